"""A folder of images from anywhere → the list of what each was drawn from, as `generate` writes it beside its own.

Which image is of which prompt is never guessed from the order of files alone: 10.png stands before 2.png there, and
every score would look right and be wrong.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from eval.drawn import is_loose, loose_path, read_list, shards
from eval.images import image_files
from eval.prompts import PROMPTS_FILE, Prompt
from recap.errors import UserError
from recap.rundir import StageDir
from recap.storage import write_bytes

WHERE = "evaluate"
NUMBERED = re.compile(r"(?:\D*[-_ ])?(\d+)(?:[-_](\d+))?")
"""`00012`, `sample_00012`, and, of several pictures of a prompt, `00012-3`."""
IDS = ("id", "item_id", "image_id", "file_name", "filename", "name")
"""What a prompt's row may call the image that is drawn from it."""


@dataclass(frozen=True)
class GivenFolder:
    """A folder of images that is to be measured."""

    path: Path
    files: list[Path]

    @classmethod
    def open(cls, path: Path) -> "GivenFolder":
        """`UserError` where it holds no image, or two of one name.

        The mosaics that GenEval's generation leaves beside its samples are none.
        """
        files = [file for file in image_files(path) if not (file.stem == "grid" and (file.parent / "samples").is_dir())]
        if not files:
            raise UserError(f"{WHERE}: no image in {path}: name a folder of images, or a diffusers pipeline")
        found = cls(path, sorted(files, key=lambda file: file.relative_to(path).with_suffix("").parts))
        if twice := [name for name, after in pairwise(found.names) if name == after]:
            raise UserError(f"{WHERE}: {path} holds two images {twice[0]}: delete one of them, or name it otherwise")
        return found

    @property
    def names(self) -> list[str]:
        """Of its images, without their extensions."""
        return [str(file.relative_to(self.path).with_suffix("")) for file in self.files]


def by_hash(names: list[str]) -> list[str]:
    """In an order that is as good as random, and the same every time."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest())


def take(stage: StageDir, folder: Path, prompts: list[Prompt] | None, only: list[str] | None, paired: bool
         ) -> dict[str, Any]:
    """List a folder's images in `prompts.jsonl`, each with its prompt and its file.

    Args:
        stage: begun by the caller.
        folder: of images, or one that `generate` filled, whose own list is taken.
        prompts: what they were drawn from, if anybody knows.
        only: names of the images to take, where not all are.
        paired: where there are no prompts, whether the n-th image belongs to the n-th of the other folders.

    Returns:
        `num_images`, `num_prompts`.
    """
    if (folder / PROMPTS_FILE).is_file():
        rows = _own_rows(stage, folder)
        _check_same(folder, rows, prompts)
    elif prompts:
        rows = _rows(GivenFolder.open(folder), prompts)
    else:
        given, names = GivenFolder.open(folder), None if only is None else set(only)
        rows = [{"prompt": "", "set": "images", "is_paired": paired, "file": str(file.resolve())}
                for name, file in zip(given.names, given.files, strict=True) if names is None or name in names]
    text = "".join(json.dumps({"index": index, **row}) + "\n" for index, row in enumerate(rows))
    write_bytes(str(stage.path / PROMPTS_FILE), text.encode())
    return {"num_images": len(rows), "num_prompts": len({row.get("prompt_index", index)
                                                         for index, row in enumerate(rows)})}


def _own_rows(stage: StageDir, folder: Path) -> list[dict[str, Any]]:
    """Of a folder with a list: loose pictures are taken where they are, and so are shards, by links to them."""
    drawn, loose = read_list(folder), is_loose(folder)  # or listed by `take`: then each has its file
    shards(folder)  # all are there
    if not loose and not any(each.file for each in drawn):
        for path in [*folder.glob("*.tar"), *folder.glob("*_stats.json")]:
            link = stage.path / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    return [{"prompt": each.prompt.text, "set": each.prompt.set, "about": each.prompt.about, "seed": each.seed,
             "prompt_index": each.prompt_index,
             **({"file": str((each.file or loose_path(folder, each.index)).resolve())} if loose or each.file else {}),
             } for each in drawn]


def _check_same(folder: Path, rows: list[dict[str, Any]], prompts: list[Prompt] | None) -> None:
    """`UserError` where a folder's own list and the prompts that were given differ."""
    own = {row["prompt_index"]: row["prompt"] for row in rows}
    if prompts is not None and [own[place] for place in sorted(own)] != [prompt.text for prompt in prompts]:
        raise UserError(f"{WHERE}: {folder / PROMPTS_FILE} lists other prompts than were given: leave --prompts out, "
                        "or delete that list")


def _rows(given: GivenFolder, prompts: list[Prompt]) -> list[dict[str, Any]]:
    """A row for every image, in the order of the prompts."""
    places = _by_id(given, prompts) or _by_number(given, len(prompts))
    if places is None:
        raise UserError(f"{WHERE}: cannot tell which image of {given.path} ({given.names[0]} first) is of which "
                        "prompt: name them by the numbers of the prompts, 00000.png of the first, or by their ids")
    _check_whole(given, places, prompts)
    ordered = sorted(zip(places, given.names, given.files, strict=True))
    return [{"prompt": prompts[place].text, "set": prompts[place].set, "about": prompts[place].about,
             "prompt_index": place, "file": str(file.resolve())} for place, _, file in ordered]


def _by_number(given: GivenFolder, num_prompts: int) -> list[int] | None:
    """Places of the prompts, of images named by numbers, from 0 or from 1; or in folders named so, as GenEval's."""
    parts = [Path(name).parts for name in given.names]
    is_nested = all(len(each) > 1 and each[0].isdecimal() for each in parts)
    found = [NUMBERED.fullmatch(each[0] if is_nested else each[-1]) for each in parts]
    numbers = [int(match[1]) for match in found if match]
    if len(numbers) < len(parts) or (not is_nested and any(len(each) > 1 for each in parts)):
        return None
    first = 1 if min(numbers) == 1 and max(numbers) == num_prompts else 0
    return [number - first for number in numbers]


def _by_id(given: GivenFolder, prompts: list[Prompt]) -> list[int] | None:
    """Places of the prompts, of images named by ids in their rows; COCO's are numbers with zeros and a name before."""
    for key in IDS:
        known = {Path(str(prompt.about[key])).stem: place for place, prompt in enumerate(prompts)
                 if key in prompt.about}
        found = [known.get(stem, known.get(_number(stem))) for stem in (Path(name).name for name in given.names)]
        if len(known) == len(prompts) and None not in found:
            return [place for place in found if place is not None]
    return None


def _number(name: str) -> str:
    """`42` of `COCO_val2014_000000000042`."""
    return name.rpartition("_")[2].lstrip("0")


def _check_whole(given: GivenFolder, places: list[int], prompts: list[Prompt]) -> None:
    """`UserError` unless every prompt has an image, and each as many as the others."""
    counts = Counter(places)
    if beyond := sorted(place for place in counts if not 0 <= place < len(prompts)):
        name = given.names[places.index(beyond[0])]
        raise UserError(f"{WHERE}: {given.path} has an image {name}, and there are {len(prompts):,} prompts: give the "
                        "prompts that it was drawn from")
    if missing := [place for place in range(len(prompts)) if not counts[place]]:
        raise UserError(f"{WHERE}: {given.path} has {len(places):,} images, none of {len(missing):,} of the "
                        f"{len(prompts):,} prompts, of number {missing[0]} first: draw them, or leave the prompts out")
    if len(set(counts.values())) > 1:
        few = min(counts, key=lambda place: (counts[place], place))
        raise UserError(f"{WHERE}: {given.path} has {counts[few]} images of prompt {few}, and "
                        f"{max(counts.values())} of another: every prompt needs as many")
