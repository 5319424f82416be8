"""A detector's labels, found in what prompts say: by their names, and by everyday nouns for the same things."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from recap.caption_text import normal, unquoted
from recap.filters import ABSENT, ENGLISH, FREE, NUMBERS, TOKEN, UNITS, VAGUE, Number
from recap.nouns import AMBIGUOUS, NOUNS, WIDER, Mention, Noun, plural_of

NAMES = {"mouse": "computer mouse", "computer keyboard": "keyboard", "tv remote": "remote", "tv monitor": "tv",
         "tvmonitor": "tv", "diningtable": "dining table", "pottedplant": "potted plant", "sports ball": "ball"}
"""What detectors and benchmarks call a thing → what we call it."""
NEVER_SAID = {"mouse"}
"""Labels that a prompt means something else by: COCO's mouse is a computer's."""
DOUBTFUL = frozenset(AMBIGUOUS.split())
ARTICLES = {"a", "an"}
ONE = {"one", "1", "single"}
DEFINITE = {"the", "this", "that", "these", "those", "his", "her", "its", "their"}
DETERMINERS = ARTICLES | ONE | DEFINITE | NUMBERS.keys() | {"some", "several", "many"}
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
"""GenEval's ten."""
COLOURS: tuple[Colour, ...] = get_args(Colour)


@dataclass(frozen=True, slots=True)
class Named:
    """A thing that a text says is there."""

    mention: Mention
    """Where among the text's words."""
    labels: frozenset[str]
    """What a detector may call it; empty where it has no label for it."""
    number: int | None
    """How many of them, if the text says so exactly."""
    is_new: bool
    """Whether a number or `a` brings it in."""
    is_again: bool
    """Whether `the` or `its` says that it is known."""


class Vocabulary:
    """What a detector has labels for.

    A label is named by itself, its plural, and nouns for the same thing (`man` for person, `sofa` for couch) or for a
    special case of it (`duck` for bird); not by what may be something else (`chicken`, `desk` where there is a dining
    table).
    """

    def __init__(self, labels: Iterable[str]) -> None:
        self._labels: dict[str, set[str]] = {}
        self._forms: dict[tuple[str, ...], Noun] = {}
        for label in filter(_name, labels):
            name = _name(label)
            self._labels.setdefault(name, set()).add(label)
            also = {alias for alias, meant in NAMES.items() if meant == name}
            for known in {name, _spoken(label), *also} - NEVER_SAID:
                for form in {known, plural_of(known), f"{known}s"}:  # benchmarks have four benchs, three persons
                    plural = form != known or bool((noun := NOUNS.get(tuple(form.split()))) and noun.plural)
                    self._forms[tuple(form.split())] = Noun(name, plural, form not in DOUBTFUL, frozenset({name}))
        self._kinds: dict[str, set[str]] = {}
        for name in self._labels:
            for kind in _claims(NOUNS.get(tuple(name.split()))):
                self._kinds.setdefault(kind, set()).add(name)
        self._longest = max(map(len, self._forms.keys() | NOUNS.keys()))

    def labels_of(self, name: str) -> frozenset[str]:
        """The labels for a class that a benchmark names; none where the detector lacks it."""
        words = tuple(_name(name).split())
        noun = self._forms.get(words) or NOUNS.get(words)
        return self._labels_of(noun) if noun else frozenset()

    def find(self, words: list[str]) -> list[Named]:
        """The things that a text, by its `words_of`, says are there, in order; not those of which it says they aren't,
        nor the dog of a dog bowl.
        """
        found = list(self._mentions(words))
        modifiers = {one.start for one, after in pairwise(found) if one.end == after.start and not one.noun.plural}
        return [self._named(each, words) for each in found
                if each.start not in modifiers and not _is_absent(words[max(each.start - 3, 0):each.start])
                and (each.noun.sure or _is_a_thing(each, words))]

    def _mentions(self, words: list[str]) -> Iterable[Mention]:
        start = 0
        while start < len(words):
            runs = [tuple(words[start:end]) for end in range(start + 1, min(start + self._longest, len(words)) + 1)]
            run = next((run for run in reversed(runs) if run in self._forms or run in NOUNS), ())
            noun = self._forms.get(run) or NOUNS.get(run)
            if noun and noun.kinds:  # an idiom has none
                yield Mention(noun, start, start + len(run))
            start += len(run) or 1

    def _named(self, mention: Mention, words: list[str]) -> Named:
        number, determiner = Number.before(mention, words), _determiner(mention, words)
        value = number.value if number else 1 if determiner in ONE and not mention.noun.plural else None
        return Named(mention, self._labels_of(mention.noun), value, is_new=bool(value) or determiner in ARTICLES,
                     is_again=not value and determiner in DEFINITE)

    def _labels_of(self, noun: Noun) -> frozenset[str]:
        if noun.lemma in self._labels:
            return frozenset(self._labels[noun.lemma])
        names = [self._names_of(kind, noun.lemma) for kind in _claims(noun)]
        return frozenset(label for several in names for name in several for label in self._labels[name]
                         ) if all(names) else frozenset()

    def _names_of(self, kind: str, lemma: str) -> set[str]:
        """The names of labels for a kind: its own, or else of what is more general, whatever it may be counted among.

        A label that is but one word for a kind (dining table, of tables) is found for the kind's own name only.
        """
        if same := {name for name in self._kinds.get(kind, ()) if kind in (name, lemma)}:
            return same
        wider = {each for each in WIDER.get(kind, ()) if each in self._labels}
        is_covered = all(any(each in WIDER[one] or one in WIDER[each] for one in wider)
                         for each in WIDER.get(kind, frozenset()) - {kind})
        return wider if is_covered else set()


def words_of(text: str) -> list[str]:
    """A prompt's words and punctuation in lower case, without quotations: writing in a picture is no thing in it."""
    return [token if (token,) in NOUNS else token.removesuffix("'s") for token in TOKEN.findall(unquoted(normal(text)))]


def _spoken(label: str) -> str:
    return " ".join(re.sub(r"[_/,;()]", " ", normal(label)).split())


def _name(label: str) -> str:
    return NAMES.get(_spoken(label), _spoken(label))


def _claims(noun: Noun | None) -> frozenset[str]:
    """The kinds that a noun says are there: that of its name, a person for who does a thing (a surfer also bears out a
    surfboard), or else all that it may be a word for.
    """
    if noun is None:
        return frozenset()
    return next((frozenset({kind}) for kind in (noun.lemma, "person") if kind in noun.kinds), noun.kinds)


def _is_absent(before: list[str]) -> bool:
    return not ABSENT.isdisjoint(before) or not FREE.isdisjoint(pairwise(before))


def _determiner(mention: Mention, words: list[str]) -> str:
    """What stands before a thing and at most two adjectives: `a`, `one`, `the`; empty for nothing, or `about one`."""
    for place in range(mention.start - 1, max(mention.start - 4, -1), -1):
        if words[place] in DETERMINERS:
            return "" if words[place] in ONE and VAGUE.intersection(words[max(place - 1, 0):place]) else words[place]
        if words[place] in ENGLISH or words[place] in UNITS or not words[place][0].isalpha():
            break
    return ""


def _is_a_thing(mention: Mention, words: list[str]) -> bool:
    """Whether a word that may be an adjective or a verb stands like a noun: `an orange`, not `an orange cat`."""
    before, after = words[:mention.start], words[mention.end:mention.end + 1]
    if before and before[-1] in COLOURS:
        before.pop()
    return (" ".join(words[mention.start:mention.end]) in DOUBTFUL and bool(before) and before[-1] in DETERMINERS
            and (not after or after[0] in ENGLISH or not after[0][0].isalpha()))
