"""GenEval's verdicts of given detections."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.judges.geneval import Row, is_correct, read_row, to_colour
from recap.facts import Object

MARGIN = 0.1


def row(*include: dict[str, Any], exclude: list[dict[str, Any]] | None = None) -> Row:
    found = read_row({"tag": "mine", "include": list(include), "exclude": exclude or []}, "here")
    assert found
    return found


def dog(left: float = 0, score: float = 0.9, label: str = "dog") -> Object:
    return Object(label, score, (left, 0.0, left + 10, 10.0))


ONE_DOG = {"class": "dog", "count": 1}
TWO_DOGS = {"class": "dog", "count": 2}
CAT_RIGHT = {"class": "cat", "count": 1, "position": ["right of", 0]}


@pytest.mark.parametrize(("num_dogs", "is_right"), [(0, False), (1, False), (2, True), (3, True), (16, True)])
def test_so_many_are_needed_and_more_are_no_fault(num_dogs: int, is_right: bool) -> None:
    assert is_correct(row(TWO_DOGS), {"dog": [dog()] * num_dogs}, {}, MARGIN) is is_right


@pytest.mark.parametrize(("num_dogs", "is_right"), [(1, False), (2, True), (3, False), (4, False)])
def test_what_is_excluded_makes_the_number_exact(num_dogs: int, is_right: bool) -> None:
    exact = row(TWO_DOGS, exclude=[{"class": "dog", "count": 3}])
    assert exact.is_counting and is_correct(exact, {"dog": [dog()] * num_dogs}, {}, MARGIN) is is_right


def test_another_class_may_be_excluded() -> None:
    without = row(ONE_DOG, exclude=[{"class": "cat", "count": 1}])
    assert not without.is_counting and without.names == ["dog", "cat"]
    assert is_correct(without, {"dog": [dog()], "cat": []}, {}, MARGIN)
    assert not is_correct(without, {"dog": [dog()], "cat": [dog(label="cat")]}, {}, MARGIN)


def test_every_object_is_needed() -> None:
    both = row(ONE_DOG, {"class": "cat", "count": 1})
    cat = dog(label="cat")
    assert is_correct(both, {"dog": [dog()], "cat": [cat]}, {}, MARGIN)
    assert not is_correct(both, {"dog": [dog()], "cat": []}, {}, MARGIN)
    assert not is_correct(both, {"dog": [], "cat": [cat]}, {}, MARGIN)


def test_the_surest_must_have_the_colour() -> None:
    red = row({"class": "dog", "count": 1, "color": "red"})
    sure, less_sure = dog(0, 0.9), dog(20, 0.5)
    found = {"dog": [sure, less_sure]}
    assert red.has_colours and to_colour(red, found) == [("dog", sure)]
    assert is_correct(red, found, {("dog", sure): "red", ("dog", less_sure): "blue"}, MARGIN)
    assert not is_correct(red, found, {("dog", sure): "blue", ("dog", less_sure): "red"}, MARGIN)


def test_no_colour_is_asked_for_where_the_number_is_wrong_already() -> None:
    two = row({"class": "dog", "count": 2, "color": "red"})
    assert to_colour(two, {"dog": [dog()]}) == [] and not is_correct(two, {"dog": [dog()]}, {}, MARGIN)
    assert to_colour(row(ONE_DOG), {"dog": [dog()]}) == []


@pytest.mark.parametrize(("left", "is_right"), [(50, True), (-50, False), (0, False)])
def test_the_surest_must_be_in_the_place(left: float, is_right: bool) -> None:
    found = {"dog": [dog(), dog(100)], "cat": [dog(left, label="cat"), dog(-30, label="cat")]}
    assert is_correct(row(ONE_DOG, CAT_RIGHT), found, {}, MARGIN) is is_right


def test_a_place_holds_from_every_one_of_them() -> None:
    found = {"dog": [dog(), dog(100)], "cat": [dog(50, label="cat")]}
    assert not is_correct(row(TWO_DOGS, CAT_RIGHT), found, {}, MARGIN)
    assert is_correct(row(TWO_DOGS, CAT_RIGHT), found | {"cat": [dog(150, label="cat")]}, {}, MARGIN)


def test_a_place_is_wrong_where_the_other_is_missing() -> None:
    assert not is_correct(row(ONE_DOG, CAT_RIGHT), {"dog": [], "cat": [dog(50, label="cat")]}, {}, MARGIN)


@given(st.lists(st.integers(0, 300), max_size=6), st.lists(st.integers(0, 300), max_size=6))
def test_mirrored_pictures_bear_out_mirrored_rows(dogs: list[int], cats: list[int]) -> None:
    left = row(ONE_DOG, CAT_RIGHT | {"position": ["left of", 0]})
    found = {"dog": [dog(x) for x in dogs], "cat": [dog(x, label="cat") for x in cats]}
    mirrored = {"dog": [dog(300 - x) for x in dogs], "cat": [dog(300 - x, label="cat") for x in cats]}
    assert is_correct(row(ONE_DOG, CAT_RIGHT), found, {}, MARGIN) == is_correct(left, mirrored, {}, MARGIN)


def test_fields_of_others_are_no_row() -> None:
    assert read_row({}, "here") is None
    assert read_row({"category": "color", "tag": "x"}, "here") is None
