"""BLIP-2 as an expert: a sentence of each upright image, the same in a batch as alone."""

import io
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration

from recap.captioners.text import Caption
from recap.config.stitch import Blip2, Stitch
from recap.errors import UserError
from recap.experts import View, open_expert
from recap.experts.blip2 import Blip2Expert
from recap.facts import Facts, Sentence
from recap.sample import decode_image
from recap.shards import read_shard
from recap.world.base import unpack
from recap.world.scene import draw_scene, render


def opened(folder: Path, **options: Any) -> Blip2Expert:
    table = Blip2(model=str(folder), **{"dtype": "float32", "num_beams": 2, **options})
    return Blip2Expert(Stitch(blip2=table), "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's base captioner, which says something of drawings."""
    folder = tmp_path_factory.mktemp("models") / "blip2"
    unpack("blip2", folder)
    return folder


@pytest.fixture(scope="module")
def expert(folder: Path) -> Blip2Expert:
    return opened(folder)


def look(expert: Blip2Expert, *images: Image.Image) -> list[Facts]:
    return expert.look(expert.preprocess([View(image) for image in images]))


def scene(index: int, width: int = 64, height: int = 64) -> Image.Image:
    return render(draw_scene(Random(index)), 64).resize((width, height))


def test_each_image_gets_a_sentence_that_names_what_is_there(expert: Blip2Expert) -> None:
    scenes = [draw_scene(Random(index)) for index in range(6)]
    for facts, drawn in zip(look(expert, *(render(each, 64) for each in scenes)), scenes, strict=True):
        sentence, = facts.sentences
        assert facts == Facts(sentences=[Sentence(sentence.text, "blip2", reliable=True)])
        assert any(word in sentence.text for shape in drawn.shapes for word in (shape.kind, shape.colour))


def test_a_batch_gives_what_single_images_give(expert: Blip2Expert) -> None:
    images = [scene(0), scene(1, 200, 90), scene(2, 50, 180), scene(3)]
    together = look(expert, *images)
    assert together == [facts for image in images for facts in look(expert, image)]
    assert len({facts.sentences[0] for facts in together}) > 1


def test_a_rotated_photo_is_seen_upright(expert: Blip2Expert) -> None:
    upright = scene(1, 96, 48)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # "turn me a quarter clockwise"
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    assert look(expert, decode_image(turned.getvalue())) == look(expert, upright)


def test_a_prompt_is_gone_on_from_and_is_not_part_of_the_sentence(folder: Path, expert: Blip2Expert) -> None:
    plain, = look(expert, scene(4))[0].sentences
    prompted, = look(opened(folder, prompt="A detailed caption:"), scene(4))[0].sentences
    assert prompted != plain
    assert "caption" not in prompted.text


def test_a_caption_that_says_nothing_is_no_sentence(expert: Blip2Expert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert.captioner, "caption", lambda *_: [Caption("", False), Caption("a dog", True)])
    assert look(expert, scene(0), scene(1)) == [Facts(), Facts(sentences=[Sentence("a dog", "blip2")])]


def test_a_sentence_that_is_cut_says_so(folder: Path, expert: Blip2Expert) -> None:
    whole, = look(expert, scene(4))[0].sentences
    cut, = look(opened(folder, max_new_tokens=5), scene(4))[0].sentences
    assert not whole.text.endswith("…") and cut.text.endswith(" …")


def test_odd_sizes_are_looked_at(expert: Blip2Expert) -> None:
    sizes = [(1, 1), (1, 50), (500, 10), (5000, 100), (100, 5000)]
    assert len(look(expert, *(Image.new("RGB", size, "red") for size in sizes))) == 5


def test_real_photos_are_looked_at(expert: Blip2Expert, shared_data: Path) -> None:
    samples = read_shard(str(shared_data / "photos" / "coco-open-00000.tar"), [])
    assert all(facts.sentences for facts in look(expert, *(next(samples).image() for _ in range(4))))


def test_images_are_looked_at_in_bfloat16(folder: Path) -> None:
    assert look(opened(folder, dtype="bfloat16"), scene(0))[0].sentences


# --- opening -------------------------------------------------------------------------------------------------------


def test_more_tokens_than_the_model_has_positions_for_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"stitch\.blip2\.max_new_tokens: 5000 .* positions for \d+: lower it"):
        opened(folder, max_new_tokens=5000)


def test_a_checkpoint_that_is_not_there_or_of_another_kind_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^stitch\.blip2\.model: no folder"):
        open_expert("blip2", Stitch(blip2=Blip2(model=str(tmp_path / "nothing"))), "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(UserError, match=r"^stitch\.blip2\.model: .* holds a model of type 'blip'"):
        opened(tmp_path)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^stitch\.blip2\.model: cannot load"):
        opened(tmp_path)


def test_provenance_names_the_files_and_what_was_asked(expert: Blip2Expert) -> None:
    made = json.loads(json.dumps(expert.provenance))
    assert made["revision"].startswith("sha256:")
    assert (made["prompt"], made["max_new_tokens"], made["num_beams"], made["dtype"]) == ("", 48, 2, "float32")
