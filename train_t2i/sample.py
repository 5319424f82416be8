"""Drawing with a diffusers pipeline: prompts of any length, one seed an image, no image dependent on its batch.

python -m train_t2i.sample runs/NAME/seed-0/train/mix/pipeline "a long prompt …" --out pictures
"""

import json
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging
from PIL import Image
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from recap.chunks import split
from recap.config import Model
from recap.errors import UserError
from recap.pretrained import checkpoint_folder, load_pretrained
from recap.sample import visible
from recap.show import COLUMNS, wrap
from train_t2i.text import WINDOW, encode_prompts, encode_unconditional

KINDS: dict[str, Any] = {"StableDiffusionPipeline": StableDiffusionPipeline,
                         "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
"""Without which neither draws; of XL, the last two are needed twice."""
SIDE_STEP = 8
"""Pixels that a picture's sides are a multiple of; diffusers refuses any other."""


def load_pipeline(ref: Model, where: str, device: str) -> Any:
    """Open a Stable Diffusion 1.x, 2.x or XL pipeline, float32, safetensors only, without a safety checker.

    Args:
        ref: hub id or diffusers folder.
        where: the table that names it, for messages.
        device: a torch device.

    Raises:
        UserError: it is another pipeline, or not there, or lacks a part.
    """
    logging.disable_progress_bar()
    kind = _kind(ref, where)
    # The safety checker blanks pictures, which would count against an arm; nothing drawn here is shown unasked.
    options = {"safety_checker": None, "requires_safety_checker": False} if kind is StableDiffusionPipeline else {
        "add_watermarker": False}
    pipe = load_pretrained(kind.from_pretrained, ref, where, use_safetensors=True, **options)
    pipe.set_progress_bar_config(disable=True)
    # After loading: the keyword for it has two names among diffusers' releases, and transformers 5 another default.
    return pipe.to(device, torch.float32)


def _kind(ref: Model, where: str) -> Any:
    path = checkpoint_folder(ref, where) / "model_index.json"
    try:
        index = json.loads(path.read_bytes())
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{where}.model: {ref.model} is no diffusers folder, which has a model_index.json: name one, "
                        "or a hub id of one") from None
    if name not in KINDS:
        raise UserError(f"{where}.model: {ref.model} is a {name}: name Stable Diffusion 1.x, 2.x or XL")
    needed = [*PARTS, "text_encoder_2", "tokenizer_2"] if "XL" in name else PARTS
    if absent := [part for part in needed if None in (index.get(part) or [None])]:
        raise UserError(f"{where}.model: {ref.model} has no {' and no '.join(absent)}: name a folder with all parts")
    return KINDS[name]


def plan(pipe: Any, prompts: list[str], batch_size: int) -> list[list[int]]:
    """Indices of `prompts` in batches, each of one number of windows (stock pipelines take no mask)."""
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(num_windows(pipe, prompt), []).append(index)
    return [group[start:start + batch_size] for _, group in sorted(groups.items())
            for start in range(0, len(group), batch_size)]


def num_windows(pipe: Any, prompt: str) -> int:
    return len(split(prompt, pipe.tokenizer).ids)


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index`, the same for every arm, in 32 bits: torch's generator on the CPU ignores all others.

    Runs begin far from each other (Knuth's multiplicative hashing), so that they do not overlap.
    """
    return (seed * 2_654_435_769 + index) % 2 ** 32


@torch.no_grad()
def prompt_embeds(pipe: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    """What a stock pipeline takes in the place of prompts of any length: `pipe(**prompt_embeds(pipe, prompts))`.

    All prompts must have one number of windows (see `plan`).
    """
    embeds = encode_prompts(prompts, pipe)
    if embeds.mask is not None:
        raise ValueError("prompts of different numbers of windows in one batch: group them with plan()")
    negative = encode_unconditional(embeds.states.shape[1] // WINDOW, pipe)
    found = {"prompt_embeds": embeds.states, "negative_prompt_embeds": negative.states.expand(len(prompts), -1, -1)}
    if embeds.pooled is not None and negative.pooled is not None:
        found |= {"pooled_prompt_embeds": embeds.pooled,
                  "negative_pooled_prompt_embeds": negative.pooled.expand(len(prompts), -1)}
    return found


@torch.no_grad()
def draw(pipe: Any, prompts: list[str], seeds: list[int], *, num_inference_steps: int, guidance_scale: float,
         **options: Any) -> list[Image.Image]:
    """Draw one picture a prompt. All prompts must have one number of windows (see `plan`).

    Args:
        pipe: a stock pipeline.
        prompts: of any length.
        seeds: of the noise, one each.
        num_inference_steps: of the pipeline's scheduler.
        guidance_scale: how much more of the prompt; 1 is none.
        options: of the pipeline, such as `height` and `width`.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on any device
    drawn = pipe(**prompt_embeds(pipe, prompts), generator=generators, num_inference_steps=num_inference_steps,
                 guidance_scale=guidance_scale, **options)
    return cast(list[Image.Image], drawn.images)


def main(
    pipeline: Annotated[str, typer.Argument(help="A diffusers folder, or a hub id.")],
    prompts: Annotated[list[str], typer.Argument(help="Of any length; or a .txt file with one a line.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the pictures.")] = Path("pictures"),
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Pictures of every prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first picture of a prompt; the next have the next.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Of the sampler.")] = 30,
    guidance: Annotated[float, typer.Option(min=0, help="Guidance scale.")] = 7.5,
    size: Annotated[int | None, typer.Option(min=8, help="Side in pixels; by default the model's own.")] = None,
    revision: Annotated[str, typer.Option(help="Of a hub id: commit, tag or branch.")] = "main",
    lora: Annotated[Path | None, typer.Option(help="A folder of LoRA weights to add.")] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Draw prompts of any length: 00000-0.png is the first picture of the first."""
    texts = [text for prompt in prompts for text in _lines(prompt)]
    if size is not None and size % SIDE_STEP:
        raise UserError(f"sample: --size {size} is not a multiple of {SIDE_STEP}, which a pipeline asks for: try "
                        f"{max(SIDE_STEP, round(size / SIDE_STEP) * SIDE_STEP)}")
    _check_device(device)
    pipe = load_pipeline(Model(model=pipeline, revision=revision), "sample", device)
    if lora:
        _add_lora(pipe, lora)
    square = {} if size is None else {"height": size, "width": size}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for index, text in enumerate(texts):
            for place in range(num):
                [image] = draw(pipe, [text], [seed + place], num_inference_steps=steps, guidance_scale=guidance,
                               **square)
                name, windows = f"{index:05d}-{place}.png", num_windows(pipe, text)
                image.save(out / name)
                start = f"{name}  {windows} window{'s' if windows > 1 else ' '}  "
                print(start + next(iter(wrap(visible(text), COLUMNS - len(start))), "(no text)"), flush=True)
    except OSError as error:
        raise UserError(f"sample: cannot write to {out} ({error}): name another folder by --out") from error
    print(f"{len(texts) * num} picture{'s' if len(texts) * num > 1 else ''} in {out}")


def _lines(prompt: str) -> list[str]:
    if not prompt.endswith(".txt"):
        return [prompt]
    try:
        found = [line for line in Path(prompt).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"sample: no prompts in {prompt} ({error}): give a text file with one a line") from None
    if not found:
        raise UserError(f"sample: no prompts in {prompt}, which is empty: give a text file with one a line")
    return found


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"sample: no device {device} here: try --device cpu") from None


def _add_lora(pipe: Any, folder: Path) -> None:
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"sample: no LoRA weights at {folder}: name a folder with a .safetensors file in it")
    try:
        pipe.load_lora_weights(str(folder), use_safetensors=True)
        if not pipe.get_list_adapters():  # of which the library warns only
            raise ValueError("nothing in them has a name that it has")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"sample: the LoRA weights at {folder} are not of this model "
                        f"({' '.join(str(error).split())[:160]}): name its own") from error


if __name__ == "__main__":
    from recap.cli import fail
    logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        typer.run(main)
    except UserError as error:
        fail(str(error))
