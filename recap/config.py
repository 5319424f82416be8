"""TOML → typed tables. Defaults < file < `a.b=c` on the command line; an unknown key is an error naming the nearest.

A table is a pydantic model beside the code that it configures: recap's own are below, `train_t2i/config.py` and
`eval/config.py` hold theirs, and `recap/pipeline.py` joins them into one experiment. Nothing heavy is imported here.
"""

import difflib
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recap.errors import UserError

T = TypeVar("T", bound=BaseModel)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""What becomes part of a file's name: an arm, a style."""

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""The same, where a dot may stand as well: `v1.2`."""


class Table(BaseModel):
    """A table of the experiment file. Fields are documented by the string below them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class Model(Table):
    """A checkpoint: a hub id, or a local folder in the same format."""

    model: str
    """Hub id (`Salesforce/blip2-opt-2.7b`) or folder."""
    revision: str = "main"
    """Commit, tag or branch on the hub; `main` can change, so it is warned of. Ignored for a folder."""


# --- recap's tables ------------------------------------------------------------------------------------------------


class Data(Table):
    shards: str | list[str] = Field(default_factory=list)
    """Webdataset shards as img2dataset writes them: paths or URLs, with braces or globs."""
    alt_text: Literal["required", "optional"] = "required"
    """`required` quarantines a sample whose alt-text is missing, empty or not text; `optional` keeps it."""


class Style(Table):
    prompt: str
    """The fixed conditioning prompt of this style, given to the captioner in training and in relabelling."""
    max_new_tokens: int = Field(64, ge=1)
    """The longest caption, in tokens of the captioner's language model."""
    num_beams: int = Field(1, ge=1)
    """Beams of the search; 1 is greedy."""
    no_repeat_ngram_size: int = Field(0, ge=0)
    """A caption never repeats so many of its tokens in a row; 0 allows it."""


DEFAULT_STYLES = {
    "short": Style(prompt="A short caption:", max_new_tokens=32),
    "long": Style(prompt="A detailed caption:", max_new_tokens=96),
    "rich": Style(prompt="A rich description:", max_new_tokens=256),
}


class Detr(Model):
    model: str = "facebook/detr-resnet-50"
    threshold: float = Field(0.7, ge=0, le=1)
    """Detections below this score are not facts."""


class Stitch(Table):
    shards: str | list[str] | None = None
    """Images to write captions for; by default `data.shards`."""
    num_images: int = Field(100, ge=1)
    """How many, from the first shard on. RECAP tuned its captioner on 100 images."""
    experts: list[str] = ["detr", "alt_text"]
    writer: Literal["template"] = "template"
    batch_size: int = Field(8, ge=1)
    detr: Detr = Detr()


FAMILIES = ("blip2", "blip", "clipcap", "transformer", "cnn_lstm", "vlm")


class ClipCap(Table):
    """ClipCap (Mokady et al. 2021, arXiv 2111.09734): a CLIP vector, mapped to a prefix that GPT-2 goes on from."""

    clip: str = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    """An open_clip model: `hf-hub:ID`, or a folder with `open_clip_config.json` and safetensors weights."""
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
    """The paper tunes GPT-2 beside the MLP, and keeps it frozen behind the Transformer."""


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
        if family not in FAMILIES:
            near = difflib.get_close_matches(str(family), FAMILIES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the families are {', '.join(FAMILIES)}"
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


DEFAULT_CAPTIONERS = {
    "blip2": "Salesforce/blip2-opt-2.7b", "blip": "Salesforce/blip-image-captioning-base",
    "vlm": "HuggingFaceTB/SmolVLM-500M-Instruct", "clipcap": "", "transformer": "", "cnn_lstm": "",
}
"""Family → the hub id of its captioner; empty for those that are put together from parts."""


class Dataset(Table):
    """Captioned images in a format other than shards."""

    format: Literal["coco", "flickr", "pixlore", "imagefolder"]
    """COCO captions JSON; Flickr8k or Flickr30k token file; PixLore's CSV; a Hugging Face imagefolder."""
    captions: str
    """The file with the captions; of an imagefolder, the folder that holds `metadata.jsonl`."""
    images: str | None = None
    """The folder that image names are relative to; by default that of the captions."""
    style: Name = "long"
    """What style the captions are of, where the file doesn't say."""


class Lora(Table):
    """LoRA (Hu et al. 2021, arXiv 2106.09685), for blip2 and vlm: which linear layers get an adapter."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    language_model: list[str] | None = None
    """Layers of the language model, by name; by default those that project queries and values, as peft knows them for
    its kind: `q_proj` and `v_proj` of OPT, `q` and `v` of T5."""
    qformer: list[str] = []
    """Layers of BLIP-2's Q-Former: `query`, `key`, `value`."""
    vision_model: list[str] = []
    """Layers of the vision model: `qkv` in BLIP-2's."""


class Augment(Table):
    """What happens to a training image, drawn anew for every pair and epoch. All off by default."""

    flip: float = Field(0, ge=0, le=1)
    """Share of images mirrored; never where the caption speaks of left or right."""
    crop: float = Field(1, gt=0, le=1)
    """The smallest share of an image's area that a crop keeps; 1 crops nothing."""
    blur: float = Field(0, ge=0, le=1)
    """Share of images blurred."""
    colour: float = Field(0, ge=0, lt=1)
    """How much brightness, contrast and saturation may change, as a share."""

    @property
    def is_off(self) -> bool:
        return not self.flip and self.crop == 1 and not self.blur and not self.colour


class Validation(Table):
    """Held-out images: when they are looked at, and what for."""

    share: float = Field(0, ge=0, lt=1)
    """Of the images, held out whole, with all their captions; 0 trains on all."""
    shards: str | list[str] | None = None
    """Shards to validate on instead of a share."""
    dataset: Dataset | None = None
    """Captioned images to validate on instead of a share."""
    every: int | None = Field(None, ge=1)
    """Steps between validations; by default an epoch, or a tenth of the steps where that is longer."""
    num_images: int = Field(200, ge=1)
    """At most so many images are captioned and scored."""
    select_by: Literal["loss", "cider_d"] = "loss"
    """What the best checkpoint is best in."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many validations without a better one."""

    @property
    def is_on(self) -> bool:
        return bool(self.share or self.shards or self.dataset)

    @model_validator(mode="after")
    def _one_source(self) -> "Validation":
        if sum(map(bool, (self.share, self.shards, self.dataset))) > 1:
            raise ValueError("validation.share, .shards and .dataset: give one of them")
        if self.patience and not self.is_on:
            raise ValueError("validation.patience needs held-out images: set validation.share")
        return self


class Finetune(Table):
    shards: str | list[str] | None = None
    """Shards with a `KEY.STYLE.txt` for the styles to learn; by default what `stitch` wrote."""
    dataset: Dataset | None = None
    """Captioned images in another format, instead of shards."""
    steps: int | None = Field(None, ge=1)
    """By default 300, unless `epochs` is given."""
    epochs: int | None = Field(None, ge=1)
    """Instead of steps: how often every pair is seen."""
    batch_size: int = Field(64, ge=1)
    """Image–caption pairs a step, over all processes. Each image comes once for every caption that it has."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Pairs in memory at once on one process, gradients accumulated; by default all."""
    lr: float = Field(4e-5, gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; `linear` and `cosine` end at zero."""
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    """Of matrices only, not of biases and norms."""
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["no", "bf16"] = "no"
    """Autocast; what is trained stays float32."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, more time."""
    lora: Lora = Lora()
    augment: Augment = Augment()
    validation: Validation = Validation()
    test_share: float = Field(0, ge=0, lt=1)
    """Of the images, held out from training and validation both: what `recap compare` scores captioners on."""
    cache_features: bool = False
    """Encode every image once and keep the result on disk: where the vision model is frozen and nothing augmented."""
    max_tokens: int = Field(256, ge=1)
    """Longer captions are cut at a sentence end, counted and reported."""
    num_workers: int = Field(0, ge=0)
    """Processes that decode and augment images ahead of the training."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints."""
    seed: int = 0

    @model_validator(mode="after")
    def _fits_together(self) -> "Finetune":
        if self.steps and self.epochs:
            raise ValueError("steps and epochs: give one of them")
        if self.shards is not None and self.dataset:
            raise ValueError("shards and dataset: give one of them")
        if self.cache_features and not self.augment.is_off:
            raise ValueError("cache_features keeps what was seen of an image, and augment changes it: leave one out")
        return self


class Compare(Table):
    """Captioners to compare: each is this experiment with some values of its own."""

    captioners: dict[Name, dict[str, Any]] = Field(min_length=1)
    """Name → tables that differ (`captioner.family = "blip"`, `finetune.lr = 1e-4`). `captioner.tuned = "none"` is the
    base as it is. All learn from the same images and are scored on the same others, `finetune.test_share` of them."""
    baseline: Name | None = None
    """The one that the others are compared with; by default the first."""
    num_images: int = Field(1000, ge=2)
    """At most so many images are captioned and scored."""
    batch_size: int = Field(32, ge=1)
    """Images captioned at once."""
    meteor: bool = False
    """METEOR too; needs Java and pycocoevalcap."""
    num_samples: int = Field(12, ge=0)
    """Images on the page."""

    @model_validator(mode="after")
    def _baseline_is_there(self) -> "Compare":
        if self.baseline is not None and self.baseline not in self.captioners:
            raise ValueError(f"compare.baseline: no captioner {self.baseline!r} there: take one of "
                             f"{', '.join(self.captioners)}")
        return self


class Dimension(Table):
    """What one key is tried with: some values, or a range of numbers. A bare list is its `values`."""

    values: list[Any] | None = Field(None, min_length=1)
    low: int | float | None = None
    """Integers are tried where `low` and `high` are written as integers."""
    high: int | float | None = None
    log: bool = False
    """Search the range by orders of magnitude."""
    step: int | float | None = Field(None, gt=0)
    """Between the numbers that are tried; by default 1 for integers, and any for others."""

    @model_validator(mode="after")
    def _check_form(self) -> "Dimension":
        if self.values is not None:
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("values, or low and high: give one of them")
            if twice := [value for place, value in enumerate(self.values) if value in self.values[:place]]:
                raise ValueError(f"{twice[0]!r} is named twice: name it once")
            return self
        if self.low is None or self.high is None:
            raise ValueError("low and high: give both, or a list of values")
        if self.high <= self.low:
            raise ValueError(f"high={self.high} is not above low={self.low}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log goes with low above 0 and without step")
        return self

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    def listed(self) -> list[Any] | None:
        """All values there are to try; none for a range without steps."""
        if self.values is not None or self.low is None or self.high is None:
            return self.values
        step = self.step or (1 if self.is_integer else None)
        if step is None or self.log:
            return None
        # Rounded, so that 0.1 + 2 · 0.1 is 0.3.
        return [round(self.low + place * step, 12) for place in range(int((self.high - self.low) / step + 1e-9) + 1)]


class Sweep(Table):
    """A search for the best settings of captioner fine-tuning, for `recap sweep`."""

    sampler: Literal["grid", "tpe"] = "tpe"
    """`grid` tries every combination; `tpe` (Bergstra et al. 2011) draws where earlier trials were good."""
    trials: int | None = Field(None, ge=1)
    """How many `tpe` makes; by default 20. More of them go on with the same search."""
    metric: Literal["loss", "cider_d"] | None = None
    """Of the held-out images, at each trial's best validation; by default `finetune.validation.select_by`."""
    seed: int = 0
    """Of `tpe`."""
    space: dict[str, Dimension] = Field(min_length=1)
    """Dotted key → what to try: `finetune.batch_size = [16, 64]`, `finetune.lr = { low = 1e-5, high = 1e-3, log = true
    }`."""

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("space"), dict):
            return content  # which validation refuses
        return content | {"space": dict(_dimensions(content["space"], ""))}

    @model_validator(mode="after")
    def _grid_is_finite(self) -> "Sweep":
        if self.sampler == "tpe":
            return self
        if self.trials is not None:
            raise ValueError("trials is of tpe, and grid tries every combination: leave it out")
        if endless := [key for key, dimension in self.space.items() if dimension.listed() is None]:
            raise ValueError(f"space.{endless[0]}: grid needs a list of values, or a range with a step and without log")
        return self


def _dimensions(space: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Tables in tables → dotted keys: TOML reads `finetune.lr = …` as a table `finetune` that holds `lr`."""
    for name, value in space.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and not value.keys() & Dimension.model_fields.keys():
            yield from _dimensions(value, f"{key}.")
        elif isinstance(value, list):
            yield key, {"values": value}
        elif isinstance(value, dict | Dimension):
            yield key, value
        else:
            raise ValueError(f"space.{key}: give a list of values, or a range {{ low = …, high = … }}")


class Relabel(Table):
    shards: str | list[str] | None = None
    """Shards to relabel; by default `data.shards`."""
    batch_size: int = Field(16, ge=1)
    mix: dict[str, float] = {"short": 1.0, "long": 1.0}
    """Weights of the draw that `KEY.mix.txt` holds, for other trainers; ours draws anew in every epoch."""
    seed: int = 0


# --- loading -------------------------------------------------------------------------------------------------------


def load(path: Path, overrides: Iterable[str], model: type[T]) -> T:
    """Read an experiment file, apply `a.b=c` overrides, and check it whole."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no experiment file at {path}: see configs/ for those that come with recap") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError, RecursionError) as error:
        raise UserError(f"{path} is not a TOML file: {error}") from None
    for override in overrides:
        _set(content, override)
    content.setdefault("name", path.stem)
    return validate(content, model, str(path))


def validate(content: dict[str, Any], model: type[T], where: str) -> T:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, model)}") from None


def _set(content: dict[str, Any], override: str) -> None:
    """Apply `train.lr=1e-5`. The value is TOML; what is not TOML is taken as a string."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"{override!r} is not an override: write table.key=value, e.g. train.lr=1e-5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, key = dotted.split(".")
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise UserError(f"{override!r}: {table} is a value, not a table")
    content[key] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem in one line; for an unknown key, with the nearest known one."""
    first = error.errors()[0]
    *parents, last = [str(part) for part in first["loc"]] or [""]
    dotted = ".".join([*parents, last])
    if first["type"] == "extra_forbidden":
        known = _keys(model, parents)
        near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*parents, near[0]])}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {dotted}: {hint}"
    if first["type"] == "missing":
        return f"{dotted} is missing: set it in the file or give {dotted}=…"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    if not dotted:
        return message
    of_a_table = first["type"] == "value_error" and isinstance(first["input"], dict)  # such a rule names its keys
    found = "" if of_a_table else f", not {first['input']!r:.80}"
    return f"{dotted}: {message}{found}{more}"


def _keys(model: Any, parents: list[str]) -> list[str]:
    """The field names of the table that `parents` leads to."""
    for parent in parents:
        field = model.model_fields.get(parent) if hasattr(model, "model_fields") else None
        if field is not None:
            model = field.annotation
        if args := getattr(model, "__args__", None):  # dict[str, Style] or Style | None → Style
            model = next((a for a in reversed(args) if hasattr(a, "model_fields")), model)
    return list(getattr(model, "model_fields", {}))
