"""Curves over training steps, guidance and sampler steps: charts of the points that `generate.sweep` asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from eval.charts import Line, key, line_chart
from eval.measures import CLIP_SCORE, FID, Measure
from eval.verdict import Findings

Kind = Literal["guidance_scale", "num_inference_steps", "train_steps"]
TITLES: dict[Kind, tuple[str, str]] = {
    "train_steps": ("Over training steps", "training steps"), "guidance_scale": ("Over guidance", "guidance scale"),
    "num_inference_steps": ("Over sampler steps", "sampler steps")}
"""In the order of the page: title, and name of the axis."""


@dataclass(frozen=True)
class Point:
    """One arm with one value of one setting."""

    arm: str
    kind: Kind
    value: float
    metrics: dict[str, Any]
    """Of its metrics.json."""


@dataclass(frozen=True)
class Chart:
    """One figure of the page."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class Curves:
    """The charts over one setting."""

    title: str
    note: str
    legend: list[tuple[str, Markup]]
    """Arms, and what their lines look like."""
    charts: list[Chart]


def curves(found: Findings, swept: Sequence[Point], usual: Sequence[Point]) -> list[Curves]:
    """Charts over each setting that was swept.

    Args:
        found: arms in their order, and the measures of the headline.
        swept: the points.
        usual: of each arm and setting the point with the value that everything else was drawn with. It joins the curve
            where it is of as many pictures, as an FID falls with their number.
    """
    return [_curves(found, kind, own, [each for each in usual if each.kind == kind])
            for kind in TITLES if (own := [each for each in swept if each.kind == kind])]


def _joined(swept: list[Point], usual: list[Point]) -> list[Point]:
    """Swept and usual points of each arm, by value."""
    there = {(each.arm, each.value) for each in swept}
    sizes = {each.arm: each.metrics.get("num_images") for each in swept}
    more = [each for each in usual if each.arm in sizes and each.metrics.get("num_images") == sizes[each.arm]
            and (each.arm, each.value) not in there]
    return sorted([*swept, *more], key=lambda each: each.value)


def _curves(found: Findings, kind: Kind, swept: list[Point], usual: list[Point]) -> Curves:
    title, axis = TITLES[kind]
    points = _joined(swept, usual)
    numbers = sorted({int(each.metrics.get("num_images", 0)) for each in swept})
    note = f"Of the first seed; {' or '.join(f'{number:,}' for number in numbers)} pictures a point."
    if any(each.metrics.get("num_images") not in numbers for each in usual):
        note += " What all else on this page was drawn with is no point of these curves, as it is of more pictures."
    measures = found.headline
    charts = []
    if kind == "guidance_scale" and any(_has(each, FID) and _has(each, CLIP_SCORE) for each in points):
        charts = [_trade_off(found, points)]
        measures = [each for each in measures if each not in (FID, CLIP_SCORE)]
    charts += [_over(found, axis, measure, points) for measure in measures
               if any(_has(each, measure) for each in points)]
    arms = [arm for arm in found.arms if any(each.arm == arm for each in points)]
    return Curves(title, note, [(arm, key(tone(found, arm))) for arm in arms], charts)


def tone(found: Findings, arm: str) -> int:
    """0 for the baseline, a number of its own for each other arm."""
    return [found.baseline, *(each for each in found.arms if each != found.baseline)].index(arm)


def _over(found: Findings, axis: str, measure: Measure, points: list[Point]) -> Chart:
    lines = _lines(found, points, [measure], lambda each: (each.value, measure.written(each.metrics[measure.key])),
                   lambda each: f"{axis} {each.value:g}, {measure.name} {measure.text(each.metrics[measure.key])}")
    unit = ", %" if measure.is_share else ""
    direction = "Lower is better." if measure.lower_is_better else "Higher is better."
    title = f"{measure.label} over {axis}"
    return Chart(title, direction, line_chart(lines, axis, f"{measure.label}{unit} {measure.arrow}",
                                              f"{title}, a line for each arm"))


def _trade_off(found: Findings, points: list[Point]) -> Chart:
    both = [CLIP_SCORE, FID]

    def place(each: Point) -> tuple[float, float]:
        return each.metrics[CLIP_SCORE.key], each.metrics[FID.key]

    def text(each: Point) -> str:
        figures = ", ".join(f"{measure.name} {measure.text(each.metrics[measure.key])}" for measure in both)
        return f"guidance scale {each.value:g}, {figures}"

    lines = _lines(found, points, both, place, text, lambda each: f"{each.value:g}")
    title = "FID against CLIP score"
    return Chart(title, "Numbers are guidance scales. Lower and farther right is better.",
                 line_chart(lines, "CLIP score ↑", "FID ↓", f"{title} over guidance, a line for each arm"))


def _lines(found: Findings, points: list[Point], measures: list[Measure], place: Callable[[Point], tuple[float, float]],
           text: Callable[[Point], str], mark: Callable[[Point], str] | None = None) -> list[Line]:
    lines = []
    for arm in found.arms:
        own = [each for each in points if each.arm == arm and all(_has(each, measure) for measure in measures)]
        if own:
            lines.append(Line(arm, [place(each) for each in own], [text(each) for each in own], tone(found, arm),
                              [mark(each) for each in own] if mark else ()))
    return lines


def _has(point: Point, measure: Measure) -> bool:
    return point.metrics.get(measure.key) is not None
