"""`recap compare`: captioners side by side, tuned on the same images and scored on the same others.

    fine-tune each → caption the test images → score → one table (and, downstream, train Stable Diffusion on each)

Each captioner is the experiment with values of its own, in a run of its own below `runs/NAME/compare/`. Everything is
skipped that is already done.
"""

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.caption_java import program
from eval.captioner_scores import Scored, score
from eval.captioner_table import page, table
from eval.config import Compare
from eval.judge import find_judge
from recap import pipeline, progress
from recap.caption_sets import CaptionedImage
from recap.captioners import Captioner, Tunable, open_captioner
from recap.config.finetune import Augment
from recap.errors import UserError
from recap.finetune import read_test_images
from recap.pairs import Pair, open_image
from recap.pipeline import Experiment, Plan, Stage, given_tuned
from recap.rundir import StageDir, lock
from recap.shards import write_bytes, write_json
from recap.variants import stitch, variant

SEED = 0
"""Of resampling."""
SAME_FOR_ALL = ("shards", "dataset", "test_share", "seed")
"""Of `[finetune]`: what decides which images are learned from, and which are tested."""


@dataclass(frozen=True)
class Contestant:
    """A captioner of the comparison."""

    name: str
    exp: Experiment
    """Its own: the experiment with its values, in a folder of its own."""

    @functools.cached_property
    def finetune(self) -> Stage | None:
        """Its tuning; none of a base as it is, and of one that was tuned before."""
        return Plan(self.exp).finetune(None) if self.exp.captioner.tuned is None else None

    @property
    def tuned(self) -> str:
        return "here" if self.finetune else "no" if self.exp.captioner.tuned == "none" else "before"


def compare(exp: Experiment, downstream: bool, redo: bool) -> None:
    """Do what is not yet done, write `runs/NAME/compare/` `compare.json` and `index.html`, and print the table.

    Args:
        exp: with a `[compare]` table.
        downstream: also train the experiment's arms on each one's captions, and take what the judge says of them.
        redo: make again what was made with other settings.

    Raises:
        UserError: there is no such table, no test image, or a captioner can't be tuned.
    """
    config = _table_of(exp)
    stitch(exp, redo)
    out = Path(exp.runs) / exp.name / "compare"
    contestants = [Contestant(name, variant(exp, name, out, values, f"compare.captioners.{name}"))
                   for name, values in config.captioners.items()]
    _check(exp, contestants, downstream)
    with lock(out):
        for contestant in contestants:
            if contestant.finetune:
                pipeline.do(contestant.finetune, f"tune {contestant.name}", redo)
        for contestant in contestants:
            pipeline.do(_captions(contestant, config), f"caption with {contestant.name}", redo)
    if downstream:
        for contestant in contestants:
            pipeline.run(contestant.exp, None, redo)
    found = [_scored(contestant, config, downstream) for contestant in contestants]
    baseline = config.baseline or contestants[0].name
    result = {"schema": 1, "baseline": baseline, "captioners": score(found, baseline, SEED),
              "references": _source(contestants[0].exp)}
    write_json(str(out / "compare.json"), result)
    write_bytes(str(out / "index.html"), page(exp.name, result, found, config.num_samples).encode())
    print(f"\n{table(result)}\n\nThe page: {out / 'index.html'}")


def _table_of(exp: Experiment) -> Compare:
    if exp.compare is None:
        raise UserError("this experiment has no [compare] table: name captioners in [compare.captioners.NAME]")
    if not exp.finetune.test_share:
        raise UserError("compare scores captioners on images that none has seen: set finetune.test_share, e.g. 0.1")
    if progress.num_processes() > 1:
        raise UserError("recap compare runs in one process: start it without torchrun or accelerate")
    return exp.compare


def _check(exp: Experiment, contestants: list[Contestant], downstream: bool) -> None:
    """Say what is wrong now, not after hours of tuning.

    Raises:
        UserError: captioners would see different images, something is missing, or arms wouldn't be of their captions.
    """
    config = _table_of(exp)
    for name, values in config.captioners.items():
        if differing := [key for key in SAME_FOR_ALL if key in values.get("finetune", {})]:
            raise UserError(f"compare.captioners.{name}: finetune.{differing[0]} says which images are learned from "
                            "and which are tested, one for all: set it in [finetune]")
    for contestant in contestants:
        for stage in (contestant.finetune, _captions(contestant, config)):
            if stage:
                stage.dir  # noqa: B018  (looks whether checkpoints and inputs are there)
    if exp.evaluate.judge:
        find_judge(exp.evaluate.judge)
    for metric in {"meteor", "spice"} & set(config.metrics):
        try:
            program("METEOR" if metric == "meteor" else "SPICE")
        except ValueError as error:
            raise UserError(f"compare.metrics: {error}") from None
    if downstream and exp.train.shards is not None:
        raise UserError("compare --downstream trains on what each captioner relabels, and train.shards names other "
                        "captions: leave it out")


# --- captions of the test images -----------------------------------------------------------------------------------


def _captions(contestant: Contestant, config: Compare) -> Stage:
    exp, finetune = contestant.exp, contestant.finetune
    plan = Plan(exp)

    def reads() -> dict[str, Any]:
        of_tuning = plan.finetune(None).reads()
        return {"tuned": finetune.dir.fingerprint if finetune else given_tuned(exp.captioner)[1],
                "captioner": exp.captioner.own(), "checkpoint": of_tuning["checkpoint"],
                "inputs": of_tuning["inputs"], "dataset": exp.finetune.dataset, "styles": exp.styles,
                "num_images": config.num_images, "test_share": exp.finetune.test_share, "seed": exp.finetune.seed}

    def work(stage: StageDir) -> dict[str, Any]:
        tuned = (finetune.path / finetune.dir.result()["chosen"] if finetune else given_tuned(exp.captioner)[0])
        captioner = open_captioner(exp.captioner, plan.device, tuned)
        return _caption(stage, _test_images(stage.path, plan, config), captioner, exp, config.batch_size)

    return Stage("compare", plan.root / "captions", reads, work, [finetune] if finetune else [])


def _test_images(folder: Path, plan: Plan, config: Compare) -> list[CaptionedImage]:
    exp = plan.exp
    shards = [] if exp.finetune.dataset else plan.shards(exp.finetune.shards, "finetune.shards").urls
    return read_test_images(folder, shards, exp.finetune, exp.styles)[:config.num_images]


def _caption(stage: StageDir, images: list[CaptionedImage], captioner: Captioner, exp: Experiment,
             batch_size: int) -> dict[str, Any]:
    """Caption every test image in every style that there are references of.

    Returns:
        How many images, how large the captioner is, and by style how many images/s it would caption in that one alone.
    """
    known = [style for style in exp.styles if any(style == kind for image in images for kind, _ in image.captions)]
    captions: dict[str, dict[str, dict[str, Any]]] = {style: {} for style in known}
    encoding, seconds = 0.0, dict.fromkeys(known, 0.0)
    with progress.bar("caption", len(images)) as bar:
        for start in range(0, len(images), batch_size):
            batch = images[start:start + batch_size]
            pictures = [open_image(Pair(image.uid, image.image, "", ""), Augment(), "") for image in batch]
            started = time.perf_counter()
            features = captioner.encode(captioner.preprocess(pictures))
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # else the first style would be charged with it
            encoding += time.perf_counter() - started
            for style in known:
                started = time.perf_counter()
                for image, found in zip(batch, captioner.caption(features, exp.styles[style]), strict=True):
                    captions[style][image.uid] = {"text": found.text, "ended": found.ended}
                seconds[style] += time.perf_counter() - started
            bar.update(len(batch))
    write_json(str(stage.path / "captions.json"), captions)
    count = sum(p.numel() for p in captioner.model.parameters()) if isinstance(captioner, Tunable) else None
    return {"images": len(images), "parameters": count,
            "images_per_second": {style: len(images) / (encoding + spent) for style, spent in seconds.items()}}


# --- what the table is made of -------------------------------------------------------------------------------------


def _scored(contestant: Contestant, config: Compare, downstream: bool) -> Scored:
    plan, finetune = Plan(contestant.exp), contestant.finetune
    stage = _captions(contestant, config)
    return Scored(
        name=contestant.name, family=contestant.exp.captioner.family, tuned=contestant.tuned,
        styles=list(contestant.exp.styles),
        images=_test_images(stage.path, plan, config), captions=json.loads((stage.path / "captions.json").read_bytes()),
        training=finetune.dir.result() if finetune else {}, captioning=stage.dir.result(),
        downstream=_downstream(plan) if downstream else {}, judge=contestant.exp.evaluate.judge,
        device=plan.device, metrics=list(config.metrics), clip=contestant.exp.evaluate.clip_score)


def _source(exp: Experiment) -> str:
    """Where the references are."""
    dataset, shards = exp.finetune.dataset, exp.finetune.shards
    return dataset.captions if dataset else " ".join([shards] if isinstance(shards, str) else shards or [])


def _downstream(plan: Plan) -> dict[str, dict[str, Any]]:
    """`seed-N/ARM` → what evaluation found of the pictures that the arm drew."""
    return {f"{stage.path.parent.parent.name}/{stage.path.name}": stage.dir.result() for stage in plan.stages()
            if stage.verb == "evaluate"}
