"""A page of pictures with their captions and the loss's curves: what a person looks at while a captioner trains."""

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from recap.caption_sets import ImageRef
from recap.errors import BadSample
from recap.sample import decode_image
from recap.storage import write_bytes
from recap.validation import Row

MAX_SIDE, SMALL = 384, 64
"""Of a picture on the page, in pixels; up to `SMALL` it is shown as it is."""


def write_sheet(path: Path, step: int, num_steps: int, history: dict[str, Any], rows: list[Row]) -> None:
    """Write one page, whole in itself. Captions are escaped: they may be of the web.

    Args:
        path: an HTML file; its folder is made.
        step: done so far, of `num_steps`.
        num_steps: of the training.
        history: `losses` ([step, loss] each) and `validations` (`step`, `loss`, `styles`).
        rows: the images.
    """
    path.parent.mkdir(exist_ok=True)
    validations = history["validations"]
    pictures = [thumbnail(row.image) for row in rows]
    page = _template().render(
        step=step, num_steps=num_steps, figures=validations[-1] if validations else None,
        curves=curves(history["losses"], [(found["step"], found["loss"]) for found in validations], num_steps),
        rows=[{"uid": row.uid, "picture": picture, "captions": row.captions, "references": row.references}
              for row, picture in zip(rows, pictures, strict=True)])
    write_bytes(str(path), page.encode())


def curves(losses: list[list[float]], validations: list[tuple[int, float]], num_steps: int) -> str:
    """Training and held-out loss over steps, as an SVG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.add_subplot()
    for name, points, style in (("training", losses, "-"), ("held out", validations, "o-")):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1.5, markersize=4)
    axes.set_xlim(0, num_steps)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token")
    axes.spines[["top", "right"]].set_visible(False)
    if losses or validations:
        axes.legend(frameon=False)
    out = io.StringIO()
    figure.savefig(out, format="svg")
    svg = out.getvalue()
    return svg[svg.index("<svg"):]


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("recap", "."), autoescape=True)
    return environment.get_template("sheet.html")


def thumbnail(image: ImageRef) -> str:
    """A picture as a `data:` URL, small enough for a page; empty where it can't be read, which is no reason to stop."""
    try:
        picture = decode_image(image.read())
    except BadSample:
        return ""
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    kind = "png" if max(picture.size) <= SMALL else "jpeg"  # JPEG blurs what is small
    out = io.BytesIO()
    picture.save(out, kind)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
