"""BLEU, ROUGE-L and CIDEr-D of tokenized captions, as coco-caption computes them, with frozen document frequencies.

All take candidates, one an image, and references, one or more an image, as lists of words (`eval.caption_tokens`), and
give a row an image, so that images can be resampled. CIDEr-D is a short caption's score: against short references a
correct caption of 40 words gets nearly 0. Do not rank long captions by it.
"""

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

Words = Sequence[str]
Ngram = tuple[str, ...]

MAX_N = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0
_SCHEMA = 1


def ngram_counts(words: Words) -> Counter[Ngram]:
    """How often a caption has each n-gram of 1 to `MAX_N` words."""
    return Counter(chain.from_iterable(ngrams(words, n) for n in range(1, MAX_N + 1)))


def ngrams(words: Words, n: int) -> Iterable[Ngram]:
    """The n-grams of a caption, in order; none if it has fewer than n words."""
    return zip(*(words[start:] for start in range(n)), strict=False)


# --- BLEU ----------------------------------------------------------------------------------------------------------


def bleu_statistics(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """What corpus BLEU needs of each caption: sums of rows are the statistics of the captions together.

    Returns:
        (N, 10) float64: matched n-grams for n = 1…4, each counted at most as often as one reference has it; n-grams for
        n = 1…4; words of the caption; and of the reference nearest in length, the shorter one of two.
    """
    _check_paired(candidates, references)
    return np.array([_bleu_row(words, refs) for words, refs in zip(candidates, references, strict=True)], np.float64)


def _bleu_row(words: Words, references: Sequence[Words]) -> list[int]:
    allowed: Counter[Ngram] = Counter()
    for reference in references:
        allowed |= ngram_counts(reference)
    matched = [0] * MAX_N
    for ngram, count in ngram_counts(words).items():
        matched[len(ngram) - 1] += min(count, allowed[ngram])
    nearest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    return [*matched, *(max(0, len(words) - n) for n in range(MAX_N)), len(words), nearest]


def bleu(statistics: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002, section 2.3), not smoothed.

    Args:
        statistics: (…, 10), sums of rows of `bleu_statistics` for the BLEU of a corpus.

    Returns:
        (…, 4) float64 in [0, 1]; 0 where no n-gram of some length matches, or there is none so long.
    """
    matched, total = statistics[..., :MAX_N], statistics[..., MAX_N:2 * MAX_N]
    length, reference_length = statistics[..., -2], statistics[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.where(total > 0, matched / total, 0))
        brevity = np.minimum(0, 1 - np.where(length > 0, reference_length / length, np.inf))
    result: np.ndarray = np.exp(np.cumsum(logs, axis=-1) / np.arange(1, MAX_N + 1) + brevity[..., None])
    return result


# --- ROUGE-L -------------------------------------------------------------------------------------------------------


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """ROUGE-L (Lin 2004, equations 2 to 4) with beta 1.2, which weighs recall over precision.

    As coco-caption does, precision is the best over the references and so is recall, maybe of another reference.

    Returns:
        (N,) float64 in [0, 1]; 0 for a caption without words.
    """
    _check_paired(candidates, references)
    return np.array([_rouge_l(words, refs) for words, refs in zip(candidates, references, strict=True)], np.float64)


def _rouge_l(words: Words, references: Sequence[Words]) -> float:
    common = [(_common_length(words, reference), len(reference)) for reference in references]
    if not any(length for length, _ in common):
        return 0.0
    precision = max(length for length, _ in common) / len(words)
    recall = max(length / size for length, size in common if size)
    return (1 + ROUGE_BETA ** 2) * precision * recall / (recall + ROUGE_BETA ** 2 * precision)


def _common_length(first: Words, second: Words) -> int:
    """Length of the longest common subsequence: a row of the usual table is one integer, a bit a word (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & full
    return len(first) - row.bit_count()


# --- CIDEr-D -------------------------------------------------------------------------------------------------------


class DocumentFrequencies:
    """In how many images' references each n-gram is found: counted once and kept, so that scores stay comparable.

    coco-caption counts them in the references of whichever images it is given, so its CIDEr-D changes with the set.

    Args:
        num_images: of the reference set.
        counts: n-gram of 1 to 4 words → number of images, at most `num_images`.

    Raises:
        ValueError: there is but one image, so that every weight and every score would be 0; or a count cannot be.
    """

    def __init__(self, num_images: int, counts: dict[Ngram, int]) -> None:
        if num_images < 2:
            raise ValueError(f"CIDEr-D cannot weigh words by {num_images} image{'s' * (num_images != 1)}: every weight "
                             "would be 0, and so every score; take document frequencies from a larger reference set")
        if any(not 1 <= count <= num_images for count in counts.values()):
            raise ValueError(f"document frequencies must lie between 1 and the number of images, {num_images}")
        self.num_images = num_images
        self.counts = counts
        self._log_images = math.log(num_images)

    @classmethod
    def of(cls, references: Sequence[Sequence[Words]]) -> "DocumentFrequencies":
        """Count in the references of a set of images."""
        counts: Counter[Ngram] = Counter()
        for of_image in references:
            counts.update(set().union(*(ngram_counts(reference) for reference in of_image)))
        return cls(len(references), dict(counts))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DocumentFrequencies":
        """Read what `save` wrote.

        Raises:
            ValueError: the file cannot be read, or holds something else.
        """
        try:
            kept = json.loads(Path(path).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot read document frequencies from {path}: {' '.join(str(error).split())}") from error
        if not _is_kept(kept):
            raise ValueError(f"{path} does not hold document frequencies of schema {_SCHEMA}: write it again with "
                             "DocumentFrequencies.save")
        return cls(kept["num_images"], {tuple(ngram.split(" ")): count for ngram, count in kept["counts"].items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON: `{"schema": 1, "num_images": N, "counts": {"a red": 12, …}}`; equal sets give equal bytes."""
        counts = {" ".join(ngram): count for ngram, count in self.counts.items()}
        text = json.dumps({"schema": _SCHEMA, "num_images": self.num_images, "counts": counts}, ensure_ascii=False,
                          sort_keys=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=Path(path).parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)

    def weight(self, ngram: Ngram) -> float:
        """ln(images / images with it), at least 0; an n-gram that no image has counts as if one had it."""
        return self._log_images - math.log(self.counts.get(ngram, 1))


def _is_kept(kept: Any) -> bool:
    return (isinstance(kept, dict) and kept.get("schema") == _SCHEMA and type(kept.get("num_images")) is int
            and isinstance(kept.get("counts"), dict) and all(type(count) is int for count in kept["counts"].values()))


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]],
            frequencies: DocumentFrequencies) -> np.ndarray:
    """CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726, section 5 and equations 1 to 4): sigma 6, n = 1…4, times 10.

    Args:
        frequencies: of a reference set, frozen: a caption's score then depends on its own references only.

    Returns:
        (N,) float64 in [0, 10]; the corpus score is the mean.
    """
    _check_paired(candidates, references)
    return np.array([_cider_d(_Weighted(words, frequencies), [_Weighted(each, frequencies) for each in refs])
                     for words, refs in zip(candidates, references, strict=True)], np.float64)


class _Weighted:
    """A caption as a vector of tf-idf for every n, with its length. (Raw counts: the cosine cancels their sum.)"""

    def __init__(self, words: Words, frequencies: DocumentFrequencies) -> None:
        self.num_words = len(words)
        self.vector = {ngram: count * frequencies.weight(ngram) for ngram, count in ngram_counts(words).items()}
        squares = [0.0] * MAX_N
        for ngram, weight in self.vector.items():
            squares[len(ngram) - 1] += weight ** 2
        self.norms = [math.sqrt(square) for square in squares]


def _cider_d(candidate: _Weighted, references: Sequence[_Weighted]) -> float:
    return CIDER_SCALE * sum(_similarity(candidate, reference) for reference in references) / len(references)


def _similarity(candidate: _Weighted, reference: _Weighted) -> float:
    """Mean over n of the cosines, clipped to the reference's weights and damped by the difference in length."""
    products = [0.0] * MAX_N
    for ngram, weight in candidate.vector.items():
        wanted = reference.vector.get(ngram)
        if wanted:
            products[len(ngram) - 1] += min(weight, wanted) * wanted
    cosines = (product / (a * b) for product, a, b in zip(products, candidate.norms, reference.norms, strict=True)
               if product)
    difference = candidate.num_words - reference.num_words
    return math.exp(-difference ** 2 / (2 * CIDER_SIGMA ** 2)) * sum(cosines) / MAX_N


def _check_paired(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} captions for the references of {len(references)} images")
    for place, of_image in enumerate(references):
        if not of_image:
            raise ValueError(f"image {place} has no reference captions: give at least one, or leave the image out")
