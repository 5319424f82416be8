"""Experts look at images and state facts; captions are stitched from what several of them say.

An expert is a class in a file of its own: `(config: Stitch, device: str)` opens it, `look` is all that it does. To add
one, write the file, give it a line in REGISTRY, and its table, if it has one, in `recap.config.Stitch`.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from PIL import Image

from recap.config import Stitch
from recap.errors import UserError

REGISTRY = {
    "detr": "recap.experts.detr:DetrExpert",
    "alt_text": "recap.experts.alt_text:AltTextExpert",
}
SAME_OBJECT_IOU = 0.6
"""Boxes of one label that overlap by so much are taken for one object, seen by two experts."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Object:
    """Something that was seen, and where."""

    label: str
    score: float
    """0 to 1."""
    box: Box
    """Left, top, right, bottom, in pixels of the upright original image."""


@dataclass(frozen=True, slots=True)
class Tag:
    """Something that was seen, nobody says where."""

    label: str
    score: float
    """0 to 1."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """What somebody says of the image."""

    text: str
    source: str
    """The expert that said it."""
    reliable: bool = True
    """False for what was not written by looking at the pixels, as alt-text."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What one expert, or several, found in one image."""

    objects: list[Object] = field(default_factory=list)
    tags: list[Tag] = field(default_factory=list)
    sentences: list[Sentence] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    """Writing that can be read in the image."""

    @property
    def seen(self) -> bool:
        """Whether anything was found by looking; hearsay does not count."""
        return bool(self.objects or self.tags or self.text or any(sentence.reliable for sentence in self.sentences))


class Expert(Protocol):
    """Looks at images."""

    provenance: dict[str, Any]
    """What its facts were made with, JSON-like: checkpoint, revision, settings."""

    def look(self, images: list[Image.Image], alt_texts: list[str]) -> list[Facts]:
        """One `Facts` per image, in order.

        Args:
            images: RGB, upright, of any sizes: one batch.
            alt_texts: what each image's shard says of it; empty where it says nothing.
        """
        ...


def open_experts(config: Stitch, device: str) -> dict[str, Expert]:
    """Open the experts that the configuration names, in its order.

    Raises:
        UserError: none is named, a name is not known, or a checkpoint cannot be opened.
    """
    if not config.experts:
        raise UserError(f"stitch.experts is empty: name at least one of {', '.join(REGISTRY)}")
    return {name: _open(name, config, device) for name in config.experts}


def _open(name: str, config: Stitch, device: str) -> Expert:
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(REGISTRY)}"
        raise UserError(f"stitch.experts: there is no expert {name!r}: {hint}")
    module, attribute = REGISTRY[name].split(":")
    expert: Expert = getattr(import_module(module), attribute)(config, device)
    return expert


def merge(several: Iterable[Facts]) -> Facts:
    """What several experts found in one image, each fact once: of two alike the surer, and of two as sure the first.

    Objects are alike when their labels are equal and their boxes overlap by SAME_OBJECT_IOU, and only across experts:
    what one expert counts twice is two things to it.
    """
    merged = Facts()
    for facts in several:
        merged = Facts(
            objects=_merge_objects(merged.objects, facts.objects),
            tags=_merge_tags([*merged.tags, *facts.tags]),
            sentences=_merge_sentences([*merged.sentences, *facts.sentences]),
            text=list(dict.fromkeys([*merged.text, *facts.text])),
        )
    return merged


def _merge_objects(known: list[Object], new: list[Object]) -> list[Object]:
    merged, unmatched = list(known), set(range(len(known)))
    for found in new:
        alike = (place for place in unmatched if merged[place].label == found.label)
        overlaps = {place: iou(merged[place].box, found.box) for place in alike}
        best = max(overlaps, key=lambda place: (overlaps[place], -place), default=None)
        if best is None or overlaps[best] < SAME_OBJECT_IOU:
            merged.append(found)
            continue
        unmatched.discard(best)
        if found.score > merged[best].score:
            merged[best] = found
    return merged


def _merge_tags(tags: list[Tag]) -> list[Tag]:
    best: dict[str, Tag] = {}
    for tag in tags:
        if tag.label not in best or tag.score > best[tag.label].score:
            best[tag.label] = tag
    return list(best.values())


def _merge_sentences(sentences: list[Sentence]) -> list[Sentence]:
    best: dict[str, Sentence] = {}
    for sentence in sentences:
        if sentence.text not in best or (sentence.reliable and not best[sentence.text].reliable):
            best[sentence.text] = sentence
    return list(best.values())


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
