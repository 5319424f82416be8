"""The `[train]` table and the arms."""

from typing import Literal

from pydantic import Field, model_validator

from recap.config import Model, Table


class Arm(Table):
    """What one arm of the comparison is trained on."""

    captions: dict[str, float] = {}
    """Caption kind → weight of its draw for an image (`alt`, a style, or any `KEY.KIND.txt`).

    Empty: not trained, the base itself."""
    shuffled: bool = False
    """Give each image another image's captions: the control that must not help."""
    guidance_scale: float | None = Field(None, ge=0)
    """This arm's own, instead of `generate.guidance_scale`: chosen on validation prompts."""


DEFAULT_ARMS = {
    "base": Arm(),
    "alt": Arm(captions={"alt": 1}),
    "short": Arm(captions={"short": 1}),
    "long": Arm(captions={"long": 1}),
    "mix": Arm(captions={"short": 1, "long": 1}),
    "rich": Arm(captions={"rich": 1}),
    "oracle": Arm(captions={"exact": 1}),
    "shuffled": Arm(captions={"short": 1, "long": 1}, shuffled=True),
}


class Train(Model):
    model: str = "CompVis/stable-diffusion-v1-4"
    shards: str | list[str] | None = None
    """Shards with the arms' captions; by default what `relabel` wrote."""
    captions: str | None = None
    """Folder or URL of what `relabel` wrote with `format = "parquet"`: the captions of `shards`, which are the original
    ones. Every arm is trained on those of their images that were relabelled."""
    resolution: int = Field(512, ge=8)
    """Side of the square training images, in pixels."""
    steps: int = Field(250_000, ge=1)
    batch_size: int = Field(512, ge=1)
    """Images a step, over all processes."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Images in memory at once on one process, gradients accumulated; by default all."""
    lr: float = Field(1e-5, gt=0)
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    """After the warm-up; `cosine` ends at zero."""
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    caption_dropout: float = Field(0.14, ge=0, le=1)
    """Share of captions replaced by the empty one, drawn anew whenever an image is read."""
    flip: bool = False
    """Mirror half of the images. Wrong where captions speak of left and right."""
    max_windows: int = Field(4, ge=1)
    """CLIP windows of 75 content tokens a caption; what is beyond is cut, counted and logged."""
    train_text_encoder: bool = True
    text_encoder_lr: float | None = Field(None, gt=0)
    """By default `lr`; it warms up and falls in step with it."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Of UNet and text encoder; warmed up as (1 + step) / (10 + step)."""
    shuffle_buffer: int = Field(1000, ge=1)
    """Images held for shuffling, beside the shuffled order of the shards."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast; weights and optimizer stay float32."""
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _a_rate_is_of_what_is_trained(self) -> "Train":
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise ValueError("text_encoder_lr is set, but train_text_encoder = false: leave one of them out")
        return self
