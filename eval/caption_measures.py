"""A figure of a set of captions, its interval, and the difference of two captioners in it.

The image is the unit. Every figure here is a function of sums over images, so resampling images means summing anew:
corpus BLEU and METEOR, which are no means of captions' scores, are resampled as exactly as the means are. All
intervals speak of other images of the same kind, with these references and this one captioner as trained; training it
anew would scatter more. (Document frequencies are frozen, and not resampled.)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.statistics import ALPHA, paired_difference, verdict_of

NUM_RESAMPLES = 2000
_CHUNK = 2_000_000  # random numbers in memory at once


def ratio(sums: np.ndarray) -> np.ndarray:
    """First of two sums over the second: a mean, where the second counts images."""
    result: np.ndarray = sums[..., 0] / sums[..., 1]
    return result


@dataclass(frozen=True)
class Measure:
    """A figure as a function of sums over images.

    Args:
        statistics: (N, M) float64, a row an image.
        of_sums: (…, M) sums of rows → (…) the figure.
        better: 1 if more is better, -1 if less is.
    """

    statistics: np.ndarray
    of_sums: Callable[[np.ndarray], np.ndarray]
    better: int = 1

    @classmethod
    def mean(cls, scores: Sequence[float] | np.ndarray, better: int = 1) -> "Measure":
        """The mean of scores, one a caption.

        Raises:
            ValueError: a score is no finite number.
        """
        column = np.asarray(scores, np.float64)
        if column.ndim != 1 or not np.isfinite(column).all():
            raise ValueError("scores of captions must be finite numbers, one a caption")
        return cls(np.stack([column, np.ones_like(column)], axis=1), ratio, better)

    @property
    def is_mean(self) -> bool:
        """Whether the figure is the mean of `scores`."""
        return self.of_sums is ratio and bool((self.statistics[:, 1] == 1).all())

    @property
    def scores(self) -> np.ndarray:
        """The figure of each caption alone, (N,)."""
        return self.of_sums(self.statistics)

    @property
    def value(self) -> float:
        """The figure of all captions together."""
        return float(self.of_sums(self.statistics.sum(axis=0)))


def intervals(measures: Mapping[str, Measure], seed: int,
              num_resamples: int = NUM_RESAMPLES) -> dict[str, list[float] | None]:
    """95 % intervals of figures of the same images, by resampling images with replacement (Efron 1979).

    All figures are taken from the same resamples.

    Returns:
        [low, high] by name; None of fewer than two images, which say nothing of others.
    """
    if not measures or min(len(each.statistics) for each in measures.values()) < 2:
        return dict.fromkeys(measures)
    columns = np.concatenate([each.statistics for each in measures.values()], axis=1)
    sums = np.concatenate([counts @ columns for counts in _resamples(len(columns), num_resamples, seed)])
    ends = np.cumsum([each.statistics.shape[1] for each in measures.values()])
    parts = np.split(sums, ends[:-1], axis=1)
    return {name: np.quantile(each.of_sums(part), [ALPHA / 2, 1 - ALPHA / 2]).tolist()
            for (name, each), part in zip(measures.items(), parts, strict=True)}


def difference(a: Measure, b: Measure, seed: int, num_resamples: int = NUM_RESAMPLES) -> dict[str, Any]:
    """How far captioner A is from captioner B on the same images, a − b.

    Means of scores go through `eval.statistics.paired_difference`. For corpus figures the interval is that of drawing
    images with replacement, the same for both (Koehn 2004), and p is the share of random exchanges of the two captions
    of every image that move the figure as far (approximate randomization, Noreen 1989; Riezler & Maxwell 2005), the
    observed one counted among them.

    Args:
        a: of captioner A, on N images.
        b: of captioner B, on the same images in the same order.
        seed: of both kinds of draws.
        num_resamples: of each kind.

    Returns:
        `difference`, `ci` [low, high], `p` (two-sided), `verdict`: "better" or "worse" (A than B) or "can't tell";
        `num_images`; and `over`: "images", what interval and p speak of.

    Raises:
        ValueError: the two are not of as many images.
    """
    if a.statistics.shape != b.statistics.shape or a.better != b.better:
        raise ValueError(f"cannot compare captioners on {len(a.statistics)} and {len(b.statistics)} images: give both "
                         "the same images and the same figures")
    if a.is_mean and b.is_mean:
        found = paired_difference(a.scores, b.scores, seed, num_resamples)
        observed, (low, high), p = found["difference"], found["ci"], found["p"]
    else:
        observed, (low, high), p = _corpus_difference(a, b, seed, num_resamples)
    signed = (low, high) if a.better > 0 else (-high, -low)
    return {"difference": observed, "ci": [low, high], "p": p, "verdict": verdict_of(*signed, p),
            "num_images": len(a.statistics), "over": "images"}


def _corpus_difference(a: Measure, b: Measure, seed: int,
                       num_resamples: int) -> tuple[float, tuple[float, float], float]:
    """Difference of two corpus figures, its interval, and p."""
    resampled = np.concatenate([a.of_sums(counts @ a.statistics) - b.of_sums(counts @ b.statistics)
                                for counts in _resamples(len(a.statistics), num_resamples, seed)])
    low, high = np.quantile(resampled, [ALPHA / 2, 1 - ALPHA / 2])
    whole_a, whole_b, apart = a.statistics.sum(axis=0), b.statistics.sum(axis=0), b.statistics - a.statistics
    moved = np.concatenate([taken @ apart for taken in _exchanges(len(apart), num_resamples, seed)])
    exchanged = np.abs(a.of_sums(whole_a + moved) - b.of_sums(whole_b - moved))
    observed = a.value - b.value
    as_extreme = int((exchanged >= abs(observed) * (1 - 1e-9)).sum())
    return observed, (float(low), float(high)), (1 + as_extreme) / (1 + num_resamples)


def _resamples(num_images: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn in each resample: chunks of rows of N counts."""
    rng = np.random.default_rng([seed, 0])
    for count in _rows(num_images, num_resamples):
        drawn = rng.integers(num_images, size=(count, num_images)) + np.arange(count)[:, None] * num_images
        yield np.bincount(drawn.ravel(), minlength=count * num_images).reshape(count, num_images).astype(np.float64)


def _exchanges(num_images: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Which images' captions change sides in each exchange: chunks of rows of N zeros and ones."""
    rng = np.random.default_rng([seed, 1])
    for count in _rows(num_images, num_resamples):
        yield rng.integers(2, size=(count, num_images)).astype(np.float64)


def _rows(num_images: int, num_resamples: int) -> list[int]:
    """Split so many resamples into chunks that fit into memory."""
    chunk = max(1, _CHUNK // num_images)
    whole, rest = divmod(num_resamples, chunk)
    return [chunk] * whole + [rest] * (rest > 0)


# --- figures that are no function of sums ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Diversity:
    """A figure that counts different things over all captions: no sum over images, and biased when images are redrawn.

    Args:
        value: over all captions.
        without: (N,) the same without one image.
    """

    value: float
    without: np.ndarray

    @property
    def interval(self) -> list[float] | None:
        """[low, high], 95 %, about as many other images; None of fewer than two.

        By the delete-one jackknife (Tukey 1958): a resample with replacement holds captions twice, and so would always
        seem less diverse than the captions are.
        """
        num_images = len(self.without)
        if num_images < 2:
            return None
        spread = float(((self.without - self.without.mean()) ** 2).sum()) * (num_images - 1) / num_images
        return [self.value - 1.96 * spread ** 0.5, self.value + 1.96 * spread ** 0.5]
