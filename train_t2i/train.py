"""Fine-tune Stable Diffusion on one arm's captions. To resume, run the same command again.

data.py (batches) → model.py (their losses) → update.py (one step) → ema.py (the average) → export.py (the result)
"""

import os
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from recap import progress
from recap.errors import Stopped, UserError
from recap.learning_rate import learning_rate
from recap.processes import one_voice, open_accelerator
from recap.rundir import StageDir
from train_t2i import export
from train_t2i.checkpoint import Checkpoint, Progress, joint
from train_t2i.config import Arm, Train
from train_t2i.data import Parts, steps
from train_t2i.ema import EMA
from train_t2i.model import Diffusion
from train_t2i.monitor import Monitor
from train_t2i.order import epochs
from train_t2i.sample import load_pipeline
from train_t2i.stopping import stoppable
from train_t2i.trackers import open_trackers
from train_t2i.update import Updater

if TYPE_CHECKING:
    from train_t2i.validation import Validator


def run(stage: StageDir, shards: list[str], config: Train, arm: Arm, seed: int, name: str, device: str,
        latents: Path | None = None) -> dict[str, Any]:
    """Train from `config.model`; `stage.path/pipeline` is the result, a diffusers folder.

    Args:
        stage: where log, checkpoints and result go.
        shards: with the captions that the arm draws from.
        seed: of the order, the captions drawn, the dropout and the noise.
        name: of the arm, for the bar.
        device: `cpu` keeps accelerate off the GPUs; else it takes those it finds.
        latents: the folder of kept ones, see `latents.py`.
    """
    check(config, device)
    accelerator = open_accelerator(config.precision, device, config.trackers, stage.path)
    with one_voice(accelerator):
        return _run(accelerator, stage, shards, config, arm, seed, name, latents)


def _run(accelerator: Accelerator, stage: StageDir, shards: list[str], config: Train, arm: Arm, seed: int, name: str,
         latents: Path | None) -> dict[str, Any]:
    pipe = load_pipeline(config, "train", str(accelerator.device))
    torch.manual_seed(seed)  # the first weights of LoRA
    model = Diffusion(pipe, config, is_sharded=accelerator.distributed_type == DistributedType.FSDP).train()
    prepared, optimizer = prepare(accelerator, model, open_optimizer(model, config))
    ema = EMA(model, config.ema_decay, config.ema_every, "cpu" if config.ema_device == "cpu" else None)
    checkpoint = Checkpoint(stage.path, accelerator, model, optimizer.optimizer, ema)
    at = checkpoint.load()
    open_trackers(accelerator, stage, config, at.step)
    parts = Parts(shards, arm, config, seed, model.recipe, latents, accelerator.process_index,
                  accelerator.num_processes, at.cursors)
    update = Updater(accelerator, prepared, optimizer, config, seed)
    validator = open_validator(stage, accelerator, config)
    with ExitStack() as stack:
        stop = stack.enter_context(stoppable(accelerator))
        batches = stack.enter_context(closing(steps(parts, pin=accelerator.device.type == "cuda")))
        monitor = stack.enter_context(closing(Monitor(stage, accelerator, config, name, at)))
        while at.step < config.steps:
            if validator and validator.is_due(at.step):
                monitor.validate(validator, ema)
            part = monitor.next(batches)
            updated = update(at.step, part.batches, learning_rate(config, at.step) / config.lr)
            ema.update(model, at.step, is_last=at.step + 1 == config.steps)
            monitor.step(part, updated)
            if config.snapshot_every and at.step % config.snapshot_every == 0:  # once saved, it would not come again
                _export(accelerator, stage.path / "snapshots" / f"{at.step:07d}", config, arm, seed, at.step, ema)
            stops = stop.agreed()
            if stops or at.step % config.checkpoint_every == 0:
                monitor.look()
                checkpoint.save(at)
            if stops:
                raise Stopped
        if validator:
            monitor.validate(validator, ema)
    everyone = joint(accelerator, at)
    _export(accelerator, stage.path, config, arm, seed, at.step, ema)
    if accelerator.is_main_process and config.push_to_hub:
        export.push(stage.path, config)
    for tracker in accelerator.trackers:  # end_training would also end the group of processes, which other arms need
        tracker.finish()
    return _result(everyone, len(shards), config)


def open_validator(stage: StageDir, accelerator: Accelerator, config: Train) -> "Validator | None":
    if config.validation is None:
        return None
    from train_t2i.validation import Validator  # with torchmetrics and all its metrics, for seconds
    return Validator(stage, accelerator, config)


def prepare(accelerator: Accelerator, model: Diffusion, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Have accelerate spread model and optimizer over the processes."""
    if accelerator.distributed_type == DistributedType.FSDP:
        # It would cast weights, but not the batch. With autocast around the model, all is as in one process.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    prepared, wrapped = accelerator.prepare(model, optimizer)
    if isinstance(prepared, DistributedDataParallel):
        # They are constants. To send them anew in each forward would keep a process that is out of memory from trying
        # again by itself.
        prepared.broadcast_buffers = False
    return prepared, wrapped


def open_optimizer(model: Diffusion, config: Train) -> torch.optim.Optimizer:
    groups = model.parameter_groups(config)
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit
        return AdamW8bit(groups, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def _export(accelerator: Accelerator, folder: Path, config: Train, arm: Arm, seed: int, step: int, ema: EMA) -> None:
    """Write the averaged weights as a diffusers folder."""
    averages = ema.whole()
    if accelerator.is_main_process:
        about = {"captions": arm.captions, "steps": step, "images": step * config.batch_size, "seed": seed}
        export.write(folder, export.averaged_pipeline(config, averages), config, about)
    accelerator.wait_for_everyone()


def _result(at: Progress, num_shards: int, config: Train) -> dict[str, Any]:
    """What the training saw."""
    if at.num_cut:
        progress.warn(f"{at.num_cut:,} tokens beyond train.max_windows={config.max_windows} were cut from captions")
    if at.num_skipped:
        progress.warn(f"{at.num_skipped} steps were skipped, as their gradients were not finite")
    images = at.step * config.batch_size
    return {"steps": at.step, "images": images, "epochs": epochs(at.cursors, num_shards), "tokens_cut": at.num_cut,
            "skipped": at.num_skipped, "training_seconds": round(at.seconds, 1),
            "images_per_second": round(images / at.seconds, 2) if at.seconds else None, "rejected": dict(at.rejects)}


def check(config: Train, device: str) -> None:
    """Refuse, in one line, what cannot run here.

    Raises:
        UserError: the device lacks the precision, the optimizer's library is not there, or processes outnumber images.
    """
    if config.precision == "fp16" and device == "cpu":
        raise UserError("train.precision: fp16 needs a GPU: set it to bf16 or no")
    if config.precision == "bf16" and device != "cpu" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("train.precision: this GPU has no bf16: set it to fp16 or no")
    if config.optimizer == "adamw8bit":
        if device == "cpu":
            raise UserError("train.optimizer: adamw8bit runs on CUDA, not on the CPU: set it to adamw")
        if find_spec("bitsandbytes") is None:
            raise UserError("train.optimizer: adamw8bit needs bitsandbytes: pip install 'recap-t2i[quantization]'")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # whose engine steps and saves by itself
        raise UserError("train: DeepSpeed is not supported: launch with --use_fsdp --fsdp_version 2 instead")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _check_sharded(config)
    if config.batch_size < progress.num_processes():
        raise UserError(f"train.batch_size={config.batch_size} is less than the {progress.num_processes()} processes "
                        "that share a batch: raise it")
    for tracker in config.trackers:
        if find_spec({"tensorboard": "tensorboard"}.get(tracker, tracker)) is None:
            raise UserError(f"train.trackers: {tracker} is not installed: pip install {tracker}")


def _check_sharded(config: Train) -> None:
    """What FSDP cannot do."""
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError("train: FSDP 1 is not supported: launch with --use_fsdp --fsdp_version 2")
    if config.optimizer == "adamw8bit":
        raise UserError("train.optimizer: adamw8bit does not go with FSDP, whose weights are in pieces: set it to "
                        "adamw, or launch without --use_fsdp")
    if config.precision == "fp16":
        raise UserError("train.precision: fp16 does not go with FSDP: set it to bf16, or launch without --use_fsdp")
    if config.ema_device == "cpu":
        raise UserError("train.ema_device: cpu does not go with FSDP, where each process keeps a piece of the average: "
                        "leave it out, or launch without --use_fsdp")
