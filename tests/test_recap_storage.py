"""Storage: what is read and written is whole, whatever the network does to it; what can't be mended is one line."""

import functools
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Faulty, faulty, s3

from recap import storage
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import ShardWriter, expand, read_shard
from recap.storage import open_read

CONTENT = bytes(range(256)) * 3000


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small blocks, short waits, and file systems that no other test has used."""
    quick = {"BLOCK": 50_000, "FIRST_WAIT": 0.01, "LAST_WAIT": 0.05, "STALL": 0.6, "LONG_STALL": 1.0}
    for name, value in quick.items():
        monkeypatch.setattr(storage, name, value)
    storage._file_system.cache_clear()
    yield
    storage._file_system.cache_clear()


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    with s3() as port:
        yield port


@pytest.fixture
def bucket(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """An S3 server; requests reach it undisturbed."""
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1",
                        "ENDPOINT_URL": f"http://127.0.0.1:{s3_port}", "MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    return "s3://recap"


@pytest.fixture
def troubled(bucket: str, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """The same, where three requests in ten fail."""
    with faulty(s3_port, 0.3) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield server


@contextmanager
def web(folder: Path, has_ranges: bool) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def send_head(self) -> Any:
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not (has_ranges and span):
                return super().send_head()
            data = Path(self.translate_path(self.path)).read_bytes()[int(span[1]):int(span[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return None

        def end_headers(self) -> None:
            if has_ranges:
                self.send_header("Accept-Ranges", "bytes")
            super().end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with serving(functools.partial(Handler, directory=str(folder))) as url:
        yield url


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()  # soon shut down
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Hub(BaseHTTPRequestHandler):
    """So much of the hub's API as one data set needs, `me/shards`."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    status = 200
    requests = 0

    def do_GET(self) -> None:
        Hub.requests += 1
        path, name = self.path.partition("?")[0], self.path.rpartition("/")[2]
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.status != 200:
            self.answer(self.status, b"{}")
        elif "/tree/" in path:
            self.answer(200, json.dumps([
                {"type": "file", "path": name, "size": len(data), "oid": f"{hash(data)}"}
                for name, data in self.files.items()]).encode())
        elif path.startswith("/api/"):
            self.answer(200, json.dumps({"id": "me/shards", "sha": "0" * 40}).encode())
        elif span:
            self.answer(206, self.files[name][int(span[1]):int(span[2]) + 1])
        else:
            self.answer(200, self.files[name])

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from huggingface_hub import constants
    monkeypatch.setattr(Hub, "files", {"00000.tar": CONTENT})
    monkeypatch.setattr(Hub, "status", 200)
    with serving(Hub) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # which conftest sets; this hub is on loopback
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        yield "hf://datasets/me/shards"


def read(url: str, size: int = 7777) -> bytes:
    with open_read(url) as file:
        return b"".join(iter(lambda: file.read(size), b""))


# --- reading -------------------------------------------------------------------------------------------------------


def test_what_s3_holds_is_read_whole_in_any_portions(bucket: str) -> None:
    storage.write_bytes(f"{bucket}/content", CONTENT)
    assert [read(f"{bucket}/content", size) == CONTENT for size in (512, 60_000, 10**7, -1)] == [True] * 4
    assert storage.read_bytes(f"{bucket}/content") == CONTENT
    storage.write_bytes(f"{bucket}/empty", b"")
    assert read(f"{bucket}/empty") == b""


def test_requests_that_fail_or_stall_lose_and_double_nothing(troubled: Faulty,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BLOCK", 100_000)
    for place in range(3):
        storage.write_bytes(f"s3://recap/troubled/{place}", CONTENT[place:])
    assert [read(f"s3://recap/troubled/{place}") for place in range(3)] == [CONTENT[place:] for place in range(3)]
    assert storage.names("s3://recap/troubled") == {"0", "1", "2"}
    storage.remove("s3://recap/troubled/1")
    assert storage.names("s3://recap/troubled") == {"0", "2"}
    assert set(troubled.counts) == {"served", "refuse", "cut", "lose", "stall"}


@pytest.mark.parametrize("has_ranges", [True, False])
def test_the_web_with_and_without_parts(tmp_path: Path, has_ranges: bool) -> None:
    (tmp_path / "content").write_bytes(CONTENT)
    (tmp_path / "empty").write_bytes(b"")
    with web(tmp_path, has_ranges) as url, faulty(int(url.rsplit(":", 1)[1]), 0.2, seed=1) as server:
        assert read(f"{url}/content") == CONTENT and read(f"{url}/empty") == b""
        assert read(f"http://127.0.0.1:{server.server_address[1]}/content") == CONTENT
        assert server.counts.total() > server.counts["served"]


def test_a_server_without_parts_is_gone_on_with_after_a_cut() -> None:
    answers = iter([70_000, 10_000, 400_000, len(CONTENT)])

    class Cut(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(CONTENT[:next(answers)])
            threading.Event().wait(0.2)  # else the cut would be known before anything was given

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Cut) as url:
        assert read(f"{url}/content") == CONTENT
    assert next(answers, None) is None


class Unreliable(MemoryFileSystem):
    """What each next request comes to: all of it, so many bytes of it, an error, no answer for now, or none at all."""

    protocol = "unreliable"
    plan: list[Any] = []
    is_over = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("unreliable://").lstrip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        found = bytes(super().cat_file(path, start=start, end=end, **options))
        fault = self.plan.pop(0) if self.plan else None
        if fault == "error":
            raise ConnectionResetError("by the peer")
        if fault == "stall":
            threading.Event().wait(0.2)
        if fault == "silence":
            self.is_over.wait(20)
            raise AssertionError("this was waited for")
        return found[:fault] if isinstance(fault, int) else found

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes()[:self.plan.pop(0) if self.plan else None])


@settings(max_examples=60)
@given(content=st.binary(max_size=300), sizes=st.lists(st.integers(1, 100), min_size=1, max_size=5),
       plan=st.lists(st.none() | st.integers(0, 40) | st.sampled_from(["error", "stall"]), max_size=8))
def test_any_faults_leave_the_content_as_it_is(content: bytes, sizes: list[int], plan: list[Any]) -> None:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    fsspec.filesystem("memory").pipe_file("/content", content)
    Unreliable.plan = list(plan)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BLOCK": 64, "TRIES": 10, "FIRST_WAIT": 0.0, "STALL": 0.05}.items():
            patch.setattr(storage, name, value)
        found = b""
        with open_read("unreliable://content") as file:
            while part := file.read(sizes[len(found) % len(sizes)]):
                found += part
    assert found == content


def test_a_request_that_is_never_answered_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    fsspec.filesystem("memory").pipe_file("/content", CONTENT)
    monkeypatch.setattr(storage, "STALL", 0.1)
    Unreliable.plan = ["silence", None, "silence", "silence"]
    assert read("unreliable://content") == CONTENT
    Unreliable.is_over.set()


def test_what_arrives_in_part_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    monkeypatch.setattr(storage, "TRIES", 3)
    Unreliable.plan = [5, 0]
    storage.write_bytes("unreliable://sent", b"0123456789")
    assert fsspec.filesystem("memory").cat_file("/sent") == b"0123456789"
    Unreliable.plan = [5, 5, 5]
    with pytest.raises(UserError, match=r"cannot write unreliable://sent, after 3 tries \(EOFError: 5 of 10 bytes"):
        storage.write_bytes("unreliable://sent", b"0123456789")


def test_an_upload_whose_end_was_not_confirmed_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As S3 answers to the end of an upload in parts that it has heard of before."""
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    put, faults = Unreliable.put_file, [FileNotFoundError("The specified multipart upload does not exist.")]

    def once_lost(self: Unreliable, *paths: str, **options: Any) -> None:
        put(self, *paths, **options)
        if faults:
            raise faults.pop()

    monkeypatch.setattr(Unreliable, "put_file", once_lost)
    storage.write_bytes("unreliable://whole", b"0123456789")
    assert fsspec.filesystem("memory").cat_file("/whole") == b"0123456789" and not faults


def test_a_table_is_read_in_any_order_through_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    fsspec.filesystem("memory").pipe_file("/content", CONTENT)
    Unreliable.plan = ["error", 100, "error"]
    with storage.open_seekable("unreliable://content") as file:
        file.seek(-10, io.SEEK_END)
        assert file.read() == CONTENT[-10:]
        file.seek(0)
        assert file.read() == CONTENT


def test_what_never_works_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    fsspec.filesystem("memory").pipe_file("/content", b"x" * 100)
    monkeypatch.setattr(storage, "TRIES", 3)
    Unreliable.plan = ["error"] * 9
    with pytest.raises(UserError, match=r"cannot read unreliable://content, after 3 tries \(ConnectionResetError: by"):
        read("unreliable://content")
    assert len(Unreliable.plan) == 6
    Unreliable.plan = []


def test_a_file_that_changes_while_it_is_read_is_refused(bucket: str) -> None:
    storage.write_bytes(f"{bucket}/changing", CONTENT)
    with open_read(f"{bucket}/changing") as file, pytest.raises(UserError, match="was changed while it was read"):
        file.read(10)
        storage.write_bytes(f"{bucket}/changing", CONTENT[::-1])
        while file.read(10_000):
            pass


@pytest.mark.parametrize("change", [lambda tar: tar.replace(b"1" * 3000, b"1" * 3600), lambda tar: tar[:70_000]],
                         ids=["longer", "cut"])
def test_a_shard_that_changes_while_it_is_read_is_not_taken_for_a_damaged_one(bucket: str, tmp_path: Path,
                                                                              change: Any) -> None:
    with ShardWriter(str(tmp_path / "00000.tar")) as writer:
        for place in range(60):
            writer.write(Sample("00000", f"{place}", {"txt": b"1" * 3000}))
    tar = (tmp_path / "00000.tar").read_bytes()
    storage.write_bytes(f"{bucket}/changes/00000.tar", tar)
    samples = read_shard(f"{bucket}/changes/00000.tar", rejects := [])
    next(samples)
    storage.write_bytes(f"{bucket}/changes/00000.tar", change(tar))
    with pytest.raises(UserError, match="was changed while it was read"):
        list(samples)
    assert not rejects


def test_the_hub_is_read_as_it_is_now(hub: str) -> None:
    assert storage.names(hub) == {"00000.tar"} and read(f"{hub}/00000.tar") == CONTENT
    before = storage.identity(f"{hub}/00000.tar")
    Hub.files |= {"00000.tar": CONTENT[1:], "00001.tar": b"x"}
    assert storage.names(hub) == {"00000.tar", "00001.tar"}
    assert expand(f"{hub}/*.tar") == [f"{hub}/00000.tar", f"{hub}/00001.tar"]
    assert storage.identity(f"{hub}/00000.tar") != before
    with open_read(f"{hub}/00000.tar") as file, pytest.raises(UserError, match="was changed while it was read"):
        file.read(10)
        Hub.files["00000.tar"] = CONTENT[::-1]
        while file.read(10_000):
            pass


def test_what_the_hub_refuses_is_not_asked_again(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "status", 403)
    monkeypatch.setattr(Hub, "requests", 0)
    with pytest.raises(UserError, match="check the address, and the credentials") as caught:
        open_read(f"{hub}/00000.tar")
    assert "\n" not in str(caught.value) and Hub.requests <= 2


def test_offline_the_hub_is_not_asked(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot find hf://.* \(OfflineModeIsEnabled: .*: check the address"):
        open_read(f"{hub}/00000.tar")


def test_a_hub_that_does_not_answer_is_asked_again(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils._http import httpx2
    monkeypatch.setattr(storage, "TRIES", 3)
    asked = []

    def ask() -> None:
        asked.append(1)
        raise httpx2.ConnectError("connection refused")

    with pytest.raises(UserError, match="after 3 tries"):
        storage._patiently("read", hub, ask)
    assert len(asked) == 3


FORK = """
import os, sys
from recap.storage import read_bytes
assert read_bytes(sys.argv[1])
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
print(len(read_bytes(sys.argv[1])), flush=True)
"""

LEAVE = """
import threading
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from recap import storage
asked = threading.Event()

class Silent(MemoryFileSystem):
    protocol = "silent"

    @staticmethod
    def _strip_protocol(path):
        return "/" + path.removeprefix("silent://").lstrip("/")

    def cat_file(self, path, start=None, end=None):
        if start:
            asked.set()
            threading.Event().wait()
        return super().cat_file(path, start=start, end=end)

fsspec.register_implementation("silent", Silent)
fsspec.filesystem("memory").pipe_file("/content", bytes(300))
storage.BLOCK = 100
with storage.open_read("silent://content") as file:
    file.read(10)
    asked.wait()
print("left")
"""


def test_a_forked_process_reads_too(tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(CONTENT)
    with web(tmp_path, True) as url:
        found = subprocess.run([sys.executable, "-c", FORK, f"{url}/content"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, f"{len(CONTENT)}\n"), found.stderr


def test_a_process_ends_while_a_request_is_not_answered() -> None:
    found = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=30)
    assert (found.returncode, found.stdout) == (0, "left\n"), found.stderr


def test_what_is_not_there_or_not_allowed_is_said_at_once(bucket: str, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        open_read(f"{bucket}/none")
    with web(tmp_path, True) as url, pytest.raises(FileNotFoundError):
        open_read(f"{url}/none")
    with pytest.raises(UserError, match=r"nothing at s3://recap/none\.tar: check the path"):
        expand(f"{bucket}/none.tar")
    with pytest.raises(UserError, match="no-such-protocol://x"):
        open_read("no-such-protocol://x")
    with pytest.raises(UserError, match="nothing can be written to the web"):
        storage.write_bytes("https://example.org/x", b"")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage._file_system.cache_clear()
    with pytest.raises(UserError, match="check the address, and the credentials"):
        open_read(f"{bucket}/none")


def test_a_package_that_is_missing_is_named() -> None:
    code = "import sys; sys.modules['s3fs'] = None; from recap.storage import open_read; open_read('s3://recap/x')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "s3://recap/x needs a package that is not installed: pip install 'recap-t2i[s3]'" in found.stderr


# --- names ---------------------------------------------------------------------------------------------------------


def test_many_shards_are_found_by_one_listing(bucket: str, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in range(10):
        storage.write_bytes(f"{bucket}/many/{place:05d}.tar", b"x" * place)
    with faulty(s3_port, 0.0) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        storage._file_system.cache_clear()
        names = expand(f"{bucket}/many/{{00000..00009}}.tar")
        assert names == [f"{bucket}/many/{place:05d}.tar" for place in range(10)]
        assert [size for _, size, _ in storage.identities(names).values()] == list(range(10))
        assert server.counts["served"] < 8
    assert expand(f"{bucket}/many/*[13].tar") == [f"{bucket}/many/{place}.tar" for place in ("00001", "00003")]
    assert storage.identity(names[3]) == storage.identities(names)[names[3]]


def test_lists_name_shards_local_and_remote(bucket: str, tmp_path: Path) -> None:
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        (tmp_path / name).write_bytes(b"")
    storage.write_bytes(f"{bucket}/00003.tar", b"")
    lines = ["# shards", f"{tmp_path}/0000{{0..1}}.tar", "", f"  {bucket}/00003.tar", "  # remark"]
    (tmp_path / "shards.txt").write_text("\n".join(lines))
    expected = [f"{tmp_path}/00000.tar", f"{tmp_path}/00001.tar", f"{bucket}/00003.tar"]
    assert expand(str(tmp_path / "shards.txt")) == expected
    storage.write_bytes(f"{bucket}/shards.list", "\n".join(lines).encode())
    assert expand([f"{bucket}/shards.list", f"{tmp_path}/00002.tar"]) == [*expected, f"{tmp_path}/00002.tar"]
    with pytest.raises(UserError, match="no list of shards at"):
        expand(str(tmp_path / "none.txt"))


def test_another_signature_is_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(CONTENT)
    with web(tmp_path, True) as url:
        found = storage.identities([f"{url}/00000.tar?sig={place}" for place in "ab"])
    first, second = found.values()
    assert first == second and first[:2] == ["00000.tar", len(CONTENT)]


def test_there_is_nothing_in_a_folder_that_is_not_there(bucket: str, tmp_path: Path) -> None:
    assert storage.names(f"{bucket}/nowhere") == storage.names(str(tmp_path / "nowhere")) == set()
    storage.remove(f"{bucket}/nowhere/x")
    storage.remove(str(tmp_path / "nowhere"))


# --- writing -------------------------------------------------------------------------------------------------------


def test_a_shard_goes_to_s3_and_comes_back(troubled: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BLOCK", 300_000)
    samples = [Sample("00000", f"{place}", {"txt": b"x" * 5000 * place}) for place in range(40)]
    with ShardWriter("s3://recap/out/00000.tar") as writer:
        for sample in samples:
            writer.write(sample)
    found = list(read_shard("s3://recap/out/00000.tar", rejects := []))
    assert {each.key: each.members for each in found} == {each.key: each.members for each in samples} and not rejects


def test_a_place_that_cannot_be_written_is_one_clear_line(bucket: str, tmp_path: Path) -> None:
    storage.check_writable(f"{bucket}/fresh")
    storage.check_writable(str(tmp_path / "new"))
    assert storage.names(f"{bucket}/fresh") == set() == storage.names(str(tmp_path / "new"))
    with pytest.raises(UserError, match=r"cannot write s3://no-such-bucket/.*: check the bucket's name"):
        storage.check_writable("s3://no-such-bucket/out")
    (tmp_path / "00000.tar").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*00000\.tar \(Is a directory\): move what is there"):
        storage.write_bytes(str(tmp_path / "00000.tar"), b"")
    (tmp_path / "file").write_bytes(b"")
    for ask in (storage.names, storage.check_writable):
        with pytest.raises((UserError, OSError), match="file"):
            ask(str(tmp_path / "file"))


def test_what_killed_processes_built_for_a_bucket_is_removed(bucket: str, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = storage.temporary(f"{bucket}/00000.tar").parent
    gone = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-"))
    running = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-"))
    for folder in (gone, running):
        folder.mkdir()
        (folder / "00000.tar").write_bytes(b"x")
    (tmp_path / "recap-plan-x").mkdir()
    storage.clean(bucket)
    assert set(tmp_path.iterdir()) == {running, tmp_path / "recap-plan-x"}


def test_nothing_is_left_behind_after_an_error(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(ZeroDivisionError), ShardWriter(f"{bucket}/failed/00000.tar") as writer:
        writer.write(Sample("00000", "a", {"txt": b"x"}))
        raise ZeroDivisionError
    with ShardWriter(f"{bucket}/failed/00001.tar") as writer:
        writer.write(Sample("00001", "a", {"txt": b"x"}))
    assert storage.names(f"{bucket}/failed") == {"00001.tar"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("samples", [100, 1], ids=["while-writing", "at-the-end"])
def test_a_full_disk_leaves_neither_a_file_nor_its_beginning(tmp_path: Path, samples: int) -> None:
    code = """
import resource, signal, sys
from recap.errors import UserError
from recap.shards import ShardWriter
from recap.sample import Sample
from recap.storage import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = 3_000 * int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def shard():
    with ShardWriter(sys.argv[1] + "/00000.tar") as writer:
        for place in range(int(sys.argv[2])):
            writer.write(Sample("00000", str(place), {"txt": bytes(2_500)}))

for write in (shard, lambda: write_bytes(sys.argv[1] + "/stats.json", bytes(limit + 1))):
    try:
        write()
    except UserError as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(samples)], capture_output=True, text=True)
    said = f"no space left at {tmp_path} (File too large): free some, and run the same command again\n"
    assert (found.stdout, found.stderr) == (said * 2, "")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_is_removed_and_what_others_build_is_not(tmp_path: Path) -> None:
    def left_by(process: int, name: str) -> Path:
        own = storage.temporary(str(tmp_path / name))
        return own.with_name(own.name.replace(f"-{os.getpid()}.", f"-{process}."))

    gone = left_by(2**22 + 1, "a.tar")  # more processes there can't be
    folder = left_by(2**22 + 1, "b")
    own, running = left_by(os.getpid(), "c.tar"), left_by(os.getppid(), "d.tar")
    other = tmp_path / ".e.tar.01234567-4194305.tmp"  # of another machine
    old = tmp_path / ".f.tar.01234567-4194305.tmp"
    for path in (gone, own, running, other, old, tmp_path / "00000.tar"):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 8 * 86400,) * 2)
    folder.mkdir()
    (folder / "x").write_bytes(b"x")
    storage.clean(str(tmp_path))
    assert set(tmp_path.iterdir()) == {running, other, tmp_path / "00000.tar"}
