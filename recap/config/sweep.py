"""What a sweep tries."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from recap.config import Table


class Dimension(Table):
    """What one key is tried with: some values, or a range of numbers. A bare list is its `values`."""

    values: list[Any] | None = Field(None, min_length=1)
    low: int | float | None = None
    """Integers are tried where `low` and `high` are written as integers."""
    high: int | float | None = None
    log: bool = False
    """Search the range by orders of magnitude."""
    step: int | float | None = Field(None, gt=0)
    """Between the numbers that are tried; by default 1 for integers, and any for others."""

    @model_validator(mode="after")
    def _check_form(self) -> "Dimension":
        if self.values is not None:
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("values, or low and high: give one of them")
            if twice := [value for place, value in enumerate(self.values) if value in self.values[:place]]:
                raise ValueError(f"{twice[0]!r} is named twice: name it once")
            return self
        if self.low is None or self.high is None:
            raise ValueError("low and high: give both, or a list of values")
        if self.high <= self.low:
            raise ValueError(f"high={self.high} is not above low={self.low}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log goes with low above 0 and without step")
        return self

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    def listed(self) -> list[Any] | None:
        """All values there are to try; none for a range without steps."""
        if self.values is not None or self.low is None or self.high is None:
            return self.values
        step = self.step or (1 if self.is_integer else None)
        if step is None or self.log:
            return None
        # Rounded, so that 0.1 + 2 · 0.1 is 0.3.
        return [round(self.low + place * step, 12) for place in range(int((self.high - self.low) / step + 1e-9) + 1)]


class Sweep(Table):
    """A search for the best settings of captioner fine-tuning, for `recap sweep`."""

    sampler: Literal["grid", "tpe"] = "tpe"
    """`grid` tries every combination; `tpe` (Bergstra et al. 2011) draws where earlier trials were good."""
    trials: int | None = Field(None, ge=1)
    """How many `tpe` makes; by default 20. More of them go on with the same search."""
    metric: Literal["loss", "cider_d"] | None = None
    """Of the held-out images, at each trial's best validation; by default `finetune.validation.select_by`."""
    seed: int = 0
    """Of `tpe`."""
    space: dict[str, Dimension] = Field(min_length=1)
    """Dotted key → what to try: `finetune.batch_size = [16, 64]`, `finetune.lr = { low = 1e-5, high = 1e-3, log = true
    }`."""

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("space"), dict):
            return content  # which validation refuses
        return content | {"space": dict(_dimensions(content["space"], ""))}

    @model_validator(mode="after")
    def _grid_is_finite(self) -> "Sweep":
        if self.sampler == "tpe":
            return self
        if self.trials is not None:
            raise ValueError("trials is of tpe, and grid tries every combination: leave it out")
        if endless := [key for key, dimension in self.space.items() if dimension.listed() is None]:
            raise ValueError(f"space.{endless[0]}: grid needs a list of values, or a range with a step and without log")
        return self


def _dimensions(space: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Tables in tables → dotted keys: TOML reads `finetune.lr = …` as a table `finetune` that holds `lr`."""
    for name, value in space.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and not value.keys() & Dimension.model_fields.keys():
            yield from _dimensions(value, f"{key}.")
        elif isinstance(value, list):
            yield key, {"values": value}
        elif isinstance(value, dict | Dimension):
            yield key, value
        else:
            raise ValueError(f"space.{key}: give a list of values, or a range {{ low = …, high = … }}")
