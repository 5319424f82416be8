"""The data card of a relabelled set: its figures, what hostile captions cannot do, and that loaders take the set."""

import io
import json
import re
import runpy
import shutil
import threading
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from recap import data_card
from recap.caption_statistics import CaptionStatistics, num_clip_tokens, partial_file
from recap.data_card import compare, escape, make_card, read_reference, size_category, write_card
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import ShardWriter
from recap.storage import write_json

HOSTILE = ["<img src=x onerror=alert(1)>", "| a | b |\n# heading", "[x](javascript:alert(1)) ![y](http://z/1.png)",
           "`code` **bold** _it_ ~~no~~ $x^2$ :smile: @someone https://x.org www.x.org",
           "كلب بني 👨‍👩‍👧‍👦 \x1b[31m \u202e",
           "--- \n--- <!-- x --> &lt; </table>", "word " * 1000]
SETTINGS: dict[str, Any] = {
    "captioner": {"model": "blip2", "family": "blip2"}, "styles": {"short": {"prompt": "```\n<b>"}},
    "relabel": {"seed": 0, "checks": {"empty": "flag", "not_ended": "resample", "words": {"short": [2, 30]},
                                      "clip_score": {"model": "m", "action": "drop"}, "otherwise": "flag"}},
    "inputs": [["00000.tar", 1, 2]],
}


def sample(shard: str, key: int, text: str) -> Sample:
    Image.new("RGB", (8, 8), "green").save(out := io.BytesIO(), "JPEG")
    short = f"Caption {key}: {text}"
    made = {"captioner": "blip2|x", "revision": "main", "adapter": "ab12", "prompt": "Say <b>:",
            "decoding": {"beams": 3}, "num_clip_tokens": num_clip_tokens(" ".join(short.split())), "scores": {},
            "flags": ["not_ended"][key % 2:]}
    return Sample(shard, f"{shard}{key}", {
        "jpg": out.getvalue(), "txt": text.encode(), "json": b"{}", "short.txt": short.encode(),
        "mix.txt": short.encode(), "recap.json": json.dumps({"schema": 1, "captions": {"short": made}}).encode()})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set of two shards, as relabelling leaves it."""
    folder = tmp_path_factory.mktemp("set")
    for shard in ("00000", "00001"):
        with ShardWriter(str(folder / f"{shard}.tar")) as writer:
            for key, text in enumerate(HOSTILE):
                writer.write(sample(shard, key, text))
        write_json(str(folder / f"{shard}_stats.json"), {
            "count": 9, "successes": 7, "empty_captions": 0, "status_dict": {"success": 7, "undecodable_image": 2}})
    write_json(str(folder / "config.json"), {"fingerprint": "x", "reads": SETTINGS})
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "set"))


def rows(card: str, first: str) -> list[str]:
    """The cells of a table's row."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


def test_the_card_tells_what_is_in_the_set_and_how_it_was_made(folder: Path) -> None:
    assert make_card(str(folder)) == f"{folder}/README.md"
    card = (folder / "README.md").read_text()
    assert "14 images in 2 shards, 00000.tar to 00001.tar. A model captioned them in the styles short;" in card
    assert rows(card, "read") == ["18"] and rows(card, "captioned") == ["14"]
    assert rows(card, r"quarantined: undecodable\_image") == ["4"]
    assert rows(card, "captions") == ["14", "14", "14"] and rows(card, "not ended") == ["–", "57.1%", "–"]
    assert rows(card, r"not\_ended") == ["resample", "8 (57.14%)"] and rows(card, "empty") == ["flag", "0 (0.00%)"]
    assert rows(card, r"clip\_score")[0] == "drop" and "otherwise" not in card.split("## Checks")[1]
    assert rows(card, "short") == [r"blip2\|x", "main", "ab12", "Say &lt;b&gt;:", "beams 3"]
    assert '"model": "blip2"' in card and "00000.tar\", 1" not in card and "inputs" not in card
    statistics = json.loads((folder / "statistics.json").read_text())
    assert statistics["captions"]["short"]["num_captions"] == 14 and statistics["images"]["images_in"] == 18
    assert statistics["closeness"] is None


def test_the_front_matter_is_what_the_hub_reads(folder: Path) -> None:
    make_card(str(folder))
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["size_categories"] == ["n<1K"] and found["annotations_creators"] == ["machine-generated"]
    assert found["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}]
    assert "license" not in found  # nobody knows it
    assert [size_category(num) for num in (0, 999, 1000, 25_000, 10**6, 10**9, 10**12)] == [
        "n<1K", "n<1K", "1K<n<10K", "10K<n<100K", "1M<n<10M", "1B<n<10B", "n>1T"]


def test_captions_are_text_on_the_card_whatever_they_hold(folder: Path) -> None:
    markdown = pytest.importorskip("markdown_it")
    make_card(str(folder))
    body = (folder / "README.md").read_text().split("---\n", 2)[2]
    assert "\x1b" not in body and "\u202e" not in body
    page = markdown.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body)
    assert not re.search(r"<(img|script|a|b|del|h1>\s*heading|!--)[\s>]", page)
    text = re.sub("<[^>]*>", "", page).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    shown = 0
    for hostile in HOSTILE[:-1]:
        plain = " ".join(hostile.split()).replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
        shown += f": {plain}" in text and text.count(plain) >= 2
    assert shown >= 4  # of the five examples one may be the long one
    assert page.count("<table>") == 5 + 5  # ways, images, figures, lengths, checks; and the examples


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_renders_as_itself(text: str) -> None:
    markdown = pytest.importorskip("markdown_it")
    inside = markdown.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(
        f"| {escape(text.strip())} |\n| --- |\n")
    cell = re.sub("</?(table|thead|tr|th)>", "", inside).strip()
    assert "<" not in cell
    assert escape("a" * 700).endswith("… and 100 more characters")
    if len(text) < 600:
        assert unescape(cell).replace("\n", " ").split() == text.replace("\x1b", r"\x1b").replace(
            "\n", r"\n").replace("\u202e", r"\u202e").split()


def test_what_workers_counted_is_summed_and_what_they_did_not_is_read(folder: Path) -> None:
    make_card(str(folder))
    read = json.loads((folder / "statistics.json").read_text())["captions"]
    for shard in ("00000", "00001"):
        counted = CaptionStatistics(["alt", "short", "mix"])
        for key, text in enumerate(HOSTILE):
            counted.add(sample(shard, key, text))
        write_json(partial_file(str(folder / f"{shard}.tar")), counted.partial())
    make_card(str(folder))
    assert json.loads((folder / "statistics.json").read_text())["captions"] == read
    partial = json.loads(Path(partial_file(str(folder / "00000.tar"))).read_text())
    partial["kinds"]["short"]["sums"]["captions"] += 100
    write_json(partial_file(str(folder / "00000.tar")), partial)
    make_card(str(folder))
    assert json.loads((folder / "statistics.json").read_text())["captions"]["short"]["num_captions"] == 114


def test_small_files_of_many_shards_are_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(40):
        counted = CaptionStatistics(["alt"])
        counted.add(sample(str(shard), 0, f"dog {shard}"))
        write_json(partial_file(str(tmp_path / f"{shard}.tar")), counted.partial())
    together = threading.Barrier(8)
    read = data_card.read_bytes

    def slow(url: str) -> bytes:
        together.wait(60)  # eight at a time, or none goes on
        return read(url)

    monkeypatch.setattr(data_card, "read_bytes", slow)
    found = data_card.statistics_of([str(tmp_path / f"{shard}.tar") for shard in range(40)], ["alt"]).summary()
    assert found["alt"]["num_captions"] == 40 and found["alt"]["vocabulary"] == 41


def test_a_set_that_is_not_finished_has_no_card(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.tar and no \.parquet in"):
        make_card(str(tmp_path))
    (folder / "00001_stats.json").write_text("{")
    with pytest.raises(UserError, match=r"00001_stats\.json is damaged"):
        make_card(str(folder))
    (folder / "00001_stats.json").unlink()
    with pytest.raises(UserError, match=r"00001\.tar has no stats"):
        make_card(str(folder))
    assert not (folder / "README.md").exists()


def test_a_set_of_captions_only_on_remote_storage_has_one(tmp_path: Path) -> None:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq
    record = json.dumps({"schema": 1, "captions": {"short": {"captioner": "c"}}})
    pq.write_table(pa.table({"key": ["k"], "sha256": [""], "short": ["A wall."], "mix": ["A wall."],
                             "recap": [record]}), tmp_path / "0.parquet")
    with fsspec.open("memory://cards/0.parquet", "wb") as file:
        file.write((tmp_path / "0.parquet").read_bytes())
    assert write_card("memory://cards", ["memory://cards/0.parquet"], {"images_in": 1, "images_out": 1}, {},
                      {"torch": "2.11"}) == "memory://cards/README.md"
    with fsspec.open("memory://cards/README.md", "rt") as file:
        card = file.read()
    assert '"*.parquet"' in card and "With torch 2.11." in card and 'captions[0]["short"]' in card


def test_closeness_to_a_reference_is_on_the_card(folder: Path) -> None:
    shards = [str(folder / "00000.tar")]
    compared = {"reference": "coco|val.txt", "num_captions": 7, "model": "open_clip x@1", "bandwidth": 1.0,
                "kinds": {"short": {"frechet": 0.5, "mmd2": 0.25, "num_cut": 1},
                          "reference": {"frechet": 0.125, "mmd2": -0.001, "num_cut": 0}}}
    write_card(str(folder), shards, {"images_in": 9, "images_out": 7}, {}, {}, compared)
    card = (folder / "README.md").read_text()
    assert rows(card, "reference") == ["0.1250", "-0.00100", "0"] and r"of coco\|val.txt, as the" in card
    with pytest.raises(UserError, match="both --reference and --clip"):
        make_card(str(folder), reference="x.txt")
    with pytest.raises(UserError, match="--clip: cannot fetch"):
        compare(shards, "x.txt", None, "none/such", "cpu")


def test_references_are_lines_or_captions_of_shards(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("A dog.\n\n  A   cat. \n")
    assert sorted(read_reference(str(tmp_path / "captions.txt"), None)) == ["A cat.", "A dog."]
    assert len(read_reference(str(folder / "*.tar"), "short")) == 14
    with pytest.raises(UserError, match="--kind"):
        read_reference(str(folder / "*.tar"), None)
    with pytest.raises(UserError, match="nothing at"):
        read_reference(str(tmp_path / "none.txt"), None)


def test_loaders_take_the_set_as_the_card_says(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    make_card(str(folder))
    monkeypatch.chdir(folder)
    code = (folder / "README.md").read_text().split("## Loading")[1].split("## How")[0]
    lines = [line.removeprefix("    ") for line in code.splitlines() if line.startswith("    ")]
    (tmp_path / "load.py").write_text("\n".join(lines))
    sample = runpy.run_path(str(tmp_path / "load.py"))["sample"]
    assert sample["short.txt"].startswith("Caption 6: word") and sample["jpg"].size == (8, 8)
    streamed = datasets.load_dataset("webdataset", data_files="*.tar", split="train", streaming=True)
    assert sorted(next(iter(streamed))) >= ["__key__", "__url__", "jpg", "json", "mix.txt", "recap.json", "short.txt"]
    whole = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(whole) == ["train"] and len(whole["train"]) == 14
