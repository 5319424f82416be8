"""Arms against arms: means over seeds, paired differences over prompts, and what they say in words."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.statistics import paired_difference
from recap.errors import UserError

CONTROLS = ("base", "oracle", "shuffled")
"""Arms that say what the others' figures mean; none of them is the claim."""


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
        found: dict[str, Any] = self._read("metrics.json")
        return found

    @cached_property
    def scores(self) -> list[float]:
        """CLIP scores, one a prompt."""
        found: list[float] = self._read("scores.json")
        return found

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.evaluated / name).read_bytes())
        except (OSError, ValueError):
            raise UserError(f"no readable {name} in {self.evaluated}: run `recap evaluate` first") from None


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds."""

    arm: str
    fids: list[float]
    """One a seed."""
    clip_scores: list[float]
    num_images: int
    """Of one seed."""

    @property
    def fid(self) -> float:
        return float(np.mean(self.fids))

    @property
    def clip_score(self) -> float:
        return float(np.mean(self.clip_scores))


def summarize(arms: list[str], runs: list[Run]) -> list[ArmSummary]:
    """The arms that have runs, in the order of the report."""
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in arms}
    return [ArmSummary(arm, [run.metrics["fid"] for run in found], [run.metrics["clip_score"] for run in found],
                       found[0].metrics["num_images"]) for arm, found in by_arm.items() if found]


def baseline(arms: list[str]) -> str:
    """What arms are compared with: `alt`, the web's own captions, or else the first arm."""
    return "alt" if "alt" in arms else arms[0]


def claim(arms: list[str]) -> str | None:
    """The arm that the headline speaks of, fixed by name before any result: `mix`, or the first that is no control."""
    others = [arm for arm in arms if arm not in (*CONTROLS, baseline(arms))]
    return "mix" if "mix" in others else others[0] if others else None


def compare(arms: list[str], runs: list[Run], seed: int = 0) -> list[dict[str, Any]]:
    """CLIP score of every arm against the baseline, paired over prompts, as `report.json` lists them.

    A prompt's scores are first averaged over the seeds that both arms have: the prompt is the unit. FID is a figure of
    a whole set of images and has no such pairs, so no interval is given for it here.
    """
    b = baseline(arms)
    found = []
    for a in arms:
        seeds = _seeds(a, runs) & _seeds(b, runs)
        if a == b or not seeds:
            continue
        try:
            result = paired_difference(_mean_scores(a, seeds, runs), _mean_scores(b, seeds, runs), seed)
        except ValueError as error:
            raise UserError(f"arms {a} and {b} did not draw the same prompts ({error}): generate and evaluate both "
                            "again") from None
        found.append({"a": a, "b": b, "metric": "clip_score", **result})
    return found


def _seeds(arm: str, runs: list[Run]) -> set[int]:
    return {run.seed for run in runs if run.arm == arm}


def _mean_scores(arm: str, seeds: set[int], runs: list[Run]) -> np.ndarray:
    """Scores a prompt, (N,), averaged over seeds. `ValueError` where seeds have different numbers of prompts."""
    return np.mean([run.scores for run in runs if run.arm == arm and run.seed in seeds], axis=0)


# --- in words ------------------------------------------------------------------------------------------------------


def verdict(arms: list[str], summaries: list[ArmSummary], comparisons: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """A headline, and sentences that say on what it stands."""
    b, a = baseline(arms), claim(arms)
    by_arm = {each["a"]: each for each in comparisons}
    if a is None or a not in by_arm:
        return "There is no second arm to compare.", []
    found = by_arm[a]
    headline = f"Pictures of the arm “{a}” match their prompts {found['verdict']} than those of “{b}”."
    if found["verdict"] == "can't tell":
        headline = f"No difference between the arms “{a}” and “{b}” could be shown."
    num_prompts = summaries[0].num_images
    return headline, [_clip_sentence(a, b, num_prompts, found), *_fid_sentences(a, b, summaries, found),
                      *_control_sentences(by_arm, b), *_seed_sentences(a, summaries)]


def _clip_sentence(a: str, b: str, num_prompts: int, found: dict[str, Any]) -> str:
    low, high = found["ci"]
    p = "p < 0.001" if found["p"] < 0.001 else f"p = {found['p']:.3f}"
    return (f"CLIP score of {a} against {b}: {signed(found['difference'])}, 95 % interval {signed(low)} to "
            f"{signed(high)}, {p}, over {num_prompts:,} prompts.")


def _fid_sentences(a: str, b: str, summaries: list[ArmSummary], found: dict[str, Any]) -> list[str]:
    fid = {each.arm: each.fid for each in summaries}
    if a not in fid or b not in fid:
        return []
    sentence = f"FID, lower is better: {fid[a]:.2f} for {a}, {fid[b]:.2f} for {b}."
    opposed = {"better": fid[a] > fid[b], "worse": fid[a] < fid[b]}.get(found["verdict"], False)
    return [sentence, "The two measures disagree."] if opposed else [sentence]


def _control_sentences(by_arm: dict[str, dict[str, Any]], b: str) -> list[str]:
    shuffled = by_arm.get("shuffled")
    if shuffled is None:
        return []
    if shuffled["verdict"] == "better":
        return [f"The control fails: captions of other images (shuffled) also beat {b}, so what the captions say is "
                "not the cause."]
    return [f"The control holds: captions of other images (shuffled) do not beat {b}."]


def _seed_sentences(a: str, summaries: list[ArmSummary]) -> list[str]:
    if any(each.arm == a and len(each.fids) > 1 for each in summaries):
        return []
    return ["There is one training seed: the interval speaks of these very models, and training anew may move them "
            "by more."]


def signed(value: float, digits: int = 2) -> str:
    """`+0.51`, `−0.20`, with a true minus sign; a zero has none."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def arms_table(summaries: list[ArmSummary], comparisons: list[dict[str, Any]]) -> str:
    """The result for a terminal, at most 80 columns."""
    by_arm = {each["a"]: each for each in comparisons}
    against = f"CLIP score against {comparisons[0]['b'][:20]}, 95 % interval" if comparisons else ""
    lines = [f"{'arm':<16}{'FID ↓':>10}{'CLIP score ↑':>14}   {against}".rstrip()]
    for each in summaries:
        name = each.arm if len(each.arm) <= 16 else each.arm[:15] + "…"
        lines.append(f"{name:<16}{each.fid:>10.2f}{each.clip_score:>14.2f}   {_against(by_arm.get(each.arm))}".rstrip())
    return "\n".join(lines)


def _against(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["ci"]
    return f"{signed(found['difference'])} [{signed(low)}, {signed(high)}] {found['verdict']}"
