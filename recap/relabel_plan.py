"""`recap relabel --plan`: how long a whole set takes, and how large it gets, from relabelling a little of it."""

import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from recap import progress
from recap.config.relabel import Relabel
from recap.environment import environment
from recap.errors import UserError
from recap.outputs import open_output, written
from recap.relabel import Job
from recap.shard_work import Stats, total
from recap.shards import MAX_COUNTED, Reject, ShardWriter, count_images, read_shard, shard_name
from recap.storage import identities, is_local

if TYPE_CHECKING:
    from recap.pipeline import Experiment

NUM_SHARDS = 3
"""That are probed: of the beginning, the middle and the end."""
BATCHES = 6
"""That are captioned of each, but no fewer images than MIN_IMAGES."""
MIN_IMAGES = 32
SCALES = {"1 million": 10**6, "100 million": 10**8, "1 billion": 10**9}


@dataclass(frozen=True)
class Probe:
    """What was measured."""

    device: str
    images: int
    """That were captioned or quarantined."""
    shards: int
    rate: float
    """Images per second, after the first batch."""
    quarantined: dict[str, int]
    """Reason → images."""
    bytes_in: float
    """Of an image with all that is beside it in a shard."""
    bytes_added: float
    """Of its captions there."""
    bytes_table: float
    """Of its captions in a parquet."""
    total: int
    """Images of the whole set, counted or estimated."""
    is_estimated: bool
    """Whether `total` is an estimate, from the shards' sizes."""


def plan(exp: "Experiment", price: float | None, num_devices: int) -> str:
    """Relabel some images of a set, and say what all would take.

    Args:
        exp: the experiment.
        price: of a device for an hour, in any currency.
        num_devices: that share the work.
    """
    from recap.pipeline import Plan
    own = Plan(exp)
    tuned, note = own.tuned_if_done()
    with tempfile.TemporaryDirectory(prefix="recap-plan-") as folder:
        config = exp.relabel.model_copy(update={"format": "shards", "output": f"{folder}/out"})
        job = Job(f"{folder}/out", exp.captioner, tuned, exp.styles, config, exp.data, "plan")
        found = _probe(job, own.relabel_inputs.urls, own.device, Path(folder))
    if note:
        progress.warn(note)
    return "\n".join(_table(found, price, num_devices))


def _probe(job: Job, shards: list[str], device: str, folder: Path) -> Probe:
    chosen = [shards[place] for place in sorted({0, len(shards) // 2, len(shards) - 1})][:NUM_SHARDS]
    taken = [_take(url, folder / "in" / f"{shard_name(url)}.tar", job.config) for url in chosen]
    images, seconds, found = _measure(job, [str(path) for path in taken], device)
    sums = total(found)
    if not sums["images_out"]:
        raise UserError(f"relabel: of {', '.join(chosen)} no image could be used ({sums['quarantined']}): "
                        "check data.shards")
    if not images:
        raise UserError("relabel --plan: the probed shards have no second batch to be timed: lower relabel.batch_size")
    num_in, num_out = sums["images_in"], sums["images_out"]
    bytes_in = sum(path.stat().st_size for path in taken) / num_in
    outputs = [written("shards", job.out, path.stem) for path in taken]
    added, table = _captions_bytes(outputs, job.styles, folder)
    sizes = [int(size) for _, size, _ in identities(shards).values() if int(size) >= 0]  # not every web server says it
    whole = count_images(shards)
    if whole is None:
        whole = round(sum(sizes) / max(1, len(sizes)) * len(shards) / bytes_in)
    return Probe(environment()["hardware"], num_in, len(taken), images / seconds, sums["quarantined"], bytes_in,
                 added / num_out, table / num_out, whole,
                 is_estimated=len(shards) > MAX_COUNTED or not all(map(is_local, shards)))


def _take(url: str, path: Path, config: Relabel) -> Path:
    """Copy the first samples of a shard."""
    rejects: list[Reject] = []
    with ShardWriter(str(path)) as writer:
        for sample in islice(read_shard(url, rejects), max(MIN_IMAGES, BATCHES * config.batch_size)):
            writer.write(sample)
    return path


def _measure(job: Job, shards: list[str], device: str) -> tuple[int, float, list[Stats]]:
    """Relabel them; images after the first batch, their seconds, and the shards' stats."""
    moments: list[tuple[float, int]] = []
    done: dict[str, int] = {}

    def report(shard: str, count: int, _: dict[str, int]) -> None:
        done[shard] = count
        moments.append((time.perf_counter(), sum(done.values())))

    with job.open("cuda:0" if device == "cuda" else device, report) as worker:
        progress.say("probing …")
        found = [stats for _, stats in worker.process(shards)]
    began, before = moments[0]
    return moments[-1][1] - before, time.perf_counter() - began, found


def _captions_bytes(shards: list[str], styles: Iterable[str], folder: Path) -> tuple[int, int]:
    """Of what was added to the probed shards, and of a parquet of it."""
    rejects: list[Reject] = []
    added = 0
    with open_output("parquet", str(folder), "captions", styles, "mix") as output:
        for url in shards:
            for sample in read_shard(url, rejects):
                output.write(sample)
                added += sum(512 + -(-len(content) // 512) * 512  # a header, and the content in blocks
                             for name, content in sample.members.items() if name.endswith((".txt", "recap.json")))
    return added, (folder / "captions.parquet").stat().st_size


# --- what it says --------------------------------------------------------------------------------------------------


def _table(found: Probe, price: float | None, num_devices: int) -> Iterator[str]:
    bad = sum(found.quarantined.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in found.quarantined.items())
    yield f"measured    {found.rate:,.1f} images/s, on {found.images:,} images of {found.shards} shards"
    yield f"device      {found.device}"
    yield f"quarantined {bad / found.images:.1%}" + (f" ({reasons})" if reasons else "")
    yield f"an image    {_size(found.bytes_in)}, and {_size(found.bytes_added)} of captions"
    yield ""
    yield _row(["", "images", "device-hours", f"days on {num_devices:,}", *(["cost"] if price is not None else []),
                "shards", "parquet"])
    whole = f"{'~' if found.is_estimated else ''}this set"
    for name, images in {whole: found.total, **SCALES}.items():
        hours = images / found.rate / 3600
        kept = images * (1 - bad / found.images)
        yield _row([name, f"{images:,}", f"{hours:,.1f}", f"{hours / 24 / num_devices:,.2f}",
                    *([f"{hours * price:,.2f}"] if price is not None else []),
                    _size(kept * (found.bytes_in + found.bytes_added)), _size(kept * found.bytes_table)])
    yield ""
    yield "An estimate: all shards are taken to be like these, and devices to add up."


def _row(cells: list[str]) -> str:
    widths = [11, 14, 13, 11, 13, 9, 9] if len(cells) == 7 else [12, 16, 15, 13, 12, 12]
    return "".join(f"{cell:<{width}}" if not place else f"{cell:>{width}}"
                   for place, (cell, width) in enumerate(zip(cells, widths, strict=True))).rstrip()


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} PB"
