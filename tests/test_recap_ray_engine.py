"""The same work on a Ray cluster: shared, and done again where an actor is lost."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_recap_engines import NUM_IMAGES, tries, work

from recap.errors import UserError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'recap-t2i[ray]'")


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
