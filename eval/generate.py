"""Every prompt → a picture, by one arm's pipeline. The same noise for every arm, whatever the batch; resumable."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from eval.config import Generate
from eval.prompts import PROMPTS_FILE, Prompt, load_prompts
from recap import progress
from recap.config import Model
from recap.rundir import StageDir
from recap.storage import write_bytes
from train_t2i.sample import draw, image_seed, load_pipeline, num_windows, plan


def run(stage: StageDir, pipeline: Model, where: str, config: Generate, arm: str, device: str) -> dict[str, Any]:
    """Draw prompt i to `stage.path/0000i.png`, and list the prompts in `prompts.jsonl`.

    A line holds `index`, `prompt`, `set`, `about`, `seed`, `windows`.

    To resume, run the same again. A batch with a missing picture is drawn whole: which prompts share a batch is fixed
    by the plan, so an interruption cannot change a pixel.

    Args:
        stage: begun by the caller, whose fingerprint covers prompts, pipeline and config.
        pipeline: hub id or diffusers folder of the arm.
        where: the table that names it, for messages.
        config: prompts, steps, guidance, seed, batch size.
        arm: its name, for the bar.
        device: a torch device.

    Returns:
        `num_images`, and `num_windows`: number of CLIP windows → prompts of that length.
    """
    prompts = load_prompts(config)
    pipe = load_pipeline(pipeline, where, device)
    seeds = [image_seed(config.seed, place) for place in places_in_sets(prompts)]
    texts = [prompt.text for prompt in prompts]
    windows = [num_windows(pipe, text) for text in texts]
    _list_prompts(stage.path, prompts, seeds, windows)
    batches = plan(pipe, texts, config.batch_size)
    missing = [batch for batch in batches if not all(image_path(stage.path, index).is_file() for index in batch)]
    done = len(prompts) - sum(map(len, missing))
    with progress.bar(f"generate {arm}", len(prompts), done) as bar:
        for batch in missing:
            drawn = draw(pipe, [texts[index] for index in batch], [seeds[index] for index in batch],
                         num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale)
            for index, image in zip(batch, drawn, strict=True):
                write_bytes(str(image_path(stage.path, index)), _png(image))
            bar.update(len(batch))
    return {"num_images": len(prompts), "num_windows": {str(count): n for count, n in sorted(Counter(windows).items())}}


def places_in_sets(prompts: list[Prompt]) -> list[int]:
    """The place of each prompt in its set: its noise goes by that, so that no other set can change its picture."""
    found: Counter[str] = Counter()
    places = []
    for prompt in prompts:
        places.append(found[prompt.set])
        found[prompt.set] += 1
    return places


def image_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"


def _list_prompts(folder: Path, prompts: list[Prompt], seeds: list[int], windows: list[int]) -> None:
    rows = [{"index": index, "prompt": prompt.text, "set": prompt.set, "about": prompt.about, "seed": seed,
             "windows": count}
            for index, (prompt, seed, count) in enumerate(zip(prompts, seeds, windows, strict=True))]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(str(folder / PROMPTS_FILE), text.encode())


def _png(image: Image.Image) -> bytes:
    """PNG and never JPEG: compression alone moves FID."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
