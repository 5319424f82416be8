"""Where boxes lie, by GenEval's rule; and the opposite of what is said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.judges.positions import OPPOSITES, RELATIONS, opposite, relations
from recap.facts import Box

SWAPPED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TURNED = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    left, top = draw(st.integers(0, 200)), draw(st.integers(0, 200))
    return (float(left), float(top), float(left + draw(st.integers(1, 100))), float(top + draw(st.integers(1, 100))))


@given(boxes(), boxes())
def test_swapping_the_boxes_swaps_the_relation(first: Box, second: Box) -> None:
    assert relations(second, first, 0.1) == {SWAPPED[each] for each in relations(first, second, 0.1)}


@given(boxes(), boxes(), st.sampled_from([2.0, 4.0, 0.5]))
def test_only_shape_and_place_count_not_scale(first: Box, second: Box, scale: float) -> None:
    one, other = ((scale * box[0], scale * box[1], scale * box[2], scale * box[3]) for box in (first, second))
    assert relations(one, other, 0.1) == relations(first, second, 0.1)


@given(boxes(), boxes())
def test_axes_are_treated_alike(first: Box, second: Box) -> None:
    turned = [(box[1], box[0], box[3], box[2]) for box in (first, second)]
    assert relations(turned[0], turned[1], 0.1) == {TURNED[each] for each in relations(first, second, 0.1)}


@given(boxes(), boxes())
def test_no_box_is_on_both_sides_of_another(first: Box, second: Box) -> None:
    found = relations(first, second, 0.1)
    assert found <= set(RELATIONS) and not any(SWAPPED[each] in found for each in found)
    assert relations(first, first, 0.1) == set()


@pytest.mark.parametrize(("second", "expected"), [
    ((30, 0, 40, 10), {"left of"}),
    ((0, 30, 10, 40), {"above"}),
    ((30, 30, 40, 40), {"left of", "above"}),  # 30 apart on either axis, less 2: 0.66 of the distance
    ((2, 0, 12, 10), set()),  # 2 apart, and a tenth of both widths is 2
    ((3, 0, 13, 10), set()),  # 1 remains of 3: a third of the distance
    ((5, 0, 15, 10), {"left of"}),  # 3 of 5
    ((30, 12, 40, 22), {"left of"}),
])
def test_the_margin_is_a_tenth_of_both_sizes(second: Box, expected: set[str]) -> None:
    assert relations((0, 0, 10, 10), second, 0.1) == expected


@pytest.mark.parametrize(("text", "swapped"), [
    ("a photo of a dog right of a teddy bear", "a photo of a dog left of a teddy bear"),
    ("A dog on the Left of a cat", "A dog on the right of a cat"),
    ("a dog on the left side of a cat", "a dog on the right side of a cat"),
    ("a cup on top of a table", "a cup under a table"),
    ("a cup under a table", "a cup on top of a table"),
    ("a cow on the top of a car", "a cow on the bottom of a car"),
    ("a dog in front of a desk", "a dog behind a desk"),
    ("a dog inside a box near a wall", "a dog outside a box far from a wall"),
    ("a cat far away from a dog", "a cat near a dog"),
    ("a dog hidden by a car", "a dog in front of a car"),
    ("a bird above, a cat below", "a bird below, a cat above"),
    ("a bright room with leftovers", None),
    ("a dog next to a cat", None),
    ("", None),
])
def test_the_opposite_swaps_every_relation_and_nothing_else(text: str, swapped: str | None) -> None:
    assert opposite(text) == swapped


@pytest.mark.parametrize("said", sorted(OPPOSITES))
def test_every_opposite_is_positional_itself(said: str) -> None:
    swapped = opposite(f"a dog {said} a cat")
    assert swapped and swapped != f"a dog {said} a cat" and opposite(swapped) not in (None, swapped)
