"""The command line: quick to answer, and one clear line with status 2 for what a user can mend."""

import ast
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import recap, recap_here

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.toml")


def test_help_answers_in_under_half_a_second() -> None:
    times = []
    for _ in range(5):
        started = time.monotonic()
        assert recap("--help").returncode == 0
        times.append(time.monotonic() - started)
    assert statistics.median(times) < 0.5


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "--help"], ["world", "--help"]])
def test_help_fits_80_columns(arguments: list[str]) -> None:
    done = recap(*arguments)
    assert all(len(line) <= 80 for line in (done.stdout + done.stderr).splitlines())


@pytest.mark.parametrize(("arguments", "expected"), [
    (["run", "-c", "none.toml"], "no experiment file at none.toml"),
    (["run", "-c", TINY, "train.lrr=1"], "did you mean train.lr?"),
    (["run", "-c", TINY, "data.shards=none/*.tar", "stitch.shards={shard}", "stitch.detr.model={models}/detr",
      "captioner.model={models}/blip2"], "data.shards: nothing at none/*.tar"),
    (["generate", "-c", TINY, "generate.prompts=none.txt", 'arms=["base"]'], "generate.prompts: nothing at none.txt"),
    (["relabel", "-c", TINY, "data.shards={shard}", "captioner.model=./none", "captioner.tuned=none"],
     "captioner.model: no folder at ./none"),
    (["relabel", "-c", TINY, "data.shards={shard}", "captioner.model={models}/blip2", "captioner.tuned=none-such"],
     "captioner.tuned: no folder at none-such"),
    (["stitch", "-c", TINY, "stitch.shards={shard}", 'stitch.experts=["dter"]', "stitch.detr.model={models}/detr"],
     "detr"),
    (["relabel", "-c", TINY, "data.shards={shard}", "captioner.tuned=none", "captioner.model=someone/not-cached"],
     "captioner.model: no folder someone/not-cached"),
    (["train", "-c", TINY, "train.shards={shard}", 'arms=["rich"]', "train.model={models}/stable-diffusion-0"],
     "no_rich_caption"),
    (["pool", "{models}", "--out", "all.json", "--title", "", "--command", ""], "no finished run in {models}"),
    (["generate", "-c", TINY, "generate.prompts={shard}", 'arms=["base"]', "train.model=someone/not-cached"],
     "train.model: no folder someone/not-cached"),
])
def test_what_a_user_can_mend_is_one_line_and_status_2(
        arguments: list[str], expected: str, tmp_path: Path, world_shards: Path, world_models: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shard = world_shards / "evaluation" / "00000.tar"
    status = recap_here(*[argument.format(shard=shard, models=world_models) for argument in arguments])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and last.startswith("recap: ") and expected.format(models=world_models) in last


def test_status_and_line_are_those_of_the_installed_command(tmp_path: Path) -> None:
    done = recap("run", "-c", "none.toml", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("recap: ") and done.stderr.count("\n") == 1
    assert recap("relable").returncode == recap("run", "--fast").returncode == recap("run").returncode == 2


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "recap", "version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == recap("version").stdout != ""


# --- the arrows of the design ----------------------------------------------------------------------------------------

UPSTREAM = {"recap": {"recap"}, "train_t2i": {"recap", "train_t2i"}, "eval": {"recap", "train_t2i", "eval"}}
MAY_NAME_ALL = {"recap/cli.py", "recap/pipeline.py", "recap/world/cli.py"}
LEAVES = {f"eval.{name}" for name in ("captions", "caption_tokens", "caption_scores", "caption_measures",
                                      "caption_java", "clipscore_hessel", "clip_score", "statistics")}
"""They know nothing of the three packages but one another, so that recap may score captions with them."""


def imported(path: Path) -> set[str]:
    """Packages of ours that a file imports from, anywhere in it; leaves are everyone's."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.split(".")[0] for name in found - LEAVES} & set(UPSTREAM)


@pytest.mark.parametrize("package", UPSTREAM)
def test_imports_point_upstream_only(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        name = str(path.relative_to(ROOT))
        if name.removesuffix(".py").replace("/", ".") in LEAVES:
            allowed = set()
        else:
            allowed = set(UPSTREAM) if name in MAY_NAME_ALL else UPSTREAM[package]
        assert imported(path) <= allowed, name


def test_nothing_but_the_command_line_knows_the_drawn_world() -> None:
    for package in UPSTREAM:
        for path in (ROOT / package).rglob("*.py"):
            if "world" not in path.parts and path.name != "cli.py":
                assert not re.search(r"\bworld\b", path.read_text(), re.I), path
