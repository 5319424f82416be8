"""Images per second of Recap's fine-tuning, and of a plain loop over transformers and peft, turn by turn in one run.

    python tests/benchmarks/finetune.py [--family blip2] [--settings plain micro-batches kept-features] [--repeats 7]
                                        [--batch-size 16]

Both train the same model (random weights, but the real vocabulary) on the same batches of the same photos from the
disk, 32-bit on one thread: BLIP-2 by the same LoRA, or the whole of BLIP. Their first losses are compared, so that it
is the same work. The machine's own speed changes by the minute, therefore only the ratio of neighbouring turns counts:
its median, with the extremes. Kept features are compared with a plain loop that encodes in every step.
"""

import argparse
import io
import json
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from PIL import Image
from tqdm import tqdm

from recap.caption_sets import read_dataset
from recap.captioners import open_tunable
from recap.config import Style
from recap.config.captioner import Captioner
from recap.config.finetune import Dataset, Finetune, Lora
from recap.pairs import Batches, Features, Pair, draw_batch, to_pairs
from recap.processes import open_accelerator
from recap.rundir import StageDir
from recap.training import Training

SHARED = Path(__file__).parents[3] / "shared" / "data"
PROMPTS = {"short": "A short caption:", "long": "A detailed caption:"}
OPT_VOCAB_SIZE, BERT_VOCAB_SIZE = 50_272, 30_524
NUM_QUERY_TOKENS = 32
WIDTH = 256
NUM_LAYERS = 4
IMAGE_SIZE, PATCH_SIZE = 224, 16
NUM_IMAGES = 48
LORA = Lora(rank=16, alpha=32, dropout=0.0, language_model=["q_proj", "v_proj"])
IGNORE = -100
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {}, "micro-batches": {"micro_batch_size": 4}, "kept-features": {"cache_features": True}}
MAX_LOSS_DIFFERENCE = 1e-4
"""Relative. Only sums are added in another order."""

Turn = Callable[[int], float]
"""Number of a step → its loss, once the step is done."""


# --- the same for both ---------------------------------------------------------------------------------------------


def write_dataset(folder: Path) -> None:
    """An imagefolder of photos, each with a short and a long caption; of noise and drawn words without shared/data."""
    draw = random.Random(0)
    photos, short, long = _real() if SHARED.is_dir() else _drawn(draw)
    rows = []
    for place in range(NUM_IMAGES):
        name = f"{place:03}.jpg"
        (folder / name).write_bytes(photos[place % len(photos)])
        rows.append({"file_name": name, "short": draw.choice(short), "long": draw.choice(long)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _real() -> tuple[list[bytes], list[str], list[str]]:
    with tarfile.open(SHARED / "photos" / "coco-open-00000.tar") as tar:
        photos = [file.read() for member in tar if member.name.endswith(".jpg") and (file := tar.extractfile(member))]
    coco = json.loads((SHARED / "captions" / "coco_fakecap_tokenized.json").read_text())
    rows = [json.loads(line) for line in (SHARED / "long_captions" / "IIW-400.jsonl").read_text().splitlines()]
    # One or two sentences, as RECAP's detailed captions are.
    return photos, [text for row in coco for text in row["refs"]], [
        ". ".join(row["IIW"].split(". ")[:2]) for row in rows if row["IIW"]]


def _drawn(draw: random.Random) -> tuple[list[bytes], list[str], list[str]]:
    photos = []
    for _ in range(NUM_IMAGES):
        file = io.BytesIO()
        noise = Image.frombytes("RGB", (80, 60), draw.randbytes(80 * 60 * 3))
        noise.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        photos.append(file.getvalue())
    words = ["".join(draw.choices("aeioubcdfglmnprst", k=draw.randint(2, 9))) for _ in range(2000)]
    short = [" ".join(draw.choices(words, k=draw.randint(6, 14))) for _ in range(200)]
    return photos, short, [" ".join(draw.choices(words, k=draw.randint(25, 60))) for _ in range(200)]


def write_blip2(folder: Path, texts: list[str]) -> None:
    """A BLIP-2 with its processor."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor

    from recap.captioners.vocabulary import learn_vocabulary
    tokenizer = learn_vocabulary(texts, 8000)
    tokenizer.add_bos_token = True
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    processor: Any = Blip2Processor(BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}), tokenizer,
                                    NUM_QUERY_TOKENS)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 8}
    config = Blip2Config(
        vision_config={**sizes, "intermediate_size": 4 * WIDTH, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        # Without dropout: a plain loop has it on in the frozen Q-Former, and the losses could not be compared.
        qformer_config={**sizes, "num_hidden_layers": 2, "intermediate_size": 4 * WIDTH, "encoder_hidden_size": WIDTH,
                        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        text_config={**sizes, "model_type": "opt", "vocab_size": OPT_VOCAB_SIZE, "word_embed_proj_dim": WIDTH,
                     "ffn_dim": 4 * WIDTH, "max_position_embeddings": 2048, "dropout": 0.0,
                     "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id,
                     "eos_token_id": newline},
        num_query_tokens=NUM_QUERY_TOKENS)
    config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def write_blip(folder: Path, texts: list[str]) -> None:
    """A BLIP with its processor."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    learned = Tokenizer(models.WordPiece(unk_token=names[1]))
    learned.normalizer = normalizers.BertNormalizer(lowercase=True)
    learned.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    learned.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=8000, special_tokens=names,
                                                                 show_progress=False))
    tokens = BertTokenizer(vocab=learned.get_vocab(), additional_special_tokens=[names[-1]])
    special = dict(zip(names, tokens.convert_tokens_to_ids(names), strict=True))
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 8,
             "intermediate_size": 4 * WIDTH}
    config = BlipConfig(
        vision_config={**sizes, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        text_config={**sizes, "vocab_size": BERT_VOCAB_SIZE, "encoder_hidden_size": WIDTH,
                     "max_position_embeddings": 512, "bos_token_id": special["[DEC]"],
                     "sep_token_id": special["[SEP]"], "pad_token_id": special["[PAD]"],
                     "eos_token_id": special["[SEP]"]})
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    image_processor = BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    BlipProcessor(image_processor, tokens).save_pretrained(folder)


# --- Recap ---------------------------------------------------------------------------------------------------------


def recap(family: str, folder: Path, model: Path, data: Path, config: Finetune) -> tuple[Turn, list[Pair]]:
    """A turn as `recap.finetune.run` takes it; and the pairs that batches are drawn of."""
    accelerator = open_accelerator("no", "cpu")
    captioner = open_tunable(Captioner(family=family, model=str(model), dtype="float32"), "cpu")
    torch.manual_seed(0)
    captioner.prepare(config, [])
    styles = {name: Style(prompt=prompt) for name, prompt in PROMPTS.items()}
    images, _ = read_dataset(Dataset(format="imagefolder", captions=str(data)))
    pairs, _ = to_pairs(images, styles, captioner, config.max_tokens)
    stage = StageDir(folder, {})
    stage.begin()
    features = None
    if config.cache_features:
        started = time.perf_counter()
        features = Features(folder / "features.npy", pairs, "cpu")
        features.fill(captioner, config.batch_size)
        print(f"  (encoding {len(images)} images once took {time.perf_counter() - started:.1f} s, not counted below)")
    batches = Batches(pairs, config, captioner.num_tokens, None if features else captioner.preprocess)
    training = Training(stage, accelerator, captioner, styles, config, features)
    loader = batches.loader(range(config.steps or 0))
    bar = tqdm(disable=True)

    def turn(step: int) -> float:
        training.step(next(loader), bar)
        recent = training.history.recent
        return recent[-1] if recent else training.history.losses[-1][1]

    return turn, pairs


# --- the plain loop ------------------------------------------------------------------------------------------------

Losses = Callable[[list[Pair]], tuple[torch.Tensor, int]]
"""A part of a batch → mean loss, and over how many tokens."""


def plain_blip2(folder: Path) -> tuple[Any, Losses]:
    """The processor puts as many `<image>` ids before the text as there are query tokens; nothing is learned of them,
    of the prompt and of padding; a caption ends in the newline that the model ends on.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import Blip2ForConditionalGeneration, Blip2Processor
    processor: Any = Blip2Processor.from_pretrained(folder)
    base: Any = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(
        r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=LORA.dropout,
        target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    starts = {style: NUM_QUERY_TOKENS + len(processor.tokenizer(prompt)["input_ids"])
              for style, prompt in PROMPTS.items()}
    image_id, pad_id = base.config.image_token_index, processor.tokenizer.pad_token_id

    def losses(part: list[Pair]) -> tuple[torch.Tensor, int]:
        texts = [f"{PROMPTS[pair.style]} {pair.caption}\n" for pair in part]
        inputs = processor(images=opened(part), text=texts, padding=True, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[(labels == image_id) | (labels == pad_id)] = IGNORE
        ignore_prompts(labels, part, starts)
        return model(**inputs, labels=labels).loss, int((labels != IGNORE).sum())

    return model, losses


def plain_blip(folder: Path) -> tuple[Any, Losses]:
    """A caption starts with `[DEC]` and ends with `[SEP]`; nothing is learned of the prompt and of padding."""
    from transformers import BlipForConditionalGeneration, BlipProcessor
    processor: Any = BlipProcessor.from_pretrained(folder)
    model: Any = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    starts = {style: len(processor.tokenizer(prompt)["input_ids"]) - 1 for style, prompt in PROMPTS.items()}

    def losses(part: list[Pair]) -> tuple[torch.Tensor, int]:
        texts = [f"{PROMPTS[pair.style]} {pair.caption}" for pair in part]
        inputs = processor(images=opened(part), text=texts, padding=True, return_tensors="pt")
        inputs["input_ids"][:, 0] = model.config.text_config.bos_token_id
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
        ignore_prompts(labels, part, starts)
        return model(**inputs, labels=labels).loss, int((labels != IGNORE).sum())

    return model, losses


def opened(part: list[Pair]) -> list[Image.Image]:
    return [Image.open(pair.image.url).convert("RGB") for pair in part]


def ignore_prompts(labels: torch.Tensor, part: list[Pair], starts: dict[str, int]) -> None:
    for row, pair in zip(labels, part, strict=True):
        row[:starts[pair.style]] = IGNORE


def plain(model: Any, losses: Losses, config: Finetune, pairs: list[Pair]) -> Turn:
    """A turn of the loop that a careful user writes from the libraries' documentation."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr, weight_decay=0.0)

    def turn(step: int) -> float:
        batch = draw_batch(pairs, step, config.batch_size, config.seed)
        size = config.micro_batch_size or len(batch)
        parts, total, count = [batch[start:start + size] for start in range(0, len(batch), size)], 0.0, 0
        for part in parts:
            loss, num_tokens = losses(part)
            (loss / len(parts)).backward()
            total, count = total + loss.item() * num_tokens, count + num_tokens
        optimizer.step()
        optimizer.zero_grad()
        return total / count

    return turn


FAMILIES: dict[str, tuple[Callable[[Path, list[str]], None], Callable[[Path], tuple[Any, Losses]]]] = {
    "blip2": (write_blip2, plain_blip2), "blip": (write_blip, plain_blip)}
"""Name → writes a model; opens it for a plain loop."""


# --- turn by turn --------------------------------------------------------------------------------------------------


def compare(family: str, name: str, config: Finetune, repeats: int, model: Path, data: Path) -> None:
    """Print what one setting gives."""
    with tempfile.TemporaryDirectory() as folder:
        ours, pairs = recap(family, Path(folder) / "stage", model, data, config)
        theirs = plain(*FAMILIES[family][1](model), config, pairs)
        found, known = ours(0), theirs(0)  # also warms up
        if not abs(found - known) <= MAX_LOSS_DIFFERENCE * known:  # NaN, too
            sys.exit(f"{name}: Recap's first loss is {found}, the plain loop's {known}: this is not the same work")
        seconds: dict[str, list[float]] = {"recap": [], "plain": []}
        for step in range(1, repeats + 1):
            turns = [("recap", ours), ("plain", theirs)]
            for who, turn in turns if step % 2 else reversed(turns):
                started = time.perf_counter()
                turn(step)
                seconds[who].append(time.perf_counter() - started)
    ratios = [theirs / ours for ours, theirs in zip(seconds["recap"], seconds["plain"], strict=True)]
    rates = {who: config.batch_size / statistics.median(found) for who, found in seconds.items()}
    print(f"{family:<5} {name:<13} Recap {rates['recap']:6.2f} images/s   plain loop {rates['plain']:6.2f} images/s   "
          f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} over {repeats} turns)   "
          f"load {os.getloadavg()[0]:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="blip2")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="by default all that suit the family")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' plans
    with tempfile.TemporaryDirectory() as folder:
        data, model = Path(folder) / "data", Path(folder) / "model"
        data.mkdir()
        write_dataset(data)
        rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
        texts = [f"{row['short']}\n{row['long']}" for row in rows]
        FAMILIES[arguments.family][0](model, [*texts, *PROMPTS.values()])
        # What is trained of BLIP includes its vision model, whose features change.
        for name in arguments.settings or [each for each in SETTINGS if (arguments.family, each) != (
                "blip", "kept-features")]:
            config = Finetune(steps=arguments.repeats + 1, batch_size=arguments.batch_size, lr=1e-4, lora=LORA,
                              **SETTINGS[name])
            compare(arguments.family, name, config, arguments.repeats, model, data)


if __name__ == "__main__":
    main()
