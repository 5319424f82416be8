"""The figures of captioners side by side: for the terminal, as JSON, and on a page with pictures."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jinja2
import numpy as np

from eval.caption_measures import Measure, difference
from eval.captions import (
    ScoredCaptions,
    compare_captioners,
    document_frequencies,
    score_captions,
    summarize,
    with_meteor,
)
from eval.config import JudgeRef
from eval.judge import Facts, Judge, open_judge
from recap.caption_sets import CaptionedImage
from recap.errors import BadSample, UserError
from recap.shards import read_shard
from recap.sheet import thumbnail

WIDTH = 18
"""Of a captioner's name in the terminal."""
FACTS = {"facts_covered": "facts of the image that the captions state, of those there are",
         "facts_precision": "facts that the captions state and that are true, of those they state"}


@dataclass(frozen=True)
class Scored:
    """A captioner with its captions of the test images."""

    name: str
    family: str
    styles: list[str]
    images: list[CaptionedImage]
    captions: dict[str, dict[str, dict[str, Any]]]
    """Style → uid → `text`, `ended`."""
    training: dict[str, Any]
    """What fine-tuning found; nothing of a base as it is."""
    captioning: dict[str, Any]
    downstream: dict[str, dict[str, Any]]
    """`seed-N/ARM` → what evaluation found."""
    judge: JudgeRef | None
    device: str
    meteor: bool


# --- figures -------------------------------------------------------------------------------------------------------


def score(found: list[Scored], baseline: str, seed: int) -> list[dict[str, Any]]:
    """A row of figures a captioner, JSON-like, in the order given.

    Returns:
        `name`, `family`, `parameters`, `trainable_parameters`, `training_seconds`, `training_images_per_second`,
        `steps`; `styles` → `images_per_second` (captions of that style), `ended` (share that ended by themselves),
        `metrics` (name → `value`, `ci`) and, but for the baseline, `differences` from it; `downstream`.
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
        rows.append({"name": each.name, "family": each.family, "parameters": each.captioning["parameters"],
                     "trainable_parameters": training.get("trainable_parameters", 0),
                     "training_seconds": training.get("training_seconds"), "steps": training.get("steps"),
                     "training_images_per_second": training.get("images_per_second"), "styles": styles,
                     "downstream": each.downstream})
    return rows


def _by_style(each: Scored) -> dict[str, ScoredCaptions]:
    """Style → scores of the captions of the images that have references of the style."""
    scored = {}
    for style, captions in each.captions.items():
        references = _references(each.images, style)
        if len(references) < 2:
            raise UserError(f"compare: {len(references)} test images have a caption of style {style}, and CIDEr-D "
                            "needs two at least: raise finetune.test_share")
        said = {uid: captions[uid]["text"] for uid in references}
        try:
            found = score_captions(said, references, document_frequencies(references))
            scored[style] = _with_facts(with_meteor(found) if each.meteor else found, said, each)
        except ValueError as error:
            raise UserError(f"compare: {error}") from None
    return scored


def _references(images: Iterable[CaptionedImage], style: str) -> dict[str, list[str]]:
    found = {image.uid: [text for kind, text in image.captions if kind == style] for image in images}
    return {uid: texts for uid, texts in found.items() if texts}


def _ended(each: Scored, style: str) -> float:
    return sum(caption["ended"] for caption in each.captions[style].values()) / len(each.captions[style])


# --- facts, where a judge can tell ---------------------------------------------------------------------------------


def _with_facts(scored: ScoredCaptions, said: dict[str, str], each: Scored) -> ScoredCaptions:
    """The same with what a judge finds right and wrong in the captions, where the test images' metadata say it."""
    if each.judge is None:
        return scored
    judge = _open(each.judge.target, each.judge.model, each.device)
    metadata = _metadata(tuple(sorted({image.image.url for image in each.images})))
    facts = [_facts(judge, said[uid], metadata.get(uid, {})) for uid in scored.keys]
    if not any(facts):
        return scored
    counts = np.array([[f.covered, f.total, f.covered, f.covered + f.wrong] if f else [0.0] * 4 for f in facts])
    own = {"facts_covered": Measure(counts[:, :2], _share)}
    if counts[:, 3].any():
        own["facts_precision"] = Measure(counts[:, 2:], _share)
    return replace(scored, measures={**scored.measures, **own})


def _share(sums: np.ndarray) -> np.ndarray:
    """First of two sums over the second; of nothing stated, nothing is true."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)


def _facts_apart(a: ScoredCaptions, b: ScoredCaptions, seed: int) -> dict[str, Any]:
    return {name: difference(a.measures[name], b.measures[name], seed) for name in FACTS
            if name in a.measures and name in b.measures}


@cache
def _open(target: str, model: str, device: str) -> Judge:
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


def _facts(judge: Judge, caption: str, metadata: dict[str, Any]) -> Facts | None:
    try:
        return judge.caption(caption, metadata)
    except (KeyError, BadSample):
        return None


# --- for people ----------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The table for the terminal, at most 80 columns wide."""
    rows = result["captioners"]
    lines = [f"{'':<{WIDTH}}{'parameters':>13}{'trained':>13}{'tuned in':>11}{'images/s':>11}{'steps':>9}"]
    for row in rows:
        seconds, rate, steps = row["training_seconds"], row["training_images_per_second"], row["steps"]
        lines.append(f"{row['name'][:WIDTH - 1]:<{WIDTH}}{_count(row['parameters']):>13}"
                     f"{_count(row['trainable_parameters']):>13}{f'{seconds:.0f} s' if seconds else '–':>11}"
                     f"{f'{rate:.1f}' if rate else '–':>11}{_count(steps):>9}")
    for style in dict.fromkeys(style for row in rows for style in row["styles"]):
        lines += ["", f"{style:<{WIDTH}}{'CIDEr-D':>22}{'BLEU-4':>8}{'words':>7}{'of ref.':>9}{'ended':>7}{'found':>7}"]
        lines += [_style_row(row, style) for row in rows if style in row["styles"]]
    if any(row["downstream"] for row in rows):
        lines += ["", *_downstream_rows(rows)]
    return "\n".join([*lines, "", "CIDEr-D with its 95 % interval over images; * differs from "
                      f"{result['baseline']}, p < 0.05.", "of ref.: length against the references. found: facts that a "
                      "judge finds stated."])


def _style_row(row: dict[str, Any], style: str) -> str:
    found = row["styles"][style]
    metrics = found["metrics"]
    low, high = metrics["cider_d"]["ci"]
    apart = found.get("differences", {}).get("cider_d", {})
    star = "*" if apart.get("verdict") in ("better", "worse") else " "
    cider = f"{metrics['cider_d']['value']:.2f} [{low:.2f}, {high:.2f}]{star}"
    facts = metrics.get("facts_covered")
    return (f"{row['name'][:WIDTH - 1]:<{WIDTH}}{cider:>22}{metrics['bleu_4']['value']:>8.3f}"
            f"{metrics['mean_words']['value']:>7.1f}{f'''{100 * metrics['length_ratio']['value']:.0f} %''':>9}"
            f"{f'''{100 * found['ended']:.0f} %''':>7}{f'''{100 * facts['value']:.0f} %''' if facts else '–':>7}")


def _downstream_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Object accuracy, or whatever leads, of the diffusion arms trained on each one's captions."""
    lines = [f"{'drawn by':<{WIDTH}}{'arm':<18}{'object accuracy':>17}{'CLIP score':>12}{'FID':>9}"]
    for row in rows:
        for arm, found in row["downstream"].items():
            accuracy = found.get("object_accuracy")
            lines.append(f"{row['name'][:WIDTH - 1]:<{WIDTH}}{arm:<18}"
                         f"{f'{100 * accuracy:.1f} %' if accuracy is not None else '–':>17}"
                         f"{found['clip_score']:>12.2f}{found['fid']:>9.2f}")
    return lines


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def page(name: str, result: dict[str, Any], found: list[Scored], num_samples: int) -> str:
    """The page: the table, what differs from the baseline, and pictures with what each captioner says of them."""
    samples = [{"picture": thumbnail(image.image), "uid": image.uid, "styles": [
        {"name": style, "references": [text for kind, text in image.captions if kind == style],
         "captions": [(each.name, each.captions[style][image.uid]) for each in found
                      if image.uid in each.captions.get(style, {})]}
        for style in found[0].styles if any(kind == style for kind, _ in image.captions)]}
        for image in found[0].images[:num_samples]]
    return _template().render(name=name, result=result, samples=samples, facts=FACTS)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("eval", "."), autoescape=True)
    return environment.get_template("captioners.html")
