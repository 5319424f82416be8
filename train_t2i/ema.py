"""Exponential moving average of all that is trained."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class EMA:
    """θ' ← d·θ' + (1 − d)·θ, with d = min(decay, (1 + step) / (10 + step)) so that a short run leaves its start behind.

    Holds float32 copies of the trainable parameters by name; frozen ones need no average. Updated once for `every`
    steps, and after the last one, it uses d to the power of their number.
    """

    def __init__(self, module: nn.Module, decay: float, every: int = 1, device: str | None = None) -> None:
        """Begin with the parameters as they are; on their own device, or on `device`."""
        self.decay, self.every, self.device = decay, every, device
        self.shadow = {name: self._copy(p) for name, p in trainable(module)}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, is_last: bool = False) -> None:
        """Take in the parameters after step `step` (from 0)."""
        num_since = (step + 1) % self.every
        if num_since and not is_last:
            return
        decay = min(self.decay, (1 + step) / (10 + step)) ** (num_since or self.every)
        parameters = [p.detach() for _, p in trainable(module)]
        if self.device is not None:
            parameters = [p.to(self.device) for p in parameters]
        torch._foreach_lerp_(list(self.shadow.values()), parameters, 1 - decay)

    def whole(self) -> dict[str, torch.Tensor]:
        """The averages by name; of what processes hold in pieces, all together, for which all must call it."""
        return {name: whole(shadow) for name, shadow in self.shadow.items()}

    def _copy(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach().clone() if self.device is None else parameter.detach().to(self.device, copy=True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that processes may hold pieces of, in one piece; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
