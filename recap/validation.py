"""How good a captioner is while it is tuned: its loss and its captions on held-out images."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from eval.caption_tokens import tokenize
from eval.captions import LONG, describe, score_captions
from recap import progress
from recap.caption_sets import ImageRef
from recap.captioners import Tunable
from recap.captioners.text import Caption
from recap.config import Style
from recap.config.finetune import Augment, Finetune
from recap.config.finetune import Validation as Config
from recap.errors import UserError
from recap.pairs import Features, Pair, open_image

NUM_SHOWN = 12
"""Images on a sheet."""


@dataclass(frozen=True, slots=True)
class Row:
    """An image on a sheet."""

    uid: str
    image: ImageRef
    references: dict[str, list[str]]
    """By style."""
    captions: dict[str, Caption]
    """By style."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a look at the captioner found."""

    figures: dict[str, Any] = field(default_factory=dict)
    """`loss`, `cider_d` (mean over styles), `styles` → figures of each; nothing where no image is held out."""
    rows: list[Row] = field(default_factory=list)
    """For the sheet."""


class Validator:
    """Looks at held-out images; where none are, only shows some of those that are trained on."""

    def __init__(self, captioner: Tunable, pairs: list[Pair], held_out: list[Pair], styles: dict[str, Style],
                 config: Finetune, features: Features | None) -> None:
        self.captioner, self.held_out, self.styles = captioner, held_out, styles
        self.config, self.features = config, features
        self.every = config.validation.every or _every(config, len(pairs))
        self.references: dict[ImageRef, dict[str, list[str]]] = {}
        self.uids: dict[ImageRef, str] = {}
        for pair in held_out or pairs:
            self.references.setdefault(pair.image, {}).setdefault(pair.style, []).append(pair.caption)
            self.uids[pair.image] = pair.uid
        self.images = list(self.references)[:config.validation.num_images if held_out else NUM_SHOWN]
        if held_out and config.validation.select_by == "cider_d":
            self._check_cider()

    def _check_cider(self) -> None:
        """Refuse to select by CIDEr-D where there is none, and warn where it says little."""
        scored = {style: found for style in self.styles if len(found := self._with_words(style)) > 1}
        if not scored:
            raise UserError("finetune.validation.select_by: CIDEr-D needs two held-out images of a style at least: "
                            "hold out more, or select by loss")
        for style, images in scored.items():
            texts = [text for image in images for text in self.references[image][style]]
            if sum(len(tokenize(text)) for text in texts) > LONG * len(texts):
                progress.warn(f"captions of style {style} have more than {LONG} words: CIDEr-D is near 0 even for good "
                              "ones, so select by loss")

    def _with_words(self, style: str) -> list[ImageRef]:
        """The images with a reference of the style that has words, not only signs: n-grams score these alone."""
        return [image for image in self.images if any(map(tokenize, self.references[image].get(style, [])))]

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.config.steps

    @torch.no_grad()
    def look(self, accelerator: Accelerator) -> Found:
        """Loss and captions. The processes share the work, and each ends with the whole."""
        mine = self.images[accelerator.process_index::accelerator.num_processes]
        spoken: dict[ImageRef, dict[str, Caption]] = dict(gather_object(list(self._captions(mine))))
        rows = [Row(self.uids[image], image, self.references[image], spoken[image]) for image in self.images]
        if not self.held_out:
            return Found({}, rows[:NUM_SHOWN])
        by_style = {style: self._figures(style, images, spoken) for style in self.styles
                    if (images := self._with_words(style))}
        known = [figures["cider_d"] for figures in by_style.values() if "cider_d" in figures]
        overall = {"cider_d": sum(known) / len(known)} if known else {}
        return Found({"loss": self._loss(accelerator), **overall, "styles": by_style}, rows[:NUM_SHOWN])

    def _captions(self, images: list[ImageRef]) -> Iterator[tuple[ImageRef, dict[str, Caption]]]:
        wanted = {style for image in images for style in self.references[image]}
        size = self.config.micro_batch_size or self.config.batch_size
        for start in range(0, len(images), size):
            part = images[start:start + size]
            features = self._features([Pair(self.uids[image], image, "", "") for image in part])
            by_style = {style: self.captioner.caption(features, settings) for style, settings in self.styles.items()
                        if style in wanted}
            for place, image in enumerate(part):
                yield image, {style: found[place] for style, found in by_style.items()}

    def _loss(self, accelerator: Accelerator) -> float:
        """Mean over the tokens of all held-out captions."""
        sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        mine = self.held_out[accelerator.process_index::accelerator.num_processes]
        size = self.config.micro_batch_size or self.config.batch_size
        for start in range(0, len(mine), size):
            part = mine[start:start + size]
            loss = self.captioner.loss(self._features(part), [self.styles[pair.style].prompt for pair in part],
                                       [pair.caption for pair in part])
            num_tokens = sum(self.captioner.num_tokens(pair.caption) for pair in part)
            sums += torch.tensor([loss.item() * num_tokens, num_tokens], dtype=torch.float64, device=sums.device)
        total, count = accelerator.reduce(sums, "sum").tolist()
        return float(total / count)

    def _features(self, pairs: list[Pair]) -> Any:
        if self.features is not None:
            return self.features.of(pairs)
        images = [open_image(pair, Augment(), "") for pair in pairs]
        return self.captioner.encode(self.captioner.preprocess(images))

    def _figures(self, style: str, images: list[ImageRef],
                 spoken: dict[ImageRef, dict[str, Caption]]) -> dict[str, Any]:
        """What `score_captions` finds of one style's captions; without n-gram scores where there is one image alone."""
        captions = [spoken[image][style] for image in images]
        texts, references = [caption.text for caption in captions], [self.references[image][style] for image in images]
        found = score_captions(texts, references).values if len(images) > 1 else describe(texts, references)
        return {**found, "ended": sum(caption.ended for caption in captions) / len(captions)}


def is_better(value: float, best: float | None, config: Config) -> bool:
    """Whether a validation is the best so far; a first one is."""
    if best is None:
        return not math.isnan(value)
    return value < best if config.select_by == "loss" else value > best


def _every(config: Finetune, num_pairs: int) -> int:
    """An epoch, or a tenth of the steps where that is longer."""
    return max(math.ceil(num_pairs / config.batch_size), math.ceil((config.steps or 1) / 10))
