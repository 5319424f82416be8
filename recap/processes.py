"""The processes of a training, by accelerate: one, or as many as torchrun or `accelerate launch` started."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from recap.errors import Stopped, UserError

PATIENCE = timedelta(hours=12)
"""How long processes wait for the first one, which may have to check and encode all images."""
SILENCE = 5.0
"""Seconds that a launcher needs to notice that a process has ended, and to end the others."""


def open_accelerator(precision: str, device: str, trackers: Sequence[str] = (),
                     folder: Path | None = None) -> Accelerator:
    """An accelerator of its own for a training.

    Args:
        precision: `no`, `bf16` or `fp16`: autocast.
        device: `cpu` keeps it off the GPUs; `cuda:1` takes that one, where there is one process; else it takes those
            that it finds.
        trackers: who is told of figures beside the log: `tensorboard`, `wandb`, `trackio`.
        folder: where trackers write that write files.
    """
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    # accelerate keeps the precision of the first training of a process for all that follow; a run has several.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision, cpu=device == "cpu", log_with=list(trackers) or None,
                       project_dir=folder,
                       kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


@contextmanager
def one_voice(accelerator: Accelerator) -> Iterator[None]:
    """Let one process alone say why all of them end.

    What the user can mend is mostly wrong for every process, and the first one says it. What the others then run into
    is that it has gone. So they keep silent until the launcher ends them; a process that alone is in trouble is
    still there afterwards, and speaks.
    """
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        says_it = accelerator.is_main_process and isinstance(error, UserError)
        if accelerator.num_processes > 1 and not says_it:
            time.sleep(SILENCE)
        raise
