"""DETR, an object detector (Carion et al. 2020, arXiv 2005.12872)."""

from typing import Any

import torch
from PIL import Image

from recap.config import Stitch
from recap.experts import Box, Facts, Object
from recap.pretrained import find_local, load_pretrained
from recap.rundir import hash_files

WHERE = "stitch.detr"
NO_LABEL = "N/A"
"""What COCO's numbering calls its unused places; the hub's checkpoints have them as labels."""
MAX_ASPECT = 50
"""An image that is longer than this times its width is a ruler or a fault; resized, it would have no pixel of width."""


class DetrExpert:
    """Objects with labels and boxes, above a score. Any DETR checkpoint of transformers, in float32."""

    def __init__(self, config: Stitch, device: str) -> None:
        from transformers import AutoImageProcessor, DetrForObjectDetection
        from transformers.utils import logging

        logging.disable_progress_bar()
        ref = config.detr
        local = find_local(ref, WHERE)
        self.threshold = ref.threshold
        self.processor: Any = load_pretrained(AutoImageProcessor.from_pretrained, ref, WHERE)
        # transformers opens a timm backbone untrained and fills it from the same checkpoint: nothing else is fetched.
        model: Any = load_pretrained(DetrForObjectDetection.from_pretrained, ref, WHERE, use_safetensors=True,
                                     dtype=torch.float32)
        self.model = model.to(device).eval()
        self.provenance: dict[str, Any] = {
            "model": ref.model, "revision": f"sha256:{hash_files(local)}" if local else ref.revision,
            "threshold": ref.threshold,
        }

    @torch.no_grad()
    def look(self, images: list[Image.Image], alt_texts: list[str]) -> list[Facts]:
        """Detect in one batch. Boxes are in pixels of the images given and clipped to them; the surest comes first."""
        usable = [image for image in images if _is_usable(image)]
        if not usable:
            return [Facts() for _ in images]
        inputs = self.processor(images=usable, return_tensors="pt").to(self.model.device)
        sizes = [(image.height, image.width) for image in usable]
        found = self.processor.post_process_object_detection(self.model(**inputs), self.threshold, sizes)
        facts = iter([self._facts(detections, image) for detections, image in zip(found, usable, strict=True)])
        return [next(facts) if _is_usable(image) else Facts() for image in images]

    def _facts(self, detections: dict[str, torch.Tensor], image: Image.Image) -> Facts:
        scores, labels, boxes = (detections[name].tolist() for name in ("scores", "labels", "boxes"))
        names = [self.model.config.id2label[label] for label in labels]
        objects = [Object(name, round(score, 4), _clip(box, image))
                   for name, score, box in zip(names, scores, boxes, strict=True) if name != NO_LABEL]
        return Facts(objects=sorted(objects, key=lambda seen: -seen.score))


def _is_usable(image: Image.Image) -> bool:
    return max(image.size) <= MAX_ASPECT * min(image.size)


def _clip(box: list[float], image: Image.Image) -> Box:
    x0, x1 = (round(min(max(x, 0.0), image.width), 2) for x in box[::2])
    y0, y1 = (round(min(max(y, 0.0), image.height), 2) for y in box[1::2])
    return x0, y0, x1, y1
