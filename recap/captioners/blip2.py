"""BLIP-2 (Li et al. 2023, arXiv 2301.12597) with LoRA, on OPT or Flan-T5.

The image features are put before the text embeddings by hand, instead of through `<image>` placeholder ids: a wrong
number of placeholders makes transformers ignore the image, or mix the images of a batch, without an error.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import Blip2ForConditionalGeneration, Blip2Processor
from transformers.utils import logging

from recap.captioners import Tunable
from recap.captioners.continuous import Begun, Slots, decode, read_prompts
from recap.captioners.lora import add_lora, load_lora, untrained
from recap.captioners.text import IGNORE, Caption, Text, next_token_loss, pad
from recap.config import Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.config.finetune import Finetune
from recap.pretrained import load_model, load_pretrained


class Blip2(Tunable):
    """A BLIP-2 whose language model is a decoder (OPT), or an encoder and a decoder (T5)."""

    whole: ClassVar[bool] = False

    def __init__(self, model: Any, processor: Blip2Processor, name: str, device: str) -> None:
        self.name = name
        """Hub id or folder of the base."""
        self.model = model
        """`Blip2ForConditionalGeneration`, or the `PeftModel` around it."""
        self.base: Blip2ForConditionalGeneration = model.get_base_model() if isinstance(model, PeftModel) else model
        self.processor, self.device = processor, device
        self.is_seq2seq = not self.base.config.use_decoder_only_language_model
        self.text = _text(self.base.config, processor.tokenizer, self.is_seq2seq)
        self.slots: Slots | None = None
        self.set_training(False)

    @classmethod
    def open(cls, config: CaptionerConfig, device: str, tuned: Path | None) -> Self:
        logging.disable_progress_bar()
        model = load_model(Blip2ForConditionalGeneration, config, device)
        processor = load_pretrained(Blip2Processor.from_pretrained, config, "captioner", weights=device != "meta",
                                    trust_remote_code=False)
        return cls(model if tuned is None else load_lora(model, tuned).to(device), processor, config.model, device)

    def prepare(self, config: Finetune, captions: list[str]) -> None:
        """LoRA on the language model's layers, and on those of Q-Former and vision model that are named."""
        parts = {"language_model": "language_model", "qformer": "qformer", "vision_model": "vision_model"}
        self.model = add_lora(self.base, config.lora, parts, self.base.config.text_config.model_type, self.name)
        self.encoder_is_trained = bool(config.lora.qformer or config.lora.vision_model)

    def preprocess(self, images: list[Image.Image]) -> torch.Tensor:
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected Q-Former outputs, (B, num_query_tokens, D) in the language model's dtype."""
        pixels = pixels.to(self.device, self.base.vision_model.dtype)
        with torch.set_grad_enabled(self.encoder_is_trained and torch.is_grad_enabled()):
            features = self.base.get_image_features(pixels, return_dict=True).pooler_output
            return features.to(self.base.language_model.dtype)

    @torch.no_grad()
    def caption(self, features: torch.Tensor, style: Style) -> list[Caption]:
        # Every row has the same prompt, so none is padded, and a caption does not depend on its neighbours.
        prompt = torch.tensor([self.text.prompt_ids(style.prompt)], device=features.device)
        embeds = self._after(features, prompt.expand(len(features), -1))
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        ids = self.base.language_model.generate(
            inputs_embeds=embeds, attention_mask=mask, eos_token_id=self.text.end, pad_token_id=self.text.pad,
            **self.text.decoding(style))
        # T5's rows begin with the decoder's start token, which is its padding; OPT's hold new tokens only.
        return [self.text.read(row[self.is_seq2seq:]) for row in ids.tolist()]

    @torch.no_grad()
    def captions(self, batches: Iterable[torch.Tensor], styles: dict[str, Style],
                 num_slots: int) -> Iterator[tuple[int, dict[str, Caption]]]:
        """Greedy captions of OPT are decoded continuously: see `continuous.py`."""
        greedy = {name: style for name, style in styles.items()
                  if not self.is_seq2seq and style.num_beams == 1 and not style.no_repeat_ngram_size}
        if not greedy:
            yield from super().captions(batches, styles, num_slots)
            return
        found: dict[int, dict[str, Caption]] = defaultdict(dict)
        begun = self._begin(batches, styles, greedy, found)
        try:
            for first in begun:
                slots = self._slots(greedy, num_slots, first.cache)
                for (place, name), ids in decode(slots, chain([first], begun), self.text.end):
                    found[place][name] = self.text.read(ids)
                    if len(found[place]) == len(styles):
                        captions = found.pop(place)
                        yield place, {name: captions[name] for name in styles}
        except RuntimeError:  # out of memory, perhaps, which they take much of
            self.slots = None
            raise

    def _begin(self, batches: Iterable[torch.Tensor], styles: dict[str, Style], greedy: dict[str, Style],
               found: dict[int, dict[str, Caption]]) -> Iterator[Begun[tuple[int, str]]]:
        """Encode images and read the prompts of greedy styles, the longest captions' first; write the other styles."""
        longest_first = sorted(greedy, key=lambda name: -greedy[name].max_new_tokens)
        prompts = [self.text.prompt_ids(greedy[name].prompt) for name in longest_first]
        start = 0
        for pixels in batches:
            features = self.encode(pixels)
            places = range(start, start + len(features))
            start += len(features)
            for name in styles.keys() - greedy.keys():
                for place, caption in zip(places, self.caption(features, styles[name]), strict=True):
                    found[place][name] = caption
            for name, (cache, first) in zip(longest_first, read_prompts(self.base.language_model, features, prompts),
                                            strict=True):
                yield Begun([(place, name) for place in places], cache, first, greedy[name].max_new_tokens)

    def _slots(self, styles: dict[str, Style], num_slots: int, like: torch.Tensor) -> Slots:
        """Room for the longest of these styles; the same as for the images before, where that will do."""
        longest = max(len(self.text.prompt_ids(style.prompt)) + self.text.decoding(style)["max_new_tokens"]
                      for style in styles.values())
        length = self.base.config.num_query_tokens + longest
        if self.slots is None or (self.slots.num_slots, self.slots.length) != (num_slots, length):
            self.slots = None  # before new ones take memory
            self.slots = Slots(self.base.language_model, num_slots, length, like)
        return self.slots

    def loss(self, features: torch.Tensor, prompts: list[str], captions: list[str]) -> torch.Tensor:
        if self.is_seq2seq:
            return self._seq2seq_loss(features, prompts, captions)
        batch = self.text.batch(prompts, captions, features.device)
        logits = self.base.language_model(
            inputs_embeds=self._after(features, batch.ids), attention_mask=_seen(features, batch.mask),
            logits_to_keep=batch.ids.shape[1]).logits  # the image's positions have nothing to predict
        return next_token_loss(logits, batch.labels)

    def _seq2seq_loss(self, features: torch.Tensor, prompts: list[str], captions: list[str]) -> torch.Tensor:
        asked = pad([(self.text.prompt_ids(prompt), []) for prompt in prompts], self.text.pad, features.device)
        said = pad([([], self.text.caption_ids(caption)) for caption in captions], self.text.pad, features.device)
        logits = self.base.language_model(
            inputs_embeds=self._after(features, asked.ids), attention_mask=_seen(features, asked.mask),
            decoder_input_ids=self.base.language_model.prepare_decoder_input_ids_from_labels(said.labels)).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), said.labels.flatten(), ignore_index=IGNORE)

    def _after(self, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Image features and then the embeddings of token ids: (B, N + L, D)."""
        return torch.cat([features, self.base.get_input_embeddings()(ids).to(features.dtype)], dim=1)

    def frozen(self) -> list[nn.Module]:
        return untrained([self.base.vision_model, self.base.qformer, self.base.language_model])

    def save(self, folder: Path) -> None:
        """A peft adapter folder: `PeftModel.from_pretrained(base, folder)` opens it."""
        self.model.save_pretrained(str(folder), safe_serialization=True)


def _text(whole: Any, tokenizer: Any, is_seq2seq: bool) -> Text:
    config = whole.text_config
    if is_seq2seq:
        return Text(tokenizer, start=(), end=config.eos_token_id, pad=config.pad_token_id, space="",
                    stop=(config.eos_token_id,))
    # BLIP-2's OPT ends a caption with "\n" (LAVIS appends it), not with the tokenizer's own EOS.
    return Text(tokenizer, start=(config.bos_token_id,), end=config.eos_token_id, pad=config.pad_token_id,
                max_length=config.max_position_embeddings - whole.num_query_tokens)


def _seen(features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The text's mask after the image's positions, all of which are attended to."""
    return torch.cat([torch.ones(features.shape[:2], dtype=mask.dtype, device=mask.device), mask], dim=1)
