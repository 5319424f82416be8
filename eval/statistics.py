"""Is one arm better than another? Paired statistics over prompts and training seeds.

The prompt is the unit: two arms draw the same prompts from the same noise, so what is resampled is the difference of
their scores on a prompt. Pooling several votes or seeds of one prompt as if they were independent overstates certainty.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

ALPHA = 0.05
CANT_TELL = "can't tell"
MIN_SEEDS = 3
"""From so many training seeds on, intervals speak of training anew as well."""
_CHUNK = 2_000_000  # random numbers in memory at once


def paired_difference(a: Sequence[Any] | np.ndarray, b: Sequence[Any] | np.ndarray, seed: int,
                      num_resamples: int = 2000, seeds: Sequence[int] | None = None,
                      lower_is_better: bool = False) -> dict[str, Any]:
    """Mean difference a − b over pairs: 95 % interval and sign-flip p-value.

    The scores of a prompt are averaged over seeds. The interval is that of resampling prompts with replacement (Efron
    1979), and the p-value flips the signs of the prompts' differences, which under the null hypothesis are symmetric
    about 0 (Fisher 1935); it counts the observed one among the draws, so it is never 0 (Phipson & Smyth 2010), and what
    is just as extreme, as scores of yes and no often are, for a half (Lancaster 1961). From `MIN_SEEDS` training seeds
    on both speak of other seeds as well, by `crossed_variance` and Student's t.

    Args:
        a: scores of arm A, (N,), one a prompt, or (R, N), a row a run; NaN where there is none.
        b: scores of arm B on the same prompts and runs, in the same order.
        seed: of both kinds of draws.
        num_resamples: of each kind.
        seeds: (R,) the training seed of each row, see `by_seed`; by default every row has its own.
        lower_is_better: of the scores, as of distances.

    Returns:
        `difference` (mean of a − b over the prompts that both arms have a score for), `ci` [low, high], `p`
        (two-sided), `verdict`: "better" or "worse" (A than B) if the interval excludes 0 and p < 0.05, else
        "can't tell"; `num_prompts` compared; and `over`, what the interval speaks of: "prompts" or "prompts and seeds".

    Raises:
        ValueError: the two differ in shape, share no prompt, or hold an infinite number.
    """
    first, second = (np.atleast_2d(np.asarray(scores, dtype=np.float64)) for scores in (a, b))
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"paired scores must be two equal tables of numbers, not {first.shape} and {second.shape}")
    first, second = by_seed(first, seeds), by_seed(second, seeds)
    differences = mean_over_runs(first) - mean_over_runs(second)
    shared = ~np.isnan(differences)
    if not shared.any() or np.isinf(first).any() or np.isinf(second).any():
        raise ValueError("paired scores must be finite numbers, at least one pair")
    differences, of_seeds = differences[shared], (first - second)[:, shared]
    observed = float(differences.mean())
    rng = np.random.default_rng(seed)
    over_seeds = len(first) >= MIN_SEEDS and len(differences) > 1 and not np.isnan(of_seeds).all(axis=1).any()
    if over_seeds:
        variance, freedom = crossed_variance(of_seeds, differences)
        (low, high), p = around(observed, variance, freedom), p_of(observed, variance, freedom)
    else:
        low, high = np.quantile(_bootstrap_means(differences, num_resamples, rng), [ALPHA / 2, 1 - ALPHA / 2])
        p = _flipped_p(differences, num_resamples, rng)
    return {"difference": observed, "ci": [float(low), float(high)], "p": p,
            "verdict": verdict_of(low, high, p, lower_is_better), "num_prompts": int(shared.sum()),
            "over": "prompts and seeds" if over_seeds else "prompts"}


def paired_ratio(a: np.ndarray, b: np.ndarray, seed: int, seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """The ratio of two means, a / b, with its 95 % interval; scores as of `paired_difference`.

    By the logarithm, whose scatter is, to the first order, that of either score in shares of its mean.

    Returns:
        `ratio` and `ratio_ci`; None where a mean is not clearly above 0: its own interval holds 0.
    """
    of_prompts = [mean_over_runs(by_seed(np.atleast_2d(each), seeds)) for each in (a, b)]
    means = [float(np.nanmean(each)) for each in of_prompts]
    errors = [float(np.nanstd(each)) / math.sqrt((~np.isnan(each)).sum()) for each in of_prompts]
    if any(mean <= 1.96 * error for mean, error in zip(means, errors, strict=True)):
        return {"ratio": None, "ratio_ci": None}
    ratio = means[0] / means[1]
    low, high = paired_difference(np.atleast_2d(a) / means[0], np.atleast_2d(b) / means[1], seed, seeds=seeds)["ci"]
    return {"ratio": ratio, "ratio_ci": [ratio * math.exp(low), ratio * math.exp(high)]}


def unpaired_difference(a: np.ndarray, b: np.ndarray, lower_is_better: bool = False) -> dict[str, Any]:
    """Mean difference a − b of images that are not of the same prompts, by Welch's t (1947).

    Args:
        a: scores of arm A, (N,), at least 2; NaN where there is none.
        b: scores of arm B, (M,), at least 2.
        lower_is_better: of the scores, as of distances.

    Returns:
        As of `paired_difference`; `num_prompts` is None.
    """
    known = [each[~np.isnan(each)] for each in (a, b)]
    difference = float(known[0].mean() - known[1].mean())
    parts = [float(each.var(ddof=1)) / len(each) for each in known]
    variance = sum(parts)
    freedom = variance ** 2 / sum(part ** 2 / (len(each) - 1) for part, each in zip(parts, known, strict=True)) \
        if variance else math.inf
    (low, high), p = around(difference, variance, freedom), p_of(difference, variance, freedom)
    return {"difference": difference, "ci": [low, high], "p": p, "verdict": verdict_of(low, high, p, lower_is_better),
            "num_prompts": None, "over": "images"}


# --- training seeds ------------------------------------------------------------------------------------------------


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of several questions, adjusted so that any of them is wrongly answered in 5 % of cases (Holm 1979).

    Args:
        ps: p-values, one a question.

    Returns:
        Adjusted p-values in the same order, to be held to the same threshold.
    """
    order = sorted(range(len(ps)), key=lambda place: ps[place])
    found, least = [0.0] * len(ps), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * ps[place]))
        found[place] = least
    return found


def by_seed(scores: np.ndarray, seeds: Sequence[int] | None) -> np.ndarray:
    """(R, N), a row a run → (S, N), a row a seed: the mean of its runs.

    Runs of one seed on several base models share order, captions, dropout and noise. They may err together, so they
    count as one; and as every model has every seed, models do not add to what seeds scatter: the result is about them.
    """
    if seeds is None:
        return scores
    labels = np.asarray(seeds)
    return np.array([mean_over_runs(scores[labels == label]) for label in np.unique(labels)])


def crossed_variance(differences: np.ndarray, by_prompt: np.ndarray) -> tuple[float, float]:
    """Variance of a mean over seeds and prompts, and its degrees of freedom.

    Every seed draws every prompt, so the mean scatters by seed and by prompt: the variance by seeds and that by prompts
    are added, and what both hold, the scatter of single pictures, is taken off once (Cameron, Gelbach & Miller 2011,
    two-way clusters; resampling both would count it three times, Owen 2007).

    Args:
        differences: (S, N), a row a seed; NaN where there is none.
        by_prompt: (N,) their means over seeds, none NaN.
    """
    num_seeds, num_prompts = differences.shape
    of_seeds = mean_over_runs(differences.T)
    rest = differences - mean_over_runs(differences) - (of_seeds - of_seeds.mean())[:, None]
    of_pictures = np.nansum(rest ** 2) / (num_seeds - 1) / (num_prompts - 1) / (num_seeds * num_prompts)
    return combined_variance(float(by_prompt.var(ddof=1)) / num_prompts, float(of_seeds.var(ddof=1)) / num_seeds,
                             float(of_pictures), num_seeds)


def combined_variance(of_prompts: float, of_seeds: float, of_pictures: float, num_seeds: int) -> tuple[float, float]:
    """The variances by prompts and by seeds together, less what both hold.

    Returns:
        The variance, never less than either alone, and degrees of freedom for Student's t: those of the seeds, weighed
        by their share of the variance (Satterthwaite 1946).
    """
    whole = max(of_prompts, of_seeds, of_prompts + of_seeds - of_pictures)
    return whole, (num_seeds - 1) * (whole / of_seeds) ** 2 if of_seeds > 0 else math.inf


def around(value: float, variance: float, freedom: float) -> tuple[float, float]:
    """The 95 % interval around a value by Student's t."""
    from scipy import stats  # takes seconds, and planning has no use for it
    half = float(stats.t.isf(ALPHA / 2, freedom)) * math.sqrt(variance)
    return value - half, value + half


def p_of(value: float, variance: float, freedom: float) -> float:
    """Two-sided, of a value that would be 0, by the same t as `around`."""
    if not variance:
        return 1.0 if value == 0 else 0.0
    from scipy import stats
    return 2 * float(stats.t.sf(abs(value) / math.sqrt(variance), freedom))


def mean_over_runs(scores: np.ndarray) -> np.ndarray:
    """(R, N) → (N,): the mean of the scores that a prompt has, NaN where it has none."""
    known = ~np.isnan(scores)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(known, scores, 0).sum(axis=0) / known.sum(axis=0)
    return mean


def verdict_of(low: float, high: float, p: float, lower_is_better: bool = False) -> str:
    """In words, of what the interval and the p-value say together."""
    if p >= ALPHA or low <= 0 <= high:
        return CANT_TELL
    return "better" if (low > 0) != lower_is_better else "worse"


def _bootstrap_means(values: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of resamples with replacement, (num_resamples,)."""
    rows = _rows(values, num_resamples)
    return np.concatenate([values[rng.integers(len(values), size=(count, len(values)))].mean(axis=1) for count in rows])


def _flipped_means(values: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means with every sign drawn anew, (num_resamples,)."""
    rows = _rows(values, num_resamples)
    signs = (rng.integers(2, size=(count, len(values)), dtype=np.int8) * 2 - 1 for count in rows)
    return np.concatenate([sign @ values / len(values) for sign in signs])


def _flipped_p(values: np.ndarray, num_resamples: int, rng: np.random.Generator) -> float:
    """Two-sided p-value of a mean; 1 of one that is 0."""
    observed = abs(float(values.mean()))
    if observed == 0:
        return 1.0
    flipped = np.abs(_flipped_means(values, num_resamples, rng)) / observed
    ties = np.isclose(flipped, 1, rtol=1e-9)  # what differs only by rounding is as extreme
    return float(1 + (flipped[~ties] > 1).sum() + ties.sum() / 2) / (1 + num_resamples)


def _rows(values: np.ndarray, num_resamples: int) -> list[int]:
    """Split so many resamples into chunks that fit into memory."""
    chunk = max(1, _CHUNK // len(values))
    whole, rest = divmod(num_resamples, chunk)
    return [chunk] * whole + [rest] * (rest > 0)
