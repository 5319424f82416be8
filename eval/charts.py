"""Dot charts as inline SVG: a row an arm, a dot a seed, a bar an interval, and a dashed line to compare with."""

import math
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, LEFT, RIGHT = 400, 92, 66  # of the whole, of the names, of the figures; in SVG units, about a pixel each
ROW, TOP, BOTTOM = 30, 8, 30
MAX_LABEL = 12


@dataclass(frozen=True)
class Row:
    """One arm in a chart."""

    label: str
    values: list[float]
    """One a seed; their mean is the large dot."""
    text: str
    """The figure at the right."""
    interval: tuple[float, float] | None = None
    tone: str = "plain"
    """Its CSS class: plain, reference, better or worse."""


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to places."""

    low: float
    high: float
    ticks: list[float] = field(default_factory=list)

    def x(self, value: float) -> float:
        return round(LEFT + (value - self.low) / (self.high - self.low) * (WIDTH - LEFT - RIGHT), 2)


def dot_chart(rows: list[Row], reference: float, summary: str) -> Markup:
    """Draw rows on a common axis; a dashed line at `reference`. `summary` is for screen readers."""
    ends = [reference, *(value for row in rows for value in (*row.values, *(row.interval or ())))]
    axis = _axis(min(ends), max(ends))
    height = TOP + ROW * len(rows) + BOTTOM
    bottom = height - BOTTOM
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, summary)]
    for tick in axis.ticks:
        parts.append(_vertical("tick", axis.x(tick), bottom))
        parts.append(Markup('<text class="axis" x="{}" y="{}">{}</text>').format(
            axis.x(tick), bottom + 18, _tick_text(tick, axis)))
    parts.append(_vertical("mark", axis.x(reference), bottom))
    parts += [_row(row, axis, TOP + ROW * place + ROW / 2) for place, row in enumerate(rows)]
    return Markup("").join([*parts, Markup("</svg>")])


def _vertical(kind: str, x: float, bottom: float) -> Markup:
    return Markup('<line class="{}" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(kind, TOP, bottom, x=x)


def _row(row: Row, axis: Axis, y: float) -> Markup:
    label = row.label if len(row.label) <= MAX_LABEL else row.label[:MAX_LABEL - 1] + "…"
    parts = [Markup('<g class="{}"><title>{}: {}</title><text class="name" x="0" y="{}">{}</text>').format(
        row.tone, row.label, row.text, y + 4.5, label)]
    if row.interval:
        low, high = map(axis.x, row.interval)
        parts.append(Markup('<line class="interval" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(low, high, y=y))
    if len(row.values) > 1:
        parts += [_dot("seed", axis.x(value), y, 3) for value in row.values]
    parts.append(_dot("mean", axis.x(sum(row.values) / len(row.values)), y, 5.5))
    parts.append(Markup('<text class="figure" x="{}" y="{}">{}</text></g>').format(WIDTH, y + 4.5, row.text))
    return Markup("").join(parts)


def _dot(kind: str, x: float, y: float, radius: float) -> Markup:
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}"/>').format(kind, x, y, radius)


def _axis(low: float, high: float) -> Axis:
    """A scale a little wider than the values, with three or four round ticks on it."""
    spread = (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - 0.08 * spread, high + 0.08 * spread
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.75)
    first = math.ceil(low / step)
    return Axis(low, high, [step * index for index in range(first, math.floor(high / step) + 1)])


def _tick_text(tick: float, axis: Axis) -> Markup:
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return escape(f"{tick + 0.0:.{digits}f}".replace("-", "−"))
