"""OWL-ViT: what is asked for in words, with boxes in pixels of the upright original, the same in a batch as alone."""

import functools
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.ops import box_iou
from transformers import (
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    OwlViTProcessor,
)

from recap.clip_bpe import VOCAB_SIZE, clip_tokenizer
from recap.config.stitch import Owlvit, Stitch
from recap.errors import UserError
from recap.experts import View
from recap.experts.owlvit import MAX_QUERIES, OwlvitExpert, _facts, label_of
from recap.facts import Facts
from recap.sample import decode_image
from recap.shards import read_shard
from recap.world.scene import draw_scene, render

SIDE = 96
TEXT = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": SIDE, "patch_size": 16}
QUERIES = ("a red circle", "a photo of a blue ring", "triangle")


def save(folder: Path, config: Any, model: Any, image_processor: Any, processor: Any) -> Path:
    """A checkpoint of the whole architecture, with random weights that make it sure of this and that."""
    torch.manual_seed(0)
    made = model(config(text_config=TEXT, vision_config=VISION, projection_dim=16))
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    made.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    tokenizer = clip_tokenizer.__wrapped__()  # the shared one saves its last truncation, too
    tokenizer.model_max_length = 16
    processor(image_processor(size=size), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("owlvit"), OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor,
                OwlViTProcessor)


@pytest.fixture(scope="module")
def folder_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("owlv2"), Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor,
                Owlv2Processor)


@functools.cache
def opened(folder: Path, queries: tuple[str, ...] = QUERIES, threshold: float = 0.0) -> OwlvitExpert:
    table = Owlvit(model=str(folder), queries=list(queries), tags_from="detr", threshold=threshold)
    return OwlvitExpert(Stitch(owlvit=table), "cpu")


def look(expert: OwlvitExpert, *views: View) -> list[Facts]:
    return expert.look(expert.preprocess(list(views)))


def scene(index: int, width: int, height: int) -> Image.Image:
    return render(draw_scene(Random(index)), 64).resize((width, height))


def in_pixels(output: Any, width: float, height: float) -> torch.Tensor:
    """The first image's raw boxes as corners, (patches, 4)."""
    x, y, w, h = output.pred_boxes[0].T
    corners = torch.stack([(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height], dim=1)
    return corners.clamp(min=0)


def nearest(found: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far each box is from the nearest of others, and which that is."""
    distances, numbers = (found[:, None] - expected).abs().amax(dim=-1).min(dim=1)
    return distances, numbers


def boxes(facts: Facts) -> torch.Tensor:
    return torch.tensor([seen.box for seen in facts.objects])


def alike(one: Facts, other: Facts) -> bool:
    return ([seen.label for seen in one.objects] == [seen.label for seen in other.objects]
            and torch.allclose(boxes(one), boxes(other), atol=0.05))


# --- boxes ---------------------------------------------------------------------------------------------------------


def test_boxes_and_scores_are_those_of_the_stock_pipeline_in_pixels_of_the_image_given(folder: Path) -> None:
    expert, image = opened(folder), scene(0, 300, 120)
    facts, = look(expert, View(image))
    model = OwlViTForObjectDetection.from_pretrained(folder).eval()
    stock: Any = OwlViTProcessor.from_pretrained(folder)
    with torch.no_grad():
        output = model(**stock(text=[[*QUERIES]], images=image, return_tensors="pt"))
    scores, labels = output.logits[0].sigmoid().max(dim=-1)
    expected = in_pixels(output, 300, 120).minimum(torch.tensor([300.0, 120.0, 300.0, 120.0]))
    distances, patches = nearest(boxes(facts), expected)
    assert len(facts.objects) > 5
    assert distances.max() < 0.05
    assert [label_of(QUERIES[number]) for number in labels[patches]] == [seen.label for seen in facts.objects]
    assert scores[patches].tolist() == pytest.approx([seen.score for seen in facts.objects], abs=1e-3)
    assert boxes(facts)[:, 2].max() > 120  # beyond the height: not in the pixels of the resized square


def test_owlv2_boxes_are_in_pixels_of_the_image_too_which_it_pads_to_a_square(folder_v2: Path) -> None:
    expert, image = opened(folder_v2), scene(0, 300, 120)
    facts, = look(expert, View(image))
    with torch.no_grad():
        output = expert.model(**expert.preprocess([View(image)]).inputs or {})
    expected = in_pixels(output, 300, 300).minimum(torch.tensor([300.0, 120.0, 300.0, 120.0]))
    assert nearest(boxes(facts), expected)[0].max() < 0.05
    assert boxes(facts)[:, 2].max() > 120
    assert len(facts.objects) > 5  # those in the padding have no area in the image, and are left out


def test_owlv2_does_not_pad_a_long_image_at_its_full_length(folder_v2: Path) -> None:
    expert = opened(folder_v2)
    assert expert._shrunk(Image.new("RGB", (70_000, 1_400))).size == (2 * SIDE, 4)
    assert len(look(expert, View(Image.new("RGB", (5000, 100))), View(scene(0, 64, 64)))) == 2


def test_a_rotated_photo_is_seen_upright(folder: Path) -> None:
    expert, upright = opened(folder), scene(1, 96, 48)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # "turn me a quarter clockwise"
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    image = decode_image(turned.getvalue())
    assert image.size == (96, 48)
    assert look(expert, View(image)) == look(expert, View(upright))


def test_the_threshold_decides_and_the_surest_comes_first(folder: Path) -> None:
    view = View(scene(2, 64, 64))
    every = look(opened(folder), view)[0].objects
    assert [seen.score for seen in every] == sorted((seen.score for seen in every), reverse=True)
    middle = every[len(every) // 2].score
    strict = opened(folder, threshold=middle)
    assert [seen.score for seen in look(strict, view)[0].objects] == [s.score for s in every if s.score > middle]
    assert look(opened(folder, threshold=1.0), view) == [Facts()]


def test_of_overlapping_boxes_of_one_label_the_surest_is_kept(folder: Path) -> None:
    found = {"scores": torch.tensor([0.3, 0.9, 0.8, 0.5, 0.6]), "labels": torch.tensor([0, 0, 1, 0, 0]),
             "boxes": torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [1, 0, 10, 10], [50, 0, 60, 10],
                                    [200, 0, 210, 10]])}
    objects = _facts(found, ["dog", "cat"], height=20, width=100).objects
    assert [(seen.label, seen.score) for seen in objects] == [("dog", 0.9), ("cat", 0.8), ("dog", 0.5)]
    facts, = look(opened(folder), View(scene(3, 64, 64)))
    for label in {seen.label for seen in facts.objects}:
        same = torch.tensor([seen.box for seen in facts.objects if seen.label == label])
        assert (box_iou(same, same).fill_diagonal_(0) < 0.6).all()  # at most 0.5, before they are clipped


@pytest.mark.parametrize("version", ["folder", "folder_v2"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (500, 10), (3, 7)])
def test_odd_sizes_are_looked_at(version: str, size: tuple[int, int], request: pytest.FixtureRequest) -> None:
    facts, = look(opened(request.getfixturevalue(version)), View(Image.new("RGB", size, "red")))
    assert all(0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1] for x0, y0, x1, y1 in
               (seen.box for seen in facts.objects))


# --- what is looked for --------------------------------------------------------------------------------------------


def test_each_image_is_searched_for_its_own_tags_alone_as_in_a_batch(folder: Path) -> None:
    expert = opened(folder, queries=())
    views = [View(scene(4, 64, 64), tags=["ring", "cross", "small white dog"]), View(scene(5, 200, 90)),
             View(scene(6, 50, 180), tags=["circle"])]
    together = look(expert, *views)
    for facts, view in zip(together, views, strict=True):
        alone, = look(expert, view)
        assert alike(facts, alone)
        assert {seen.label for seen in facts.objects} <= set(view.tags)
    assert together[0].objects
    assert together[1] == Facts()
    assert len(together[2].objects) > 5


def test_what_fills_up_a_batch_never_wins(folder: Path) -> None:
    expert = opened(folder, queries=("circle",))
    batch = expert.preprocess([View(scene(7, 64, 64)), View(scene(7, 64, 64), tags=["ring", "cross"])])
    with torch.no_grad():
        logits = expert.model(**batch.inputs or {}).logits
    assert (logits[0, :, 1:].sigmoid() == 0).all()
    assert (logits[1].sigmoid() > 0).all()


def test_a_batch_in_which_nothing_is_looked_for_finds_nothing(folder: Path) -> None:
    assert look(opened(folder, queries=()), View(scene(0, 8, 8)), View(scene(1, 8, 8))) == [Facts(), Facts()]


def test_queries_come_before_tags_and_each_thing_is_asked_for_once(folder: Path) -> None:
    expert = opened(folder, queries=("a dog", "a photo of the Eiffel tower"))
    assert expert._queries(["dog", "cat", "a cat", "an apple", "", "\u0007"]) == {
        "dog": "a dog", "Eiffel tower": "a photo of the Eiffel tower", "cat": "a photo of a cat",
        "apple": "a photo of a apple"}


def test_tags_that_are_too_long_or_too_many_are_left_out(folder: Path) -> None:
    expert = opened(folder, queries=("a dog",))
    long = "very " * 12 + "long thing"
    asked = expert._queries([long, *(f"thing {number}" for number in range(100))])
    assert list(asked)[:2] == ["dog", "thing 0"]
    assert len(asked) == MAX_QUERIES
    facts, = look(expert, View(scene(8, 64, 64), tags=[long, *(f"thing {number}" for number in range(100))]))
    assert {seen.label for seen in facts.objects} <= set(asked)


# --- opening -------------------------------------------------------------------------------------------------------


def test_a_query_longer_than_the_model_reads_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"stitch\.owlvit\.queries: 'a very .* more than the 16 tokens"):
        opened(folder, queries=("a dog", "a" + " very" * 14 + " small dog"))
    with pytest.raises(ValidationError, match="at most 64"):
        Owlvit(queries=["a dog"] * 65)


def test_a_checkpoint_that_is_not_there_or_of_another_kind_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^stitch\.owlvit\.model: no folder"):
        opened(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "detr"}')
    with pytest.raises(UserError, match=r"^stitch\.owlvit\.model: .* holds a model of type 'detr'"):
        opened(tmp_path)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    OwlViTForObjectDetection.from_pretrained(folder).config.save_pretrained(tmp_path)
    torch.save(OwlViTForObjectDetection.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^stitch\.owlvit\.model: cannot load"):
        opened(tmp_path)


def test_provenance_names_the_files_and_what_was_asked(folder: Path) -> None:
    made = json.loads(json.dumps(opened(folder).provenance))
    assert made["revision"].startswith("sha256:")
    assert (made["queries"], made["tags_from"], made["threshold"]) == ([*QUERIES], "detr", 0.0)


def test_real_photos_are_looked_at(folder: Path, shared_data: Path) -> None:
    samples = read_shard(str(shared_data / "photos" / "coco-open-00000.tar"), [])
    views = [View(next(samples).image(), tags=["cat", "traffic light"]) for _ in range(4)]
    for view, facts in zip(views, look(opened(folder), *views), strict=True):
        assert facts.objects
        assert (boxes(facts) <= torch.tensor([*view.image.size] * 2)).all()
