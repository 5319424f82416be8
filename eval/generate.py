"""Every prompt → pictures, by one arm's pipeline, in shards. The same noise for every arm, whoever draws it; resumable.

A shard of pictures is the unit of work, and its stats, written last, mark it as done. `eval/drawn.py` reads them.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import CLIPTokenizer

from eval.config import Generate
from eval.drawn import FORGOTTEN_FILE, THUMBNAILS_FILE, Drawn, is_done, is_loose, read_list, shards
from eval.prompts import PROMPTS_FILE, Prompt, load_prompts
from eval.thumbnails import write_thumbnails
from recap import engines, progress
from recap.chunks import split
from recap.config import Model
from recap.engines import Report, Result
from recap.errors import UserError
from recap.memory import in_halves, is_out_of_memory
from recap.meter import Meter
from recap.pretrained import load_pretrained
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shard_work import NUM_DECODERS, Stats, ahead, reasons, stats_of, stats_url
from recap.shards import ShardWriter, shard_name
from recap.storage import clean, remove, write_bytes, write_json
from train_t2i.sample import draw, image_seed, load_pipeline, plan


@dataclass(frozen=True)
class Job:
    """All that a worker has to know, wherever it is."""

    out: Path
    pipeline: Model
    where: str
    config: Generate

    def open(self, device: str, report: Report) -> AbstractContextManager["Drawer"]:
        return nullcontext(Drawer(self, device, report))


def run(stage: StageDir, pipeline: Model, where: str, config: Generate, arm: str, device: str) -> dict[str, Any]:
    """List the pictures in `prompts.jsonl`, and draw them into shards `00000.tar` and so on.

    A line of the list holds `index`, `prompt`, `set`, `about`, `seed`, `windows`, `prompt_index`. A shard holds
    `{index:08d}.png` and `.txt` (the prompt) of `shard_size` pictures, in the order of the list.

    To resume, run the same again. Which prompts share a batch is fixed within a shard, so that neither an interruption
    nor the number of workers can change a byte. In batches of another size, sums may round otherwise: of the shipped
    tiny pipeline, two pixels in 100,000 then differ, by one level of 256.

    Args:
        stage: begun by the caller, whose fingerprint covers prompts, pipeline and config.
        pipeline: hub id or diffusers folder of the arm.
        where: the table that names it, for messages.
        config: prompts, steps, guidance, seed, batch size, who draws.
        arm: its name, for the bar.
        device: a torch device; `cuda` for all GPUs.

    Returns:
        `num_images`, `num_prompts`, and `num_windows`: number of CLIP windows → prompts of that length.

    Raises:
        UserError: there are no prompts, or no such pipeline, or its device does not suffice; or ranks were lost.
    """
    is_main = progress.is_main()  # which tells the other ranks what there is to draw
    prompts = load_prompts(config) if is_main else []
    windows = _windows(prompts, pipeline, where) if is_main else []
    pictures = listed(prompts, config)
    paths = [str(stage.path / f"{number:05d}.tar") for number in range(-(-len(pictures) // config.shard_size))]
    if is_main:
        _forget_nothing(stage.path)
        _write_list(stage.path, pictures, windows)
    left = [path for path in paths if not is_done(Path(path))]
    finished = [_stats(path, stage.path, _pictures_of(path, pictures, config)) for path in paths if path not in left]
    job = Job(stage.path, pipeline, where, config)
    with Meter(stage.path, len(pictures) if is_main else None, len(paths), finished, f"generate {arm}") as meter:
        if left or progress.num_processes() > 1:
            for path, stats in engines.work(job, left, config.engine, config.workers, device, meter):
                stage.log(event="shard", shard=shard_name(path), **stats)
                meter.shard(path, stats["count"], reasons(stats))
    if not is_main:
        return {}
    clean(str(stage.path))  # what lost workers have left
    if missing := [path for path in paths if not is_done(Path(path))]:
        raise UserError(f"generate: {len(missing)} of {len(paths)} shards are not drawn, {missing[0]} first, though no "
                        "rank is at work any more: run the same command again")
    return {"num_images": len(pictures), "num_prompts": len(prompts),
            "num_windows": {str(count): n for count, n in sorted(Counter(windows).items())}}


def listed(prompts: list[Prompt], config: Generate) -> list[Drawn]:
    """The pictures to draw: all of the first prompt, all of the second, and so on."""
    return [Drawn(prompt_index * config.num_images_per_prompt + copy, prompt, prompt_index,
                  image_seed(config.seed + copy, place))
            for prompt_index, (prompt, place) in enumerate(zip(prompts, places_in_sets(prompts), strict=True))
            for copy in range(config.num_images_per_prompt)]


def places_in_sets(prompts: list[Prompt]) -> list[int]:
    """The place of each prompt in its set: its noise goes by that, so that no other set can change its picture."""
    found: Counter[str] = Counter()
    places = []
    for prompt in prompts:
        places.append(found[prompt.set])
        found[prompt.set] += 1
    return places


def _windows(prompts: list[Prompt], pipeline: Model, where: str) -> list[int]:
    """How many CLIP windows each prompt fills, by the pipeline's own tokenizer alone."""
    tokenizer = load_pretrained(CLIPTokenizer.from_pretrained, pipeline, where, subfolder="tokenizer")
    return [len(split(prompt.text, tokenizer).ids) for prompt in prompts]


def _write_list(folder: Path, pictures: list[Drawn], windows: list[int]) -> None:
    rows = [{"index": each.index, "prompt": each.prompt.text, "set": each.prompt.set, "about": each.prompt.about,
             "seed": each.seed, "windows": windows[each.prompt_index], "prompt_index": each.prompt_index}
            for each in pictures]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(str(folder / PROMPTS_FILE), text.encode())


def _pictures_of(path: str, pictures: list[Drawn], config: Generate) -> list[Drawn]:
    """What goes into a shard, by its number."""
    first = int(shard_name(path)) * config.shard_size
    return pictures[first:first + config.shard_size]


def _stats(path: str, out: Path, drawn: list[Drawn]) -> Stats:
    return stats_of(path, out, len(drawn), [])


# --- one worker ----------------------------------------------------------------------------------------------------


class Drawer:
    """Draws shards, one after the other, on one device."""

    def __init__(self, job: Job, device: str, report: Report) -> None:
        self.job, self.config, self.report = job, job.config, report
        self.pipe = load_pipeline(job.pipeline, job.where, device)
        self.pictures = read_list(job.out)

    def process(self, paths: Iterable[str]) -> Iterator[Result]:
        """Shards with their stats, which mark their end."""
        for path in paths:
            drawn = _pictures_of(path, self.pictures, self.config)
            remove(stats_url(str(self.job.out), path))  # an earlier try's, whose shard is gone
            with ShardWriter(path) as writer:
                for sample in _in_order(path, drawn, ahead(_encoded, self._draw(path, drawn), NUM_DECODERS)):
                    writer.write(sample)
            stats = _stats(path, self.job.out, drawn)
            write_json(stats_url(str(self.job.out), path), stats)
            yield path, stats

    def _draw(self, path: str, drawn: list[Drawn]) -> Iterator[tuple[int, Image.Image]]:
        """Place in the shard, and picture; prompts of one number of windows after those of another."""
        done = 0
        for batch in plan(self.pipe, [each.prompt.text for each in drawn], self.config.batch_size):
            yield from zip(batch, self._draw_batch([drawn[place] for place in batch]), strict=True)
            done += len(batch)
            self.report(path, done, {})

    def _draw_batch(self, drawn: list[Drawn]) -> list[Image.Image]:
        """A picture each; where the memory does not suffice for all at once, of one half after the other."""
        try:
            return in_halves(self._draw_some, drawn)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("generate: the device's memory does not suffice for a single picture: take another "
                            "device") from error


    def _draw_some(self, drawn: list[Drawn]) -> list[Image.Image]:
        pictures = np.asarray(draw(
            self.pipe, [each.prompt.text for each in drawn], [each.seed for each in drawn if each.seed is not None],
            num_inference_steps=self.config.num_inference_steps, guidance_scale=self.config.guidance_scale,
            output_type="np"))
        if broken := [each for each, picture in zip(drawn, pictures, strict=True) if not np.isfinite(picture).all()]:
            raise UserError(f"generate: {self.job.pipeline.model} draws no finite numbers of "
                            f"{broken[0].prompt.text[:80]!r}, which as a picture would be black: its weights are "
                            "damaged, or the guidance scale is too high")
        images: list[Image.Image] = self.pipe.image_processor.numpy_to_pil(pictures)
        return images


def _in_order(path: str, drawn: list[Drawn], pictures: Iterable[tuple[int, bytes]]) -> Iterator[Sample]:
    """The shard's samples; what is drawn before its turn waits."""
    waiting: dict[int, bytes] = {}
    written = 0
    for place, png in pictures:
        waiting[place] = png
        while written in waiting:
            members = {"png": waiting.pop(written), "txt": drawn[written].prompt.text.encode()}
            yield Sample(shard_name(path), f"{drawn[written].index:08d}", members)
            written += 1


def _encoded(picture: tuple[int, Image.Image]) -> tuple[int, bytes]:
    """PNG and never JPEG: compression alone moves FID."""
    place, image = picture
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return place, buffer.getvalue()


# --- pictures that are not kept ------------------------------------------------------------------------------------


def forget(folder: Path) -> None:
    """Delete the pictures that `run` drew, once they are measured; of some, `thumbnails.tar` remains.

    The list and the stats stay, and a file `forgotten` says why there is no more. Killed, it can be called again; for
    what is forgotten already, and for what other tools drew, it does nothing.

    Raises:
        UserError: pictures are missing or damaged.
    """
    if is_loose(folder) or any(each.file for each in read_list(folder)):
        return
    if not (folder / FORGOTTEN_FILE).is_file():
        shards(folder)  # all are there
        write_thumbnails(folder)
        write_bytes(str(folder / FORGOTTEN_FILE), b"")  # from here on, no shard is missed
    for path in folder.glob("*.tar"):
        if path.name != THUMBNAILS_FILE:
            path.unlink(missing_ok=True)


def _forget_nothing(folder: Path) -> None:
    """Have forgotten pictures drawn again. The mark goes last, so that half of this is not taken for the whole."""
    if (folder / FORGOTTEN_FILE).is_file():
        for path in [*folder.glob("*_stats.json"), folder / THUMBNAILS_FILE, folder / FORGOTTEN_FILE]:
            path.unlink(missing_ok=True)
