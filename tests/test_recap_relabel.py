"""Relabelling: nothing is lost, whatever the shards hold, and nothing else of a sample changes."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from recap.config import DEFAULT_STYLES, Data, Relabel, Style
from recap.config.captioner import Captioner
from recap.errors import UserError
from recap.relabel import run
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shards import Reject, ShardWriter, read_shard

STYLES = {"short": Style(prompt="A short caption:", max_new_tokens=6),
          "long": Style(prompt="In detail:", max_new_tokens=9)}


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (level, 255 - level, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def relabelled(shards: list[str], out: Path, models: Path, styles: dict[str, Style] = STYLES,
               **data: str) -> dict[str, object]:
    stage = StageDir(out, {})
    stage.begin()
    return run(stage, shards, Captioner(model=str(models / "blip2"), dtype="float32"), None, styles,
               Relabel(batch_size=4), Data(**data), "cpu")


def read(path: Path) -> list[Sample]:
    rejects: list[Reject] = []
    return list(read_shard(str(path), rejects))


@pytest.fixture
def nasty(tmp_path: Path) -> str:
    """A shard with every kind of bad sample among good ones."""
    with ShardWriter(str(tmp_path / "in" / "00000.tar")) as writer:
        for key, members in {
            "good-1": {"png": png(10), "txt": b"a cat", "json": b'{"a": 1}', "extra.bin": b"\x00\xff"},
            "broken-image": {"png": png(10)[:60], "txt": b"a cat"},
            "not-an-image": {"jpg": b"<html>403</html>", "txt": b"a cat"},
            "no-image": {"txt": b"a cat"},
            "no-text": {"png": png(20)},
            "empty-text": {"png": png(20), "txt": b"  \n"},
            "binary-text": {"png": png(20), "txt": b"\x89PNG\r\n\xff"},
            "bad-json": {"png": png(20), "txt": b"a cat", "json": b"{"},
            "good-2": {"png": png(30), "txt": "un café 🎨".encode()},
        }.items():
            writer.write(Sample("00000", key, members))
    return str(tmp_path / "in" / "00000.tar")


def test_every_sample_is_captioned_or_quarantined_with_its_reason(nasty: str, tmp_path: Path,
                                                                  world_models: Path) -> None:
    result = relabelled([nasty], tmp_path / "out", world_models)
    assert [sample.key for sample in read(tmp_path / "out" / "00000.tar")] == ["good-1", "good-2"]
    lines = (tmp_path / "out" / "00000_quarantine.jsonl").read_text().splitlines()
    assert {entry["key"]: entry["reason"] for entry in map(json.loads, lines)} == {
        "broken-image": "undecodable_image", "not-an-image": "undecodable_image", "no-image": "missing_image",
        "no-text": "missing_alt_text", "empty-text": "empty_alt_text", "binary-text": "binary_alt_text",
        "bad-json": "bad_metadata"}
    assert (result["images_in"], result["images_out"]) == (9, 2)
    assert sum(result["quarantined"].values()) == 7  # type: ignore[attr-defined]


def test_optional_alt_text_keeps_images_without_one(nasty: str, tmp_path: Path, world_models: Path) -> None:
    assert relabelled([nasty], tmp_path / "out", world_models, alt_text="optional")["images_out"] == 5


def test_members_keep_bytes_and_order_and_the_captions_follow(nasty: str, tmp_path: Path, world_models: Path) -> None:
    relabelled([nasty], tmp_path / "out", world_models)
    before, after = read(Path(nasty))[0], read(tmp_path / "out" / "00000.tar")[0]
    assert list(after.members)[:len(before.members)] == list(before.members)
    assert all(after.members[name] == content for name, content in before.members.items())
    assert list(after.members)[len(before.members):] == ["short.txt", "long.txt", "mix.txt", "recap.json"]


def test_a_truncated_shard_gives_what_is_whole_and_names_the_rest(tmp_path: Path, world_models: Path,
                                                                  world_shards: Path) -> None:
    whole = (world_shards / "train" / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[:len(whole) // 3])
    result = relabelled([str(tmp_path / "00000.tar")], tmp_path / "out", world_models)
    assert result["quarantined"] == {"truncated_shard": 1}
    assert result["images_out"] == result["images_in"] - 1 > 3  # type: ignore[operator]


def test_bytes_do_not_depend_on_the_other_shards_or_an_interruption(world_shards: Path, world_models: Path,
                                                                    tmp_path: Path) -> None:
    shard = world_shards / "train" / "00000.tar"
    other = tmp_path / "00001.tar"
    with ShardWriter(str(other)) as writer:
        for sample in read(shard)[:5]:
            writer.write(sample)
    relabelled([str(shard), str(other)], tmp_path / "both", world_models)
    relabelled([str(other)], tmp_path / "one", world_models)
    assert (tmp_path / "both" / "00001.tar").read_bytes() == (tmp_path / "one" / "00001.tar").read_bytes()
    (tmp_path / "one" / "00001_stats.json").unlink()  # killed before its mark
    (tmp_path / "one" / ".00001.tar.tmp").write_bytes(b"half")
    relabelled([str(other)], tmp_path / "one", world_models)
    assert (tmp_path / "both" / "00001.tar").read_bytes() == (tmp_path / "one" / "00001.tar").read_bytes()


def test_adding_a_style_leaves_all_else_byte_equal(world_shards: Path, world_models: Path, tmp_path: Path) -> None:
    shard = str(world_shards / "evaluation" / "00000.tar")
    relabelled([shard], tmp_path / "one", world_models)
    rich = {"rich": DEFAULT_STYLES["rich"].model_copy(update={"max_new_tokens": 5})}
    relabelled([str(tmp_path / "one" / "00000.tar")], tmp_path / "two", world_models, rich)
    for before, after in zip(read(tmp_path / "one" / "00000.tar"), read(tmp_path / "two" / "00000.tar"), strict=True):
        assert set(after.members) - set(before.members) == {"rich.txt"}
        assert all(after.members[name] == before.members[name] for name in before.members if name != "recap.json")
        assert set(json.loads(after.members["recap.json"])["captions"]) == {"short", "long", "rich"}


def test_shards_without_a_single_good_image_are_one_clear_line(tmp_path: Path, world_models: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w"):
        pass
    with pytest.raises(UserError, match="no image of"):
        relabelled([str(tmp_path / "00000.tar")], tmp_path / "out", world_models)


@pytest.mark.full
def test_all_real_photos_come_out_with_their_bytes(shared_data: Path, world_models: Path, tmp_path: Path) -> None:
    shards = sorted(map(str, (shared_data / "photos").glob("*.tar")))
    result = relabelled(shards, tmp_path / "out", world_models)
    assert (result["images_in"], result["images_out"], result["quarantined"]) == (1824, 1824, {})
    for shard in shards:
        for before, after in zip(read(Path(shard)), read(tmp_path / "out" / Path(shard).name), strict=True):
            assert before.key == after.key
            assert list(after.members)[:len(before.members)] == list(before.members)
            assert all(after.members[name] == content for name, content in before.members.items())
