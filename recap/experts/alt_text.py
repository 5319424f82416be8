"""What the image's shard says of it: hearsay, stated as such."""

from typing import Any

from PIL import Image

from recap.config import Stitch
from recap.experts import Facts, Sentence

SOURCE = "alt_text"


class AltTextExpert:
    """Passes the alt-text on as an unreliable sentence; the writer judges what it is good for."""

    def __init__(self, config: Stitch, device: str) -> None:
        self.provenance: dict[str, Any] = {}

    def look(self, images: list[Image.Image], alt_texts: list[str]) -> list[Facts]:
        """One `Facts` per alt-text; without a sentence where it is empty."""
        return [Facts(sentences=[Sentence(text, SOURCE, reliable=False)] if text else []) for text in alt_texts]
