"""How the world's checkpoints are made: every part trains, stops, goes on, is shipped, and opens again."""

import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recap.errors import UserError
from recap.rundir import StageDir, lock
from recap.world import base
from recap.world.base import text_encoder, vae
from recap.world.base.blip2 import MAX_TERSE, NamesThings, build, terse_caption
from recap.world.base.drawings import Drawings
from recap.world.base.fit import Schedule, fit
from recap.world.base.text_encoder import changed, rearranged
from recap.world.facts import compare, read
from recap.world.init import init
from recap.world.scene import JITTER, PLACES, draw_scene
from recap.world.words import clean_alt_text

FEW = 16


def fitted(folder: Path, stop_at: int | None = None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def loss(step: int) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return (model(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()

    stage = StageDir(folder, {})
    stage.begin()
    fit(stage, "x", model, loss, Schedule(steps=10, batch_size=16, lr=1e-2, checkpoint_every=4))
    return [parameter.detach() for parameter in model.parameters()]


def test_a_training_that_was_stopped_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole")
    for stop_at in (3, 7):  # before the first checkpoint, and after it
        with pytest.raises(KeyboardInterrupt):
            fitted(tmp_path / "stopped", stop_at)
    assert all(torch.equal(a, b) for a, b in zip(whole, fitted(tmp_path / "stopped"), strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every part trained for two steps on a few drawings, judged by a few others, and shipped."""
    out = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        names = {name for name, _ in base.PARTS.values()}
        modules = [importlib.import_module(f"recap.world.base.{name}") for name in sorted({*names, "text_encoder"})]
        for module in modules:
            if hasattr(module, "NUM_DRAWINGS"):
                patch.setattr(module, "NUM_DRAWINGS", FEW)
            if hasattr(module, "SCHEDULE"):
                patch.setattr(module, "SCHEDULE", replace(module.SCHEDULE, steps=2, batch_size=8))
            if hasattr(module, "TRAIN"):
                patch.setattr(module, "TRAIN", {**module.TRAIN, "steps": 2, "batch_size": 4})
            if hasattr(module, "NUM_HELD_OUT"):
                patch.setattr(module, "NUM_HELD_OUT", FEW)
        draw, choose, families = Drawings.draw, Drawings.choose, text_encoder._families
        patch.setattr(Drawings, "draw", lambda name, count, size: draw(
            name, count if "/clip/" in name else min(count, FEW), size))  # that part counts its thousand by hundreds
        patch.setattr(Drawings, "choose", lambda drawings, step, size: choose(drawings, step, min(size, FEW)))
        patch.setattr(text_encoder, "_families", lambda name, count, size: families(name, min(count, FEW), size))
        patch.setattr(base, "NUM_BASE", FEW)
        patch.setattr(base, "SHIPPED", out / "shipped")
        base.train_base(out / "base", base.PARTS)
        base.ship(out / "base")
        init(out / "models")
        with pytest.raises(UserError, match="no part 'unet': the parts are vae"):
            base.train_base(out / "none", ["vae", "unet"])
        assert not (out / "none").exists()
        yield out


def test_a_part_of_other_settings_is_neither_trained_on_nor_shipped(trained: Path, monkeypatch: pytest.MonkeyPatch,
                                                                    tmp_path: Path) -> None:
    monkeypatch.setattr(base, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(vae, "NUM_DRAWINGS", 17)
    with pytest.raises(UserError, match=r"was made with other settings \(vae.NUM_DRAWINGS: 16 → 17\): delete it first"):
        base.train_base(trained / "base", ["vae"])
    with pytest.raises(UserError, match="vae is not trained yet, or was with other settings"):
        base.ship(trained / "base")
    assert not (tmp_path / "shipped").exists()


def test_every_part_leaves_its_log_and_its_figures(trained: Path) -> None:
    for part in base.PARTS:
        files = {path.name for path in (trained / "shipped" / part).iterdir()}
        assert {"log.jsonl", "done.json"} <= files
        assert (trained / "shipped" / part / "log.jsonl").read_text().count('"step": 2') in (1, 2)
    diffusion = (trained / "shipped" / "stable-diffusion-0" / "log.jsonl").read_text()
    assert "nearest_of_100" in diffusion  # of the text encoder, trained first
    figures = json.loads((trained / "shipped" / "stable-diffusion-0" / "done.json").read_text())
    assert figures["loss"] > 0 and figures["gain_by_own"] != figures["gain_by_other"]


def test_a_diffusion_model_is_not_shipped_with_another_vae(trained: Path, monkeypatch: pytest.MonkeyPatch,
                                                           tmp_path: Path) -> None:
    monkeypatch.setattr(base, "SHIPPED", tmp_path / "shipped")
    shutil.copytree(trained / "base", tmp_path / "base")
    weights = tmp_path / "base/vae/model" / base.VAE_WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="stable-diffusion-0 was trained with another VAE"):
        base.ship(tmp_path / "base")
    assert not (tmp_path / "shipped").exists()


def test_what_is_shipped_opens_as_it_was_trained(trained: Path) -> None:
    assert {path.name for path in (trained / "models").iterdir()} == {*base.PARTS, "done.json"}
    assert not list((trained / "shipped").glob("stable-diffusion-*/vae"))  # it is shipped once
    for part in ("stable-diffusion-0", "stable-diffusion-1"):
        opened, made = (StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
                        for folder in (trained / "models" / part, trained / "base" / part / "model"))
        for name in ("vae", "text_encoder", "unet"):
            ours, theirs = getattr(opened, name).state_dict(), getattr(made, name).state_dict()
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert opened.tokenizer("a red circle").input_ids == made.tokenizer("a red circle").input_ids


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_a_family_shows_the_same_things_in_other_places(seed: int, num_shapes: int) -> None:
    scene = draw_scene(Random(seed), num_shapes)
    moved = rearranged(scene, Random(f"{seed}/moved"))
    assert sorted(shape.full_name for shape in moved.shapes) == sorted(shape.full_name for shape in scene.shapes)
    assert moved.background == scene.background
    order = [list(PLACES).index(shape.place) for shape in moved.shapes]
    assert order == sorted(set(order))  # reading order, no place twice
    assert all(max(abs(shape.x - PLACES[shape.place][0]), abs(shape.y - PLACES[shape.place][1])) < JITTER + 1e-9
               for shape in moved.shapes)


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_a_family_differs_in_one_thing(seed: int, num_shapes: int) -> None:
    scene = draw_scene(Random(seed), num_shapes)
    other = changed(scene, Random(f"{seed}/changed"))
    names, others = ([shape.full_name for shape in each.shapes] for each in (scene, other))
    if sorted(names) != sorted(others):
        pairs = zip(scene.shapes, other.shapes, strict=True)
        differing = [field.name for one, two in pairs for field in fields(one)
                     if getattr(one, field.name) != getattr(two, field.name)]
        assert len(differing) == 1 and differing[0] in ("kind", "colour", "size")
    assert other.background == scene.background


def test_most_of_a_family_differs() -> None:
    """A shape alone may be moved into the place that it had: then a text has two drawings."""
    scenes = [draw_scene(Random(seed)) for seed in range(400)]
    said = [(clean_alt_text(scene), clean_alt_text(changed(scene, Random(seed)))) for seed, scene in enumerate(scenes)]
    assert sum(one != other for one, other in said) > 0.9 * len(said)


def test_a_part_is_trained_by_one_command_at_a_time(tmp_path: Path) -> None:
    with lock(tmp_path / "vae"), pytest.raises(UserError, match="another recap is at work"):
        base.train_base(tmp_path, ["vae"])


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_a_terse_caption_is_true_and_names_few_shapes_or_all(seed: int, num_shapes: int) -> None:
    scene = draw_scene(Random(seed), num_shapes)
    said = read(terse_caption(scene, Random(f"{seed}/said")))
    assert compare(said, scene.metadata(32)).wrong == 0
    assert len(said.things) <= MAX_TERSE or len(said.things) == num_shapes


def test_what_a_query_knows_is_its_own_place() -> None:
    names = NamesThings(build(32))
    queries = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(0))
    other = queries.clone()
    other[:, 2] += 1
    for name, logits in names(queries).items():
        differs = (logits != names(other)[name]).any(-1)[0].tolist()
        assert differs == ([place == 2 for place in range(len(PLACES))] if len(differs) > 1 else [False])


def test_the_unet_learns_beside_a_text_encoder_that_stands_still(trained: Path) -> None:
    start, end = (StableDiffusionPipeline.from_pretrained(trained / "base" / "stable-diffusion-0" / name,
                                                          safety_checker=None) for name in ("start", "model"))
    for name, same in (("text_encoder", True), ("vae", True), ("unet", False)):
        before, after = getattr(start, name).state_dict(), getattr(end, name).state_dict()
        assert same == all(torch.equal(before[key].half(), after[key].half()) for key in before)
