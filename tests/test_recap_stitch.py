"""Stitching: shards in, the same members and captions out; what is bad is counted; a kill changes nothing."""

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import webdataset
from PIL import Image

from recap import look, storage
from recap.config import Data
from recap.config.stitch import Detr, Stitch
from recap.errors import UserError
from recap.experts.detr import DetrExpert
from recap.facts import read_facts, write_facts
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shards import ShardWriter, read_shard
from recap.stitch import run
from recap.world.draw import draw

STYLES = ["short", "long", "rich"]
Stitching = Callable[..., dict[str, Any]]


@pytest.fixture
def stitch(world_models: Path) -> Stitching:
    """Stitch shards into a folder with the tiny DETR, at a threshold where it reports something of everything."""
    def stitch(out: Path, shards: list[Path], num_images: int = 1000, threshold: float = 0.01,
               alt_text: Literal["required", "optional"] = "required", **settings: Any) -> dict[str, Any]:
        detr = Detr(model=str(world_models / "detr"), threshold=threshold)
        config = Stitch(num_images=num_images, detr=detr, **settings)
        urls, looked = [str(shard) for shard in shards], {name: facts_of(out, name) for name in config.experts}
        for name, folder in looked.items():
            look.run(begun(folder, config), name, None, urls, config, Data(alt_text=alt_text), "cpu")
        return run(begun(out, config), urls, config, STYLES, looked, out.parent / "answers.sqlite", "cpu")
    return stitch


def facts_of(out: Path, expert: str) -> Path:
    return out.parent / f"{out.name}-facts" / expert


def begun(folder: Path, config: Stitch) -> StageDir:
    stage = StageDir(folder, {"stitch": config})
    stage.begin()
    return stage


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two shards, of 64 and 16 images."""
    out = tmp_path_factory.mktemp("stitch")
    draw(out, num_train=80, num_tuning=0, num_validation=0, num_evaluation=0, shard_size=64)
    return sorted((out / "train").glob("*.tar"))


def read(path: Path) -> list[Sample]:
    rejects: list[Any] = []
    found = list(read_shard(str(path), rejects))
    assert not rejects
    return found


def write_shard(path: Path, samples: list[Sample]) -> Path:
    with ShardWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def results(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.name not in ("log.jsonl", "config.json")}


# --- what comes out ------------------------------------------------------------------------------------------------


def test_members_stay_as_they_were_and_captions_follow(stitch: Stitching, shards: list[Path], tmp_path: Path,
                                                       world_models: Path) -> None:
    result = stitch(tmp_path, shards)
    assert result == {"images_in": 80, "images_out": 80, "quarantined": {}, "nothing_seen": 0}
    for shard in shards:
        before, after = read(shard), read(tmp_path / shard.name)
        assert [sample.key for sample in after] == [sample.key for sample in before]
        for old, new in zip(before, after, strict=True):
            assert list(new.members.items())[:5] == list(old.members.items())
            assert list(new.members)[5:] == ["short.txt", "long.txt", "rich.txt", "facts.json"]
            assert all(new.caption(style) for style in STYLES)
            facts = json.loads(new.members["facts.json"])
            assert (facts["width"], facts["height"]) == (32, 32)
            assert facts["experts"]["detr"]["model"] == str(world_models / "detr")
            assert facts["experts"]["detr"]["revision"].startswith("sha256:")
            assert facts["experts"]["detr"]["facts"]["objects"]
            assert facts["experts"]["alt_text"]["facts"]["sentences"][0]["text"] == old.caption("alt")
            assert facts["writer"]["name"] == "template"
    assert not list(tmp_path.glob("*quarantine*"))
    stats = json.loads((tmp_path / "00001_stats.json").read_text())
    assert stats["count"] == stats["successes"] == stats["status_dict"]["success"] == 16
    assert 0 < stats["mean_words"]["short"] < stats["mean_words"]["long"] <= stats["mean_words"]["rich"]


def test_webdataset_reads_what_is_written(stitch: Stitching, shards: list[Path], tmp_path: Path) -> None:
    stitch(tmp_path, shards[1:])
    found = list(webdataset.WebDataset(str(tmp_path / "00001.tar"), shardshuffle=False))
    ours = read(tmp_path / "00001.tar")
    assert [sample["short.txt"].decode() for sample in found] == [sample.caption("short") for sample in ours]


def test_only_so_many_images_are_used_across_shards(stitch: Stitching, shards: list[Path], tmp_path: Path) -> None:
    third = tmp_path / "00002.tar"
    third.write_bytes(b"not read")
    result = stitch(tmp_path / "out", [*shards, third], num_images=70, batch_size=16)
    assert (result["images_in"], result["images_out"]) == (70, 70)
    assert [len(read(path)) for path in sorted((tmp_path / "out").glob("*.tar"))] == [64, 6]


def test_captions_that_are_there_already_are_replaced_in_place(stitch: Stitching, shards: list[Path],
                                                               tmp_path: Path) -> None:
    old = read(shards[1])[0]
    members = {"short.txt": b"old words"} | old.members | {"other.txt": b"kept"}
    shard = write_shard(tmp_path / "00000.tar", [Sample("00000", old.key, members)])
    stitch(tmp_path / "out", [shard])
    new, = read(tmp_path / "out/00000.tar")
    assert list(new.members) == ["short.txt", *old.members, "other.txt", "long.txt", "rich.txt", "facts.json"]
    assert new.caption("short") != "old words"
    assert new.caption("other") == "kept"


def test_facts_of_a_rotated_photo_are_in_its_upright_pixels(stitch: Stitching, tmp_path: Path) -> None:
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 90), "red").save(turned, "JPEG", exif=exif)
    shard = write_shard(tmp_path / "00000.tar", [Sample("00000", "1", {"jpg": turned.getvalue(), "txt": b"a wall"})])
    stitch(tmp_path / "out", [shard])
    facts = json.loads(read(tmp_path / "out/00000.tar")[0].members["facts.json"])
    assert (facts["width"], facts["height"]) == (90, 30)
    boxes = [thing["box"] for thing in facts["experts"]["detr"]["facts"]["objects"]]
    assert max(box[2] for box in boxes) > 30
    assert max(box[3] for box in boxes) <= 30


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (1, 5000), (5000, 1)])
def test_odd_images_are_looked_at_like_others(stitch: Stitching, tmp_path: Path, size: tuple[int, int]) -> None:
    samples = []
    for key, image in (("1", Image.new("RGB", size)), ("2", Image.new("RGB", (64, 64)))):
        image.save(file := io.BytesIO(), "PNG")
        samples.append(Sample("00000", key, {"png": file.getvalue(), "txt": b"a wall"}))
    stitch(tmp_path / "out", [write_shard(tmp_path / "00000.tar", samples)])
    found, _ = read_facts(facts_of(tmp_path / "out", "detr") / "00000.parquet")
    assert [(each.width, each.height) for each in found.values()] == [size, (64, 64)]
    for each in found.values():
        assert len(each.facts.objects) == 10
        assert all(box[2] <= each.width and box[3] <= each.height for box in (one.box for one in each.facts.objects))
    heard, _ = read_facts(facts_of(tmp_path / "out", "alt_text") / "00000.parquet")
    assert all(each.facts.sentences for each in heard.values())


def test_a_new_mix_of_experts_looks_at_nothing_again(stitch: Stitching, shards: list[Path], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    stitch(tmp_path / "both", shards[1:])
    for name in ("both", "one"):
        assert facts_of(tmp_path / name, "detr").parent == tmp_path / f"{name}-facts"
    (tmp_path / "both-facts").rename(tmp_path / "one-facts")
    monkeypatch.setattr("recap.look.open_expert", lambda *_: pytest.fail("opened"))
    stitch(tmp_path / "one", shards[1:], experts=["detr"])
    facts = json.loads(read(tmp_path / "one/00001.tar")[0].members["facts.json"])
    assert list(facts["experts"]) == ["detr"]


def test_facts_of_different_images_are_not_put_together(stitch: Stitching, shards: list[Path], tmp_path: Path) -> None:
    stitch(tmp_path / "out", shards[1:])
    file = facts_of(tmp_path / "out", "alt_text") / "00001.parquet"
    found, provenance = read_facts(file)
    write_facts(file, list(found.values())[1:], provenance)
    (tmp_path / "out" / "00001_stats.json").unlink()
    with pytest.raises(UserError, match=r"facts of different images of .*00001\.tar: delete both"):
        stitch(tmp_path / "out", shards[1:])


def test_real_photos(stitch: Stitching, shared_data: Path, tmp_path: Path) -> None:
    shard = shared_data / "photos/archive-00000.tar"
    result = stitch(tmp_path, [shard], num_images=24)
    assert result["images_out"] == 24
    for old, new in zip(read_shard(str(shard), []), read(tmp_path / shard.name), strict=False):
        assert new.key == old.key
        assert new.image_bytes == old.image_bytes
        facts = json.loads(new.members["facts.json"])
        assert (facts["width"], facts["height"]) == old.image().size


# --- what is bad ---------------------------------------------------------------------------------------------------


def spoilt(shard: Path, out: Path) -> Path:
    """A copy of a shard in which four samples are bad, each in a way of its own."""
    samples = read(shard)
    samples[1].members["png"] = samples[1].members["png"][:60]
    samples[3].members["txt"] = b"\xff\xfe"
    samples[4].members["json"] = b"[1]"
    del samples[9].members["png"]
    return write_shard(out, samples)


def test_bad_samples_are_quarantined_with_their_reason_and_the_counts_add_up(stitch: Stitching, shards: list[Path],
                                                                             tmp_path: Path) -> None:
    shard = spoilt(shards[1], tmp_path / "00001.tar")
    result = stitch(tmp_path / "out", [shard], batch_size=5)
    reasons = {"undecodable_image": 1, "binary_alt_text": 1, "bad_metadata": 1, "missing_image": 1}
    assert result == {"images_in": 16, "images_out": 12, "quarantined": reasons, "nothing_seen": 0}
    rejects = [json.loads(line) for line in (tmp_path / "out/00001_quarantine.jsonl").read_text().splitlines()]
    assert Counter(reject["reason"] for reject in rejects) == reasons
    assert [reject["key"][-1] for reject in rejects] == ["1", "3", "4", "9"]
    assert len(read(tmp_path / "out/00001.tar")) == 12
    stats = json.loads((tmp_path / "out/00001_stats.json").read_text())
    assert stats["count"] == sum(stats["status_dict"].values()) == 16


def test_where_alt_text_is_optional_bad_alt_text_is_none(stitch: Stitching, shards: list[Path], tmp_path: Path) -> None:
    shard = spoilt(shards[1], tmp_path / "00001.tar")
    result = stitch(tmp_path / "out", [shard], alt_text="optional")
    assert result["images_out"] == 13
    facts = {sample.key: json.loads(sample.members["facts.json"]) for sample in read(tmp_path / "out/00001.tar")}
    assert not facts["000010003"]["experts"]["alt_text"]["facts"]["sentences"]


def test_bad_samples_do_not_count_among_the_images_asked_for(stitch: Stitching, shards: list[Path],
                                                             tmp_path: Path) -> None:
    result = stitch(tmp_path / "out", [spoilt(shards[1], tmp_path / "00001.tar")], num_images=3)
    assert result["images_out"] == 3
    assert result["quarantined"] == {"undecodable_image": 1, "binary_alt_text": 1, "bad_metadata": 1}


def test_when_nothing_is_left_the_user_is_told(stitch: Stitching, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "00000.tar", [Sample("00000", "1", {"jpg": b"no image", "txt": b"a"})])
    with pytest.raises(UserError, match=r"no image of .* could be used .*undecodable_image"):
        stitch(tmp_path / "out", [shard])


def test_experts_that_see_nothing_are_warned_of(stitch: Stitching, shards: list[Path], tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    result = stitch(tmp_path, shards[1:], threshold=0.9)
    assert result["nothing_seen"] == 16
    assert "saw nothing in 16 of 16 images" in capsys.readouterr().err
    assert {sample.caption("short") for sample in read(tmp_path / "00001.tar")} == {"An image."}


# --- kills ---------------------------------------------------------------------------------------------------------


def test_a_killed_run_that_is_run_again_gives_the_same_bytes(stitch: Stitching, shards: list[Path],
                                                             tmp_path: Path) -> None:
    inputs = [shards[0], spoilt(shards[1], tmp_path / "00001.tar")]
    whole = stitch(tmp_path / "whole", inputs, num_images=70)
    stitch(tmp_path / "killed", inputs, num_images=70)
    (tmp_path / "killed/00001_stats.json").unlink()
    (tmp_path / "killed/00001.tar").unlink()
    half = storage.temporary(str(tmp_path / "killed/00001.tar"))
    half.with_name(half.name.replace(f"-{os.getpid()}.", "-4194305.")).write_bytes(b"half a tar")  # no such process
    first = (tmp_path / "killed/00000.tar").stat().st_mtime_ns
    assert stitch(tmp_path / "killed", inputs, num_images=70) == whole
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert (tmp_path / "killed/00000.tar").stat().st_mtime_ns == first  # not done twice


def test_an_error_within_a_shard_leaves_no_shard_behind(stitch: Stitching, shards: list[Path], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    look = DetrExpert.look

    def fail_at_the_third(self: DetrExpert, *arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise KeyboardInterrupt
        return look(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DetrExpert, "look", fail_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            stitch(tmp_path / "killed", shards, batch_size=16)
    assert not results(facts_of(tmp_path / "killed", "detr"))
    stitch(tmp_path / "killed", shards, batch_size=16)
    stitch(tmp_path / "whole", shards, batch_size=16)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_a_run_that_is_done_opens_no_expert(stitch: Stitching, shards: list[Path], tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    first = stitch(tmp_path, shards[1:])
    monkeypatch.setattr("recap.look.open_expert", lambda *_: pytest.fail("opened"))
    assert stitch(tmp_path, shards[1:]) == first
