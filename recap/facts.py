"""What experts find in images: objects, tags, sentences, writing; merged, and kept beside the shards as parquet."""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recap.storage import write_bytes

SAME_OBJECT_IOU = 0.6
"""Boxes of one label that overlap by so much are taken for one object, seen by two experts."""

Box = tuple[float, float, float, float]


def clip(box: Sequence[float], width: int, height: int) -> Box:
    """A box as far as it is in the image, in hundredths of a pixel."""
    x0, x1 = (round(min(max(x, 0.0), width), 2) for x in box[::2])
    y0, y1 = (round(min(max(y, 0.0), height), 2) for y in box[1::2])
    return x0, y0, x1, y1


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


@dataclass(frozen=True, slots=True)
class Found:
    """What one expert found in the image of one sample."""

    key: str
    width: int
    """Of the upright image, in pixels, as are the boxes."""
    height: int
    facts: Facts


# --- files ---------------------------------------------------------------------------------------------------------


def _schema() -> Any:
    import pyarrow as pa
    scored = [("label", pa.string()), ("score", pa.float64())]
    sentence = [("text", pa.string()), ("source", pa.string()), ("reliable", pa.bool_())]
    return pa.schema([
        ("key", pa.string()), ("width", pa.int32()), ("height", pa.int32()),
        ("objects", pa.list_(pa.struct([*scored, ("box", pa.list_(pa.float64(), 4))]))),
        ("tags", pa.list_(pa.struct(scored))), ("sentences", pa.list_(pa.struct(sentence))),
        ("text", pa.list_(pa.string()))])


def write_facts(path: Path, found: Iterable[Found], provenance: dict[str, Any]) -> None:
    """One shard's facts as parquet, a row for each image, in the order of the shard; whole or not at all.

    Args:
        path: to write.
        found: by one expert.
        provenance: what they were found with, JSON-like; kept in the file's metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [{"key": each.key, "width": each.width, "height": each.height, **asdict(each.facts)} for each in found]
    table = pa.Table.from_pylist(rows, _schema().with_metadata({"provenance": json.dumps(provenance)}))
    file = io.BytesIO()
    pq.write_table(table, file)
    write_bytes(str(path), file.getvalue())


def read_facts(path: Path) -> tuple[dict[str, Found], dict[str, Any]]:
    """Key → what was found, in the order of the shard; and what it was found with."""
    import pyarrow.parquet as pq
    table = pq.read_table(path)
    found = {row["key"]: Found(row["key"], row["width"], row["height"], _facts(row)) for row in table.to_pylist()}
    provenance: dict[str, Any] = json.loads(table.schema.metadata[b"provenance"])
    return found, provenance


def count_facts(path: Path) -> int:
    """How many images a file has facts of."""
    import pyarrow.parquet as pq
    return int(pq.read_metadata(path).num_rows)


def _facts(row: dict[str, Any]) -> Facts:
    return Facts([Object(each["label"], each["score"], tuple(each["box"])) for each in row["objects"]],
                 [Tag(**each) for each in row["tags"]], [Sentence(**each) for each in row["sentences"]], row["text"])


# --- several experts -----------------------------------------------------------------------------------------------


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
