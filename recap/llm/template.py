"""Captions from facts by a template: deterministic, offline, and it can't make anything up."""

import html
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recap.facts import Facts, Object
from recap.filters import Number, addresses_a_model
from recap.llm import Scene, Written
from recap.nouns import NOUNS, PLURAL_ONLY, WIDER, Mention, Noun, mentions

MAX_CHARACTERS = {"short": 160, "long": 480, "rich": 1600}
MAX_GROUPS = {"short": 3, "long": 6, "rich": 12}
MAX_LABEL, MAX_ALT_TEXT = 40, 120
FILLING = 0.6
"""A box of this share of the picture has no place in it: it is the picture."""
SIZES = ((0.01, "tiny"), (0.1, "small"), (0.4, "large"), (1.0, "very large"))
"""What a box is called up to which share of the picture."""
SIZE_WORD = re.compile(r"(?:tiny|small|little|big|large|huge)\b", re.I)
APART = 0.12
"""Centres closer than this share of the picture are neither left nor right, neither above nor below."""

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
PLURALS = {"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "knife": "knives",
           "sheep": "sheep", "fish": "fish", "foot": "feet", "tooth": "teeth", "shelf": "shelves", "leaf": "leaves"}
PAIRS = {"scissors", "skis", "glasses", "trousers", "jeans", "shorts"}
UNCOUNTABLE = {"broccoli", "grass", "water", "sand", "snow", "bread", "hair", "rice", "food"}

FILE_NAME = re.compile(
    r"https?:|www\.|[/\\_]|\d{3}|\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|pdf|html?|com|net|org)\b", re.I)
SHOP_TALK = re.compile(
    r"[|$€£%™®©#]|\b(?:buy|shop|store|sale|free|stock|price|deals?|discount|shipping|download|templates?|slide|vector|"
    r"icon|clip ?art|wallpaper|poster|print|set of|size|pack|review|how to|best|by|item|for sale|new|screenshot|image|"
    r"photos?|picture|thumb|banner|logo|untitled|online|royalty|edition)\b", re.I)
NOT_TEXT = ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that no caption holds. Cf is not among them, as it joins emoji and the letters of some scripts."""
WORD = re.compile(r"[\w’'-]+")
BIDI_AND_INVISIBLE = re.compile(r"[\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")


class TemplateWriter:
    """Facts in English sentences. The same facts always give the same captions."""

    provenance: dict[str, Any] = {"name": "template", "version": 4}
    instructions = ""

    def __init__(self, styles: Iterable[str]) -> None:
        """`short` is one sentence, `rich` a paragraph; a style of any other name gets one or two detailed sentences."""
        self.styles = list(styles)

    def prepare(self, scenes: Iterable[Scene], total: int) -> dict[str, Any]:
        """Nothing takes long."""
        return {}

    def write(self, scene: Scene) -> Written:
        """One caption per style: never empty, bounded in length, one line, no control characters."""
        content = _Content.of(scene.facts, (scene.width, scene.height))
        forms = {"short": _short, "rich": _rich}
        return Written({style: _bounded(forms.get(style, _long)(content),
                                        MAX_CHARACTERS.get(style, MAX_CHARACTERS["long"])) for style in self.styles})


# --- the three forms -----------------------------------------------------------------------------------------------


def _short(scene: "_Content") -> list[str]:
    if scene.groups:
        shown = scene.groups[:MAX_GROUPS["short"]]
        others = ["other objects"] if len(scene.groups) > len(shown) else []
        return [_sentence(_joined([_counted(group.label, len(group.seen)) for group in shown] + others))]
    if scene.said:
        return scene.said[:1]
    return [f"A picture of {_joined(scene.tags[:3])}."] if scene.tags else ["An image."]


def _long(scene: "_Content") -> list[str]:
    said = scene.said[:1]
    found = [*_objects(scene.groups, MAX_GROUPS["long"], said), *_tags(scene, 6), *_sizes(scene)][:2]
    return [*said, *found] or _unknown(scene)


def _rich(scene: "_Content") -> list[str]:
    said = scene.said[:3]
    found = [*said, *_objects(scene.groups, MAX_GROUPS["rich"], said), *_sizes(scene), *_relations(scene),
             *_tags(scene, 12)]
    return [*(found or _unknown(scene)), *_writing(scene), *_hearsay(scene)]


def _unknown(scene: "_Content") -> list[str]:
    return _writing(scene) or ["An image whose content was not recognised."]


def _objects(groups: list["_Group"], limit: int, said: list[str]) -> list[str]:
    """What there is; of what was said already, where it is: `A cat on a bed. The cat is on the left.`"""
    told = [group for group in groups[:limit] if _is_told(group, said)]
    shown = [_placed(group) for group in groups[:limit] if group not in told]
    others = ["other objects"] if len(groups) > limit else []
    return [*([_sentence(_joined([_where(group) for group in told]))] if told else []),
            *([f"The picture shows {_joined(shown + others)}."] if shown + others else [])]


def _is_told(group: "_Group", said: list[str]) -> bool:
    """Whether sentences name as many things of a group: who hears of them again in another way, counts them twice."""
    words, label = WORD.findall(" ".join(said).lower()), WORD.findall(group.label.lower())
    if kinds := NOUNS.get(tuple(label), Noun("")).kinds:
        named = sum(_count(mention, words) for mention in mentions(words)
                    if any(kinds & WIDER[kind] for kind in mention.noun.kinds))
    else:
        named = sum(words[place:place + len(label)] == label for place in range(len(words)))
    return named >= len(group.seen)


def _count(mention: Mention, words: list[str]) -> int:
    """How many things a noun names: of an uncounted plural none, as nobody can say whether it is of all."""
    is_one = mention.start > 0 and words[mention.start - 1] in ("a", "an")  # sheep
    if is_one or not mention.noun.plural or mention.noun.lemma in PLURAL_ONLY:
        return 1
    number = Number.before(mention, words)
    return number.value if number else 0


def _sizes(scene: "_Content") -> list[str]:
    """`The dog is large and the red circles are small.` Unless the label says it, or the thing fills the picture."""
    clauses = []
    sized = [group for group in scene.groups if not (SIZE_WORD.match(group.label) or _fills(group))]
    for group in sized[:4]:
        sizes = list(dict.fromkeys(_size(seen.area) for seen in group.seen))
        size = sizes[0] if len(sizes) == 1 else "of several sizes"
        clauses.append(f"{_again(group)} {size}")
    return [_sentence(_joined(clauses))] if clauses else []


def _relations(scene: "_Content") -> list[str]:
    """Where the largest objects are to one another, of those that are one of their kind."""
    single = [group for group in scene.groups if len(group.seen) == 1 and not _fills(group)][:3]
    sentences = []
    for group, other in zip(single[1:], single, strict=False):
        here, there = group.seen[0], other.seen[0]
        across, down = here.x - there.x, here.y - there.y
        if max(abs(across), abs(down)) < APART:
            continue
        side = ("to the right of" if across > 0 else "to the left of") if abs(across) >= abs(down) else (
            "below" if down > 0 else "above")
        sentences.append(_sentence(f"{_again(group)} {side} the {other.label}"))
    return sentences


def _tags(scene: "_Content", limit: int) -> list[str]:
    return [f"The picture has to do with {_joined(scene.tags[:limit])}."] if scene.tags else []


def _writing(scene: "_Content") -> list[str]:
    quoted = [f"“{line}”" for line in scene.writing[:3]]
    return [f"It bears the words {_joined(quoted)}."] if quoted else []


def _hearsay(scene: "_Content") -> list[str]:
    return [f"Its caption on the web reads: “{text}”." for text in scene.hearsay[:1]]


# --- facts in order ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Seen:
    """Where an object is: its centre and area, as shares of the picture."""

    x: float
    y: float
    area: float

    @property
    def row(self) -> int:
        """0 in the top third of the picture, 1 in the middle, 2 at the bottom."""
        return min(int(self.y * 3), 2)

    @property
    def column(self) -> int:
        """0 in the left third of the picture, 1 in the middle, 2 on the right."""
        return min(int(self.x * 3), 2)


@dataclass(frozen=True, slots=True)
class _Group:
    label: str
    seen: list[_Seen]


@dataclass(frozen=True, slots=True)
class _Content:
    """The facts as the template uses them: cleaned, grouped, the most striking first."""

    groups: list[_Group]
    tags: list[str]
    said: list[str]
    writing: list[str]
    hearsay: list[str]

    @classmethod
    def of(cls, facts: Facts, size: tuple[int, int]) -> "_Content":
        groups: dict[str, list[_Seen]] = {}
        for found in facts.objects:
            if label := _clean(found.label, MAX_LABEL):
                groups.setdefault(label, []).append(_seen(found, size))
        largest_first = sorted(groups.items(), key=lambda item: _rank(item[0], item[1]))
        tags = [_clean(tag.label, MAX_LABEL) for tag in sorted(facts.tags, key=lambda tag: (-tag.score, tag.label))]
        said = [_clean(sentence.text, 300) for sentence in facts.sentences if sentence.reliable]
        heard = [_clean(html.unescape(said.text), MAX_ALT_TEXT) for said in facts.sentences
                 if not said.reliable and looks_like_words(said.text)]
        return cls(
            groups=[_Group(label, sorted(seen, key=lambda one: (one.row, one.column, one.x)))
                    for label, seen in largest_first],
            tags=[tag for tag in tags if tag and tag not in groups],
            said=[_sentence(text) for text in said if text],
            writing=[line for text in facts.text if (line := _clean(text, MAX_LABEL))],
            hearsay=[text for text in heard if text],
        )


def _rank(label: str, seen: list[_Seen]) -> tuple[int, int, int, str]:
    """Large things before small ones, as `SIZES` has them; then as one reads, by the nine parts of the picture.

    An order that can be seen: by areas themselves, things of a size would come in an order that no captioner can learn.
    """
    band = next((place for place, (limit, _) in enumerate(SIZES) if sum(one.area for one in seen) <= limit), len(SIZES))
    first = min(seen, key=lambda one: (one.row, one.column))
    return -band, first.row, first.column, label


def _seen(found: Object, size: tuple[int, int]) -> _Seen:
    x0, x1 = (min(max(x / size[0], 0.0), 1.0) for x in found.box[::2])
    y0, y1 = (min(max(y / size[1], 0.0), 1.0) for y in found.box[1::2])
    return _Seen((x0 + x1) / 2, (y0 + y1) / 2, abs(x1 - x0) * abs(y1 - y0))


def looks_like_words(text: str) -> bool:
    """Whether alt-text may speak of the picture: words, and no file name, address, number, shop talk or order."""
    text = html.unescape(text)
    if FILE_NAME.search(text) or SHOP_TALK.search(text) or addresses_a_model(text):
        return False
    letters = sum(char.isalpha() for char in text)
    words = [word for word in text.split() if sum(char.isalpha() for char in word) > 1]
    # Scripts that put no space between words are judged by their letters.
    return letters >= 0.7 * len(text.replace(" ", "")) and (len(words) > 1 or (letters > 5 and not text.isascii()))


# --- English -------------------------------------------------------------------------------------------------------


def _placed(group: _Group) -> str:
    """`two red circles at the top left and on the right`."""
    name = _counted(group.label, len(group.seen))
    if _fills(group):
        return f"{name} filling most of it"
    return f"{name} {_places(group)}"


def _where(group: _Group) -> str:
    """`the red circles are at the top left and on the right`."""
    return f"{_again(group)} {'all over the picture' if _fills(group) else _places(group)}"


def _again(group: _Group) -> str:
    """`the red circles are`, of what has been brought in."""
    several = len(group.seen) > 1
    verb = "are" if several or group.label in PAIRS else "is"
    return f"the {_plural(group.label) if several else group.label} {verb}"


def _places(group: _Group) -> str:
    places = list(dict.fromkeys(_place(seen) for seen in group.seen))
    return _joined(places) if len(places) <= 3 else "in many places"


def _fills(group: _Group) -> bool:
    return any(seen.area >= FILLING for seen in group.seen)


def _place(seen: _Seen) -> str:
    """One of the nine parts of the picture."""
    row, column = ("top", "", "bottom")[seen.row], ("left", "", "right")[seen.column]
    if row and column:
        return f"at the {row} {column}"
    return f"at the {row}" if row else f"on the {column}" if column else "in the centre"


def _size(area: float) -> str:
    return next((name for limit, name in SIZES if area <= limit), SIZES[-1][1])


def _counted(label: str, count: int) -> str:
    number = NUMBERS[count] if count < len(NUMBERS) else str(count)
    if label in UNCOUNTABLE:
        return label
    if label in PAIRS:
        return f"a pair of {label}" if count == 1 else f"{number} pairs of {label}"
    if count > 1:
        return f"{number} {_plural(label)}"
    return f"{'an' if re.match(r'(?!uni|eu|one)[aeiou]', label, re.I) else 'a'} {label}"


def _plural(label: str) -> str:
    """Of the last word: `wine glass` → `wine glasses`."""
    start, space, noun = label.rpartition(" ")
    if noun in PAIRS or noun in UNCOUNTABLE:
        return label
    if noun in PLURALS:
        noun = PLURALS[noun]
    elif re.search(r"(?:s|x|z|ch|sh)$", noun):
        noun += "es"
    elif re.search(r"[^aeiou]y$", noun):
        noun = f"{noun[:-1]}ies"
    else:
        noun += "s"
    return f"{start}{space}{noun}"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sentence(text: str) -> str:
    """With a capital first letter and a stop at the end."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?", "…", "。")) else ".")


def _clean(text: str, limit: int) -> str:
    """One line without control or invisible characters, of at most `limit` characters, cut between words if need be."""
    visible = BIDI_AND_INVISIBLE.sub("", text)
    text = " ".join("".join(" " if unicodedata.category(char) in NOT_TEXT else char for char in visible).split())
    if len(text) <= limit:
        return text
    return text[:limit - 1].rsplit(" ", 1)[0].rstrip(" ,;:") + "…"


def _bounded(sentences: list[str], limit: int) -> str:
    """The sentences that fit, in order; the first always, cut where it must be."""
    text = _clean(sentences[0], limit)
    for sentence in sentences[1:]:
        if len(text) + 1 + len(sentence) <= limit:
            text = f"{text} {sentence}"
    return text
