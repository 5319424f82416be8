"""Each image is looked at once, by the image processor and by the vision model, however many texts go with it."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from PIL import Image

MIN_SIDE, MAX_RATIO = 8, 100
"""Of an image that any processor reads."""


def legible(image: Image.Image) -> Image.Image:
    """The image, enlarged where it is a line or a dot: some processors refuse those, or take them for channels."""
    least = max(MIN_SIDE, max(image.size) // MAX_RATIO)
    width, height = image.size
    return image if min(image.size) >= least else image.resize((max(width, least), max(height, least)))


class ReadOnce:
    """Stands for a processor's image processor. It keeps what that makes of the images, and gives it again.

    The processor itself then puts every text together as it always does: with the right number of placeholders for
    each image, and all that goes with them.
    """

    def __init__(self, image_processor: Any, made: list[Any] | None = None) -> None:
        self._image_processor = image_processor
        self._left = None if made is None else list(made)
        self.made: list[Any] = [] if made is None else made
        """What each call gave."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._left is not None:
            return copy.copy(self._left.pop(0))  # processors take out of it what the model doesn't need
        self.made.append(self._image_processor(*args, **kwargs))
        return copy.copy(self.made[-1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)


class Vision:
    """The vision side of a model: what its `get_image_features` gives, in transformers' own convention.

    A model that has none (Mllama, GIT) looks at the images anew for every text.
    """

    def __init__(self, model: Any) -> None:
        inner = model.base_model
        self.owner: Any = inner if hasattr(inner, "get_image_features") else model
        """The module whose forward pass asks for the features."""
        self.has_features = hasattr(self.owner, "get_image_features")

    def look(self, inputs: dict[str, torch.Tensor]) -> Any:
        """The features of the images; None where they can't be had without a text."""
        if not self.has_features:
            return None
        parameters = inspect.signature(self.owner.get_image_features).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if not inputs or any(name not in inputs for name in needed):
            return None
        given = {p.name: inputs[p.name] for p in parameters if p.name in inputs}
        return self.owner.get_image_features(**given, return_dict=True)

    @contextmanager
    def seen(self, inputs: dict[str, torch.Tensor], features: Any) -> Iterator[None]:
        """While it lasts, the model is given these features when it asks for those of these inputs."""
        if features is None:
            yield
            return
        original = self.owner.get_image_features
        shapes = {tuple(value.shape) for value in inputs.values()}

        @wraps(original)  # `generate` reads the names of its parameters
        def kept(*args: Any, **kwargs: Any) -> Any:
            asked = [tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            if any(shape not in shapes for shape in asked):  # transformers before 5.20 repeats the pixels for each beam
                return original(*args, **kwargs)
            return copy.copy(features)  # `generate` changes what it gets

        self.owner.get_image_features = kept
        try:
            yield
        finally:
            del self.owner.get_image_features
