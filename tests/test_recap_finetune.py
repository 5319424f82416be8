"""Tuning a captioner: all pairs in every epoch, exact resume, held-out images, one clear line for what is wrong."""

import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from recap import training
from recap.augment import augment
from recap.caption_sets import CaptionedImage, ImageRef, read_shards
from recap.captioners import open_tunable
from recap.config import Style
from recap.config.captioner import Captioner
from recap.config.finetune import Augment, Finetune, Validation
from recap.errors import UserError
from recap.finetune import run
from recap.pairs import Batches, Pair, draw_batch, to_pairs, usable
from recap.rundir import StageDir
from recap.shards import Reject, ShardWriter, read_shard
from recap.training import Training, with_steps

LORA = {"rank": 4}
QUICK = Finetune(steps=6, batch_size=4, micro_batch_size=2, lr=1e-2, checkpoint_every=2, lora=LORA)
STYLES = {"short": Style(prompt="A short caption:", max_new_tokens=8),
          "long": Style(prompt="A detailed caption:", max_new_tokens=16)}
SMALL = {"hidden_size": 32, "num_layers": 1, "vocab_size": 400, "image_size": 32, "dropout": 0.1}


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


def captioner_of(family: str, models: Path) -> Captioner:
    tables: dict[str, Any] = {
        "blip2": {"model": str(models / "blip2")}, "blip": {"model": str(models / "blip")},
        "clipcap": {"clipcap": {"clip": str(models / "clip-1"), "gpt2": str(models / "gpt2")}},
        "transformer": {"transformer": {**SMALL, "encoder": "none", "patch_size": 8, "num_heads": 2}},
        "cnn_lstm": {"cnn_lstm": {**SMALL, "encoder": str(models / "cnn")}}}
    return Captioner(family=family, dtype="float32", **tables[family])


def tuned(out: Path, shards: list[str], models: Path, config: Finetune = QUICK,
          family: str = "blip2") -> dict[str, Any]:
    stage = StageDir(out, {})
    stage.begin()
    result = run(stage, shards, config, captioner_of(family, models), STYLES, "cpu")
    stage.finish(result)
    return result


def weights(out: Path, name: str = "last") -> bytes:
    return b"".join(file.read_bytes() for file in sorted((out / name).glob("*.safetensors")))


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# --- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["blip2", "blip", "clipcap", "transformer", "cnn_lstm"])
def test_a_run_that_was_stopped_ends_with_the_same_weights(family: str, stitched: list[str], world_models: Path,
                                                           tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = QUICK.model_copy(update={"validation": Validation(share=0.4, every=3), "max_tokens": 24,
                                      "augment": Augment(flip=0.5, crop=0.8, colour=0.2)})
    tuned(tmp_path / "whole", stitched, world_models, config, family)
    step = Training.step

    def stopping(self: Training, parts: Any, bar: Any) -> None:
        if self.done == 5:  # one step after a checkpoint
            raise KeyboardInterrupt
        step(self, parts, bar)

    monkeypatch.setattr(Training, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "stopped", stitched, world_models, config, family)
    assert json.loads((tmp_path / "stopped" / "checkpoint" / "state.json").read_text())["step"] == 4
    monkeypatch.undo()
    tuned(tmp_path / "stopped", stitched, world_models, config, family)
    for name in ("best", "last"):
        assert weights(tmp_path / "stopped", name) == weights(tmp_path / "whole", name) != b""


def test_a_stage_that_is_done_keeps_no_checkpoint(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    tuned(tmp_path, stitched, world_models, QUICK.model_copy(update={"cache_features": True}))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "done.json", "last", "log.jsonl", "quarantine.jsonl", "sheets"]


# --- the same, computed otherwise ----------------------------------------------------------------------------------


def test_micro_batches_give_the_weights_of_the_batch(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    """The loss is a mean over tokens: short and long captions in different micro-batches must keep their weight."""
    found = []
    for size in (None, 1):
        torch.manual_seed(0)
        config = QUICK.model_copy(update={"micro_batch_size": size, "steps": 1, "lora": QUICK.lora.model_copy(
            update={"dropout": 0.0}), "lr": 1e-3})
        captioner = open_tunable(captioner_of("blip2", world_models), "cpu")
        captioner.prepare(config, [])
        images, _ = read_shards(stitched, STYLES)
        pairs, _ = to_pairs(images, STYLES, captioner, 256)
        steps = Training(StageDir(tmp_path / str(size), {}), Accelerator(cpu=True), captioner, STYLES, config, None)
        batches = Batches(pairs, config, captioner.num_tokens, captioner.preprocess)
        loss = steps._backward(batches[0])
        grads = torch.cat([p.grad.flatten() for p in captioner.trainable().values() if p.grad is not None])
        found.append((loss, grads))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)


def test_features_that_are_kept_give_the_same_training(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    for name, kept in (("kept", True), ("new", False)):
        tuned(tmp_path / name, stitched, world_models, QUICK.model_copy(update={"cache_features": kept}))
    losses = [[event["loss"] for event in events(tmp_path / name) if event["event"] == "step"]
              for name in ("kept", "new")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_batches_made_by_other_processes_are_the_same(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        tuned(tmp_path / str(workers), stitched, world_models,
              QUICK.model_copy(update={"num_workers": workers, "augment": Augment(flip=0.5, blur=0.5)}))
    assert weights(tmp_path / "0") == weights(tmp_path / "2")


def test_gradient_checkpointing_and_bf16_train_too(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    plain = tuned(tmp_path / "plain", stitched, world_models)
    for family in ("blip2", "blip", "clipcap", "transformer", "cnn_lstm"):
        tuned(tmp_path / family, stitched, world_models,
              QUICK.model_copy(update={"gradient_checkpointing": True, "precision": "bf16"}), family)
    same = tuned(tmp_path / "same", stitched, world_models, QUICK.model_copy(update={"gradient_checkpointing": True}))
    assert plain["steps"] == same["steps"]
    assert weights(tmp_path / "plain") == weights(tmp_path / "same")


def test_checkpointed_activations_are_computed_twice(world_models: Path) -> None:
    for family in ("blip2", "blip", "clipcap", "transformer"):
        calls: list[str] = []
        captioner = open_tunable(captioner_of(family, world_models), "cpu")
        captioner.prepare(QUICK, ["a red circle"])
        layers = [module for name, module in captioner.model.named_modules()
                  if re.search(r"(layers|layer|h)\.0$", name) and any(p.requires_grad for p in module.parameters())]
        for layer in layers:  # a part of it, as the layer's own hooks stand outside
            first = next(module for module in layer.modules() if not list(module.children()))
            first.register_forward_pre_hook(lambda *_, seen=calls: seen.append(""))
        captioner.checkpoint_activations()
        captioner.set_training(True)
        pixels = captioner.preprocess([Image.new("RGB", (32, 32))])
        captioner.loss(captioner.encode(pixels), ["a"], ["red"]).backward()
        assert layers and len(calls) > len(layers), family


def test_bf16_is_autocast(stitched: list[str], world_models: Path, tmp_path: Path,
                          monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.dtype] = []
    real = training.Loss.forward

    def spy(self: training.Loss, *inputs: Any) -> torch.Tensor:
        found.append(torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype)
        return real(self, *inputs)

    monkeypatch.setattr(training.Loss, "forward", spy)
    for precision in ("no", "bf16"):
        config = QUICK.model_copy(update={"precision": precision, "steps": 1})
        tuned(tmp_path / precision, stitched, world_models, config)
    assert set(found[:2]) == {torch.float32} and set(found[2:]) == {torch.bfloat16}


def test_first_weights_follow_from_the_seed_alone(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)  # what ran before in the process
        tuned(tmp_path / name, stitched, world_models, QUICK.model_copy(update={"seed": seed, "steps": 1, "lr": 1e-12}),
              "clipcap")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


# --- which step sees what ------------------------------------------------------------------------------------------


def some_pairs(count: int) -> list[Pair]:
    return [Pair(str(i), ImageRef(f"{i}.jpg"), "short", "x" * (1 + i % 4)) for i in range(count)]


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 20))
def test_every_epoch_draws_every_pair_once(num_pairs: int, batch_size: int, steps: int) -> None:
    pairs = some_pairs(num_pairs)
    drawn = [pair.uid for step in range(steps) for pair in draw_batch(pairs, step, batch_size, 0)]
    for start in range(0, len(drawn) - num_pairs + 1, num_pairs):
        assert Counter(drawn[start:start + num_pairs]) == Counter(pair.uid for pair in pairs)


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 5), st.integers(1, 4), st.integers(0, 5))
def test_processes_share_a_batch_without_loss(num_pairs: int, batch_size: int, micro: int, num_ranks: int,
                                              step: int) -> None:
    config = Finetune(batch_size=batch_size, micro_batch_size=micro)
    batches = [Batches(some_pairs(num_pairs), config, len, None, rank, num_ranks) for rank in range(num_ranks)]
    parts = [part for each in batches for part in each[step]]
    assert Counter(pair.uid for part in parts for pair in part.pairs) == Counter(
        pair.uid for pair in draw_batch(batches[0].pairs, step, batch_size, 0))
    assert sum(part.share for part in parts) == pytest.approx(1)


@pytest.mark.parametrize(("config", "steps"), [
    (Finetune(), 300), (Finetune(steps=7), 7), (Finetune(epochs=2, batch_size=4), 5),
    (Finetune(epochs=1, batch_size=64), 1)])
def test_steps_are_those_asked_for_or_those_of_the_epochs(config: Finetune, steps: int) -> None:
    assert with_steps(config, num_pairs=10).steps == steps


def test_every_caption_of_every_image_is_a_pair_and_long_ones_are_cut_and_counted(stitched: list[str],
                                                                                  world_models: Path) -> None:
    captioner = open_tunable(captioner_of("blip2", world_models), "cpu")
    images, _ = read_shards(stitched, STYLES)
    pairs, num_cut = to_pairs(images, STYLES, captioner, 256)
    assert Counter(pair.style for pair in pairs) == {"short": 6, "long": 6} and num_cut == 0
    several = [CaptionedImage("a", ImageRef("a.jpg"), (("long", "One."), ("long", "Two."), ("rich", "Three.")))]
    assert [pair.caption for pair in to_pairs(several, STYLES, captioner, 256)[0]] == ["One.", "Two."]
    pairs, num_cut = to_pairs(images, {"long": STYLES["long"]}, captioner, 8)
    assert num_cut == 6 and all(captioner.num_tokens(pair.caption) <= 9 for pair in pairs)


def test_what_cannot_be_decoded_is_quarantined_once(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    images = [CaptionedImage(name, ImageRef(str(tmp_path / name)), (("long", "x"),))
              for name in ("good.png", "bad.png", "gone.png")]
    early = [Reject("", "other", "missing_caption")]
    for _ in range(2):  # the second time from the file
        assert usable(images, early, tmp_path / "q.jsonl", 0) == images[:1]
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("other", "missing_caption"), ("bad.png", "undecodable_image"), ("gone.png", "missing_image")]


# --- augmentation --------------------------------------------------------------------------------------------------


def drawing() -> Image.Image:
    image = Image.new("RGB", (40, 20), "white")
    image.paste((200, 20, 20), (0, 0, 10, 10))
    return image


@pytest.mark.parametrize(("caption", "mirrored"), [
    ("a red square", True), ("a square on the left", False), ("Right of it, nothing", False), ("a bright square", True),
    ("the leftmost square", False), ("a right-hand glove", False)])
def test_a_caption_that_speaks_of_left_or_right_keeps_its_image_unmirrored(caption: str, mirrored: bool) -> None:
    from random import Random
    found = augment(drawing(), caption, Augment(flip=1), Random(0))
    assert (ImageChops.difference(found, drawing()).getbbox() is not None) == mirrored


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.05, 1), st.floats(0, 0.9), st.integers())
def test_an_augmented_image_is_an_image_of_its_proportions(width: int, height: int, crop: float, colour: float,
                                                           seed: int) -> None:
    from random import Random
    config = Augment(flip=0.5, crop=crop, blur=0.5, colour=colour)
    image = Image.new("RGB", (width, height), (100, 150, 200))
    found = augment(image, "a square", config, Random(seed))
    assert found.mode == "RGB" and 1 <= found.width <= width and 1 <= found.height <= height
    assert found.width * found.height >= crop * width * height * 0.5 - max(width, height)
    again = augment(image, "a square", config, Random(seed))
    assert found.tobytes() == again.tobytes()


# --- validation ----------------------------------------------------------------------------------------------------


def test_the_best_weights_are_those_of_the_lowest_held_out_loss(stitched: list[str], world_models: Path,
                                                                tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"steps": 12, "validation": Validation(share=0.3, every=2), "lr": 0.05})
    result = tuned(tmp_path, stitched, world_models, config)
    found = [event for event in events(tmp_path) if event["event"] == "validation"]
    assert [event["step"] for event in found] == [2, 4, 6, 8, 10, 12]
    assert result["best"] == min(event["loss"] for event in found) and result["chosen"] == "best"
    best_at = min(found, key=lambda event: event["loss"])["step"]
    assert (weights(tmp_path, "best") == weights(tmp_path, "last")) == (best_at == 12)
    assert set(found[0]["styles"]) == {"short", "long"}
    assert found[0]["styles"]["long"]["mean_reference_words"] > found[0]["styles"]["short"]["mean_reference_words"]


def test_a_run_stops_when_no_validation_is_better(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    validation = Validation(share=0.3, every=2, patience=2)
    config = QUICK.model_copy(update={"steps": 100, "lr": 10.0, "validation": validation})
    result = tuned(tmp_path, stitched, world_models, config)
    assert result["steps"] < 30
    assert len(result["validations"]) == result["steps"] // 2


def test_held_out_captions_without_words_are_not_scored(stitched: list[str], world_models: Path,
                                                        tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "signs.tar")) as writer:
        for sample in read_shard(stitched[0], []):
            sample.members |= {"short.txt": "🙂 …".encode(), "long.txt": b"..."}
            writer.write(sample)
    validation = Validation(shards=str(tmp_path / "signs.tar"), every=3)
    result = tuned(tmp_path / "run", stitched, world_models, QUICK.model_copy(update={"validation": validation}))
    assert result["validations"][0]["loss"] > 0 and result["validations"][0]["styles"] == {}
    with pytest.raises(UserError, match="CIDEr-D needs two held-out images of a style"):
        tuned(tmp_path / "cider", stitched, world_models, QUICK.model_copy(
            update={"validation": validation.model_copy(update={"select_by": "cider_d"})}))


def test_images_that_are_trained_on_cannot_be_held_out(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    config = QUICK.model_copy(update={"validation": Validation(shards=stitched)})
    with pytest.raises(UserError, match="6 of its 6 images are among those to train and test on"):
        tuned(tmp_path, stitched, world_models, config)


def test_the_sheet_shows_what_is_said_and_escapes_it(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.tar"
    with ShardWriter(str(hostile)) as writer:
        for sample in read_shard(stitched[0], []):
            sample.members["long.txt"] = b"<script>alert(1)</script> and a red circle."
            writer.write(sample)
    tuned(tmp_path / "run", [str(hostile)], world_models,
          QUICK.model_copy(update={"validation": Validation(share=0.4, every=3)}))
    pages = sorted((tmp_path / "run" / "sheets").iterdir())
    assert [page.name for page in pages] == ["000003.html", "000006.html"]
    page = pages[-1].read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "data:image/png;base64," in page and "<svg" in page and "http" not in page.replace(
        "http://www.w3.org", "").replace("https://matplotlib.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", "")


def test_the_loss_falls(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    tuned(tmp_path, stitched, world_models, QUICK.model_copy(update={"steps": 60, "lora": QUICK.lora.model_copy(
        update={"dropout": 0.0})}))
    losses = [event["loss"] for event in events(tmp_path) if event["event"] == "step"]
    assert losses[-1] < 0.8 * losses[0]


# --- one clear line ------------------------------------------------------------------------------------------------


def test_shards_without_styled_captions_are_one_clear_line(world_shards: Path, world_models: Path,
                                                           tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stitch them first"):
        tuned(tmp_path, [str(world_shards / "evaluation" / "00000.tar")], world_models)


def test_a_target_that_no_layer_has_is_one_clear_line(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    lora = QUICK.lora.model_copy(update={"language_model": ["q_proj", "wq"]})
    with pytest.raises(UserError, match=r"finetune\.lora\.language_model: no linear layer 'wq' there: .*q_proj"):
        tuned(tmp_path, stitched, world_models, QUICK.model_copy(update={"lora": lora}))


@pytest.mark.parametrize("lr", [1e30])
def test_a_loss_that_is_not_finite_stops_names_the_images_and_keeps_the_checkpoint(
        lr: float, stitched: list[str], world_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "learning_rate", lambda config, step: 1e-3 if step < 3 else lr)
    with pytest.raises(UserError, match=r"(loss is (nan|inf)|gradient is not finite) at step 5, with .*00000/"):
        tuned(tmp_path, stitched, world_models)
    last = events(tmp_path)[-1]
    assert last["event"] == "not finite" and len(last["keys"]) == QUICK.batch_size
    from recap import checkpoint
    found = checkpoint.load(tmp_path)
    assert found is not None
    tensors, state = found
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values()) and state["step"] in (2, 4)


def test_one_image_cannot_be_split(stitched: list[str], world_models: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.tar"
    with ShardWriter(str(one)) as writer:
        writer.write(next(iter(read_shard(stitched[0], []))))
    config = QUICK.model_copy(update={"validation": Validation(share=0.5)})
    with pytest.raises(UserError, match="1 image cannot be split"):
        tuned(tmp_path / "run", [str(one)], world_models, config)


def test_a_prompt_that_leaves_no_room_is_one_clear_line(stitched: list[str], world_models: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STYLES, "long", Style(prompt="word " * 600, max_new_tokens=8))
    with pytest.raises(UserError, match=r"styles\.long\.prompt: it takes all positions"):
        tuned(tmp_path, stitched, world_models, family="transformer")


def test_features_of_a_vision_model_in_training_cannot_be_kept(stitched: list[str], world_models: Path,
                                                               tmp_path: Path) -> None:
    with pytest.raises(UserError, match="includes the vision model"):
        tuned(tmp_path, stitched, world_models, QUICK.model_copy(update={"cache_features": True}), "blip")


def test_history_goes_through_json() -> None:
    history = training.History(3, [[1, 0.5]], [{"step": 3, "loss": 0.1}], 0.1, 1, 2.5)
    assert training.History(**json.loads(json.dumps(asdict(history)))) == history
