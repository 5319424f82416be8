"""The text encoder of the diffusion models: CLIP's, taught which alt-text belongs to which drawing (Radford 2021).

It has read alt-text alone, as bad as what the UNet then learns from.
"""

from random import Random

import torch
from open_clip import ClipLoss
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from recap.clip_bpe import MAX_LENGTH, VOCAB_SIZE, clip_tokenizer
from recap.rundir import StageDir
from recap.world.base import clip
from recap.world.base.drawings import Drawings, to_float
from recap.world.base.fit import Schedule, fit
from recap.world.scene import Scene
from recap.world.words import alt_text, clean_alt_text

WIDTH = 64
NUM_DRAWINGS = 60_000


def build() -> CLIPTextModel:
    tokenizer = clip_tokenizer()
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))


class Pair(nn.Module):
    """The text encoder beside an image encoder that is thrown away afterwards."""

    def __init__(self, text_encoder: CLIPTextModel, size: int) -> None:
        super().__init__()
        whole = clip.build(size)
        self.tokenizer = clip_tokenizer()
        self.text, self.image, self.scale = text_encoder, whole.visual, whole.logit_scale
        self.projection = nn.Linear(WIDTH, whole.text_projection.shape[1])

    def forward(self, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of pictures, (B, 3, S, S) in [−1, 1], and of texts: both (B, D), of length 1."""
        ids = self.tokenizer(texts, padding="longest", truncation=True, max_length=MAX_LENGTH,
                             return_tensors="pt").input_ids
        return (nn.functional.normalize(self.image(clip.normalised(pixels)), dim=1),
                nn.functional.normalize(self.projection(self.text(ids).pooler_output), dim=1))


def train(stage: StageDir, text_encoder: CLIPTextModel, seed: int, size: int, schedule: Schedule) -> None:
    """Train in place; logs how often, among 100 held-out drawings' clean alt-texts, a drawing's own is the nearest."""
    pair, contrast = Pair(text_encoder, size), ClipLoss()
    drawings = Drawings.draw(f"{seed}/text encoder", NUM_DRAWINGS, size)

    def loss(step: int) -> torch.Tensor:
        pixels, scenes = drawings.batch(step, schedule.batch_size)
        found: torch.Tensor = contrast(*pair(pixels, _alt_texts(scenes, step)), pair.scale.exp())
        return found

    fit(stage, "text encoder", pair, loss, schedule)
    stage.log(event="text encoder", nearest_of_100=_nearest_of_100(pair, f"{seed}/text encoder/held out", size))


def _alt_texts(scenes: list[Scene], seed: int) -> list[str]:
    rng = Random(f"alt-text/{seed}")
    return [alt_text(scene, rng)[1] for scene in scenes]


@torch.no_grad()
def _nearest_of_100(pair: Pair, name: str, size: int) -> float:
    held_out = Drawings.draw(name, 1000, size)
    hits = 0
    for start in range(0, 1000, 100):
        scenes, pixels = held_out.scenes[start:start + 100], held_out.pixels[start:start + 100]
        images, texts = pair(to_float(pixels), [clean_alt_text(scene) for scene in scenes])
        hits += int(((images @ texts.T).argmax(1) == torch.arange(100)).sum())
    return hits / 1000
