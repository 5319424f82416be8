"""The committed result of another run, to show beside this one: its `report.json`, with a few words added by hand.

    {"schema": 1, "title": "…", "command": "…", "date": "2026-01-31", "hardware": "…", "runs": […], "comparisons": […]}

`title`, `command`, `date` and `hardware` may be missing; `runs` and `comparisons` are as `recap report` writes them
(and `set_comparisons`), `base_models` as `recap pool` does; whatever else is there is passed over.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from eval.comparisons import summarize
from eval.judge import METRIC
from eval.measures import measures_of
from eval.verdict import Findings
from recap.errors import UserError
from recap.storage import identity

WHERE = "report.beside"
MAX_BYTES = 20_000_000
MAX_ARMS = 50
_Text = Annotated[str, Field(max_length=2000)]


def _numbers(metrics: Any) -> Any:
    """Metrics without what is no number; their `judges` are kept, as they name them."""
    if not isinstance(metrics, dict):
        return metrics
    return {key: value for key, value in metrics.items() if key == "judges" or value is None or is_finite(value)}


def is_finite(value: Any) -> bool:
    """Of a number that a float can hold: JSON's integers may have any number of digits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # not of NaN


def _few_arms(runs: list["BesideRun"]) -> list["BesideRun"]:
    if len(arms := {run.arm for run in runs}) > MAX_ARMS:
        raise ValueError(f"{len(arms):,} arms, and at most {MAX_ARMS} can be shown")
    return runs


def _usual_names(metrics: dict[str, Any]) -> dict[str, Any]:
    if not measures_of(metrics):
        raise ValueError("it has no metric that is known, such as fid or clip_score")
    if bad := [measure.key for measure in measures_of(metrics) if not METRIC.fullmatch(measure.key)]:
        raise ValueError(f"a metric is called {bad[0][:40]!r}, and names are like object_accuracy")
    return metrics


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class BesideRun(_Part):
    """One arm of one seed."""

    seed: int = 0
    base_model: int = 0
    arm: _Text
    metrics: Annotated[dict[str, Any], BeforeValidator(_numbers), AfterValidator(_usual_names)]


class BesideComparison(_Part):
    a: _Text
    b: _Text
    metric: _Text
    difference: FiniteFloat
    ci: tuple[FiniteFloat, FiniteFloat] | None = None
    ratio: FiniteFloat | None = None
    ratio_ci: tuple[FiniteFloat, FiniteFloat] | None = None
    p: FiniteFloat | None = None
    verdict: Literal["better", "worse", "can't tell"] = "can't tell"
    """No other words: they would be the file's own, in our sentences."""
    note: _Text | None = None
    num_prompts: int | None = None
    num_seeds: int | None = None
    num_base_models: int | None = None
    p_holm: FiniteFloat | None = None
    over: Literal["prompts", "prompts and seeds", "images"] | None = None


class BesideSets(BesideComparison):
    """Of one arm with itself: `a` and `b` are prompt sets."""

    arm: _Text
    means: tuple[FiniteFloat, FiniteFloat]


class BesideModel(_Part):
    """One base model of several, and what its runs alone say."""

    model: _Text
    comparisons: list[BesideComparison] = []


class Beside(_Part):
    """What another run found."""

    version: Literal[1] = Field(alias="schema")
    title: _Text | None = None
    command: _Text | None = None
    date: _Text | None = None
    hardware: _Text | None = None
    runs: Annotated[list[BesideRun], Field(min_length=1), AfterValidator(_few_arms)]
    comparisons: list[BesideComparison] = []
    base_models: list[BesideModel] = []
    set_comparisons: list[BesideSets] = []

    def findings(self) -> Findings:
        """The same as of this run: means over seeds, and comparisons."""
        arms = list(dict.fromkeys(run.arm for run in self.runs))
        return Findings(arms, measures_of(self.runs[0].metrics), summarize(arms, self.runs),
                        [each.model_dump() for each in self.comparisons])


def find_beside(path: str) -> list[Any]:
    """The identity of the file, for fingerprints; `UserError` where `read_beside` would give one."""
    read_beside(path)
    return identity(path)


def read_beside(path: str) -> Beside:
    """Read and check it whole.

    Raises:
        UserError: it is not there, or not of this form; the first thing wrong is named.
    """
    if not Path(path).is_file():
        raise UserError(f"{WHERE}: no file at {path}: check the path")
    if Path(path).stat().st_size > MAX_BYTES:
        raise UserError(f"{WHERE}: {path} is larger than {MAX_BYTES:,} bytes: give a report.json")
    try:
        return Beside.model_validate_json(Path(path).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(f"{WHERE}: {path} is not the result of a run ({place}: {first['msg'][:200]}): give a "
                        "report.json of schema 1") from None
