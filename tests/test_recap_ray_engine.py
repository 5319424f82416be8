"""The same work on a Ray cluster: shared, and done again where an actor is lost."""

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from test_recap_engines import NUM_IMAGES, Job, free_port, tries, work

from recap import progress
from recap.engines import Result
from recap.errors import UserError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'recap-t2i[ray]'")

from recap import ray_engine  # noqa: E402
from recap.ray_engine import RayPool, RayWorker  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False,
             object_store_memory=100_000_000, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield
    ray.shutdown()


def test_two_actors_share_the_work(tmp_path: Path) -> None:
    shards = [f"slow-{place}" for place in range(20)]
    found, meter = work(tmp_path, shards, workers=2, engine="ray")
    assert sorted(found) == sorted(shards)
    done_by = Counter(process for shard in shards for process in tries(tmp_path / shard))
    assert len(done_by) == 2 and sum(done_by.values()) == 20
    assert all(1 <= done <= NUM_IMAGES for done in meter.done.values())


def test_what_a_killed_actor_had_is_done_again_by_another(tmp_path: Path) -> None:
    shards = ["slow-a", "kills-once-b", *(f"slow-{place}" for place in range(6))]
    found, _ = work(tmp_path, shards, workers=1, engine="ray")
    assert sorted(found) == sorted(shards)
    assert len(tries(tmp_path / "kills-once-b")) == 2


def test_errors_are_said_as_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^the model is gone$"):
        work(tmp_path, ["user-error", "slow-b"], engine="ray")
    with pytest.raises(UserError, match=r"^this device is broken$"):
        work(tmp_path, ["slow-b"], engine="ray", device="broken")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        work(tmp_path, ["bug"], engine="ray")
    with pytest.raises(OSError, match="OddError: the disk is odd"):
        work(tmp_path, ["odd-error"], engine="ray")
    with pytest.raises(RuntimeError, match="SystemExit: 3"):
        work(tmp_path, ["exits"], engine="ray")


def test_relative_paths_are_meant_where_the_command_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    work(Path("out"), ["shard-a"], engine="ray")
    assert len(tries(tmp_path / "out/shard-a")) == 1
    monkeypatch.setattr(Path, "cwd", lambda: Path("/of/this/machine/alone"))
    with pytest.raises(UserError, match="has no /of/this/machine/alone, which out is in: share that folder"):
        work(Path("out"), ["shard-b"], engine="ray")
    work(tmp_path / "out", ["shard-b"], engine="ray")
    assert len(tries(tmp_path / "out/shard-b")) == 1


def test_an_actor_keeps_nothing_of_what_is_done(tmp_path: Path) -> None:
    class Worker:
        def process(self, shards: Iterable[str]) -> Iterator[Result]:
            for shard in shards:
                yield shard, {}

    actor = RayWorker()
    threading.Thread(target=actor._work, args=[Worker()], daemon=True).start()
    assert actor.process("a") == actor.process("b") == {} and not actor.results


def test_gpus_that_are_missing_or_left_idle_are_told_of(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ray_engine, "LOOK_EVERY", 0.1)
    progress.warn.cache_clear()
    pool = RayPool(Job(tmp_path), None, "cuda")
    assert not pool.events() and "no GPU" not in capfd.readouterr().err
    assert not pool.events() and not pool.events() and pool.size() == 1
    assert capfd.readouterr().err.count("the cluster has no GPU, which device=cuda needs") == 1
    pool.close()
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 8.0})
    RayPool(Job(tmp_path), None, "cpu").close()
    assert "device=cpu leaves the cluster's 8 GPUs idle; device=cuda takes them" in capfd.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:PORT", "ray://127.0.0.1:PORT", "[::1]:PORT", "auto", "nonsense"])
def test_a_cluster_that_is_not_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
                                                       ) -> None:
    def fail(**_: object) -> None:
        raise {"auto": ConnectionError, "nonsense": ValueError}[address]("no cluster\nwhatever it says else")

    address = address.replace("PORT", str(free_port()))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError) as raised:
        RayPool(Job(tmp_path), None, "cpu")
    said = str(raised.value)
    assert said.startswith(f"engine=ray: no cluster at RAY_ADDRESS={address} (") and "else" not in said
