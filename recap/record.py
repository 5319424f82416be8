"""What relabelling adds to a sample: captions, a mix of them, and `KEY.recap.json`, which says how they came to be."""

import json
import random
from typing import Any

from recap.choosing import Chosen, Item
from recap.chunks import split
from recap.clip_bpe import clip_tokenizer
from recap.config import Style
from recap.sample import MAX_JSON_BYTES, Sample
from recap.seal import SCHEMA


class Recorder:
    """Adds captions to samples."""

    def __init__(self, source: dict[str, Any], styles: dict[str, Style], mix: dict[str, float], seed: int) -> None:
        """Begin.

        Args:
            source: captioner, revision and adapter.
            styles: by name.
            mix: style → its weight in the draw for `KEY.mix.txt`.
            seed: of that draw.
        """
        self.source, self.styles, self.mix, self.seed = source, styles, mix, seed

    def add(self, item: Item, chosen: dict[str, Chosen]) -> tuple[Sample, dict[str, Any]]:
        """The sample with its captions, and what its `recap.json` holds."""
        sample = item.sample
        record = earlier_record(sample)
        record["captions"] |= {style: self._provenance(style, each) for style, each in chosen.items()}
        record |= {"image": item.scores} if item.scores else {}
        members = sample.members | self._texts(sample, chosen)
        members |= {"recap.json": json.dumps(record).encode()}  # ASCII: an earlier one may hold lone surrogates
        return Sample(sample.shard, sample.key, members), record

    def _texts(self, sample: Sample, chosen: dict[str, Chosen]) -> dict[str, bytes]:
        """Captions and mix. A style that the shard already had is replaced in its place."""
        texts = {f"{style}.txt": each.caption.text.encode() for style, each in chosen.items()}
        present = Sample(sample.shard, sample.key, sample.members | texts)  # a style of an earlier relabelling as well
        kinds = [kind for kind in sorted(self.mix) if present.readable(kind) is not None]
        if kinds:
            draw = random.Random(f"{self.seed}/{sample.key}")
            kind = draw.choices(kinds, [self.mix[kind] for kind in kinds])[0]
            texts["mix.txt"] = present.member(f"{kind}.txt") or b""
        return texts

    def _provenance(self, name: str, chosen: Chosen) -> dict[str, Any]:
        style = self.styles[name]
        windows = split(chosen.caption.text, clip_tokenizer())
        return {**self.source, "prompt": style.prompt,
                "decoding": style.model_dump(exclude={"prompt"}) | chosen.instead,
                "num_clip_tokens": windows.num_tokens, "num_clip_windows": len(windows.ids),
                "scores": chosen.found.scores, "flags": chosen.found.faults}


def earlier_record(sample: Sample) -> dict[str, Any]:
    """What an earlier relabelling said of styles that are not asked for now; it stays."""
    try:
        data = sample.members["recap.json"]
        found = json.loads(data) if len(data) <= MAX_JSON_BYTES else {}
        if found["schema"] == SCHEMA and isinstance(found["captions"], dict):
            return found
    except (KeyError, ValueError, TypeError, RecursionError):
        pass
    return {"schema": SCHEMA, "captions": {}}
