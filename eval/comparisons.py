"""Arms against arms: means over seeds, paired differences over prompts, and what they say in words."""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eval.fid import Statistics
from eval.fid_difference import Fids, fid_difference, resample_fid, why_no_interval
from eval.measures import FID, Measure, headline_measures, measures_of
from eval.scores import Scores
from eval.statistics import MIN_SEEDS, paired_difference
from recap import progress
from recap.errors import UserError

CONTROLS = ("base", "oracle", "shuffled")
"""Arms that say what the others' figures mean; none of them is the claim."""


class Scored(Protocol):
    """What one arm of one seed scored."""

    @property
    def seed(self) -> int: ...
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
        except (OSError, ValueError):
            raise self._unreadable("scores.json") from None

    def headline(self, metric: str) -> np.ndarray:
        """Values of one metric, (N,), over the prompts of the headline sets; NaN for None."""
        return self.scores.values(metric, self.metrics["headline_sets"])

    def features(self) -> tuple[np.ndarray, list[int]]:
        """Features (N, D) float32 of the pictures that FID is taken over, and their indices among the prompts."""
        try:
            with np.load(self.evaluated / "features.npz", allow_pickle=False) as content:
                return content["features"], content["index"].tolist()
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise self._unreadable("features.npz") from None

    @property
    def has_features(self) -> bool:
        """Whether `features` is there to be read."""
        return (self.evaluated / "features.npz").is_file()

    def _unreadable(self, name: str) -> UserError:
        return UserError(f"no readable {name} in {self.evaluated}: run `recap evaluate` first")


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds."""

    arm: str
    values: dict[str, list[float]]
    """Measure → one value a seed; none where no prompt asks for it."""
    num_images: int
    """Of one seed."""

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
        metrics = [run.metrics for run in runs if run.arm == arm]
        if metrics:
            values = {measure.key: [each[measure.key] for each in metrics if each.get(measure.key) is not None]
                      for measure in measures_of(metrics[0])}
            found.append(ArmSummary(arm, values, metrics[0].get("num_images", 0)))
    return found


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


def compare(arms: list[str], runs: list[Run], reference: Statistics | None = None, seed: int = 0
            ) -> list[dict[str, Any]]:
    """All `pairs` of arms by every measure, as `report.json` lists them.

    Arms are paired over the prompts of the headline sets, and over the seeds that both have: the prompt is the unit,
    so its scores are averaged over seeds. FID, a figure of a whole set of images, is compared by resampling prompts
    (`eval.fid_difference`), where its reference is given. Each says in which `unit` its difference is ("share": of 1),
    and whether "higher" or "lower" is `better`.
    """
    seeds = {arm: {run.seed for run in runs if run.arm == arm} for arm in arms}
    compared = [(a, b) for a, b in pairs(arms) if seeds[a] & seeds[b]]
    found = []
    for a, b in compared:
        shared = sorted(seeds[a] & seeds[b])
        _check_alike(a, b, runs)
        for measure in measures_of(runs[0].metrics)[:-1]:
            ours, theirs = (np.array([run.headline(measure.key) for run in _of(arm, shared, runs)]) for arm in (a, b))
            if _any_shared(ours, theirs):
                found.append({**_named(a, b, measure), **paired_difference(ours, theirs, seed)})
    return found + (_compare_fids(compared, runs, reference, seed) if reference else [])


def _named(a: str, b: str, measure: Measure) -> dict[str, Any]:
    return {"a": a, "b": b, "metric": measure.key, "unit": "share" if measure.is_share else measure.label,
            "better": "lower" if measure.lower_is_better else "higher"}


def _compare_fids(compared: list[tuple[str, str]], runs: list[Run], reference: Statistics, seed: int
                  ) -> list[dict[str, Any]]:
    metrics = runs[0].metrics
    note = why_no_interval(metrics["num_images"], metrics["feature_dim"])
    fids: dict[tuple[str, int], Fids] = {}
    used = [run for run in runs if any(run.arm in pair for pair in compared) and run.has_features] if not note else []
    with progress.bar("FID intervals", len(used)) as bar:
        for run in used:
            fids[run.arm, run.seed] = resample_fid(run.features()[0], reference, seed)
            bar.update(1)
    found = []
    for a, b in compared:
        shared = sorted({run.seed for run in _of(a, None, runs)} & {run.seed for run in _of(b, None, runs)})
        why = note or _features_missing(a, b, shared, runs)
        result = (_without_interval(a, b, shared, runs, why) if why else
                  fid_difference([fids[a, each] for each in shared], [fids[b, each] for each in shared], seed))
        found.append({**_named(a, b, FID), **result, "num_prompts": metrics["num_images"]})
    return found


def _features_missing(a: str, b: str, seeds: list[int], runs: list[Run]) -> str | None:
    """A note where an arm was evaluated without keeping its features, as by an older version."""
    lacking = [arm for arm in (a, b) if not all(run.has_features for run in _of(arm, seeds, runs))]
    return f"no interval: no features.npz of {' and '.join(lacking)}: evaluate again" if lacking else None


def _without_interval(a: str, b: str, seeds: list[int], runs: list[Run], note: str) -> dict[str, Any]:
    means = [float(np.mean([run.metrics["fid"] for run in _of(arm, seeds, runs)])) for arm in (a, b)]
    return {"difference": means[0] - means[1], "ci": None, "ratio": means[0] / means[1] if means[1] > 0 else None,
            "ratio_ci": None, "p": None, "verdict": "can't tell", "note": note}


def _of(arm: str, seeds: list[int] | None, runs: list[Run]) -> list[Run]:
    """The runs of an arm, in the order of their seeds."""
    found = [run for run in runs if run.arm == arm and (seeds is None or run.seed in seeds)]
    return sorted(found, key=lambda run: run.seed)


def _check_alike(a: str, b: str, runs: list[Run]) -> None:
    both = [run for run in runs if run.arm in (a, b)]
    sets, headlines = [run.scores.sets for run in both], [run.metrics["headline_sets"] for run in both]
    if any(each != sets[0] for each in sets) or any(each != headlines[0] for each in headlines):
        raise UserError(f"arms {a} and {b} did not draw the same prompts ({len(sets[0])} and {len(sets[-1])}): "
                        "generate and evaluate both again")
    wanted = {measure.key for measure in measures_of(runs[0].metrics)} - {FID.key}
    if any(run.scores.columns.keys() != wanted for run in both):
        raise UserError(f"arms {a} and {b} were not scored by the same metrics ({', '.join(sorted(wanted))}): "
                        "evaluate both again")


def _any_shared(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether there is a prompt for which both arms have a value, of whatever seed."""
    return bool((~np.isnan(a)).any(axis=0)[(~np.isnan(b)).any(axis=0)].any())


# --- in words ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """What was found of arms, by measure."""

    arms: list[str]
    measures: list[Measure]
    summaries: list[ArmSummary]
    comparisons: list[dict[str, Any]]

    @cached_property
    def headline(self) -> list[Measure]:
        return headline_measures(self.measures)

    @property
    def lead(self) -> Measure:
        """What the headline goes by: the judge's first metric, or else CLIP score."""
        return self.headline[0]

    @property
    def baseline(self) -> str:
        return baseline(self.arms)

    def against(self, arm: str, measure: Measure) -> dict[str, Any] | None:
        """The comparison of an arm with the baseline, if there is one."""
        return next((each for each in self.comparisons
                     if (each["a"], each["b"], each["metric"]) == (arm, self.baseline, measure.key)), None)

    def mean(self, arm: str, measure: Measure) -> float | None:
        return next((each.mean(measure) for each in self.summaries if each.arm == arm), None)


def verdict(found: Findings) -> tuple[str, list[str]]:
    """A headline, and sentences that say on what it stands."""
    a, b, lead = claim(found.arms), found.baseline, found.lead
    result = found.against(a, lead) if a else None
    if a is None or result is None:
        return "There is no second arm to compare.", []
    headline = f"Pictures of the arm “{a}” match their prompts {result['verdict']} than those of “{b}”"
    if result["verdict"] == "can't tell":
        headline = f"No difference between the arms “{a}” and “{b}” could be shown"
    if lead.is_share:
        ours, theirs = (lead.text(found.mean(arm, lead)) for arm in (a, b))
        headline += f": {lead.label.lower()} {ours} against {theirs}"
    scores = [_score_sentence(a, b, measure, each) for measure in found.headline[:-1]
              if (each := found.against(a, measure))]
    return f"{headline}.", [*scores, *_fid_sentences(a, b, found), *_disagreement(a, found), *_control(b, found),
                            *_seed_sentences(a, found)]


def _score_sentence(a: str, b: str, measure: Measure, found: dict[str, Any]) -> str:
    return (f"{measure.label} of {a} against {b}: {measure.change(found['difference'])}{measure.unit}, 95 % interval "
            f"{measure.interval(found)}, {p_text(found['p'])}, over {found['num_prompts']:,} prompts.")


def _fid_sentences(a: str, b: str, found: Findings) -> list[str]:
    ours, theirs = found.mean(a, FID), found.mean(b, FID)
    if ours is None or theirs is None:
        return []
    sentence = f"FID, lower is better: {ours:.2f} for {a}, {theirs:.2f} for {b}"
    result = found.against(a, FID)
    if result is None:
        return [f"{sentence}."]
    if result["ci"] is None:
        return [f"{sentence}; {result['note']}."]
    return [f"{sentence}; difference {FID.change(result['difference'])}, 95 % interval {FID.interval(result)}: "
            f"{result['verdict']}."]


def _disagreement(a: str, found: Findings) -> list[str]:
    results = [(measure, each) for measure in found.headline if (each := found.against(a, measure))]
    words = {each["verdict"] for measure, each in results if measure is not FID or each["ci"]}
    if FID not in [measure for measure, each in results if each["ci"]]:  # then its sign must do
        ours, theirs = found.mean(a, FID), found.mean(found.baseline, FID)
        if ours is not None and theirs is not None and ours != theirs:
            words.add("better" if ours < theirs else "worse")
    return ["The measures disagree."] if {"better", "worse"} <= words else []


def _control(b: str, found: Findings) -> list[str]:
    results = [(measure, each) for measure in found.headline[:-1] if (each := found.against("shuffled", measure))]
    if not results:
        return []
    beaten = [measure.label for measure, each in results if each["verdict"] == "better"]
    if beaten:
        return [f"The control fails: captions of other images (shuffled) also beat {b} by {' and '.join(beaten)}, so "
                "what the captions say is not the cause."]
    return [f"The control holds: captions of other images (shuffled) do not beat {b}."]


def _seed_sentences(a: str, found: Findings) -> list[str]:
    num_seeds = max((len(each.values["fid"]) for each in found.summaries if each.arm == a), default=1)
    if num_seeds < MIN_SEEDS:
        count = "There is one training seed" if num_seeds == 1 else "There are two training seeds"
        return [f"{count}: the interval speaks of these very models, and training anew may move them by more."]
    return [f"The intervals resample prompts and the {num_seeds} training seeds; so few seeds tell little of how much "
            "training anew may move them."]


def p_text(p: float | None) -> str:
    """`p = 0.012`, `p < 0.001`."""
    if p is None:
        return "no p-value"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def arms_table(found: Findings) -> str:
    """The result for a terminal, at most 80 columns."""
    lead, columns = found.lead, [found.headline[-1], *reversed(found.headline[:-1])]
    widths = [9, 9, 12][:len(columns)]
    names = [f"{measure.label.split()[0][:10]} {measure.arrow}" for measure in columns]
    against = f"{lead.label[:16]} against {found.baseline[:12]}" if found.comparisons else ""
    lines = [_line("arm", names, widths, against)]
    for each in found.summaries:
        values = [measure.text(each.mean(measure)) for measure in columns]
        lines.append(_line(each.arm, values, widths, _against(lead, found.against(each.arm, lead))))
    return "\n".join(lines)


def _line(name: str, cells: list[str], widths: list[int], last: str) -> str:
    name = name if len(name) <= 14 else name[:13] + "…"
    middle = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{name:<14}{middle}   {last}".rstrip()


def _against(lead: Measure, found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = map(lead.change, found["ci"])
    return f"{lead.change(found['difference'])} [{low}, {high}] {found['verdict']}"
