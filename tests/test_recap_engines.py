"""Engines: every shard is done, whoever does it and whoever is lost; what is wrong with the work ends the run."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from recap import engines
from recap.engines import Report, Result
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

    def relabel(self, shards: Iterable[str]) -> Iterator[Result]:
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
        if shard.startswith("hangs"):
            time.sleep(600)


class Meter:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}
        self.workers: Counter[str] = Counter()

    def images(self, worker: str, shard: str, done: int, quarantined: dict[str, int]) -> None:
        self.done[shard] = done
        self.workers[worker] += 1


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
