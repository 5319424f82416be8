"""Small pictures for a page: embedded in a report, or kept of pictures that are not."""

import io
from collections import Counter
from pathlib import Path

from PIL import Image

from eval.drawn import THUMBNAILS_FILE, Drawn, by_hash, iterate, read_list
from recap.errors import BadSample, UserError
from recap.sample import Sample, decode_image
from recap.shards import ShardWriter

THUMBNAIL = 320
"""Longest side, in pixels."""
PIXEL_ART = 128
"""Pictures smaller than this are PNG, as their pixels are few and count."""
NUM_PROMPTS = 512
"""Prompts whose thumbnails are kept."""


def thumbnail(image: Image.Image) -> tuple[str, bytes]:
    """`jpg` or `png`, and the file's content."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    if max(image.size) < PIXEL_ART:
        image.save(buffer, format="PNG", optimize=True)
        return "png", buffer.getvalue()
    image.save(buffer, format="JPEG", quality=82, optimize=True)
    return "jpg", buffer.getvalue()


def write_thumbnails(folder: Path) -> None:
    """Write `thumbnails.tar`, of the pictures of some prompts."""
    indices = _kept(read_list(folder))
    with ShardWriter(str(folder / THUMBNAILS_FILE)) as writer:
        for each, png in iterate(folder):
            if each.index in indices:
                extension, content = thumbnail(_decoded(png, folder, each.index))
                writer.write(Sample("thumbnails", f"{each.index:08d}", {extension: content}))


def _decoded(png: bytes, folder: Path, index: int) -> Image.Image:
    try:
        return decode_image(png)
    except BadSample as error:
        raise UserError(f"{folder}: picture {index} is not a whole image ({error.reason}): delete its shard and "
                        f"{folder / 'done.json'}, and run `recap generate` again") from None


def _kept(drawn: list[Drawn]) -> set[int]:
    """Which pictures: all of a prompt, by hash, and of every prompt set as many as of the others, if it has them."""
    found: Counter[str] = Counter()
    places: dict[int, int] = {}
    for each in by_hash(drawn):
        if each.prompt_index not in places:
            places[each.prompt_index] = found[each.prompt.set]
            found[each.prompt.set] += 1
    chosen = set(sorted(places, key=places.__getitem__)[:NUM_PROMPTS])
    return {each.index for each in drawn if each.prompt_index in chosen}
