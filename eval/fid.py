"""Fréchet distance between the features of two sets of images, in float64 and by symmetric eigendecomposition.

scipy's `sqrtm` has returned 4.5e53 on rank-deficient covariances, and its interface changed under the tools that call
it. Roots of symmetric matrices are always real, and give the same value to ten digits in less time.
"""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recap.errors import UserError
from recap.storage import write_bytes

SCHEMA = 1


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
    is the sum of their roots. R leaves out the directions in which Σ₁ is zero but for rounding: with fewer images than
    features there are many, and the roots of their 1e-16 would add up.
    """
    return distance_to(a)(b)


def distance_to(a: Statistics) -> Callable[[Statistics], float]:
    """`frechet_distance` to one and the same set, whose root is then found only once."""
    root = _root(a.sigma)

    def distance(b: Statistics) -> float:
        if a.dim != b.dim:
            raise ValueError(f"features of {a.dim} and {b.dim} dimensions cannot be compared")
        trace_of_root = np.sqrt(np.clip(np.linalg.eigvalsh(root.T @ b.sigma @ root), 0, None)).sum()
        difference = a.mu - b.mu
        squared = difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace_of_root
        return max(0.0, float(squared))  # below 0 by rounding only

    return distance


def _root(matrix: np.ndarray) -> np.ndarray:
    """R (D, rank) with R Rᵀ = the positive semidefinite matrix (D, D)."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def save(path: Path, found: Statistics, about: dict[str, Any]) -> None:
    """Write statistics with what they are of (network, resize, data) as .npz, whole or not at all."""
    buffer = io.BytesIO()
    text = json.dumps({"schema": SCHEMA, **about})
    np.savez(buffer, mu=found.mu, sigma=found.sigma, n=np.int64(found.n), about=np.str_(text))
    write_bytes(str(path), buffer.getvalue())


def load(path: Path) -> tuple[Statistics, dict[str, Any]]:
    """Read what `save` wrote. `UserError` for anything else; nothing is unpickled."""
    advice = "run `recap reference` again, or name another file"
    try:
        with np.load(path, allow_pickle=False) as content:
            found = Statistics(content["mu"], content["sigma"], int(content["n"]))
            about = json.loads(str(content["about"]))
    except FileNotFoundError:
        raise UserError(f"no reference statistics at {path}: {advice}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile,
            RecursionError) as error:  # what numpy raises on other content
        raise UserError(f"{path} does not hold reference statistics ({type(error).__name__}): {advice}") from None
    shapes_fit = found.mu.ndim == 1 and found.sigma.shape == (found.dim, found.dim) and found.n >= 2
    if not shapes_fit or not isinstance(about, dict) or about.get("schema") != SCHEMA:
        raise UserError(f"{path} holds statistics of another form than schema {SCHEMA}: {advice}")
    return found, about
