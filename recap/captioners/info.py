"""How many parameters a captioner has, and how many its fine-tuning trains: from the configuration, without weights."""

from dataclasses import dataclass
from typing import Any

from recap.captioners import open_tunable
from recap.config.captioner import Captioner
from recap.config.finetune import Finetune


@dataclass(frozen=True, slots=True)
class Info:
    """Parameters, all and trained, of a captioner and of its parts."""

    parts: dict[str, tuple[int, int]]
    """Part → (all, trained), in the model's order."""

    @property
    def total(self) -> int:
        return sum(count for count, _ in self.parts.values())

    @property
    def trained(self) -> int:
        return sum(count for _, count in self.parts.values())


def info(captioner: Captioner, finetune: Finetune) -> Info:
    """Make the captioner on torch's `meta` device, prepare it for tuning, and count.

    Where a vocabulary is learned from captions, it is taken to be full.
    """
    made = open_tunable(captioner, "meta")
    made.prepare(finetune, [])
    trained = {id(p) for p in made.trainable().values()}
    parts: dict[str, tuple[int, int]] = {}
    for name, p in made.model.named_parameters():
        part = _part(name)
        total, count = parts.get(part, (0, 0))
        parts[part] = (total + p.numel(), count + (p.numel() if id(p) in trained else 0))
    return Info(parts)


def table(found: Info) -> str:
    """For the terminal: a line a part, then the whole."""
    rows = [("", "parameters", "trained", ""), *(_row(name, *counts) for name, counts in found.parts.items()),
            _row("all", found.total, found.trained)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([f"{name:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(
        cells, widths[1:], strict=True))]).rstrip() for name, *cells in rows)


def _row(name: str, total: int, trained: int) -> tuple[str, str, str, str]:
    return name, f"{total:,}", f"{trained:,}", f"{100 * trained / total:.3f} %"


def _part(name: str) -> str:
    """The first name that says something: peft's and transformers' wrappers are passed over."""
    names: list[Any] = [part for part in name.split(".") if part not in ("base_model", "model")]
    return str(names[0])
