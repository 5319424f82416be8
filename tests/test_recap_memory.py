"""A CPU's memory is kept. Where it does not suffice, work is done in halves; other errors are what they were."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recap.memory import in_halves, is_out_of_memory


@given(items=st.lists(st.integers(), max_size=40), room=st.integers(1, 40))
def test_halves_give_what_the_whole_would(items: list[int], room: int) -> None:
    sizes = []

    def double(some: list[int]) -> list[int]:
        if len(some) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(some))
        return [2 * each for each in some]

    assert in_halves(double, items) == [2 * each for each in items]
    assert sum(sizes) == len(items) and max(sizes) <= room


@pytest.mark.parametrize(("said", "sizes"), [
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", [3, 1]), ("shapes", [3])])
def test_no_memory_for_one_and_any_other_error_is_raised(said: str, sizes: list[int]) -> None:
    tried = []

    def fail(some: list[int]) -> list[int]:
        tried.append(len(some))
        raise RuntimeError(said)

    with pytest.raises(RuntimeError, match=said[:10]):
        in_halves(fail, [1, 2, 3])
    assert tried == sizes


def test_what_torch_says_of_too_much_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("x")) and not is_out_of_memory(ValueError("out of memory"))


NEW_PAGES = """
import resource, torch
from recap.memory import keep_freed_memory
if {kept}: keep_freed_memory()
for _ in range(20): torch.ones(2**24)  # until what is freed beside one block has room enough for the next
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc alone")
def test_memory_that_is_kept_is_not_asked_for_again() -> None:
    """64 MB five times: of the system's pages, or of those that were there."""
    kept, asked = (int(subprocess.run([sys.executable, "-c", NEW_PAGES.format(kept=kept)], capture_output=True,
                                      check=True).stdout) for kept in (True, False))
    assert kept < 0.1 * asked
