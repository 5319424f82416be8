"""What prompts ask of objects: classes, numbers and places, read from words, and from GenEval's rows alike."""

import json
import re
from pathlib import Path

import pytest

from eval.judges.asked import Asked, read_asked
from eval.judges.geneval import TAGS
from eval.judges.vocabulary import Vocabulary, words_of
from eval.prompts import Prompt
from recap.errors import UserError

COCO = re.split(r",\s*", """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell
phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
""".replace("\n", " ").strip())
VOC = ["aeroplane", "diningtable", "motorbike", "pottedplant", "sofa", "tvmonitor"]
NAMES = Vocabulary(COCO)


def asked(text: str) -> Asked:
    return read_asked(Prompt(text), NAMES)


def classes(text: str) -> list[str]:
    return ["/".join(sorted(labels)) for labels in asked(text).classes]


def counts(text: str) -> dict[str, int]:
    return {"/".join(sorted(labels)): number for labels, number in asked(text).counts.items()}


def relations(text: str) -> list[str]:
    return ["/".join(sorted(first)) + f" {relation} " + "/".join(sorted(second))
            for (first, _), relation, (second, _) in asked(text).relations]


@pytest.mark.parametrize("name", COCO)
def test_a_class_is_named_by_its_label_alone_and_in_the_plural(name: str) -> None:
    said = {"mouse": "computer mouse", "skis": "pair of skis"}.get(name, name)
    assert classes(f"a {said}") == classes(f"two photos with a {said} in them") == [name]
    assert NAMES.labels_of(name) == {name}


@pytest.mark.parametrize(("text", "names"), [
    ("a man and a woman", ["person"]),
    ("people on motorbikes and bikes", ["person", "motorcycle", "bicycle/motorcycle"]),
    ("a surfer with a duck", ["person", "bird"]),
    ("a puppy on a sofa beside the fridge", ["dog", "couch", "refrigerator"]),
    ("a hot dog", ["hot dog"]),
    ("a teddy bear", ["teddy bear"]),
    ("an orange cat", ["cat"]),
    ("an orange, a banana", ["orange", "banana"]),
    ("a red orange and a remote", ["orange", "remote"]),
    ("a remote village", []),
    ("a man in a tie", ["person", "tie"]),
    ("a mouse eats; two mice", []),
    ("a dog bowl and a car door", []),
    ("a street without cars, no dog", []),
    ("a statue like a horse", []),
    ("a table", ["dining table"]),
    ("a desk, a chicken, a plant and a stool", []),
    ('a sign that says "two dogs"', []),
    ("a cat, dog and bird", ["cat", "dog", "bird"]),
    ("A DOG’S owner", ["dog"]),
    ("the dog's ball", ["sports ball"]),
    ("dogs cats birds", ["dog", "cat", "bird"]),
    ("", []),
])
def test_things_are_read_from_words(text: str, names: list[str]) -> None:
    assert classes(text) == names


@pytest.mark.parametrize(("text", "numbers"), [
    ("three dogs and a cat", {"dog": 3}),
    ("one knife", {"knife": 1}),
    ("a single red kite", {"kite": 1}),
    ("2 large white cups", {"cup": 2}),
    ("a pair of zebras", {"zebra": 2}),
    ("a dozen donuts", {"donut": 12}),
    ("two men and a woman", {"person": 3}),
    ("two boys and three girls", {"person": 5}),
    ("two dogs; the dogs run", {"dog": 2}),
    ("a dog", {}),
    ("dogs", {}),
    ("some people and two men", {}),
    ("about one dog, at least two cats, three or four cows", {}),
    ("two dogs, one dog is brown", {}),
    ("a bike and two bicycles", {}),
    ("two lemurs", {}),
    ("a bus with two doors", {}),
    ("two story houses and a car", {}),
    ("no two dogs", {}),
])
def test_numbers_are_read_from_words(text: str, numbers: dict[str, int]) -> None:
    assert counts(text) == numbers


@pytest.mark.parametrize(("text", "expected"), [
    ("a dog right of a teddy bear", ["dog right of teddy bear"]),
    ("a dog to the left of a big red car", ["dog left of car"]),
    ("a dog is standing on the left side of the car", ["dog left of car"]),
    ("a kite above two benches", ["kite above bench"]),
    ("a giraffe on the top of an airplane", ["giraffe above airplane"]),
    ("a giraffe on the bottom of an airplane", ["giraffe below airplane"]),
    ("a dog below a cat, left of a cow", ["dog below cat"]),
    ("a dog on top of a bed", []),
    ("a dog left of a lemur", []),
    ("a lemur left of a dog", []),
    ("a dog left of a dog", []),
    ("a dog and nothing else above a car", []),
    ("left of a car is a dog", []),
    ("a dog turns left and a car passes", []),
])
def test_places_are_read_from_words(text: str, expected: list[str]) -> None:
    assert relations(text) == expected


def test_a_relation_asks_for_as_many_as_were_named() -> None:
    assert asked("two dogs above a cat").relations == (((frozenset({"dog"}), 2), "above", (frozenset({"cat"}), 1)),)


def test_labels_of_other_spellings_are_found() -> None:
    other = Vocabulary([*VOC, "cell_phone", "N/A"])
    names = ["airplane", "dining table", "motorcycle", "potted plant", "couch", "tv", "cell phone"]
    for said, label in zip(names, [*VOC, "cell_phone"], strict=True):
        assert other.labels_of(said) == {label}
        assert read_asked(Prompt(f"a photo of a {said}"), other).classes == (frozenset({label}),)


def test_labels_that_are_no_everyday_nouns_are_found_as_they_are() -> None:
    world = Vocabulary(["small red circle", "large red circle"])
    found = read_asked(Prompt("two small red circles above a large red circle"), world)
    assert found.counts == {frozenset({"small red circle"}): 2} and len(found.relations) == 1
    assert read_asked(Prompt("a red circle"), world).classes == ()
    assert read_asked(Prompt("a red circle"), Vocabulary(["", " "])).classes == ()


def test_every_row_of_geneval_is_read_and_says_what_its_prompt_says(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "prompts" / "geneval.jsonl").read_text().splitlines()]
    differ = []
    for row in rows:
        text = row.pop("prompt")
        by_row, by_words = read_asked(Prompt(text, "geneval", row), NAMES), asked(text)
        assert by_row.row and not by_row.unknown and by_row.row.tag in TAGS
        assert by_row.row.is_counting == (row["tag"] == "counting") == bool(by_row.counts)
        assert len(by_row.classes) == len(row["include"]) and len(by_row.relations) == (row["tag"] == "position")
        if (set(by_row.classes), by_row.counts, by_row.relations) != (
                set(by_words.classes), by_words.counts, by_words.relations):
            differ.append(text)
    assert len(rows) == 553 and differ == ["a photo of a skis right of a zebra"]  # "a skis" may be a verb


def test_prompts_of_t2i_compbench_are_read(shared_data: Path) -> None:
    lines = (shared_data / "prompts" / "t2i_compbench_val.jsonl").read_text().splitlines()
    texts = [(row["category"], row["prompt"]) for row in map(json.loads, lines)]
    numbers = [text for category, text in texts if category == "numeracy"]
    several = [asked(text) for text in numbers]
    assert sum(bool(each.counts) for each in several) >= 220
    assert all(set(each.counts) == set(each.classes) for each, text in zip(several, numbers, strict=True)
               if re.fullmatch(r"(?:one|two|three|four) \w+(?: and (?:one|two|three|four) \w+)?", text))
    named = {category: sum(bool(asked(text).relations) for other, text in texts if other == category)
             for category in ("spatial", "3d_spatial", "numeracy", "color")}
    assert named == {"spatial": named["spatial"], "3d_spatial": 0, "numeracy": 0, "color": 0}
    assert named["spatial"] >= 75  # of 215 with such a relation, those in which COCO has labels for both things


def test_captions_of_people_are_read(shared_data: Path) -> None:
    content = json.loads((shared_data / "captions" / "coco_fakecap_tokenized.json").read_text())
    captions = re.findall(r'"([^"]{20,})"', json.dumps(content))[:5000]
    found = [asked(caption) for caption in captions]
    assert len(captions) > 1000 and sum(bool(each.classes) for each in found) > 0.6 * len(captions)
    assert all(1 <= number <= 99 for each in found for number in each.counts.values())


@pytest.mark.parametrize(("about", "says"), [
    ({"include": "dog"}, "include: Input should be a valid list, not 'dog'"),
    ({"include": []}, "include: List should have at least 1 item"),
    ({"include": [{"class": "dog"}]}, "include.0.count is missing"),
    ({"include": [{"count": 1}]}, "include.0.class is missing"),
    ({"include": [{"class": "dog", "count": "two"}]}, "include.0.count: Input should be a valid integer, not 'two'"),
    ({"include": [{"class": "dog", "count": True}]}, "include.0.count"),
    ({"include": [{"class": "dog", "count": 0}]}, "include.0.count: Input should be greater than or equal to 1"),
    ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "include.0.color: Input should be 'red', 'orange'"),
    ({"include": [{"class": "dog", "count": 1, "position": ["near", 0]}]}, "include.0.position.0: Input should be 'le"),
    ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "include.0.position: refers to object 0"),
    ({"include": [{"class": "dog", "count": 1}], "exclude": [3]}, "exclude.0: Input should be a valid dictionary"),
    ({"include": [{"class": "dog", "count": 1}], "tag": 3}, "tag: Input should be a valid string"),
])
def test_a_malformed_row_is_one_line(about: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as caught:
        read_asked(Prompt("a dog", "mine", about), NAMES)
    assert str(caught.value).startswith("evaluate.detector: the prompt 'a dog': ")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_may_carry_more_and_ask_for_what_the_detector_lacks() -> None:
    about = {"id": 7, "include": [{"class": "lemur", "count": 2, "note": ""},
                                  {"class": "dog", "count": 1, "position": ["above", 0]}]}
    found = read_asked(Prompt("two lemurs below a dog", "mine", about), NAMES)
    assert found == Asked(classes=(frozenset({"dog"}),), unknown=("lemur",))


def test_words_keep_punctuation_and_drop_quotations() -> None:
    assert words_of('A dog’s “two cats” bowl, red.') == ["a", "dog", '"', '"', "bowl", ",", "red", "."]
