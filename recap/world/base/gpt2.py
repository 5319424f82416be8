"""The language model of a ClipCap: a small GPT-2 that has read descriptions of scenes, and seen none."""

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from recap.captioners.text import pad
from recap.captioners.vocabulary import learn_vocabulary
from recap.rundir import StageDir
from recap.world.base.blip2 import terse_caption, world_texts
from recap.world.base.fit import Schedule, fit
from recap.world.base.fp16 import save_fp16
from recap.world.scene import draw_scene
from recap.world.words import describe_at_length

SCHEDULE = Schedule(steps=4000, batch_size=32, lr=1e-3, warmup_steps=200)
VOCAB_SIZE = 1000
WIDTH = 160
TERSE_SHARE = 0.5
"""Of its texts; the others are long descriptions."""


def build(size: int) -> GPT2LMHeadModel:
    """As wide as the language model of the world's BLIP-2; pictures of any size are nothing to it."""
    tokens = tokenizer()
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokens), n_positions=640, n_embd=WIDTH, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.05, bos_token_id=tokens.eos_token_id, eos_token_id=tokens.eos_token_id))


def tokenizer() -> GPT2Tokenizer:
    return learn_vocabulary(world_texts(), VOCAB_SIZE)


def save(model: GPT2LMHeadModel, folder: Path, size: int) -> None:
    """A transformers folder with its tokenizer, fp16."""
    save_fp16(model, folder)
    tokenizer().save_pretrained(folder)


def train(stage: StageDir, seed: int, size: int, schedule: Schedule) -> dict[str, float]:
    """Write `stage.path/model`; returns the loss per token of held-out texts."""
    torch.manual_seed(seed)
    model, tokens = build(size), tokenizer()

    def loss(step: int, count: int = schedule.batch_size) -> torch.Tensor:
        rng = Random(f"{seed}/gpt2/{step}")
        texts = [_text(rng) for _ in range(count)]
        end = tokens.eos_token_id
        batch = pad([([], [end, *tokens(f" {text}")["input_ids"], end]) for text in texts], tokens.pad_token_id, "cpu")
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())

    fit(stage, "gpt2", model, loss, schedule)
    with torch.no_grad():
        held_out = loss(-1, 256)
    save(model, stage.path / "model", size)
    return {"loss": held_out.item()}


def _text(rng: Random) -> str:
    scene = draw_scene(rng)
    return terse_caption(scene, rng) if rng.random() < TERSE_SHARE else describe_at_length(scene, rng)
