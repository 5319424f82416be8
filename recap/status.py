"""What a relabelling that goes on elsewhere says of itself: `progress.json`, and a file for each further rank."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from recap.errors import UserError

SILENT_AFTER = 120.0
"""Seconds without a word after which a run that has not ended is said to be silent."""


def read(folder: Path) -> list[dict[str, Any]]:
    """What the processes of a relabelling have written last, the first rank's first; not those of an earlier run,
    which may have had more ranks: what they have done is what the first rank has found done.

    Args:
        folder: of the stage, `runs/NAME/relabel`.
    """
    files = sorted(folder.glob("progress*.json"), key=lambda file: (len(file.name), file.name))
    if not files:
        raise UserError(f"no relabelling has begun in {folder}: check name=… and runs=…, or run `recap relabel -c …`")
    first, *others = (json.loads(file.read_bytes()) for file in files)
    return [first, *(rank for rank in others if rank["time"] >= first["began"])]


def status(folder: Path) -> str:
    """How far a relabelling has got, for a terminal of 80 columns."""
    return table(read(folder), time.time())


def table(ranks: list[dict[str, Any]], now: float) -> str:
    """As `status`, of what each rank has written."""
    first = ranks[0]
    done, shards = (first["before"][name] + sum(rank[name] for rank in ranks) for name in ("images", "shards"))
    quarantined = sum((Counter(rank["quarantined"]) for rank in ranks), Counter(first["before"]["quarantined"]))
    running = [rank for rank in ranks if _state(rank, now) == "running"]
    rate = sum(rank["images_per_second"] for rank in running)
    lines = [f"state        {_states(ranks, now)}",
             f"images       {_of(done, first['images_total'])}",
             f"shards       {_of(shards, first['shards_total'])}"]
    if running:
        left = (first["images_total"] - done) / rate if first["images_total"] and rate else None
        lines.append(f"rate         {rate:,.1f} images/s" + (f", {_duration(left)} left" if left is not None else ""))
    lines += [f"             {name:<28} {per_second:>10,.1f} images/s"
              for rank in running for name, per_second in rank["workers"].items()]
    lines += [f"{'quarantined' if not place else '':<12} {reason:<28} {count:>10,}"
              for place, (reason, count) in enumerate(quarantined.most_common())]
    return "\n".join(lines)


def _states(ranks: list[dict[str, Any]], now: float) -> str:
    states = Counter(_state(rank, now) for rank in ranks)
    first = ranks[0]
    where = f"{first['host']}, process {first['pid']}, {_duration(now - first['time'])} ago"
    if len(ranks) == 1:
        return f"{_state(first, now)} ({where})"
    return ", ".join(f"{count} ranks {state}" for state, count in states.items()) + f" (the first one: {where})"


def _state(rank: dict[str, Any], now: float) -> str:
    """A process that was killed could not say so."""
    return "silent" if rank["state"] == "running" and now > rank["time"] + SILENT_AFTER else str(rank["state"])


def _of(done: int, whole: int | None) -> str:
    return f"{done:,} of {whole:,} ({done / whole:.1%})" if whole else f"{done:,}"


def _duration(seconds: float) -> str:
    """`3 d 4 h`, `5 h 12 min`, `8 min`, `40 s`."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days:.0f} d {hours % 24:.0f} h"
    if hours:
        return f"{hours:.0f} h {minutes % 60:.0f} min"
    return f"{minutes:.0f} min" if minutes else f"{seconds:.0f} s"
