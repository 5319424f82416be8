"""Florence-2, one model for several tasks of vision (Xiao et al. 2023, arXiv 2311.06242)."""

import itertools
import re
from typing import Any, NamedTuple

import torch
from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor

from recap.config.stitch import Stitch
from recap.errors import UserError
from recap.experts import View
from recap.experts.checkpoint import open_model, provenance
from recap.facts import Box, Facts, Object, Sentence, clip, merge
from recap.pretrained import load_pretrained
from recap.sample import visible

WHERE = "stitch.florence2"
BOXES = ("<OD>", "<DENSE_REGION_CAPTION>")
LINES = "<OCR_WITH_REGION>"
PLACES = re.compile(r"((?:<loc_\d+>)+)")
NUM_PLACES = 1000
"""Along a side of the image; each stands for its middle."""
SURROUNDINGS = re.compile(r"</?s>|<pad>")


class Batch(NamedTuple):
    """What the model sees of the images, and how large they were."""

    sizes: list[tuple[int, int]]
    """Widths and heights of the images given."""
    pixels: torch.Tensor
    """(B, 3, H, W)"""


class Florence2Expert:
    """What the tasks say: objects with boxes, sentences, writing. The model gives no scores: what it names has 1."""

    def __init__(self, config: Stitch, device: str) -> None:
        ref = config.florence2
        self.provenance: dict[str, Any] = provenance(ref, WHERE)
        found, _ = load_pretrained(Florence2Config.get_config_dict, ref, WHERE, weights=False)
        if "auto_map" in found:
            raise UserError(f"{WHERE}.model: {ref.model} brings code of its own, which is never run: name a checkpoint "
                            "in transformers' own format, as florence-community/Florence-2-large")
        self.model: Any = open_model(Florence2ForConditionalGeneration, ref, device, WHERE, ref.dtype)
        self.processor: Any = load_pretrained(Florence2Processor.from_pretrained, ref, WHERE, trust_remote_code=False)
        self.tasks = ref.tasks
        self.decoding = {"max_new_tokens": ref.max_new_tokens, "num_beams": ref.num_beams, "do_sample": False}
        room = self.model.config.text_config.max_position_embeddings
        if ref.max_new_tokens > room:
            raise UserError(f"{WHERE}.max_new_tokens: {ref.max_new_tokens}, but {ref.model} has positions for {room}: "
                            "lower it")

    def preprocess(self, views: list[View]) -> Batch:
        """Resize, without keeping the aspect, and normalise."""
        images = [view.image for view in views]
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return Batch([image.size for image in images], pixels)

    @torch.no_grad()
    def look(self, batch: Batch) -> list[Facts]:
        """Ask every task of one batch, whose images are encoded once. Boxes are in pixels of the images given."""
        features = self.model.get_image_features(batch.pixels.to(self.model.device, self.model.dtype)).pooler_output
        answers = [self._answers(task, features) for task in self.tasks]
        return [merge(read(task, answer, size) for task, answer in zip(self.tasks, said, strict=True))
                for size, *said in zip(batch.sizes, *answers, strict=True)]

    def _answers(self, task: str, features: torch.Tensor) -> list[str]:
        """One for each image. All have the same prompt, so none is padded, and no answer depends on its neighbours."""
        tokenizer = self.processor.tokenizer
        prompt = f"{tokenizer.bos_token}{self.processor.task_prompts_without_inputs[task]}{tokenizer.eos_token}"
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(features.device)
        asked = self.model.get_input_embeddings()(ids).expand(len(features), -1, -1)
        embeds = torch.cat([features, asked], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        encoded = self.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask)
        rows = self.model.generate(encoder_outputs=encoded, attention_mask=mask, **self.decoding)
        answers: list[str] = self.processor.batch_decode(rows, skip_special_tokens=task not in (*BOXES, LINES))
        return answers


def read(task: str, answer: str, size: tuple[int, int]) -> Facts:
    """What an answer says. Boxes without a name or an area, which a model that errs may write, are left out.

    Read here, as transformers' own reading cuts boxes to whole pixels and names to ASCII, and of five places in a row
    makes a box named "loc_7>".

    Args:
        task: that was asked.
        answer: decoded, with special tokens where the task asks for places.
        size: width and height of the image.
    """
    if task in BOXES:
        objects = [Object(name, 1.0, box) for name, places in _named(answer) if name for box in _boxes(places, *size)]
        return Facts(objects=list(dict.fromkeys(objects)))
    if task == LINES:
        return Facts(text=[line for line, _ in _named(answer) if line])
    if task == "<OCR>":
        return Facts(text=[line for line in map(visible, answer.splitlines()) if line])
    return Facts(sentences=[Sentence(visible(answer), "florence2")] if visible(answer) else [])


def _named(answer: str) -> list[tuple[str, list[int]]]:
    """Names, each with the places that follow it: "dog<loc_10><loc_20><loc_500><loc_600>…"."""
    parts = PLACES.split(SURROUNDINGS.sub("", answer))
    return [(visible(name), [int(place) for place in re.findall(r"\d+", places)])
            for name, places in zip(parts[::2], parts[1::2], strict=False)]  # what comes last has no places


def _boxes(places: list[int], width: int, height: int) -> list[Box]:
    """Four places a box, left, top, right, bottom; what is left of them is none."""
    along = [(place + 0.5) / NUM_PLACES * side for place, side in zip(places, itertools.cycle((width, height)))]
    boxes = [clip(along[start:start + 4], width, height) for start in range(0, len(along) - 3, 4)]
    return [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
