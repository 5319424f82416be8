"""OWL-ViT, a detector of what it is asked for in words (Minderer et al. 2022, arXiv 2205.06230); and OWLv2
(2306.09683).
"""

import re
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torchvision.ops import batched_nms
from transformers import Owlv2ForObjectDetection, Owlv2Processor, OwlViTForObjectDetection, OwlViTProcessor

from recap.config.stitch import Stitch
from recap.errors import UserError
from recap.experts import View
from recap.experts.checkpoint import open_model, provenance
from recap.facts import Facts, Object, clip
from recap.pretrained import load_pretrained
from recap.sample import visible

WHERE = "stitch.owlvit"
PROMPT = "a photo of a {}"
"""What a tag is looked for as, as in the paper."""
NOT_THE_THING = re.compile(r"^(a photo of )?((a|an|the) )?", re.IGNORECASE)
MAX_QUERIES = 64
"""Of one image; the configured ones come first, and tags after these are not looked for."""
SAME_BOX_IOU = 0.5
"""Of boxes of one label that overlap by more, the surest is kept: every patch of the image has a box."""


class Batch(NamedTuple):
    """What is looked for in each image, and what the model reads."""

    sizes: list[tuple[int, int]]
    """Heights and widths of the images given."""
    labels: list[list[str]]
    inputs: dict[str, torch.Tensor] | None
    """`pixel_values` (B, 3, H, W), and of Q queries each `input_ids` and `attention_mask` (B · Q, L); None where
    nothing is looked for in any image."""


class OwlvitExpert:
    """Objects with boxes: those of the queries, and of what another expert named, that are found above a score. In
    float32.
    """

    def __init__(self, config: Stitch, device: str) -> None:
        ref = config.owlvit
        self.queries = {label: query for query in ref.queries if (label := label_of(query))}
        self.provenance: dict[str, Any] = provenance(ref, WHERE)
        self.threshold = ref.threshold
        found, _ = load_pretrained(OwlViTForObjectDetection.config_class.get_config_dict, ref, WHERE)
        self.pads = found.get("model_type") == "owlv2"
        kind, processor = ((Owlv2ForObjectDetection, Owlv2Processor) if self.pads else
                           (OwlViTForObjectDetection, OwlViTProcessor))
        self.model: Any = open_model(kind, ref, device, WHERE)
        self.processor: Any = load_pretrained(processor.from_pretrained, ref, WHERE, trust_remote_code=False)
        self.max_length: int = self.model.config.text_config.max_position_embeddings
        if unread := next((query for query in self.queries.values() if not self._can_read(query)), None):
            raise UserError(f"{WHERE}.queries: {unread!r} has more than the {self.max_length} tokens that {ref.model} "
                            "reads: shorten it")

    def preprocess(self, views: list[View]) -> Batch:
        """Queries as tokens, and the resized and normalised pixels."""
        sizes = [(view.image.height, view.image.width) for view in views]
        queries = [self._queries(view.tags) for view in views]
        labels = [list(each) for each in queries]
        if not any(queries):
            return Batch(sizes, labels, None)
        most = max(map(len, queries))
        prompts = [prompt for each in queries for prompt in [*each.values(), *[""] * (most - len(each))]]
        text = self.processor.tokenizer(prompts, padding="max_length", max_length=self.max_length, return_tensors="pt")
        # So the model knows what only fills up. Its processor fills with " ", a query that wins patches like any other.
        text["input_ids"][[not prompt for prompt in prompts], 0] = 0
        pixels = self.processor.image_processor([self._shrunk(view.image) for view in views], return_tensors="pt")
        return Batch(sizes, labels, {**text, **pixels})

    @torch.no_grad()
    def look(self, batch: Batch) -> list[Facts]:
        """Detect in one batch. Boxes are in pixels of the images given and clipped to them; the surest comes first."""
        if batch.inputs is None:
            return [Facts() for _ in batch.sizes]
        output = self.model(**{name: value.to(self.model.device) for name, value in batch.inputs.items()})
        found = self.processor.post_process_grounded_object_detection(output, self.threshold, batch.sizes)
        return [_facts(detections, labels, *size)
                for detections, labels, size in zip(found, batch.labels, batch.sizes, strict=True)]

    def _queries(self, tags: list[str]) -> dict[str, str]:
        """What is looked for in one image: label → prompt. A tag of more tokens than the model reads is left out."""
        asked = dict(self.queries)
        for label in map(label_of, tags):
            prompt = PROMPT.format(label)
            if label and label not in asked and len(asked) < MAX_QUERIES and self._can_read(prompt):
                asked[label] = prompt
        return asked

    def _can_read(self, prompt: str) -> bool:
        return len(self.processor.tokenizer(prompt, verbose=False)["input_ids"]) <= self.max_length

    def _shrunk(self, image: Image.Image) -> Image.Image:
        """A large image smaller, for OWLv2, whose processor first pads to a square: gigabytes, for a long one."""
        side = 2 * self.model.config.vision_config.image_size
        return ImageOps.contain(image, (side, side)) if self.pads and max(image.size) > side else image


def label_of(query: str) -> str:
    """The thing that is looked for: "a photo of a dog" → "dog"."""
    return NOT_THE_THING.sub("", visible(query))


def _facts(detections: dict[str, torch.Tensor], labels: list[str], height: int, width: int) -> Facts:
    kept = batched_nms(detections["boxes"], detections["scores"], detections["labels"], SAME_BOX_IOU)  # sorted, too
    scores, numbers, boxes = (detections[name][kept].tolist() for name in ("scores", "labels", "boxes"))
    objects = [Object(labels[number], round(score, 4), clip(box, width, height))
               for number, score, box in zip(numbers, scores, boxes, strict=True)]
    return Facts(objects=[seen for seen in objects if seen.box[0] < seen.box[2] and seen.box[1] < seen.box[3]])
