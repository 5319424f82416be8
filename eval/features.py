"""Images → the features that FID compares, by clean-fid's Inception or any timm model, behind clean-fid's resize.

Resizing decides as much as the network (Parmar et al. 2022, arXiv 2104.11222): all images go through PIL's bicubic
filter on floats, channel by channel, to the network's own input size.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from cleanfid.features import build_feature_extractor
from PIL import Image

from eval.config import Features
from recap.errors import BadSample, UserError
from recap.pretrained import load_pretrained
from recap.rundir import hash_files
from recap.sample import IMAGE_EXTENSIONS, decode_image
from recap.shards import Reject, expand, read_shard
from recap.timm_features import TimmFeatures, clean_resizer

CLEAN_FID = "clean-fid"
INCEPTION_SIZE = (299, 299)


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network, and all that its features depend on."""

    name: str
    """Model and version; features of two names are never compared."""
    size: tuple[int, int]
    """Height and width of its input, in pixels."""
    dim: int
    forward: Callable[[torch.Tensor], torch.Tensor]
    """(N, 3, H, W) float32 in [0, 255] → (N, D)."""

    @property
    def resize(self) -> str:
        return f"clean-fid (PIL bicubic on floats) to {self.size[1]}×{self.size[0]}"

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        """Images (N, 3, H, W) float32 in [0, 255], of `size` → features (N, D) float64."""
        with torch.no_grad():
            return self.forward(images).double().cpu().numpy()


# --- networks ------------------------------------------------------------------------------------------------------


def open_network(ref: Features, where: str, device: str) -> FeatureNetwork:
    """Open the network of a reference: `clean-fid`, or a timm model `local-dir:FOLDER` or `hf-hub:ID`.

    Raises:
        UserError: it is not there, cannot be fetched, or has no safetensors weights.
    """
    if ref.model == CLEAN_FID:
        return _open_inception(where, device)
    return load_pretrained(lambda folder: _open_timm(Path(folder), ref.model, device), ref, where)


def _open_inception(where: str, device: str) -> FeatureNetwork:
    """Inception-v3 of StyleGAN's authors, as clean-fid has it: 2048 features of 299-pixel images."""
    try:
        forward = build_feature_extractor("clean", torch.device(device), use_dataparallel=False)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}.model: clean-fid cannot fetch or open its Inception weights ({reason}): put a whole "
                        "inception-2015-12-05.pt into /tmp, or choose a timm model (local-dir:…, hf-hub:…)") from None
    return FeatureNetwork("clean-fid inception-2015-12-05", INCEPTION_SIZE, 2048, forward)


def _open_timm(folder: Path, name: str, device: str) -> FeatureNetwork:
    """A timm model without its classifier; inputs normalised by its own mean and standard deviation."""
    network = TimmFeatures(folder).to(device)
    is_snapshot = folder.parent.name == "snapshots"
    version = f"{name.removeprefix('hf-hub:')}@{folder.name}" if is_snapshot else hash_files(folder)
    return FeatureNetwork(f"timm {network.architecture} {version}", network.size, network.dim,
                          lambda images: network(images.to(device)))


# --- features ------------------------------------------------------------------------------------------------------


def features(images: Iterable[Image.Image], network: FeatureNetwork, batch_size: int,
             tell: Callable[[int], object] = lambda num_images: None) -> np.ndarray:
    """Features of images, (N, D) float64, in their order.

    Args:
        images: RGB, any sizes.
        network: see `open_network`.
        batch_size: images at once.
        tell: called with the number of images of every finished batch.
    """
    resize = clean_resizer(network.size)
    stream = iter(images)
    batches = []
    while batch := [torch.from_numpy(resize(np.asarray(image))) for image in islice(stream, batch_size)]:
        batches.append(network(torch.stack(batch).permute(0, 3, 1, 2)))
        tell(len(batch))
    return np.concatenate(batches) if batches else np.zeros((0, network.dim))


# --- images --------------------------------------------------------------------------------------------------------


def iterate_images(source: str | list[str], where: str, rejects: list[Reject]) -> Iterator[Image.Image]:
    """The images of a folder (with those below it, sorted), or of shards, decoded.

    A broken image in a folder is an error, as somebody put it there; in a shard from the web it is one of many, and is
    appended to `rejects`.

    Raises:
        UserError: nothing is there, or a folder holds a broken image.
    """
    if isinstance(source, str) and Path(source).is_dir():
        paths = image_files(Path(source))
        if not paths:
            raise UserError(f"{where}: no image ({', '.join(IMAGE_EXTENSIONS)}) in {source}: check the path")
        yield from map(read_image, paths)
        return
    if not source:
        raise UserError(f"{where} is empty: give a folder of real images, or shards")
    for shard in expand(source, where):
        for sample in read_shard(shard, rejects):
            try:
                yield sample.image()
            except BadSample as error:
                rejects.append(Reject(sample.shard, sample.key, error.reason, error.detail))


def image_files(folder: Path) -> list[Path]:
    extensions = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    return sorted(path for path in folder.rglob("*")
                  if path.suffix.lower() in extensions and not path.name.startswith("."))


def read_image(path: Path) -> Image.Image:
    """Decode one file; `UserError` with its name where it is not a whole image."""
    try:
        return decode_image(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no image at {path}: it was there before; put it back, or run generate again") from None
    except BadSample as error:
        raise UserError(f"{path} is not a whole image ({error.reason}): delete or replace it, and run again") from None
