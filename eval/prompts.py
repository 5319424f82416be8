"""The prompts that every arm draws: from a text file, a table, or the captions of shards."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from eval.config import Generate
from recap.errors import BadSample, UserError
from recap.progress import warn
from recap.shards import Reject, expand, read_shard

WHERE = "generate.prompts"


def load_prompts(config: Generate) -> list[str]:
    """Read the prompts in order, the first `num_prompts` of them.

    Files: `.txt` one a line, `.tsv` with a column `Prompt` (as PartiPrompts), `.jsonl` with a field `prompt`. Shards
    (`*.tar`): the caption of kind `config.kind`; a sample without one is passed over and counted in a warning.

    Raises:
        UserError: no file, no prompts, another kind of file, or an empty or malformed line (with its number).
    """
    inputs = prompt_inputs(config)
    prompts = list(islice(_read_all(inputs, config.kind), config.num_prompts))
    if not prompts:
        raise UserError(f"{WHERE}: no prompts in {', '.join(inputs)}")
    return prompts


def prompt_inputs(config: Generate) -> list[str]:
    """The files that `load_prompts` reads, braces and globs of shards resolved; for fingerprints."""
    patterns = [config.prompts] if isinstance(config.prompts, str) else config.prompts
    if not patterns:
        raise UserError(f"{WHERE} is empty: name a .txt, .tsv or .jsonl file, or shards")
    shards = [pattern for pattern in patterns if pattern.endswith(".tar")]
    if shards and len(shards) < len(patterns):
        raise UserError(f"{WHERE} mixes shards and other files: give one kind")
    if shards:
        return expand(shards, WHERE)
    for path in patterns:
        if Path(path).suffix not in READERS:
            raise UserError(f"{WHERE}: cannot read {path}: give {', '.join(READERS)}, or .tar shards")
        if not Path(path).is_file():
            raise UserError(f"{WHERE}: no file at {path}: check the path")
    return patterns


def _read_all(inputs: list[str], kind: str) -> Iterator[str]:
    if inputs[0].endswith(".tar"):
        yield from _read_shards(inputs, kind)
        return
    for path in inputs:
        for number, text in READERS[Path(path).suffix](Path(path)):
            prompt = " ".join(text.split())
            if not prompt:
                raise UserError(f"{WHERE}: line {number} of {path} has no prompt: fill it or delete it")
            yield prompt


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{WHERE}: {path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    # Not splitlines: it would also split at the odd separators that a prompt may hold.
    yield from enumerate(text.removesuffix("\n").split("\n") if text else [], start=1)


def _read_table(path: Path) -> Iterator[tuple[int, str]]:
    # Quotes are text, not CSV: prompts of PartiPrompts begin with one.
    lines = ((number, line.split("\t")) for number, line in _read_lines(path))
    _, header = next(lines, (1, [""]))
    if "Prompt" not in header:
        raise UserError(f"{WHERE}: {path} has no column Prompt, only {', '.join(header) or 'nothing'}")
    column = header.index("Prompt")
    for number, row in lines:
        yield number, row[column] if len(row) > column else ""


def _read_json_lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in _read_lines(path):
        try:
            prompt = json.loads(line)["prompt"]
            prompt.encode()  # JSON can spell lone surrogates, which no file or tokenizer takes
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{WHERE}: line {number} of {path} is not {{"prompt": "a text"}}') from None
        yield number, prompt


def _read_shards(shards: list[str], kind: str) -> Iterator[str]:
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
                    yield caption
                else:
                    num_without += 1
    finally:  # also where `num_prompts` stops the reading
        if num_without + len(rejects):
            warn(f"{WHERE}: passed over {num_without} samples without a usable {kind} caption "
                 f"and {len(rejects)} malformed ones")


READERS = {".txt": _read_lines, ".tsv": _read_table, ".jsonl": _read_json_lines}
