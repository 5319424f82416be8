"""Captioners: one protocol, one file for each family.

A captioner turns pixels into features, once an image, and features into captions in any style; and, to be tuned, into a
loss. What it writes is the format that the family's users know.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from PIL import Image
from torch import nn

from recap.captioners.text import Caption, Text
from recap.config import Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.config.finetune import Finetune
from recap.errors import UserError
from recap.progress import warn

REGISTRY = {
    "blip2": "recap.captioners.blip2:Blip2",
    "blip": "recap.captioners.blip:Blip",
    "clipcap": "recap.captioners.clipcap:ClipCap",
    "transformer": "recap.captioners.transformer:Transformer",
    "cnn_lstm": "recap.captioners.cnn_lstm:CnnLstm",
    "vlm": "recap.captioners.vlm:Vlm",
}
"""Family → where its class is; imported when it is asked for."""
SERVED = "recap.captioners.served:Served"


class Captioner(Protocol):
    """From pixels to captions in any style: all that relabelling needs."""

    @abstractmethod
    def preprocess(self, images: list[Image.Image]) -> Any:
        """RGB images → what `encode` takes, on the CPU; for most families pixel values (B, 3, H, W)."""

    @abstractmethod
    def encode(self, pixels: Any) -> Any:
        """What the text side sees of the images, (B, N, D) for most families: computed once, whatever the styles.

        Without gradients, unless the encoder is being trained.
        """

    @abstractmethod
    def caption(self, features: Any, style: Style) -> list[Caption]:
        """Captions of encoded images. No image's caption depends on the others of its batch."""

    def captions(self, batches: Iterable[Any], styles: dict[str, Style],
                 num_slots: int) -> Iterator[tuple[int, dict[str, Caption]]]:
        """Captions of images in all styles; each image is encoded once.

        Args:
            batches: what `preprocess` gave, one batch after the other; asked for as they are needed.
            styles: name → style.
            num_slots: how many captions are decoded together, where the family decodes batch by batch no longer.

        Yields:
            The place of an image among all of the batches, and its captions by style; the first to be done come first.
        """
        place = 0
        for pixels in batches:
            features = self.encode(pixels)
            found = {name: self.caption(features, style) for name, style in styles.items()}
            for captions in zip(*found.values(), strict=True):
                yield place, dict(zip(found, captions, strict=True))
                place += 1


class Tunable(Captioner, ABC):
    """A captioner that can be tuned."""

    model: Any
    """All its weights: an `nn.Module`, most often of a class of transformers."""
    text: Text
    """Its tokens."""
    device: str
    encoder_is_trained: bool = False
    """Whether tuning changes what `encode` computes. If not, features may be computed once and kept."""
    whole: ClassVar[bool] = True
    """Whether what tuning writes is a whole model, or an adapter for a base."""

    @classmethod
    @abstractmethod
    def open(cls, config: CaptionerConfig, device: str, tuned: Path | None) -> "Tunable":
        """Load base and processor, and what fine-tuning wrote where that is given.

        On the device `meta` the model is made from its configuration alone, and no weight is read.
        """

    @abstractmethod
    def prepare(self, config: Finetune, captions: list[str]) -> None:
        """Make trainable what this family tunes. `captions` teach its words to one that has none yet."""

    @abstractmethod
    def loss(self, features: Any, prompts: list[str], captions: list[str]) -> torch.Tensor:
        """Mean negative log-likelihood of the captions' tokens, a scalar; what the prompt says is not learned."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what training changed, in the format that the family's users know."""

    def num_tokens(self, caption: str) -> int:
        """How many tokens of a caption the loss is a mean over, its end included."""
        return len(self.text.caption_ids(caption))

    def fit(self, caption: str, max_tokens: int) -> str:
        """The caption, cut at the last sentence end (else the last word) within `max_tokens`, if it is longer."""
        return self.text.fit(caption, max_tokens)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name → parameter that training changes."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def set_training(self, training: bool) -> None:
        """Dropout and batch statistics on or off; what is frozen stays as it is when captioning."""
        self.model.train(training)
        for module in self.frozen():
            module.eval()

    def frozen(self) -> list[nn.Module]:
        """Parts that are not trained, and so never dropped out."""
        return []

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them, where the model can."""
        for module in self.model.modules():
            if getattr(module, "supports_gradient_checkpointing", False):  # the outermost first, which holds the others
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                return
        warn("finetune.gradient_checkpointing has no effect: this captioner's model can't")


class Assembled(Tunable):
    """A captioner that is put together from parts when it is prepared for tuning, unless a whole one is named."""

    model: Any = None

    def __init__(self, config: CaptionerConfig, device: str) -> None:
        self.config, self.device = config, device

    @classmethod
    def open(cls, config: CaptionerConfig, device: str, tuned: Path | None) -> Self:
        captioner = cls(config, device)
        if tuned is not None or config.model:
            captioner.open_whole(config.model_copy(update={"model": str(tuned or config.model)}))
        return captioner

    @abstractmethod
    def open_whole(self, whole: CaptionerConfig) -> None:
        """Load model and tokenizer from the folder or hub id `whole.model`."""

    def check_whole(self) -> None:
        """Raise UserError where no part has been put to another yet."""
        if self.model is None:
            raise UserError(f"captioner: a {self.config.family} put together from parts can't caption before it is "
                            "tuned: name a whole one in captioner.model, or tune this first")


def open_captioner(config: CaptionerConfig, device: str, tuned: Path | None = None) -> Captioner:
    """Load a captioner, as fine-tuning left it or as its base is."""
    return cast(Captioner, _class(SERVED).open(config)) if config.server else open_tunable(config, device, tuned)


def open_tunable(config: CaptionerConfig, device: str, tuned: Path | None = None) -> Tunable:
    """The same, for one that is to be tuned.

    Raises:
        UserError: it is at a server, or its checkpoint isn't there or isn't of this family.
    """
    if config.server:
        raise UserError(f"captioner.server: what {config.server} serves can't be tuned here: name the model itself")
    return cast(Tunable, _class(REGISTRY[config.family]).open(config, device, tuned))


def _class(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
