"""Engines: every shard is done, whoever does it and whoever is lost; what is wrong with the work ends the run."""

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from recap import engines
from recap.engines import Done, Event, Images, Joined, Lost, Report, Result
from recap.errors import UserError

NUM_IMAGES = 10


@dataclass(frozen=True)
class Job:
    """Work on shards, which are names of files: their names say what goes wrong with them."""

    out: Path

    @contextmanager
    def open(self, device: str, report: Report) -> Iterator["Worker"]:
        if device == "broken":
            raise UserError("this device is broken")
        yield Worker(self.out, report)


class Worker:
    def __init__(self, out: Path, report: Report) -> None:
        self.out, self.report = out, report

    def process(self, shards: Iterable[str]) -> Iterator[Result]:
        for shard in shards:
            self.report(shard, NUM_IMAGES // 2, {})
            with open(self.out / shard, "ab", buffering=0) as file:
                file.write(f"{os.getpid()}\n".encode())
            self._suffer(shard)
            self.report(shard, NUM_IMAGES, {"undecodable_image": 1})
            yield shard, {"count": NUM_IMAGES}

    def _suffer(self, shard: str) -> None:
        if shard.startswith("slow"):
            time.sleep(0.3)
        if shard.startswith("kills-always") or (shard.startswith("kills-once") and len(tries(self.out / shard)) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if shard.startswith("user-error"):
            raise UserError("the model is gone")
        if shard.startswith("bug"):
            raise ZeroDivisionError
        if shard.startswith("odd-error"):
            raise OddError("the disk is odd", response=1)
        if shard.startswith("locked-error"):
            raise LockedError(errno.ENOSPC, "the disk is full", shard)
        if shard.startswith("exits"):
            sys.exit(3)
        if shard.startswith("deaf"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (self.out / "is-deaf").touch()
            time.sleep(20)
        if shard.startswith("hangs"):
            time.sleep(600)


class OddError(OSError):
    """It can't be made again from what pickle keeps."""

    def __init__(self, message: str, *, response: int) -> None:
        super().__init__(message)


class LockedError(OSError):
    """It can't be pickled."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.lock = threading.Lock()


class Meter:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}
        self.workers: Counter[str] = Counter()
        self.gone: list[str] = []

    def images(self, worker: str, shard: str, done: int, quarantined: dict[str, int]) -> None:
        self.done[shard] = done
        self.workers[worker] += 1

    def lost(self, worker: str) -> None:
        self.gone.append(worker)


def tries(file: Path) -> list[str]:
    return file.read_text().split()


def work(out: Path, shards: list[str], workers: int = 1, engine: str = "local", device: str = "cpu"
         ) -> tuple[list[str], Meter]:
    meter = Meter()
    results = list(engines.work(Job(out), shards, engine, workers, device, meter))
    assert all(stats == {"count": NUM_IMAGES} for _, stats in results)
    return [shard for shard, _ in results], meter


def test_one_process_does_all_in_their_order(tmp_path: Path) -> None:
    shards = [f"shard-{place}" for place in range(5)]
    found, meter = work(tmp_path, shards)
    assert found == shards
    assert meter.done == dict.fromkeys(shards, NUM_IMAGES) and list(meter.workers) == ["cpu"]


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    shards = [f"slow-{place}" for place in range(8)]
    found, meter = work(tmp_path, shards, workers=2)
    assert sorted(found) == shards
    done_by = Counter(process for shard in shards for process in tries(tmp_path / shard))
    assert len(done_by) == 2 and sum(done_by.values()) == 8 and str(os.getpid()) not in done_by
    assert set(meter.workers) == {"cpu 0", "cpu 1"} and meter.done == dict.fromkeys(shards, NUM_IMAGES)


def test_what_a_killed_worker_had_is_done_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shards = ["kills-once-a", "slow-b", "slow-c", "kills-once-d", "slow-e"]
    found, meter = work(tmp_path, shards, workers=2)
    assert sorted(found) == sorted(shards) and meter.done == dict.fromkeys(shards, NUM_IMAGES)
    assert [len(tries(tmp_path / shard)) for shard in shards] == [2, 1, 1, 2, 1]
    said = capfd.readouterr().err
    assert "was ended by SIGKILL at work on kills-once-a; the shard is done again" in " ".join(said.split())
    assert len(meter.gone) == 2


def test_a_shard_that_ends_every_worker_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 workers ended at work on kills-always, the last one was ended by SIGKILL"):
        work(tmp_path, ["kills-always", "slow-b", "slow-c"], workers=2)


def test_what_the_user_can_mend_is_said_as_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the model is gone$"):
        work(tmp_path, ["user-error", "slow-b"], workers=2)
    with pytest.raises(UserError, match=r"^this device is broken$"):
        work(tmp_path, ["shard", "slow-b"], workers=2, device="broken")


def test_a_bug_in_a_worker_comes_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)^cpu .:.*_suffer.*ZeroDivisionError"):
        work(tmp_path, ["bug", "slow-b", "slow-c"], workers=2)


@pytest.mark.parametrize("kind", ["odd-error", "locked-error", "exits"])
def test_an_error_that_can_not_travel_is_said(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RuntimeError if kind == "exits" else OSError) as raised:
        work(tmp_path, [kind, "slow-b"], workers=2)
    said = {"odd-error": r"OddError: the disk is odd", "exits": r"(?s)cpu .:.*sys\.exit\(3\).*SystemExit: 3",
            "locked-error": r"^\[Errno 28\] the disk is full: 'locked-error'$"}
    assert raised.match(said[kind])
    assert getattr(raised.value, "errno", None) == (errno.ENOSPC if kind == "locked-error" else None)


def test_a_worker_that_does_not_heed_its_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "TIME_TO_END", 0.3)
    results = engines.work(Job(tmp_path), ["deaf", "shard-b"], "local", 2, "cpu", Meter())
    assert next(results)[0] == "shard-b"
    wait_until((tmp_path / "is-deaf").is_file)
    began = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() < began + 10 and not Path(f"/proc/{tries(tmp_path / 'deaf')[0]}").exists()


def test_a_worker_takes_its_gpu_for_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    taken: list[str] = []

    class Here(Job):
        def open(self, device: str, report: Report) -> AbstractContextManager["Worker"]:
            taken.append(f"opened on {device}")
            return super().open(device, report)

    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    list(engines.work(Here(tmp_path), ["shard-a"], "local", 1, "cuda:1", Meter()))
    assert taken == ["cuda:1", "opened on cuda:1"]


class Pool:
    """Says what a test has it say."""

    def __init__(self, *events: list[Event]) -> None:
        self.said, self.given = list(events), list[tuple[str, str]]()

    def size(self) -> int:
        return 2

    def give(self, worker: str, shard: str) -> None:
        self.given.append((worker, shard))

    def events(self) -> list[Event]:
        return self.said.pop(0)

    def close(self) -> None:
        self.said.clear()


def scheduled(pool: Pool, shards: list[str]) -> tuple[list[str], Meter]:
    meter = Meter()
    return [shard for shard, _ in engines.schedule(pool, shards, meter)], meter


def test_what_a_lost_worker_had_done_counts_once_and_is_not_done_again() -> None:
    gone = [Joined("a")], [Lost("a", "is gone")]
    late = Done("a", "s1", {})
    waits = Pool(*gone, [late, Joined("b")], [Done("b", "s2", {})])
    assert scheduled(waits, ["s1", "s2"])[0] == ["s1", "s2"]
    assert waits.given == [("a", "s1"), ("b", "s2")]
    begun = Pool(*gone, [Joined("b")], [late, Images("b", "s1", 5, {})], [Done("b", "s1", {})], [Done("b", "s2", {})])
    found, meter = scheduled(begun, ["s1", "s2"])
    assert found == ["s1", "s2"] and meter.done == {}
    assert begun.given == [("a", "s1"), ("b", "s1"), ("b", "s2")]


def test_idle_workers_may_be_lost_while_others_work() -> None:
    idle = [Joined("c"), Joined("d"), Joined("e")], [Lost(name, "is gone") for name in "cde"]
    pool = Pool([Joined("a"), Joined("b")], *idle, [Done("a", "s1", {})], [Lost("a", "is gone")], [Done("b", "s2", {})])
    assert scheduled(pool, ["s1", "s2"])[0] == ["s1", "s2"]
    with_a_done = Pool([Lost("a worker", "is gone")], [Lost("a worker", "is gone")], [Joined("a")],
                       [Done("a", "s1", {}), Lost("a", "is gone")], [Joined("b")], [Done("b", "s2", {})])
    assert scheduled(with_a_done, ["s1", "s2"])[0] == ["s1", "s2"]
    with pytest.raises(UserError, match="3 workers ended without a shard, the last one is gone"):
        scheduled(Pool(*([Lost("a worker", "is gone")] for _ in range(3))), ["s1"])


def test_the_shard_that_a_worker_told_of_last_is_blamed() -> None:
    shards = [f"s{place}" for place in range(9)]
    lives = [event for name in "abc" for event in
             ([Joined(name)], [Images(name, "s0", 10, {}), Images(name, "s1", 5, {})], [Lost(name, "is gone")])]
    with pytest.raises(UserError, match="3 workers ended at work on s1,"):
        scheduled(Pool(*lives), shards)


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = ("import test_recap_engines as t, pathlib; "
            f"t.work(pathlib.Path({str(tmp_path)!r}), ['hangs-a', 'hangs-b'], 2)")
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    parent = subprocess.Popen([sys.executable, "-c", f"if __name__ == '__main__': {code}"],
                              env={**os.environ, "PYTHONPATH": paths})
    files = [tmp_path / "hangs-a", tmp_path / "hangs-b"]
    wait_until(lambda: all(file.is_file() and tries(file) for file in files))
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(Path(f"/proc/{tries(file)[0]}/cmdline").is_file()
                               and Path(f"/proc/{tries(file)[0]}/cmdline").read_bytes() for file in files))


def test_ranks_of_torchrun_or_slurm_share_the_work(tmp_path: Path) -> None:
    shards = [f"slow-{place}" for place in range(8)]
    code = (f"import test_recap_engines as t, pathlib; out = pathlib.Path({str(tmp_path)!r}); "
            f"print(*t.work(out, {shards!r})[0])")
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": paths, "RANK": str(rank), "WORLD_SIZE": "2",
                                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
             for port in [str(free_port())] for rank in range(2)]
    found = [rank.communicate(timeout=60)[0].split() for rank in ranks]
    assert sorted(found[0] + found[1]) == shards and all(found)
    assert all(len(tries(tmp_path / shard)) == 1 for shard in shards)


def test_the_first_rank_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        def add(self, name: str, amount: int) -> int:
            return 3

    monkeypatch.setattr(engines, "PATIENCE", 0.3)
    with pytest.raises(UserError, match="2 shards of other ranks are not done"):
        engines._wait_for_others(Store(), 5)


def test_a_rank_that_is_at_work_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        def __init__(self) -> None:
            self.counts = Counter[str]()

        def add(self, name: str, amount: int) -> int:
            self.counts[name] += amount
            if name == "signs" and not amount:  # the first rank looks
                sign("shard", 1, {})
                self.counts["looks"] += 1
                self.counts["done"] += self.counts["looks"] == 5
            return self.counts[name]

    store, told = Store(), Counter[str]()
    sign = engines._signing(lambda shard, done, quarantined: told.update([shard]), store)
    monkeypatch.setattr(engines, "PATIENCE", 0.3)
    monkeypatch.setattr(engines, "SIGN_EVERY", -1.0)
    engines._wait_for_others(store, 1)
    assert store.counts["signs"] == told["shard"] == 5
    monkeypatch.setattr(engines, "SIGN_EVERY", 60.0)
    sign("shard", 2, {})
    assert store.counts["signs"] == 5 and told["shard"] == 6


def test_the_ranks_store_takes_any_number_of_shards() -> None:
    import torch
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=10))
    draw = random.Random(0)
    shards = [f"s3://bucket/{draw.randbytes(2000).hex()}.tar" for _ in range(5000)]
    engines._put(store, "shards", shards)
    assert engines._get(store, "shards") == shards


def test_a_rank_takes_the_gpu_that_its_launcher_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    monkeypatch.setenv("LOCAL_RANK", "3")
    for num_gpus, own in ((8, "cuda:3"), (1, "cuda:0"), (2, "cuda:1"), (0, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda num_gpus=num_gpus: num_gpus)
        assert engines._own("cuda") == own
    assert engines._own("cpu") == "cpu" and engines._own("cuda:2") == "cuda:2"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def wait_until(condition: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)
