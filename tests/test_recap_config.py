"""Experiment files: defaults < file < overrides, and one clear line for what is wrong."""

import re
from pathlib import Path

import pytest

from recap.config import load
from recap.errors import UserError
from recap.pipeline import Experiment

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


def loaded(tmp_path: Path, text: str, *overrides: str) -> Experiment:
    (tmp_path / "mine.toml").write_text(text)
    return load(tmp_path / "mine.toml", overrides, Experiment)


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_file_overrides_defaults_and_the_command_line_the_file(tmp_path: Path) -> None:
    exp = loaded(tmp_path, "[train]\nlr = 1e-4\nsteps = 7", "train.lr=1e-3", 'arms=["alt"]', "train.model=some/model")
    assert (exp.train.lr, exp.train.steps, exp.train.batch_size) == (1e-3, 7, 512)
    assert (exp.arms, exp.train.model, exp.name) == (["alt"], "some/model", "mine")


@pytest.mark.parametrize(("text", "overrides", "expected"), [
    ("[train]\nbatchsize = 8", (), "unknown key train.batchsize: did you mean train.batch_size?"),
    ("[trian]\nlr = 1", (), "unknown key trian: did you mean train?"),
    ("", ("styles.short.promt=x", "styles.short.prompt=y"),
     "unknown key styles.short.promt: did you mean styles.short.prompt?"),
    ("", ("evaluate.features.modell=x",),
     "unknown key evaluate.features.modell: did you mean evaluate.features.model?"),
    ("", ("evaluate.judge.modle=x", "evaluate.judge.target=a:B", "evaluate.judge.model=x"),
     "unknown key evaluate.judge.modle: did you mean evaluate.judge.model?"),
    ("", ("evaluate.judge.target=a:B",), "evaluate.judge.model is missing"),
    ("", ("evaluate.sets=[]",), "evaluate.sets: List should have at least 1 item"),
    ("", ("arm.mix.guidance=4",), "unknown key arm.mix.guidance: did you mean arm.mix.guidance_scale?"),
    ("", ("arm.mix.guidance_scale=-1",), "arm.mix.guidance_scale: Input should be greater than or equal to 0"),
    ("", ("arm=3",), "arm: Input should be a valid dictionary"),
    ("", ("train.lr=fast",), "train.lr: Input should be a valid number"),
    ("", ("train.steps=0",), "train.steps: Input should be greater than or equal to 1"),
    ("", ('arms=["mixx"]',), "arms: no arm 'mixx': did you mean mix?"),
    ("", ('arms=["alt", "mix", "alt"]',), "arms: alt is named twice: name it once"),
    ("", ("seeds=[0, 1, 1]",), "seeds: 1 is named twice: name it once"),
    ("", ('relabel.mix={huge=1}',), "relabel.mix: no style 'huge': the styles are short, long, rich"),
    ("", ("relabel.format=folder", "relabel.folder_caption=lnog"),
     "relabel.folder_caption: no caption 'lnog': choose one of short, long, rich, mix, alt"),
    ('styles.rich.prompt = "In detail:"', ("relabel.format=folder",),
     "relabel.folder_caption: no caption 'mix': choose one of rich, alt"),
    ("", ("name=../up",), "name: String should match pattern"),
    ("", ("train",), "'train' is not an override: write table.key=value"),
    ("seeds = 3\n", ("seeds.a=1",), "seeds is a value, not a table"),
    ("", ("stitch.llm.model.api_key=sk-1", "stitch.llm.model=x", "stitch.llm.model.api_key=sk-1"), "is a value, not"),
    ("", ("stitch.llm.api_key=sk-1",), "unknown key stitch.llm.api_key"),
    ("", ("stitch.llm.options={model='x'}",), "stitch.llm: options.model is set by recap"),
    ("", ("stitch.llm.budget=3",), "stitch.llm: budget needs prompt_price and completion_price"),
    ("", ("stitch.owlvit.tags_from=owlvit",), "stitch.owlvit: tags_from is owlvit itself"),
    ("a = [", (), "is not a TOML file"),
    ("[styles.short]\nmax_new_tokens = 3", (), "styles.short.prompt is missing"),
])
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, overrides: tuple[str, ...],
                                           expected: str) -> None:
    found = message(tmp_path, text, *overrides)
    assert expected in found and "sk-1" not in found  # a key belongs into the environment, and not on the screen


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no experiment file at"):
        load(tmp_path / "none.toml", [], Experiment)


def test_arms_of_ones_own_stand_beside_the_usual_ones(tmp_path: Path) -> None:
    exp = loaded(tmp_path, 'arms = ["half", "alt"]\n[arm.half]\ncaptions = { alt = 1, long = 1 }')
    assert exp.arm["half"].captions == {"alt": 1, "long": 1} and "oracle" in exp.arm


def test_a_table_of_a_usual_arm_changes_only_what_it_sets(tmp_path: Path) -> None:
    arms = loaded(tmp_path, "[arm.mix]\nguidance_scale = 4\n[arm.alt]\ncaptions = { txt = 1 }").arm
    assert (arms["mix"].captions, arms["mix"].guidance_scale) == ({"short": 1, "long": 1}, 4)
    assert (arms["alt"].captions, arms["alt"].guidance_scale) == ({"txt": 1}, None)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_we_ship_loads_and_opens_with_its_command(path: Path) -> None:
    load(path, [], Experiment)
    head = path.read_text().split("\n[")[0]
    assert all(re.search(rf"^# {word}:", head, re.MULTILINE) for word in ("command", "hardware", "time", "expect"))
