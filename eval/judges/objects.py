"""Objects in pictures, found by any object detector of transformers."""

import re
from collections import defaultdict
from typing import Any

import torch
from PIL import Image

from eval.config import Detector
from recap.errors import UserError
from recap.experts.checkpoint import open_model, provenance
from recap.experts.detr import NO_LABEL
from recap.facts import Object, clip
from recap.pretrained import find_local, load_pretrained

WHERE = "evaluate.detector"
NUM_AT_ONCE = 8
"""Pictures, which detectors look at enlarged."""
NUMBERED = re.compile(r"LABEL_\d+")
"""How transformers calls a class without a name."""


class ObjectDetector:
    """Finds objects above a score, in float32.

    Raises:
        UserError: the checkpoint isn't there, is no object detector, isn't whole, or has no names for what it finds.
    """

    def __init__(self, ref: Detector, device: str, threshold: float) -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection
        _check_kind(ref)
        self.name = _version(ref)
        """Model and version, for the report."""
        self.threshold = threshold
        self.model: Any = open_model(AutoModelForObjectDetection, ref, device, WHERE)
        self.processor: Any = load_pretrained(AutoImageProcessor.from_pretrained, ref, WHERE, trust_remote_code=False)
        if not hasattr(self.processor, "post_process_object_detection"):
            raise UserError(f"{WHERE}.model: the {type(self.processor).__name__} of {ref.model} makes no boxes: take "
                            "preprocessor_config.json from the checkpoint that the weights are of")
        names: dict[int, str] = self.model.config.id2label
        self.labels = [name for name in names.values() if name != NO_LABEL]
        if all(map(NUMBERED.fullmatch, self.labels)):
            raise UserError(f"{WHERE}.model: {ref.model} has no names for what it finds: give its config.json an "
                            "id2label, such as {\"0\": \"person\", …}")

    def look(self, images: list[Image.Image]) -> list[list[Object]]:
        """What is in each picture, the surest first. Boxes are in its pixels, clipped to it, and not empty.

        Only pictures of one size are looked at together: padding would change what is found.
        """
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            by_size[image.size].append(index)
        found: dict[int, list[Object]] = {}
        for several in by_size.values():
            for start in range(0, len(several), NUM_AT_ONCE):
                part = several[start:start + NUM_AT_ONCE]
                found.update(zip(part, self._look([images[index] for index in part]), strict=True))
        return [found[index] for index in range(len(images))]

    @torch.no_grad()
    def _look(self, images: list[Image.Image]) -> list[list[Object]]:
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        found = self.processor.post_process_object_detection(
            self.model(**inputs), self.threshold, [(image.height, image.width) for image in images])
        return [self._objects(each, *image.size) for each, image in zip(found, images, strict=True)]

    def _objects(self, found: dict[str, torch.Tensor], width: int, height: int) -> list[Object]:
        scores, labels, boxes = (found[name].tolist() for name in ("scores", "labels", "boxes"))
        objects = [Object(self.model.config.id2label[label], score, clip(box, width, height))
                   for score, label, box in zip(scores, labels, boxes, strict=True)]
        return sorted((each for each in objects if each.label != NO_LABEL and not _is_empty(each)),
                      key=lambda each: -each.score)


def _is_empty(seen: Object) -> bool:
    left, top, right, bottom = seen.box
    return left >= right or top >= bottom


def _check_kind(ref: Detector) -> None:
    from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING, AutoConfig
    found = load_pretrained(AutoConfig.from_pretrained, ref, WHERE, trust_remote_code=False)
    if type(found) not in MODEL_FOR_OBJECT_DETECTION_MAPPING:
        raise UserError(f"{WHERE}.model: {ref.model} holds a model of type {found.model_type!r}, which is no object "
                        "detector of transformers: name one, such as facebook/detr-resnet-50")


def _version(ref: Detector) -> str:
    """Hub id and commit, or name and hash of a folder."""
    local, revision = find_local(ref, WHERE), provenance(ref, WHERE)["revision"]
    return f"{local.resolve().name if local else ref.model}@{revision.removeprefix('sha256:')[:12]}"
