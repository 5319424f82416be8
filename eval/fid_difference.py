"""Is the FID of one arm lower than another's? Resampling prompts, the same for all arms, and what that says.

One FID must not be bootstrapped: it is biased upward by about (some constant of the features) / n, a resample doubles
that bias, and the "interval" misses the very value it belongs to. In the difference of two arms, over the same prompts
and against the same reference, the greater part of the bias cancels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.fid import Statistics, distance_to, statistics
from eval.statistics import ALPHA, MIN_SEEDS, draw_seeds, verdict_of

MAX_DIM = 256
"""Features of more dimensions make a resample too slow: an eigendecomposition costs the cube of it."""
IMAGES_PER_FEATURE = 2
"""With fewer images for each feature the bias no longer goes by 1 / n, and the interval misses; measured, see tests."""
NUM_RESAMPLES = 200


@dataclass(frozen=True)
class Fids:
    """The FID of one arm and training seed: as it is, and as resamples of its prompts give it."""

    observed: float
    resampled: np.ndarray
    """(R,): the r-th of every arm and training seed is of the same prompts."""


def why_no_interval(num_images: int, dim: int) -> str | None:
    """A note where no interval can be given; None where one can."""
    if dim > MAX_DIM:
        return f"no interval: resampling features of {dim:,} dimensions would take too long (at most {MAX_DIM})"
    if num_images < IMAGES_PER_FEATURE * dim:
        return (f"no interval: {num_images:,} images are too few for {dim:,} features "
                f"(at least {IMAGES_PER_FEATURE * dim:,})")
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


def fid_difference(a: list[Fids], b: list[Fids], seed: int) -> dict[str, Any]:
    """FID of arm A against arm B, by difference and by ratio, each with its 95 % interval; lower is better.

    Both are lists over the same training seeds, in the same order.

    A resample's FID is off from the observed one by as much as that is off from the FID of endless images, in scatter
    and in bias. So the difference has the basic interval, observed − (resampled − observed) (Davison & Hinkley 1997,
    §5.2.1), which takes out what bias is left of it; percentiles of the resamples would double that. The ratio has
    percentiles, as its scatter goes by its size, of FIDs with the bias taken out. Neither need have the observed value
    in its middle. From `MIN_SEEDS` training seeds on seeds are resampled too, as in `eval.statistics`.

    Returns:
        `difference` (a − b, mean over seeds), `ci`, `ratio` (of the means over seeds, a / b), `ratio_ci`, `p`
        (two-sided, by the same resamples), `verdict` of A, and `resampled`.
    """
    two_levels = len(a) >= MIN_SEEDS
    first, second = (_over_seeds(each, two_levels, seed) for each in (a, b))
    means = [float(np.mean([fids.observed for fids in each])) for each in (a, b)]
    difference = means[0] - means[1]
    shifts = (first - second) - difference
    low, high = (float(difference - shift) for shift in np.quantile(shifts, [1 - ALPHA / 2, ALPHA / 2]))
    at_least, at_most = (shifts >= difference).sum(), (shifts <= difference).sum()
    p = min(1.0, 2 * (1 + float(min(at_least, at_most))) / (1 + len(shifts)))
    return {"difference": difference, "ci": [low, high], **_ratio(means, [first, second]), "p": p,
            "verdict": verdict_of(-high, -low, p), "resampled": "prompts and seeds" if two_levels else "prompts"}


def _ratio(means: list[float], draws: list[np.ndarray]) -> dict[str, Any]:
    """No interval where an FID is no more than its bias."""
    # Off by the bias twice: once as all FIDs of so many images are, and once more as resamples of them are.
    first, second = (each - 2 * (each.mean() - mean) for each, mean in zip(draws, means, strict=True))
    ratio = means[0] / means[1] if means[1] > 0 else None
    if min(first.min(), second.min()) <= 0:
        return {"ratio": ratio, "ratio_ci": None}
    low, high = np.quantile(first / second, [ALPHA / 2, 1 - ALPHA / 2])
    return {"ratio": ratio, "ratio_ci": [float(low), float(high)]}


def _over_seeds(fids: list[Fids], two_levels: bool, seed: int) -> np.ndarray:
    """Mean FIDs over all seeds, or over those that each resample draws: (R,)."""
    resampled = np.array([each.resampled for each in fids])
    if not two_levels:
        return np.asarray(resampled.mean(axis=0))
    drawn = draw_seeds(len(resampled), resampled.shape[1], np.random.default_rng(seed))
    return np.asarray(resampled[drawn, np.arange(resampled.shape[1])[:, None]].mean(axis=1))
