"""Finished runs of scores that are drawn: every file as `generate`, `reference`, `evaluate` and `report` leave it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.comparisons import Run, compare
from eval.drawn import read_list
from eval.evaluate import figures
from eval.measure import Measured
from eval.reference import Reference, of_features, save

DIM = 4
ABOUT_JUDGE = {"all_right": {"about": "share of pictures with all that was asked", "is_share": True,
                             "lower_is_better": False}}


@dataclass(frozen=True)
class Made:
    """How a run is drawn."""

    effects: Mapping[str, float] = field(default_factory=lambda: {"alt": 0.0, "mix": 1.0})
    """Arm → how much better it is than none."""
    seeds: Sequence[int] = (0,)
    prompts: Sequence[str] = tuple(f"prompt {place}" for place in range(40))
    network: str = "timm net"
    clip_model: str = "open_clip tiny"
    judge: str | None = "reader 1"
    num_reference: int = 50
    reference_seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)


def finish(folder: Path, made: Made) -> Path:
    """Write a whole run into `folder`, runs/NAME, and return it."""
    reference = _reference(made)
    (folder / "reference").mkdir(parents=True)
    save(folder / "reference/features.npz", reference)
    runs = [_arm(folder, made, seed, arm, reference) for seed in made.seeds for arm in made.effects
            if arm != "base" or seed == made.seeds[0]]
    write_report(folder, runs, made)
    return folder


def write_report(folder: Path, runs: list[Run], made: Made) -> None:
    arms = list(made.effects)
    (folder / "report").mkdir(exist_ok=True)
    (folder / "report/report.json").write_text(json.dumps({
        "schema": 1, "runs": [{"seed": run.seed, "arm": run.arm, "metrics": run.metrics} for run in runs],
        "comparisons": compare(arms, runs), "captions": {}, "environment": {"python": "3.11"},
        "config": {"name": folder.name, "arms": arms, **made.config}}))


def _reference(made: Made) -> Reference:
    features = np.random.default_rng(made.reference_seed).normal(size=(made.num_reference, DIM))
    return of_features(features, {"network": made.network, "resize": "clean", "data": str(made.reference_seed)})


def _arm(folder: Path, made: Made, seed: int, arm: str, reference: Reference) -> Run:
    run = Run(seed, arm, folder / f"seed-{seed}/generate/{arm}", folder / f"seed-{seed}/eval/{arm}")
    run.images.mkdir(parents=True)
    run.evaluated.mkdir(parents=True)
    (run.images / "prompts.jsonl").write_text("".join(
        json.dumps({"index": place, "prompt": text}) + "\n" for place, text in enumerate(made.prompts)))
    metrics, scores = figures(read_list(run.images), ["prompts"], _measured(made, seed, arm), {"features": reference})
    scores.save(run.evaluated / "scores.json")
    (run.evaluated / "metrics.json").write_text(json.dumps(metrics))
    return run


def _measured(made: Made, seed: int, arm: str) -> dict[str, Measured]:
    num, effect = len(made.prompts), made.effects[arm]
    rng = np.random.default_rng([seed, *arm.encode()])
    size = np.full((num, 2), 64)
    found = {"features": Measured(made.network, {"resize": "clean", "dim": DIM}, {
                 "features": rng.normal(size=(num, DIM)) + 2 - effect, "size": size}, {}),
             "clip_score": Measured(made.clip_model, {}, {
                 "clip_score": 20 + np.arange(num) / 10 + effect + 0.3 * rng.normal(size=num),
                 "is_cut": np.zeros(num), "size": size}, {})}
    if made.judge is not None:
        right = (rng.random(num) < 0.4 + 0.4 * effect).astype(float)
        found["judge"] = Measured(made.judge, {"metrics": ABOUT_JUDGE}, {"all_right": right, "size": size}, {})
    return found
