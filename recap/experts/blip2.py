"""BLIP-2, a captioner (Li et al. 2023, arXiv 2301.12597), as it is before any tuning."""

from typing import Any

import torch
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from recap.captioners.blip2 import Blip2
from recap.config import Style
from recap.config.stitch import Stitch
from recap.errors import UserError
from recap.experts import View
from recap.experts.checkpoint import open_model, provenance
from recap.facts import Facts, Sentence
from recap.pretrained import load_pretrained

WHERE = "stitch.blip2"


class Blip2Expert:
    """A sentence of each image, or none where the model says nothing."""

    def __init__(self, config: Stitch, device: str) -> None:
        ref = config.blip2
        self.provenance: dict[str, Any] = provenance(ref, WHERE)
        model = open_model(Blip2ForConditionalGeneration, ref, device, WHERE, ref.dtype)
        processor = load_pretrained(Blip2Processor.from_pretrained, ref, WHERE, trust_remote_code=False)
        self.captioner = Blip2(model, processor, ref.model, device)
        self.style = Style(prompt=ref.prompt, max_new_tokens=ref.max_new_tokens, num_beams=ref.num_beams)
        room = self.captioner.text.room(ref.prompt)
        if room is not None and ref.max_new_tokens > room:
            raise UserError(f"{WHERE}.max_new_tokens: {ref.max_new_tokens} after {ref.prompt!r}, but {ref.model} has "
                            f"positions for {room}: lower it")

    def preprocess(self, views: list[View]) -> torch.Tensor:
        """Pixel values, (B, 3, H, W)."""
        return self.captioner.preprocess([view.image for view in views])

    @torch.no_grad()
    def look(self, batch: torch.Tensor) -> list[Facts]:
        """Caption one batch. A prompt is not part of the sentence that goes on from it; "…" says that one is cut."""
        captions = self.captioner.caption(self.captioner.encode(batch), self.style)
        said = [caption.text if caption.ended or not caption.text else f"{caption.text} …" for caption in captions]
        return [Facts(sentences=[Sentence(text, "blip2")] if text else []) for text in said]
