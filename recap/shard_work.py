"""What stages that go through shards share: decoded samples in batches, a quarantine file, stats that mark the end.

A shard is the unit of work. Its stats are written last, so a shard that has them is done; to resume is to skip those.
"""

import itertools
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from recap import progress
from recap.config import Data
from recap.decoders import Decoders
from recap.errors import BadSample, UserError
from recap.rundir import StageDir
from recap.sample import Sample, count_pixels
from recap.shards import Reject, read_shard, shard_name, write_rejects
from recap.storage import read_bytes, remove, write_json

Stats = dict[str, Any]
Decoded = tuple[Sample, Image.Image]
In = TypeVar("In")
Out = TypeVar("Out")
NUM_DECODERS = min(8, os.cpu_count() or 1)
MAX_BATCH_PIXELS = 200_000_000
"""Decoded images of a batch hold 3 bytes a pixel: a shard of huge ones must not fill the memory."""
MAX_BATCH_BYTES = 256 * 2**20
"""Of a batch's members, so that other large ones must not either."""
LARGE_PIXELS = 32_000_000
"""An image of more is large; to decode one takes up to 15 bytes a pixel."""


def decoded(shard: str, data: Data, decoders: Decoders, rejects: list[Reject]) -> Iterator[Decoded]:
    """The usable samples of a shard with their images, in file order.

    Images are decoded some ahead of those that are asked for; large ones each in its turn, so that the memory holds no
    more of them than a batch does.
    """
    read_ahead = ahead(lambda read: (read, None if _is_large(read[1]) else _decode(*read, data, decoders)),
                       _read(shard), NUM_DECODERS)
    for read, done in read_ahead:
        faults, found = done or _decode(*read, data, decoders)
        rejects += faults
        if found:
            yield found


def batches(samples: Iterable[Decoded], size: int, limit: int | None = None) -> Iterator[list[Decoded]]:
    """The first `limit` samples, in batches; no more of them are asked for.

    Batches are formed within the shard, in file order, so that no result depends on rank or interruption.
    """
    batch: list[Decoded] = []
    given = pixels = num_bytes = 0
    for sample, image in samples:
        batch.append((sample, image))
        pixels += image.width * image.height
        num_bytes += sum(map(len, sample.members.values()))
        is_full = len(batch) == size or pixels > MAX_BATCH_PIXELS or num_bytes > MAX_BATCH_BYTES
        if is_full or given + len(batch) == limit:
            yield batch
            given += len(batch)
            batch, pixels, num_bytes = [], 0, 0
            if given == limit:
                return
    if batch:
        yield batch


def _read(shard: str) -> Iterator[tuple[list[Reject], Sample | None]]:
    """The samples of a shard, each with what was found malformed before it; at the end, what was after the last."""
    rejects: list[Reject] = []
    for sample in read_shard(shard, rejects):
        yield rejects.copy(), sample
        rejects.clear()
    yield rejects, None


def _is_large(sample: Sample | None) -> bool:
    try:
        return sample is not None and count_pixels(sample.image_bytes) > LARGE_PIXELS
    except BadSample:
        return False


def _decode(rejects: list[Reject], sample: Sample | None, data: Data,
            decoders: Decoders) -> tuple[list[Reject], Decoded | None]:
    """The sample with its image; or one reject more."""
    if sample is None:
        return rejects, None
    try:
        return rejects, (sample, sample.check(data.alt_text, decoders.decode))
    except BadSample as error:
        return [*rejects, Reject(sample.shard, sample.key, error.reason, error.detail)], None


def ahead(work: Callable[[In], Out], items: Iterable[In], threads: int) -> Iterator[Out]:
    """What `work` makes of the items, in their order; done in threads, by as many items before it is asked for.

    The items are read in the caller's thread.
    """
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[Future[Out]] = deque()
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) > threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


def in_background(items: Iterator[In]) -> Generator[In]:
    """The items, of which the next is made in a thread while the caller works on one."""
    end = object()
    for item in ahead(lambda _: next(items, end), itertools.repeat(None), 1):
        if item is end:
            return
        yield item  # type: ignore[misc]


def once(stage: StageDir, shard: str, work: Callable[[str], Stats]) -> tuple[Stats, bool]:
    """The stats of a shard, and whether the work was done just now or by an earlier try."""
    path = stage.path / f"{shard_name(shard)}_stats.json"
    if path.is_file():
        return json.loads(path.read_bytes()), False
    stats = work(shard)
    write_json(str(path), stats)
    stage.log(event="shard", shard=shard_name(shard), **stats)
    return stats, True


def stats_url(out: str, shard: str) -> str:
    return f"{out}/{shard_name(shard)}_stats.json"


def read_stats(out: str, shard: str) -> Stats:
    """What marks a shard as done. UserError where that is damaged, or another program's."""
    url = stats_url(out, shard)
    try:
        stats = json.loads(read_bytes(url))
    except ValueError as error:
        raise UserError(f"{url} is damaged ({error}): delete it, and run the same command again") from None
    if not isinstance(stats, dict) or not {"count", "successes", "settings", "input", "status_dict"} <= stats.keys():
        raise UserError(f"{url} is not of `recap relabel`: choose another relabel.output")
    return stats


def stats_of(shard: str, out: Path | str, successes: int, rejects: list[Reject], **others: Any) -> Stats:
    """A shard's stats, named as img2dataset names them; its rejects go to the quarantine file first."""
    reasons = Counter(reject.reason for reject in rejects)
    quarantine = quarantine_file(shard, out)
    remove(quarantine)  # an earlier try may have found faults that have been mended since
    if rejects:
        write_rejects(quarantine, rejects)
    return {"count": successes + len(rejects), "successes": successes, **others,
            "status_dict": {"success": successes, **reasons}}


def quarantine_file(shard: str, out: Path | str) -> str:
    return f"{out}/{shard_name(shard)}_quarantine.jsonl"


def warn_of(rejects: list[Reject], shard: str, out: Path | str) -> None:
    """Say that samples of a shard are not used, by reason, and where they are listed."""
    if rejects:
        reasons = Counter(reject.reason for reject in rejects)
        listed = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        progress.warn(f"{shard}: {len(rejects)} samples quarantined ({listed}), see {quarantine_file(shard, out)}")


def total(found: list[Stats], *others: str) -> dict[str, Any]:
    """The sums over shards: images in, out and quarantined by reason, and the other counts that are named, or tables of
    them.
    """
    quarantined = sum(map(reasons, found), Counter[str]())
    sums = {name: sum(stats[name] for stats in found) for name in ("count", "successes", *others)}
    counts = {"images_in": sums.pop("count"), "images_out": sums.pop("successes")}
    return {**counts, "quarantined": dict(quarantined), **sums}


def reasons(stats: Stats) -> Counter[str]:
    """How many samples of a shard were quarantined, by reason."""
    return Counter({reason: count for reason, count in stats["status_dict"].items() if reason != "success"})
