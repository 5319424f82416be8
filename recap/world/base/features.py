"""The network of the Fréchet distance: a small ConvNeXt of timm, taught to tell what is in a drawing."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from recap.rundir import StageDir
from recap.world.base.drawings import Drawings, to_float
from recap.world.base.fit import Schedule, fit
from recap.world.scene import BACKGROUNDS, COLOURS, KINDS, PATTERNS, PLACES, SIZES, Scene

SCHEDULE = Schedule(steps=3000, batch_size=64, lr=2e-3)
NUM_DRAWINGS = 30_000
ARCHITECTURE: dict[str, Any] = {"depths": [1, 1, 2, 1], "dims": [32, 48, 64, 64], "patch_size": 2}
NUM_FEATURES = 64
ANSWERS = ([f"{colour} {kind}" for colour in COLOURS for kind in KINDS] + [f"{size} {kind}" for size in SIZES
           for kind in KINDS] + list(PLACES) + list(BACKGROUNDS) + list(PATTERNS))
"""What it says yes or no to: is there such a shape, is the place taken, is this the background."""


def build(size: int, num_answers: int = len(ANSWERS)) -> nn.Module:
    """The network, with or without (0) its answers."""
    model: nn.Module = timm.create_model("convnext_atto", num_classes=num_answers, **ARCHITECTURE)
    return model


def train(stage: StageDir, seed: int, size: int, schedule: Schedule) -> dict[str, float]:
    """Write `stage.path/model`; returns the share of held-out answers that are right."""
    torch.manual_seed(seed)
    model = build(size)
    drawings = Drawings.draw(f"{seed}/features", NUM_DRAWINGS, size)

    def loss(step: int) -> torch.Tensor:
        pixels, scenes = drawings.batch(step, schedule.batch_size)
        return F.binary_cross_entropy_with_logits(model(pixels), _answers(scenes))

    fit(stage, "features", model, loss, schedule)
    held_out = Drawings.draw(f"{seed}/features/held out", 1000, size)
    with torch.no_grad():
        right = (model(to_float(held_out.pixels)) > 0) == (_answers(held_out.scenes) > 0)
    save(model, stage.path / "model", size)
    return {"answers_right": right.float().mean().item()}


def _answers(scenes: list[Scene]) -> torch.Tensor:
    """(B, ANSWERS) float32, 1 for yes."""
    return torch.tensor([[float(answer in _true_of(scene)) for answer in ANSWERS] for scene in scenes])


def _true_of(scene: Scene) -> set[str]:
    shapes = {text for shape in scene.shapes for text in (shape.name, f"{shape.size} {shape.kind}", shape.place)}
    return shapes | {scene.background.colour, scene.background.pattern}


def save(model: nn.Module, folder: Path, size: int) -> None:
    """A timm model folder without the answers, fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocessing = {"input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                     "crop_pct": 1.0}
    config = {"architecture": "convnext_atto", "num_classes": 0, "num_features": NUM_FEATURES,
              "model_args": ARCHITECTURE, "pretrained_cfg": {**preprocessing, "num_classes": 0, "first_conv": "stem.0",
                                                             "classifier": "head.fc"}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.half() for name, value in model.state_dict().items() if not name.startswith("head.fc")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
