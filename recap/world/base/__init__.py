"""The base checkpoints of the embedded world: how each was made, and where the trained ones lie."""

import importlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recap.clip_bpe import clip_tokenizer
from recap.errors import UserError
from recap.progress import say
from recap.rundir import StageDir, lock

SHIPPED = Path(__file__).parent / "checkpoints"
"""What `train_base` made, as this version of Recap ships it."""
SIZE = 32
"""Pixels of the pictures that the shipped checkpoints know."""
PARTS = {"vae": ("vae", 0), "reader": ("reader", 11), "features": ("features", 21), "clip": ("clip", 31),
         "detr": ("detr", 41), "blip2": ("blip2", 3), "stable-diffusion-0": ("stable_diffusion", 0),
         "stable-diffusion-1": ("stable_diffusion", 1)}
"""Part → the module that makes it, and the seed of its weights and of its drawings, which bear the module's name too.

The UNets of the two diffusion models read the same drawings, in orders of their own; their text encoders do not.
"""
CAPTIONER_PARTS = {"blip": ("blip", 51), "llava": ("llava", 71), "gpt2": ("gpt2", 61), "clip-1": ("clip", 32),
                   "cnn": ("features", 22)}
"""What captioners of other families begin with. They are not shipped: who compares captioners trains them."""
ALL_PARTS = PARTS | CAPTIONER_PARTS
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
RECORDS = ("log.jsonl", "done.json")
"""What is kept of a part's training."""
NUM_BASE = 120_000
"""Drawings with alt-text that the diffusion models are trained on."""


def train_base(out: Path, parts: Iterable[str]) -> None:
    """Train parts, one after another, below `out`. To resume, run the same again.

    Each leaves `out/PART/model` (a folder of the library's own format, fp16), `log.jsonl`, and figures in `done.json`.

    Raises:
        UserError: a part that does not exist, one that was begun with other settings, or one that another command is
            training.
    """
    parts = list(parts)
    if unknown := [part for part in parts if part not in ALL_PARTS]:
        raise UserError(f"no part {unknown[0]!r}: the parts are {', '.join(ALL_PARTS)}")
    for part in parts:
        stage = StageDir(out / part, _reads(part))
        if stage.state() == "changed":
            raise UserError(f"{stage.path} was made with other settings ({stage.changes()[0]}): delete it first")
        if stage.state() == "done":
            say(f"{part}: trained before")
            continue
        with lock(stage.path):
            stage.begin()
            stage.finish(_train(part, stage, out))
        say(f"{part}: {json.dumps(stage.result())}")


def _reads(part: str) -> dict[str, Any]:
    """What decides a part: its seed and size, and every constant of its modules that is plain data."""
    modules = [*_modules(part)]
    constants = {f"{module.__name__.rpartition('.')[2]}.{name}": asdict(value) if name == "SCHEDULE" else value
                 for module in modules for name, value in vars(module).items() if name.isupper()}
    drawings = {"num_base": NUM_BASE} if len(modules) > 1 else {}
    return {"seed": ALL_PARTS[part][1], "size": SIZE, **drawings,
            **{name: value for name, value in constants.items() if _is_data(value)}}


def _is_data(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:  # a function, or a table of them
        return False
    return True


def _train(part: str, stage: StageDir, out: Path) -> dict[str, float]:
    module, seed = next(_modules(part)), ALL_PARTS[part][1]
    if hasattr(module, "TRAIN"):
        return _train_diffusion(module, part, seed, stage, out)
    result: dict[str, float] = module.train(stage, seed, SIZE, module.SCHEDULE)
    return result


def _train_diffusion(module: Any, part: str, seed: int, stage: StageDir, out: Path) -> dict[str, float]:
    from recap.world.draw import draw
    vae = out / "vae" / "model"
    if not vae.is_dir():
        raise UserError(f"{part} needs the VAE first: recap world train-base {out} --part vae")
    with lock(out / "shards"):  # two models trained side by side read the same
        draw(out / "shards", num_train=0, num_tuning=0, num_validation=0, num_evaluation=0, num_reference=0,
             num_base=NUM_BASE, size=SIZE)
    result: dict[str, float] = module.train(stage, seed, SIZE, vae, str(out / "shards" / "base" / "*.tar"))
    return result


def _modules(part: str) -> Iterator[Any]:
    """That which makes it, and that of a pipeline's text encoder; imported late, as each loads a library of its own."""
    name = ALL_PARTS[part][0]
    for each in (name, "text_encoder") if name == "stable_diffusion" else (name,):
        yield importlib.import_module(f"recap.world.base.{each}")


def ship(out: Path) -> None:
    """Copy what `train_base` left below `out` into this package: models, logs and figures.

    A pipeline's VAE is that of the part `vae`, and its tokenizer open_clip's: they are shipped once.

    Raises:
        UserError: a part is not trained yet with today's settings, or a diffusion model with another VAE.
    """
    for part in PARTS:
        source = out / part
        if StageDir(source, _reads(part)).state() != "done":
            raise UserError(f"{part} is not trained yet, or was with other settings: "
                            f"recap world train-base {out} --part {part}")
        own = source / "model" / "vae" / VAE_WEIGHTS
        if own.is_file() and own.read_bytes() != (out / "vae" / "model" / VAE_WEIGHTS).read_bytes():
            raise UserError(f"{part} was trained with another VAE than {out / 'vae'}: delete it and train it again")
    for part in PARTS:
        source = out / part
        target = SHIPPED / part
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source / "model", target, ignore=shutil.ignore_patterns("vae", "tokenizer"))
        for name in RECORDS:
            shutil.copy(source / name, target)


def unpack(part: str, folder: Path) -> None:
    """Write a shipped part to `folder`, as its library opens it."""
    shutil.copytree(SHIPPED / part, folder, ignore=shutil.ignore_patterns(*RECORDS), dirs_exist_ok=True)
    if (folder / "model_index.json").is_file():
        shutil.copytree(SHIPPED / "vae", folder / "vae", ignore=shutil.ignore_patterns(*RECORDS))
        clip_tokenizer().save_pretrained(folder / "tokenizer")
