"""The judge of objects: its verdicts of drawn scenes whose truth is known, and of photos; what can't be opened."""

import functools
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from eval.clip_score import ClipScorer
from eval.config import ClipScore, Detector, Evaluate
from eval.judge import Judge, check_prompts, judge_images, metrics_of, open_named
from eval.judges.clip_answers import ClipAnswers
from eval.judges.detector import METRICS, DetectorJudge
from eval.judges.objects import ObjectDetector
from eval.judges.positions import relations
from eval.prompts import Prompt
from recap.errors import UserError
from recap.shards import read_shard
from recap.world.base import unpack
from recap.world.scene import Scene, Shape, box, draw_scene, render

SIDE = 32
WORDS = ("zero", "one", "two", "three", "four", "five", "six")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's detector and CLIP, as they ship."""
    out = tmp_path_factory.mktemp("trained")
    for part in ("detr", "clip"):
        unpack(part, out / part)
    return out


@functools.cache
def opened(folder: Path, clip: bool = True, threshold: float = 0.3, counting: float = 0.5) -> Judge:
    return DetectorJudge.open(Detector(
        model=str(folder / "detr"), threshold=threshold, counting_threshold=counting,
        clip=ClipScore(model=str(folder / "clip") if clip else "none")), "cpu")


def scenes(num: int, num_shapes: int | None = None) -> list[Scene]:
    return [draw_scene(Random(index), num_shapes) for index in range(num)]


def pictures(drawn: list[Scene]) -> list[Image.Image]:
    return [render(scene, SIDE) for scene in drawn]


def counted(scene: Scene) -> str:
    """`two small red circles and one large blue ring`."""
    counts = Counter(shape.full_name for shape in scene.shapes)
    return " and ".join(f"{WORDS[number]} {name}{'s' * (number > 1)}" for name, number in counts.items())


def mean(values: list[dict[str, float | None]], metric: str) -> float:
    known = [value for each in values if (value := each[metric]) is not None]
    return sum(known) / len(known)


def lies(first: Shape, second: Shape) -> str | None:
    left, top, right, bottom = box(first, SIDE)
    found = relations((left, top, right, bottom), tuple(box(second, SIDE)), 0.1)  # type: ignore[arg-type]
    return min(found, default=None)


def placed() -> list[tuple[Scene, str]]:
    """Scenes of two shapes, and how the first lies from the second."""
    return [(scene, relation) for scene in scenes(60, 2)
            if len({shape.full_name for shape in scene.shapes}) == 2 and (relation := lies(*scene.shapes))]


# --- verdicts of what is known -------------------------------------------------------------------------------------


def test_true_prompts_are_borne_out_and_others_are_not(trained: Path) -> None:
    drawn = scenes(60)
    prompts = [Prompt(counted(scene)) for scene in drawn]
    true = judge_images(opened(trained), pictures(drawn), prompts)
    assert mean(true, "soa") > 0.97 and mean(true, "count_error") < 0.1
    other = judge_images(opened(trained), pictures(drawn), [*prompts[1:], prompts[0]])
    assert mean(other, "soa") < 0.1 and mean(other, "count_error") > 0.8


def test_the_error_of_numbers_is_root_mean_square_over_classes(trained: Path) -> None:
    scene = placed()[0][0]
    first, second = (shape.full_name for shape in scene.shapes)
    values, = opened(trained).images(pictures([scene]), [Prompt(f"five {first}s and three {second}s")])
    assert values["count_error"] == pytest.approx(((4 ** 2 + 2 ** 2) / 2) ** 0.5)


def test_places_are_borne_out_by_boxes(trained: Path) -> None:
    known = placed()
    images = pictures([scene for scene, _ in known])
    for word, low, high in ((str, 0.95, 1.0), (OPPOSITE.get, 0.0, 0.0)):
        prompts = [Prompt(f"a {scene.shapes[0].full_name} {word(relation)} a {scene.shapes[1].full_name}")
                   for scene, relation in known]
        assert low <= mean(opened(trained).images(images, prompts), "positions") <= high


def test_a_place_is_not_borne_out_by_what_is_missing(trained: Path) -> None:
    scene, relation = placed()[0]
    first, second = (shape.full_name for shape in scene.shapes)
    missing = next(name for name in ("large pink ring", "small red bar") if name not in (first, second))
    texts = [f"a {first} {relation} a {second}", f"a {first} {relation} a {missing}",
             f"a {missing} {relation} a {second}", f"two {first}s {relation} a {second}"]
    found = opened(trained).images(pictures([scene]) * 4, [Prompt(text) for text in texts])
    assert [each["positions"] for each in found] == [1, 0, 0, 0]


def test_clip_prefers_true_places_more_often_than_false_ones(trained: Path) -> None:
    known = placed()
    images = pictures([scene for scene, _ in known])
    said = [(scene.shapes[0].full_name, relation, scene.shapes[1].full_name) for scene, relation in known]
    true, false = ([Prompt(f"a {first} {word} a {second}") for first, word, second in words]
                   for words in (said, [(first, OPPOSITE[word], second) for first, word, second in said]))
    right, wrong = (mean(opened(trained).images(images, each), "positions_clip") for each in (true, false))
    assert right > 0.25 and wrong < 0.1


def geneval(scene: Scene, **first: Any) -> Prompt:
    names = [shape.full_name for shape in scene.shapes]
    return Prompt("drawn", "mine", {"tag": "two_object", "include": [
        {"class": names[1], "count": 1}, {"class": names[0], "count": 1, **first}]})


def test_rows_of_geneval_are_judged_whole(trained: Path) -> None:
    known = placed()
    images, judge = pictures([scene for scene, _ in known]), opened(trained)
    there = judge.images(images, [geneval(scene) for scene, _ in known])
    right = judge.images(images, [geneval(scene, position=[relation, 0]) for scene, relation in known])
    wrong = judge.images(images, [geneval(scene, position=[OPPOSITE[relation], 0]) for scene, relation in known])
    assert mean(there, "geneval") > 0.95 and mean(right, "geneval") > 0.95 and mean(wrong, "geneval") == 0
    assert [each["geneval"] for each in there] == [each["geneval_two_object"] for each in there]
    assert all(each["geneval_counting"] is None for each in there)


def test_the_colour_of_a_thing_is_told_from_its_crop(trained: Path) -> None:
    shapes = [scene.shapes[-1] for scene in scenes(60)]  # the last covers the others
    crops = [image.crop(tuple(box(shape, SIDE)))  # type: ignore[arg-type]
             for image, shape in zip(pictures(scenes(60)), shapes, strict=True)]
    answers = ClipAnswers(ClipScorer(str(trained / "clip"), "cpu"))
    assert answers.colours(crops, [shape.kind for shape in shapes]) == [shape.colour for shape in shapes]
    assert answers.colours([], []) == []


def test_a_row_with_a_colour_is_right_where_clip_sees_it(trained: Path) -> None:
    drawn = scenes(40, 1)
    shapes = [scene.shapes[0] for scene in drawn]
    for colours, low, high in (([shape.colour for shape in shapes], 0.95, 1.0), (["brown"] * 40, 0.0, 0.0)):
        prompts = [Prompt("a thing", "mine", {"tag": "colors", "include": [
            {"class": shape.full_name, "count": 1, "color": colour}]})
            for shape, colour in zip(shapes, colours, strict=True)]
        found = opened(trained).images(pictures(drawn), prompts)
        assert low <= mean(found, "geneval_colors") <= high


def test_a_number_asks_for_surer_detections(trained: Path) -> None:
    drawn = scenes(1, 2)
    name = drawn[0].shapes[0].full_name
    judge = opened(trained, threshold=0.3, counting=1.0)
    values, = judge.images(pictures(drawn), [Prompt(f"one {name}")])
    assert values["soa"] == 1 and values["count_error"] == 1
    counting = {"include": [{"class": name, "count": 1}], "exclude": [{"class": name, "count": 2}]}
    values, = judge.images(pictures(drawn), [Prompt("one", "mine", counting)])
    assert values["geneval"] == 0


def test_what_a_prompt_does_not_ask_has_no_value(trained: Path) -> None:
    values, = judge_images(opened(trained), pictures(scenes(1)), [Prompt("a lemur in a tree")])
    assert values.keys() == METRICS.keys() and set(values.values()) == {None}


def test_results_do_not_depend_on_the_batch(trained: Path) -> None:
    drawn = scenes(12)
    images = [image.resize((SIDE * (1 + index % 2), SIDE)) for index, image in enumerate(pictures(drawn))]
    prompts = [Prompt(f"{counted(scene)} above a large red ring") for scene in drawn]
    judge = opened(trained)
    alone = [judge.images([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    assert judge.images(images, prompts) == alone and judge.images([], []) == []


# --- how it is reported --------------------------------------------------------------------------------------------


def test_it_says_what_it_is_and_what_it_leaves_out(trained: Path) -> None:
    table = Detector(model=str(trained / "detr"), clip=ClipScore(model="none"))
    judge = open_named("detector", Evaluate(detector=table), "cpu")
    assert isinstance(judge, DetectorJudge) and judge.name.startswith("object detector detr@")
    assert "score over 0.3, where numbers are asked for over 0.9" in judge.name and judge.name.endswith("no CLIP")
    assert judge.remarks() == []
    scene, = scenes(1, 1)
    name, coloured = scene.shapes[0].full_name, {"count": 1, "color": "red"}
    judge.images(pictures([scene]) * 4, [
        Prompt(f"a {name}"), Prompt("a lemur"), Prompt("a cat", "mine", {"include": [{"class": "cat", "count": 1}]}),
        Prompt("red", "mine", {"include": [{"class": name} | coloured]})])
    said = "\n".join(judge.remarks())
    assert "of 4 pictures just judged, 2 are left out of soa: for detr@" in said and "without a label: cat" in said
    assert "1 are left out of geneval: for detr@" in said and "which only CLIP can tell" in said


def test_without_clip_its_metrics_are_left_out(trained: Path) -> None:
    judge = opened(trained, clip=False)
    assert set(METRICS) - set(judge.metrics) == {"positions_clip", "geneval_colors", "geneval_color_attr"}
    assert metrics_of(judge)["count_error"].lower_is_better and not metrics_of(judge)["count_error"].is_share
    scene, = scenes(1, 1)
    values, = judge_images(judge, pictures([scene]), [Prompt(f"a {scene.shapes[0].full_name} left of a wall")])
    assert values["soa"] == 1


def test_a_malformed_row_names_its_prompt(trained: Path) -> None:
    with pytest.raises(UserError, match=r"^evaluate\.detector: the prompt 'a dog': include\.0\.count: Input should"):
        opened(trained).images(pictures(scenes(1)), [Prompt("a dog", "mine", {"include": [
            {"class": "dog", "count": "1"}]})])


# --- what it opens -------------------------------------------------------------------------------------------------


def detr(folder: Path, labels: dict[int, str]) -> Path:
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                "layer_type": "basic", "out_features": ["stage2"]}
    config = DetrConfig(backbone_config=backbone, d_model=16, num_queries=6, encoder_layers=1, decoder_layers=1,
                        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                        id2label=labels)
    processor = DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})  # it pads to the largest of a batch
    return _saved(folder, DetrForObjectDetection(config), processor)


def yolos(folder: Path, labels: dict[int, str]) -> Path:
    config = YolosConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                         image_size=[32, 32], patch_size=8, num_detection_tokens=6, id2label=labels)
    return _saved(folder, YolosForObjectDetection(config), YolosImageProcessor(size={"height": 32, "width": 32}))


def rt_detr(folder: Path, labels: dict[int, str]) -> Path:
    backbone = {"model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16],
                "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}
    config = RTDetrConfig(backbone_config=backbone, encoder_in_channels=[8, 16, 16], encoder_hidden_dim=16,
                          encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16, num_queries=6, decoder_layers=2,
                          decoder_ffn_dim=16, decoder_attention_heads=2, decoder_in_channels=[16, 16, 16],
                          num_denoising=0, id2label=labels)
    return _saved(folder, RTDetrForObjectDetection(config), RTDetrImageProcessor(size={"height": 64, "width": 64}))


def _saved(folder: Path, model: Any, processor: Any) -> Path:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [detr, yolos, rt_detr])
def test_detectors_of_any_architecture_are_opened(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = make(tmp_path / "detector", {0: "N/A", 1: "cat", 2: "dog", 3: "bird"})
    detector = ObjectDetector(Detector(model=str(folder)), "cpu", 0.0)
    images = [render(scene, 64).resize((64 + 16 * (index % 2), 64)) for index, scene in enumerate(scenes(18))]
    found = detector.look(images)
    assert detector.labels == ["cat", "dog", "bird"] and any(found)
    for image, seen in ((image, each) for image, several in zip(images, found, strict=True) for each in several):
        left, top, right, bottom = seen.box
        assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
        assert seen.label in detector.labels
    assert all(first.score >= second.score for several in found for first, second in pairwise(several))
    for image, several in zip(images[:2], found, strict=False):
        alone, = detector.look([image])
        assert [each.label for each in alone] == [each.label for each in several]
        assert [each.score for each in alone] == pytest.approx([each.score for each in several], abs=1e-5)


def test_photos_are_judged(shared_data: Path, tmp_path: Path) -> None:
    folder = yolos(tmp_path / "detector", {0: "person", 1: "cat", 2: "dog", 3: "bird"})
    table = Detector(model=str(folder), threshold=0.0, counting_threshold=0.0, clip=ClipScore(model="none"))
    judge = DetectorJudge.open(table, "cpu")
    samples = read_shard(str(shared_data / "photos" / "coco-open-00000.tar"), [])
    photos = [next(samples).image() for _ in range(8)]
    found = judge_images(judge, photos, [Prompt("a person and two cats left of a dog")] * len(photos))
    assert {each["soa"] for each in found} <= {0, 1 / 3, 2 / 3, 1} and any(each["soa"] for each in found)
    assert all(each["count_error"] in (0, 1, 2, 3, 4) and each["positions"] in (0, 1) for each in found)


def no_detector(folder: Path) -> Path:
    model = CLIPVisionModel(CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                             num_attention_heads=1, image_size=16, patch_size=8))
    model.save_pretrained(folder)
    return folder


def no_weights(folder: Path) -> Path:
    folder.mkdir()
    DetrConfig(use_timm_backbone=False, backbone_config={"model_type": "resnet"}).save_pretrained(folder)
    return folder


def no_processor(folder: Path) -> Path:
    (yolos(folder, {0: "cat"}) / "preprocessor_config.json").unlink()
    return folder


def own_code(folder: Path) -> Path:
    """A checkpoint that asks for its own code to be run, which would leave a trace."""
    config = yolos(folder, {0: "cat"}) / "config.json"
    content = json.loads(config.read_text()) | {"model_type": "mine", "auto_map": {
        "AutoConfig": "mine.Config", "AutoModelForObjectDetection": "mine.Model"}}
    config.write_text(json.dumps(content))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    return folder


def half_the_weights(folder: Path) -> Path:
    from safetensors.torch import load_file, save_file
    weights = yolos(folder, {0: "cat"}) / "model.safetensors"
    save_file(dict(list(load_file(weights).items())[::2]), weights, {"format": "pt"})
    return folder


@pytest.mark.parametrize(("make", "says"), [
    (no_detector, "holds a model of type 'clip_vision_model', which is no object detector of transformers: name one"),
    (no_weights, "cannot load"),
    (no_processor, "cannot load"),
    (half_the_weights, "lacks"),
    (own_code, "cannot load"),
    (lambda folder: yolos(folder, {0: "LABEL_0", 1: "LABEL_1"}), "has no names for what it finds"),
    (lambda folder: folder, "no folder at"),
])
def test_what_is_no_detector_is_one_line(make: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        DetectorJudge.open(Detector(model=str(make(tmp_path / "model"))), "cpu")
    assert str(caught.value).startswith("evaluate.detector.model: ") and says in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "model" / "ran").exists()


def test_a_hub_id_offline_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^evaluate\.detector\.model: no folder facebook/detr-resnet-50, and the hub"):
        DetectorJudge.open(Detector(), "cpu")


def test_a_clip_that_is_none_is_one_line(trained: Path, tmp_path: Path) -> None:
    table = Detector(model=str(trained / "detr"), clip=ClipScore(model=str(tmp_path)))
    with pytest.raises(UserError, match=r"^evaluate\.detector\.clip\.model: cannot load .*no open_clip_model"):
        DetectorJudge.open(table, "cpu")


def test_long_prompts_are_asked_about_by_sentence(trained: Path) -> None:
    image = pictures(scenes(1))[0]
    answers = ClipAnswers(ClipScorer(str(trained / "clip"), "cpu"))
    short = "A ring is above a bar"
    long = "There are many words in here. " * 20 + short + ". " + "And so it goes on. " * 20
    first, second, third = answers.preferences([image] * 3, [short, long, "word " * 100 + "above " + "word " * 100])
    assert first == pytest.approx(second) and third is None
    alone, = answers.preferences([image], [short])
    assert alone == pytest.approx(first, abs=1e-6)


def test_a_faulty_row_is_said_before_hours_of_work() -> None:
    faulty = Prompt("two dogs", about={"tag": "counting", "include": [{"class": "dog", "count": "two"}]})
    with pytest.raises(UserError, match=r"evaluate.detector: the prompt 'two dogs'.*include"):
        check_prompts(Evaluate(detector=Detector()), [Prompt("a dog"), faulty])
    check_prompts(Evaluate(), [faulty])
