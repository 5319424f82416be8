"""How good captions are, against people's: BLEU, ROUGE-L, CIDEr-D, METEOR, SPICE, length, repetition, diversity.

The figures are coco-caption's to four digits (its published ones: tests/test_eval_captions.py), with two differences
that are meant: CIDEr-D's document frequencies can be frozen, so that a caption's score does not hang on which others
are scored with it; and every figure comes with an interval.

    scored = score_captions(candidates, references, frequencies)      # images × figures; no Java, no network
    scored = with_meteor(scored)                                      # and with_spice; need Java
    scored = scored.with_scores("clipscore_hessel", scores)           # and others, see eval.clipscore_hessel
    report = summarize(scored, seed=0)
    differences = compare_captioners(scored, other, seed=0)

Read long captions by their length and repetition too: n-gram scores against short references fall to 0 for them.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from eval.caption_java import meteor, meteor_statistics, spice
from eval.caption_measures import NUM_RESAMPLES, Diversity, Measure, difference, intervals, ratio
from eval.caption_scores import DocumentFrequencies, Words, bleu, bleu_statistics, cider_d, ngrams, rouge_l
from eval.caption_tokens import tokenize

Captions = Mapping[Any, str] | Sequence[str]
References = Mapping[Any, Sequence[str]] | Sequence[Sequence[str]]

LONG = 25
"""Words of references from which on CIDEr-D says little: people's captions of 31 words score .013 against others'."""
REPEATED_WORDS = 4
"""So many words in a row count as said again."""
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|\n+|(?<=[。！？])")


@dataclass(frozen=True)
class ScoredCaptions:
    """The captions of one captioner, scored image by image."""

    keys: list[Any]
    """Keys of the images, sorted; or places, if lists were given. Every array of scores has this order."""
    candidates: list[list[str]]
    """Words of the captions."""
    references: list[list[list[str]]]
    """Words of the references."""
    frequencies: DocumentFrequencies
    """What CIDEr-D was weighed with."""
    measures: dict[str, Measure]
    """Figures by name, see `score_captions`."""
    diversity: dict[str, Diversity]
    """Figures that count different things."""

    @property
    def values(self) -> dict[str, float]:
        """Every figure, by name."""
        return ({name: each.value for name, each in self.measures.items()}
                | {name: each.value for name, each in self.diversity.items()})

    def with_scores(self, name: str, scores: Mapping[Any, float] | Sequence[float] | np.ndarray) -> "ScoredCaptions":
        """The same with one figure more: the mean of scores by key (or by place, if captions were given as lists).

        Raises:
            ValueError: an image has no score, or one that is no finite number.
        """
        try:
            found = [scores[key] for key in self.keys]
        except (KeyError, IndexError) as error:
            raise ValueError(f"{name} lacks scores: give one for each of the {len(self.keys)} images, by the captions' "
                             "own keys") from error
        if len(scores) != len(self.keys):
            raise ValueError(f"{len(scores)} scores of {name} for {len(self.keys)} images")
        return replace(self, measures={**self.measures, name: Measure.mean(found)})


def evaluate_captions(candidates: Captions, references: References, seed: int,
                      frequencies: DocumentFrequencies | None = None,
                      num_resamples: int = NUM_RESAMPLES) -> dict[str, Any]:
    """All figures that need no Java: `summarize(score_captions(…), …)`."""
    return summarize(score_captions(candidates, references, frequencies), seed, num_resamples)


def score_captions(candidates: Captions, references: References,
                   frequencies: DocumentFrequencies | None = None) -> ScoredCaptions:
    """Score the captions of one captioner.

    Figures, all of words as `eval.caption_tokens` finds them: `bleu_1` … `bleu_4`, `rouge_l` in [0, 1]; `cider_d` in
    [0, 10]; `mean_words`, of a caption; `mean_reference_words`; `length_ratio`, of these two; `repetition`, the share
    of captions that say `REPEATED_WORDS` words in a row twice, or a sentence; `reference_repetition`, the same of the
    references; `loops`, the share that do so twice in a row, see `loops`; `distinct_1` and `distinct_2`, different
    words and pairs of words over all of them (Li et al. 2016); `vocabulary`, the number of different words. The last
    three depend on how many captions there are: compare them on the same images only.

    Args:
        candidates: a caption for each image, by key or as a list.
        references: one or more captions of people for each of the same images.
        frequencies: document frequencies for CIDEr-D, from `document_frequencies` of a fixed set of images; by default
            these references', as coco-caption takes them.

    Raises:
        ValueError: there are no captions, the images of the two differ, an image has no references, or something is
            not text; or there is but one image, and no document frequencies are given.
    """
    keys, texts, of_people = _aligned(candidates, references)
    said = [tokenize(text) for text in texts]
    people = [[tokenize(text) for text in each] for each in of_people]
    if frequencies is None:
        frequencies = DocumentFrequencies.of(people)
    counts = bleu_statistics(said, people)
    measures = {f"bleu_{n}": Measure(counts, _Bleu(n)) for n in (1, 2, 3, 4)} | {
        "rouge_l": Measure.mean(rouge_l(said, people)),
        "cider_d": Measure.mean(cider_d(said, people, frequencies))}
    return ScoredCaptions(keys, said, people, frequencies, measures | _described(texts, said, of_people, people),
                          _diversity(said))


def describe(candidates: Captions, references: References) -> dict[str, float]:
    """Length, repetition and diversity alone, from `mean_words` to `vocabulary` of `score_captions`: values only.

    Raises:
        ValueError: as in `score_captions`, except that one image is enough.
    """
    _, texts, of_people = _aligned(candidates, references)
    said, people = [tokenize(text) for text in texts], [[tokenize(text) for text in each] for each in of_people]
    figures: dict[str, Measure | Diversity] = {**_described(texts, said, of_people, people), **_diversity(said)}
    return {name: each.value for name, each in figures.items()}


def summarize(scored: ScoredCaptions, seed: int, num_resamples: int = NUM_RESAMPLES) -> dict[str, Any]:
    """What goes into a report, all of it JSON.

    Returns:
        `num_images`, `num_references`, `document_frequencies` {`num_images`}, and `metrics`, by name {`value`, `ci`
        [low, high]}: 95 % over other images, see `eval.caption_measures`; None with a single image.
    """
    found = intervals(scored.measures, seed, num_resamples)
    metrics = {name: {"value": each.value, "ci": found[name]} for name, each in scored.measures.items()}
    metrics |= {name: {"value": each.value, "ci": each.interval} for name, each in scored.diversity.items()}
    return {"num_images": len(scored.keys), "num_references": sum(map(len, scored.references)),
            "document_frequencies": {"num_images": scored.frequencies.num_images}, "metrics": metrics}


COMPARED = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d", "meteor", "spice", "clipscore_hessel",
            "ref_clipscore", "repetition", "loops")
"""Figures of which more is better, or less. Length and diversity are not: a captioner can have too much of them."""


def compare_captioners(a: ScoredCaptions, b: ScoredCaptions, seed: int,
                       num_resamples: int = NUM_RESAMPLES) -> dict[str, dict[str, Any]]:
    """Differences a − b of two captioners on the same images, for every figure of `COMPARED` that both have.

    Returns:
        By name, what `eval.caption_measures.difference` says: `difference`, `ci`, `p`, `verdict`, …

    Raises:
        ValueError: the two were not scored on the same images, references and document frequencies.
    """
    if a.keys != b.keys or a.references != b.references:
        raise ValueError(f"cannot compare captioners on {len(a.keys)} and {len(b.keys)} images that differ in keys or "
                         "references: score both on the same")
    if (a.frequencies.num_images, a.frequencies.counts) != (b.frequencies.num_images, b.frequencies.counts):
        raise ValueError("cannot compare CIDEr-D by different document frequencies: score both with the same")
    return {name: difference(a.measures[name], b.measures[name], seed, num_resamples)
            for name in COMPARED if name in a.measures and name in b.measures}


def document_frequencies(references: References) -> DocumentFrequencies:
    """Document frequencies for CIDEr-D of a set of images, to be kept (`save`) and used for every captioner.

    Raises:
        ValueError: there are fewer than two images, or something is not text.
    """
    keys = references.keys() if isinstance(references, Mapping) else range(len(references))
    return DocumentFrequencies.of([[tokenize(text) for text in _texts(key, references[key])] for key in keys])


def with_meteor(scored: ScoredCaptions) -> ScoredCaptions:
    """The same with `meteor` (corpus METEOR 1.5). Raises ValueError where `eval.caption_java` does."""
    statistics = meteor_statistics(scored.candidates, scored.references)
    return replace(scored, measures={**scored.measures, "meteor": Measure(statistics, meteor)})


def with_spice(scored: ScoredCaptions) -> ScoredCaptions:
    """The same with `spice`. Raises ValueError where `eval.caption_java` does."""
    return replace(scored, measures={**scored.measures,
                                     "spice": Measure.mean(spice(scored.candidates, scored.references))})


@dataclass(frozen=True)
class _Bleu:
    n: int

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        result: np.ndarray = bleu(sums)[..., self.n - 1]
        return result


# --- length, repetition, diversity -----------------------------------------------------------------------------------


def _described(texts: list[str], said: list[list[str]], of_people: list[list[str]],
               people: list[list[list[str]]]) -> dict[str, Measure]:
    lengths, people_lengths = _column(map(len, said)), _means(map(len, each) for each in people)
    again = _means(map(_repeats, *each) for each in zip(of_people, people, strict=True))
    return {"mean_words": Measure.mean(lengths),
            "mean_reference_words": Measure.mean(people_lengths),
            "length_ratio": Measure(np.stack([lengths, people_lengths], axis=1), ratio),
            "repetition": Measure.mean(_column(map(_repeats, texts, said)), better=-1),
            "reference_repetition": Measure.mean(again, better=-1),
            "loops": Measure.mean(_column(map(_loops, texts, said)), better=-1)}


def _diversity(said: list[list[str]]) -> dict[str, Diversity]:
    return {"distinct_1": distinct(said, 1), "distinct_2": distinct(said, 2), "vocabulary": vocabulary(said)}


def repeats(caption: str) -> bool:
    """Whether a caption says `REPEATED_WORDS` words in a row twice, anywhere, or the same sentence twice.

    Long captions of people do so as well ("on the left side of the"): 44 to 68 % of those of about 180 words in three
    data sets, and 1 % of COCO's. So read the share beside the references'.
    """
    return _repeats(caption, tokenize(caption))


def loops(caption: str) -> bool:
    """Whether a caption says the same thing twice in a row, `REPEATED_WORDS` words or more, or a sentence twice.

    This is what a stuck decoder does. "a dog on a mat a dog on a mat" does, and "big big big big big"; "very very good"
    does not. Of people's captions of about 180 words 0.2 to 0.9 % do.
    """
    return _loops(caption, tokenize(caption))


def _repeats(caption: str, words: Words) -> bool:
    runs = [*ngrams(words, REPEATED_WORDS)]
    return len(set(runs)) < len(runs) or _repeats_sentence(caption)


def _loops(caption: str, words: Words) -> bool:
    places: dict[tuple[str, ...], list[int]] = {}
    for place, run in enumerate(ngrams(words, REPEATED_WORDS)):
        places.setdefault(run, []).append(place)
    apart = {later - earlier for same in places.values() for earlier, later in combinations(same, 2)}
    return any(_repeats_after(words, distance) for distance in sorted(apart)) or _repeats_sentence(caption)


def _repeats_after(words: Words, distance: int) -> bool:
    """Whether as many words as `distance` (and no fewer than `REPEATED_WORDS`) in a row come again that much later."""
    run = 0
    for earlier, later in zip(words, words[distance:], strict=False):
        run = run + 1 if earlier == later else 0
        if run >= max(distance, REPEATED_WORDS):
            return True
    return False


def _repeats_sentence(caption: str) -> bool:
    parts = [part for part in _SENTENCE_END.split(caption) if part]
    if len(parts) < 2:
        return False  # as with most short captions: their words are not looked for again
    sentences = [tuple(found) for part in parts if (found := tokenize(part))]
    return len(set(sentences)) < len(sentences)


def distinct(candidates: Sequence[Words], n: int) -> Diversity:
    """Different n-grams over all n-grams of all captions together (Li et al. 2016); 0 if there are none."""
    different, without = _different(candidates, n)
    of_each = _column(max(0, len(words) - n + 1) for words in candidates)
    total = of_each.sum()
    return Diversity(different / max(total, 1), without / np.maximum(total - of_each, 1))


def vocabulary(candidates: Sequence[Words]) -> Diversity:
    """The number of different words of all captions together."""
    return Diversity(*_different(candidates, 1))


def _different(candidates: Sequence[Words], n: int) -> tuple[int, np.ndarray]:
    """How many different n-grams there are, and how many without each caption."""
    found = [set(ngrams(words, n)) for words in candidates]
    captions_with = Counter(ngram for each in found for ngram in each)
    only_here = _column(sum(captions_with[ngram] == 1 for ngram in each) for each in found)
    return len(captions_with), len(captions_with) - only_here


def _means(values: Iterable[Iterable[float]]) -> np.ndarray:
    return _column(map(fmean, values))


def _column(values: Iterable[float]) -> np.ndarray:
    return np.fromiter(values, np.float64)


# --- what is given ---------------------------------------------------------------------------------------------------


def _aligned(candidates: Captions, references: References) -> tuple[list[Any], list[str], list[list[str]]]:
    """Keys in a fixed order, so that results do not hang on the order of what is given; captions; references."""
    if not candidates:
        raise ValueError("there are no captions to score: give at least one")
    if isinstance(candidates, Mapping) and isinstance(references, Mapping):
        _check_keys(candidates.keys(), references.keys())
        keys: list[Any] = sorted(candidates, key=lambda key: (str(type(key)), key))
    elif isinstance(candidates, Mapping | str) or isinstance(references, Mapping | str):
        raise ValueError("captions and references must both be by key, or both be lists")
    elif len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} captions for the references of {len(references)} images")
    else:
        keys = [*range(len(candidates))]
    wrong = [key for key in keys if not isinstance(candidates[key], str)]
    if wrong:
        raise ValueError(f"the caption of image {wrong[0]!r} is no text but {type(candidates[wrong[0]]).__name__}")
    return keys, [candidates[key] for key in keys], [_texts(key, references[key]) for key in keys]


def _check_keys(captioned: Any, described: Any) -> None:
    for missing, what in ((captioned - described, "references"), (described - captioned, "caption")):
        if missing:
            named = ", ".join(sorted(map(repr, missing))[:3])
            raise ValueError(f"{len(missing)} image{'s' * (len(missing) > 1)} without {what}: {named}"
                             f"{' …' * (len(missing) > 3)}; score captions and references of the same images")


def _texts(key: Hashable, references: Any) -> list[str]:
    if isinstance(references, str) or not isinstance(references, Sequence) or not all(
            isinstance(text, str) for text in references):
        raise ValueError(f"the references of image {key!r} must be a list of texts")
    if not any(tokenize(text) for text in references):
        raise ValueError(f"image {key!r} has no references with words in them: give at least one, or leave it out")
    return [*references]
