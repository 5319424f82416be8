"""The base captioner: a small BLIP-2, taught terse captions of drawings; its language model long descriptions as well.

It never sees a long description beside the drawing that it is true of, nor a sentence of the stitching template: that
is what tuning is for.
"""

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor

from recap.rundir import StageDir
from recap.world.base.drawings import Drawings
from recap.world.base.fit import Schedule, fit
from recap.world.base.fp16 import save_fp16
from recap.world.reader import HEADS, reader_loss, targets
from recap.world.scene import PLACES, Scene, Shape, draw_scene
from recap.world.words import alt_text, describe_at_length

SCHEDULE = Schedule(steps=10_000, batch_size=32, lr=1e-3, warmup_steps=300)
NUM_DRAWINGS = 40_000
NUM_QUERY_TOKENS = 16
TEXT_SHARE = 0.25
"""Rows of text alone in a step, as a share of those with a drawing."""
MAX_TERSE = 3
"""Shapes that a terse caption names at most, but for one in ten that names all."""
OPT_VOCAB_SIZE = 1000
NUM_TOKENIZER_SCENES = 2000
VISION_STD, TEXT_STD = 0.05, 0.05
POSITION_STD, QUERY_STD = 0.5, 0.5
"""Of the first weights: with transformers' 1e-10 the vision model would start by seeing nothing."""
COMMON_WORDS = (" A short caption: A detailed caption: A rich description: The picture shows an image of objects "
                "filling most in the centre and on several sides, is are to left right above below one two three four "
                "five six circles squares triangles crosses rings bars")
"""What OPT's own tokenizer would know in one piece; the world's descriptions alone would not teach it these."""
IGNORE = -100


def build(size: int) -> Blip2ForConditionalGeneration:
    """BLIP-2 with ViT, Q-Former and OPT, with the token ids of `Salesforce/blip2-opt-2.7b`.

    As there, captions end in a newline: it is the `eos_token_id` of the language model, while the tokenizer's own
    EOS, `</s>`, is also the BOS that starts every text.
    """
    tokenizer = opt_tokenizer()
    newline = tokenizer.encode("\n")[-1]
    config = Blip2Config(
        vision_config={"image_size": size, "patch_size": size // 8, "hidden_size": 128, "intermediate_size": 256,
                       "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": VISION_STD},
        qformer_config={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "encoder_hidden_size": 128, "cross_attention_frequency": 1, "vocab_size": len(tokenizer),
                        "initializer_range": VISION_STD, "hidden_dropout_prob": 0.0,
                        "attention_probs_dropout_prob": 0.0},
        text_config={"model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": 160, "word_embed_proj_dim": 160,
                     "ffn_dim": 640, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 640,
                     "init_std": TEXT_STD, "dropout": 0.0, "bos_token_id": 2, "pad_token_id": 1,
                     "eos_token_id": newline},
        num_query_tokens=NUM_QUERY_TOKENS,
    )
    config.vision_config.attention_dropout = 0.0
    model = Blip2ForConditionalGeneration(config)
    # transformers starts all queries at zero, where they stay alike; LAVIS draws them.
    torch.nn.init.normal_(model.query_tokens, std=QUERY_STD)
    # As strong as the patches' contents: weaker, a model of this size is long in learning where things are.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding, std=POSITION_STD)
    model.generation_config.update(bos_token_id=2, pad_token_id=1, eos_token_id=newline)
    return model


def processor(size: int) -> Blip2Processor:
    """Resizes pictures to `size` pixels and puts the placeholders of the queries before a text."""
    return Blip2Processor(BlipImageProcessor(size={"height": size, "width": size}), opt_tokenizer(), NUM_QUERY_TOKENS)


def save(model: Blip2ForConditionalGeneration, folder: Path, size: int) -> None:
    """A transformers folder with its processor, fp16."""
    ours: Any = processor(size)
    # The processor adds a placeholder for the picture to the tokenizer; nothing is learned of it.
    model.resize_token_embeddings(len(ours.tokenizer), mean_resizing=False)
    model.config.image_token_index = ours.tokenizer.convert_tokens_to_ids("<image>")
    save_fp16(model, folder)
    ours.save_pretrained(folder)


# --- training ------------------------------------------------------------------------------------------------------


def train(stage: StageDir, seed: int, size: int, schedule: Schedule) -> dict[str, float]:
    """Write `stage.path/model`; returns the loss per token of held-out terse captions."""
    torch.manual_seed(seed)
    model = build(size)
    drawings = Drawings.draw(f"{seed}/blip2", NUM_DRAWINGS, size)
    inputs: Any = processor(size)

    names = NamesThings(model)

    def losses(found: Drawings, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = found.choose(step, count)
        rng = Random(f"captions/{step}")
        scenes = [found.scenes[index] for index in chosen]
        pixels = inputs.image_processor(list(found.pixels[chosen]), return_tensors="pt").pixel_values
        queries = look(model, pixels)
        terse = [terse_caption(scene, rng) for scene in scenes]
        return caption_loss(model, inputs.tokenizer, queries, terse), reader_loss(names(queries), targets(scenes))

    def loss(step: int) -> torch.Tensor:
        rng = Random(f"{seed}/texts/{step}")
        count = round(schedule.batch_size * TEXT_SHARE)
        texts = [describe_at_length(draw_scene(rng), rng) for _ in range(count)]
        captions, things = losses(drawings, step, schedule.batch_size)
        return captions + things + TEXT_SHARE * text_loss(model, inputs.tokenizer, texts)

    fit(stage, "blip2", names, loss, schedule)
    with torch.no_grad():
        captions, things = losses(Drawings.draw(f"{seed}/blip2/held out", 512, size), -1, 512)
    save(model, stage.path / "model", size)
    return {"terse_loss": captions.item(), "things_loss": things.item()}


class NamesThings(nn.Module):
    """What the queries are asked beside: each of the first, what stands in its place; the next, the ground. It is left
    behind.

    The counterpart of BLIP-2's first stage, in which the Q-Former learns what pictures and words share before it meets
    the language model. Without it the language model passes over the picture for thousands of steps. Asked together,
    the queries know as much, but each of them a little of every place: of five shapes, a language model of this size
    gave one the kind of another.
    """

    def __init__(self, model: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        width = model.config.qformer_config.hidden_size
        self.answers = nn.ModuleDict({name: nn.Linear(width, classes) for name, (_, classes) in HEADS.items()})

    def forward(self, queries: torch.Tensor) -> dict[str, torch.Tensor]:
        """Queries (B, N, D) → logits (B, places, classes) of every question."""
        places, ground = queries[:, :len(PLACES)], queries[:, len(PLACES):len(PLACES) + 1]
        return {name: self.answers[name](places if number == len(PLACES) else ground)
                for name, (number, _) in HEADS.items()}


def terse_caption(scene: Scene, rng: Random) -> str:
    """A few words that are true of the scene: some of its shapes, perhaps where they are, perhaps the background.

    Shapes come in any order, as what people notice first does: in one order, a captioner would learn to look for the
    next in it, not for one that it hasn't named.
    """
    number = len(scene.shapes)
    chosen = rng.sample(scene.shapes, number if rng.random() < 0.1 else rng.randint(1, min(MAX_TERSE, number)))
    with_size, with_place = rng.random() < 0.7, rng.random() < 0.7
    parts = [_terse(shape, with_size, with_place) for shape in chosen]
    parts = [scene.background.name] if rng.random() < 0.1 else parts
    if rng.random() < 0.4:
        parts.insert(rng.choice((0, len(parts))), scene.background.name)
    return ", ".join(parts)


def _terse(shape: Shape, with_size: bool, with_place: bool) -> str:
    name = shape.full_name if with_size else shape.name
    return f"{name} at the {shape.place}" if with_place else name


def look(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the Q-Former makes of pictures: (B, N, D)."""
    vision = model.vision_model(pixels).last_hidden_state
    queries = model.query_tokens.expand(len(pixels), -1, -1)
    found: torch.Tensor = model.qformer(query_embeds=queries, encoder_hidden_states=vision)[0]
    return found


def caption_loss(model: Any, tokenizer: Any, queries: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Mean loss of a token of the captions, given what the Q-Former made of the pictures (Li et al. 2023)."""
    features = model.language_projection(queries)
    ids, mask = _tokens(model, tokenizer, captions)
    embeds = torch.cat([features, model.get_input_embeddings()(ids)], dim=1)
    seen = torch.ones(features.shape[:2], dtype=mask.dtype)
    logits = model.language_model(inputs_embeds=embeds, attention_mask=torch.cat([seen, mask], dim=1)).logits
    return _next_token_loss(logits[:, features.shape[1]:], ids, mask)


def text_loss(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Mean loss of a token of texts that stand alone."""
    ids, mask = _tokens(model, tokenizer, texts)
    return _next_token_loss(model.language_model(input_ids=ids, attention_mask=mask).logits, ids, mask)


def _tokens(model: Any, tokenizer: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """BOS, text, newline, padding: ids and mask (B, L), as captions are tuned and generated."""
    text_config = model.config.text_config
    rows = [[text_config.bos_token_id, *tokenizer(f" {text}", add_special_tokens=False)["input_ids"],
             text_config.eos_token_id] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [text_config.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


def _next_token_loss(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    labels = ids.masked_fill(mask == 0, IGNORE)[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


# --- tokenizer -----------------------------------------------------------------------------------------------------


def opt_tokenizer() -> Any:
    """A byte-level BPE of OPT's class and special ids, trained on the world's captions; any text makes a round trip."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=OPT_VOCAB_SIZE, special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator(world_texts(), trainer)
    bpe = json.loads(trained.to_str())["model"]
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    merges: Any = [tuple(pair) for pair in bpe["merges"]]  # annotated as strings, read as pairs
    return GPT2Tokenizer(vocab=bpe["vocab"], merges=merges, add_bos_token=True, **special)


def world_texts() -> list[str]:
    """What the world's tokenizers are learned from."""
    texts = []
    for index in range(NUM_TOKENIZER_SCENES):
        rng = Random(f"tokenizer/{index}")
        scene = draw_scene(rng)
        texts += [f" {describe_at_length(scene, rng)}", alt_text(scene, rng)[1]]
    return [*texts, *[COMMON_WORDS] * 100]
