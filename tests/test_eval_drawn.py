"""Reading what an arm drew, in both forms; what is missing or damaged is one line."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eval import drawn as module
from eval import thumbnails
from eval.drawn import Drawn, by_hash, iterate, loose_path, picture, pictures, read_list, shards
from eval.generate import forget
from eval.prompts import Prompt
from eval.thumbnails import thumbnail, write_thumbnails
from recap.errors import UserError
from recap.sample import Sample, decode_image
from recap.shards import ShardWriter

NUM = 10


def png(index: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (index % 256, index // 256, 7)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_list(folder: Path, rows: list[Any]) -> None:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")


def write_shards(folder: Path, num: int = NUM, shard_size: int = 4, size: int = 8) -> None:
    for number, start in enumerate(range(0, num, shard_size)):
        indices = range(start, min(start + shard_size, num))
        with ShardWriter(str(folder / f"{number:05d}.tar")) as writer:
            for index in indices:
                members = {"png": png(index, size), "txt": b"a text"}
                writer.write(Sample(f"{number:05d}", f"{index:08d}", members))
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"count": len(indices)}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "alt"
    write_list(folder, [{"index": index, "prompt": f"scene {index // 2}", "set": "seen", "about": {"says": "a\u2028b"},
                         "seed": index, "prompt_index": index // 2} for index in range(NUM)])
    write_shards(folder)
    return folder


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    write_list(folder, [{"index": index, "prompt": f"scene {index}"} for index in range(NUM)])
    for index in range(NUM):
        loose_path(folder, index).write_bytes(png(index))
    return folder


def test_pictures_come_with_what_they_were_drawn_from(sharded: Path) -> None:
    found = list(iterate(sharded))
    assert [each for each, _ in found] == read_list(sharded) == [
        Drawn(index, Prompt(f"scene {index // 2}", "seen", {"says": "a\u2028b"}), index // 2, index)
        for index in range(NUM)]
    assert [content for _, content in found] == [png(index) for index in range(NUM)]
    assert shards(sharded) == [sharded / f"{number:05d}.tar" for number in range(3)]
    assert [index for index, _ in pictures(sharded / "00001.tar")] == [4, 5, 6, 7]
    assert [picture(sharded, index) for index in (0, 9, 10)] == [png(0), png(9), None]


def test_other_tools_pictures_are_read_as_shards(loose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_LOOSE", 4)
    found = list(iterate(loose))
    assert [each for each, _ in found] == [Drawn(index, Prompt(f"scene {index}"), index, None) for index in range(NUM)]
    assert [content for _, content in found] == [png(index) for index in range(NUM)]
    assert [path.name for path in shards(loose)] == ["00000-00004", "00004-00008", "00008-00010"]
    assert picture(loose, 9) == png(9) and picture(loose, 10) is None
    before = sorted(loose.iterdir())
    forget(loose)
    assert sorted(loose.iterdir()) == before


def test_missing_pictures_are_counted(sharded: Path, loose: Path) -> None:
    loose_path(loose, 7).unlink()
    loose_path(loose, 0).unlink()
    with pytest.raises(UserError, match=r"2 of 10 pictures are missing: delete .* run `recap generate` again"):
        shards(loose)
    (sharded / "00001_stats.json").unlink()  # as if it were being drawn
    with pytest.raises(UserError, match="4 of 10 pictures are missing"):
        list(iterate(sharded))
    (sharded / "00002.tar").unlink()
    with pytest.raises(UserError, match="6 of 10 pictures are missing"):
        shards(sharded)
    assert picture(sharded, 5) is None


@pytest.mark.parametrize("row", [
    "{", "[]", "3", "{}", '{"index": 0}', '{"prompt": "a"}', '{"index": "0", "prompt": "a"}',
    '{"index": true, "prompt": "a"}', '{"index": -1, "prompt": "a"}', '{"index": 1, "prompt": "a"}',
    '{"index": 0, "prompt": 3}', '{"index": 0, "prompt": "a", "about": []}', '{"index": 0, "prompt": "a", "set": null}',
    '{"index": 0, "prompt": "a", "seed": "x"}', '{"index": 0, "prompt": "a", "prompt_index": 0.5}', "[" * 100_000, ""])
def test_a_damaged_list_is_one_line(tmp_path: Path, row: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(row + "\n")
    with pytest.raises(UserError, match=r"prompts\.jsonl is damaged.*run `recap generate` again") as caught:
        read_list(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_list_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no prompts\.jsonl in .*: run `recap generate` first"):
        read_list(tmp_path / "nowhere")
    (tmp_path / "prompts.jsonl").write_bytes(b'{"index": 0, "prompt": "\xff"}\n')
    with pytest.raises(UserError, match="is damaged"):
        read_list(tmp_path)


def test_a_damaged_shard_is_one_line(sharded: Path) -> None:
    whole = (sharded / "00001.tar").read_bytes()
    (sharded / "00001.tar").write_bytes(whole[:2000])
    with pytest.raises(UserError, match=r"00001\.tar is damaged \(truncated_shard\): delete it"):
        list(iterate(sharded))
    (sharded / "00001.tar").write_bytes((sharded / "00002.tar").read_bytes())
    with pytest.raises(UserError, match=r"00001\.tar is damaged \(picture 8 stands where 4 should\)"):
        list(iterate(sharded))
    (sharded / "00001.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"00001\.tar is damaged"):
        picture(sharded, 5)
    (sharded / "00001_stats.json").write_text("{}")
    with pytest.raises(UserError, match="the stats of a shard are damaged"):
        shards(sharded)


# --- thumbnails ----------------------------------------------------------------------------------------------------


def test_thumbnails_are_small_and_pixels_that_count_are_kept() -> None:
    extension, content = thumbnail(Image.new("RGB", (1000, 500), (200, 0, 0)))
    image = decode_image(content)
    assert extension == "jpg" and image.size == (320, 160) and image.getpixel((9, 9))[0] > 190  # type: ignore[index]
    drawing = Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8))
    extension, content = thumbnail(drawing)
    assert extension == "png" and np.array_equal(np.asarray(decode_image(content)), np.asarray(drawing))


def test_thumbnails_are_of_a_few_prompts_whole_and_of_every_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                ) -> None:
    monkeypatch.setattr(thumbnails, "NUM_PROMPTS", 6)
    num = 60
    write_list(tmp_path, [{"index": index, "prompt": f"scene {index // 2}", "prompt_index": index // 2,
                           "set": "rare" if index // 2 in (3, 7) else "usual"} for index in range(num)])
    write_shards(tmp_path, num, 16, size=200)
    write_thumbnails(tmp_path)
    once = (tmp_path / "thumbnails.tar").read_bytes()
    forget(tmp_path)
    assert (tmp_path / "thumbnails.tar").read_bytes() == once
    kept = [each for each in read_list(tmp_path) if picture(tmp_path, each.index) is not None]
    assert len(kept) == 12 and {each.prompt_index for each in kept} >= {3, 7}
    usual = [each for each in by_hash(read_list(tmp_path)) if each.prompt.set == "usual"]
    assert {each.index for each in kept if each.prompt.set == "usual"} == {each.index for each in usual[:8]}


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.integers(1, 12))
def test_kept_prompts_are_as_many_as_may_be(sets: list[str], limit: int) -> None:
    """And no set has two less than another, unless it has no more."""
    pictures = [Drawn(2 * place + copy, Prompt("x", name), place, None) for place, name in enumerate(sets)
                for copy in range(2)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(thumbnails, "NUM_PROMPTS", limit)
        found = thumbnails._kept(pictures)
    prompts = {index // 2 for index in found}
    assert len(prompts) == min(limit, len(sets)) and found == {2 * each + copy for each in prompts for copy in (0, 1)}
    counts = {name: sum(sets[each] == name for each in prompts) for name in set(sets)}
    assert all(counts[name] == sets.count(name) or counts[name] >= max(counts.values()) - 1 for name in counts)
