"""A stage's folder: when it counts as done, and when its results may not be mixed with new ones."""

import shutil
from pathlib import Path

import pytest

from recap.config.relabel import Relabel
from recap.errors import UserError
from recap.rundir import StageDir, digest, hash_files, lock


def test_a_stage_goes_from_new_to_begun_to_done(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "relabel", {"lr": 1})
    assert stage.state() == "new"
    stage.begin()
    assert stage.state() == "begun"
    (stage.path / "checkpoint").mkdir()
    stage.finish({"images": 3})
    assert not (stage.path / "checkpoint").exists()
    assert stage.state() == "done"
    assert stage.result()["images"] == 3


def test_other_inputs_make_it_changed_and_say_which(tmp_path: Path) -> None:
    StageDir(tmp_path, {"relabel": Relabel(batch_size=8), "seed": 0}).begin()
    changed = StageDir(tmp_path, {"relabel": Relabel(batch_size=16), "seed": 0})
    assert changed.state() == "changed"
    assert changed.changes() == ["relabel.batch_size: 8 → 16"]


def test_of_many_files_it_says_which_differ(tmp_path: Path) -> None:
    before = [[f"{place}.png", 10, 1] for place in range(30_000)]
    stage = StageDir(tmp_path, {"images": before, "text": "a" * 5000})
    stage.begin()
    [images, text] = StageDir(tmp_path, {"images": [*before[:-1], ["29999.png", 10, 2]], "text": "b" * 5000}).changes()
    assert images == "images: 1 of 30000 differ, ['29999.png', 10, 2] first" and len(text) < 250


def test_the_fingerprint_depends_on_values_not_on_their_order(tmp_path: Path) -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_a_damaged_marker_counts_as_none(tmp_path: Path) -> None:
    stage = StageDir(tmp_path, {})
    stage.begin()
    (tmp_path / "done.json").write_bytes(b'{"half')
    assert stage.state() == "begun"


def test_two_commands_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with lock(tmp_path / "run"), pytest.raises(UserError, match="another recap is at work"), lock(tmp_path / "run"):
        pass
    with lock(tmp_path / "run"):
        pass  # and afterwards it is free


def test_a_kill_while_clearing_leaves_nothing_that_looks_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = StageDir(tmp_path / "s", {"lr": 1})
    stage.begin()
    (stage.path / "00000_stats.json").write_text("{}")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.clear()
    assert not (stage.path / "00000_stats.json").exists() or stage.state() != "new"


def test_clear_leaves_nothing(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "s", {})
    stage.begin()
    (stage.path / "x.tar").write_bytes(b"x")
    stage.clear()
    assert not stage.path.exists() and stage.state() == "new"


def test_the_hash_of_a_folder_covers_names_and_contents(tmp_path: Path) -> None:
    hashes = set()
    for name, content in (("a", b"1"), ("a", b"2"), ("b", b"2")):
        folder = tmp_path / f"{name}{content.decode()}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        hashes.add(hash_files(folder))
    assert len(hashes) == 3
