"""A set that is whole has no finding; whatever is done to it is found, and nothing else."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recap.errors import UserError
from recap.outputs import Format, open_output
from recap.sample import Sample
from recap.shard_work import stats_of
from recap.shards import Reject, ShardWriter, read_shard
from recap.storage import write_json
from recap.verify import MAX_SHOWN, Verified, report, run, verify

STYLES = ["short", "long"]
KINDS: list[Format] = ["shards", "parquet", "folder"]


def sample(place: int) -> Sample:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (place, 0, 0)).save(buffer, "PNG")
    return Sample("00000", f"{place:03d}", {"png": buffer.getvalue(), "txt": f"alt {place}".encode(), "json": b"{}"})


def relabelled(each: Sample) -> Sample:
    texts = {f"{style}.txt": f"{style} {each.key}".encode() for style in STYLES}
    record = json.dumps({"schema": 1, "captions": {style: {"captioner": "x"} for style in STYLES}}).encode()
    return Sample(each.shard, each.key, each.members | texts | {"mix.txt": texts["long.txt"], "recap.json": record})


class Set:
    """Two shards of ten samples, of which one is in quarantine."""

    def __init__(self, root: Path, kind: Format) -> None:
        self.input, self.out, self.kind = root / "in", root / "out", kind
        self.shards = [str(self.input / f"{name}.tar") for name in ("00000", "00001")]
        for shard in self.shards:
            with ShardWriter(shard) as writer:
                for place in range(10):
                    writer.write(sample(place))
            self.write(shard, [relabelled(sample(place)) for place in range(10) if place != 4])

    def write(self, shard: str, samples: list[Sample]) -> None:
        with open_output(self.kind, str(self.out), Path(shard).stem, "long") as output:
            for each in samples:
                output.write(each)
        stats = stats_of(shard, str(self.out), 9, [Reject(Path(shard).stem, "004", "undecodable_image")],
                         captions={}, settings="s")
        write_json(f"{self.out}/{Path(shard).stem}_stats.json", stats)

    def changed(self, change: Callable[[list[Sample]], None]) -> None:
        """Write the second shard anew, changed."""
        samples = [relabelled(sample(place)) for place in range(10) if place != 4]
        change(samples)
        self.write(self.shards[1], samples)

    def verified(self) -> Verified:
        return verify(self.shards, str(self.out), self.kind, STYLES)

    def found(self) -> list[str]:
        return [str(finding) for finding in self.verified().findings]


@pytest.fixture
def shards(tmp_path: Path) -> Set:
    return Set(tmp_path, "shards")


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_set_has_no_finding(tmp_path: Path, kind: Format) -> None:
    made = Set(tmp_path, kind)
    found = made.verified()
    assert found.findings == [] and found.num_shards == 2
    assert found.counts == {"images": 18, "captions": 36, "quarantined": 2}
    said = "all is whole: 2 shards: 18 images with 36 captions, 2 samples in quarantine"
    assert run(made.shards, str(made.out), kind, STYLES) == said


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_that_is_lost_or_another_is_found(tmp_path: Path, kind: Format) -> None:
    made = Set(tmp_path, kind)
    made.changed(lambda samples: samples.pop(2))  # type: ignore[arg-type, return-value]
    lost = "00001/002: is lost: neither written nor in quarantine"
    assert made.found() == [lost, *(f"00001: its stats say {name}" for name in (
        "count 10, and it is 9", "success 9, and it is 8", "successes 9, and it is 8"))]
    made.changed(lambda samples: samples.append(relabelled(sample(77))))
    assert made.found()[0] == "00001/077: was written, and is not in the input"
    made.changed(lambda samples: samples[3].members.update(png=sample(99).members["png"]))
    assert re.fullmatch("00001/003: (png|the image) has other bytes", made.found()[0]) and len(made.found()) == 1


def drop(name: str) -> Callable[[list[Sample]], None]:
    return lambda samples: samples[0].members.pop(name) and None


def put(name: str, content: bytes) -> Callable[[list[Sample]], None]:
    return lambda samples: samples[0].members.update({name: content})


def swap(samples: list[Sample]) -> None:
    samples[0], samples[1] = samples[1], samples[0]


def turn(samples: list[Sample]) -> None:
    members = samples[0].members
    members["png"] = members.pop("png")


@pytest.mark.parametrize(("change", "expected"), [
    (put("txt", b"another"), "000: txt has other bytes"),
    (drop("json"), "000: json is missing"),
    (drop("long.txt"), "000: has no long caption"),
    (put("short.txt", b"\xff"), "000: its short caption is not UTF-8"),
    (put("mix.txt", b"neither"), "000: its mix is none of its captions"),
    (put("recap.json", b"{"), "000: its recap.json is damaged"),
    (put("recap.json", b'{"schema": 1, "captions": {"long": {}}}'), "000: its recap.json says nothing of short"),
    (swap, "001: does not stand where it stood"),
    (turn, "000: its members stand in another order"),
])
def test_any_change_of_a_sample_is_found(shards: Set, change: Callable[[list[Sample]], None], expected: str) -> None:
    shards.changed(change)
    assert f"00001/{expected}" in shards.found()
    assert all(finding.startswith("00001/00") for finding in shards.found())


def test_stats_and_quarantine_are_held_to_what_is_there(shards: Set) -> None:
    stats = shards.out / "00001_stats.json"
    whole = json.loads(stats.read_bytes())
    stats.write_text(json.dumps(whole | {"count": 11}))
    assert shards.found() == ["00001: its stats say count 11, and it is 10"]
    stats.write_text(json.dumps(whole | {"settings": "other"}))
    assert shards.found() == ["made with different settings: 1 shards of s, 1 shards of other"]
    stats.write_text("{")
    assert "00001: is damaged" in shards.found()[0]
    stats.unlink()
    assert shards.found() == ["00001: is not relabelled: there is no 00001_stats.json"]
    stats.write_text(json.dumps(whole))
    (shards.out / "00001_quarantine.jsonl").write_text(json.dumps(
        {"shard": "00001", "key": "\x1b[31m", "reason": "undecodable_image", "detail": ""}) + "\n")
    assert shards.found() == ["00001/004: is lost: neither written nor in quarantine",
                              r"00001/\x1b[31m: is in quarantine, and not in the input"]


def test_what_is_missing_cut_left_over_or_half_written_is_found(shards: Set) -> None:
    whole = (shards.out / "00001.tar").read_bytes()
    (shards.out / "00001.tar").write_bytes(whole[:len(whole) // 2])
    assert any("was written damaged: truncated_shard" in finding for finding in shards.found())
    (shards.out / "00001.tar").unlink()
    assert any("00001: is " in finding for finding in shards.found())
    (shards.out / "00001.tar").write_bytes(whole)
    (shards.out / "00007.tar").write_bytes(whole)
    (shards.out / ".00008.tar.0-1.tmp").write_bytes(b"")
    found = shards.found()
    assert len(found) == 2 and "00007.tar is of no shard of the input" in found and "half written" in found[0]


def test_malformed_input_has_to_be_in_quarantine(shards: Set) -> None:
    whole = Path(shards.shards[1]).read_bytes()
    Path(shards.shards[1]).write_bytes(whole[:len(whole) - 10_240 - 1024 - 700])
    with tarfile.open(shards.shards[0], "a") as tar:
        tar.addfile(tarfile.TarInfo("000.png"))
    found = shards.found()
    assert "00000/000: is malformed (duplicate_key), and not in quarantine" in found
    assert "00001/009: is malformed (truncated_shard), and not in quarantine" in found


def test_a_terminal_shows_the_first_findings(shards: Set, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(samples: list[Sample]) -> None:
        for each in samples:
            each.members |= {"txt": b"x", "json": b"x", "png": sample(50).members["png"]}

    shards.changed(spoil)
    with pytest.raises(UserError, match="verify: 27 findings, in 1 of 2 shards"):
        run(shards.shards, str(shards.out), "shards", STYLES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == MAX_SHOWN + 2 and lines[-2] == "… and 7 more" and max(map(len, lines)) <= 80
    assert lines[-1] == report(shards.verified()).splitlines()[-1]
    with pytest.raises(UserError, match=r"nothing at .*: run `recap relabel` first"):
        run(shards.shards, str(shards.out / "none"), "shards", STYLES)


def test_an_input_that_was_relabelled_before_may_get_new_captions(tmp_path: Path) -> None:
    made = Set(tmp_path, "shards")
    rejects: list[Any] = []
    for shard in made.shards:
        old = {"long.txt": b"old", "mix.txt": b"old", "recap.json": b"{}"}
        again = [Sample(each.shard, each.key, each.members | old) for each in read_shard(shard, rejects)]
        with ShardWriter(shard) as writer:
            for each in again:
                writer.write(each)
    assert made.found() == []
