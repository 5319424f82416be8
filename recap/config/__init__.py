"""TOML → typed tables. Defaults < file < `a.b=c` on the command line; an unknown key is an error naming the nearest.

A table is a pydantic model: recap's own are below and in the files beside this one, `train_t2i/config.py` and
`eval/config.py` hold theirs, and `recap/pipeline.py` joins them into one experiment. Nothing heavy is imported here.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recap.errors import UserError

T = TypeVar("T", bound=BaseModel)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""What becomes part of a file's name: an arm, a style."""

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""The same, where a dot may stand as well: `v1.2`."""


OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")
"""How `captioner.tuned=none` begins, and the name of nothing that is there."""


class Table(BaseModel):
    """A table of the experiment file. Fields are documented by the string below them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class Model(Table):
    """A checkpoint: a hub id, or a local folder in the same format."""

    model: str
    """Hub id (`Salesforce/blip2-opt-2.7b`) or folder."""
    revision: str = "main"
    """Commit, tag or branch on the hub; `main` can change, so it is warned of. Ignored for a folder."""


# --- recap's tables ------------------------------------------------------------------------------------------------


class Data(Table):
    shards: str | list[str] = Field(default_factory=list)
    """Webdataset shards as img2dataset writes them: paths or URLs, with braces or globs."""
    alt_text: Literal["required", "optional"] = "required"
    """`required` quarantines a sample whose alt-text is missing, empty or not text; `optional` keeps it."""


class Style(Table):
    prompt: str
    """The fixed conditioning prompt of this style, given to the captioner in training and in relabelling."""
    max_new_tokens: int = Field(64, ge=1)
    """The longest caption, in tokens of the captioner's language model."""
    num_beams: int = Field(1, ge=1)
    """Beams of the search; 1 is greedy."""
    no_repeat_ngram_size: int = Field(0, ge=0)
    """A caption never repeats so many of its tokens in a row; 0 allows it."""


class Draw(Style):
    """A style whose caption is drawn by lot; no experiment file says so, relabelling asks for it after a fault."""

    temperature: float
    seeds: list[int]
    """One for each image."""


DEFAULT_STYLES = {
    "short": Style(prompt="A short caption:", max_new_tokens=32),
    "long": Style(prompt="A detailed caption:", max_new_tokens=96),
    "rich": Style(prompt="A rich description:", max_new_tokens=256),
}


# --- loading -------------------------------------------------------------------------------------------------------


def load(path: Path | None, overrides: Iterable[str], model: type[T], **values: Any) -> T:
    """Read an experiment file, if there is one, apply `a.b=c` overrides and other values, and check it whole."""
    content = _read(path) if path else {}
    for override in overrides:
        _set(content, override)
    content |= values
    content.setdefault("name", path.stem if path else "recap")
    return validate(content, model, str(path or "the command line"))


def tell_apart(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """What was given on the command line → paths or the like, and values that override the file's."""
    given = list(arguments)
    overrides = [each for each in given if OVERRIDE.match(each) and not Path(each).exists()]
    return [each for each in given if each not in overrides], overrides


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no experiment file at {path}: see configs/ for those that come with recap") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError, RecursionError) as error:
        raise UserError(f"{path} is not a TOML file: {error}") from None


def validate(content: dict[str, Any], model: type[T], where: str) -> T:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, model)}") from None


def _set(content: dict[str, Any], override: str) -> None:
    """Apply `train.lr=1e-5`. The value is TOML; what is not TOML is taken as a string."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"{override!r} is not an override: write table.key=value, e.g. train.lr=1e-5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, key = dotted.split(".")
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise UserError(f"{dotted}: {table} is a value, not a table")
    content[key] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem in one line; for an unknown key, with the nearest known one."""
    first = error.errors()[0]
    *parents, last = [str(part) for part in first["loc"]] or [""]
    dotted = ".".join([*parents, last])
    if first["type"] == "extra_forbidden":
        known = _keys(model, parents)
        near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*parents, near[0]])}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {dotted}: {hint}"
    if first["type"] == "missing":
        return f"{dotted} is missing: set it in the file or give {dotted}=…"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    if not dotted:
        return message
    of_a_table = first["type"] == "value_error" and isinstance(first["input"], dict)  # such a rule names its keys
    found = "" if of_a_table else f", not {first['input']!r:.80}"
    return f"{dotted}: {message}{found}{more}"


def _keys(model: Any, parents: list[str]) -> list[str]:
    """The field names of the table that `parents` leads to."""
    for parent in parents:
        field = model.model_fields.get(parent) if hasattr(model, "model_fields") else None
        if field is not None:
            model = field.annotation
        if args := getattr(model, "__args__", None):  # dict[str, Style] or Style | None → Style
            model = next((a for a in reversed(args) if hasattr(a, "model_fields")), model)
    return list(getattr(model, "model_fields", {}))
