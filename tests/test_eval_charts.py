"""Charts hold what they are given, and curves join what belongs together."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scored_runs import PAYLOAD, make_run

from eval.charts import ABOVE, BELOW, HEIGHT, WIDTH, Y_AXIS, Line, Room, Row, _axis, dot_chart, key, line_chart
from eval.comparisons import compare, summarize
from eval.curves import Kind, Point, curves
from eval.measures import measures_of
from eval.verdict import Findings

NUMBERS = st.floats(-1e6, 1e6)


def places(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"translate\(([\d.-]+) ([\d.-]+)\)", svg)]


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12))
def test_all_points_lie_within_the_plot(points: list[tuple[float, float]]) -> None:
    found = places(line_chart([Line("a", points, ["?"] * len(points), 0)], "x", "y", "chart"))
    assert len(found) == len(points)
    assert all(Y_AXIS <= x <= WIDTH and ABOVE <= y <= HEIGHT - BELOW for x, y in found)
    order = sorted(range(len(points)), key=lambda place: points[place][1])
    assert [found[place][1] for place in order] == sorted((y for _, y in found), reverse=True)  # more is higher up


@given(NUMBERS, st.floats(1e-3, 1e6))
def test_an_axis_has_a_few_ticks_and_no_more(low: float, spread: float) -> None:
    ticks = _axis(low, low + spread, 0, 100).ticks
    assert 3 <= len(ticks) <= 6 and all(0 <= _axis(low, low + spread, 0, 100).at(tick) <= 100 for tick in ticks)


def test_ties_but_for_rounding_have_an_axis() -> None:
    """The means of two arms whose scores are in thirds."""
    for value in (0.1, 63.2, 1e-7, 31415.9):
        above = math.nextafter(value, math.inf)
        assert 3 <= len(_axis(value, above, 0, 100).ticks) <= 6
        chart = dot_chart([Row("a", [value], "a"), Row("b", [above], "b")], value, "two")
        assert max(map(len, re.findall(r"class=\"axis\"[^>]*>([^<]*)<", chart))) <= 12


@given(st.lists(st.tuples(st.floats(Y_AXIS, WIDTH), st.floats(ABOVE, HEIGHT - BELOW)), min_size=1, max_size=20))
def test_what_is_written_beside_points_covers_nothing(points: list[tuple[float, float]]) -> None:
    room = Room(points)
    for point in points:
        room.write("12.5", point)
    boxes = room._taken[len(points):]
    for place, (left, top, right, bottom) in enumerate(boxes):
        assert left >= Y_AXIS and top >= ABOVE and right <= WIDTH and bottom <= HEIGHT - BELOW
        assert not any(left < x + 5 and x - 5 < right and top < y + 5 and y - 5 < bottom for x, y in points)
        assert not any(left < other[2] and other[0] < right and top < other[3] and other[1] < bottom
                       for other in boxes[place + 1:])


def test_a_mark_alone_is_written_at_the_right_of_its_point() -> None:
    written = str(Room([(100, 100)]).write("7.5", (100, 100)))
    assert 'x="108"' in written and ">7.5<" in written


def test_names_are_escaped_and_lines_are_told_apart() -> None:
    svg = line_chart([Line(PAYLOAD, [(1, 2), (3, 4)], [PAYLOAD, "b"], 1, [PAYLOAD]), Line("b", [(1, 1)], ["c"], 2)],
                     PAYLOAD, "y", PAYLOAD)
    assert "<img" not in svg and "<script" not in svg and "&lt;img" in svg
    assert len(set(re.findall(r'marker" d="([^"]+)"', svg))) == 2
    assert len({str(key(tone)) for tone in range(15)}) == 15


# --- curves --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root, 0, arm, effect, 20) for arm, effect in (("base", -1.0), ("alt", 0.0), ("mix", 1.0))]
    arms = ["base", "alt", "mix"]
    return Findings(arms, measures_of(runs[0].metrics), summarize(arms, runs), compare(arms, runs))


def point(arm: str, kind: Kind, value: float, **metrics: Any) -> Point:
    return Point(arm, kind, value, {"fid": 30.0 - value, "clip_score": 20.0 + value, "num_images": 16, **metrics})


def test_fid_is_traded_against_clip_score_over_guidance(found: Findings) -> None:
    swept = [point(arm, "guidance_scale", value) for arm in ("alt", "mix") for value in (5, 1.5, 3)]
    each, = curves(found, swept, [])
    assert each.title == "Over guidance" and [arm for arm, _ in each.legend] == ["alt", "mix"]
    chart, = each.charts
    assert chart.title == "FID against CLIP score"
    assert "mix: guidance scale 1.5, CLIP score 21.50, FID 28.50" in chart.svg
    own = places(chart.svg)[:3]
    assert own == sorted(own)  # joined in the order of their scales
    assert re.findall(r'class="beside"[^>]*>([\d.]+)<', chart.svg)[:3] == ["1.5", "3", "5"]


def test_each_measure_of_the_headline_has_a_curve_over_steps(found: Findings) -> None:
    swept = [point("mix", kind, value) for kind in ("num_inference_steps", "train_steps") for value in (10.0, 20.0)]
    steps, sampler = curves(found, swept, [])
    assert (steps.title, sampler.title) == ("Over training steps", "Over sampler steps")
    assert [chart.title for chart in steps.charts] == ["CLIP score over training steps", "FID over training steps"]


def test_a_usual_point_joins_only_curves_of_as_many_pictures(found: Findings) -> None:
    swept = [point("mix", "train_steps", value) for value in (10.0, 20.0)]
    usual = [point("mix", "train_steps", 15.0), point("alt", "train_steps", 15.0), point("mix", "guidance_scale", 7.5)]
    joined, = curves(found, swept, usual)
    assert "training steps 15," in joined.charts[0].svg and joined.charts[0].svg.count("<title>") == 3
    assert "16 pictures a point." in joined.note and "of more pictures" not in joined.note
    apart, = curves(found, swept, [replace(usual[0], metrics=usual[0].metrics | {"num_images": 99})])
    assert "training steps 15," not in apart.charts[0].svg and "of more pictures" in apart.note
    again, = curves(found, swept, [replace(usual[0], value=20.0)])
    assert again.charts[0].svg.count("<title>") == 2  # it is among them already


def test_points_without_a_measure_are_left_out(found: Findings, tmp_path: Path) -> None:
    swept = [Point("mix", "guidance_scale", value, {"fid": 10.0 + value, "num_images": 16}) for value in (1.0, 2.0)]
    each, = curves(found, swept, [])
    assert [chart.title for chart in each.charts] == ["FID over guidance scale"]
    assert curves(found, [], []) == []
