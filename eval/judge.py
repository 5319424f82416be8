"""A judge of one's own: a class, named by the experiment file, that looks at pictures and reads captions.

    [evaluate.judge]
    target = "my_package.judge:Judge"
    model = "folder/of/its/weights"

The class is imported and so runs its code, with all that the user may do. Nothing but the user's own file names it: no
shard, checkpoint or prompt can.
"""

import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from PIL import Image

from eval.config import Evaluate, JudgeRef
from eval.prompts import Prompt
from recap.errors import UserError
from recap.rundir import folder_identity

WHERE = "evaluate.judge"
METRIC = re.compile(r"[a-z][a-z0-9_]{0,39}")
TAKEN = ("schema", "sets", "prompts", "size", "is_cut", "features", "clip_score", "fid", "fid_infinity", "fd_dinov2",
         "fd_dinov2_infinity", "cmmd", "kid", "precision", "recall", "density", "coverage", "distances", "num_images",
         "num_prompts", "num_reference", "clip_truncated", "clip_model", "judges", "headline_sets", "resolutions",
         "is_paired")
"""Names in scores.json and metrics.json that no judge may use."""


@dataclass(frozen=True, slots=True)
class CaptionFacts:
    """What a caption says of an image, counted."""

    covered: int
    """Facts of the image that it states."""
    wrong: int
    """Statements of its that are false."""
    total: int
    """Facts of the image that there are to state."""


class Facts(Protocol):
    """What `Judge.caption` returns: `CaptionFacts`, or anything with its three counts."""

    @property
    def covered(self) -> int: ...
    @property
    def wrong(self) -> int: ...
    @property
    def total(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Metric:
    """What a judge measures."""

    about: str
    """What it is, in one line."""
    lower_is_better: bool = False
    is_share: bool = True
    """In 0…1, written in percent; else any number from 0 on."""


class Judge(Protocol):
    """Says what a picture shows of what its prompt asks. A class also has `open(folder: str, device: str) -> Judge`."""

    name: str
    """Model and version, for the report."""
    metrics: Mapping[str, Metric | str]
    """Metric (`object_accuracy`) → what it is; a text stands for a share, higher is better. The first leads."""

    def images(self, images: list[Image.Image], prompts: list[Prompt]) -> list[dict[str, float | None]]:
        """For every picture, metric → value; None where the prompt asks nothing of that kind."""
        ...


class CaptionJudge(Judge, Protocol):
    """One that reads captions as well."""

    def caption(self, caption: str, metadata: dict[str, Any]) -> Facts:
        """What a caption says right and wrong of an image, by the image's metadata (`KEY.json` of its shard).

        Raises:
            KeyError: the metadata does not say what the image holds.
        """
        ...


BUILT_IN = {"detector": "eval.judges.detector:DetectorJudge", "vqa": "eval.judges.vqa:VqaJudge"}
"""Table of `[evaluate]` → class, whose `open(table, device)` gives a judge."""
JUDGES = ("judge", *BUILT_IN)
"""One's own leads."""


def open_named(name: str, config: Evaluate, device: str) -> Judge:
    """Open one of `JUDGES`, whose table is there."""
    table = getattr(config, name)
    if name not in BUILT_IN:
        return open_judge(table, device)
    module, _, kind = BUILT_IN[name].partition(":")
    return cast(Judge, getattr(importlib.import_module(module), kind).open(table, device))


def check_prompts(config: Evaluate, prompts: list[Prompt]) -> None:
    """Have the built-in judges look at what comes with the prompts. `UserError` where they could not read it later."""
    for table, target in BUILT_IN.items():
        if (own := getattr(config, table)) is not None:
            importlib.import_module(target.partition(":")[0]).check(own, prompts)


def metrics_of(judge: Judge) -> dict[str, Metric]:
    """Its metrics, in order."""
    return {name: Metric(found) if isinstance(found, str) else found for name, found in judge.metrics.items()}


def open_judge(ref: JudgeRef, device: str) -> CaptionJudge:
    """Import the class and open its model.

    Raises:
        UserError: no such module or class, a folder that isn't there or cannot be opened, or no usable `metrics`.
    """
    find_judge(ref)
    module, _, name = ref.target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"{WHERE}.target: {module} cannot be imported ({_one_line(error)}): install what it needs"
                        ) from error
    if found is None:
        raise UserError(f"{WHERE}.target: no {name} in {module}: name a class of that module")
    if not callable(getattr(found, "open", None)):
        raise UserError(f"{WHERE}.target: {ref.target} has no open(folder, device): see eval/judge.py")
    try:
        judge = cast(CaptionJudge, found.open(ref.model, device))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{WHERE}.model: {ref.target} cannot open {ref.model}: {_one_line(error)}") from error
    _check_metrics(ref.target, judge)
    return judge


def find_judge(ref: JudgeRef) -> list[Any]:
    """Look, before hours of work, whether module and folder are there; nothing of the class is run.

    Returns:
        The identity of the folder, for fingerprints.
    """
    module, colon, name = ref.target.partition(":")
    if not (colon and module and name):
        raise UserError(f"{WHERE}.target: {ref.target!r} names no class: write package.module:Class")
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # its parent is missing or broken; or the name is no module's
        found = None
    if found is None:
        raise UserError(f"{WHERE}.target: no module {module}: install it, or put its folder on PYTHONPATH")
    folder = Path(ref.model)
    if not folder.is_dir():
        raise UserError(f"{WHERE}.model: no folder at {ref.model}: check the path")
    return folder_identity(folder)


def judge_images(judge: Judge, images: list[Image.Image], prompts: list[Prompt]) -> list[dict[str, float | None]]:
    """`judge.images`, held to what it promises: for every picture every metric, None or a number from 0 on; shares in
    0…1.
    """
    found = judge.images(images, prompts)
    if len(found) != len(images):
        raise UserError(f"{WHERE}: {judge.name} gave {len(found)} results for {len(images)} pictures: "
                        "mend its images()")
    for values in found:
        if values.keys() != judge.metrics.keys():
            raise UserError(f"{WHERE}: {judge.name} gave the metrics {', '.join(values)}, its `metrics` are "
                            f"{', '.join(judge.metrics)}: mend its images()")
    metrics = metrics_of(judge)
    return [{name: _checked(judge.name, name, metric, values[name]) for name, metric in metrics.items()}
            for values in found]


def _checked(judge: str, name: str, metric: Metric, value: float | None) -> float | None:
    if value is None:
        return None
    number, most = float(value), 1.0 if metric.is_share else float(np.finfo(np.float64).max)
    if not 0 <= number <= most:  # NaN is refused as well
        limits = "in 0…1" if metric.is_share else "a finite number from 0 on"
        raise UserError(f"{WHERE}: {judge} gave {name} = {number}, which is not {limits}: mend its images()")
    return number


def _check_metrics(target: str, judge: Judge) -> None:
    names = list(judge.metrics)
    bad = [name for name in names if not METRIC.fullmatch(name) or name in TAKEN]
    if bad or not names:
        what = f"calls a metric {bad[0]!r}" if bad else "has no metrics"
        raise UserError(f"{WHERE}.target: {target} {what}: give names like object_accuracy, none of {', '.join(TAKEN)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
