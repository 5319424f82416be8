"""What a training says of itself: the bar, `log.jsonl` and trackers; and when it must not go on."""

import math
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from recap import progress
from recap.errors import UserError
from recap.learning_rate import learning_rate
from recap.rundir import StageDir
from train_t2i.batch import Part
from train_t2i.checkpoint import Progress
from train_t2i.config import Train
from train_t2i.ema import EMA
from train_t2i.update import Updated

if TYPE_CHECKING:
    from train_t2i.validation import Validator

SPIKE = 3.0
"""A loss so many times the usual one is remarked on."""
MEMORY = 50
"""Log lines over which the usual loss is a mean; so many are needed to know it."""


class Monitor:
    """Collects what steps leave on the device, and looks at it every `log_every` steps, which alone waits for it."""

    def __init__(self, stage: StageDir, accelerator: Accelerator, config: Train, name: str, seen: Progress) -> None:
        """Begin where the training stands; `name` is for the bar."""
        self.stage, self.accelerator, self.config, self.progress = stage, accelerator, config, seen
        self.bar = progress.bar(f"train {name}", config.steps * config.batch_size, seen.step * config.batch_size)
        self.steps: list[Updated] = []
        self.uids: list[list[str]] = []
        self.lines: deque[float] = deque(maxlen=MEMORY)
        """The losses of the last lines."""
        self.in_a_row = 0
        self.waited = 0.0
        self.began = time.perf_counter()

    def next(self, parts: Iterator[Part]) -> Part:
        """The next step's data, and how long it was waited for."""
        began = time.perf_counter()
        part = next(parts)
        self.waited += time.perf_counter() - began
        return part

    def step(self, part: Part, updated: Updated) -> None:
        """Count a step."""
        self.progress.advance(part)
        self.steps.append(updated)
        self.uids.append([uid for batch in part.batches for uid in batch.uids])
        self.bar.update(self.config.batch_size)
        if self.progress.step % self.config.log_every == 0 or self.progress.step == self.config.steps:
            self.look()

    def look(self) -> None:
        """Wait for the device; write a line of the steps since the last one.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        if not self.steps:
            return
        # Gradients are the same in all processes, losses are of their own shares.
        losses = self.accelerator.reduce(torch.stack([step.loss for step in self.steps]), "mean").tolist()
        norms = torch.stack([step.grad_norm for step in self.steps]).tolist()
        if not all(map(math.isfinite, norms)):
            self.uids = self._everyones()
        first = self.progress.step - len(self.steps)
        for place, norm in enumerate(norms):
            self.in_a_row = 0 if math.isfinite(norm) else self.in_a_row + 1
            if self.in_a_row:
                self._remark("not finite", first + place + 1, losses[place], self.uids[place])
                self.progress.num_skipped += 1
            if self.in_a_row > self.config.max_skipped:
                raise UserError(f"train: the gradients of {self.in_a_row} steps in a row are not finite, the last with "
                                f"{', '.join(self.uids[place][:4])}… (all in {self.stage.path / 'log.jsonl'}): lower "
                                "train.lr; the checkpoint is of before")
        found = [(loss, norm) for loss, norm in zip(losses, norms, strict=True) if math.isfinite(norm)]
        if found:
            self._line([loss for loss, _ in found], [norm for _, norm in found])
        self.steps.clear()
        self.uids.clear()
        self.waited, self.began = 0.0, time.perf_counter()

    def _line(self, losses: list[float], norms: list[float]) -> None:
        """One line of the log, of the steps since the last."""
        config, step, loss = self.config, self.progress.step, sum(losses) / len(losses)
        seconds = time.perf_counter() - self.began
        self.progress.seconds += seconds
        if len(self.lines) == MEMORY and loss > SPIKE * sum(self.lines) / MEMORY:
            self._remark("loss spike", step, loss, [uid for uids in self.uids for uid in uids])
        self.lines.append(loss)
        line: dict[str, Any] = {
            "loss": loss, "grad_norm": sum(norms) / len(norms), "largest_grad_norm": max(norms),
            "lr": learning_rate(config, step - 1),
            "images_per_second": round(len(self.steps) * config.batch_size / seconds, 2),
            "step_seconds": round(seconds / len(self.steps), 4), "data_share": round(self.waited / seconds, 4),
            "skipped": self.progress.num_skipped}
        memory = ""
        if self.accelerator.device.type == "cuda":
            line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            memory = f" · {line['memory_gib']} GiB"
        self.bar.set_postfix_str(f"loss {loss:.4f} · {line['step_seconds']:.2f} s/step, data "
                                 f"{line['data_share']:.0%}{memory}")
        if self.accelerator.is_main_process:
            self.stage.log(event="step", step=step, images=step * config.batch_size, **line)
        self.accelerator.log(line, step=step)

    def validate(self, validator: "Validator", ema: EMA) -> None:
        """Have pictures drawn by the averaged weights; the time that it takes is not training's."""
        began = time.perf_counter()
        figures = validator.look(self.progress.step, ema.whole())
        if self.accelerator.is_main_process:
            self.stage.log(event="validation", step=self.progress.step, **figures)
        self.accelerator.log(figures, step=self.progress.step)
        self.began += time.perf_counter() - began

    def close(self) -> None:
        self.bar.close()

    def _everyones(self) -> list[list[str]]:
        """The images of each step, in all processes; all must call it."""
        gathered = gather_object([self.uids])
        return [[uid for uids in step for uid in uids] for step in zip(*gathered, strict=True)]

    def _remark(self, what: str, step: int, loss: float, uids: list[str]) -> None:
        if self.accelerator.is_main_process:
            self.stage.log(event=what, step=step, loss=str(loss), keys=uids)
        progress.say(f"warning: step {step}: {what}, with a loss of {loss:.4g}")

