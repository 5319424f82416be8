"""Pixels to train on: sizes, crops, mirrored images; and what decoding less of a large JPEG costs."""

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from recap.sample import decode_image
from recap.shards import read_shard
from train_t2i.config import Buckets, Train
from train_t2i.images import CENTER, draft_side, nearest, size_ids, sizes, to_pixels, to_unit, unit_of

SHARES = st.floats(0, 1)
ASPECTS = st.floats(1, 4)


def ramp(width: int, height: int) -> Image.Image:
    """Red is how far to the right a pixel is, green how far down."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def photos(folder: Path, count: int = 40) -> list[Image.Image]:
    found = [Image.open(io.BytesIO(sample.image_bytes)) for name in ("subjects-00000", "coco-open-00000")
             for sample in itertools.islice(read_shard(str(folder / "photos" / f"{name}.tar"), []), count // 2)]
    return [image.convert("RGB") for image in found]


# --- sizes -----------------------------------------------------------------------------------------------------------


@given(st.integers(64, 1024), st.sampled_from([8, 32, 64]), ASPECTS)
def test_sizes_are_multiples_within_the_squares_area_and_the_proportions(resolution: int, step: int,
                                                                         max_aspect: float) -> None:
    found = sizes(resolution, Buckets(step=step, max_aspect=max_aspect))
    assert (resolution // step * step,) * 2 in found
    for height, width in found:
        assert height % step == width % step == 0
        assert height * width <= resolution ** 2
        assert max(height, width) <= max_aspect * min(height, width)
        assert (width, height) in found
    for long in range(resolution // step * step, 4 * resolution, step):  # with each, the largest that is allowed
        short = max((side for side in range(step, long + 1, step) if side * long <= resolution ** 2), default=0)
        assert ((long, short) in found) == (long <= max_aspect * short)
        assert short == long or not any((long, side) in found for side in range(step, short, step))


def test_the_sizes_of_512_are_the_known_ones() -> None:
    assert sizes(512, None) == [(512, 512)]
    assert sizes(512, Buckets(step=64, max_aspect=2)) == [
        (384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert sizes(32, Buckets(step=64)) == [(32, 32)]
    assert unit_of(Train(resolution=512, buckets=Buckets())) == 64 and unit_of(Train(resolution=520)) == 520


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_an_image_gets_the_size_of_the_nearest_proportions(width: int, height: int) -> None:
    among = tuple(sizes(512, Buckets(step=32, max_aspect=3)))
    chosen = nearest(width, height, among)

    def lost(size: tuple[int, int]) -> float:
        """Share of the image that is cropped."""
        return 1 - min(size[1] / size[0] / (width / height), width / height / (size[1] / size[0]))

    assert lost(chosen) <= min(map(lost, among)) + 1e-9
    assert nearest(height, width, among) == chosen[::-1]


def test_of_sizes_alike_the_larger_one_is_chosen() -> None:
    assert nearest(300, 300, ((256, 256), (512, 512), (256, 512))) == (512, 512)


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(128, 96), (96, 128), (64, 64), (40, 40), (300, 100)])
def test_the_middle_is_what_pillow_fits_to_a_level(width: int, height: int, shared_data: Path) -> None:
    for image in photos(shared_data, 8):
        image = image.resize((width, height))
        wanted = np.asarray(ImageOps.fit(image, (64, 64), Image.Resampling.BICUBIC)).astype(int)
        found = to_pixels(image, (64, 64)).permute(1, 2, 0).numpy()
        assert np.abs(found - wanted)[4:-4, 4:-4].max() <= 1
        assert np.abs(found - wanted).max() <= 40  # of what lies beyond the crop, Pillow's has a share at its edge


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 24), st.integers(1, 24), SHARES, SHARES)
def test_any_image_gives_any_size(width: int, height: int, out: int, wide: int, left: float, top: float) -> None:
    pixels = to_pixels(Image.new("RGB", (width, height), (255, 0, 128)), (out, wide), (left, top))
    assert pixels.shape == (3, out, wide) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert [pixels[channel].unique().tolist() for channel in range(3)] == [[255], [0], [128]]


@given(st.integers(64, 250), st.integers(64, 250), SHARES, SHARES)
def test_a_crop_lies_within_the_image_where_it_is_asked_for(width: int, height: int, left: float, top: float) -> None:
    side = min(width, height)
    pixels = to_pixels(ramp(width, height), (side, side), (left, top))
    columns, rows = pixels[0, 0].tolist(), pixels[1, :, 0].tolist()
    assert columns == list(range(round(left * (width - side)), round(left * (width - side)) + side))
    assert rows == list(range(round(top * (height - side)), round(top * (height - side)) + side))


def test_a_flipped_image_is_the_mirrored_one() -> None:
    whole = to_pixels(ramp(90, 60), (60, 60), (0.2, 0.7))
    assert torch.equal(to_pixels(ramp(90, 60), (60, 60), (0.2, 0.7), flipped=True), whole.flip(-1))


def test_pixels_become_minus_one_to_one() -> None:
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


# --- what Stable Diffusion XL is told --------------------------------------------------------------------------------


@given(st.integers(64, 250), st.integers(64, 250), SHARES, SHARES)
def test_size_ids_say_where_the_crop_is(width: int, height: int, left: float, top: float) -> None:
    side = min(width, height)
    ids = size_ids(width, height, (side, side), (left, top))
    pixels = to_pixels(ramp(width, height), (side, side), (left, top))
    assert ids == [height, width, pixels[1, 0, 0], pixels[0, 0, 0], side, side]


def test_size_ids_count_pixels_of_the_resized_image() -> None:
    assert size_ids(1000, 600, (300, 300), (1, 0.5)) == [600, 1000, 0, 200, 300, 300]
    assert size_ids(600, 1000, (512, 256)) == [1000, 600, 0, round((600 * 0.512 - 256) / 2), 512, 256]
    assert size_ids(100, 100, (300, 300), CENTER) == [100, 100, 0, 0, 300, 300]


# --- decoding less ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [2, 4, 6])
def test_what_is_left_out_of_a_large_jpeg_is_hardly_seen(ratio: int, shared_data: Path) -> None:
    size, errors, are_smaller = (96, 96), [], 0
    for image in photos(shared_data):
        buffer = io.BytesIO()
        scale = ratio * 96 / min(image.size)
        image.resize((math.ceil(image.width * scale), math.ceil(image.height * scale))).save(buffer, "JPEG", quality=90)
        drafted, whole = decode_image(buffer.getvalue(), draft_side(size)), decode_image(buffer.getvalue())
        assert min(drafted.size) >= draft_side(size)
        are_smaller += drafted.size != whole.size
        errors.append((to_pixels(drafted, size).int() - to_pixels(whole, size).int()).abs().float().mean().item())
    assert are_smaller == (0 if ratio == 2 else len(errors))
    assert np.mean(errors) <= (1 if are_smaller else 0) and max(errors) <= 6  # levels, of 255
