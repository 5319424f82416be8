"""DETR, an object detector (Carion et al. 2020, arXiv 2005.12872)."""

from typing import Any

import torch

from recap.config.stitch import Stitch
from recap.errors import UserError
from recap.experts import View
from recap.experts.checkpoint import open_model, provenance
from recap.facts import Facts, Object, clip
from recap.pretrained import load_pretrained

WHERE = "stitch.detr"
NO_LABEL = "N/A"
"""What COCO's numbering calls its unused places; the hub's checkpoints have them as labels."""


class DetrExpert:
    """Objects with labels and boxes, above a score. Any DETR checkpoint of transformers, in float32."""

    def __init__(self, config: Stitch, device: str) -> None:
        from transformers import AutoImageProcessor, DetrForObjectDetection

        ref = config.detr
        self.provenance: dict[str, Any] = provenance(ref, WHERE)
        self.threshold = ref.threshold
        # transformers opens a timm backbone untrained and fills it from the same checkpoint: nothing else is fetched.
        self.model: Any = open_model(DetrForObjectDetection, ref, device, WHERE)
        self.processor: Any = load_pretrained(AutoImageProcessor.from_pretrained, ref, WHERE, trust_remote_code=False)
        if not hasattr(self.processor, "post_process_object_detection"):
            raise UserError(f"{WHERE}.model: the {type(self.processor).__name__} of {ref.model} makes no boxes: take "
                            "preprocessor_config.json from the checkpoint that the weights are of")

    def preprocess(self, views: list[View]) -> tuple[list[tuple[int, int]], Any]:
        """Heights and widths, and the resized and normalised pixels."""
        images = [view.image for view in views]
        return [(image.height, image.width) for image in images], self.processor(images=images, return_tensors="pt")

    @torch.no_grad()
    def look(self, batch: tuple[list[tuple[int, int]], Any]) -> list[Facts]:
        """Detect in one batch. Boxes are in pixels of the images given and clipped to them; the surest comes first."""
        sizes, inputs = batch
        found = self.processor.post_process_object_detection(
            self.model(**inputs.to(self.model.device)), self.threshold, sizes)
        return [self._facts(detections, *size) for detections, size in zip(found, sizes, strict=True)]

    def _facts(self, detections: dict[str, torch.Tensor], height: int, width: int) -> Facts:
        scores, labels, boxes = (detections[name].tolist() for name in ("scores", "labels", "boxes"))
        names = [self.model.config.id2label[label] for label in labels]
        objects = [Object(name, round(score, 4), clip(box, width, height))
                   for name, score, box in zip(names, scores, boxes, strict=True) if name != NO_LABEL]
        return Facts(objects=sorted(objects, key=lambda seen: -seen.score))
