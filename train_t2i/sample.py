"""Drawing with a diffusers pipeline: prompts of any length, one seed an image, no image dependent on its batch."""

from typing import cast

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from PIL import Image

from recap.chunks import split
from recap.config import Model
from recap.pretrained import load_pretrained
from train_t2i.text import encode_prompts, encode_unconditional


def load_pipeline(ref: Model, where: str, device: str) -> StableDiffusionPipeline:
    """Open a Stable Diffusion 1.x or 2.x pipeline, float32, safetensors only, without a safety checker.

    Args:
        ref: hub id or diffusers folder.
        where: the table that names it, for messages.
        device: a torch device.
    """
    # The safety checker blanks pictures, which would count against an arm; nothing drawn here is shown unasked.
    logging.disable_progress_bar()
    pipe = load_pretrained(StableDiffusionPipeline.from_pretrained, ref, where, use_safetensors=True,
                           safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    # After loading: the keyword for it has two names among diffusers' releases, and transformers 5 another default.
    return cast(StableDiffusionPipeline, pipe.to(device, torch.float32))


def plan(pipe: StableDiffusionPipeline, prompts: list[str], batch_size: int) -> list[list[int]]:
    """Indices of `prompts` in batches, each of one number of windows (stock pipelines take no mask)."""
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(num_windows(pipe, prompt), []).append(index)
    return [group[start:start + batch_size] for _, group in sorted(groups.items())
            for start in range(0, len(group), batch_size)]


def num_windows(pipe: StableDiffusionPipeline, prompt: str) -> int:
    return len(split(prompt, pipe.tokenizer).ids)


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index`, the same for every arm, in 32 bits: torch's generator on the CPU ignores all others.

    Runs begin far from each other (Knuth's multiplicative hashing), so that they do not overlap.
    """
    return (seed * 2_654_435_769 + index) % 2 ** 32


@torch.no_grad()
def draw(pipe: StableDiffusionPipeline, prompts: list[str], seeds: list[int], *, num_inference_steps: int,
         guidance_scale: float) -> list[Image.Image]:
    """Draw one picture a prompt. All prompts must have one number of windows (see `plan`)."""
    embeds = encode_prompts(prompts, pipe.tokenizer, pipe.text_encoder)
    if embeds.mask is not None:
        raise ValueError("prompts of different numbers of windows in one batch: group them with plan()")
    windows = embeds.states.shape[1] // 77
    negative = encode_unconditional(windows, pipe.tokenizer, pipe.text_encoder)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on any device
    drawn = pipe(prompt_embeds=embeds.states, negative_prompt_embeds=negative.expand(len(prompts), -1, -1),
                 generator=generators, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    return cast(list[Image.Image], drawn.images)
