"""Drawn images against real ones, by every distance whose network is there."""

import numpy as np

from eval.fid import frechet
from eval.manifold import NEAREST, manifold
from eval.mmd import cmmd, kid
from eval.pseudovalues import Distance
from eval.reference import Reference

FRECHET = {"features": "fid", "dinov2": "fd_dinov2"}
"""Table of `[evaluate]` → what the Fréchet distance by its network is called."""
KEYS = {"features": ("fid", "kid", "precision", "recall", "density", "coverage"), "dinov2": ("fd_dinov2",),
        "cmmd": ("cmmd",)}
"""Table → the distances by its network."""


def distances(table: str, features: np.ndarray, reference: Reference, prompts: np.ndarray | None = None
              ) -> dict[str, Distance]:
    """The distances by one network.

    Args:
        table: `features`, `dinov2` or `cmmd`.
        features: (N, D) of drawn images, N ≥ 2.
        reference: real images by the same network.
        prompts: (N,) which images are of the same prompt; by default each has its own.

    Returns:
        Those of `KEYS`; with fewer than 6 images on a side none of precision and its like.
    """
    if table == "cmmd":
        return {"cmmd": cmmd(features, reference.features, reference.within, prompts)}
    found = {FRECHET[table]: frechet(features, reference.statistics, prompts)}
    if table == "features":
        found["kid"] = kid(features, reference.features, reference.within, prompts)
        if reference.radii and len(features) > max(NEAREST.values()):
            found |= manifold(features, reference.features, reference.radii)
    return found
