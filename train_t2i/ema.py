"""Exponential moving average of all that is trained."""

from collections.abc import Iterator

import torch
from torch import nn


class EMA:
    """θ' ← d·θ' + (1 − d)·θ, with d = min(decay, (1 + step) / (10 + step)) so that a short run leaves its start behind.

    Holds float32 copies of the trainable parameters by name; frozen ones need no average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in _trainable(module)}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the parameters after step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        names, parameters = zip(*_trainable(module), strict=True)
        torch._foreach_lerp_([self.shadow[name] for name in names], list(parameters), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in _trainable(module):
            parameter.copy_(self.shadow[name])


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
