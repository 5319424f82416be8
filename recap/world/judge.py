"""What a picture shows of what its prompt asks, judged by the reader; and what a caption says, judged by the truth."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from PIL import Image

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
        "binding": "of the shapes asked for whose kind is there, those in the colour asked for",
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
    found = _found(things, reading.shapes)
    right = len(found) == len(things) and (not complete or len(reading.shapes) == len(things))
    there = [thing for thing in things if any(_is(thing, shape, place=False) for shape in reading.shapes)]
    of_kind = [thing for thing in things if thing.colour and _candidates(thing, reading.shapes)]
    in_place = [thing for thing in there if thing.place]
    sized = [(thing, shape) for thing, shape in found if thing.size]
    background = [said == seen for said, seen in ((asked.background, reading.background),
                                                  (asked.pattern, reading.pattern)) if said]
    return {
        "object_accuracy": float(right) if things else None,
        "objects_found": _share([True] * len(found) + [False] * (len(things) - len(found))),
        "binding": _share([any(shape.colour == thing.colour for shape in _candidates(thing, reading.shapes))
                           for thing in of_kind]),
        "count": float(len(reading.shapes) == len(things)) if complete else None,
        "places": _share([any(_is(thing, shape) for shape in reading.shapes) for thing in in_place]),
        "sizes": _share([thing.size == shape.size for thing, shape in sized]),
        "background": _share(background),
    }


def _found(things: Iterable[Thing], shapes: Iterable[Seen]) -> list[tuple[Thing, Seen]]:
    """Things paired with shapes that are as they say, each shape once; those that say most choose first."""
    left, pairs = list(shapes), []
    for thing in sorted(things, key=lambda thing: (thing.place is None, thing.colour is None)):
        if fitting := [shape for shape in left if _is(thing, shape)]:
            shape = max(fitting, key=lambda shape: shape.size == thing.size)
            left.remove(shape)
            pairs.append((thing, shape))
    return pairs


def _is(thing: Thing, shape: Seen, place: bool = True) -> bool:
    """Whether a shape has the kind, the colour and, if `place`, the place that were said."""
    return (thing.kind == shape.kind and thing.colour in (None, shape.colour)
            and (not place or thing.place in (None, shape.place)))


def _candidates(thing: Thing, shapes: Iterable[Seen]) -> list[Seen]:
    """The shapes of a thing's kind, in its place if it was said."""
    return [shape for shape in shapes if shape.kind == thing.kind and thing.place in (None, shape.place)]


def _share(truths: list[bool]) -> float | None:
    return sum(truths) / len(truths) if truths else None
