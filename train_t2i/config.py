"""The `[train]` table and the arms."""

from typing import Any, Literal

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

    @model_validator(mode="after")
    def _some_caption_is_drawn(self) -> "Arm":
        if any(weight < 0 for weight in self.captions.values()):
            raise ValueError("captions: a weight is below 0")
        if self.captions and not any(self.captions.values()):
            raise ValueError("captions: every weight is 0, so that no caption would ever be drawn: raise one")
        return self


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


class Bounds(Table):
    """Of a number; both ends belong to it."""

    min: float | None = None
    max: float | None = None


class Filters(Table):
    """Which images are trained on. Those that are not are counted by reason."""

    min_side: int | None = Field(None, ge=1)
    """Pixels of the image's shorter side, at least."""
    max_aspect: float | None = Field(None, ge=1)
    """The longer side over the shorter, at most."""
    metadata: dict[str, Bounds] = {}
    """Key of `KEY.json` → the bounds of its number: `punsafe = {max = 0.1}`. An image without it is left out."""


class Buckets(Table):
    """Images keep about their own proportions: of sizes of about `resolution`² pixels, each takes the nearest.

    A step computes each size by itself: that most of it is of one, takes a `shuffle_buffer` of about `batch_size` times
    the number of sizes.
    """

    step: int = Field(64, ge=8)
    """Sides are multiples of it, in pixels."""
    max_aspect: float = Field(2.0, ge=1)
    """The longer side over the shorter, at most."""


class Lora(Table):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) instead of training all weights."""

    rank: int = Field(16, ge=1)
    alpha: int | None = Field(None, ge=1)
    """What adds to a layer is scaled by alpha / rank; by default rank, which is 1."""
    dropout: float = Field(0, ge=0, lt=1)
    unet: list[str] = ["to_q", "to_k", "to_v", "to_out.0"]
    """Which of the UNet's layers get an adapter, by the ends of their names."""
    text_encoder: list[str] = ["q_proj", "k_proj", "v_proj", "out_proj"]
    """Which of the text encoders' layers do."""


class Validation(Table):
    """Pictures of fixed prompts and seeds while the training runs, by the averaged weights."""

    prompts: str
    """A text file with a prompt a line, or JSON lines with `prompt`."""
    every: int = Field(1000, ge=1)
    """Steps between them; also drawn before the first step and after the last."""
    num_prompts: int = Field(16, ge=1)
    """At most so many, from the first on."""
    seed: int = 0
    num_inference_steps: int = Field(30, ge=1)
    guidance_scale: float = Field(7.5, ge=0)
    batch_size: int = Field(4, ge=1)
    """Pictures drawn at once on one process; the processes share the batches. Halved where it does not fit."""
    clip_score: str | None = None
    """The open_clip model of a CLIP score of the pictures (`local-dir:FOLDER`, `hf-hub:ID`); by default none."""
    reference: str | None = None
    """A folder of real images, for KID between the pictures and them; by default none."""
    num_references: int = Field(1000, ge=2)
    """At most so many of these, evenly spread over their names."""
    features: str | None = None
    """The network whose features KID compares: a timm model (`local-dir:FOLDER`, `hf-hub:ID`)."""

    @model_validator(mode="after")
    def _kid_needs_both(self) -> "Validation":
        if (self.reference is None) != (self.features is None):
            raise ValueError("validation.reference and validation.features: KID needs both")
        return self


class Train(Model):
    model: str = "CompVis/stable-diffusion-v1-4"
    """Stable Diffusion 1.x, 2.x or XL."""
    # --- data
    shards: str | list[str] | None = None
    """Shards with the arms' captions; by default what `relabel` wrote."""
    captions: str | None = None
    """Folder or URL of what `relabel` wrote with `format = "parquet"`: the captions of `shards`, which are the original
    ones. Every arm is trained on those of their images that were relabelled."""
    resolution: int = Field(512, ge=8)
    """Side of the square training images, in pixels."""
    buckets: Buckets | None = None
    """By default all images are square."""
    crop: Literal["center", "random"] = "center"
    """What is kept of an image where its proportions are not those wanted."""
    flip: bool = False
    """Mirror half of the images; never one whose caption speaks of left or right."""
    filters: Filters = Filters()
    shuffle_buffer: int = Field(1000, ge=1)
    """Images held for shuffling, over all processes, beside the shuffled order of the shards."""
    caption_dropout: float = Field(0.14, ge=0, le=1)
    """Share of captions replaced by the empty one, drawn anew whenever an image is read."""
    max_windows: int = Field(4, ge=1)
    """CLIP windows of 75 content tokens a caption; what is beyond is cut, counted and logged."""
    cache_latents: bool = False
    """Encode every image once, before the first arm is trained, and keep the result for all arms."""
    num_workers: int = Field(1, ge=0)
    """Processes that read and decode ahead of each training process."""
    # --- steps
    steps: int = Field(250_000, ge=1)
    batch_size: int = Field(512, ge=1)
    """Images a step, over all processes."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Images in memory at once on one process, gradients accumulated; by default all. Halved where it does not fit."""
    lr: float = Field(1e-5, gt=0)
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    """After the warm-up; `cosine` ends at zero."""
    warmup_steps: int = Field(0, ge=0)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps its moments in 8 bits, by bitsandbytes, on CUDA."""
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_skipped: int = Field(10, ge=0)
    """Steps in a row whose gradients are not finite, which change nothing, before the training stops."""
    # --- what is trained
    train_unet: bool = True
    train_text_encoder: bool = True
    text_encoder_lr: float | None = Field(None, gt=0)
    """By default `lr`; it warms up and falls in step with it."""
    lora: Lora | None = None
    """By default all weights are trained."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Of all that is trained; warmed up as (1 + step) / (10 + step)."""
    ema_every: int = Field(1, ge=1)
    """Steps between two updates of the average."""
    ema_device: Literal["device", "cpu"] = "device"
    """Where it is kept; `cpu` spares a GPU's memory, and costs a copy at every update."""
    # --- the loss
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the UNet predicts; by default what its checkpoint says, from which it can't differ."""
    zero_terminal_snr: bool = False
    """The last noise level is noise alone (Lin et al. 2023, arXiv 2305.08891), for v-prediction."""
    min_snr_gamma: float | None = Field(None, gt=0)
    """Weigh the noise levels by min(SNR, γ) (Hang et al. 2023, arXiv 2303.09556), which names 5; by default evenly."""
    noise_offset: float = Field(0, ge=0)
    """Noise added to a whole channel, as a share of that of its pixels; 0.05 to 0.1 lets pictures be dark."""
    # --- engine
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast; weights that are trained and the optimizer stay float32."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """torch.compile of the UNet: minutes at the start, for faster steps."""
    # --- what is kept
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints, to go on from."""
    snapshot_every: int | None = Field(None, ge=1)
    """Steps between diffusers folders of the averaged weights, `snapshots/STEP/`, which are kept; by default none."""
    log_every: int = Field(10, ge=1)
    """Steps between log lines, which are what waits for the device."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Who is told of loss, rates and validation beside `log.jsonl`."""
    validation: Validation | None = None
    single_file: bool = False
    """Write the result as one `.safetensors` file as well, float16, for the programs that want one."""
    push_to_hub: str | None = None
    """Upload the result to this repository of the hub."""

    def own(self) -> dict[str, Any]:
        """What the weights depend on, or what stands beside them: all but how fast it is done and who is told."""
        return self.model_dump(exclude={"num_workers", "log_every", "trackers", "push_to_hub", "checkpoint_every"})

    @model_validator(mode="after")
    def _something_is_trained(self) -> "Train":
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise ValueError("text_encoder_lr is set, but train_text_encoder = false: leave one of them out")
        if not self.train_unet and not self.train_text_encoder:
            raise ValueError("train_unet = false and train_text_encoder = false: nothing would be trained")
        return self

    @model_validator(mode="after")
    def _the_cache_holds_what_is_trained_on(self) -> "Train":
        if self.cache_latents and self.crop == "random":
            raise ValueError("cache_latents keeps one crop of an image: set crop = \"center\", or leave it out")
        return self
