"""Files wherever they are: on this machine, or through fsspec on S3, GCS, the hub or the web.

A network fails in many ways: requests are refused, cut short, or never answered. All that is asked of one is asked
again, a bounded number of times, and so far as it has not been answered. What is written is there whole or not at all.
"""

import errno
import functools
import io
import json
import os
import random
import re
import shutil
import socket
import tempfile
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self, TypeVar

import fsspec

from recap.errors import UserError

TRIES = 8
"""Of what fails, in a row."""
FIRST_WAIT, LAST_WAIT = 0.5, 60.0
"""Seconds before the second try; twice as many before each further one, up to so many."""
STALL = 60.0
"""Seconds without an answer to a request of BLOCK bytes at most, after which it counts as failed."""
LONG_STALL = 900.0
"""The same of a listing, or of a file that is written, which are one request as far as can be seen from here."""
BLOCK = 8 * 2**20
"""Bytes that are asked for at once."""
LISTED_FROM = 8
"""Files of one folder from which on it is listed, instead of asking for each."""
Identity = list[str | int]
"""What tells one version of a file from another without reading it: name, size, and time or etag."""
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "last_modified", "mtime")
"""What storages call it."""
NETWORKS = {"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "httpx", "httpx2", "huggingface_hub",
            "requests", "s3fs", "urllib3"}
"""Packages whose exceptions mean that something went wrong elsewhere."""
OLD = 7 * 86400.0
"""Seconds after which a file that nobody has gone on with is left over, whoever built it."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system says of a disk that holds no more, or no more of this user."""
T = TypeVar("T")


# --- asking, and asking again --------------------------------------------------------------------------------------


def _patiently(what: str, url: str, ask: Callable[[], T], seconds: float | None = None) -> T:
    """What `ask` returns, which is asked again where it fails or is not answered in time.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: asking again would not help, or has not.
    """
    for number in count(1):
        try:
            return _in_time(ask, STALL if seconds is None else seconds)
        except Exception as error:  # noqa: BLE001
            _wait_or_raise(what, url, error, number)
    raise AssertionError


def _wait_or_raise(what: str, url: str, error: Exception, tries: int) -> None:
    """Wait before the next try; or raise, where there is to be none."""
    is_of_network = isinstance(error, OSError | EOFError) or type(error).__module__.partition(".")[0] in NETWORKS
    if isinstance(error, FileNotFoundError) or not is_of_network:
        raise error
    if _is_refused(error):
        raise UserError(f"cannot {what} {url} ({_said(error)}): check the address, and the credentials in the "
                        "environment") from error
    if tries == TRIES:
        raise UserError(f"cannot {what} {url}, after {TRIES} tries ({_said(error)}): see whether the network and the "
                        "server are well, and run the same command again") from error
    time.sleep(min(LAST_WAIT, FIRST_WAIT * 2 ** (tries - 1)) * random.uniform(0.5, 1))


def _is_refused(error: Exception) -> bool:
    """Whether the server would say the same again."""
    answer = getattr(error, "response", error)
    names = ("status", "status_code", "code")  # aiohttp's, the hub's, gcsfs's
    status = next((getattr(answer, name) for name in names if hasattr(answer, name)), None)
    return (isinstance(error, PermissionError)
            or re.search("Credentials|ParamValidation|OfflineMode", type(error).__name__) is not None
            or str(error).startswith("Forbidden: ")  # gcsfs's 403
            or (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)))


def _begin(ask: Callable[[], T]) -> "Future[T]":
    """Ask in a thread that nobody need wait for, at the end of the process neither."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # noqa: BLE001  (raised where it is waited for)
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


def _in_time(ask: Callable[[], T], seconds: float) -> T:
    """The answer; one that comes too late is not waited for, whoever holds it up."""
    answer = _begin(ask)
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():  # the server's, or the library's
            raise
        raise TimeoutError(f"no answer in {seconds:g} s") from None


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def is_local(url: str) -> bool:
    return "://" not in url


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    protocol = fsspec.utils.get_protocol(url)
    try:
        kind = fsspec.get_filesystem_class(protocol)
        options = kind._get_kwargs_from_urls(url)
        # What isn't made for threads, such as the hub's, is made anew: it remembers listings, whatever it is told.
        make = _file_system if kind.async_impl else _file_system.__wrapped__
        return make(protocol, json.dumps(options)), kind._strip_protocol(url)
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}.get(protocol)
        needed = f"pip install 'recap-t2i[{extra}]'" if extra else str(error)
        raise UserError(f"{url} needs a package that is not installed: {needed}") from error
    except ValueError as error:
        raise UserError(f"{url}: {_said(error)}: write a path, s3://…, gs://…, hf://… or https://…") from error


@functools.cache
def _file_system(protocol: str, options: str) -> Any:
    """One for all threads: fsspec would keep one for each, with connections of its own. Nothing listed is kept."""
    return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, **json.loads(options))


os.register_at_fork(after_in_child=_file_system.cache_clear)  # its connections and its loop stay with the parent


# --- what is there -------------------------------------------------------------------------------------------------


def names(folder: str) -> set[str]:
    """Of the files and folders in a folder; none where there is no such folder. UserError where it is a file."""
    try:
        if is_local(folder):
            return {path.name for path in Path(folder).iterdir()}
        fs, path = _opened(folder)
        listed = _patiently("list", folder, lambda: fs.ls(path, detail=False), LONG_STALL)
        return {PurePosixPath(name).name for name in listed}
    except FileNotFoundError:
        return set()
    except NotADirectoryError:
        raise UserError(f"{folder} is no folder: choose another, or move the file that is there") from None


def identities(urls: Iterable[str]) -> dict[str, Identity]:
    """URL → identity, of those files that are there. Of many in one remote folder, by one listing."""
    found: dict[str, Identity] = {}
    by_folder: dict[str, list[str]] = defaultdict(list)
    for url in urls:
        if not is_local(url):
            by_folder[url.rsplit("/", 1)[0]].append(url)
        elif os.path.isfile(url):
            stat = os.stat(url)
            found[url] = [PurePosixPath(url).name, stat.st_size, stat.st_mtime_ns]
    with ThreadPoolExecutor(32) as pool:
        single = [url for folder, some in by_folder.items() if not _is_listed(folder, some) for url in some]
        infos = {url: info for url, info in zip(single, pool.map(_info, single), strict=True) if info}
    for folder, some in by_folder.items():
        if _is_listed(folder, some):
            listed = _list(folder)
            infos |= {url: listed[url.rsplit("/", 1)[1]] for url in some if url.rsplit("/", 1)[1] in listed}
    return found | {url: _identity(url, info) for url, info in infos.items()}


def _is_listed(folder: str, urls: list[str]) -> bool:
    return len(urls) >= LISTED_FROM and not folder.startswith("http")  # web servers list nothing, or anything


def _list(folder: str) -> dict[str, dict[str, Any]]:
    fs, path = _opened(folder)
    with suppress(FileNotFoundError):
        listed = _patiently("list", folder, lambda: fs.ls(path, detail=True), LONG_STALL)
        return {PurePosixPath(info["name"]).name: info for info in listed if info["type"] == "file"}
    return {}


def _info(url: str) -> dict[str, Any] | None:
    fs, path = _opened(url)
    with suppress(FileNotFoundError):
        info: dict[str, Any] = _patiently("find", url, lambda: fs.info(path))
        return info if info.get("type") == "file" else None
    return None


def _identity(url: str, info: dict[str, Any]) -> Identity:
    size = info.get("size")
    version = next((str(info[name]) for name in VERSIONS if info.get(name)), "")
    path = url.partition("?")[0] if url.startswith("http") else url  # a signature is another every day
    return [PurePosixPath(path).name, -1 if size is None else int(size), version]


def exists(url: str) -> bool:
    return bool(identities([url]))


def identity(url: str) -> Identity:
    """Of a file; FileNotFoundError where it is not there."""
    try:
        return identities([url])[url]
    except KeyError:
        raise FileNotFoundError(url) from None


def glob(pattern: str) -> list[str]:
    """The files that a remote pattern names, sorted."""
    fs, path = _opened(pattern)
    return sorted(fs.unstrip_protocol(name) for name in _patiently("list", pattern, lambda: fs.glob(path), LONG_STALL))


# --- reading -------------------------------------------------------------------------------------------------------


def read_bytes(url: str) -> bytes:
    """A whole file; FileNotFoundError where it is not there."""
    if is_local(url):
        return Path(url).read_bytes()
    fs, path = _opened(url)
    content: bytes = _patiently("read", url, lambda: fs.cat_file(path))
    return content


def open_seekable(url: str) -> IO[bytes]:
    """A file, to be read in any order, and closed; a remote one is held in the memory. FileNotFoundError as before."""
    if is_local(url):
        return open(url, "rb")
    with Remote(url) as file:
        return io.BytesIO(file.read())


def open_read(url: str) -> "IO[bytes] | Remote":
    """A file, to be read from its beginning on, and closed; FileNotFoundError where it is not there."""
    return open(url, "rb") if is_local(url) else Remote(url)


class Remote:
    """A remote file, read block by block; the next one is asked for while one is read.

    Raises:
        UserError: it cannot be read, or it is another one than it was at the beginning.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self.path = _opened(url)
        info = _info(url)
        if info is None:
            raise FileNotFoundError(url)
        self.identity = _identity(url, info)
        self.size = int(self.identity[1])
        has_parts = self.size >= 0 and (not url.startswith("http") or info.get("partial"))
        self.blocks = self._blocks() if has_parts else self._from_the_start()
        self.rest = memoryview(b"")

    def read(self, size: int = -1, /) -> bytes:
        """So many bytes, or as many as are left."""
        parts: list[memoryview] = []
        while size:
            self.rest = self.rest or memoryview(next(self.blocks, b""))
            if not self.rest:
                break
            part = self.rest[:size] if size > 0 else self.rest
            self.rest = self.rest[len(part):]
            parts.append(part)
            size -= len(part) if size > 0 else 0
        return b"".join(parts)

    def close(self) -> None:
        self.blocks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _blocks(self) -> Generator[bytes, None, None]:
        """By requests for parts, each of which can be made again."""
        blocks = (functools.partial(self._block, start) for start in range(0, self.size, BLOCK))
        coming = [_begin(block) for block in islice(blocks, 1)]
        while coming:
            block = coming.pop().result()
            coming = [_begin(block) for block in islice(blocks, 1)]
            if not coming:
                self.check_unchanged()
            yield block

    def _block(self, start: int) -> bytes:
        end = min(start + BLOCK, self.size)

        is_again = False

        def ask() -> bytes:
            nonlocal is_again
            if is_again and not self._is_unchanged():
                raise self._changed()
            is_again = True
            block: bytes = self.fs.cat_file(self.path, start=start, end=end)
            if len(block) != end - start:
                raise EOFError(f"{len(block):,} of {end - start:,} bytes")
            return block

        try:
            return _patiently("read", self.url, ask)
        except FileNotFoundError:
            raise self._changed() from None

    def _from_the_start(self) -> Generator[bytes, None, None]:
        """By one request, as not every web server knows of parts; after a failure, without what was given before."""
        given, tries = 0, 0
        while True:
            begun = given
            try:
                for block in self._stream(given):
                    given += len(block)
                    yield block
                if self.size >= 0 and given < self.size:
                    raise EOFError(f"{given:,} of {self.size:,} bytes")
                return
            except Exception as error:  # noqa: BLE001
                tries = 1 if given > begun else tries + 1
                _wait_or_raise("read", self.url, error, tries)
                self.check_unchanged()

    def _stream(self, start: int) -> Iterator[bytes]:
        with _in_time(lambda: self.fs.open(self.path, block_size=0), STALL) as file:
            position = 0
            while block := _in_time(lambda: file.read(BLOCK), STALL):
                if position + len(block) > start:
                    yield block[max(0, start - position):]
                position += len(block)

    def check_unchanged(self) -> None:
        """UserError where the file is another one by now."""
        with suppress(FileNotFoundError):
            if _patiently("find", self.url, self._is_unchanged):
                return
        raise self._changed()

    def _is_unchanged(self) -> bool:
        fs, path = _opened(self.url)
        return _identity(self.url, fs.info(path)) == self.identity

    def _changed(self) -> UserError:
        return UserError(f"{self.url} was changed while it was read: let nobody write to it, and run the same command "
                         "again")


# --- writing -------------------------------------------------------------------------------------------------------


def temporary(url: str) -> Path:
    """Where this process may build a file or folder before it is published; `discard` it in any case, after that."""
    if is_local(url):
        path = Path(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f".{path.name}.{_node()}-{os.getpid()}.tmp")
    if url.startswith("http"):
        raise UserError(f"{url}: nothing can be written to the web: give a folder, s3://… or gs://…")
    _opened(url)  # what is wrong with it is said now
    return Path(tempfile.mkdtemp(prefix=f"recap-{_node()}-{os.getpid()}-")) / PurePosixPath(url).name


def publish(path: Path, url: str) -> None:
    """Give what was built its final name: a rename, or one put to remote storage.

    Raises:
        UserError: there is a folder of that name, or no bucket; or writing has failed too often.
    """
    if is_local(url):
        _sync(path)
        try:
            os.replace(path, url)
        except (IsADirectoryError, NotADirectoryError) as error:
            raise UserError(f"cannot write {url} ({error.strerror}): move what is there, or choose another "
                            "folder") from error
        _sync(Path(url).parent)
        return
    fs, target = _opened(url)

    def put() -> None:
        try:
            fs.put_file(str(path), target)
        except FileNotFoundError as error:
            if "upload" not in str(error):
                raise
            raise EOFError(f"the upload was lost ({error})") from error  # or its end was heard, and not confirmed
        if (size := fs.info(target)["size"]) != path.stat().st_size:
            raise EOFError(f"{size:,} of {path.stat().st_size:,} bytes arrived")

    try:
        _patiently("write", url, put, LONG_STALL)
    except FileNotFoundError as error:
        raise UserError(f"cannot write {url} ({_said(error)}): check the bucket's name") from error


def check_writable(folder: str) -> None:
    """UserError, or what the system says, where nothing can be written to a folder or URL."""
    url = f"{folder}/.written"
    write_bytes(url, b"recap")
    remove(url)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Have a full disk named, in a UserError, while a file is built."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"no space left at {path.parent} ({error.strerror}): free some, and run the same command "
                        "again") from error


def discard(path: Path, url: str) -> None:
    """Remove what was built for a URL, and is not published."""
    if not is_local(url):
        shutil.rmtree(path.parent, ignore_errors=True)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clean(folder: str) -> None:
    """Remove what killed processes of this machine have left half built in a folder, or for a URL."""
    where, pattern = (Path(folder), rf"\..*\.{_node()}-([0-9]+)\.tmp") if is_local(folder) else \
        (Path(tempfile.gettempdir()), rf"recap-{_node()}-([0-9]+)-.*")
    for name in names(str(where)):
        found = re.fullmatch(pattern, name)
        if found and (int(found[1]) == os.getpid() or not _is_running(int(found[1]))):
            discard(where / name, str(where))
        elif re.fullmatch(r"\..*\.[0-9a-f]{8}-[0-9]+\.tmp", name) and _is_old(where / name):
            discard(where / name, str(where))  # of a machine or container that is no more


def _is_old(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > OLD
    return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@functools.cache
def _node() -> str:
    """What names this machine, or container, among those that share a disk."""
    processes = ""
    with suppress(OSError):  # no Linux
        processes = str(Path("/proc/self/ns/pid").readlink())
    return f"{zlib.crc32((socket.gethostname() + processes).encode()):08x}"


def _sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_bytes(url: str, data: bytes) -> None:
    """Write a file whole or not at all."""
    path = temporary(url)
    try:
        with room_for(path):
            path.write_bytes(data)
            publish(path, url)
    finally:
        discard(path, url)


def write_json(url: str, content: Any) -> None:
    write_bytes(url, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def remove(url: str) -> None:
    """Delete a file, if it is there."""
    if is_local(url):
        Path(url).unlink(missing_ok=True)
        return
    fs, path = _opened(url)
    with suppress(FileNotFoundError):
        _patiently("delete", url, lambda: fs.rm_file(path))
