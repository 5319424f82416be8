"""Tune a captioner on captions in several styles. To resume, run the same command again.

    caption_sets.py (which images) → pairs.py (which batches) → training.py (steps) → validation.py, sheet.py (how good)

Several processes (torchrun, accelerate launch) share every batch; on the CPU a resumed run ends with equal bits.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from recap import progress
from recap.caption_sets import CaptionedImage, read_dataset, read_shards, split
from recap.captioners import Tunable, open_tunable
from recap.config import Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.config.finetune import Dataset, Finetune
from recap.errors import UserError
from recap.pairs import Batches, Features, Pair, to_pairs, usable
from recap.processes import one_voice, open_accelerator
from recap.rundir import StageDir
from recap.shards import Reject, expand
from recap.training import Training, with_steps
from recap.validation import Validator

FEATURES = "features.npy"
QUARANTINE = "quarantine.jsonl"


def run(stage: StageDir, shards: list[str], config: Finetune, captioner_config: CaptionerConfig,
        styles: dict[str, Style], device: str) -> dict[str, Any]:
    """Train on every (image, caption) pair; `stage.path/best` or, without validation, `last` is the result.

    Args:
        stage: where log, checkpoints, sheets and results go.
        shards: with the captions to learn, unless `config.dataset` has them.
        styles: what the captioner is asked, and how captions are decoded for validation.
        device: `cpu` keeps accelerate off the GPUs; else it takes those it finds.
    """
    accelerator = open_accelerator(config.precision, device)
    with one_voice(accelerator):
        return _run(accelerator, stage, shards, config, captioner_config, styles)


def _run(accelerator: Accelerator, stage: StageDir, shards: list[str], config: Finetune,
         captioner_config: CaptionerConfig, styles: dict[str, Style]) -> dict[str, Any]:
    if config.batch_size < accelerator.num_processes:
        raise UserError(f"finetune.batch_size={config.batch_size} is less than the {accelerator.num_processes} "
                        "processes that share a batch: raise it")
    torch.manual_seed(config.seed)  # the first weights of what is new; twice, as reading the images may draw, too
    captioner = open_tunable(captioner_config, str(accelerator.device))
    with accelerator.main_process_first():  # it leaves what it found for the others to read
        held_in, held_out = read_images(stage.path, shards, config, styles)
    torch.manual_seed(config.seed)
    captioner.prepare(config, [caption for image in held_in for _, caption in image.captions])
    pairs, validation, num_cut = _pairs(held_in, held_out, styles, captioner, config)
    config = with_steps(config, len(pairs))
    with accelerator.main_process_first():
        features = _kept(stage.path, [*pairs, *validation], captioner, config) if config.cache_features else None
    batches = Batches(pairs, config, captioner.num_tokens, None if features else captioner.preprocess,
                      accelerator.process_index, accelerator.num_processes)
    validator = Validator(captioner, pairs, validation, styles, config, features)
    training = Training(stage, accelerator, captioner, styles, config, features)
    with progress.bar("finetune", training.num_steps * config.batch_size, training.done * config.batch_size) as bar:
        for parts in batches.loader(range(training.done, training.num_steps)):
            if training.has_stopped:  # asked first: a run that was killed after its last step must take no other
                break
            training.step(parts, bar)
            if validator.is_due(training.done):
                training.validate(validator)
            if training.done % config.checkpoint_every == 0:
                training.save()
    result = training.finish() | {"images": len(held_in), "pairs": len(pairs), "captions_cut": num_cut}
    (stage.path / FEATURES).unlink(missing_ok=True)
    return result


# --- data ----------------------------------------------------------------------------------------------------------


def read_images(folder: Path, shards: list[str], config: Finetune,
                styles: dict[str, Style]) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """The images to train on, and those held out: no image is in both."""
    images = _usable(folder / QUARANTINE, *_read(shards, config.dataset, styles), config)
    held_in, _ = split(images, config.test_share, config.seed)
    validation = config.validation
    if validation.shards or validation.dataset:
        given = expand(validation.shards, "finetune.validation.shards") if validation.shards else []
        found = _read(given, validation.dataset, styles)
        held_out = _usable(folder / "validation_quarantine.jsonl", *found, config)
        _check_apart(images, held_out)
        return held_in, held_out
    return split(held_in, validation.share, config.seed) if validation.share else (held_in, [])


def _check_apart(images: list[CaptionedImage], held_out: list[CaptionedImage]) -> None:
    both = {image.image for image in images} & {image.image for image in held_out}
    if both:
        raise UserError(f"finetune.validation: {len(both)} of its {len(held_out)} images are among those to train and "
                        f"test on, as {min(image.url for image in both)}: name others, or set validation.share")


def read_test_images(folder: Path, shards: list[str], config: Finetune,
                     styles: dict[str, Style]) -> list[CaptionedImage]:
    """The images that are neither trained nor validated on; `folder` gets a quarantine file, as fine-tuning's has."""
    images = _usable(folder / QUARANTINE, *_read(shards, config.dataset, styles), config)
    return split(images, config.test_share, config.seed)[1]


def _usable(path: Path, images: list[CaptionedImage], rejects: list[Reject], config: Finetune) -> list[CaptionedImage]:
    found = usable(images, rejects, path, config.num_workers)
    if not found:
        raise UserError(f"finetune: none of {len(images)} images can be decoded: see {path}")
    return found


def _read(shards: list[str], dataset: Dataset | None,
          styles: dict[str, Style]) -> tuple[list[CaptionedImage], list[Reject]]:
    if dataset is None:
        return read_shards(shards, styles)
    images, rejects = read_dataset(dataset)
    known = [image for image in images if any(style in styles for style, _ in image.captions)]
    if not known:
        found = sorted({style for image in images for style, _ in image.captions})
        raise UserError(f"finetune.dataset: {dataset.captions} has captions of the styles {', '.join(found)}, and none "
                        f"of {', '.join(styles)}: define [styles.{found[0]}], or set finetune.dataset.style")
    return known, rejects


def _pairs(held_in: list[CaptionedImage], held_out: list[CaptionedImage], styles: dict[str, Style], captioner: Tunable,
           config: Finetune) -> tuple[list[Pair], list[Pair], int]:
    pairs, num_cut = to_pairs(held_in, styles, captioner, config.max_tokens)
    validation, cut_too = to_pairs(held_out, styles, captioner, config.max_tokens)
    if num_cut + cut_too:
        progress.warn(f"{num_cut + cut_too} captions were longer than finetune.max_tokens={config.max_tokens}, or "
                      "than the captioner has positions for, and cut at a sentence end")
    if not pairs:
        raise UserError("finetune: no caption is left after the cut: raise finetune.max_tokens")
    return pairs, validation, num_cut


def _kept(folder: Path, pairs: list[Pair], captioner: Tunable, config: Finetune) -> Features:
    if captioner.encoder_is_trained:
        raise UserError("finetune.cache_features: what is trained includes the vision model, so its features change: "
                        "leave it out")
    features = Features(folder / FEATURES, pairs, captioner.device)
    features.fill(captioner, config.micro_batch_size or config.batch_size)
    return features
