"""A captioner's captions of images that it has not seen, and what they are scored with."""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.captioner_scores import Scored
from recap import progress
from recap.caption_sets import CaptionedImage
from recap.captioners import Captioner, Tunable, open_captioner
from recap.config.finetune import Augment
from recap.pairs import Pair, open_image
from recap.pipeline import Experiment, Plan, Stage, captioner_checkpoint, given_tuned
from recap.rundir import StageDir
from recap.storage import write_json


@dataclass(frozen=True)
class Unseen:
    """Images with references, which no captioner of a comparison learns from."""

    reads: Callable[[], dict[str, Any]]
    """What they depend on."""
    images: Callable[[Path], list[CaptionedImage]]
    """They themselves; what can't be read is listed in the folder."""
    batch_size: int
    """Images captioned at once."""


@dataclass(frozen=True)
class Contestant:
    """A captioner of the comparison."""

    name: str
    exp: Experiment
    """Its own: the experiment with its values, in a folder of its own."""
    unseen: Unseen

    @functools.cached_property
    def finetune(self) -> Stage | None:
        """Its tuning; none of a base as it is, and of one that was tuned before."""
        return Plan(self.exp).finetune(None) if self.exp.captioner.tuned is None else None

    @property
    def tuned(self) -> str:
        return "here" if self.finetune else "no" if self.exp.captioner.tuned == "none" else "before"

    @property
    def captions(self) -> Stage:
        """Its captions of the unseen images."""
        exp, finetune, plan = self.exp, self.finetune, Plan(self.exp)

        def reads() -> dict[str, Any]:
            return {"tuned": finetune.dir.fingerprint if finetune else given_tuned(exp.captioner)[1],
                    "captioner": exp.captioner.own(), "checkpoint": captioner_checkpoint(exp.captioner),
                    "styles": exp.styles, **self.unseen.reads()}

        def work(stage: StageDir) -> dict[str, Any]:
            tuned = (finetune.path / finetune.dir.result()["chosen"] if finetune else given_tuned(exp.captioner)[0])
            captioner = open_captioner(exp.captioner, plan.device, tuned)
            return _caption(stage, self.unseen.images(stage.path), captioner, exp, self.unseen.batch_size)

        return Stage("caption", plan.root / "captions", reads, work, [finetune] if finetune else [])

    def scored(self, metrics: list[str], downstream: dict[str, dict[str, Any]]) -> Scored:
        """Its captions, and all that their figures are made of."""
        stage = self.captions
        return Scored(
            name=self.name, family=self.exp.captioner.family, tuned=self.tuned, styles=list(self.exp.styles),
            images=self.unseen.images(stage.path), captions=json.loads((stage.path / "captions.json").read_bytes()),
            training=self.finetune.dir.result() if self.finetune else {}, captioning=stage.dir.result(),
            downstream=downstream, judge=self.exp.evaluate.judge, device=Plan(self.exp).device, metrics=metrics,
            clip=self.exp.evaluate.clip_score)


def _caption(stage: StageDir, images: list[CaptionedImage], captioner: Captioner, exp: Experiment,
             batch_size: int) -> dict[str, Any]:
    """Caption every test image in every style that there are references of.

    Returns:
        How many images, how large the captioner is, and by style how many images/s it would caption in that one alone.
    """
    known = [style for style in exp.styles if any(style == kind for image in images for kind, _ in image.captions)]
    captions: dict[str, dict[str, dict[str, Any]]] = {style: {} for style in known}
    encoding, seconds = 0.0, dict.fromkeys(known, 0.0)
    with progress.bar("caption", len(images)) as bar:
        for start in range(0, len(images), batch_size):
            batch = images[start:start + batch_size]
            pictures = [open_image(Pair(image.uid, image.image, "", ""), Augment(), "") for image in batch]
            started = time.perf_counter()
            features = captioner.encode(captioner.preprocess(pictures))
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # else the first style would be charged with it
            encoding += time.perf_counter() - started
            for style in known:
                started = time.perf_counter()
                for image, found in zip(batch, captioner.caption(features, exp.styles[style]), strict=True):
                    captions[style][image.uid] = {"text": found.text, "ended": found.ended}
                seconds[style] += time.perf_counter() - started
            bar.update(len(batch))
    write_json(str(stage.path / "captions.json"), captions)
    count = sum(p.numel() for p in captioner.model.parameters()) if isinstance(captioner, Tunable) else None
    return {"images": len(images), "parameters": count,
            "images_per_second": {style: len(images) / (encoding + spent) for style, spent in seconds.items()}}
