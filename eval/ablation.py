"""`recap ablate`: what each expert is worth, by leaving it out, and by itself.

    look, once → stitch every mix of experts → tune a captioner on each → caption unseen images → score → one table

Every mix is the experiment with a captioner of its own below `runs/NAME/ablate/`; what the experts have seen serves
all, and everything is skipped that is already done.
"""

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.caption_measures import Measure, difference, intervals
from eval.captioner_scores import FACTS, adjust, facts_of, score, with_share
from eval.captioner_table import page
from eval.captioning import Contestant, Unseen
from eval.config import Ablate
from eval.judge import CaptionJudge, find_judge, open_judge
from recap import pipeline, progress
from recap.caption_sets import read_shards
from recap.config.stitch import Stitch
from recap.errors import UserError
from recap.pairs import usable
from recap.pipeline import Experiment, Inputs, Plan, Stage, captioner_checkpoint
from recap.rundir import lock
from recap.shards import read_shard
from recap.storage import write_bytes, write_json
from recap.variants import variant

SEED = 0
"""Of resampling."""
ALL = "all"


def mixes_of(config: Stitch) -> dict[str, list[str]]:
    """Name → experts: all of them, without each, each alone; none twice.

    Without an expert goes also the one that looks for what it names, as the name says: `without-ram-owlvit`.
    """
    experts = config.experts
    named = {ALL: experts}
    for name in experts:
        gone = [name, *(other for other in experts if config.tagger(other) == name)]
        named[f"without-{'-'.join(gone)}"] = [other for other in experts if other not in gone]
    named |= {f"only-{name}": [name] for name in experts}
    found: dict[str, list[str]] = {}
    for name, mix in named.items():
        if mix and mix not in found.values():
            found[name] = mix
    return found


def ablate(exp: Experiment, redo: bool) -> None:
    """Do what is not yet done, write `runs/NAME/ablate/` `ablate.json` and `index.html`, and print the table.

    Raises:
        UserError: there is no `[ablate]` table, but one expert, or something is missing.
    """
    config = _table_of(exp)
    out = Path(exp.runs) / exp.name / "ablate"
    mixes = mixes_of(exp.stitch)
    plan = Plan(exp)
    stitched = {name: plan.stitch(experts, f"ablate/{name}/stitch") for name, experts in mixes.items()}
    _check(exp, config, [*stitched.values()])
    unseen = _unseen(exp, config, out)
    contestants = [_contestant(exp, name, out, unseen) for name in mixes]
    pipeline.look(exp, redo)
    with lock(plan.root):
        for name, stage in stitched.items():
            pipeline.do(stage, f"stitch {name}", redo)
    with lock(out):
        for contestant in contestants:
            if contestant.finetune:
                pipeline.do(contestant.finetune, f"tune {contestant.name}", redo)
        for contestant in contestants:
            pipeline.do(contestant.captions, f"caption {contestant.name}", redo)
    found = [contestant.scored([], {}) for contestant in contestants]
    result = {"schema": 1, "baseline": ALL, "mixes": mixes, "stitched": stitched_figures(exp, stitched),
              "captioners": score(found, ALL, SEED), "references": " ".join(_references(config).urls)}
    write_json(str(out / "ablate.json"), result)
    write_bytes(str(out / "index.html"), page(exp.name, result, found, config.num_samples).encode())
    print(f"\n{ablation_table(result)}\n\nThe page: {out / 'index.html'}")


def _table_of(exp: Experiment) -> Ablate:
    if exp.ablate is None:
        raise UserError("this experiment has no [ablate] table: name shards with captions of people in "
                        "ablate.references")
    if len(exp.stitch.experts) < 2:
        raise UserError(f"ablate: stitch.experts names {len(exp.stitch.experts)}: name two at least")
    if exp.finetune.dataset is not None or exp.captioner.tuned is not None:
        raise UserError("ablate tunes captioners on what it stitches: leave finetune.dataset and captioner.tuned out")
    if progress.num_processes() > 1:
        raise UserError("recap ablate runs in one process: start it without torchrun or accelerate")
    return exp.ablate


def _check(exp: Experiment, config: Ablate, stitched: list[Stage]) -> None:
    """Say what is missing now, not after hours."""
    for stage in stitched:
        stage.dir  # noqa: B018  (looks whether checkpoints and inputs are there)
    captioner_checkpoint(exp.captioner)
    if exp.evaluate.judge:
        find_judge(exp.evaluate.judge)
    if unknown := sorted(set(config.kinds) - set(exp.styles)):
        raise UserError(f"ablate.kinds.{unknown[0]}: there is no [styles.{unknown[0]}], only {', '.join(exp.styles)}")
    learned = set(Plan(exp).shards(exp.stitch.shards, "stitch.shards").urls)
    if both := sorted(learned & set(_references(config).urls)):
        raise UserError(f"ablate.references: captioners learn from {both[0]}, which stitch.shards names, too: name "
                        "shards of other images")


def _contestant(exp: Experiment, name: str, out: Path, unseen: Unseen) -> Contestant:
    """The captioner that learns from one mix."""
    own = variant(exp, name, out, {"finetune": {"shards": str(out / name / "stitch" / "*.tar")}}, f"ablate: {name}")
    return Contestant(name, own, unseen)


def _references(config: Ablate) -> Inputs:
    return Inputs(config.references, "ablate.references")


def _unseen(exp: Experiment, config: Ablate, out: Path) -> Unseen:
    """The images of the references, read now: what is wrong with them is not to be found out after the tuning."""
    kinds = {style: config.kinds.get(style, style) for style in exp.styles}
    found, rejects = read_shards(_references(config).urls, kinds.values())
    images = [replace(image, captions=tuple(
        (style, text) for style, kind in kinds.items() for of, text in image.captions if of == kind))
              for image in found[:config.num_images]]
    quarantine = out / "references_quarantine.jsonl"
    quarantine.unlink(missing_ok=True)  # of another command, perhaps for other references
    images = usable(images, rejects, quarantine, num_workers=0)
    for style, kind in kinds.items():
        count = sum(any(style == of for of, _ in image.captions) for image in images)
        if count == 1:
            raise UserError(f"ablate.references: one image alone has a caption of kind {kind}, and CIDEr-D needs two "
                            "at least: name more shards")
        if not count:
            progress.warn(f"ablate.references: no image has a caption of kind {kind}, so captions of style {style} are "
                          f"not scored: say in ablate.kinds.{style} which are its references")
    return Unseen(lambda: {"references": _references(config).identity, "kinds": kinds,
                           "num_images": config.num_images}, lambda _: images, config.batch_size)


# --- what was stitched ---------------------------------------------------------------------------------------------


def stitched_figures(exp: Experiment, stitched: dict[str, Stage]) -> list[dict[str, Any]]:
    """A row a mix, JSON-like.

    Returns:
        `name`; `images`; `ungrounded`, the share of them whose captions state what no expert of the mix saw, None of a
        template; `styles` → `metrics` (`words`, and where a judge knows the images `facts_covered` and
        `facts_precision`: `value`, `ci`) and, but for all experts, `differences` from theirs, each of the two held to
        how many there are (`p_holm`).
    """
    judge = open_judge(exp.evaluate.judge, Plan(exp).device) if exp.evaluate.judge else None
    measured = {name: _measures(exp, stage, judge) for name, stage in stitched.items()}
    rows = []
    for name, by_style in measured.items():
        styles = {}
        for style, measures in by_style.items():
            bounds = intervals(measures, SEED)
            styles[style] = {"metrics": {key: {"value": each.value, "ci": bounds[key]}
                                         for key, each in measures.items()}}
            if name != ALL:
                styles[style]["differences"] = {key: difference(each, measured[ALL][style][key], SEED)
                                                for key, each in measures.items()
                                                if key in FACTS and key in measured[ALL][style]}
        result = stitched[name].dir.result()
        rows.append({"name": name, "images": result["images_out"], "styles": styles,
                     "ungrounded": result["ungrounded"] / result["images_out"] if "ungrounded" in result else None})
    apart = [style["differences"] for row in rows for style in row["styles"].values() if "differences" in style]
    for figure in FACTS:
        adjust([each[figure] for each in apart if figure in each])
    return rows


def _measures(exp: Experiment, stage: Stage, judge: CaptionJudge | None) -> dict[str, dict[str, Measure]]:
    """Style → figures of the captions of one mix, image by image."""
    words: dict[str, list[float]] = {style: [] for style in exp.styles}
    counts: dict[str, list[list[float]]] = {style: [] for style in exp.styles}
    for shard in sorted(stage.path.glob("*.tar")):
        for sample in read_shard(str(shard), []):
            for style in exp.styles:
                caption = sample.caption(style) or ""
                words[style].append(len(caption.split()))
                counts[style].append(facts_of(judge, caption, sample.metadata))
    return {style: with_share({"words": Measure.mean(words[style])}, np.array(counts[style]))
            for style in exp.styles}


def ablation_table(result: dict[str, Any]) -> str:
    """A table a style, for the terminal, at most 80 columns wide."""
    lines = []
    for style in result["stitched"][0]["styles"]:
        lines += ["", f"{style:<26}{'facts covered':>18}{'true':>18}{'CIDEr-D':>18}"]
        lines += [_line(stitched, captioner, style)
                  for stitched, captioner in zip(result["stitched"], result["captioners"], strict=True)]
    return "\n".join([*lines[1:], "", *textwrap.wrap(NOTE, 80)])


NOTE = ("Of what was stitched, the facts of the images that it states, and the share of what it states that is true; "
        "of the captioner tuned on it, CIDEr-D on other images. 95 % intervals over images; * differs from all "
        "experts', p < 0.05 (Holm).")


def _line(stitched: dict[str, Any], captioner: dict[str, Any], style: str) -> str:
    of_mix, of_captioner = stitched["styles"][style], captioner["styles"].get(style, {"metrics": {}})
    figures = [_figure(each["metrics"].get(name), each.get("differences", {}).get(name))
               for each, name in ((of_mix, "facts_covered"), (of_mix, "facts_precision"), (of_captioner, "cider_d"))]
    return f"{stitched['name'][:26]:<26}" + "".join(f"{figure:>18}" for figure in figures)


def _figure(metric: dict[str, Any] | None, apart: dict[str, Any] | None) -> str:
    if metric is None or metric["ci"] is None:
        return "– "
    low, high = metric["ci"]
    star = "*" if apart and apart["verdict"] != "can't tell" else " "
    return f"{metric['value']:.2f} [{low:.2f}, {high:.2f}]{star}"
