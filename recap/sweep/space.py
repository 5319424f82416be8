"""What there is to try."""

import copy
import itertools
import math
from typing import Any

from recap.config.sweep import Dimension
from recap.errors import UserError

Values = dict[str, Any]
"""Dotted key → value."""


def combinations(space: dict[str, Dimension]) -> list[Values]:
    """Every combination of listed values, each once; the last key changes fastest."""
    return [dict(zip(space, values, strict=True))
            for values in itertools.product(*(dimension.listed() or [] for dimension in space.values()))]


def samples(dimension: Dimension) -> list[Any]:
    """All values of a list; of a range, both ends, and one between, which is no integer where floats are tried."""
    if dimension.values is not None:
        return dimension.values
    if (listed := dimension.listed()) is not None:
        return [*dict.fromkeys([listed[0], listed[len(listed) // 2], listed[-1]])]
    low, high = dimension.low, dimension.high
    assert low is not None and high is not None  # noqa: S101  (the table holds it)
    return [low, high] if dimension.is_integer else [low, low + (high - low) / math.pi, high]


def nested(values: Values) -> dict[str, Any]:
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
