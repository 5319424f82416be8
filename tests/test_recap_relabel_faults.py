"""Relabelling through kills, lost workers, full disks and failing storage: the same bytes, nothing lost or doubled."""

import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tarfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import recap, recap_here
from loopback import faulty, s3

from recap.cli import main
from recap.shards import ShardWriter, read_shard

ASIDE = {"config.json", "log.jsonl", "progress.json", "README.md", "done.json"}
"""What says when, how fast and where."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["recap.relabel", "recap.captioners.blip2", "recap.pipeline"])


class Work:
    """A few small shards, and an experiment that relabels them."""

    def __init__(self, root: Path, models: Path, source: Path, num_shards: int = 8) -> None:
        self.root = root
        samples = list(read_shard(str(source), []))
        self.shards = [root / "in" / f"{place:05d}.tar" for place in range(num_shards)]
        for place, path in enumerate(self.shards):
            with ShardWriter(str(path)) as writer:
                for sample in samples[5 * place % 40:][:5]:
                    writer.write(sample)
        self.file = root / "mine.toml"
        self.file.write_text(f"""
            runs = "{root / 'runs'}"
            device = "cpu"
            data.shards = "{root / 'in'}/*.tar"
            styles.short = {{ prompt = "A short caption:", max_new_tokens = 5 }}
            styles.long = {{ prompt = "In detail:", max_new_tokens = 9 }}
            captioner = {{ model = "{models / 'blip2'}", dtype = "float32", tuned = "none" }}
            relabel.batch_size = 4
        """)

    def arguments(self, name: str, *more: str) -> list[str]:
        return ["relabel", "-c", str(self.file), f"name={name}", *more]

    def out(self, name: str) -> Path:
        return self.root / "runs" / name / "relabel"

    def written(self, name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.out(name).iterdir() if path.name not in ASIDE}

    def start(self, name: str, *more: str, limit: int | None = None) -> ForkServerProcess:
        process = FORKS.Process(target=_main, args=(self.arguments(name, *more), self.root / "stderr", limit))
        process.start()
        return process

    def finished(self, name: str) -> int:
        """How many shards are done."""
        return len(list(self.out(name).glob("*_stats.json"))) if self.out(name).is_dir() else 0


def _main(arguments: list[str], stderr: Path, limit: int | None) -> None:
    sys.stderr = open(stderr, "w")  # noqa: SIM115
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main(arguments)


@pytest.fixture
def work(world_shards: Path, world_models: Path, tmp_path: Path) -> Work:
    return Work(tmp_path, world_models, world_shards / "train" / "00000.tar")


@pytest.fixture
def whole(work: Work) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    assert recap_here(*work.arguments("whole")) == 0
    return work.written("whole")


def killed(work: Work, seed: int, num_kills: int, *more: str) -> list[int]:
    """Run until it is done, killed that many times; how many shards were done at each kill."""
    lot = random.Random(seed)
    moments: list[int] = []
    while True:
        process = work.start("killed", *more)
        if len(moments) < num_kills:
            begun = work.finished("killed")
            while process.is_alive() and work.finished("killed") == begun and lot.random() < 0.97:
                time.sleep(0.02)
            time.sleep(lot.uniform(0, 0.05))
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
                moments.append(work.finished("killed"))
        process.join()
        if process.exitcode == 0:
            return moments


def test_a_run_that_is_killed_ends_with_the_same_bytes(work: Work, whole: dict[str, bytes]) -> None:
    assert killed(work, 0, 4)
    assert work.written("killed") == whole


@pytest.mark.full
def test_twenty_kills_over_one_run_end_with_the_same_bytes(world_shards: Path, world_models: Path,
                                                           tmp_path: Path) -> None:
    work = Work(tmp_path, world_models, world_shards / "train" / "00000.tar", num_shards=40)
    assert recap_here(*work.arguments("whole")) == 0
    assert len(killed(work, 1, 20)) == 20
    assert work.written("killed") == work.written("whole")


@pytest.mark.full
def test_killed_workers_of_a_run_leave_the_same_bytes(work: Work, whole: dict[str, bytes]) -> None:
    process = work.start("killed", "relabel.workers=2")
    lost = 0
    while process.is_alive():
        found = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                 if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()] if process.is_alive() else []
        if lost < 2 and found and work.finished("killed") > 2 * lost:
            os.kill(random.Random(lost).choice(found), signal.SIGKILL)
            lost += 1
        time.sleep(0.05)
    assert process.exitcode == 0 and lost == 2
    assert work.written("killed") == whole


@pytest.mark.full
def test_a_killed_ray_worker_leaves_the_same_bytes(work: Work, whole: dict[str, bytes]) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'recap-t2i[ray]'")
    process = work.start("killed", "relabel.engine=ray", "relabel.workers=2")
    lost: set[int] = set()
    while process.is_alive():
        workers = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _is_ray_worker(path)]
        if not lost and workers and work.finished("killed"):
            os.kill(workers[0], signal.SIGKILL)
            lost.add(workers[0])
        time.sleep(0.05)
    assert process.exitcode == 0 and lost
    assert work.written("killed") == whole


def _is_ray_worker(process: Path) -> bool:
    try:
        return (process / "cmdline").read_bytes().startswith(b"ray::RayWorker")
    except OSError:
        return False


def test_a_full_disk_is_one_clear_line_and_then_goes_on(work: Work, whole: dict[str, bytes]) -> None:
    limit = min(len(content) for name, content in whole.items() if name.endswith(".tar")) - 1
    process = work.start("full", limit=limit)
    process.join()
    said = (work.root / "stderr").read_text().replace("\r", "\n").splitlines()[-1]
    assert process.exitcode == 2 and "File too large" in said and "run the same command again" in said
    assert work.finished("full") == 0 and not list(work.out("full").glob(".*"))
    assert recap_here(*work.arguments("full")) == 0
    assert work.written("full") == whole


@pytest.mark.full
def test_s3_where_requests_fail_or_stall_gets_the_same_bytes(work: Work, whole: dict[str, bytes],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    from recap import storage
    with s3() as port, faulty(port, 0.1, stall=8) as server:
        for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1",
                            "ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        direct = fsspec.filesystem("s3", skip_instance_cache=True)
        for shard in work.shards:
            direct.put_file(str(shard), f"recap/in/{shard.name}")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        for name, value in {"STALL": 2.0, "LONG_STALL": 3.0, "FIRST_WAIT": 0.05}.items():
            monkeypatch.setattr(storage, name, value)
        storage._file_system.cache_clear()
        arguments = work.arguments("s3", "data.shards=s3://recap/in/*.tar", "relabel.output=s3://recap/out")
        assert recap_here(*arguments) == 0
        assert server.counts.total() > 1.05 * server.counts["served"] > 50
        found = {Path(name).name: direct.cat_file(name) for name in direct.ls("recap/out", detail=False)}
        storage._file_system.cache_clear()
    assert wherever({name: content for name, content in found.items() if name not in ASIDE}) == wherever(whole)


def wherever(files: dict[str, bytes]) -> dict[str, Any]:
    """What was written, but for the time or etag of the input."""
    stats = {name: json.loads(content) for name, content in files.items() if name.endswith("_stats.json")}
    return files | {name: content | {"input": content["input"][:2]} for name, content in stats.items()}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.full
def test_everything_nasty_is_captioned_or_quarantined(shared_data: Path, work: Work, tmp_path: Path) -> None:
    images = sorted(path for path in (shared_data / "nasty_images").rglob("*") if path.is_file())
    good = next(iter(read_shard(str(work.shards[0]), []))).image_bytes
    with tarfile.open(work.shards[0], "w") as tar:
        for place, path in enumerate(images):
            add(tar, f"{place:05d}.{path.suffix[1:] or 'jpg'}", path.read_bytes())
            add(tar, f"{place:05d}.txt", b"an image")
    with tarfile.open(work.shards[1], "w") as tar:
        for place, path in enumerate(images):
            add(tar, f"{place:05d}.jpg", path.read_bytes())
            add(tar, f"{place:05d}.txt", b"an image")
    with tarfile.open(work.shards[2], "w") as tar:
        for name, content in {
            "bytes.png": good, "bytes.txt": b"\xff\xfe", "huge.png": good, "huge.txt": b"A" * 50_000_000,
            "no-text.png": good, "../x.png": good, "../x.txt": b"up", "/x.png": good, "/x.txt": b"root",
            "a/b.png": good, "a/b.txt": b"fine", "line\n.png": good, "line\n.txt": b"a line", "bare": b"x",
            "deep.png": good, "deep.txt": b"fine", "deep.json": b"[" * 100_000, "only.txt": b"no image",
        }.items():
            add(tar, name, content)
        add(tar, "a/b.png", good)
        add(tar, "a/b.txt", b"again")
    cut = work.shards[3].read_bytes()
    work.shards[3].write_bytes(cut[:len(cut) // 2])
    work.shards[4].write_bytes(b"")
    work.shards[5].write_bytes(random.Random(0).randbytes(100_000))
    before = {path for path in tmp_path.parent.rglob("*") if not path.is_relative_to(tmp_path / "runs")}
    found = recap(*work.arguments("nasty"), timeout=600)
    assert found.returncode == 0, found.stderr[-2000:]
    assert {path for path in tmp_path.parent.rglob("*") if not path.is_relative_to(tmp_path / "runs")} == before
    result = json.loads((work.out("nasty") / "done.json").read_bytes())
    assert result["images_in"] == result["images_out"] + sum(result["quarantined"].values()) >= 2 * len(images)
    assert {"undecodable_image", "missing_image", "binary_alt_text", "oversized_alt_text", "missing_alt_text",
            "unsafe_key", "duplicate_key", "bad_metadata", "no_extension",
            "truncated_shard"} <= set(result["quarantined"])
    assert recap_here("verify", "-c", str(work.file), "name=nasty") == 0
