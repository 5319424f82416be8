"""Finished runs, as they lie in their folders `runs/NAME`: what they scored, by whom, and how they were made."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval.beside import MAX_BYTES, BesideComparison, BesideRun, is_finite
from eval.comparisons import Run, summarize
from eval.fid import Statistics
from eval.measures import DISTANCES, measures_of
from eval.provenance import settings
from eval.reference import load
from eval.verdict import Findings
from recap.config import Name
from recap.errors import UserError
from recap.show import plain

OWN = ("name", "runs", "device", "report")
"""Settings, or tables of them, that say nothing of what a run found."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Run(BesideRun):
    seed: Annotated[int, Field(ge=0)] = 0
    arm: Name
    """It is also a folder's name."""


class _Report(_Part):
    version: Literal[1] = Field(alias="schema")
    runs: Annotated[list[_Run], Field(min_length=1)]
    comparisons: list[BesideComparison] = []
    config: dict[str, Any] = {}
    environment: dict[str, str] = {}


class _Distance(_Part):
    network: str
    resize: str
    dim: int
    num_reference: int
    why: str | None = None


class _Judge(_Part):
    name: str
    metrics: dict[str, dict[str, Any]]


class _Metrics(_Part):
    """What must be known of how an arm was scored."""

    distances: dict[str, _Distance]
    judges: list[_Judge]
    clip_model: str | None
    headline_sets: list[str]
    num_images: int
    num_reference: int
    num_prompts: int | None = None


@dataclass(frozen=True)
class FinishedRun:
    """One run whose report is written."""

    name: str
    """No other run beside it is called so."""
    folder: Path
    runs: list[Run]
    comparisons: list[dict[str, Any]]
    """Of its arms among themselves."""
    settings: dict[str, str]
    """`train.lr` → `1e-05`, of what figures may hang on."""
    environment: dict[str, str]
    _known: dict[str, tuple[Any, Statistics] | None] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def findings(self) -> Findings:
        arms = list(dict.fromkeys(run.arm for run in self.runs))
        return Findings(arms, measures_of(self.runs[0].metrics), summarize(arms, self.runs), self.comparisons)

    def of(self, arm: str) -> list[Run]:
        """Its runs of one arm, in the order of their seeds."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    def has_real_images_of(self, other: "FinishedRun", table: str) -> bool | None:
        """Whether both were held against the same real images, as the network of `table` sees them; None where that is
        no more known.
        """
        ours, theirs = self._real_images(table), other._real_images(table)
        if ours is None or theirs is None:
            return None
        (data, own), (their_data, their_own) = ours, theirs
        return data == their_data or (own.mu.shape == their_own.mu.shape and np.allclose(own.mu, their_own.mu)
                                      and np.allclose(own.sigma, their_own.sigma))

    def _real_images(self, table: str) -> tuple[Any, Statistics] | None:
        """A hash of what they were, and their statistics."""
        if table not in self._known:
            path = self.folder / "reference" / f"{table}.npz"
            found = load(path) if path.is_file() else None
            self._known[table] = (found.about.get("data"), found.statistics) if found else None
        return self._known[table]


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Read and check them.

    Raises:
        UserError: fewer than two, or one twice, or one that is not finished, or was scored by an older Recap.
    """
    if len(folders) < 2:
        raise UserError(f"report: {folders[0] if folders else 'no run'} alone: name the folders of two runs or more, "
                        "or write one run's report with -c FILE")
    for place, folder in enumerate(folders):
        if folder.resolve() in [each.resolve() for each in folders[:place]]:
            raise UserError(f"report: {folder} is named twice: name every run once")
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """As much of each path's end as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = [plain("/".join(each[-length:])) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str) -> FinishedRun:
    report = _report(folder)
    runs = [Run(each.seed, each.arm, folder / f"seed-{each.seed}/generate/{each.arm}",
                folder / f"seed-{each.seed}/eval/{each.arm}") for each in report.runs]
    for run, reported in zip(runs, report.runs, strict=True):
        _check(run, reported, folder)
    return FinishedRun(name, folder, runs, [each.model_dump() for each in report.comparisons],
                       _settings(report.config), report.environment)


def _report(folder: Path) -> _Report:
    path = folder / "report" / "report.json"
    if not folder.is_dir():
        raise UserError(f"report: no folder {folder}: give folders of finished runs, runs/NAME")
    if not path.is_file():
        raise UserError(f"report: no finished run in {folder}, it has no report/report.json: finish it with "
                        "`recap run`, or give another folder")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"report: {path} is larger than {MAX_BYTES:,} bytes: compare runs of fewer arms")
    try:
        return _Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"report: {path} is not the report of a run ({_first(error)}): run `recap report -c FILE "
                        "--redo` again") from None


def _check(run: Run, reported: _Run, folder: Path) -> None:
    """`UserError` unless a run was scored as it is now, and is the one that its report speaks of."""
    try:
        _Metrics.model_validate(run.metrics)
        now = _Run(seed=run.seed, arm=run.arm, metrics=run.metrics)
    except ValidationError as error:
        raise UserError(f"report: {run.evaluated} was scored by an older Recap, or is damaged ({_first(error)}): "
                        "evaluate it again, with `recap evaluate` and `recap report`") from None
    if bad := _faulty(run):
        raise UserError(f"report: {run.evaluated} is damaged ({plain(bad)}): evaluate it again, with `recap evaluate` "
                        "and `recap report`")
    if now.metrics != reported.metrics:
        raise UserError(f"report: the report in {folder} is older than its evaluations: run `recap report` again "
                        "there first")


def _faulty(run: Run) -> str | None:
    """What a run's figures lack that comparisons need."""
    measures = measures_of(run.metrics)
    if odd := [each.key for each in measures if not is_finite(run.metrics[each.key])]:
        return f"{odd[0]} is no finite number"
    if unknown := [each.key for each in measures if each in DISTANCES and each.key not in run.metrics["distances"]]:
        return f"it does not say what {unknown[0]} was measured by"
    odd = [name for name, column in run.scores.columns.items()
           if not all(value is None or is_finite(value) for value in column)]
    return f"a score of {odd[0]} is no finite number" if odd else None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{plain('.'.join(map(str, first['loc'])))[:100] or 'the whole'}: {first['msg'][:200]}"


def _settings(config: dict[str, Any]) -> dict[str, str]:
    lines = (line.partition(" = ") for line in settings(config).split("\n") if line)
    return {key: value for key, _, value in lines if key.split(".")[0] not in OWN}
