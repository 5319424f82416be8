"""Any timm model as a network whose features FID and KID compare, behind clean-fid's resize.

Resizing decides as much as the network (Parmar et al. 2022, arXiv 2104.11222): all images go through PIL's bicubic
filter on floats, channel by channel, to the network's own input size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from cleanfid.resize import make_resizer
from PIL import Image
from safetensors import SafetensorError
from timm.data.config import resolve_model_data_config
from torch import nn


class TimmFeatures(nn.Module):
    """A timm model without its classifier, behind clean-fid's resize (Parmar et al. 2022, arXiv 2104.11222)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, folder: Path, size: int | None = None) -> None:
        """Open it, frozen; ValueError where it has no safetensors weights, or not one vector an image.

        Args:
            folder: of the model.
            size: side of its input in pixels, where that is not its own: a ViT's positions are interpolated.
        """
        super().__init__()
        if not (folder / "model.safetensors").is_file():
            raise ValueError(f"no model.safetensors in {folder} (pickled weights are not opened)")
        try:
            # With the checkpoint's own number of classes timm loads strictly: no layer can stay random unnoticed.
            empty: Any = timm.create_model(f"local-dir:{folder}")
            num_classes, sized = empty.pretrained_cfg["num_classes"], {} if size is None else {"img_size": size}
            self.network: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=num_classes,
                                                  **sized)
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        self.network.reset_classifier(0)
        settings = resolve_model_data_config(self.network)
        self.size: tuple[int, int] = (size, size) if size else settings["input_size"][1:]
        self.resizer = clean_resizer(self.size)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(settings[name]).view(3, 1, 1))
        self.requires_grad_(False).eval()
        self.network.to(memory_format=torch.channels_last)  # which convolutions are the faster in
        probe = self(torch.zeros(1, 3, *self.size))
        if probe.ndim != 2:
            raise ValueError(f"its features are of shape {tuple(probe.shape)}, not one vector an image")
        self.dim = probe.shape[1]
        self.architecture: str = self.network.pretrained_cfg["architecture"]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) float32 in [0, 255], as `resize` makes them → (N, D)."""
        found: torch.Tensor = self.network((images / 255 - self.mean) / self.std)
        return found

    def resize(self, image: Image.Image) -> torch.Tensor:
        """RGB of any size → (3, H, W) float32 in [0, 255], not rounded."""
        return torch.from_numpy(self.resizer(np.asarray(image))).permute(2, 0, 1)


def clean_resizer(size: tuple[int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """clean-fid's resize to (height, width): (H, W, 3) uint8 → (height, width, 3) float32 in [0, 255], not rounded."""
    height, width = size
    resize: Callable[[np.ndarray], np.ndarray] = make_resizer("PIL", False, "bicubic", (width, height))
    return resize
