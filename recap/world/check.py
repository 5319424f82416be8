"""`recap world check`: whether the instrument is sound, measured on held-out scenes. Nothing here trains or chooses."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image

from recap.captioners import open_captioner
from recap.config import Captioner, Style
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import expand, read_shard
from recap.world.base.detr import expert_facts
from recap.world.base.drawings import to_float, to_images, to_pixels
from recap.world.draw import scene_of
from recap.world.facts import Truth, compare, read
from recap.world.reader import Reader, agrees
from recap.world.scene import Scene

NUM_UNTUNED = 200
BATCH = 100
Fid = Callable[[list[Image.Image], list[Image.Image]], float]


@dataclass(frozen=True, slots=True)
class Gate:
    """One thing that must hold, and what was measured."""

    name: str
    value: float
    limit: float
    at_least: bool = True

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{'ok  ' if self.holds else 'FAIL'} {self.name:<58} {self.value:7.3f} {sign} {self.limit:.3f}"


def check(models: Path, shards: Path, run: Path, claim: Path, fid: Fid) -> list[Gate]:
    """Measure every gate, printing each as it is known.

    Args:
        models: what `recap world init` wrote.
        shards: what `recap world draw` wrote.
        run: a finished run on them, whose relabelled captions are judged.
        claim: the result whose alt arm the VAE's distance is measured against.
        fid: two lists of pictures → their Fréchet distance, by the world's feature network.

    Raises:
        UserError: one of them is not there.
    """
    found: list[Gate] = []
    for gate in _gates(models, shards, run, claim, fid):
        print(gate, flush=True)
        found.append(gate)
    return found


def _gates(models: Path, shards: Path, run: Path, claim: Path, fid: Fid) -> Iterator[Gate]:
    samples = _samples(shards / "evaluation")
    pictures = [sample.image() for sample in samples]
    scenes = [scene_of("evaluation", index)[0] for index in range(len(samples))]
    reader = Reader.open(models / "reader", "cpu")
    yield Gate("reader: drawings with all objects right", _all_right(reader, pictures, scenes), 0.97)
    rebuilt = reconstructions(models / "vae", pictures)
    yield Gate("VAE: reconstructions with all objects right", _all_right(reader, rebuilt, scenes), 0.90)
    yield Gate("VAE: FID of reconstructions, of a fifth of alt's", fid(rebuilt, pictures), _alt_fid(claim) / 5, False)
    expert = _total(compare(read(said), scene.metadata(pictures[0].width))
                    for said, scene in zip(expert_facts(models / "detr", pictures), scenes, strict=True))
    yield from _stated("expert: facts", expert, 0.80, 0.95)
    relabelled = list(_captioned(_samples(run / "relabel"), "long"))
    yield from _stated("relabelled long captions: facts", _total(relabelled), 0.70, 0.85)
    base = _total(_untuned(models / "blip2", _samples(shards / "train")[:NUM_UNTUNED]))
    print(f"     untuned captioner, for comparison: coverage {_coverage(base):.3f}, precision {_precision(base):.3f}")


def _stated(name: str, truth: Truth, coverage: float, precision: float) -> Iterator[Gate]:
    yield Gate(f"{name} covered", _coverage(truth), coverage)
    yield Gate(f"{name} stated that are true", _precision(truth), precision)


def _all_right(reader: Reader, pictures: list[Image.Image], scenes: list[Scene]) -> float:
    right = [agrees(reading, scene)["objects"] for start in range(0, len(pictures), BATCH)
             for reading, scene in zip(reader.read(pictures[start:start + BATCH]), scenes[start:start + BATCH],
                                       strict=True)]
    return sum(right) / len(right)


@torch.no_grad()
def reconstructions(vae: Path, pictures: list[Image.Image]) -> list[Image.Image]:
    """Pictures through the VAE and back."""
    model: Any = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32)
    rebuilt: list[Image.Image] = []
    for start in range(0, len(pictures), BATCH):
        latents = model.encode(to_float(to_pixels(pictures[start:start + BATCH]))).latent_dist.mode()
        decoded = model.decode(latents).sample.clamp(-1, 1)
        rebuilt += to_images(((decoded + 1) * 127.5).round().to(torch.uint8))
    return rebuilt


def _untuned(blip2: Path, samples: list[Sample]) -> Iterator[Truth]:
    """What the captioner says of images before it is tuned."""
    captioner = open_captioner(Captioner(model=str(blip2), dtype="float32"), "cpu")
    style = Style(prompt="", max_new_tokens=48)
    for start in range(0, len(samples), BATCH):
        part = samples[start:start + BATCH]
        features = captioner.encode(captioner.preprocess([sample.image() for sample in part]))
        for sample, caption in zip(part, captioner.caption(features, style), strict=True):
            yield compare(read(caption.text), _scene(sample))


def _captioned(samples: list[Sample], style: str) -> Iterator[Truth]:
    for sample in samples:
        yield compare(read(sample.caption(style) or ""), _scene(sample))


def _scene(sample: Sample) -> dict[str, Any]:
    scene: dict[str, Any] = json.loads(sample.members["json"])["scene"]
    return scene


def _samples(folder: Path) -> list[Sample]:
    if not folder.is_dir():
        raise UserError(f"no shards in {folder}: make demo draws the world and relabels it")
    return [sample for shard in expand(str(folder / "*.tar"), "shards") for sample in read_shard(shard, [])]


def _alt_fid(claim: Path) -> float:
    try:
        runs = json.loads(claim.read_bytes())["runs"]
        found = [run["metrics"]["fid"] for run in runs if run["arm"] == "alt"]
        return sum(found) / len(found)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{claim} holds no FID of an arm alt ({error}): give a result as report.json is") from None


def _total(truths: Any) -> Truth:
    found = list(truths)
    return Truth(sum(t.covered for t in found), sum(t.wrong for t in found), sum(t.total for t in found))


def _coverage(truth: Truth) -> float:
    return truth.covered / max(truth.total, 1)


def _precision(truth: Truth) -> float:
    return truth.covered / max(truth.covered + truth.wrong, 1)
