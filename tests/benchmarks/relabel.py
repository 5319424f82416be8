"""Images per second of Recap's relabelling, and of a plain loop over transformers, turn by turn in one run.

    python tests/benchmarks/relabel.py [--model small|opt-2.7b] [--device cpu|cuda] [--lengths fixed drawn] [--turns 3]

Both read the same shards of photos, write the same two captions of every image to new shards, and have the same model
(random weights in the real classes) in the same dtype; a caption ends at a fixed length, or at lengths drawn from those
of people's captions. Each side takes the best of its own batch sizes, found first. The machine's own speed changes by
the minute, therefore only neighbouring turns are compared: the ratio is their median, with the extremes.

Beside them stands Recap's model alone, with images that are preprocessed already: what is left is the cost of reading,
decoding and writing. The hardware's limit is worked out from the operations and bytes that the model needs, and from
the rates of a large matrix product and a large copy, measured on the spot.
"""

import argparse
import importlib.metadata
import io
import json
import os
import platform
import random
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import webdataset
from PIL import Image
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    LogitsProcessor,
)
from transformers.utils import logging

from recap.captioners import blip2, open_captioner
from recap.captioners.continuous import Begun, Row
from recap.captioners.vocabulary import learn_vocabulary
from recap.config import Data, Style
from recap.config.captioner import Captioner
from recap.config.relabel import Images, Relabel
from recap.relabel import Job
from recap.sample import Sample, decode_image, visible
from recap.shards import ShardWriter, read_shard

SHARED = Path(__file__).parents[3] / "shared" / "data"
PROMPTS = {"short": "A short caption:", "long": "A detailed caption:"}
NUM_QUERY_TOKENS = 32


@dataclass(frozen=True)
class Size:
    """A BLIP-2, its captions, and how much of it is measured."""

    vision: dict[str, int]
    qformer: dict[str, int]
    text: dict[str, int]
    fixed: dict[str, int]
    """Style → tokens of a caption."""
    num_images: int
    batch_sizes: list[int]
    num_slots: list[int]


SIZES = {
    # Vision and language parts cost about the same.
    "small": Size(
        vision={"hidden_size": 448, "num_hidden_layers": 11, "num_attention_heads": 7, "intermediate_size": 1792,
                "image_size": 224, "patch_size": 16},
        qformer={"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 1536},
        text={"hidden_size": 512, "num_hidden_layers": 5, "num_attention_heads": 8, "ffn_dim": 2048,
              "vocab_size": 24000},
        fixed={"short": 12, "long": 36}, num_images=96, batch_sizes=[8, 16, 32], num_slots=[32, 64]),
    "opt-2.7b": Size(
        vision={"hidden_size": 1408, "num_hidden_layers": 39, "num_attention_heads": 16, "intermediate_size": 6144,
                "image_size": 224, "patch_size": 14},
        qformer={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        text={"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 10240,
              "vocab_size": 50304},
        fixed={"short": 32, "long": 128}, num_images=2048, batch_sizes=[32, 64, 128, 256], num_slots=[256, 512]),
}


# --- the same for both ---------------------------------------------------------------------------------------------


def write_model(folder: Path, size: Size, texts: list[str], dtype: torch.dtype, device: str) -> None:
    """A BLIP-2 with random weights and its processor."""
    tokenizer = learn_vocabulary(texts, 8000)
    tokenizer.add_bos_token = True
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    image_size = size.vision["image_size"]
    processor: Any = Blip2Processor(BlipImageProcessor(size={"height": image_size, "width": image_size}), tokenizer,
                                    NUM_QUERY_TOKENS)
    config = Blip2Config(
        vision_config=size.vision,
        qformer_config={**size.qformer, "encoder_hidden_size": size.vision["hidden_size"]},
        text_config={**size.text, "model_type": "opt", "word_embed_proj_dim": size.text["hidden_size"],
                     "init_std": 1.6 / size.text["hidden_size"]**0.5,  # with less, a caption is one word many times
                     "max_position_embeddings": 2048, "bos_token_id": tokenizer.bos_token_id,
                     "pad_token_id": tokenizer.pad_token_id, "eos_token_id": newline},
        num_query_tokens=NUM_QUERY_TOKENS)
    config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    with torch.device(device):
        model = Blip2ForConditionalGeneration(config).to(dtype)
    with torch.no_grad():  # a logit of 0 is never the largest: captions end by their length, and are made of words
        embeddings = model.language_model.get_output_embeddings().weight
        embeddings[newline] = 0
        embeddings[len(tokenizer):] = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def photos() -> list[bytes]:
    """Real ones of 400 to 640 pixels; noise, where shared/data is not there."""
    if SHARED.is_dir():
        with tarfile.open(SHARED / "photos" / "coco-open-00000.tar") as tar:
            return [file.read() for each in tar if each.name.endswith(".jpg") and (file := tar.extractfile(each))]
    found = []
    for seed in range(50):
        noise = Image.frombytes("RGB", (80, 60), random.Random(seed).randbytes(80 * 60 * 3))
        noise.resize((640, 480), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def written_captions() -> dict[str, list[str]]:
    """People's: one sentence of COCO, and the first two of ImageInWords; of as many words without shared/data."""
    if SHARED.is_dir():
        coco = json.loads((SHARED / "captions" / "coco_fakecap_tokenized.json").read_text())
        rows = [json.loads(line) for line in (SHARED / "long_captions" / "IIW-400.jsonl").read_text().splitlines()]
        return {"short": [text for row in coco for text in row["refs"]],
                "long": [". ".join(row["IIW"].split(". ")[:2]) for row in rows if row["IIW"]]}
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubcdfglmnprst", k=draw.randint(2, 9))) for _ in range(2000)]
    return {style: [" ".join(draw.choices(words, k=draw.randint(*some))) for _ in range(400)]
            for style, some in {"short": (8, 16), "long": (25, 70)}.items()}


def write_shard(path: Path, num_images: int) -> None:
    files = photos()
    with ShardWriter(str(path)) as writer:
        for place in range(num_images):
            writer.write(Sample(path.stem, f"{place:06}", {"jpg": files[place % len(files)], "txt": b"a photo"}))


class Lengths:
    """How long each caption is, in tokens: fixed, or drawn from people's."""

    def __init__(self, size: Size, drawn: bool, texts: dict[str, list[str]], tokenizer: Any) -> None:
        self.most = dict(size.fixed)
        self.drawn: dict[str, list[int]] = {}
        if drawn:
            counts = {style: [len(tokenizer(text)["input_ids"]) for text in found] for style, found in texts.items()}
            self.most = {style: max(size.fixed[style], *sorted(counts[style])[-1:]) for style in PROMPTS}
            self.drawn = {style: random.Random(0).choices(counts[style], k=10_000) for style in PROMPTS}

    def of(self, place: int, style: str) -> int:
        return self.drawn[style][place] if self.drawn else self.most[style]

    def mean(self, style: str, num_images: int) -> float:
        return statistics.mean(self.of(place, style) for place in range(num_images))


# --- the plain loop ------------------------------------------------------------------------------------------------


class EndAt(LogitsProcessor):
    """A caption ends when it has its length, and not before."""

    def __init__(self, lengths: list[int], start: int, end: int) -> None:
        self.lengths, self.start, self.end = torch.tensor(lengths), start, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        scores[(self.lengths <= input_ids.shape[1] - self.start + 1).to(scores.device), self.end] = torch.inf
        return scores


class Plain:
    """What a careful user writes from the documentation: a batch is decoded and captioned, in one style and the other.

    With a GPU, a DataLoader's processes read and preprocess; without one, they would only take the model's cores.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str, lengths: Lengths) -> None:
        self.processor: Any = Blip2Processor.from_pretrained(folder)
        self.model: Any = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.device, self.lengths = device, lengths
        dot = Image.new("RGB", (32, 32))  # without an image the processor leaves out its placeholders
        self.texts = {style: self.processor(images=dot, text=prompt, return_tensors="pt").to(device)["input_ids"]
                      for style, prompt in PROMPTS.items()}

    def run(self, shard: Path, out: Path, batch_size: int) -> list[dict[str, str]]:
        """Write a shard with captions; the captions."""
        dataset = webdataset.WebDataset(str(shard), shardshuffle=False, nodesplitter=None).map(self._preprocess)
        loader = torch.utils.data.DataLoader(dataset, batch_size, collate_fn=list,
                                             num_workers=1 if self.device == "cuda" else 0)
        found: list[dict[str, str]] = []
        with webdataset.TarWriter(str(out)) as writer:
            for batch in loader:
                captions = self._caption(torch.stack([pixels for _, pixels in batch]), len(found))
                for (sample, _), texts in zip(batch, captions, strict=True):
                    added = {f"{style}.txt": text for style, text in texts.items()}
                    writer.write({name: content for name, content in sample.items() if name != "__url__"} | added)
                found += captions
        return found

    def _preprocess(self, sample: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        return sample, self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def _caption(self, pixels: torch.Tensor, place: int) -> list[dict[str, str]]:
        pixels = pixels.to(self.device, self.model.dtype)
        found = {}
        for style, text in self.texts.items():
            text, start = text.expand(len(pixels), -1), text.shape[1]
            lengths = [self.lengths.of(place + row, style) for row in range(len(pixels))]
            rule = EndAt(lengths, start, self.model.config.text_config.eos_token_id)
            ids = self.model.generate(pixel_values=pixels, input_ids=text, attention_mask=torch.ones_like(text),
                                      max_new_tokens=max(lengths), do_sample=False, logits_processor=[rule])
            found[style] = self.processor.batch_decode(ids[:, start:], skip_special_tokens=True)
        return [dict(zip(found, texts, strict=True)) for texts in zip(*found.values(), strict=True)]


# --- Recap ---------------------------------------------------------------------------------------------------------


class Ours:
    """Recap's relabelling; and its model alone, with images that are preprocessed already."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str, lengths: Lengths, out: Path) -> None:
        name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
        styles = {style: Style(prompt=prompt, max_new_tokens=lengths.most[style]) for style, prompt in PROMPTS.items()}
        config = Relabel(images=Images(duplicates="ignore"))
        self.job = Job(str(out), Captioner(model=str(folder), dtype=name), None, styles, config, Data(),
                       "benchmark")
        self.captioner = open_captioner(self.job.captioner, device)
        self.device, self.out, self.styles = device, out, styles

    def run(self, shard: Path, batch_size: int, num_slots: int) -> list[dict[str, str]]:
        with self.job.open(self.device, lambda *_: None) as worker:
            worker.captioner, worker.batch_size, worker.num_slots = self.captioner, batch_size, num_slots
            list(worker.process([str(shard)]))
        samples = read_shard(str(self.out / shard.name), [])
        return [{style: sample.caption(style) or "" for style in PROMPTS} for sample in samples]

    def preprocess(self, shard: Path, batch_size: int) -> list[torch.Tensor]:
        images = [decode_image(sample.image_bytes) for sample in read_shard(str(shard), [])]
        return [self.captioner.preprocess(images[start:start + batch_size])
                for start in range(0, len(images), batch_size)]

    def model_alone(self, pixels: list[torch.Tensor], num_slots: int) -> None:
        for _ in self.captioner.captions(pixels, self.styles, num_slots):
            pass

    @torch.no_grad()
    def encode_alone(self, pixels: list[torch.Tensor]) -> None:
        for batch in pixels:
            self.captioner.encode(batch)


def end_at(lengths: Lengths) -> None:
    """Let captions in the slots end at their lengths; the plain loop's last token is the end."""
    class WithLengths(Begun[tuple[int, str]]):
        def row(self, place: int) -> Row[tuple[int, str]]:
            row = super().row(place)
            row.max_new_tokens = max(1, lengths.of(*row.name) - 1)
            return row
    blip2.Begun = WithLengths  # type: ignore[misc]


# --- the hardware's limit ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the hardware gives: operations of a large matrix product and bytes of a large copy, per second."""

    operations: float
    bytes: float

    @classmethod
    def measure(cls, dtype: torch.dtype, device: str) -> "Ceilings":
        n = 8192 if device == "cuda" else 2048
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        source = torch.randn(2**28 if device == "cuda" else 2**26, device=device)
        target = torch.empty_like(source)
        return cls(2 * n**3 / best_seconds(lambda: a @ b, device),
                   2 * source.nbytes / best_seconds(lambda: target.copy_(source), device))

    def seconds(self, operations: float, num_bytes: float) -> float:
        return max(operations / self.operations, num_bytes / self.bytes)


def best_seconds(work: Callable[[], Any], device: str) -> float:
    found = []
    for _ in range(10):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - started)
    return min(found)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def limit(model: Any, ceilings: Ceilings, lengths: Lengths, num_images: int, batch_size: int,
          num_slots: int) -> dict[str, float]:
    """Seconds that each part of an image needs at the ceilings: for its operations or bytes, whichever takes longer.

    A linear layer takes two operations for each weight and token; attention, four for each width, token and token seen.
    Weights are read once for each batch, or each step of all slots; what slots have seen, in each step.
    """
    parts = {"vision": model.vision_model, "Q-Former": model.qformer, "language": model.language_model}
    weights = {name: sum(p.numel() for module in part.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
                         for p in module.parameters()) for name, part in parts.items()}
    size = model.dtype.itemsize
    vision, text = model.config.vision_config, model.config.text_config
    num_patches = (vision.image_size // vision.patch_size) ** 2 + 1
    image = NUM_QUERY_TOKENS
    seen = 4 * text.hidden_size * text.num_hidden_layers
    looks = 4 * num_patches**2 * vision.hidden_size * vision.num_hidden_layers
    operations = {"vision": 2 * weights["vision"] * num_patches + looks, "Q-Former": 2 * weights["Q-Former"] * image}
    found = {name: ceilings.seconds(count, weights[name] * size / batch_size) for name, count in operations.items()}
    prompts = {style: len(PROMPTS[style].split()) + 2 for style in PROMPTS}  # about as many tokens as words
    num_read = image + sum(prompts.values())
    found["prompts"] = ceilings.seconds(2 * weights["language"] * num_read + seen * num_read * image / 2,
                                        weights["language"] * size / batch_size)
    for style in PROMPTS:
        steps = lengths.mean(style, num_images) - 1
        context = image + prompts[style] + steps / 2
        found[f"{style} captions"] = ceilings.seconds(
            steps * (2 * weights["language"] + seen * context),
            steps * (weights["language"] * size / num_slots + seen / 2 * context * size))
    return found


# --- turn by turn --------------------------------------------------------------------------------------------------


def timed(work: Callable[[], Any], device: str) -> float:
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def best(options: list[Any], work: Callable[[Any], Any], device: str) -> Any:
    """The option that takes the least time; one that the memory does not suffice for is none."""
    found = {}
    for option in options:
        try:
            found[option] = timed(lambda option=option: work(option), device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return min(found, key=lambda option: found[option])


def measure(size: Size, folder: Path, device: str, dtype: torch.dtype, drawn: bool, turns: int,
            texts: dict[str, list[str]]) -> dict[str, Any]:
    """One setting."""
    shard, few = folder / "in" / "00000.tar", folder / "few" / "00000.tar"
    lengths = Lengths(size, drawn, texts, Blip2Processor.from_pretrained(folder / "model").tokenizer)
    plain = Plain(folder / "model", dtype, device, lengths)
    ours = Ours(folder / "model", dtype, device, lengths, folder / "out")
    end_at(lengths)
    said, expected = ours.run(few, size.batch_sizes[0], size.num_slots[0]), plain.run(few, folder / "plain.tar", 8)
    equal = [a[style] == visible(b[style]) for a, b in zip(said, expected, strict=True) for style in PROMPTS]
    their_batch = best(size.batch_sizes, lambda batch: plain.run(shard, folder / "plain.tar", batch), device)
    pairs = [(batch, slots) for batch in size.batch_sizes for slots in size.num_slots]
    batch, slots = best(pairs, lambda pair: ours.run(shard, *pair), device)
    pixels = ours.preprocess(shard, batch)
    works = {"Recap": lambda: ours.run(shard, batch, slots),
             "plain loop": lambda: plain.run(shard, folder / "plain.tar", their_batch),
             "model alone": lambda: ours.model_alone(pixels, slots),
             "of it, the image's part": lambda: ours.encode_alone(pixels)}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns):
        for name in works if turn % 2 else reversed(works):
            seconds[name].append(timed(works[name], device))
    least = limit(plain.model, Ceilings.measure(dtype, device), lengths, size.num_images, batch, slots)
    return {"equal": sum(equal) / len(equal), "num_captions": len(equal), "seconds": seconds, "limit": least,
            "batch": batch, "slots": slots, "their_batch": their_batch,
            "tokens": {style: lengths.mean(style, size.num_images) for style in PROMPTS}}


def show(found: dict[str, Any], num_images: int) -> None:
    seconds, limits = found["seconds"], found["limit"]
    print(f"  {found['equal']:.1%} of {found['num_captions']} captions equal; tokens on average "
          + ", ".join(f"{style} {count:.0f}" for style, count in found["tokens"].items()))
    print(f"  Recap: batch {found['batch']}, {found['slots']} slots; plain loop: batch {found['their_batch']}")
    for name, each in seconds.items():
        print(f"  {name:<28} {num_images / statistics.median(each):8.2f} images/s")
    print(f"  {'Recap to plain loop':<28} {ratio(seconds['plain loop'], seconds['Recap'])}")
    print(f"  {'whole to its model alone':<28} {ratio(seconds['Recap'], seconds['model alone'])}"
          "   what is over 1 is reading, decoding and writing")
    whole = sum(limits.values())
    rate = num_images / statistics.median(seconds["Recap"])
    print(f"  {'limit of the hardware':<28} {1 / whole:8.2f} images/s, of which Recap reaches {rate * whole:.0%}; its "
          "time goes to " + ", ".join(f"{name} {part / whole:.0%}" for name, part in limits.items()))


def ratio(theirs: list[float], ours: list[float]) -> str:
    found = [a / b for a, b in zip(theirs, ours, strict=True)]
    return f"{statistics.median(found):8.2f} ({min(found):.2f} to {max(found):.2f} over {len(found)} turns)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=SIZES, default="opt-2.7b" if has_gpu else "small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_gpu else "cpu")
    parser.add_argument("--lengths", nargs="+", choices=["fixed", "drawn"], default=["fixed", "drawn"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--images", type=int, help="by default as many as suit the model")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # the libraries' plans
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    size = SIZES[arguments.model]
    size = size if arguments.images is None else Size(**{**vars(size), "num_images": arguments.images})
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    texts = written_captions()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shard(folder / "in" / "00000.tar", size.num_images)
        write_shard(folder / "few" / "00000.tar", min(size.num_images, 200))
        write_model(folder / "model", size, [*texts["short"], *texts["long"], *PROMPTS.values()], dtype,
                    arguments.device)
        print(heading(arguments.model, size.num_images, dtype, arguments.device), flush=True)
        for lengths in arguments.lengths:
            print(f"\ncaptions of {lengths} lengths", flush=True)
            found = measure(size, folder, arguments.device, dtype, lengths == "drawn", arguments.turns, texts)
            show(found, size.num_images)
    if not has_gpu:
        print("\nNo GPU here: BLIP-2 OPT-2.7B in bf16 is measured by the same command where there is one.")


def heading(model: str, num_images: int, dtype: torch.dtype, device: str) -> str:
    hardware = torch.cuda.get_device_name() if device == "cuda" else (
        f"{torch.get_num_threads()} threads of {os.cpu_count()} CPU cores ({platform.machine()})")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    precision = str(dtype).removeprefix("torch.")
    return f"BLIP-2 {model}, {precision}, {num_images} images, {hardware}, {versions}, {date.today()}"


if __name__ == "__main__":
    main()
