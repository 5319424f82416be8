"""Pairs of an image and a caption: checked, drawn in batches, decoded ahead of the training.

What a step sees follows from its number and the seed alone, so that a run that was stopped goes on as if it had not.
"""

import functools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from recap import progress
from recap.augment import augment
from recap.caption_sets import CaptionedImage, ImageRef
from recap.captioners import Tunable
from recap.config import Style
from recap.config.finetune import Augment, Finetune
from recap.errors import BadSample, UserError
from recap.sample import decode_image
from recap.shards import Reject, write_rejects


@dataclass(frozen=True, slots=True)
class Pair:
    """An image with one of its captions."""

    uid: str
    image: ImageRef
    style: str
    caption: str


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one process computes at once."""

    pairs: list[Pair]
    pixels: Any
    """As `Captioner.preprocess` gives them; None where features are kept."""
    share: float
    """Of the step's tokens: the loss is a mean over tokens, whatever batch they are in."""


# --- which images, which captions ----------------------------------------------------------------------------------


def usable(images: list[CaptionedImage], rejects: list[Reject], path: Path, num_workers: int) -> list[CaptionedImage]:
    """The images that can be decoded; the others join `rejects` in the quarantine file at `path`.

    Decoding all takes minutes where there are many, so that where the file is there, it is believed.
    """
    if path.exists():
        # Not the first rows, `rejects`: an image that lost one of its captions there is used for the others.
        bad = {json.loads(line)["key"] for line in path.read_text().splitlines()[len(rejects):]}
        return [image for image in images if image.uid not in bad]
    loader = DataLoader(_Check([image.image for image in images]), batch_size=None, num_workers=num_workers)
    found: list[CaptionedImage] = []
    rejects = list(rejects)
    for image, fault in zip(images, loader, strict=True):
        if fault:
            shard, _, _ = image.uid.rpartition("/")
            rejects.append(Reject(shard, image.uid, *fault))
        else:
            found.append(image)
    if progress.is_main():
        write_rejects(str(path), rejects)
    if rejects:
        progress.warn(f"{len(rejects)} samples are not used, see {path}; the first: {rejects[0]}")
    return found


class _Check(Dataset[tuple[str, str] | None]):
    """Why an image can't be decoded; None where it can."""

    def __init__(self, images: list[ImageRef]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, str] | None:
        try:
            decode_image(self.images[index].read())
        except BadSample as error:
            return error.reason, error.detail
        return None


def to_pairs(images: Iterable[CaptionedImage], styles: dict[str, Style], captioner: Tunable,
             max_tokens: int) -> tuple[list[Pair], int]:
    """A pair for every caption of the styles; and how many captions had to be cut, at a sentence end.

    The limit is `max_tokens`, or what the captioner has positions for. A caption of which nothing is left when it is
    cut, one word that is longer than the limit, is no pair.
    """
    rooms = {style: captioner.text.room(settings.prompt) for style, settings in styles.items()}
    for style, room in rooms.items():
        if room is not None and room < 1:
            raise UserError(f"styles.{style}.prompt: it takes all positions that this captioner has: shorten it")
    limits = {style: max_tokens if room is None else min(max_tokens, room) for style, room in rooms.items()}
    pairs, num_cut = [], 0
    for image in images:
        for style, caption in image.captions:
            if style in limits:
                cut = captioner.fit(caption, limits[style])
                num_cut += cut != caption
                if cut:
                    pairs.append(Pair(image.uid, image.image, style, cut))
    return pairs, num_cut


# --- which step sees what ------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Batches(Dataset[list[MicroBatch]]):
    """Step → the micro-batches that this process computes in it."""

    pairs: list[Pair]
    config: Finetune
    num_tokens: Callable[[str], int]
    preprocess: Callable[[list[Image.Image]], Any] | None
    """None where features are kept."""
    rank: int = 0
    num_ranks: int = 1
    counts: dict[str, int] = field(default_factory=dict)
    """Caption → its tokens, once they have been counted: every epoch asks again."""

    def __getitem__(self, step: int) -> list[MicroBatch]:
        config = self.config
        batch = draw_batch(self.pairs, step, config.batch_size, config.seed)
        num_tokens = [self._count(pair.caption) for pair in batch]
        # Captions of a length together: less padding to compute.
        order = sorted(range(len(batch)), key=lambda place: -num_tokens[place])[self.rank::self.num_ranks]
        size = config.micro_batch_size or len(order)
        return [self._micro_batch(batch, order[start:start + size], num_tokens, step)
                for start in range(0, len(order), size)]

    def _count(self, caption: str) -> int:
        if caption not in self.counts:
            self.counts[caption] = self.num_tokens(caption)
        return self.counts[caption]

    def _micro_batch(self, batch: list[Pair], places: list[int], num_tokens: list[int], step: int) -> MicroBatch:
        pixels = None
        if self.preprocess is not None:
            seed = f"{self.config.seed}/{step}"
            pixels = self.preprocess([open_image(batch[place], self.config.augment, f"{seed}/{place}")
                                      for place in places])
        share = sum(num_tokens[place] for place in places) / sum(num_tokens)
        return MicroBatch([batch[place] for place in places], pixels, share)

    def loader(self, steps: range) -> Iterator[list[MicroBatch]]:
        """The batches of the steps, made ahead of their turn by `config.num_workers` processes."""
        return iter(DataLoader(self, batch_size=None, sampler=steps, num_workers=self.config.num_workers))


def open_image(pair: Pair, config: Augment, seed: str) -> Image.Image:
    """The decoded image of a pair, augmented.

    Raises:
        UserError: it could be read when the run began, and can't now.
    """
    try:
        image = decode_image(pair.image.read())
    except BadSample as error:
        raise UserError(f"finetune: {pair.uid} could be read when the run began, and can't now ({error}): put "
                        f"{pair.image.url} back and run the same command") from None
    return image if config.is_off else augment(image, pair.caption, config, random.Random(seed))


# --- features that are kept ----------------------------------------------------------------------------------------


class Features:
    """What the captioner sees of every image, computed once, in one file; a row an image."""

    def __init__(self, path: Path, pairs: list[Pair], device: str) -> None:
        self.path, self.device = path, device
        self.images = {pair.image: pair for pair in pairs}
        self.rows = {image: row for row, image in enumerate(self.images)}
        self.seconds = 0.0
        """That `fill` took."""

    @torch.no_grad()
    def fill(self, captioner: Tunable, batch_size: int) -> None:
        """Encode every image, unless it has been done."""
        started = time.perf_counter()
        if not self.path.exists():
            temporary = self.path.with_suffix(".tmp")
            todo, file = list(self.images.values()), None
            with progress.bar("encode", len(todo)) as bar:
                for start in range(0, len(todo), batch_size):
                    part = todo[start:start + batch_size]
                    found = _plain(captioner.encode(captioner.preprocess(
                        [open_image(pair, Augment(), "") for pair in part])))
                    if file is None:
                        file = np.lib.format.open_memmap(temporary, "w+", found.dtype, (len(todo), *found.shape[1:]))
                    file[start:start + len(part)] = found
                    bar.update(len(part))
            if file is not None:
                file.flush()
            temporary.rename(self.path)
            self.seconds = time.perf_counter() - started
        self.array = np.load(self.path, mmap_mode="r", allow_pickle=False)

    def of(self, pairs: list[Pair]) -> torch.Tensor:
        rows = torch.from_numpy(self.array[[self.rows[pair.image] for pair in pairs]])
        return (rows.view(torch.bfloat16) if rows.dtype == torch.uint16 else rows).to(self.device)


def _plain(features: Any) -> np.ndarray:
    """Features as numpy has them, which knows no bfloat16."""
    if not isinstance(features, torch.Tensor):
        raise UserError("finetune.cache_features: this captioner's features are not one tensor: leave it out")
    features = features.cpu()
    return (features.view(torch.uint16) if features.dtype == torch.bfloat16 else features).numpy()
