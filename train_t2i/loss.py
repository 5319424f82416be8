"""The denoising loss."""

import torch
from diffusers import SchedulerMixin


def target(scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor,
           timesteps: torch.Tensor) -> torch.Tensor:
    """What the UNet is to predict, by the scheduler's `prediction_type`.

    `epsilon`: the noise (Ho et al. 2020, Eq. 14). `v_prediction`: α·ε − σ·x (Salimans & Ho 2022, appendix D).

    Args:
        latents, noise: (B, C, H, W).
        timesteps: (B,) int64.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        alpha_bar = scheduler.alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    raise ValueError(f"prediction_type {kind!r}: known are epsilon and v_prediction")


def add_noise(scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor,
              timesteps: torch.Tensor) -> torch.Tensor:
    """q(x_t | x_0), Ho et al. 2020, Eq. 4: √ᾱ·x + √(1−ᾱ)·ε. (B, C, H, W)."""
    alpha_bar = scheduler.alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def per_sample_mse(prediction: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, (B,) float32."""
    return (prediction.float() - wanted.float()).square().mean(dim=(1, 2, 3))
