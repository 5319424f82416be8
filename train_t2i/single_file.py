"""A pipeline as one file in the layout of the original code, which AUTOMATIC1111, ComfyUI and kohya's scripts read.

The names are those of the original modules: `UNetModel` and `AutoencoderKL` of CompVis/stable-diffusion and
Stability-AI/generative-models, transformers' CLIP, and open_clip's text transformer. Which block has which number
follows from the configuration, so that a model of any size is written by the same rules.
"""

import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError
from safetensors.torch import save_file

from recap.checkpoint import Tensors, with_prefix
from recap.errors import UserError
from recap.storage import discard, publish, room_for, temporary

Places = dict[str, str]
"""Path of a module in diffusers → its path in the original."""
Rules = tuple[tuple[str, str], ...]
"""Pattern of the path below such a module → the path there in the original. What no pattern matches has no name."""

INSIDE_UNET: Rules = (
    ("", ""), ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
    (r"norm|proj_in|proj_out", r"\g<0>"),
    (r"transformer_blocks\.\d+\.(norm[123]|attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))", r"\g<0>"))
INSIDE_VAE: Rules = (
    ("", ""), (r"(norm|conv)[12]", r"\g<0>"), ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"), (r"to_([qkv])", r"\1"), (r"to_out\.0", "proj_out"))
IN_CLIP: Places = {name: name for name in ("embeddings", "encoder.layers", "final_layer_norm")}
INSIDE_CLIP: Rules = ((r"|(token|position)_embedding", r"\g<0>"),
                      (r"\d+\.(self_attn\.([qkv]|out)_proj|layer_norm[12]|mlp\.fc[12])", r"\g<0>"))
IN_OPEN_CLIP: Places = {
    "embeddings.token_embedding": "token_embedding", "embeddings.position_embedding": "positional_embedding",
    "encoder.layers": "transformer.resblocks", "final_layer_norm": "ln_final", "text_projection": "text_projection"}
INSIDE_OPEN_CLIP: Rules = (
    ("", ""), (r"(\d+)\.layer_norm([12])", r"\1.ln_\2"), (r"(\d+)\.self_attn\.(in|out)_proj", r"\1.attn.\2_proj"),
    (r"(\d+)\.mlp\.fc1", r"\1.mlp.c_fc"), (r"(\d+)\.mlp\.fc2", r"\1.mlp.c_proj"))
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""diffusers' word → that of the Stability AI model metadata standard."""


def write_single_file(pipe: Any, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a pipeline as one `.safetensors` file, whole or not at all.

    The file holds weights. Who reads it takes the rest from the kind of model: the VAE's scaling factor, the number of
    heads, the activations, the noise levels. A v-prediction XL model is marked as such; of a 2.x one readers find out
    by trying; of a 1.x one they have to be told (ComfyUI: ModelSamplingDiscrete, AUTOMATIC1111: a YAML beside it).

    Args:
        pipe: `StableDiffusionPipeline` (1.x or 2.x) or `StableDiffusionXLPipeline`, adapters fused; it stays as it is.
        path: a path, or a URL as recap.storage takes it; what was there is replaced.
        dtype: of all weights in the file, a floating one.

    Raises:
        UserError: another kind of pipeline, a module that the layout has no name for, a weight that `dtype` cannot
            hold, or no space.
    """
    tensors = {name: _stored(name, tensor, dtype) for name, tensor in original_tensors(pipe).items()}
    metadata = _metadata(pipe, Path(path).stem)
    built = temporary(str(path))
    try:
        with room_for(built):
            _save(tensors, built, metadata)
            publish(built, str(path))
    finally:
        discard(built, str(path))


def original_tensors(pipe: Any) -> Tensors:
    """A pipeline's weights by their names in the original layout, of the dtype and on the device that they have.

    Raises:
        UserError: see `write_single_file`.
    """
    kind = _kind(pipe)
    vae = _renamed("vae", pipe.vae.state_dict(), _vae_places(pipe.vae.config), INSIDE_VAE)
    parts = {
        "model.diffusion_model": _renamed("unet", pipe.unet.state_dict(), _unet_places(pipe.unet.config, kind),
                                          INSIDE_UNET),
        # The attention's linear layers are 1×1 convolutions in the original.
        "first_stage_model": {name: value[:, :, None, None] if value.ndim == 2 else value
                              for name, value in vae.items()}}
    if kind == "xl":
        parts["conditioner.embedders.0.transformer.text_model"] = _clip(pipe.text_encoder)
        parts["conditioner.embedders.1.model"] = _open_clip("text_encoder_2", pipe.text_encoder_2)
    elif kind == "v2":  # of 24 layers, the last of which no reader uses and diffusers does not hold
        parts["cond_stage_model.model"] = _open_clip("text_encoder", pipe.text_encoder)
    else:
        parts["cond_stage_model.transformer.text_model"] = _clip(pipe.text_encoder)
    marks = _marks(pipe) if kind == "xl" else {}
    return marks | {name: value for prefix, part in parts.items() for name, value in with_prefix(prefix, part).items()}


# --- the kinds -----------------------------------------------------------------------------------------------------


def _kind(pipe: Any) -> str:
    """`v1`, `v2` or `xl`; UserError for what is none of them, or lacks a part."""
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise UserError(f"{type(pipe).__name__}: only Stable Diffusion 1.x, 2.x and XL have such a file: give a "
                        "StableDiffusionPipeline or a StableDiffusionXLPipeline")
    is_xl = isinstance(pipe, StableDiffusionXLPipeline)
    for part in ("unet", "vae", "text_encoder", *(("text_encoder_2",) if is_xl else ())):
        if getattr(pipe, part) is None:
            raise UserError(f"{type(pipe).__name__} without {part}: a single file holds all parts: load it with them")
    if _prediction(pipe) not in PREDICTIONS:
        raise UserError(f"scheduler: prediction_type {_prediction(pipe)!r} is none that readers of single files know: "
                        f"have {' or '.join(PREDICTIONS)}")
    return "xl" if is_xl else "v2" if pipe.unet.config.use_linear_projection else "v1"


def _prediction(pipe: Any) -> str:
    return str(pipe.scheduler.config.get("prediction_type", "epsilon"))


def _marks(pipe: Any) -> Tensors:
    """Empty tensors, (0,), by whose names ComfyUI and stable-diffusion.cpp know an XL model that predicts v."""
    is_v, is_zero_snr = _prediction(pipe) == "v_prediction", pipe.scheduler.config.get("rescale_betas_zero_snr", False)
    return {name: torch.zeros(0) for name, is_so in (("v_pred", is_v), ("ztsnr", is_v and is_zero_snr)) if is_so}


def _metadata(pipe: Any, title: str) -> dict[str, str]:
    """The header's: fields of github.com/Stability-AI/ModelSpec 1.0.0, as far as the pipeline tells them."""
    prediction = PREDICTIONS[_prediction(pipe)]
    architecture, code = {
        "v1": ("stable-diffusion-v1", "CompVis/stable-diffusion"),
        "v2": (f"stable-diffusion-v2-{'768-v' if prediction == 'v' else '512'}", "Stability-AI/stablediffusion"),
        "xl": ("stable-diffusion-xl-v1-base", "Stability-AI/generative-models")}[_kind(pipe)]
    metadata = {"sai_model_spec": "1.0.0", "architecture": architecture, "title": title,
                "implementation": f"https://github.com/{code}", "prediction_type": prediction}
    if isinstance(size := pipe.unet.config.sample_size, int):
        side = size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        metadata["resolution"] = f"{side}x{side}"
    return {"format": "pt", **{f"modelspec.{name}": value for name, value in metadata.items()}}


# --- the names -----------------------------------------------------------------------------------------------------


def _unet_places(config: Any, kind: str) -> Places:
    """The original numbers its blocks through all levels; a level's last one going down is its downsampler."""
    places = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
              "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
              "mid_block.resnets.1": "middle_block.2"}
    if kind == "xl":
        places |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    layers = config.layers_per_block
    layers = [layers] * len(config.block_out_channels) if isinstance(layers, int) else list(layers)
    for way, blocks, number, more in (("down", "input_blocks", 1, 0), ("up", "output_blocks", 0, 1)):
        for level, num_layers in enumerate(layers if way == "down" else reversed(layers)):
            for layer in range(num_layers + more):
                places[f"{way}_blocks.{level}.resnets.{layer}"] = f"{blocks}.{number + layer}.0"
                places[f"{way}_blocks.{level}.attentions.{layer}"] = f"{blocks}.{number + layer}.1"
            number += num_layers + 1
            behind = 2 if "CrossAttn" in config.up_block_types[level] else 1  # an upsampler, in the level's last block
            sampler = "0.op" if way == "down" else f"{behind}.conv"
            places[f"{way}_blocks.{level}.{way}samplers.0.conv"] = f"{blocks}.{number - 1}.{sampler}"
    return places


def _vae_places(config: Any) -> Places:
    """The original numbers the decoder's levels by resolution, from the finest on, as the encoder's."""
    places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half, way in (("encoder", "down"), ("decoder", "up")):
        places |= {f"{half}.{mine}": f"{half}.{theirs}" for mine, theirs in (
            ("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out"),
            ("mid_block.resnets.0", "mid.block_1"), ("mid_block.attentions.0", "mid.attn_1"),
            ("mid_block.resnets.1", "mid.block_2"))}
        levels = range(len(config.block_out_channels))
        for mine, level in zip(levels, levels if way == "down" else reversed(levels), strict=True):
            places[f"{half}.{way}_blocks.{mine}.{way}samplers.0.conv"] = f"{half}.{way}.{level}.{way}sample.conv"
            for layer in range(config.layers_per_block + 1):
                places[f"{half}.{way}_blocks.{mine}.resnets.{layer}"] = f"{half}.{way}.{level}.block.{layer}"
    return places


def _clip(encoder: Any) -> Tensors:
    """Of transformers' CLIP, which the original uses too; with a buffer that it had then."""
    named = _renamed("text_encoder", _text_state(encoder), IN_CLIP, INSIDE_CLIP)
    return named | {"embeddings.position_ids": torch.arange(encoder.config.max_position_embeddings)[None]}


def _open_clip(what: str, encoder: Any) -> Tensors:
    """Of open_clip's text transformer: q, k and v are one matrix, and two parameters are no modules."""
    state: Tensors = {}
    for name, value in (own := _text_state(encoder)).items():
        if ".q_proj." in name:
            parts = [own[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            state[name.replace(".q_proj.", ".in_proj.")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            state[name] = value.T if name == "text_projection.weight" else value
    named = _renamed(what, state, IN_OPEN_CLIP, INSIDE_OPEN_CLIP)
    bare = {re.sub(r"^(positional_embedding|text_projection)\.weight$", r"\1", name).replace(".in_proj.", ".in_proj_"):
            value for name, value in named.items()}
    # Of training alone, and of the published models at CLIP's ceiling; open_clip has one, transformers' encoder none.
    return bare | ({"logit_scale": torch.tensor(math.log(100))} if "text_projection" in bare else {})


def _text_state(encoder: Any) -> Tensors:
    return {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}


def _renamed(what: str, state: Tensors, places: Places, rules: Rules) -> Tensors:
    """All of a part's tensors, unchanged; UserError for one that has no name in the original."""
    named = {}
    for name, value in state.items():
        module, _, parameter = name.rpartition(".")
        if (original := _original(module.split("."), places, rules)) is None:
            raise UserError(f"{what}: the original layout has no name for {name}: give a plain Stable Diffusion, with "
                            "adapters fused and unloaded (fuse_lora, unload_lora_weights)")
        named[f"{original}.{parameter}"] = value
    return named


def _original(steps: list[str], places: Places, rules: Rules) -> str | None:
    for length in range(len(steps), 0, -1):
        place, rest = places.get(".".join(steps[:length])), ".".join(steps[length:])
        for pattern, template in rules if place is not None else ():
            if found := re.fullmatch(pattern, rest):
                return f"{place}.{found.expand(template)}".removesuffix(".")
    return None


# --- the file ------------------------------------------------------------------------------------------------------


def _stored(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as the file holds it: on the CPU, contiguous, of `dtype` unless it holds whole numbers."""
    stored = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
    if not stored.isfinite().all():
        raise UserError(f"{name} has values that are not finite in {dtype}: write float32, or, if they are not finite "
                        "there either, take an earlier checkpoint")
    return stored


def _save(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # which has the system's answer in words alone
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise
