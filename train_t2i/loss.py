"""The denoising loss."""

import torch
from torch import nn

ZERO_SNR = 1e-12
"""ᾱ below which a noise level has no signal."""


class NoiseLevels(nn.Module):
    """The forward process q(x_t | x_0) of a scheduler's timesteps, and what its UNet predicts of it."""

    alphas_cumprod: torch.Tensor

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str) -> None:
        """Keep ᾱ, (T,), and the kind of prediction: `epsilon` or `v_prediction`."""
        super().__init__()
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {prediction_type!r}: known are epsilon and v_prediction")
        self.prediction_type = prediction_type
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """q(x_t | x_0), Ho et al. 2020, Eq. 4: √ᾱ·x + √(1−ᾱ)·ε. (B, C, H, W); timesteps (B,) int64."""
        alpha_bar = self._alpha_bar(timesteps)
        return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the UNet is to predict, (B, C, H, W).

        `epsilon`: the noise (Ho et al. 2020, Eq. 14). `v_prediction`: α·ε − σ·x (Salimans & Ho 2022, appendix D).
        """
        if self.prediction_type == "epsilon":
            return noise
        alpha_bar = self._alpha_bar(timesteps)
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """min(SNR, γ) on the error of x_0 (Hang et al. 2023, section 3.4), as weights (B,) of what is predicted.

        The error of ε is SNR times that of x_0, that of v is SNR + 1 times; so min(1, γ/SNR), and
        min(SNR, γ)/(SNR + 1). The paper's schedules have no level of SNR 0. There v's weight would be 0, and a level
        that sampling starts from would never be trained: it is 1, as for ε.
        """
        alpha_bar = self.alphas_cumprod[timesteps]
        sigma2 = (1 - alpha_bar).clamp_min(ZERO_SNR)
        snr = alpha_bar / sigma2
        if self.prediction_type == "epsilon":
            return (gamma / snr.clamp_min(ZERO_SNR)).clamp_max(1)
        weights = snr.clamp_max(gamma) / (snr + 1)
        return torch.where(alpha_bar < ZERO_SNR, torch.ones_like(weights), weights)

    def _alpha_bar(self, timesteps: torch.Tensor) -> torch.Tensor:
        return self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)


def per_sample_mse(prediction: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, (B,) float32."""
    return (prediction.float() - wanted.float()).square().mean(dim=(1, 2, 3))
