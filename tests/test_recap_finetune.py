"""Tuning the captioner: every pair in every epoch, exact resume, and one clear line for what is wrong."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recap import finetune
from recap.captioners import open_captioner
from recap.config import Captioner, Finetune
from recap.errors import UserError
from recap.finetune import Pair, draw_batch, load_pairs, run
from recap.rundir import StageDir
from recap.shards import Reject, ShardWriter, read_shard

QUICK = Finetune(steps=6, batch_size=4, micro_batch_size=2, lr=1e-2, checkpoint_every=2, lora_rank=4)
PROMPTS = {"short": "A short caption:", "long": "A detailed caption:"}


@pytest.fixture(scope="module")
def stitched(world_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Drawn images whose exact description serves as `long`, and its first words as `short`."""
    path = tmp_path_factory.mktemp("stitched") / "00000.tar"
    rejects: list[Reject] = []
    with ShardWriter(str(path)) as writer:
        for sample in list(read_shard(str(world_shards / "evaluation" / "00000.tar"), rejects))[:6]:
            exact = sample.members["exact.txt"]
            sample.members |= {"long.txt": exact, "short.txt": b" ".join(exact.split()[:5])}
            writer.write(sample)
    return [str(path)]


def tuned(out: Path, shards: list[str], models: Path, config: Finetune = QUICK) -> bytes:
    stage = StageDir(out, {})
    stage.begin()
    run(stage, shards, config, Captioner(model=str(models / "blip2"), dtype="float32"), PROMPTS, "cpu")
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_that_was_stopped_ends_with_the_same_weights(stitched: list[str], world_models: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuned(tmp_path / "whole", stitched, world_models)

    def stopping(pairs: list[Pair], step: int, size: int, seed: int) -> list[Pair]:
        if step == 5:  # one step after a checkpoint
            raise KeyboardInterrupt
        return draw_batch(pairs, step, size, seed)

    monkeypatch.setattr(finetune, "draw_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "stopped", stitched, world_models)
    assert json.loads((tmp_path / "stopped" / "checkpoint" / "state.json").read_text()) == {"step": 4}
    monkeypatch.undo()
    assert tuned(tmp_path / "stopped", stitched, world_models) == whole


def test_micro_batches_give_the_weights_of_the_batch(stitched: list[str], world_models: Path) -> None:
    """The loss is a mean over tokens: short and long captions in different micro-batches must keep their weight."""
    found = []
    for size in (None, 1):
        torch.manual_seed(0)
        captioner = open_captioner(Captioner(model=str(world_models / "blip2"), dtype="float32"), "cpu")
        captioner.add_adapter(QUICK)
        captioner.set_training(False)  # dropout would draw other masks for other batches
        pairs, _ = load_pairs(stitched, ["short", "long"], captioner, 256)
        weights = captioner.trainable()
        config = QUICK.model_copy(update={"micro_batch_size": size})
        optimizer = torch.optim.SGD(weights.values(), lr=1)
        loss = finetune._train_step(captioner, pairs[:4], PROMPTS, optimizer, config, 0)
        found.append((loss, torch.cat([weight.detach().flatten() for weight in weights.values()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)


def test_the_loss_falls(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    tuned(tmp_path, stitched, world_models, QUICK.model_copy(update={"steps": 60, "lora_dropout": 0.0}))
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events[-1]["loss"] < 0.8 * events[0]["loss"]


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 20))
def test_every_epoch_draws_every_pair_once(num_pairs: int, batch_size: int, steps: int) -> None:
    pairs = [Pair(str(i), b"", "short", str(i)) for i in range(num_pairs)]
    drawn = [pair.uid for step in range(steps) for pair in draw_batch(pairs, step, batch_size, 0)]
    for start in range(0, len(drawn) - num_pairs + 1, num_pairs):
        assert Counter(drawn[start:start + num_pairs]) == Counter(pair.uid for pair in pairs)


def test_every_style_of_every_image_is_a_pair_and_long_captions_are_cut_and_counted(stitched: list[str],
                                                                                    world_models: Path) -> None:
    captioner = open_captioner(Captioner(model=str(world_models / "blip2"), dtype="float32"), "cpu")
    pairs, num_cut = load_pairs(stitched, ["short", "long", "rich"], captioner, 256)
    assert Counter(pair.style for pair in pairs) == {"short": 6, "long": 6} and num_cut == 0
    pairs, num_cut = load_pairs(stitched, ["long"], captioner, 8)
    assert num_cut == 6


def test_shards_without_styled_captions_are_one_clear_line(world_shards: Path, world_models: Path,
                                                           tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stitch them first"):
        tuned(tmp_path, [str(world_shards / "evaluation" / "00000.tar")], world_models)


def test_a_target_that_no_layer_has_is_one_clear_line(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finetune\.lora_targets"):
        tuned(tmp_path, stitched, world_models, QUICK.model_copy(update={"lora_targets": ["wq"]}))


def test_a_loss_that_is_not_finite_stops_and_names_the_images(stitched: list[str], world_models: Path,
                                                              tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf).*00000/"):
        tuned(tmp_path, stitched, world_models, QUICK.model_copy(update={"lr": 1e30}))
