"""Images, encoded once by the VAE and kept for all arms: shards of moments beside shards of images.

    KEY.safetensors   `moments` (2·C, h, w) float16: mean and log-variance, as the VAE gives them, unscaled; with
                      `train.flip`, `flipped` as well, those of the mirrored image
    KEY.json          `sha256` of the encoded image, its `width` and `height`; of one that can't be used, the `reason`

Nothing in them is of a caption, so that dropout and the draw of captions stay the training's. A shard is named as the
one that it was made of, and has its order. Its stats are written last, and mark it as done; to resume, run the same
command again.
"""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from recap import engines, progress
from recap.caption_tables import image_hash
from recap.engines import Report
from recap.errors import UserError
from recap.meter import Meter
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shard_work import Stats, reasons, stats_url, total
from recap.shards import count_images, read_shard, shard_name
from recap.storage import clean
from train_t2i.config import Train
from train_t2i.encoder import FLIPPED, MOMENTS, Encoder


@dataclass(slots=True)
class Latents(Sample):
    """A sample whose image is encoded already."""

    original: tuple[int, int] = (0, 0)
    """Width and height of the image."""
    kept: bytes = b""

    def moments(self, flipped: bool) -> torch.Tensor:
        """(2·C, h, w) float16: mean and log-variance."""
        return load(self.kept)[FLIPPED if flipped else MOMENTS]


def read_latents(folder: Path, shard: str) -> Iterator[Sample]:
    """What is kept of a shard's images, in its order."""
    return read_shard(str(folder / f"{shard_name(shard)}.tar"), [])


def joined(samples: Iterator[Sample | str], kept: Iterator[Sample]) -> Iterator[Sample | str]:
    """The samples with what is kept of their images; reasons stay as they are.

    Both are in one order, and every sample is among the kept ones, which may be more.

    Raises:
        UserError: they are not.
    """
    for sample in samples:
        if isinstance(sample, str):
            yield sample
            continue
        found = next((each for each in kept if each.key == sample.key), None)
        if found is None:
            raise UserError(f"train.cache_latents: nothing is kept of {sample.uid}: its shard has changed since, or "
                            "its order; delete the run's latents and run again")
        about = found.metadata
        if "reason" in about:
            yield str(about["reason"])
        elif about["sha256"] != image_hash(sample):
            yield "latents_of_another_image"
        else:
            yield Latents(sample.shard, sample.key, sample.members, sample.offsets, (about["width"], about["height"]),
                          found.members["safetensors"])


# --- writing ---------------------------------------------------------------------------------------------------------


def run(stage: StageDir, shards: list[str], config: Train, device: str) -> dict[str, Any]:
    """Encode every image at the size that it is trained at; write each shard, then its quarantine, then its stats.

    Args:
        stage: where it goes.
        shards: of the images; of those that training reads, or what they were made of.
        config: names the VAE.
        device: `cuda` for all GPUs, or one device.

    Returns:
        `images` that are kept, `rejected` (reason → number), `bytes` of the shards, `seconds` of this try. Of the ranks
        of torchrun, the first one alone returns it.

    Raises:
        UserError: the model cannot be trained so, or no image could be used.
    """
    from train_t2i import model, train  # which import this module
    from train_t2i.sample import load_pipeline
    train.check(config, device)
    model.check(load_pipeline(config, "train", "cpu"), config)  # what training would refuse only when all is encoded
    began, is_main = time.monotonic(), progress.is_main()
    found = _finished_before(stage.path, shards) if is_main else {}
    left = [shard for shard in shards if shard not in found]
    with Meter(stage.path, count_images(shards) if is_main else None, len(shards), found.values(), "latents") as meter:
        for shard, stats in engines.work(Job(stage.path, config), left, "local", None, device, meter):
            found[shard] = stats
            stage.log(event="shard", shard=shard_name(shard), **stats)
            meter.shard(shard, stats["count"], reasons(stats))
    if not is_main:
        return {}
    clean(str(stage.path))  # what lost workers have left
    sums = total(list(_finished_before(stage.path, shards).values()), "bytes")
    if not sums["images_out"]:
        raise UserError(f"train.cache_latents: no image of {', '.join(shards[:3])} can be used "
                        f"({sums['quarantined'] or 'they are empty'}): check train.shards and data.shards")
    return {"images": sums["images_out"], "rejected": sums["quarantined"], "bytes": sums["bytes"],
            "seconds": round(time.monotonic() - began, 1)}


def _finished_before(folder: Path, shards: list[str]) -> dict[str, Stats]:
    """The stats of the shards that are done."""
    paths = {shard: Path(stats_url(str(folder), shard)) for shard in shards}
    return {shard: json.loads(path.read_bytes()) for shard, path in paths.items() if path.is_file()}


@dataclass(frozen=True)
class Job:
    """All that a worker has to know, in whatever process it is."""

    out: Path
    config: Train

    def open(self, device: str, report: Report) -> AbstractContextManager[Encoder]:
        return Encoder(self.out, self.config, device, report)
