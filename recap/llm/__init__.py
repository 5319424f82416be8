"""Who writes captions from facts: a template, or a chat model, here or behind a server."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from recap.config.stitch import Stitch
from recap.facts import Facts


@dataclass(frozen=True, slots=True)
class Scene:
    """What a writer is given of an image."""

    facts: Facts
    """What the experts found, merged."""
    width: int
    """Of the image, in pixels, in which boxes are given."""
    height: int


@dataclass(frozen=True, slots=True)
class Written:
    """The captions of one image."""

    captions: dict[str, str]
    """Style → caption: one line, never empty."""
    flags: list[str] = field(default_factory=list)
    """What is to be known of them, snake_case: `rewritten`, `template` (which stepped in), and for which problems."""
    ungrounded: list[str] = field(default_factory=list)
    """Objects and counts that they state, and no expert saw."""


class Writer(Protocol):
    """Puts facts into words."""

    provenance: dict[str, Any]
    """What its captions are made with, JSON-like."""
    instructions: str
    """What it is told to write; empty of one that isn't told."""

    def prepare(self, scenes: Iterable[Scene], total: int) -> dict[str, Any]:
        """Do what takes long for all images together, such as asking a server; what is done is kept, never repeated.

        Args:
            scenes: that `write` will be given.
            total: their number, for a bar.

        Returns:
            What it took: requests, tokens, money; nothing of a writer that takes none.
        """
        ...

    def write(self, scene: Scene) -> Written:
        """A caption in every style, of an image that was prepared."""
        ...


def open_writer(config: Stitch, styles: list[str], answers: Path, device: str) -> Writer:
    """The writer that the configuration names.

    Args:
        config: of the stage.
        styles: to write captions in.
        answers: the file in which a chat model's answers are kept.
        device: of a chat model that is opened here.

    Raises:
        UserError: its model or its prompt is not there.
    """
    if config.writer == "template":
        from recap.llm.template import TemplateWriter
        return TemplateWriter(styles)
    if config.llm.server:
        from recap.llm.server import ServerWriter
        return ServerWriter(config.llm, styles, answers)
    from recap.llm.local import LocalWriter
    return LocalWriter(config.llm, styles, answers, device)
