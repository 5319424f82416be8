"""`recap compare`: captioners side by side, tuned on the same images and scored on the same others.

    fine-tune each → caption the test images → score → one table (and, downstream, train Stable Diffusion on each)

Each captioner is the experiment with values of its own, in a run of its own below `runs/NAME/compare/`. Everything is
skipped that is already done.
"""

from pathlib import Path
from typing import Any

from eval.caption_java import program
from eval.captioner_scores import score
from eval.captioner_table import page, table
from eval.captioning import Contestant, Unseen
from eval.config import Compare
from eval.judge import find_judge
from recap import pipeline, progress
from recap.caption_sets import CaptionedImage
from recap.errors import UserError
from recap.finetune import read_test_images
from recap.pipeline import Experiment, Plan
from recap.rundir import lock
from recap.storage import write_bytes, write_json
from recap.variants import stitch, variant

SEED = 0
"""Of resampling."""
SAME_FOR_ALL = ("shards", "dataset", "test_share", "seed")
"""Of `[finetune]`: what decides which images are learned from, and which are tested."""


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
    contestants = [_contestant(variant(exp, name, out, values, f"compare.captioners.{name}"), config)
                   for name, values in config.captioners.items()]
    _check(exp, contestants, downstream)
    with lock(out):
        for contestant in contestants:
            if contestant.finetune:
                pipeline.do(contestant.finetune, f"tune {contestant.name}", redo)
        for contestant in contestants:
            pipeline.do(contestant.captions, f"caption with {contestant.name}", redo)
    if downstream:
        for contestant in contestants:
            pipeline.run(contestant.exp, None, redo)
    found = [contestant.scored(list(config.metrics), _downstream(Plan(contestant.exp)) if downstream else {})
             for contestant in contestants]
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
        for stage in (contestant.finetune, contestant.captions):
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


def _contestant(exp: Experiment, config: Compare) -> Contestant:
    return Contestant(exp.name, exp, _unseen(exp, config))


def _unseen(exp: Experiment, config: Compare) -> Unseen:
    """The held-out images of what all learn from."""
    plan = Plan(exp)

    def images(folder: Path) -> list[CaptionedImage]:
        shards = [] if exp.finetune.dataset else plan.shards(exp.finetune.shards, "finetune.shards").urls
        return read_test_images(folder, shards, exp.finetune, exp.styles)[:config.num_images]

    return Unseen(lambda: {"inputs": plan.finetune(None).reads()["inputs"], "dataset": exp.finetune.dataset,
                           "num_images": config.num_images, "test_share": exp.finetune.test_share,
                           "seed": exp.finetune.seed}, images, config.batch_size)


def _source(exp: Experiment) -> str:
    """Where the references are."""
    dataset, shards = exp.finetune.dataset, exp.finetune.shards
    return dataset.captions if dataset else " ".join([shards] if isinstance(shards, str) else shards or [])


def _downstream(plan: Plan) -> dict[str, dict[str, Any]]:
    """`seed-N/ARM` → what evaluation found of the pictures that the arm drew."""
    return {f"{stage.path.parent.parent.name}/{stage.path.name}": stage.dir.result() for stage in plan.stages()
            if stage.verb == "evaluate"}
