"""Training: exact resume, and a diffusers folder at the end."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recap.rundir import StageDir
from train_t2i.config import Arm, Train
from train_t2i.data import Batch, Stream
from train_t2i.train import run

Run = tuple[Path, dict[str, torch.Tensor]]
ARM = Arm(captions={"alt": 1, "exact": 1})


def config(models: Path, **changes: object) -> Train:
    return Train(model=str(models / "stable-diffusion-0"), resolution=32, steps=5, batch_size=4, lr=1e-3,
                 checkpoint_every=2, **changes)


def trained(out: Path, shards: Path, settings: Train) -> dict[str, torch.Tensor]:
    stage = StageDir(out, {})
    stage.begin()
    run(stage, sorted(map(str, (shards / "train").glob("*.tar"))), settings, ARM, 0, "alt", "cpu")
    return {f"{part}.{name}": tensor for part in ("unet", "text_encoder")
            for file in (out / "pipeline" / part).glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def whole(world_models: Path, world_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing stopped: its folder and its weights."""
    out = tmp_path_factory.mktemp("whole")
    return out, trained(out, world_shards, config(world_models))


def test_a_run_that_was_stopped_ends_with_the_same_weights(whole: Run, world_models: Path, world_shards: Path,
                                                           tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Stream.take

    def stopping(self: Stream, *arguments: int) -> Batch:
        if self.offset >= 12:  # the fourth step; the last checkpoint is of the second
            raise KeyboardInterrupt
        return take(self, *arguments)

    monkeypatch.setattr(Stream, "take", stopping)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", world_shards, config(world_models))
    assert json.loads((tmp_path / "stopped" / "checkpoint" / "state.json").read_text())["step"] == 2
    monkeypatch.undo()
    again = trained(tmp_path / "stopped", world_shards, config(world_models))
    assert again.keys() == whole[1].keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole[1].items())


def test_micro_batches_change_memory_not_the_result(whole: Run, world_models: Path, world_shards: Path,
                                                    tmp_path: Path) -> None:
    trained(tmp_path, world_shards, config(world_models, micro_batch_size=1))
    losses = [json.loads((folder / "log.jsonl").read_text())["loss"] for folder in (whole[0], tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_unet_and_text_encoder_both_change_and_the_vae_does_not(whole: Run, world_models: Path) -> None:
    out, after = whole
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before = load_file(world_models / "stable-diffusion-0" / part / f"{file}.safetensors")
        assert any(not torch.equal(after[f"{part}.{name}"], tensor) for name, tensor in before.items())
    vae = "vae/diffusion_pytorch_model.safetensors"
    before, now = load_file(world_models / "stable-diffusion-0" / vae), load_file(out / "pipeline" / vae)
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_the_text_encoder_can_learn_at_a_rate_of_its_own(world_models: Path, world_shards: Path,
                                                         tmp_path: Path) -> None:
    settings = config(world_models, ema_decay=0.0, weight_decay=0.0, text_encoder_lr=1e-5)
    after, moved = trained(tmp_path, world_shards, settings), {}
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before = load_file(world_models / "stable-diffusion-0" / part / f"{file}.safetensors")
        moved[part] = max((after[f"{part}.{name}"] - tensor).abs().max().item() for name, tensor in before.items())
    assert moved["unet"] > 1e-3
    assert 0 < moved["text_encoder"] < 1e-4  # five steps, none of which is much longer than the rate


def test_a_rate_for_a_text_encoder_that_is_not_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="train_text_encoder = false"):
        Train(train_text_encoder=False, text_encoder_lr=1e-5)
