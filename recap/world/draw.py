"""Shards of drawn scenes, as img2dataset writes them of the web, and prompts to draw by."""

import io
import json
from pathlib import Path
from random import Random
from typing import Any

from recap.chunks import split
from recap.clip_bpe import clip_tokenizer
from recap.errors import UserError
from recap.progress import bar, say
from recap.sample import Sample
from recap.shards import ShardWriter
from recap.storage import clean, write_bytes, write_json
from recap.world import marker
from recap.world.scene import Scene, draw_scene, render
from recap.world.words import (
    alt_text,
    careful_alt_text,
    describe,
    reference_long,
    reference_rich,
    reference_short,
)

FORMAT = 4
"""Raised when the same settings would give other shards."""
WINDOW = 75
"""Content tokens that CLIP reads at once."""
NUM_CUT = 150
"""Prompts over that length that are also drawn whole and cut down to it, at most."""
PROMPTED = ("validation", "evaluation")
"""Splits whose scenes are asked for by prompts."""
HELD_OUT = (*PROMPTED, "reference")
REFERENCES = {"reference-short": reference_short, "reference-long": reference_long, "reference-rich": reference_rich}
SETS = {"reference-short": "reference-short", "reference-long": "reference-long", "rich": "reference-rich",
        "alt-like": "alt"}
"""Prompt set → the caption kind that its prompts are."""
TURNS = ("reference-short", "reference-long", "rich") * 3 + ("alt-like",)
"""Which prompt set a held-out scene goes to, by its number."""


def draw(out: Path, num_train: int = 2000, num_tuning: int = 200, num_validation: int = 200, num_evaluation: int = 2000,
         num_reference: int = 4000, num_base: int = 0, size: int = 32, seed: int = 0, shard_size: int = 250) -> None:
    """Draw `OUT/SPLIT/*.tar` for every split, and `OUT/prompts/{validation,evaluation}/SET.jsonl`.

    Every sample has its alt-text (`KEY.txt`), an exact description (`KEY.exact.txt`) and its alt-text as it would be if
    the web were careful (`KEY.clean.txt`); held-out ones have references as people write them too. Every scene has its
    own seed, so the first images of a larger drawing are those of a smaller one; the same settings give the same bytes.
    Does nothing where it has been done.

    Args:
        out: folder to write to.
        num_train: images to relabel, and to train the arms on.
        num_tuning: images to stitch captions of, and to tune the captioner on.
        num_validation: held-out images for what is chosen (guidance).
        num_evaluation: held-out images for what is reported; as many prompts.
        num_reference: held-out images that FID is measured against. No prompt asks for their scenes: an arm that draws
            what it is asked for would share the luck of these very scenes, and its FID would be too low.
        num_base: images that the base diffusion model was trained on; only `recap world train-base` needs them.
        size: side of the square images, in pixels.
        seed: of the whole world.
        shard_size: samples a shard.

    Raises:
        UserError: a negative number, a size out of 32 to 128, or `out` holds a drawing of other settings.
    """
    counts = {"train": num_train, "tuning": num_tuning, "validation": num_validation, "evaluation": num_evaluation,
              "reference": num_reference, "base": num_base}
    for name, number in counts.items():
        if number < 0:
            raise UserError(f"num_{name} = {number}: give 0 or more")
    if shard_size < 1:
        raise UserError(f"shard_size = {shard_size}: give 1 or more")
    if not 32 <= size <= 128:
        raise UserError(f"size {size}: give 32 to 128 pixels: shapes can be told apart, and models stay tiny")
    settings = {"format": FORMAT, **{f"num_{name}": number for name, number in counts.items()}, "size": size,
                "seed": seed, "shard_size": shard_size}
    if marker.is_done(out, settings):
        say(f"{out}: the drawing is there already")
        return
    marker.begin(out, settings)
    with bar("draw", total=sum(counts.values())) as progress:
        for name, number in counts.items():
            clean(str(out / name))
            for shard, start in enumerate(range(0, number, shard_size)):
                places = range(start, min(start + shard_size, number))
                _write_shard(out, name, shard, places, size, seed)
                progress.update(len(places))
    num_prompts = sum(_write_prompts(out, name, counts[name], seed) for name in PROMPTED)
    marker.finish(out, settings)
    say(f"{out}: {', '.join(f'{number} {name}' for name, number in counts.items() if number)}; {num_prompts} prompts")


def scene_of(split_name: str, index: int, seed: int = 0) -> tuple[Scene, Random]:
    """Scene `index` of a split, and the lots that its words are drawn with."""
    rng = Random(f"{seed}/{split_name}/{index}")
    return draw_scene(rng), rng


# --- shards --------------------------------------------------------------------------------------------------------


def _write_shard(out: Path, split_name: str, shard: int, places: range, size: int, seed: int) -> None:
    """Write one shard, then its statistics under the names that img2dataset gives them."""
    name = f"{shard:05d}"
    with ShardWriter(str(out / split_name / f"{name}.tar")) as writer:
        for index, place in enumerate(places):
            key = f"{name}{index:04d}"
            scene, rng = scene_of(split_name, place, seed)
            texts = _texts(scene, rng, references=split_name in HELD_OUT)
            writer.write(Sample(name, key, _members(key, size, scene, texts)))
    write_json(str(out / split_name / f"{name}_stats.json"),
               {"count": len(places), "successes": len(places), "failed_to_download": 0, "failed_to_resize": 0,
                "status_dict": {"success": len(places)}})


def _texts(scene: Scene, rng: Random, references: bool) -> dict[str, str]:
    """Caption kind → text; of `alt`, also which kind of alt-text it is."""
    alt_kind, alt = alt_text(scene, rng)
    texts = {"alt_kind": alt_kind, "alt": alt, "exact": describe(scene, rng)}
    if references:
        texts |= {name: write(scene, rng) for name, write in REFERENCES.items()}
    return texts | {"clean": careful_alt_text(scene, rng)}


def _members(key: str, size: int, scene: Scene, texts: dict[str, str]) -> dict[str, bytes]:
    image = io.BytesIO()
    render(scene, size).save(image, "PNG")
    metadata = {"key": key, "width": size, "height": size, "original_width": size, "original_height": size,
                "status": "success", "error_message": None, "caption": texts["alt"], "url": None,
                "alt_text_kind": texts["alt_kind"], "scene": scene.metadata(size)}
    captions = {f"{kind}.txt": text.encode() for kind, text in texts.items() if kind not in ("alt", "alt_kind")}
    return {"png": image.getvalue(), "txt": texts["alt"].encode(), "json": json.dumps(metadata).encode(), **captions}


# --- prompts -------------------------------------------------------------------------------------------------------

Row = dict[str, Any]
"""A line of a prompt set."""


def _write_prompts(out: Path, split_name: str, number: int, seed: int) -> int:
    """Write the prompt sets of a held-out split; how many prompts there are."""
    rows: dict[str, list[Row]] = {}
    for index in range(number):
        name = TURNS[index % len(TURNS)]
        scene, rng = scene_of(split_name, index, seed)
        text = _texts(scene, rng, references=True)[SETS[name]]
        rows.setdefault(name, []).append({"prompt": text, "complete": _is_complete(name, text)})
    rows["rich-whole"], rows["rich-cut"] = _over_one_window(rows.get("rich", []))
    for name, prompts in rows.items():
        if prompts:
            lines = "".join(json.dumps(row) + "\n" for row in prompts)
            write_bytes(str(out / "prompts" / split_name / f"{name}.jsonl"), lines.encode())
    return sum(map(len, rows.values()))


def _is_complete(name: str, text: str) -> bool:
    """Whether the prompt names every shape, so that a picture with others is wrong."""
    return name != "alt-like" and "more shapes" not in text


def _over_one_window(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The prompts over CLIP's window, as they are, and cut as trainers and samplers without chunking cut them.

    Both in the same order, so that they are drawn from the same noise; and both judged by the whole prompt.
    """
    tokenizer = clip_tokenizer()
    whole, cut = [], []
    for row in rows:
        ids = [token for window in split(row["prompt"], tokenizer).ids for token in window]
        if len(ids) > WINDOW:
            whole.append(row)
            cut.append({**row, "prompt": tokenizer.decode(ids[:WINDOW]), "asks": row["prompt"]})
    return whole[:NUM_CUT], cut[:NUM_CUT]
