"""All that a training goes on from: weights, their average, the optimizer's moments, and where the data stands.

Tensors are written whole and by name, whoever holds which piece of them, so that any number of processes goes on from
the same file. Randomness needs no state: every sample and every step has a seed of its own.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor, distribute_tensor

from recap import checkpoint
from recap.errors import UserError
from train_t2i.batch import Part
from train_t2i.ema import EMA, trainable, whole
from train_t2i.order import Cursor


@dataclass
class Progress:
    """How far a training is. JSON-like, but for the cursors."""

    step: int = 0
    cursors: dict[int, Cursor] = field(default_factory=dict)
    """Lane → where it stands; of the lanes that this process speaks for."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Samples that were left out, by reason; those that this process speaks for."""
    num_cut: int = 0
    """Content tokens beyond `max_windows`, of the captions that this process has read."""
    num_skipped: int = 0
    """Steps whose gradients were not finite."""
    seconds: float = 0.0
    """Of training."""

    def advance(self, part: Part) -> None:
        """Count a step."""
        self.step += 1
        self.cursors |= part.cursors
        self.rejects += part.rejects
        self.num_cut += part.num_cut


class Checkpoint:
    """Saves and loads one training, in `folder/checkpoint`."""

    def __init__(self, folder: Path, accelerator: Accelerator, model: torch.nn.Module, optimizer: Any,
                 ema: EMA) -> None:
        """Take the model whose parameters the prepared optimizer has, not what accelerate has wrapped around it."""
        self.folder, self.accelerator, self.model, self.optimizer, self.ema = folder, accelerator, model, optimizer, ema

    def save(self, progress: Progress) -> None:
        """Write a checkpoint in the place of the last one. All processes must call it."""
        everyone = joint(self.accelerator, progress)
        tensors = {}
        for name, tensor in self._tensors():
            value = whole(tensor)
            if self.accelerator.is_main_process:
                tensors[name] = value.cpu()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            # A Counter that `asdict` goes into comes back as one of its pairs.
            state = asdict(everyone) | {"rejects": dict(everyone.rejects), "scaler": scaler and scaler.state_dict()}
            checkpoint.save(self.folder, tensors, state)
        self.accelerator.wait_for_everyone()

    def load(self) -> Progress:
        """Go on from the last checkpoint, if there is one.

        Raises:
            UserError: it is of another model.
        """
        found = checkpoint.load(self.folder)
        if found is None:
            return Progress()
        tensors, state = found
        self._check(tensors)
        slots = _slots(tensors)
        for name, parameter in trainable(self.model):
            _put(parameter.data, tensors[f"model.{name}"])
            _put(self.ema.shadow[name], tensors[f"ema.{name}"])
            self.optimizer.state[parameter] = {slot: _value(value, parameter)
                                               for slot, value in slots.get(name, {}).items()}
        if scaler := state.pop("scaler"):
            self.accelerator.scaler.load_state_dict(scaler)
        state["cursors"] = {int(lane): Cursor(**cursor) for lane, cursor in state["cursors"].items()}
        state["rejects"] = Counter(state["rejects"])
        progress = Progress(**state)
        if not self.accelerator.is_main_process:  # the sums over all are the first one's from here on
            progress.rejects, progress.num_cut = Counter(), 0
        return progress

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        state = self.optimizer.state
        for name, parameter in trainable(self.model):
            yield f"model.{name}", parameter.detach()
            yield f"ema.{name}", self.ema.shadow[name]
            for slot, value in state[parameter].items():
                value = torch.as_tensor(value)
                # 8-bit Adam has one map of its values for all parameters, and safetensors no tensor of two names.
                yield f"optimizer.{name}.{slot}", value if value.ndim > 1 else value.clone()

    def _check(self, tensors: checkpoint.Tensors) -> None:
        saved = {name: tuple(value.shape) for name, value in checkpoint.without_prefix("model", tensors).items()}
        wanted = {name: tuple(parameter.shape) for name, parameter in trainable(self.model)}
        if saved != wanted:
            wrong = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
            raise UserError(f"train: the checkpoint in {self.folder} is of another model ({wrong[0]}: "
                            f"{saved.get(wrong[0], 'nothing')} there, {wanted.get(wrong[0], 'nothing')} here): give "
                            "the run another name=…, or delete that folder")


def joint(accelerator: Accelerator, progress: Progress) -> Progress:
    """What all processes know of how far they are. All must call it."""
    if accelerator.num_processes == 1:
        return progress
    everyone: list[Progress | None] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(everyone, progress)
    known = [each for each in everyone if each is not None]
    cursors: dict[int, Cursor] = {}
    for lane, cursor in (item for each in known for item in each.cursors.items()):
        cursors[lane] = max(cursor, cursors.get(lane, cursor))  # the others still have where they went on from
    return Progress(progress.step, cursors,
                    sum((each.rejects for each in known), Counter()), sum(each.num_cut for each in known),
                    progress.num_skipped, progress.seconds)


def _slots(tensors: checkpoint.Tensors) -> dict[str, checkpoint.Tensors]:
    """Parameter → the optimizer's values for it, by their names."""
    found: dict[str, checkpoint.Tensors] = {}
    for name, value in checkpoint.without_prefix("optimizer", tensors).items():
        parameter, slot = name.rsplit(".", 1)
        found.setdefault(parameter, {})[slot] = value
    return found


def _value(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor | int:
    """An optimizer's value, on its parameter's device. 8-bit Adam counts steps in an integer, torch's in a float."""
    if value.ndim == 0 and value.dtype == torch.int64:
        return int(value)
    return _like(value, parameter)


def _put(tensor: torch.Tensor, value: torch.Tensor) -> None:
    tensor.copy_(_like(value, tensor))


def _like(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A whole value as another tensor is held: on its device, in its pieces, in its order of memory."""
    value = value.to(tensor.device)
    if value.shape != tensor.shape:
        return value
    if isinstance(tensor, DTensor):
        return distribute_tensor(value, tensor.device_mesh, tensor.placements)
    # A fused optimizer takes moments to be in their parameter's order, channels last as it may be, and does not look.
    return torch.empty_like(tensor, dtype=value.dtype).copy_(value)
