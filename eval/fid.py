"""Fréchet distance between the features of two sets of images, in float64 and by symmetric eigendecomposition.

scipy's `sqrtm` has returned 4.5e53 on rank-deficient covariances, and its interface changed under the tools that call
it. Roots of symmetric matrices are always real, and give the same value to ten digits in less time.

One FID must not be bootstrapped: it is biased upward by about (some constant of the features) / n, a resample doubles
that bias, and the "interval" misses the very value it belongs to. `frechet` gives pseudovalues instead, whose mean is
free of it.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from eval.pseudovalues import Distance

IMAGES_PER_FEATURE = 4
"""With fewer images for each feature the bias of halves no longer goes by 1 / n, and an interval misses."""
REFERENCES_PER_FEATURE = 10
"""With fewer real images for each feature their own bias, which does not cancel, can outweigh the difference: it draws
an arm of too little spread nearer. Of 64 features and a truly worse such arm, 65 real images called it better 8 times
of 8, 128 five times, 640 never."""
MIN_PROMPTS = 4
"""Of which a half has two pictures at least."""
NUM_SPLITS = 4
"""Of the images into halves, to tell the bias from."""


@dataclass(frozen=True)
class Statistics:
    """What FID knows of a set of images."""

    mu: np.ndarray
    """(D,) float64: mean of the features."""
    sigma: np.ndarray
    """(D, D) float64: their covariance, normalised by n − 1."""
    n: int
    """Images."""

    @property
    def dim(self) -> int:
        return len(self.mu)


def statistics(features: np.ndarray) -> Statistics:
    """Mean and covariance of features (N, D), in float64. `ValueError` where N < 2."""
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"a covariance needs at least 2 feature vectors, not an array of shape {values.shape}")
    return Statistics(values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False)), len(values))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """FID (Heusel et al. 2017, arXiv 1706.08500, eq. 6): the squared Fréchet distance of two Gaussians.

        |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)

    Σ₁ Σ₂ has the eigenvalues of the symmetric Rᵀ Σ₂ R with Σ₁ = R Rᵀ, so the trace of its root (Dowson & Landau 1982)
    is the sum of their roots.
    """
    return distance_to(a)(b)


def distance_to(a: Statistics) -> Callable[[Statistics], float]:
    """`frechet_distance` to one and the same set, whose root is then found only once."""
    root = _root(a)

    def distance(b: Statistics) -> float:
        if a.dim != b.dim:
            raise ValueError(f"features of {a.dim} and {b.dim} dimensions cannot be compared")
        trace_of_root = np.sqrt(np.clip(np.linalg.eigvalsh(root.T @ b.sigma @ root), 0, None)).sum()
        difference = a.mu - b.mu
        squared = difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace_of_root
        return max(0.0, float(squared))  # below 0 by rounding only

    return distance


def _root(found: Statistics) -> np.ndarray:
    """R (D, rank) with R Rᵀ = Σ (D, D).

    With fewer images than features, directions in which Σ is zero but for rounding are left out: there are many, and
    the roots of their 1e-16 would add up.
    """
    if found.n > found.dim:
        with suppress(np.linalg.LinAlgError):  # a feature may be the same in all images
            return np.linalg.cholesky(found.sigma)
    values, vectors = np.linalg.eigh(found.sigma)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


# --- over images ---------------------------------------------------------------------------------------------------


def frechet(features: np.ndarray, reference: Statistics, prompts: np.ndarray | None = None, seed: int = 0) -> Distance:
    """FID of features (N, D) to real images, with pseudovalues, whose mean is the FID of endless images.

    FID falls with the number of images about as 1 / n (Chong & Forsyth 2020, arXiv 1911.07023): halves of the images
    lie as far above it as it lies above FID∞, and as two halves together err as the whole does, that adds no noise.
    Pictures of a prompt are alike, so that a half has half of the prompts. The influence of an image x, with d = x − μ,
    is the derivative of the distance towards it,

        2 dᵀ(μ − μᵣ) + dᵀ(I − T) d − tr((I − T) Σ),    T = R (Rᵀ Σ R)^−½ Rᵀ,    Σᵣ = R Rᵀ,

    where T is the map that carries the drawn Gaussian to the real one (Bhatia, Jain & Lim 2019, eq. 23).

    Args:
        features: of drawn images.
        reference: statistics of the real ones.
        prompts: (N,) which images are of the same prompt; by default each has its own.
        seed: of the splits into halves.
    """
    values = np.asarray(features, dtype=np.float64)
    found, distance = statistics(values), distance_to(reference)
    value = distance(found)
    own = np.arange(found.n) if prompts is None else np.unique(prompts, return_inverse=True)[1]
    why = why_no_interval(found.n, reference.n, found.dim)
    if (num_prompts := int(own.max()) + 1) < MIN_PROMPTS:
        return Distance(value, None, why or f"no interval: {num_prompts} prompts are too few (at least {MIN_PROMPTS})")
    bias = _of_halves(values, own, distance, seed) - value
    if why is not None:
        return Distance(value, None, why, bias)
    return Distance(value, value - bias + _influence(values, found, reference), bias=bias)


def why_no_interval(num_images: int, num_reference: int, dim: int) -> str | None:
    """A note where no interval can be given; None where one can."""
    for number, kind, least in ((num_images, "images", IMAGES_PER_FEATURE * dim),
                                (num_reference, "real images", REFERENCES_PER_FEATURE * dim)):
        if number < least:
            return f"no interval: {number:,} {kind} are too few for {dim:,} features (at least {least:,})"
    return None


def _influence(values: np.ndarray, found: Statistics, reference: Statistics) -> np.ndarray:
    root = _root(reference)
    roots, vectors = np.linalg.eigh(root.T @ found.sigma @ root)
    kept = roots > roots[-1] * len(roots) * np.finfo(np.float64).eps
    carried = root @ vectors[:, kept]
    towards = np.eye(found.dim) - carried / np.sqrt(roots[kept]) @ carried.T
    offsets = values - found.mu
    squared = (offsets @ towards * offsets).sum(axis=1)
    return np.asarray(2 * offsets @ (found.mu - reference.mu) + squared - squared.mean())


def _of_halves(values: np.ndarray, prompts: np.ndarray, distance: Callable[[Statistics], float], seed: int) -> float:
    """Mean FID of the pictures of half as many prompts, which count from 0."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(NUM_SPLITS):
        order = rng.permutation(prompts.max() + 1)
        found += [distance(statistics(values[np.isin(prompts, half)])) for half in np.array_split(order, 2)]
    return float(np.mean(found))
