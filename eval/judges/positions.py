"""Where one thing is in relation to another: as a prompt says, as boxes show, and the opposite of what was said."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from eval.judges.vocabulary import DETERMINERS, Named
from recap.facts import Box
from recap.filters import ENGLISH

Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
MAX_BETWEEN = 3
"""Words between a thing and what is said of its place."""
SAID = re.compile(r"(?:\b(?:to|on|at) (?:the )?)?\b(?P<side>left|right)(?: hand)?(?: side)? of\b"
                  r"|\b(?P<height>above|below)\b|\bon the (?P<end>top|bottom) of\b")
"""What boxes can bear out. `on the top of` is T2I-CompBench's word for above; what is on top of a thing, or under it,
may have its middle within it.
"""
ENDS: dict[str, Relation] = {"top": "above", "bottom": "below"}
LINKS = {"is", "are", "was", "were", "be", "that", "which", "sits", "sitting", "stands", "standing", "lies", "lying",
         "placed", "located", "positioned", "hanging", "floating"}
OPPOSITES = {
    "left of": "right of", "left side": "right side", "on the left": "on the right", "to the left": "to the right",
    "above": "below", "on the top of": "on the bottom of", "at the top of": "at the bottom of",
    "on top of": "under", "beneath": "on top of", "underneath": "on top of",
    "in front of": "behind", "hidden by": "in front of", "inside": "outside", "inside of": "outside of",
    "near": "far from", "far away from": "near",
}
"""What is said → what would be false then; both ways, where the second isn't false of another as well."""
OPPOSITES |= {false: true for true, false in OPPOSITES.items() if false not in OPPOSITES}
OPPOSITES |= {"behind": "in front of"}
POSITIONAL = re.compile(rf"\b(?:{'|'.join(sorted(OPPOSITES, key=len, reverse=True))})\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """What a prompt says of where things are: `first` is `relation` `second`."""

    first: Named
    relation: Relation
    second: Named


def opposite(text: str) -> str | None:
    """The same text with every relation swapped, false wherever the text is true; None where it says nothing of any."""
    swapped, count = POSITIONAL.subn(lambda found: OPPOSITES[found[0].lower()], text)
    return swapped if count else None


def places(words: list[str], things: list[Named]) -> list[Place]:
    """The relations between two things that a text states: `a dog to the left of a red car`."""
    text = " ".join(words)
    found = []
    for said in SAID.finditer(text):
        start, end = text[:said.start()].count(" "), text[:said.end()].count(" ") + 1
        first = next((each for each in reversed(things) if each.mention.end <= start), None)
        second = next((each for each in things if each.mention.start >= end), None)
        if first and second and _are_linked(words[first.mention.end:start], words[end:second.mention.start]):
            found.append(Place(first, _relation(said), second))
    return found


def _relation(said: re.Match[str]) -> Relation:
    if said["end"]:
        return ENDS[said["end"]]
    return next(each for each in RELATIONS if each.startswith(said["side"] or said["height"]))


def _are_linked(before: list[str], after: list[str]) -> bool:
    """Whether no more than a verb stands before a relation, and than an article and adjectives after it."""
    return (max(len(before), len(after)) <= MAX_BETWEEN and LINKS.issuperset(before)
            and all(word in DETERMINERS or (word[0].isalpha() and word not in ENGLISH) for word in after))


def relations(first: Box, second: Box, margin: float) -> set[Relation]:
    """How one box lies from another, by GenEval's rule (Ghosh et al. 2023, arXiv 2310.11513): none or one, or two where
    it lies at a slant.

    Args:
        first, second: left, top, right, bottom.
        margin: what the centres must lie apart, along an axis, to count as apart at all; a share of both boxes' sizes.
    """
    corners = np.array([first, second]).reshape(2, 2, 2)
    (offset,) = -np.diff(corners.mean(axis=1), axis=0)
    apart = np.maximum(np.abs(offset) - margin * np.ptp(corners, axis=1).sum(axis=0), 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    x, y = apart / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {each for each in RELATIONS if holds[each]}
