"""The training loop: exact resume, micro-batches, what isn't finite, memory that doesn't suffice; what it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recap.errors import UserError
from recap.rundir import StageDir
from train_t2i import export
from train_t2i.config import Arm, Train
from train_t2i.data import Batch
from train_t2i.model import Diffusion
from train_t2i.train import check, run

ARM = Arm(captions={"alt": 1, "exact": 1})


def config(models: Path, **changes: object) -> Train:
    return Train(**({"model": str(models / "stable-diffusion-0"), "resolution": 32, "steps": 5, "batch_size": 4,
                     "lr": 1e-3, "checkpoint_every": 2, "log_every": 1, "num_workers": 0} | changes))


def train(out: Path, shards: Path, settings: Train) -> dict[str, Any]:
    stage = StageDir(out, {})
    stage.begin()
    return run(stage, sorted(map(str, (shards / "train").glob("*.tar"))), settings, ARM, 0, "alt", "cpu")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": tensor for part in ("unet", "text_encoder")
            for file in (out / "pipeline" / part).glob("*.safetensors") for name, tensor in load_file(file).items()}


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


def losses(out: Path) -> dict[int, float]:
    """Of every step; what is logged again after a stop takes the place of what was there."""
    return {event["step"]: event["loss"] for event in events(out, "step")}


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(world_models: Path, world_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    train(out, world_shards, config(world_models))
    return out


class Spoilt:
    """The model's forward, which from its `first` call on, `count` times, does something else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, count: int, instead: Any) -> None:
        self.calls, forward = 0, Diffusion.forward

        def spoilt(model: Diffusion, batch: Batch) -> torch.Tensor:
            self.calls += 1
            return instead(forward, model, batch) if first <= self.calls < first + count else forward(model, batch)

        monkeypatch.setattr(Diffusion, "forward", spoilt)


def stop(*_: Any) -> torch.Tensor:
    raise KeyboardInterrupt


def not_a_number(forward: Any, model: Diffusion, batch: Batch) -> torch.Tensor:
    return forward(model, batch) * torch.nan


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_ends_with_the_same_weights(whole: Path, world_models: Path, world_shards: Path,
                                                           tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Spoilt(patch, 4, 1, stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, world_shards, config(world_models))
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 2
    result = train(tmp_path, world_shards, config(world_models))
    assert losses(tmp_path) == losses(whole)
    assert is_equal(weights(tmp_path), weights(whole))
    assert result["images"] == 20


def test_it_goes_on_with_another_number_of_workers(whole: Path, world_models: Path, world_shards: Path,
                                                   tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Spoilt(patch, 4, 1, stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, world_shards, config(world_models, num_workers=1))
    train(tmp_path, world_shards, config(world_models, num_workers=3))
    assert is_equal(weights(tmp_path), weights(whole))


def test_a_checkpoint_of_another_model_is_one_clear_line(world_models: Path, world_shards: Path,
                                                         tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Spoilt(patch, 4, 1, stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, world_shards, config(world_models))
    with pytest.raises(UserError, match=r"is of another model \(text_encoder\..*: give the run another"):
        train(tmp_path, world_shards, config(world_models, train_text_encoder=False))


# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_change_memory_not_the_result(size: int, whole: Path, world_models: Path, world_shards: Path,
                                                    tmp_path: Path) -> None:
    train(tmp_path, world_shards, config(world_models, micro_batch_size=size))
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


def test_where_memory_does_not_suffice_the_micro_batch_is_halved_and_the_batch_stays(
        whole: Path, world_models: Path, world_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def small(forward: Any, model: Diffusion, batch: Batch) -> torch.Tensor:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(model, batch)

    Spoilt(monkeypatch, 3, 100, small)  # in the third step
    train(tmp_path, world_shards, config(world_models))
    assert sizes == [4, *[2] * 6]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


def test_a_backward_that_stopped_half_way_leaves_no_gradient_behind(
        whole: Path, world_models: Path, world_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(forward: Any, model: Diffusion, batch: Batch) -> torch.Tensor:
        if len(batch) > 2:
            forward(model, batch).sum().backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(model, batch)

    Spoilt(monkeypatch, 3, 100, half)
    train(tmp_path, world_shards, config(world_models))
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


def test_what_does_not_fit_one_image_at_a_time_is_one_clear_line(world_models: Path, world_shards: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    spoilt = Spoilt(monkeypatch, 1, 100, full)
    with pytest.raises(UserError, match=r"one image at a time: set train\.gradient_checkpointing=true"):
        train(tmp_path, world_shards, config(world_models))
    assert spoilt.calls == 3  # 4, 2, 1


def test_another_error_is_not_taken_for_one_of_memory(world_models: Path, world_shards: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> torch.Tensor:
        raise RuntimeError("a size is not another")

    spoilt = Spoilt(monkeypatch, 2, 1, wrong)
    with pytest.raises(RuntimeError, match="a size is not another"):
        train(tmp_path, world_shards, config(world_models))
    assert spoilt.calls == 2


# --- what is not finite ----------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted_with_its_keys(
        whole: Path, world_models: Path, world_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Spoilt(monkeypatch, 3, 1, not_a_number)
    result = train(tmp_path, world_shards, config(world_models, log_every=5))
    assert result["skipped"] == 1
    remark, = events(tmp_path, "not finite")
    assert remark["step"] == 3 and len(remark["keys"]) == 4 and all("/" in key for key in remark["keys"])
    lines = events(tmp_path, "step")  # at the checkpoints, and at the end
    assert [(line["step"], line["skipped"]) for line in lines] == [(2, 0), (4, 1), (5, 1)]
    assert all(line["loss"] == line["loss"] for line in lines)  # that which is none is not in it
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_after_a_step_that_is_not_finite_the_weights_are_those_of_before(world_models: Path, world_shards: Path,
                                                                        tmp_path: Path) -> None:
    plain = {"ema_decay": 0.0, "warmup_steps": 0}
    train(tmp_path / "two", world_shards, config(world_models, steps=2, **plain))
    with pytest.MonkeyPatch.context() as patch:
        Spoilt(patch, 3, 1, not_a_number)
        train(tmp_path / "three", world_shards, config(world_models, steps=3, **plain))
    assert is_equal(weights(tmp_path / "three"), weights(tmp_path / "two"))


def test_too_many_such_steps_in_a_row_stop_the_run_with_one_clear_line(world_models: Path, world_shards: Path,
                                                                       tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    Spoilt(monkeypatch, 3, 100, not_a_number)
    with pytest.raises(UserError, match=r"gradients of 3 steps in a row are not finite, the last with \d+/.*lower"):
        train(tmp_path, world_shards, config(world_models, max_skipped=2, steps=20))
    assert [event["step"] for event in events(tmp_path, "not finite")] == [3, 4, 5]
    saved = load_file(tmp_path / "checkpoint" / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


# --- what is left ----------------------------------------------------------------------------------------------------


def test_unet_and_text_encoder_both_change_and_the_vae_does_not(whole: Path, world_models: Path) -> None:
    after = weights(whole)
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before = load_file(world_models / "stable-diffusion-0" / part / f"{file}.safetensors")
        assert any(not torch.equal(after[f"{part}.{name}"], tensor) for name, tensor in before.items())
    vae = "vae/diffusion_pytorch_model.safetensors"
    before, now = load_file(world_models / "stable-diffusion-0" / vae), load_file(whole / "pipeline" / vae)
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_the_text_encoder_can_learn_at_a_rate_of_its_own(world_models: Path, world_shards: Path,
                                                         tmp_path: Path) -> None:
    train(tmp_path, world_shards, config(world_models, ema_decay=0.0, weight_decay=0.0, text_encoder_lr=1e-5))
    after, moved = weights(tmp_path), {}
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before = load_file(world_models / "stable-diffusion-0" / part / f"{file}.safetensors")
        moved[part] = max((after[f"{part}.{name}"] - tensor).abs().max().item() for name, tensor in before.items())
    assert moved["unet"] > 1e-3
    assert 0 < moved["text_encoder"] < 1e-4  # five steps, none of which is much longer than the rate


def test_snapshots_are_kept_beside_the_result(world_models: Path, world_shards: Path, tmp_path: Path) -> None:
    train(tmp_path, world_shards, config(world_models, steps=4, snapshot_every=2, ema_device="cpu"))
    assert sorted(folder.name for folder in (tmp_path / "snapshots").iterdir()) == ["0000002", "0000004"]
    unet = "unet/diffusion_pytorch_model.safetensors"
    second, last = (load_file(tmp_path / each / unet) for each in ("snapshots/0000002/pipeline", "pipeline"))
    assert not is_equal(second, last)
    assert is_equal(load_file(tmp_path / "snapshots/0000004/pipeline" / unet), last)


def test_a_snapshot_that_a_kill_left_out_comes_with_the_next_try(world_models: Path, world_shards: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(world_models, steps=3, snapshot_every=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export, "write", stop)
        train(tmp_path, world_shards, settings)
    train(tmp_path, world_shards, settings)
    assert [folder.name for folder in (tmp_path / "snapshots").glob("*/pipeline")] == ["pipeline"]


def test_the_log_says_how_fast_it_goes_and_how_long_data_was_waited_for(whole: Path) -> None:
    lines = events(whole, "step")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and lines[-1]["images"] == 20
    for line in lines:
        assert line["images_per_second"] == pytest.approx(4 / line["step_seconds"], rel=0.02)
        assert 0 <= line["data_share"] < 1 and 0 < line["grad_norm"] <= line["largest_grad_norm"]


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"precision": "fp16"}, "train.precision: fp16 needs a GPU: set it to bf16 or no"),
    ({"optimizer": "adamw8bit"}, "train.optimizer: adamw8bit runs on CUDA, not on the CPU: set it to adamw"),
])
def test_what_the_device_lacks_is_one_clear_line(changes: dict[str, str], message: str, world_models: Path,
                                                 world_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(tmp_path, world_shards, config(world_models, **changes))


def test_deepspeed_is_refused_with_what_to_do_instead(world_models: Path, world_shards: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed is not supported: launch with --use_fsdp"):
        train(tmp_path, world_shards, config(world_models))


@pytest.mark.parametrize(("version", "changes", "message"), [
    ("1", {}, "FSDP 1 is not supported: launch with --use_fsdp --fsdp_version 2"),
    ("2", {"optimizer": "adamw8bit"}, "train.optimizer: adamw8bit does not go with FSDP"),
    ("2", {"precision": "fp16"}, "train.precision: fp16 does not go with FSDP"),
    ("2", {"ema_device": "cpu"}, "train.ema_device: cpu does not go with FSDP"),
])
def test_what_fsdp_cannot_do_is_one_clear_line(version: str, changes: dict[str, str], message: str,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    monkeypatch.setattr("train_t2i.train.find_spec", lambda name: name)
    with pytest.raises(UserError, match=message):
        check(Train(**changes), "cuda")
    check(Train(), "cpu") if version == "2" else None


@pytest.mark.parametrize(("changes", "message"), [
    ({"train_text_encoder": False, "text_encoder_lr": 1e-5}, "train_text_encoder = false"),
    ({"train_text_encoder": False, "train_unet": False}, "nothing would be trained"),
    ({"cache_latents": True, "crop": "random"}, "cache_latents keeps one crop"),
])
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Train(**changes)


@pytest.mark.parametrize(("captions", "message"), [({"alt": -1}, "below 0"), ({"alt": 0}, "every weight is 0")])
def test_weights_by_which_nothing_can_be_drawn_are_refused(captions: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arm(captions=captions)
