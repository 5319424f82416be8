"""The figures of a report for TensorBoard, Weights & Biases and Trackio, as `train.trackers` names them."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from eval.comparisons import Scored
from eval.curves import Point
from eval.measures import measures_of
from eval.tables import figures
from recap import progress
from recap.processes import open_accelerator
from recap.rundir import StageDir
from train_t2i.config import Train
from train_t2i.trackers import PROJECT, open_trackers

Told = dict[tuple[int, str], dict[int, list[dict[str, Any]]]]
"""Seed and arm → training step → the metrics that were found then."""


def log_report(stage: StageDir, config: Mapping[str, Any], runs: Sequence[Scored], swept: Sequence[Point], device: str
               ) -> None:
    """Tell the trackers of the training what its arms are worth.

    Every arm of every seed is a run of its own, `NAME/report/seed-N/ARM`; TensorBoard's files lie in the stage's folder
    `seed-N/ARM/recap`. A figure is called `fid/over_1000_pictures`: of other numbers of pictures it is another curve,
    as distances depend on them. A service that can't be reached costs a warning, not the report.

    Args:
        stage: of the report.
        config: the resolved experiment; nobody is told of one without `train.trackers`.
        runs: what every arm of every seed scored, the first seed first.
        swept: points of curves, of the first seed; those over training steps are told.
        device: a torch device, that of the training.
    """
    train = Train.model_validate(config["train"]) if config.get("train", {}).get("trackers") else None
    if train is None:
        return
    try:
        for (seed, arm), own in _by_step(train, config, runs, swept).items():
            _log_arm(StageDir(stage.path / f"seed-{seed}" / arm, {}), train, own, device)
    except Exception as error:  # noqa: BLE001  (services raise what they like, and the report does not depend on them)
        progress.warn(f"train.trackers: {', '.join(train.trackers)} could not be told of the report's figures "
                      f"({' '.join(str(error).split())[:200]}): they are in {stage.path / 'metrics.csv'}")


def _by_step(train: Train, config: Mapping[str, Any], runs: Sequence[Scored], swept: Sequence[Point]) -> Told:
    """In the order of the steps; an arm that is not trained is at step 0."""
    found: Told = {}
    for run in runs:
        is_trained = config.get("arm", {}).get(run.arm, {}).get("captions")
        found.setdefault((run.seed, run.arm), {}).setdefault(train.steps if is_trained else 0, []).append(run.metrics)
    for point in swept:
        if point.kind == "train_steps":
            found.setdefault((runs[0].seed, point.arm), {}).setdefault(int(point.value), []).append(point.metrics)
    # wandb passes over what comes after a later step.
    return {place: dict(sorted(own.items())) for place, own in found.items()}


def _log_arm(stage: StageDir, train: Train, by_step: dict[int, list[dict[str, Any]]], device: str) -> None:
    shutil.rmtree(stage.path / PROJECT, ignore_errors=True)  # of a report that was killed
    accelerator = open_accelerator("no", device, train.trackers, stage.path)
    open_trackers(accelerator, stage, train, 0)
    for step, found in by_step.items():
        accelerator.log({key: value for metrics in reversed(found) for key, value in _named(metrics).items()},
                        step=step)
    for tracker in accelerator.trackers:
        tracker.finish()


def _named(metrics: dict[str, Any]) -> dict[str, float]:
    return {f"{key}/over_{metrics['num_images']}_pictures": value
            for key, value in figures(metrics, measures_of(metrics)).items()}
