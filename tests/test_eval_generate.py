"""Pictures in shards: what is drawn, from which noise, and the same bytes whoever draws them and whoever is lost."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from test_recap_engines import free_port

from eval import generate
from eval.config import Generate
from eval.drawn import FORGOTTEN_FILE, iterate, picture, read_list, shards
from eval.generate import forget, listed, places_in_sets, run
from eval.prompts import Prompt
from recap.config import Model
from recap.errors import UserError
from recap.rundir import StageDir
from recap.sample import decode_image

LONG = "A red circle is at the left of a blue square. " * 12
PROMPTS = ["a red circle", LONG, "two stars", "a dog", LONG.replace("red", "green"),
           "<img src=x> 👩‍👩‍👧‍👦 مرحبا", "a cat"]
SMALL = {"batch_size": 2, "num_inference_steps": 2, "shard_size": 4}


def draw(folder: Path, models: Path, prompts: list[str] = PROMPTS, **settings: Any) -> Path:
    listing = folder.parent / "prompts.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    stage = StageDir(folder, {})
    stage.begin()
    config = Generate(prompts=str(listing), **{**SMALL, **settings})
    result = run(stage, Model(model=str(models / "stable-diffusion-0")), "train", config, "alt", "cpu")
    assert result["num_images"] == len(prompts) * config.num_images_per_prompt
    assert result["num_prompts"] == sum(result["num_windows"].values()) == len(prompts)
    return folder


def test_what_is_no_number_is_no_picture(world_models: Path, tmp_path: Path) -> None:
    models = Path(shutil.copytree(world_models / "stable-diffusion-0", tmp_path / "models" / "stable-diffusion-0"))
    [path] = (models / "unet").glob("*.safetensors")
    save_file({name: value * float("nan") for name, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match="draws no finite numbers of 'a red circle'"):
        draw(tmp_path / "alt", models.parent)
    with pytest.raises(ValidationError):
        Generate(guidance_scale=float("inf"))


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same to the byte."""
    names = ("*.tar", "*_stats.json", "prompts.jsonl")
    return {path.name: path.read_bytes() for name in names for path in sorted(folder.glob(name))}


def pixels(folder: Path) -> dict[tuple[str, int | None], np.ndarray]:
    """Prompt and seed → picture, signed."""
    return {(each.prompt.text, each.seed): np.asarray(decode_image(png), dtype=int) for each, png in iterate(folder)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, world_models: Path) -> Path:
    return draw(tmp_path_factory.mktemp("whole") / "alt", world_models)


def test_every_prompt_is_drawn_and_listed(whole: Path) -> None:
    rows = [json.loads(line) for line in (whole / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [" ".join(prompt.split()) for prompt in PROMPTS]
    assert {row["set"] for row in rows} == {"prompts"} and not any(row["about"] for row in rows)
    assert [row["index"] for row in rows] == list(range(7)) and len({row["seed"] for row in rows}) == 7
    assert [row["prompt_index"] for row in rows] == list(range(7))
    assert [row["windows"] > 1 for row in rows] == [prompt.startswith("A ") for prompt in PROMPTS]
    assert {array.shape for array in pixels(whole).values()} == {(32, 32, 3)}
    assert not list(whole.glob("*.png"))


def test_shards_are_those_of_webdataset_in_the_order_of_the_list(whole: Path) -> None:
    found: dict[str, bytes] = {}
    for path, indices in ((whole / "00000.tar", range(4)), (whole / "00001.tar", range(4, 7))):
        with tarfile.open(path) as tar:
            found |= {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
            assert tar.getnames() == [f"{index:08d}.{kind}" for index in indices for kind in ("png", "txt")]
        stats = json.loads((whole / f"{path.stem}_stats.json").read_bytes())
        assert stats["count"] == stats["successes"] == len(indices)
    assert [found[f"{index:08d}.txt"].decode() for index in range(7)] == [
        " ".join(prompt.split()) for prompt in PROMPTS]


def test_sets_and_what_is_said_of_prompts_are_listed(world_models: Path, tmp_path: Path) -> None:
    about = {"asks": "a dog\u2028on a mat", "complete": True}
    (tmp_path / "seen.jsonl").write_text(json.dumps({"prompt": "a dog", **about}) + "\n", encoding="utf-8")
    (tmp_path / "probe.txt").write_text("a cat\n")
    stage = StageDir(tmp_path / "alt", {})
    stage.begin()
    config = Generate(prompts=[str(tmp_path / "seen.jsonl"), str(tmp_path / "probe.txt")], num_inference_steps=1)
    run(stage, Model(model=str(world_models / "stable-diffusion-0")), "train", config, "alt", "cpu")
    assert [each.prompt for each in read_list(stage.path)] == [
        Prompt("a dog", "seen", about), Prompt("a cat", "probe", {})]


def test_resumed_equals_whole(whole: Path, world_models: Path, tmp_path: Path) -> None:
    folder = draw(tmp_path / "alt", world_models)
    untouched = (folder / "00000.tar").stat().st_mtime_ns
    (folder / "00001_stats.json").unlink()
    (folder / "00001.tar").write_bytes(b"what was not marked as done")
    (folder / ".00001.tar.tmp").write_bytes(b"what a kill leaves")
    assert contents(draw(folder, world_models)) == contents(whole)
    assert (folder / "00000.tar").stat().st_mtime_ns == untouched
    (folder / "00000.tar").unlink()  # by hand: its stats do not speak for it
    assert contents(draw(folder, world_models)) == contents(whole)


def test_an_image_depends_on_its_prompt_and_seed_alone(whole: Path, world_models: Path, tmp_path: Path) -> None:
    one = pixels(whole)
    for place, settings in enumerate([{"batch_size": 1}, {"batch_size": 7, "shard_size": 7}, {"shard_size": 1}]):
        other = pixels(draw(tmp_path / f"{place}" / "alt", world_models, **settings))
        assert list(other) == list(one)
        assert max(abs(one[each] - other[each]).max() for each in one) <= 1  # sums of another size round otherwise
    draw(tmp_path / "other" / "alt", world_models, PROMPTS[:1], seed=1)
    [first], [reseeded] = list(one.values())[:1], pixels(tmp_path / "other" / "alt").values()
    assert abs(first - reseeded).max() > 30


def test_several_pictures_of_a_prompt_begin_with_the_usual_one(whole: Path, world_models: Path, tmp_path: Path
                                                               ) -> None:
    folder = draw(tmp_path / "alt", world_models, PROMPTS[:3], num_images_per_prompt=2, seed=0)
    assert [(each.prompt_index, each.prompt.text) for each in read_list(folder)] == [
        (place, " ".join(PROMPTS[place].split())) for place in (0, 0, 1, 1, 2, 2)]
    found, one = pixels(folder), pixels(whole)
    assert len(found) == 6
    shared = list(one)[:3]
    assert [each for each in found if each in one] == shared
    assert max(abs(found[each] - one[each]).max() for each in shared) <= 1
    again = pixels(draw(tmp_path / "again" / "alt", world_models, PROMPTS[:3], seed=1))
    assert set(again) | set(shared) == set(found)  # copy k is drawn as the first of seed + k


def test_no_pipeline_is_one_line(tmp_path: Path, world_models: Path) -> None:
    with pytest.raises(UserError, match=r"train\.model: no folder at"):
        draw(tmp_path / "alt", world_models / "none")


def test_noise_goes_by_the_place_in_the_set() -> None:
    prompts = [Prompt(str(index), name) for index, name in enumerate(("a", "a", "b", "a", "b", "c"))]
    assert places_in_sets(prompts) == [0, 1, 0, 2, 1, 0]
    pictures = listed(prompts, Generate(num_images_per_prompt=3, seed=5))
    assert [each.index for each in pictures] == list(range(18))
    seeds = {(each.prompt.set, each.seed) for each in pictures}
    assert len(seeds) == 18 and pictures[0].seed == pictures[6].seed == pictures[15].seed


# --- who draws -----------------------------------------------------------------------------------------------------


def test_memory_that_holds_a_part_of_a_batch_takes_it_in_parts(
        whole: Path, world_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, real = 1, generate.draw

    def scarce(pipe: Any, prompts: list[str], *others: Any, **options: Any) -> list[Image.Image]:
        if len(prompts) > limit:
            raise MemoryError
        return real(pipe, prompts, *others, **options)

    monkeypatch.setattr(generate, "draw", scarce)
    one, other = pixels(whole), pixels(draw(tmp_path / "alt", world_models))
    assert max(abs(one[each] - other[each]).max() for each in one) <= 1
    limit = 0
    with pytest.raises(UserError, match="memory does not suffice for a single picture"):
        draw(tmp_path / "none" / "alt", world_models)


def test_what_no_rank_has_drawn_is_not_called_done(world_models: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate.engines, "work", lambda *_: iter(()))
    with pytest.raises(UserError, match=r"2 of 2 shards are not drawn, .*00000\.tar first.*run the same command again"):
        draw(tmp_path / "alt", world_models)


@pytest.mark.full
def test_a_lost_worker_changes_no_byte(whole: Path, world_models: Path, tmp_path: Path,
                                       capfd: pytest.CaptureFixture[str]) -> None:
    """One of two is killed when the first shard is done; the other, or a third, does what it had."""
    expected = contents(draw(tmp_path / "whole" / "alt", world_models, shard_size=1))
    folder = tmp_path / "lost" / "alt"
    process = multiprocessing.get_context("spawn").Process(
        target=draw, args=(folder, world_models), kwargs={"shard_size": 1, "workers": 2})
    process.start()
    lost = 0
    while process.is_alive():
        if not lost and len(list(folder.glob("*_stats.json"))) >= 1 and (found := _workers(process.pid)):
            os.kill(lost := found[0], signal.SIGKILL)
        time.sleep(0.02)
    process.join()
    assert lost and process.exitcode == 0 and "was ended by SIGKILL" in capfd.readouterr().err
    assert contents(folder) == expected


def _workers(process: int | None) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.full
def test_a_killed_run_ends_with_the_same_bytes(world_models: Path, tmp_path: Path) -> None:
    expected = contents(draw(tmp_path / "whole" / "alt", world_models, shard_size=1, num_images_per_prompt=2))
    folder, lot, kills = tmp_path / "killed" / "alt", random.Random(0), 0
    while True:
        before = len(list(folder.glob("*_stats.json")))
        process = multiprocessing.get_context("spawn").Process(
            target=draw, args=(folder, world_models), kwargs={"shard_size": 1, "num_images_per_prompt": 2})
        process.start()
        while kills < 3 and process.is_alive() and len(list(folder.glob("*_stats.json"))) <= before:
            time.sleep(0.01)
        time.sleep(lot.uniform(0, 0.1))
        if kills < 3 and process.is_alive():
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert kills and contents(folder) == expected
    assert not list(folder.glob(".*"))


@pytest.mark.full
def test_ranks_share_the_shards(world_models: Path, tmp_path: Path) -> None:
    expected = contents(draw(tmp_path / "whole" / "alt", world_models, shard_size=1))
    code = ("import sys, pathlib, test_eval_generate as t\n"
            "from recap.rundir import StageDir\n"
            "folder, models = map(pathlib.Path, sys.argv[1:])\n"
            "t.rank(folder, models)\n")
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    folder, port = tmp_path / "ranks" / "alt", str(free_port())
    folder.mkdir(parents=True)
    (folder.parent / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(folder), str(world_models)], text=True,
                              env={**os.environ, "PYTHONPATH": paths, "RANK": str(rank), "WORLD_SIZE": "2",
                                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in range(2)]
    assert [each.wait(timeout=120) for each in ranks] == [0, 0]
    assert contents(folder) == expected
    shared = [json.loads((folder / name).read_bytes())["shards"] for name in ("progress.json", "progress-1.json")]
    assert sum(shared) == len(PROMPTS)


def rank(folder: Path, models: Path) -> None:
    """What one of torchrun's processes does."""
    stage = StageDir(folder, {})
    config = Generate(prompts=str(folder.parent / "prompts.txt"), **{**SMALL, "shard_size": 1})
    run(stage, Model(model=str(models / "stable-diffusion-0")), "train", config, "alt", "cpu")


@pytest.mark.full
def test_actors_of_ray_draw_the_same_bytes(whole: Path, world_models: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'recap-t2i[ray]'")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    try:
        assert contents(draw(tmp_path / "alt", world_models, engine="ray", workers=2)) == contents(whole)
    finally:
        ray.shutdown()


# --- pictures that are not kept ------------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path: Path, whole: Path) -> Iterator[Path]:
    """A copy to be forgotten."""
    folder = tmp_path / "alt"
    folder.mkdir()
    for name, content in contents(whole).items():
        (folder / name).write_bytes(content)
    yield folder


def test_what_is_forgotten_leaves_list_stats_and_thumbnails(drawn: Path, whole: Path) -> None:
    forget(drawn)
    assert {path.name for path in drawn.iterdir()} == {
        "prompts.jsonl", "00000_stats.json", "00001_stats.json", FORGOTTEN_FILE, "thumbnails.tar"}
    assert read_list(drawn) == read_list(whole)
    for index in range(len(PROMPTS)):
        kept, png = picture(drawn, index), picture(whole, index)
        assert kept is not None and png is not None
        assert np.array_equal(np.asarray(decode_image(kept)), np.asarray(decode_image(png)))  # few pixels: PNG
    before = hashlib.sha256((drawn / "thumbnails.tar").read_bytes()).digest()
    forget(drawn)
    assert hashlib.sha256((drawn / "thumbnails.tar").read_bytes()).digest() == before
    with pytest.raises(UserError, match=r"were not kept \(generate\.keep=false\): to draw them again, delete .*done"):
        shards(drawn)


def test_what_is_forgotten_is_drawn_again_when_asked_for(drawn: Path, whole: Path, world_models: Path) -> None:
    forget(drawn)
    assert contents(draw(drawn, world_models)) == contents(whole)
    assert not (drawn / FORGOTTEN_FILE).exists()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_forgetting_that_is_killed_goes_on(drawn: Path, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever it writes or deletes: until the mark is there all pictures are, and from then on none is missed."""
    left = num_steps

    def step(act: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return act(*arguments, **options)
        return counted

    with monkeypatch.context() as patched:
        patched.setattr(generate, "write_thumbnails", step(generate.write_thumbnails))
        patched.setattr(generate, "write_bytes", step(generate.write_bytes))
        patched.setattr(Path, "unlink", step(Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            forget(drawn)
    if not (drawn / FORGOTTEN_FILE).exists():
        assert len(list(iterate(drawn))) == len(PROMPTS)
    forget(drawn)
    assert not list(drawn.glob("0*.tar")) and picture(drawn, 6) is not None


def test_nothing_is_forgotten_of_what_is_not_whole(drawn: Path) -> None:
    (drawn / "00001_stats.json").unlink()
    with pytest.raises(UserError, match="3 of 7 pictures are missing"):
        forget(drawn)
    assert (drawn / "00000.tar").is_file() and (drawn / "00001.tar").is_file()
