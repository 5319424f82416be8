"""What the tests share: tiny checkpoints of the real classes, drawn shards, and the real data where it is there."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from recap.cli import main

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

settings.register_profile("recap", deadline=None)  # the first example also pays for imports
settings.load_profile("recap")

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a hub; and what is offline fails at once, without retries


def pytest_collection_finish() -> None:
    """What is imported by now stays: let no search for garbage go through it again, for half a second each."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """An extension reports what is left at the end as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photos, prompts and captions beside the checkout (see their SOURCES.md)."""
    if not SHARED_DATA.is_dir():
        if os.environ.get("RECAP_REQUIRE_DATA") == "1":
            pytest.fail(f"RECAP_REQUIRE_DATA=1, but there is no {SHARED_DATA}")
        pytest.skip("needs ../shared/data (real photos, prompts, captions)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def world_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Randomly initialised tiny checkpoints: blip2, stable-diffusion-0, detr, clip, features, reader, …"""
    from recap.world.init import init_untrained
    out = tmp_path_factory.mktemp("world") / "models"
    init_untrained(out)
    return out


@pytest.fixture(scope="session")
def world_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes: train/*.tar (48 images), evaluation/*.tar and reference/*.tar (16), prompts/evaluation/*.jsonl (16
    and, of those over one window, the same whole and cut).
    """
    from recap.world.draw import draw
    out = tmp_path_factory.mktemp("world") / "shards"
    draw(out, num_train=48, num_tuning=8, num_validation=0, num_evaluation=16, num_reference=16,
         shard_size=64)
    return out


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Diffusers folders of random weights: `sd1` predicts noise, `sd2` v, and `sdxl` has two text encoders."""
    import pipelines
    out = tmp_path_factory.mktemp("pipelines")
    for make in (pipelines.sd1, pipelines.sd2, pipelines.sdxl):
        pipelines.stirred(make()).save_pretrained(out / make.__name__)
    return out


def recap_here(*arguments: str) -> int:
    """Run the command in this process, which need not import it all anew; its status."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def recap(*arguments: str, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    return subprocess.run([str(Path(sys.executable).with_name("recap")), *arguments], cwd=cwd, capture_output=True,
                          text=True, timeout=timeout)
