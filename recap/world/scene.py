"""A scene of the drawn world: one to six coloured shapes on a plain or patterned background."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40), "yellow": (250, 215, 40), "green": (40, 160, 70), "blue": (40, 90, 210),
    "purple": (130, 60, 180), "pink": (250, 140, 190),
}
BACKGROUNDS = {"white": (250, 250, 250), "black": (20, 20, 20), "grey": (135, 135, 135), "beige": (222, 205, 170)}
PATTERNS = ("plain", "striped", "checkered")
PATTERN_SHADE = 26
"""How much darker (on black: lighter) a pattern's second tone is, of 255."""
PATTERN_PARTS = 8
"""Stripes from top to bottom, and checks along a side."""
SIZES = {"small": 0.105, "large": 0.175}
"""Half the width of a shape, as a share of the image's side."""
PLACES = {
    "top left": (0.19, 0.27), "top": (0.5, 0.27), "top right": (0.81, 0.27),
    "bottom left": (0.19, 0.73), "bottom": (0.5, 0.73), "bottom right": (0.81, 0.73),
}
"""Centre of a shape, as shares of width and height. Large neighbours overlap."""
NUM_SHAPES = {1: 0.25, 2: 0.30, 3: 0.20, 4: 0.12, 5: 0.08, 6: 0.05}
"""How often a scene has so many shapes."""
JITTER = 0.02
OVERSAMPLING = 8

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Background:
    """What the shapes stand on."""

    colour: str
    pattern: str

    @property
    def name(self) -> str:
        """`striped grey background`."""
        return f"{self.pattern} {self.colour} background"


@dataclass(frozen=True, slots=True)
class Shape:
    """One object of a scene. Lengths are shares of the image's side."""

    kind: str
    colour: str
    size: str
    place: str
    x: float
    y: float

    @property
    def name(self) -> str:
        """`red circle`."""
        return f"{self.colour} {self.kind}"

    @property
    def full_name(self) -> str:
        """What a detector of this world calls it: `small red circle`."""
        return f"{self.size} {self.name}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What is drawn. Shapes stand in different places, in reading order; each covers those before it."""

    background: Background
    shapes: tuple[Shape, ...]

    def metadata(self, side: int) -> dict[str, Any]:
        """The truth about the scene, JSON-like: background, and kind, colour, size, place and box of each object.

        A box is left, top, right, bottom, in pixels of an image of `side` pixels.
        """
        objects = [{"kind": shape.kind, "colour": shape.colour, "size": shape.size, "place": shape.place,
                    "box": box(shape, side)} for shape in self.shapes]
        return {"background": {"colour": self.background.colour, "pattern": self.background.pattern},
                "objects": objects}


def draw_scene(rng: Random, num_shapes: int | None = None) -> Scene:
    """Draw the lots of a scene; `num_shapes` fixes how many shapes it has."""
    count = rng.choices(list(NUM_SHAPES), list(NUM_SHAPES.values()))[0] if num_shapes is None else num_shapes
    places = sorted(rng.sample(list(PLACES), count), key=list(PLACES).index)
    background = Background(rng.choice(list(BACKGROUNDS)), rng.choice(PATTERNS))
    return Scene(background, tuple(_draw_shape(rng, place) for place in places))


def _draw_shape(rng: Random, place: str) -> Shape:
    x, y = PLACES[place]
    return Shape(rng.choice(list(KINDS)), rng.choice(list(COLOURS)), rng.choice(list(SIZES)), place,
                 x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER))


# --- pixels --------------------------------------------------------------------------------------------------------


def render(scene: Scene, side: int) -> Image.Image:
    """The scene as an RGB image of `side` × `side` pixels, drawn large and reduced, so that edges are smooth."""
    large = side * OVERSAMPLING
    image = _backdrop(scene.background, large).copy()
    for shape in scene.shapes:
        image.paste(COLOURS[shape.colour], mask=_mask(shape, large))
    return image.resize((side, side), Image.Resampling.BOX)


def box(shape: Shape, side: int) -> list[int]:
    """The pixels that a shape touches: left, top, right, bottom, in pixels of an image of `side` pixels."""
    mask = _mask(shape, side * OVERSAMPLING).resize((side, side), Image.Resampling.BOX)
    return list(mask.getbbox() or (0, 0, side, side))


@lru_cache(maxsize=32)
def _backdrop(background: Background, side: int) -> Image.Image:
    first = BACKGROUNDS[background.colour]
    shade = PATTERN_SHADE if background.colour == "black" else -PATTERN_SHADE
    second = tuple(tone + shade for tone in first)
    image = Image.new("RGB", (side, side), first)
    canvas, step = ImageDraw.Draw(image), side / PATTERN_PARTS
    for row in range(PATTERN_PARTS):
        for column in range(PATTERN_PARTS):
            odd = row % 2 if background.pattern == "striped" else (row + column) % 2
            if odd and background.pattern != "plain":
                canvas.rectangle((column * step, row * step, (column + 1) * step - 1, (row + 1) * step - 1), second)
    return image


def _mask(shape: Shape, side: int) -> Image.Image:
    """Where the shape is: (side, side), 255 inside."""
    mask = Image.new("L", (side, side))
    KINDS[shape.kind](ImageDraw.Draw(mask), (shape.x * side, shape.y * side), SIZES[shape.size] * side)
    return mask


def _circle(canvas: ImageDraw.ImageDraw, centre: Point, half: float) -> None:
    canvas.circle(centre, half, fill=255)


def _ring(canvas: ImageDraw.ImageDraw, centre: Point, half: float) -> None:
    canvas.circle(centre, half, fill=255)
    canvas.circle(centre, half * 0.5, fill=0)


def _square(canvas: ImageDraw.ImageDraw, centre: Point, half: float) -> None:
    _rectangle(canvas, centre, half * 0.9, half * 0.9)


def _bar(canvas: ImageDraw.ImageDraw, centre: Point, half: float) -> None:
    _rectangle(canvas, centre, half, half * 0.4)


def _cross(canvas: ImageDraw.ImageDraw, centre: Point, half: float) -> None:
    _rectangle(canvas, centre, half, half / 3)
    _rectangle(canvas, centre, half / 3, half)


def _triangle(canvas: ImageDraw.ImageDraw, centre: Point, half: float) -> None:
    corners = [(centre[0] + 1.15 * half * math.sin(angle), centre[1] - 1.15 * half * math.cos(angle))
               for angle in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    canvas.polygon(corners, fill=255)


def _rectangle(canvas: ImageDraw.ImageDraw, centre: Point, half_x: float, half_y: float) -> None:
    x, y = centre
    canvas.rectangle((x - half_x, y - half_y, x + half_x, y + half_y), fill=255)


KINDS: dict[str, Callable[[ImageDraw.ImageDraw, Point, float], None]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross, "ring": _ring, "bar": _bar,
}
