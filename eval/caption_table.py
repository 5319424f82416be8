"""What the captions of a run say: how many, how long, of how many words, how readable, how close to those of people;
and, where a judge can tell, how much is covered and true.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from eval.clip_score import ClipScorer
from eval.config import ClipScore
from eval.judge import CaptionJudge, Facts
from recap.caption_statistics import Tally, captions_of, closeness, draw_captions, num_clip_tokens, read_captions
from recap.errors import BadSample, UserError
from recap.pretrained import load_pretrained
from recap.progress import warn
from recap.sample import Sample
from recap.shards import Reject

NUM_SAMPLES = 2000
"""Only the first so many samples of each source are read."""
NUM_COMPARED = 1000
"""Captions of each kind that are compared with references: a text encoder reads them all, perhaps on a CPU."""


@dataclass(frozen=True)
class Source:
    """Shards, and the caption kinds in them that are looked at."""

    name: str
    shards: list[str]
    kinds: list[str]


@dataclass
class Kind:
    """What is counted of the captions of one kind."""

    counted: Tally = field(default_factory=Tally)
    num_captions: int = 0
    num_judged: int = 0
    covered: int = 0
    wrong: int = 0
    total: int = 0

    def add(self, text: str, num_tokens: int, facts: Facts | None) -> None:
        self.num_captions += 1
        self.counted.add(text, num_tokens, None)
        if facts is not None:
            self.num_judged += 1
            self.covered += facts.covered
            self.wrong += facts.wrong
            self.total += facts.total

    def summary(self) -> dict[str, Any]:
        found = self.counted.summary()
        return {"num_captions": found["num_captions"], "mean_words": found["words"]["mean"],
                "mean_clip_tokens": found["clip_tokens"]["mean"],
                **{name: found[name] for name in ("share_over_77", "vocabulary", "mattr", "reading_ease", "grade")},
                "num_judged": self.num_judged, "covered": _share(self.covered, self.total),
                "precision": _share(self.covered, self.covered + self.wrong)}


def caption_table(sources: list[Source], judge: CaptionJudge | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Source → caption kind → figures, over the first `NUM_SAMPLES` samples of each source.

    Returns:
        For every kind that was found: `num_captions`, without empty ones, `mean_words`, `mean_clip_tokens`,
        `share_over_77` (of captions that one CLIP window does not hold), `vocabulary` (different words), `mattr`,
        `reading_ease` and `grade`, all as `recap.caption_statistics` has them; and of the `num_judged` captions of
        images whose metadata says what they show: `covered`, facts stated of facts there are, and `precision`, true
        ones of those stated; None without any.
    """
    return {source.name: _counted(source, judge) for source in sources if source.shards}


def _counted(source: Source, judge: CaptionJudge | None) -> dict[str, dict[str, Any]]:
    kinds = {kind: Kind() for kind in source.kinds}
    for sample in islice(_samples(source.shards), NUM_SAMPLES):
        for caption in captions_of(sample):
            if caption.kind in kinds and caption.text:
                num = caption.num_clip_tokens
                kinds[caption.kind].add(caption.text, num_clip_tokens(caption.text) if num is None else num,
                                        _facts(judge, caption.text, sample))
    if missing := [name for name, kind in kinds.items() if not kind.num_captions]:
        warn(f"report: no caption of kind {', '.join(missing)} in the {source.name} shards")
    return {name: kind.summary() for name, kind in kinds.items() if kind.num_captions}


def _samples(shards: list[str]) -> Iterator[Sample]:
    rejects: list[Reject] = []  # counted by the stages that made or read these shards
    for shard in shards:
        yield from read_captions(shard, rejects)


def _facts(judge: CaptionJudge | None, text: str, sample: Sample) -> Facts | None:
    if judge is None:
        return None
    try:
        return judge.caption(text, sample.metadata)
    except (KeyError, BadSample):  # metadata that does not say what the image shows, or is none
        return None


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


# --- closeness to references ---------------------------------------------------------------------------------------


def close_to(references: Source, captions: Source, clip: ClipScore, device: str) -> dict[str, dict[str, Any]]:
    """How close captions come to those of people, in what a CLIP text encoder makes of them.

    Args:
        references: shards and kinds to compare with.
        captions: shards, and kinds that are compared; of the images that have all of them.
        clip: whose text encoder it is.
        device: a torch device.

    Returns:
        Kind of reference → as `recap.caption_statistics.closeness` gives it; none where there are too few captions.
    """
    if not (references.shards and references.kinds and captions.shards):
        return {}
    scorer = load_pretrained(lambda folder: ClipScorer(folder, device), clip, "evaluate.clip_score")
    drawn = draw_captions(captions.shards, captions.kinds, NUM_COMPARED)
    found = {}
    for kind in references.kinds:
        try:
            found[kind] = closeness(drawn, draw_captions(references.shards, [kind], 2 * NUM_COMPARED)[kind], scorer)
        except UserError as error:
            warn(f"report.references: {kind}: {error}")
    return found
