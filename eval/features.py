"""Networks whose features distances compare, behind clean-fid's resize.

Resizing decides as much as the network (Parmar et al. 2022, arXiv 2104.11222): all images go through PIL's bicubic
filter on floats, channel by channel, to the network's own input size. It is antialiased, as CMMD needs it, too.
"""

import importlib
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torchvision
from cleanfid.downloads_helper import check_download_inception
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import to_2tuple
from torch import nn

from eval.clip_score import ClipScorer
from eval.config import Features
from recap.errors import UserError
from recap.pretrained import load_pretrained
from recap.rundir import hash_file, hash_files
from recap.timm_features import TimmFeatures, clean_resizer

CLEAN_FID, TORCHVISION = "clean-fid", "torchvision:"
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SIZE, TORCHVISION_SIZE = (299, 299), (224, 224)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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

    def prepare(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        """RGB of any size, or (H, W, 3) uint8 → (3, H, W) float32 in [0, 255], not rounded."""
        return torch.from_numpy(clean_resizer(self.size)(np.asarray(image))).permute(2, 0, 1)

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        """Images (N, 3, H, W) float32 in [0, 255], of `size` → features (N, D) float64."""
        with torch.no_grad():
            return self.forward(images).double().cpu().numpy()


# --- networks ------------------------------------------------------------------------------------------------------


def open_network(ref: Features, where: str, device: str) -> FeatureNetwork:
    """Open the network of a reference; see `eval.config.Features.model`.

    Raises:
        UserError: it is not there, cannot be fetched, or has no weights that may be opened.
    """
    if ref.target is not None:
        return _open_own(ref, where, device)
    if ref.model.partition(":")[0] == CLEAN_FID:
        return _open_inception(ref.model.partition(":")[2], where, device)
    if ref.model.startswith(TORCHVISION):
        return _open_torchvision(ref, where, device)
    return load_pretrained(lambda folder: _open_folder(Path(folder), ref, device), ref, where)


def _open_inception(file: str, where: str, device: str) -> FeatureNetwork:
    """Inception-v3 of StyleGAN's authors, as clean-fid has it: 2048 features of 299-pixel images.

    It is TorchScript, the one checkpoint here that brings code, which runs in TorchScript's own interpreter.
    """
    path = Path(file).expanduser() if file else Path(tempfile.gettempdir()) / INCEPTION_FILE
    try:
        if not file and not path.exists():
            _fetch_inception(path)
        layers = torch.jit.load(path, map_location=device).eval().layers
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}.model: cannot fetch or open clean-fid's Inception weights ({reason}): name a whole "
                        f"{INCEPTION_FILE} as clean-fid:FILE, or choose a timm model (local-dir:…, hf-hub:…)") from None
    _channels_last(layers)

    def forward(images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = layers.forward(_as_input(images, device).sub(128).div(128)).flatten(1)
        return found

    return FeatureNetwork(f"clean-fid {path.stem} {hash_file(path)}", INCEPTION_SIZE, 2048, forward)


def _fetch_inception(path: Path) -> None:
    """Put it where clean-fid itself looks for it; whole, as clean-fid would take half of it for the whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        Path(check_download_inception(folder)).replace(path)


def _open_folder(folder: Path, ref: Features, device: str) -> FeatureNetwork:
    if (folder / "open_clip_config.json").is_file():
        return _open_clip(folder, device)
    return _open_timm(folder, ref, device)


def _open_timm(folder: Path, ref: Features, device: str) -> FeatureNetwork:
    """A timm model without its classifier; inputs normalised by its own mean and standard deviation."""
    network = TimmFeatures(folder, ref.size).to(device)
    is_snapshot = folder.parent.name == "snapshots"
    version = f"{ref.model.removeprefix('hf-hub:')}@{folder.name}" if is_snapshot else hash_files(folder)
    return FeatureNetwork(f"timm {network.architecture} {version}", network.size, network.dim,
                          lambda images: network(_as_input(images, device)))


def _open_clip(folder: Path, device: str) -> FeatureNetwork:
    """The image encoder of an open_clip model, whose images are squeezed to a square, as CMMD's are, not cropped."""
    scorer = ClipScorer(str(folder), device)
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1)
                 for each in (scorer.visual.image_mean, scorer.visual.image_std))

    def forward(images: torch.Tensor) -> torch.Tensor:
        return scorer.encode_pixels(images.to(device).div(255).sub(mean).div(std))

    size = to_2tuple(scorer.visual.image_size)
    return FeatureNetwork(f"open_clip {scorer.version}", size, forward(torch.zeros(1, 3, *size)).shape[1], forward)


def _open_torchvision(ref: Features, where: str, device: str) -> FeatureNetwork:
    """A torchvision classifier without its last layer, of ImageNet's mean and standard deviation."""
    name = ref.model.removeprefix(TORCHVISION)
    if ref.weights is None:
        raise UserError(f"{where}.weights: name the file of {ref.model}'s weights, or take the same network from timm "
                        f"(hf-hub:timm/…)")
    try:
        network = torchvision.models.get_model(name, weights=None)
        network.load_state_dict(_state(Path(ref.weights).expanduser()))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"{where}: cannot open {ref.model} with {ref.weights} ({' '.join(str(error).split())[:200]}): "
                        "check both") from None
    _without_classifier(network, where)
    network.requires_grad_(False).eval().to(device)
    _channels_last(network)
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    size = INCEPTION_SIZE if name == "inception_v3" else TORCHVISION_SIZE

    def forward(images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = network(_as_input(images, device).div(255).sub(mean).div(std))
        return found

    dim = forward(torch.zeros(1, 3, *size)).shape[1]
    return FeatureNetwork(f"torchvision {name} {hash_file(Path(ref.weights).expanduser())}", size, dim, forward)


def _state(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _without_classifier(network: nn.Module, where: str) -> None:
    for name in ("fc", "classifier", "heads", "head"):
        if hasattr(network, name):
            setattr(network, name, nn.Identity())
            return
    raise UserError(f"{where}: {type(network).__name__} has no classifier that is known: take it from timm")


def _open_own(ref: Features, where: str, device: str) -> FeatureNetwork:
    module, _, name = str(ref.target).partition(":")
    try:
        found: FeatureNetwork = getattr(importlib.import_module(module), name).open(ref.model, device)
        dim = found(torch.zeros(1, 3, *found.size)).shape
    except (ImportError, AttributeError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{where}.target: cannot open {ref.target} ({' '.join(str(error).split())[:200]}): name "
                        "package.module:Class, whose open(folder, device) gives a FeatureNetwork") from error
    if dim != (1, found.dim):
        raise UserError(f"{where}.target: {ref.target} gives features of shape {tuple(dim)} for one image, and says "
                        f"that they have {found.dim} dimensions: mend it")
    return found


def _channels_last(network: Any) -> None:
    """Lay convolutions' weights out as they are the fastest in, on CPUs and GPUs; TorchScript modules, too."""
    for value in network.parameters():
        if value.ndim == 4:
            value.data = value.data.contiguous(memory_format=torch.channels_last)


def _as_input(images: torch.Tensor, device: str) -> torch.Tensor:
    return images.to(device, memory_format=torch.channels_last)


# --- features ------------------------------------------------------------------------------------------------------


def features(images: Iterable[Image.Image | np.ndarray], network: FeatureNetwork, batch_size: int,
             tell: Callable[[int], object] = lambda num_images: None) -> np.ndarray:
    """Features of images in memory, (N, D) float64, in their order.

    Args:
        images: RGB, any sizes; or arrays (H, W, 3) uint8.
        network: see `open_network`.
        batch_size: images at once.
        tell: called with the number of images of every finished batch.

    Raises:
        ValueError: an array is of another shape or type: floats in [0, 1] would be taken for black.
    """
    stream = iter(images)
    batches = []
    while batch := [network.prepare(_checked(image)) for image in islice(stream, batch_size)]:
        batches.append(network(torch.stack(batch)))
        tell(len(batch))
    return np.concatenate(batches) if batches else np.zeros((0, network.dim))


def _checked(image: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
    if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
        raise ValueError(f"an image is an array (H, W, 3) uint8, not {image.shape} {image.dtype}")
    return image
