"""An image → the pixels that it is trained on: the size of its bucket, resized, cropped, mirrored."""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from train_t2i.config import Buckets, Train

Size = tuple[int, int]
"""Height and width."""
CENTER = (0.5, 0.5)


def sizes(resolution: int, buckets: Buckets | None) -> list[Size]:
    """What images are trained at; the square alone where there are no buckets.

    Every multiple of `buckets.step` as the longer side, from that of the square on, with the largest one as the shorter
    side that keeps the area within that of the square, if the proportions are within `buckets.max_aspect`.
    """
    if buckets is None:
        return [(resolution, resolution)]
    step, found = buckets.step, set()
    for long in range(resolution // step * step or step, int(resolution * math.sqrt(buckets.max_aspect)) + 1, step):
        short = min(long, resolution ** 2 // long // step * step)
        if short and long <= short * buckets.max_aspect:
            found |= {(long, short), (short, long)}
    return sorted(found) or [(resolution, resolution)]


@lru_cache(maxsize=65536)
def nearest(width: int, height: int, among: tuple[Size, ...]) -> Size:
    """The size whose proportions are nearest to the image's, as a ratio; of those alike, the larger."""
    return min(among, key=lambda size: (abs(math.log(size[1] / size[0] * height / width)), -size[0] * size[1]))


def draft_side(size: Size) -> int:
    """The shorter side that a JPEG is decoded at, at least: about twice the wanted one, so that resizing hides it."""
    return 2 * min(size)


def to_pixels(image: Image.Image, size: Size, centering: tuple[float, float] = CENTER,
              flipped: bool = False) -> torch.Tensor:
    """The image, cropped to the proportions of `size` and resized to it: (3, H, W) uint8.

    To a level, it is what Pillow's `ImageOps.fit` makes, by its bicubic filter, of a window of whole pixels; in a
    quarter of its time.

    Args:
        image: RGB.
        size: height and width.
        centering: what of the image is kept where it is too wide or too high: from 0, left or top, to 1.
        flipped: mirror it.
    """
    width, height = _window(image, size)
    left, top = round(centering[0] * (image.width - width)), round(centering[1] * (image.height - height))
    pixels = torch.from_numpy(np.array(image)[top:top + height, left:left + width]).permute(2, 0, 1)[None]
    if (height, width) != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
    return (pixels.flip(-1) if flipped else pixels)[0].contiguous()


def _window(image: Image.Image, size: Size) -> tuple[int, int]:
    """Width and height of the largest window that has the proportions of `size`, to a pixel."""
    scale = min(image.height / size[0], image.width / size[1])
    return max(1, round(scale * size[1])), max(1, round(scale * size[0]))


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 → float32 in [−1, 1], as the VAE takes it."""
    return pixels.float() / 127.5 - 1


def size_ids(width: int, height: int, size: Size, centering: tuple[float, float] = CENTER) -> list[float]:
    """What Stable Diffusion XL is told of an image (Podell et al. 2023, arXiv 2307.01952, section 2.2).

    Returns:
        Height and width of the original; top and left of the crop, in pixels of the resized image; height and width
        trained at.
    """
    scale = max(size[0] / height, size[1] / width)
    left, top = (centering[0] * (width * scale - size[1]), centering[1] * (height * scale - size[0]))
    return [height, width, round(max(top, 0)), round(max(left, 0)), *size]


def unit_of(config: Train) -> int:
    """What every side is a multiple of, as the table asks for it."""
    return math.gcd(*(side for size in sizes(config.resolution, config.buckets) for side in size))
