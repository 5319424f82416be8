"""Every image measured once, by however many processes, and kept; a set that has changed is measured anew."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import eval.drawn
import eval.images
from eval.config import ClipScore, Evaluate, Features
from eval.drawn import FORGOTTEN_FILE, loose_path
from eval.images import DrawnImages, Images, RealImages
from eval.measure import Measured, measure
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import ShardWriter

NUM = 10


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten pictures in units of four."""
    monkeypatch.setattr(eval.drawn, "NUM_LOOSE", 4)
    monkeypatch.setattr(eval.images, "NUM_FILES", 4)
    folder = tmp_path / "mix"
    folder.mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(256, size=(NUM, 20, 30, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(loose_path(folder, index))
    rows = [{"index": index, "prompt": f"scene {index}", "set": "a" if index < 7 else "b"} for index in range(NUM)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(world_models: Path) -> Evaluate:
    return Evaluate(batch_size=3, features=Features(model=f"local-dir:{world_models / 'features'}"),
                    clip_score=ClipScore(model=f"local-dir:{world_models / 'clip'}"))


def measured(folder: Path, config: Evaluate, images: Images, gauge: str = "features", checkpoint: str = "these"
             ) -> Measured:
    found = measure(folder.parent / "measured", gauge, config, images, checkpoint, "test", "cpu")
    assert found is not None
    return found


def test_what_is_measured_is_kept(drawn: Path, config: Evaluate, world_models: Path) -> None:
    first = measured(drawn, config, DrawnImages(drawn))
    assert first.values["features"].shape[0] == NUM and first.values["features"].dtype == np.float32
    assert first.values["size"].tolist() == [[30, 20]] * NUM
    assert first.about["resize"].startswith("clean-fid") and first.excluded == {}
    parts = sorted((drawn.parent / "measured" / "features").glob("*.npz"))
    assert [part.name for part in parts] == ["00000.npz", "00001.npz", "00002.npz"]
    times = [part.stat().st_mtime_ns for part in parts]
    again = measured(drawn, config, DrawnImages(drawn))
    np.testing.assert_array_equal(again.values["features"], first.values["features"])
    assert [part.stat().st_mtime_ns for part in parts] == times and again.name == first.name


def test_a_stopped_one_goes_on(drawn: Path, config: Evaluate) -> None:
    first = measured(drawn, config, DrawnImages(drawn))
    folder = drawn.parent / "measured" / "features"
    kept = (folder / "00000.npz").stat().st_mtime_ns
    for name in ("00001.npz", "done.json"):
        (folder / name).unlink()
    again = measured(drawn, config, DrawnImages(drawn))
    np.testing.assert_array_equal(again.values["features"], first.values["features"])
    assert (folder / "00000.npz").stat().st_mtime_ns == kept


def test_a_changed_set_is_noticed(drawn: Path, config: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    first = measured(drawn, config, DrawnImages(drawn))
    Image.new("RGB", (30, 20), "red").save(loose_path(drawn, 5))
    again = measured(drawn, config, DrawnImages(drawn))
    differing = np.flatnonzero((again.values["features"] != first.values["features"]).any(axis=1))
    assert differing.tolist() == [5] and "measured anew" in capsys.readouterr().err
    measured(drawn, config, DrawnImages(drawn), checkpoint="others")
    assert "measured anew" in capsys.readouterr().err


def test_only_of_some_sets(drawn: Path, config: Evaluate) -> None:
    whole = measured(drawn, config, DrawnImages(drawn))
    some = measured(drawn, config, DrawnImages(drawn, ("b",)))
    np.testing.assert_allclose(some.values["features"], whole.values["features"][7:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gauge", ["features", "clip_score"])
def test_two_processes_measure_the_same(drawn: Path, config: Evaluate, gauge: str) -> None:
    one = measured(drawn, config, DrawnImages(drawn), gauge)
    several = config.model_copy(update={"workers": 2})
    found = measure(drawn.parent / "by two", gauge, several, DrawnImages(drawn), "these", "test", "cpu")
    assert found is not None and found.name == one.name
    for name, column in one.values.items():
        np.testing.assert_allclose(found.values[name], column, rtol=1e-5, atol=1e-6)


def test_what_a_shard_holds_that_is_no_image_is_counted(tmp_path: Path, drawn: Path, config: Evaluate) -> None:
    shards = [str(tmp_path / f"{number}.tar") for number in range(2)]
    for shard in shards:
        with ShardWriter(shard) as writer:
            writer.write(Sample(shard, "a", {"png": loose_path(drawn, 0).read_bytes()}))
            writer.write(Sample(shard, "b", {"jpg": b"no image"}))
            writer.write(Sample(shard, "c", {"txt": b"no image at all"}))
    found = measured(drawn, config, RealImages(shards, "evaluate.reference"))
    assert len(found.values["features"]) == 2
    assert found.excluded == {"undecodable_image": 2, "missing_image": 2}


def test_a_shard_without_an_image_leaves_an_empty_part(tmp_path: Path, drawn: Path, config: Evaluate) -> None:
    for name, content in (("0", b"no image"), ("1", loose_path(drawn, 0).read_bytes())):
        with ShardWriter(str(tmp_path / f"{name}.tar")) as writer:
            writer.write(Sample(name, "a", {"png": content}))
    found = measured(drawn, config, RealImages(str(tmp_path / "*.tar"), "evaluate.reference"))
    assert len(found.values["features"]) == 1
    nothing = measured(drawn, config, RealImages(str(tmp_path / "0.tar"), "evaluate.reference"))
    assert len(nothing.values["size"]) == 0 and nothing.excluded == {"undecodable_image": 1}


def test_images_of_a_folder(tmp_path: Path, drawn: Path, config: Evaluate) -> None:
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for index, name in enumerate(["b.png", "a.webp", "below/c.JPG", ".hidden.png"]):
        Image.new("RGB", (10 + index, 10)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    found = measured(drawn, config, RealImages(str(folder), "evaluate.reference"))
    assert found.values["size"][:, 0].tolist() == [11, 10, 12]
    (folder / "a.webp").write_bytes((folder / "a.webp").read_bytes()[:20])
    with pytest.raises(UserError, match=r"a\.webp is not a whole image"):
        measured(drawn, config, RealImages(str(folder), "evaluate.reference"))


def test_real_photos(shared_data: Path, drawn: Path, config: Evaluate) -> None:
    photos = str(shared_data / "photos" / "coco-open-00000.tar")
    found = measured(drawn, config, RealImages(photos, "evaluate.reference"))
    assert len(found.values["features"]) == 51 and not found.excluded


def test_forgotten_pictures_keep_what_was_measured(drawn: Path, config: Evaluate) -> None:
    first = measured(drawn, config, DrawnImages(drawn))
    (drawn / FORGOTTEN_FILE).touch()
    for index in range(NUM):
        loose_path(drawn, index).unlink()
    again = measured(drawn, config, DrawnImages(drawn))
    np.testing.assert_array_equal(again.values["features"], first.values["features"])
    whole = DrawnImages(drawn)
    for images, checkpoint, gauge in ((whole, "these", "clip_score"), (whole, "others", "features"),
                                      (DrawnImages(drawn, ("b",)), "these", "features")):
        with pytest.raises(UserError, match="were not kept"):  # of what was measured then, nothing follows for these
            measured(drawn, config, images, gauge, checkpoint)


def test_a_damaged_part_is_one_line(drawn: Path, config: Evaluate) -> None:
    measured(drawn, config, DrawnImages(drawn))
    part = drawn.parent / "measured" / "features" / "00001.npz"
    for content in (b"", part.read_bytes()[:-40]):
        part.write_bytes(content)
        with pytest.raises(UserError, match=r"00001\.npz is damaged .*: delete it"):
            measured(drawn, config, DrawnImages(drawn))


def test_numbers_that_are_not_finite_are_one_line(drawn: Path, config: Evaluate, tmp_path: Path) -> None:
    weights = load_file(Path(config.features.model.removeprefix("local-dir:")) / "model.safetensors")
    folder = Path(shutil.copytree(config.features.model.removeprefix("local-dir:"), tmp_path / "broken"))
    save_file({name: value * float("nan") for name, value in weights.items()}, folder / "model.safetensors")
    broken = config.model_copy(update={"features": Features(model=f"local-dir:{folder}")})
    with pytest.raises(UserError, match=r"gives no finite numbers of picture 0 of .*mix"):
        measured(drawn, broken, DrawnImages(drawn))


@pytest.mark.parametrize(("source", "says"), [
    ("EMPTY", "no image"), ([], "is empty"), ("none.tar", "check the path")])
def test_no_images(drawn: Path, config: Evaluate, tmp_path: Path, source: str | list[str], says: str) -> None:
    (tmp_path / "empty").mkdir()
    images = RealImages(str(tmp_path / "empty") if source == "EMPTY" else source, "evaluate.reference")
    with pytest.raises(UserError, match=says):
        measured(drawn, config, images)
