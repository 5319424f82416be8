"""Experts: boxes in pixels of the upright original, the same in a batch as alone."""

import io
import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from random import Random
from shutil import copytree

import pytest
import torch
from PIL import Image

from recap.config.stitch import Detr, Owlvit, Stitch
from recap.errors import UserError
from recap.experts import Expert, View, open_expert
from recap.experts.detr import DetrExpert
from recap.experts.settings import check_names, check_settings
from recap.facts import Facts, Sentence
from recap.sample import decode_image
from recap.world.scene import draw_scene, render


def look(expert: Expert, *images: Image.Image, alt_texts: Sequence[str] = ()) -> list[Facts]:
    views = [View(image, alt_text) for image, alt_text in zip_longest(images, alt_texts, fillvalue="")]
    return expert.look(expert.preprocess(views))


def scene(index: int, width: int, height: int) -> Image.Image:
    return render(draw_scene(Random(index)), 64).resize((width, height))


@pytest.fixture(scope="module")
def detr(world_models: Path) -> Expert:
    # Untrained, it is sure of nothing: at threshold 0 it reports all of its 10 queries.
    return DetrExpert(Stitch(detr=Detr(model=str(world_models / "detr"), threshold=0.0)), "cpu")


# --- detection -----------------------------------------------------------------------------------------------------


def test_boxes_are_in_pixels_of_the_image_given(detr: DetrExpert) -> None:
    image = scene(0, 300, 120)
    facts, = look(detr, image)
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
    assert look(detr, image) == look(detr, upright)


def test_a_batch_gives_what_single_images_give(detr: DetrExpert) -> None:
    images = [scene(2, 64, 64), scene(3, 200, 90), scene(4, 50, 180)]
    for together, image in zip(look(detr, *images), images, strict=True):
        alone, = look(detr, image)
        scores = [sorted(found.score for found in facts.objects) for facts in (together, alone)]
        assert scores[0] == pytest.approx(scores[1], abs=0.02)
        assert all(0 <= box[0] <= box[2] <= image.width and 0 <= box[1] <= box[3] <= image.height
                   for box in (found.box for found in together.objects))


def test_the_threshold_decides_and_the_surest_comes_first(detr: DetrExpert, world_models: Path) -> None:
    image = scene(6, 64, 64)
    every = look(detr, image)[0].objects
    assert [found.score for found in every] == sorted((found.score for found in every), reverse=True)
    strict = DetrExpert(Stitch(detr=Detr(model=str(world_models / "detr"), threshold=0.7)), "cpu")
    assert look(strict, image) == [Facts()]
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
    assert len(look(opened, scene(7, 64, 64))) == 1


# --- the registry --------------------------------------------------------------------------------------------------


def test_experts_open_by_their_names_and_look(world_models: Path) -> None:
    config = Stitch(detr=Detr(model=str(world_models / "detr")))
    for name in config.experts:
        expert = open_expert(name, config, "cpu")
        assert len(look(expert, scene(0, 64, 64), scene(1, 32, 64), alt_texts=["a cat"])) == 2
        json.dumps(expert.provenance)


@pytest.mark.parametrize(("experts", "message"), [
    (["dert"], "did you mean 'detr'"), (["yolo"], "known are detr, owlvit"), ([], "name at least one"),
    (["detr", "alt_text", "detr"], "'detr' is named twice")])
def test_an_unknown_expert_is_named_with_the_nearest(experts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_names(experts)


@pytest.mark.parametrize(("name", "config", "message"), [
    ("ram", Stitch(), r"^stitch\.ram\.checkpoint is not set: name the \.pth file"),
    ("tag2text", Stitch(), r"^stitch\.tag2text\.checkpoint is not set"),
    ("owlvit", Stitch(), r"^stitch\.owlvit: nothing says what to look for: set queries or tags_from"),
    ("owlvit", Stitch(owlvit=Owlvit(queries=[" "])), r"^stitch\.owlvit: nothing says what to look for"),
    ("owlvit", Stitch(owlvit=Owlvit(tags_from="dert")), r"^stitch\.owlvit\.tags_from: .*did you mean 'detr'"),
    ("owlvit", Stitch(owlvit=Owlvit(tags_from="alt_text")), r"^stitch\.owlvit\.tags_from: alt_text names nothing")])
def test_settings_that_cannot_be_right_are_found_before_anything_is_opened(name: str, config: Stitch,
                                                                           message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(name, config)


def test_a_checkpoint_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stitch\.detr\.model: no folder"):
        open_expert("detr", Stitch(detr=Detr(model=str(tmp_path / "nothing"))), "cpu")


@pytest.mark.parametrize("kind", ["yolos", "vit", "blip-2"])
def test_another_model_is_no_detr(world_models: Path, tmp_path: Path, kind: str) -> None:
    folder = copytree(world_models / "detr", tmp_path / "detr")
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=rf"^stitch\.detr\.model: .* holds a model of type '{kind}'"):
        open_expert("detr", Stitch(detr=Detr(model=str(folder))), "cpu")


def test_a_detr_without_all_its_weights_is_refused(world_models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    folder = copytree(world_models / "detr", tmp_path / "detr")
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if not name.startswith("bbox_predictor")},
              folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"^stitch\.detr\.model: .* lacks \d+ weights of a DetrForObjectDetection"):
        open_expert("detr", Stitch(detr=Detr(model=str(folder))), "cpu")


def test_a_detr_with_another_models_processor_is_refused(world_models: Path, tmp_path: Path) -> None:
    folder = copytree(world_models / "detr", tmp_path / "detr")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(UserError, match=r"^stitch\.detr\.model: the ViTImageProcessor.* makes no boxes") as caught:
        open_expert("detr", Stitch(detr=Detr(model=str(folder))), "cpu")
    assert "\n" not in str(caught.value)


def test_alt_text_is_hearsay() -> None:
    said, silent = look(open_expert("alt_text", Stitch(), "cpu"), *[scene(0, 8, 8)] * 2, alt_texts=["a cat"])
    assert said.sentences == [Sentence("a cat", "alt_text", reliable=False)]
    assert not said.seen
    assert silent == Facts()
