"""A hash of all that relabelling has said of a shard's images, by which `recap verify` knows if it was changed."""

import hashlib
import json
from typing import Any

from recap.errors import BadSample
from recap.sample import Sample


class Seal:
    """The hash of a shard's captions and records, in whatever order and format they are kept."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []

    def add(self, sample: Sample, record: dict[str, Any]) -> None:
        """Count in a sample: key, the captions that its record tells of, the mix, and the record.

        Args:
            sample: with its captions.
            record: what its `recap.json` holds.
        """
        texts = {style: _text(sample, style) for style in [*record["captions"], "mix"]}
        said = [sample.key, texts, record["captions"], record.get("image")]
        self._digests.append(hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest())

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(sorted(self._digests))).hexdigest()


def _text(sample: Sample, style: str) -> str | None:
    try:
        return sample.caption(style)
    except BadSample:
        return None
