"""What a captioner is tuned on, and how."""

from typing import Literal

from pydantic import Field, model_validator

from recap.config import Name, Table


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
    """After the warm-up; `linear` and `cosine` fall to zero after the last step."""
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
