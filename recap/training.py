"""Steps of a captioner's training, and all that a checkpoint of it holds."""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import nn

from recap import checkpoint, progress
from recap.captioners import Tunable
from recap.config import Style
from recap.config.finetune import Finetune
from recap.errors import UserError
from recap.learning_rate import learning_rate
from recap.pairs import Features, MicroBatch
from recap.rundir import StageDir, hash_files
from recap.sheet import write_sheet
from recap.validation import Validator, is_better

LOG_EVERY = 10
DEFAULT_STEPS = 300
SEED_STRIDE = 1_000_003


@dataclass
class History:
    """How far a training is, and how it went: what a checkpoint holds beside tensors. JSON-like."""

    step: int = 0
    losses: list[list[float]] = field(default_factory=list)
    """[step, mean training loss since the last entry]."""
    validations: list[dict[str, Any]] = field(default_factory=list)
    """What `Validator` found, each with its `step`."""
    best: float | None = None
    waited: int = 0
    """Validations since the best one."""
    seconds: float = 0.0
    """Of training, with the encoding of kept features; validations not counted."""
    recent: list[float] = field(default_factory=list)
    """Training losses since the last entry of `losses`."""


def with_steps(config: Finetune, num_pairs: int) -> Finetune:
    """The table with its steps counted: those asked for, or as many as its epochs take."""
    steps = config.steps or DEFAULT_STEPS
    if config.epochs:
        steps = math.ceil(config.epochs * num_pairs / config.batch_size)
    return config.model_copy(update={"steps": steps, "epochs": None})


class Loss(nn.Module):
    """The captioner's loss as a module, for accelerate to wrap."""

    def __init__(self, captioner: Tunable) -> None:
        super().__init__()
        self.model = captioner.model
        self._captioner = captioner

    def forward(self, pixels: Any, features: Any, prompts: list[str], captions: list[str]) -> torch.Tensor:
        """The loss of pixels; or of features, where they are kept."""
        seen = self._captioner.encode(pixels) if features is None else features
        return self._captioner.loss(seen, prompts, captions)


class Training:
    """A captioner in training. It goes on where the stage's last checkpoint stands."""

    def __init__(self, stage: StageDir, accelerator: Accelerator, captioner: Tunable, styles: dict[str, Style],
                 config: Finetune, features: Features | None) -> None:
        self.stage, self.accelerator, self.captioner, self.features = stage, accelerator, captioner, features
        self.styles, self.config, self.num_steps = styles, config, config.steps or DEFAULT_STEPS
        if config.gradient_checkpointing:
            captioner.checkpoint_activations()
        self.parameters = captioner.trainable()
        optimizer = torch.optim.AdamW(_groups(self.parameters, config.weight_decay), lr=config.lr, fused=True)
        self.history = _resume(stage, self.parameters, optimizer)
        self.history.seconds += features.seconds if features else 0
        # A vision model may have layers after the one whose features are read: LLaVA's has.
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=captioner.encoder_is_trained)
        self.loss, self.optimizer = accelerator.prepare(Loss(captioner), optimizer, device_placement=[False, False])
        self.clock = time.perf_counter()
        captioner.set_training(True)

    @property
    def done(self) -> int:
        """Steps that are done."""
        return self.history.step

    @property
    def has_stopped(self) -> bool:
        """Whether it has waited for a better validation for as long as it should."""
        patience = self.config.validation.patience
        return patience is not None and self.history.waited >= patience

    def step(self, parts: list[MicroBatch], bar: Any) -> None:
        """One optimizer step on the batch's mean loss.

        Raises:
            UserError: loss or gradient is not finite. Nothing of it has reached the weights, nor a checkpoint.
        """
        seed = self.config.seed * SEED_STRIDE + self.done
        # For dropout, which no two processes draw alike.
        torch.manual_seed(seed * self.accelerator.num_processes + self.accelerator.process_index)
        loss = self._backward(parts)
        norm: Any = self.accelerator.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            self._refuse(parts, loss)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.history.step += 1
        self._tick(counts=True)
        self.history.recent.append(loss)
        bar.update(self.config.batch_size)
        if self.done % LOG_EVERY == 0 or self.done == self.num_steps:
            self._log(bar)

    def _backward(self, parts: list[MicroBatch]) -> float:
        """Gradients of the mean loss over all processes' tokens, a micro-batch at a time; that loss."""
        total = torch.zeros((), device=self.accelerator.device)
        for place, part in enumerate(parts):
            # Gradients meet across processes at the last micro-batch only, where they are averaged.
            with self.accelerator.no_sync(self.loss) if place + 1 < len(parts) else nullcontext():
                features = self.features.of(part.pairs) if self.features else None
                loss = self.loss(part.pixels, features, [self.styles[pair.style].prompt for pair in part.pairs],
                                 [pair.caption for pair in part.pairs])
                self.accelerator.backward(loss * part.share * self.accelerator.num_processes)
            total += loss.detach() * part.share
        return float(self.accelerator.reduce(total, "sum").item())

    def _refuse(self, parts: list[MicroBatch], loss: float) -> None:
        keys = gather_object([pair.uid for part in parts for pair in part.pairs])
        if self.accelerator.is_main_process:
            self.stage.log(event="not finite", step=self.done + 1, loss=str(loss), keys=keys)
        found = f"loss is {loss}" if not math.isfinite(loss) else "gradient is not finite"
        raise UserError(f"finetune: the {found} at step {self.done + 1}, with {', '.join(keys[:4])}… (all in "
                        f"{self.stage.path / 'log.jsonl'}): lower finetune.lr; the last good checkpoint is kept")

    def _log(self, bar: Any) -> None:
        loss = sum(self.history.recent) / len(self.history.recent)
        self.history.recent.clear()
        self.history.losses.append([self.done, loss])
        bar.set_postfix_str(f"loss {loss:.4f}")
        if self.accelerator.is_main_process:
            self.stage.log(event="step", step=self.done, images=self.done * self.config.batch_size, loss=loss)

    def validate(self, validator: Validator) -> None:
        """Look at held-out images, write the sheet, and keep the weights if they are the best so far."""
        self.captioner.set_training(False)
        found = validator.look(self.accelerator)
        self.captioner.set_training(True)
        history = self.history
        if found.figures:
            history.validations.append({"step": self.done, **found.figures})
            value = found.figures[self.config.validation.select_by]
            if is_better(value, history.best, self.config.validation):
                history.best, history.waited = value, 0
                self._keep("best")
            else:
                history.waited += 1
        if self.accelerator.is_main_process:
            self.stage.log(event="validation", step=self.done, **found.figures)
            write_sheet(self.stage.path / "sheets" / f"{self.done:06d}.html", self.done, self.num_steps,
                        asdict(history), found.rows)
        self._tick(counts=False)

    def save(self) -> None:
        if self.accelerator.is_main_process:
            optimizer = checkpoint.optimizer_tensors(self.optimizer.optimizer)
            tensors = checkpoint.with_prefix("model", self.parameters) | checkpoint.with_prefix("optimizer", optimizer)
            checkpoint.save(self.stage.path, tensors, asdict(self.history))

    def finish(self) -> dict[str, Any]:
        """Write the last weights; figures of the training."""
        self.captioner.set_training(False)
        self._keep("last")
        self.accelerator.wait_for_everyone()
        seconds = self.history.seconds
        chosen = "last" if self.history.best is None else "best"
        if self.has_stopped:
            progress.say(f"    stopped at step {self.done}: no better validation {self.history.waited} times in a row")
        return {"steps": self.done, "chosen": chosen, "best": self.history.best,
                "validations": self.history.validations, "training_seconds": seconds,
                "images_per_second": self.done * self.config.batch_size / seconds,
                "parameters": sum(p.numel() for p in self.captioner.model.parameters()),
                "trainable_parameters": sum(p.numel() for p in self.parameters.values()),
                "tuned": hash_files(self.stage.path / chosen)}

    def _tick(self, counts: bool) -> None:
        """Count the time since the last call as training, or don't."""
        now = time.perf_counter()
        self.history.seconds += (now - self.clock) if counts else 0
        self.clock = now

    def _keep(self, name: str) -> None:
        if self.accelerator.is_main_process:
            temporary = self.stage.path / f".{name}.tmp"
            self.captioner.save(temporary)
            checkpoint.publish(temporary, self.stage.path / name)


def _groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices; none for biases and norms."""
    decayed = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim <= 1]
    return [{"params": group, "weight_decay": decay}
            for group, decay in ((decayed, weight_decay), (others, 0.0)) if group]


def _resume(stage: StageDir, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> History:
    """Load the last checkpoint, if there is one."""
    found = checkpoint.load(stage.path)
    if found is None:
        return History()
    tensors, state = found
    with torch.no_grad():
        for name, value in checkpoint.without_prefix("model", tensors).items():
            parameters[name].copy_(value)
    checkpoint.load_optimizer(optimizer, checkpoint.without_prefix("optimizer", tensors))
    return History(**state)
