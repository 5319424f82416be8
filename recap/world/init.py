"""The world's checkpoints in stock folder formats: as they were trained, or untrained."""

import importlib
import shutil
from pathlib import Path

import torch

from recap.checkpoint import publish
from recap.errors import UserError
from recap.progress import say
from recap.rundir import hash_files
from recap.world import base, marker
from recap.world.base import ALL_PARTS, PARTS, SIZE, unpack

FORMAT = 4
"""Raised when the same settings would give other untrained checkpoints."""


def init(out: Path) -> None:
    """Copy the trained checkpoints of this version to `out`, one folder a part. Does nothing where it has been done.

    Raises:
        UserError: `out` holds others, such as an earlier version's.
    """
    settings = {"trained": True, "size": SIZE, "version": hash_files(base.SHIPPED)}
    if marker.is_done(out, settings):
        say(f"{out}: the checkpoints are there already")
        return
    marker.begin(out, settings)
    for part in PARTS:
        temporary = out / f".{part}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        unpack(part, temporary)
        publish(temporary, out / part)
    marker.finish(out, settings)
    say(f"{out}: {', '.join(PARTS)}")


def init_untrained(out: Path, size: int = SIZE, seed: int = 0) -> None:
    """Write every part as its training begins: of the real classes, with random weights, fp16.

    Every library opens them as it opens the real ones. Each part is seeded alone, so that a change of one leaves the
    others as they were. Does nothing where it has been done.

    Raises:
        UserError: `size` is not a multiple of 16 from 32 on, or `out` holds others.
    """
    if size < 32 or size % 16:
        raise UserError(f"size {size}: give a multiple of 16, from 32 on")
    settings = {"format": FORMAT, "trained": False, "size": size, "seed": seed}
    if marker.is_done(out, settings):
        say(f"{out}: the checkpoints are there already")
        return
    marker.begin(out, settings)
    for part, (name, _) in ALL_PARTS.items():
        module = importlib.import_module(f"recap.world.base.{name}")
        temporary = out / f".{part}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        torch.manual_seed(seed)
        module.save(module.build(size), temporary, size)
        publish(temporary, out / part)
    marker.finish(out, settings)
    say(f"{out}: {', '.join(ALL_PARTS)}")
