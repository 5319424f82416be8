"""What is trained: a pipeline's UNet and CLIP text encoders, with its frozen VAE, as one module that gives a loss."""

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from peft import LoraConfig
from torch import nn

from recap.errors import UserError
from train_t2i.batch import Batch, Recipe
from train_t2i.config import Lora, Train
from train_t2i.encoder import DTYPES, moments, vae_dtype
from train_t2i.images import unit_of
from train_t2i.loss import NoiseLevels, per_sample_mse
from train_t2i.text import encode, text_encoders, tokenize, tokenizers, zeros_for_empty


class Diffusion(nn.Module):
    """Stable Diffusion 1.x, 2.x or XL as a function from a batch to its losses."""

    empty: torch.Tensor

    _no_split_modules = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
    """What FSDP shards as one, unless it is told otherwise."""

    def __init__(self, pipe: Any, config: Train, is_sharded: bool = False) -> None:
        """Make trainable what the table says, cast and freeze the rest. The pipeline shares the modules.

        Args:
            pipe: as `sample.load_pipeline` opens it.
            config: what is trained, and how.
            is_sharded: processes will hold pieces of the weights, which must be of one dtype then.

        Raises:
            UserError: the pipeline cannot be trained so.
        """
        super().__init__()
        check(pipe, config)
        self.unet, self.text_encoder = pipe.unet, pipe.text_encoder
        self._apart = [pipe.vae]  # not a part of this module: it is frozen, and never sharded
        if getattr(pipe, "text_encoder_2", None) is not None:
            self.text_encoder_2 = pipe.text_encoder_2
        self.encoders = text_encoders(pipe)
        self.min_snr_gamma = config.min_snr_gamma
        self.vae_scale, self.vae_shift = pipe.vae.config.scaling_factor, pipe.vae.config.get("shift_factor") or 0.0
        if config.zero_terminal_snr:
            pipe.scheduler = with_zero_terminal_snr(pipe.scheduler)
        self.levels = NoiseLevels(DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod,
                                  pipe.scheduler.config.prediction_type)
        self.zeros_for_empty = zeros_for_empty(pipe)
        self.register_buffer("empty", tokenize("", tokenizers(pipe)).ids, persistent=False)
        self.recipe = Recipe(tokenizers(pipe), self.vae.config.latent_channels,
                             2 ** (len(self.vae.config.block_out_channels) - 1),
                             len(self.levels.alphas_cumprod))
        self.vae.requires_grad_(False)
        choose_trained(pipe, config)
        self.vae.to(vae_dtype(self.vae, config.precision))
        if not is_sharded:
            self._cast_frozen(config.precision, is_lora=config.lora is not None)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            for encoder in self.encoders if self.text_encoder_trained else []:
                encoder.gradient_checkpointing_enable({"use_reentrant": False})
        self.vae.to(memory_format=torch.channels_last)  # convolutions are the faster in it, on CPUs too
        # 8-bit Adam's first step makes weights contiguous, and FSDP takes no others.
        if config.optimizer != "adamw8bit" and not is_sharded:
            self.unet.to(memory_format=torch.channels_last)
        if config.compile:
            self.unet.compile()

    def train(self, mode: bool = True) -> "Diffusion":
        super().train(mode)
        self.vae.eval()
        return self

    def forward(self, batch: Batch) -> torch.Tensor:
        """Denoising loss of each sample, (B,) float32; 0 for an empty place. All randomness is the batch's own."""
        latents = self.latents(batch)
        noisy = self.levels.add_noise(latents, batch.noise, batch.timesteps)
        noisy = noisy.contiguous(memory_format=torch.channels_last)  # the UNet's inside is then, too
        states, mask, added = self._condition(batch)
        prediction = self.unet(noisy, batch.timesteps, encoder_hidden_states=states, encoder_attention_mask=mask,
                               added_cond_kwargs=added).sample
        losses = per_sample_mse(prediction, self.levels.target(latents, batch.noise, batch.timesteps))
        if self.min_snr_gamma is not None:
            losses = losses * self.levels.min_snr_weights(batch.timesteps, self.min_snr_gamma)
        return losses * batch.weights

    @torch.no_grad()
    def latents(self, batch: Batch) -> torch.Tensor:
        """A draw from the VAE's posterior of each image, scaled: (B, C, h, w) float32."""
        found = moments(self.vae, batch.images) if batch.images.dtype == torch.uint8 else batch.images
        mean, logvar = found.float().chunk(2, dim=1)
        std = (0.5 * logvar.clamp(-30, 20)).exp()
        return (mean + std * batch.posterior_noise - self.vae_shift) * self.vae_scale

    def _condition(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor] | None]:
        """Text states (B, 77·n, D), their mask, and what Stable Diffusion XL's UNet is told beside them."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_encoder_trained):
            embeds = encode(batch.tokens, self.encoders)
        states, pooled = embeds.states, embeds.pooled
        if self.zeros_for_empty:
            is_text = torch.stack([(ids[0] != self.empty[0]).any() for ids in batch.tokens])
            states = states * is_text[:, None, None]
            pooled = pooled if pooled is None else pooled * is_text[:, None]
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": batch.size_ids}
        return states, embeds.mask, added

    @property
    def vae(self) -> Any:
        return self._apart[0]

    @property
    def text_encoder_trained(self) -> bool:
        return any(p.requires_grad for encoder in self.encoders for p in encoder.parameters())

    def parameter_groups(self, config: Train) -> list[dict[str, Any]]:
        """What the optimizer trains, each part at the learning rate that it rises to."""
        text = [p for encoder in self.encoders for p in encoder.parameters()]
        parts = [(list(self.unet.parameters()), config.lr), (text, config.text_encoder_lr or config.lr)]
        return [{"params": trained, "lr": lr, "peak_lr": lr} for parameters, lr in parts
                if (trained := [p for p in parameters if p.requires_grad])]

    def _cast_frozen(self, precision: str, is_lora: bool) -> None:
        """Frozen weights in the precision of the computation."""
        for part in (self.unet, *self.encoders):
            parameters = list(part.parameters())
            if any(p.requires_grad for p in parameters) and not is_lora:
                continue  # of a part that is trained whole, what no gradient reaches computes as the rest does
            for parameter in parameters:
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(DTYPES[precision])


def choose_trained(pipe: Any, config: Train) -> None:
    """Mark what of a pipeline is trained; with `config.lora`, add the adapters that are."""
    pipe.unet.requires_grad_(config.train_unet and config.lora is None)
    if config.lora and config.train_unet:
        _add_lora(pipe.unet, "unet", config.lora.unet, config.lora)
    encoders = text_encoders(pipe)
    for place, encoder in enumerate(encoders):
        # Of two, the states are those before the last layer. Of the first, nothing else is taken.
        unused = encoder.config.num_hidden_layers - 1 if len(encoders) == 2 and place == 0 else None
        encoder.requires_grad_(config.train_text_encoder and config.lora is None)
        if config.lora and config.train_text_encoder:
            _add_lora(encoder, "text_encoder", config.lora.text_encoder, config.lora, unused)
        if unused is not None:  # no gradient would reach these
            inner = getattr(encoder, "text_model", encoder)
            inner.encoder.layers[unused].requires_grad_(False)
            inner.final_layer_norm.requires_grad_(False)


def _add_lora(part: Any, key: str, names: list[str], lora: Lora, unused_layer: int | None = None) -> None:
    modules = [f".{name}" for name, _ in part.named_modules()]
    absent = [name for name in names if not any(module.endswith(f".{name}") for module in modules)]
    if absent or not names:  # the library asks for one of them only
        raise UserError(f"train.lora.{key}: {type(part).__name__} has no layers {', '.join(absent) or 'of no name'}: "
                        "name others by the ends of their names, as to_q or q_proj")
    try:
        part.add_adapter(LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha or lora.rank, lora_dropout=lora.dropout, target_modules=names,
            exclude_modules=None if unused_layer is None else rf".*\blayers\.{unused_layer}\..*",
            init_lora_weights="gaussian"))
    except ValueError as error:
        raise UserError(f"train.lora.{key}: {type(part).__name__} takes no adapters at {', '.join(names)}: name "
                        f"linear layers or convolutions ({' '.join(str(error).split())[:120]})") from None


def check(pipe: Any, config: Train) -> None:
    """Refuse, in one line, what this pipeline cannot be trained as.

    Raises:
        UserError: it is not a Stable Diffusion, or not for such images, or predicts something else.
    """
    if getattr(pipe, "unet", None) is None or pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise UserError(f"train.model: {config.model} is a {type(pipe).__name__}, whose UNet does not draw from text "
                        "alone: name Stable Diffusion 1.x, 2.x or XL")
    if pipe.vae.config.get("latents_mean") is not None:
        raise UserError(f"train.model: the VAE of {config.model} has latents of its own mean and deviation, which "
                        "Stable Diffusion 1.x, 2.x and XL do not: name one of those")
    unit = 2 ** (len(pipe.vae.config.block_out_channels) - 1 + len(pipe.unet.config.block_out_channels) - 1)
    if unit_of(config) % unit:
        key = "resolution" if config.resolution % unit else "buckets.step"
        value = config.resolution if key == "resolution" else config.buckets.step if config.buckets else 0
        near = max(unit, round(value / unit) * unit)
        raise UserError(f"train.{key}: {value} is not a multiple of {unit}, as this VAE and UNet need: try {near}")
    if "beta_schedule" not in pipe.scheduler.config:
        raise UserError(f"train.model: {config.model} has a {type(pipe.scheduler).__name__}, whose noise is not that "
                        "of Stable Diffusion 1.x, 2.x and XL: name one of those")
    found = pipe.scheduler.config.prediction_type
    if found not in ("epsilon", "v_prediction"):
        raise UserError(f"train.model: {config.model} predicts {found!r}; known are epsilon and v_prediction")
    if config.prediction_type not in (None, found):
        raise UserError(f"train.prediction_type: {config.prediction_type} is asked of {config.model}, which predicts "
                        f"{found}: leave it out, or name a checkpoint that was trained so")
    if config.zero_terminal_snr and found != "v_prediction":
        raise UserError(f"train.zero_terminal_snr: {config.model} predicts {found}, which says nothing where there is "
                        "no signal: name a checkpoint that predicts v, or leave it out")


def with_zero_terminal_snr(scheduler: Any) -> Any:
    """The scheduler with a last noise level of noise alone, from which sampling must start; DDIM where it has none."""
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if "rescale_betas_zero_snr" in scheduler.config:
        return type(scheduler).from_config(scheduler.config, **changes)
    return DDIMScheduler.from_config(scheduler.config, **changes, clip_sample=False)  # latents are not within ±1
