"""A vision encoder and a text decoder with cross-attention to it: both from scratch, or of pretrained parts."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from recap.captioners import Assembled
from recap.captioners.text import Caption, Text, next_token_loss
from recap.captioners.vocabulary import learn_vocabulary
from recap.config import Model, Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.config.captioner import Part
from recap.config.captioner import Transformer as Config
from recap.config.finetune import Finetune
from recap.pretrained import load_model, load_pretrained

POOLER = "pooler."
"""What its weights begin with. A ViT may have one, or not; nobody reads it here."""


class Transformer(Assembled):
    """transformers' `VisionEncoderDecoderModel` with a ViT and a GPT-2."""

    def open_whole(self, whole: CaptionerConfig) -> None:
        logging.disable_progress_bar()
        self._take(load_model(VisionEncoderDecoderModel, whole, self.device, unread=f"encoder.{POOLER}"),
                   _load(AutoTokenizer, whole, "captioner"), _load(AutoImageProcessor, whole, "captioner"))

    def prepare(self, config: Finetune, captions: list[str]) -> None:
        """Train the decoder, and the encoder where it is from scratch or asked for."""
        parts = self.config.transformer
        if self.model is None:
            self._take(*_assembled(parts, captions, self.device))
        self.encoder_is_trained = parts.train_encoder or (parts.is_from_scratch and not self.config.model)
        self.model.float().requires_grad_(True)
        self.model.encoder.requires_grad_(self.encoder_is_trained)
        for name, p in self.model.encoder.named_parameters():
            if name.startswith(POOLER):
                p.requires_grad_(False)

    def _take(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        self.model, self.image_processor = model.to(self.device), image_processor
        self.text = Text(tokenizer, start=(model.config.decoder_start_token_id,), end=model.config.eos_token_id,
                         pad=model.config.pad_token_id, max_length=model.config.decoder.n_positions)
        self.set_training(False)

    def preprocess(self, images: list[Image.Image]) -> torch.Tensor:
        self.check_whole()
        return self.image_processor(images, return_tensors="pt")["pixel_values"]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The encoder's last hidden states, (B, patches + 1, D)."""
        with torch.set_grad_enabled(self.encoder_is_trained and torch.is_grad_enabled()):
            return self.model.encoder(pixels.to(self.device, self.model.dtype)).last_hidden_state

    @torch.no_grad()
    def caption(self, features: torch.Tensor, style: Style) -> list[Caption]:
        prompt = torch.tensor([self.text.prompt_ids(style.prompt)], device=features.device).expand(len(features), -1)
        ids = self.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=features), decoder_input_ids=prompt,
            decoder_attention_mask=torch.ones_like(prompt), eos_token_id=self.text.end, pad_token_id=self.text.pad,
            **self.text.decoding(style, prompt.shape[1]))
        return [self.text.read(row[prompt.shape[1]:]) for row in ids.tolist()]

    def loss(self, features: torch.Tensor, prompts: list[str], captions: list[str]) -> torch.Tensor:
        batch = self.text.batch(prompts, captions, features.device)
        logits = self.model(encoder_outputs=(features,), decoder_input_ids=batch.ids,
                            decoder_attention_mask=batch.mask).logits
        return next_token_loss(logits, batch.labels)

    def frozen(self) -> list[nn.Module]:
        return [] if self.encoder_is_trained else [self.model.encoder]

    def save(self, folder: Path) -> None:
        """A transformers folder: `VisionEncoderDecoderModel.from_pretrained(folder)` opens it."""
        self.model.save_pretrained(str(folder))
        self.text.tokenizer.save_pretrained(str(folder))
        self.image_processor.save_pretrained(str(folder))


def _assembled(config: Config, captions: list[str], device: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor from the parts that the configuration names; on `meta` without weights."""
    encoder, image_processor = _encoder(config, device)
    with torch.device(device if device == "meta" else "cpu"):
        decoder, tokenizer = _decoder(config, captions, device)
        model: Any = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for place in (model.config, model.generation_config):
        place.update({"decoder_start_token_id": end, "bos_token_id": end, "eos_token_id": end, "pad_token_id": pad})
    return model, tokenizer, image_processor


def _encoder(config: Config, device: str) -> tuple[Any, Any]:
    if config.is_from_scratch:
        with torch.device(device if device == "meta" else "cpu"):
            encoder: Any = ViTModel(ViTConfig(
                hidden_size=config.hidden_size, intermediate_size=4 * config.hidden_size,
                num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
                hidden_dropout_prob=config.dropout, image_size=config.image_size, patch_size=config.patch_size))
        size = {"height": config.image_size, "width": config.image_size}
        return encoder, ViTImageProcessorPil(size=size)
    ref, where = Part.of(str(config.encoder)), "captioner.transformer.encoder"
    return load_model(ViTModel, ref, device, where, POOLER), _load(AutoImageProcessor, ref, where)


def _decoder(config: Config, captions: list[str], device: str) -> tuple[Any, Any]:
    """A GPT-2 with cross-attention, and its tokenizer."""
    if config.decoder is not None:
        ref, where = Part.of(config.decoder), "captioner.transformer.decoder"
        settings = _load(AutoConfig, ref, where)
        settings.update({"add_cross_attention": True, "is_decoder": True})
        if device == "meta":
            return GPT2LMHeadModel(settings), _load(AutoTokenizer, ref, where)
        model = load_pretrained(GPT2LMHeadModel.from_pretrained, ref, where, config=settings, dtype=torch.float32,
                                use_safetensors=True)
        return model, _load(AutoTokenizer, ref, where)
    tokenizer = learn_vocabulary(captions, config.vocab_size)
    # From the configuration alone, with no caption seen, the vocabulary is taken to be full.
    vocab_size = len(tokenizer) if captions else config.vocab_size
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=config.max_length, n_embd=config.hidden_size, n_layer=config.num_layers,
        n_head=config.num_heads, resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        add_cross_attention=True, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)), tokenizer


def _load(kind: Any, ref: Model, where: str) -> Any:
    return load_pretrained(kind.from_pretrained, ref, where, weights=False, trust_remote_code=False)
