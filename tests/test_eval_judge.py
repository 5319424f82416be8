"""A judge of one's own: found, opened, and held to what it promises; what is wrong is one line."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from eval.config import JudgeRef
from eval.judge import Judge, find_judge, judge_images, open_judge
from eval.prompts import Prompt
from recap.errors import UserError

MODULE = '''
from pathlib import Path
from eval.judge import CaptionFacts

class Judge:
    """Finds a picture as bright as its prompt asks for."""
    metrics = {"bright": "how near the brightness is to that asked for", "named": "always 1"}

    def __init__(self, name):
        self.name = name

    @classmethod
    def open(cls, folder, device):
        return cls(f"{(Path(folder) / 'version').read_text()} on {device}")

    def images(self, images, prompts):
        asked = [prompt.about.get("grey") for prompt in prompts]
        return [{"bright": None if grey is None else 1 - abs(image.getpixel((0, 0))[0] - grey) / 255, "named": 1}
                for image, grey in zip(images, asked)]

    def caption(self, caption, metadata):
        words = set(caption.split())
        return CaptionFacts(len(words & set(metadata["words"])), len(words - set(metadata["words"])),
                            len(metadata["words"]))

class Closed:
    pass

class Vain(Judge):
    metrics = {"fid": "lower than anybody's"}

class Empty(Judge):
    metrics = {}

class Liar(Judge):
    """Gives what its prompt says."""
    def images(self, images, prompts):
        return prompts[0].about["found"]
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that can be imported, of another name in every test."""
    name = f"judge_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "version").write_text("judge 1")
    return folder


def opened(module: str, name: str, model: Path) -> Judge:
    return open_judge(JudgeRef(target=f"{module}:{name}", model=str(model)), "cpu")


def test_a_judge_is_opened_and_asked(module: str, model: Path) -> None:
    judge = opened(module, "Judge", model)
    images = [Image.new("RGB", (4, 4), (grey, grey, grey)) for grey in (0, 255)]
    prompts = [Prompt("a dark field", "greys", {"grey": 51}), Prompt("a field", "greys", {})]
    assert judge.name == "judge 1 on cpu"
    assert judge_images(judge, images, prompts) == [{"bright": 0.8, "named": 1.0}, {"bright": None, "named": 1.0}]
    facts = judge.caption("a red cat", {"words": ["red", "cat", "mat"]})
    assert (facts.covered, facts.wrong, facts.total) == (2, 1, 3)


def test_looking_for_it_runs_nothing_of_it(module: str, model: Path) -> None:
    ref = JudgeRef(target=f"{module}:Judge", model=str(model))
    before = find_judge(ref)
    (model / "version").write_text("judge 1.1")
    assert find_judge(ref) != before and module not in sys.modules


@pytest.mark.parametrize(("target", "says"), [
    ("{module}", "names no class: write package.module:Class"),
    (":Judge", "names no class"),
    ("no_such_package.judge:Judge", "no module no_such_package.judge: install it"),
    ("{module}.deeper:Judge", "no module"),
    ("{module}:Judgement", "no Judgement in"),
    ("{module}:Closed", r"has no open\(folder, device\)"),
    ("{module}:Vain", "calls a metric 'fid'"),
    ("{module}:Empty", "has no metrics"),
])
def test_what_cannot_be_a_judge_is_said_in_one_line(module: str, model: Path, target: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        open_judge(JudgeRef(target=target.format(module=module), model=str(model)), "cpu")
    assert str(caught.value).startswith("evaluate.judge.target: ") and "\n" not in str(caught.value)


def test_a_folder_that_is_missing_or_cannot_be_opened(module: str, model: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.judge\.model: no folder at .*none: check the path"):
        opened(module, "Judge", model / "none")
    (model / "version").unlink()
    with pytest.raises(UserError, match=r"evaluate\.judge\.model: .*:Judge cannot open .*No such file"):
        opened(module, "Judge", model)


def test_a_module_that_lacks_what_it_imports(module: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / f"{module}_too.py").write_text("import no_such_package")
    with pytest.raises(UserError, match=r"_too cannot be imported .*no_such_package"):
        opened(f"{module}_too", "Judge", model)


@pytest.mark.parametrize(("found", "says"), [
    ([], "gave 0 results for 1 pictures"),
    ([{"bright": 1.5, "named": 1}], r"gave bright = 1\.5, which is not in 0…1"),
    ([{"bright": float("nan"), "named": 1}], "gave bright = nan"),
    ([{"bright": 1}], "gave the metrics bright, its `metrics` are bright, named"),
    ([{"bright": 1, "named": 1, "more": 1}], "gave the metrics bright, named, more"),
])
def test_it_is_held_to_what_it_promises(module: str, model: Path, found: object, says: str) -> None:
    judge = opened(module, "Liar", model)
    with pytest.raises(UserError, match=says):
        judge_images(judge, [Image.new("RGB", (4, 4))], [Prompt("a field", "greys", {"found": found})])
