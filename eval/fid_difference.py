"""Is the FID of one arm lower than another's? Resampling prompts, the same for all arms, and what that says.

One FID must not be bootstrapped: it is biased upward by about (some constant of the features) / n, a resample doubles
that bias, and the "interval" misses the very value it belongs to. In the difference of two arms, over the same prompts
and against the same reference, the greater part of the bias cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.fid import Statistics, distance_to, statistics
from eval.statistics import MIN_SEEDS, around, by_seed, combined_variance, p_of, verdict_of

MAX_DIM = 256
"""Features of more dimensions make a resample too slow: an eigendecomposition costs the cube of it."""
IMAGES_PER_FEATURE = 2
"""With fewer images for each feature the bias no longer goes by 1 / n, and the interval misses."""
REFERENCES_PER_FEATURE = 10
"""With fewer real images for each feature their own bias, which does not cancel, can outweigh the difference: it draws
an arm of too little spread nearer. Of 64 features and a truly worse such arm, 65 real images called it better 8 times
of 8, 128 five times, 640 never."""
NUM_RESAMPLES = 400
"""A standard deviation of so many draws is known to 4 %."""


@dataclass(frozen=True)
class Fids:
    """The FID of one arm and training seed: as it is, and as resamples of its prompts give it."""

    observed: float
    resampled: np.ndarray
    """(R,): the r-th of every arm and training seed is of the same prompts."""


def why_no_interval(num_images: int, num_reference: int, dim: int) -> str | None:
    """A note where no interval can be given; None where one can."""
    if dim > MAX_DIM:
        return f"no interval: resampling features of {dim:,} dimensions would take too long (at most {MAX_DIM})"
    for number, kind, least in ((num_images, "images", IMAGES_PER_FEATURE * dim),
                                (num_reference, "real images", REFERENCES_PER_FEATURE * dim)):
        if number < least:
            return f"no interval: {number:,} {kind} are too few for {dim:,} features (at least {least:,})"
    return None


def resample_fid(features: np.ndarray, reference: Statistics, seed: int, num_resamples: int = NUM_RESAMPLES) -> Fids:
    """The FID of features, with those of resamples of its prompts.

    Args:
        features: (N, D), row i of prompt i.
        reference: statistics of the real images, which are not resampled.
        seed: of the draws; the same for all that are compared, or the prompts would not be.
        num_resamples: R.
    """
    distance = distance_to(reference)
    draws = np.random.default_rng(seed).integers(len(features), size=(num_resamples, len(features)))
    resampled = [distance(statistics(features[prompts])) for prompts in draws]
    return Fids(distance(statistics(features)), np.array(resampled))


def fid_difference(a: list[Fids], b: list[Fids], seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """FID of arm A against arm B, by difference and by ratio, each with its 95 % interval; lower is better.

    Resamples are off from the observed FID by as much as that is off from the FID of endless images, in scatter and in
    bias. So intervals have the resamples' variance, and all that is given is of FIDs less the bias of so many drawn
    images (Efron & Tibshirani 1993, §10), which two observed FIDs need not have alike; that of so many real images
    stays. From `eval.statistics.MIN_SEEDS` training seeds on they speak of other seeds as well, as those of scores do.

    Args:
        a, b: of the same runs, in the same order.
        seeds: the training seed of each run, see `eval.statistics.by_seed`; by default every run has its own.

    Returns:
        `difference` (a − b, mean over seeds), `ci`, `ratio` (of the means over seeds, a / b) and `ratio_ci` (None where
        an FID is no more than its bias), `p` (two-sided, that of the interval), `verdict` of A, and `over`.
    """
    first, second = (by_seed(_without_bias(each), seeds) for each in (a, b))
    difference, variance, freedom = _mean(first - second)
    low, high = around(difference, variance, freedom)
    p, over = p_of(difference, variance, freedom), "prompts and seeds" if len(first) >= MIN_SEEDS else "prompts"
    return {"difference": difference, "ci": [low, high], **_ratio(first, second), "p": p,
            "verdict": verdict_of(-high, -low, p), "over": over}


def _without_bias(fids: list[Fids]) -> np.ndarray:
    """(runs, R): resampled FIDs of every run, moved to where those of endless images would lie.

    They are off by the bias twice: once as all FIDs of so many images are, and once more as resamples of them are.
    """
    return np.array([each.resampled - 2 * (each.resampled.mean() - each.observed) for each in fids])


def _mean(draws: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds and resamples (S, R), its variance, and the degrees of freedom of that."""
    of_prompts, num_seeds = float(draws.mean(axis=0).var(ddof=1)), len(draws)
    if num_seeds < MIN_SEEDS:
        return float(draws.mean()), of_prompts, math.inf
    of_seeds = float(draws.mean(axis=1).var(ddof=1)) / num_seeds
    return float(draws.mean()), *combined_variance(of_prompts, of_seeds, _of_pictures(draws), num_seeds)


def _of_pictures(draws: np.ndarray) -> float:
    """The share of single pictures in the variance of a mean over seeds.

    Of one seed's FID the resamples' variance is prompts + pictures; of the mean over S seeds, prompts + pictures / S.
    """
    each, mean = float(draws.var(axis=1, ddof=1).mean()), float(draws.mean(axis=0).var(ddof=1))
    return max(0.0, each - mean) / (len(draws) - 1)


def _ratio(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """`ratio` and `ratio_ci`, by the logarithm, whose scatter is that of either FID in shares of its mean."""
    if min(a.mean(axis=0).min(), b.mean(axis=0).min()) <= 0:
        return {"ratio": None, "ratio_ci": None}
    ratio = float(a.mean() / b.mean())
    _, variance, freedom = _mean(a / a.mean() - b / b.mean())
    low, high = around(math.log(ratio), variance, freedom)
    return {"ratio": ratio, "ratio_ci": [math.exp(low), math.exp(high)]}
