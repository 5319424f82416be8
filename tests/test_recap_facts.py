"""Facts: merged once, and read from their file as they were written."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recap.facts import Facts, Found, Object, Sentence, Tag, clip, iou, merge, read_facts, write_facts


def test_what_two_experts_see_is_one_object_and_what_one_sees_twice_is_two() -> None:
    dog, same_dog, other_dog = Object("dog", 0.8, (0, 0, 10, 10)), Object("dog", 0.9, (1, 0, 10, 10)), \
        Object("dog", 0.7, (20, 20, 30, 30))
    cat = Object("cat", 0.9, (0, 0, 10, 10))
    assert merge([Facts([dog]), Facts([same_dog, other_dog, cat])]).objects == [same_dog, other_dog, cat]
    assert merge([Facts([dog, dog])]).objects == [dog, dog]
    assert merge([Facts(tags=[Tag("sea", 0.2)]), Facts(tags=[Tag("sea", 0.6), Tag("sky", 0.1)])]).tags == [
        Tag("sea", 0.6), Tag("sky", 0.1)]
    assert merge([]) == Facts()
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
labelled = {"label": texts, "score": st.floats(0, 1)}
objects = st.builds(Object, **labelled, box=st.tuples(*[st.floats(0, 5000)] * 4))
facts = st.builds(Facts, st.lists(objects), st.lists(st.builds(Tag, **labelled)),
                  st.lists(st.builds(Sentence, texts, texts, st.booleans())), st.lists(texts))
found = st.builds(Found, texts, st.integers(1, 100_000), st.integers(1, 100_000), facts)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(found, max_size=4, unique_by=lambda each: each.key))
def test_what_is_written_is_read(tmp_path: Path, several: list[Found]) -> None:
    write_facts(tmp_path / "facts.parquet", several, {"model": "a", "settings": [1, 0.5]})
    read, provenance = read_facts(tmp_path / "facts.parquet")
    assert list(read.values()) == several
    assert list(read) == [each.key for each in several]
    assert provenance == {"model": "a", "settings": [1, 0.5]}


def test_equal_facts_give_equal_bytes(tmp_path: Path) -> None:
    several = [Found("a", 2, 3, Facts(tags=[Tag("sea", 0.5)])), Found("b", 2, 3, Facts())]
    for name in ("first", "second"):
        write_facts(tmp_path / name, several, {})
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_box_ends_where_the_image_does() -> None:
    assert clip([-1, 0.123, 20, 5], 10, 4) == (0, 0.12, 10, 4)
