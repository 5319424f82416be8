"""The prompts that every arm draws, in sets: from text files, tables, or the captions of shards."""

import csv
import hashlib
import heapq
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from eval.config import Generate
from recap.errors import BadSample, UserError
from recap.progress import warn
from recap.sample import visible
from recap.shards import Reject, expand_files, read_shard

WHERE = "generate.prompts"
PROMPTS_FILE = "prompts.jsonl"
"""Beside the pictures that an arm drew: a row for each, what it was drawn from."""
MAX_PROMPT = 16_384
"""Bytes of a prompt in a file: over 40 CLIP windows."""
MAX_ABOUT = 16_384
"""Bytes of JSON that may travel with a prompt."""
COLUMNS = ("prompt", "caption", "text")
"""Names of a table's column of prompts, in any case; the first that is there is taken."""
KEPT = ("Category", "Challenge")
"""Columns of PartiPrompts that travel with the prompt."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a picture is drawn from."""

    text: str
    set: str = "prompts"
    """The prompt set it belongs to."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else its file says of it, JSON-like: for whoever judges the picture, never for who draws it."""


def load_prompts(config: Generate) -> list[Prompt]:
    """Read the prompts in order, of each set the first `num_prompts`, or as many by lot.

    Files: see `Generate.prompts`; the set is the file's stem. Shards (`*.tar`): the captions of each kind in
    `config.kind`, a set each; a sample without one is passed over and counted in a warning.

    Raises:
        UserError: no file, no prompts, another kind of file, two files of one stem, or an empty, huge or malformed
            line (with its number).
    """
    inputs = prompt_inputs(config)
    if inputs[0].endswith(".tar"):
        sets = [(kind, _read_shards(inputs, kind)) for kind in _kinds(config)]
    else:
        sets = [(_stem(path), _read_file(path)) for path in inputs]
    prompts = [Prompt(text, name, about) for name, rows in sets for text, about in _some(rows, config)]
    drawn = Counter(prompt.set for prompt in prompts)
    if empty := [name for name, _ in sets if not drawn[name]]:
        raise UserError(f"{WHERE}: no prompts of the set {empty[0]} in {', '.join(inputs[:5])}")
    return prompts


def _some(rows: "Iterator[Row]", config: Generate) -> "Iterable[Row]":
    """The first rows, or those of the smallest hashes: as good as random, and the same on any machine."""
    if config.prompts_seed is None or config.num_prompts is None:
        return islice(rows, config.num_prompts)

    def lot(numbered: "tuple[int, Row]") -> bytes:
        place, (text, _) = numbered
        return hashlib.sha256(f"{config.prompts_seed}/{place}/{text}".encode()).digest()

    drawn = heapq.nsmallest(config.num_prompts, enumerate(rows), key=lot)
    return [row for _, row in sorted(drawn, key=lambda numbered: numbered[0])]


def prompt_inputs(config: Generate) -> list[str]:
    """The files that `load_prompts` reads, braces and globs resolved; for fingerprints."""
    patterns = [config.prompts] if isinstance(config.prompts, str) else config.prompts
    if not patterns:
        raise UserError(f"{WHERE} is empty: name files ({', '.join(READERS)}), or shards")
    shards = [pattern for pattern in patterns if pattern.endswith(".tar")]
    if shards and len(shards) < len(patterns):
        raise UserError(f"{WHERE} mixes shards and other files: give one kind")
    inputs = expand_files(patterns, WHERE)
    if shards:
        return inputs
    for path in inputs:
        if Path(path).suffix not in READERS:
            raise UserError(f"{WHERE}: cannot read {path}: give {', '.join(READERS)}, or .tar shards")
        if not Path(path).is_file():
            raise UserError(f"{WHERE}: no file at {path}: give files of this machine")
        if not path.isprintable():
            raise UserError(f"{WHERE}: {path!a} has no printable name, and it names its prompt set: rename it")
    if same := _repeated(map(_stem, inputs)):
        both = " and ".join([path for path in inputs if _stem(path) == same][:2])
        raise UserError(f"{WHERE}: {both} would both be the prompt set {same!r}: rename one of them")
    return inputs


def prompt_sets(config: Generate) -> list[str]:
    """The names of the prompt sets, in order; no file is opened."""
    inputs = prompt_inputs(config)
    return _kinds(config) if inputs[0].endswith(".tar") else [_stem(path) for path in inputs]


def _kinds(config: Generate) -> list[str]:
    kinds = [config.kind] if isinstance(config.kind, str) else config.kind
    if not kinds or _repeated(kinds):
        raise UserError(f"generate.kind: {kinds!r}: name each caption kind once, at least one")
    return kinds


def _stem(path: str) -> str:
    return Path(path).stem


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


# --- files ---------------------------------------------------------------------------------------------------------

Row = tuple[str, dict[str, Any]]
"""A prompt, and what else is said of it."""
Located = tuple[str, str, dict[str, Any]]
"""The same, after where in the file it is, for messages: `line 3`."""


def _read_file(path: str) -> Iterator[Row]:
    for at, text, about in READERS[Path(path).suffix](Path(path)):
        prompt = " ".join(text.split())
        if not prompt:
            raise UserError(f"{WHERE}: {at} of {path} has no prompt: fill it or delete it")
        if (size := len(prompt.encode())) > MAX_PROMPT:
            raise UserError(f"{WHERE}: {at} of {path} is a prompt of {size:,} bytes: leave at most {MAX_PROMPT:,}")
        if (size := len(json.dumps(about, ensure_ascii=False).encode())) > MAX_ABOUT:
            raise UserError(f"{WHERE}: {at} of {path} carries {size:,} bytes beside its prompt: "
                            f"leave at most {MAX_ABOUT:,}")
        yield prompt, about


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{WHERE}: {path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line)."""
    text = _text(path)
    # Not splitlines: it would also split at the odd separators that a prompt may hold.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        yield f"line {number}", line


def _read_lines(path: Path) -> Iterator[Located]:
    for at, line in _lines(path):
        yield at, line, {}


def _read_tab_separated(path: Path) -> Iterator[Located]:
    # Quotes are text, not CSV: prompts of PartiPrompts begin with one.
    return _read_table(path, ((at, line.split("\t")) for at, line in _lines(path)))


def _read_comma_separated(path: Path) -> Iterator[Located]:
    # read_text has made every line end "\n", also inside of quotes, where white space is one to us.
    rows = csv.reader(io.StringIO(_text(path)), strict=True)
    try:
        yield from _read_table(path, ((f"line {rows.line_num}", row) for row in rows))
    except csv.Error as error:
        raise UserError(f"{WHERE}: line {rows.line_num} of {path} is no CSV ({error}): mend it, or give a .txt "
                        "file") from None


def _read_table(path: Path, rows: Iterator[tuple[str, list[str]]]) -> Iterator[Located]:
    _, header = next(rows, ("", []))
    names = [name.strip().casefold() for name in header]
    column = next((names.index(name) for name in COLUMNS if name in names), None)
    if column is None:
        found = visible(", ".join(header).strip())[:200] or "nothing"
        raise UserError(f"{WHERE}: {path} has no column Prompt, Caption or Text, only {found}: name its column so")
    kept = {name: names.index(name.casefold()) for name in KEPT if name.casefold() in names}
    for at, row in rows:
        if len(row) > len(header):
            raise UserError(f"{WHERE}: {at} of {path} has {len(row)} cells, and the header {len(header)}: quote a text "
                            "that holds the separator, or give a .txt file")
        cells = dict(enumerate(map(str.strip, row)))
        yield at, cells.get(column, ""), {name: cell for name, place in kept.items() if (cell := cells.get(place))}


def _read_json_lines(path: Path) -> Iterator[Located]:
    for at, line in _lines(path):
        try:
            about = json.loads(line)
            prompt = about.pop("prompt")
            prompt.encode()  # JSON can spell lone surrogates, which no file or tokenizer takes
            json.dumps(about, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{WHERE}: {at} of {path} is not {{"prompt": "a text", …}}') from None
        yield at, prompt, about


def _read_coco(path: Path) -> Iterator[Located]:
    """The first caption of every image, in the order of the images."""
    captions: dict[int, str] = {}
    try:
        content = json.loads(_text(path))
        images = [int(image["id"]) for image in content["images"]]
        for annotation in content["annotations"]:
            annotation["caption"].encode()  # lone surrogates, as above
            captions.setdefault(int(annotation["image_id"]), annotation["caption"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError,
            RecursionError):
        raise UserError(f'{WHERE}: {path} is not {{"images": [{{"id": 1}}], "annotations": [{{"image_id": 1, '
                        '"caption": "a text"}]}, as COCO\'s captions are') from None
    if without := sum(image not in captions for image in images):
        warn(f"{WHERE}: {path} has {without} images without a caption, which are passed over")
    for image in images:
        if image in captions:
            yield f"image {image}", captions[image], {"image_id": image}


READERS = {".txt": _read_lines, ".tsv": _read_tab_separated, ".csv": _read_comma_separated,
           ".jsonl": _read_json_lines, ".json": _read_coco}


# --- shards --------------------------------------------------------------------------------------------------------


def _read_shards(shards: list[str], kind: str) -> Iterator[Row]:
    rejects: list[Reject] = []
    num_without = 0
    try:
        for shard in shards:
            for sample in read_shard(shard, rejects):
                try:
                    caption = sample.caption(kind)
                except BadSample:
                    caption = None
                if caption:
                    yield caption, {}
                else:
                    num_without += 1
    finally:  # also where `num_prompts` stops the reading
        if num_without + len(rejects):
            warn(f"{WHERE}: passed over {num_without} samples without a usable {kind} caption "
                 f"and {len(rejects)} malformed ones")
