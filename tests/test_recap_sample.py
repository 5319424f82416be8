"""Samples: what is decoded, and what is rejected with which reason."""

import contextlib
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recap.errors import BadSample
from recap.sample import Sample, decode_image, decode_text, image_size


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason_of(data: bytes) -> str:
    with pytest.raises(BadSample) as caught:
        decode_image(data)
    return caught.value.reason


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(Image.new(mode, (5, 4)), kind)).mode == "RGB"


def test_transparency_is_shown_on_white() -> None:
    assert decode_image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_tones() -> None:
    grey = Image.new("I;16", (2, 2), 0x8000)
    assert decode_image(encoded(grey)).getpixel((0, 0)) == (128, 128, 128)


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90°
    assert decode_image(encoded(image, "JPEG", exif=exif)).size == (10, 30)


def test_a_decompression_bomb_is_rejected_before_it_is_decoded() -> None:
    assert reason_of(encoded(Image.new("1", (20_000, 20_000)))) == "oversized_image"


def test_only_web_image_formats_are_decoded() -> None:
    assert reason_of(encoded(Image.new("RGB", (4, 4)), "BMP")) == "undecodable_image"
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "undecodable_image"


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_rejected(data: bytes) -> None:
    for read in (decode_image, image_size):
        try:
            read(data)
        except BadSample as error:
            assert error.reason in ("undecodable_image", "oversized_image")


@given(st.integers(0, 400), st.integers(0, 255), st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(1, 40))
def test_a_damaged_image_decodes_or_is_rejected(place: int, value: int, kind: str, min_side: int) -> None:
    data = bytearray(encoded(Image.radial_gradient("L").resize((40, 32)).convert("RGB"), kind))
    data[place % len(data)] = value
    with contextlib.suppress(BadSample):
        image_size(bytes(data))
    with contextlib.suppress(BadSample):
        size = decode_image(bytes(data)).size
        assert size == image_size(bytes(data))
        assert min(decode_image(bytes(data), min_side).size) >= min(min_side, *size)


def test_real_malformed_images_never_raise_anything_else(shared_data: Path) -> None:
    decoded = 0
    for line in (shared_data / "nasty_images" / "manifest.jsonl").read_text().splitlines():
        data = (shared_data / "nasty_images" / json.loads(line)["file"]).read_bytes()
        with contextlib.suppress(BadSample):
            image_size(data)
        with contextlib.suppress(BadSample):
            decode_image(data, 16)
        try:
            image = decode_image(data)
        except BadSample:
            continue
        assert image.mode == "RGB"
        assert image.size == image_size(data)
        assert min(decode_image(data, 16).size) >= min(16, *image.size)
        decoded += 1
    assert decoded > 40  # the unusual ones are many, but most of JPEG, PNG and WebP open


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("orientation", range(10))
def test_the_size_of_an_image_is_that_of_its_upright_pixels(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.radial_gradient("L").resize((48, 32)).convert("RGB"), kind, exif=exif)
    for min_side in (None, 8):
        image = decode_image(data, min_side)
        assert (image.width < image.height) == (orientation in (5, 6, 7, 8))
    assert image_size(data) == decode_image(data).size


def test_the_size_is_read_of_what_can_not_be_decoded_and_a_bomb_has_none() -> None:
    data = encoded(Image.effect_noise((400, 300), 90), "PNG")
    assert image_size(data[:len(data) // 2]) == (400, 300)
    assert reason_of(data[:len(data) // 2]) == "undecodable_image"
    for side in (12_000, 20_000):
        with pytest.raises(BadSample) as caught:
            image_size(encoded(Image.new("1", (side, side))))
        assert caught.value.reason == "oversized_image"


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_of_a_large_jpeg_no_more_than_is_needed_is_decoded(width: int, height: int, min_side: int) -> None:
    data = encoded(Image.new("RGB", (width, height), (200, 100, 50)), "JPEG")
    image = decode_image(data, min_side)
    shorter = min(width, height)
    assert min(image.size) >= min(min_side, shorter)
    scale = max(scale for scale in (1, 2, 4, 8) if scale == 1 or shorter >= scale * min_side)
    assert image.size == (-(-width // scale), -(-height // scale))
    assert all(abs(found - wanted) < 4 for found, wanted in zip(image.getpixel((0, 0)), (200, 100, 50), strict=True))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_other_formats_are_decoded_whole(kind: str) -> None:
    data = encoded(Image.radial_gradient("L").convert("RGB"), kind)
    assert decode_image(data, 16).tobytes() == decode_image(data).tobytes()


# --- text ------------------------------------------------------------------------------------------------------------


def test_captions_are_read_by_kind_with_white_space_collapsed() -> None:
    sample = Sample("00000", "1", {"txt": b" a\n cat ", "short.txt": "un café".encode()})
    assert (sample.caption("alt"), sample.caption("short"), sample.caption("rich")) == ("a cat", "un café", None)


def test_extensions_are_read_in_any_case_and_marks_are_no_text() -> None:
    sample = Sample("00000", "1", {"TXT": b"\xef\xbb\xbfa cat", "short.txt": "\u200b\ufeff".encode()})
    assert (sample.caption("alt"), sample.caption("short")) == ("a cat", "")


@pytest.mark.parametrize(("data", "reason"), [
    (b"\xff\xfe\x00", "binary_alt_text"), (b"a\x00b", "binary_alt_text"), (b"a" * 200_000, "oversized_alt_text")])
def test_text_that_is_not_text_is_rejected(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode_text(data, "alt")
    assert caught.value.reason == reason


@pytest.mark.parametrize(("members", "reason"), [
    ({"txt": b"a cat"}, "missing_image"),
    ({"jpg": b"", "png": b"", "txt": b"a cat"}, "several_images"),
    ({"png": encoded(Image.new("RGB", (4, 4)))}, "missing_alt_text"),
    ({"png": encoded(Image.new("RGB", (4, 4))), "txt": b" \n"}, "empty_alt_text"),
    ({"png": encoded(Image.new("RGB", (4, 4))), "txt": b"a cat", "json": b"[1]"}, "bad_metadata"),
    ({"png": encoded(Image.new("RGB", (4, 4))), "txt": b"a cat", "json": b"{" * 100_000}, "bad_metadata"),
    ({"png": encoded(Image.new("RGB", (4, 4))), "txt": b"a cat", "json": b"[" + b"1," * 2**20}, "oversized_metadata"),
])
def test_a_bad_sample_says_why(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        Sample("00000", "1", members).check("required")
    assert caught.value.reason == reason


def test_alt_text_may_be_optional() -> None:
    sample = Sample("00000", "1", {"png": encoded(Image.new("RGB", (4, 4)))})
    assert sample.check("optional").size == (4, 4)
