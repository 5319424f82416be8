"""Images per second of Recap's training, and of diffusers' `train_text_to_image` procedure, turn by turn in one run.

    python tests/benchmarks/train.py [--model mid|small|sd14] [--device cpu|cuda] [--sides 256 512] [--turns 3]
    python tests/benchmarks/train.py --script PATH/train_text_to_image.py    the original script beside it, once
    python tests/benchmarks/train.py --flat 10000                            memory over so many steps of a tiny model

Both train the same UNet (random weights in the real classes) on the same photos and captions, at the same batch and
precision. The procedure is the script's work per step, written anew: decode, resize and crop in the training's own
process, encode by VAE and frozen text encoder, noise, one forward and backward, two figures fetched from the device,
gradients clipped, AdamW, the EMA of its `--use_ema`. Recap does equal work in "text frozen", and then what the script
can't: latents kept, the text encoder trained, captions of three windows. Each is a process of its own, with what Recap
or the script sets in it. The machine's own speed changes by the minute, therefore only neighbouring turns are compared:
the ratio is their median, with the extremes.

Utilisation is the model's operations, counted by torch's FlopCounterMode (encoding included, nothing computed twice),
over the rate of a large matrix product, measured on the spot; and over the hardware's published rate, where known.
"""

import argparse
import gc
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging

from recap.clip_bpe import clip_tokenizer
from recap.memory import free_memory, keep_freed_memory
from recap.processes import open_accelerator
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shards import ShardWriter
from train_t2i import latents
from train_t2i.config import Arm, Train
from train_t2i.data import Batch, Parts, steps
from train_t2i.ema import EMA
from train_t2i.model import Diffusion
from train_t2i.sample import load_pipeline
from train_t2i.train import open_optimizer, prepare
from train_t2i.update import Updater

SHARED = Path(__file__).parents[3] / "shared" / "data"
SHORT = "A dog runs along the beach beside a child with a red kite."
LONG = " ".join(["A brown dog with a white chest runs along the wet sand, and a child in a coat follows it."] * 9)
PUBLISHED = {"NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12}
"""Dense bf16 operations per second, by the maker's data sheets."""


@dataclass(frozen=True)
class Size:
    """A Stable Diffusion 1.x, and how much of it is measured."""

    unet: tuple[int, ...]
    vae: tuple[int, ...]
    text: dict[str, int]
    heads: int
    batch_size: int
    num_steps: int
    layers_per_block: int = 2
    mid_block: str | None = "UNetMidBlock2DCrossAttn"


SIZES = {
    # A quarter of SD 1.4's widths, in as wide heads: UNet, VAE and text encoder cost one another what they do there.
    "mid": Size((80, 160, 320, 320), (32, 64, 128, 128),
                {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3}, 2,
                batch_size=8, num_steps=6),
    # The same quarter of BK-SDM-Small (arXiv 2305.15798): a UNet of less depth, beside Stable Diffusion's own VAE.
    "small": Size((80, 160, 320, 320), (32, 64, 128, 128),
                  {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3}, 2,
                  batch_size=8, num_steps=6, layers_per_block=1, mid_block=None),
    "sd14": Size((320, 640, 1280, 1280), (128, 256, 512, 512),
                 {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}, 8,
                 batch_size=64, num_steps=20),
}


# --- the same for both -----------------------------------------------------------------------------------------------


def write_model(folder: Path, size: Size, side: int) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(3, 3, ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, size.vae, layers_per_block=2,
                        latent_channels=4, sample_size=side)
    unet = UNet2DConditionModel(sample_size=side // 8, block_out_channels=size.unet,
                                layers_per_block=size.layers_per_block, mid_block_type=size.mid_block,
                                norm_num_groups=16 if size.unet[0] % 32 else 32, attention_head_dim=size.heads,
                                cross_attention_dim=size.text["hidden_size"])
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, bos_token_id=49406,
                                        eos_token_id=49407, pad_token_id=49407, projection_dim=size.text["hidden_size"],
                                        **size.text))
    scheduler: Any = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                   clip_sample=False, set_alpha_to_one=False)
    pipe: Any = StableDiffusionPipeline(vae, text, clip_tokenizer(), unet, scheduler, safety_checker=None,
                                        feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)


def photos() -> list[bytes]:
    """Real ones of 400 to 640 pixels; noise, where shared/data is not there."""
    if SHARED.is_dir():
        with tarfile.open(SHARED / "photos" / "coco-open-00000.tar") as tar:
            return [file.read() for each in tar if each.name.endswith(".jpg") and (file := tar.extractfile(each))]
    found = []
    for seed in range(50):
        noise = torch.randint(256, (60, 80, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize((640, 480)).save(file := io.BytesIO(), "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def write_shards(folder: Path) -> list[str]:
    """Eight shards of photos with a caption of one window and one of three."""
    images = photos()
    for place in range(8):
        with ShardWriter(str(folder / f"{place:05d}.tar")) as writer:
            for index, image in enumerate(images):
                writer.write(Sample(f"{place:05d}", f"{index:04d}", {
                    "jpg": image, "txt": SHORT.encode(), "long.txt": LONG.encode()}))
    return sorted(map(str, folder.glob("*.tar")))


# --- the script's procedure ------------------------------------------------------------------------------------------


class Peer:
    """What `train_text_to_image.py` does for a step, at its defaults; with `--use_ema`, as Recap always has one."""

    def __init__(self, model: Path, side: int, batch_size: int, precision: str, device: str,
                 keeps_memory: bool = False) -> None:
        if keeps_memory:
            keep_freed_memory()
        self.accelerator = Accelerator(mixed_precision=precision, cpu=device == "cpu")
        dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
        pipe = StableDiffusionPipeline.from_pretrained(model)
        self.tokenizer, self.scheduler = pipe.tokenizer, DDPMScheduler.from_config(pipe.scheduler.config)
        self.vae = pipe.vae.requires_grad_(False).to(self.accelerator.device, dtype)
        self.text = pipe.text_encoder.requires_grad_(False).to(self.accelerator.device, dtype)
        self.dtype, self.parameters = dtype, list(pipe.unet.parameters())
        pipe.unet.train()
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=1e-2)
        self.unet, self.optimizer = self.accelerator.prepare(pipe.unet, optimizer)
        self.ema = EMAModel([p.detach().clone() for p in self.parameters])
        self.ema.to(self.accelerator.device)
        self.transform = transforms.Compose([
            transforms.Resize(side, interpolation=transforms.InterpolationMode.LANCZOS), transforms.CenterCrop(side),
            transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
        self.images, self.batch_size = cycle(photos()), batch_size

    def step(self) -> None:
        pixels, ids = self._batch()
        with torch.no_grad():
            latents = self.vae.encode(pixels.to(self.dtype)).latent_dist.sample() * self.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),),
                                      device=latents.device).long()
            noisy = self.scheduler.add_noise(latents.float(), noise.float(), timesteps).to(self.dtype)
            states = self.text(ids, return_dict=False)[0]
        loss = F.mse_loss(self.unet(noisy, timesteps, states, return_dict=False)[0].float(), noise.float())
        self.accelerator.gather(loss.repeat(self.batch_size)).mean().item()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        loss.detach().item()

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        images = [self.transform(Image.open(io.BytesIO(next(self.images))).convert("RGB"))
                  for _ in range(self.batch_size)]
        ids = self.tokenizer([SHORT] * self.batch_size, max_length=77, padding="max_length", truncation=True,
                             return_tensors="pt").input_ids
        return torch.stack(images).to(self.accelerator.device), ids.to(self.accelerator.device)


# --- Recap's ---------------------------------------------------------------------------------------------------------


class Ours:
    """The steps of `train_t2i.train`, without its log."""

    def __init__(self, config: Train, shards: list[str], arm: Arm, kept: Path | None, device: str) -> None:
        if device == "cpu":  # as the command does
            keep_freed_memory()
        self.accelerator = open_accelerator(config.precision, device)
        self.config = config
        self.model = Diffusion(load_pipeline(config, "train", str(self.accelerator.device)), config).train()
        prepared, optimizer = prepare(self.accelerator, self.model, open_optimizer(self.model, config))
        self.ema = EMA(self.model, config.ema_decay)
        self.update = Updater(self.accelerator, prepared, optimizer, config, 0)
        self.parts = steps(Parts(shards, arm, config, 0, self.model.recipe, kept), pin=device == "cuda")
        self.done, self.waited = 0, 0.0

    def step(self) -> None:
        began = time.perf_counter()
        part = next(self.parts)
        self.waited += time.perf_counter() - began
        updated = self.update(self.done, part.batches, 1.0)
        self.ema.update(self.model, self.done)
        self.done += 1
        if self.done % self.config.log_every == 0:
            updated.loss.item()

    def flops(self) -> int:
        """Of one step's images: encoding, forward and backward."""
        batch: Batch = next(self.parts).batches[0].slice(0, 1).to(self.accelerator.device)
        with FlopCounterMode(display=False) as counter:
            self.model(batch).sum().backward()
        self.model.zero_grad(set_to_none=True)
        return counter.get_total_flops() * self.config.batch_size


# --- turns -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a contestant says of itself at the end."""

    flops: int
    """Of a step; 0 where they are not counted."""
    waited: float
    """For data, seconds a step."""
    memory: float
    """Peak of a GPU's, GiB."""


class Contestant:
    """Steps in a process of its own, which stands still between its turns."""

    def __init__(self, make: Callable[[], Any], device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make, device))
        self.process.start()
        theirs.close()

    def ask(self, num_steps: int | None) -> Any:
        self.connection.send(num_steps)
        return self.connection.recv()


def serve(connection: Any, make: Callable[[], Any], device: str) -> None:
    """Seconds for one of so many steps, as often as asked; at None, the facts."""
    quiet()
    contestant = make()
    while (num_steps := connection.recv()) is not None:
        connection.send(timed(contestant.step, num_steps, device))
        free_memory()  # which the others need
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    is_ours = isinstance(contestant, Ours)
    connection.send(Facts(contestant.flops(), contestant.waited / contestant.done, memory) if is_ours else
                    Facts(0, 0, memory))
    if is_ours:
        contestant.parts.close()


def timed(step: Callable[[], object], num_steps: int, device: str) -> float:
    """Seconds for one step."""
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()
    wait()
    began = time.perf_counter()
    for _ in range(num_steps):
        step()
    wait()
    return (time.perf_counter() - began) / num_steps


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * n ** 3 / min(timed(lambda: torch.mm(a, b), 3, device) for _ in range(5))


def measure(size: Size, side: int, folder: Path, device: str, turns: int) -> None:
    """One side's table; a turn has all contestants, one after the other."""
    precision = "bf16" if device == "cuda" else "no"
    model = folder / f"model-{side}"
    write_model(model, size, side)
    shards = write_shards(folder / "shards")
    config = Train(model=str(model), resolution=side, batch_size=size.batch_size, caption_dropout=0, lr=1e-4,
                   train_text_encoder=False, precision=precision, num_workers=8 if device == "cuda" else 1,
                   compile=device == "cuda", cache_latents=False)
    kept = StageDir(folder / f"latents-{side}", {})
    kept.begin()
    latents.run(kept, shards, config, device)
    short, long = Arm(captions={"alt": 1}), Arm(captions={"long": 1})
    whole = config.model_copy(update={"train_text_encoder": True})
    peer = partial(Peer, model, side, size.batch_size, precision, device)
    contestants = {name: Contestant(make, device) for name, make in {
        "diffusers' procedure": peer,
        **({"diffusers' procedure, freed memory kept": partial(peer, keeps_memory=True)} if device == "cpu" else {}),
        "Recap, text frozen": partial(Ours, config, shards, short, None, device),
        "Recap, text frozen, kept latents": partial(Ours, config, shards, short, kept.path, device),
        "Recap, text trained, kept latents": partial(Ours, whole, shards, short, kept.path, device),
        "Recap, text trained, 3 windows, kept latents": partial(Ours, whole, shards, long, kept.path, device)}.items()}
    for each in contestants.values():
        each.ask(2)  # compiles, finds its kernels
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns):
        for name in contestants if turn % 2 else reversed(contestants):
            seconds[name].append(contestants[name].ask(size.num_steps))
    rate = matmul_rate(device, torch.bfloat16 if device == "cuda" else torch.float32)
    print(f"\n{side} px, batches of {size.batch_size}, {precision}; matrix products: {rate / 1e12:.3g} TFLOP/s")
    theirs = seconds["diffusers' procedure"]
    for name, each in contestants.items():
        mine = statistics.median(seconds[name])
        print(f"  {name:<46}{size.batch_size / mine:8.2f} images/s  {ratio(theirs, seconds[name])}"
              f"{described(each.ask(None), mine, rate, device)}", flush=True)
        each.process.join()


def described(facts: Facts, seconds: float, rate: float, device: str) -> str:
    """What there is to say of steps of so many seconds, where matrix products have that rate."""
    line = ""
    if facts.flops:
        line += f"  {facts.flops / seconds / rate:4.0%} of matrix products"
        line += "".join(f", {facts.flops / seconds / known:.0%} of the published rate" for name, known in
                        PUBLISHED.items() if device == "cuda" and name in torch.cuda.get_device_name())
        line += f"  data {facts.waited / seconds:.1%}"
    return line + (f"  {facts.memory:.1f} GiB" if device == "cuda" else "")


def ratio(theirs: list[float], ours: list[float]) -> str:
    found = [a / b for a, b in zip(theirs, ours, strict=True)]
    return f"{statistics.median(found):5.2f} ({min(found):.2f} to {max(found):.2f})"


# --- the original script, and memory ---------------------------------------------------------------------------------


def run_script(script: Path, size: Size, side: int, folder: Path, num_steps: int = 12) -> None:
    """The original script on the same photos: its own rate, from the times that it logs."""
    images = folder / "imagefolder"
    images.mkdir()
    lines = []
    for index, image in enumerate(photos()):
        (images / f"{index:04d}.jpg").write_bytes(image)
        lines.append(json.dumps({"file_name": f"{index:04d}.jpg", "text": SHORT}))
    (images / "metadata.jsonl").write_text("\n".join(lines))
    write_model(folder / "script-model", size, side)
    began = time.perf_counter()
    command = [sys.executable, str(script), "--pretrained_model_name_or_path", str(folder / "script-model"),
               "--train_data_dir", str(images), "--resolution", str(side), "--center_crop", "--use_ema",
               "--train_batch_size", str(size.batch_size), "--output_dir", str(folder / "script-out")]
    seconds = []
    for count in (2, num_steps + 2):  # the difference is without its start
        began = time.perf_counter()
        subprocess.run([*command, "--max_train_steps", str(count)], check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    print(f"  the original script, {num_steps} steps: "
          f"{size.batch_size * num_steps / (seconds[1] - seconds[0]):.2f} images/s")


def flat(num_steps: int, folder: Path) -> None:
    """Memory and open files over many steps of a tiny model."""
    from recap.world.base.stable_diffusion import build
    torch.manual_seed(0)
    build(32).save_pretrained(folder / "tiny")
    config = Train(model=str(folder / "tiny"), resolution=32, batch_size=2, lr=1e-5, shuffle_buffer=50, num_workers=1)
    ours = Ours(config, write_shards(folder / "shards"), Arm(captions={"alt": 1, "long": 1}), None, "cpu")
    with closing(ours.parts):
        for step in range(num_steps + 1):
            if step in (100, 1000) or step % max(num_steps // 4, 1) == 0:
                gc.collect()
                num_files = len(list(Path("/proc/self/fd").iterdir()))
                print(f"  after {step:6d} steps: {resident():7.1f} MiB, {num_files} open files", flush=True)
            ours.step()
    print(f"  never over {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def resident() -> float:
    """MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=SIZES, default="sd14" if has_gpu else "mid")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_gpu else "cpu")
    parser.add_argument("--sides", nargs="+", type=int, default=[256, 512] if has_gpu else [256])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--script", type=Path, help="diffusers' examples/text_to_image/train_text_to_image.py")
    parser.add_argument("--flat", type=int, metavar="STEPS", help="measure memory instead")
    arguments = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as name:
        if arguments.flat:
            flat(arguments.flat, Path(name))
            return
        print(heading(arguments.model, arguments.device), flush=True)
        for side in arguments.sides:
            measure(SIZES[arguments.model], side, Path(name), arguments.device, arguments.turns)
            if arguments.script:
                run_script(arguments.script, SIZES[arguments.model], side, Path(name))
    if not has_gpu:
        print("\nNo GPU here: Stable Diffusion 1.4 in bf16 is measured by the same command where there is one.")


def quiet() -> None:
    warnings.filterwarnings("ignore")  # the libraries' plans
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def heading(model: str, device: str) -> str:
    hardware = torch.cuda.get_device_name() if device == "cuda" else (
        f"{torch.get_num_threads()} threads of {os.cpu_count()} CPU cores ({platform.machine()})")
    found = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"Stable Diffusion {model}, {hardware}, {versions}, {date.today()}"


if __name__ == "__main__":
    main()
