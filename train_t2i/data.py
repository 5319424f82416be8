"""Relabelled shards → training batches: a stream that a seed and a position fix, whatever stopped in between."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageOps

from recap.caption_tables import join, read_table, table_url
from recap.errors import BadSample, UserError
from recap.sample import Sample, caption_extension
from recap.shards import Reject, read_shard, shard_name
from train_t2i.config import Arm, Train


@dataclass
class Batch:
    """Images with their captions."""

    pixels: torch.Tensor
    """(B, 3, H, W) float32 in [−1, 1]."""
    captions: list[str]
    seeds: list[int]
    """What each sample's noise and timestep are drawn from."""
    uids: list[str]

    def __len__(self) -> int:
        return len(self.uids)

    def slice(self, start: int, stop: int) -> "Batch":
        return Batch(self.pixels[start:stop], self.captions[start:stop], self.seeds[start:stop], self.uids[start:stop])


@dataclass
class Stream:
    """Endless samples in a shuffled order; `epoch` and `offset` say where it stands."""

    shards: list[str]
    arm: Arm
    config: Train
    seed: int
    epoch: int = 0
    offset: int = 0
    """Samples given out in this epoch."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Samples that cannot be used → reason. By name, as a resumed run reads some of them again."""

    def take(self, count: int, rank: int = 0, num_ranks: int = 1) -> Batch:
        """The next `count` samples of the global order; only this rank's share of them is decoded."""
        if not hasattr(self, "_samples"):
            self._samples = self._forever()
        samples = [next(self._samples) for _ in range(count)]
        share = samples[rank * count // num_ranks:(rank + 1) * count // num_ranks]
        batch = Batch(torch.empty(0), [], [], [])
        images = []
        for epoch, sample in share:
            try:
                pixels, caption = prepare(sample, self.arm, self.config, self.seed, epoch)
            except BadSample as error:  # the position counts it all the same, so that ranks and resumed runs agree
                self.rejected[sample.uid] = error.reason
                continue
            images.append(pixels)
            batch.captions.append(caption)
            batch.seeds.append(_number("noise", self.seed, epoch, sample.uid))
            batch.uids.append(sample.uid)
        if not images:
            raise UserError(self._nothing())
        batch.pixels = torch.stack(images)
        return batch

    def _forever(self) -> Iterator[tuple[int, Sample]]:
        skip = self.offset
        while True:
            given = 0
            for sample in self._epoch():
                given += 1
                if given > skip:
                    self.offset = given
                    yield self.epoch, sample
            if not given:
                raise UserError(self._nothing())
            self.epoch, self.offset, skip = self.epoch + 1, 0, 0

    def _epoch(self) -> Iterator[Sample]:
        """One pass: shards in a drawn order, through a buffer from which a drawn sample leaves for each that enters."""
        draw = random.Random(_number("order", self.seed, self.epoch))
        shards = draw.sample(self.shards, len(self.shards))
        buffer: list[Sample] = []
        for shard in shards:
            for sample in self._usable(shard):
                if len(buffer) < self.config.shuffle_buffer:
                    buffer.append(sample)
                else:
                    place = draw.randrange(len(buffer))
                    leaving, buffer[place] = buffer[place], sample
                    yield leaving
        draw.shuffle(buffer)
        yield from buffer

    def _usable(self, shard: str) -> Iterator[Sample]:
        """The samples that hold every caption kind of the arm; with `shuffled`, each with another one's captions."""
        rejects: list[Reject] = []
        samples = self._with_captions(shard, rejects)
        yield from self._rotated(shard, samples) if self.arm.shuffled else samples
        self.rejected.update({f"{reject.shard}/{reject.key}": reject.reason for reject in rejects})

    def _rotated(self, shard: str, samples: Iterator[Sample]) -> Iterator[Sample]:
        """The captions of a shard, moved on by a number of images drawn for seed and shard: nobody keeps its own."""
        names = [caption_extension(kind) for kind in self.arm.captions]
        texts = [{name: sample.member(name) or b"" for name in names} for sample in self._with_captions(shard, [])]
        shift = random.Random(_number("shuffled", self.seed, shard_name(shard))).randrange(1, max(len(texts), 2))
        for place, sample in enumerate(samples):
            yield Sample(sample.shard, sample.key, sample.members | texts[(place + shift) % len(texts)])

    def _with_captions(self, shard: str, rejects: list[Reject]) -> Iterator[Sample]:
        folder = self.config.captions
        rows = read_table(table_url(folder, shard), self.arm.captions) if folder is not None else None
        for sample in read_shard(shard, rejects):
            try:
                if rows is not None:
                    sample = join(sample, rows)
                for kind in self.arm.captions:
                    if sample.caption(kind) is None:
                        raise BadSample(f"no_{kind}_caption")
                sample.image_bytes  # noqa: B018  (read for its check)
                yield sample
            except BadSample as error:
                rejects.append(Reject(sample.shard, sample.key, error.reason, error.detail))

    def _nothing(self) -> str:
        reasons = Counter(self.rejected.values()).most_common(3)
        counts = ", ".join(f"{reason} {count}" for reason, count in reasons) or "they are empty"
        return (f"train.shards: none of the samples in {len(self.shards)} shards can be used ({counts}): "
                f"relabel them with the styles {', '.join(self.arm.captions)}, or choose other arms")


# --- one sample ------------------------------------------------------------------------------------------------------


def prepare(sample: Sample, arm: Arm, config: Train, seed: int, epoch: int) -> tuple[torch.Tensor, str]:
    """Pixels (3, H, W) float32 in [−1, 1] and the caption drawn for this seed, epoch and image."""
    draw = random.Random(_number("caption", seed, epoch, sample.uid))
    kinds = sorted(arm.captions)
    kind = draw.choices(kinds, [arm.captions[kind] for kind in kinds])[0]
    dropped = draw.random() < config.caption_dropout
    flipped = config.flip and draw.random() < 0.5
    caption = "" if dropped else sample.caption(kind) or ""
    return to_pixels(sample.image(), config.resolution, flipped), caption


def to_pixels(image: Image.Image, resolution: int, flipped: bool = False) -> torch.Tensor:
    """The middle square, resized to `resolution`: (3, H, W) float32 in [−1, 1]."""
    square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    if flipped:
        square = ImageOps.mirror(square)
    array = np.asarray(square, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _number(*parts: object) -> int:
    """A 63-bit number that depends on every part, the same on every machine."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
