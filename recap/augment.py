"""What happens to a training image before the captioner sees it, drawn anew for every pair and epoch."""

import re
from random import Random

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from recap.config.finetune import Augment

SIDES = re.compile(r"\b(?:left|right)(?:most|ward|wards|-hand)?\b", re.I)
"""A caption that says one of these is false of the mirrored image."""
MAX_BLUR = 0.01
"""Of the Gaussian's radius, as a share of the image's longer side."""


def augment(image: Image.Image, caption: str, config: Augment, rng: Random) -> Image.Image:
    """Crop, mirror, blur and recolour an RGB image, each as `config` says. What it is changed by, `rng` decides."""
    if config.crop < 1:
        image = image.crop(_window(image.size, config.crop, rng))
    if rng.random() < config.flip and not SIDES.search(caption):
        image = ImageOps.mirror(image)
    if rng.random() < config.blur:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, MAX_BLUR) * max(image.size)))
    if config.colour:
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(rng.uniform(1 - config.colour, 1 + config.colour))
    return image


def _window(size: tuple[int, int], smallest: float, rng: Random) -> tuple[int, int, int, int]:
    """A window of the image's own proportions, of at least `smallest` of its area: left, top, right, bottom."""
    scale = rng.uniform(smallest, 1) ** 0.5
    width, height = (max(1, round(side * scale)) for side in size)
    left, top = rng.randint(0, size[0] - width), rng.randint(0, size[1] - height)
    return left, top, left + width, top + height
