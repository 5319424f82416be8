"""What the image's shard says of it: hearsay, stated as such."""

from typing import Any

from recap.config.stitch import Stitch
from recap.experts import View
from recap.facts import Facts, Sentence

SOURCE = "alt_text"


class AltTextExpert:
    """Passes the alt-text on as an unreliable sentence; the writer judges what it is good for."""

    def __init__(self, config: Stitch, device: str) -> None:
        self.provenance: dict[str, Any] = {}

    def preprocess(self, views: list[View]) -> list[str]:
        """The alt-texts."""
        return [view.alt_text for view in views]

    def look(self, batch: list[str]) -> list[Facts]:
        """One `Facts` per alt-text; without a sentence where it is empty."""
        return [Facts(sentences=[Sentence(text, SOURCE, reliable=False)] if text else []) for text in batch]
