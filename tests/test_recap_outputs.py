"""Relabelled samples as tables of captions and as folders of images: whole, safely named, joined to their shards."""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from recap import caption_tables, outputs, storage
from recap.caption_tables import Row, image_hash, join, read_table, table_url
from recap.errors import BadSample, UserError
from recap.outputs import Format, file_name, open_output, written
from recap.sample import MAX_TEXT_BYTES, Sample
from recap.shards import read_shard

FORMATS: tuple[Format, ...] = ("shards", "parquet", "folder")
KEYS = st.text(st.characters().filter(str.isprintable), min_size=1, max_size=300)
ODD_KEYS = ["a/b", "a", "A", "CON", "con", "照片", "k" * 300, "é" * 150, ".hidden/x", "a/../b", "x~1", "-rf", "COM1",
            "..", "a b ", "B", "b"]


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(key: str, level: int = 0, /, **more: bytes) -> Sample:
    """As relabelling writes it; `more` are styles."""
    texts = {"short": b"A grey wall.", "mix": b"A grey wall."} | more
    record = {"schema": 1, "captions": {"short": {"captioner": "c"}}}
    return Sample("00000", key, {
        "png": png(level), "txt": b"alt", "json": b"{}", **{f"{style}.txt": text for style, text in texts.items()},
        "recap.json": json.dumps(record).encode()})


def write(folder: Path, samples: Iterable[Sample], kind: Format = "parquet", caption: str = "mix",
          styles: Iterable[str] = ("short",)) -> str:
    with open_output(kind, str(folder), "00000", styles, caption) as output:
        for each in samples:
            output.write(each)
    return written(kind, str(folder), "00000")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# --- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_an_error_leaves_nothing_and_what_was_there_before(tmp_path: Path, kind: Format) -> None:
    def fails() -> Iterator[Sample]:
        yield sample("a")
        raise RuntimeError("the captioner stopped")
    with pytest.raises(RuntimeError):
        write(tmp_path, fails(), kind)
    assert names(tmp_path) == []
    write(tmp_path, [sample("before")], kind)
    before = files(tmp_path)
    with pytest.raises(RuntimeError):
        write(tmp_path, fails(), kind)
    assert files(tmp_path) == before and before


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_has_its_final_name_before_the_end_and_a_second_try_replaces_the_first(
        tmp_path: Path, kind: Format) -> None:
    with open_output(kind, str(tmp_path), "00000", ["short"], "mix") as output:
        output.write(sample("a"))
        assert not Path(written(kind, str(tmp_path), "00000")).exists()
    write(tmp_path, [sample("b")], kind)
    assert names(tmp_path) == [Path(written(kind, str(tmp_path), "00000")).name]
    assert all("a." not in name for name in files(tmp_path))


def test_shards_hold_every_member(tmp_path: Path) -> None:
    samples = [sample("a"), sample("b", 9)]
    assert list(read_shard(write(tmp_path, samples, "shards"), [])) == samples


# --- tables --------------------------------------------------------------------------------------------------------


def test_a_table_holds_the_captions_and_not_the_alt_text(tmp_path: Path) -> None:
    samples = [sample("a/b", 7, notes=b"of the shard"), sample("ü", 8, rich="Eine graue Wand: ▦.".encode())]
    url = write(tmp_path, samples, styles=["short", "rich"])
    table = pq.read_table(url).to_pylist()
    assert url == table_url(str(tmp_path), "s3://x/00000.tar") == table_url(f"{tmp_path}/", "00000.tar")
    assert list(table[0]) == ["key", "sha256", "mix", "rich", "short", "recap"]
    assert [(row["key"], row["short"], row["rich"]) for row in table] == [
        ("a/b", "A grey wall.", None), ("ü", "A grey wall.", "Eine graue Wand: ▦.")]
    assert json.loads(table[0]["recap"])["captions"] == {"short": {"captioner": "c"}}
    assert table[0]["sha256"] == image_hash(sample("", 7)) != table[1]["sha256"]


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    samples = [sample(f"{i}", i, long=b"Long.") for i in range(20)]
    first, second = (Path(write(tmp_path / name, samples)).read_bytes() for name in "ab")
    assert first == second


def test_rows_are_written_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tables, "ROWS", 3)
    samples = [sample(str(i), i, **({"long": b"Long."} if i == 4 else {})) for i in range(8)]
    url = write(tmp_path, samples, styles=["short", "long"])
    assert [pq.ParquetFile(url).metadata.row_group(i).num_rows for i in range(3)] == [3, 3, 2]
    rows = read_table(url, ["short", "long"])
    assert list(rows) == [str(i) for i in range(8)]
    for each in samples:
        expected = {name: text for name, text in each.members.items() if name in ("short.txt", "long.txt")}
        assert rows[each.key] == Row(image_hash(each), expected)


def test_long_texts_end_a_group_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tables, "BYTES", 5_000)
    url = write(tmp_path, [sample(str(i), long=b"x" * 3_000) for i in range(4)], styles=["short", "long"])
    assert pq.ParquetFile(url).metadata.num_row_groups == 2


def test_a_shard_without_a_sample_gives_a_table_without_a_row(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, []), ["short"]) == {}


def test_all_tables_have_the_same_columns(tmp_path: Path) -> None:
    strange = {"notes": b"?", "key": b"?", **{f"s{i}": b"?" for i in range(200)}}
    for samples in ([], [sample("a", **strange)], [sample("a")]):
        assert pq.read_schema(write(tmp_path, samples, styles=["short", "long"])).names == [
            "key", "sha256", "long", "mix", "short", "recap"]


def test_a_mix_of_what_came_with_the_shard_and_is_no_text_stays_there(tmp_path: Path) -> None:
    samples = [sample(key, mix=mix) for key, mix in (("a", b"\xff"), ("b", b"x" * (MAX_TEXT_BYTES + 1)))]
    assert [row.members.keys() for row in read_table(write(tmp_path, samples), ["short", "mix"]).values()] == [
        {"short.txt"}] * 2


@given(st.lists(KEYS, unique=True, max_size=8))
@example(ODD_KEYS)
def test_any_key_comes_back_with_its_captions(tmp_path_factory: pytest.TempPathFactory, keys: list[str]) -> None:
    samples = [sample(key, i, long=f"Long {key}".encode()) for i, key in enumerate(keys)]
    rows = read_table(write(tmp_path_factory.mktemp("table"), samples, styles=["long"]), ["long"])
    assert list(rows) == keys
    for each in samples:
        bare = Sample(each.shard, each.key, {"png": each.members["png"], "txt": b"alt"})
        assert join(bare, rows).members == bare.members | {"long.txt": each.members["long.txt"]}


def test_a_row_of_another_image_or_none_is_refused() -> None:
    rows = {"a": Row(image_hash(sample("a")), {})}
    with pytest.raises(BadSample, match="captions_of_another_image"):
        join(sample("a", 1), rows)
    with pytest.raises(BadSample, match="not_relabelled"):
        join(sample("b"), rows)


def test_a_text_is_held_once_and_no_longer_than_a_caption_may_be(tmp_path: Path) -> None:
    url = str(tmp_path / "00000.parquet")
    count, huge = 20_000, "x" * 10_000_000  # 200 GB, were each row to hold its own
    pq.write_table(pa.table({
        "key": [str(i) for i in range(count)], "sha256": ["0" * 64] * count,
        "short": pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), [huge])}), url)
    assert os.path.getsize(url) < 2_000_000
    rows = read_table(url, ["short"])
    assert len(rows) == count and len({id(row.members["short.txt"]) for row in rows.values()}) == 1
    assert len(rows["0"].members["short.txt"]) == MAX_TEXT_BYTES + 1
    with pytest.raises(BadSample, match="oversized_caption"):
        Sample("00000", "0", rows["0"].members).caption("short")


TEXTS = ["a", "b"]


@pytest.mark.parametrize(("columns", "problem"), [
    ({"key": TEXTS, "short": TEXTS}, "no column sha256"),
    ({"key": [1, 2], "sha256": TEXTS}, "column key is not of text"),
    ({"key": TEXTS, "sha256": TEXTS, "short": [["a"], ["b"]]}, "column short is not of text"),
    ({"key": TEXTS, "sha256": TEXTS, "short": [{"a": "a"}] * 2}, "column short is not of text"),
    ({"key": TEXTS, "sha256": TEXTS, "short": [b"a", b"b"]}, "column short is not of text"),
    ({"key": TEXTS, "sha256": TEXTS} | {f"s{i}": TEXTS for i in range(200)}, "202 columns"),
])
def test_a_parquet_of_another_kind_is_refused_in_one_line(tmp_path: Path, columns: dict[str, Any], problem: str
                                                          ) -> None:
    url = str(tmp_path / "00000.parquet")
    pq.write_table(pa.table(columns), url)
    with pytest.raises(UserError, match=f"{re.escape(url)} is no parquet of captions .*{problem}") as caught:
        read_table(url, ["short"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("bound", "value", "problem"), [
    ("MAX_ROWS", 4, "10 rows, of 4"), ("MAX_READ_BYTES", 400, "a row group of .* bytes"),
    ("MAX_READ_BYTES", 750, "captions of over 750 bytes")])
def test_a_table_too_large_for_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str,
                                                     value: int, problem: str) -> None:
    monkeypatch.setattr(caption_tables, "ROWS", 1)
    url = write(tmp_path, [sample(str(i), i) for i in range(10)])
    monkeypatch.setattr(caption_tables, bound, value)
    with pytest.raises(UserError, match=problem):
        read_table(url, ["short"])


@given(st.integers(0, 10_000), st.integers(0, 255), st.booleans())
@example(3032, 128, False)  # a column's name that is no UTF-8
def test_a_damaged_table_is_read_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, place: int,
                                                        value: int, cut: bool) -> None:
    folder = tmp_path_factory.mktemp("table")
    url = write(folder, [sample(str(i), i) for i in range(3)])
    data = bytearray(Path(url).read_bytes())
    place %= len(data)
    data[place] = value
    Path(url).write_bytes(data[:place] if cut else data)
    try:
        read_table(url, ["short"])
    except UserError as error:
        assert url in str(error) and "\n" not in str(error)


def test_a_table_can_be_remote() -> None:
    with open_output("parquet", "memory://tables/set", "00000", ["short"], "mix") as output:
        output.write(sample("a"))
    rows = read_table(table_url("memory://tables/set", "s3://bucket/00000.tar"), ["short"])
    assert rows == {"a": Row(image_hash(sample("a")), {"short.txt": b"A grey wall."})}


def test_no_table_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no captions at .*00001\.parquet: name the folder"):
        read_table(table_url(f"{tmp_path}/", "00001.tar"), ["short"])


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_holds_images_the_chosen_captions_and_all_that_is_known(tmp_path: Path) -> None:
    write(tmp_path, [sample("000", 5, long=b"A long wall."), sample("a/b", long=b"Another.")], "folder", "long")
    folder = tmp_path / "00000"
    assert (folder / "000.png").read_bytes() == png(5)
    assert (folder / "000.txt").read_text() == "A long wall."
    assert json.loads((folder / "000.recap.json").read_text()) == {
        "schema": 1, "captions": {"short": {"captioner": "c"}}, "key": "000",
        "texts": {"alt": "alt", "short": "A grey wall.", "mix": "A grey wall.", "long": "A long wall."}}
    other = next(folder.glob("a_b~*.recap.json"))
    assert json.loads(other.read_text())["key"] == "a/b"
    assert len(files(folder)) == 6


@given(st.lists(KEYS, unique=True, max_size=12))
@example(ODD_KEYS)
def test_every_key_has_files_of_its_own_within_the_folder(tmp_path_factory: pytest.TempPathFactory, keys: list[str]
                                                          ) -> None:
    root = tmp_path_factory.mktemp("root")
    write(root / "out", [sample(key, long=key.encode()) for key in keys], "folder", "long")
    found = files(root)
    assert all(re.fullmatch(r"out/00000/[^/.]+\.(png|txt|recap\.json)", name) for name in found)
    assert len({name.casefold() for name in found}) == 3 * len(keys)
    for record in (root / "out").rglob("*.recap.json"):
        name = record.name.removesuffix(".recap.json")
        content = json.loads(record.read_text())
        assert content.get("key", name) in keys and len(record.name.encode()) <= 255
        assert record.with_name(f"{name}.txt").read_text() == content["texts"]["long"]
        assert not re.fullmatch("(?i)con|nul|com1", name)


def test_plain_keys_stay_and_those_that_differ_in_case_alone_do_not_meet() -> None:
    taken: set[str] = set()
    names = []
    for key in ["000000012", "IMG_1-2", "img_1-2", "Img_1-2"]:
        names.append(file_name(key, taken))
        taken.add(names[-1].casefold())
    assert names[:2] == ["000000012", "IMG_1-2"]
    assert len({name.casefold() for name in names}) == 4
    assert file_name("Img_1-2", {"img_1-2"}) == names[3]


def test_a_remote_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"relabel.output: s3://bucket/set/00000 is remote"):
        open_output("folder", "s3://bucket/set", "00000", [], "mix")


def test_a_folder_that_holds_anything_else_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path, [sample("a")], "folder")
    (tmp_path / "00000" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"00000/thesis\.tex was not written by relabelling"):
        write(tmp_path, [sample("b")], "folder")
    assert (tmp_path / "00000" / "thesis.tex").exists() and not list(tmp_path.glob(".*"))


def test_a_kill_while_a_folder_is_replaced_leaves_one_that_is_whole(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [sample("a")], "folder")
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "publish", lambda *_: os._exit(9))
        child = os.fork()
        if not child:
            write(tmp_path, [sample("b")], "folder")
        os.waitpid(child, 0)
    assert names(tmp_path) != ["00000"]
    storage.clean(str(tmp_path))
    write(tmp_path, [sample("b")], "folder")
    assert names(tmp_path) == ["00000"] and (tmp_path / "00000" / "b.txt").exists()


@pytest.mark.parametrize("kind", FORMATS[1:])
def test_a_failure_to_publish_leaves_no_temporary(tmp_path: Path, kind: Format) -> None:
    target = Path(written(kind, str(tmp_path), "00000"))
    output = open_output(kind, str(tmp_path), "00000", ["short"], "mix")
    with pytest.raises(UserError, match="cannot write"), output as opened:
        opened.write(sample("a"))
        if kind == "folder":
            target.write_bytes(b"")
        else:
            (target / "x").mkdir(parents=True)
    assert names(tmp_path) == [target.name]
