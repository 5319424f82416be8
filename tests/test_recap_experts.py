"""Experts: boxes in pixels of the upright original, facts merged once, captions that are never empty or unbounded."""

import io
import json
import unicodedata
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recap.config import Detr, Stitch
from recap.errors import UserError
from recap.experts import REGISTRY, Expert, Facts, Object, Sentence, Tag, iou, merge, open_experts
from recap.experts.detr import DetrExpert
from recap.llm import MAX_CHARACTERS, TemplateWriter, looks_like_words
from recap.sample import decode_image
from recap.world.scene import draw_scene, render

STYLES = ["short", "long", "rich", "haiku"]


def scene(index: int, width: int, height: int) -> Image.Image:
    return render(draw_scene(Random(index)), 64).resize((width, height))


@pytest.fixture(scope="module")
def detr(world_models: Path) -> Expert:
    # Untrained, it is sure of nothing: at threshold 0 it reports all of its 10 queries.
    return DetrExpert(Stitch(detr=Detr(model=str(world_models / "detr"), threshold=0.0)), "cpu")


# --- detection -----------------------------------------------------------------------------------------------------


def test_boxes_are_in_pixels_of_the_image_given(detr: DetrExpert) -> None:
    image = scene(0, 300, 120)
    facts, = detr.look([image], [""])
    with torch.no_grad():
        output = detr.model(**detr.processor(images=[image], return_tensors="pt"))
    x, y, width, height = output.pred_boxes[0].T
    left, right = (x - width / 2) * 300, (x + width / 2) * 300
    top, bottom = (y - height / 2) * 120, (y + height / 2) * 120
    expected = torch.stack([left, top, right, bottom], dim=1)
    found = torch.tensor([thing.box for thing in facts.objects])
    assert len(found) == 10
    assert torch.cdist(found, expected).min(dim=1).values.max() < 0.05
    assert found[:, 2].max() > 120  # beyond the height: not in the pixels of the resized square


def test_a_rotated_photo_is_seen_upright(detr: DetrExpert) -> None:
    upright = scene(1, 96, 48)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # "turn me a quarter clockwise"
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    image = decode_image(turned.getvalue())
    assert image.size == (96, 48)
    assert detr.look([image], [""]) == detr.look([upright], [""])


def test_a_batch_gives_what_single_images_give(detr: DetrExpert) -> None:
    images = [scene(2, 64, 64), scene(3, 200, 90), scene(4, 50, 180)]
    for together, image in zip(detr.look(images, [""] * 3), images, strict=True):
        alone, = detr.look([image], [""])
        scores = [sorted(found.score for found in facts.objects) for facts in (together, alone)]
        assert scores[0] == pytest.approx(scores[1], abs=0.02)
        assert all(0 <= box[0] <= box[2] <= image.width and 0 <= box[1] <= box[3] <= image.height
                   for box in (found.box for found in together.objects))


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (1, 5000), (5000, 1)])
def test_odd_images_cost_at_most_their_facts(detr: DetrExpert, size: tuple[int, int]) -> None:
    normal = scene(5, 64, 64)
    odd, facts = detr.look([Image.new("RGB", size), normal], ["", ""])
    assert len(facts.objects) == 10
    assert len(odd.objects) == (0 if max(size) > 50 * min(size) else 10)


def test_the_threshold_decides_and_the_surest_comes_first(detr: DetrExpert, world_models: Path) -> None:
    image = scene(6, 64, 64)
    every = detr.look([image], [""])[0].objects
    assert [found.score for found in every] == sorted((found.score for found in every), reverse=True)
    strict = DetrExpert(Stitch(detr=Detr(model=str(world_models / "detr"), threshold=0.7)), "cpu")
    assert strict.look([image], [""]) == [Facts()]
    assert strict.provenance["threshold"] == 0.7
    assert strict.provenance["revision"] == detr.provenance["revision"]


def test_a_timm_backbone_is_filled_from_the_checkpoint_itself(tmp_path: Path) -> None:
    """The configuration of facebook/detr-resnet-50 asks for a pretrained timm backbone; nothing may be fetched."""
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor
    hub = {"model_type": "detr", "backbone": "test_resnet", "use_timm_backbone": True, "use_pretrained_backbone": True,
           "backbone_config": None, "dilation": False, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
           "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
           "num_queries": 4}
    model = DetrForObjectDetection(DetrConfig.from_dict(dict(hub)))
    model.save_pretrained(tmp_path)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | hub))
    opened = DetrExpert(Stitch(detr=Detr(model=str(tmp_path), threshold=0.0)), "cpu")
    ours, theirs = model.state_dict(), opened.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(opened.look([scene(7, 64, 64)], [""])) == 1


# --- registry and merging ------------------------------------------------------------------------------------------


def test_every_registered_expert_opens_and_looks(world_models: Path) -> None:
    config = Stitch(experts=list(REGISTRY), detr=Detr(model=str(world_models / "detr")))
    for expert in open_experts(config, "cpu").values():
        assert len(expert.look([scene(0, 64, 64), scene(1, 32, 64)], ["a cat", ""])) == 2
        json.dumps(expert.provenance)


@pytest.mark.parametrize(("experts", "message"), [
    (["dert"], "did you mean 'detr'"), (["owlvit_xl_huge"], "known are detr, alt_text"), ([], "name at least one")])
def test_an_unknown_expert_is_named_with_the_nearest(experts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_experts(Stitch(experts=experts), "cpu")


def test_a_checkpoint_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stitch\.detr\.model: no folder"):
        open_experts(Stitch(detr=Detr(model=str(tmp_path / "nothing"))), "cpu")


def test_alt_text_is_hearsay() -> None:
    expert = open_experts(Stitch(experts=["alt_text"]), "cpu")["alt_text"]
    said, silent = expert.look([scene(0, 8, 8)] * 2, ["a cat", ""])
    assert said.sentences == [Sentence("a cat", "alt_text", reliable=False)]
    assert not said.seen
    assert silent == Facts()


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


# --- the template --------------------------------------------------------------------------------------------------


def write(facts: Facts) -> dict[str, str]:
    return TemplateWriter().write(facts, (100, 100), STYLES)


def seen(label: str, *box: float) -> Object:
    return Object(label, 0.9, box)  # type: ignore[arg-type]


def test_captions_count_place_and_size() -> None:
    captions = write(Facts([seen("red circle", 5, 5, 15, 15), seen("red circle", 85, 85, 95, 95),
                            seen("dog", 30, 30, 75, 70)]))
    assert captions["short"] == "A dog and two red circles."
    assert captions["long"] == ("The picture shows a dog in the centre and two red circles at the top left and at the "
                                "bottom right. The dog is large and the red circles are tiny.")
    assert captions["haiku"] == captions["long"]
    assert captions["rich"].startswith(captions["long"])


@given(st.lists(st.floats(0.1, 2.9), min_size=4, max_size=4))
def test_things_of_a_size_come_in_reading_order_however_large_they_are_exactly(jitter: list[float]) -> None:
    corners = {"dog": (4, 70), "cat": (68, 2), "ball": (40, 72), "kite": (3, 3)}  # each some 15 pixels wide
    things = [seen(name, x, y, x + 14 + wider, y + 14 + wider)
              for (name, (x, y)), wider in zip(corners.items(), jitter, strict=True)]
    captions = write(Facts([*things, seen("tree", 30, 20, 70, 66)]))
    assert captions["short"] == "A tree, a kite, a cat and other objects."
    assert captions["long"].startswith("The picture shows a tree in the centre, a kite at the top left, a cat at the "
                                       "top right, a dog at the bottom left and a ball at the bottom.")


def test_single_objects_are_placed_relative_to_one_another() -> None:
    rich = write(Facts([seen("dog", 0, 40, 40, 80), seen("umbrella", 70, 40, 90, 60)]))["rich"]
    assert "The umbrella is to the right of the dog." in rich


@pytest.mark.parametrize(("label", "short"), [
    ("person", "Two people."), ("wine glass", "Two wine glasses."), ("bus", "Two buses."), ("sheep", "Two sheep."),
    ("scissors", "Two pairs of scissors."), ("cherry", "Two cherries."), ("broccoli", "Broccoli.")])
def test_plurals(label: str, short: str) -> None:
    assert write(Facts([seen(label, 0, 0, 9, 9), seen(label, 50, 50, 60, 60)]))["short"] == short


@pytest.mark.parametrize(("label", "short"), [("umbrella", "An umbrella."), ("unicorn", "A unicorn."),
                                              ("scissors", "A pair of scissors."), ("dog", "A dog.")])
def test_articles(label: str, short: str) -> None:
    assert write(Facts([seen(label, 0, 0, 9, 9)]))["short"] == short


def test_alt_text_is_quoted_as_such_where_it_is_words_and_only_in_rich() -> None:
    captions = write(Facts([seen("dog", 0, 0, 9, 9)], sentences=[Sentence("Our dog &amp; the sea", "alt_text", False)]))
    assert captions["rich"].endswith("Its caption on the web reads: “Our dog & the sea”.")
    assert "sea" not in captions["short"] + captions["long"]
    noise = write(Facts(sentences=[Sentence("IMG_2002.JPG", "alt_text", False)]))
    assert noise == write(Facts())
    assert noise["short"] == "An image."


@pytest.mark.parametrize("text", [
    "Sad beautiful woman drinking cognac at restaurant", "red circle", "猫が窓辺で眠っている",
    "Candles burning with foggy trees in the background"])
def test_what_looks_like_words(text: str) -> None:
    assert looks_like_words(text)


@pytest.mark.parametrize("text", [
    "spyker-c8-1.JPG", "DSC04321", "High Waist Mom Jeans | Boohoo", "Buy Notebook Online", "https://a.example/b.png",
    "x", "0000081866 PowerPoint Templates - Slide 26", "Royalty Free Stock Images", "12 x 14 (3)", "", "$49 red dress"])
def test_what_does_not_look_like_words(text: str) -> None:
    assert not looks_like_words(text)


coordinates = st.floats(-50, 5000, allow_nan=False)
objects = st.builds(Object, st.text(max_size=60), st.floats(0, 1), st.tuples(*[coordinates] * 4))
facts = st.builds(
    Facts, st.lists(objects, max_size=30), st.lists(st.builds(Tag, st.text(max_size=60), st.floats(0, 1)), max_size=20),
    st.lists(st.builds(Sentence, st.text(max_size=400), st.just("x"), st.booleans()), max_size=4),
    st.lists(st.text(max_size=80), max_size=4))


@given(facts, st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
def test_no_facts_give_an_empty_unbounded_or_unprintable_caption(found: Facts, size: tuple[int, int]) -> None:
    captions = TemplateWriter().write(found, size, STYLES)
    assert list(captions) == STYLES
    for style, caption in captions.items():
        assert 0 < len(caption) <= MAX_CHARACTERS.get(style, MAX_CHARACTERS["long"])
        assert caption == " ".join(caption.split())
        assert not {unicodedata.category(char) for char in caption} & {"Cc", "Cs", "Co", "Cn", "Zl", "Zp"}
        assert caption.encode()
    assert captions == TemplateWriter().write(found, size, STYLES)
