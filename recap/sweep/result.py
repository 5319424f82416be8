"""What a sweep found: for the terminal, and to paste into a command line."""

import json
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from typing import Any

from recap.sweep.space import Values
from recap.sweep.study import Trial, direction


def overrides(values: Values) -> str:
    """Values as arguments of the command line: `finetune.lr=1e-05 finetune.batch_size=16`, quoted for a shell."""
    return " ".join(shlex.quote(f"{key}={_override(value)}") for key, value in _leaves(values, ""))


def _leaves(values: Values, prefix: str) -> Iterator[tuple[str, Any]]:
    """A table as its keys: given whole, it would replace the file's, and a trial's goes into it."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _override(value: Any) -> str:
    if not isinstance(value, str):
        return _toml(value)
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return value  # a bare word, which the command line takes as a string
    return _toml(value)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def table(result: dict[str, Any], width: int = 80) -> str:
    """For the terminal: a line a trial, best first, then those that failed and why."""
    metric = result["metric"]
    rows = [f"{'trial':<10} {metric:>10} {'seconds':>9}  values"]
    for entry in sorted(result["trials"], key=lambda entry: rank(entry, metric)):
        found = f"{entry['metric']:.4f}" if entry["state"] == "complete" else entry["state"]
        seconds = "" if entry["seconds"] is None else f"{entry['seconds']:.1f}"
        head = f"{entry['name']:<10} {found:>10} {seconds:>9}  "
        rows += textwrap.wrap(shown(entry["values"]), width, initial_indent=head, subsequent_indent=" " * len(head))
        if entry["reason"]:
            rows += textwrap.wrap(entry["reason"], width, initial_indent=" " * 4, subsequent_indent=" " * 4)
    return "\n".join(rows)


def rank(entry: dict[str, Any], metric: str) -> tuple[int, float, int]:
    """The best first; of equals, the earlier."""
    if entry["state"] != "complete":
        return 1, 0.0, entry["number"]
    return 0, entry["metric"] if direction(metric) == "minimize" else -entry["metric"], entry["number"]


def line(trial: Trial, metric: str) -> str:
    found = f"{metric} {trial.metric:.4f}" if trial.metric is not None else f"failed: {trial.reason}"
    return f"{trial.name}  {shown(trial.values)}  {found}"


def shown(values: Values) -> str:
    """`lr=0.0001 batch_size=16`: keys by their last name where that tells them apart."""
    last = [key.rpartition(".")[2] for key in values]
    names = [name if last.count(name) == 1 else key for key, name in zip(values, last, strict=True)]
    return " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                    for name, value in zip(names, values.values(), strict=True))
