"""Maximum mean discrepancy between two sets of features, unbiased, and what each drawn image adds to it.

KID (Bińkowski et al. 2018, arXiv 1801.01401) takes a cubic kernel on Inception's features; CMMD (Jayasumana et al.
2024, arXiv 2401.09603) a Gaussian one on CLIP's. Both are computed over all pairs of images: subsets, as KID is usually
drawn from, have the same mean and more noise.
"""

from collections.abc import Callable

import numpy as np

from eval.pseudovalues import Distance

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(N, D) and (M, D) float64 → (N, M)."""
BLOCK = 4096
"""Rows at a time: a block of kernel values is 128 MiB."""
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(a·b / D + 1)³, KID's kernel."""
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)


def gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(−|a − b|² / 2σ²) with σ = 10, CMMD's kernel."""
    squared = (a ** 2).sum(axis=1)[:, None] + (b ** 2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.exp(-squared / (2 * CMMD_SIGMA ** 2)))


def kid(features: np.ndarray, reference: np.ndarray, within_reference: float | None = None,
        prompts: np.ndarray | None = None) -> Distance:
    """KID of features (N, D) to those of real images (M, D); the others as of `squared_mmd`."""
    return squared_mmd(features, reference, cubic, within_reference, prompts)


def cmmd(embeddings: np.ndarray, reference: np.ndarray, within_reference: float | None = None,
         prompts: np.ndarray | None = None) -> Distance:
    """CMMD of CLIP embeddings (N, D) to those of real images (M, D), in thousandths. They are brought to length 1.

    The authors' code leaves the diagonals in, each of which adds (1 − mean kernel) / N of its set; this one does not.
    """
    found = squared_mmd(unit(embeddings), unit(reference), gaussian, within_reference, prompts)
    return Distance(CMMD_SCALE * found.value, None if found.pseudovalues is None else CMMD_SCALE * found.pseudovalues)


def squared_mmd(features: np.ndarray, reference: np.ndarray, kernel: Kernel, within_reference: float | None = None,
                prompts: np.ndarray | None = None) -> Distance:
    """MMD² without bias (Gretton et al. 2012, lemma 6): mean k(x, x′) − 2 mean k(x, y) + mean k(y, y′).

    The pseudovalues are those of its projection on single images (Hoeffding 1948): what an image adds by being like the
    other drawn ones, less what it takes away by being like the real ones.

    Args:
        features: (N, D) of drawn images, N ≥ 2.
        reference: (M, D) of real images, M ≥ 2.
        kernel: see `cubic`, `gaussian`.
        within_reference: `mean_within(reference, kernel)`, where it is known.
        prompts: (N,) which images are of the same prompt, and are alike for that: such pairs are left out, as an image
            and itself are. By default each has its own; of one prompt alone, all pairs count.
    """
    drawn, real = (np.asarray(each, dtype=np.float64) for each in (features, reference))
    if min(len(drawn), len(real)) < 2:
        raise ValueError(f"MMD² needs at least 2 images in each set, not {len(drawn)} and {len(real)}")
    if within_reference is None:
        within_reference = mean_within(real, kernel)
    own = prompts is None or (prompts == prompts[0]).all()  # of a single prompt, there are no other pairs
    alike, num_alike = _of_one_prompt(drawn, np.arange(len(drawn)) if own else np.asarray(prompts), kernel)
    among = (_row_sums(drawn, drawn, kernel) - alike) / (len(drawn) - num_alike)
    across = _row_sums(drawn, real, kernel) / len(real)
    value = float(among.mean() - 2 * across.mean() + within_reference)
    return Distance(value, value + 2 * (among - among.mean()) - 2 * (across - across.mean()))


def mean_within(features: np.ndarray, kernel: Kernel) -> float:
    """Mean kernel over all pairs of two different images of one set."""
    values = np.asarray(features, dtype=np.float64)
    sums = _row_sums(values, values, kernel) - _of_one_prompt(values, np.arange(len(values)), kernel)[0]
    return float(sums.sum() / (len(values) * (len(values) - 1)))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64."""
    values = np.asarray(vectors, dtype=np.float64)
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


def _row_sums(a: np.ndarray, b: np.ndarray, kernel: Kernel) -> np.ndarray:
    """(N,): of each row of `a`, the sum of its kernel values with all rows of `b`."""
    return np.concatenate([sum(kernel(a[start:start + BLOCK], b[other:other + BLOCK]).sum(axis=1)
                               for other in range(0, len(b), BLOCK)) for start in range(0, len(a), BLOCK)])


def _of_one_prompt(values: np.ndarray, prompts: np.ndarray, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, the sum of its kernel values with those of its prompt, itself among them; and how many these are."""
    sums, counts = np.zeros(len(values)), np.zeros(len(values))
    order = np.argsort(prompts, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(prompts[order])) + 1):
        sums[rows], counts[rows] = kernel(values[rows], values[rows]).sum(axis=1), len(rows)
    return sums, counts
