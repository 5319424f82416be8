"""A base captioner of today's kind: a small LLaVA, taught terse captions of drawings; its language model read more."""

from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from recap.captioners.text import next_token_loss, pad
from recap.captioners.vocabulary import learn_vocabulary
from recap.rundir import StageDir
from recap.world.base.blip2 import TEXT_SHARE, terse_caption, world_texts
from recap.world.base.drawings import Drawings
from recap.world.base.fit import Schedule, fit
from recap.world.base.fp16 import save_fp16
from recap.world.reader import HEADS, reader_loss, targets
from recap.world.scene import PLACES, draw_scene
from recap.world.words import describe_at_length

SCHEDULE = Schedule(steps=10_000, batch_size=32, lr=1e-3, warmup_steps=300)
NUM_DRAWINGS = 40_000
VOCAB_SIZE = 1000
SEEN, SAID = 128, 160
"""Widths of the vision model and of the language model."""
GRID = 4
"""Patches a side."""
ASKED = "What is this?"
"""What it is asked while it is taught."""
TEMPLATE = (
    "{% for message in messages %}{% set user = message['role'] == 'user' %}{{ 'USER: ' if user else 'ASSISTANT:' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif user %}{{ part['text'] + ' ' }}{% else %}{{ ' ' + part['text'] + eos_token }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
"""In the manner of LLaVA-1.5's."""


def build(size: int) -> LlavaForConditionalGeneration:
    """As large as the world's BLIP-2: CLIP's ViT, a projection, and a Llama."""
    tokens = processor(size).tokenizer
    vision = CLIPVisionConfig(hidden_size=SEEN, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                              image_size=size, patch_size=size // GRID, initializer_range=0.05)
    text = LlamaConfig(vocab_size=len(tokens), hidden_size=SAID, intermediate_size=448, num_hidden_layers=3,
                       num_attention_heads=4, max_position_embeddings=640, initializer_range=0.05,
                       bos_token_id=tokens.eos_token_id, eos_token_id=tokens.eos_token_id)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="default"))
    model.generation_config.update(bos_token_id=tokens.eos_token_id, eos_token_id=tokens.eos_token_id,
                                   pad_token_id=tokens.pad_token_id)
    return model


def processor(size: int) -> Any:
    """Pictures of `size` pixels, and a chat template."""
    tokenizer = learn_vocabulary([*world_texts(), f"USER: ASSISTANT: {ASKED}"], VOCAB_SIZE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"height": size, "width": size}, crop_size={"height": size, "width": size})
    return LlavaProcessor(images, tokenizer, patch_size=size // GRID, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1, chat_template=TEMPLATE)


def save(model: LlavaForConditionalGeneration, folder: Path, size: int) -> None:
    """A transformers folder with its processor, fp16."""
    save_fp16(model, folder)
    processor(size).save_pretrained(folder)


# --- training ------------------------------------------------------------------------------------------------------


class NamesThings(nn.Module):
    """What the patches are asked beside: those of each place, what stands there; all, the ground. It is left behind.

    The counterpart of what CLIP had learnt before LLaVA took its eyes.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.answers = nn.ModuleDict({name: nn.Linear(SEEN, classes) for name, (_, classes) in HEADS.items()})

    def forward(self, seen: torch.Tensor) -> dict[str, torch.Tensor]:
        """States (B, patches, D) → logits (B, places, classes) of every question."""
        grid = seen.transpose(1, 2).unflatten(2, (GRID, GRID))
        places = F.adaptive_avg_pool2d(grid, (2, 3))  # as PLACES are laid out
        found = {len(PLACES): places.flatten(2).transpose(1, 2), 1: seen.mean(dim=1, keepdim=True)}
        return {name: self.answers[name](found[number]) for name, (number, _) in HEADS.items()}


def train(stage: StageDir, seed: int, size: int, schedule: Schedule) -> dict[str, float]:
    """Write `stage.path/model`; returns the loss per token of held-out terse captions."""
    torch.manual_seed(seed)
    model: Any = build(size)
    drawings = Drawings.draw(f"{seed}/llava", NUM_DRAWINGS, size)
    inputs, names = processor(size), NamesThings(model)
    tokens = inputs.tokenizer
    end, fill = tokens.eos_token_id, tokens.pad_token_id
    prompt = inputs(images=drawings.images()[:1], text=f"USER: <image>\n{ASKED} ASSISTANT:").input_ids[0]

    def losses(found: Drawings, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = found.choose(step, count)
        rng = Random(f"captions/{step}")
        scenes = [found.scenes[index] for index in chosen]
        pixels = inputs.image_processor([_image(found.pixels[index]) for index in chosen],
                                        return_tensors="pt").pixel_values
        batch = pad([(prompt, [*tokens(f" {terse_caption(scene, rng)}")["input_ids"], end]) for scene in scenes], fill,
                    "cpu")
        seen = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
        embeds = model.get_input_embeddings()(batch.ids)
        features = model.model.multi_modal_projector(seen)
        at_image = (batch.ids == model.config.image_token_id).unsqueeze(-1)
        logits = model(inputs_embeds=embeds.masked_scatter(at_image, features), attention_mask=batch.mask).logits
        return next_token_loss(logits, batch.labels), reader_loss(names(seen), targets(scenes))

    def text_loss(step: int) -> torch.Tensor:
        rng = Random(f"{seed}/texts/{step}")
        texts = [describe_at_length(draw_scene(rng), rng) for _ in range(round(schedule.batch_size * TEXT_SHARE))]
        batch = pad([([end], [*tokens(f" {text}")["input_ids"], end]) for text in texts], fill, "cpu")
        return next_token_loss(model(input_ids=batch.ids, attention_mask=batch.mask).logits, batch.labels)

    def loss(step: int) -> torch.Tensor:
        captions, things = losses(drawings, step, schedule.batch_size)
        return captions + things + TEXT_SHARE * text_loss(step)

    fit(stage, "llava", names, loss, schedule)
    with torch.no_grad():
        captions, things = losses(Drawings.draw(f"{seed}/llava/held out", 512, size), -1, 512)
    save(model, stage.path / "model", size)
    return {"terse_loss": captions.item(), "things_loss": things.item()}


def _image(pixels: torch.Tensor) -> Any:
    """uint8 (3, S, S) → (S, S, 3), as image processors take arrays."""
    return pixels.permute(1, 2, 0).numpy()
