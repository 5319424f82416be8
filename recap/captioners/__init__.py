"""Captioners: one protocol, one file for each family."""

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from PIL import Image

from recap.config import Captioner as CaptionerConfig
from recap.config import Finetune, Style
from recap.errors import UserError

REGISTRY = {"blip2": "recap.captioners.blip2:Blip2"}
"""Family → where its class is; imported when it is asked for."""


@dataclass(frozen=True, slots=True)
class Caption:
    """What a captioner says of an image in one style."""

    text: str
    ended: bool
    """Whether the captioner ended by itself, before the style's token limit."""


class Captioner(Protocol):
    """From pixels to captions in any style; and to a loss, for tuning."""

    def preprocess(self, images: list[Image.Image]) -> torch.Tensor:
        """RGB images → pixel values (B, 3, H, W) as the vision model takes them, on the CPU."""

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the language model sees of the images, (B, N, D): computed once, whatever the number of styles."""

    def caption(self, features: torch.Tensor, style: Style) -> list[Caption]:
        """Greedy captions of encoded images."""

    def loss(self, pixel_values: torch.Tensor, prompts: list[str], captions: list[str]) -> torch.Tensor:
        """Mean negative log-likelihood of the captions' tokens, a scalar; what the prompt says is not learned."""

    def num_tokens(self, caption: str) -> int:
        """How many tokens of a caption the loss is a mean over, its end included."""

    def fit(self, caption: str, max_tokens: int) -> str:
        """The caption, cut at the last sentence end (else the last word) within `max_tokens`, if it is longer."""

    def add_adapter(self, config: Finetune) -> None:
        """Make what this family tunes trainable."""

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Name → parameter that training changes."""

    def set_training(self, training: bool) -> None:
        """Dropout on or off."""

    def save(self, folder: Path) -> None:
        """Write what training changed, in the format that the family's users know."""


def open_captioner(config: CaptionerConfig, device: str, adapter: Path | None = None) -> Captioner:
    """Load a captioner, with a tuned adapter or as its base is."""
    if config.family not in REGISTRY:
        near = difflib.get_close_matches(config.family, REGISTRY, n=1) or list(REGISTRY)
        raise UserError(f"captioner.family: no captioner {config.family!r}: did you mean {near[0]}?")
    module, name = REGISTRY[config.family].split(":")
    return cast(Captioner, getattr(importlib.import_module(module), name).open(config, device, adapter))
