"""A device's memory: when it does not suffice, and what can still be done then."""

import gc
from collections.abc import Callable
from typing import TypeVar

from recap.errors import UserError

In = TypeVar("In")
Out = TypeVar("Out")
# Outside its CUDA allocator, torch has no class for it: its words are those of the CPU, of CUDA, and of cuBLAS.
WORDS = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


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


def in_halves(work: Callable[[list[In]], list[Out]], items: list[In], what: str) -> list[Out]:
    """What `work` makes of the items, one for each; where memory does not suffice for all of them, of halves.

    Args:
        work: done on items that do not depend on each other.
        items: of it.
        what: it is that needs memory, for the error.

    Raises:
        UserError: it does not suffice for one item either.
    """
    try:
        return work(items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(items) == 1:
            raise UserError(f"{what}: the device's memory does not suffice for a single image: take a smaller model, "
                            "or leave it out") from None
    free_memory()
    half = len(items) // 2
    return [*in_halves(work, items[:half], what), *in_halves(work, items[half:], what)]
