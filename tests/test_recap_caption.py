"""`recap caption`: single images, in every style, as relabelling would caption them."""

from pathlib import Path

import pytest
from conftest import recap_here

from recap.caption import _lines, tell_apart
from recap.captioners import open_captioner
from recap.captioners.text import Caption
from recap.config import OVERRIDE, Style
from recap.config.captioner import Captioner
from recap.sample import decode_image
from recap.shards import read_shard

EXPERIMENT = """
device = "cpu"
captioner = {{ model = "{models}/blip2", dtype = "float32", tuned = "none" }}
styles.short = {{ prompt = "A short caption:", max_new_tokens = 3 }}
styles.long = {{ prompt = "A detailed caption:", max_new_tokens = 40 }}
"""


@pytest.fixture
def images(world_shards: Path, tmp_path: Path) -> list[Path]:
    samples = list(read_shard(str(world_shards / "evaluation" / "00000.tar"), []))[:2]
    paths = [tmp_path / f"{sample.key}=.png" for sample in samples]
    for path, sample in zip(paths, samples, strict=True):
        path.write_bytes(sample.image_bytes)
    return paths


@pytest.fixture
def file(world_models: Path, tmp_path: Path) -> str:
    (tmp_path / "mine.toml").write_text(EXPERIMENT.format(models=world_models))
    return str(tmp_path / "mine.toml")


def test_every_image_is_captioned_in_every_style(images: list[Path], file: str, world_models: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert not recap_here("caption", "-c", file, *map(str, images), "styles.long.max_new_tokens=20")
    printed = capsys.readouterr().out
    captioner = open_captioner(Captioner(model=str(world_models / "blip2"), dtype="float32"), "cpu")
    styles = {"short": Style(prompt="A short caption:", max_new_tokens=3),
              "long": Style(prompt="A detailed caption:", max_new_tokens=20)}
    expected = []
    for image in images:
        features = captioner.encode(captioner.preprocess([decode_image(image.read_bytes())]))
        expected.append(str(image))
        for name, style in styles.items():
            expected += _lines(name, captioner.caption(features, style)[0], styles)
    assert printed.splitlines() == expected and "(cut at 3 tokens)" in printed


def test_lines_fit_80_columns() -> None:
    lines = list(_lines("long", Caption("a dog 犬 and " * 40, True), {"long": Style(prompt=""), "a": Style(prompt="")}))
    assert lines[0].startswith("  long  a dog") and all(line.startswith(" " * 8) for line in lines[1:])
    assert len(lines) > 6 and max(map(len, lines)) <= 80
    assert list(_lines("a", Caption("", True), {"a": Style(prompt="")})) == ["  a  (nothing)"]


def test_overrides_are_told_from_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b.jpg").touch()
    given = ["a=b.jpg", "device=cpu", "x.jpg", "./c=d.jpg", "styles.a-b.prompt=x", "https://a.b/c.jpg?d=e"]
    assert tell_apart(given) == (["a=b.jpg", "x.jpg", "./c=d.jpg", "https://a.b/c.jpg?d=e"],
                                 ["device=cpu", "styles.a-b.prompt=x"])
    assert not OVERRIDE.match("photos/a=b.jpg")


@pytest.mark.parametrize(("arguments", "expected"), [
    (["none.jpg"], "caption: no image at none.jpg"), (["{folder}"], "caption: no image at"),
    (["{folder}/mine.toml"], "mine.toml: undecodable_image"), (["device=cpu"], "no image was named")])
def test_what_is_no_image_is_one_clear_line(arguments: list[str], expected: str, file: str, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert recap_here("caption", "-c", file, *[each.format(folder=tmp_path) for each in arguments]) == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]
