"""Webdataset shards: their names, and reading and writing them.

A shard is a tar whose neighbouring members share a key: `KEY.jpg KEY.txt KEY.json`. What is written is deterministic
(no time, no owner), so equal samples give equal bytes; and atomic, so a shard under its final name is whole.
"""

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Self, cast

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from recap import storage
from recap.errors import UserError
from recap.sample import Sample
from recap.storage import (
    discard,
    identities,
    is_local,
    open_read,
    publish,
    read_bytes,
    room_for,
    temporary,
    write_bytes,
)

MAX_MEMBER_BYTES = 256 * 2**20
"""Of a member, and of all members of a sample, which the memory holds."""
MAX_HEADER_BYTES = 2**20
"""Of what a tar says of a member beside its 512 bytes: long names, pax headers."""
MAX_COUNTED = 64
"""Shards whose headers are read for a bar."""
LISTS = (".txt", ".list")
"""How the name of a list of shards ends."""
# As webdataset splits names: the key ends at the first dot of the file's own name.
KEY_AND_EXTENSION = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]+)$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Reject:
    """A sample that was not used, and why."""

    shard: str
    key: str
    reason: str
    detail: str = ""


# --- names ---------------------------------------------------------------------------------------------------------


def expand(patterns: str | Iterable[str], where: str = "data.shards") -> list[str]:
    """Patterns → the shards they name, each once, in order.

    Braces (`{00000..00009}`), globs, and lists (`.txt`, `.list`: a path, URL or pattern a line); local or remote.

    Raises:
        UserError: a pattern that names nothing, a file that is not there, a shard without a name of its own (`.tar`),
            or two of one name (outputs and seeds go by the name).
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return expand_files([line for pattern in patterns for line in (
        _lines(pattern, where) if pattern.endswith(LISTS) else [pattern])], where)


def expand_files(patterns: list[str], where: str) -> list[str]:
    """The same of files of any kind: a text file is no list of others."""
    if not patterns:
        raise UserError(f"{where} is empty: give at least one, e.g. {where}='shards/*.tar'")
    urls = [(url, pattern) for pattern in patterns for url in _expand_one(pattern, where)]
    there = identities(url for url, _ in urls)
    by_name: dict[str, str] = {}
    for url, pattern in urls:
        if url not in there:
            raise UserError(f"{where}: nothing at {url}: check the path{_source(url, pattern)}")
        if shard_name(url) in ("", ".", ".."):
            raise UserError(f"{where}: {url} has no name before its .tar, by which what is made of it goes: rename it")
        other = by_name.setdefault(shard_name(url), url)
        if other != url:
            raise UserError(f"{where}: {other} and {url} share the name {shard_name(url)!r}: rename one of them")
    return list(by_name.values())


def _lines(name: str, where: str) -> list[str]:
    """The shards that a list names; lines that begin with # are remarks."""
    try:
        text = read_bytes(name).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{where}: no list of shards at {name}: check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: {name} is no list of shards: write a path, URL or pattern a line") from None
    lines = map(str.strip, text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _expand_one(pattern: str, where: str) -> Iterator[str]:
    """What a pattern names; whether it is there, is not yet known of single files."""
    try:
        names = list(braceexpand(pattern))
    except UnbalancedBracesError:
        raise UserError(f"{where}: the braces of {pattern!r} do not close: write e.g. '{{00000..00009}}.tar'") from None
    for name in names:
        if not any(c in name for c in "*?["):
            yield name
            continue
        found = sorted(filter(os.path.isfile, glob.glob(name))) if is_local(name) else storage.glob(name)
        if not found:
            raise UserError(f"{where}: nothing at {name}: check the path{_source(name, pattern)}")
        yield from found


def _source(name: str, pattern: str) -> str:
    return f" (from {pattern})" if name != pattern else ""


def shard_name(url: str) -> str:
    """`s3://bucket/00000.tar` → `00000`; what a web address has after a `?` is not of the name."""
    path = url.partition("?")[0] if url.startswith(("http://", "https://")) else url
    return PurePosixPath(path).name.removesuffix(".tar")


# --- reading -------------------------------------------------------------------------------------------------------


def read_shard(url: str, rejects: list[Reject]) -> Iterator[Sample]:
    """Stream the samples of a shard, in file order; what is malformed is appended to `rejects`.

    A truncated shard gives the samples before the cut; the sample at the cut is rejected as `truncated_shard`.
    """
    shard = shard_name(url)
    seen: set[str] = set()
    key: str | None = None
    members, offsets, faults = {}, {}, []  # type: dict[str, bytes], dict[str, int], list[tuple[str, str]]

    def finish(key: str) -> Iterator[Sample]:
        if key in seen:
            rejects.append(Reject(shard, key, "duplicate_key"))
        elif faults:
            rejects.append(Reject(shard, key, *faults[0]))
        else:
            yield Sample(shard, key, members, offsets)
        seen.add(key)

    for name, content, offset, fault in _read_members(url):
        found = KEY_AND_EXTENSION.match(name)
        member_key, extension = (found[1], found[2]) if found else (name, "")
        if member_key != key:
            if key is not None:
                yield from finish(key)
            key, members, offsets, faults = member_key, {}, {}, []
        fault = fault or _name_fault(name, extension, members) or _size_fault(content, members)
        if fault:
            faults.append(fault)
            members.clear()  # nobody will read them
        else:
            members[extension], offsets[extension] = content, offset
    if key is not None:
        yield from finish(key)


def count_images(urls: list[str]) -> int | None:
    """About how many samples the shards hold, for a bar. None where one is remote.

    From local tars' headers; of more than MAX_COUNTED shards, by their sizes, from so many of them.
    """
    if not all(map(is_local, urls)):
        return None
    step = -(-len(urls) // MAX_COUNTED)
    counted = urls[::step or 1]
    found = sum(map(_count_keys, counted))
    if step <= 1:
        return found
    return round(found * sum(map(os.path.getsize, urls)) / max(1, sum(map(os.path.getsize, counted))))


def _count_keys(path: str) -> int:
    try:
        with tarfile.open(path, tarinfo=_Member) as tar:  # jumps from header to header, reads no content
            keys = set()
            for info in tar:
                if info.size < 0:  # tarfile would read the same header for ever
                    break
                if found := KEY_AND_EXTENSION.match(info.name):
                    keys.add(found[1])
            return len(keys)
    except Exception:  # noqa: BLE001  (a damaged shard is reported when it is read; this is only for a bar)
        return 0


def _name_fault(name: str, extension: str, members: dict[str, bytes]) -> tuple[str, str] | None:
    if not name.isprintable():  # control characters, or bytes that are no UTF-8, which no other tar could carry on
        return "unsafe_key", ascii(name)
    if not extension:
        return "no_extension", name
    if name.startswith("/") or ".." in name.split("/"):
        return "unsafe_key", f"{name!r} would be extracted outside its folder"
    if extension in members:
        return "duplicate_member", name
    return None


def _size_fault(content: bytes, members: dict[str, bytes]) -> tuple[str, str] | None:
    size = len(content) + sum(map(len, members.values()))
    return ("oversized_sample", f"over {MAX_MEMBER_BYTES:,} bytes in all") if size > MAX_MEMBER_BYTES else None


def _read_members(url: str) -> Iterator[tuple[str, bytes, int, tuple[str, str] | None]]:
    """Yield (name, content, where in the file it begins, fault) for every member that is not a folder."""
    name, end = "", 0
    try:
        with open_read(url) as file:
            stream = _Tail(file)
            try:
                # A block at a time, so that what follows the end-of-archive mark is still there to be seen.
                with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|", bufsize=tarfile.BLOCKSIZE,
                                  tarinfo=_Member) as tar:
                    for info in tar:
                        if info.size < 0:
                            raise tarfile.ReadError(f"a member of {info.size} bytes")
                        has_content = info.isfile() and not info.issparse()
                        name, end = info.name, info.offset_data + (info.size if has_content else 0)
                        if info.isdir() or PurePosixPath(name).name.startswith("._"):  # what macOS adds to every file
                            continue
                        if not has_content:
                            yield name, b"", 0, ("not_a_file", "a link, a device or a sparse file")
                        elif info.size > MAX_MEMBER_BYTES:
                            yield name, b"", 0, ("oversized_member", f"{info.size:,} bytes in {name}")
                        else:
                            content = cast(IO[bytes], tar.extractfile(info)).read()
                            yield name, content, info.offset_data, None
                # tarfile takes a damaged header, and the end of the file, for the end of the tar.
                if any(stream.last) or stream.position < end + tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("no end-of-archive mark")
                if stream.has_more():
                    raise tarfile.ReadError("more data after the end-of-archive mark")
            except (tarfile.TarError, EOFError, ValueError, RecursionError, MemoryError, OverflowError) as error:
                if isinstance(file, storage.Remote):
                    file.check_unchanged()  # else the rest of another shard would be taken for damage
                fault = ("truncated_shard", f"{error}, at byte {stream.position:,} of {url}")
                yield name or shard_name(url), b"", 0, fault
    except FileNotFoundError:
        raise UserError(f"no shard at {url}: it was there when the run began; put it back and run again") from None


class _Member(tarfile.TarInfo):
    """A header; one with more to say than memory should hold is damage."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
                         tarfile.SOLARIS_XHDTYPE) and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


class _Tail:
    """A reader that remembers how far it got and the last 512 bytes; a whole tar ends in a block of zeros."""

    def __init__(self, file: IO[bytes] | storage.Remote) -> None:
        self.file, self.position, self.last, self.empty_reads = file, 0, b"", 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.position += len(data)
        self.last = (self.last + data)[-512:]
        self.empty_reads = 0 if data else self.empty_reads + 1
        if self.empty_reads > 100:  # tarfile skips a member of 2⁷⁰ bytes by as many empty reads
            raise EOFError("the file ends before its members do")
        return data

    def has_more(self) -> bool:
        """Whether anything but zeros is left."""
        return any(any(data) for data in iter(lambda: self.file.read(2**20), b""))


# --- writing -------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Write a shard under a temporary name; leaving the `with` block without an error gives it its final one."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._temporary = temporary(url)
        self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed in __exit__)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def write(self, sample: Sample) -> None:
        for extension, content in sample.members.items():
            info = tarfile.TarInfo(f"{sample.key}.{extension}")  # its defaults: time 0, owner 0
            info.size = len(content)
            with room_for(self._temporary):
                self._tar.addfile(info, io.BytesIO(content))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            with room_for(self._temporary):
                with self._file:
                    if kind is None:
                        self._tar.close()
                if kind is None:
                    publish(self._temporary, self.url)
        except (OSError, UserError):
            if kind is None:  # else what went wrong is told of already
                raise
        finally:
            discard(self._temporary, self.url)


def write_rejects(url: str, rejects: list[Reject]) -> None:
    """A quarantine file: one JSON object a line (shard, key, reason, detail)."""
    # Keys come from the web and may hold lone surrogates, which only the escaped form can carry.
    write_bytes(url, "".join(json.dumps(asdict(reject)) + "\n" for reject in rejects).encode())


def read_rejects(path: Path) -> list[Reject]:
    """What a quarantine file lists; nothing where there is none."""
    return [Reject(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []
