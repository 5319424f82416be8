"""A base captioner of another family: a small BLIP, taught terse captions of drawings."""

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

from recap.captioners.text import Text, next_token_loss
from recap.rundir import StageDir
from recap.world.base.blip2 import terse_caption, world_texts
from recap.world.base.drawings import Drawings
from recap.world.base.fit import Schedule, fit
from recap.world.base.fp16 import save_fp16
from recap.world.reader import HEADS, reader_loss, targets
from recap.world.scene import PLACES

SCHEDULE = Schedule(steps=10_000, batch_size=32, lr=1e-3, warmup_steps=300)
NUM_DRAWINGS = 40_000
VOCAB_SIZE = 700
WIDTH = 128
GRID = 8
"""Patches a side."""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")


def build(size: int) -> BlipForConditionalGeneration:
    """As large as the world's BLIP-2: a ViT, and a BERT that decodes."""
    tokens = tokenizer()
    ids = dict(zip(SPECIAL, tokens.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    text = {"vocab_size": len(tokens), "hidden_size": WIDTH, "encoder_hidden_size": WIDTH, "intermediate_size": 512,
            "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 400,
            "initializer_range": 0.05, "bos_token_id": ids["[DEC]"], "sep_token_id": ids["[SEP]"],
            "pad_token_id": ids["[PAD]"], "eos_token_id": ids["[SEP]"]}
    vision = {"hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
              "image_size": size, "patch_size": size // GRID, "initializer_range": 0.05}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))


def tokenizer() -> BertTokenizer:
    """WordPiece in lower case, as BLIP's, of the world's most frequent words; with `[DEC]`, which starts a caption.

    Not by the trainer of `tokenizers`, which decides between equally frequent pieces anew each time.
    """
    from tokenizers import normalizers, pre_tokenizers
    lower, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in world_texts() for word, _ in split.pre_tokenize_str(lower.normalize_str(text)))
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = [word for word in sorted(counts, key=lambda word: (-counts[word], word)) if len(word) > 1]
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words][:VOCAB_SIZE]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return BertTokenizer(vocab=vocab, do_lower_case=True, additional_special_tokens=["[DEC]"])


def save(model: BlipForConditionalGeneration, folder: Path, size: int) -> None:
    """A transformers folder with its processor, fp16."""
    save_fp16(model, folder)
    processor(size).save_pretrained(folder)


def processor(size: int) -> Any:
    return BlipProcessor(BlipImageProcessorPil(size={"height": size, "width": size}), tokenizer())


# --- training ------------------------------------------------------------------------------------------------------


class NamesThings(nn.Module):
    """What the patches are asked beside: those of each place, what stands there; all, the ground. It is left behind.

    The counterpart of what BLIP learns of pictures beside captioning them, as is that of the world's BLIP-2.
    """

    def __init__(self, model: BlipForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.answers = nn.ModuleDict({name: nn.Linear(WIDTH, classes) for name, (_, classes) in HEADS.items()})

    def forward(self, seen: torch.Tensor) -> dict[str, torch.Tensor]:
        """States (B, 1 + patches, D) → logits (B, places, classes) of every question."""
        grid = seen[:, 1:].transpose(1, 2).unflatten(2, (GRID, GRID))
        places = F.adaptive_avg_pool2d(grid, (2, 3)).flatten(2).transpose(1, 2)  # as PLACES are laid out
        return {name: self.answers[name](places if number == len(PLACES) else seen[:, :1])
                for name, (number, _) in HEADS.items()}


def train(stage: StageDir, seed: int, size: int, schedule: Schedule) -> dict[str, float]:
    """Write `stage.path/model`; returns the loss per token of held-out terse captions."""
    torch.manual_seed(seed)
    model: Any = build(size)
    drawings = Drawings.draw(f"{seed}/blip", NUM_DRAWINGS, size)
    inputs, names = processor(size), NamesThings(model)
    config = model.config.text_config
    text = Text(inputs.tokenizer, (config.bos_token_id,), config.sep_token_id, config.pad_token_id, space="")

    def losses(found: Drawings, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = found.choose(step, count)
        rng = Random(f"captions/{step}")
        scenes = [found.scenes[index] for index in chosen]
        pixels = inputs.image_processor(list(found.pixels[chosen]), return_tensors="pt").pixel_values
        seen = model.vision_model(pixels).last_hidden_state
        batch = text.batch([""] * count, [terse_caption(scene, rng) for scene in scenes], "cpu")
        logits = model.text_decoder(input_ids=batch.ids, attention_mask=batch.mask, encoder_hidden_states=seen).logits
        return next_token_loss(logits, batch.labels), reader_loss(names(seen), targets(scenes))

    fit(stage, "blip", names, lambda step: torch.stack(losses(drawings, step, schedule.batch_size)).sum(), schedule)
    with torch.no_grad():
        captions, things = losses(Drawings.draw(f"{seed}/blip/held out", 512, size), -1, 512)
    save(model, stage.path / "model", size)
    return {"terse_loss": captions.item(), "things_loss": things.item()}
