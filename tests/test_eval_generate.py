import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.config import Generate
from eval.evaluate import read_drawn
from eval.generate import image_path, places_in_sets, run
from eval.prompts import Prompt
from recap.config import Model
from recap.errors import UserError
from recap.rundir import StageDir

LONG = "A red circle is at the left of a blue square. " * 12
PROMPTS = ["a red circle", LONG, "two stars", "a dog", LONG.replace("red", "green"),
           "<img src=x> 👩‍👩‍👧‍👦 مرحبا", "a cat"]


def draw(folder: Path, models: Path, prompts: list[str] = PROMPTS, seed: int = 0, batch_size: int = 2) -> StageDir:
    listing = folder.parent / "prompts.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    stage = StageDir(folder, {})
    stage.begin()
    config = Generate(prompts=str(listing), batch_size=batch_size, num_inference_steps=2, seed=seed)
    result = run(stage, Model(model=str(models / "stable-diffusion-0")), "train", config, "alt", "cpu")
    assert result["num_images"] == len(prompts)
    return stage


def contents(stage: StageDir) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(stage.path.glob("*.png"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, world_models: Path) -> StageDir:
    return draw(tmp_path_factory.mktemp("whole") / "alt", world_models)


def test_every_prompt_is_drawn_and_listed(whole: StageDir) -> None:
    rows = [json.loads(line) for line in (whole.path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [" ".join(prompt.split()) for prompt in PROMPTS]
    assert {row["set"] for row in rows} == {"prompts"} and not any(row["about"] for row in rows)
    assert [row["index"] for row in rows] == list(range(7)) and len({row["seed"] for row in rows}) == 7
    assert [row["windows"] > 1 for row in rows] == [prompt.startswith("A ") for prompt in PROMPTS]
    assert list(contents(whole)) == [f"{index:05d}.png" for index in range(7)]
    assert {Image.open(image_path(whole.path, index)).size for index in range(7)} == {(32, 32)}


def test_sets_and_what_is_said_of_prompts_are_listed(world_models: Path, tmp_path: Path) -> None:
    about = {"asks": "a dog\u2028on a mat", "complete": True}
    (tmp_path / "seen.jsonl").write_text(json.dumps({"prompt": "a dog", **about}) + "\n", encoding="utf-8")
    (tmp_path / "probe.txt").write_text("a cat\n")
    stage = StageDir(tmp_path / "alt", {})
    stage.begin()
    config = Generate(prompts=[str(tmp_path / "seen.jsonl"), str(tmp_path / "probe.txt")], num_inference_steps=1)
    run(stage, Model(model=str(world_models / "stable-diffusion-0")), "train", config, "alt", "cpu")
    assert [each.prompt for each in read_drawn(stage.path)] == [
        Prompt("a dog", "seen", about), Prompt("a cat", "probe", {})]


def test_resumed_equals_whole(whole: StageDir, world_models: Path, tmp_path: Path) -> None:
    stage = draw(tmp_path / "alt", world_models)
    untouched = image_path(stage.path, 0).stat().st_mtime_ns  # 0 and 2 share a batch, as do 3 and 5
    for index in (3, 1):
        image_path(stage.path, index).unlink()
    (stage.path / ".00003.png.tmp").write_bytes(b"what a kill leaves")
    image_path(stage.path, 5).write_bytes(b"drawn anew with its batch")
    stage = draw(tmp_path / "alt", world_models)
    assert contents(stage) == contents(whole)
    assert image_path(stage.path, 0).stat().st_mtime_ns == untouched


def test_an_image_depends_on_its_prompt_and_seed_alone(whole: StageDir, world_models: Path, tmp_path: Path) -> None:
    alone = draw(tmp_path / "alt", world_models, batch_size=1)
    for index in range(len(PROMPTS)):
        one, other = (np.asarray(Image.open(image_path(stage.path, index)), dtype=int) for stage in (alone, whole))
        assert abs(one - other).max() <= 1  # sums of another batch size may round otherwise
    draw(tmp_path / "other" / "alt", world_models, PROMPTS[:1], seed=1)
    one, other = (np.asarray(Image.open(image_path(folder, 0)), dtype=int)
                  for folder in (tmp_path / "other" / "alt", whole.path))
    assert abs(one - other).max() > 30


def test_no_pipeline_is_one_line(tmp_path: Path, world_models: Path) -> None:
    with pytest.raises(UserError, match=r"train\.model: no folder at"):
        draw(tmp_path / "alt", world_models / "none")


def test_noise_goes_by_the_place_in_the_set() -> None:
    prompts = [Prompt(str(index), name) for index, name in enumerate(("a", "a", "b", "a", "b", "c"))]
    assert places_in_sets(prompts) == [0, 1, 0, 2, 1, 0]
