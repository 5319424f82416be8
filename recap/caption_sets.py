"""Caption-tuning sets in the formats that people have, as captioned images whose bytes stay where they are.

Shards with `KEY.STYLE.txt`; COCO's and Karpathy's JSON; Flickr8k and Flickr30k; PixLore's CSV; Hugging Face's
ImageFolder. Reading a set decodes no image (100,000 COCO photos would take minutes) and keeps none (nor would they fit
in memory): an `ImageRef` is read when its turn comes.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import fsspec

from recap.caption_formats import READERS, SHAPES, CaptionsFile
from recap.config.finetune import Dataset
from recap.errors import BadSample, UserError
from recap.sample import IMAGE_EXTENSIONS, decode_text
from recap.shards import MAX_MEMBER_BYTES, Reject, read_shard
from recap.storage import is_local

MAX_CAPTIONS_BYTES = 2**30
"""Of a captions file, which is read whole; one for all of COCO has some 100 MB."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where an encoded image lies: a whole file, or a stretch of a shard, local or remote."""

    url: str
    offset: int = 0
    size: int | None = None
    """In bytes; None is the whole file."""

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            BadSample: `missing_image` where the file has gone or is cut, `oversized_image` where it is no image's size.
            UserError: the storage fails or refuses. A run must not drop images for as long as a network is down.
        """
        limit = MAX_MEMBER_BYTES + 1 if self.size is None else self.size
        try:
            data = self._read_local(limit) if is_local(self.url) else self._read_remote(limit)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise BadSample("missing_image", f"nothing at {self.url}") from error
        except Exception as error:  # every storage has errors of its own
            raise UserError(f"{self.url} cannot be read ({type(error).__name__}: {error}): when its storage can be "
                            "reached again, run the same command") from error
        if self.size is not None and len(data) < self.size:
            raise BadSample("missing_image", f"{self.url} is cut: {len(data):,} of the {self.size:,} bytes from byte "
                                             f"{self.offset:,} on")
        if len(data) > MAX_MEMBER_BYTES:
            raise BadSample("oversized_image", f"{self.url} has over {MAX_MEMBER_BYTES:,} bytes")
        if self.size is not None and len(data) > self.size:
            raise UserError(f"{self.url}: its server sends whole files where a part is asked for: copy the shards to "
                            "a local folder or to S3")
        return data

    def _read_local(self, limit: int) -> bytes:
        with open(self.url, "rb") as file:
            file.seek(self.offset)
            return file.read(limit)

    def _read_remote(self, limit: int) -> bytes:
        fs, path = fsspec.core.url_to_fs(self.url)
        return bytes(fs.cat_file(path, start=self.offset, end=self.offset + limit))


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image of a set, with what the set says of it."""

    uid: str
    """Unique within the set."""
    image: ImageRef
    captions: tuple[tuple[str, str], ...]
    """(style, caption), in the order of the file; one style may have several."""


def read_shards(urls: list[str], styles: Iterable[str]) -> tuple[list[CaptionedImage], list[Reject]]:
    """The images of webdataset shards with their captions of the given styles, in the order of `styles`.

    Args:
        urls: shards as `recap.shards.expand` gives them, none twice.
        styles: `short` is the member `KEY.short.txt`; `alt` is the alt-text, `KEY.txt`.

    Raises:
        UserError: no sample has a caption.
    """
    images: list[CaptionedImage] = []
    rejects: list[Reject] = []
    wanted = list(dict.fromkeys(styles))
    for url in urls:
        for sample in read_shard(url, rejects):
            try:
                extension = sample.image_extension
                captions = tuple((style, text) for style in wanted if (text := sample.caption(style)))
                if not captions:
                    raise BadSample("missing_caption", f"none of {', '.join(wanted)}")
            except BadSample as error:
                rejects.append(Reject(sample.shard, sample.key, error.reason, error.detail))
                continue
            image = ImageRef(url, sample.offsets[extension], len(sample.members[extension]))
            images.append(CaptionedImage(sample.uid, image, captions))
    if not images:
        raise UserError(f"no sample of {', '.join(urls)} has an image with a caption of the styles "
                        f"{', '.join(wanted)}: stitch them first, or check the members' names (KEY.STYLE.txt)"
                        + _first(rejects))
    return images, rejects


def read_dataset(config: Dataset) -> tuple[list[CaptionedImage], list[Reject]]:
    """The images of a folder with the captions that a file has for them.

    A uid is the image's path relative to the images' folder. What the file says of one image in several places is
    joined.

    Raises:
        UserError: the file is not there or not in its format, or no image of it can be used.
    """
    file, folder = _open(config)
    by_name: dict[str, list[tuple[str, str]]] = {}
    for name, captions in READERS[config.format](file):
        by_name.setdefault(PureWindowsPath(name.strip()).as_posix(), []).extend(captions)  # \ → /, ./a → a
    by_uid: dict[str, list[tuple[str, str]]] = {}
    for name, captions in by_name.items():
        try:
            uid = _find_by_end(folder, name) if config.format == "pixlore" else _find(folder, name)
        except BadSample as error:
            file.reject(name, error.reason, error.detail)
            continue
        by_uid.setdefault(uid, []).extend(captions)
    images = [CaptionedImage(uid, ImageRef(os.path.join(folder, uid)), texts)
              for uid, captions in by_uid.items() if (texts := _clean(file, uid, captions))]
    if not images:
        raise UserError(f"{file.path}: none of its {len(by_name)} images in {folder} can be used; {config.format} is "
                        f"{SHAPES[config.format]}, and `images` the folder that names are relative to"
                        + _first(file.rejects))
    return images, file.rejects


def split(images: list[CaptionedImage], share: float, seed: int) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """(training, validation), both in the order given: by image, so that no image has captions in both.

    An image's part follows from the seed, its uid and the set of uids, not from their order.

    Args:
        share: of the images to hold out, at least one and never all of them; 0 holds out none.

    Raises:
        UserError: there is one image only.
    """
    if share <= 0:
        return list(images), []
    ranked = sorted({image.uid for image in images}, key=lambda uid: (_hash(seed, uid), uid))
    if len(ranked) < 2:
        raise UserError(f"{len(ranked)} image cannot be split into training and validation: give more images, or "
                        "hold none out")
    held_out = set(ranked[:min(max(round(share * len(ranked)), 1), len(ranked) - 1)])
    return ([image for image in images if image.uid not in held_out],
            [image for image in images if image.uid in held_out])


def _hash(seed: int, uid: str) -> bytes:
    return hashlib.sha256(f"{seed}/{uid}".encode("utf-8", "surrogatepass")).digest()


def _first(rejects: list[Reject]) -> str:
    """The end of a message: how many rejects of each reason, and the first of them."""
    if not rejects:
        return ""
    counts = ", ".join(f"{count} {reason}" for reason, count in Counter(r.reason for r in rejects).most_common())
    first = "; ".join(f"{r.key}: {r.reason}" + (f" ({r.detail})" if r.detail else "") for r in rejects[:3])
    text = f" [{counts}; first: {first:.400}]"
    return "".join(c if c.isprintable() else "?" for c in text)  # keys come from the web; a message is one line


# --- files and folders ---------------------------------------------------------------------------------------------


def places(config: Dataset) -> tuple[str, str]:
    """Where a set's captions file is, and the folder of its images."""
    path = config.captions
    if config.format == "imagefolder" and Path(path).is_dir():
        path = os.path.join(path, "metadata.jsonl")
    return path, config.images or str(Path(path).parent)


def _open(config: Dataset) -> tuple[CaptionsFile, str]:
    """The captions file, read, and the folder of its images."""
    path, folder = places(config)
    if not all(map(is_local, (path, folder))):
        raise UserError(f"{path}: {config.format} sets are read from local folders: copy it, or make shards of it")
    if not Path(folder).is_dir():
        raise UserError(f"no folder at {folder}: `images` is where the images of {path} lie")
    try:
        with open(path, "rb") as content:
            data = content.read(MAX_CAPTIONS_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): `captions` is the file with the captions, for "
                        "imagefolder the folder that has metadata.jsonl") from None
    if len(data) > MAX_CAPTIONS_BYTES:
        raise UserError(f"{path} has over {MAX_CAPTIONS_BYTES:,} bytes: split it, or make shards of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8: write it anew as UTF-8 text") from None
    return CaptionsFile(path, text, config.format, config.style, []), folder


def _find(folder: str, name: str) -> str:
    """The uid of an image that is there; `BadSample` for any other.

    Links are followed: a folder of links is how the hub's cache, and many a person, keeps a set.
    """
    path = PureWindowsPath(name)  # which knows both kinds of slash, and drives
    if path.anchor or ".." in path.parts or re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name):
        raise BadSample("unsafe_path", ascii(name))
    if path.suffix[1:].lower() not in IMAGE_EXTENSIONS:
        raise BadSample("not_an_image", f"{name} ends in none of {', '.join(IMAGE_EXTENSIONS)}")
    if not os.path.isfile(os.path.join(folder, name)):
        raise BadSample("missing_image", f"no {name} in {folder}")
    return name


def _find_by_end(folder: str, name: str) -> str:
    """The same for a path on another machine: the longest end of it that is in the folder, down to the bare name."""
    parts = PureWindowsPath(name).parts
    for start in range(len(parts)):
        try:
            return _find(folder, "/".join(parts[start:]))
        except BadSample as error:
            if error.reason == "not_an_image" or start == len(parts) - 1:
                raise
    raise BadSample("missing_image", "an empty path")


def _clean(file: CaptionsFile, uid: str, captions: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The captions that are text, under the rules for captions in shards; the others are rejected."""
    texts, num_rejects = [], len(file.rejects)
    for style, caption in captions:
        try:
            text = decode_text(caption.encode("utf-8", "surrogatepass"), style)
        except BadSample as error:
            file.reject(uid, error.reason, error.detail)
            continue
        if text:
            texts.append((style, text))
    if not texts and len(file.rejects) == num_rejects:
        file.reject(uid, "missing_caption")
    return tuple(texts)
