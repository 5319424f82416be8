"""Which images get captions: sizes, repetitions by bytes and by hash, and what tiny models of the real classes say."""

import io
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from eval.clip_score import ClipScorer
from recap.config.relabel import Aesthetic, Images, Nsfw, Watermark
from recap.errors import BadSample, UserError
from recap.image_filters import ImageScores, Seen, check_size, difference_hash, middle, read_head, unwanted_classes


def noise(seed: int, height: int = 60, width: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def smooth(seed: int) -> Image.Image:
    return noise(seed, 8, 9).resize((320, 240), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


# --- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "reason"), [
    ((64, 64), None), ((63, 900), "image_too_small"), ((900, 63), "image_too_small"), ((192, 64), None),
    ((193, 64), "extreme_aspect"), ((64, 193), "extreme_aspect"),
])
def test_small_and_long_images_are_dropped_with_their_reason(size: tuple[int, int], reason: str | None) -> None:
    image = Image.new("RGB", size)
    check_size(image, Images())
    if reason is None:
        check_size(image, Images(min_side=64, max_aspect=3))
        return
    with pytest.raises(BadSample) as error:
        check_size(image, Images(min_side=64, max_aspect=3))
    assert error.value.reason == reason and f"{size[0]}×{size[1]}" in error.value.detail


def test_of_an_image_that_is_too_long_the_middle_is_seen() -> None:
    image = noise(0, 2, 300)
    assert middle(image) == image.crop((100, 0, 200, 2))
    assert middle(image.rotate(90, expand=True)).size == (2, 100)
    assert middle(noise(0, 2, 100)).size == (100, 2)


# --- repetitions ---------------------------------------------------------------------------------------------------


def test_the_hash_says_where_it_gets_lighter_to_the_right() -> None:
    rising = Image.fromarray(np.tile(np.arange(0, 252, 28, dtype=np.uint8), (8, 1)))
    assert difference_hash(rising) == 2**64 - 1
    assert difference_hash(rising.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    assert difference_hash(Image.new("RGB", (100, 100), "white")) == 0
    one = np.zeros((8, 9), np.uint8)
    one[2, 5] = 255
    assert difference_hash(Image.fromarray(one)) == 1 << (63 - (2 * 8 + 4))


@given(st.binary(min_size=72, max_size=72))
def test_the_hash_is_that_of_its_definition(greys: bytes) -> None:
    rows = np.frombuffer(greys, np.uint8).reshape(8, 9).tolist()
    bits = "".join("1" if left < right else "0" for row in rows for left, right in pairwise(row))
    assert difference_hash(Image.frombytes("L", (9, 8), greys).convert("RGB")) == int(bits, 2)


def test_the_same_bytes_are_the_same_image() -> None:
    seen = Seen(Images())
    places = [seen.place(data, smooth(0)) for data in (b"a", b"b", b"a", b"c", b"b")]
    assert places == [(0, True), (1, True), (0, False), (2, True), (1, False)]


def test_copies_are_known_again_by_their_hash() -> None:
    seen = Seen(Images(duplicate_bits=4))
    for number in range(8):
        assert seen.place(jpeg(smooth(number), 95), smooth(number)) == (number, True)
    for number in range(8):
        copy = jpeg(smooth(number).resize((200, 150)), 40)
        assert seen.place(copy, Image.open(io.BytesIO(copy)).convert("RGB")) == (number, False)
        assert seen.place(copy, noise(99)) == (number, False)  # its bytes are known by now
    assert seen.place(b"new", smooth(8)) == (8, True)


def turned(bits: int) -> Image.Image:
    """An image whose hash differs in so many bits from that of the one without any turned."""
    greys = np.tile(np.array([20, 60, 100, 140, 180, 140, 100, 60, 20], np.uint8), (8, 1))
    for row in range(bits):
        greys[row, 8] = 200
    return Image.fromarray(greys)


def test_no_more_bits_may_differ_than_the_config_says_and_the_nearest_is_meant() -> None:
    assert (difference_hash(turned(3)) ^ difference_hash(turned(0))).bit_count() == 3
    for allowed in range(5):
        seen = Seen(Images(duplicate_bits=allowed))
        seen.place(b"first", turned(0))
        assert seen.place(b"second", turned(3)) == ((0, False) if allowed >= 3 else (1, True))
    seen = Seen(Images(duplicate_bits=2))
    assert [seen.place(bytes([bits]), turned(bits)) for bits in (0, 3, 2, 1, 6)] == [
        (0, True), (1, True), (1, False), (0, False), (2, True)]


def test_images_without_an_edge_are_not_taken_for_others() -> None:
    seen = Seen(Images(duplicate_bits=16))
    spot = Image.fromarray(np.pad(np.full((1, 1), 255, np.uint8), ((3, 4), (4, 4))))
    assert difference_hash(spot).bit_count() == 1
    for place, image in enumerate((Image.new("L", (9, 8), 255), spot, Image.new("L", (9, 8), 0))):
        assert seen.place(image.tobytes(), image) == (place, True)
    assert seen.place(spot.tobytes(), spot) == (1, False)


def test_a_hash_of_hardly_any_edge_or_of_nothing_else_is_not_compared() -> None:
    def card(text: str) -> Image.Image:
        image = Image.new("RGB", (500, 500), "white")
        ImageDraw.Draw(image).text((20, 20), text, "black")
        return image

    seen = Seen(Images(duplicate_bits=4))
    cards = [card(f"Sale number {number}: {number * 7} cups") for number in range(4)]
    rising = [Image.fromarray(np.tile(np.arange(0, 9 * step, step, dtype=np.uint8), (8, 1))) for step in (20, 28)]
    assert all(0 < difference_hash(image).bit_count() < 8 for image in cards)
    assert {difference_hash(image).bit_count() for image in rising} == {64}
    for place, image in enumerate(cards + rising):
        assert seen.place(image.tobytes(), image) == (place, True)
    assert seen.place(cards[2].tobytes(), cards[2]) == (2, False)


def test_where_repetitions_are_ignored_every_image_is_new() -> None:
    seen = Seen(Images(duplicates="ignore", duplicate_bits=4))
    assert [seen.place(b"a", smooth(0)) for _ in range(3)] == [(0, True), (1, True), (2, True)]


def test_a_large_shard_is_compared_whole() -> None:
    seen = Seen(Images(duplicate_bits=0))
    images = [noise(number, 8, 9) for number in range(2500)]
    assert [seen.place(str(number).encode(), image) for number, image in enumerate(images)] == [
        (number, True) for number in range(2500)]
    assert seen.place(b"2400 again", images[2400]) == (2400, False)


# --- classifiers ---------------------------------------------------------------------------------------------------


def save_vit(folder: Path, labels: list[str], problem_type: str | None = None, kind: Any = ViTForImageClassification,
             ) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
                       patch_size=8, initializer_range=0.5, problem_type=problem_type,
                       id2label=dict(enumerate(labels)), label2id={name: place for place, name in enumerate(labels)})
    kind(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def probabilities(folder: Path, images: list[Image.Image], activation: Callable[[torch.Tensor], torch.Tensor],
                  ) -> list[list[float]]:
    """By transformers alone."""
    model = ViTForImageClassification.from_pretrained(folder).eval()
    inputs = ViTImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    with torch.no_grad():
        return activation(model(**inputs).logits).tolist()


def test_scores_are_the_probability_of_the_unwanted_class(tmp_path: Path) -> None:
    nsfw = save_vit(tmp_path / "nsfw", ["normal", "nsfw"])
    watermark = save_vit(tmp_path / "watermark", ["Watermark", "No Watermark"])
    images = [noise(number) for number in range(6)]
    expected = [row[1] for row in probabilities(nsfw, images, lambda logits: logits.softmax(1))]
    other = [row[0] for row in probabilities(watermark, images, lambda logits: logits.softmax(1))]
    threshold = sorted(expected)[3]
    config = Images(nsfw=Nsfw(model=str(nsfw), threshold=threshold),
                    watermark=Watermark(model=str(watermark), threshold=1))
    found = ImageScores(config, "cpu").look(images)
    assert [each.scores["nsfw"] for each in found] == pytest.approx(expected, abs=1e-5)
    assert [each.scores["watermark"] for each in found] == pytest.approx(other, abs=1e-5)
    for each in found:
        assert each.reason == ("nsfw" if each.scores["nsfw"] >= threshold else None)
    assert {each.reason for each in found} == {"nsfw", None}


def test_of_several_unwanted_classes_the_probabilities_are_added(tmp_path: Path) -> None:
    labels = ["drawings", "hentai", "neutral", "porn", "sexy"]
    images = [noise(number) for number in range(4)]
    for problem_type, activation in ((None, lambda logits: logits.softmax(1)),
                                     ("multi_label_classification", torch.sigmoid)):
        folder = save_vit(tmp_path, labels, problem_type)
        expected = [min(1, row[1] + row[3] + row[4]) for row in probabilities(folder, images, activation)]
        found = ImageScores(Images(nsfw=Nsfw(model=str(folder), label=["Hentai", "porn", "sexy"])), "cpu").look(images)
        assert [each.scores["nsfw"] for each in found] == pytest.approx(expected, abs=1e-5)


def test_the_first_reason_that_holds_is_given(tmp_path: Path) -> None:
    model = str(save_vit(tmp_path, ["nsfw", "watermarked"]))
    both = Images(nsfw=Nsfw(model=model, threshold=0), watermark=Watermark(model=model, threshold=0))
    long = noise(1, 1, 300)
    assert ImageScores(both, "cpu").look([noise(0), long])[1].reason == "nsfw"
    assert ImageScores(both, "cpu").look([long]) == ImageScores(both, "cpu").look([middle(long)])
    only = both.model_copy(update={"nsfw": Nsfw(model=model, threshold=1)})
    assert ImageScores(only, "cpu").look([noise(0)])[0].reason == "watermark"
    assert ImageScores(only, "cpu").look([]) == []


@pytest.mark.parametrize(("labels", "problem_type"), [
    (["nsfw"], None), (["art", "nsfw", "text"], "multi_label_classification")])
def test_classes_that_do_not_exclude_each_other_are_scored_alone(tmp_path: Path, labels: list[str],
                                                                 problem_type: str | None) -> None:
    folder = save_vit(tmp_path, labels, problem_type)
    place = labels.index("nsfw")
    expected = [row[place] for row in probabilities(folder, [noise(0), noise(1)], torch.sigmoid)]
    found = ImageScores(Images(nsfw=Nsfw(model=str(folder))), "cpu").look([noise(0), noise(1)])
    assert [each.scores["nsfw"] for each in found] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("name", "labels", "label", "place"), [
    ("nsfw", ["normal", "nsfw"], None, 1), ("nsfw", ["NSFW", "SFW"], None, 0), ("nsfw", ["safe", "unsafe"], None, 1),
    ("nsfw", ["drawings", "neutral", "porn"], None, 2), ("nsfw", ["drawings", "hentai", "porn"], "hentai", 1),
    ("nsfw", ["not_nsfw", "nsfw"], None, 1), ("nsfw", ["LABEL_0", "LABEL_1"], "label_1", 1),
    ("watermark", ["No Watermark", "Watermark"], None, 1), ("watermark", ["clean", "watermarked"], None, 1),
    ("watermark", ["no", "yes"], None, 1), ("watermark", ["non-watermark", "watermark"], None, 1),
    ("nsfw", ["LABEL_0", "LABEL_1"], None, "it can't be told which class is nsfw: name one of 'LABEL_0', 'LABEL_1'"),
    ("nsfw", ["porn", "nude", "normal"], None, "several classes may be nsfw: name one of 'porn', 'nude', 'normal', or"),
    ("nsfw", ["drawings", "hentai", "neutral", "porn", "sexy"], None, "several classes may be nsfw"),
    ("nsfw", ["drawings", "hentai", "porn"], ["porn", "rude"], "there is no class 'rude'"),
    ("nsfw", ["neutral", "low", "high"], [], "it can't be told which class is nsfw"),
    ("watermark", ["No Watermark", "not watermarked"], None, "it can't be told which class is watermark"),
    ("nsfw", ["normal", "nsfw"], "porn", "there is no class 'porn': name one of 'normal', 'nsfw'"),
])
def test_the_unwanted_class_is_told_by_its_name(name: str, labels: list[str], label: str | list[str] | None,
                                                place: int | str) -> None:
    if isinstance(place, int):
        assert unwanted_classes(name, dict(enumerate(labels)), label) == [place]
        return
    with pytest.raises(UserError, match=f"relabel.images.{name}.label: {place}"):
        unwanted_classes(name, dict(enumerate(labels)), label)


def test_classifiers_that_are_not_whole_or_not_safe_are_refused(tmp_path: Path) -> None:
    headless = save_vit(tmp_path / "headless", ["normal", "nsfw"], kind=ViTModel)
    pickled = save_vit(tmp_path / "pickled", ["normal", "nsfw"])
    (pickled / "model.safetensors").unlink()
    torch.save(ViTForImageClassification.from_pretrained(tmp_path / "headless").state_dict(),
               pickled / "pytorch_model.bin")
    for folder, what in ((headless, "lacks 2 weights"), (pickled, "cannot load"), (tmp_path / "none", "no folder at")):
        with pytest.raises(UserError, match=f"relabel.images.nsfw.model: .*{what}") as error:
            ImageScores(Images(nsfw=Nsfw(model=str(folder))), "cpu")
        assert "\n" not in str(error.value)


# --- aesthetic score -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(world_models: Path) -> tuple[str, int]:
    """The folder, and how long its vectors are."""
    folder = str(world_models / "clip")
    return folder, ClipScorer(folder, "cpu").embed_images([noise(0)]).shape[1]


def laions_network(size: int) -> nn.Sequential:
    """Version 2, as it is published: `layers.0` to `layers.7`."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(size, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
                         nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)).eval()


def prefixed(model: nn.Module, prefix: str = "layers.") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("version", [1, 2])
def test_both_of_laions_heads_score_as_they_do_there(clip: tuple[str, int], version: int, suffix: str,
                                                    tmp_path: Path) -> None:
    folder, size = clip
    head = nn.Linear(size, 1) if version == 1 else laions_network(size)
    tensors, file = head.state_dict() if version == 1 else prefixed(head), tmp_path / f"head.{suffix}"
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    images = [noise(number) for number in range(4)]
    vectors = torch.tensor(ClipScorer(folder, "cpu").embed_images(images), dtype=torch.float32)
    expected = head(vectors)[:, 0].tolist()
    threshold = (min(expected) + max(expected)) / 2
    config = Images(aesthetic=Aesthetic(model=folder, head=str(file), threshold=threshold))
    found = ImageScores(config, "cpu").look(images)
    assert [each.scores["aesthetic"] for each in found] == pytest.approx(expected, abs=1e-4)
    assert [each.reason for each in found] == [
        "low_aesthetic_score" if score < threshold else None for score in expected]
    assert {each.reason for each in found} == {"low_aesthetic_score", None}


def test_heads_with_something_between_their_layers_or_that_do_not_fit_are_refused(clip: tuple[str, int],
                                                                                 tmp_path: Path) -> None:
    folder, size = clip
    with_relu = nn.Sequential(nn.Linear(size, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 1))
    broken = prefixed(laions_network(size)) | {"layers.4.weight": torch.zeros(64, 5)}
    for tensors, what in ((prefixed(with_relu), "other layers"), (broken, "don't fit each other"), ({}, "other layers"),
                          (nn.Linear(size, 2).state_dict(), "don't fit each other"),
                          (nn.Linear(size + 1, 1).state_dict(), "take the CLIP that the head was trained on")):
        torch.save(tensors, tmp_path / "head.pth")
        with pytest.raises(UserError, match=f"relabel.images.aesthetic.head: .*{what}"):
            ImageScores(Images(aesthetic=Aesthetic(model=folder, head=str(tmp_path / "head.pth"), threshold=5)), "cpu")
    torch.save(nn.Linear(size, 1).state_dict(), tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"relabel\.images\.aesthetic\.model: "):
        ImageScores(Images(aesthetic=Aesthetic(model="./none", head=str(tmp_path / "head.pth"), threshold=5)), "cpu")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("content", [
    b"", b"no weights", pickle.dumps(Bomb(), 2), pickle.dumps({"weight": 1}, 2), pickle.dumps([1], 2), None])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_that_is_no_head_is_refused_and_runs_nothing(content: bytes | None, suffix: str, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(f"head.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=r"relabel\.images\.aesthetic\.head: cannot read weights from head\.") as error:
        read_head(f"head.{suffix}")
    assert "\n" not in str(error.value) and not Path("exploded").exists()
    torch.save({"weight": torch.zeros(1, 3), "bias": Bomb()}, "bomb.pth")
    with pytest.raises(UserError, match="cannot read weights"):
        read_head("bomb.pth")
    assert not Path("exploded").exists()
