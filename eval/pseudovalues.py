"""A figure of a whole set of images, spread over its images, so that arms are compared by it as by scores of prompts.

A distance such as FID has no value of a single image. Yet to the first order it is a mean over images: each has a
pseudovalue (Tukey 1958), the figure plus the image's influence on it (Hampel 1974). Their mean is the figure, without
the bias that comes of the number of images where there is one, and their scatter is what the figure scatters by.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distance:
    """Drawn images against real ones, by one figure."""

    value: float
    """As it is computed from these very images."""
    pseudovalues: np.ndarray | None
    """(N,) float64, one an image; None for a figure that has none, or where there are too few images for them."""
    why: str | None = None
    """Why there are none."""
    bias: float = 0.0
    """How much of the value comes of the number of images, or of what can be told of that where there are too few."""

    @property
    def unbiased(self) -> float | None:
        """What endless images of this arm would give."""
        return None if self.pseudovalues is None else float(self.pseudovalues.mean())
