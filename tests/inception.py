"""clean-fid's Inception with random weights, in the file format of the real one, which not every machine can have."""

from pathlib import Path
from typing import Any

import torch
import torchvision
from cleanfid.inception_pytorch import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
from torch import nn

BLOCKS = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2",
          "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a",
          "Mixed_7b", "Mixed_7c", "avgpool")


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        network: Any = torchvision.models.inception_v3(weights=None, init_weights=False, aux_logits=False)
        own = {"Mixed_5b": FIDInceptionA(192, 32), "Mixed_5c": FIDInceptionA(256, 64),
               "Mixed_5d": FIDInceptionA(288, 64),
               "Mixed_6b": FIDInceptionC(768, 128), "Mixed_6c": FIDInceptionC(768, 160),
               "Mixed_6d": FIDInceptionC(768, 160), "Mixed_6e": FIDInceptionC(768, 192),
               "Mixed_7b": FIDInceptionE_1(1280), "Mixed_7c": FIDInceptionE_2(2048)}
        self.layers = nn.Sequential(*(own.get(name) or getattr(network, name) for name in BLOCKS))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(images)
        return found


def random_inception(path: Path) -> None:
    """Write one whose features differ from image to image, as they do where every layer keeps its scale."""
    torch.manual_seed(0)
    network = Inception().eval()
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    torch.jit.script(network).save(str(path))  # type: ignore[no-untyped-call]
