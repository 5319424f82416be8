"""Words read back: what a caption or a prompt says of a scene, and how much of it is true.

Reads the world's own texts, and whatever a stitcher or a captioner makes of its words: shapes brought in by `a`, a
number or no article at all, with colour, size and place; a place too many is wrong. `the` speaks of a shape again: that
is no fact anew, but wrong where there is no such shape, as is a relation (`the red ring is below the bar`) that does
not hold; put otherwise (`below the bar lies the ring`) relations are passed over. The words for backgrounds are none of
those for shapes, so they count wherever they stand. Places are the world's six; others (`on the right`) are passed
over. What is quoted is nobody's statement.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from recap.world.scene import BACKGROUNDS, COLOURS, KINDS, PATTERNS, PLACES

MAX_CHARACTERS = 4000
SIZE_WORDS = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"}
COUNT_WORDS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
               "eight": 8, "nine": 9, "ten": 10}
RELATIONS = {"above": (1, -1), "below": (1, 1), "to the left of": (0, -1), "to the right of": (0, 1)}
"""How it is said → the axis along which the first shape lies apart from the second (0: x, 1: y), and which way."""

_ANY = "|".join
SHAPE = re.compile(
    rf"(?:\b(?P<count>the|{_ANY(COUNT_WORDS)})[ -])?(?:\b(?P<size>{_ANY(SIZE_WORDS)})[ -])?"
    rf"(?:\b(?P<colour>{_ANY(COLOURS)})[ -])?\b(?P<kind>{_ANY(KINDS)})(?:es|s)?\b")
PLACE = re.compile(rf"\b(?:{_ANY(sorted(PLACES, key=len, reverse=True))})\b")
BACKGROUND = re.compile(rf"\b(?:{_ANY(BACKGROUNDS)})\b")
PATTERN = re.compile(rf"\b(?:{_ANY(PATTERNS)})\b")
RELATION = re.compile(rf"\s+(?:is|are|lies|stands)\s+({_ANY(RELATIONS)}|to)\s+")
QUOTED = re.compile(r"[“\"][^“”\"]*[”\"]")


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape as it is spoken of; None is what is not said."""

    kind: str
    colour: str | None = None
    size: str | None = None
    place: str | None = None

    @property
    def num_facts(self) -> int:
        """What is said of it: that it is there, its colour, its size, its place."""
        return 1 + sum(said is not None for said in (self.colour, self.size, self.place))


@dataclass(frozen=True, slots=True)
class Stated:
    """All that a text says."""

    things: tuple[Thing, ...]
    """Brought in, a shape each."""
    num_surplus: int
    """Places said of them beyond one for each."""
    again: tuple[Thing, ...]
    """Spoken of again."""
    relations: tuple[tuple[Thing, str, Thing], ...]
    """Of those that are spoken of again: one, how it lies, another."""
    backgrounds: tuple[str, ...]
    """Its colours, each once; so that more than one of them is false."""
    patterns: tuple[str, ...]

    @property
    def background(self) -> str | None:
        return self.backgrounds[0] if self.backgrounds else None

    @property
    def pattern(self) -> str | None:
        return self.patterns[0] if self.patterns else None


def read(text: str) -> Stated:
    """What a text says of a scene."""
    text = QUOTED.sub(" ", text[:MAX_CHARACTERS].lower())
    clauses = re.split(r"[.;]", text)
    found = [(match, places) for clause in clauses for match, places in _shapes(clause) if match["count"] != "the"]
    things = tuple(thing for match, places in found for thing in _expanded(match, places))
    num_surplus = sum(max(0, len(places) - _number(match)) for match, places in found)
    again = tuple(_thing(match) for match in SHAPE.finditer(text) if match["count"] == "the")
    relations = tuple(relation for clause in clauses for relation in _relations(clause))
    return Stated(things, num_surplus, again, relations, tuple(dict.fromkeys(BACKGROUND.findall(text))),
                  tuple(dict.fromkeys(PATTERN.findall(text))))


def _thing(match: re.Match[str], place: str | None = None) -> Thing:
    return Thing(match["kind"], match["colour"], SIZE_WORDS[match["size"]] if match["size"] else None, place)


def _relations(clause: str) -> Iterator[tuple[Thing, str, Thing]]:
    """`the red ring is below the small bar`; and where the words that say how are lost: `is to the small bar`."""
    found = list(SHAPE.finditer(clause))
    for first, second in pairwise(found):
        between = RELATION.fullmatch(clause, first.end(), second.start())
        if between and first["count"] == second["count"] == "the":
            yield _thing(first), between[1], _thing(second)


def _shapes(clause: str) -> Iterator[tuple[re.Match[str], list[str]]]:
    """The shapes of a clause, and the places said of each.

    Places follow the shapes, unless the clause opens with one: then they come before.
    """
    found = list(SHAPE.finditer(clause))
    if not found:
        return
    places_first = PLACE.search(clause[:found[0].start()]) is not None
    edges = [match.end() for match in found]
    for index, match in enumerate(found):
        if places_first:
            between = clause[edges[index - 1] if index else 0:match.start()]
        else:
            between = clause[match.end():found[index + 1].start() if index + 1 < len(found) else len(clause)]
        yield match, PLACE.findall(between)


def _expanded(match: re.Match[str], places: list[str]) -> Iterator[Thing]:
    """`two red circles at the top left and at the bottom`: two things, each in its place."""
    number = _number(match)
    for _, place in zip_longest(range(number), places[:number]):
        yield _thing(match, place)


def _number(match: re.Match[str]) -> int:
    return COUNT_WORDS[match["count"] or "one"]


# --- true or not ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Truth:
    """How a text compares with a scene, in facts: of a shape that it is there, its colour, its size, its place; of the
    background its colour and its pattern.
    """

    covered: int
    """Stated, and true."""
    wrong: int
    """Stated, and not true; what is wrong of a shape that is spoken of again, and of relations, as well."""
    total: int
    """There to be stated."""


def compare(stated: Stated, scene: Mapping[str, Any]) -> Truth:
    """Hold a text against a scene's metadata (see `Scene.metadata`).

    A thing is a shape of its kind, and of its colour where that is said. Of all ways to pair things with shapes, the
    one counts by which most is true; a thing without a shape is wrong in all that is said of it.
    """
    shapes = scene["objects"]
    right = np.array([[_num_right(thing, shape) for shape in shapes] for thing in stated.things])
    covered = int(right[linear_sum_assignment(right, maximize=True)].sum()) if right.size else 0
    wrong = sum(thing.num_facts for thing in stated.things) - covered + stated.num_surplus
    for said, true in ((stated.backgrounds, scene["background"]["colour"]),
                       (stated.patterns, scene["background"]["pattern"])):
        covered += true in said
        wrong += len(set(said) - {true})
    wrong += sum(not any(_may_be(thing, shape) for shape in shapes) for thing in stated.again)
    wrong += sum(not _holds(relation, shapes) for relation in stated.relations)
    return Truth(covered, wrong, 4 * len(shapes) + 2)


def _holds(relation: tuple[Thing, str, Thing], shapes: list[Mapping[str, Any]]) -> bool:
    """Whether it does of any two shapes that may be meant. Of one that is not there it does: that is wrong already."""
    first, name, second = relation
    if name not in RELATIONS:
        return False
    axis, way = RELATIONS[name]
    meant = [[PLACES[shape["place"]] for shape in shapes if _may_be(thing, shape)] for thing in (first, second)]
    return not all(meant) or any(way * (here[axis] - there[axis]) > 0 for here in meant[0] for there in meant[1])


def _may_be(thing: Thing, shape: Mapping[str, Any]) -> bool:
    return thing.kind == shape["kind"] and thing.colour in (None, shape["colour"])


def _num_right(thing: Thing, shape: Mapping[str, Any]) -> int:
    """Of what is said of a thing, how much is true of a shape; 0 where it is another thing."""
    if not _may_be(thing, shape):
        return 0
    return 1 + (thing.colour is not None) + (thing.size == shape["size"]) + (thing.place == shape["place"])
