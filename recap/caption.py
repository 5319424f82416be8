"""`recap caption`: captions of single images, printed."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from recap import config, progress
from recap.captioners import open_captioner
from recap.captioners.text import Caption
from recap.config import Style
from recap.errors import BadSample, UserError
from recap.sample import decode_image
from recap.show import COLUMNS, wrap
from recap.storage import exists, read_bytes

if TYPE_CHECKING:
    from recap.pipeline import Experiment

def tell_apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What was given on the command line → images, and values that override the file's."""
    images, overrides = config.tell_apart(arguments)
    if not images:
        raise UserError("caption: no image was named: give paths or URLs, e.g. photo.jpg")
    return images, overrides


def caption(exp: "Experiment", images: list[str]) -> Iterator[str]:
    """The captions of images in every style, as they come; an image's are independent of the others.

    Args:
        exp: the experiment, of which captioner, styles and device count.
        images: paths or URLs.

    Yields:
        Lines of at most COLUMNS columns.

    Raises:
        UserError: an image is not there, or is none.
    """
    from recap.pipeline import Plan
    for image in images:
        if not exists(image):
            raise UserError(f"caption: no image at {image}: check the path")
    plan = Plan(exp)
    tuned, note = plan.tuned_if_done()
    if note:
        progress.warn(note)
    captioner = open_captioner(exp.captioner, plan.device, tuned)
    for image in images:
        try:
            decoded = decode_image(read_bytes(image))
        except BadSample as error:
            raise UserError(f"caption: {image}: {error.reason} ({error.detail}): give a JPEG, PNG or WebP") from None
        yield image
        for _, captions in captioner.captions([captioner.preprocess([decoded])], exp.styles, len(exp.styles)):
            for name, found in captions.items():
                yield from _lines(name, found, exp.styles)


def _lines(name: str, found: Caption, styles: dict[str, Style]) -> Iterator[str]:
    margin = max(map(len, styles)) + 4
    cut = "" if found.ended else f" … (cut at {styles[name].max_new_tokens} tokens)"
    for number, line in enumerate(wrap(f"{found.text or '(nothing)'}{cut}", COLUMNS - margin)):
        yield (f"  {name:<{margin - 2}}" if number == 0 else " " * margin) + line
