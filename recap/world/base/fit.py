"""The training loop of the base checkpoints, on the CPU. To resume, run the same command again."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from recap import checkpoint, progress
from recap.rundir import StageDir

LOG_EVERY = 50
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long, and how fast: a linear warm-up, then a cosine down to zero."""

    steps: int
    batch_size: int
    lr: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    checkpoint_every: int = 500

    def lr_at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def fit(stage: StageDir, name: str, model: nn.Module, loss: Callable[[int], torch.Tensor], schedule: Schedule) -> None:
    """Train `model` in place; it ends in evaluation mode.

    Args:
        stage: holds the log and the checkpoints.
        name: for the bar.
        model: its parameters that require gradients are trained.
        loss: step → the loss of that step's batch, a scalar. All that it draws, it draws from the step's number, so
            that an interrupted training goes on as if nothing had been.
        schedule: steps and learning rate.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=schedule.lr, weight_decay=schedule.weight_decay)
    start = _resume(stage, model, optimizer)
    model.train()
    losses: list[float] = []
    size = schedule.batch_size
    with progress.bar(name, schedule.steps * size, start * size) as bar:
        for step in range(start, schedule.steps):
            value = _step(loss, step, optimizer, trained.values(), schedule.lr_at(step))
            losses.append(value)
            bar.update(size)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == schedule.steps:
                mean = sum(losses) / len(losses)
                losses.clear()
                bar.set_postfix_str(f" · loss {mean:.4f}")
                stage.log(event="step", step=step + 1, loss=mean)
            if (step + 1) % schedule.checkpoint_every == 0:
                _save(stage, step + 1, model, optimizer)
    model.eval()


def _step(loss: Callable[[int], torch.Tensor], step: int, optimizer: torch.optim.Optimizer,
          trained: Iterable[nn.Parameter], lr: float) -> float:
    torch.manual_seed(step)  # for dropout, and for what the models of transformers draw themselves
    value = loss(step)
    value.backward()
    nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.item()


def _save(stage: StageDir, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = (checkpoint.with_prefix("model", _whole(model))
               | checkpoint.with_prefix("optimizer", checkpoint.optimizer_tensors(optimizer)))
    checkpoint.save(stage.path, tensors, {"step": step})


def _resume(stage: StageDir, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    found = checkpoint.load(stage.path)
    if found is None:
        return 0
    tensors, state = found
    model.load_state_dict(checkpoint.without_prefix("model", tensors), strict=False)  # tied weights are kept once
    checkpoint.load_optimizer(optimizer, checkpoint.without_prefix("optimizer", tensors))
    return int(state["step"])


def _whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, each once, however many names tied weights have."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
