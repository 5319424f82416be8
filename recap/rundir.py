"""A stage's folder: `config.json` first, `log.jsonl` while it runs, `done.json` last.

Stages meet only in files. A stage is done when its `done.json` is there and bears the fingerprint of what the stage
would read now; a folder with another fingerprint is never mixed with new results.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from recap.errors import UserError
from recap.progress import is_main
from recap.storage import clean, write_json

CHECKPOINTS = ("checkpoint", ".checkpoint.old", ".checkpoint.tmp")
"""What a training keeps in its stage's folder while it runs."""
MAX_TOLD = 100
"""Characters of a value that has changed."""
State = Literal["done", "begun", "new", "changed"]
Stale = Literal["refuse", "redo", "go_on"]
"""What to do with that which was made with other settings: refuse to run, make it again, or keep it and go on."""


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Keep other commands out of a run's folder; a killed command lets go of it by itself.

    Raises:
        UserError: another command is at work there.
    """
    if not is_main():  # the ranks of one training share the folder, and only the first one writes
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a") as file:
        # A worker that is forked would hold the lock, too, and for a while after this process was killed.
        os.register_at_fork(after_in_child=file.close)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another recap is at work in {run}: wait for it, or choose another name=…") from None
        yield


def digest(content: Any) -> str:
    """A short stable hash of JSON-like content."""
    text = json.dumps(content, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """For `json.dumps`."""
    return value.model_dump() if isinstance(value, BaseModel) else str(value)


def folder_identity(path: Path) -> list[list[Any]]:
    """Names, sizes and times of the files below a folder (a checkpoint, a folder of images)."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [[printable(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def printable(path: Path) -> str:
    """A path as text that any encoding takes, whatever bytes its name is of."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def hash_files(path: Path) -> str:
    """SHA-256 over names and contents of the files in a folder: what a result says it was made with."""
    whole = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        whole.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as content:
            whole.update(hashlib.file_digest(content, "sha256").digest())
    return whole.hexdigest()[:16]


def hash_file(path: Path) -> str:
    """SHA-256 over the content of one file."""
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


@dataclass(frozen=True)
class StageDir:
    """The folder of one stage of one run."""

    path: Path
    reads: dict[str, Any]
    """All that the stage reads, and nothing else: its tables, its inputs, its checkpoints. JSON-like."""

    @property
    def fingerprint(self) -> str:
        return digest(self.reads)

    def state(self) -> State:
        found = _read(self.path / "config.json")
        if found is None:
            return "new"
        if found.get("fingerprint") != self.fingerprint:
            return "changed"
        return "done" if _read(self.path / "done.json") is not None else "begun"

    def changes(self) -> list[str]:
        """Which values differ from those the folder was begun with: `train.lr: 1e-05 → 2e-05`."""
        before = _flat((_read(self.path / "config.json") or {}).get("reads", {}))
        now = _flat(json.loads(json.dumps(self.reads, default=plain)))
        return [f"{key}: {_told(before.get(key), now.get(key))}" for key in sorted(before.keys() | now.keys())
                if before.get(key) != now.get(key)]

    def begin(self) -> None:
        """Write what the stage reads, also over that of a stage that goes on with other settings; remove what a killed
        try has left half written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        clean(str(self.path))
        (self.path / "done.json").unlink(missing_ok=True)
        reads = json.loads(json.dumps(self.reads, default=plain))
        write_json(str(self.path / "config.json"), {"fingerprint": self.fingerprint, "reads": reads})

    def log(self, **event: Any) -> None:
        """Append one line to `log.jsonl`. A line is one write, so a kill can only cut the last."""
        line = json.dumps({"time": round(time.time(), 3), **event}, ensure_ascii=False) + "\n"
        with open(self.path / "log.jsonl", "ab", buffering=0) as file:
            file.write(line.encode())

    def finish(self, result: dict[str, Any]) -> None:
        """Mark the stage as done; then, and not before, delete what it needed only to go on after a stop."""
        write_json(str(self.path / "done.json"), {"fingerprint": self.fingerprint, **result})
        for name in CHECKPOINTS:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def result(self) -> dict[str, Any]:
        return _read(self.path / "done.json") or {}

    def clear(self) -> None:
        """Delete the folder; renamed first, so that what half a deletion leaves is not taken for new results."""
        doomed = self.path.with_name(f".{self.path.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        self.path.rename(doomed)
        shutil.rmtree(doomed)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        os.replace(path, path.with_suffix(".broken"))  # never written by us: written files are whole
        return None
    return found if isinstance(found, dict) else None


def _told(before: Any, now: Any) -> str:
    """A change in few words; of lists, as of a folder's files, which of them differ."""
    if isinstance(before, list) and isinstance(now, list) and len(f"{before}{now}") > MAX_TOLD:
        known, new = ({json.dumps(each) for each in every} for every in (before, now))
        number, first = max(len(known - new), len(new - known)), min(new - known or known - new, default=None)
        return f"{number} of {len(now)} differ, {_cut(json.loads(first))} first" if first else "another order"
    return f"{_cut(before)} → {_cut(now)}"


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_TOLD else f"{text[:MAX_TOLD]}…"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: leaf for name, child in value.items()
            for key, leaf in _flat(child, f"{prefix}.{name}" if prefix else str(name)).items()}
