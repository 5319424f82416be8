"""How far a work on shards has got: on the terminal, and in `progress.json` for `recap status` elsewhere."""

import os
import shutil
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from tqdm import tqdm

from recap import progress
from recap.shard_work import Stats, reasons
from recap.storage import write_json

WINDOW = 60.0
"""Seconds over which a worker's present rate is taken."""
WRITE_EVERY = 5.0
"""Seconds between writes of `progress.json`."""


class Meter:
    """Counts what the workers report. One for each rank; the first one has the bar."""

    def __init__(self, folder: Path, num_images: int | None, num_shards: int, finished: Iterable[Stats],
                 name: str = "relabel") -> None:
        """Begin with what an earlier try has done.

        Args:
            folder: of the stage, for `progress.json`.
            num_images: of all shards, or about as many; None where that is not known.
            num_shards: in all.
            finished: stats of the shards that are done.
            name: of the work, for the bar.
        """
        self.name = name
        rank = os.environ.get("RANK", "0")
        self.path = folder / ("progress.json" if rank == "0" else f"progress-{rank}.json")
        self.num_images, self.num_shards = num_images, num_shards
        self.before = self.shards_before = 0
        self.quarantined_before: Counter[str] = Counter()
        for stats in finished:
            self.before += stats["count"]
            self.shards_before += 1
            self.quarantined_before += reasons(stats)
        self.done = self.shards_done = 0
        self.quarantined: Counter[str] = Counter()
        self.began, self.written = time.time(), 0.0
        self.begun: dict[str, tuple[int, Counter[str]]] = {}
        """Shard → how many of its images are done by now, and how many of these quarantined, by reason."""
        self.rates: dict[str, Rate] = {}
        """Of the workers that there are."""

    def __enter__(self) -> Self:
        self.bar = progress.bar(self.name, self.num_images, self.before)
        self.details = tqdm(total=0, position=1, bar_format="{desc}", leave=False,
                            disable=not progress.is_main() or not sys.stderr.isatty())
        self._write("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_all = self.shards_before + self.shards_done == self.num_shards
        if is_all and self.num_images is not None:
            self.num_images = self.bar.total = self.before + self.done
        self._write("stopped" if kind else "done")
        self.details.close()
        self.bar.close()

    def images(self, worker: str, shard: str, done: int, quarantined: Mapping[str, int]) -> None:
        """A worker has done so many of a shard's images by now: fewer than before, where the shard is done again."""
        self.rates.setdefault(worker, Rate()).add(max(0, self._count(shard, done, quarantined)))
        if time.time() > self.written + WRITE_EVERY:
            self._write("running")

    def lost(self, worker: str) -> None:
        """There will be no more of this worker: over a long run on borrowed machines, thousands come and go."""
        self.rates.pop(worker, None)

    def shard(self, shard: str, done: int, quarantined: Mapping[str, int]) -> None:
        """A shard is finished, with so many images."""
        self._count(shard, done, quarantined)
        del self.begun[shard]
        self.shards_done += 1
        self._write("running")

    def _count(self, shard: str, done: int, quarantined: Mapping[str, int]) -> int:
        """How many more images that makes."""
        done_before, quarantined_before = self.begun.get(shard, (0, Counter[str]()))
        self.begun[shard] = done, Counter(quarantined)
        self.quarantined = self.quarantined - quarantined_before + Counter(quarantined)
        self.done += done - done_before
        if self.num_images is not None and self.before + self.done > self.num_images:
            self.num_images = self.bar.total = self.before + self.done
        self.bar.update(done - done_before)
        self.details.set_description_str(self._details(), refresh=False)
        return done - done_before

    def _details(self) -> str:
        """A second line: the workers' rates, and what was quarantined for which reason."""
        rates = [f"{worker} {rate.per_second():.1f}/s" for worker, rate in self.rates.items()]
        quarantined = self.quarantined_before + self.quarantined
        bad = ", ".join(f"{reason} {count}" for reason, count in quarantined.most_common())
        parts = [*([" · ".join(rates)] if len(rates) > 1 else []), *([f"quarantined: {bad}"] if bad else [])]
        return "   ".join(parts)[:shutil.get_terminal_size().columns - 1]

    def _write(self, state: str) -> None:
        self.written = time.time()
        write_json(str(self.path), {
            "state": state, "began": round(self.began, 3), "time": round(self.written, 3),
            "host": socket.gethostname(), "pid": os.getpid(),
            "images_total": self.num_images, "shards_total": self.num_shards,
            "before": {"images": self.before, "shards": self.shards_before, "quarantined": self.quarantined_before},
            "images": self.done, "shards": self.shards_done, "quarantined": self.quarantined,
            "images_per_second": round(self.done / (self.written - self.began), 2),
            "workers": {worker: round(each.per_second(), 2) for worker, each in self.rates.items()}})


class Rate:
    """Images per second over the last minute."""

    def __init__(self) -> None:
        self.counts: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self.sum = 0
        """Of all but the first, which was before the time that is looked at."""

    def add(self, count: int) -> None:
        now = time.monotonic()
        self.counts.append((now, count))
        self.sum += count
        while self.counts[1][0] < now - WINDOW:
            self.counts.popleft()
            self.sum -= self.counts[0][1]

    def per_second(self) -> float:
        seconds = time.monotonic() - self.counts[0][0]
        return self.sum / seconds if seconds > 0 else 0.0
