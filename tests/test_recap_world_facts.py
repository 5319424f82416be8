"""Words read back: the parser is exact on everything that the world says, and on what a stitcher makes of its facts."""

import re
from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recap.facts import Facts, Object
from recap.llm import Scene as Shown
from recap.llm.template import TemplateWriter
from recap.world.facts import (
    BACKGROUND,
    COUNT_WORDS,
    PATTERN,
    PLACE,
    SHAPE,
    SIZE_WORDS,
    Stated,
    Thing,
    Truth,
    compare,
    read,
)
from recap.world.judge import judge
from recap.world.reader import Reading, Seen
from recap.world.scene import BACKGROUNDS, COLOURS, KINDS, PATTERNS, PLACES, SIZES, Scene, draw_scene
from recap.world.words import (
    OTHER_WORDS,
    alt_text,
    careful_alt_text,
    careful_prose,
    clean_alt_text,
    describe,
    describe_at_length,
    reference_long,
    reference_rich,
    reference_short,
)


@given(st.integers(0, 10**9))
def test_whole_texts_state_every_fact_and_nothing_false(seed: int) -> None:
    rng = Random(seed)
    scene = draw_scene(rng)
    writers = (careful_alt_text, careful_prose, describe, reference_long, reference_rich)
    for text in [clean_alt_text(scene), *(write(scene, rng) for write in writers)]:
        truth = compare(read(text), scene.metadata(32))
        assert (truth.covered, truth.wrong) == (truth.total, 0), text


def test_other_words_say_nothing_of_a_scene() -> None:
    said = {word for name in (*PLACES, *COLOURS, *KINDS, *SIZES, *PATTERNS, *BACKGROUNDS) for word in name.split()}
    assert not (said | SIZE_WORDS.keys() | COUNT_WORDS.keys() - {"a", "an"}) & set(OTHER_WORDS)


@given(st.integers(0, 10**9))
def test_how_shapes_are_said_to_lie_is_how_they_lie(seed: int) -> None:
    rng = Random(seed)
    scene = draw_scene(rng)
    for sentence in describe_at_length(scene, rng).rstrip(".").split(". "):
        said = re.sub(r"^Here (the .+) lies (.+? of|above|below) (the .+)", r"\1 is \2 \3", sentence)
        said = re.sub(r"^(.+? of|Above|Below) (the .+) lies (the .+)", r"\3 is \1 \2", said)
        said = re.sub(r"^It is (.+? of|above|below) (the .+) that (the .+) is seen", r"\3 is \1 \2", said)
        if said != sentence:
            assert len(read(said).relations) == 1, sentence
            assert compare(read(said), scene.metadata(32)).wrong == 0, sentence


@given(st.integers(0, 10**9))
def test_short_references_and_true_alt_text_say_nothing_false(seed: int) -> None:
    rng = Random(seed)
    scene = draw_scene(rng)
    assert compare(read(reference_short(scene, rng)), scene.metadata(32)).wrong == 0
    kind, alt = alt_text(scene, rng)
    truth = compare(read(alt), scene.metadata(32))
    assert (truth.covered > 0) == (kind in ("one fact", "whole")), alt
    assert (truth.wrong > 0) == (kind == "false"), alt


def facts_of(scene: Scene) -> Facts:
    """What a detector without fault finds."""
    objects = [Object(f"{thing['size']} {thing['colour']} {thing['kind']}", 1.0, tuple(thing["box"]))
               for thing in scene.metadata(32)["objects"]]
    return Facts(objects=[*objects, Object(scene.background.name, 1.0, (0, 0, 32, 32))])


def stitched(scene: Scene) -> dict[str, str]:
    return TemplateWriter(["short", "long", "rich"]).write(Shown(facts_of(scene), 32, 32)).captions


@given(st.integers(0, 10**9))
def test_stitched_captions_of_what_is_there_say_nothing_false(seed: int) -> None:
    scene = draw_scene(Random(seed))
    things = scene.metadata(32)
    for style, text in stitched(scene).items():
        truth = compare(read(text), things)
        assert truth.wrong == 0, text
        if style == "rich":
            assert truth.covered >= truth.total - 2, text  # "in many places" is no place


@pytest.mark.parametrize(("text", "things"), [
    ("two red circles at the top left and at the bottom", [Thing("circle", "red", None, "top left"),
                                                           Thing("circle", "red", None, "bottom")]),
    ("Down in the bottom right, a big bar", [Thing("bar", None, "large", "bottom right")]),
    ("The small red circle is to the left of the ring.", []),
    ("Blue-Cross-42 Mouse Pad", [Thing("cross", "blue")]),
    ("a circle. A Small RING at the top", [Thing("circle"), Thing("ring", None, "small", "top")]),
    ("crossing the barn, starring nobody", []),
])
def test_what_a_text_brings_in(text: str, things: list[Thing]) -> None:
    assert list(read(text).things) == things


@given(st.text(max_size=200))
def test_any_text_can_be_read(text: str) -> None:
    assert isinstance(read(text), Stated)


def test_what_is_not_there_is_wrong_in_all_that_is_said_of_it() -> None:
    scene = {"objects": [{"kind": "ring", "colour": "red", "size": "small", "place": "top"}],
             "background": {"colour": "grey", "pattern": "plain"}}
    assert compare(read("a small blue ring at the top, plain white background"), scene) == Truth(1, 5, 6)
    assert compare(read("a large red ring at the top"), scene) == Truth(3, 1, 6)
    assert compare(read("a large ring at the top"), scene) == Truth(2, 1, 6)
    assert compare(read("two red rings at the top"), scene) == Truth(3, 2, 6)
    assert compare(read(""), scene) == Truth(0, 0, 6)


def test_things_are_paired_so_that_most_is_true() -> None:
    scene = {"objects": [{"kind": "ring", "colour": "red", "size": "small", "place": "top"},
                         {"kind": "ring", "colour": "blue", "size": "small", "place": "bottom"}],
             "background": {"colour": "grey", "pattern": "plain"}}
    assert compare(read("a ring at the top and a red ring"), scene) == Truth(3, 1, 10)
    assert compare(read("a red ring and a ring at the top"), scene) == Truth(3, 1, 10)


@pytest.mark.parametrize(("text", "wrong"), [
    ("The small red ring is above the large blue bar.", 0),
    ("The small red ring is below the large blue bar.", 1),
    ("The bar is to the right of the red ring. The ring is to the left of the blue bar.", 0),
    ("The bar is to the left of the ring.", 1),
    ("The green ring is above the bar.", 1),  # there is none
    ("The bar is to the ring.", 1),
    ("The large blue bar is large.", 0),
    ("a plain grey background and a striped white background", 2),
    ("seven red rings", 12),  # of which one is there
    ("a small red ring at the top left and at the bottom", 1),  # it can be in one place only
    ("Its caption on the web reads: “Red Cross on white”.", 0),
])
def test_what_is_said_again_and_how_shapes_lie_is_held_to_the_truth(text: str, wrong: int) -> None:
    scene = {"objects": [{"kind": "ring", "colour": "red", "size": "small", "place": "top left"},
                         {"kind": "bar", "colour": "blue", "size": "large", "place": "bottom right"}],
             "background": {"colour": "grey", "pattern": "plain"}}
    assert compare(read(text), scene).wrong == wrong


def test_references_share_no_sentence_with_the_stitchers_template() -> None:
    """A model must not score by having learnt its form: sentences in which shapes, grounds and places are masked."""
    ground = re.compile(rf"(?:\ban? )?(?:{PATTERN.pattern} )?{BACKGROUND.pattern}(?: background\b)?")

    def forms(texts: Iterable[str]) -> set[str]:
        masked = (PLACE.sub("P", ground.sub("S", SHAPE.sub("S", text.lower()))) for text in texts)
        return {re.sub(r"S(?:(?:, | and )S)*", "S", sentence.strip())
                for text in masked for sentence in text.split(".") if sentence.strip()}

    references: set[str] = set()
    ours: set[str] = set()
    for seed in range(300):
        rng = Random(seed)
        scene = draw_scene(rng)
        references |= forms(write(scene, rng) for write in (reference_short, reference_long, reference_rich))
        ours |= forms(stitched(scene).values())
    assert {"S", "S and other objects"} <= ours
    assert any(form.startswith("the picture shows S") for form in ours)
    assert not references & ours


# --- judging -------------------------------------------------------------------------------------------------------


def reading(scene: Scene) -> Reading:
    """What a reader without fault sees."""
    return Reading(tuple(Seen(shape.kind, shape.colour, shape.size, shape.place) for shape in scene.shapes),
                   scene.background.colour, scene.background.pattern)


@given(st.integers(0, 10**9))
def test_the_scene_itself_satisfies_every_reference(seed: int) -> None:
    rng = Random(seed)
    scene = draw_scene(rng)
    for write in (reference_short, reference_long, reference_rich, describe):
        text = write(scene, rng)
        found = judge(reading(scene), read(text), complete="more shapes" not in text)
        assert set(found.values()) <= {1.0, None}, text
        assert found["object_accuracy"] == 1.0


def test_every_fault_shows_in_its_own_metric() -> None:
    asked = read("a small red circle at the top and a large blue bar at the bottom on a plain grey background")
    right = [Seen("circle", "red", "small", "top"), Seen("bar", "blue", "large", "bottom")]

    def found(shapes: list[Seen], background: str = "grey") -> dict[str, float | None]:
        return judge(Reading(tuple(shapes), background, "plain"), asked, complete=True)

    assert set(found(right).values()) == {1.0}
    assert found([*right, Seen("ring", "pink", "small", "top left")]) | {"object_accuracy": 0, "count": 0} == found(
        [*right, Seen("ring", "pink", "small", "top left")])
    swapped = found([Seen("circle", "blue", "small", "top"), Seen("bar", "red", "large", "bottom")])
    assert (swapped["binding"], swapped["objects_found"], swapped["count"]) == (0, 0, 1)
    moved = found([Seen("circle", "red", "small", "top left"), right[1]])
    assert (moved["places"], moved["objects_found"], moved["object_accuracy"]) == (0.5, 0.5, 0)
    assert found([Seen("circle", "red", "large", "top"), right[1]])["sizes"] == 0.5
    assert found(right, "white")["background"] == 0.5
    missing = found(right[:1])
    assert missing == dict.fromkeys(missing, 1.0) | {"objects_found": 0.5, "object_accuracy": 0, "count": 0}

    nothing = judge(Reading(tuple(right), "grey", "plain"), read("IMG_2041.JPG"), complete=False)
    assert set(nothing.values()) == {None}


def test_a_shape_that_is_not_there_is_neither_misplaced_nor_in_a_wrong_colour() -> None:
    one = Reading((Seen("circle", "red", "small", "top"),), "grey", "plain")
    for text in ("a red circle at the top and a red circle at the bottom", "a red circle and a blue circle"):
        found = judge(one, read(text), complete=True)
        assert found["objects_found"] == 0.5
        assert (found["binding"], found["places"]) in ((1, 1), (1, None))
