"""What stages that go through shards share: batches of decoded samples, a quarantine file, stats that mark the end.

A shard is the unit of work. Its stats are written last, so a shard that has them is done; to resume is to skip those.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from recap import progress
from recap.config import Data
from recap.errors import BadSample
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shards import Reject, read_shard, shard_name, write_json, write_rejects

Stats = dict[str, Any]
MAX_BATCH_PIXELS = 200_000_000
"""Decoded images of a batch hold 3 bytes a pixel: a shard of huge ones must not fill the memory."""


def batches(shard: str, size: int, data: Data, rejects: list[Reject],
            limit: int | None = None) -> Iterator[list[tuple[Sample, Image.Image]]]:
    """The first `limit` usable samples of a shard with their images, in batches; what comes after is not read.

    Batches are formed within the shard, in file order, so that no result depends on rank or interruption.
    """
    batch: list[tuple[Sample, Image.Image]] = []
    given = 0
    for sample in read_shard(shard, rejects):
        try:
            batch.append((sample, sample.check(data.alt_text)))
        except BadSample as error:
            rejects.append(Reject(sample.shard, sample.key, error.reason, error.detail))
            continue
        pixels = sum(image.width * image.height for _, image in batch)
        if len(batch) == size or given + len(batch) == limit or pixels > MAX_BATCH_PIXELS:
            yield batch
            given += len(batch)
            batch = []
            if given == limit:
                return
    if batch:
        yield batch


def once(stage: StageDir, shard: str, work: Callable[[str], Stats]) -> tuple[Stats, bool]:
    """The stats of a shard, and whether the work was done just now or by an earlier try."""
    path = stage.path / f"{shard_name(shard)}_stats.json"
    if path.is_file():
        return json.loads(path.read_bytes()), False
    stats = work(shard)
    write_json(str(path), stats)
    stage.log(event="shard", shard=shard_name(shard), **stats)
    return stats, True


def stats_of(shard: str, out: Path, successes: int, rejects: list[Reject], **others: Any) -> Stats:
    """A shard's stats, named as img2dataset names them; its rejects go to the quarantine file first."""
    reasons = Counter(reject.reason for reject in rejects)
    quarantine = out / f"{shard_name(shard)}_quarantine.jsonl"
    quarantine.unlink(missing_ok=True)  # an earlier try may have found faults that have been mended since
    if rejects:
        write_rejects(str(quarantine), rejects)
        listed = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        progress.warn(f"{shard}: {len(rejects)} samples quarantined ({listed}), see {quarantine}")
    return {"count": successes + len(rejects), "successes": successes, **others,
            "status_dict": {"success": successes, **reasons}}


def total(found: list[Stats], *others: str) -> dict[str, Any]:
    """The sums over shards: images in, out and quarantined by reason, and the other counts that are named."""
    reasons: Counter[str] = Counter()
    for stats in found:
        reasons.update(stats["status_dict"])
    del reasons["success"]
    sums = {name: sum(stats[name] for stats in found) for name in ("count", "successes", *others)}
    return {"images_in": sums.pop("count"), "images_out": sums.pop("successes"), "quarantined": dict(reasons), **sums}
