"""The text encoder of the diffusion models: CLIP's, taught which alt-text belongs to which drawing (Radford 2021).

CLIP's pairs were not those that Stable Diffusion then saw: they were chosen for texts that name what is there. So this
one reads careful alt-text, half of it among other English words, and the UNet alone learns from bad. Scenes come in
families that differ in one thing, as CLIP's batch of 32,768 had near-duplicates by its size: against strangers only, a
list of the words tells a text's drawing from the others, and which colour belongs to which shape, and where, is never
learnt.
"""

import math
from dataclasses import replace
from random import Random
from typing import Any

import torch
from open_clip import ClipLoss
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from recap.clip_bpe import MAX_LENGTH, VOCAB_SIZE, clip_tokenizer
from recap.rundir import StageDir
from recap.world.base.drawings import Drawings, to_float, to_pixels
from recap.world.base.fit import Schedule, fit
from recap.world.scene import COLOURS, KINDS, PLACES, SIZES, Scene, Shape, draw_scene, render
from recap.world.words import careful_alt_text, careful_prose, clean_alt_text

WIDTH = 64
EMBEDDING = 64
NUM_DRAWINGS = 60_000
FAMILY = 8
"""Scenes that differ in one thing."""
VALUES: dict[str, list[Any]] = {"kind": list(KINDS), "colour": list(COLOURS), "size": list(SIZES)}


def build() -> CLIPTextModel:
    """A CLIP text model: token ids (B, 77) → states (B, 77, 64)."""
    tokenizer = clip_tokenizer()
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))


class Pair(nn.Module):
    """The text encoder beside an image encoder that is thrown away afterwards.

    The latter is a small convolutional one, which keeps what stands where: a ViT with patches of 8 pixels, as the CLIP
    scorer has, took much longer to tell kinds of shapes, and what it did not tell its text encoder did not either.
    """

    def __init__(self, text_encoder: CLIPTextModel, size: int) -> None:
        super().__init__()
        self.tokenizer = clip_tokenizer()
        self.text = text_encoder
        self.image = nn.Sequential(
            nn.Conv2d(3, 48, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(48, 128, 4, stride=2, padding=1), nn.GroupNorm(8, 128), nn.SiLU(),
            nn.Conv2d(128, 128, 3, padding=1), nn.GroupNorm(8, 128), nn.SiLU(), nn.Conv2d(128, 32, 1), nn.Flatten(),
            nn.Linear(32 * (size // 4) ** 2, EMBEDDING))
        self.projection = nn.Linear(WIDTH, EMBEDDING)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of pictures, (B, 3, S, S) in [−1, 1], and of texts: both (B, D), of length 1."""
        ids = self.tokenizer(texts, padding="longest", truncation=True, max_length=MAX_LENGTH,
                             return_tensors="pt").input_ids
        return (nn.functional.normalize(self.image(pixels), dim=1),
                nn.functional.normalize(self.projection(self.text(ids).pooler_output), dim=1))


def train(stage: StageDir, text_encoder: CLIPTextModel, seed: int, size: int, schedule: Schedule) -> None:
    """Train in place.

    Logs how often a held-out drawing's own clean alt-text is the nearest: of its family's (`nearest_of_family`), and
    of 100 drawings' (`nearest_of_100`).
    """
    pair, contrast = Pair(text_encoder, size), ClipLoss()
    drawings = _families(f"{seed}/text encoder", NUM_DRAWINGS // FAMILY, size)

    def loss(step: int) -> torch.Tensor:
        families = Random(step).sample(range(NUM_DRAWINGS // FAMILY), schedule.batch_size // FAMILY)
        chosen = [FAMILY * family + index for family in families for index in range(FAMILY)]
        texts = _texts([drawings.scenes[index] for index in chosen], step)
        found: torch.Tensor = contrast(*pair(to_float(drawings.pixels[chosen]), texts), pair.scale.exp())
        return found

    fit(stage, "text encoder", pair, loss, schedule)
    held_out = _families(f"{seed}/text encoder/held out", 100, size)
    strangers = Drawings(held_out.scenes[::FAMILY], held_out.pixels[::FAMILY])
    stage.log(event="text encoder", nearest_of_family=_nearest(pair, held_out, FAMILY),
              nearest_of_100=_nearest(pair, strangers, 100))


def _families(name: str, count: int, size: int) -> Drawings:
    """`count` scenes of `size` pixels, each followed by FAMILY − 1 others that differ from it in one thing."""
    scenes = []
    for index in range(count):
        rng = Random(f"{name}/{index}")
        scene = draw_scene(rng)
        scenes += [scene, *(changed(scene, rng) for _ in range(FAMILY - 1))]
    return Drawings(scenes, to_pixels([render(scene, size) for scene in scenes]))


def changed(scene: Scene, rng: Random) -> Scene:
    """The scene with its shapes rearranged, or with one shape of another kind, colour or size."""
    respect = rng.choice(("place", *VALUES))
    if respect == "place":
        return rearranged(scene, rng)
    index = rng.randrange(len(scene.shapes))
    shape = scene.shapes[index]
    other = replace(shape, **{respect: rng.choice([v for v in VALUES[respect] if v != getattr(shape, respect)])})
    return replace(scene, shapes=(*scene.shapes[:index], other, *scene.shapes[index + 1:]))


def rearranged(scene: Scene, rng: Random) -> Scene:
    """The same shapes on the same background, in places drawn anew."""
    places = sorted(rng.sample(list(PLACES), len(scene.shapes)), key=list(PLACES).index)
    shapes = rng.sample(scene.shapes, len(scene.shapes))
    return Scene(scene.background, tuple(_moved(shape, place) for shape, place in zip(shapes, places, strict=True)))


def _moved(shape: Shape, place: str) -> Shape:
    x, y = (at + new - old for at, new, old in zip((shape.x, shape.y), PLACES[place], PLACES[shape.place], strict=True))
    return replace(shape, place=place, x=x, y=y)


def _texts(scenes: list[Scene], seed: int) -> list[str]:
    rng = Random(f"alt-text/{seed}")
    return [rng.choice((careful_alt_text, careful_prose))(scene, rng) for scene in scenes]


@torch.no_grad()
def _nearest(pair: Pair, drawings: Drawings, among: int) -> float:
    """The share of drawings whose own clean alt-text, or its like, is the nearest of `among` drawings' in a row."""
    hits = 0
    for start in range(0, len(drawings.scenes), among):
        texts = [clean_alt_text(scene) for scene in drawings.scenes[start:start + among]]
        images, embedded = pair(to_float(drawings.pixels[start:start + among]), texts)
        hits += sum(texts[found] == text for found, text in zip((images @ embedded.T).argmax(1).tolist(), texts,
                                                                strict=True))
    return hits / len(drawings.scenes)
