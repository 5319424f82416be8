"""Words of a caption, as coco-caption counts them: Penn Treebank tokens in lower case without punctuation.

BLEU, ROUGE, CIDEr and METEOR are published on what Stanford's PTBTokenizer (CoreNLP 3.4.1, Java) makes of a caption;
another tokenizer gives other figures. This one needs no Java. It was written from what that one does with test strings
and agrees with it on nearly all real captions; where it does not, it is on things like smileys, markup and telephone
numbers (tests/test_eval_captions.py holds the share).
"""

import re
import unicodedata

PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--",
                         "...", ";"])
"""What coco-caption drops. It compares after lower-casing, so that brackets stay: as `-lrb-` they are words."""

# Abbreviations keep their full stop, except where a letter follows at once. (So does any word before a comma.)
_ALWAYS = """mr mrs ms dr prof st ave blvd rd ct rt jr sr bros inc co corp ltd plc etc vs gen col capt lt sgt maj cmdr
adm gov sen rep rev hon pres messrs mme mlle jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu
thurs fri ala ariz calif colo conn fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc
wyo ft dept est ext tel univ assn mt al cf cie sq pty ste bldg msgr supt insp det pvt cpl spc atty asst comdr mfg intl
natl adj adv elec ph.d"""
_CAPITALISED = "Ark Del Ill La Mass Miss Ore Pa Tex Wash"
_BEFORE_NUMBERS = "no nos fig figs pp art ca op"
_SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "lemme": "lem me", "gimme": "gim me",
          "wanna": "wan na"}
_WRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "…": "...",
            "–": "--", "—": "--", "―": "--", "£": "#", "€": "$", "¤": "$", "¢": "cents", "½": "1/2", "¼": "1/4",
            "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "&amp;": "&", "&lt;": "<", "&gt;": ">",
            "---": "--", "...": "...", **dict.fromkeys(["&nbsp;", "&quot;", "&apos;", *"\"“”‘’‛«»‹›"], "''")}
# Accents and vowel signs belong to the letter before; numerals that are no digits (², Ⅳ, ①) are no letters.
_MARKS = "".join(chr(code) for code in range(0x300, 0xE50) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
_L = f"(?:[^\\W\\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u218f\u2460-\u24ff\u2776-\u2793]|[{_MARKS}])"
_SYMBOL = "[!-/:-@\\[-`{-~\u00a1-\u00bf\u00d7\u00f7\u02c2-\u02df\u2016-\u201f\u2020-\u2023\u2026\u2013-\u2015" \
          "\u2030-\u203b\u2039\u203a\u203e\u2044\u2070-\u209c\u20a4\u20ac\u2100-\u214f\u2153-\u215e\u2190-\u27bf" \
          "\u27c0-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0-\uffe6]"

# The characters of RFC 3986 but brackets; a full stop, comma, … belongs to it only if more follows.
_IN_URL = r"(?:[\w~:/#@$&'*+;=%]|[-.,!?]+(?=[\w~:/#@$&'*+;=%]))"


def _any(words: str) -> str:
    return "(?:" + "|".join(re.escape(word) for word in sorted(words.split(), key=len, reverse=True)) + ")"


# Tried in this order at every place of the text; what no line fits is passed over (emoji, control characters).
# Repetitions before a mark that may not come are bounded (by 63, a host name's limit): time stays linear in length.
_TOKEN = re.compile(rf"""
    (?P<plain> [A-Za-z]+ (?= \s|$|,\s ) )                                  # most words, at once
  | (?P<tag> </?[A-Za-z][\w:.-]{{0,63}}
      (?:\s+[\w:.-]{{1,63}}(?:\s*=\s*(?:"[^"]{{0,199}}"|'[^']{{0,199}}'|[^\s"'>]{{1,199}}))?){{0,9}}\s*/?>
    | <[!?][A-Za-z-][^>]{{0,199}}> )
  | (?P<url> (?i:https?://{_IN_URL}+
    | (?: www\.(?:[\w-]{{1,63}}\.){{1,9}}[a-z]{{2,4}} | (?:[^\W_]{{1,63}}\.){{1,9}}(?:com|net|org|edu)(?![a-z]) )
      (?: /{_IN_URL}{{2,}} )? ) )
  | (?P<email> [A-Za-z0-9][\w.%+-]{{0,63}}@[\w-]{{1,63}}(?:\.[\w-]{{1,63}}){{0,9}} )
  | (?P<handle> \#{_L}+ | @[A-Za-z_]\w* )
  | (?P<smiley> [:;=]-?[()] )
  | (?P<fraction> \d{{1,4}}[\s-]\d{{1,4}}/\d{{1,4}} )
  | (?P<entity> &(?:amp|lt|gt|quot|nbsp|apos);|&\#\d+; )
  | (?P<aux> ['’](?i:ll|re|ve|[smd])(?!{_L}) | (?i:n['’]t)(?!{_L}) )
  | (?P<elided> ['’](?i:n['’] | t(?=is\b|was\b) | (?:em|n|cause|til)(?![A-Za-z])) | ['’]\d\ds?(?!\w) | [Oo]l['’](?!\w) )
  | (?P<negated> [A-Za-z]{{1,63}}? (?= (?i:n['’]t)(?!{_L}) ) )
  | (?P<prefixed> (?:[dDoOlL]['’]|[Mm]a['’](?=am\b)|[Yy]['’](?=all\b)|[Cc]['’](?=est\b))
      {_L}[A-Za-z0-9]*(?:-[A-Za-z0-9]+)* )
  | (?P<stopped> (?:{_L}|\d){{1,63}}(?:[.-](?:{_L}|\d){{1,63}}){{0,9}}\.(?=[,;:]) )
  | (?P<slashed> (?: [A-Za-z]+(?:-[A-Za-z]+)* | [A-Za-z0-9]+ )(?:/[A-Za-z0-9]+){{1,2}} )
  | (?P<hyphened> [A-Za-z0-9]+(?:-[A-Za-z0-9]+)*_[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)*
    | [A-Za-z0-9][A-Za-z0-9.,]{{0,63}}(?:-(?:(?:[A-Za-z]\.){{2,}}|(?:{_L}|\d)+))+ | {_L}+(?:-{_L}+)+
    | [A-Za-z0-9]+\.(?i:jpe?g|png|gif|bmp|html?|pdf|txt|zip|mp3)\b )
  | (?P<abbreviated> (?: (?i:{_any(_ALWAYS)}) | {_any(_CAPITALISED)} | (?i:{_any(_BEFORE_NUMBERS)})(?=\.\s*\d) )\.
      (?!{_L}) )
  | (?P<acronym> (?:[A-Za-z]\.)+(?![A-Za-z]) )
  | (?P<joined> [A-Z]{{1,63}}(?:[&+][A-Z]{{1,63}}){{1,9}}(?![a-z]) | b&b\b )
  | (?P<number> [+-]?\d*(?:[.,:]\d+)+ | [+-]\d+ | \d++(?!{_L}) )
  | (?P<dollar> \b(?:US|HK|NT|A|C|S|R)\$ )
  | (?P<word> {_L}(?:{_L}|\d)*(?:[.!?]{_L}(?:{_L}|\d)*)* | \d(?:{_L}|\d)* )
  | (?P<run> [?!]+ | \.{{3,}} | -{{2,}} | \*+ | _+ | ['’]{{2}} | ``)
  | (?P<symbol> {_SYMBOL} )
""", re.VERBOSE)


def tokenize(caption: str) -> list[str]:
    """The words of a caption, in lower case, without punctuation.

    Args:
        caption: any text; line ends count as spaces.

    Returns:
        Tokens, none of them empty or with white space in it; no tokens if the caption has no words.
    """
    text = caption.replace("\u00ad", "")
    found = (token for match in _TOKEN.finditer(text) for token in _written(match.group()))
    return [token for token in found if token not in PUNCTUATION]


def _written(matched: str) -> list[str]:
    """What the tokenizer writes for a piece of text: mostly the same, in lower case."""
    lowered = matched.lower()
    if lowered.isalpha():
        return _SPLIT[lowered].split() if lowered in _SPLIT else [lowered]
    written = _WRITTEN.get(lowered) or _WRITTEN.get(lowered[:3]) or lowered
    if lowered[0] in ":;=" and lowered[-1] in "()":
        written = lowered[:-1] + _WRITTEN[lowered[-1]]
    elif len(written) > 1 and written[-1] not in "’'" and not written[1].isdigit():
        written = written.replace("’", "'")
    return written.split()
