"""The learning rate of a step, for both trainings."""

import math
from typing import Literal, Protocol


class Scheduled(Protocol):
    """What a training's table says of it."""

    @property
    def steps(self) -> int | None: ...
    @property
    def lr(self) -> float: ...
    @property
    def lr_scheduler(self) -> Literal["constant", "linear", "cosine"]: ...
    @property
    def warmup_steps(self) -> int: ...


def learning_rate(config: Scheduled, step: int) -> float:
    """The rate of step `step`, counted from 0: a linear warm-up, then as `lr_scheduler` says."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_scheduler == "constant":
        return config.lr
    assert config.steps is not None, "counted before training begins"  # noqa: S101
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.lr * (1 - done if config.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
