"""TensorBoard, Weights & Biases, Trackio: told of settings, and of pictures where they take such; see `Monitor`."""

import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from recap.rundir import StageDir
from recap.storage import write_bytes
from train_t2i.config import Train

PROJECT = "recap"
"""Also the folder of TensorBoard's files, in the stage's."""


def open_trackers(accelerator: Accelerator, stage: StageDir, config: Train, step: int) -> None:
    """Begin a run with each of the accelerator's trackers, or go on with it from a step; on the first process."""
    if not config.trackers or not accelerator.is_main_process:
        return
    name = "/".join(stage.path.absolute().parts[-4:])  # RUN/seed-N/train/ARM
    accelerator.init_trackers(PROJECT, init_kwargs={
        # What was told after the checkpoint will be told again.
        "tensorboard": {"purge_step": step + 1 if step else None},
        "wandb": {"name": name, "dir": str(stage.path), "id": _identity(stage.path), "resume": "allow"},
        "trackio": {"name": f"{name} {_identity(stage.path)}", "resume": "allow"}})
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":  # where accelerate would make a run of its own of them, and of every restart
            tracker.log({"config": f"```json\n{config.model_dump_json(indent=2)}\n```"}, step=0)
        else:
            tracker.store_init_configuration(json.loads(config.model_dump_json()))


def _identity(folder: Path) -> str:
    """What a service knows this stage by, for as long as its folder is there."""
    path = folder / "tracker_id"
    if not path.exists():
        write_bytes(str(path), secrets.token_hex(4).encode())
    return path.read_text()


def show(accelerator: Accelerator, step: int, prompts: list[str], folder: Path) -> None:
    """Send pictures, `folder/00000.png` …, and with the first ones the prompts that they are drawn from."""
    for tracker in accelerator.trackers:
        if not hasattr(tracker, "log_images"):
            continue
        options: dict[str, Any] = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        for index, prompt in enumerate(prompts):
            with Image.open(folder / f"{index:05d}.png", formats=["PNG"]) as picture:
                pixels = np.asarray(picture.convert("RGB"))[None]
            tracker.log_images({f"pictures/{index:05d}": pixels}, step=step, **options)
            if step == 0:  # they stay the same
                tracker.log({f"prompts/{index:05d}": prompt}, step=0)
