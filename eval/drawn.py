"""What an arm drew, as other stages read it: a list of the pictures, and the pictures in shards.

A folder holds `prompts.jsonl`, a row for each picture, and either what `eval/generate.py` writes (`00000.tar` and so
on, each with the stats that mark it as done), or loose pictures `00000.png` and so on, as other tools write them.
"""

import functools
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from eval.prompts import PROMPTS_FILE, Prompt
from recap.errors import UserError
from recap.shards import Reject, read_shard

THUMBNAILS_FILE = "thumbnails.tar"
FORGOTTEN_FILE = "forgotten"
"""Marks a folder whose pictures were measured and not kept."""
NUM_LOOSE = 256
"""Loose pictures that count as a shard."""
LOOSE_SHARD = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture, by its place among all of the folder, and what it was drawn from."""

    index: int
    prompt: Prompt
    prompt_index: int
    """The place of its prompt among all prompts: pictures of one prompt share it."""
    seed: int | None
    """Of its noise, where that is known."""
    file: Path | None = None
    """Where it lies, if that is elsewhere: the folder then holds no more than the list."""
    is_paired: bool = True
    """Whether another arm's picture of this place is known to belong to it."""


def read_list(folder: Path) -> list[Drawn]:
    """The pictures that there should be, in their order, which is that of the prompts.

    Others than `generate` may write the list, with no more than `index` and `prompt`.

    Raises:
        UserError: there is no list, or it is damaged, or its indices do not count from 0.
    """
    listing = folder / PROMPTS_FILE
    try:
        # Not splitlines: it would also split at the odd separators that a prompt's `about` may hold.
        lines = listing.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        drawn = [_drawn(json.loads(line)) for line in lines]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no {PROMPTS_FILE} in {folder}: run `recap generate` first") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{listing} is damaged: {_again(folder)}") from None
    if wrong := [place for place, each in enumerate(drawn) if each.index != place]:
        raise UserError(f"{listing} is damaged, its line {wrong[0] + 1} is of picture {drawn[wrong[0]].index}: "
                        f"{_again(folder)}")
    return drawn


def _drawn(row: dict[str, Any]) -> Drawn:
    prompt = Prompt(row["prompt"], row.get("set", "prompts"), row.get("about", {}))
    file = row.get("file")
    found = Drawn(row["index"], prompt, row.get("prompt_index", row["index"]), row.get("seed"),
                  None if file is None else Path(file), row.get("is_paired", True) is True)
    if not (isinstance(prompt.text, str) and isinstance(prompt.set, str) and isinstance(prompt.about, dict)
            and _is_count(found.index) and _is_count(found.prompt_index)
            and (found.seed is None or _is_count(found.seed))):
        raise TypeError("not a picture's row")
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _again(folder: Path) -> str:
    return f"delete {folder / 'done.json'}, and run `recap generate` again"


def clusters(drawn: list[Drawn]) -> list[int]:
    """Of each picture a number that it shares with those of the same prompt: by its set and text, as a prompt may stand
    in a file twice; without a text, by the place of its prompt.
    """
    known: dict[Any, int] = {}
    keys = ((each.prompt.set, each.prompt.text) if each.prompt.text else each.prompt_index for each in drawn)
    return [known.setdefault(key, len(known)) for key in keys]


def by_hash(drawn: list[Drawn]) -> list[Drawn]:
    """The pictures in the order in which some are picked to be shown: by prompt, as good as random, the same for every
    arm. What is kept of a folder whose pictures are not, are the first of them.
    """
    return sorted(drawn, key=lambda each: (_hash(each), each.index))


def _hash(each: Drawn) -> str:
    return hashlib.sha256(f"{each.prompt_index}/{each.prompt.text}".encode("utf-8", "surrogateescape")).hexdigest()


# --- shards --------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    """All pictures in shards, in the order of the list, for `pictures`. Each may be read by another process.

    Raises:
        UserError: as `read_list`; pictures are missing, or were not kept.
    """
    drawn = read_list(folder)
    if (folder / FORGOTTEN_FILE).is_file():
        raise UserError(f"{folder}: the pictures were not kept (generate.keep=false): to draw them again, "
                        f"{_again(folder)}")
    if is_loose(folder) or any(each.file for each in drawn):
        missing = [each.index for each in drawn if not (each.file or loose_path(folder, each.index)).is_file()]
        num_missing, found = len(missing), [folder / f"{start:05d}-{min(start + NUM_LOOSE, len(drawn)):05d}"
                                            for start in range(0, len(drawn), NUM_LOOSE)]
    else:
        counts = _counts(folder)
        num_missing, found = len(drawn) - sum(counts.values()), list(counts)
    if num_missing:
        raise UserError(f"{folder}: {num_missing} of {len(drawn)} pictures are missing: {_again(folder)}")
    return found


def pictures(shard: Path, drawn: list[Drawn] | None = None) -> Iterator[tuple[int, bytes]]:
    """Index and PNG of each picture of a shard, in their order.

    Args:
        shard: one of `shards`.
        drawn: its folder's list, where that is read already.

    Raises:
        UserError: the shard is damaged, or does not hold the pictures that it should, one after the other.
    """
    if found := LOOSE_SHARD.fullmatch(shard.name):
        for each in (drawn or read_list(shard.parent))[int(found[1]):int(found[2])]:
            yield each.index, (each.file or loose_path(shard.parent, each.index)).read_bytes()
        return
    counts = _counts(shard.parent)
    first = sum(count for path, count in counts.items() if path.name < shard.name)
    rejects: list[Reject] = []
    num = 0
    for sample in read_shard(str(shard), rejects):
        if "png" in sample.members and sample.key.isdecimal():
            if int(sample.key) != first + num:
                raise _damaged(shard, f"picture {int(sample.key)} stands where {first + num} should")
            yield first + num, sample.members["png"]
            num += 1
    if rejects or num != counts[shard]:
        raise _damaged(shard, rejects[0].reason if rejects else f"{num} pictures, not {counts[shard]}")


def _damaged(shard: Path, why: str) -> UserError:
    return UserError(f"{shard} is damaged ({why}): delete it, and {_again(shard.parent)}")


def iterate(folder: Path) -> Iterator[tuple[Drawn, bytes]]:
    """Every picture, with what it was drawn from."""
    drawn = read_list(folder)
    for shard in shards(folder):
        for index, png in pictures(shard, drawn):
            yield drawn[index], png


def picture(folder: Path, index: int) -> bytes | None:
    """One picture: PNG as it was drawn, else what is kept of it as a thumbnail, JPEG or PNG; None if neither is."""
    file = _files(folder, (folder / PROMPTS_FILE).stat().st_mtime_ns).get(index) or loose_path(folder, index)
    if file.is_file():
        return file.read_bytes()
    counts = _counts(folder)
    first = 0
    for shard, count in counts.items():
        if first <= index < first + count:
            return _member(shard, index)
        first += count
    return _member(folder / THUMBNAILS_FILE, index)


@functools.lru_cache(maxsize=16)
def _files(folder: Path, changed: int) -> dict[int, Path]:
    """Index → file of pictures that lie elsewhere. `changed` is when the list was."""
    return {each.index: each.file for each in read_list(folder) if each.file}


def is_loose(folder: Path) -> bool:
    """Whether another tool drew the pictures, each into a file of its own."""
    return next(folder.glob("[0-9]*.png"), None) is not None


def loose_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"


def is_done(shard: Path) -> bool:
    """Whether a shard is there whole, and marked as done."""
    return shard.is_file() and stats_path(shard).is_file()


def stats_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}_stats.json")


def _counts(folder: Path) -> dict[Path, int]:
    """The shards that are done, and how many pictures each holds."""
    found = [path for path in sorted(folder.glob("*.tar")) if path.stem.isdecimal() and is_done(path)]
    try:
        return {path: int(json.loads(stats_path(path).read_bytes())["count"]) for path in found}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder}: the stats of a shard are damaged: delete its *_stats.json and "
                        f"{folder / 'done.json'}, and run `recap generate` again") from None


def _member(tar: Path, index: int) -> bytes | None:
    """The picture of one index; headers are read up to it, and no other content."""
    try:
        with tarfile.open(tar) as file:
            for info in file:
                if info.size < 0:  # tarfile would read the same header for ever
                    break
                name = Path(info.name)
                if info.isfile() and name.suffix != ".txt" and name.stem.isdecimal() and int(name.stem) == index:
                    return cast(IO[bytes], file.extractfile(info)).read()
    except FileNotFoundError:
        return None
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{tar} is damaged ({error}): delete it, and {_again(tar.parent)}") from None
    return None
