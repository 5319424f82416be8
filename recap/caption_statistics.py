"""Statistics of captions: length, words, readability, repeats, flags, and how close they come to other captions.

Counted in one pass and in bounded memory, by many workers at once: what each has counted is JSON, and parts join to the
same figures in whatever order. Words are those of `eval.caption_tokens`, tokens are CLIP's.
"""

import base64
import hashlib
import heapq
import json
import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from recap.caption_checks import FAULTS
from recap.caption_formats import STYLE
from recap.caption_tables import read_rows
from recap.chunks import CONTENT_TOKENS
from recap.clip_bpe import clip_tokenizer
from recap.errors import BadSample, UserError
from recap.sample import Sample, caption_extension
from recap.shards import Reject, read_shard, shard_name

if TYPE_CHECKING:
    from eval.clip_score import ClipScorer

SCHEMA = 2
"""Of parts."""
MADE = ("captioner", "revision", "adapter", "prompt", "decoding")
"""What `KEY.recap.json` says of how a caption was made."""
MAX_RECORD_BYTES = 1_000_000
"""Of a `KEY.recap.json` that is read."""
MAX_NAME, MAX_FLAGS = 40, 64
"""Characters of a flag's or score's name, and flags or scores of a caption that are read."""
MAX_KEPT, MAX_WRITTEN = 2**14, 2**11
"""Different values (words, pairs of words, captions) that are kept of each kind of caption: in memory, and of a part
that is written. A set has a part for every shard, and all of them are read again."""
NUM_BYTES = 5
"""Of a value's hash: of a billion values, one in 2,000 falls together with another."""
MAX_CACHED = 64
"""Characters of a text of which it is remembered what was computed: there may be many, and of any length."""
WINDOW = 100
"""Words in a row over which types and tokens are compared."""
BINS = (0, 5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300)
"""Where the bins of a histogram of lengths begin; the last has no end."""
MAX_COMPARED = 10_000
"""Captions of each kind that are compared with a reference set."""
MAX_SENTENCES = 64
"""Of a caption, that are embedded."""
T = TypeVar("T")


# --- what a sample says --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caption:
    """One caption of an image, with what `KEY.recap.json` says of it: what is no plain value there is left out."""

    kind: str
    """`alt`, a style, or `mix`."""
    text: str
    """Empty where it cannot be read, see `fault`."""
    fault: str = ""
    """Why it cannot be read."""
    made: dict[str, Any] | None = None
    """How: `captioner`, `revision`, `adapter`, `prompt`, `decoding`. None where the shard came with it."""
    num_clip_tokens: int | None = None
    """Without BOS and EOS, where it is recorded, and may be right."""
    flags: tuple[str, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)


def read_captions(url: str, rejects: list[Reject]) -> Iterator[Sample]:
    """The samples of a shard, or of a parquet of captions only (which have no image), local or remote."""
    if not url.endswith(".parquet"):
        return read_shard(url, rejects)
    name = shard_name(url).removesuffix(".parquet")
    return (Sample(name, key, row.members) for key, row in read_rows(url))


def captions_of(sample: Sample) -> list[Caption]:
    """All captions of a sample: alt-text, the styles that relabelling added, the mix, and what else the shard has."""
    recorded = record(sample)
    names = [name.lower().removesuffix(".txt") for name in sample.members if name.lower().endswith(".txt")]
    kinds = dict.fromkeys(["alt", *recorded, "mix", *filter(STYLE.fullmatch, names)])
    return [_caption(sample, kind, recorded.get(kind)) for kind in kinds
            if sample.member(caption_extension(kind)) is not None]


def record(sample: Sample) -> dict[str, dict[str, Any]]:
    """What `KEY.recap.json` says of each style; nothing where it is missing or damaged."""
    data = sample.members.get("recap.json", b"{}")
    try:
        found = json.loads(data)["captions"] if len(data) <= MAX_RECORD_BYTES else {}
        return {style: entry for style, entry in found.items() if STYLE.fullmatch(style) and isinstance(entry, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _caption(sample: Sample, kind: str, entry: dict[str, Any] | None) -> Caption:
    try:
        text, fault = sample.caption(kind) or "", ""
    except BadSample as error:
        text, fault = "", error.reason
    if entry is None:
        return Caption(kind, text, fault)
    flags, scores = entry.get("flags"), entry.get("scores")
    known = [name for name in flags[:MAX_FLAGS] if _is_name(name)] if isinstance(flags, list) else []
    numbers = list(scores.items())[:MAX_FLAGS] if isinstance(scores, dict) else []
    tokens = entry.get("num_clip_tokens")
    return Caption(kind, text, fault, {name: entry.get(name) for name in MADE},
                   tokens if type(tokens) is int and _may_have(text, tokens) else None, tuple(known),
                   {name: value for name, value in numbers if _is_name(name) and _is_score(value)})


def _may_have(text: str, num_tokens: int) -> bool:
    """Whether a text may have so many CLIP tokens: one for each word at least, and no more than it has bytes."""
    return len(text.split()) <= num_tokens <= 2 * len(text.encode())  # in lower case it may have more


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


# --- counting ------------------------------------------------------------------------------------------------------


@dataclass
class Distinct:
    """How many different values there are, and how many came only once: exact up to `MAX_KEPT`, then an estimate.

    Distinct sampling (Gibbons 2001, VLDB): only those values are kept whose hash ends in `level` zero bits, and as soon
    as they are too many, the level rises by one, which halves them. What is kept depends on the values alone, not on
    their order, so counts of parts join to the count of the whole. Their standard error is about 1 %, and of a part
    that was written 3 %.
    """

    level: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    """Hash of a value → how often it came."""

    def add(self, value: str, times: int = 1) -> None:
        self._add(_hash(value), times)

    def _add(self, code: int, times: int) -> None:
        if code & ((1 << self.level) - 1):
            return
        self.counts[code] = self.counts.get(code, 0) + times
        while len(self.counts) > MAX_KEPT:
            self._raise(self.level + 1)

    def _raise(self, level: int) -> None:
        if level > self.level:
            self.level = level
            self.counts = {code: times for code, times in self.counts.items() if not code & ((1 << level) - 1)}

    def merge(self, other: "Distinct") -> None:
        self._raise(other.level)
        for code, times in other.counts.items():
            self._add(code, times)

    def partial(self) -> dict[str, Any]:
        """No more than `MAX_WRITTEN` values, as JSON: their hashes one after the other, those that came once first; and
        how often the others came. In strings, for a list has a line for each.
        """
        kept = Distinct(self.level, self.counts)
        while len(kept.counts) > MAX_WRITTEN:
            kept._raise(kept.level + 1)
        codes = sorted(kept.counts, key=lambda code: (kept.counts[code] > 1, code))
        times = [str(kept.counts[code]) for code in codes if kept.counts[code] > 1]
        data = b"".join(code.to_bytes(NUM_BYTES) for code in codes)
        return {"level": kept.level, "codes": base64.b64encode(data).decode(), "times": " ".join(times)}

    @classmethod
    def from_partial(cls, found: dict[str, Any]) -> "Distinct":
        data = np.frombuffer(base64.b64decode(found["codes"]), np.uint8).reshape(-1, NUM_BYTES)
        codes = data @ (np.int64(1) << np.arange(8 * (NUM_BYTES - 1), -1, -8))
        times = list(map(int, found["times"].split()))
        return cls(found["level"], dict(zip(codes.tolist(), [1] * (len(codes) - len(times)) + times, strict=True)))

    @property
    def number(self) -> int:
        return len(self.counts) << self.level

    def share_repeated(self, num: int) -> float | None:
        """Of `num` values that were added, the share of those that came more than once.

        It is a ratio within the sample, whose size then matters little. But a value that came very often may be in the
        sample, or not; then the sample stands for another number than `num`, and what came once is compared with that.
        """
        expected, kept = num / (1 << self.level), sum(self.counts.values())
        if abs(kept - expected) <= 3 * math.sqrt(expected):
            expected = kept
        return _share(max(0.0, expected - sum(times == 1 for times in self.counts.values())), expected)


def _hash(value: str) -> int:
    return _remembered_hash(value) if len(value) <= MAX_CACHED else _compute_hash(value)


def _compute_hash(value: str) -> int:
    return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=NUM_BYTES).digest())


_remembered_hash = lru_cache(2**16)(_compute_hash)


@dataclass
class Tally:
    """What is counted of the captions of one kind."""

    sums: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    """Words of a caption → captions."""
    clip_tokens: Counter[int] = field(default_factory=Counter)
    """CLIP tokens of a caption, without BOS and EOS → captions."""
    flags: Counter[str] = field(default_factory=Counter)
    distinct: dict[str, Distinct] = field(default_factory=lambda: {
        name: Distinct() for name in ("words", "pairs", "captions")})
    _window: deque[str] = field(default_factory=deque)
    _inside: dict[str, int] = field(default_factory=dict)
    """Word of the window → how often it is in it."""

    def add(self, text: str, num_tokens: int, flags: Iterable[str] | None) -> None:
        """Count one caption. `flags` is None where nobody has looked for faults, as in alt-text."""
        from eval.caption_tokens import tokenize
        words = tokenize(text)
        self.words[len(words)] += 1
        self.clip_tokens[num_tokens] += 1
        self.sums.update(captions=1, pairs=max(0, len(words) - 1), checked=flags is not None)
        self.flags.update({flag if flag in FAULTS else "other" for flag in flags or ()})
        if words:
            self.distinct["captions"].add(text)
        for word in words:
            self.distinct["words"].add(word)
        for first, second in pairwise(words):
            self.distinct["pairs"].add(f"{first} {second}")
        self._slide(words)
        self._read(text)

    def _slide(self, words: list[str]) -> None:
        window, inside, num_windows, num_types = self._window, self._inside, 0, 0
        for word in words:
            window.append(word)
            inside[word] = inside.get(word, 0) + 1
            if len(window) > WINDOW:
                first = window.popleft()
                inside[first] -= 1
                if not inside[first]:
                    del inside[first]
            if len(window) == WINDOW:
                num_windows += 1
                num_types += len(inside)
        self.sums.update(windows=num_windows, types=num_types)

    def _read(self, text: str) -> None:
        for sentence in sentences(text):
            words = _WORD.findall(sentence.lower())
            self.sums.update(sentences=bool(words), read_words=len(words), syllables=sum(map(num_syllables, words)))

    def merge(self, other: "Tally") -> None:
        self.sums.update(other.sums)
        self.words.update(other.words)
        self.clip_tokens.update(other.clip_tokens)
        self.flags.update(other.flags)
        for name, distinct in self.distinct.items():
            distinct.merge(other.distinct[name])

    def partial(self) -> dict[str, Any]:
        """All of it as JSON, the same bytes for the same captions in the same order."""
        return {"sums": dict(sorted(self.sums.items())), "words": dict(sorted(self.words.items())),
                "clip_tokens": dict(sorted(self.clip_tokens.items())), "flags": dict(sorted(self.flags.items())),
                "distinct": {name: each.partial() for name, each in self.distinct.items()}}

    @classmethod
    def from_partial(cls, found: dict[str, Any]) -> "Tally":
        return cls(Counter(found["sums"]), _by_number(found["words"]), _by_number(found["clip_tokens"]),
                   Counter(found["flags"]),
                   {name: Distinct.from_partial(each) for name, each in found["distinct"].items()})

    def summary(self) -> dict[str, Any]:
        sums, distinct = self.sums, self.distinct
        num, num_read = sums["captions"], sums["captions"] - self.words[0]
        sentences, words = sums["sentences"], sums["read_words"]
        per_sentence, per_word = words / max(1, sentences), sums["syllables"] / max(1, words)
        over = sum(count for length, count in self.clip_tokens.items() if length > CONTENT_TOKENS)
        return {
            "num_captions": num, "num_empty": self.words[0],
            "words": lengths(self.words), "clip_tokens": lengths(self.clip_tokens), "share_over_77": _share(over, num),
            "vocabulary": distinct["words"].number,
            "mattr": _share(sums["types"], WINDOW * sums["windows"]),
            "distinct_2": _share(min(distinct["pairs"].number, sums["pairs"]), sums["pairs"]),
            "reading_ease": round(206.835 - 1.015 * per_sentence - 84.6 * per_word, 2) if words else None,
            "grade": round(0.39 * per_sentence + 11.8 * per_word - 15.59, 2) if words else None,
            "share_repeated": distinct["captions"].share_repeated(num_read),
            "num_checked": sums["checked"],
            "share_not_ended": _share(self.flags["not_ended"], sums["checked"]),
            "flags": dict(sorted(self.flags.items())),
            "estimated": [figure for figure, name in (("vocabulary", "words"), ("distinct_2", "pairs"),
                                                      ("share_repeated", "captions")) if distinct[name].level],
        }


def _by_number(found: dict[str, int]) -> Counter[int]:
    return Counter({int(key): count for key, count in found.items()})


class CaptionStatistics:
    """Statistics of captions of several kinds, e.g. of a shard: add samples, join with others, sum up.

    Args:
        kinds: `alt`, styles, `mix`; others are not counted, so that a shard cannot name ever new ones.
    """

    def __init__(self, kinds: Iterable[str]) -> None:
        self.tallies = {kind: Tally() for kind in kinds}

    def add(self, sample: Sample) -> None:
        """Count the captions of a sample. One that cannot be read is not counted."""
        captions = captions_of(sample)
        counted = {each.text: each.num_clip_tokens for each in captions if each.num_clip_tokens is not None}
        for caption in captions:
            if caption.kind in self.tallies and not caption.fault:
                tokens = counted.get(caption.text)
                tokens = num_clip_tokens(caption.text) if tokens is None else tokens
                self.tallies[caption.kind].add(caption.text, tokens,
                                               None if caption.made is None else caption.flags)

    def merge(self, other: "CaptionStatistics") -> None:
        for kind, tally in other.tallies.items():
            self.tallies.setdefault(kind, Tally()).merge(tally)

    def partial(self) -> dict[str, Any]:
        """What was counted, as JSON, for `from_partial`."""
        return {"schema": SCHEMA, "kinds": {kind: tally.partial() for kind, tally in self.tallies.items()}}

    @classmethod
    def from_partial(cls, found: dict[str, Any]) -> "CaptionStatistics":
        statistics = cls(())
        statistics.tallies = {kind: Tally.from_partial(tally) for kind, tally in found["kinds"].items()}
        return statistics

    def summary(self) -> dict[str, dict[str, Any]]:
        """By kind of caption, of those that were found, JSON-like.

        - `num_captions`, and `num_empty` of them that have no words;
        - `words` and `clip_tokens` (without BOS and EOS) of a caption: `mean`, `median`, `p5`, `p95`, `histogram` (the
          bin's first length → captions); `share_over_77`, of captions that one CLIP window does not hold;
        - `vocabulary`, different words; `distinct_2`, different pairs of words over all pairs (Li et al. 2016). Both
          hang on how many captions there are;
        - `mattr`, different words over words, mean over all `WINDOW` words in a row within a shard (Covington & McFall
          2010, the moving-average type–token ratio), which does not; None where no shard has so many words;
        - `reading_ease` (Flesch 1948) and `grade` (Kincaid et al. 1975), of all captions as one text: for English, of
          words in a–z, with syllables by `num_syllables`;
        - `share_repeated`, of captions that another image has as well, to the letter;
        - `num_checked` captions that were looked at for faults, `share_not_ended` of these, `flags` (name → captions);
        - `estimated`, which of these figures are estimates, see `Distinct`.
        """
        return {kind: tally.summary() for kind, tally in self.tallies.items() if tally.sums["captions"]}


def partial_file(url: str) -> str:
    """Where a shard's partial statistics lie: `00000.tar` → `00000_captions.json`."""
    return f"{url.removesuffix('.tar').removesuffix('.parquet')}_captions.json"


def of_shard(url: str, kinds: Iterable[str]) -> CaptionStatistics:
    """The statistics of one shard or parquet of captions. What is malformed is not counted."""
    found = CaptionStatistics(kinds)
    for sample in read_captions(url, []):
        found.add(sample)
    return found


def lengths(counts: Counter[int]) -> dict[str, Any]:
    """Length → captions, as mean, median, percentiles (between two lengths, in proportion) and histogram."""
    values = np.array(sorted(counts))
    numbers = np.array([counts[value] for value in values])
    places = numbers.cumsum()

    def quantile(share: float) -> float:
        place = share * (places[-1] - 1)
        low, high = (values[np.searchsorted(places, end, "right")] for end in (math.floor(place), math.ceil(place)))
        return round(float(low + (high - low) * (place % 1)), 2)

    bins = np.searchsorted(BINS, values, "right") - 1
    return {"mean": round(float(values @ numbers) / int(places[-1]), 2), "median": quantile(0.5), "p5": quantile(0.05),
            "p95": quantile(0.95),
            "histogram": {str(start): int(numbers[bins == place].sum()) for place, start in enumerate(BINS)}}


def num_clip_tokens(text: str) -> int:
    """CLIP tokens of a text, without BOS and EOS, uncut."""
    return len(clip_tokenizer()(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


# --- sentences and syllables ---------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])")
_WORD = re.compile(r"[a-z]+(?:['’-][a-z]+)*")
_VOWELS = re.compile(r"[aeiouy]+")
# Two sounds side by side: ra-di-o, di-al, qui-et, du-al, be-ing, lay-er. (But: region, cushion, onion, special.)
_APART = re.compile(r"(?<![tcsghnl])i(?=o)|(?<![tcs])i(?=a)|(?<=[tc])i(?=at)|i(?=um|e[tr]|en[ct])|(?<=[^qg])u(?=[ae]l)"
                    r"|e(?=ons?$|um|os?$)|(?<=[rd])e(?=as?$)|(?<=^cr)e(?=at[ei])|(?<=^r)e(?=act)|o(?=e[mt])|[aeiouy](?=ing)"
                    r"|(?<=[aeo])y(?=er|or|on)|(?<=[sh])m$")
# Written and not spoken: mak(e), saf(e)ly, mak(e)s, walk(e)d. (But: ta-ble, box-es, want-ed.)
_SILENT = re.compile(r"(?<=[^aeiouy])e(?=(?:ly|ful|less|ness|ment)s?$)|(?<![^aeiouy]l)(?<=[^aeiouy])e$"
                     r"|(?<![sxzcg])(?<![cs]h)(?<![^aeiouy]l)(?<=[^aeiouy])es$|(?<=[^aeiouytd])ed$")
_IRREGULAR = {"every": 2, "evening": 2, "something": 2, "sometimes": 2, "business": 2, "baseball": 2, "skateboard": 2,
              "skateboarding": 3, "skateboarder": 3, "fireplace": 2, "hundred": 2, "naked": 2, "lion": 2, "lions": 2}


def sentences(text: str) -> list[str]:
    """The sentences of a text; what follows the last full stop is one, too."""
    return [found.strip() for found in _SENTENCE_END.split(text) if found.strip()]


def num_syllables(word: str) -> int:
    """Syllables of an English word in lower case, by its spelling: groups of vowels, less silent ones; at least one."""
    return _remembered_syllables(word) if len(word) <= MAX_CACHED else _count_syllables(word)


def _count_syllables(word: str) -> int:
    parts = [part for part in re.split("[’'-]", word) if part not in ("s", "t", "d", "m", "ll", "re", "ve")]
    return max(1, sum(_IRREGULAR.get(part) or max(1, len(_VOWELS.findall(part)) + len(_APART.findall(part))
                                                  - len(_SILENT.findall(part))) for part in parts))


_remembered_syllables = lru_cache(2**16)(_count_syllables)


# --- closeness to a reference set ----------------------------------------------------------------------------------


def draw(rows: Iterable[tuple[str, T]], num: int, seed: int = 0) -> list[T]:
    """`num` of many (name, value): those whose name has the smallest hash with the seed, in its order."""
    return [value for _, value in heapq.nsmallest(num, rows, key=lambda row: _order(seed, row[0]))]


def _order(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest()


def draw_captions(shards: list[str], kinds: list[str], num: int = MAX_COMPARED) -> dict[str, list[str]]:
    """Up to `num` captions of each kind, of the same images for all: those that have every one of the kinds.

    Whole shards are read in a drawn order until there are enough, so that a large set is not read to its end.
    """
    drawn = draw(_rows(shards, kinds, num), num)
    return {kind: [texts[kind] for texts in drawn] for kind in kinds}


def _rows(shards: list[str], kinds: list[str], num: int) -> Iterator[tuple[str, dict[str, str]]]:
    found = 0
    for url in draw(((url.rsplit("/", 1)[-1], url) for url in shards), len(shards)):
        for sample in read_captions(url, []):
            texts = {caption.kind: caption.text for caption in captions_of(sample) if caption.text}
            if all(kind in texts for kind in kinds):
                found += 1
                yield sample.uid, {kind: texts[kind] for kind in kinds}
        if found >= num:
            return


def closeness(captions: dict[str, list[str]], reference: list[str], scorer: "ClipScorer") -> dict[str, Any]:
    """How close captions of each kind come to a reference set, in what a CLIP text encoder makes of them.

    A text that fits the encoder's context is embedded whole; of a longer one, it is the mean of its sentences' vectors,
    made 1 long again. The fewer captions, the larger the Fréchet distance, so all are of the same number: every kind,
    one half of the reference set, and its other half, whose distance is that of captions which could not be closer.

    Args:
        captions: kind → captions.
        reference: captions in a drawn order, twice as many as are compared.
        scorer: whose text encoder it is.

    Returns:
        `num_captions` of each; `model`; `bandwidth`; and `kinds`, by name (`reference` is its other half): `frechet`,
        the squared Fréchet distance (Heusel et al. 2017, eq. 6); `mmd2`, the squared maximum mean discrepancy, unbiased
        (Gretton et al. 2012, eq. 3), of a Gaussian kernel whose bandwidth is the reference's median distance; and
        `num_cut`, captions of which the encoder read only a part.

    Raises:
        UserError: there are fewer than two captions to compare.
    """
    num = min([len(reference) // 2, MAX_COMPARED, *map(len, captions.values())])
    if num < 2:
        counts = ", ".join(f"{len(texts)} {kind}" for kind, texts in captions.items())
        raise UserError(f"closeness needs 2 captions of each kind and 4 references, and there are {counts} and "
                        f"{len(reference)} references: name more")
    first, _ = embed(reference[:num], scorer)
    bandwidth = _median_distance(first)
    root, within = _root(np.cov(first, rowvar=False)), _mean_kernel(first, None, bandwidth)
    kinds = {}
    for kind, texts in {**captions, "reference": reference[num:]}.items():
        vectors, num_cut = embed(texts[:num], scorer)
        mmd2 = within + _mean_kernel(vectors, None, bandwidth) - 2 * _mean_kernel(first, vectors, bandwidth)
        kinds[kind] = {"frechet": round(frechet_distance(first, vectors, root), 6), "mmd2": round(mmd2, 6),
                       "num_cut": num_cut}
    return {"num_captions": num, "model": scorer.name.split(",")[0], "bandwidth": round(bandwidth, 4), "kinds": kinds}


def embed(texts: list[str], scorer: "ClipScorer") -> tuple[np.ndarray, int]:
    """Texts → (N, D) float64, rows of length 1; and how many of them were read in part only."""
    parts = [[text] if scorer.num_tokens(text) <= scorer.context_length else sentences(text) for text in texts]
    num_cut = sum(len(each) > MAX_SENTENCES or any(scorer.num_tokens(part) > scorer.context_length for part in each)
                  for each in parts)
    read = [each[:MAX_SENTENCES] for each in parts]
    vectors = scorer.embed_texts([part for each in read for part in each])
    starts = np.cumsum([0, *map(len, read)])[:-1]
    sums = np.add.reduceat(vectors, starts, axis=0)
    return sums / np.linalg.norm(sums, axis=1, keepdims=True), num_cut


def frechet_distance(a: np.ndarray, b: np.ndarray, root_a: np.ndarray | None = None) -> float:
    """Squared Fréchet distance of two Gaussians with the means and covariances of two sets of vectors, (N, D) each.

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), where with Σ₁ = R Rᵀ the last is the sum of the roots of the eigenvalues of
    Rᵀ Σ₂ R.
    """
    root = _root(np.cov(a, rowvar=False)) if root_a is None else root_a
    sigma = np.cov(b, rowvar=False)
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root.T @ sigma @ root), 0, None)).sum()
    apart = a.mean(axis=0) - b.mean(axis=0)
    return max(0.0, float(apart @ apart + np.square(root).sum() + np.trace(sigma) - 2 * shared))


def _root(matrix: np.ndarray) -> np.ndarray:
    """R (D, rank) with R Rᵀ = the positive semidefinite matrix (D, D), without what is zero but for rounding."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def _mean_kernel(a: np.ndarray, b: np.ndarray | None, bandwidth: float) -> float:
    """Mean Gaussian kernel over pairs of two sets, or over the pairs of different vectors of one."""
    other = a if b is None else b
    total = 0.0
    for start in range(0, len(a), 1000):
        total += float(np.exp(-_squared_distances(a[start:start + 1000], other) / (2 * bandwidth**2)).sum())
    return total / (len(a) * len(other)) if b is not None else (total - len(a)) / (len(a) * (len(a) - 1))


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.clip(np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T, 0, None)


def _median_distance(vectors: np.ndarray) -> float:
    """Of the first thousand; 1 where they are all the same."""
    some = vectors[:1000]
    return float(np.sqrt(np.median(_squared_distances(some, some)[np.triu_indices(len(some), 1)]))) or 1.0
