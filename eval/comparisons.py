"""Arms against arms: means over seeds, and paired differences over prompts and seeds."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eval.drawn import Drawn, clusters, read_list
from eval.measures import CLIP_SCORE, DISTANCES, Measure, headline_measures, measures_of
from eval.scores import Scores, check_sets
from eval.statistics import (
    ALPHA,
    CANT_TELL,
    holm,
    mean_over_runs,
    paired_difference,
    paired_ratio,
    unpaired_difference,
)
from recap.errors import UserError

CONTROLS = ("base", "oracle", "shuffled")
"""Arms that say what the others' figures mean; none of them is the claim."""


class Scored(Protocol):
    """What one arm of one seed scored."""

    @property
    def seed(self) -> int: ...
    @property
    def base_model(self) -> int: ...
    @property
    def arm(self) -> str: ...
    @property
    def metrics(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Run:
    """What one arm of one seed drew and scored."""

    seed: int
    arm: str
    images: Path
    """Folder that `generate` filled."""
    evaluated: Path
    """Folder that `evaluate` filled."""
    base_model: int = 0
    """Which model it was trained from, where several runs are pooled."""

    @cached_property
    def metrics(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.evaluated / "metrics.json").read_bytes())
            return found
        except (OSError, ValueError):
            raise self._unreadable("metrics.json") from None

    @cached_property
    def scores(self) -> Scores:
        """Every metric for every prompt."""
        try:
            return Scores.load(self.evaluated / "scores.json")
        except (OSError, ValueError, KeyError, TypeError):
            raise self._unreadable("scores.json") from None

    def headline(self, metric: str) -> np.ndarray:
        """Values of one metric, (N,), over the prompts of the headline sets; NaN for None. Equal prompts are one."""
        return self.scores.by_prompt(metric, self.metrics["headline_sets"], self._clusters)

    @cached_property
    def _clusters(self) -> list[int]:
        return clusters(self.drawn)

    @cached_property
    def drawn(self) -> list[Drawn]:
        """The pictures, and what they were drawn from."""
        return read_list(self.images)

    @cached_property
    def asked(self) -> list[tuple[str, str]]:
        """Prompt set and prompt of every picture."""
        return [(each.prompt.set, each.prompt.text) for each in self.drawn]

    def _unreadable(self, name: str) -> UserError:
        return UserError(f"no readable {name} in {self.evaluated}: run `recap evaluate` first")


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds."""

    arm: str
    values: dict[str, list[float]]
    """Measure → one value a seed, the mean over base models; none where no prompt asks for it."""

    def mean(self, measure: Measure) -> float | None:
        values = self.values.get(measure.key)
        return float(np.mean(values)) if values else None

    def spread(self, measure: Measure) -> float | None:
        """Standard deviation over seeds, normalised by their number − 1; none of a single seed."""
        values = self.values.get(measure.key, [])
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


def summarize(arms: list[str], runs: Sequence[Scored]) -> list[ArmSummary]:
    """The arms that have runs, in the order of the report."""
    found = []
    for arm in arms:
        by_seed: dict[int, list[dict[str, Any]]] = {}
        for run in runs:
            if run.arm == arm:
                by_seed.setdefault(run.seed, []).append(run.metrics)
        if by_seed:
            measures = measures_of(next(iter(by_seed.values()))[0])
            found.append(ArmSummary(arm, {each.key: _a_seed(each.key, by_seed.values()) for each in measures}))
    return found


def _a_seed(key: str, by_seed: Iterable[list[dict[str, Any]]]) -> list[float]:
    """Of every seed the mean over its base models."""
    values = [[each[key] for each in metrics if each.get(key) is not None] for metrics in by_seed]
    return [sum(own) / len(own) for own in values if own]


def baseline(arms: list[str]) -> str:
    """What arms are compared with: `alt`, the web's own captions, or else the first arm."""
    return "alt" if "alt" in arms else arms[0]


def claim(arms: list[str]) -> str | None:
    """The arm that the headline speaks of, fixed by name before any result: `mix`, or the first that is no control."""
    others = [arm for arm in arms if arm not in (*CONTROLS, baseline(arms))]
    return "mix" if "mix" in others else others[0] if others else None


# --- comparisons ---------------------------------------------------------------------------------------------------


def pairs(arms: list[str]) -> list[tuple[str, str]]:
    """Every two arms once, as (a, b): first all against the baseline, then against `oracle`, the bound, then the rest.

    Of a control and another arm, the control is b: `mix` is compared with `shuffled`.
    """
    ranks = {baseline(arms): 0, "oracle": 1} | {arm: 2 for arm in CONTROLS if arm not in (baseline(arms), "oracle")}
    ranked = sorted(arms, key=lambda arm: ranks.get(arm, 3))
    return [(a, b) for place, b in enumerate(ranked) for a in arms if a in ranked[place + 1:]]


def compare(arms: list[str], runs: list[Run], seed: int = 0) -> list[dict[str, Any]]:
    """All `pairs` of arms by every measure, as `report.json` lists them.

    Arms are paired over the prompts of the headline sets, and over training seeds: the prompt is the unit, so its
    scores are averaged over pictures and seeds. A distance to real images, a figure of a whole set, is compared by its
    pseudovalues, so that its difference is that of endless images; and by its ratio, too. Each says in which `unit` its
    difference is ("share": of 1), and whether "higher" or "lower" is `better`.

    Where several arms are held against the baseline by the headline measures, chance has as many tries: their p-values
    are adjusted as a family (`p_holm`), and what is no more significant is no more called better or worse. All others
    are for exploring, and not adjusted.
    """
    found = []
    for a, b in pairs(arms):
        if (pair := Pair.of(a, b, runs)).ours:
            pair.check_alike()
            found += [pair.named(measure) | pair.compared(measure, seed) for measure in measures_of(runs[0].metrics)
                      if all(measure.key in run.metrics for run in pair.runs)]
    headline = [each.key for each in headline_measures(measures_of(runs[0].metrics))]
    return adjusted(found, [each["b"] == baseline(arms) and each["metric"] in headline for each in found])


def adjusted(found: list[dict[str, Any]], in_family: list[bool]) -> list[dict[str, Any]]:
    """Comparisons with `p_holm` (None outside the family), and verdicts that heed it."""
    family = [place for place, each in enumerate(found) if in_family[place] and each["p"] is not None]
    ps = dict(zip(family, holm([found[place]["p"] for place in family]), strict=True))
    return [each | {"p_holm": ps.get(place)} | ({"verdict": CANT_TELL} if ps.get(place, 0) >= ALPHA else {})
            for place, each in enumerate(found)]


@dataclass(frozen=True)
class Pair:
    """Two arms and their runs, each beside the other's of the same training seed, from the same base model."""

    a: str
    b: str
    ours: list[Run]
    """Of arm a."""
    theirs: list[Run]
    """Of arm b."""
    places: list[tuple[int, int]]
    """Base model and training seed of each."""

    @classmethod
    def of(cls, a: str, b: str, runs: Sequence[Run]) -> "Pair":
        """An arm that is not trained is drawn once for each base model: that run stands beside each of the other's."""
        by_arm = [{(run.base_model, run.seed): run for run in runs if run.arm == arm} for arm in (a, b)]
        for mine, other in (by_arm, by_arm[::-1]):
            for model in {model for model, _ in mine}:
                seeds = [place for place in mine if place[0] == model]
                if len(seeds) == 1:
                    mine |= {place: mine[seeds[0]] for place in other if place[0] == model}
        shared = sorted(by_arm[0].keys() & by_arm[1].keys())
        ours, theirs = ([each[place] for place in shared] for each in by_arm)
        return cls(a, b, ours, theirs, shared)

    @property
    def runs(self) -> list[Run]:
        return [*self.ours, *self.theirs]

    @property
    def seeds(self) -> list[int]:
        return [seed for _, seed in self.places]

    def named(self, measure: Measure) -> dict[str, Any]:
        return {"a": self.a, "b": self.b, "metric": measure.key, **_units(measure), "num_seeds": len(set(self.seeds)),
                "num_base_models": len({model for model, _ in self.places})}

    def check_alike(self) -> None:
        """`UserError` unless both drew the same prompts and were scored alike."""
        first = self.ours[0]
        if self.is_paired and (differing := [run for run in self.runs if run.asked != first.asked]):
            raise UserError(f"arms {self.a} and {self.b} did not draw the same prompts ({differing[0].images} and "
                            f"{first.images}): generate and evaluate both again")
        if self.is_paired and any(run.scores.sets != first.scores.sets
                                  or run.metrics["headline_sets"] != first.metrics["headline_sets"]
                                  for run in self.runs):
            raise UserError(f"arms {self.a} and {self.b} were not scored by the same prompts: evaluate both again")
        wanted = {measure.key for measure in measures_of(first.metrics)}
        if any({measure.key for measure in measures_of(run.metrics)} != wanted for run in self.runs):
            raise UserError(f"arms {self.a} and {self.b} were not scored by the same metrics "
                            f"({', '.join(sorted(wanted))}): evaluate both again")

    @property
    def is_paired(self) -> bool:
        """Whether it is known which pictures of one arm belong to which of the other."""
        return all(run.metrics.get("is_paired", True) for run in self.runs)

    def compared(self, measure: Measure, seed: int) -> dict[str, Any]:
        """One measure of the two: difference, interval, p-value and verdict."""
        if any(measure.key not in run.scores.columns for run in self.runs):
            return self._without_interval(measure)
        ours, theirs = ([run.headline(measure.key) for run in each] for each in (self.ours, self.theirs))
        if not self.is_paired:
            return unpaired_difference(ours[0], theirs[0], measure.lower_is_better)
        if not _any_shared(np.array(ours), np.array(theirs)):
            return self._without_interval(measure, "no prompt gives both a value")
        found = paired_difference(np.array(ours), np.array(theirs), seed, seeds=self.seeds,
                                  lower_is_better=measure.lower_is_better)
        is_distance = measure in DISTANCES and measure.lower_is_better
        return found | (paired_ratio(np.array(ours), np.array(theirs), seed, self.seeds) if is_distance else {})

    def _without_interval(self, measure: Measure, why: str | None = None) -> dict[str, Any]:
        """The figures compared as they are."""
        means = [float(np.mean([run.metrics[measure.key] for run in each])) for each in (self.ours, self.theirs)]
        notes = [run.metrics["distances"].get(measure.key, {}).get("why") for run in self.runs
                 if "distances" in run.metrics]
        return {"difference": means[0] - means[1], "ci": None, "p": None, "verdict": CANT_TELL, "num_prompts": None,
                "note": why or next((note for note in notes if note), None)}


# --- prompt sets ---------------------------------------------------------------------------------------------------


def compare_sets(arms: list[str], runs: Sequence[Run], pairs: Sequence[tuple[str, str]], seed: int = 0
                 ) -> list[dict[str, Any]]:
    """Every arm with itself: what it drew from one prompt set, and from another form of the same prompts.

    By the judge's measures. CLIP score would score other texts, and FID wants more pictures than such sets have.

    Args:
        pairs: names of sets, as `("whole", "cut")`: the same prompts in the same order, so from the same noise.

    Returns:
        As of `compare`, with `arm`, `a` and `b` the sets, and `means` of both over the prompts compared.

    Raises:
        UserError: a set is not there, or two differ in length.
    """
    by_arm = {arm: own for arm in arms if (own := [run for run in runs if run.arm == arm])}
    found = []
    for a, b in pairs:
        for measure in measures_of(runs[0].metrics):
            if measure in (CLIP_SCORE, *DISTANCES):
                continue
            for arm, own in by_arm.items():
                one, other = _of_sets(own, measure, a, b)
                if _any_shared(one, other):
                    found.append({"arm": arm, "a": a, "b": b, "metric": measure.key, **_units(measure),
                                  "means": _shared_means(one, other),
                                  "num_seeds": len({run.seed for run in own}),
                                  "num_base_models": len({run.base_model for run in own}),
                                  **paired_difference(one, other, seed, seeds=[run.seed for run in own],
                                                      lower_is_better=measure.lower_is_better)})
    return found


def _units(measure: Measure) -> dict[str, str]:
    return {"unit": "share" if measure.is_share else measure.label,
            "better": "lower" if measure.lower_is_better else "higher"}


def _of_sets(runs: list[Run], measure: Measure, *names: str) -> list[np.ndarray]:
    """Values, (runs, N), over the prompts of each of two sets."""
    known = list(dict(zip(runs[0].scores.prompts, runs[0].scores.sets, strict=True)).values())
    check_sets("report.compare_sets", names, known)
    if len({known.count(name) for name in names}) > 1:
        counts = " and ".join(f"{name} has {known.count(name):,} prompts" for name in names)
        raise UserError(f"report.compare_sets: {counts}: name two forms of the same prompts")
    return [np.array([run.scores.by_prompt(measure.key, [name]) for run in runs]) for name in names]


def _shared_means(*tables: np.ndarray) -> list[float]:
    """Of each (runs, N), the mean over the prompts for which all have a value: what a difference is between."""
    by_prompt = np.array([mean_over_runs(table) for table in tables])
    means: list[float] = by_prompt[:, ~np.isnan(by_prompt).any(axis=0)].mean(axis=1).tolist()
    return means


def _any_shared(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether there is a prompt for which both arms have a value, of whatever seed."""
    return bool((~np.isnan(a)).any(axis=0)[(~np.isnan(b)).any(axis=0)].any())
