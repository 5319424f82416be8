"""Pictures of fixed prompts and seeds while a training runs, and how good they are.

Nothing of the training's is touched: they are drawn by a pipeline of their own, which is gone afterwards.
"""

import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from recap import checkpoint
from recap.errors import UserError
from recap.memory import free_memory, in_halves, is_out_of_memory
from recap.rundir import StageDir
from recap.storage import write_bytes
from train_t2i import trackers
from train_t2i.config import Train
from train_t2i.encoder import DTYPES
from train_t2i.export import averaged_pipeline
from train_t2i.figures import Figures, share
from train_t2i.sample import draw, image_seed, plan
from train_t2i.sheet import FIGURES, PROMPTS, write_sheet

WHERE = "train.validation.prompts"
Png = bytes


class Validator:
    """Draws the prompts at some steps, and shows them all on `validation/index.html` in the stage's folder.

    To resume, run the same again: what was drawn of a step is kept.
    """

    def __init__(self, stage: StageDir, accelerator: Accelerator, config: Train) -> None:
        """Read and open all that will be needed.

        Raises:
            UserError: prompts, models or real images are not there, or earlier pictures are of other prompts.
        """
        assert config.validation is not None  # noqa: S101
        self.accelerator, self.config, self.validation = accelerator, config, config.validation
        self.prompts = read_prompts(Path(self.validation.prompts).expanduser(), self.validation.num_prompts)
        self.seeds = [image_seed(self.validation.seed, index) for index in range(len(self.prompts))]
        self.figures = Figures(self.validation, len(self.prompts), accelerator)
        self.stage, self.folder = stage, stage.path / "validation"
        if accelerator.is_main_process:
            self._claim_folder()

    def is_due(self, step: int) -> bool:
        """Whether to look before step `step`, from 0; after the last one, one looks in any case."""
        return step % self.validation.every == 0

    def look(self, step: int, averages: dict[str, torch.Tensor]) -> dict[str, float]:
        """Draw and measure what `step` steps have come to, and show it. All processes must call it.

        Args:
            step: done so far.
            averages: see `averaged_pipeline`.

        Returns:
            `kid` and `clip_score`, so far as they are asked for.
        """
        folder = self.folder / f"{step:07d}"
        # All processes must go the same way, and the first one's disk is the one that counts.
        figures = broadcast_object_list([_kept(folder) if self.accelerator.is_main_process else None])[0]
        if figures is None:
            figures, pictures = self._drawn_and_measured(averages)
            if self.accelerator.is_main_process:
                _write(folder, pictures, figures)
        if self.accelerator.is_main_process:
            write_sheet(self.folder, self.stage.path.name, self.config, self.prompts)
            trackers.show(self.accelerator, step, self.prompts, folder)
        self.accelerator.wait_for_everyone()
        found: dict[str, float] = figures
        return found

    def _drawn_and_measured(self, averages: dict[str, torch.Tensor]) -> tuple[dict[str, float], dict[int, Png]]:
        """Figures and all pictures by index, in every process; torch's global generators are as they were."""
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.validation.seed)
            mine = self._drawn(averages)
            free_memory()
            figures = self.figures.of(list(mine.values()), [self.prompts[index] for index in mine])
        free_memory()
        return figures, dict(gather_object([(index, _png(picture)) for index, picture in mine.items()]))

    def _drawn(self, averages: dict[str, torch.Tensor]) -> dict[int, Image.Image]:
        """The share of this process; which prompts are drawn in one batch, no number of processes changes."""
        try:
            pipe = averaged_pipeline(self.config, averages, str(self.accelerator.device))
            if self.config.precision != "no":
                pipe.to(DTYPES[self.config.precision])
            pipe.vae.enable_slicing()  # as the training's memory is still held

            def drawn(batch: list[int]) -> list[Image.Image]:
                return draw(pipe, [self.prompts[index] for index in batch], [self.seeds[index] for index in batch],
                            num_inference_steps=self.validation.num_inference_steps,
                            guidance_scale=self.validation.guidance_scale, height=self.config.resolution,
                            width=self.config.resolution)

            batches = plan(pipe, self.prompts, self.validation.batch_size)
            mine = [batches[place] for place in share(len(batches), self.accelerator)]
            return {index: picture for batch in mine for index, picture in zip(batch, in_halves(drawn, batch),
                                                                               strict=True)}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        raise UserError("train.validation: out of memory with one picture at a time beside the training: set "
                        "train.ema_device=\"cpu\" or a lower train.micro_batch_size, or leave [train.validation] out")

    def _claim_folder(self) -> None:
        """List the prompts, unless pictures of others are there already."""
        path = self.folder / PROMPTS
        rows = [{"index": index, "prompt": prompt, "seed": seed}
                for index, (prompt, seed) in enumerate(zip(self.prompts, self.seeds, strict=True))]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(str(path), text)
        elif path.read_bytes() != text:
            raise UserError(f"{WHERE}: the pictures in {self.folder} are of other prompts than those that are in "
                            f"{self.validation.prompts} now: put these back, or delete that folder")


def _kept(folder: Path) -> dict[str, float] | None:
    """The figures of a step that was looked at before."""
    path = folder / FIGURES
    return json.loads(path.read_bytes()) if path.is_file() else None


def _write(folder: Path, pictures: dict[int, Png], figures: dict[str, float]) -> None:
    """Have a step's folder there whole, or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    for index, picture in pictures.items():
        (temporary / f"{index:05d}.png").write_bytes(picture)
    (temporary / FIGURES).write_text(json.dumps(figures))
    checkpoint.publish(temporary, folder)


def _png(picture: Image.Image) -> Png:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


# --- prompts ---------------------------------------------------------------------------------------------------------


def read_prompts(path: Path, most: int) -> list[str]:
    """The first prompts of a text file with one a line, or of JSON lines with `prompt`; empty lines are passed over.

    Raises:
        UserError: there is no such file, or no prompt in it, or a line that is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{WHERE}: cannot read {path} ({error.strerror}): name a text file with a prompt a line, or "
                        "JSON lines with `prompt`") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{WHERE}: {path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    read = _json_prompts if path.suffix in (".jsonl", ".json") else _plain_prompts
    found = list(islice(read(text, path), most))
    if not found:
        raise UserError(f"{WHERE}: no prompt in {path}: write one a line")
    return found


def _plain_prompts(text: str, path: Path) -> Iterator[str]:
    # Not splitlines: it would also split at the odd separators that a prompt may hold.
    return (prompt for line in text.split("\n") if (prompt := " ".join(line.split())))


def _json_prompts(text: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = " ".join(json.loads(line)["prompt"].split())
            prompt.encode()  # JSON can spell lone surrogates, which no file or tokenizer takes
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            prompt = ""
        if not prompt:
            raise UserError(f'{WHERE}: line {number} of {path} is not {{"prompt": "a text"}}: mend or delete it')
        yield prompt
