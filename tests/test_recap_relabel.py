"""Relabelling: nothing is lost, whatever the shards hold, and nothing else of a sample changes."""

import gc
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from recap import storage
from recap.caption_checks import CaptionChecks
from recap.caption_tables import read_table
from recap.captioners import Captioner as Captions
from recap.captioners.blip2 import Blip2
from recap.choosing import Item
from recap.config import DEFAULT_STYLES, Data, Style
from recap.config.captioner import Captioner
from recap.config.relabel import Checks, Images, Relabel
from recap.errors import UserError
from recap.image_filters import ImageScores
from recap.relabel import Job, run
from recap.relabeller import Prepared, Relabeller
from recap.rundir import StageDir, Stale
from recap.sample import Sample
from recap.shards import Reject, ShardWriter, read_shard
from recap.verify import verify

STYLES = {"short": Style(prompt="A short caption:", max_new_tokens=6),
          "long": Style(prompt="In detail:", max_new_tokens=9)}


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (level, 255 - level, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def relabelled(shards: list[str], out: Path, models: Path, styles: dict[str, Style] = STYLES,
               config: Relabel = Relabel(batch_size=4), stale: Stale = "refuse", **data: str  # noqa: B008
               ) -> dict[str, object]:
    stage = StageDir(out, {"styles": styles, "output": config.output, "inputs": shards})
    stage.begin()
    return run(stage, shards, Captioner(model=str(models / "blip2"), dtype="float32"), None, styles, config,
               Data(**data), "cpu", stale)


def files(folder: Path) -> dict[str, bytes]:
    """The set that was written: without what says when, how fast and on which machine."""
    aside = {"config.json", "log.jsonl", "progress.json", "README.md"}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in aside}


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
    storage.temporary(str(tmp_path / "one" / "00001.tar")).write_bytes(b"half")
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


@pytest.fixture
def small(world_shards: Path, tmp_path: Path) -> list[str]:
    """Four shards of six drawings."""
    samples = read(world_shards / "train" / "00000.tar")
    paths = [tmp_path / "small" / f"{place:05d}.tar" for place in range(4)]
    for place, path in enumerate(paths):
        with ShardWriter(str(path)) as writer:
            for sample in samples[6 * place:6 * place + 6]:
                writer.write(sample)
    return [str(path) for path in paths]


def test_several_processes_write_what_one_does(small: list[str], tmp_path: Path, world_models: Path) -> None:
    one = relabelled(small, tmp_path / "one", world_models)
    two = relabelled(small, tmp_path / "two", world_models, config=Relabel(batch_size=4, workers=2))
    assert files(tmp_path / "one") == files(tmp_path / "two") and one == two
    assert {f"{place:05d}.tar" for place in range(4)} < files(tmp_path / "one").keys()


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A device on which so many images find room at once, and no more."""
    def with_room_for(num_images: int) -> None:
        begin = Blip2._begin

        def limited(self: Blip2, batches: Iterable[torch.Tensor], *others: Any) -> Iterator[Any]:
            def checked() -> Iterator[torch.Tensor]:
                for batch in batches:
                    if len(batch) > num_images:
                        raise torch.OutOfMemoryError(f"CUDA out of memory: no room for {len(batch)} images")
                    yield batch
            return begin(self, checked(), *others)

        monkeypatch.setattr(Blip2, "_begin", limited)
    return with_room_for


def test_out_of_memory_halves_the_batch_and_goes_on(small: list[str], tmp_path: Path, world_models: Path,
                                                    little_memory: Callable[[int], None],
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    relabelled(small, tmp_path / "large", world_models, config=Relabel(batch_size=6))
    little_memory(2)
    relabelled(small, tmp_path / "small-memory", world_models, config=Relabel(batch_size=6))
    said = capsys.readouterr().err
    assert said.count("out of memory: goes on with") == 2 and "relabel.batch_size=1," in said
    assert files(tmp_path / "large") == files(tmp_path / "small-memory")
    progress = json.loads((tmp_path / "small-memory" / "progress.json").read_bytes())
    assert (progress["images"], progress["shards"]) == (24, 4)  # those that were begun twice count once


def test_no_memory_for_a_single_image_is_one_clear_line(small: list[str], tmp_path: Path, world_models: Path,
                                                        little_memory: Callable[[int], None]) -> None:
    little_memory(0)
    with pytest.raises(UserError, match="memory does not suffice for a single image"):
        relabelled(small, tmp_path / "out", world_models, config=Relabel(batch_size=4, num_slots=8))


def test_shards_of_other_settings_are_refused_kept_or_made_again(small: list[str], tmp_path: Path,
                                                                 world_models: Path) -> None:
    out = tmp_path / "out"
    config = Relabel(batch_size=4, output=str(tmp_path / "set"))
    relabelled(small[:2], out, world_models, config=config)
    before = files(tmp_path / "set")
    other = {"short": Style(prompt="A short caption:", max_new_tokens=3)}
    with pytest.raises(UserError, match=r"2 shards of other settings, 00000 for one: .*--go-on.*--redo"):
        relabelled(small, out, world_models, other, config)
    assert files(tmp_path / "set") == before
    relabelled(small, out, world_models, other, config, "go_on")
    after = files(tmp_path / "set")
    assert all(after[name] == before[name] for name in ("00000.tar", "00001.tar", "00001_stats.json"))
    assert "long.txt" not in read(tmp_path / "set" / "00002.tar")[0].members
    assert json.loads(after["00002_stats.json"])["settings"] != json.loads(after["00001_stats.json"])["settings"]
    relabelled(small, out, world_models, other, config, "redo")
    assert "long.txt" not in read(tmp_path / "set" / "00000.tar")[0].members
    relabelled(small, out, world_models, other, config)  # now they are all alike


def test_a_shard_of_another_version_of_the_input_is_made_again(small: list[str], tmp_path: Path, world_models: Path
                                                               ) -> None:
    out, config = tmp_path / "out", Relabel(batch_size=4, output=str(tmp_path / "set"))
    relabelled(small, out, world_models, config=config)
    before = files(tmp_path / "set")
    samples = read(Path(small[1]))
    with ShardWriter(small[1]) as writer:
        for sample in samples[:4]:
            writer.write(sample)
    with pytest.raises(UserError, match=r"1 shards of another input, 00001 for one: choose .*, or make them again"):
        relabelled(small, out, world_models, config=config)
    assert files(tmp_path / "set") == before
    for stale in ("go_on", "redo"):
        result = relabelled(small, out, world_models, config=config, stale=stale)  # type: ignore[arg-type]
        assert result["images_out"] == 22 and len(read(tmp_path / "set" / "00001.tar")) == 4
        after = files(tmp_path / "set")
        assert all(after[name] == before[name] for name in before if name.endswith(".tar") and name != "00001.tar")


def test_a_copy_of_the_input_is_another_unless_one_goes_on(small: list[str], tmp_path: Path, world_models: Path
                                                           ) -> None:
    out, config = tmp_path / "out", Relabel(batch_size=4, output=str(tmp_path / "set"))
    relabelled(small, out, world_models, config=config)
    before = files(tmp_path / "set")
    for shard in small:
        os.utime(shard, (1, 1))
    with pytest.raises(UserError, match=r"4 shards of another input, .* keep those that only have another time with"):
        relabelled(small, out, world_models, config=config)
    relabelled(small, out, world_models, config=config, stale="go_on")
    assert files(tmp_path / "set") == before


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_the_input_is_not_written_over(small: list[str], tmp_path: Path, world_models: Path, kind: Any) -> None:
    before = files(tmp_path / "small")
    (tmp_path / "links").mkdir()
    for shard in small:
        (tmp_path / "links" / Path(shard).name).symlink_to(shard)
    with pytest.raises(UserError, match="holds 00000 of the input"):
        relabelled([str(path) for path in sorted((tmp_path / "links").iterdir())], tmp_path / "out", world_models,
                   config=Relabel(output=str(tmp_path / "links")))
    for out in (tmp_path / "small", tmp_path / "x" / ".." / "small"):
        with pytest.raises(UserError, match="holds 00000 of the input"):
            relabelled(small, tmp_path / "out", world_models, config=Relabel(format=kind, output=f"{out}/"))
    assert files(tmp_path / "small") == before


@pytest.mark.parametrize(("content", "said"), [
    ('{"count": 10, "successes": 9, "status_dict": {}}', "is not of `recap relabel`"), ("[]", "is not of `recap"),
    ("", "is damaged"), ("{", "is damaged")])
def test_stats_of_others_are_one_clear_line(small: list[str], tmp_path: Path, world_models: Path, content: str,
                                            said: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00001_stats.json").write_text(content)
    with pytest.raises(UserError, match=f"out/00001_stats.json {said}"):
        relabelled(small, tmp_path / "out", world_models)


def test_an_output_that_cannot_be_written_is_said_before_anything_is_captioned(small: list[str], tmp_path: Path,
                                                                               world_models: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is no folder"):
        relabelled(small, tmp_path / "out", world_models, config=Relabel(output=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"


def test_one_form_of_an_outputs_name(tmp_path: Path) -> None:
    forms = {"s3://b/out/": "s3://b/out", "s3://b/out": "s3://b/out", "/": "/", "a//": "a", "file:///x/y": "/x/y"}
    assert {form: Relabel(output=form).output for form in forms} == forms and Relabel().output is None


def test_memory_that_suffices_for_one_image_at_a_time_suffices_for_filters_and_checks(
        small: list[str], tmp_path: Path, world_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relabelled(small, tmp_path / "large", world_models)

    def with_little(work: Callable[..., Any]) -> Callable[..., Any]:
        def limited(self: Any, images: list[Any], *others: Any) -> Any:
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return work(self, images, *others)
        return limited

    preprocess, calls = Blip2.preprocess, iter(range(100))

    def sometimes(self: Blip2, images: list[Image.Image]) -> torch.Tensor:
        if next(calls) in (0, 4):  # of a shard's first batch, and of a later one
            raise MemoryError
        return preprocess(self, images)

    monkeypatch.setattr(Blip2, "preprocess", sometimes)
    monkeypatch.setattr(ImageScores, "look", with_little(ImageScores.look))
    monkeypatch.setattr(CaptionChecks, "check", with_little(CaptionChecks.check))
    relabelled(small, tmp_path / "small-memory", world_models)
    assert files(tmp_path / "large") == files(tmp_path / "small-memory")


def worker(tmp_path: Path, models: Path, report: Any = lambda *_: None) -> Relabeller:
    job = Job(str(tmp_path / "out"), Captioner(model=str(models / "blip2"), dtype="float32"), None, STYLES,
              Relabel(batch_size=2), Data(), "s")
    return Relabeller(job, "cpu", report)


def test_a_shard_is_told_of_when_it_is_published_and_not_after_the_next(small: list[str], tmp_path: Path,
                                                                        world_models: Path) -> None:
    told: list[tuple[str, int]] = []
    is_published = threading.Event()
    with worker(tmp_path, world_models, lambda shard, done, _: told.append((Path(shard).name, done))) as relabeller:
        publish, caption = relabeller._publish, relabeller._caption

        def published(*arguments: Any) -> Any:
            result = publish(*arguments)
            is_published.set()
            return result

        def captioned(shard: str, parts: Any) -> Iterator[None]:
            assert shard == small[0] or is_published.wait(60)  # the next is not held up by it either
            for _ in caption(shard, parts):
                time.sleep(0.01)
                yield

        relabeller._publish, relabeller._caption = published, captioned  # type: ignore[method-assign]
        for shard, _ in relabeller.process(small[:2]):
            told.append((Path(shard).name, -1))
    assert told.index(("00000.tar", -1)) < told.index(("00001.tar", 6))


def test_the_next_shard_is_captioned_while_one_is_published(small: list[str], tmp_path: Path, world_models: Path
                                                            ) -> None:
    told: list[tuple[str, int]] = []
    go_on = threading.Event()
    with worker(tmp_path, world_models, lambda shard, done, _: told.append((Path(shard).name, done))) as relabeller:
        publish = relabeller._publish

        def late(*arguments: Any) -> Any:
            assert go_on.wait(60)
            return publish(*arguments)

        def report(shard: str, done: int, _: Any) -> None:
            told.append((Path(shard).name, done))
            if told[-1] == ("00001.tar", 6):
                go_on.set()

        relabeller._publish, relabeller.report = late, report  # type: ignore[method-assign]
        assert [shard for shard, _ in relabeller.process(small)] == small


def test_repeats_of_an_image_are_written_while_the_shard_is_read(
        small: list[str], tmp_path: Path, world_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blip2, "captions", Captions.captions)  # batch by batch, as most families do
    shard = tmp_path / "repeats" / "00000.tar"
    members = read(Path(small[0]))[0].members
    with ShardWriter(str(shard)) as writer:
        for place in range(40):
            writer.write(Sample("00000", f"{place:04d}", members))
    waiting: list[int] = []
    gc.collect()  # what other tests have left
    with worker(tmp_path, world_models) as relabeller:
        prepare = relabeller._prepare

        def counted(shard: str) -> Iterator[Prepared]:
            for part in prepare(shard):
                waiting.append(sum(isinstance(each, Item) for each in gc.get_objects()))
                yield part

        relabeller._prepare = counted  # type: ignore[method-assign]
        list(relabeller.process([str(shard)]))
    assert len(waiting) == 21 and max(waiting) <= 12
    assert len(read(tmp_path / "out" / "00000.tar")) == 40


@pytest.mark.parametrize("kind", ["shards", "parquet", "folder"])
def test_what_was_relabelled_before_becomes_a_whole_set_in_any_format(small: list[str], tmp_path: Path,
                                                                      world_models: Path, kind: Any) -> None:
    """Its mix may be of a caption that is in the input alone; one that is no text is none."""
    record = {"schema": 1, "captions": {"long": {"captioner": "x"}, "alt": {}, "old": {}, "huge": {"x": "y" * 200_000}}}
    shard = tmp_path / "earlier" / "00000.tar"
    with ShardWriter(str(shard)) as writer:
        for place, sample in enumerate(read(Path(small[0]))):
            writer.write(Sample("00000", sample.key, sample.members | {
                "long.txt": b"\xff" if place == 2 else b" Long  before. ", "OLD.TXT": b"old",
                "recap.json": json.dumps(record).encode()}))
    config = Relabel(batch_size=4, format=kind, mix={"short": 1, "long": 9})
    short = {"short": STYLES["short"]}
    result = relabelled([str(shard)], tmp_path / "out", world_models, short, config)
    assert result["images_out"] == 6
    assert verify([str(shard)], str(tmp_path / "out"), config, ["short"]).findings == []


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_other_formats_hold_the_same_captions(small: list[str], tmp_path: Path, world_models: Path, kind: Any) -> None:
    relabelled(small[:1], tmp_path / "shards", world_models)
    config = Relabel(batch_size=4, format=kind, folder_caption="long")
    relabelled(small[:1], tmp_path / "other", world_models, config=config)
    samples = read(tmp_path / "shards" / "00000.tar")
    expected = {sample.key: sample.caption("long") for sample in samples}
    if kind == "parquet":
        rows = read_table(str(tmp_path / "other" / "00000.parquet"), ["long"])
        assert {key: row.members["long.txt"].decode() for key, row in rows.items()} == expected
    else:
        folder = tmp_path / "other" / "00000"
        assert {key: (folder / f"{key}.txt").read_text() for key in expected} == expected
        assert (folder / f"{samples[0].key}.{samples[0].image_extension}").read_bytes() == samples[0].image_bytes


def test_a_repeated_image_is_captioned_once(small: list[str], tmp_path: Path, world_models: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tmp_path / "repeats" / "00000.tar"
    samples = read(Path(small[0]))
    with ShardWriter(str(shard)) as writer:
        for place, sample in enumerate([*samples, *samples]):
            writer.write(Sample("00000", f"{place:04d}", sample.members))
    shown: list[int] = []
    preprocess = Blip2.preprocess

    def counted(self: Blip2, images: list[Image.Image]) -> torch.Tensor:
        shown.append(len(images))
        return preprocess(self, images)

    monkeypatch.setattr(Blip2, "preprocess", counted)
    relabelled([str(shard)], tmp_path / "out", world_models)
    found = read(tmp_path / "out" / "00000.tar")
    assert sum(shown) == 6 and len(found) == 12
    assert [each.caption("long") for each in found[:6]] == [each.caption("long") for each in found[6:]]
    dropping = Relabel(batch_size=4, images=Images(duplicates="drop"))
    result = relabelled([str(shard)], tmp_path / "dropped", world_models, config=dropping)
    assert result["quarantined"] == {"duplicate_image": 6}


def test_a_caption_at_fault_is_drawn_again_replaced_or_dropped(small: list[str], tmp_path: Path,
                                                               world_models: Path) -> None:
    def captioned(**checks: Any) -> tuple[dict[str, object], list[Sample]]:
        words = {"short": (1, 300), "long": (1, 1)}  # which no caption keeps to
        out = tmp_path / "-".join(map(str, checks.values()))
        result = relabelled(small[:1], out, world_models, config=Relabel(
            batch_size=4, checks=Checks(words=words, not_ended="flag", **checks)))
        return result, read(out / "00000.tar") if (out / "00000.tar").is_file() else []

    def said(sample: Sample) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(sample.members["recap.json"])["captions"]["long"]
        return found

    result, flagged = captioned(too_long="flag")
    assert result["captions"]["long/too_long"] == 6  # type: ignore[index]
    assert all("too_long" in said(sample)["flags"] for sample in flagged)
    result, kept = captioned(too_long="alt")
    assert [sample.caption("long") for sample in kept] == [sample.caption("alt") for sample in kept]
    assert result["captions"]["long/alt_text_kept"] == 6  # type: ignore[index]
    decoding = said(kept[0])["decoding"]
    assert decoding["text"] == "alt" and "too_long" in decoding["because"] and said(kept[0])["flags"] == ["too_long"]
    result, drawn = captioned(too_long="resample", otherwise="alt")
    assert [sample.caption("long") for sample in drawn] == [sample.caption("alt") for sample in drawn]
    with pytest.raises(UserError, match="caption_too_long"):
        captioned(too_long="drop")


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
