"""Figures of captioners on the same images, and how they differ."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from eval.caption_measures import Measure, difference
from eval.caption_tokens import tokenize
from eval.captions import ScoredCaptions, compare_captioners, score_captions, summarize, with_meteor, with_spice
from eval.clip_score import ClipScorer
from eval.clipscore_hessel import clipscores
from eval.config import ClipScore, JudgeRef
from eval.judge import CaptionJudge, open_judge
from eval.statistics import ALPHA, holm
from recap import progress
from recap.caption_sets import CaptionedImage
from recap.config.finetune import Augment
from recap.errors import BadSample, UserError
from recap.pairs import Pair, open_image
from recap.pretrained import load_pretrained
from recap.shards import read_shard

IMAGE_BATCH = 64
FACTS = {"facts_covered": "facts of the image that the captions state, of those there are",
         "facts_precision": "facts that the captions state and that are true, of those they state"}


@dataclass(frozen=True)
class Scored:
    """A captioner with its captions of the test images."""

    name: str
    family: str
    tuned: str
    """`here`, `before`, or `no`."""
    styles: list[str]
    images: list[CaptionedImage]
    captions: dict[str, dict[str, dict[str, Any]]]
    """Style → uid → `text`, `ended`."""
    training: dict[str, Any]
    """What fine-tuning found; nothing of a captioner that was not tuned here."""
    captioning: dict[str, Any]
    downstream: dict[str, dict[str, Any]]
    """`seed-N/ARM` → what evaluation found."""
    judge: JudgeRef | None
    device: str
    metrics: list[str]
    """Those of `compare.metrics`."""
    clip: ClipScore
    """By which CLIPScore is."""


# --- figures -------------------------------------------------------------------------------------------------------


def score(found: list[Scored], baseline: str, seed: int) -> list[dict[str, Any]]:
    """A row of figures a captioner, JSON-like, in the order given.

    Returns:
        `name`, `family`, `tuned` (`here`, `before`, or `no`), `parameters`, `trainable_parameters`, `training_seconds`,
        `training_images_per_second`, `steps`; `styles` → `images_per_second` (captions of that style), `ended` (share
        that ended by themselves), `metrics` (name → `value`, `ci`) and, but for the baseline, `differences` from it,
        CIDEr-D's with `p_holm`, for all rows and styles together; `downstream`.
    """
    by_name = {each.name: _by_style(each) for each in found}
    rows = []
    for each in found:
        styles = {}
        for style, scored in by_name[each.name].items():
            other = by_name[baseline].get(style)
            apart = {} if each.name == baseline or other is None else {
                "differences": compare_captioners(scored, other, seed) | _facts_apart(scored, other, seed)}
            styles[style] = {"images_per_second": each.captioning["images_per_second"].get(style),
                             "ended": _ended(each, style), **summarize(scored, seed), **apart}
        training = each.training
        rows.append({"name": each.name, "family": each.family, "tuned": each.tuned,
                     "parameters": each.captioning["parameters"],
                     "trainable_parameters": training.get("trainable_parameters", 0 if each.tuned == "no" else None),
                     "training_seconds": training.get("training_seconds"), "steps": training.get("steps"),
                     "training_images_per_second": training.get("images_per_second"), "styles": styles,
                     "downstream": each.downstream})
    adjust([scored["differences"]["cider_d"] for row in rows for scored in row["styles"].values()
            if "differences" in scored])
    return rows


def adjust(apart: list[dict[str, Any]]) -> None:
    """Hold differences of one figure to how many there are (Holm): of twenty by chance, one would be starred."""
    for each, p in zip(apart, holm([each["p"] for each in apart]), strict=True):
        each["p_holm"] = p
        if p >= ALPHA:
            each["verdict"] = "can't tell"


def _by_style(each: Scored) -> dict[str, ScoredCaptions]:
    """Style → scores of the captions of the images that have references of the style."""
    scored = {}
    for style, captions in each.captions.items():
        references = _references(each.images, style)
        if len(references) < 2:
            raise UserError(f"{len(references)} of the images to score captioners on have a caption of style {style}, "
                            "and CIDEr-D needs two at least: name more (finetune.test_share, ablate.references)")
        said = {uid: captions[uid]["text"] for uid in references}
        try:
            found = score_captions(said, references)
            for metric in each.metrics:
                found = _with_metric(metric, found, said, references, each)
        except ValueError as error:
            raise UserError(f"captioners cannot be scored: {error}") from None
        scored[style] = _with_facts(found, said, each)
    return scored


def _with_metric(metric: str, found: ScoredCaptions, said: dict[str, str], references: dict[str, list[str]],
                 each: Scored) -> ScoredCaptions:
    if metric == "meteor":
        return with_meteor(found)
    if metric == "spice":
        return with_spice(found)
    scorer = _open_clip(each.clip, each.device)
    seen = _seen(scorer, tuple(each.images))
    scores, with_references, num_cut = clipscores(scorer, np.stack([seen[uid] for uid in found.keys]),
                                                  [said[uid] for uid in found.keys],
                                                  [references[uid] for uid in found.keys])
    if num_cut:
        progress.warn(f"CLIPScore: {num_cut} of {len(scores)} captions of {each.name} go beyond the "
                      f"{scorer.context_length} tokens that the model reads; they count by their beginning")
    by_name = {"clipscore_hessel": scores, "ref_clipscore": with_references}
    for name, column in by_name.items():
        found = found.with_scores(name, dict(zip(found.keys, column, strict=True)))
    return found


@cache
def _open_clip(config: ClipScore, device: str) -> ClipScorer:
    return load_pretrained(lambda folder: ClipScorer(folder, device), config, "evaluate.clip_score")


@cache
def _seen(scorer: ClipScorer, images: tuple[CaptionedImage, ...]) -> dict[str, np.ndarray]:
    """Uid → the image's embedding, (D,): the same for every captioner and style."""
    found: dict[str, np.ndarray] = {}
    for start in range(0, len(images), IMAGE_BATCH):
        part = images[start:start + IMAGE_BATCH]
        pictures = [open_image(Pair(image.uid, image.image, "", ""), Augment(), "") for image in part]
        found |= dict(zip([image.uid for image in part], scorer.embed_images(pictures), strict=True))
    return found


def _references(images: Iterable[CaptionedImage], style: str) -> dict[str, list[str]]:
    """By uid, of the images that have one with words, not only signs: n-grams score these alone."""
    found = {image.uid: [text for kind, text in image.captions if kind == style] for image in images}
    return {uid: texts for uid, texts in found.items() if any(map(tokenize, texts))}


def _ended(each: Scored, style: str) -> float:
    return sum(caption["ended"] for caption in each.captions[style].values()) / len(each.captions[style])


# --- facts, where a judge can tell ---------------------------------------------------------------------------------


def _with_facts(scored: ScoredCaptions, said: dict[str, str], each: Scored) -> ScoredCaptions:
    """The same with what a judge finds right and wrong in the captions, where the test images' metadata say it."""
    if each.judge is None:
        return scored
    judge = _open(each.judge.target, each.judge.model, each.device)
    metadata = _metadata(tuple(sorted({image.image.url for image in each.images})))
    counts = np.array([facts_of(judge, said[uid], metadata.get(uid, {})) for uid in scored.keys])
    return replace(scored, measures=with_share(dict(scored.measures), counts))


def with_share(measures: dict[str, Measure], counts: np.ndarray) -> dict[str, Measure]:
    """The same with `FACTS`, where any are known; counts are of `facts_of`, (N, 4), a row an image."""
    own = {}
    if counts[:, 1].any():
        own["facts_covered"] = Measure(counts[:, :2], _share)
    if counts[:, 3].any():
        own["facts_precision"] = Measure(counts[:, 2:], _share)
    return {**measures, **own}


def _share(sums: np.ndarray) -> np.ndarray:
    """First of two sums over the second; of nothing stated, nothing is true."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)


def _facts_apart(a: ScoredCaptions, b: ScoredCaptions, seed: int) -> dict[str, Any]:
    return {name: difference(a.measures[name], b.measures[name], seed) for name in FACTS
            if name in a.measures and name in b.measures}


@cache
def _open(target: str, model: str, device: str) -> CaptionJudge:
    return open_judge(JudgeRef(target=target, model=model), device)


@cache
def _metadata(urls: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Uid → `KEY.json`, of shards; files in folders have none."""
    found: dict[str, dict[str, Any]] = {}
    for url in urls:
        if url.endswith(".tar"):
            for sample in read_shard(url, []):
                try:
                    found[sample.uid] = sample.metadata
                except BadSample:
                    continue
    return found


def facts_of(judge: CaptionJudge | None, caption: str, metadata: dict[str, Any]) -> list[float]:
    """Facts that a caption states, and those there are; true statements, and all; zeros of an image nobody knows."""
    try:
        found = judge.caption(caption, metadata) if judge else None
    except (KeyError, BadSample):
        found = None
    return [found.covered, found.total, found.covered, found.covered + found.wrong] if found else [0.0] * 4
