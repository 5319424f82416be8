"""Experts look at images and state facts; captions are stitched from what several of them say.

An expert is a class in a file of its own: `(config: Stitch, device: str)` opens it, `preprocess` and `look` are all
that it does. To add one, write the file, give it a line in REGISTRY, and its table, if it has one, in
`recap.config.stitch`.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from PIL import Image

from recap.config.stitch import Stitch
from recap.facts import Facts

REGISTRY = {
    "detr": "recap.experts.detr:DetrExpert",
    "owlvit": "recap.experts.owlvit:OwlvitExpert",
    "blip2": "recap.experts.blip2:Blip2Expert",
    "florence2": "recap.experts.florence2:Florence2Expert",
    "ram": "recap.experts.ram:RamExpert",
    "tag2text": "recap.experts.tag2text:Tag2textExpert",
    "clip_tags": "recap.experts.clip_tags:ClipTagsExpert",
    "alt_text": "recap.experts.alt_text:AltTextExpert",
}


@dataclass(frozen=True, slots=True)
class View:
    """What an expert is shown of a sample."""

    image: Image.Image
    """RGB, upright, of any size."""
    alt_text: str = ""
    """What the image's shard says of it; empty where it says nothing."""
    tags: list[str] = field(default_factory=list)
    """What another expert named, for one that looks for things by name."""


class Expert(Protocol):
    """Looks at images."""

    provenance: dict[str, Any]
    """What its facts were made with, JSON-like: checkpoint, revision, settings."""

    def preprocess(self, views: list[View]) -> Any:
        """What `look` reads of one batch. Called in a thread, while the model is at work on the batch before."""
        ...

    def look(self, batch: Any) -> list[Facts]:
        """A preprocessed batch → one `Facts` for each image, in order."""
        ...


def open_expert(name: str, config: Stitch, device: str) -> Expert:
    """Open an expert of the registry.

    Raises:
        UserError: its checkpoint can't be opened, or its package isn't installed.
    """
    module, attribute = REGISTRY[name].split(":")
    expert: Expert = getattr(import_module(module), attribute)(config, device)
    return expert
