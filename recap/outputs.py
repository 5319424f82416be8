"""What relabelling writes: shards, tables of captions only, or folders of images with their captions in text files.

Each is written for a shard at a time, and is there whole or not at all.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from recap.caption_tables import TableWriter, table_url
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import ShardWriter
from recap.storage import discard, is_local, publish, temporary

Format = Literal["shards", "parquet", "folder"]
MAX_NAME, MAX_PART = 200, 120
"""Bytes of a file's name without extensions, and of what an escaped one shows of the key; file systems allow 255."""
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
RESERVED = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)
"""Devices of Windows, whatever their extension."""


class Output(Protocol):
    """Where the samples of a shard go, in their order."""

    def write(self, sample: Sample) -> None: ...


def open_output(kind: Format, folder: str, shard: str, styles: Iterable[str],
                folder_caption: str) -> AbstractContextManager[Output]:
    """The output for one shard. Leaving its block without an error publishes it; with one, nothing is left.

    Args:
        kind: `relabel.format`.
        folder: or URL, in which it is to be.
        shard: its name.
        styles: for a `parquet`: the captions that it holds, beside the mix.
        folder_caption: for a `folder`: which caption `KEY.txt` holds.
    """
    url = written(kind, folder, shard)
    if kind == "parquet":
        return TableWriter(url, [*styles, "mix"])
    return ShardWriter(url) if kind == "shards" else FolderWriter(url, folder_caption)


def written(kind: Format, folder: str, shard: str) -> str:
    """Where the output for a shard is, once it is published."""
    if kind == "parquet":
        return table_url(folder, shard)
    return f"{folder}/{shard}.tar" if kind == "shards" else f"{folder}/{shard}"


class FolderWriter:
    """Write `KEY.jpg`, `KEY.txt` and `KEY.recap.json`; a key that no file can be called by is escaped."""

    def __init__(self, folder: str, caption: str) -> None:
        if not is_local(folder):
            raise UserError(f"relabel.output: {folder} is remote, where relabel.format=folder can't write: give a "
                            "local folder, or set relabel.format=shards")
        self.folder, self.caption = Path(folder), caption
        _check_own(self.folder)
        self._temporary = temporary(folder)
        discard(self._temporary, folder)
        self._temporary.mkdir()
        self._names: set[str] = set()

    def write(self, sample: Sample) -> None:
        texts = _texts(sample)
        name = file_name(sample.key, self._names)
        self._names.add(name.casefold())
        record: dict[str, Any] = json.loads(sample.members.get("recap.json", b"{}"))
        record |= {"texts": texts, "key": sample.key}
        path = self._temporary / name
        path.with_name(f"{name}.{sample.image_extension.lower()}").write_bytes(sample.image_bytes)
        path.with_name(f"{name}.txt").write_text(texts[self.caption], encoding="utf-8")
        path.with_name(f"{name}.recap.json").write_text(json.dumps(record), encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            discard(self._temporary, str(self.folder))

    def _publish(self) -> None:
        os.sync()  # once, not for each of thousands of small files
        earlier = temporary(f"{self.folder}.earlier")  # a folder can't be replaced; what a kill leaves is cleaned up
        if self.folder.is_dir():
            self.folder.rename(earlier)
        publish(self._temporary, str(self.folder))
        discard(earlier, str(self.folder))


def file_name(key: str, taken: set[str]) -> str:
    """A key as the name of a file, on any file system; one that has to be escaped ends in its hash.

    Args:
        key: of the sample.
        taken: names of other samples, in lower case: many file systems do not tell `A` from `a`.
    """
    plain = PLAIN.fullmatch(key) and len(key) <= MAX_NAME and not RESERVED.fullmatch(key)
    if plain and key.casefold() not in taken:
        return key
    part = re.sub(r"[^\w-]+", "_", key).encode()[:MAX_PART].decode(errors="ignore")
    return f"{part}~{hashlib.sha256(key.encode()).hexdigest()[:32]}"  # no plain key has a ~


def _texts(sample: Sample) -> dict[str, str]:
    """All captions that can be read, by kind."""
    texts = {}
    for extension in sample.members:
        kind = "alt" if extension.lower() == "txt" else extension.removesuffix(".txt")
        if kind == extension:
            continue
        if (text := sample.readable(kind)) is not None:
            texts[kind] = text
    return texts


def _check_own(folder: Path) -> None:
    """Refuse to replace a folder that an earlier try did not write."""
    if not folder.exists():
        return
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [""]
    own = {name.removesuffix(".recap.json") for name in names if name.endswith(".recap.json")}
    other = next((name for name in names if name.split(".")[0] not in own), None)
    if other is not None:
        raise UserError(f"relabel.output: {folder / other} was not written by relabelling, which would replace it: "
                        "choose another relabel.output")
