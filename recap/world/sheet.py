"""A sheet of pictures with what the reader sees in each, for a person to check."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from recap.errors import UserError
from recap.world.reader import Reading

COLUMNS = 10
ENLARGED = 128
LINE = 11
CELL = (ENLARGED + 32, ENLARGED + 8 * LINE)


def sheet(pictures: Iterable[Image.Image], readings: Iterable[Reading]) -> Image.Image:
    """Pictures enlarged, each numbered, with a line for each shape read, in rows of ten."""
    cells = [_cell(number, picture, reading)
             for number, (picture, reading) in enumerate(zip(pictures, readings, strict=True), 1)]
    rows = -(-len(cells) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * CELL[0], rows * CELL[1]), "white")
    for index, cell in enumerate(cells):
        page.paste(cell, (index % COLUMNS * CELL[0], index // COLUMNS * CELL[1]))
    return page


def open_picture(path: Path) -> Image.Image:
    """One picture of a sheet; `UserError` where it is none."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        raise UserError(f"{path} is no picture: delete it, or draw it again") from None


def _cell(number: int, picture: Image.Image, reading: Reading) -> Image.Image:
    cell = Image.new("RGB", CELL, "white")
    cell.paste(picture.resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST), (4, 4))
    lines = [f"{number}. {reading.pattern} {reading.background}"]
    lines += [f"{shape.place}: {shape.size} {shape.colour} {shape.kind}" for shape in reading.shapes]
    canvas, font = ImageDraw.Draw(cell), ImageFont.load_default(9)
    for index, line in enumerate(lines):
        canvas.text((4, ENLARGED + 6 + index * LINE), line, fill="black", font=font)
    return cell
