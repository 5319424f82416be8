"""The files in which people keep captions: COCO's and Karpathy's JSON, Flickr's, PixLore's, ImageFolder's.

Flickr8k's and Flickr30k's come as token files and as tables.

A reader gives what a file says of images by their names; whether the images are there is not its business.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from recap.errors import UserError
from recap.shards import Reject

STYLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
SHAPES = {
    "coco": '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "…"}]}, '
            "or Karpathy's dataset_coco.json",
    "flickr": "lines of NAME.jpg#0<tab>CAPTION, or a table with the header image,caption or "
              "image_name| comment_number| comment",
    "pixlore": "CSV whose header has image_path and rich_caption",
    "imagefolder": 'a metadata.jsonl with lines of {"file_name": "1.jpg", "text": "…"}',
}


@dataclass(frozen=True, slots=True)
class CaptionsFile:
    """A captions file while it is read: its text, what its captions are, and what was not used."""

    path: str
    text: str
    format: str
    style: str
    rejects: list[Reject]

    def reject(self, key: str, reason: str, detail: str = "") -> None:
        self.rejects.append(Reject(PurePosixPath(self.path).name, key, reason, detail))

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}: a {self.format} set is {SHAPES[self.format]}")

    def json(self, text: str, first_line: int) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise self.error(f"line {first_line + error.lineno - 1} is not JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise self.error(f"the JSON from line {first_line} on cannot be read ({error})") from None


Entries = Iterator[tuple[str, list[tuple[str, str]]]]
"""(an image's name as the file has it, (style, caption)s); an image may come in several pieces."""


def _coco(file: CaptionsFile) -> Entries:
    content = file.json(file.text, 1)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise file.error("no list of images")
    if any(isinstance(image, dict) and "sentences" in image for image in images):
        yield from _karpathy(file, images)
        return
    captions = _coco_captions(file, content.get("annotations"))
    names: dict[str, str] = {}
    for place, image in enumerate(images):
        match image:
            case {"id": int() | str() as image_id, "file_name": str() as name}:
                if names.setdefault(str(image_id), name) == name:
                    yield name, captions.pop(str(image_id), [])
                else:
                    file.reject(name, "duplicate_id", f"{image_id} is also {names[str(image_id)]}")
            case _:
                file.reject(f"images[{place}]", "malformed_entry", "no id or no file_name")
    for key, found in captions.items():
        file.reject(key, "unknown_image", f"{len(found)} captions of an image that is not listed")


def _coco_captions(file: CaptionsFile, annotations: Any) -> dict[str, list[tuple[str, str]]]:
    """Id of an image → its captions."""
    if not isinstance(annotations, list):
        raise file.error("no list of annotations")
    captions: dict[str, list[tuple[str, str]]] = {}
    for place, annotation in enumerate(annotations):
        match annotation:
            case {"image_id": int() | str() as image_id, "caption": str() as caption}:
                captions.setdefault(str(image_id), []).append((file.style, caption))
            case _:
                file.reject(f"annotations[{place}]", "malformed_entry", "no image_id or no caption")
    return captions


def _karpathy(file: CaptionsFile, images: list[Any]) -> Entries:
    """Karpathy's files, without what he keeps for validation and test: published scores are those images'."""
    for place, image in enumerate(images):
        match image:
            case {"filename": str() as name, "sentences": list() as sentences}:
                if image.get("split") in ("val", "test"):
                    file.reject(name, "held_out", f"Karpathy's {image['split']} split")
                    continue
                folder = image.get("filepath")
                texts = [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]
                yield (f"{folder}/{name}" if isinstance(folder, str) and folder else name,
                       [(file.style, text) for text in texts if isinstance(text, str)])
            case _:
                file.reject(f"images[{place}]", "malformed_entry", "no filename or no sentences")


def _flickr(file: CaptionsFile) -> Entries:
    lines = [(number, line) for number, line in enumerate(file.text.split("\n"), 1) if line.strip()]
    header = [column.strip().lower() for column in re.split("[|,]", lines[0][1])] if lines else [""]
    if header[0] in ("image", "image_name") and header[-1] in ("caption", "comment"):
        parse = _pipe_row if "|" in lines[0][1] else _comma_row
        lines = lines[1:]
    elif any(all(_token_row(line, 2)) for _, line in lines[:100]):
        parse = _token_row
    else:
        raise file.error("its first lines are of another kind")
    for number, line in lines:
        name, caption = parse(line, len(header))
        if name and caption:
            yield name, [(file.style, caption)]
        else:  # Flickr30k's results.csv has such a row
            file.reject(f"line {number}", "malformed_row", ascii(line[:80]))


def _token_row(line: str, num_columns: int) -> tuple[str, str]:
    """(name, caption), as the next two do; one of them empty where the row is malformed."""
    place, _, caption = line.partition("\t")
    name, _, number = place.rpartition("#")
    return (name.strip(), caption.strip()) if number.strip().isdigit() else ("", "")


def _pipe_row(line: str, num_columns: int) -> tuple[str, str]:
    fields = line.split("|", num_columns - 1)
    return (fields[0].strip(), fields[-1].strip()) if len(fields) == num_columns else ("", "")


def _comma_row(line: str, num_columns: int) -> tuple[str, str]:
    # One line at a time, so that a quotation mark that does not close costs one row, not all that follow.
    try:
        fields = next(csv.reader([line.rstrip("\r")], strict=True))
    except csv.Error:
        return "", ""
    return fields[0].strip(), ",".join(fields[num_columns - 1:]).strip()  # a caption's commas that nobody quoted


def _pixlore(file: CaptionsFile) -> Entries:
    # The csv module's own limit of 131,072 characters a field is above what a caption may have, and is left as it is.
    rows = csv.reader(io.StringIO(file.text, newline=""), strict=True)
    header: list[str] = []
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # the reader goes on with the next line
            file.reject(f"line {rows.line_num}", "malformed_row", str(error))
            continue
        if not row:
            continue
        if not header:
            header = [column.strip() for column in row]
            if not {"image_path", "rich_caption"} <= set(header):
                raise file.error(f"line {rows.line_num} has no columns image_path and rich_caption")
        elif len(row) == len(header):  # the data set's other columns hold what the caption was made from
            yield row[header.index("image_path")], [(file.style, row[header.index("rich_caption")])]
        else:
            file.reject(f"line {rows.line_num}", "malformed_row", f"{len(row)} columns, not {len(header)}")


def _imagefolder(file: CaptionsFile) -> Entries:
    """`text` is of the set's style; any other column of text is of the style that it is named."""
    for number, line in enumerate(file.text.split("\n"), 1):
        if not line.strip():
            continue
        row = file.json(line, number)
        if not isinstance(row, dict):
            raise file.error(f"line {number} is not a JSON object")
        name = row.pop("file_name", None)
        if not isinstance(name, str):
            file.reject(f"line {number}", "malformed_row", "no file_name")
            continue
        yield name, [(file.style if column == "text" else column, text)
                     for column, value in row.items() if STYLE.fullmatch(column)
                     for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


READERS: dict[str, Callable[[CaptionsFile], Entries]] = {
    "coco": _coco, "flickr": _flickr, "pixlore": _pixlore, "imagefolder": _imagefolder}
