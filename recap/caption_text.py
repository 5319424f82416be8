"""What all checks of captions share: how a text is read, and what in it is wrong whatever the image shows.

What is read here may be hostile, so of every text only a beginning is read, and no pattern takes more than linear time.
"""

import html
import re
import unicodedata

from recap.sample import visible

MAX_READ = 6000
"""Characters of a text that are read: more than a caption of 300 words has, or a writer is shown."""
MAX_WORD = 20
"""Letters that a word may have on average before a caption is too long, however few its words."""

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
QUOTED = re.compile(r'“[^“”]*”|"[^"]*"')
SENTENCE_END = re.compile(r"[.!?](?:\s|$)")


def normal(text: str) -> str:
    """The beginning of a text in lower case on one line, without the tricks that Unicode and HTML allow."""
    text = unicodedata.normalize("NFKC", html.unescape(visible(text[:20 * MAX_READ])[:MAX_READ]))
    return visible(text.casefold().replace("’", "'").replace("‘", "'"))


def words_of(text: str) -> list[str]:
    """The words of a normal text; a dog's is a dog."""
    return [word.removesuffix("'s") for word in WORD.findall(text)]


def unquoted(text: str) -> str:
    """A text without its quotations, for writing in an image may say anything; a text that is all one is itself."""
    return text if QUOTED.fullmatch(text.strip()) else QUOTED.sub('""', text)


def is_wordless(caption: str) -> bool:
    """Whether nothing in a caption could be a word."""
    return not any(letter.isalpha() for letter in caption)


def length_faults(caption: str, fewest: int, most: int) -> list[str]:
    """`too_short`, `too_long`, for the number of words; too long are a few endless ones as well."""
    num_words = len(WORD.findall(caption))
    found = {"too_short": num_words < fewest, "too_long": num_words > most or len(caption) > most * MAX_WORD}
    return [fault for fault, is_found in found.items() if is_found]


# --- what a chat model says ----------------------------------------------------------------------------------------


def is_chatter(text: str) -> bool:
    """Whether a normal text speaks of a model, its task or its sources, or holds what is left of an answer's form."""
    return CHATTER.search(unquoted(text)) is not None


def is_refusal(text: str) -> bool:
    """Whether a normal text refuses or apologises."""
    return REFUSAL.search(unquoted(text)) is not None


CHATTER = re.compile(r"""
    ^[\s"]*(?:sure|certainly|of\ course|okay|ok|absolutely|great|alright)\b\s*[!,.:]
  | \b(?:here(?:'s|\ is|\ are)|the\ following\ (?:is|are))\ (?:the|your|a|an|my|some|three|two)\ (?:[\w-]+,?\ ){0,4}
      (?:captions?|descriptions?|json|summary|answers?|alt[-\ ]text)\b
  | \bi\ (?:hope|have\ (?:written|created|generated|described)|(?:will|would)\ (?:describe|write))\b
  | \blet\ me\ (?:know|describe|explain|provide|elaborate)\b | \bfeel\ free\b | \bas\ requested\b
  | \bwould\ you\ like\ (?:me\ to|more|to\ know|an?\ (?:more|different|longer|shorter)\ )
  | \bis\ there\ anything\ else\b | \b(?:happy|glad)\ to\ (?:help|assist|describe)\b | \bword\ count\s?:
  | (?:^|[.!?]\s+)q\s?:.{1,200}?[.!?\s]a\s?:
  | \bas\ an?\ (?:ai|artificial|(?:large\ )?language|assistant)\b
  | \b(?:language|vision)\ models?\b | \bai\ (?:model|assistant|language)\b | \byou\ cannot\ see\b
  | \bmy\ (?:task|instructions|answer|response|training)\b
  | \b(?:based\ on|according\ to|given|judging\ (?:by|from))\ the\ (?:\w+\ )?
      (?:facts?|findings?|data|information|detections?|objects|tags|descriptions?|models?|experts?|metadata|captions?)\b
  | \bthe\ (?:provided|given|supplied|above)\ (?:facts?|findings?|data|information|objects|tags|text|image)\b
  | \bthe\ (?:facts|findings|detections)\b | \bdetected\ (?:objects?|by|with)\b | \bobject\ detect
  | \bbounding[\ -]box | \bconfidence\ (?:scores?|levels?|of\ 0)\b | \bwith\ a\ (?:score|confidence)\ of\b
  | \balt(?:ernative)?[-\ _]text\b | \b(?:image|revised|rewritten|requested|final)\ captions?\b | \bcaptioning\ model
  | \b(?:this|my|your|following)\ captions?\b
  | \bthe\ captions?\ (?:describes?|must|should|would|combines?|based|(?:for|of)\ (?:the|this)\ (?:image|photo))\b
  | ```|\*\*|[{}]|^\s*[#*•](?!\s?\d)|</?[a-z]+>
  | ^\s*(?:short|long|rich|(?:\w+\ ){0,2}(?:captions?|output|answer|descriptions?)(?:\ \d)?)\s*:
  | (?:^|[.!?]\s+)\(?(?:please\ )?note(?:\ that\b|:) | \bplease\ note\b
    """, re.VERBOSE)
REFUSAL = re.compile(r"""
    \bi\ (?:cannot|can't|can\ not|could\ not|couldn't|am\ unable|am\ not\ able|am\ sorry|apologi[sz]e|do\ not\ have|
      don't\ have|don't\ see|do\ not\ see|won't|will\ not)\b
  | \bi'm\ (?:sorry|unable|not\ able|afraid)\b | ^\s*(?:sorry|apologies|unable\ to)\b
  | \b(?:unable|not\ able)\ to\ (?:describe|assist|help|provide|generate|comply|fulfil|see\ (?:the|this|an|any)\ image|
      view\ (?:the|this)\ image|(?:access|determine\ the\ content))
  | \bcannot\ (?:assist|help\ with|comply|provide|fulfil|be\ described|describe)
  | \bno\ (?:image|facts|information|data)\ (?:(?:was|is|were|are|has\ been|have\ been)\ )?
      (?:provided|given|attached|available|supplied)\b
  | \b(?:please|could\ you|can\ you)\ (?:please\ )?(?:provide|upload|share|attach|send|re-?upload|re-?send)
      (?:\ \w+){0,3}\ (?:image|picture|photo|file|link|it)\b
  | \b(?:image|picture|photo)\ (?:cannot|can't|can\ not|could\ not|couldn't)\ be
      \ (?:displayed|loaded|shown|seen|viewed|accessed|processed|found|opened|rendered)\b
  | \b(?:image|picture|photo)\ (?:did\ not|didn't|does\ not|doesn't|has\ not|hasn't|failed\ to|won't)(?:\ seem\ to)?
      (?:\ have)?\ (?:loaded|load|come\ through|uploaded|upload|been\ (?:loaded|uploaded|attached))\b
  | \bthe\ (?:image|picture|photo)\ is\ (?:not\ (?:available|attached|loading)|unavailable|missing\b\W*$)
  | \bi(?:'m\ not|\ am\ not|\ do\ not\ feel|\ don't\ feel)\ comfortable\b
  | \bi\ need\ (?:more|additional)\ (?:context|information|details)\b
  | \bi(?:'m|\ am)\ just\ an?\ (?:computer|program)\b | \btext-based\ (?:model|ai|assistant)\b
  | \blo\ siento\b | \bno\ puedo\ (?:ver|describir|ayudar|proporcionar|identificar|acceder)\b
  | ^\W*(?:很?抱歉|对不起|對不起) | (?:无法|無法|不能)(?:查看|看到|看見|描述|识别|識別|提供|生成|帮|幫)
    """, re.VERBOSE)

# --- repetition ----------------------------------------------------------------------------------------------------

MIN_DISTINCT = 0.25
"""Share of distinct words below which a text of 20 words or more repeats itself."""
MAX_PERIOD = 40
"""Words in the longest run whose repetition is looked for."""
LONG_LOOP = 14
"""Words that are said again before a run of over eight counts as a loop."""
NUMBERED = 2
"""How many times as long a loop must be that has other numbers every time: `person 1, person 2, …`."""
STUTTER = re.compile(r"([^\s\d]{1,4}?)(?:\s?\1){7,}")
"""A letter or a sign, or up to four together, eight times in a row: `hahahaha…`, `. . . .`; a number may have zeros."""


def repeats(text: str) -> bool:
    """Whether a normal text says a sentence twice, runs in a loop, stutters, or has hardly a word that is new."""
    sentences = [" ".join(words_of(sentence)) for sentence in SENTENCE_END.split(text)]
    told = [sentence for sentence in sentences if sentence.count(" ") >= 2]
    words = words_of(text)
    unnumbered = [word for word in words if not word.isdecimal()]
    return (len(set(told)) < len(told) or _is_in_a_loop(words) or STUTTER.search(text) is not None
            or (len(words) >= 20 and len(set(words)) < MIN_DISTINCT * len(words))
            or (len(unnumbered) < len(words) and _is_in_a_loop(unnumbered, NUMBERED)))


def _is_in_a_loop(words: list[str], times: int = 1) -> bool:
    return any(_is_looped(words, period, times) for period in range(1, MAX_PERIOD + 1))


def _is_looped(words: list[str], period: int, times: int) -> bool:
    """Whether a run of so many words comes four times in a row; of three to eight, three times; of more, twice, if that
    is LONG_LOOP words again: a list of things in the same place says nine words twice. Or `times` as many words again.
    """
    needed, run = times * (period * (3 if period <= 2 else 2) if period <= 8 else max(period, LONG_LOOP)), 0
    for before, word in zip(words, words[period:], strict=False):
        run = run + 1 if before == word else 0
        if run == needed:
            return True
    return False
