"""Fine-tune Stable Diffusion on one arm's captions. To resume, run the same command again."""

import math
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline

from recap import checkpoint, progress
from recap.learning_rate import learning_rate
from recap.processes import open_accelerator
from recap.rundir import StageDir
from train_t2i.config import Arm, Train
from train_t2i.data import Batch, Stream
from train_t2i.ema import EMA
from train_t2i.model import Diffusion
from train_t2i.sample import load_pipeline

LOG_EVERY = 10


def run(stage: StageDir, shards: list[str], config: Train, arm: Arm, seed: int, name: str,
        device: str) -> dict[str, Any]:
    """Train UNet and text encoder from `config.model`; `stage.path/pipeline` is the result, a diffusers folder.

    Args:
        stage: where log, checkpoints and result go.
        shards: with the captions that the arm draws from.
        seed: of the order, the captions drawn, the dropout and the noise.
        name: of the arm, for the bar.
        device: `cpu` keeps accelerate off the GPUs; else it takes those it finds.
    """
    accelerator = open_accelerator(config.precision, device)
    pipe = load_pipeline(config, "train", str(accelerator.device))
    model = Diffusion(pipe, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(model, config), weight_decay=config.weight_decay, fused=True)
    ema, stream = EMA(model, config.ema_decay), Stream(shards, arm, config, seed)
    start = _resume(stage.path, model, optimizer, ema, stream)
    ddp, optimizer = accelerator.prepare(model, optimizer)
    losses: list[torch.Tensor] = []
    with progress.bar(f"train {name}", config.steps * config.batch_size, start * config.batch_size) as bar:
        for step in range(start, config.steps):
            torch.manual_seed(seed + step)  # for dropout inside the networks, where a checkpoint has any
            batch = stream.take(config.batch_size, accelerator.process_index, accelerator.num_processes)
            losses.append(_backward(accelerator, ddp, batch, config))
            accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate(config, step) / config.lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(model, step)
            bar.update(config.batch_size)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == config.steps:
                _log(stage, step + 1, losses, bar, accelerator)
            if (step + 1) % config.checkpoint_every == 0 and accelerator.is_main_process:
                _save(stage.path, step + 1, model, optimizer, ema, stream)
    return _finish(stage, accelerator, pipe, model, ema, stream, config)


def _backward(accelerator: Accelerator, ddp: torch.nn.Module, batch: Batch, config: Train) -> torch.Tensor:
    """Gradients of the batch's mean loss, a micro-batch at a time; they meet across processes at the last one."""
    size = config.micro_batch_size or len(batch)
    total = torch.zeros((), device=accelerator.device)
    for start in range(0, len(batch), size):
        part = batch.slice(start, start + size)
        with accelerator.no_sync(ddp) if start + size < len(batch) else nullcontext():
            loss = ddp(part).sum() / len(batch)
            accelerator.backward(loss)
        total += loss.detach()
    return total


def parameter_groups(model: Diffusion, config: Train) -> list[dict[str, Any]]:
    """What the optimizer trains, each part at the learning rate that it rises to."""
    peaks = [(model.unet, config.lr), (model.text_encoder, config.text_encoder_lr or config.lr)]
    return [{"params": [p for p in part.parameters() if p.requires_grad], "lr": lr, "peak_lr": lr}
            for part, lr in peaks if any(p.requires_grad for p in part.parameters())]


def _log(stage: StageDir, step: int, losses: list[torch.Tensor], bar: Any, accelerator: Accelerator) -> None:
    """Write the mean loss since the last log line; the only place in the loop that waits for the device."""
    loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
    losses.clear()
    bar.set_postfix_str(f"loss {loss:.4f}")
    if accelerator.is_main_process:
        stage.log(event="step", step=step, images=bar.n, loss=loss)
    if not math.isfinite(loss):
        progress.warn(f"the loss is {loss} at step {step}")


def _save(folder: Path, step: int, model: Diffusion, optimizer: Any, ema: EMA, stream: Stream) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = (checkpoint.with_prefix("model", trained) | checkpoint.with_prefix("ema", ema.shadow)
               | checkpoint.with_prefix("optimizer", checkpoint.optimizer_tensors(optimizer)))
    checkpoint.save(folder, tensors, {"step": step, "epoch": stream.epoch, "offset": stream.offset,
                                      "num_cut": model.num_cut, "rejected": stream.rejected})


def _resume(folder: Path, model: Diffusion, optimizer: torch.optim.Optimizer, ema: EMA, stream: Stream) -> int:
    """Load the last checkpoint, if there is one; the step to go on from."""
    found = checkpoint.load(folder)
    if found is None:
        return 0
    tensors, state = found
    model.load_state_dict(checkpoint.without_prefix("model", tensors), strict=False)
    checkpoint.load_optimizer(optimizer, checkpoint.without_prefix("optimizer", tensors))
    averages = checkpoint.without_prefix("ema", tensors)
    ema.shadow = {name: averages[name].to(shadow) for name, shadow in ema.shadow.items()}
    stream.epoch, stream.offset, model.num_cut = state["epoch"], state["offset"], state["num_cut"]
    stream.rejected.update(state["rejected"])
    return int(state["step"])


def _finish(stage: StageDir, accelerator: Accelerator, pipe: StableDiffusionPipeline, model: Diffusion, ema: EMA,
            stream: Stream, config: Train) -> dict[str, Any]:
    """Write the averaged weights as a diffusers folder, and say what the training saw."""
    ema.copy_to(model)
    model.eval()
    if accelerator.is_main_process:
        temporary = stage.path / ".pipeline.tmp"
        pipe.save_pretrained(temporary, safe_serialization=True)
        checkpoint.publish(temporary, stage.path / "pipeline")
    accelerator.wait_for_everyone()
    if model.num_cut:
        progress.warn(f"{model.num_cut:,} tokens beyond train.max_windows={config.max_windows} were cut from captions")
    return {"steps": config.steps, "images": config.steps * config.batch_size, "epochs": stream.epoch,
            "tokens_cut": model.num_cut, "rejected": Counter(stream.rejected.values())}
