"""The trials on disk, and what is tried next."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap import progress
from recap.config.sweep import Dimension, Sweep
from recap.errors import UserError
from recap.sweep.space import Values, combinations

if TYPE_CHECKING:
    import optuna

DEFAULT_TRIALS = 20
NUM_DRAWS = 100
"""So often TPE is asked for values that no trial has tried yet."""


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
        self.optuna.create_study(storage=storage, study_name="sweep", direction=direction(self.metric))
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
            memory = self.optuna.create_study(direction=direction(self.metric),
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


def direction(metric: str) -> str:
    return "minimize" if metric == "loss" else "maximize"


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
