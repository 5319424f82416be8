"""Tune a captioner on captions in several styles. To resume, run the same command again."""

import functools
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recap import checkpoint, progress
from recap.captioners import Captioner, open_captioner
from recap.config import Captioner as CaptionerConfig
from recap.config import Finetune
from recap.errors import BadSample, UserError
from recap.learning_rate import learning_rate
from recap.rundir import StageDir, hash_files
from recap.sample import decode_image
from recap.shards import Reject, read_shard

LOG_EVERY = 10


@dataclass(frozen=True, slots=True)
class Pair:
    """An image with one of its captions."""

    uid: str
    image: bytes
    style: str
    caption: str


def run(stage: StageDir, shards: list[str], config: Finetune, captioner_config: CaptionerConfig,
        prompts: dict[str, str], device: str) -> dict[str, Any]:
    """Train on every (image, style) pair of the shards; `stage.path/adapter` is the result.

    Args:
        prompts: what the captioner is asked, by style.
    """
    captioner = open_captioner(captioner_config, device)
    torch.manual_seed(config.seed)  # the adapter's first weights
    captioner.add_adapter(config)
    pairs, num_cut = load_pairs(shards, list(prompts), captioner, config.max_tokens)
    if num_cut:
        progress.warn(f"{num_cut} captions were longer than finetune.max_tokens={config.max_tokens} and cut")
    parameters = captioner.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
    start = _resume(stage.path, parameters, optimizer)
    captioner.set_training(True)
    losses: list[float] = []
    with progress.bar("finetune", config.steps * config.batch_size, start * config.batch_size) as bar:
        for step in range(start, config.steps):
            torch.manual_seed(config.seed * 1_000_003 + step)  # dropout
            batch = draw_batch(pairs, step, config.batch_size, config.seed)
            losses.append(_train_step(captioner, batch, prompts, optimizer, config, step))
            bar.update(config.batch_size)
            if (step + 1) % LOG_EVERY == 0 or step + 1 == config.steps:
                _log(stage, step + 1, losses, batch, bar)
            if (step + 1) % config.checkpoint_every == 0:
                _save(stage.path, step + 1, parameters, optimizer)
    captioner.set_training(False)
    return _finish(stage, captioner, pairs, num_cut, config)


def load_pairs(shards: list[str], styles: list[str], captioner: Captioner, max_tokens: int) -> tuple[list[Pair], int]:
    """All (image, style) pairs of the shards, and how many captions had to be cut to `max_tokens`."""
    pairs, num_cut = [], 0
    rejects: list[Reject] = []
    for shard in shards:
        for sample in read_shard(shard, rejects):
            try:
                sample.image()  # decoded again when its turn comes; here for the check
                found = {style: caption for style in styles if (caption := sample.caption(style))}
                image = sample.image_bytes
            except BadSample as error:
                rejects.append(Reject(sample.shard, sample.key, error.reason, error.detail))
                continue
            for style, caption in found.items():
                cut = captioner.fit(caption, max_tokens)
                num_cut += cut != caption
                if cut:
                    pairs.append(Pair(sample.uid, image, style, cut))
    if rejects:
        progress.warn(f"{len(rejects)} samples are not used for tuning, the first: {rejects[0]}")
    if not pairs:
        raise UserError(f"finetune.shards: no sample of {', '.join(shards)} has a caption of the styles "
                        f"{', '.join(styles)}: stitch them first, or check the members' names (KEY.STYLE.txt)")
    return pairs, num_cut


def draw_batch(pairs: list[Pair], step: int, batch_size: int, seed: int) -> list[Pair]:
    """The batch of a step: every epoch is a drawn order of all pairs, and batches run across the epochs' ends."""
    batch = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(place, len(pairs))
        batch.append(pairs[_order(len(pairs), epoch, seed)[offset]])
    return batch


@functools.lru_cache(maxsize=2)
def _order(count: int, epoch: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _train_step(captioner: Captioner, batch: list[Pair], prompts: dict[str, str], optimizer: torch.optim.Optimizer,
                config: Finetune, step: int) -> float:
    """One optimizer step on the batch's mean loss; the loss."""
    size = config.micro_batch_size or len(batch)
    total = 0.0
    num_tokens = [captioner.num_tokens(pair.caption) for pair in batch]
    for start in range(0, len(batch), size):
        part = batch[start:start + size]
        pixels = captioner.preprocess([decode_image(pair.image) for pair in part])
        loss = captioner.loss(pixels, [prompts[pair.style] for pair in part], [pair.caption for pair in part])
        share = sum(num_tokens[start:start + size]) / sum(num_tokens)  # the loss is a mean over tokens, not pairs
        (loss * share).backward()
        total += loss.item() * share
    if not math.isfinite(total):
        keys = ", ".join(pair.uid for pair in batch[:4])
        raise UserError(f"finetune: the loss is {total} at step {step + 1}, with {keys}…: lower finetune.lr; "
                        "the last good checkpoint is kept")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _log(stage: StageDir, step: int, losses: list[float], batch: list[Pair], bar: Any) -> None:
    loss = sum(losses) / len(losses)
    losses.clear()
    bar.set_postfix_str(f"loss {loss:.4f}")
    stage.log(event="step", step=step, images=step * len(batch), loss=loss)


def _save(folder: Path, step: int, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    tensors = (checkpoint.with_prefix("model", parameters)
               | checkpoint.with_prefix("optimizer", checkpoint.optimizer_tensors(optimizer)))
    checkpoint.save(folder, tensors, {"step": step})


def _resume(folder: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint, if there is one; the step to go on from."""
    found = checkpoint.load(folder)
    if found is None:
        return 0
    tensors, state = found
    with torch.no_grad():
        for name, value in checkpoint.without_prefix("model", tensors).items():
            parameters[name].copy_(value)
    checkpoint.load_optimizer(optimizer, checkpoint.without_prefix("optimizer", tensors))
    return int(state["step"])


def _finish(stage: StageDir, captioner: Captioner, pairs: list[Pair], num_cut: int, config: Finetune) -> dict[str, Any]:
    temporary = stage.path / ".adapter.tmp"
    captioner.save(temporary)
    checkpoint.publish(temporary, stage.path / "adapter")
    return {"steps": config.steps, "images": len({pair.uid for pair in pairs}), "pairs": len(pairs),
            "captions_cut": num_cut,
            "trainable_parameters": sum(p.numel() for p in captioner.trainable().values()),
            "adapter": hash_files(stage.path / "adapter")}
