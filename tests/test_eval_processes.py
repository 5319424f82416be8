"""Drawing and evaluating by ranks as torchrun's, and by a Ray cluster: stage after stage, as by one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_recap_engines import free_port
from test_recap_pipeline import CONFIG, settings

pytestmark = pytest.mark.full
SMALL = ["generate.num_prompts=12", "generate.shard_size=5", 'arms=["base"]', "report.beside=none"]
SWEEP = "generate.sweep={guidance_scale=[1]}"


@pytest.fixture(scope="module")
def arguments(world_models: Path, world_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    runs = tmp_path_factory.mktemp("runs")
    return ["-c", str(CONFIG), *settings(world_models, world_shards, runs), *SMALL]


@pytest.fixture(scope="module")
def whole(arguments: list[str]) -> Path:
    """By one process."""
    for verb in ("reference", "generate", "evaluate"):
        subprocess.run([command(), verb, *arguments, SWEEP], check=True, capture_output=True, timeout=300)
    return folder_of(arguments)


def command() -> str:
    return str(Path(sys.executable).with_name("recap"))


def folder_of(arguments: list[str]) -> Path:
    return Path(next(each for each in arguments if each.startswith("runs=")).removeprefix("runs=")) / "tiny"


def metrics(run: Path) -> dict[str, Any]:
    """Of the arm, and of its point."""
    found = sorted(run.glob("seed-0/**/metrics.json"))
    return {str(path.relative_to(run)): json.loads(path.read_bytes()) for path in found}


def elsewhere(whole: Path, arguments: list[str], runs: Path) -> list[str]:
    """The same experiment with its reference alone done."""
    for name in ("reference", "measured/reference"):
        shutil.copytree(whole / name, runs / "tiny" / name)
    return [each if not each.startswith("runs=") else f"runs={runs}" for each in arguments]


def test_two_ranks_draw_and_evaluate_several_stages(whole: Path, arguments: list[str], tmp_path: Path) -> None:
    own = [*elsewhere(whole, arguments, tmp_path), SWEEP]
    for verb in ("generate", "evaluate"):
        port = str(free_port())
        ranks = [subprocess.Popen([command(), verb, *own], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            for rank in range(2)]
        assert [each.wait(timeout=200) for each in ranks] == [0, 0]
    found = metrics(tmp_path / "tiny")
    assert len(found) == 2 and found == metrics(whole)


def test_a_ray_cluster_evaluates(whole: Path, arguments: list[str], tmp_path: Path) -> None:
    own = elsewhere(whole, arguments, tmp_path)
    shutil.copytree(whole / "seed-0" / "generate", tmp_path / "tiny" / "seed-0" / "generate")
    done = subprocess.run([command(), "evaluate", *own, "evaluate.engine=ray", "evaluate.workers=2"], timeout=280,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    place = "seed-0/eval/base/metrics.json"
    assert metrics(tmp_path / "tiny") == {place: metrics(whole)[place]}
