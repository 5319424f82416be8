"""`recap world check`: whether the instrument is sound, measured on held-out scenes, and the claim with its controls.

Nothing here trains or chooses.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image

from recap.captioners import open_captioner
from recap.config import Style
from recap.config.captioner import Captioner
from recap.errors import UserError
from recap.rundir import hash_files
from recap.sample import Sample
from recap.shards import expand, read_shard
from recap.world.base.detr import expert_facts
from recap.world.base.drawings import to_float, to_images, to_pixels
from recap.world.facts import Truth, compare, read
from recap.world.reader import Reader, agrees

NUM_UNTUNED = 200
BATCH = 100
BY_EYE = Path(__file__).parent / "by_eye"
"""A sheet of generated pictures with what the reader sees in each, and what the eye found wrong in it."""
CLAIMED = (
    ("claim: object accuracy", "mix", "alt", "object_accuracy", 0, True),
    ("control: object accuracy", "mix", "oracle", "object_accuracy", 0, False),
    ("control: object accuracy", "clean", "oracle", "object_accuracy", 1, True),
    ("control: object accuracy", "shuffled", "alt", "object_accuracy", 0, False),
    ("control: FID", "shuffled", "alt", "fid", 1, True),
)
"""Arm a less arm b by a metric: which end of the 95 % interval must be at least 0, or at most. The claim is shown; of
controls it must not be shown that they fail."""
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
        return f"{'ok  ' if self.holds else 'FAIL'} {self.name:<56} {self.value:7.3f} {sign} {self.limit:.3f}"


def check(models: Path, shards: Path, run: Path, claim: Path, fid: Fid) -> list[Gate]:
    """Measure every gate, printing each as it is known.

    Args:
        models: what `recap world init` wrote.
        shards: what `recap world draw` wrote.
        run: a finished run on them, whose relabelled captions are judged.
        claim: the result that `recap pool` kept: its alt arm is what the VAE's distance is measured against.
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
    claimed, alt_fid, num_drawn = _claim(claim)  # what is missing is said now, not after minutes of measuring
    if not (run / "relabel" / "done.json").is_file():
        raise UserError(f"no relabelled shards in {run}: run `recap relabel` there first, or give --run")
    samples = _samples(shards / "evaluation")
    captioned = _samples(run / "relabel")
    pictures = [sample.image() for sample in samples]
    scenes = [_scene(sample) for sample in samples]
    reader = Reader.open(models / "reader", "cpu")
    yield Gate("reader: drawings with all objects right", _all_right(reader, pictures, scenes), 0.97)
    print(f"     {_by_eye(models / 'reader')}")
    rebuilt = reconstructions(models / "vae", pictures)
    yield Gate("VAE: reconstructions with all objects right", _all_right(reader, rebuilt, scenes), 0.90)
    expert = _total(compare(read(said), scene)
                    for said, scene in zip(expert_facts(models / "detr", pictures), scenes, strict=True))
    yield from _stated("expert", expert, 0.80, 0.95)
    yield from _stated("relabelled long captions", _total(_captioned(captioned, "long")), 0.70, 0.85)
    base = _total(_untuned(models / "blip2", _samples(shards / "train")[:NUM_UNTUNED]))
    print(f"     untuned captioner, for comparison: coverage {_coverage(base):.3f}, precision {_precision(base):.3f}")
    # Of as many reconstructions as the arm drew pictures, against the same real images: then both have one bias.
    real = [sample.image() for sample in _samples(shards / "reference")]
    name = f"VAE: FID of {min(num_drawn, len(rebuilt)):,} reconstructions ≤ a fifth of alt's"
    yield Gate(name, fid(rebuilt[:num_drawn], real), alt_fid / 5, False)
    yield from _claimed(claimed)


def _claimed(intervals: dict[tuple[str, str, str], tuple[float, float]]) -> Iterator[Gate]:
    for what, a, b, metric, end, at_least in CLAIMED:
        if (interval := intervals.get((a, b, metric))) is None:
            print(f"     {what}: nothing of {a} − {b} in the claim")
        else:
            yield Gate(f"{what}, {a} − {b}, {('low', 'high')[end]} end", interval[end], 0, at_least)


def _by_eye(reader: Path) -> str:
    """What the eye found; shapes that are drawn between two kinds or colours do not count."""
    judged = json.loads((BY_EYE / "judged.json").read_bytes())
    if judged["reader"] != hash_files(reader):
        return f"by eye: not this reader was checked, but {judged['reader']}"
    clear = judged["shapes"] - judged["undecided"]["shapes"]
    return f"by eye: of {clear} clear shapes in {judged['pictures']} generated pictures {len(judged['wrong'])} misread"


def _stated(name: str, truth: Truth, coverage: float, precision: float) -> Iterator[Gate]:
    yield Gate(f"{name}: facts stated, of all there are", _coverage(truth), coverage)
    yield Gate(f"{name}: statements that are true", _precision(truth), precision)


def _all_right(reader: Reader, pictures: list[Image.Image], scenes: list[dict[str, Any]]) -> float:
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
    try:
        scene: dict[str, Any] = json.loads(sample.members["json"])["scene"]
        return scene
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{sample.key} in {sample.shard} says nothing of its scene: give shards of the drawn world"
                        ) from None


def _samples(folder: Path) -> list[Sample]:
    if not folder.is_dir():
        raise UserError(f"no shards in {folder}: `recap world draw` draws them, `recap relabel` captions them")
    found = [sample for shard in expand(str(folder / "*.tar"), "shards") for sample in read_shard(shard, [])]
    if not found:
        raise UserError(f"no images in {folder}: draw some, see `recap world draw --help`")
    return found


def _claim(path: Path) -> tuple[dict[tuple[str, str, str], tuple[float, float]], float, int]:
    """Arms a and b and metric → 95 % interval; mean FID of arm alt over its seeds, and over how many pictures."""
    try:
        found = json.loads(path.read_bytes())
        alt = [run["metrics"] for run in found["runs"] if run["arm"] == "alt"]
        intervals = {(each["a"], each["b"], each["metric"]): (float(each["ci"][0]), float(each["ci"][1]))
                     for each in found["comparisons"] if each["ci"]}
        return intervals, sum(metrics["fid"] for metrics in alt) / len(alt), alt[0]["num_images"]
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} holds no FID of an arm alt ({error}): give a result as report.json is") from None


def _total(truths: Any) -> Truth:
    found = list(truths)
    return Truth(sum(t.covered for t in found), sum(t.wrong for t in found), sum(t.total for t in found))


def _coverage(truth: Truth) -> float:
    return truth.covered / max(truth.total, 1)


def _precision(truth: Truth) -> float:
    return truth.covered / max(truth.covered + truth.wrong, 1)
