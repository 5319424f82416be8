"""The reader: a small convolutional network that tells what stands in every place of a scene's picture.

It judges pictures that models drew, so no part of the pipeline is trained with it or on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from recap.errors import UserError
from recap.world.scene import BACKGROUNDS, COLOURS, KINDS, PATTERNS, PLACES, SIZES, Scene

WEIGHTS = "model.safetensors"
SIDE = 32
"""Pixels of its input; other pictures are resized."""
NOTHING = len(KINDS)
"""The kind of an empty place."""
HEADS = {"kind": (len(PLACES), len(KINDS) + 1), "colour": (len(PLACES), len(COLOURS)),
         "size": (len(PLACES), len(SIZES)), "background": (1, len(BACKGROUNDS)), "pattern": (1, len(PATTERNS))}
"""What is told: of how many places, and among how many."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A shape that the reader found."""

    kind: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What the reader sees in a picture."""

    shapes: tuple[Seen, ...]
    """In the order of PLACES."""
    background: str
    pattern: str


class Reader(nn.Module):
    """Pictures (B, 3, 32, 32) in [−1, 1] → logits of every head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), _Block(32), _down(32, 64), _Block(64), _down(64, 96),
                                  _Block(96), _Block(96), nn.GroupNorm(8, 96), nn.SiLU(), nn.Conv2d(96, 32, 1))
        num_outputs = sum(places * classes for places, classes in HEADS.values())
        self.head = nn.Linear(32 * (SIDE // 4) ** 2, num_outputs)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Head → logits (B, places, classes)."""
        flat = self.head(self.stem(pixels).flatten(1))
        parts = flat.split([places * classes for places, classes in HEADS.values()], dim=1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(HEADS.items(), parts, strict=True)}

    @classmethod
    def open(cls, folder: Path, device: str) -> "Reader":
        """Load trained weights, in evaluation mode. `UserError` where they are not there or do not fit."""
        reader = cls()
        try:
            reader.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"no reader's weights in {folder} ({reason}): `recap world init` writes them") from None
        return reader.to(device).eval()

    def save(self, folder: Path) -> None:
        """Write the weights, fp16."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half() for name, value in self.state_dict().items()}, folder / WEIGHTS)

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> list[Reading]:
        """What stands where, in each picture."""
        pixels = torch.stack([_to_pixels(image) for image in images]).to(next(self.parameters()).device)
        best = {name: logits.argmax(-1).tolist() for name, logits in self(pixels).items()}
        return [_reading({name: rows[index] for name, rows in best.items()}) for index in range(len(images))]


class _Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                                  nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.body(x)
        return result


def _down(width: int, wider: int) -> nn.Module:
    return nn.Conv2d(width, wider, 3, stride=2, padding=1)


def _to_pixels(image: Image.Image) -> torch.Tensor:
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _reading(best: dict[str, list[int]]) -> Reading:
    kinds, colours, sizes = list(KINDS), list(COLOURS), list(SIZES)
    shapes = tuple(
        Seen(kinds[kind], colours[colour], sizes[size], place)
        for place, kind, colour, size in zip(PLACES, best["kind"], best["colour"], best["size"], strict=True)
        if kind != NOTHING)
    return Reading(shapes, list(BACKGROUNDS)[best["background"][0]], PATTERNS[best["pattern"][0]])


# --- training ------------------------------------------------------------------------------------------------------


def targets(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Head → class of every place (B, places) int64; −100, which the loss passes over, where there is nothing."""
    rows: dict[str, list[list[int]]] = {name: [] for name in HEADS}
    for scene in scenes:
        at = {shape.place: shape for shape in scene.shapes}
        here = [at.get(place) for place in PLACES]
        rows["kind"].append([list(KINDS).index(shape.kind) if shape else NOTHING for shape in here])
        rows["colour"].append([list(COLOURS).index(shape.colour) if shape else -100 for shape in here])
        rows["size"].append([list(SIZES).index(shape.size) if shape else -100 for shape in here])
        rows["background"].append([list(BACKGROUNDS).index(scene.background.colour)])
        rows["pattern"].append([PATTERNS.index(scene.background.pattern)])
    return {name: torch.tensor(values) for name, values in rows.items()}


def reader_loss(logits: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over the heads of the cross-entropy, a scalar."""
    losses = [F.cross_entropy(logits[name].flatten(0, 1), wanted[name].flatten()) for name in HEADS]
    return torch.stack(losses).sum()


def agrees(reading: Reading, scene: Mapping[str, Any]) -> dict[str, bool]:
    """How a reading compares with a scene's metadata (see `Scene.metadata`): `objects` (kind and colour right in all
    places), `sizes` (of all shapes too), `background` (colour and pattern).
    """
    seen = {shape.place: (shape.kind, shape.colour) for shape in reading.shapes}
    objects = seen == {thing["place"]: (thing["kind"], thing["colour"]) for thing in scene["objects"]}
    sizes = {shape.place: shape.size for shape in reading.shapes}
    return {
        "objects": objects,
        "sizes": objects and sizes == {thing["place"]: thing["size"] for thing in scene["objects"]},
        "background": {"colour": reading.background, "pattern": reading.pattern} == scene["background"],
    }
