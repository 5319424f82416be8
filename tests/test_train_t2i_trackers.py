"""What TensorBoard is told of a training."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recap.processes import open_accelerator
from recap.rundir import StageDir
from train_t2i.config import Arm, Train
from train_t2i.trackers import PROJECT, open_trackers
from train_t2i.train import run

PROMPTS = ["a red ring", "a blue bar"]


def told(out: Path) -> EventAccumulator:
    found = EventAccumulator(str(out / PROJECT), {"images": 0, "tensors": 0, "scalars": 0})
    found.Reload()
    return found


@pytest.fixture(scope="module")
def trained(world_models: Path, world_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that TensorBoard was told of."""
    out = tmp_path_factory.mktemp("told")
    (out / "prompts.txt").write_text("\n".join(PROMPTS))
    config = Train(model=str(world_models / "stable-diffusion-0"), resolution=32, steps=2, batch_size=2, log_every=1,
                   num_workers=0, trackers=["tensorboard"], validation={
                       "prompts": str(out / "prompts.txt"), "every": 9, "num_inference_steps": 1,
                       "clip_score": f"local-dir:{world_models / 'clip'}"})
    stage = StageDir(out, {})
    stage.begin()
    run(stage, sorted(map(str, (world_shards / "train").glob("*.tar"))), config, Arm(captions={"alt": 1}), 0, "alt",
        "cpu")
    return out


def test_a_training_tells_its_losses_and_figures(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    for event, key in (("step", "loss"), ("step", "lr"), ("validation", "clip_score")):
        logged = {line["step"]: line[key] for line in lines if line["event"] == event}
        found = {scalar.step: scalar.value for scalar in told(trained).Scalars(key)}
        assert found == pytest.approx(logged, rel=1e-6) and len(found) == 2


def test_it_shows_its_pictures_and_their_prompts(trained: Path) -> None:
    found = told(trained)
    for index, prompt in enumerate(PROMPTS):
        shown = found.Images(f"pictures/{index:05d}")
        assert [image.step for image in shown] == [0, 2] and (shown[0].width, shown[0].height) == (32, 32)
        written, = found.Tensors(f"prompts/{index:05d}/text_summary")
        assert written.tensor_proto.string_val == [prompt.encode()]
    last = Image.open(trained / "validation/0000002/00001.png")
    (trained / "shown.png").write_bytes(found.Images("pictures/00001")[1].encoded_image_string)
    assert (np.asarray(Image.open(trained / "shown.png")) == np.asarray(last)).all()


def test_it_tells_how_it_was_asked_to_train(trained: Path) -> None:
    text, = told(trained).Tensors("config/text_summary")
    assert b'"batch_size": 2' in text.tensor_proto.string_val[0]
    assert [path.is_file() for path in (trained / PROJECT).iterdir()] == [True]


def test_what_is_told_again_after_a_stop_takes_the_place_of_what_was(tmp_path: Path) -> None:
    for begin, end, loss in ((0, 5, 1.0), (2, 6, 2.0)):
        accelerator = open_accelerator("no", "cpu", ["tensorboard"], tmp_path)
        open_trackers(accelerator, StageDir(tmp_path, {}), Train(trackers=["tensorboard"]), begin)
        for step in range(begin + 1, end):
            accelerator.log({"loss": loss}, step=step)
        for tracker in accelerator.trackers:
            tracker.finish()
        time.sleep(1)  # the files of one process and second are read by the order of "10" and "9"
    assert [(each.step, each.value) for each in told(tmp_path).Scalars("loss")] == [
        (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
