"""A value of every metric for every picture: `scores.json`, and the means over prompts and prompt sets."""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recap.errors import UserError
from recap.storage import write_json

SCHEMA = 2


@dataclass(frozen=True)
class Scores:
    """One row a picture, in the order of `prompts.jsonl`."""

    sets: list[str]
    """The prompt set of each."""
    columns: dict[str, list[float | None]]
    """Metric → its value for each picture; None where the prompt asks nothing of that kind. Of a distance, its
    pseudovalue (`eval.pseudovalues`)."""
    prompts: list[int]
    """The place of each one's prompt among all prompts."""

    def rows(self, sets: list[str]) -> np.ndarray:
        """Indices of the pictures of these sets, in order."""
        return np.array([index for index, name in enumerate(self.sets) if name in sets], dtype=np.int64)

    def values(self, metric: str, sets: list[str]) -> np.ndarray:
        """Values of one metric, (N,) float64, over the pictures of these sets; NaN for None."""
        return np.array(self.columns[metric], dtype=np.float64)[self.rows(sets)]

    def by_prompt(self, metric: str, sets: list[str], prompts: list[int] | None = None) -> np.ndarray:
        """The same over the prompts of these sets, in order: of each, the mean of its pictures that have a value.

        `prompts` are other numbers of the prompts than their places, as `eval.drawn.clusters` gives them.
        """
        values, rows = self.values(metric, sets), self.rows(sets)
        _, places = np.unique(np.array(prompts or self.prompts, dtype=np.int64)[rows], return_inverse=True)
        known = ~np.isnan(values)
        sums = np.bincount(places, weights=np.where(known, values, 0))
        with np.errstate(invalid="ignore"):
            return np.asarray(sums / np.bincount(places, weights=known))

    def means(self, sets: list[str]) -> dict[str, float]:
        """Metric → its mean over the prompts of these sets that have a value; without the metrics that none has."""
        found = {metric: values[~np.isnan(values)] for metric in self.columns
                 for values in [self.by_prompt(metric, sets)]}
        return {metric: float(values.mean()) for metric, values in found.items() if values.size}

    def by_set(self, metrics: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Set → `num_images`, and `means` of some metrics."""
        own = Scores(self.sets, {name: self.columns[name] for name in metrics}, self.prompts)
        return {name: {"num_images": self.sets.count(name), **own.means([name])} for name in dict.fromkeys(self.sets)}

    def save(self, path: Path) -> None:
        write_json(str(path), {"schema": SCHEMA, "sets": self.sets, "prompts": self.prompts, **self.columns})

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """Read what `save` wrote. `ValueError`, `KeyError` or `OSError` for anything else."""
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
            raise ValueError(f"not of schema {SCHEMA}")
        if any(not isinstance(column, list) or len(column) != len(found["sets"]) for column in found.values()):
            raise ValueError("columns of unequal length")
        return cls(found.pop("sets"), found, found.pop("prompts"))


def headline_sets(wanted: list[str] | None, known: list[str]) -> list[str]:
    """The sets of the headline figures, in the order of the prompts: those wanted, by default all.

    Raises:
        UserError: there is no set of such a name.
    """
    check_sets("evaluate.sets", wanted or [], known)
    return [name for name in dict.fromkeys(known) if wanted is None or name in wanted]


def check_sets(where: str, wanted: Iterable[str], known: Sequence[str]) -> None:
    """`UserError` where there is no prompt set of a name that the experiment file gives."""
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the sets are {', '.join(dict.fromkeys(known))}"
            raise UserError(f"{where}: no prompt set {name!r} in generate.prompts: {hint}")
