"""What an arm drew → distances to real images, and for every picture its CLIP score and what judges say of it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from eval.config import NETWORKS, Evaluate
from eval.distances import FRECHET, KEYS, distances
from eval.drawn import Drawn, clusters, read_list
from eval.gauges import gauges
from eval.generate import forget
from eval.images import DrawnImages, RealImages
from eval.judge import JUDGES, check_prompts
from eval.measure import Measured, measure
from eval.pseudovalues import Distance
from eval.reference import AGAIN, Reference, kept, load, of_features, save
from eval.scores import Scores, headline_sets
from recap import progress
from recap.errors import UserError
from recap.rundir import StageDir, digest
from recap.storage import write_json

WHERE = "evaluate.reference"


def reference(stage: StageDir, config: Evaluate, measured: Path, checkpoints: dict[str, Any], device: str
              ) -> dict[str, Any]:
    """Compute what distances need of the real images, as `features.npz` and so on, one for each network.

    Args:
        stage: begun by the caller.
        config: the images, and the networks.
        measured: folder that keeps what is measured of them.
        checkpoints: table → identity of its weights.
        device: a torch device; `cuda` for all GPUs.

    Returns:
        `num_images`, `features` (the network's name), and `excluded`: reason → images that could not be used.
    """
    if isinstance(config.reference, str) and (folder := kept(config.reference)):
        return _adopted(stage, folder, config)
    images = RealImages(config.reference, WHERE)
    result: dict[str, Any] = {}
    for table in gauges(config, with_prompts=False):
        found = measure(measured, table, config, images, checkpoints[table], f"reference, {table}", device)
        if found is None:
            continue
        num = len(found.values["size"])
        if num < 2:
            raise UserError(f"{WHERE}: {num} usable images in {config.reference}: FID needs at least 2, and thousands "
                            "to mean much")
        about = {"network": found.name, "resize": found.about["resize"], "data": digest(images.identity()),
                 "excluded": found.excluded, "resolutions": _resolutions(found)}
        save(stage.path / f"{table}.npz", of_features(found.values["features"], about, table))
        result = result or {"num_images": num, "features": found.name, "excluded": found.excluded}
    if result and result["excluded"]:
        progress.warn(f"{WHERE}: {sum(result['excluded'].values())} images excluded ({_counts(result['excluded'])})")
    return result


def _adopted(stage: StageDir, folder: Path, config: Evaluate) -> dict[str, Any]:
    """What `recap reference` wrote before, taken over."""
    result: dict[str, Any] = {}
    for table in gauges(config, with_prompts=False):
        found = load(folder / f"{table}.npz")
        save(stage.path / f"{table}.npz", found)
        result = result or {"num_images": found.num, "features": found.about.get("network"),
                            "excluded": found.about.get("excluded", {})}
    return result


def run(stage: StageDir, images: Path, reference: Path, config: Evaluate, measured: Path, checkpoints: dict[str, Any],
        keep: bool, device: str) -> dict[str, Any]:
    """Score what an arm drew.

    Writes `metrics.json`, and `scores.json`: the value of every metric for every picture.

    Args:
        stage: begun by the caller.
        images: folder with `prompts.jsonl` and a picture for each of its lines.
        reference: the folder that `reference` wrote.
        config: networks, CLIP model, judges, and the prompt sets of the headline figures.
        measured: folder that keeps what is measured of these pictures.
        checkpoints: table → identity of its weights.
        keep: whether the pictures are kept; else thumbnails of some.
        device: a torch device; `cuda` for all GPUs.

    Returns:
        The metrics. Over the headline sets: the distances, `fid_infinity` (FID of endless images), `clip_score` and the
        judges' metrics (means over the prompts asked), `num_images`, `num_prompts`. For every set the same but
        distances, in `sets`. `distances`: of each, its network and what is to be known of it. And `num_reference`,
        `clip_truncated` (prompts that lose tokens even by sentence), `clip_model`, `judges`,
        `headline_sets`, `resolutions` (`512×512` → pictures), and `is_paired`: whether those of another arm's pictures
        are known that belong to these.
    """
    drawn = read_list(images)
    sets = headline_sets(config.sets, [each.prompt.set for each in drawn])
    check_prompts(config, [each.prompt for each in drawn])
    found: dict[str, Measured] = {}
    for name in gauges(config, with_prompts=any(each.prompt.text for each in drawn)):
        looked_at = DrawnImages(images, tuple(sets) if name in NETWORKS else None)
        of_gauge = measure(measured, name, config, looked_at, checkpoints[name], name.replace("_", " "), device)
        if of_gauge is not None:
            found[name] = of_gauge
    if not progress.is_main():
        return {}
    metrics, scores = figures(drawn, sets, found, {name: load_reference(reference / f"{name}.npz", found[name])
                                                   for name in found if name in NETWORKS})
    scores.save(stage.path / "scores.json")
    write_json(str(stage.path / "metrics.json"), metrics)
    if not keep:
        forget(images)
    return metrics


def figures(drawn: list[Drawn], sets: list[str], found: dict[str, Measured], references: dict[str, Reference]
            ) -> tuple[dict[str, Any], Scores]:
    """All that was measured, as `metrics.json` and `scores.json` hold it.

    Args:
        drawn: the pictures.
        sets: prompt sets of the headline.
        found: gauge → what it measured: networks of the headline's pictures, all others of all.
        references: network → real images.
    """
    headline = [index for index, each in enumerate(drawn) if each.prompt.set in sets]
    prompts = np.array(clusters(drawn))[headline]
    far = {key: distance for name, reference in references.items()
           for key, distance in _distances(name, found[name], reference, prompts).items()}
    looked = _looked(found)
    spread = {key: _spread(distance.pseudovalues, headline, len(drawn)) for key, distance in far.items()
              if distance.pseudovalues is not None}
    scores = Scores([each.prompt.set for each in drawn], {**looked, **spread}, [each.prompt_index for each in drawn])
    own = Scores(scores.sets, looked, scores.prompts)
    clip = found.get("clip_score")
    return {**{key: distance.value for key, distance in far.items()}, **_infinity(far), **own.means(sets),
            "num_images": len(headline), "num_prompts": len({drawn[index].prompt_index for index in headline}),
            "num_reference": references["features"].num, "distances": _about(far, found, references),
            "clip_truncated": len({drawn[index].prompt_index for index in headline if clip.values["is_cut"][index]})
            if clip else 0,
            "clip_model": clip.name if clip else None,
            "judges": [{"name": found[name].name, "metrics": found[name].about["metrics"]}
                       for name in JUDGES if name in found],
            "headline_sets": sets, "sets": own.by_set(looked), "resolutions": _resolutions(found["features"]),
            "is_paired": all(each.is_paired for each in drawn)}, scores


def load_reference(path: Path, found: Measured) -> Reference:
    """Real images as this very network and resize saw them; `UserError` otherwise."""
    known = load(path)
    for what, ours in (("network", found.name), ("resize", found.about["resize"])):
        if known.about.get(what) != ours:
            raise UserError(f"{path} was made with {what} {known.about.get(what)!r}, and the pictures with {ours!r}: "
                            f"{AGAIN}")
    return known


def _distances(table: str, found: Measured, reference: Reference, prompts: np.ndarray) -> dict[str, Distance]:
    features = found.values.get("features", np.zeros((0, 1)))
    if len(features) < 2:
        raise UserError(f"evaluate.sets: {len(features)} pictures to take FID over: it needs at least 2, and thousands "
                        "to mean much")
    far = distances(table, features, reference, prompts)
    for key in far.keys() & set(FRECHET.values()):
        if far[key].pseudovalues is None:
            progress.warn(f"{key}: {len(features)} pictures and {reference.num} real images are too few for "
                          f"{features.shape[1]} features. Half as many pictures give {far[key].bias:.3g} more, and so "
                          f"{far[key].value:.4g} is too high by about that or more: compare arms at this very number "
                          "only, and with no published figure")
    return far


def _looked(found: dict[str, Measured]) -> dict[str, list[float | None]]:
    """What CLIP and the judges found of each picture; `UserError` where two judges measure the same."""
    looked: dict[str, list[float | None]] = {}
    for name in ("clip_score", *JUDGES):
        columns = _columns(found[name]) if name in found else {}
        if twice := sorted(columns.keys() & looked.keys()):
            raise UserError(f"evaluate.{name} measures {twice[0]}, and another judge as well: leave one of them out")
        looked |= columns
    return looked


def _columns(found: Measured) -> dict[str, list[float | None]]:
    """Metric → a value for each picture; None for NaN."""
    return {name: _or_none(column) for name, column in found.values.items() if name not in ("size", "is_cut")}


def _spread(values: np.ndarray, places: list[int], num: int) -> list[float | None]:
    """The values at their places among so many; None elsewhere."""
    whole = np.full(num, np.nan)
    whole[places] = values
    return _or_none(whole)


def _or_none(column: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in column]


def _infinity(far: dict[str, Distance]) -> dict[str, float]:
    """FID∞ (Chong & Forsyth 2020), and the same of FD-DINOv2, where there are images enough."""
    found = {f"{key}_infinity": far[key].unbiased for key in FRECHET.values() if key in far}
    return {key: value for key, value in found.items() if value is not None}


def _about(far: dict[str, Distance], found: dict[str, Measured], references: dict[str, Reference]) -> dict[str, Any]:
    return {key: {"network": found[name].name, "resize": found[name].about["resize"], "dim": found[name].about["dim"],
                  "num_reference": references[name].num, "bias": far[key].bias, "why": far[key].why}
            for name in references for key in far if key in KEYS[name]}


def _resolutions(found: Measured) -> dict[str, int]:
    """`512×512` → images; the most frequent ones, and how many others there are."""
    sizes = Counter(f"{width}×{height}" for width, height in found.values["size"].tolist())
    kept = dict(sizes.most_common(8))
    return kept | ({"others": len(found.values["size"]) - sum(kept.values())} if len(sizes) > len(kept) else {})


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())
