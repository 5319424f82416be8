"""Any vision-language model of transformers (`AutoModelForImageTextToText`) with its chat template and LoRA.

    chat.py (what it is asked, what of its answer is the caption) → once.py (each image is looked at once) → here

Every text is put together by the model's own processor: how many placeholders an image needs, and what other inputs go
with them, is each model's own affair, and a wrong number mixes images or hides them.
"""

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils import logging

from recap.captioners import Tunable
from recap.captioners.chat import PROMPT, Chat, Reply, decoder_output, turn
from recap.captioners.lora import add_lora, load_lora, untrained
from recap.captioners.once import ReadOnce, Vision, legible
from recap.captioners.text import IGNORE, Batch, Caption, next_token_loss, pad
from recap.config import Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.config.finetune import Finetune
from recap.errors import UserError
from recap.pretrained import load_model, load_pretrained


@dataclass(frozen=True, slots=True)
class Pictures:
    """A batch of images as its processor made them, on the CPU."""

    sizes: list[tuple[int, int]]
    """Width and height of each."""
    made: list[Any]
    """What the image processor gave; the processor reads the numbers of placeholders from it."""
    inputs: dict[str, torch.Tensor]
    """What of it the model takes: `pixel_values`, and grids, masks or sizes."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Encoded images. Opaque, and not one tensor: how many positions an image takes can differ from image to image."""

    pictures: Pictures
    inputs: dict[str, torch.Tensor]
    """Those of the pictures, on the model's device."""
    features: Any
    """What `get_image_features` gave; None of a model that has no such thing."""


class Vlm(Tunable):
    """A language model, decoder-only or encoder–decoder, that sees images by a vision model of its own."""

    whole: ClassVar[bool] = False
    text: Reply

    def __init__(self, model: Any, processor: Any, name: str, device: str) -> None:
        self.name = name
        """Hub id or folder of the base."""
        self.model = model
        """Of a class of transformers, or the `PeftModel` around it."""
        self.base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.processor, self.device, self.chat = processor, device, _chat(processor)
        self.is_seq2seq = bool(self.base.config.is_encoder_decoder)
        self.text = _text(self.base, self.chat, self.is_seq2seq)
        # The checkpoint's own would sample, forbid repetitions or force an end: a style says all of that.
        self.base.generation_config = GenerationConfig(
            eos_token_id=list(self.text.ends), pad_token_id=self.text.pad,
            decoder_start_token_id=self.text.start[0] if self.is_seq2seq else None)
        self.vision = Vision(self.base)
        self.set_training(False)

    @classmethod
    def open(cls, config: CaptionerConfig, device: str, tuned: Path | None) -> Self:
        """Model and processor. No code that a checkpoint brings along is run."""
        logging.disable_progress_bar()
        model = load_model(AutoModelForImageTextToText, config, device)
        try:
            processor = load_pretrained(AutoProcessor.from_pretrained, config, "captioner", weights=device != "meta",
                                        trust_remote_code=False)
        except ImportError as error:  # SmolVLM2's needs num2words
            line = " ".join(str(error).split())[:200]
            raise UserError(f"captioner.model: the processor of {config.model} needs a package: {line}") from None
        return cls(model if tuned is None else load_lora(model, tuned).to(device), processor, config.model, device)

    def prepare(self, config: Finetune, captions: list[str]) -> None:
        """LoRA on the language model's layers, and on those of the vision model that are named."""
        kind = self.base.config.get_text_config(decoder=True).model_type.removesuffix("_text")
        self.model = add_lora(self.base, config.lora, _parts(self.base), kind, self.name)
        self.encoder_is_trained = bool(config.lora.vision_model)

    # --- images ----------------------------------------------------------------------------------------------------

    def preprocess(self, images: list[Image.Image]) -> Pictures:
        """What the processor makes of the images, with the checkpoint's own limits on their size."""
        images = [legible(image) for image in images]
        reader = ReadOnce(self.processor.image_processor)
        out = self._process([PROMPT] * len(images), images, reader)
        names = {name for made in reader.made for name in made}
        inputs = {name: value for name, value in out.items() if name in names and isinstance(value, torch.Tensor)}
        return Pictures([image.size for image in images], reader.made, inputs)

    def encode(self, pixels: Pictures) -> Seen:
        """What the vision model sees of the images; opaque, and not for `cache_features`."""
        inputs = self._on_device(pixels.inputs)
        with torch.set_grad_enabled(self.encoder_is_trained and torch.is_grad_enabled()):
            return Seen(pixels, inputs, self.vision.look(inputs))

    def _process(self, prompts: list[str], images: list[Image.Image], reader: ReadOnce) -> dict[str, Any]:
        """The processor's own output for a batch of prompts, each with an image.

        Padded on the left, where a decoder goes on from; an encoder with a table of positions begins at the first.
        """
        asked = {prompt: self.chat.ask(prompt) for prompt in set(prompts)}
        bos = self.processor.tokenizer.bos_token
        has_bos = bos is not None and asked[prompts[0]].startswith(bos)  # a template's own; as transformers does it
        processor = copy.copy(self.processor)
        processor.image_processor = reader
        return dict(processor(text=[asked[prompt] for prompt in prompts], images=[[image] for image in images],
                              return_tensors="pt", padding=True, padding_side="right" if self.is_seq2seq else "left",
                              **({"add_special_tokens": False} if has_bos else {})))

    def _ask(self, seen: Seen, prompts: list[str]) -> dict[str, torch.Tensor]:
        """All that goes into the model beside the images' own inputs: `input_ids` (B, L), and what goes with them."""
        pictures = seen.pictures
        blanks = [Image.new("RGB", size, None) for size in pictures.sizes]  # counted and measured, never read
        try:
            out = self._process(prompts, blanks, ReadOnce(self.processor.image_processor, pictures.made))
        except ValueError as error:  # Florence-2's: a task's token has to stand alone
            asked = ", ".join(map(repr, sorted(set(prompts))))
            raise UserError(f"styles: this model does not take the prompt {asked}: {' '.join(str(error).split())[:200]}"
                            ) from None
        return self._on_device({name: value for name, value in out.items() if isinstance(value, torch.Tensor)
                                and name not in pictures.inputs and name != "labels"})

    def _on_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device, self.base.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()}

    # --- texts -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def caption(self, features: Seen, style: Style) -> list[Caption]:
        asked = self._ask(features, [style.prompt] * len(features.pictures.sizes))
        start = len(self.text.start) if self.is_seq2seq else asked["input_ids"].shape[1]
        if self.is_seq2seq:
            begin = torch.tensor([self.text.start], device=self.device)
            asked["decoder_input_ids"] = begin.expand(len(asked["input_ids"]), -1)
        with self.vision.seen(features.inputs, features.features):
            ids = self.base.generate(**asked, **features.inputs, **self.text.decoding(style, start))
        return [self.text.read(row[start:]) for row in ids.tolist()]

    def loss(self, features: Seen, prompts: list[str], captions: list[str]) -> torch.Tensor:
        asked = self._ask(features, prompts)
        said = pad([(list(self.text.start), self.text.caption_ids(caption)) for caption in captions], self.text.pad,
                   self.device)
        if self.is_seq2seq:
            rows, labels, keep = asked | {"decoder_input_ids": said.ids}, said.labels, said.ids.shape[1]
        else:
            rows, labels, keep = _answered(asked, said, self._suffix_type)
        # A vocabulary's logits for thousands of an image's positions would not fit, and nothing is learned of them.
        limits = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(self.base.forward).parameters else {}
        with self.vision.seen(features.inputs, features.features):
            logits = self.base(**rows, **features.inputs, **limits, use_cache=False).logits
        return next_token_loss(logits[:, -keep:], labels[:, -keep:])

    @property
    def _suffix_type(self) -> int:
        """The `token_type_ids` of what is generated. PaliGemma's alone tell a suffix (1) from its prefix (0)."""
        return int(self.base.config.model_type == "paligemma")

    def frozen(self) -> list[nn.Module]:
        return untrained([*self.vision.owner.children()])

    def save(self, folder: Path) -> None:
        """A peft adapter folder: `PeftModel.from_pretrained(base, folder)` opens it."""
        self.model.save_pretrained(str(folder), safe_serialization=True)


def _chat(processor: Any) -> Chat:
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not hasattr(processor, "image_processor"):
        raise UserError(f"captioner.model: a {type(processor).__name__} is not a processor of images and text: take "
                        "another model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Chat(processor)


def _text(model: Any, chat: Chat, is_seq2seq: bool) -> Reply:
    """How captions are written and where they end."""
    generation, tokenizer = model.generation_config, chat.processor.tokenizer
    eos = generation.eos_token_id
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not is_seq2seq:
        return turn(chat, eos, tokenizer.pad_token_id)
    config = model.config.get_text_config(decoder=True)
    start = generation.decoder_start_token_id
    return decoder_output(tokenizer, config.decoder_start_token_id if start is None else start, eos,
                          tokenizer.pad_token_id, getattr(config, "max_position_embeddings", None))


def _parts(model: Any) -> dict[str, str]:
    """Where language model and vision model are. Both can have a `q_proj`: each is only looked for in its own."""
    names = {id(module): name for name, module in model.named_modules()}
    decoder = model.get_decoder()
    language, vision = names[id(decoder)], names[id(model.get_encoder(modality="image"))]
    if decoder in (model, model.base_model) or f"{vision}.".startswith(f"{language}."):
        raise UserError(f"captioner.model: the language model of a {type(model).__name__} can't be told from its "
                        "vision model, so it can't be tuned here: take another")
    return {"language_model": language} | ({"vision_model": vision} if vision else {})


def _answered(asked: dict[str, torch.Tensor], said: Batch,
              suffix_type: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
    """Prompts, padded on the left, and captions → rows padded on the right; labels (B, L); how many last positions
    hold all that is learned, and the one before.
    """
    ids, mask = asked["input_ids"], torch.cat([asked["attention_mask"], said.mask], dim=1)
    order = mask.argsort(dim=1, descending=True, stable=True)[:, :int(mask.sum(1).max())]
    follows = {"input_ids": said.ids, "attention_mask": said.mask, "token_type_ids": said.mask * suffix_type}

    def row(name: str, value: torch.Tensor) -> torch.Tensor:
        if value.shape[:2] != ids.shape:
            return value
        more = follows.get(name, torch.zeros_like(said.ids))
        if value.ndim > 2:  # which images a position sees: a caption, what the prompt's last one does
            more = value[:, -1:].expand(-1, said.ids.shape[1], *value.shape[2:])
        joined = torch.cat([value, more.to(value.dtype)], dim=1)
        return torch.take_along_dim(joined, order.view(*order.shape, *[1] * (value.ndim - 2)), dim=1)

    labels = torch.cat([torch.full_like(ids, IGNORE), said.labels], dim=1).take_along_dim(order, dim=1)
    keep = order.shape[1] - int(asked["attention_mask"].sum(1).min()) + 1
    return {name: row(name, value) for name, value in asked.items()}, labels, keep
