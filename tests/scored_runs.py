"""Arms of made-up figures, as `generate` and `evaluate` leave them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.comparisons import Run, summarize
from eval.drawn import loose_path
from eval.measures import measures_of
from eval.scores import Scores
from eval.verdict import Findings

PAYLOAD = "<img src=x onerror=alert(1)><script>document.title='pwned'</script>"
HOSTILE = [PAYLOAD, "مرحبا بالعالم\u202egnp.exe", "👩‍👩‍👧‍👦🦄 " * 60, "x" * 5000,
           "{{ 7 * 7 }} {% raw %}", "'\"></div><!--", ""]
NUM_PROMPTS = 40


@dataclass(frozen=True)
class Scripted:
    """A scored arm of which no more than its figures is there."""

    arm: str
    metrics: dict[str, Any]
    seed: int = 0
    base_model: int = 0


def png(seed: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(size, size, 3), dtype=np.uint8))


SETS = ["short", "probe<i>", "half"]


def make_run(root: Path, seed: int, arm: str, better_by: float = 0.0, prompts: int = NUM_PROMPTS,
             judged: bool = False) -> Run:
    """A scored arm, as `generate` and `evaluate` leave it; the last fifth of its prompts are two probe sets."""
    images, evaluated = root / f"seed-{seed}/generate/{arm}", root / f"seed-{seed}/eval/{arm}"
    images.mkdir(parents=True)
    evaluated.mkdir(parents=True)
    places = [(index >= prompts * 4 // 5) + (index >= prompts * 9 // 10) for index in range(prompts)]
    sets = [SETS[place] for place in places] if judged else ["prompts"] * prompts
    rows = [{"index": i, "prompt": f"{HOSTILE[i % 6]} {i}", "set": name} for i, name in enumerate(sets)]
    (images / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for index in range(prompts):
        png(index).save(loose_path(images, index))
    columns, judges = drawn_scores(seed, arm, better_by, prompts, judged), []
    if judged:
        about = {"about": "share of pictures with all that was asked", "lower_is_better": False, "is_share": True}
        judges = [{"name": "my <b>judge</b>", "metrics": {"all_right": about}}]
    headline = SETS[:1] if judged else ["prompts"]
    found = Scores(sets, columns, list(range(prompts)))
    num = len(found.rows(headline))
    why = None if judged else "no interval: 40 images are too few for 64 features (at least 256)"
    about = {"network": "timm <b>net</b> 01ab", "resize": "bicubic", "dim": 64, "num_reference": 5000}
    distances = {"fid": about | {"bias": 2.5 - better_by / 10, "why": why}}
    far: dict[str, float] = {"fid": 40 - 5 * better_by}
    if judged:
        far |= {"kid": 0.02 - 0.005 * better_by, "precision": 0.5, "fid_infinity": 38 - 5 * better_by}
        distances |= {"kid": about | {"bias": 0.0, "why": None}, "precision": about | {"bias": 0.0, "why": None}}
    asked = [name for name in columns if name not in far]
    metrics = {**found.means(headline), **far, "num_images": num, "num_prompts": num,
               "num_reference": 5000, "distances": distances, "clip_truncated": 1, "clip_model": "open_clip tiny",
               "judges": judges, "headline_sets": headline, "sets": found.by_set(asked), "resolutions": {"32×32": num},
               "is_paired": True}
    found.save(evaluated / "scores.json")
    (evaluated / "metrics.json").write_text(json.dumps(metrics))
    return Run(seed, arm, images, evaluated)


def drawn_scores(seed: int, arm: str, better_by: float, num: int, judged: bool) -> dict[str, list[float | None]]:
    """CLIP scores, and with a judge its answers and pseudovalues of FID."""
    noise = np.random.default_rng([seed, len(arm)]).normal(size=(2, num))
    scores = 20 + np.arange(num) / 10 + better_by + 0.3 * noise[0]
    columns: dict[str, list[float | None]] = {"clip_score": scores.tolist()}
    if judged:
        draw = np.random.default_rng(seed)
        columns["all_right"] = [float(draw.random() < 0.4 + 0.4 * better_by) for _ in range(num)]
        columns |= {"fid": (38 - 5 * better_by + noise[1]).tolist(), "precision": (0.5 + 0.1 * noise[1]).tolist(),
                    "kid": (0.02 - 0.005 * better_by + 0.001 * noise[1]).tolist()}
    return columns


def findings(arms: list[str], **comparisons: tuple[str, str, float, float, float]) -> Findings:
    """Of arms a, b and a measure: difference, low and high; all FIDs are 20 but that of mix, 30."""
    runs = [Scripted(arm, {"fid": 30.0 if arm == "mix" else 20.0, "clip_score": 20.0}) for arm in arms]
    measures = {each.key: each for each in measures_of(runs[0].metrics)}
    found = []
    for a, key, difference, low, high in comparisons.values():
        good = "better" if (difference < 0) == measures[key].lower_is_better else "worse"
        found.append({"a": a, "b": "alt", "metric": key, "difference": difference, "p": 0.01, "num_seeds": 3,
                      "ci": [low, high] if high > low else None, "note": "no interval: too few",
                      "verdict": "can't tell" if low <= 0 <= high else good})
    return Findings(arms, list(measures.values()), summarize(arms, runs), found)
