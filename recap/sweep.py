"""`recap sweep`: search settings of captioner fine-tuning. To resume, run the same command again.

    stitch, if need be → trial-000, trial-001, … (each a fine-tuning stage with values of its own) → a table, best first

The study is an Optuna study in `runs/NAME/sweep/study.db`. What a trial tries depends on the seed, its number and the
trials before it alone, so a sweep that was stopped ends as one that was not.
"""

import copy
import dataclasses
import gc
import hashlib
import itertools
import json
import math
import shlex
import textwrap
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap import pipeline, progress
from recap.config.sweep import Dimension, Sweep
from recap.errors import UserError
from recap.pipeline import Experiment, Plan, Stage
from recap.rundir import StageDir, digest, lock
from recap.shards import write_json
from recap.variants import stitches, variant

if TYPE_CHECKING:
    import optuna

DEFAULT_TRIALS = 20
NUM_DRAWS = 100
"""So often TPE is asked for values that no trial has tried yet."""
HELD_OUT = ("finetune.validation.share", "finetune.validation.shards", "finetune.validation.dataset",
            "finetune.validation.num_images", "finetune.validation.select_by", "finetune.test_share", "finetune.seed")
"""What decides on which images, and in what, trials are compared."""
Values = dict[str, Any]
"""Dotted key → value."""


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One try."""

    number: int
    values: Values
    state: str = "running"
    """`complete`, `failed`, or `running`: begun, and not yet ended."""
    metric: float | None = None
    seconds: float | None = None
    """Of training, stops not counted; of a failed trial, since it was last begun."""
    reason: str | None = None
    """Why it failed."""

    @property
    def name(self) -> str:
        return f"trial-{self.number:03d}"


class Failed(Exception):
    """A trial cannot be trained.

    Args:
        reason: in one line.
        of_values: whether it is surely the trial's values that are to blame, not the experiment.
    """

    def __init__(self, reason: str, of_values: bool) -> None:
        super().__init__(" ".join(reason.split()))
        self.of_values = of_values


def sweep(exp: Experiment, redo: bool = False) -> None:
    """Do the trials that are not yet done, write `runs/NAME/sweep/result.json`, and print the table.

    Args:
        exp: with a `[sweep]` table and held-out images.
        redo: begin anew where the sweep was made with other settings.

    Raises:
        UserError: the table, a key of its space or the experiment is wrong, or no trial worked.
    """
    search = Search(exp)
    search.check_values()
    with lock(Path(exp.runs) / exp.name):
        if stitches(exp):
            pipeline.do(Plan(exp).stitch(), "stitch", redo)
        search.check_effect()
        folder = search.folder()
        _begin(folder, redo)
        study = Study(folder.path / "study.db", search.config, search.metric)
        while trial := study.next():
            ended = search.attempt(trial, study, redo)
            study.tell(ended)
            write_json(str(folder.path / "result.json"), search.result(study.trials()))
            folder.log(event="trial", **dataclasses.asdict(ended))
            progress.say(f"    {_line(ended, search.metric)}")
        result = search.result(study.trials())
        write_json(str(folder.path / "result.json"), result)
    print(f"\n{table(result)}\n")
    if result["best"] is None:
        raise UserError(f"sweep: no trial worked; the first: {result['trials'][0]['reason']}")
    print(f"The best is {result['best']['name']}: {result['best']['folder']}\nIts values, to paste:\n"
          f"{result['best']['overrides']}")


def _begin(folder: StageDir, redo: bool) -> None:
    """Refuse a sweep of other settings, or with `redo` delete it."""
    if folder.state() == "changed":
        if not redo:
            changes = folder.changes()
            more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
            raise UserError(f"{folder.path} was made with other settings or inputs ({changes[0]}{more}): give the run "
                            "another name=…, or --redo to delete all its trials and begin anew")
        progress.say(f"    {folder.path} was made with other settings: deleted, made again")
        folder.clear()
    folder.begin()


# --- trials as experiments -----------------------------------------------------------------------------------------


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
        return variant(self.exp, name, self.root, _nested(values | self._of_metric()), "sweep.space")

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
            if any(key == held or key.startswith(f"{held}.") for held in HELD_OUT):
                raise UserError(f"sweep.space: with another {key}, trials could not be compared: leave it out")
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
            others = [{**self._first(), key: value} for value in _samples(values)[1:]]
            if others and all(digest(self.stage("trial", each).reads()) == usual for each in others):
                raise UserError(f"sweep.space: {key} changes nothing that this experiment's fine-tuning reads: "
                                "leave it out")

    def _first(self) -> Values:
        return {key: _samples(dimension)[0] for key, dimension in self.config.space.items()}

    def _variations(self) -> Iterator[Values]:
        """The first value of every key; then each other value of one key at a time."""
        yield self._first()
        for key, dimension in self.config.space.items():
            for value in _samples(dimension)[1:]:
                yield {**self._first(), key: value}

    def attempt(self, trial: Trial, study: "Study", redo: bool) -> Trial:
        """Train one trial, or go on with it; how it ended.

        Raises:
            UserError: the experiment is wrong, not this trial's values.
        """
        started = time.time()
        label = f"[{trial.number + 1}/{study.num_trials}] {trial.name}  {_shown(trial.values)}"
        try:
            result = self._train(trial, label, redo)
        except Failed as failure:
            # What stops the first trials is mostly wrong for all: say it now, and not after a night.
            if not failure.of_values and not any(each.state == "complete" for each in study.trials()):
                raise UserError(f"sweep: {trial.name} ({_shown(trial.values)}): {failure}") from None
            return dataclasses.replace(trial, state="failed", seconds=round(time.time() - started, 1),
                                       reason=str(failure))
        finally:
            _free_memory()
        return dataclasses.replace(trial, state="complete", metric=float(result["best"]),
                                   seconds=round(result["training_seconds"], 1))

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
        best = min(complete, key=lambda entry: _rank(entry, self.metric), default=None)
        if best is not None:
            of_metric = self._of_metric() if self.metric != self.exp.finetune.validation.select_by else {}
            best = {**best, "overrides": overrides(best["values"] | of_metric)}
        return {"schema": 1, "metric": self.metric, "direction": _direction(self.metric), "trials": entries,
                "best": best}


def _guarded(stage: Stage, folder: StageDir) -> dict[str, Any]:
    """The stage's work; what is of this trial alone becomes `Failed`."""
    try:
        return stage.work(folder)
    except UserError as error:
        raise Failed(str(error), _is_not_finite(folder)) from None
    except ValueError as error:  # how the model libraries refuse settings: heads that don't divide a width
        raise Failed(f"{type(error).__name__}: {error}", False) from None
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise Failed(f"out of memory: {str(error).splitlines()[0] if str(error) else ''}", True) from None


def _is_not_finite(folder: StageDir) -> bool:
    """Whether a loss or gradient stopped the training; its log says so last."""
    try:
        last = (folder.path / "log.jsonl").read_text().splitlines()[-1]
        return bool(json.loads(last)["event"] == "not finite")
    except (FileNotFoundError, IndexError, ValueError):
        return False


def _is_out_of_memory(error: Exception) -> bool:
    import torch
    # Outside its CUDA allocator, torch has no class for it: its words are those of the CPU, of CUDA, and of cuBLAS.
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(each in str(error) for each in words)


def _free_memory() -> None:
    """Let go of a trial's weights, which cycles may hold, before the next is loaded."""
    import torch
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _nested(values: Values) -> dict[str, Any]:
    """Dotted keys → tables in tables."""
    whole: dict[str, Any] = {}
    for dotted, value in values.items():
        table = whole
        *tables, key = dotted.split(".")
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise UserError(f"sweep.space: {dotted}: {name} is a key of the space itself: leave one of them out")
        table[key] = copy.deepcopy(value)
    return whole


# --- the space -----------------------------------------------------------------------------------------------------


def combinations(space: dict[str, Dimension]) -> list[Values]:
    """Every combination of listed values, each once; the last key changes fastest."""
    return [dict(zip(space, values, strict=True))
            for values in itertools.product(*(dimension.listed() or [] for dimension in space.values()))]


def _samples(dimension: Dimension) -> list[Any]:
    """All values; of a range without steps, both ends and one between, which is no integer where floats are tried."""
    if (listed := dimension.listed()) is not None:
        return listed
    low, high = dimension.low, dimension.high
    assert low is not None and high is not None  # noqa: S101  (the table holds it)
    return [low, high] if dimension.is_integer else [low, low + (high - low) / math.pi, high]


def _distribution(dimension: Dimension, is_of_grid: bool) -> "optuna.distributions.BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    listed = dimension.listed()
    if dimension.values is not None or is_of_grid:
        return CategoricalDistribution([_choice(value) for value in listed or []])
    low, high = dimension.low, listed[-1] if listed else dimension.high  # Optuna wants high to be a whole step
    if dimension.is_integer:
        return IntDistribution(low, high, log=dimension.log, step=dimension.step or 1)  # type: ignore[arg-type]
    return FloatDistribution(low, high, log=dimension.log, step=dimension.step)  # type: ignore[arg-type]


def _choice(value: Any) -> Any:
    """A value as Optuna can keep it."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _from_choice(dimension: Dimension, found: Any) -> Any:
    if dimension.values is None:
        return found
    return next(value for value in dimension.values if _choice(value) == found)


# --- the study -----------------------------------------------------------------------------------------------------


class Study:
    """The trials on disk, by Optuna.

    SQLite, as a kill at any moment leaves the last whole transaction, and no lock. (Optuna's journal file, killed in a
    write, can hold half a line that stops every later reading, or a lock that is waited for.) A trial is written with
    all its values in one transaction, so there are none with some.
    """

    def __init__(self, path: Path, config: Sweep, metric: str) -> None:
        self.config, self.metric = config, metric
        self.optuna = _optuna()
        self.grid = combinations(config.space) if config.sampler == "grid" else []
        self.distributions = {key: _distribution(dimension, bool(self.grid)) for key, dimension in config.space.items()}
        self.num_trials = len(self.grid) or config.trials or DEFAULT_TRIALS
        if not path.exists():
            self._create(path)
        self._storage = self.optuna.storages.RDBStorage(f"sqlite:///{path}")
        self._study: optuna.Study = self.optuna.load_study(storage=self._storage, study_name="sweep")

    def _create(self, path: Path) -> None:
        """Make the file under another name first: a kill between two of its tables must not leave half of them."""
        temporary = path.with_name(".study.tmp.db")
        for left in (temporary, Path(f"{temporary}-journal")):
            left.unlink(missing_ok=True)
        storage = self.optuna.storages.RDBStorage(f"sqlite:///{temporary}")
        self.optuna.create_study(storage=storage, study_name="sweep", direction=_direction(self.metric))
        storage.remove_session()
        storage.engine.dispose()
        temporary.rename(path)

    def trials(self) -> list[Trial]:
        """All that were begun, by number."""
        return [self._trial(each) for each in self._study.get_trials(deepcopy=False)]

    def _trial(self, found: "optuna.trial.FrozenTrial") -> Trial:
        words = {"COMPLETE": "complete", "FAIL": "failed"}
        values = {key: _from_choice(dimension, found.params[key]) for key, dimension in self.config.space.items()}
        return Trial(found.number, values, words.get(found.state.name, "running"), found.value,
                     found.user_attrs.get("seconds"), found.user_attrs.get("reason"))

    def next(self) -> Trial | None:
        """The trial that a stop interrupted, or a new one; none when all are done."""
        known = self.trials()
        running = [trial for trial in known if trial.state == "running"]
        if running:
            return running[0]
        if len(known) >= self.num_trials:
            return None
        params = ({key: _choice(value) for key, value in self.grid[len(known)].items()} if self.grid
                  else self._draw(len(known)))
        if params is None:
            progress.say(f"    all {len(known)} combinations that were found are tried: no further trial")
            return None
        self._study.add_trial(self.optuna.trial.create_trial(
            state=self.optuna.trial.TrialState.RUNNING, params=params, distributions=self.distributions))
        return self.next()

    def _draw(self, number: int) -> dict[str, Any] | None:
        """What TPE would try now, given what is complete; not what was tried before. None where it finds nothing."""
        before = self._study.get_trials(deepcopy=False)
        for attempt in range(NUM_DRAWS):
            memory = self.optuna.create_study(direction=_direction(self.metric),
                                              sampler=self.optuna.samplers.TPESampler(
                                                  seed=_seed(self.config.seed, number, attempt)))
            memory.add_trials([each for each in before if each.state.is_finished()])
            params: dict[str, Any] = memory.ask(self.distributions).params
            if all(params != each.params for each in before):
                return params
        return None

    def tell(self, trial: Trial) -> None:
        """Keep how a trial ended; the state comes last, and counts it."""
        found = self._study.get_trials(deepcopy=False)[trial.number]
        for name, value in (("seconds", trial.seconds), ("reason", trial.reason)):
            self._storage.set_trial_user_attr(found._trial_id, name, value)
        states = self.optuna.trial.TrialState
        state = states.COMPLETE if trial.state == "complete" else states.FAIL
        self._study.tell(trial.number, trial.metric, state=state)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("recap sweep needs Optuna: pip install 'recap-t2i[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _seed(seed: int, number: int, attempt: int) -> int:
    """Of one draw: a trial's own, so that it doesn't matter which process draws it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number} {attempt}".encode()).digest()[:4], "big")


def _direction(metric: str) -> str:
    return "minimize" if metric == "loss" else "maximize"


# --- what is shown -------------------------------------------------------------------------------------------------


def overrides(values: Values) -> str:
    """Values as arguments of the command line: `finetune.lr=1e-05 finetune.batch_size=16`, quoted for a shell."""
    return " ".join(shlex.quote(f"{key}={_override(value)}") for key, value in _leaves(values, ""))


def _leaves(values: Values, prefix: str) -> Iterator[tuple[str, Any]]:
    """A table as its keys: given whole, it would replace the file's, and a trial's goes into it."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _override(value: Any) -> str:
    if not isinstance(value, str):
        return _toml(value)
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return value  # a bare word, which the command line takes as a string
    return _toml(value)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def table(result: dict[str, Any], width: int = 80) -> str:
    """For the terminal: a line a trial, best first, then those that failed and why."""
    metric = result["metric"]
    rows = [f"{'trial':<10} {metric:>10} {'seconds':>9}  values"]
    for entry in sorted(result["trials"], key=lambda entry: _rank(entry, metric)):
        found = f"{entry['metric']:.4f}" if entry["state"] == "complete" else entry["state"]
        seconds = "" if entry["seconds"] is None else f"{entry['seconds']:.1f}"
        head = f"{entry['name']:<10} {found:>10} {seconds:>9}  "
        rows += textwrap.wrap(_shown(entry["values"]), width, initial_indent=head, subsequent_indent=" " * len(head))
        if entry["reason"]:
            rows += textwrap.wrap(entry["reason"], width, initial_indent=" " * 4, subsequent_indent=" " * 4)
    return "\n".join(rows)


def _rank(entry: dict[str, Any], metric: str) -> tuple[int, float, int]:
    """The best first; of equals, the earlier."""
    if entry["state"] != "complete":
        return 1, 0.0, entry["number"]
    return 0, entry["metric"] if _direction(metric) == "minimize" else -entry["metric"], entry["number"]


def _line(trial: Trial, metric: str) -> str:
    found = f"{metric} {trial.metric:.4f}" if trial.metric is not None else f"failed: {trial.reason}"
    return f"{trial.name}  {_shown(trial.values)}  {found}"


def _shown(values: Values) -> str:
    """`lr=0.0001 batch_size=16`: keys by their last name where that tells them apart."""
    last = [key.rpartition(".")[2] for key in values]
    names = [name if last.count(name) == 1 else key for key, name in zip(values, last, strict=True)]
    return " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                    for name, value in zip(names, values.values(), strict=True))
