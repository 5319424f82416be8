"""The CLIP scorer: an open_clip model taught which words belong to which drawing (Radford et al. 2021)."""

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from open_clip import CLIP, ClipLoss, SimpleTokenizer
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file

from recap.clip_bpe import MAX_LENGTH, VOCAB_SIZE
from recap.rundir import StageDir
from recap.world.base.drawings import Drawings
from recap.world.base.fit import Schedule, fit
from recap.world.scene import Scene
from recap.world.words import clean_alt_text, describe, reference_long, reference_rich, reference_short

SCHEDULE = Schedule(steps=2000, batch_size=128, lr=1e-3)
NUM_DRAWINGS = 40_000
TEXT_WIDTH = 40


def model_config(size: int) -> dict[str, Any]:
    """What open_clip builds the model from, as in `open_clip_config.json`; pictures are of `size` pixels."""
    return {
        "embed_dim": 48,
        "vision_cfg": {"image_size": size, "layers": 3, "width": 96, "head_width": 24, "patch_size": size // 4},
        "text_cfg": {"context_length": MAX_LENGTH, "vocab_size": VOCAB_SIZE, "width": TEXT_WIDTH, "heads": 4,
                     "layers": 2},
    }


def build(size: int) -> CLIP:
    """An open_clip model: pictures (B, 3, S, S) and token ids (B, 77) → embeddings (B, 48)."""
    return CLIP(**model_config(size))


def train(stage: StageDir, seed: int, size: int, schedule: Schedule) -> dict[str, float]:
    """Write `stage.path/model`; returns how often, among 100 held-out captions, the picture's own is the nearest."""
    torch.manual_seed(seed)
    model = build(size)
    drawings = Drawings.draw(f"{seed}/clip", NUM_DRAWINGS, size)
    contrast = ClipLoss()

    def loss(step: int) -> torch.Tensor:
        pixels, scenes = drawings.batch(step, schedule.batch_size)
        found: torch.Tensor = contrast(*model(normalised(pixels), _tokens(scenes, step)))
        return found

    fit(stage, "clip", model, loss, schedule)
    save(model, stage.path / "model", size)
    held_out = Drawings.draw(f"{seed}/clip/held out", 1000, size)
    hits = 0
    with torch.no_grad():
        for step in range(10):
            scenes = held_out.scenes[100 * step:100 * (step + 1)]
            pixels = held_out.pixels[100 * step:100 * (step + 1)].float() / 127.5 - 1
            images, texts, _ = model(normalised(pixels), _tokens(scenes, -1 - step))
            hits += int(((images @ texts.T).argmax(1) == torch.arange(100)).sum())
    return {"nearest_of_100": hits / 1000}


def _tokens(scenes: list[Scene], seed: int) -> torch.Tensor:
    """A caption of each scene in one of many voices, (B, 77)."""
    rng = Random(f"captions/{seed}")
    voices = (describe, reference_short, reference_long, reference_rich, lambda scene, _: clean_alt_text(scene))
    tokens: torch.Tensor = SimpleTokenizer()([_sentence(rng.choice(voices)(scene, rng), rng) for scene in scenes])
    return tokens


def _sentence(text: str, rng: Random) -> str:
    """The text, or one of its sentences: long texts are scored sentence by sentence."""
    return rng.choice([sentence for sentence in text.split(". ") if sentence]) if rng.random() < 0.3 else text


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """[−1, 1] → CLIP's own mean and deviation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (pixels / 2 + 0.5 - mean) / std


def save(model: CLIP, folder: Path, size: int) -> None:
    """An open_clip model folder, fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    config = {"model_cfg": model_config(size), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
