"""A hash of all that relabelling has said of a shard's images, by which `recap verify` knows if it was changed."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from recap.sample import Sample

SCHEMA = 1
"""Of `KEY.recap.json`."""


class Seal:
    """The hash of a shard's captions and records, in whatever order and format they are kept."""

    def __init__(self, styles: Iterable[str]) -> None:
        """Begin with the styles that are counted in, beside the mix; a shard's other captions are its input's."""
        self.styles = sorted(styles)
        self._digests: list[bytes] = []

    def add(self, sample: Sample, record: dict[str, Any]) -> None:
        """Count in a sample: key, captions, and what is said of them.

        Args:
            sample: with its captions.
            record: what its `recap.json` holds.
        """
        texts = {style: sample.readable(style) for style in [*self.styles, "mix"]}
        said = [sample.key, texts, record["captions"], record.get("image")]
        self._digests.append(hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest())

    def content(self) -> dict[str, Any]:
        """For the stats."""
        return {"styles": self.styles, "sha256": hashlib.sha256(b"".join(sorted(self._digests))).hexdigest()}
