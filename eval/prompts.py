"""The prompts that every arm draws, in sets: from text files, tables, or the captions of shards."""

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
from recap.shards import Reject, expand_files, read_shard

WHERE = "generate.prompts"
PROMPTS_FILE = "prompts.jsonl"
"""Beside the pictures that an arm drew: a row for each, what it was drawn from."""
MAX_ABOUT = 16_384
"""Bytes of JSON that may travel with a prompt."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a picture is drawn from."""

    text: str
    set: str = "prompts"
    """The prompt set it belongs to."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else its row in a .jsonl file says, JSON-like: for whoever judges the picture, never for who draws it."""


def load_prompts(config: Generate) -> list[Prompt]:
    """Read the prompts in order, the first `num_prompts` of each set.

    Files: `.txt` one a line, `.tsv` with a column `Prompt` (as PartiPrompts), `.jsonl` with a field `prompt`, whose
    other fields become `about`; the set is the file's stem. Shards (`*.tar`): the captions of each kind in
    `config.kind`, a set each; a sample without one is passed over and counted in a warning.

    Raises:
        UserError: no file, no prompts, another kind of file, two files of one stem, or an empty or malformed line
            (with its number).
    """
    inputs = prompt_inputs(config)
    if inputs[0].endswith(".tar"):
        sets = [(kind, _read_shards(inputs, kind)) for kind in _kinds(config)]
    else:
        sets = [(_stem(path), _read_file(path)) for path in inputs]
    prompts = [Prompt(text, name, about) for name, rows in sets for text, about in islice(rows, config.num_prompts)]
    drawn = Counter(prompt.set for prompt in prompts)
    if empty := [name for name, _ in sets if not drawn[name]]:
        raise UserError(f"{WHERE}: no prompts of the set {empty[0]} in {', '.join(inputs[:5])}")
    return prompts


def prompt_inputs(config: Generate) -> list[str]:
    """The files that `load_prompts` reads, braces and globs resolved; for fingerprints."""
    patterns = [config.prompts] if isinstance(config.prompts, str) else config.prompts
    if not patterns:
        raise UserError(f"{WHERE} is empty: name .txt, .tsv or .jsonl files, or shards")
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


def _read_file(path: str) -> Iterator[Row]:
    for number, text, about in READERS[Path(path).suffix](Path(path)):
        prompt = " ".join(text.split())
        if not prompt:
            raise UserError(f"{WHERE}: line {number} of {path} has no prompt: fill it or delete it")
        yield prompt, about


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{WHERE}: {path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    # Not splitlines: it would also split at the odd separators that a prompt may hold.
    yield from enumerate(text.removesuffix("\n").split("\n") if text else [], start=1)


def _read_lines(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for number, line in _lines(path):
        yield number, line, {}


def _read_table(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    # Quotes are text, not CSV: prompts of PartiPrompts begin with one.
    lines = ((number, line.split("\t")) for number, line in _lines(path))
    _, header = next(lines, (1, [""]))
    if "Prompt" not in header:
        raise UserError(f"{WHERE}: {path} has no column Prompt, only {', '.join(header) or 'nothing'}")
    column = header.index("Prompt")
    for number, row in lines:
        yield number, row[column] if len(row) > column else "", {}


def _read_json_lines(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            about = json.loads(line)
            prompt = about.pop("prompt")
            prompt.encode()  # JSON can spell lone surrogates, which no file or tokenizer takes
            size = len(json.dumps(about, ensure_ascii=False, allow_nan=False).encode())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{WHERE}: line {number} of {path} is not {{"prompt": "a text", …}}') from None
        if size > MAX_ABOUT:
            raise UserError(f"{WHERE}: line {number} of {path} carries {size:,} bytes beside its prompt: "
                            f"leave at most {MAX_ABOUT:,}")
        yield number, prompt, about


READERS = {".txt": _read_lines, ".tsv": _read_table, ".jsonl": _read_json_lines}


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
