"""The reader's training: drawings, blurred, shifted in tone and noisy as models' pictures are."""

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from recap.rundir import StageDir
from recap.world.base.drawings import Drawings
from recap.world.base.fit import Schedule, fit
from recap.world.reader import SIDE, Reader, agrees, reader_loss, targets

SCHEDULE = Schedule(steps=4000, batch_size=64, lr=1e-3)
NUM_DRAWINGS = 40_000


def build(size: int) -> Reader:
    """The reader looks at 32 pixels, whatever the size of the pictures."""
    return Reader()


def save(model: Reader, folder: Path, size: int) -> None:
    model.save(folder)


def train(stage: StageDir, seed: int, size: int, schedule: Schedule) -> dict[str, float]:
    """Write `stage.path/model`; returns the share of held-out drawings that are read without a fault."""
    torch.manual_seed(seed)
    model = build(size)
    drawings = Drawings.draw(f"{seed}/reader", NUM_DRAWINGS, SIDE)

    def loss(step: int) -> torch.Tensor:
        pixels, scenes = drawings.batch(step, schedule.batch_size)
        return reader_loss(model(worsened(pixels, step)), targets(scenes))

    fit(stage, "reader", model, loss, schedule)
    save(model, stage.path / "model", size)
    held_out = Drawings.draw(f"{seed}/reader/held out", 2000, SIDE)
    readings = model.read(held_out.images())
    found = [agrees(reading, scene.metadata(SIDE)) for reading, scene in zip(readings, held_out.scenes, strict=True)]
    return {"objects": sum(each["objects"] for each in found) / len(found),
            "everything": sum(all(each.values()) for each in found) / len(found)}


def worsened(pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """Half of the pictures blurred, all a little off in tone and noisy: (B, 3, S, S)."""
    generator, rng = torch.Generator().manual_seed(seed), Random(seed)
    count = len(pixels)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = torch.rand((count, 1, 1, 1), generator=generator) * (torch.rand((count, 1, 1, 1), generator=generator) < 0.5)
    mixed = pixels.lerp(blurred, blur)
    contrast = 1 + 0.1 * torch.randn((count, 1, 1, 1), generator=generator)
    tone = 0.05 * torch.randn((count, 3, 1, 1), generator=generator)
    noise = torch.randn(pixels.shape, generator=generator) * rng.uniform(0, 0.12)
    return (mixed * contrast + tone + noise).clamp(-1, 1)
