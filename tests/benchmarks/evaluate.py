"""Images per second of Recap's features, and seconds of its Fréchet distance, beside clean-fid's and torchmetrics'.

    python tests/benchmarks/evaluate.py [--images 384] [--turns 3] [--device cpu|cuda]

All read the same PNG files of photos and have the same Inception, of random weights, in clean-fid's own file format;
the features, and FID by them, must be equal. Each contestant is a process of its own, as how memory is kept is a
process's; opening the network counts. clean-fid has the best of three numbers of its workers, found first. The
machine's own speed changes by the minute, therefore only neighbouring turns are compared: the ratio is their median,
with the extremes.

The distance is over features of as many dimensions as Inception's whose spectrum falls as its does.
"""

import argparse
import io
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import cleanfid.fid
import numpy as np
import scipy
import torch
from cleanfid.inception_torchscript import InceptionV3W
from inception import random_inception
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

from eval.config import Evaluate, Features
from eval.fid import Statistics, frechet, frechet_distance
from eval.fid import statistics as statistics_of
from eval.images import RealImages, image_files
from eval.measure import measure
from recap.timm_features import clean_resizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
WORKERS = (0, 2, 12)
"""Of clean-fid's DataLoader; 12 is its default."""
BATCH = 32
DIM, NUM = 2048, 10_000
"""Of the distance: features, and images on each side."""


def write_images(folder: Path, num: int) -> None:
    """Photos of 512 pixels as PNG; noise, where shared/data is not there."""
    folder.mkdir()
    if SHARED.is_dir():
        with tarfile.open(SHARED / "photos" / "subjects-00000.tar") as tar:
            files = [file.read() for each in tar if each.name.endswith(".jpg") and (file := tar.extractfile(each))]
        images = [Image.open(io.BytesIO(each)).convert("RGB").resize((512, 512)) for each in files]
    else:
        draw = random.Random(0)
        images = [Image.frombytes("RGB", (64, 64), draw.randbytes(64 * 64 * 3)).resize((512, 512)) for _ in range(50)]
    for place in range(num):
        images[place % len(images)].save(folder / f"{place:05d}.png")


# --- features ------------------------------------------------------------------------------------------------------


def recap(images: Path, inception: Path, device: str) -> np.ndarray:
    config = Evaluate(features=Features(model=f"clean-fid:{inception}"), batch_size=BATCH)
    with tempfile.TemporaryDirectory() as kept:
        found = measure(Path(kept), "features", config, RealImages(str(images), "images"), None, "features", device)
    assert found is not None
    return found.values["features"]


def clean_fid(images: Path, inception: Path, device: str, workers: int) -> np.ndarray:
    network = InceptionV3W(str(inception.parent), download=False).to(device)
    found: np.ndarray = cleanfid.fid.get_folder_features(
        str(images), network, num_workers=workers, batch_size=BATCH, device=torch.device(device), mode="clean",
        verbose=False)
    return found


class _Network(torch.nn.Module):
    num_features = DIM

    def __init__(self, inception: Path) -> None:
        super().__init__()
        self.network = InceptionV3W(str(inception.parent), download=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network(images)
        return found


def torchmetrics_fid(images: Path, inception: Path, device: str) -> Statistics:
    """What it keeps of features: their sums."""
    metric: Any = FrechetInceptionDistance(feature=_Network(inception)).to(device)
    resize = clean_resizer((299, 299))
    files = image_files(images)

    def read(path: Path) -> torch.Tensor:
        return torch.from_numpy(resize(np.asarray(Image.open(path).convert("RGB")))).permute(2, 0, 1)

    for start in range(0, len(files), BATCH):
        metric.update(torch.stack([read(path) for path in files[start:start + BATCH]]).to(device), real=True)
    num, total, products = (getattr(metric, f"real_features_{name}").double().cpu().numpy()
                            for name in ("num_samples", "sum", "cov_sum"))
    mu = total / num
    return Statistics(mu, (products - num * np.outer(mu, mu)) / (num - 1), int(num))


def contest(name: str, images: Path, inception: Path, device: str, out: Path) -> None:
    """One contestant's turn, in this process: its seconds, and the statistics that it found."""
    torch.set_num_threads(os.cpu_count() or 1)
    began = time.perf_counter()
    if name == "torchmetrics":
        found = torchmetrics_fid(images, inception, device)
        seconds = time.perf_counter() - began
    else:
        values = recap(images, inception, device) if name == "recap" else clean_fid(images, inception, device,
                                                                                     int(name.split()[-1]))
        seconds = time.perf_counter() - began
        found = statistics_of(values)
    np.savez(out, mu=found.mu, sigma=found.sigma, seconds=seconds)


def turn(name: str, images: Path, inception: Path, device: str) -> tuple[float, Statistics]:
    """Images per second, and what was found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.npz"
        subprocess.run([sys.executable, __file__, "--contestant", name, "--folder", str(images), "--inception",
                        str(inception), "--device", device, "--out", str(out)], check=True, stderr=subprocess.DEVNULL)
        with np.load(out) as content:
            num = len(image_files(images))
            return num / float(content["seconds"]), Statistics(content["mu"], content["sigma"], num)


def compare_features(images: Path, inception: Path, device: str, turns: int) -> None:
    few = min(WORKERS, key=lambda workers: -turn(f"clean-fid {workers}", images, inception, device)[0])
    rivals = [f"clean-fid {few}", "torchmetrics"]
    rates: dict[str, list[float]] = {name: [] for name in ("recap", *rivals)}
    found = {}
    for _ in range(turns):
        for name in rates:
            rate, found[name] = turn(name, images, inception, device)
            rates[name].append(rate)
    print(f"features of {len(image_files(images))} photos, 512 px, {device}, {os.cpu_count()} cores")
    print(f"  {'recap':<14} {statistics.median(rates['recap']):7.1f} images/s")
    scale = np.trace(found["recap"].sigma)
    for name in rivals:
        ratios = sorted(ours / theirs for ours, theirs in zip(rates["recap"], rates[name], strict=True))
        apart = frechet_distance(found["recap"], found[name]) / scale
        print(f"  {name:<14} {statistics.median(rates[name]):7.1f} images/s   recap has "
              f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times that; FID of the two "
              f"{apart:.0e} of the spread")


# --- the distance --------------------------------------------------------------------------------------------------


def draws(seed: int) -> Statistics:
    rng = np.random.default_rng(seed)
    spread = np.arange(1, DIM + 1) ** -0.6
    return statistics_of(rng.normal(size=(NUM, DIM)) * spread * (1 + 0.05 * seed) + 0.01 * seed)


def compare_distances(turns: int) -> None:
    a, b = draws(0), draws(1)
    as_tensors = [torch.from_numpy(value) for each in (a, b) for value in (each.mu, each.sigma)]
    contestants: dict[str, Callable[[], float]] = {
        "recap": lambda: frechet_distance(a, b),
        "clean-fid": lambda: float(cleanfid.fid.frechet_distance(a.mu, a.sigma, b.mu, b.sigma)),
        "torchmetrics": lambda: float(_compute_fid(*as_tensors)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    values = {}
    for _ in range(turns):
        for name, distance in contestants.items():
            began = time.perf_counter()
            values[name] = distance()
            seconds[name].append(time.perf_counter() - began)
    print(f"Fréchet distance, {DIM} features")
    for name in contestants:
        ratios = sorted(theirs / ours for theirs, ours in zip(seconds[name], seconds["recap"], strict=True))
        beside = "" if name == "recap" else (f"   recap takes 1/{statistics.median(ratios):.1f} of it ({ratios[0]:.1f} "
                                             f"to {ratios[-1]:.1f})")
        print(f"  {name:<14} {statistics.median(seconds[name]):7.2f} s   {values[name]:.10f}{beside}")
    began = time.perf_counter()
    rng = np.random.default_rng(0)
    frechet(rng.normal(size=(NUM, DIM)), Statistics(b.mu, b.sigma, 10 * NUM))
    print(f"  with pseudovalues of {NUM:,} images, from which intervals come: {time.perf_counter() - began:.1f} s")


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    for name in ("--contestant", "--folder", "--inception", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contest(options.contestant, Path(options.folder), Path(options.inception), options.device, Path(options.out))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", options.images)
        inception = Path(folder) / "inception-2015-12-05.pt"
        random_inception(inception)
        compare_features(Path(folder) / "images", inception, options.device, options.turns)
    compare_distances(options.turns)
    print(f"torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}")


if __name__ == "__main__":
    main()
