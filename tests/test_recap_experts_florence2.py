"""Florence-2: each task's answer in the right place, boxes in pixels of the upright original, the same in a batch."""

import functools
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AddedToken,
    BartConfig,
    BartTokenizer,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Florence2VisionConfig,
)

from recap.config.stitch import Florence2, FlorenceTask, Stitch
from recap.errors import UserError
from recap.experts import View
from recap.experts.florence2 import Florence2Expert, read
from recap.facts import Facts, Object, Sentence
from recap.sample import decode_image
from recap.shards import read_shard
from recap.world.scene import draw_scene, render

SIDE = 64
NUM_IMAGE_TOKENS = (SIDE // 8) ** 2 + 1
POSITIONS = 160
TASKS: tuple[FlorenceTask, ...] = ("<OD>", "<DENSE_REGION_CAPTION>", "<CAPTION>", "<OCR>", "<OCR_WITH_REGION>")
KINDS = ["pure_text", "ocr", "phrase_grounding", "description_with_bboxes", "description_with_polygons", "polygons",
         "bboxes", "description_with_bboxes_or_polygons"]


def tokenizer() -> Any:
    """BART's, of bytes alone, with what Florence-2 adds."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "<mask>"]
    made = BartTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[],
                         extra_special_tokens={"image_token": "<image>"})
    places = [AddedToken(f"<loc_{place}>", special=True, normalized=False) for place in range(1000)]
    made.add_tokens(places, special_tokens=True)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the whole architecture, with random weights."""
    folder, words = tmp_path_factory.mktemp("florence2"), tokenizer()
    torch.manual_seed(0)
    vision = Florence2VisionConfig(
        depths=[1, 1], patch_size=[7, 3], patch_stride=[4, 2], patch_padding=[3, 1], patch_prenorm=[False, True],
        embed_dim=[16, 32], num_heads=[2, 4], num_groups=[2, 4], window_size=4, projection_dim=32)
    text = BartConfig(vocab_size=len(words), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
                      max_position_embeddings=POSITIONS, init_std=0.3)
    model = Florence2ForConditionalGeneration(Florence2Config(
        text_config=text, vision_config=vision, image_token_id=words.image_token_id))
    model.generation_config.update(forced_bos_token_id=0, no_repeat_ngram_size=3, decoder_start_token_id=2)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    images.image_seq_length = NUM_IMAGE_TOKENS
    Florence2Processor(images, words, post_processor_config={kind: {} for kind in KINDS}).save_pretrained(folder)
    return folder


@functools.cache
def opened(folder: Path, tasks: tuple[FlorenceTask, ...] = TASKS, max_new_tokens: int = 24) -> Florence2Expert:
    table = Florence2(model=str(folder), tasks=list(tasks), max_new_tokens=max_new_tokens, num_beams=2, dtype="float32")
    return Florence2Expert(Stitch(florence2=table), "cpu")


def look(expert: Florence2Expert, *images: Image.Image) -> list[Facts]:
    return expert.look(expert.preprocess([View(image) for image in images]))


def scene(index: int, width: int, height: int) -> Image.Image:
    return render(draw_scene(Random(index)), 64).resize((width, height))


# --- what is read of an answer -------------------------------------------------------------------------------------

ANSWER = ("</s><s>dog<loc_10><loc_20><loc_500><loc_600>red car<loc_0><loc_0><loc_999><loc_999>"
          "<loc_100><loc_100><loc_200><loc_300></s><pad><pad>")


@pytest.mark.parametrize("task", ["<OD>", "<DENSE_REGION_CAPTION>"])
def test_places_become_boxes_in_pixels_of_the_image(task: str) -> None:
    assert read(task, ANSWER, (300, 120)).objects == [
        Object("dog", 1.0, (3.15, 2.46, 150.15, 72.06)),  # (place + 0.5) / 1000 of width and height
        Object("red car", 1.0, (0.15, 0.06, 299.85, 119.94)),
        Object("red car", 1.0, (30.15, 12.06, 60.15, 36.06))]


def test_boxes_are_those_of_transformers_which_cuts_them_to_whole_pixels(folder: Path) -> None:
    theirs = opened(folder).processor.post_process_generation(ANSWER, task="<OD>", image_size=(300, 120))["<OD>"]
    ours = read("<OD>", ANSWER, (300, 120)).objects
    assert theirs == {"labels": [seen.label for seen in ours], "bboxes": [[int(x) for x in seen.box] for seen in ours]}


def test_boxes_of_small_images_are_finer_than_pixels() -> None:
    assert read("<OD>", "<s>café<loc_10><loc_20><loc_500><loc_600></s>", (1, 4)).objects == [
        Object("café", 1.0, (0.01, 0.08, 0.5, 2.4))]


@pytest.mark.parametrize("answer", [
    "", "</s>", "<s></s><pad>", "dog", "<loc_1><loc_2><loc_3><loc_4>", "dog<loc_1><loc_2><loc_3>",
    "dog<loc_5><loc_2><loc_5><loc_9>", "dog<loc_9><loc_2><loc_5><loc_9>", "dog<loc_1><loc_9><loc_5><loc_2>",
    " \u0007 <loc_1><loc_2><loc_3><loc_4>", "<loc_7>dog<loc_1><loc_2>cat<loc_3><loc_4>", "<<><loc_", "\n<loc_9999>",
    "<loc_7><loc_1><loc_2><loc_3><loc_4>"])
def test_what_is_not_a_box_with_a_name_is_left_out(answer: str) -> None:
    assert read("<OD>", answer, (300, 120)) == Facts()


TOKENS = ["dog", "é", "<", ">", "\n", "<s>", "</s>", "<pad>", "<loc_0>", "<loc_5>", "<loc_999>"]


@given(st.lists(st.sampled_from(TOKENS), max_size=30), st.integers(1, 60), st.integers(1, 60))
def test_no_answer_is_too_odd_to_be_read(tokens: list[str], width: int, height: int) -> None:
    for task in TASKS:
        found = read(task, "".join(tokens), (width, height))
        assert all(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
                   for x0, y0, x1, y1 in (seen.box for seen in found.objects))
        assert all("<loc" not in seen.label for seen in found.objects)


def test_a_box_that_is_named_twice_is_one() -> None:
    box = "dog<loc_10><loc_20><loc_500><loc_600>"
    assert len(read("<OD>", f"<s>{box}{box}</s>", (300, 120)).objects) == 1


@pytest.mark.parametrize("task", ["<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>"])
def test_captions_are_sentences_of_one_line(task: str) -> None:
    assert read(task, "A dog\u0007 on\n a beach. ", (300, 120)) == Facts(
        sentences=[Sentence("A dog on a beach.", "florence2")])
    assert read(task, " \n", (300, 120)) == Facts()


def test_writing_is_read_line_by_line() -> None:
    places = "".join(f"<loc_{place}>" for place in range(8))
    assert read("<OCR_WITH_REGION>", f"</s><s>CUDA{places}FOR\tENGINEERS > 1{places}</s><pad>", (300, 120)) == Facts(
        text=["CUDA", "FOR ENGINEERS > 1"])
    assert read("<OCR_WITH_REGION>", f"</s>{places}", (300, 120)) == Facts()
    assert read("<OCR>", "\nCUDA\n \nFOR ENGINEERS\n", (300, 120)) == Facts(text=["CUDA", "FOR ENGINEERS"])


# --- looking -------------------------------------------------------------------------------------------------------


def answers(expert: Florence2Expert, task: FlorenceTask, *images: Image.Image) -> list[str]:
    pixels = expert.preprocess([View(image) for image in images]).pixels
    return expert._answers(task, expert.model.get_image_features(pixels).pooler_output)


@torch.no_grad()
def test_answers_are_those_of_the_stock_pipeline(folder: Path) -> None:
    image, expert = scene(0, 300, 120), opened(folder)
    model = Florence2ForConditionalGeneration.from_pretrained(folder).eval()
    stock: Any = Florence2Processor.from_pretrained(folder)
    for task in TASKS:
        ids = model.generate(**stock(text=task, images=image, return_tensors="pt"), max_new_tokens=24, num_beams=2,
                             do_sample=False)
        theirs, = stock.batch_decode(ids, skip_special_tokens=task not in ("<OD>", "<DENSE_REGION_CAPTION>",
                                                                           "<OCR_WITH_REGION>"))
        assert answers(expert, task, image) == [theirs]
    assert "<loc_" in answers(expert, "<OD>", image)[0]
    assert "<" not in answers(expert, "<CAPTION>", image)[0]


@torch.no_grad()
def test_answers_depend_on_the_image_and_the_task(folder: Path) -> None:
    expert, images = opened(folder), [scene(index, 64, 64) for index in range(8)]
    said = [answers(expert, task, *images) for task in ("<OD>", "<DENSE_REGION_CAPTION>")]
    assert len({*said[0]}) > 1
    assert said[0] != said[1]


def test_a_batch_gives_what_single_images_give(folder: Path) -> None:
    expert = opened(folder)
    images = [scene(2, 64, 64), scene(3, 200, 90), scene(4, 50, 180), scene(5, 64, 64)]
    assert look(expert, *images) == [facts for image in images for facts in look(expert, image)]


def test_each_image_gets_its_own_answers_in_its_own_pixels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expert = opened(folder)
    said = {"<OD>": ["dog<loc_0><loc_0><loc_499><loc_499>", "cat<loc_0><loc_0><loc_499><loc_499>"],
            "<DENSE_REGION_CAPTION>": ["a dog<loc_0><loc_0><loc_9><loc_9>", ""], "<CAPTION>": ["One.", "Two."],
            "<OCR>": ["1\n2", "3"], "<OCR_WITH_REGION>": ["2" + "<loc_0>" * 8, "4" + "<loc_0>" * 8]}
    monkeypatch.setattr(expert, "_answers", lambda task, features: said[task])
    one, two = look(expert, scene(0, 1000, 500), scene(0, 100, 200))
    assert one == Facts([Object("dog", 1.0, (0.5, 0.25, 499.5, 249.75)), Object("a dog", 1.0, (0.5, 0.25, 9.5, 4.75))],
                        sentences=[Sentence("One.", "florence2")], text=["1", "2"])
    assert two == Facts([Object("cat", 1.0, (0.05, 0.1, 49.95, 99.9))], sentences=[Sentence("Two.", "florence2")],
                        text=["3", "4"])


def test_a_rotated_photo_is_seen_upright(folder: Path) -> None:
    expert, upright = opened(folder), scene(1, 96, 48)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # "turn me a quarter clockwise"
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    assert look(expert, decode_image(turned.getvalue())) == look(expert, upright)


def test_odd_sizes_are_looked_at(folder: Path) -> None:
    images = [Image.new("RGB", size, "red") for size in ((1, 1), (1, 50), (500, 10), (5000, 100), (100, 5000))]
    for image, facts in zip(images, look(opened(folder), *images), strict=True):
        assert all(0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height
                   for x0, y0, x1, y1 in (seen.box for seen in facts.objects))


def test_real_photos_are_looked_at(folder: Path, shared_data: Path) -> None:
    samples = read_shard(str(shared_data / "photos" / "coco-open-00000.tar"), [])
    found = look(opened(folder), *(next(samples).image() for _ in range(4)))
    assert [len(facts.sentences) for facts in found] == [1] * 4


def test_images_are_looked_at_in_bfloat16(folder: Path) -> None:
    table = Florence2(model=str(folder), tasks=["<OD>", "<CAPTION>"], max_new_tokens=8)
    expert = Florence2Expert(Stitch(florence2=table), "cpu")
    assert expert.model.dtype == torch.bfloat16
    assert len(look(expert, scene(0, 64, 64))) == 1


# --- opening -------------------------------------------------------------------------------------------------------


def test_more_tokens_than_the_model_has_positions_for_are_refused(folder: Path) -> None:
    assert look(opened(folder, ("<OD>",), POSITIONS), scene(0, 64, 64))
    with pytest.raises(UserError, match=r"stitch\.florence2\.max_new_tokens: 161, but .* positions for 160"):
        opened(folder, ("<OD>",), POSITIONS + 1)


def test_a_checkpoint_that_is_not_there_or_of_another_kind_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^stitch\.florence2\.model: no folder"):
        opened(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    with pytest.raises(UserError, match=r"^stitch\.florence2\.model: .* holds a model of type 'bart'"):
        opened(tmp_path)


def test_a_checkpoint_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    """As Microsoft's are: of the same model type, with other names within."""
    own = {"model_type": "florence2", "auto_map": {"AutoConfig": "configuration_florence2.Florence2Config"},
           "vision_config": {"model_type": "davit", "dim_embed": [256, 512, 1024, 2048], "patch_size": [7, 3, 3, 3]},
           "text_config": {"model_type": "florence2_language", "d_model": 1024}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=r"^stitch\.florence2\.model: .* brings code of its own, which is never run"):
        opened(tmp_path)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    model = Florence2ForConditionalGeneration.from_pretrained(folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^stitch\.florence2\.model: cannot load"):
        opened(tmp_path)


def test_provenance_names_the_files_and_what_was_asked(folder: Path) -> None:
    made = json.loads(json.dumps(opened(folder).provenance))
    assert made["revision"].startswith("sha256:")
    assert (made["tasks"], made["num_beams"], made["max_new_tokens"]) == ([*TASKS], 2, 24)
