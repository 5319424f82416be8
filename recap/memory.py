"""A device's memory: how a CPU's is kept, when it does not suffice, and what can still be done then."""

import ctypes
import gc
from collections.abc import Callable
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")
# Outside its CUDA allocator, torch has no class for it: its words are those of the CPU, of CUDA, and of cuBLAS.
WORDS = ("can't allocate memory", "out of memory", "ALLOC_FAILED")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt."""


def keep_freed_memory() -> None:
    """Keep what tensors on the CPU leave for those that come next.

    glibc gives every block of over 32 MB back to the system at once, which fills the next one with zeros, page by page:
    half of the time of a convolution at full resolution. Without glibc, nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def is_out_of_memory(error: BaseException) -> bool:
    import torch
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(each in str(error) for each in WORDS))


def free_memory() -> None:
    """Let go of what nobody needs any more, cycles too. While an error is handled, its traceback needs much."""
    import torch
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def in_halves(work: Callable[[list[In]], list[Out]], items: list[In]) -> list[Out]:
    """What `work` makes of the items, one for each; where memory does not suffice for all of them, of halves.

    The items do not depend on each other. What `work` raises is raised where it does not suffice for one either.
    """
    try:
        return work(items)
    except (RuntimeError, MemoryError) as error:
        if len(items) == 1 or not is_out_of_memory(error):
            raise
    free_memory()
    half = len(items) // 2
    return [*in_halves(work, items[:half]), *in_halves(work, items[half:])]
