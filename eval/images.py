"""Sets of images in units, each of which a process measures at a time: what an arm drew, and real images."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from eval.drawn import FORGOTTEN_FILE, Drawn, pictures, read_list, shards
from eval.prompts import PROMPTS_FILE, Prompt
from recap.errors import BadSample, UserError
from recap.rundir import folder_identity, printable
from recap.sample import IMAGE_EXTENSIONS, decode_image
from recap.shards import Reject, expand, read_shard
from recap.storage import identities, identity

NUM_FILES = 256
"""Files of a folder that are a unit."""
Given = tuple[str, bytes, Prompt | None]
"""Where an image is, for messages; its bytes; and what it was drawn from."""


class Images(Protocol):
    """A set of images. It travels to other processes."""

    def units(self) -> list[str]:
        """Parts of the set, whose images one after the other are the whole in order."""

    def count(self) -> int | None:
        """How many images there are, where that can be told at once."""

    def read(self, unit: str, rejects: list[Reject]) -> Iterator[Given]:
        """The images of a unit; what can't be read of shards goes to `rejects`."""

    def decode(self, given: Given) -> Image.Image:
        """`BadSample` for one of many from the web; `UserError` for one that somebody put there."""

    def identity(self) -> Any:
        """What tells one version of the set from another."""

    def are_kept(self) -> bool:
        """Whether there are images any more; else what was measured of them is all there is."""

    @property
    def sets(self) -> tuple[str, ...] | None:
        """The prompt sets that it is of; None for all, or where there are no prompts."""


@dataclass(frozen=True)
class DrawnImages:
    """What an arm drew: a folder as `eval/drawn.py` reads it."""

    folder: Path
    sets: tuple[str, ...] | None = None
    """Only of these prompt sets; by default of all."""

    @cached_property
    def listed(self) -> list[Drawn]:
        return read_list(self.folder)

    def units(self) -> list[str]:
        return [str(path) for path in shards(self.folder)]

    def count(self) -> int:
        return sum(self._is_in(each.prompt) for each in self.listed)

    def read(self, unit: str, rejects: list[Reject]) -> Iterator[Given]:
        for index, content in pictures(Path(unit), self.listed):
            each = self.listed[index]  # `pictures` holds a shard to its place
            if self._is_in(each.prompt):
                yield str(each.file or f"picture {index} of {self.folder}"), content, each.prompt

    def decode(self, given: Given) -> Image.Image:
        return _whole(given)

    def identity(self) -> Any:
        known = ("*.tar", "[0-9]*.png", PROMPTS_FILE)
        files = sorted({path for pattern in known for path in self.folder.glob(pattern)}
                       | {each.file for each in self.listed if each.file})
        return [[printable(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]

    def are_kept(self) -> bool:
        return not (self.folder / FORGOTTEN_FILE).is_file()

    def _is_in(self, prompt: Prompt) -> bool:
        return self.sets is None or prompt.set in self.sets


@dataclass(frozen=True)
class RealImages:
    """Images of a folder (with those below it, sorted), or of shards.

    A broken image in a folder is an error, as somebody put it there; in a shard from the web it is one of many.
    """

    source: str | list[str]
    where: str
    """The key that names it, for messages."""
    sets: None = None

    @cached_property
    def files(self) -> list[Path] | None:
        """Of a folder; None for shards."""
        if not self.source:
            raise UserError(f"{self.where} is empty: give a folder of real images, or shards")
        if not isinstance(self.source, str) or not Path(self.source).is_dir():
            return None
        if not (found := image_files(Path(self.source))):
            raise UserError(f"{self.where}: no image ({', '.join(IMAGE_EXTENSIONS)}) in {self.source}: check the path")
        return found

    def units(self) -> list[str]:
        if self.files is None:
            return expand(self.source, self.where)
        return [f"{start}-{min(start + NUM_FILES, len(self.files))}" for start in range(0, len(self.files), NUM_FILES)]

    def count(self) -> int | None:
        return None if self.files is None else len(self.files)

    def read(self, unit: str, rejects: list[Reject]) -> Iterator[Given]:
        if self.files is not None:
            start, _, stop = unit.partition("-")
            for path in self.files[int(start):int(stop)]:
                yield str(path), path.read_bytes(), None
            return
        for sample in read_shard(unit, rejects):
            try:
                yield sample.uid, sample.image_bytes, None
            except BadSample as error:
                rejects.append(Reject(sample.shard, sample.key, error.reason, error.detail))

    def decode(self, given: Given) -> Image.Image:
        return decode_image(given[1]) if self.files is None else _whole(given)

    def identity(self) -> Any:
        if self.files is not None:
            return folder_identity(Path(str(self.source)))
        urls = expand(self.source, self.where)
        found = identities(urls)
        return [found.get(url) or identity(url) for url in urls]

    def are_kept(self) -> bool:
        return True


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and those below it, sorted; hidden files are none. `UserError` for a broken link."""
    extensions = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in extensions
                   and not path.name.startswith(".") and not path.is_dir())
    if broken := [path for path in found if not path.is_file()]:
        raise UserError(f"{printable(broken[0])} is a link to nothing: delete it, or mend it")
    return found


def _whole(given: Given) -> Image.Image:
    try:
        return decode_image(given[1])
    except BadSample as error:
        raise UserError(f"{given[0]} is not a whole image ({error.reason}): delete or replace it, and run again"
                        ) from None
