"""Caption sets: every format gives the same images and captions, bytes are read on demand, and a defect costs a row."""

import csv
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recap import caption_sets
from recap.caption_sets import CaptionedImage, ImageRef, read_dataset, read_shards, split
from recap.config.finetune import Dataset
from recap.errors import BadSample, UserError
from recap.sample import Sample, decode_image
from recap.shards import Reject, ShardWriter, read_shard

Photo = tuple[str, bytes, list[str]]
TWO = {"a.jpg": ("a cat", "the cat"), "b.jpg": ("a dog",)}


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> list[Photo]:
    """51 COCO photos: name, JPEG, five captions by people."""
    rejects: list[Reject] = []
    samples = read_shard(str(shared_data / "photos" / "coco-open-00000.tar"), rejects)
    return [(f"{sample.metadata['coco_id']:012}.jpg", sample.image_bytes, sample.metadata["captions"])
            for sample in samples]


def make_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"bytes of {name}".encode())
    return folder


def write_csv(path: Path, rows: list[list[str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


class Found:
    """What was read, in the form that tests ask about."""

    def __init__(self, images: list[CaptionedImage], rejects: list[Reject]) -> None:
        self.images, self.rejects = images, rejects
        self.captions = {image.uid: tuple(text for _, text in image.captions) for image in images}
        self.styled = {image.uid: image.captions for image in images}
        self.reasons = [(reject.key, reject.reason) for reject in rejects]


def read_text(kind: str, folder: Path, text: str | bytes, *names: str, style: str = "long") -> Found:
    """Read a captions file of this text, beside images of these names."""
    make_images(folder, *names)
    path = folder / ("metadata.jsonl" if kind == "imagefolder" else "captions")
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return Found(*read_dataset(Dataset(format=kind, captions=str(path), style=style)))


def coco(images: list[object], annotations: list[object]) -> str:
    return json.dumps({"info": {}, "images": images, "annotations": annotations})


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- real photos in every format -----------------------------------------------------------------------------------


def one_line(text: str) -> str:
    """Flickr's files have a caption a line; some of COCO's captions have two."""
    return " ".join(text.split())


def as_coco(folder: Path, photos: list[Photo]) -> Dataset:
    annotations = [{"id": place * 10 + n, "image_id": int(name[:-4]), "caption": caption}
                   for place, (name, _, captions) in enumerate(photos) for n, caption in enumerate(captions)]
    images = [{"id": int(name[:-4]), "file_name": name, "height": 1} for name, _, _ in photos]
    (folder / "annotations").mkdir()
    (folder / "annotations" / "captions_train2017.json").write_text(coco(images, annotations))
    return Dataset(format="coco", captions=f"{folder}/annotations/captions_train2017.json", images=f"{folder}/images")


def as_karpathy(folder: Path, photos: list[Photo]) -> Dataset:
    images = [{"filename": name, "sentences": [{"raw": caption, "tokens": caption.split()} for caption in captions],
               "split": "train", "cocoid": int(name[:-4])} for name, _, captions in photos]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return Dataset(format="coco", captions=str(folder / "dataset_coco.json"), images=str(folder / "images"))


def as_flickr_tokens(folder: Path, photos: list[Photo]) -> Dataset:
    (folder / "results_20130124.token").write_text("".join(
        f"{name}#{n}\t{one_line(caption)}\n" for name, _, captions in photos for n, caption in enumerate(captions)))
    return Dataset(format="flickr", captions=str(folder / "results_20130124.token"), images=str(folder / "images"))


def as_flickr_pipes(folder: Path, photos: list[Photo]) -> Dataset:
    (folder / "results.csv").write_text("image_name| comment_number| comment\n" + "".join(
        f"{name}| {n}| {one_line(caption)}\n" for name, _, captions in photos for n, caption in enumerate(captions)))
    return Dataset(format="flickr", captions=str(folder / "results.csv"), images=str(folder / "images"))


def as_flickr_commas(folder: Path, photos: list[Photo]) -> Dataset:
    write_csv(folder / "captions.txt",
              [["image", "caption"], *([name, one_line(text)] for name, _, captions in photos for text in captions)])
    return Dataset(format="flickr", captions=str(folder / "captions.txt"), images=str(folder / "images"))


def as_pixlore(folder: Path, photos: list[Photo]) -> Dataset:
    rows = [["", "image_path", "rich_caption", "prompt"]]
    rows += [["0", f"/home/author/coco/train2017/{name}", text, "DETR:\ncat"] for name, _, texts in photos
             for text in texts]
    write_csv(folder / "pixlore.csv", rows)
    return Dataset(format="pixlore", captions=str(folder / "pixlore.csv"), images=str(folder / "images"))


def as_imagefolder(folder: Path, photos: list[Photo]) -> Dataset:
    rows = [{"file_name": name, "text": captions} for name, _, captions in photos]
    (folder / "images" / "metadata.jsonl").write_text(jsonl(*rows))
    return Dataset(format="imagefolder", captions=str(folder / "images"))


@pytest.mark.parametrize("write", [as_coco, as_karpathy, as_flickr_tokens, as_flickr_pipes, as_flickr_commas,
                                   as_pixlore, as_imagefolder])
def test_every_format_gives_the_same_images_and_captions(tmp_path: Path, photos: list[Photo],
                                                         write: Callable[[Path, list[Photo]], Dataset]) -> None:
    (tmp_path / "images").mkdir()
    for name, data, _ in photos:
        (tmp_path / "images" / name).write_bytes(data)
    images, rejects = read_dataset(write(tmp_path, photos))
    assert not rejects
    assert sum(len(image.captions) for image in images) == sum(len(captions) for _, _, captions in photos) > 250
    for image, (name, data, captions) in zip(images, photos, strict=True):
        assert image.uid == name and image.image.read() == data
        assert image.captions == tuple(("long", one_line(caption)) for caption in captions)


# --- images where they lie -----------------------------------------------------------------------------------------


def test_the_images_of_real_shards_are_read_by_offset(shared_data: Path) -> None:
    path = str(shared_data / "photos" / "coco-open-00000.tar")
    images, rejects = read_shards([path], ["alt"])
    assert not rejects and len(images) == 51
    for image, sample in zip(images, read_shard(path, rejects), strict=True):
        assert image.uid == sample.uid and image.image.read() == sample.image_bytes
        assert image.captions == (("alt", sample.caption("alt")),)
    assert decode_image(images[-1].image.read()).mode == "RGB"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_offsets_are_those_of_the_content_behind_headers_of_any_kind(tmp_path: Path, form: int) -> None:
    names = [f"{'long' * 40}{n}é" for n in range(3)]
    with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
        for name in names:
            for extension, data in (("txt", b"a cat"), ("json", b"{}"), ("PNG", name.encode())):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    images, _ = read_shards([str(tmp_path / "0.tar")], ["alt"])
    assert [image.image.read().decode() for image in images] == names


def write_shard(url: str, *samples: dict[str, bytes]) -> str:
    with ShardWriter(url) as writer:
        for key, members in enumerate(samples):
            writer.write(Sample("0", str(key), members))
    return url


def test_remote_images_are_read_in_part() -> None:
    url = write_shard("memory://sets/0.tar", {"txt": b"a cat", "jpg": b"first"}, {"jpg": b"second", "txt": b"a dog"})
    images, rejects = read_shards([url], ["alt"])
    assert [image.image.read() for image in images] == [b"first", b"second"] and not rejects
    assert ImageRef(url).read() == fsspec.filesystem("memory").cat("/sets/0.tar")


@pytest.mark.parametrize("folder", ["{tmp}", "memory://cut"])
def test_an_image_that_has_gone_or_is_cut_is_a_bad_sample(tmp_path: Path, folder: str) -> None:
    url = write_shard(folder.format(tmp=tmp_path) + "/0.tar", {"txt": b"a cat", "jpg": b"image"})
    fs, path = fsspec.core.url_to_fs(url)
    [image], _ = read_shards([url], ["alt"])
    fs.pipe_file(path, fs.cat_file(path)[:image.image.offset + 2])
    with pytest.raises(BadSample, match=r"^missing_image: .* is cut: 2 of the 5 bytes"):
        image.image.read()
    fs.rm_file(path)
    with pytest.raises(BadSample, match="missing_image: nothing at "):
        image.image.read()


class Faulty(MemoryFileSystem):
    """A store that sends whole files only, or fails, as its path says."""

    protocol = "faulty"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        if "whole" in path:
            return b"much more than was asked for"
        raise ConnectionError("reset by peer")


@pytest.mark.parametrize(("url", "message"), [
    ("faulty://whole/0.tar", "its server sends whole files"),
    ("faulty://down/0.tar", "ConnectionError: reset by peer"),
])
def test_storage_that_fails_stops_the_run_and_drops_no_image(url: str, message: str) -> None:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    with pytest.raises(UserError, match=message):
        ImageRef(url, 2, 3).read()


def test_a_file_that_is_no_images_size_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_sets, "MAX_MEMBER_BYTES", 10)
    (tmp_path / "a.jpg").write_bytes(b"x" * 11)
    with pytest.raises(BadSample, match="oversized_image"):
        ImageRef(str(tmp_path / "a.jpg")).read()


# --- shards --------------------------------------------------------------------------------------------------------


def test_a_sample_has_the_captions_of_the_styles_asked_for(tmp_path: Path) -> None:
    url = write_shard(str(tmp_path / "0.tar"), {"jpg": b"", "txt": b"alt", "short.txt": b" a\n cat ", "long.txt": b""},
                      {"jpg": b"", "rich.txt": b"x"}, {"short.txt": b"x"}, {"jpg": b"", "png": b"", "txt": b"x"},
                      {"jpg": b"", "short.txt": b"\xff"}, {"webp": b"", "long.txt": b"y"})
    found = Found(*read_shards([url], ["short", "alt", "long", "short"]))
    assert found.styled == {"0/0": (("short", "a cat"), ("alt", "alt")), "0/5": (("long", "y"),)}
    assert found.reasons == [("1", "missing_caption"), ("2", "missing_image"), ("3", "several_images"),
                             ("4", "binary_caption")]


def test_shards_without_captions_are_one_clear_line(tmp_path: Path) -> None:
    url = write_shard(str(tmp_path / "0.tar"), {"jpg": b"", "txt": b"alt"})
    with pytest.raises(UserError, match=r"stitch them first.*1 missing_caption; first: 0: .*none of short") as caught:
        read_shards([url], ["short"])
    assert "\n" not in str(caught.value)


# --- coco ----------------------------------------------------------------------------------------------------------


def test_coco_counts_images_without_captions_and_captions_without_images(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": "2", "file_name": "b.jpg"}, {"id": 3, "file_name": "c.jpg"},
              {"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "c.jpg"}, {"id": 4}, 5,
              {"id": [], "file_name": ""}]
    annotations = [{"image_id": 2, "caption": "a dog"}, {"image_id": 1, "caption": "a cat"}, {"image_id": 1},
                   {"image_id": 1, "caption": "the cat"}, {"image_id": 9, "caption": "x"},
                   {"image_id": 9, "caption": "y"}, {"image_id": [], "caption": "z"}, None]
    found = read_text("coco", tmp_path, coco(images, annotations), "a.jpg", "b.jpg", "c.jpg", style="short")
    assert found.captions == TWO and found.styled["b.jpg"] == (("short", "a dog"),)
    assert Counter(reason for _, reason in found.reasons) == {
        "malformed_entry": 6, "duplicate_id": 1, "unknown_image": 1, "missing_caption": 1}
    assert ("c.jpg", "missing_caption") in found.reasons and ("9", "unknown_image") in found.reasons


def test_karpathys_held_out_images_are_not_tuned_on(tmp_path: Path) -> None:
    images = [{"filepath": "val2014", "filename": f"{kind}.jpg", "split": kind, "sentences": [{"raw": kind}, {}, 1]}
              for kind in ("train", "restval", "val", "test")]
    text = json.dumps({"images": [*images, {"filename": "x.jpg"}]})
    found = read_text("coco", tmp_path, text, "val2014/train.jpg", "val2014/restval.jpg", "val2014/test.jpg")
    assert found.captions == {"val2014/train.jpg": ("train",), "val2014/restval.jpg": ("restval",)}
    assert found.reasons == [("val.jpg", "held_out"), ("test.jpg", "held_out"), ("images[4]", "malformed_entry")]


# --- flickr --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "a.jpg#0\ta cat\na.jpg#1\t the  cat .\nb.jpg#0\ta dog\n",
    "\ufeffa.jpg#0\ta cat\r\n a.jpg #1 \tthe cat .\r\n\r\nb.jpg# 0\t a dog",
    "image_name| comment_number| comment\na.jpg| 0| a cat\na.jpg |1| the cat .\nb.jpg|0| a dog\n",
    "image,caption\na.jpg,a cat\na.jpg,the cat .\nb.jpg,a dog\n",
    "\ufeffImage , Caption\r\na.jpg , a cat\r\n\r\na.jpg,the cat .\r\n\"b.jpg\",\"a dog\"\r\n",
    "image_name,comment_number,comment\na.jpg,0,a cat\na.jpg,1,the cat .\nb.jpg,0,a dog\n",
])
def test_flickrs_files_are_told_apart_by_their_content(tmp_path: Path, text: str) -> None:
    found = read_text("flickr", tmp_path, text, "a.jpg", "b.jpg")
    assert found.captions == {"a.jpg": ("a cat", "the cat ."), "b.jpg": ("a dog",)} and not found.rejects


def test_the_known_defects_of_flickrs_files_cost_a_row(tmp_path: Path) -> None:
    rows = "2258277193_586949ec62.jpg.1#0\tpeople waiting\na.jpg#0\ta cat\na.jpg\tx\na.jpg#1 y\na.jpg#2\t \n#3\tz\n"
    found = read_text("flickr", tmp_path, rows, "a.jpg", "2258277193_586949ec62.jpg.1")
    assert found.captions == {"a.jpg": ("a cat",)}
    assert found.reasons == [("line 3", "malformed_row"), ("line 4", "malformed_row"), ("line 5", "malformed_row"),
                             ("line 6", "malformed_row"), ("2258277193_586949ec62.jpg.1", "not_an_image")]
    rows = 'image_name| comment_number| comment\na.jpg| 4   A dog .\na.jpg| 0| this | that "so"\n| 1| x\na.jpg| 2|\n'
    found = read_text("flickr", tmp_path, rows)
    assert found.captions == {"a.jpg": ('this | that "so"',)}
    assert [key for key, _ in found.reasons] == ["line 2", "line 4", "line 5"]


def test_a_quotation_mark_that_does_not_close_costs_its_own_row_only(tmp_path: Path) -> None:
    rows = ('image,caption\na.jpg,"one\na.jpg,two, and three\na.jpg,"a ""b"", c"\na.jpg,5" long\na.jpg\n'
            f'a.jpg,{"x" * 200_000}\n,x\na.jpg,"five')
    found = read_text("flickr", tmp_path, rows, "a.jpg")
    assert found.captions == {"a.jpg": ("two, and three", 'a "b", c', '5" long')}
    assert found.reasons == [(f"line {n}", "malformed_row") for n in (2, 6, 7, 8, 9)]


# --- pixlore -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "uid"), [
    ("a.jpg", "a.jpg"),
    ("val/a.jpg", "val/a.jpg"),
    ("/mnt/coco/val/a.jpg", "val/a.jpg"),
    ("../coco/val/a.jpg", "val/a.jpg"),
    ("C:\\coco\\val\\a.jpg", "val/a.jpg"),
    ("/mnt/coco/train/a.jpg", "a.jpg"),
    ("./other/a.jpg", "a.jpg"),
])
def test_a_path_of_the_authors_machine_is_found_by_its_longest_end(tmp_path: Path, path: str, uid: str) -> None:
    found = read_text("pixlore", tmp_path, f"image_path,rich_caption\n{path},x\n", "a.jpg", "val/a.jpg")
    assert found.captions == {uid: ("x",)} and not found.rejects


def test_a_rich_caption_may_run_over_lines_and_a_damaged_row_costs_little(tmp_path: Path) -> None:
    rows = ('rich_caption,image_path,facts\n"A cat,\n\n""Tom"".",a.jpg,x\n\nx,b.jpg\nx,,y\nx,/etc/passwd,y\nx,c.jpg,y\n'
            f'{"x" * 150_000},b.jpg,y\nA dog.,b.jpg,{"y" * 120_000}\nThe cat.,/root/a.jpg,x\n"cut,a.jpg')
    found = read_text("pixlore", tmp_path, rows, "a.jpg", "b.jpg", style="rich")
    assert found.styled == {"a.jpg": (("rich", 'A cat, "Tom".'), ("rich", "The cat.")), "b.jpg": (("rich", "A dog."),)}
    assert found.reasons == [*((f"line {n}", "malformed_row") for n in (6, 10, 13)), (".", "missing_image"),
                             ("/etc/passwd", "not_an_image"), ("c.jpg", "missing_image")]


# --- imagefolder ---------------------------------------------------------------------------------------------------


def test_columns_of_text_are_styles_and_text_is_of_the_sets_style(tmp_path: Path) -> None:
    found = read_text("imagefolder", tmp_path, jsonl(
        {"file_name": "a.jpg", "text": "a cat", "short": ["cat", "tom", 3, ""], "n": 3, "not a name": "x", "m": None},
        {"text": "x"}, {"file_name": 3}, {"file_name": "deep/b.png", "text": ["one", "two"]},
        {"file_name": "./a.jpg", "text": "the cat"}), "a.jpg", "deep/b.png", style="rich")
    assert found.styled == {"a.jpg": (("rich", "a cat"), ("short", "cat"), ("short", "tom"), ("rich", "the cat")),
                            "deep/b.png": (("rich", "one"), ("rich", "two"))}
    assert found.reasons == [("line 2", "malformed_row"), ("line 3", "malformed_row")]


def test_the_hubs_library_reads_the_same_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = make_images(tmp_path / "set", "a.png", "deep/b.png")
    for name in ("a.png", "deep/b.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "metadata.jsonl").write_text(
        jsonl({"file_name": "a.png", "text": "a cat"}, {"file_name": "deep/b.png", "text": "a dog"}))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path))
    ours = Found(*read_dataset(Dataset(format="imagefolder", captions=str(folder))))
    assert sorted(theirs["text"]) == sorted(text for texts in ours.captions.values() for text in texts)


# --- what is rejected, and what stops --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reason"), [
    ("../secret.jpg", "unsafe_path"), ("deep/../../secret.jpg", "unsafe_path"), ("..\\secret.jpg", "unsafe_path"),
    ("{outside}", "unsafe_path"), ("C:\\secret.jpg", "unsafe_path"), ("a\0.jpg", "unsafe_path"),
    ("\udce9.jpg", "unsafe_path"), ("https://host/a.jpg", "missing_image"), ("gone.jpg", "missing_image"),
    ("x" * 5000 + ".jpg", "missing_image"), ("folder.jpg", "missing_image"), ("metadata.jsonl", "not_an_image"),
    ("", "not_an_image"), (".jpg", "not_an_image"),
])
def test_an_image_that_is_not_in_the_folder_is_rejected(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "set" / "folder.jpg").mkdir(parents=True)
    rows = jsonl({"file_name": name.format(outside=tmp_path / "secret.jpg"), "text": "x"},
                 {"file_name": "a.JPEG", "text": "a cat"})
    found = read_text("imagefolder", tmp_path / "set", rows, "a.JPEG")
    assert found.captions == {"a.JPEG": ("a cat",)}
    assert [reject.reason for reject in found.rejects] == [reason]


@pytest.mark.parametrize(("caption", "reason"), [
    ("a\0b", "binary_caption"), ("\ud800", "binary_caption"), ("x" * 200_000, "oversized_caption"),
    (" \n\u200b", "missing_caption")])
def test_a_caption_that_is_no_text_is_rejected(tmp_path: Path, caption: str, reason: str) -> None:
    rows = jsonl({"file_name": "a.jpg", "text": caption}, {"file_name": "b.jpg", "text": ["a dog", "x"]},
                 {"file_name": "b.jpg", "text": caption})
    found = read_text("imagefolder", tmp_path, rows, "a.jpg", "b.jpg")
    assert found.captions == {"b.jpg": ("a dog", "x")}
    assert set(found.reasons) <= {("a.jpg", reason), ("b.jpg", reason)} and found.reasons[0] == ("a.jpg", reason)


@pytest.mark.parametrize(("kind", "text", "message"), [
    ("coco", "[]", "no list of images"),
    ("coco", '{"images": {}}', "no list of images"),
    ("coco", '{"images": []}', "no list of annotations"),
    ("coco", '{"images": [],\n"annotations": [}', "line 2 is not JSON"),
    ("coco", "[" * 200_000, "cannot be read"),
    ("coco", "1" * 5000, "cannot be read"),
    ("coco", coco([], []), "none of its 0 images"),
    ("coco", b'{"images": [],\n\n"\xff', "line 3: not UTF-8"),
    ("flickr", "", "its first lines are of another kind"),
    ("flickr", "a.jpg a cat\n", "its first lines are of another kind"),
    ("flickr", "a.jpg#0\ta cat\nb.jpg#0\ta\rdog\n", r"2 missing_image; first: a\.jpg: missing_image \(no a\.jpg in "),
    ("pixlore", "", "none of its 0 images"),
    ("pixlore", "\n\nimage,caption\na.jpg,x\n", "line 3 has no columns image_path and rich_caption"),
    ("imagefolder", '{"file_name": "a.jpg"}\n{"file_name\n', "line 2 is not JSON"),
    ("imagefolder", '{"file_name": "a.jpg"}\n[1]\n', "line 2 is not a JSON object"),
    ("imagefolder", "\n" + "[" * 200_000, "the JSON from line 2 on cannot be read"),
    ("imagefolder", jsonl({"file_name": "a\n\x1b.jpg", "text": "x"}), "1 unsafe_path"),
])
def test_a_file_that_is_not_in_its_format_is_one_line_that_says_where(tmp_path: Path, kind: str, text: str | bytes,
                                                                       message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_text(kind, tmp_path, text)
    assert str(tmp_path) in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(("captions", "images", "message"), [
    ("gone.json", None, "cannot be read"), ("set", None, "cannot be read"), ("a.json", "gone", "no folder at"),
    ("a.json", "a.json", "no folder at"), ("s3://bucket/a.json", None, "local"), ("a.json", "s3://bucket/x", "local")])
def test_what_is_not_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, captions: str,
                                             images: str | None, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "a.json").write_text(coco([], []))
    with pytest.raises(UserError, match=message):
        read_dataset(Dataset(format="coco", captions=captions, images=images))


def test_a_captions_file_of_no_sane_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_sets, "MAX_CAPTIONS_BYTES", 10)
    with pytest.raises(UserError, match="over 10 bytes"):
        read_text("flickr", tmp_path, "a.jpg#0\ta cat")


@given(st.sampled_from(["coco", "flickr", "pixlore", "imagefolder"]), st.data())
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject) -> None:
    starts = {"coco": ['{"images": ['], "flickr": ["image,caption\n", "image_name|comment\n", "a.jpg#0\tx\n"],
              "pixlore": ["image_path,rich_caption\n"], "imagefolder": ['{"file_name": "a.jpg", "text": ', ""]}
    text = data.draw(st.sampled_from(starts[kind])) + data.draw(st.text('a.jpg#0\t,|"\n\r {}[]:\0é', max_size=60))
    try:
        read_text(kind, tmp_path_factory.getbasetemp() / "any", text, "a.jpg")
    except UserError as error:
        assert "\n" not in str(error)


values = st.recursive(st.none() | st.integers() | st.sampled_from(["a.jpg", "x", "1"]),
                      lambda inner: st.lists(inner, max_size=3), max_leaves=4)
entries = st.lists(values | st.dictionaries(
    st.sampled_from(["id", "image_id", "file_name", "caption", "filename", "filepath", "split", "sentences", "raw"]),
    values, max_size=5), max_size=4)


@given(entries, entries)
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, images: list[object],
                                     annotations: list[object]) -> None:
    try:
        read_text("coco", tmp_path_factory.getbasetemp() / "any", coco(images, annotations), "a.jpg")
    except UserError as error:
        assert "\n" not in str(error)


# --- training and validation -----------------------------------------------------------------------------------------


def image(uid: str) -> CaptionedImage:
    return CaptionedImage(uid, ImageRef(uid), (("long", uid), ("short", uid)))


uids = st.lists(st.text(max_size=5), min_size=2, max_size=40, unique=True)
shares = st.floats(0, 1, exclude_min=True)


@given(uids, shares, st.integers(0, 3), st.randoms())
def test_the_parts_are_disjoint_and_whole_and_no_order_changes_them(uids: list[str], share: float, seed: int,
                                                                     random: Random) -> None:
    images = [image(uid) for uid in uids]
    training, validation = split(images, share, seed)
    assert len(training) >= 1 and len(validation) >= 1
    assert [image for image in images if image in training or image in validation] == images
    assert not {image.uid for image in training} & {image.uid for image in validation}
    assert len(training) + len(validation) == len(images)
    assert abs(len(validation) - share * len(images)) <= 1
    shuffled = sorted(images, key=lambda _: random.random())
    again = split(shuffled, share, seed)
    assert [set(part) for part in again] == [set(training), set(validation)]
    assert again[0] == [image for image in shuffled if image in training]  # each part in the order given


@given(uids, shares)
def test_pieces_of_one_image_stay_together(uids: list[str], share: float) -> None:
    training, validation = split([image(uid) for uid in uids * 2], share, 0)
    assert not {image.uid for image in training} & {image.uid for image in validation}


def test_another_seed_holds_out_other_images() -> None:
    images = [image(str(n)) for n in range(100)]
    held_out = [{image.uid for image in split(images, 0.1, seed)[1]} for seed in range(3)]
    assert [len(part) for part in held_out] == [10, 10, 10]
    assert held_out[0] != held_out[1] != held_out[2]


def test_nothing_is_held_out_of_a_share_of_zero_and_one_image_cannot_be_split() -> None:
    assert split([image("a")], 0, 0) == ([image("a")], [])
    assert split([], 0, 0) == ([], [])
    for images in ([], [image("a")], [image("a"), image("a")]):
        with pytest.raises(UserError, match="cannot be split"):
            split(images, 0.1, 0)
