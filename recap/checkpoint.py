"""Training checkpoints: one folder of safetensors and JSON, renamed into place when whole; nothing is pickled."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def save(folder: Path, tensors: Tensors, state: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder` by this one. A kill at any moment leaves the old one or the new one.

    Args:
        folder: holds `checkpoint/` after the call.
        tensors: any names; a dot-separated prefix keeps several state dicts apart.
        state: JSON-like; how far the training is.
    """
    new, current, old = folder / ".checkpoint.tmp", folder / "checkpoint", folder / ".checkpoint.old"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new / "state.safetensors")
    (new / "state.json").write_text(json.dumps(state))
    _sync(new)
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        current.rename(old)
    new.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """The last whole checkpoint in `folder`, or None."""
    for found in (folder / "checkpoint", folder / ".checkpoint.old"):  # the second: killed between save's two renames
        if (found / "state.json").exists() and (found / "state.safetensors").exists():
            return load_file(found / "state.safetensors"), json.loads((found / "state.json").read_text())
    return None


def with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Tensors) -> Tensors:
    return {name[len(prefix) + 1:]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """An optimizer's moments and step counts, as `INDEX.NAME`. Its settings are the config's business."""
    return {f"{index}.{name}": value for index, slots in optimizer.state_dict()["state"].items()
            for name, value in slots.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, slot = name.split(".", 1)
        state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def publish(temporary: Path, folder: Path) -> None:
    """Sync a folder of finished files to disk and give it its name, over what stood there."""
    _sync(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
