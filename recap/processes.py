"""The processes of a training, by accelerate: one, or as many as torchrun or `accelerate launch` started."""

from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

PATIENCE = timedelta(hours=12)
"""How long processes wait for the first one, which may have to check and encode all images."""


def open_accelerator(precision: str, device: str) -> Accelerator:
    """An accelerator of its own for a training.

    Args:
        precision: `no`, `bf16` or `fp16`: autocast.
        device: `cpu` keeps it off the GPUs; else it takes those it finds.
    """
    # accelerate keeps the precision of the first training of a process for all that follow; a run has several.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision, cpu=device == "cpu",
                       kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
