"""Encodes the images of shards by the VAE, with all that surrounds it in threads beside it.

read ─▶ decode ─▶ crop ─▶ images of one size ─▶ the VAE ─▶ write, in the shard's order ─▶ publish
       processes  threads         a thread                        a thread
"""

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save

from recap.caption_tables import image_hash
from recap.decoders import Decoders
from recap.engines import Report, Result
from recap.errors import BadSample, UserError
from recap.memory import in_halves, is_out_of_memory
from recap.pretrained import load_pretrained
from recap.sample import Sample, image_size
from recap.shard_work import (
    LARGE_PIXELS,
    NUM_DECODERS,
    Stats,
    ahead,
    in_background,
    stats_of,
    stats_url,
    warn_of,
)
from recap.shards import Reject, ShardWriter, read_shard, shard_name
from recap.storage import identity, write_json
from train_t2i.config import Train
from train_t2i.images import draft_side, nearest, sizes, to_pixels, to_unit

MOMENTS, FLIPPED = "moments", "flipped"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_SIZE = 8
"""Images that are encoded together, where `train.micro_batch_size` doesn't say."""
MAX_WAITING = 256
"""Samples that are held until one before them is encoded, whose size is rare: what bounds the memory of a shard."""


@torch.no_grad()
def moments(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) uint8 → mean and log-variance of the VAE's posterior, (B, 2·C, h, w), unscaled."""
    with torch.autocast(images.device.type, enabled=False):
        found: torch.Tensor = vae.encode(to_unit(images).to(vae.dtype)).latent_dist.parameters
        return found


def vae_dtype(vae: Any, precision: str) -> torch.dtype:
    """What a VAE computes in: float32 for one that overflows in float16."""
    return torch.float32 if precision == "fp16" and vae.config.force_upcast else DTYPES[precision]


@dataclass(slots=True)
class Item:
    """A sample on its way."""

    key: str
    about: dict[str, Any]
    """What `KEY.json` says."""
    detail: str = ""
    """Of the reason, where there is one."""
    pixels: torch.Tensor | None = None
    """(3, H, W) uint8; None where there are none, and once they are encoded."""
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    """(2·C, h, w) float16 each."""


class Encoder:
    """Encodes the images of shards, one shard after the other, on one device."""

    def __init__(self, out: Path, config: Train, device: str, report: Report) -> None:
        self.out, self.config, self.device, self.report = out, config, device, report
        self.among = tuple(sizes(config.resolution, config.buckets))
        self.batch_size = config.micro_batch_size or BATCH_SIZE
        self.num_threads = max(config.num_workers, NUM_DECODERS)
        self.decoders = Decoders(self.num_threads)
        self.one_large = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.decoders.__exit__()

    @cached_property
    def vae(self) -> Any:
        """Opened when there is something to encode."""
        vae: Any = load_pretrained(AutoencoderKL.from_pretrained, self.config, "train", subfolder="vae",
                                   use_safetensors=True)
        vae = vae.requires_grad_(False).eval().to(self.device, vae_dtype(vae, self.config.precision))
        return vae.to(memory_format=torch.channels_last)

    def process(self, shards: Iterable[str]) -> Iterator[Result]:
        """Shards with their stats, as soon as they are written."""
        for shard in shards:
            yield shard, self._do(shard)

    def _do(self, shard: str) -> Stats:
        name, path = shard_name(shard), f"{self.out}/{shard_name(shard)}.tar"
        malformed: list[Reject] = []
        unusable: list[Reject] = []
        count = 0
        read = ahead(self._prepared, read_shard(shard, malformed), self.num_threads)
        with ShardWriter(path) as writer, closing(in_background(in_batches(read, self.batch_size))) as batches:
            for items in ahead(partial(_write, writer), map(self._encoded, batches), 1):
                count += len(items)
                unusable += [Reject(name, item.key, item.about["reason"], item.detail) for item in items
                             if not item.kept]
                self.report(shard, count, Counter(reject.reason for reject in unusable))
        rejects = [*malformed, *unusable]
        warn_of(rejects, shard, str(self.out))
        stats = stats_of(shard, self.out, count - len(unusable), rejects, bytes=identity(path)[1])
        write_json(stats_url(str(self.out), shard), stats)
        return stats

    def _prepared(self, sample: Sample) -> Item:
        """In a thread of its own."""
        try:
            width, height = image_size(sample.image_bytes)
            size = nearest(width, height, self.among)
            with self.one_large if width * height > LARGE_PIXELS else nullcontext():
                pixels = to_pixels(self.decoders.decode(sample.image_bytes, draft_side(size)), size)
            return Item(sample.key, {"sha256": image_hash(sample), "width": width, "height": height}, pixels=pixels)
        except BadSample as error:
            return Item(sample.key, {"reason": error.reason}, error.detail)

    def _encoded(self, batch: tuple[list[Item], list[Item]]) -> list[Item]:
        """Encode images of one size; what can be written then, is what the batch says."""
        items, ready = batch
        try:
            found = in_halves(self._moments, [item.pixels for item in items if item.pixels is not None])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("train.cache_latents: out of memory with one image at a time: set a lower train.resolution,"
                            " or train.precision=bf16") from error
        for item, kept in zip(items, found, strict=True):
            item.pixels = None
            if all(bool(tensor.isfinite().all()) for tensor in kept.values()):
                item.kept = kept
            else:
                item.about, item.detail = {"reason": "latents_not_finite"}, f"in {self.vae.dtype}, or kept as float16"
        return ready

    def _moments(self, pixels: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        if not pixels:
            return []
        images = torch.stack(pixels).to(self.device)
        found = {MOMENTS: self._kept(images)}
        if self.config.flip:
            found[FLIPPED] = self._kept(images.flip(-1))
        return [{name: tensor[place] for name, tensor in found.items()} for place in range(len(pixels))]

    def _kept(self, images: torch.Tensor) -> torch.Tensor:
        return moments(self.vae, images).half().cpu().contiguous()


def in_batches(items: Iterable[Item], size: int) -> Iterator[tuple[list[Item], list[Item]]]:
    """At most `size` images of one size, to be encoded; and what can be written then, in the order of the items.

    No more than MAX_WAITING items are held, so a batch may be smaller. Which ones are together, is the shard's alone.
    """
    unwritten: deque[Item] = deque()
    by_size: dict[Any, list[Item]] = {}
    """The one whose first item came first, first."""
    waiting: set[int] = set()

    def batch(shape: Any) -> tuple[list[Item], list[Item]]:
        chosen, ready = by_size.pop(shape, []), []
        waiting.difference_update(map(id, chosen))
        while unwritten and id(unwritten[0]) not in waiting:
            ready.append(unwritten.popleft())
        return chosen, ready

    for item in items:
        unwritten.append(item)
        if item.pixels is not None:
            waiting.add(id(item))
            same = by_size.setdefault(item.pixels.shape, [])
            same.append(item)
            if len(same) == size:
                yield batch(item.pixels.shape)
        if len(unwritten) == MAX_WAITING:
            yield batch(next(iter(by_size), None))
    while unwritten:
        yield batch(next(iter(by_size), None))


def _write(writer: ShardWriter, items: list[Item]) -> list[Item]:
    """In a thread of its own."""
    for item in items:
        kept = {"safetensors": save(item.kept)} if item.kept else {}
        writer.write(Sample("", item.key, {**kept, "json": json.dumps(item.about).encode()}))
    return items
