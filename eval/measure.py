"""A set of images, and one gauge → what it measured of every image: by any number of processes, once, and kept.

A unit of images is done when its part is there; to resume is to skip those. What was measured is bound to the very
images and to the gauge: a set that has changed since is measured anew, and so it is where another network is named.
"""

import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from eval.config import Evaluate
from eval.gauges import Gauge, Values, open_gauge, to_text
from eval.images import Given, Images
from eval.prompts import Prompt
from recap import engines, progress
from recap.engines import Report, Result
from recap.errors import BadSample, UserError
from recap.memory import in_halves
from recap.meter import Meter
from recap.rundir import StageDir
from recap.shard_work import NUM_DECODERS, Stats, ahead, reasons
from recap.shards import Reject
from recap.storage import clean, write_bytes

FINITE = {"features", "clip_score"}
"""Columns in which no number may be missing; in others NaN stands for what a prompt does not ask."""


@dataclass(frozen=True)
class Measured:
    """What one gauge found of a set of images."""

    name: str
    """Model and version of the gauge."""
    about: dict[str, Any]
    """What else is to be said of it."""
    values: Values
    """Column → (N, …), a row an image, in their order; and `size`, (N, 2), its width and height."""
    excluded: dict[str, int]
    """Reason → images that could not be used."""


@dataclass(frozen=True)
class Job:
    """All that a worker has to know, wherever it is."""

    out: Path
    gauge: str
    config: Evaluate
    images: Images
    places: dict[str, int]
    """Unit → the number of its part."""

    def open(self, device: str, report: Report) -> AbstractContextManager["Measurer"]:
        return nullcontext(Measurer(self, open_gauge(self.gauge, self.config, device), report))

    def part(self, unit: str) -> Path:
        return self.out / f"{self.places[unit]:05d}.npz"


def measure(folder: Path, gauge: str, config: Evaluate, images: Images, checkpoint: Any, title: str, device: str
            ) -> Measured | None:
    """Measure every image, as far as it was not done before.

    Args:
        folder: what is measured of this set of images, by gauge.
        gauge: one of `eval.gauges.gauges`.
        config: what it is opened by.
        images: the set.
        checkpoint: identity of the gauge's weights, so that other ones are not taken for these.
        title: for the bar.
        device: a torch device; `cuda` for all GPUs.

    Returns:
        What was found; None in all processes but the first.
    """
    measured = {"gauge": getattr(config, gauge), "checkpoint": checkpoint, "sets": images.sets}
    stage = StageDir(folder / gauge, {**measured, "images": images.identity()})
    if not images.are_kept() and _was(stage, measured):
        return _read(stage) if progress.is_main() else None
    if stage.state() == "changed" and progress.is_main():
        progress.say(f"    {stage.path} was measured of other images or by other weights: measured anew")
        stage.clear()
    if stage.state() != "done":
        places = {unit: place for place, unit in enumerate(images.units())}
        _measure(stage, Job(stage.path, gauge, config, images, places), title, device)
    return _read(stage) if progress.is_main() else None


def _was(stage: StageDir, measured: dict[str, Any]) -> bool:
    """Whether all of that was measured before, of images that are no more."""
    changed = {line.partition(":")[0].partition(".")[0] for line in stage.changes()}
    return (stage.path / "done.json").is_file() and not changed & measured.keys()


def _measure(stage: StageDir, job: Job, title: str, device: str) -> None:
    is_main = progress.is_main()  # which tells the other ranks what there is to do
    if is_main:
        stage.begin()
    parts = {unit: job.part(unit) for unit in job.places}
    left = [unit for unit, part in parts.items() if not part.is_file()]
    finished = [_read_part(part).stats() for unit, part in parts.items() if unit not in left]
    with Meter(stage.path, job.images.count() if is_main else None, len(parts), finished, title) as meter:
        if left or progress.num_processes() > 1:
            for unit, stats in engines.work(job, left, job.config.engine, job.config.workers, device, meter):
                meter.shard(unit, stats["count"], reasons(stats))
    if is_main:
        clean(str(stage.path))
        stage.finish({"parts": [part.name for part in parts.values()]})


def _read(stage: StageDir) -> Measured:
    parts = [_read_part(stage.path / name) for name in stage.result()["parts"]]
    if not (used := [part for part in parts if part.num]):
        return Measured("", {}, {"size": np.zeros((0, 2), dtype=np.int32)}, _sum(parts))
    if len(names := {part.about["name"] for part in used}) > 1:
        raise UserError(f"{stage.path} was measured by several models ({', '.join(sorted(names))}): delete that "
                        "folder, and run the same command again")
    values = {name: np.concatenate([part.values[name] for part in used]) for name in used[0].values}
    about = {key: value for key, value in used[0].about.items() if key not in ("name", "excluded")}
    return Measured(used[0].about["name"], about, values, _sum(parts))


def _sum(parts: list["Part"]) -> dict[str, int]:
    return dict(sum((Counter(part.about["excluded"]) for part in parts), Counter[str]()))


# --- one worker ----------------------------------------------------------------------------------------------------


class Measurer:
    """Measures units, one after the other, on one device."""

    def __init__(self, job: Job, gauge: Gauge, report: Report) -> None:
        self.job, self.gauge, self.report = job, gauge, report

    def process(self, units: Iterable[str]) -> Iterator[Result]:
        """Units with their stats; the part that each leaves marks its end."""
        for unit in units:
            part = self._measured(unit)
            write_bytes(str(self.job.part(unit)), part.to_bytes())
            yield unit, part.stats()
        for remark in self.gauge.remarks():
            progress.warn(remark)

    def _measured(self, unit: str) -> "Part":
        rejects: list[Reject] = []
        found: list[Values] = []
        usable = _usable(ahead(self._ready, self.job.images.read(unit, rejects), NUM_DECODERS), rejects)
        num = 0
        while batch := list(islice(usable, self.job.config.batch_size)):
            found.append(self._rows(batch))
            num += len(batch)
            self.report(unit, num + len(rejects), dict(Counter(reject.reason for reject in rejects)))
        about = json.loads(to_text(self.gauge)) | {"excluded": Counter(reject.reason for reject in rejects)}
        values = {name: np.concatenate([each[name] for each in found]) for name in found[0]} if found else {}
        return Part(about, values)

    def _ready(self, given: Given) -> "Ready | Reject":
        where, _, prompt = given
        try:
            image = self.job.images.decode(given)
        except BadSample as error:
            return Reject("", where, error.reason, error.detail)
        return Ready(where, self.gauge.prepare(image), prompt or Prompt(""), image.size)

    def _rows(self, batch: list["Ready"]) -> Values:
        """In halves where the memory does not suffice for all at once."""
        rows = in_halves(self._columns, batch)
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _columns(self, batch: list["Ready"]) -> list[Values]:
        columns = self.gauge.measure([each.image for each in batch], [each.prompt for each in batch])
        for name in FINITE & columns.keys():
            if broken := [each.where for each, value in zip(batch, columns[name], strict=True)
                          if not np.isfinite(value).all()]:
                raise UserError(f"evaluate.{self.job.gauge}: {self.gauge.name} gives no finite numbers of {broken[0]}: "
                                "its weights are damaged, or too large for the device's numbers")
        columns["size"] = np.array([each.size for each in batch], dtype=np.int32)
        return [{name: column[place] for name, column in columns.items()} for place in range(len(batch))]


@dataclass(frozen=True, slots=True)
class Ready:
    """An image that a gauge has prepared."""

    where: str
    image: Any
    prompt: Prompt
    size: tuple[int, int]


def _usable(images: Iterable[Ready | Reject], rejects: list[Reject]) -> Iterator[Ready]:
    for each in images:
        if isinstance(each, Reject):
            rejects.append(each)
        else:
            yield each


# --- parts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What was measured of one unit."""

    about: dict[str, Any]
    """`name` of the gauge, `excluded`, and what else the gauge says of itself."""
    values: Values

    @property
    def num(self) -> int:
        return len(self.values["size"]) if self.values else 0

    def stats(self) -> Stats:
        excluded = self.about["excluded"]
        return {"count": self.num + sum(excluded.values()), "successes": self.num,
                "status_dict": {"success": self.num, **excluded}}

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        members: dict[str, Any] = {**self.values, "about": np.str_(json.dumps(self.about))}
        np.savez(buffer, **members)
        return buffer.getvalue()


def _read_part(path: Path) -> Part:
    """`UserError` for what `Part.to_bytes` did not make; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as content:
            members = dict(content)
        return Part(json.loads(str(members.pop("about"))), members)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it and the done.json beside it, and run "
                        "the same command again") from None
