"""Which images get captions: by their size, whether their shard has shown them before, and what models say of them."""

import functools
import hashlib
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from recap.config.relabel import Aesthetic, Images, Scorer
from recap.errors import BadSample, UserError

if TYPE_CHECKING:
    import torch

WHERE = "relabel.images"
MAX_ASPECT = 50
"""Of an image that is longer than this times its width models see the middle: resized, it would have no width, or no
end."""


def check_size(image: Image.Image, config: Images) -> None:
    """Raise BadSample, `image_too_small` or `extreme_aspect`, for an image that gets no captions for its size."""
    shorter, longer = sorted(image.size)
    if shorter < config.min_side:
        raise BadSample("image_too_small", f"{image.width}×{image.height} pixels")
    if config.max_aspect and longer > config.max_aspect * shorter:
        raise BadSample("extreme_aspect", f"{image.width}×{image.height} pixels")


def middle(image: Image.Image) -> Image.Image:
    """All of an image, if it is not too long for a model; else its middle."""
    limit = MAX_ASPECT * min(image.size)
    if max(image.size) <= limit:
        return image
    left, top = (max(side - limit, 0) // 2 for side in image.size)
    return image.crop((left, top, min(left + limit, image.width), min(top + limit, image.height)))


# --- images that are repeated --------------------------------------------------------------------------------------


def difference_hash(image: Image.Image) -> int:
    """64 bits, row by row: where in the image, shrunk to 9×8 greys, a pixel is darker than the one to its right.

    The dHash of Neal Krawetz, "Kind of Like That" (hackerfactor.com, 2013).
    """
    shrunk = image.resize((9, 8), Image.Resampling.LANCZOS, reducing_gap=3).convert("L")
    grey = np.asarray(shrunk, np.uint8)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


MIN_BITS = 8
"""Set bits of a hash, and bits that are not, without which it says too little: that of a card with a line of text on it
is like that of any other. Of 1,666 photos none had fewer than 10 or more than 49 set, as measured."""


class Seen:
    """The images of a shard, as far as it has been read; which of them are captioned, and which repeat one of those."""

    def __init__(self, config: Images) -> None:
        self.config = config
        self.files: dict[bytes, int] = {}
        """SHA-256 of the bytes → place."""
        self.hashes = np.zeros(1024, np.uint64)
        """Of the images that are captioned, by place; there is room for more."""
        self.num_images = 0
        """That are captioned."""

    def place(self, image_bytes: bytes, image: Image.Image) -> tuple[int, bool]:
        """The place of an image among those that are captioned, and whether it is new; if not, the place is another's.

        The same bytes are the same image. So is, where `duplicate_bits` says so, the one whose difference hash is the
        nearest, and of those as near the first; only an image with hardly an edge is not known again that way.
        """
        if self.config.duplicates == "ignore":
            return self._add(), True
        file = hashlib.sha256(image_bytes).digest()
        if file in self.files:
            return self.files[file], False
        found = difference_hash(image) if self.config.duplicate_bits is not None else 0
        found = found if MIN_BITS <= found.bit_count() <= 64 - MIN_BITS else 0
        place = self._nearest(found) if found else None
        self.files[file] = self._add(found) if place is None else place
        return self.files[file], place is None

    def _nearest(self, found: int) -> int | None:
        """The place of the image that differs in the fewest bits, if it does in no more than are allowed."""
        known = self.hashes[:self.num_images]
        distances = np.where(known == 0, 65, np.bitwise_count(known ^ np.uint64(found)))
        nearest = int(distances.argmin()) if len(distances) else None
        return nearest if nearest is not None and distances[nearest] <= (self.config.duplicate_bits or 0) else None

    def _add(self, found: int = 0) -> int:
        if self.num_images == len(self.hashes):
            self.hashes = np.concatenate([self.hashes, np.zeros_like(self.hashes)])
        self.hashes[self.num_images] = found
        self.num_images += 1
        return self.num_images - 1


# --- what models say -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scored:
    """What models say of an image."""

    scores: dict[str, float]
    """`nsfw` and `watermark`, 0 to 1; `aesthetic`, about 1 to 10. Of those that are asked for."""
    reason: str | None
    """Why the image is dropped: `nsfw`, `watermark`, `low_aesthetic_score`, the first that holds; None if it isn't."""


class ImageScores:
    """The models that `[relabel.images]` names; where it names none, no model is opened and torch not imported.

    Raises:
        UserError: a model can't be opened, or it can't be told which of its classes is unwanted.
    """

    def __init__(self, config: Images, device: str) -> None:
        self.classifiers: dict[str, tuple[Classifier, float]] = {
            name: (Classifier(name, table, device), table.threshold)
            for name, table in {"nsfw": config.nsfw, "watermark": config.watermark}.items() if table}
        self.aesthetic = (AestheticPredictor(config.aesthetic, device), config.aesthetic.threshold) if (
            config.aesthetic) else None

    def look(self, images: list[Image.Image]) -> list[Scored]:
        """What the models say of each of some images, RGB; every model sees them in one batch."""
        if not images:
            return []
        shown = [middle(image) for image in images]
        columns = {name: model.score(shown) for name, (model, _) in self.classifiers.items()}
        dropped = {name: [score >= self.classifiers[name][1] for score in column] for name, column in columns.items()}
        if self.aesthetic:
            predictor, threshold = self.aesthetic
            columns["aesthetic"] = predictor.score(shown)
            dropped["low_aesthetic_score"] = [score < threshold for score in columns["aesthetic"]]
        return [Scored({name: column[place] for name, column in columns.items()},
                       next((reason for reason, column in dropped.items() if column[place]), None))
                for place in range(len(images))]


UNWANTED = {
    "nsfw": {"nsfw", "unsafe", "porn", "porno", "pornographic", "pornography", "explicit", "nude", "nudity", "sexual",
             "sexy", "hentai", "erotic", "erotica", "sensual"},
    "watermark": {"watermark", "watermarks", "watermarked", "yes"},
}
"""What names the unwanted class, by what is looked for."""
NEGATIONS = {"no", "not", "non", "without"}


class Classifier:
    """An image classifier of transformers, in float32, and the classes of it that are unwanted."""

    def __init__(self, name: str, config: Scorer, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        from recap.experts.checkpoint import open_model
        from recap.pretrained import load_pretrained

        where = f"{WHERE}.{name}"
        self.model = open_model(AutoModelForImageClassification, config, device, where)
        self.processor: Any = load_pretrained(AutoImageProcessor.from_pretrained, config, where,
                                              trust_remote_code=False)
        self.places = unwanted_classes(name, self.model.config.id2label, config.label)

    def score(self, images: list[Image.Image]) -> list[float]:
        """The probability that each of some images, RGB, is of the unwanted classes, up to 1."""
        import torch
        with torch.no_grad():
            inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
            probabilities = self._probabilities(self.model(**inputs).logits.double())[:, self.places]
        scores: list[float] = probabilities.sum(dim=1).clamp(max=1).tolist()
        return scores

    def _probabilities(self, logits: "torch.Tensor") -> "torch.Tensor":
        """(B, classes) of logits; each for itself, where the classes don't exclude each other."""
        is_single = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        return logits.sigmoid() if is_single else logits.softmax(dim=1)


def unwanted_classes(name: str, labels: dict[int, str], wanted: str | list[str] | None) -> list[int]:
    """Which of a classifier's classes are unwanted.

    Args:
        name: `nsfw` or `watermark`.
        labels: of the classifier.
        wanted: the one that the user names, or several, if any.

    Raises:
        UserError: there is no class of that name, or none is named and not just one says by its name what it is.
    """
    given = [wanted] if isinstance(wanted, str) else wanted or []
    places = {label.casefold(): place for place, label in labels.items()}
    telling = [place for place, label in labels.items() if _says(label, UNWANTED[name])]
    unknown = [label for label in given if label.casefold() not in places]
    if not unknown and (given or len(telling) == 1):
        return sorted({places[label.casefold()] for label in given}) or telling
    what = (f"there is no class {unknown[0]!r}" if unknown else f"several classes may be {name}" if telling
            else f"it can't be told which class is {name}")
    known = ", ".join(map(repr, labels.values()))[:300]
    raise UserError(f"{WHERE}.{name}.label: {what}: name one of {known}, or a list of some")


def _says(label: str, names: set[str]) -> bool:
    words = set(re.findall(r"[a-z]+", label.casefold()))
    return bool(words & names) and not words & NEGATIONS


class AestheticPredictor:
    """LAION's aesthetic predictors: a head on CLIP's vector, of length 1, of an image.

    Version 1 (LAION-AI/aesthetic-predictor) is a linear map. Version 2 (christophschuhmann's
    improved-aesthetic-predictor) is five in a row, with nothing but dropout between them, so that they are one as well.
    """

    def __init__(self, config: Aesthetic, device: str) -> None:
        from eval.clip_score import ClipScorer
        self.weight, self.bias = read_head(config.head)
        try:
            self.scorer = ClipScorer(config.model, device, config.revision)
        except ValueError as error:
            raise UserError(f"{WHERE}.aesthetic.model: {error}: check the id or the folder") from error
        size = self.scorer.embed_images([Image.new("RGB", (32, 32))]).shape[1]
        if size != len(self.weight):
            raise UserError(f"{WHERE}.aesthetic.head: {config.head} reads {len(self.weight)} numbers of an image, and "
                            f"{config.model} gives {size}: take the CLIP that the head was trained on")

    def score(self, images: list[Image.Image]) -> list[float]:
        """About 1 to 10 for each of some images, RGB."""
        scores: list[float] = (self.scorer.embed_images(images) @ self.weight + self.bias).tolist()
        return scores


def read_head(name: str) -> tuple[np.ndarray, float]:
    """A head's file, safetensors or `.pth` (read as weights only), as one linear map: weight (D,) float64, and bias.

    Raises:
        UserError: it is not there, can't be read, or has other layers than LAION's heads.
    """
    tensors = _read_tensors(Path(name).expanduser())
    layers = [f"layers.{number}." for number in (0, 2, 4, 6, 7)] if len(tensors) > 2 else [""]
    if set(tensors) != {f"{layer}{part}" for layer in layers for part in ("weight", "bias")}:
        raise UserError(f"{WHERE}.aesthetic.head: {name} has other layers than LAION's linear heads "
                        f"({', '.join(map(str, tensors))[:100]}): name one of those")
    maps = [(tensors[f"{layer}weight"], tensors[f"{layer}bias"]) for layer in layers]
    try:
        weight = functools.reduce(lambda before, after: after @ before, (weight for weight, _ in maps))
        bias = functools.reduce(lambda before, layer: layer[0] @ before + layer[1], maps, np.zeros(weight.shape[1]))
        return weight.reshape(weight.shape[1]), float(bias.item())
    except (ValueError, IndexError) as error:
        raise UserError(f"{WHERE}.aesthetic.head: the layers of {name} don't fit each other: name one of LAION's "
                        "heads") from error


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        return {key: tensor.double().numpy() for key, tensor in found.items()}
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, AttributeError, TypeError, SafetensorError,
            pickle.UnpicklingError) as error:
        raise UserError(f"{WHERE}.aesthetic.head: cannot read weights from {path}: give a head's safetensors or .pth "
                        f"({' '.join(str(error).split())[:150]})") from error
