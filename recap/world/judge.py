"""What a picture shows of what its prompt asks, judged by the reader; and what a caption says, judged by the truth."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from recap.rundir import hash_files
from recap.world.facts import Stated, Thing, Truth, compare, read
from recap.world.reader import Reader, Reading, Seen

Values = dict[str, float | None]
NUM_AT_ONCE = 128


class Prompt(Protocol):
    """What a picture was drawn from."""

    text: str
    about: dict[str, Any]
    """`complete`: whether the prompt names every shape (False where it isn't said); `asks`: the whole of a prompt that
    was cut, by which its picture is judged."""


class WorldJudge:
    """The world's exact judge: `[evaluate.judge] target = "recap.world.judge:WorldJudge"`."""

    metrics: ClassVar[dict[str, str]] = {
        "object_accuracy": "share of pictures in which every shape asked for is there, in colour, kind and place, "
                           "and no other",
        "objects_found": "share of the shapes asked for that are there, in colour, kind and place",
        "binding": "of the shapes asked for whose kind is there (in its place, where that is asked for), those in the "
                   "colour asked for",
        "count": "share of pictures with as many shapes as asked for",
        "places": "of the shapes asked for that are there, those in the place asked for",
        "sizes": "of the shapes found, those in the size asked for",
        "background": "of what is asked of the background, colour and pattern, the share that is so",
    }

    def __init__(self, reader: Reader, name: str) -> None:
        self.reader = reader
        self.name = name

    @classmethod
    def open(cls, model: str, device: str) -> "WorldJudge":
        """Open the reader in a folder."""
        folder = Path(model)
        return cls(Reader.open(folder, device), f"the world's reader {hash_files(folder)}")

    def images(self, images: list[Image.Image], prompts: Iterable[Prompt]) -> list[Values]:
        """Every metric of every picture; None where its prompt asks nothing of that kind."""
        readings = [reading for start in range(0, len(images), NUM_AT_ONCE)
                    for reading in self.reader.read(images[start:start + NUM_AT_ONCE])]
        return [judge(reading, read(prompt.about.get("asks", prompt.text)), bool(prompt.about.get("complete")))
                for reading, prompt in zip(readings, prompts, strict=True)]

    def caption(self, caption: str, metadata: dict[str, Any]) -> Truth:
        """How many facts of a scene a caption states, and how many of its statements are false."""
        return compare(read(caption), metadata["scene"])


def judge(reading: Reading, asked: Stated, complete: bool) -> Values:
    """Hold a picture, as it was read, against what was asked of it.

    Args:
        reading: what the picture shows.
        asked: what the prompt says.
        complete: whether the prompt names every shape.
    """
    things = asked.things
    found = _paired(things, reading.shapes, _is, _is_sized)
    right = len(found) == len(things) and (not complete or len(reading.shapes) == len(things))
    of_kind = _paired(things, reading.shapes, _is_of_kind, _is)
    there = _paired(things, reading.shapes, _is_named, _is)
    background = [said == seen for said, seen in ((asked.background, reading.background),
                                                  (asked.pattern, reading.pattern)) if said]
    return {
        "object_accuracy": float(right) if things else None,
        "objects_found": _share([True] * len(found) + [False] * (len(things) - len(found))),
        "binding": _share([shape.colour == thing.colour for thing, shape in of_kind if thing.colour]),
        "count": float(len(reading.shapes) == len(things)) if complete else None,
        "places": _share([shape.place == thing.place for thing, shape in there if thing.place]),
        "sizes": _share([shape.size == thing.size for thing, shape in found if thing.size]),
        "background": _share(background),
    }


Fits = Callable[[Thing, Seen], bool]


def _paired(things: Sequence[Thing], shapes: Sequence[Seen], fits: Fits, better: Fits) -> list[tuple[Thing, Seen]]:
    """Things and shapes that fit, one to one: as many as can be, and of the ways to do that one with most better."""
    if not things or not shapes:
        return []
    worth = np.array([[fits(thing, shape) * (1 + better(thing, shape) / (1 + len(shapes))) for shape in shapes]
                      for thing in things])
    return [(things[row], shapes[column]) for row, column in zip(*linear_sum_assignment(worth, maximize=True),
                                                                 strict=True) if worth[row, column]]


def _is_named(thing: Thing, shape: Seen) -> bool:
    """Of the kind and the colour that were said."""
    return thing.kind == shape.kind and thing.colour in (None, shape.colour)


def _is_of_kind(thing: Thing, shape: Seen) -> bool:
    """Of the kind, in the place if one was said."""
    return thing.kind == shape.kind and thing.place in (None, shape.place)


def _is(thing: Thing, shape: Seen) -> bool:
    """Of the kind, the colour and the place that were said."""
    return _is_named(thing, shape) and _is_of_kind(thing, shape)


def _is_sized(thing: Thing, shape: Seen) -> bool:
    return thing.size in (None, shape.size)


def _share(truths: list[bool]) -> float | None:
    return sum(truths) / len(truths) if truths else None
