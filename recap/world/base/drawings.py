"""Scenes drawn for the training of the base checkpoints, held in memory."""

from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from PIL import Image

from recap.world.scene import Scene, draw_scene, render


@dataclass(frozen=True, slots=True)
class Drawings:
    """Scenes and their pictures."""

    scenes: list[Scene]
    pixels: torch.Tensor
    """(N, 3, S, S) uint8."""

    @classmethod
    def draw(cls, name: str, count: int, size: int) -> "Drawings":
        """Draw `count` scenes of `size` pixels; `name` is their seed. Parts of other names share no scene's lot."""
        scenes = [draw_scene(Random(f"{name}/{index}")) for index in range(count)]
        return cls(scenes, to_pixels([render(scene, size) for scene in scenes]))

    def choose(self, step: int, size: int) -> list[int]:
        """Which scenes make up the batch of a step."""
        return Random(step).choices(range(len(self.scenes)), k=size)

    def batch(self, step: int, size: int) -> tuple[torch.Tensor, list[Scene]]:
        """The batch of a step: pixels (B, 3, S, S) float32 in [−1, 1], and the scenes."""
        chosen = self.choose(step, size)
        return to_float(self.pixels[chosen]), [self.scenes[index] for index in chosen]

    def images(self) -> list[Image.Image]:
        return to_images(self.pixels)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """uint8 pixels (N, 3, S, S) as pictures."""
    return [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """Pictures of one size as uint8 pixels (N, 3, S, S)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels as float32 in [−1, 1]."""
    return pixels.float() / 127.5 - 1
