"""One image with all that its shard says of it."""

import io
import json
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from recap.errors import BadSample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Only these decoders are ever given web bytes: Pillow's others (EPS among them) run programs or parse far more.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_PIXELS = 100_000_000
MAX_TEXT_BYTES = 100_000
MAX_JSON_BYTES = 2**20
"""Of metadata; parsed, they take some twenty times as much memory."""
ORIENTATION = 0x0112
"""The tag of EXIF for how the camera was held."""
ON_ITS_SIDE = (5, 6, 7, 8)
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"


@dataclass(slots=True)
class Sample:
    """A sample of a webdataset shard: the members that share a key, as bytes, in the order of the file."""

    shard: str
    """Name of the shard without folder and `.tar`."""
    key: str
    """Unique within its shard only: two shards may both hold a `000000000`."""
    members: dict[str, bytes]
    """Extension (`jpg`, `txt`, `short.txt`) → content."""
    offsets: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Extension → where in the shard's file the content begins, for the members that were read from one."""

    @property
    def uid(self) -> str:
        """Unique within a data set; what per-sample randomness is seeded with."""
        return f"{self.shard}/{self.key}"

    @property
    def image_extension(self) -> str:
        """Which member is the image; `BadSample` where none is, or more than one."""
        found = [ext for ext in self.members if ext.lower() in IMAGE_EXTENSIONS]
        if not found:
            raise BadSample("missing_image", f"only {', '.join(self.members) or 'nothing'}")
        if len(found) > 1:
            raise BadSample("several_images", ", ".join(found))
        return found[0]

    @property
    def image_bytes(self) -> bytes:
        """The encoded image; `BadSample` where there is none, or more than one."""
        return self.members[self.image_extension]

    def image(self, min_side: int | None = None) -> Image.Image:
        """The decoded image: RGB, upright, one frame. See `decode_image`."""
        return decode_image(self.image_bytes, min_side)

    def caption(self, kind: str) -> str | None:
        """The caption of one kind, or None. `alt` is the alt-text `KEY.txt`; any other kind is `KEY.KIND.txt`."""
        data = self.member(caption_extension(kind))
        return None if data is None else decode_text(data, kind)

    def readable(self, kind: str) -> str | None:
        """The same; None for what is no text as well."""
        try:
            return self.caption(kind)
        except BadSample:
            return None

    def member(self, extension: str) -> bytes | None:
        """The content of a member, whatever the case of its extension (`TXT`), as webdataset reads it."""
        if extension in self.members:
            return self.members[extension]
        return next((data for name, data in self.members.items() if name.lower() == extension), None)

    @property
    def metadata(self) -> dict[str, Any]:
        """The content of `KEY.json`; empty where there is none. `BadSample` where it is not a JSON object."""
        data = self.member("json") or b"{}"
        if len(data) > MAX_JSON_BYTES:
            raise BadSample("oversized_metadata", f"{len(data):,} bytes in the metadata")
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadSample("bad_metadata", str(error)) from error
        if not isinstance(found, dict):
            raise BadSample("bad_metadata", f"a JSON {type(found).__name__}, not an object")
        return found

    def check(self, alt_text: Literal["required", "optional"],
              decode: Callable[[bytes], Image.Image] | None = None) -> Image.Image:
        """Decode what every stage relies on, and return the image; `BadSample` says what is wrong."""
        image = (decode or decode_image)(self.image_bytes)
        self.metadata  # noqa: B018  (read for its check)
        if alt_text == "required" and not self.caption("alt"):
            raise BadSample("missing_alt_text" if self.member("txt") is None else "empty_alt_text")
        return image


def caption_extension(kind: str) -> str:
    """`alt` → `txt`, `short` → `short.txt`."""
    return "txt" if kind == "alt" else f"{kind}.txt"


def decode_text(data: bytes, kind: str = "caption") -> str:
    """Bytes of a caption file → its text, white space collapsed. `BadSample` where it is not text."""
    name = "alt_text" if kind == "alt" else "caption"
    if len(data) > MAX_TEXT_BYTES:
        raise BadSample(f"oversized_{name}", f"{len(data):,} bytes in the {kind} text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f"binary_{name}", f"the {kind} text is not UTF-8 at byte {error.start}") from error
    if "\x00" in text:
        raise BadSample(f"binary_{name}", f"a NUL byte in the {kind} text")
    return " ".join(text.split()).strip(f"{INVISIBLE} ")


def visible(text: str) -> str:
    """One line, without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def decode_image(data: bytes, min_side: int | None = None) -> Image.Image:
    """Encoded image → RGB `PIL.Image`, first frame, EXIF orientation applied, transparency on white.

    Args:
        data: of a JPEG, PNG or WebP.
        min_side: the shorter side that is needed, in pixels: of a much larger JPEG, no more is decoded than a half, a
            quarter or an eighth of the size, as long as that is not less.

    Raises:
        BadSample: `undecodable_image`, or `oversized_image` above MAX_IMAGE_PIXELS (a decompression bomb).
    """
    with _malformed():
        image = _opened(data)
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        image.load()
        return _on_white(_upright(image))


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height that an encoded image says it has, upright, before it is decoded.

    Raises:
        BadSample: `undecodable_image`, where it says nothing, or `oversized_image`.
    """
    with _malformed():
        image = _opened(data)
        return image.size[::-1] if _orientation(image) in ON_ITS_SIDE else image.size


def count_pixels(data: bytes) -> int:
    """How many an encoded image says it has; `BadSample` where it says nothing."""
    with _malformed():
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        return image.width * image.height


@contextmanager
def _malformed() -> Iterator[None]:
    """What Pillow raises on malformed bytes, as `BadSample`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and ICC data; the pixels decide
            yield
    except Image.DecompressionBombError as error:
        raise BadSample("oversized_image", str(error)) from error
    except UnidentifiedImageError as error:  # which says where in this process's memory the bytes are
        raise BadSample("undecodable_image", "of no known image format") from error
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError,
            MemoryError, struct.error, zlib.error) as error:
        raise BadSample("undecodable_image", f"{type(error).__name__}: {error}") from error


def _opened(data: bytes) -> ImageFile:
    """Not decoded yet."""
    image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise BadSample("oversized_image", f"{image.width}×{image.height} pixels")
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)  # which copies any other as well
    except Exception:  # noqa: BLE001  (malformed EXIF costs the orientation, not the image)
        return image


def _orientation(image: Image.Image) -> int:
    """How the camera was held, as EXIF counts it; 1, upright, where the image doesn't say."""
    try:
        found: int = Image.Image.getexif(image).get(ORIENTATION, 1)  # PNG's own `getexif` would decode the image
    except Exception:  # noqa: BLE001  (as for `_upright`)
        return 1
    return found


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I;16"):  # convert("RGB") would clip 16-bit grey to white
        return image.point(lambda value: value / 256).convert("L").convert("RGB")
    return image.convert("RGB")
