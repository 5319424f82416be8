"""Charts as inline SVG, which a page's style colours.

Dot charts: a row an arm, a dot a seed, a bar an interval, a dashed line to compare with. Line charts: a line an arm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, LEFT, RIGHT = 400, 92, 66  # of the whole, of the names, of the figures; in SVG units, about a pixel each
ROW, TOP, BOTTOM = 30, 8, 30
MAX_LABEL = 12
HEIGHT, Y_AXIS, ABOVE, BELOW = 260, 48, 26, 40  # of a line chart: the whole, and what lies about the plot
CHARACTER, LINE = 7.5, 13  # a small character's width, and a line's height
MARKERS = ("M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z", "M-4,-4h8v8h-8z", "M0,-5.2L5,3.8H-5z",
           "M0,-5.5L5.5,0L0,5.5L-5.5,0z")
"""Circle, square, triangle, diamond: lines are told apart where colours are not."""
NUM_TONES = 8


@dataclass(frozen=True)
class Row:
    """One arm in a dot chart."""

    label: str
    values: list[float]
    """One a seed; their mean is the large dot."""
    text: str
    """The figure at the right."""
    interval: tuple[float, float] | None = None
    tone: str = "plain"
    """Its CSS class: plain, reference, better or worse."""


@dataclass(frozen=True)
class Line:
    """One arm in a line chart."""

    label: str
    points: list[tuple[float, float]]
    """In the order in which they are joined."""
    texts: list[str]
    """What is said of each where a pointer rests on it."""
    tone: int
    """Its colour and marker."""
    marks: Sequence[str] = ()
    """What is written beside each point, where there is room."""


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to places."""

    low: float
    high: float
    start: float
    end: float
    """Places of low and high."""
    ticks: list[float] = field(default_factory=list)

    def at(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)


def dot_chart(rows: list[Row], reference: float, summary: str) -> Markup:
    """Draw rows on a common axis; a dashed line at `reference`. `summary` is for screen readers."""
    ends = [reference, *(value for row in rows for value in (*row.values, *(row.interval or ())))]
    axis = _axis(min(ends), max(ends), LEFT, WIDTH - RIGHT)
    height = TOP + ROW * len(rows) + BOTTOM
    bottom = height - BOTTOM
    parts = [_opened(height, summary), *_upright(axis, TOP, bottom), _vertical("mark", axis.at(reference), TOP, bottom)]
    parts += [_row(row, axis, TOP + ROW * place + ROW / 2) for place, row in enumerate(rows)]
    return Markup("").join([*parts, Markup("</svg>")])


def _opened(height: int, summary: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, summary)


def _upright(axis: Axis, top: float, bottom: float) -> list[Markup]:
    """Ticks of the axis below, with their lines."""
    return [part for tick in axis.ticks for part in (
        _vertical("tick", axis.at(tick), top, bottom),
        _text("axis", axis.at(tick), bottom + 18, _tick_text(tick, axis)))]


def _text(kind: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, x, y, text)


def _vertical(kind: str, x: float, top: float, bottom: float) -> Markup:
    return Markup('<line class="{}" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(kind, top, bottom, x=x)


def _row(row: Row, axis: Axis, y: float) -> Markup:
    half = MAX_LABEL // 2
    label = row.label if len(row.label) <= MAX_LABEL else f"{row.label[:half]}…{row.label[1 - half:]}"
    parts = [Markup('<g class="{}"><title>{}: {}</title><text class="name" x="0" y="{}">{}</text>').format(
        row.tone, row.label, row.text, y + 4.5, label)]
    if row.interval:
        low, high = map(axis.at, row.interval)
        parts.append(Markup('<line class="interval" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(low, high, y=y))
    if len(row.values) > 1:
        parts += [_dot("seed", axis.at(value), y, 3) for value in row.values]
    parts.append(_dot("mean", axis.at(sum(row.values) / len(row.values)), y, 5.5))
    parts.append(Markup('<text class="figure" x="{}" y="{}">{}</text></g>').format(WIDTH, y + 4.5, row.text))
    return Markup("").join(parts)


def _dot(kind: str, x: float, y: float, radius: float) -> Markup:
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}"/>').format(kind, x, y, radius)


# --- lines ---------------------------------------------------------------------------------------------------------


def line_chart(lines: list[Line], x_label: str, y_label: str, summary: str) -> Markup:
    """Draw lines, at least one with a point; `summary` is for screen readers."""
    xs, ys = zip(*(point for line in lines for point in line.points), strict=True)
    bottom = HEIGHT - BELOW
    x = _axis(min(xs), max(xs), Y_AXIS, WIDTH - 8)
    y = _axis(min(ys), max(ys), bottom, ABOVE)
    parts = [_opened(HEIGHT, summary), *_upright(x, ABOVE, bottom), *_level(y),
             _text("axis title", 0, 12, y_label), _text("axis figure", WIDTH, HEIGHT - 4, x_label)]
    room = Room([(x.at(a), y.at(b)) for line in lines for a, b in line.points])
    return Markup("").join([*parts, *(_line(line, x, y, room) for line in lines), Markup("</svg>")])


def _level(axis: Axis) -> list[Markup]:
    """Ticks of the axis at the left, with their lines."""
    return [part for tick in axis.ticks for part in (
        Markup('<line class="tick" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(Y_AXIS, WIDTH, y=axis.at(tick)),
        _text("axis figure", Y_AXIS - 7, axis.at(tick) + 4, _tick_text(tick, axis)))]


def _line(line: Line, x: Axis, y: Axis, room: "Room") -> Markup:
    places = [(x.at(a), y.at(b)) for a, b in line.points]
    path = Markup(" ").join(Markup("{},{}").format(*place) for place in places)
    colour, shape = _look(line.tone)
    parts = [Markup('<g class="tone-{}"><polyline points="{}"/>').format(colour, path)]
    marker = Markup('<path class="marker" d="{}" transform="translate({} {})"><title>{}: {}</title></path>')
    parts += [marker.format(shape, *place, line.label, text) for place, text in zip(places, line.texts, strict=True)]
    parts += [written for place, mark in zip(places, line.marks, strict=False) if (written := room.write(mark, place))]
    return Markup("").join([*parts, Markup("</g>")])


def key(tone: int) -> Markup:
    """A line's colour and marker, for a legend."""
    return Markup('<svg class="key tone-{}" viewBox="-14 -7 28 14" aria-hidden="true"><polyline points="-14,0 14,0"/>'
                  '<path class="marker" d="{}"/></svg>').format(*_look(tone))


def _look(tone: int) -> tuple[int, str]:
    """Colour and marker: colour 0 for tone 0 alone, and those that share one of the others differ in their markers."""
    if tone == 0:
        return 0, MARKERS[0]
    lap, place = divmod(tone - 1, NUM_TONES - 1)
    return place + 1, MARKERS[(tone + 2 * lap) % len(MARKERS)]


class Room:
    """What is free of a plot: marks beside points are written only where they cover neither points nor each other.

    Args:
        points: their places.
    """

    def __init__(self, points: list[tuple[float, float]]) -> None:
        self._taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]

    def write(self, text: str, point: tuple[float, float]) -> Markup | None:
        """A text at the right of its point, else at the left, above or below; None where none of them is free."""
        (x, y), width = point, CHARACTER * len(text)
        for left, top in ((x + 8, y - LINE / 2), (x - 8 - width, y - LINE / 2), (x - width / 2, y - 8 - LINE),
                          (x - width / 2, y + 8)):
            box = (left, top, left + width, top + LINE)
            if self._is_free(box):
                self._taken.append(box)
                return _text("beside", round(left, 1), round(top + 10, 1), text)
        return None

    def _is_free(self, box: tuple[float, float, float, float]) -> bool:
        is_inside = box[0] >= Y_AXIS and box[1] >= ABOVE and box[2] <= WIDTH and box[3] <= HEIGHT - BELOW
        return is_inside and not any(box[0] < right and left < box[2] and box[1] < bottom and top < box[3]
                       for left, top, right, bottom in self._taken)


# --- scales --------------------------------------------------------------------------------------------------------


def _axis(low: float, high: float, start: float, end: float) -> Axis:
    """A scale a little wider than the values, with three to six round ticks on it."""
    is_one = high - low <= 1e-9 * max(abs(low), abs(high))  # ties, but for rounding
    spread = abs(high) * 0.1 or 1.0 if is_one else high - low
    low, high = low - 0.08 * spread, high + 0.08 * spread
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(step for factor in (5, 2.5, 2, 1, 0.5, 0.25) if len(_multiples(step := power * factor, low, high)) >= 3)
    return Axis(low, high, start, end, [step * index for index in _multiples(step, low, high)])


def _multiples(step: float, low: float, high: float) -> range:
    return range(math.ceil(low / step), math.floor(high / step) + 1)


def _tick_text(tick: float, axis: Axis) -> Markup:
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else 1.0
    digits = next((each for each in range(12) if math.isclose(round(step, each), step, rel_tol=1e-6)), 12)
    return escape(f"{tick + 0.0:,.{digits}f}".replace("-", "−"))
