"""Which sample comes when: an order that seed, shards and batch size fix, on any number of processes.

The shards, in an order drawn anew for every epoch, are dealt to lanes as cards are; a step takes equally many samples
from each lane. Within a lane, samples are drawn from one block while the next is read. Processes and their workers
share the lanes, so that none reads what only others need; the order is not theirs. A lane is where it is by a few
numbers, its cursor, whatever was read ahead.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

from recap.errors import UserError
from recap.progress import warn
from recap.sample import Sample

MAX_LANES = 64
MANY = 1000
"""Samples left out, and none used, of which a warning is due."""


@dataclass(frozen=True, order=True)
class Cursor:
    """Where a lane stands; the greater of two is further on."""

    turn: int = 0
    """The shard in which the block began, by its place among all that are dealt to the lane."""
    skip: int = 0
    """Its samples that were of the block before."""
    given: int = 0
    """Samples of the block that were given out."""


@dataclass(slots=True)
class Entry:
    """A sample in the order."""

    sample: Sample
    original: tuple[int, int]
    """Width and height of its image."""
    size: tuple[int, int]
    """Height and width that it is trained at."""
    epoch: int = 0
    """How often its shard was dealt before."""
    end: tuple[int, int] = (0, 0)
    """Turn and samples of it read so far, this one counted."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Samples that were left out before this one, by reason; in the first epoch only, so that each counts once."""


Read = Callable[[str], Iterator[Entry | str]]
"""Shard → its samples; for one that can't be used, the reason."""


def num_lanes(num_shards: int, batch_size: int) -> int:
    """The most lanes that all shards can fill and that give equally many samples to a batch."""
    most = min(num_shards, batch_size, MAX_LANES)
    return max(lanes for lanes in range(1, most + 1) if batch_size % lanes == 0)


@dataclass
class Lane:
    """An endless sequence of samples; `cursor` says where it stands."""

    shards: list[str]
    number: int
    num_lanes: int
    seed: int
    block_size: int
    run: int
    """Samples in a row that are of one size, as far as a block has so many."""
    read: Read
    cursor: Cursor = Cursor()
    speaks: bool = True
    """Whether to warn of samples that can't be used: of all who read a lane, one does."""

    def __iter__(self) -> Iterator[Entry]:
        reading = self._read(self.cursor.turn, self.cursor.skip)
        block = [next(reading) for _ in range(self.block_size)]
        while True:
            start, end = self.cursor, Cursor(*block[-1].end)
            coming, block = self._arranged(block, start), []
            while coming:
                block.append(next(reading))  # one is read for each that is given, so that no step waits for many
                entry = coming.pop()  # and what is given is not held any longer
                if len(block) > start.given:
                    self.cursor = replace(start, given=len(block))
                    yield entry
            self.cursor = end

    def _arranged(self, block: list[Entry], start: Cursor) -> list[Entry]:
        """A block in a drawn order, from the last on: first what makes no run of one size, then such runs."""
        draw = random.Random(number("order", self.seed, self.number, start.turn, start.skip))
        draw.shuffle(block)
        by_size: dict[tuple[int, int], list[Entry]] = {}
        for entry in block:
            by_size.setdefault(entry.size, []).append(entry)
        runs, rest = [], []
        for _, entries in sorted(by_size.items()):
            whole = len(entries) // self.run * self.run
            runs += [entries[place:place + self.run] for place in range(0, whole, self.run)]
            rest += entries[whole:]
        draw.shuffle(runs)
        return [entry for run in [*runs, rest] for entry in run]

    def _read(self, turn: int, skip: int) -> Iterator[Entry]:
        """The samples from some place on, through all shards that are dealt to this lane."""
        rejects: Counter[str] = Counter()
        unusable: Counter[str] = Counter()
        empty: set[str] = set()
        while True:
            epoch, shard = self._dealt(turn)
            count = 0
            for found in self.read(shard) if shard not in empty else ():
                if isinstance(found, str):
                    unusable[found] += 1
                    if unusable.total() == MANY:
                        self._warn(unusable)
                    rejects[found] += epoch == 0 and count >= skip
                    continue
                count += 1
                unusable.clear()
                self.speaks = False
                if count > skip:
                    found.epoch, found.end, found.rejects = epoch, (turn, count), +rejects
                    yield found
                    rejects.clear()
            if not count:
                empty.add(shard)
            if len(empty) == len(self.shards):
                raise UserError(f"train.shards: none of the samples in {len(self.shards)} shards can be used "
                                f"({_most(unusable) or 'they are empty'}): relabel them with the captions that this "
                                "arm is trained on, choose other arms, or let train.filters pass more")
            turn, skip = turn + 1, 0

    def _dealt(self, turn: int) -> tuple[int, str]:
        """The epoch and the shard of a turn."""
        epoch, place = divmod(self.number + turn * self.num_lanes, len(self.shards))
        return epoch, self.shards[_shuffled(len(self.shards), self.seed, epoch)[place]]

    def _warn(self, unusable: Counter[str]) -> None:
        if self.speaks:
            warn(f"train.shards: of the first {MANY:,} samples none can be used ({_most(unusable)}); reading on")


def epochs(cursors: dict[int, Cursor], num_shards: int) -> int:
    """How often every shard has been dealt and left behind."""
    return min(((lane + cursor.turn * len(cursors)) // num_shards for lane, cursor in cursors.items()), default=0)


@lru_cache(maxsize=4)
def _shuffled(num_shards: int, seed: int, epoch: int) -> list[int]:
    return random.Random(number("shards", seed, epoch)).sample(range(num_shards), num_shards)


def _most(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common(3))


def number(*parts: object) -> int:
    """A 63-bit number that depends on every part, the same on every machine."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
