"""Shards of drawn scenes, as img2dataset writes them of the web, with an exact description beside the alt-text."""

import io
import json
from pathlib import Path
from random import Random

from recap.errors import UserError
from recap.progress import bar, say
from recap.sample import Sample
from recap.shards import ShardWriter, write_bytes, write_json
from recap.world import marker
from recap.world.scene import draw_scene, render
from recap.world.words import alt_text, describe, prompts

FORMAT = 1
"""Raised when the same settings would give other shards."""
SHARD_SIZE = 64
NUM_PROMPTS = 36


def draw(out: Path, num_images: int = 256, size: int = 64, seed: int = 0, num_eval: int = 64) -> None:
    """Draw `OUT/train/*.tar`, held-out `OUT/eval/*.tar` and `OUT/prompts.txt` (a prompt a line).

    Every scene has its own seed, so the first images of a larger drawing are those of a smaller one; the same settings
    give the same bytes. Does nothing where it has been done.

    Args:
        out: folder to write to.
        num_images: images in `train`, 64 a shard.
        size: side of the square images, in pixels.
        seed: of the whole world.
        num_eval: images in `eval`.

    Raises:
        UserError: a number below one, a size below 16, or `out` holds a drawing of other settings.
    """
    if num_images < 1 or num_eval < 1:
        raise UserError(f"cannot draw {min(num_images, num_eval)} images: give at least 1")
    if size < 16:
        raise UserError(f"size {size}: give at least 16 pixels, below which the shapes cannot be told apart")
    settings = {"format": FORMAT, "num_images": num_images, "num_eval": num_eval, "size": size, "seed": seed}
    if marker.is_done(out, settings):
        say(f"{out}: the drawing is there already")
        return
    with bar("draw", total=num_images + num_eval) as progress:
        for split, number in (("train", num_images), ("eval", num_eval)):
            for first in range(0, number, SHARD_SIZE):
                count = min(SHARD_SIZE, number - first)
                _write_shard(out / split, first // SHARD_SIZE, count, size, f"{seed}/{split}")
                progress.update(count)
    lines = prompts(Random(f"{seed}/prompts"), NUM_PROMPTS)
    write_bytes(str(out / "prompts.txt"), "".join(f"{line}\n" for line in lines).encode())
    marker.finish(out, settings)
    say(f"{out}: {num_images} images to train on, {num_eval} held out, {len(lines)} prompts")


def _write_shard(folder: Path, shard: int, count: int, size: int, seed: str) -> None:
    """Write one shard, then its statistics under the names that img2dataset gives them."""
    name = f"{shard:05d}"
    with ShardWriter(str(folder / f"{name}.tar")) as writer:
        for index in range(count):
            key = f"{name}{index:04d}"
            writer.write(Sample(name, key, _members(key, size, Random(f"{seed}/{shard * SHARD_SIZE + index}"))))
    write_json(str(folder / f"{name}_stats.json"),
               {"count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0,
                "status_dict": {"success": count}})


def _members(key: str, size: int, rng: Random) -> dict[str, bytes]:
    scene = draw_scene(rng)
    exact = describe(scene, rng)
    alt_kind, alt = alt_text(scene, rng)
    image = io.BytesIO()
    render(scene, size).save(image, "PNG")
    metadata = {"key": key, "width": size, "height": size, "original_width": size, "original_height": size,
                "status": "success", "error_message": None, "caption": alt, "url": None,
                "alt_text_kind": alt_kind, "scene": scene.metadata(size)}
    return {"png": image.getvalue(), "txt": alt.encode(), "json": json.dumps(metadata).encode(),
            "exact.txt": exact.encode()}
