"""Which captioner, and what it is put together from."""

import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from recap.config import Model, Table

DEFAULT_CAPTIONERS = {
    "blip2": "Salesforce/blip2-opt-2.7b", "blip": "Salesforce/blip-image-captioning-base",
    "vlm": "HuggingFaceTB/SmolVLM-500M-Instruct", "clipcap": "", "transformer": "", "cnn_lstm": "",
}
"""Family → the hub id of its captioner; empty for those that are put together from parts."""


class Part(Model):
    """A checkpoint that a captioner is put together from, named by one key: a folder, a hub id, or `ID@REVISION`."""

    dtype: Literal["float32"] = "float32"
    quantization: Literal["none"] = "none"

    @classmethod
    def of(cls, name: str) -> "Part":
        model, _, revision = name.partition("@")
        return cls(model=name) if Path(name).is_dir() or not revision else cls(model=model, revision=revision)


class ClipCap(Table):
    """ClipCap (Mokady et al. 2021, arXiv 2111.09734): a CLIP vector, mapped to a prefix that GPT-2 goes on from."""

    clip: str = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    """An open_clip model: `hf-hub:ID`, or a folder with `open_clip_config.json` and safetensors weights. This and other
    parts take `ID@REVISION`, too."""
    gpt2: str = "openai-community/gpt2"
    """Hub id or folder of a GPT-2."""
    mapper: Literal["mlp", "transformer"] = "mlp"
    prefix_length: int = Field(10, ge=1)
    """Positions that GPT-2 sees of an image."""
    clip_length: int = Field(10, ge=1)
    """Positions that the Transformer mapper unfolds CLIP's vector into."""
    num_layers: int = Field(8, ge=1)
    """Of the Transformer mapper."""
    num_heads: int = Field(8, ge=1)
    """Of the Transformer mapper."""
    train_gpt2: bool = True
    """The paper tunes GPT-2 beside the MLP, and keeps it frozen behind the Transformer, which reads a style's prompt
    for it. An MLP doesn't, so with a frozen GPT-2 it learns one style alone."""


class Decoder(Table):
    """The text decoder of a captioner that is trained from scratch."""

    hidden_size: int = Field(512, ge=1)
    num_layers: int = Field(6, ge=1)
    num_heads: int = Field(8, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    vocab_size: int = Field(10_000, ge=300)
    """Of the byte-level BPE that is learned from the training captions."""


class Transformer(Decoder):
    """A vision encoder and a text decoder with cross-attention: pretrained parts, or both from scratch."""

    encoder: str | None = "google/vit-base-patch16-224-in21k"
    """Hub id or folder of a ViT; `none` makes one of the decoder's size."""
    decoder: str | None = None
    """Hub id or folder of a GPT-2, which gets new cross-attention; by default a new decoder with its own vocabulary."""
    max_length: int = Field(320, ge=2)
    """Positions for prompt and caption together."""
    train_encoder: bool = False
    image_size: int = Field(224, ge=8)
    """Of an encoder from scratch, in pixels."""
    patch_size: int = Field(16, ge=1)
    """Of an encoder from scratch."""

    @property
    def is_from_scratch(self) -> bool:
        return self.encoder in (None, "none")


class CnnLstm(Decoder):
    """Show and Tell (Vinyals et al. 2015, arXiv 1411.4555); with attention, Show, Attend and Tell (1502.03044)."""

    encoder: str = "hf-hub:timm/resnet50.a1_in1k"
    """A timm model: `hf-hub:ID`, or a folder with `config.json` and `model.safetensors`; a bare name (`resnet18`) is
    that architecture, untrained."""
    attention: bool = True
    train_encoder: bool = False
    image_size: int | None = Field(None, ge=8)
    """In pixels; by default what the encoder was trained with."""
    num_layers: int = Field(1, ge=1)

    @property
    def is_from_scratch(self) -> bool:
        return "/" not in self.encoder and ":" not in self.encoder


class Captioner(Model):
    family: str = "blip2"
    """blip2, blip, clipcap, transformer, cnn_lstm or vlm."""
    model: str = ""
    """Hub id or folder of a whole captioner; by default that of `DEFAULT_CAPTIONERS`. What clipcap, transformer and
    cnn_lstm are put together from, before any is tuned, their own tables say."""
    tuned: str | None = None
    """What fine-tuning wrote, to relabel with instead of tuning again: an adapter folder, or a whole model where the
    family tunes the whole; `none` relabels with the base as it is."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the frozen base; what is trained is always float32."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Of a frozen base on CUDA, by bitsandbytes; blip2 and vlm only."""
    server: str | None = None
    """Of vlm: an OpenAI-compatible server (`http://localhost:8000/v1`) that has the model; for relabelling only."""
    clipcap: ClipCap = ClipCap()
    transformer: Transformer = Transformer()
    cnn_lstm: CnnLstm = CnnLstm()

    @model_validator(mode="before")
    @classmethod
    def _check_family(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        family = content.get("family", "blip2")
        if family not in DEFAULT_CAPTIONERS:
            near = difflib.get_close_matches(str(family), DEFAULT_CAPTIONERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the families are {', '.join(DEFAULT_CAPTIONERS)}"
            raise ValueError(f"no captioner family {family!r}: {hint}")
        return content

    @model_validator(mode="after")
    def _take_the_familys_model(self) -> "Captioner":
        if "model" not in self.model_fields_set:  # and it stays unset, for a captioner that differs in its family
            self.__dict__["model"] = DEFAULT_CAPTIONERS[self.family]
        return self

    @model_validator(mode="after")
    def _fits_the_family(self) -> "Captioner":
        if self.server and self.family != "vlm":
            raise ValueError(f"server is of family vlm, not of {self.family}: leave one of them out")
        if self.server and self.tuned not in (None, "none"):
            raise ValueError("tuned is of a captioner that is opened here: have the server serve it, or leave it out")
        if self.quantization != "none" and self.family not in ("blip2", "vlm"):
            raise ValueError(f"quantization is of a frozen base, and {self.family} tunes the whole: leave it out")
        return self

    def own(self) -> dict[str, Any]:
        """What a stage reads of this table: all but what other families are made of, and which weights are tuned."""
        others = {"clipcap", "transformer", "cnn_lstm"} - {self.family}
        return self.model_dump(exclude=others | {"tuned"})

    def parts(self) -> dict[str, str]:
        """Where the experiment file says it → the checkpoint of a part, where there is no whole captioner."""
        if self.family == "clipcap":
            return {"captioner.clipcap.clip": self.clipcap.clip, "captioner.clipcap.gpt2": self.clipcap.gpt2}
        if self.model:
            return {}
        if self.family == "transformer":
            encoder = {} if self.transformer.is_from_scratch else {
                "captioner.transformer.encoder": str(self.transformer.encoder)}
            return encoder | ({"captioner.transformer.decoder": self.transformer.decoder} if self.transformer.decoder
                              else {})
        if self.family == "cnn_lstm" and not self.cnn_lstm.is_from_scratch:
            return {"captioner.cnn_lstm.encoder": self.cnn_lstm.encoder}
        return {}
