"""A page of pictures with their captions and the loss's curves: what a person looks at while a captioner trains."""

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from recap.errors import BadSample
from recap.sample import decode_image
from recap.shards import write_bytes
from recap.validation import Row

MAX_SIDE = 384
"""Of a picture on the page, in pixels."""


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
    images = [_image(row) for row in rows]
    page = _template().render(
        step=step, num_steps=num_steps, figures=validations[-1] if validations else None,
        curves=curves(history["losses"], [(found["step"], found["loss"]) for found in validations], num_steps),
        small=all(image.width <= 64 for image in images),
        rows=[{"uid": row.uid, "picture": _data_url(image), "captions": row.captions, "references": row.references}
              for row, image in zip(rows, images, strict=True)])
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


def _image(row: Row) -> Image.Image:
    try:
        image = decode_image(row.image.read())
    except BadSample:  # it has gone since: a sheet is no reason to stop a training
        return Image.new("RGB", (MAX_SIDE, MAX_SIDE), "white")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _data_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG" if max(image.size) <= 64 else "JPEG")
    kind = "png" if max(image.size) <= 64 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
