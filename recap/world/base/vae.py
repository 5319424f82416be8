"""The VAE: 32×32 pixels to 8×8 latents, taught to care for small objects."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from recap.rundir import StageDir
from recap.world.base.drawings import Drawings, to_float
from recap.world.base.fit import Schedule, fit
from recap.world.scene import BACKGROUNDS, PATTERNS, Background, Scene, render

SCHEDULE = Schedule(steps=5000, batch_size=32, lr=2e-3)
NUM_DRAWINGS = 20_000
OBJECT_WEIGHT = 5.0
"""How much more a pixel of an object counts than one of the background: else small objects lose their colours."""
KL_WEIGHT = 1e-6


def build(size: int) -> AutoencoderKL:
    """An AutoencoderKL: pictures (B, 3, S, S) in [−1, 1] → latents (B, 4, S/4, S/4)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=size)


def train(stage: StageDir, seed: int, size: int, schedule: Schedule) -> dict[str, float]:
    """Write `stage.path/model`, a diffusers folder; returns the loss on held-out drawings."""
    torch.manual_seed(seed)
    model = build(size).to(memory_format=torch.channels_last)
    drawings = Drawings.draw(f"{seed}/vae", NUM_DRAWINGS, size)
    backdrops = _backdrops(size)

    def loss_of(found: Drawings, step: int, count: int) -> torch.Tensor:
        pixels, scenes = found.batch(step, count)
        return vae_loss(model, pixels, torch.stack([backdrops[scene.background] for scene in scenes]), step)

    fit(stage, "vae", model, lambda step: loss_of(drawings, step, schedule.batch_size), schedule)
    held_out = Drawings.draw(f"{seed}/vae/held out", 1000, size)
    with torch.no_grad():
        figures = {"held_out_loss": loss_of(held_out, -1, 500).item()}
        latents = model.encode(to_float(held_out.pixels)).latent_dist.mean
        model.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    save(model, stage.path / "model", size)
    return figures


def save(model: AutoencoderKL, folder: Path, size: int) -> None:
    """A diffusers folder, fp16."""
    model.half().save_pretrained(folder)


def vae_loss(model: AutoencoderKL, pixels: torch.Tensor, backdrop: torch.Tensor, seed: int) -> torch.Tensor:
    """L1 + 2·MSE, OBJECT_WEIGHT-fold where a pixel differs from its background, + the KL term of Kingma & Welling 2014.

    Args:
        pixels, backdrop: (B, 3, S, S) in [−1, 1]; the scene, and its background alone.
        seed: of the posterior's noise.
    """
    weight = 1 + (OBJECT_WEIGHT - 1) * ((pixels - backdrop).abs().amax(1, keepdim=True) > 0.04).float()
    posterior = model.encode(pixels.to(memory_format=torch.channels_last)).latent_dist
    latents = posterior.sample(torch.Generator().manual_seed(seed))
    difference = model.decode(latents).sample - pixels
    fidelity = ((difference.abs() + 2 * difference.square()) * weight).sum() / (weight.sum() * 3)
    return fidelity + KL_WEIGHT * posterior.kl().mean()


def _backdrops(size: int) -> dict[Background, torch.Tensor]:
    """Every background without shapes, (3, S, S) float32 in [−1, 1]."""
    found = [Background(colour, pattern) for colour in BACKGROUNDS for pattern in PATTERNS]
    return {background: to_float(torch.from_numpy(np.array(render(Scene(background, ()), size))).permute(2, 0, 1))
            for background in found}
