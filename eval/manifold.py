"""Precision, recall, density and coverage: are drawn images like real ones, and do they cover what real ones show?

Around every image of one set lies a ball that reaches to its k-th nearest neighbour in that set; together the balls are
the set's manifold. k is 3 for precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), 5 for density and
coverage (Naeem et al. 2020, arXiv 2002.09797).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from eval.pseudovalues import Distance

NEAREST = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}
"""Figure → its k."""
BLOCK = 4096
"""Rows at a time: a block of distances is 128 MiB."""
WHY = "no interval: it is a share of the real images, not of the drawn ones"


@dataclass(frozen=True)
class Radii:
    """Squared distances of every image of a set to its k-th nearest neighbours in that set."""

    squared: dict[int, np.ndarray]
    """k → (N,) float64."""


def manifold(features: np.ndarray, reference: np.ndarray, radii: Radii | None = None) -> dict[str, Distance]:
    """The four figures of features (N, D) against those of real images (M, D); all higher is better.

    Precision is the share of drawn images within a real image's ball, density how many such balls hold one, by k;
    recall is the share of real images within a drawn image's ball, coverage that of real images whose ball holds a
    drawn one. Precision and density are means over the drawn images, so that each has a value of its own.

    Args:
        features: of drawn images; more than 5.
        reference: of real images; more than 5.
        radii: `radii_of(reference)`, where they are known.
    """
    drawn, real = (np.asarray(each, dtype=np.float64) for each in (features, reference))
    of_real, of_drawn = radii or radii_of(real), radii_of(drawn)
    within, held = np.zeros(len(drawn), dtype=bool), np.zeros(len(drawn))
    recalled, nearest = np.zeros(len(real), dtype=bool), np.full(len(real), np.inf)
    for rows, columns, squared in _blocks(drawn, real):
        within[rows] |= (squared <= of_real.squared[NEAREST["precision"]][columns]).any(axis=1)
        held[rows] += (squared <= of_real.squared[NEAREST["density"]][columns]).sum(axis=1)
        recalled[columns] |= (squared <= of_drawn.squared[NEAREST["recall"]][rows][:, None]).any(axis=0)
        nearest[columns] = np.minimum(nearest[columns], squared.min(axis=0))
    density = held / NEAREST["density"]
    covered = nearest <= of_real.squared[NEAREST["coverage"]]
    return {"precision": Distance(float(within.mean()), within.astype(np.float64)),
            "recall": Distance(float(recalled.mean()), None, WHY),
            "density": Distance(float(density.mean()), density),
            "coverage": Distance(float(covered.mean()), None, WHY)}


def radii_of(features: np.ndarray) -> Radii:
    """Of a set (N, D); `ValueError` where N is no more than the largest k."""
    values = np.asarray(features, dtype=np.float64)
    most = max(NEAREST.values())
    if len(values) <= most:
        raise ValueError(f"a {most}-th nearest neighbour needs more than {most} images, not {len(values)}")
    nearest = np.full((len(values), most + 1), np.inf)  # itself is the nearest
    for rows, columns, squared in _blocks(values, values):
        squared[np.arange(rows.start, rows.stop)[:, None] == np.arange(columns.start, columns.stop)] = 0.0
        both = np.concatenate([nearest[rows], squared], axis=1)
        nearest[rows] = np.partition(both, most, axis=1)[:, :most + 1]
    nearest.sort(axis=1)
    return Radii({k: nearest[:, k] for k in sorted(set(NEAREST.values()))})


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Rows of `a`, rows of `b`, and their squared distances."""
    of_a, of_b = ((each ** 2).sum(axis=1) for each in (a, b))
    for start in range(0, len(a), BLOCK):
        rows = slice(start, min(start + BLOCK, len(a)))
        for other in range(0, len(b), BLOCK):
            columns = slice(other, min(other + BLOCK, len(b)))
            squared = of_a[rows][:, None] + of_b[columns] - 2 * a[rows] @ b[columns].T
            yield rows, columns, np.clip(squared, 0, None)
