"""Is one arm better than another? Paired statistics over prompts, with numpy alone.

The prompt is the unit: two arms draw the same prompts from the same noise, so what is resampled is the difference of
their scores on a prompt. Pooling several votes or seeds of one prompt as if they were independent overstates certainty.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

ALPHA = 0.05
MIN_SEEDS = 3
"""From so many training seeds on, intervals speak of training anew as well."""
_CHUNK = 2_000_000  # random numbers in memory at once


def paired_difference(a: Sequence[Any] | np.ndarray, b: Sequence[Any] | np.ndarray, seed: int,
                      num_resamples: int = 2000) -> dict[str, Any]:
    """Mean difference a − b over pairs: 95 % percentile bootstrap interval and sign-flip p-value.

    The scores of a prompt are averaged over seeds, and the interval resamples prompts with replacement (Efron 1979);
    from `MIN_SEEDS` training seeds on, seeds as well, and independently of the prompts (see `draw_seeds`). The p-value
    flips the signs of the prompts' differences, which under the null hypothesis are symmetric about 0 (Fisher 1935);
    it counts the observed one among the draws, so it is never 0 (Phipson & Smyth 2010).

    Args:
        a: scores of arm A, (N,), one a prompt, or (S, N), a row a seed; higher is better; NaN where there is none.
        b: scores of arm B on the same prompts and seeds, in the same order.
        seed: of both kinds of draws.
        num_resamples: of each kind.

    Returns:
        `difference` (mean of a − b over the prompts that both arms have a score for), `ci` [low, high], `p`
        (two-sided), `verdict`: "better" or "worse" (A than B) if the interval excludes 0 and p < 0.05, else
        "can't tell"; `num_prompts` compared; and `resampled`, "prompts" or "prompts and seeds".

    Raises:
        ValueError: the two differ in shape, share no prompt, or hold an infinite number.
    """
    first, second = (np.atleast_2d(np.asarray(scores, dtype=np.float64)) for scores in (a, b))
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"paired scores must be two equal tables of numbers, not {first.shape} and {second.shape}")
    differences = _mean_over_seeds(first) - _mean_over_seeds(second)
    shared = ~np.isnan(differences)
    if not shared.any() or np.isinf(first).any() or np.isinf(second).any():
        raise ValueError("paired scores must be finite numbers, at least one pair")
    first, second, differences = first[:, shared], second[:, shared], differences[shared]
    observed = float(differences.mean())
    rng = np.random.default_rng(seed)
    two_levels = len(first) >= MIN_SEEDS
    means = (_two_level_means(first, second, num_resamples, rng) if two_levels
             else _bootstrap_means(differences, num_resamples, rng))
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    # What differs from the observed only by rounding is as extreme as the observed.
    as_extreme = np.abs(_flipped_means(differences, num_resamples, rng)) >= abs(observed) * (1 - 1e-9)
    p = (1 + int(as_extreme.sum())) / (1 + num_resamples)
    return {"difference": observed, "ci": [float(low), float(high)], "p": p, "verdict": verdict_of(low, high, p),
            "num_prompts": int(shared.sum()), "resampled": "prompts and seeds" if two_levels else "prompts"}


def draw_seeds(num_seeds: int, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Which seeds stand for all in each resample, (num_resamples, S − 1) indices into the S seeds.

    S − 1 are drawn with replacement, not S: the variance of their mean is then the unbiased s²/S (McCarthy & Snowden
    1985), where S draws would give (S − 1)/S of it, a third too little at three seeds. Few seeds stay few all the
    same: where training anew moves an arm by far more than other prompts would, a 95 % interval was measured to cover
    79 % of the time with 3 seeds, and 89 % with 5.
    """
    return rng.integers(num_seeds, size=(num_resamples, num_seeds - 1))


def _two_level_means(a: np.ndarray, b: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Mean differences of resamples of seeds and, crossed with them, of prompts: (num_resamples,)."""
    num_prompts = a.shape[1]
    means = np.empty(num_resamples)
    for place, seeds in enumerate(draw_seeds(len(a), num_resamples, rng)):
        prompts = rng.integers(num_prompts, size=num_prompts)
        difference = (_mean_over_seeds(a[seeds]) - _mean_over_seeds(b[seeds]))[prompts]
        known = difference[~np.isnan(difference)]
        means[place] = known.mean() if known.size else 0.0
    return means


def _mean_over_seeds(scores: np.ndarray) -> np.ndarray:
    """(S, N) → (N,): the mean of the scores that a prompt has, NaN where it has none."""
    known = ~np.isnan(scores)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(known, scores, 0).sum(axis=0) / known.sum(axis=0)
    return mean


def verdict_of(low: float, high: float, p: float) -> str:
    """In words, where higher is better."""
    if p >= ALPHA or low <= 0 <= high:
        return "can't tell"
    return "better" if low > 0 else "worse"


def _bootstrap_means(values: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of resamples with replacement, (num_resamples,)."""
    rows = _rows(values, num_resamples)
    return np.concatenate([values[rng.integers(len(values), size=(count, len(values)))].mean(axis=1) for count in rows])


def _flipped_means(values: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means with every sign drawn anew, (num_resamples,)."""
    rows = _rows(values, num_resamples)
    signs = (rng.integers(2, size=(count, len(values)), dtype=np.int8) * 2 - 1 for count in rows)
    return np.concatenate([sign @ values / len(values) for sign in signs])


def _rows(values: np.ndarray, num_resamples: int) -> list[int]:
    """Split so many resamples into chunks that fit into memory."""
    chunk = max(1, _CHUNK // len(values))
    whole, rest = divmod(num_resamples, chunk)
    return [chunk] * whole + [rest] * (rest > 0)
