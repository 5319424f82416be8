"""A page of the pictures that a training has drawn: a row a prompt, a column a step, and the figures' curves above."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from recap.storage import write_bytes
from train_t2i.config import Train

PROMPTS, FIGURES = "prompts.jsonl", "figures.json"
"""In the folder; in that of a step, where it is written last."""
LABELS = {"kid": ("KID", "lower is better"), "clip_score": ("CLIP score", "higher is better")}
WIDTH, HEIGHT, MARGIN = 400, 110, 8
"""Of a curve."""
LARGE, SMALL = 224, 128
"""Side of a picture on the page, in pixels, at most and at least."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was drawn at a step."""

    step: int
    folder: str
    """Its name."""
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure over steps."""

    label: str
    which_is_better: str
    points: list[tuple[int, float]]
    """(step, value)."""

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.points]

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.points]

    @property
    def places(self) -> list[tuple[float, float]]:
        """Of the points in the drawing, in pixels from its upper left corner."""
        (left, right), (low, high) = _ends(self.steps), _ends(self.values)
        across, down = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
        return [(round(MARGIN + across * (step - left) / (right - left), 1),
                 round(MARGIN + down * (high - value) / (high - low), 1)) for step, value in self.points]


def write_sheet(folder: Path, name: str, config: Train, prompts: list[str]) -> None:
    """Write `folder/index.html`, of all steps that are there. It needs the pictures beside it, and no network.

    Args:
        folder: with a folder for every step.
        name: of the arm.
        config: of the training.
        prompts: any text; they are escaped.
    """
    looks = [Look(int(path.name), path.name, json.loads((path / FIGURES).read_bytes()))
             for path in sorted(folder.iterdir()) if path.name.isdigit() and (path / FIGURES).is_file()]
    looks.sort(key=lambda look: look.step)
    page = _template().render(
        name=name, config=config, prompts=prompts, looks=looks, curves=curves(looks), width=WIDTH, height=HEIGHT,
        side=side(config.resolution), is_tiny=config.resolution < SMALL)
    write_bytes(str(folder / "index.html"), page.encode())


def curves(looks: list[Look]) -> list[Curve]:
    """Of every figure, those that are no number left out."""
    found = []
    for key in dict.fromkeys(key for look in looks for key in look.figures):
        points = [(look.step, value) for look in looks if math.isfinite(value := look.figures.get(key, math.nan))]
        if points:
            found.append(Curve(*LABELS.get(key, (key, "")), points))
    return found


def side(resolution: int) -> int:
    """Of a picture on the page: its own, or a multiple where it is tiny, so that its pixels stay even."""
    return min(LARGE, resolution * max(1, SMALL // resolution))


def _ends(values: list[int] | list[float]) -> tuple[float, float]:
    """The least and the largest; apart from each other, so that one can divide by how much."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1, high + 1)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("train_t2i", "."), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("validation.html")
