"""Which image of a folder is of which prompt: by number, by folder, by id, and never by the order of files alone."""

import json
import os
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eval.drawn import Drawn, loose_path, picture, pictures, read_list, shards
from eval.given import take
from eval.prompts import Prompt
from recap.errors import UserError
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shards import ShardWriter
from recap.storage import write_json

PROMPTS = [Prompt(f"scene {place}", about={"id": f"s{place * 7}"}) for place in range(12)]


def folder_of(root: Path, *names: str) -> Path:
    """Images whose red is the place of their name."""
    folder = root / "images"
    for place, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (place, 0, 0)).save(folder / name)
    return folder


def taken(root: Path, folder: Path, prompts: list[Prompt] | None = PROMPTS, only: list[str] | None = None
          ) -> list[Drawn]:
    stage = StageDir(root / "taken", {})
    stage.begin()
    result = take(stage, folder, prompts, only, True)
    found = read_list(stage.path)
    assert result["num_images"] == len(found)
    return found


def by_prompt(found: list[Drawn]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for each in found:
        assert each.file is not None
        names.setdefault(each.prompt.text, []).append(each.file.stem)
    return names


@pytest.mark.parametrize("form", ["{}.png", "{:05d}.png", "sample_{:03d}.jpg", "{:02d}.webp"])
@pytest.mark.parametrize("first", [0, 1])
def test_images_are_numbered(tmp_path: Path, form: str, first: int) -> None:
    """10.png comes before 2.png in a folder; and some count from 1."""
    folder = folder_of(tmp_path, *(form.format(place + first) for place in range(12)))
    found = by_prompt(taken(tmp_path, folder))
    assert found == {f"scene {place}": [Path(form.format(place + first)).stem] for place in range(12)}


def test_several_images_of_a_prompt(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *(f"{place:03d}-{copy}.png" for place in range(12) for copy in range(2)))
    found = taken(tmp_path, folder)
    assert by_prompt(found)["scene 3"] == ["003-0", "003-1"]
    assert [each.prompt_index for each in found[:4]] == [0, 0, 1, 1]


def test_folders_as_genevals(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *(f"{place:05d}/samples/{copy:04d}.png" for place in range(12) for copy in range(4)))
    found = by_prompt(taken(tmp_path, folder))
    assert found["scene 11"] == ["0000", "0001", "0002", "0003"] and len(found) == 12


def test_genevals_mosaics_are_no_pictures(tmp_path: Path) -> None:
    names = [f"{place:05d}/{name}" for place in range(12) for name in ("grid.png", "samples/0.png", "samples/1.png")]
    assert by_prompt(taken(tmp_path, folder_of(tmp_path, *names)))["scene 3"] == ["0", "1"]


def test_without_prompts_the_order_is_that_of_names(tmp_path: Path) -> None:
    """Whatever the extensions: x.m.png comes after x.png, and x.jpg before x.m.jpg."""
    png = [each.file.stem for each in taken(tmp_path, folder_of(tmp_path / "a", "x.png", "x.m.png"), None) if each.file]
    jpg = [each.file.stem for each in taken(tmp_path, folder_of(tmp_path / "b", "x.jpg", "x.m.jpg"), None) if each.file]
    assert png == jpg == ["x", "x.m"]


def test_a_link_to_nothing_is_one_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *(f"{place}.png" for place in range(12)))
    (folder / "12.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"12\.png is a link to nothing"):
        taken(tmp_path, folder)


def test_a_name_of_other_bytes_is_taken(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.png")
    (folder / "a.png").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    [each] = taken(tmp_path, folder, None)
    assert each.file is not None and each.file.is_file()


def test_images_named_by_their_prompts_id(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *(f"s{place * 7}.png" for place in range(12)))
    assert by_prompt(taken(tmp_path, folder)) == {f"scene {place}": [f"s{place * 7}"] for place in range(12)}


def test_images_named_as_cocos(tmp_path: Path) -> None:
    prompts = [Prompt(f"scene {place}", about={"image_id": 1000 - 7 * place}) for place in range(3)]
    folder = folder_of(tmp_path, *(f"COCO_val2014_{1000 - 7 * place:012d}.jpg" for place in (2, 0, 1)))
    assert by_prompt(taken(tmp_path, folder, prompts))["scene 1"] == ["COCO_val2014_000000000993"]


@given(st.integers(0, 10_000))
def test_the_order_of_files_makes_no_difference(seed: int) -> None:
    """Whatever digits are padded, a number stands for its prompt."""
    from eval.given import GivenFolder, _by_number
    rng = Random(seed)
    numbers = rng.sample(range(30), 30)
    files = [Path(f"/x/{number:0{rng.randint(1, 4)}d}.png") for number in numbers]
    assert _by_number(GivenFolder(Path("/x"), files), 30) == numbers


@pytest.mark.parametrize(("names", "says"), [
    ([f"{place}.png" for place in range(11)], "none of 1 of the 12 prompts, of number 11 first"),
    ([f"{place}.png" for place in range(13)], "has an image 12, and there are 12 prompts"),
    ([f"{place}.png" for place in range(12)] + ["3-1.png"], "has 1 images of prompt 0, and 2 of another"),
    ([f"cat {chr(97 + place)}.png" for place in range(12)], "cannot tell which image of"),
    (["0.png", "below/1.png"], "cannot tell which image of"),
    ([f"{place}.png" for place in range(12)] + ["3.jpg"], "holds two images 3"),
])
def test_what_does_not_fit_is_one_line(tmp_path: Path, names: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        taken(tmp_path, folder_of(tmp_path, *names))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_without_prompts_all_are_taken_or_those_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "b.png", "a.png", "below/c.png")
    assert [each.file.stem for each in taken(tmp_path, folder, None) if each.file] == ["a", "b", "c"]
    assert [each.file.stem for each in taken(tmp_path, folder, None, ["below/c", "a"]) if each.file] == ["a", "c"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in"):
        taken(tmp_path, tmp_path / "empty")


def test_taken_pictures_are_read_where_they_lie(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *(f"{place}.png" for place in range(12)))
    found = taken(tmp_path, folder)
    [unit] = shards(tmp_path / "taken")
    read = list(pictures(unit))
    assert [index for index, _ in read] == list(range(12))
    assert read[2][1] == (folder / "2.png").read_bytes() == picture(tmp_path / "taken", 2)
    assert found[10].file == (folder / "10.png").resolve()
    (folder / "2.png").unlink()
    with pytest.raises(UserError, match="1 of 12 pictures are missing"):
        shards(tmp_path / "taken")


@pytest.mark.parametrize("form", ["loose", "shards"])
def test_a_folder_that_generate_filled(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "mix"
    folder.mkdir()
    rows = [{"index": place, "prompt": f"scene {place // 2 * 2}", "set": "own", "prompt_index": place // 2,
             "seed": place} for place in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place in range(4):
        Image.new("RGB", (8, 8), (place, 0, 0)).save(loose_path(folder, place))
    if form == "shards":
        with ShardWriter(str(folder / "00000.tar")) as writer:
            for place in range(4):
                writer.write(Sample("0", f"{place:08d}", {"png": loose_path(folder, place).read_bytes()}))
        write_json(str(folder / "00000_stats.json"), {"count": 4})
        for place in range(4):
            loose_path(folder, place).unlink()
    found = taken(tmp_path, folder, None)
    assert taken(tmp_path, folder, [Prompt("scene 0"), Prompt("scene 2")]) == found  # the very prompts of its own list
    with pytest.raises(UserError, match="lists other prompts than were given"):
        taken(tmp_path, folder, PROMPTS)
    assert [(each.prompt.text, each.prompt.set, each.prompt_index, each.seed) for each in found] == [
        (f"scene {place // 2 * 2}", "own", place // 2, place) for place in range(4)]
    assert [index for unit in shards(tmp_path / "taken") for index, _ in pictures(unit)] == [0, 1, 2, 3]
    assert picture(tmp_path / "taken", 3) == picture(folder, 3) is not None
    again = StageDir(tmp_path / "again", {})  # of the list of a list
    again.begin()
    take(again, tmp_path / "taken", None, None, True)
    assert picture(again.path, 3) == picture(folder, 3)
    (folder / "forgotten").touch()
    with pytest.raises(UserError, match="were not kept"):
        taken(tmp_path, folder, None)
