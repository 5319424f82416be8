"""What an arm drew → FID against real images, and the CLIP score of every picture with its prompt."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.clip_score import ClipScorer
from eval.config import Evaluate
from eval.features import FeatureNetwork, features, iterate_images, open_network, read_image
from eval.fid import Statistics, frechet_distance, load, save, statistics
from eval.generate import PROMPTS_FILE, image_path
from recap import progress
from recap.errors import UserError
from recap.pretrained import load_pretrained
from recap.rundir import StageDir, digest, folder_identity
from recap.shards import Reject, expand, identity, write_json

REFERENCE_FILE = "reference.npz"


@dataclass(frozen=True)
class Drawn:
    """A picture and the prompt that it was drawn from."""

    path: Path
    prompt: str


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
    """Score a folder that `generate` filled; write `metrics.json`, and `scores.json`, a CLIP score for every prompt.

    Args:
        stage: begun by the caller.
        images: folder with `prompts.jsonl` and a picture for each of its lines.
        reference: what `reference` wrote: the .npz, or the folder that holds it.
        config: batch size, feature network, CLIP model.
        device: a torch device.

    Returns:
        The metrics: `fid`, `clip_score` (mean over prompts), `num_images`, `num_reference`, `clip_truncated` (prompts
        that lost tokens even by sentence), `features`, `feature_dim` and `clip_model` (which networks these were).
    """
    drawn = read_drawn(images)
    network = open_network(config.features, "evaluate.features", device)
    target = load_reference(reference, network)
    fid = _fid(drawn, target, network, config)
    scores, truncated, clip_model = _clip_scores(drawn, config, device)
    metrics = {"fid": fid, "clip_score": float(np.mean(scores)), "num_images": len(drawn), "num_reference": target.n,
               "clip_truncated": truncated, "features": network.name, "feature_dim": network.dim,
               "clip_model": clip_model}
    write_json(str(stage.path / "scores.json"), scores)
    write_json(str(stage.path / "metrics.json"), metrics)
    return metrics


def read_drawn(images: Path) -> list[Drawn]:
    """The pictures of a folder that `generate` filled, in the order of the prompts."""
    listing = images / PROMPTS_FILE
    try:
        rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
        drawn = [Drawn(image_path(images, row["index"]), row["prompt"]) for row in rows]
    except FileNotFoundError:
        raise UserError(f"no {PROMPTS_FILE} in {images}: run `recap generate` first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{listing} is damaged: delete it, and run `recap generate` again") from None
    missing = [each.path.name for each in drawn if not each.path.is_file()]
    if missing:
        raise UserError(f"{images}: {len(missing)} of {len(drawn)} pictures are missing ({missing[0]} first): "
                        "run `recap generate` again")
    if len(drawn) < 2:
        raise UserError(f"{images}: {len(drawn)} pictures: FID needs at least 2 prompts, and thousands to mean much")
    return drawn


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


def _fid(drawn: list[Drawn], target: Statistics, network: FeatureNetwork, config: Evaluate) -> float:
    with progress.bar("features", len(drawn)) as bar:
        found = statistics(features((read_image(each.path) for each in drawn), network, config.batch_size, bar.update))
    if min(found.n, target.n) <= found.dim:
        progress.warn(f"FID over {found.n} images and {target.n} references with {found.dim} features is far too high: "
                      "compare arms at this very number of images only, and with no published figure")
    return frechet_distance(found, target)


def _clip_scores(drawn: list[Drawn], config: Evaluate, device: str) -> tuple[list[float], int, str]:
    scorer = load_pretrained(lambda folder: ClipScorer(folder, device), config.clip_score, "evaluate.clip_score")
    scores: list[float] = []
    truncated = 0
    with progress.bar("CLIP score", len(drawn)) as bar:
        for start in range(0, len(drawn), config.batch_size):
            batch = drawn[start:start + config.batch_size]
            found, num_cut = scorer.score([read_image(each.path) for each in batch], [each.prompt for each in batch])
            scores += found.tolist()
            truncated += num_cut
            bar.update(len(batch))
    if truncated:
        progress.warn(f"CLIP score: {truncated} of {len(drawn)} prompts have a sentence longer than the "
                      f"{scorer.context_length} tokens that the model reads; its end was not scored")
    return scores, truncated, scorer.name


def _identity(source: str | list[str]) -> Any:
    if isinstance(source, str) and Path(source).is_dir():
        return folder_identity(Path(source))
    return [identity(url) for url in expand(source, "evaluate.reference")]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())
