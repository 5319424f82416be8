"""Which samples of a shard an arm is trained on, and at what size."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from recap.caption_tables import join, read_table, table_url
from recap.errors import BadSample
from recap.sample import Sample, caption_extension, image_size
from recap.shards import Reject, read_shard, shard_name
from train_t2i.config import Arm, Filters, Train
from train_t2i.images import nearest, sizes
from train_t2i.latents import Latents, joined, read_latents
from train_t2i.order import Entry, number


def usable(shard: str, arm: Arm, config: Train, latents: Path | None = None) -> Iterator[Entry | str]:
    """The samples of a shard that hold every caption kind of the arm and pass the filters; of the others, the reason.

    Args:
        shard: path or URL.
        arm: with `shuffled`, each sample has another one's captions, unless it is the shard's only one.
        config: names the filters, the sizes, and the folder of the captions where it is not the shard that holds them.
        latents: the folder of kept ones; each sample then is a `Latents`.
    """
    found = _rotated(shard, arm, config) if arm.shuffled else _with_captions(shard, arm, config)
    if latents is not None:
        found = joined(found, read_latents(latents, shard))
    among = tuple(sizes(config.resolution, config.buckets))
    for sample in found:
        if isinstance(sample, str):
            yield sample
            continue
        try:
            width, height = sample.original if isinstance(sample, Latents) else image_size(sample.image_bytes)
            check(sample, width, height, config.filters)
        except BadSample as error:
            yield error.reason
        else:
            yield Entry(sample, (width, height), nearest(width, height, among))


def check(sample: Sample, width: int, height: int, filters: Filters) -> None:
    """Raise BadSample for an image that isn't trained on."""
    if filters.min_side and min(width, height) < filters.min_side:
        raise BadSample("below_min_side", f"{width}×{height}")
    if filters.max_aspect and max(width, height) > filters.max_aspect * min(width, height):
        raise BadSample("beyond_max_aspect", f"{width}×{height}")
    metadata = sample.metadata if filters.metadata else {}
    for key, bounds in filters.metadata.items():
        value = _to_float(metadata.get(key))
        if math.isnan(value):
            raise BadSample(f"no_{key}_in_metadata", f"{key} is {metadata.get(key)!r}")
        if (bounds.min is not None and value < bounds.min) or (bounds.max is not None and value > bounds.max):
            raise BadSample(f"{key}_out_of_bounds", f"{key} is {value}")


def _to_float(value: object) -> float:
    """A number, or a text that is one; NaN for all else."""
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def _rotated(shard: str, arm: Arm, config: Train) -> Iterator[Sample | str]:
    """The captions of a shard, moved on by a number of images drawn for the shard: nobody keeps its own."""
    names = [caption_extension(kind) for kind in arm.captions]
    texts = [{name: sample.member(name) or b"" for name in names}
             for sample in _with_captions(shard, arm, config) if isinstance(sample, Sample)]
    shift = random.Random(number("shuffled", shard_name(shard))).randrange(1, max(len(texts), 2))
    place = 0
    for sample in _with_captions(shard, arm, config):
        if isinstance(sample, Sample):
            sample = replace(sample, members=sample.members | texts[(place + shift) % len(texts)])
            place += 1
        yield sample


def _with_captions(shard: str, arm: Arm, config: Train) -> Iterator[Sample | str]:
    folder = config.captions
    rows = read_table(table_url(folder, shard), arm.captions) if folder is not None else None
    rejects: list[Reject] = []
    for sample in read_shard(shard, rejects):
        yield from _reasons(rejects)
        try:
            if rows is not None:
                sample = join(sample, rows)
            for kind in arm.captions:
                if sample.caption(kind) is None:
                    raise BadSample(f"no_{kind}_caption")
            sample.image_bytes  # noqa: B018  (read for its check)
        except BadSample as error:
            yield error.reason
        else:
            yield sample
    yield from _reasons(rejects)


def _reasons(rejects: list[Reject]) -> Iterator[str]:
    """Those of the rejects, which are told of once."""
    yield from [reject.reason for reject in rejects]
    rejects.clear()
