"""One update of the weights: gradients of a step's mean loss, a micro-batch at a time, and what may go wrong."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from recap.errors import UserError
from recap.memory import free_memory, is_out_of_memory
from recap.processes import PATIENCE
from recap.progress import warn
from train_t2i.batch import Batch
from train_t2i.config import Train
from train_t2i.ema import whole

SEED_STRIDE = 1_000_003


@dataclass
class Updated:
    """What came of a step, on the device: to look at it is to wait for it."""

    loss: torch.Tensor
    """Mean over this process's share, times the share."""
    grad_norm: torch.Tensor
    """Before clipping; where it is not finite, nothing was changed."""


class Updater:
    """Takes steps. The micro-batch is halved where it does not fit; the batch stays what it is."""

    def __init__(self, accelerator: Accelerator, model: Any, optimizer: Any, config: Train, seed: int) -> None:
        """Take steps on a prepared model, by a prepared optimizer."""
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.config, self.seed = config, seed
        self.micro_batch_size = config.micro_batch_size or config.batch_size
        self.is_sharded = accelerator.distributed_type == DistributedType.FSDP
        self.is_rehearsed = accelerator.num_processes == 1 or self.is_sharded
        self.group: Any = None
        if self.is_sharded:  # on the CPU, so that nobody waits for a GPU
            self.group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        self.has_begun_to_sync = False
        self.skips_itself = bool(getattr(optimizer.optimizer, "_step_supports_amp_scaling", False))

    def __call__(self, step: int, batches: list[Batch], lr_scale: float) -> Updated:
        """One step.

        Args:
            step: its number, from 0.
            batches: this process's share of it, see `data.steps`.
            lr_scale: of each group's peak rate.

        Raises:
            UserError: not even one image fits in memory, or it does not fit any more and other processes wait.
        """
        self._rehearse(batches)
        loss = self._fitting(step, batches)
        norm = whole(torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale
        self._step_if_finite(norm)
        self.optimizer.zero_grad(set_to_none=True)
        return Updated(loss, norm)

    def _step_if_finite(self, norm: torch.Tensor) -> None:
        """Change the weights; or nothing, where a gradient isn't finite. A fused optimizer is told so on the device."""
        if self.accelerator.scaler is not None:  # which tells it by itself
            self.optimizer.step()
        elif self.skips_itself:
            self.optimizer.optimizer.found_inf = (~torch.isfinite(norm)).float()
            self.optimizer.step()
        elif torch.isfinite(norm).item():
            self.optimizer.step()

    # --- gradients ---------------------------------------------------------------------------------------------------

    def _fitting(self, step: int, batches: list[Batch]) -> torch.Tensor:
        """Gradients of the mean loss, and its value; begun again with half the micro-batch where it did not fit."""
        while True:
            try:
                return self._gradients(step, self._evened(list(self._parts(batches))))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve()  # here, the traceback still needs the memory; after it, what it held is freed
            self.optimizer.zero_grad(set_to_none=True)
            free_memory()

    def _parts(self, batches: list[Batch]) -> Iterator[Batch]:
        size = self.micro_batch_size
        return (batch.slice(start, start + size) for batch in batches for start in range(0, len(batch), size))

    def _evened(self, parts: list[Batch]) -> list[Batch]:
        """Processes that hold pieces of the weights must compute equally often: some of them nothing, at the end."""
        if not self.is_sharded:
            return parts
        most = torch.tensor(len(parts))
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, self.group)
        nothing = replace(parts[-1].slice(0, 1), weights=torch.zeros(1))
        return [*parts, *[nothing] * (int(most.item()) - len(parts))]

    def _gradients(self, step: int, parts: list[Batch]) -> torch.Tensor:
        # For dropout, which no two processes draw alike: a step that is begun again draws the same.
        torch.manual_seed((self.seed * SEED_STRIDE + step) * self.accelerator.num_processes
                          + self.accelerator.process_index)
        self.has_begun_to_sync = False
        total = torch.zeros((), device=self.accelerator.device)
        share = self.config.batch_size / self.accelerator.num_processes
        for place, part in enumerate(parts):
            is_last = place + 1 == len(parts)
            # Gradients meet across processes at the last micro-batch only, where they are averaged.
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                loss = self._losses(part).sum() / share
                self.has_begun_to_sync = is_last and self.accelerator.num_processes > 1
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _losses(self, part: Batch) -> torch.Tensor:
        with self.accelerator.autocast():
            losses: torch.Tensor = self.model(part.to(self.accelerator.device))
        return losses

    def _rehearse(self, batches: list[Batch]) -> None:
        """Find the micro-batch that fits before the other processes wait for what can't be begun again."""
        if self.is_rehearsed:
            return
        self.is_rehearsed = True
        while True:
            try:
                if not self.optimizer.state:  # Adam's moments are to come
                    moments = [torch.empty_like(p) for p in self.parameters for _ in range(2)]
                with self.accelerator.no_sync(self.model):
                    part = next(self._parts(batches))
                    for _ in range(2):  # the second with gradients in memory
                        self.accelerator.backward(self._losses(part).sum())
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve()
            finally:
                moments = []  # noqa: F841  (the memory is free again)
                self.optimizer.zero_grad(set_to_none=True)
            free_memory()

    def _halve(self) -> None:
        largest = min(self.micro_batch_size, -(-self.config.batch_size // self.accelerator.num_processes))
        if largest == 1:
            raise UserError("train: out of memory with one image at a time: set train.gradient_checkpointing=true, a "
                            "lower train.resolution or train.max_windows, or [train.lora]") from None
        if self.has_begun_to_sync or self.is_sharded:
            raise UserError("train: out of memory while the processes exchange gradients, from where none can go back: "
                            f"set train.micro_batch_size below {largest}, and run again") from None
        self.micro_batch_size = largest // 2
        warn(f"out of memory: train.micro_batch_size is {self.micro_batch_size} from here on; the batch stays the same")
