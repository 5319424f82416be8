"""Points of curves in the plan: one value at a time, of the first seed; what can't be drawn is said before any work."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval.drawn import read_list
from recap.config import validate
from recap.errors import UserError
from recap.pipeline import Experiment, Plan, run

SWEEP = {"guidance_scale": [1, 7.25], "num_inference_steps": [20], "train_steps": [500], "num_prompts": 3}


def plan(folder: Path, sweep: dict[str, Any] | None, train: dict[str, Any] | None = None,
         **generate: Any) -> Plan:
    """Of an experiment with a base, two arms and two seeds, none of whose checkpoints is local."""
    for name in ("prompts.txt", "00000.tar", "reference.tar"):
        if not (folder / name).exists():  # fingerprints cover times
            (folder / name).write_text("a cat\n")
    content = {"name": "mine", "runs": str(folder / "runs"), "device": "cpu", "arms": ["base", "alt", "mix"],
               "seeds": [3, 4], "arm": {"mix": {"guidance_scale": 4}},
               "train": {"shards": str(folder / "00000.tar"), "steps": 1000, "snapshot_every": 250} | (train or {}),
               "generate": {"prompts": str(folder / "prompts.txt"), "sweep": sweep, **generate},
               "evaluate": {"reference": str(folder / "reference.tar")}}
    return Plan(validate(content, Experiment, "mine.toml"))


def folders(found: Plan) -> list[str]:
    return [str(stage.path.relative_to(found.root)) for stage in found.stages()]


def test_every_value_is_one_more_point_of_every_arm_of_the_first_seed(tmp_path: Path) -> None:
    found, usual = folders(plan(tmp_path, SWEEP)), folders(plan(tmp_path, None))
    points = [each for each in found if "sweep" in each]
    assert [each for each in found if each not in points] == usual
    assert points == [f"seed-3/sweep/{arm}/{point}/{stage}" for arm in ("base", "alt", "mix")
                      for point in ("guidance-1", "guidance-7.25", "steps-20", "train-0000500")
                      if (arm, point) != ("base", "train-0000500") for stage in ("generate", "eval")]
    assert found.index(points[0]) == found.index("seed-3/eval/base") + 1


def test_one_value_differs_at_a_time(tmp_path: Path) -> None:
    made = plan(tmp_path, SWEEP)
    stages = {str(stage.path.relative_to(made.root)): stage for stage in made.stages()}
    usual = stages["seed-3/generate/mix"].reads()
    for point, value in [("guidance-7.25", {"guidance_scale": 7.25}), ("steps-20", {"num_inference_steps": 20}),
                         ("train-0000500", {})]:
        reads = stages[f"seed-3/sweep/mix/{point}/generate"].reads()
        assert reads["generate"] == usual["generate"] | {"num_prompts": 3} | value
        assert reads["pipeline"] == usual["pipeline"] and reads.get("step") == (None if value else 500)
    report, need = made.stages()[-1], stages["seed-3/sweep/mix/train-0000500/eval"]
    assert need.path in {each.path for each in report.needs}


def test_points_leave_other_stages_as_they_were(tmp_path: Path) -> None:
    def fingerprints(found: Plan) -> dict[str, str]:
        return {str(stage.path): stage.dir.fingerprint for stage in found.stages()}

    before, after = fingerprints(plan(tmp_path, None)), fingerprints(plan(tmp_path, SWEEP))
    assert {Path(name).name for name in before if before[name] != after[name]} == {"report"}
    more = fingerprints(plan(tmp_path, SWEEP | {"guidance_scale": [1, 2, 7.25]}))
    assert {Path(name).name for name in after if after[name] != more[name]} == {"report"}
    elsewhere = fingerprints(plan(tmp_path, SWEEP, engine="ray", workers=3, keep=False))
    assert elsewhere == after


@pytest.mark.parametrize(("train", "says"), [
    ({"snapshot_every": None}, "train_steps: 500: the training keeps none: set train.snapshot_every"),
    ({"snapshot_every": 300}, "the training keeps one every 300 of 1000 steps: set train.snapshot_every"),
    ({"steps": 499}, "the training keeps one every 250 of 499 steps"),
])
def test_a_step_that_no_snapshot_will_be_of_is_refused_before_any_work(tmp_path: Path, train: dict[str, Any],
                                                                       says: str) -> None:
    with pytest.raises(UserError) as caught:
        run(plan(tmp_path, SWEEP, train).exp)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_step_that_a_finished_training_has_not_kept_is_refused(tmp_path: Path) -> None:
    found = plan(tmp_path, SWEEP)
    train = next(stage for stage in found.stages() if stage.path.name == "alt" and stage.verb == "train")
    train.dir.begin()
    train.dir.finish({})
    with pytest.raises(UserError, match=r"500: the training is done, and there is no .*snapshots/0000500/pipeline:"):
        run(found.exp, "generate")
    (train.path / "snapshots/0000500/pipeline").mkdir(parents=True)
    assert all(stage.dir.state() == "new" for stage in found.stages() if "sweep/alt" in str(stage.path))


@pytest.mark.parametrize(("sweep", "says"), [
    ({"guidance_scale": [3, 5, 3]}, "3.0 is named twice"), ({"guidance_scale": [-1]}, "greater than or equal to 0"),
    ({"train_steps": [0]}, "greater than or equal to 1"), ({"guidance": [1]}, "did you mean generate.sweep.guidance"),
])
def test_bad_values_are_one_line(tmp_path: Path, sweep: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(tmp_path, sweep)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_points_are_drawn(world_models: Path, tmp_path: Path) -> None:
    made = plan(tmp_path, {"guidance_scale": [1], "num_inference_steps": [3], "num_prompts": 2},
                {"model": str(world_models / "stable-diffusion-0")}, num_inference_steps=2)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na fox\n")
    run(made.exp.model_copy(update={"arms": ["base"]}), "generate")
    folders = {name: made.root / name for name in ("seed-3/generate/base", "seed-3/sweep/base/guidance-1/generate",
                                                   "seed-3/sweep/base/steps-3/generate")}
    drawn = {name: read_list(folder) for name, folder in folders.items()}
    first, *points = drawn.values()
    assert len(first) == 3 and all(each == first[:2] for each in points)  # of the same noise
    assert len({(folder / "00000.tar").read_bytes() for folder in folders.values()}) == 3
    for folder in folders.values():
        assert json.loads((folder / "done.json").read_bytes())["num_prompts"] == len(read_list(folder))
