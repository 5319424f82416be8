"""Is one arm better than another? Paired statistics over prompts, with numpy alone.

The prompt is the unit: two arms draw the same prompts from the same noise, so what is resampled is the difference of
their scores on a prompt. Pooling several votes or seeds of one prompt as if they were independent overstates certainty.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

ALPHA = 0.05
_CHUNK = 2_000_000  # random numbers in memory at once


def paired_difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, seed: int,
                      num_resamples: int = 2000) -> dict[str, Any]:
    """Mean difference a − b over pairs: 95 % percentile bootstrap interval and sign-flip p-value.

    The interval resamples prompts with replacement (Efron 1979). The p-value flips the signs of the differences, which
    under the null hypothesis are symmetric about 0 (Fisher 1935); it counts the observed one among the draws, so it is
    never 0 (Phipson & Smyth 2010).

    Args:
        a: scores of arm A, (N,), one a prompt, higher is better.
        b: scores of arm B on the same prompts, in the same order.
        seed: of both kinds of draws.
        num_resamples: of each kind.

    Returns:
        `difference` (mean of a − b), `ci` [low, high], `p` (two-sided), and `verdict`: "better" or "worse" (A than B)
        if the interval excludes 0 and p < 0.05, else "can't tell".

    Raises:
        ValueError: the two differ in length, are empty, or hold what is not a finite number.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"paired scores must be two equal lists of numbers, not {first.shape} and {second.shape}")
    if not first.size or not np.isfinite(first).all() or not np.isfinite(second).all():
        raise ValueError("paired scores must be finite numbers, at least one pair")
    differences = first - second
    observed = float(differences.mean())
    rng = np.random.default_rng(seed)
    low, high = np.quantile(_bootstrap_means(differences, num_resamples, rng), [ALPHA / 2, 1 - ALPHA / 2])
    # What differs from the observed only by rounding is as extreme as the observed.
    as_extreme = np.abs(_flipped_means(differences, num_resamples, rng)) >= abs(observed) * (1 - 1e-9)
    p = (1 + int(as_extreme.sum())) / (1 + num_resamples)
    return {"difference": observed, "ci": [float(low), float(high)], "p": p, "verdict": _verdict(low, high, p)}


def _verdict(low: float, high: float, p: float) -> str:
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
