"""A set that is whole has no finding; whatever is done to it is found, and nothing else."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from recap.config import Data, Style
from recap.config.captioner import Captioner
from recap.config.relabel import Relabel
from recap.errors import UserError
from recap.outputs import Format, file_name, open_output
from recap.rundir import StageDir
from recap.sample import Sample
from recap.seal import Seal
from recap.shard_work import stats_of
from recap.shards import Reject, ShardWriter, read_shard
from recap.storage import write_json
from recap.verify import MAX_KEPT, MAX_SHOWN, Verified, report, run, verify

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


def seal(samples: list[Sample]) -> dict[str, Any]:
    found = Seal(STYLES)
    for each in samples:
        found.add(each, json.loads(each.members["recap.json"]))
    return found.content()


WHOLE = [relabelled(sample(place)) for place in range(10) if place != 4]


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

    def write(self, shard: str, samples: list[Sample], rejects: list[Reject] | None = None,
              sealed: list[Sample] | None = None) -> None:
        with open_output(self.kind, str(self.out), Path(shard).stem, STYLES, "long") as output:
            for each in samples:
                output.write(each)
        rejects = [Reject(Path(shard).stem, "004", "undecodable_image")] if rejects is None else rejects
        stats = stats_of(shard, str(self.out), len(samples), rejects, captions={}, settings="s",
                         seal=seal(samples if sealed is None else sealed))
        write_json(f"{self.out}/{Path(shard).stem}_stats.json", stats)

    def changed(self, change: Callable[[list[Sample]], None]) -> None:
        """Write the second shard anew, changed."""
        before, samples = ([relabelled(sample(place)) for place in range(10) if place != 4] for _ in range(2))
        change(samples)
        self.write(self.shards[1], samples, sealed=before)

    @property
    def config(self) -> Relabel:
        return Relabel(format=self.kind, folder_caption="long")

    def verified(self) -> Verified:
        return verify(self.shards, str(self.out), self.config, STYLES)

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
    said = "all 2 shards are whole: 18 images, 36 captions, 2 quarantined"
    assert run(made.shards, str(made.out), made.config, STYLES) == said


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_that_is_lost_or_another_is_found(tmp_path: Path, kind: Format) -> None:
    made = Set(tmp_path, kind)
    made.changed(lambda samples: samples.pop(2))  # type: ignore[arg-type, return-value]
    assert made.found() == ["00001/002: is lost: neither written nor in quarantine"]
    made.changed(lambda samples: samples.append(relabelled(sample(77))))
    assert made.found() == ["00001/077: was written, and is not in the input"]
    made.changed(lambda samples: samples[3].members.update(png=sample(99).members["png"]))
    assert re.fullmatch("00001/003: (png|the image) has other bytes", made.found()[0]) and len(made.found()) == 1


def exchange(samples: list[Sample]) -> None:
    """The captions of two images."""
    first, second = samples[:2]
    for name in ("short.txt", "long.txt", "mix.txt"):
        first.members[name], second.members[name] = second.members[name], first.members[name]


def empty(samples: list[Sample]) -> None:
    samples[3].members |= {"short.txt": b"", "long.txt": b"", "mix.txt": b""}


def doctor(samples: list[Sample]) -> None:
    samples[3].members["recap.json"] = samples[3].members["recap.json"].replace(b'"x"', b'"y"')


def mix_short(samples: list[Sample]) -> None:
    for each in samples:
        each.members["mix.txt"] = each.members["short.txt"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [exchange, empty, doctor, mix_short])
def test_captions_that_were_changed_are_found(tmp_path: Path, kind: Format,
                                              change: Callable[[list[Sample]], None]) -> None:
    made = Set(tmp_path, kind)
    made.changed(change)
    assert made.found() == ["00001: its captions, or what is said of them, were changed since"]


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
    (drop("short.txt"), "000: has no short caption"),
    (put("short.txt", b"\xff"), "000: its short caption cannot be read: binary_caption: the short text is …"),
    (put("short.txt", b"a" * 100_001), "000: its short caption cannot be read: oversized_caption: 100,001 bytes i…"),
    (drop("mix.txt"), "000: has no mix"),
    (put("mix.txt", b"alt 0"), "000: its mix is none of its captions"),
    (put("evil.bin", b""), "000: evil.bin is not in the input"),
    (put("recap.json", b'{"schema": 2, "captions": {}}'), "000: its recap.json is damaged"),
    (put("recap.json", b"[" * 100_000), "000: its recap.json is damaged"),
    (put("mix.txt", b"neither"), "000: its mix is none of its captions"),
    (put("recap.json", b"{"), "000: its recap.json is damaged"),
    (put("recap.json", b'{"schema": 1, "captions": {"long": {}}}'), "000: its recap.json says nothing of short"),
    (swap, "001: does not stand where it stood"),
    (turn, "000: its members stand in another order"),
])
def test_any_change_of_a_sample_is_found(shards: Set, change: Callable[[list[Sample]], None], expected: str) -> None:
    shards.changed(change)
    assert shards.found() == [f"00001/{expected}"]


def test_stats_and_quarantine_are_held_to_what_is_there(shards: Set) -> None:
    stats = shards.out / "00001_stats.json"
    whole = json.loads(stats.read_bytes())
    stats.write_text(json.dumps(whole | {"count": 11}))
    assert shards.found() == ["00001: its stats say count 11, not 10"]
    stats.write_text(json.dumps(whole | {"successes": 8, "status_dict": {"success": 9, "nsfw": 1}}))
    assert shards.found() == ["00001: its stats say nsfw 1, not 0; successes 8, not 9; undecodable_image 0, no…"]
    stats.write_text(json.dumps(whole | {"settings": "other"}))
    assert shards.found() == []  # as --go-on makes them
    assert report(shards.verified()).splitlines()[-1] == (
        "made with 2 different settings: 1 shards of s, 1 shards of other")
    changed = [json.dumps(whole | each) for each in ({"status_dict": [1]}, {"settings": 1}, {"seal": "x"},
                                                     {"seal": {"styles": [1]}})]
    for broken in ("{", "[]", "[" * 100_000, *changed):
        stats.write_text(broken)
        assert shards.found() == ["00001: its stats are damaged"]
    stats.unlink()
    assert shards.found() == ["00001: is not relabelled: there is no 00001_stats.json"]
    stats.write_text(json.dumps(whole))
    quarantine = shards.out / "00001_quarantine.jsonl"
    quarantine.write_text(json.dumps({"key": "\x1b[31m", "reason": "undecodable_image"}) + "\n")
    assert shards.found() == ["00001/004: is lost: neither written nor in quarantine",
                              r"00001/\x1b[31m: is in quarantine, and not in the input"]
    for broken in ("{", "[]", '{"key": 4, "reason": "nsfw"}'):
        quarantine.write_text(broken)
        assert shards.found() == ["00001: its quarantine file is damaged"]
    quarantine.unlink()
    assert shards.found() == ["00001: there is no 00001_quarantine.jsonl"]


@pytest.mark.parametrize(("rejects", "expected"), [
    ([("004", "undecodable_image"), ("005", "nsfw")], "005: was written, and is in quarantine"),
    ([("004", "undecodable_image"), ("004", "nsfw")], "004: is in quarantine 2 times"),
    ([("004", "undecodable_image"), ("zzz", "nsfw")], "zzz: is in quarantine, and not in the input"),
])
def test_every_sample_is_accounted_for_once(shards: Set, rejects: list[tuple[str, str]], expected: str) -> None:
    listed = [Reject("00001", key, reason) for key, reason in rejects]
    stats = stats_of(shards.shards[1], shards.out, 9, listed, settings="s", seal=seal(WHOLE))
    write_json(f"{shards.out}/00001_stats.json", stats)
    assert shards.found() == [f"00001/{expected}"]


def test_a_repeated_key_in_quarantine_does_not_stand_for_the_first(shards: Set) -> None:
    """Both of a key's samples are counted: the one that was read, and the repeated one."""
    with tarfile.open(shards.shards[1], "a") as tar:
        tar.addfile(tarfile.TarInfo("000.png"))
    listed = [Reject("00001", "004", "undecodable_image"), Reject("00001", "000", "duplicate_key")]
    samples = [relabelled(sample(place)) for place in range(10) if place != 4]
    shards.write(shards.shards[1], samples, listed)
    assert shards.found() == []
    shards.write(shards.shards[1], samples[1:], listed)
    assert shards.found() == ["00001/000: is lost: neither written nor in quarantine"]


ENDINGS: dict[Format, str] = {"shards": ".tar", "parquet": ".parquet"}


@pytest.mark.parametrize("kind", ENDINGS)
def test_a_damaged_or_missing_file_is_one_finding(tmp_path: Path, kind: Format) -> None:
    made = Set(tmp_path, kind)
    file = made.out / f"00001{ENDINGS[kind]}"
    whole = file.read_bytes()
    for broken in (whole[:len(whole) // 2], whole[:100], b"", b"\x00\xff" * 600):
        file.write_bytes(broken)
        found = made.found()
        assert len(found) == 1 and re.match(rf"00001: {file.name} is (damaged|no parquet)", found[0]), found
    file.unlink()
    assert made.found() == [f"00001: there is no {file.name}"]
    file.mkdir()
    assert made.found() == [f"00001: there is no {file.name}"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_over_or_half_written_is_named(tmp_path: Path, kind: Format) -> None:
    made = Set(tmp_path, kind)
    with open_output(kind, str(made.out), "00007", STYLES, "long") as output:
        output.write(relabelled(sample(0)))
    (made.out / "00008_stats.json").write_text("{}")
    (made.out / "logs").mkdir()
    (made.out / ".00009.\x1b[31m.tmp").write_bytes(b"")
    half, *left_over = made.found()
    assert half.startswith(r".00009.\x1b[31m.tmp is half written")
    assert left_over == [f"00007{ENDINGS.get(kind, '')} is of no shard of the input",
                         "00008_stats.json is of no shard of the input"]


def test_the_files_of_a_folder_are_those_of_its_samples(tmp_path: Path) -> None:
    made = Set(tmp_path, "folder")
    folder = made.out / "00001"
    record, text = folder / "000.recap.json", folder / "000.txt"
    whole = json.loads(record.read_bytes())

    def found(content: Any) -> list[str]:
        record.write_text(json.dumps(content))
        return made.found()

    assert found(whole | {"texts": whole["texts"] | {"alt": "x"}}) == ["00001/000: the alt-text has other bytes"]
    assert found(whole | {"texts": whole["texts"] | {"mix": "x"}}) == ["00001/000: its mix is none of its captions"]
    assert "00001/000: its short caption cannot be read" in found(
        whole | {"texts": whole["texts"] | {"short": "\ud800"}})[0]
    assert "00001/000: its recap.json is damaged" in found(whole | {"texts": {"short": 1}})
    assert "00001/other: was written, and is not in the input" in found(whole | {"key": "other"})
    del whole["key"]
    assert found(whole) == []
    text.write_text("x")
    assert made.found() == ["00001/000: 000.txt is not its long caption"]
    text.write_text(whole["texts"]["alt"])
    assert made.found() == ["00001/000: 000.txt is not its long caption"]
    text.unlink()
    assert "00001: 00001/000 has png, recap.json, not an image, txt and recap.json" in made.found()
    text.write_text(whole["texts"]["long"])
    for file in folder.glob("001.*"):
        file.rename(file.with_name(file.name.replace("001", "other")))
    (folder / "other.recap.json").write_text(json.dumps(
        json.loads((folder / "other.recap.json").read_bytes()) | {"key": "001"}))
    assert made.found() == ["00001/001: its files are called other"]
    (folder / "stray.txt").write_text("x")
    assert "00001: 00001/stray has txt, not an image, txt and recap.json" in made.found()


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_any_kind_are_whole(tmp_path: Path, kind: Format) -> None:
    made = Set(tmp_path, kind)
    keys = ["a/b", "A", "a", "con", "ключ", "k" * 300]
    samples = [Sample("00001", key, sample(place).members) for place, key in enumerate(keys)]
    with ShardWriter(made.shards[1]) as writer:
        for each in samples:
            writer.write(each)
    made.write(made.shards[1], list(map(relabelled, samples)), [])
    assert made.found() == []


def test_a_key_that_a_folder_holds_twice_is_found(tmp_path: Path) -> None:
    made = Set(tmp_path, "folder")
    folder = made.out / "00001"
    again = file_name("000", {"000"})
    for file in sorted(folder.glob("000.*")):
        (folder / file.name.replace("000", again)).write_bytes(file.read_bytes())
    record = folder / f"{again}.recap.json"
    record.write_text(json.dumps(json.loads(record.read_bytes()) | {"key": "000"}))
    assert made.found() == ["00001/000: was written twice"]


def test_what_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    made = Set(tmp_path, "folder")
    (made.out / "00001" / "000.txt").unlink()
    (made.out / "00001" / "000.txt").mkdir()
    assert len(made.found()) == 1 and made.found()[0].startswith("00001: cannot be read: ")


def test_a_folder_need_not_hold_alt_text_that_is_none(tmp_path: Path) -> None:
    made = Set(tmp_path, "folder")
    samples = [Sample("00001", "binary", sample(0).members | {"txt": b"\xff"}),
               Sample("00001", "none", {"png": sample(1).members["png"]})]
    with ShardWriter(made.shards[1]) as writer:
        for each in samples:
            writer.write(each)
    made.write(made.shards[1], list(map(relabelled, samples)), [])
    assert made.found() == []


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_an_image_that_the_input_lacks_is_found(tmp_path: Path, kind: Format) -> None:
    made = Set(tmp_path, kind)
    with ShardWriter(made.shards[1]) as writer:
        writer.write(Sample("00001", "000", {"txt": b"alt 0"}))
    made.write(made.shards[1], [relabelled(sample(0))], [])
    assert made.found() == ["00001/000: the image has other bytes"]


def test_a_key_that_a_table_holds_twice_is_found(tmp_path: Path) -> None:
    made = Set(tmp_path, "parquet")
    made.changed(lambda samples: samples.append(samples[0]))
    assert made.found()[0] == "00001/000: was written twice"


def test_rows_of_a_table_without_a_key_are_found(tmp_path: Path) -> None:
    made = Set(tmp_path, "parquet")
    rows = pq.read_table(made.out / "00001.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([*rows, rows[0] | {"key": None}]), made.out / "00001.parquet")
    assert made.found() == ["00001: 00001.parquet has 1 rows without a key or an image's hash"]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), value=st.integers(1, 255))
def test_no_byte_of_what_is_kept_can_change_unseen(shards: Set, place: int, value: int) -> None:
    file = shards.out / "00001.tar"
    whole = file.read_bytes()
    before = kept(file)
    damaged = bytearray(whole)
    damaged[place % len(whole)] ^= value
    file.write_bytes(damaged)
    try:
        assert shards.found() or kept(file) == before
    finally:
        file.write_bytes(whole)


def kept(file: Path) -> list[tuple[str, dict[str, bytes]]]:
    """What is neither a caption nor said of one."""
    return [(each.key, {name: content for name, content in each.members.items() if name in ("png", "txt", "json")})
            for each in read_shard(str(file), [])]


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
    with pytest.raises(UserError, match="verify: 27 findings in 1 of 2 shards: delete those shards' stats"):
        run(shards.shards, str(shards.out), shards.config, STYLES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == MAX_SHOWN + 2 and lines[-2:] == [
        "… and 7 more", "2 shards: 18 images, 36 captions, 2 quarantined"]
    with pytest.raises(UserError, match=r"nothing at .*: run `recap relabel` first"):
        run(shards.shards, str(shards.out / "none"), shards.config, STYLES)


def test_all_findings_are_counted_and_a_hostile_name_is_a_short_line(tmp_path: Path) -> None:
    made = Set(tmp_path, "shards")
    many = [Reject("00001", f"\x1b]0;{number:05d}" + "\u202e" * 5000, "x" * 5000) for number in range(3000)]
    made.write(made.shards[1], [], many)
    found = made.verified()
    assert found.num_findings == 3010 and len(found.findings) == MAX_KEPT and found.faulty == {"00001"}
    lines = report(found).splitlines()
    assert len(lines) == MAX_SHOWN + 2 and lines[-2] == "… and 2,990 more"
    assert max(map(len, lines)) <= 80 and all(line.isprintable() for line in lines)
    assert max(len(finding.key) for finding in found.findings) <= 1000
    of_a_shard = Verified()
    for number in range(3000):
        of_a_shard.note("00001", str(number), "is lost")
    assert of_a_shard.num_findings == 3000 and len(of_a_shard.findings) == MAX_KEPT


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


def test_findings_come_in_file_order(shards: Set) -> None:
    def spoil(samples: list[Sample]) -> None:
        del samples[2].members["short.txt"]
        del samples[5]
        samples[1], samples[7] = samples[7], samples[1]

    shards.changed(spoil)
    assert [finding.split(":")[0] for finding in shards.found()] == ["00001/002", "00001/006", "00001/009"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_relabelling_writes_is_whole_and_is_mended_by_it(tmp_path: Path, world_models: Path, kind: Format) -> None:
    from recap.relabel import run as relabel
    made = Set(tmp_path, "shards")
    with ShardWriter(made.shards[0]) as writer:
        for each in (sample(1), sample(1), Sample("00000", "broken", {"png": b"x", "txt": b"a cat"}), sample(2)):
            writer.write(each)
    whole = Path(made.shards[1]).read_bytes()
    Path(made.shards[1]).write_bytes(whole[:-12_000])
    out, styles = tmp_path / "relabelled", {style: Style(prompt="A", max_new_tokens=4) for style in STYLES}
    config = Relabel(batch_size=4, format=kind)

    def work() -> None:
        stage = StageDir(out, {})
        stage.begin()
        relabel(stage, made.shards, Captioner(model=str(world_models / "blip2"), dtype="float32"), None, styles, config,
                Data(), "cpu")

    work()
    said = run(made.shards, str(out), config, STYLES)
    assert re.fullmatch(r"all 2 shards are whole: \d+ images, \d+ captions, [1-9] quarantined", said)
    (out / "00000_quarantine.jsonl").unlink()
    assert verify(made.shards, str(out), config, STYLES).num_findings == 1
    (out / "00000_stats.json").unlink()
    work()
    assert run(made.shards, str(out), config, STYLES) == said
