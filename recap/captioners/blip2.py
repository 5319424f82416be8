"""BLIP-2 (Li et al. 2023, arXiv 2301.12597) with LoRA (Hu et al. 2021, arXiv 2106.09685) on its language model.

The image features are put before the text embeddings by hand, instead of through `<image>` placeholder ids: a wrong
number of placeholders makes transformers ignore the image, or mix the images of a batch, without an error.
"""

import re
import warnings
from pathlib import Path
from typing import Any, Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor
from transformers.utils import logging

from recap.captioners import Caption
from recap.config import Captioner as CaptionerConfig
from recap.config import Finetune, Style
from recap.errors import UserError
from recap.pretrained import load_pretrained

IGNORE = -100  # labels that the cross entropy of transformers skips
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Blip2:
    """A BLIP-2 whose language model is a decoder (OPT)."""

    def __init__(self, model: Any, processor: Blip2Processor, name: str, device: str) -> None:
        self.name = name
        """Hub id or folder of the base."""
        self.model = model
        """`Blip2ForConditionalGeneration`, or the `PeftModel` around it."""
        self.base: Blip2ForConditionalGeneration = model.get_base_model() if isinstance(model, PeftModel) else model
        self.processor, self.tokenizer, self.device = processor, processor.tokenizer, device
        text = self.base.config.text_config
        self.bos, self.pad = text.bos_token_id, text.pad_token_id
        # BLIP-2's OPT ends a caption with "\n" (LAVIS appends it), not with the tokenizer's own EOS.
        self.eos = text.eos_token_id
        self.set_training(False)

    @classmethod
    def open(cls, config: CaptionerConfig, device: str, adapter: Path | None) -> Self:
        """Load base and processor, and a peft adapter on top where one is given."""
        logging.disable_progress_bar()
        processor = load_pretrained(Blip2Processor.from_pretrained, config, "captioner")
        model, info = load_pretrained(Blip2ForConditionalGeneration.from_pretrained, config, "captioner",
                                      dtype=DTYPES[config.dtype], use_safetensors=True, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):  # transformers would leave them random, with a warning
            raise UserError(f"captioner.model: {config.model} lacks {len(missing)} weights of a BLIP-2, {missing[0]} "
                            "first: it is another model, or damaged")
        if not model.config.use_decoder_only_language_model:
            raise UserError(f"captioner.model: {config.model} has an encoder–decoder language model; "
                            "choose a BLIP-2 with OPT, e.g. Salesforce/blip2-opt-2.7b")
        model.requires_grad_(False)
        if adapter is not None:
            model = _with_adapter(model, adapter)
        return cls(model.to(device), processor, config.model, device)

    def preprocess(self, images: list[Image.Image]) -> torch.Tensor:
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projected Q-Former outputs, (B, num_query_tokens, D) in the language model's dtype."""
        pixels = pixel_values.to(self.device, self.base.vision_model.dtype)
        features = self.base.get_image_features(pixels, return_dict=True).pooler_output
        return features.to(self.base.language_model.dtype)

    @torch.no_grad()
    def caption(self, features: torch.Tensor, style: Style) -> list[Caption]:
        # Every row has the same prompt, so none is padded, and a caption does not depend on its neighbours.
        prompt = torch.tensor([self._prompt_ids(style.prompt)], device=features.device)
        text = self.base.get_input_embeddings()(prompt).to(features.dtype).expand(len(features), -1, -1)
        embeds = torch.cat([features, text], dim=1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Passing `no_repeat_ngram_size`")  # what the prompt says may be repeated
            ids = self.base.language_model.generate(
                inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long,
                                                                device=embeds.device),
                max_new_tokens=style.max_new_tokens, do_sample=False, num_beams=style.num_beams,
                no_repeat_ngram_size=style.no_repeat_ngram_size, eos_token_id=self.eos, pad_token_id=self.pad)
        return [self._read(row) for row in ids.tolist()]

    def loss(self, pixel_values: torch.Tensor, prompts: list[str], captions: list[str]) -> torch.Tensor:
        features = self.encode(pixel_values)
        rows = [(self._prompt_ids(prompt), [*self._caption_ids(caption), self.eos])
                for prompt, caption in zip(prompts, captions, strict=True)]
        length = max(len(prompt) + len(caption) for prompt, caption in rows)
        ids, labels, mask = (torch.tensor(part, device=features.device)
                             for part in zip(*(self._padded(*row, length) for row in rows), strict=True))
        # The image's positions: nothing to predict, everything to attend to.
        image_labels = torch.full(features.shape[:2], IGNORE, device=features.device)
        image_mask = torch.ones(features.shape[:2], dtype=mask.dtype, device=features.device)
        text = self.base.get_input_embeddings()(ids).to(features.dtype)
        return self.base.language_model(
            inputs_embeds=torch.cat([features, text], dim=1), attention_mask=torch.cat([image_mask, mask], dim=1),
            labels=torch.cat([image_labels, labels], dim=1)).loss

    def num_tokens(self, caption: str) -> int:
        return len(self._caption_ids(caption)) + 1

    def fit(self, caption: str, max_tokens: int) -> str:
        offsets = self.tokenizer(" " + caption, add_special_tokens=False, return_offsets_mapping=True,
                                 verbose=False)["offset_mapping"]
        if len(offsets) <= max_tokens:
            return caption
        fitting = caption[:offsets[max_tokens - 1][1] - 1]  # less the space in front
        words_end = max((match.end() for match in re.finditer(r"\S+(?=\s)", caption) if match.end() <= len(fitting)),
                        default=0)
        sentence_ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", caption[:words_end + 1])]
        return caption[:sentence_ends[-1] if sentence_ends else words_end]

    def add_adapter(self, config: Finetune) -> None:
        """LoRA on the language model's layers named in `config.lora_targets`; all else stays frozen."""
        names = "|".join(map(re.escape, config.lora_targets))
        lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                          target_modules=rf"language_model\..*\.({names})")
        try:
            self.model = get_peft_model(self.base, lora)
        except ValueError as error:
            raise UserError(f"finetune.lora_targets: {' '.join(str(error).split())[:200]}") from None
        # Not the folder of the hub's cache, which is another one on every machine.
        self.model.peft_config["default"].base_model_name_or_path = self.name

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def set_training(self, training: bool) -> None:
        self.model.train(training)
        self.base.vision_model.eval()  # frozen, so never dropped out
        self.base.qformer.eval()

    def save(self, folder: Path) -> None:
        """A peft adapter folder: `PeftModel.from_pretrained(base, folder)` opens it."""
        self.model.save_pretrained(str(folder), safe_serialization=True)

    def _prompt_ids(self, prompt: str) -> list[int]:
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return [self.bos, *ids]  # by hand: a v5 GPT2Tokenizer adds BOS only when told so in its files

    def _caption_ids(self, caption: str) -> list[int]:
        return self.tokenizer(" " + caption, add_special_tokens=False, verbose=False)["input_ids"]

    def _padded(self, prompt: list[int], caption: list[int], length: int) -> tuple[list[int], list[int], list[int]]:
        """Token ids, labels (caption and end only) and attention mask, each padded on the right to `length`."""
        used = len(prompt) + len(caption)
        fill = length - used
        return (prompt + caption + [self.pad] * fill, [IGNORE] * len(prompt) + caption + [IGNORE] * fill,
                [1] * used + [0] * fill)

    def _read(self, ids: list[int]) -> Caption:
        ended = self.eos in ids
        ids = ids[:ids.index(self.eos)] if ended else ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        visible = "".join(letter if letter.isprintable() else " " for letter in text)
        return Caption(" ".join(visible.split()), ended)


def _with_adapter(model: Blip2ForConditionalGeneration, adapter: Path) -> PeftModel:
    if not (adapter / "adapter_config.json").is_file() or not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"captioner.adapter: no peft adapter in {adapter}: it needs adapter_config.json and "
                        "adapter_model.safetensors, as `recap finetune` writes them")
    try:
        return PeftModel.from_pretrained(model, str(adapter), use_safetensors=True)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"captioner.adapter: {adapter} does not fit this base: {reason}") from None
