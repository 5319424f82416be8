"""How a scheduler ends a training: SIGTERM, after which a checkpoint is written, and the same command goes on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from recap.processes import PATIENCE


class Stop:
    """Whether any of the processes was asked to end."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.was_asked = False
        self.accelerator = accelerator
        self.group: Any = None
        if accelerator.num_processes > 1:  # on the CPU, so that nobody waits for a GPU
            self.group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def agreed(self) -> bool:
        """The same answer in all processes, which all must ask."""
        if self.group is None:
            return self.was_asked
        asked = torch.tensor([self.was_asked], dtype=torch.int32)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, self.group)
        return bool(asked.item())  # nothing is written to `was_asked`: the signal may come just now


@contextmanager
def stoppable(accelerator: Accelerator) -> Iterator[Stop]:
    """Within, SIGTERM is an answer to `Stop.agreed`, and ends nothing."""
    stop = Stop(accelerator)

    def ask(*_: Any) -> None:
        stop.was_asked = True

    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield stop
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
