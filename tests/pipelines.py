"""Tiny pipelines of Stable Diffusion 1.x, 2.x and XL: real classes, random weights."""

import copy
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from recap.clip_bpe import VOCAB_SIZE, clip_tokenizer

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
STOCK = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def text_config(width: int, layers: int, act: str = "quick_gelu", heads: int = 4, projection: int = 24) -> Any:
    return CLIPTextConfig(vocab_size=VOCAB_SIZE, hidden_size=width, intermediate_size=4 * width, hidden_act=act,
                          num_hidden_layers=layers, num_attention_heads=heads, projection_dim=projection,
                          bos_token_id=49406, eos_token_id=49407)


def unet(widths: tuple[int, ...], context: int, **more: Any) -> Any:
    """As 1.x and 2.x have it: attention in all levels but the coarsest."""
    last = len(widths) - 1
    return UNet2DConditionModel(**{
        "sample_size": 8, "block_out_channels": widths, "layers_per_block": 2, "cross_attention_dim": context,
        "attention_head_dim": 8, "norm_num_groups": 8, "down_block_types": (CROSS_DOWN,) * last + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + (CROSS_UP,) * last, **more})


def vae(widths: tuple[int, ...], groups: int = 8) -> Any:
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * len(widths), block_out_channels=widths,
                         up_block_types=("UpDecoderBlock2D",) * len(widths), layers_per_block=2, latent_channels=4,
                         norm_num_groups=groups)


def padding_with_an_exclamation_mark() -> Any:
    """The tokenizer of 2.x, and the second of XL, which read one as padding in a text as well."""
    tokenizer = copy.deepcopy(clip_tokenizer())
    tokenizer.add_special_tokens({"pad_token": "!"})
    return tokenizer


def sd(text: Any, unet: Any, vae: Any, tokenizer: Any = None, **scheduler: Any) -> Any:
    with torch.device("cpu"):  # it computes with what it makes, also where the models are made without values
        noise: Any = DDIMScheduler(clip_sample=False, **STOCK, **scheduler)
    return StableDiffusionPipeline(vae, CLIPTextModel(text), tokenizer or clip_tokenizer(), unet, noise, None, None,
                                   requires_safety_checker=False)


def xl(text: Any, text_2: Any, vae: Any, unet: Any, **scheduler: Any) -> Any:
    with torch.device("cpu"):
        noise: Any = EulerDiscreteScheduler(**STOCK, **scheduler)
    return StableDiffusionXLPipeline(vae, CLIPTextModel(text), CLIPTextModelWithProjection(text_2), clip_tokenizer(),
                                     padding_with_an_exclamation_mark(), unet, noise, add_watermarker=False)


def sd1() -> Any:
    pipe = sd(text_config(24, 2), unet((16, 32, 48, 48), 24), vae((16, 24, 32)))
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    return pipe


def sd2() -> Any:
    return sd(text_config(32, 3, "gelu"), unet((16, 32, 48, 48), 32, use_linear_projection=True,
              attention_head_dim=[2, 4, 6, 6]), vae((16, 24, 32)), padding_with_an_exclamation_mark(),
              prediction_type="v_prediction")


def sdxl(**scheduler: Any) -> Any:
    return xl(text_config(16, 2), text_config(32, 3, "gelu", projection=24), vae((16, 24, 32)), unet(
        (16, 32, 48), 48, use_linear_projection=True, attention_head_dim=[2, 4, 6], addition_time_embed_dim=8,
        transformer_layers_per_block=[1, 2, 3], projection_class_embeddings_input_dim=6 * 8 + 24,
        addition_embed_type="text_time", down_block_types=("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, "UpBlock2D")), **scheduler)


def models(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def stirred(pipe: Any) -> Any:
    """With other values in each tensor, so that no two norms are equal, which fp16 holds exactly."""
    torch.manual_seed(0)
    for part in models(pipe).values():
        for value in part.parameters():
            value.data.add_(0.05 * torch.randn(value.shape)).copy_(value.data.half().float())
    return pipe
