"""A scene of the drawn world: one to three coloured shapes on a plain background, and words that are true of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image, ImageChops, ImageDraw

COLOURS = {
    "red": (214, 40, 40), "orange": (247, 140, 20), "yellow": (250, 215, 40), "green": (40, 160, 70),
    "blue": (40, 90, 210), "purple": (130, 60, 180), "pink": (250, 150, 190), "brown": (125, 75, 40),
}
BACKGROUNDS = {"white": (250, 250, 250), "black": (20, 20, 20), "grey": (135, 135, 135), "beige": (222, 205, 170)}
SIZES = {"small": 0.11, "large": 0.2}
"""Half the width of a shape, as a share of the image's side."""
PLACES = {
    "top left": (0.27, 0.27), "top right": (0.73, 0.27), "bottom left": (0.27, 0.73), "bottom right": (0.73, 0.73),
    "centre": (0.5, 0.5),
}
"""Centre of a shape, as shares of width and height. `centre` is for a shape that is alone, as it would touch others."""
JITTER = 0.02
OVERSAMPLING = 8
NUMBERS = ("no", "one", "two", "three")

Point = tuple[float, float]


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
        """What a detector of this world calls it: `red circle`."""
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What is drawn. Shapes stand in different places, in reading order."""

    background: str
    shapes: tuple[Shape, ...]

    def metadata(self, side: int) -> dict[str, Any]:
        """The truth about the scene, JSON-like: background, and kind, colour, size, place and box of each object.

        A box is left, top, right, bottom, in pixels of an image of `side` pixels.
        """
        objects = [{"kind": shape.kind, "colour": shape.colour, "size": shape.size, "place": shape.place,
                    "box": _box(Scene(self.background, (shape,)), side)} for shape in self.shapes]
        return {"background": self.background, "objects": objects}


def draw_scene(rng: Random, num_shapes: int | None = None) -> Scene:
    """Draw the lots of a scene; `num_shapes` fixes how many shapes it has."""
    count = num_shapes or rng.choice((1, 2, 3))
    places = sorted(rng.sample(list(PLACES)[:4], count), key=list(PLACES).index)
    if count == 1 and rng.random() < 0.2:
        places = ["centre"]
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(_draw_shape(rng, place) for place in places))


def _draw_shape(rng: Random, place: str) -> Shape:
    x, y = PLACES[place]
    return Shape(rng.choice(list(KINDS)), rng.choice(list(COLOURS)), rng.choice(list(SIZES)), place,
                 x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER))


# --- pixels --------------------------------------------------------------------------------------------------------


def render(scene: Scene, side: int) -> Image.Image:
    """The scene as an RGB image of `side` × `side` pixels, drawn large and reduced, so that edges are smooth."""
    large = side * OVERSAMPLING
    background = BACKGROUNDS[scene.background]
    image = Image.new("RGB", (large, large), background)
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        KINDS[shape.kind](canvas, (shape.x * large, shape.y * large), SIZES[shape.size] * large,
                          COLOURS[shape.colour], background)
    return image.resize((side, side), Image.Resampling.BOX)


def _box(alone: Scene, side: int) -> list[int]:
    """The pixels in which a scene of one shape differs from its background."""
    empty = Image.new("RGB", (side, side), BACKGROUNDS[alone.background])
    return list(ImageChops.difference(render(alone, side), empty).getbbox() or (0, 0, side, side))


def _circle(canvas: ImageDraw.ImageDraw, centre: Point, half: float, colour: Any, background: Any) -> None:
    canvas.circle(centre, half, fill=colour)


def _ring(canvas: ImageDraw.ImageDraw, centre: Point, half: float, colour: Any, background: Any) -> None:
    canvas.circle(centre, half, fill=colour)
    canvas.circle(centre, half * 0.55, fill=background)


def _square(canvas: ImageDraw.ImageDraw, centre: Point, half: float, colour: Any, background: Any) -> None:
    _rectangle(canvas, centre, half * 0.9, half * 0.9, colour)


def _cross(canvas: ImageDraw.ImageDraw, centre: Point, half: float, colour: Any, background: Any) -> None:
    _rectangle(canvas, centre, half, half / 3, colour)
    _rectangle(canvas, centre, half / 3, half, colour)


def _triangle(canvas: ImageDraw.ImageDraw, centre: Point, half: float, colour: Any, background: Any) -> None:
    canvas.polygon(_around(centre, [half * 1.1] * 3), fill=colour)


def _star(canvas: ImageDraw.ImageDraw, centre: Point, half: float, colour: Any, background: Any) -> None:
    canvas.polygon(_around(centre, [half, half * 0.42] * 5), fill=colour)


def _rectangle(canvas: ImageDraw.ImageDraw, centre: Point, half_x: float, half_y: float, colour: Any) -> None:
    x, y = centre
    canvas.rectangle((x - half_x, y - half_y, x + half_x, y + half_y), fill=colour)


def _around(centre: Point, radii: list[float]) -> list[Point]:
    """Corners at equal angles around a centre, the first straight above it."""
    angles = [2 * math.pi * index / len(radii) for index in range(len(radii))]
    return [(centre[0] + radius * math.sin(angle), centre[1] - radius * math.cos(angle))
            for radius, angle in zip(radii, angles, strict=True)]


KINDS: dict[str, Callable[[ImageDraw.ImageDraw, Point, float, Any, Any], None]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "cross": _cross, "ring": _ring,
}
