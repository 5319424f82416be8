"""What an arm drew → FID against real images, and for every picture its CLIP score and what a judge says of it."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.clip_score import ClipScorer
from eval.config import Evaluate
from eval.features import FeatureNetwork, features, iterate_images, open_network, read_image
from eval.fid import Statistics, frechet_distance, load, save, statistics
from eval.generate import image_path
from eval.judge import Judge, judge_images, open_judge
from eval.prompts import PROMPTS_FILE, Prompt
from eval.scores import Scores, headline_sets
from recap import progress
from recap.errors import UserError
from recap.pretrained import load_pretrained
from recap.rundir import StageDir, digest, folder_identity
from recap.shards import Reject, expand
from recap.storage import identity, write_bytes, write_json

REFERENCE_FILE = "reference.npz"
FEATURES_FILE = "features.npz"


@dataclass(frozen=True)
class Drawn:
    """A picture and the prompt that it was drawn from."""

    path: Path
    prompt: Prompt


def reference(stage: StageDir, config: Evaluate, device: str) -> dict[str, Any]:
    """Compute the statistics of the real images once, as `stage.path/reference.npz`.

    Returns:
        `num_images`, `features` (the network's name), and `excluded`: reason → images that could not be used.
    """
    network = open_network(config.features, "evaluate.features", device)
    rejects: list[Reject] = []
    with progress.bar("reference", None) as bar:
        found = features(iterate_images(config.reference, "evaluate.reference", rejects), network, config.batch_size,
                         bar.update)
    excluded = dict(Counter(reject.reason for reject in rejects))
    if excluded:
        progress.warn(f"evaluate.reference: {len(rejects)} images excluded ({_counts(excluded)})")
    if len(found) < 2:
        raise UserError(f"evaluate.reference: {len(found)} usable images in {config.reference}: FID needs at least 2, "
                        "and thousands to mean much")
    about = {"features": network.name, "resize": network.resize, "data": digest(_identity(config.reference)),
             "excluded": excluded}
    save(stage.path / REFERENCE_FILE, statistics(found), about)
    return {"num_images": len(found), "features": network.name, "excluded": excluded}


def run(stage: StageDir, images: Path, reference: Path, config: Evaluate, device: str) -> dict[str, Any]:
    """Score a folder that `generate` filled.

    Writes `metrics.json`; `scores.json`, the value of every metric for every prompt; and `features.npz`, the FID
    network's `features` (N, D) float32 of the pictures that FID is taken over, and their `index` among the prompts.

    Args:
        stage: begun by the caller.
        images: folder with `prompts.jsonl` and a picture for each of its lines.
        reference: what `reference` wrote: the .npz, or the folder that holds it.
        config: batch size, feature network, CLIP model, judge, and the prompt sets of the headline figures.
        device: a torch device.

    Returns:
        The metrics. Over the headline sets: `fid`, `clip_score` and the judge's metrics (means over the prompts asked),
        `num_images`. For every set the same but `fid`, in `sets`. And `num_reference`, `clip_truncated` (prompts that
        lost tokens even by sentence), `features`, `feature_dim`, `clip_model`, `judge` (which networks these were),
        `headline_sets`.
    """
    drawn = read_drawn(images)
    sets = headline_sets(config.sets, [each.prompt.set for each in drawn])
    headline = [index for index, each in enumerate(drawn) if each.prompt.set in sets]
    network = open_network(config.features, "evaluate.features", device)
    target = load_reference(reference, network)
    judge = open_judge(config.judge, device) if config.judge else None
    found = _features([drawn[index] for index in headline], target, network, config)
    clip_scores, truncated, clip_model = _clip_scores(drawn, config, device)
    scores = Scores([each.prompt.set for each in drawn], {"clip_score": clip_scores, **_judged(judge, drawn, config)})
    metrics = {"fid": frechet_distance(statistics(found), target), **scores.means(sets), "num_images": len(headline),
               "num_reference": target.n, "clip_truncated": truncated, "features": network.name,
               "feature_dim": network.dim, "clip_model": clip_model,
               "judge": {"name": judge.name, "metrics": dict(judge.metrics)} if judge else None,
               "headline_sets": sets, "sets": scores.by_set()}
    _save_features(stage.path / FEATURES_FILE, found, headline)
    scores.save(stage.path / "scores.json")
    write_json(str(stage.path / "metrics.json"), metrics)
    return metrics


def read_drawn(images: Path) -> list[Drawn]:
    """The pictures of a folder that `generate` filled, in the order of the prompts."""
    listing = images / PROMPTS_FILE
    again = f"delete {images / 'done.json'}, and run `recap generate` again"
    try:
        # Not splitlines: it would also split at the odd separators that a prompt's `about` may hold.
        lines = listing.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        rows = [json.loads(line) for line in lines]
        drawn = [Drawn(image_path(images, row["index"]), _prompt(row)) for row in rows]
    except FileNotFoundError:
        raise UserError(f"no {PROMPTS_FILE} in {images}: run `recap generate` first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{listing} is damaged: {again}") from None
    missing = [each.path.name for each in drawn if not each.path.is_file()]
    if missing:
        raise UserError(f"{images}: {len(missing)} of {len(drawn)} pictures are missing ({missing[0]} first): {again}")
    return drawn


def _prompt(row: dict[str, Any]) -> Prompt:
    """A line of `prompts.jsonl`. Others than `generate` may write one, with no more than index and prompt."""
    found = Prompt(row["prompt"], row.get("set", "prompts"), row.get("about", {}))
    if not (isinstance(found.text, str) and isinstance(found.set, str) and isinstance(found.about, dict)):
        raise TypeError("not a prompt")
    return found


def load_reference(path: Path, network: FeatureNetwork) -> Statistics:
    """Reference statistics that were made with this very network and resize; `UserError` otherwise."""
    found, about = load(path / REFERENCE_FILE if path.is_dir() else path)
    for what, ours in (("features", network.name), ("resize", network.resize)):
        if about.get(what) != ours:
            raise UserError(f"{path} was made with {what} {about.get(what)!r}, evaluate.features is {ours!r}: "
                            "run `recap reference` again")
    if found.dim != network.dim:
        raise UserError(f"{path} has {found.dim} features, not {network.dim}: run `recap reference` again")
    return found


def _features(drawn: list[Drawn], target: Statistics, network: FeatureNetwork, config: Evaluate) -> np.ndarray:
    if len(drawn) < 2:
        raise UserError(f"evaluate.sets: {len(drawn)} pictures to take FID over: it needs at least 2, and thousands "
                        "to mean much")
    with progress.bar("features", len(drawn)) as bar:
        found = features((read_image(each.path) for each in drawn), network, config.batch_size, bar.update)
    if min(len(found), target.n) <= network.dim:
        progress.warn(f"FID over {len(found)} images and {target.n} references with {network.dim} features is far too "
                      "high: compare arms at this very number of images only, and with no published figure")
    return found


def _save_features(path: Path, found: np.ndarray, index: list[int]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, features=found.astype(np.float32), index=np.array(index, dtype=np.int64))
    write_bytes(str(path), buffer.getvalue())


def _clip_scores(drawn: list[Drawn], config: Evaluate, device: str) -> tuple[list[float | None], int, str]:
    scorer = load_pretrained(lambda folder: ClipScorer(folder, device), config.clip_score, "evaluate.clip_score")
    scores: list[float | None] = []
    truncated = 0
    for images, prompts in _batches(drawn, config.batch_size, "CLIP score"):
        found, num_cut = scorer.score(images, [prompt.text for prompt in prompts])
        scores += found.tolist()
        truncated += num_cut
    if truncated:
        progress.warn(f"CLIP score: {truncated} of {len(drawn)} prompts have a sentence longer than the "
                      f"{scorer.context_length} tokens that the model reads; its end was not scored")
    return scores, truncated, scorer.name


def _judged(judge: Judge | None, drawn: list[Drawn], config: Evaluate) -> dict[str, list[float | None]]:
    if judge is None:
        return {}
    found = [values for images, prompts in _batches(drawn, config.batch_size, "judge")
             for values in judge_images(judge, images, prompts)]
    return {metric: [values[metric] for values in found] for metric in judge.metrics}


def _batches(drawn: list[Drawn], size: int, title: str) -> Iterator[tuple[list[Image.Image], list[Prompt]]]:
    """The pictures, decoded, and their prompts; a batch counts as done when the next one is asked for."""
    with progress.bar(title, len(drawn)) as bar:
        for start in range(0, len(drawn), size):
            batch = drawn[start:start + size]
            yield [read_image(each.path) for each in batch], [each.prompt for each in batch]
            bar.update(len(batch))


def _identity(source: str | list[str]) -> Any:
    if isinstance(source, str) and Path(source).is_dir():
        return folder_identity(Path(source))
    return [identity(url) for url in expand(source, "evaluate.reference")]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())
