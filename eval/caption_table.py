"""What the captions of a run say: how many, how long, and, where a judge can tell, how much is covered and true."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from eval.judge import Facts, Judge
from recap.chunks import CONTENT_TOKENS, split
from recap.clip_bpe import clip_tokenizer
from recap.errors import BadSample
from recap.progress import warn
from recap.sample import Sample
from recap.shards import Reject, read_shard

NUM_SAMPLES = 2000
"""Only the first so many samples of each source are read."""


@dataclass(frozen=True)
class Source:
    """Shards, and the caption kinds in them that are looked at."""

    name: str
    shards: list[str]
    kinds: list[str]


@dataclass
class Tally:
    """Sums over the captions of one kind."""

    num_captions: int = 0
    num_words: int = 0
    num_clip_tokens: int = 0
    num_over_77: int = 0
    num_judged: int = 0
    covered: int = 0
    wrong: int = 0
    total: int = 0

    def add(self, text: str, facts: Facts | None) -> None:
        tokens = split(text, clip_tokenizer()).num_tokens
        self.num_captions += 1
        self.num_words += len(text.split())
        self.num_clip_tokens += tokens
        self.num_over_77 += tokens > CONTENT_TOKENS  # BOS and EOS make it 77
        if facts is not None:
            self.num_judged += 1
            self.covered += facts.covered
            self.wrong += facts.wrong
            self.total += facts.total

    def summary(self) -> dict[str, Any]:
        return {"num_captions": self.num_captions, "mean_words": round(self.num_words / self.num_captions, 2),
                "mean_clip_tokens": round(self.num_clip_tokens / self.num_captions, 2),
                "share_over_77": round(self.num_over_77 / self.num_captions, 4), "num_judged": self.num_judged,
                "covered": _share(self.covered, self.total),
                "precision": _share(self.covered, self.covered + self.wrong)}


def caption_table(sources: list[Source], judge: Judge | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Source → caption kind → figures, over the first `NUM_SAMPLES` samples of each source.

    Returns:
        For every kind that was found: `num_captions`, `mean_words`, `mean_clip_tokens`, `share_over_77` (of captions
        that one CLIP window does not hold); and of the `num_judged` captions of images whose metadata says what they
        show: `covered`, facts stated of facts there are, and `precision`, true ones of those stated; None without any.
    """
    return {source.name: _tallied(source, judge) for source in sources if source.shards}


def _tallied(source: Source, judge: Judge | None) -> dict[str, dict[str, Any]]:
    tallies = {kind: Tally() for kind in source.kinds}
    for sample in islice(_samples(source.shards), NUM_SAMPLES):
        for kind, tally in tallies.items():
            try:
                text = sample.caption(kind)
            except BadSample:
                continue
            if text:
                tally.add(text, _facts(judge, text, sample))
    if missing := [kind for kind, tally in tallies.items() if not tally.num_captions]:
        warn(f"report: no caption of kind {', '.join(missing)} in the {source.name} shards")
    return {kind: tally.summary() for kind, tally in tallies.items() if tally.num_captions}


def _samples(shards: list[str]) -> Iterator[Sample]:
    rejects: list[Reject] = []  # counted by the stages that made or read these shards
    for shard in shards:
        yield from read_shard(shard, rejects)


def _facts(judge: Judge | None, text: str, sample: Sample) -> Facts | None:
    if judge is None:
        return None
    try:
        return judge.caption(text, sample.metadata)
    except (KeyError, BadSample):  # metadata that does not say what the image shows, or is none
        return None


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
