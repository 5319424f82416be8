"""The stitched set as an imagefolder: the same images and captions, that datasets reads, and a card that tells all."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recap.caption_sets import read_dataset
from recap.config.finetune import Dataset
from recap.imagefolder import write_imagefolder
from recap.sample import Sample
from recap.shards import ShardWriter

STYLES = ["short", "rich"]
ABOUT: dict[str, Any] = {
    "result": {"images_in": 5, "images_out": 4, "quarantined": {"undecodable_image": 1}, "nothing_seen": 1,
               "flags": {"rewritten": 1, "template": 2, "not_json": 2}, "ungrounded": 1, "requests": 6,
               "prompt_tokens": 4000, "completion_tokens": 300, "possible_double_payments": 1, "cost": 0.25},
    "experts": {"detr": {"model": "facebook/detr-resnet-50", "revision": "abc", "threshold": 0.7}, "alt_text": {}},
    "writer": {"name": "llm", "model": "some|model", "prompt": "sha256:1"},
    "prompt": "Write captions.\n\n- short: short",
}


def picture(colour: str, kind: str = "JPEG") -> bytes:
    Image.new("RGB", (8, 8), colour).save(file := io.BytesIO(), kind)
    return file.getvalue()


def write(out: Path, about: dict[str, Any] = ABOUT) -> list[dict[str, Any]]:
    """Two shards that share a key, one of them with odd keys; the rows of the folder's metadata."""
    shards = {"train-0": [("000", "jpg", "red"), ("a/b ü% test", "png", "green")],
              "test-0": [("000", "JPG", "blue"), ("k" * 300, "jpg", "white")]}
    paths = []
    for shard, samples in shards.items():
        paths.append(out.parent / f"{shard}.tar")
        with ShardWriter(str(paths[-1])) as writer:
            for key, extension, colour in samples:
                captions = {"txt": f"alt {colour}", "short.txt": f"A {colour} wall.",
                            "rich.txt": f"A wall, {colour} as “walls” are."}
                image = picture(colour, "PNG" if extension == "png" else "JPEG")
                writer.write(Sample(shard, key, {extension: image} | {
                    name: caption.encode() for name, caption in captions.items()}))
    write_imagefolder(out, paths, STYLES, about)
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def test_every_image_is_there_with_its_captions(tmp_path: Path) -> None:
    rows = write(tmp_path / "imagefolder")
    assert [row["short"] for row in rows] == [f"A {colour} wall." for colour in ("red", "green", "blue", "white")]
    assert [row["alt"] for row in rows] == ["alt red", "alt green", "alt blue", "alt white"]
    assert rows[0]["file_name"] == "train-0/000.jpg" and rows[2]["file_name"] == "test-0/000.jpg"
    assert len({row["file_name"] for row in rows}) == 4
    for row, colour in zip(rows, ("red", "green", "blue", "white"), strict=True):
        data = (tmp_path / "imagefolder" / row["file_name"]).read_bytes()
        assert data == picture(colour, "PNG" if colour == "green" else "JPEG")


def test_datasets_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "imagefolder")
    found = datasets.load_dataset(str(tmp_path / "imagefolder"), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(found["short"]) == sorted(f"A {colour} wall." for colour in ("red", "green", "blue", "white"))
    assert {"image", "short", "rich", "alt"} <= set(found.column_names)
    assert found[0]["image"].size == (8, 8)


def test_fine_tuning_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "imagefolder")
    images, rejects = read_dataset(Dataset(format="imagefolder", captions=str(tmp_path / "imagefolder")))
    assert len(images) == 4 and not rejects
    assert dict(images[0].captions)["rich"] == "A wall, red as “walls” are."


def test_the_card_tells_what_it_was_made_of(tmp_path: Path) -> None:
    write(tmp_path / "imagefolder")
    card = (tmp_path / "imagefolder" / "README.md").read_text()
    for said in ("4 images", "1 undecodable_image", "| detr | facebook/detr-resnet-50 | abc | threshold 0.7 |",
                 "1 (25.0%)", "cost: 0.25", "requests: 6", "not_json 2", "    Write captions.", "| short | 3.0 |"):
        assert said in card, said
    assert "| rich | 6.0 | 6 to 6 | 9 |" in card  # a, wall, as, walls, are, and four colours


def test_a_card_of_the_template_speaks_of_no_requests(tmp_path: Path) -> None:
    result = {"images_in": 4, "images_out": 4, "quarantined": {}, "nothing_seen": 0}
    about = {"result": result, "experts": {"alt_text": {}}, "writer": {"name": "template", "version": 3}, "prompt": ""}
    write(tmp_path / "imagefolder", about)
    card = (tmp_path / "imagefolder" / "README.md").read_text()
    assert "a template wrote" in card and "requests" not in card and "## Prompt" not in card


def test_what_a_kill_left_is_replaced(tmp_path: Path) -> None:
    for name in ("imagefolder", ".imagefolder.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    write(tmp_path / "imagefolder")
    assert not (tmp_path / "imagefolder" / "old").exists() and not (tmp_path / ".imagefolder.tmp").exists()
