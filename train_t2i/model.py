"""What is trained: a pipeline's UNet and CLIP text encoder, with its frozen VAE, as one module that gives a loss."""

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import nn

from recap.errors import UserError
from train_t2i.config import Train
from train_t2i.data import Batch
from train_t2i.loss import add_noise, per_sample_mse, target
from train_t2i.text import encode_prompts


class Diffusion(nn.Module):
    """Stable Diffusion as a function from a batch to its loss."""

    def __init__(self, pipe: StableDiffusionPipeline, config: Train) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.vae = pipe.unet, pipe.text_encoder, pipe.vae
        self.tokenizer = pipe.tokenizer
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)  # the training noise levels of any sampler
        self.max_windows = config.max_windows
        self.num_cut = 0
        self.vae.requires_grad_(False)
        self.unet.requires_grad_(True)
        self.text_encoder.requires_grad_(config.train_text_encoder)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            if config.train_text_encoder:
                self.text_encoder.gradient_checkpointing_enable()
        _check_resolution(pipe, config.resolution)

    def train(self, mode: bool = True) -> "Diffusion":
        super().train(mode)
        self.vae.eval()
        return self

    def forward(self, batch: Batch) -> torch.Tensor:
        """Denoising loss of each sample, (B,) float32. All randomness comes from the samples' own seeds."""
        device = self.unet.device
        draws = [self._draw(seed, batch.pixels.shape[-1]) for seed in batch.seeds]
        latent_noise, noise, timesteps = (torch.stack(parts).to(device) for parts in zip(*draws, strict=True))
        with torch.no_grad():
            posterior = self.vae.encode(batch.pixels.to(device)).latent_dist
            latents = (posterior.mean + posterior.std * latent_noise) * self.vae.config.scaling_factor
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_encoder_trained):
            embeds = encode_prompts(batch.captions, self.tokenizer, self.text_encoder, self.max_windows)
        self.num_cut += embeds.num_cut
        noisy = add_noise(self.scheduler, latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, encoder_hidden_states=embeds.states,
                               encoder_attention_mask=embeds.mask).sample
        return per_sample_mse(prediction, target(self.scheduler, latents, noise, timesteps))

    @property
    def text_encoder_trained(self) -> bool:
        return any(p.requires_grad for p in self.text_encoder.parameters())

    def _draw(self, seed: int, resolution: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise of the VAE's posterior and of the diffusion (C, H, W), and a timestep, for one sample.

        Drawn on the CPU: the same for a seed on any device, in any batch.
        """
        generator = torch.Generator().manual_seed(seed)
        side = resolution // (2 ** (len(self.vae.config.block_out_channels) - 1))
        shape = (self.vae.config.latent_channels, side, side)
        timestep = torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), timestep


def _check_resolution(pipe: StableDiffusionPipeline, resolution: int) -> None:
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1 + len(pipe.unet.config.block_out_channels) - 1)
    if resolution % factor:
        near = max(factor, round(resolution / factor) * factor)
        raise UserError(f"train.resolution: {resolution} is not a multiple of {factor}, as this VAE and UNet need: "
                        f"try {near}")
