"""BLIP (Li et al. 2022, arXiv 2201.12086), tuned whole: vision model and text decoder."""

from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor
from transformers.utils import logging

from recap.captioners import Tunable
from recap.captioners.text import Caption, Text, next_token_loss
from recap.config import Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.config.finetune import Finetune
from recap.pretrained import load_model, load_pretrained


class Blip(Tunable):
    """A vision transformer, and a BERT that decodes with cross-attention to it. Its captions are lower-case."""

    encoder_is_trained = True

    def __init__(self, model: BlipForConditionalGeneration, processor: BlipProcessor, device: str) -> None:
        self.model: Any = model
        self.processor, self.device = processor, device
        config = model.config.text_config
        self.text = Text(processor.tokenizer, start=(config.bos_token_id,), end=config.sep_token_id,
                         pad=config.pad_token_id, space="", max_length=config.max_position_embeddings)
        self.set_training(False)

    @classmethod
    def open(cls, config: CaptionerConfig, device: str, tuned: Path | None) -> Self:
        """BLIP with its processor; `tuned` is a whole model, and takes the place of `config.model`."""
        logging.disable_progress_bar()
        if tuned is not None:
            config = config.model_copy(update={"model": str(tuned)})
        model = load_model(BlipForConditionalGeneration, config, device)
        processor = load_pretrained(BlipProcessor.from_pretrained, config, "captioner", weights=device != "meta",
                                    trust_remote_code=False)
        return cls(model, processor, device)

    def prepare(self, config: Finetune, captions: list[str]) -> None:
        self.model.float().requires_grad_(True)

    def preprocess(self, images: list[Image.Image]) -> torch.Tensor:
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The vision model's last hidden states, (B, patches + 1, D)."""
        return self.model.vision_model(pixels.to(self.device, self.model.dtype)).last_hidden_state

    @torch.no_grad()
    def caption(self, features: torch.Tensor, style: Style) -> list[Caption]:
        prompt = torch.tensor([self.text.prompt_ids(style.prompt)], device=features.device).expand(len(features), -1)
        ids = self.model.text_decoder.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), encoder_hidden_states=features,
            encoder_attention_mask=_all(features), eos_token_id=self.text.end, pad_token_id=self.text.pad,
            **self.text.decoding(style, prompt.shape[1]))
        return [self.text.read(row[prompt.shape[1]:]) for row in ids.tolist()]

    def loss(self, features: torch.Tensor, prompts: list[str], captions: list[str]) -> torch.Tensor:
        batch = self.text.batch(prompts, captions, features.device)
        logits = self.model.text_decoder(
            input_ids=batch.ids, attention_mask=batch.mask, encoder_hidden_states=features,
            encoder_attention_mask=_all(features)).logits
        return next_token_loss(logits, batch.labels)

    def save(self, folder: Path) -> None:
        """A transformers folder: `BlipForConditionalGeneration.from_pretrained(folder)` opens it."""
        self.model.save_pretrained(str(folder))
        self.processor.save_pretrained(str(folder))


def _all(features: torch.Tensor) -> torch.Tensor:
    """Attend to every position of the image."""
    return torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
