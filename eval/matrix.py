"""Caption style × prompt style: what arms, each trained on its own captions, make of prompts of every kind.

People's prompts differ in style, and an arm may do well on those that are written as its captions are, and no others.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.comparisons import CONTROLS, Pair, Run
from eval.measures import CLIP_SCORE, DISTANCES, Measure
from eval.statistics import paired_difference
from eval.verdict import Findings


@dataclass(frozen=True)
class Cell:
    """One arm and one prompt set."""

    text: str
    beneath: str
    """CLIP score, where another measure leads."""
    shade: int
    """How good among the arms: 0 for the worst, 100 for the best."""
    is_best: bool
    """Best, alone or with others, of the arms that are no controls, and shown to be better than the baseline."""
    is_own: bool
    """Whether the arm's captions are of the style of these prompts, by their names."""


@dataclass(frozen=True)
class Column:
    """A prompt set."""

    name: str
    num_images: int
    is_probe: bool
    """Whether it does not count in the headline."""


@dataclass(frozen=True)
class Matrix:
    """The table of the page."""

    measure: Measure
    columns: list[Column]
    rows: list[tuple[str, list[Cell]]]
    """Arm, and a cell for each column."""

    @property
    def has(self) -> dict[str, bool]:
        """Which of its marks there are."""
        cells = [cell for _, own in self.rows for cell in own]
        return {"best": any(cell.is_best for cell in cells), "own": any(cell.is_own for cell in cells),
                "probe": any(column.is_probe for column in self.columns)}


def matrix(found: Findings, runs: Sequence[Run], captions: Mapping[str, Iterable[str]]) -> Matrix | None:
    """The table by the leading measure; None where there are fewer than two prompt sets, or no prompts.

    Args:
        found: arms and measures.
        runs: their scores.
        captions: arm → kinds of captions that it was trained on; an arm that is not here goes by its name.
    """
    metrics = runs[0].metrics
    if len(metrics["sets"]) < 2 or found.lead in DISTANCES:
        return None
    columns = [Column(name, about["num_images"], name not in metrics["headline_sets"])
               for name, about in metrics["sets"].items()]
    arms = [each.arm for each in found.summaries]
    by_column = [_cells(found, runs, arms, column.name, captions) for column in columns]
    return Matrix(found.lead, columns, list(zip(arms, map(list, zip(*by_column, strict=True)), strict=True)))


def _cells(found: Findings, runs: Sequence[Run], arms: list[str], name: str, captions: Mapping[str, Iterable[str]]
           ) -> list[Cell]:
    """A column: the cell of every arm."""
    lead = found.lead
    values = {arm: _mean(runs, arm, name, lead) for arm in arms}
    good = {arm: -value if lead.lower_is_better else value for arm, value in values.items() if value is not None}
    most = max((value for arm, value in good.items() if arm not in CONTROLS), default=None)
    best = {arm for arm, value in good.items() if value == most and arm not in CONTROLS
            and _is_better(found, runs, arm, name)}
    return [Cell(lead.text(values[arm]),
                 "" if lead == CLIP_SCORE else CLIP_SCORE.text(_mean(runs, arm, name, CLIP_SCORE)),
                 _shade(good.get(arm), good.values()), arm in best, is_own(captions.get(arm, [arm]), name))
            for arm in arms]


def _shade(value: float | None, all_values: Collection[float]) -> int:
    """0 for the worst, 100 for the best; 0 where there is no difference."""
    if value is None or (spread := max(all_values) - min(all_values)) == 0:
        return 0
    return round(100 * (value - min(all_values)) / spread)


def _mean(runs: Sequence[Run], arm: str, name: str, measure: Measure) -> float | None:
    """Over seeds."""
    values = [run.metrics["sets"].get(name, {}).get(measure.key) for run in runs if run.arm == arm]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _is_better(found: Findings, runs: Sequence[Run], arm: str, name: str) -> bool:
    """Whether it is shown to be better than the baseline on one prompt set."""
    pair = Pair.of(arm, found.baseline, runs)
    if arm == found.baseline or not pair.ours or not pair.is_paired:
        return False
    ours, theirs = (np.array([run.scores.by_prompt(found.lead.key, [name]) for run in each])
                    for each in (pair.ours, pair.theirs))
    if np.isnan(ours - theirs).all():
        return False
    result = paired_difference(ours, theirs, 0, seeds=pair.seeds, lower_is_better=found.lead.lower_is_better)
    return bool(result["verdict"] == "better")


def is_own(kinds: Iterable[str], name: str) -> bool:
    """Whether the name of a prompt set holds that of a kind of captions: `reference-short` is of `short`."""
    return bool(_parts(name) & {part for kind in kinds for part in _parts(kind)})


def _parts(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower())) - {""}
