"""Bars that count images, and messages; both on standard error, from rank 0 only."""

import os
import sys
from functools import cache

from tqdm import tqdm

BAR = "{desc} {percentage:3.0f}% {bar:10} {n_fmt}/{total_fmt} img · {rate_fmt} · {remaining} left{postfix}"


def is_main() -> bool:
    """Whether this process is the one that speaks and writes, under torchrun or accelerate."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    """How many processes torchrun or accelerate started for this command."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def bar(name: str, total: int | None, done: int = 0) -> "tqdm[None]":
    """A bar of images with rate and ETA. `done` are those of an earlier try, which do not count in the rate."""
    # Not on a terminal (a log file), one line every 10 s is enough.
    return tqdm(total=total, initial=done, desc=f"{name:<17}", unit=" img", disable=not is_main(), dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 10, leave=True,
                bar_format=BAR if total else "{desc} {n_fmt} img · {rate_fmt}{postfix}")


def say(message: str) -> None:
    if is_main():
        tqdm.write(message, file=sys.stderr)


@cache
def warn(message: str) -> None:
    """Say it once, however many arms and shards it holds for."""
    say(f"warning: {message}")
