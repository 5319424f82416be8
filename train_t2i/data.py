"""Relabelled shards → training batches.

    order.py (which sample comes when) → usable.py (those with caption, of a size) → prepare (pixels, caption, noise) →
    Parts (of a step, in worker processes) → steps (one process's share of a step)

All randomness is of a sample's own seed, so that a batch is the same on any number of processes and workers.
"""

import atexit
import os
import random
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from recap.augment import SIDES
from recap.errors import BadSample, UserError
from recap.storage import is_local
from train_t2i.batch import Batch, Part, Recipe
from train_t2i.config import Arm, Train
from train_t2i.images import CENTER, Size, draft_side, size_ids, to_pixels
from train_t2i.latents import Latents
from train_t2i.order import Cursor, Entry, Lane, num_lanes, number
from train_t2i.text import Tokens, tokenize
from train_t2i.usable import usable

PREFETCH = 2
"""Steps that each worker is ahead."""
PATIENCE = 2.0
"""Seconds that workers have to end what they are at, when no more is wanted."""
MANY = 100
"""Images, none of which can be decoded, after which a training stops."""


# --- one sample ------------------------------------------------------------------------------------------------------


def prepare(entry: Entry, arm: Arm, config: Train, seed: int, recipe: Recipe) -> tuple[Batch, int]:
    """A batch of one sample, and how many tokens of its caption were cut.

    What is drawn (caption, crop, mirror, timestep, noise) follows from seed, epoch and the sample's name.
    """
    sample, size = entry.sample, entry.size
    draw = random.Random(number("caption", seed, entry.epoch, sample.uid))
    kinds = sorted(arm.captions)
    kind = draw.choices(kinds, [arm.captions[kind] for kind in kinds])[0]
    dropped = draw.random() < config.caption_dropout
    caption = "" if dropped else sample.caption(kind) or ""
    flipped = config.flip and draw.random() < 0.5 and not SIDES.search(caption)
    left, top = (draw.random(), draw.random()) if config.crop == "random" else CENTER
    weight = 1.0
    try:
        images = sample.moments(flipped) if isinstance(sample, Latents) else to_pixels(
            sample.image(draft_side(size)), size, (left, top), flipped)
    except BadSample as error:
        entry.rejects[error.reason] += entry.epoch == 0
        # Its place is left empty: all processes know how many there are in a step, whatever one of them finds.
        images, weight, caption = torch.zeros(3, *size, dtype=torch.uint8), 0.0, ""
    tokens: Tokens = tokenize(caption, recipe.tokenizers, config.max_windows)
    timestep, posterior_noise, noise = _drawn(number("noise", seed, entry.epoch, sample.uid), size, config, recipe)
    ids = size_ids(*entry.original, size, (1 - left if flipped else left, top))
    batch = Batch(images[None], posterior_noise[None], noise[None], timestep[None], torch.tensor([weight]),
                  torch.tensor([ids], dtype=torch.float32), [tokens.ids], [sample.uid])
    return batch, tokens.num_cut


def _drawn(seed: int, size: Size, config: Train, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A timestep; noise of the VAE's posterior and of the diffusion, (C, h, w). On the CPU: the same on any device."""
    generator = torch.Generator().manual_seed(seed)
    shape = (recipe.latent_channels, size[0] // recipe.latent_scale, size[1] // recipe.latent_scale)
    timestep = torch.randint(recipe.num_timesteps, (), generator=generator)
    posterior_noise, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    if config.noise_offset:
        noise += config.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
    return timestep, posterior_noise, noise


# --- parts of steps --------------------------------------------------------------------------------------------------


class Parts(IterableDataset[Part | UserError]):
    """Step after step, what one worker does of it. Of a process without workers, all."""

    def __init__(self, shards: list[str], arm: Arm, config: Train, seed: int, recipe: Recipe,
                 latents: Path | None = None, rank: int = 0, num_ranks: int = 1,
                 cursors: dict[int, Cursor] | None = None) -> None:
        self.shards, self.arm, self.config, self.seed, self.recipe = shards, arm, config, seed, recipe
        self.rank, self.num_ranks = rank, num_ranks
        self.num_lanes = num_lanes(len(shards), config.batch_size)
        self.each = config.batch_size // self.num_lanes
        """Samples of a lane in a step."""
        block = max(1, config.shuffle_buffer // self.num_lanes // self.each) * self.each
        run = self.each if config.buckets else 1
        read = partial(usable, arm=arm, config=config, latents=latents)
        self.lanes = [Lane(shards, lane, self.num_lanes, seed, block, run, read, (cursors or {}).get(lane, Cursor()))
                      for lane in range(self.num_lanes)]

    def __iter__(self) -> Iterator[Part | UserError]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self.share(self.rank * num_workers + worker, self.num_ranks * num_workers)
        except UserError as error:  # raised in a worker, it would come with a traceback in its message
            yield error

    def share(self, share: int, num_shares: int) -> Iterator[Part]:
        """One of so many shares of every step, which follow on each other."""
        places = range(share * self.config.batch_size // num_shares, (share + 1) * self.config.batch_size // num_shares)
        lanes = range(places.start // self.each, -(-places.stop // self.each)) if places else range(0)
        for lane in lanes:
            self.lanes[lane].speaks = share == 0
        samples = {lane: iter(self.lanes[lane]) for lane in lanes}
        while True:
            yield self._part(samples, places)

    def _part(self, samples: dict[int, Iterator[Entry]], places: range) -> Part:
        """One step's samples: those of a lane follow on each other; whoever does a lane's first one speaks for it."""
        part = Part()
        for lane, entries in samples.items():
            for place in range(lane * self.each, (lane + 1) * self.each):
                entry = next(entries)
                if lane * self.each in places:
                    part.rejects += entry.rejects
                entry.rejects.clear()
                if place in places:
                    batch, num_cut = prepare(entry, self.arm, self.config, self.seed, self.recipe)
                    part.batches.append(batch)
                    part.num_cut += num_cut
                    part.rejects += entry.rejects
            if lane * self.each in places:
                part.cursors[lane] = self.lanes[lane].cursor
        part.batches = part.by_size()
        return part


# --- steps -----------------------------------------------------------------------------------------------------------


def steps(parts: Parts, pin: bool = False) -> Generator[Part]:
    """Step after step, all that this process does of it; of each size one batch, the longest captions first.

    Read ahead by `num_workers` processes, until it is closed; where there are none, when it is asked for.

    Args:
        parts: of this process.
        pin: keep batches in pinned memory, from which copies to a GPU need not be waited for.
    """
    num_workers = parts.config.num_workers
    if not num_workers:
        return _whole(iter(parts), parts, pin)
    are_local = all(map(is_local, [*parts.shards, parts.config.captions or ""]))
    context = get_context("fork" if are_local else "spawn")  # a remote file system's threads do not survive a fork
    is_over = context.RawValue("b", 0)
    atexit.register(setattr, is_over, "value", 1)  # before multiprocessing ends, by SIGTERM, the workers that are left
    reading = iter(DataLoader(parts, None, num_workers=num_workers, prefetch_factor=PREFETCH,
                              multiprocessing_context=context, worker_init_fn=partial(_begin, is_over)))
    return _ahead(reading, _whole(reading, parts, pin), is_over)


def _begin(is_over: Any, _: int) -> None:
    """In a worker. A scheduler may send SIGTERM to all processes; the training's own ends its workers, having saved."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if is_over.value else None)


def _ahead(reading: Any, whole: Iterator[Part], is_over: Any) -> Generator[Part]:
    """The steps, of which a thread puts the next ones together while the caller works on one.

    When closed, it ends the workers, whatever they are at.
    """
    thread = ThreadPoolExecutor(1)
    coming = deque(thread.submit(next, whole) for _ in range(2))
    try:
        while True:
            yield coming.popleft().result()
            coming.append(thread.submit(next, whole))
    finally:
        for each in coming:
            each.cancel()
        is_over.value = 1
        if wait(coming, PATIENCE).not_done:
            for worker in reading._workers:
                worker.terminate()
        thread.shutdown()
        reading._shutdown_workers()  # which else waits until nobody knows of it, and an error's traceback may


def _whole(reading: Iterator[Part | UserError], parts: Parts, pin: bool) -> Generator[Part]:
    """What the workers read, put together."""
    is_good, bad = False, Counter[str]()
    while True:
        step = Part()
        for _ in range(max(parts.config.num_workers, 1)):
            found = next(reading)
            if isinstance(found, UserError):
                raise found
            step += found
        step.batches = [batch.longest_first() for batch in step.by_size()]
        is_good = is_good or any(bool(batch.weights.any()) for batch in step.batches)
        if not is_good:
            bad.update(uid.partition("/")[0] for batch in step.batches for uid in batch.uids)
            if bad.total() >= MANY and len(bad) >= min(2, len(parts.shards)):  # not of one damaged shard
                raise UserError(f"train.shards: none of the first {bad.total():,} images can be decoded: see what they "
                                "are with `recap show`")
        if pin:
            step.batches = [batch.pin_memory() for batch in step.batches]
        yield step
