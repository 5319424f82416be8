"""Trials as experiments."""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recap import pipeline, progress
from recap.errors import UserError
from recap.memory import free_memory, is_out_of_memory
from recap.pipeline import Experiment, Plan, Stage
from recap.rundir import StageDir, digest
from recap.sweep.result import overrides, rank, shown
from recap.sweep.space import Values, combinations, nested, samples
from recap.sweep.study import Study, Trial, direction
from recap.variants import variant

HELD_OUT = ("finetune.shards", "finetune.dataset", "finetune.validation", "finetune.test_share", "finetune.seed",
            "finetune.max_tokens")
"""What decides on which captions of which images, and in what, trials are compared."""
OF_TOKENS = ("captioner.family", "captioner.model", "captioner.clipcap.gpt2", "captioner.transformer.decoder",
             "captioner.transformer.vocab_size", "captioner.cnn_lstm.vocab_size")
"""What decides which tokens a loss is the mean of."""


class Failed(Exception):
    """A trial cannot be trained.

    Args:
        reason: in one line.
        of_values: whether it is surely the trial's values that are to blame, not the experiment.
    """

    def __init__(self, reason: str, of_values: bool) -> None:
        super().__init__(" ".join(reason.split()))
        self.of_values = of_values


class Search:
    """An experiment whose fine-tuning is tried with several values."""

    def __init__(self, exp: Experiment) -> None:
        if exp.sweep is None:
            raise UserError("this experiment has no [sweep] table: say what to try, e.g. "
                            "sweep.space.finetune.lr='[1e-5, 1e-4]'")
        if not exp.finetune.validation.is_on:
            raise UserError("sweep compares its trials on held-out images: set finetune.validation.share, e.g. 0.1")
        if progress.num_processes() > 1:
            raise UserError("recap sweep runs in one process: start it without torchrun or accelerate")
        self.exp, self.config = exp, exp.sweep
        self.metric: str = self.config.metric or exp.finetune.validation.select_by
        self.root = Path(exp.runs) / exp.name / "sweep"

    def experiment(self, name: str, values: Values) -> Experiment:
        """The experiment with a trial's values, in a run of its own below the sweep's folder."""
        return variant(self.exp, name, self.root, nested(values | self._of_metric()), "sweep.space")

    def _of_metric(self) -> Values:
        """The metric also chooses which weights of a trial are kept."""
        return {"finetune.validation.select_by": self.metric}

    def stage(self, name: str, values: Values) -> Stage:
        return Plan(self.experiment(name, values)).finetune(None)

    def folder(self) -> StageDir:
        """The sweep's own. How many trials are asked for is not of its fingerprint: more of them go on with it."""
        config = {"sampler": self.config.sampler, "metric": self.metric, "space": self.config.space}
        seed = {"seed": self.config.seed} if self.config.sampler == "tpe" else {}
        # The first values stand for those of the file, which no trial reads.
        return StageDir(self.root, {"sweep": config | seed, "trial": self.stage("trial", self._first()).reads()})

    def check_values(self) -> None:
        """Validate the experiment with every value, before anything is trained.

        Raises:
            UserError: an unknown key, a value that doesn't fit, or a key that decides what trials are compared on.
        """
        for key in self.config.space:
            if _touches(key, HELD_OUT):
                raise UserError(f"sweep.space: with another {key}, trials could not be compared: leave it out")
            if self.metric == "loss" and _touches(key, OF_TOKENS):
                raise UserError(f"sweep.space: a loss is a mean over tokens, and {key} makes others of the same words: "
                                "set sweep.metric = \"cider_d\"")
        is_grid = self.config.sampler == "grid"
        for values in combinations(self.config.space) if is_grid else self._variations():
            self.experiment("trial", values)

    def check_effect(self) -> None:
        """Refuse a key that changes nothing: a sweep of `train.lr`, say, would train the same captioner every time.

        Raises:
            UserError: there is such a key, or a checkpoint or an input is missing.
        """
        if "captioner.family" in self.config.space:
            return  # a key may then be of one family alone
        usual = digest(self.stage("trial", self._first()).reads())
        for key, values in self.config.space.items():
            others = [{**self._first(), key: value} for value in samples(values)[1:]]
            if others and all(digest(self.stage("trial", each).reads()) == usual for each in others):
                raise UserError(f"sweep.space: {key} changes nothing that this experiment's fine-tuning reads: "
                                "leave it out")

    def _first(self) -> Values:
        return {key: samples(dimension)[0] for key, dimension in self.config.space.items()}

    def _variations(self) -> Iterator[Values]:
        """The first value of every key; then each other value of one key at a time."""
        yield self._first()
        for key, dimension in self.config.space.items():
            for value in samples(dimension)[1:]:
                yield {**self._first(), key: value}

    def attempt(self, trial: Trial, study: Study, redo: bool) -> Trial:
        """Train one trial, or go on with it; how it ended.

        Raises:
            UserError: the experiment is wrong, not this trial's values.
        """
        started = time.time()
        label = f"[{trial.number + 1}/{study.num_trials}] {trial.name}  {shown(trial.values)}"
        try:
            result = self._train(trial, label, redo)
        except Failed as failure:
            # What stops the first trials is mostly wrong for all: say it now, and not after a night.
            if not failure.of_values and not any(each.state == "complete" for each in study.trials()):
                raise UserError(f"sweep: {trial.name} ({shown(trial.values)}): {failure}") from None
            return dataclasses.replace(trial, state="failed", seconds=round(time.time() - started, 3),
                                       reason=str(failure))
        finally:
            free_memory()  # of a trial's weights, before the next is loaded
        return dataclasses.replace(trial, state="complete", metric=float(result["best"]),
                                   seconds=round(result["training_seconds"], 3))

    def _train(self, trial: Trial, label: str, redo: bool) -> dict[str, Any]:
        try:
            stage = self.stage(trial.name, trial.values)
        except UserError as error:  # values that fit each alone, and not together
            raise Failed(str(error), True) from None
        # The work alone may fail; what `do` itself refuses (an input that changed) is the experiment's.
        pipeline.do(dataclasses.replace(stage, work=lambda folder: _guarded(stage, folder)), label, redo)
        result = stage.dir.result()
        if result["best"] is None or not math.isfinite(result["best"]):
            raise Failed(f"{self.metric} of the held-out images is not finite", True)
        return result

    def result(self, trials: list[Trial]) -> dict[str, Any]:
        """What `result.json` holds: the trials by number, and the best of them."""
        entries = [{"name": trial.name, **dataclasses.asdict(trial),
                    "folder": str(self.root / trial.name / "captioner")} for trial in trials]
        complete = [entry for entry in entries if entry["state"] == "complete"]
        best = min(complete, key=lambda entry: rank(entry, self.metric), default=None)
        if best is not None:
            of_metric = self._of_metric() if self.metric != self.exp.finetune.validation.select_by else {}
            best = {**best, "overrides": overrides(best["values"] | of_metric)}
        return {"schema": 1, "metric": self.metric, "direction": direction(self.metric), "trials": entries,
                "best": best}


def _touches(key: str, others: tuple[str, ...]) -> bool:
    """Whether a key is one of others, lies in one, or holds one."""
    return any(key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in others)


def _guarded(stage: Stage, folder: StageDir) -> dict[str, Any]:
    """The stage's work; what is of this trial alone becomes `Failed`."""
    try:
        return stage.work(folder)
    except UserError as error:
        raise Failed(str(error), _is_not_finite(folder)) from None
    except ValueError as error:  # how the model libraries refuse settings: heads that don't divide a width
        raise Failed(f"{type(error).__name__}: {error}", False) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise Failed(f"out of memory: {str(error).splitlines()[0] if str(error) else ''}", True) from None


def _is_not_finite(folder: StageDir) -> bool:
    """Whether a loss or gradient stopped the training; its log says so last."""
    try:
        last = (folder.path / "log.jsonl").read_text().splitlines()[-1]
        return bool(json.loads(last)["event"] == "not finite")
    except (FileNotFoundError, IndexError, ValueError):
        return False
