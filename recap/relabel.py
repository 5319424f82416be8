"""Shards in, the same shards with captions out. A shard is the unit of work; to resume, run the same command again.

A shard's stats are written last, and mark it as done. What a worker does with a shard, is in `relabeller.py`.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recap import engines, progress
from recap.config import Data, Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.config.relabel import Relabel
from recap.data_card import write_card
from recap.engines import Report
from recap.environment import environment
from recap.errors import UserError
from recap.meter import Meter
from recap.outputs import written
from recap.relabeller import Relabeller
from recap.rundir import StageDir, Stale, digest, plain
from recap.shard_work import Stats, ahead, read_stats, reasons, total
from recap.shards import count_images, shard_name
from recap.storage import Identity, check_writable, clean, identities, is_local, names


@dataclass(frozen=True)
class Job:
    """All that a worker has to know, wherever it is."""

    out: str
    """Folder or URL."""
    captioner: CaptionerConfig
    tuned: Path | None
    styles: dict[str, Style]
    config: Relabel
    data: Data
    settings: str
    """What the captions depend on, as a hash, for the stats."""

    def open(self, device: str, report: Report) -> Relabeller:
        return Relabeller(self, device, report)


def run(stage: StageDir, shards: list[str], captioner: CaptionerConfig, tuned: Path | None, styles: dict[str, Style],
        config: Relabel, data: Data, device: str, stale: Stale = "refuse") -> dict[str, Any]:
    """Caption every image in every style; write each shard, then its quarantine, then its stats. At the end, the card.

    Returns:
        `images_in`, `images_out`, `quarantined` (reason → number), `captions` (`STYLE/FAULT` → number), `versions`.

    Raises:
        UserError: no image could be used; or there are shards that were made with other settings, and `stale` is
            `refuse`.
    """
    out = config.output or str(stage.path)
    settings = digest({name: value for name, value in stage.reads.items() if name not in ("inputs", "output")})
    job = Job(out, captioner, tuned, styles, config, data, settings)
    is_main = progress.is_main()  # which tells the other ranks what is left to do
    _check_output(out, shards)
    if is_main:
        clean(out)
        check_writable(out)
    found = _finished_before(job, shards, stale) if is_main else {}
    left = [shard for shard in shards if shard not in found]
    with Meter(stage.path, count_images(shards) if is_main else None, len(shards), found.values()) as meter:
        if left or progress.num_processes() > 1:
            for shard, stats in engines.work(job, left, config.engine, config.workers, device, meter):
                found[shard] = stats
                stage.log(event="shard", shard=shard_name(shard), **stats)
                meter.shard(shard, stats["count"], reasons(stats))
    if not is_main:
        return {}
    clean(out)  # what lost workers have left
    others = ahead(lambda shard: found.get(shard) or read_stats(out, shard), shards, 32)  # of other ranks
    return _finish(job, stage, list(others), shards)


def _check_output(out: str, shards: list[str]) -> None:
    """Refuse to write over the input."""
    def folders(shard: str) -> list[str | Path]:
        """A link's own, and that of what it leads to."""
        path = Path(shard)
        return [path.parent.resolve(), path.resolve().parent] if is_local(shard) else [shard.rpartition("/")[0]]

    place = Path(out).resolve() if is_local(out) else out
    if at := next((shard for shard in shards if place in folders(shard)), None):
        raise UserError(f"relabel.output: {out} holds {shard_name(at)} of the input, which would be written over: "
                        "choose another folder")


def _finished_before(job: Job, shards: list[str], stale: Stale) -> dict[str, Stats]:
    """The stats of the shards that an earlier try has finished; not of those that are to be made again.

    Of other settings, `stale` says which are; so of files that only have another time, which a copy gives them; of
    another version of the input, all.
    """
    present = names(job.out)
    done = [shard for shard in shards if f"{shard_name(shard)}_stats.json" in present]
    found = dict(zip(done, ahead(lambda shard: read_stats(job.out, shard), done, 32), strict=True))
    inputs = identities(done)
    changed = {shard: stats for shard, stats in found.items()
               if not _is_same(shard, stats["input"], inputs.get(shard), stale == "go_on")}
    others = {shard: stats for shard, stats in found.items() if stats["settings"] != job.settings}
    if stale == "refuse" and (wrong := list(changed or others)):
        what = "of another input" if changed else "of other settings"
        those = "those that only have another time" if changed else "them"
        raise UserError(f"relabel: {job.out} holds {len(wrong)} shards {what}, {shard_name(wrong[0])} for one: choose "
                        f"another relabel.output, or keep {those} with --go-on, or make them again with --redo")
    again = changed | (others if stale == "redo" else {})
    return {shard: stats for shard, stats in found.items() if shard not in again}


def _is_same(shard: str, before: Identity | None, now: Identity | None, is_copy: bool) -> bool:
    """Whether two versions of a shard are one; a copy on a disk has another time."""
    if is_copy and is_local(shard) and before and now:
        return before[:2] == now[:2]
    return before == now


def _finish(job: Job, stage: StageDir, found: list[Stats], shards: list[str]) -> dict[str, Any]:
    """The sums over all shards, and the set's card."""
    result = total(found) | {"captions": dict(sum((Counter(stats["captions"]) for stats in found), Counter[str]()))}
    if not result["images_out"]:
        raise UserError(f"relabel: no image of {', '.join(shards[:3])} could be used ({result['quarantined']}): "
                        "check data.shards")
    if job.config.format != "folder":  # which holds no shards to read again
        settings = json.loads(json.dumps(stage.reads, default=plain))
        outputs = [written(job.config.format, job.out, shard_name(shard)) for shard in shards]
        write_card(job.out, outputs, result, settings, environment())
    return result | {"versions": environment()}
