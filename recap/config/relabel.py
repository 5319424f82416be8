"""`[relabel]`: which shards get captions, how they are checked, and where they go."""

from typing import Literal

from pydantic import Field, field_validator

from recap.config import Model, Table

Action = Literal["flag", "resample", "alt", "drop"]
"""What happens to a caption that a check finds at fault: `flag` keeps it and says so in `KEY.recap.json`; `resample`
draws it anew, a few times; `alt` puts the alt-text in its place, if that is a text, and CLIP does not prefer the
caption; `drop` quarantines the sample."""

LENGTHS = {"short": (2, 30), "long": (5, 100), "rich": (5, 300)}
"""Style → the fewest and the most words of a caption."""
ANY_LENGTH = (1, 300)
"""The same of other styles."""


class ClipCheck(Model):
    """Captions that CLIP does not find in the image (sentence by sentence, where they are long)."""

    model: str = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    """An open_clip model: `hf-hub:ID`, or a folder with `open_clip_config.json` and safetensors weights."""
    threshold: float | None = Field(None, allow_inf_nan=False)
    """Cosine × 100 below which a caption is at fault. Without it, and without `above_alt`, captions are only scored."""
    above_alt: bool = False
    """Whether a caption that scores less than the alt-text is at fault."""
    action: Action = "flag"


class ObjectCheck(Model):
    """Captions that name an everyday thing which a detector knows by name and does not find."""

    model: str = "facebook/detr-resnet-50"
    """A DETR of transformers."""
    threshold: float = Field(0.5, ge=0, le=1)
    """Detections below this score count as not there."""
    action: Action = "flag"


class Checks(Table):
    """Checks of captions; every rate is in the shard's stats."""

    empty: Action = "flag"
    too_short: Action = "flag"
    too_long: Action = "flag"
    not_ended: Action = "flag"
    """Stopped by the style's token limit."""
    repetition: Action = "flag"
    leaked_prompt: Action = "flag"
    """Holds the style's prompt, a question's or an answer's mark, or speaks to or of a model."""
    non_text: Action = "flag"
    """Mostly what no sentence is made of: markup, addresses, symbols, replacement characters. Or anywhere what programs
    leave: a tokenizer's `[UNK]` and `▁`, a detector's coordinates."""
    words: dict[str, tuple[int, int]] = LENGTHS
    """Style → the fewest and the most words; `short`, `long` and `rich` keep theirs where they are not named. Other
    styles may have 1 to 300."""
    clip_score: ClipCheck | None = None
    objects: ObjectCheck | None = None
    max_resamples: int = Field(2, ge=1, le=16)
    """Draws of a caption whose check says `resample`. The first without a fault is taken."""
    temperature: float = Field(0.7, gt=0)
    """Of these draws."""
    otherwise: Literal["flag", "alt", "drop"] = "flag"
    """What happens where every draw is at fault."""

    @field_validator("words")
    @classmethod
    def _all_lengths(cls, words: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """The lengths that hold: those that are given, in place of the known ones."""
        for style, (fewest, most) in words.items():
            if fewest > most:
                raise ValueError(f"{style}: {fewest} to {most} words: write the fewest first")
        return LENGTHS | words


class Scorer(Model):
    """An image classifier of transformers; what it is sure of is dropped."""

    label: str | list[str] | None = None
    """Of its classes, the one that is unwanted, or several; by default the one whose name says so, if just one does."""
    threshold: float = Field(0.5, ge=0, le=1)
    """The probability of that class, or of those together, from which on an image is dropped."""


class Nsfw(Scorer):
    model: str = "Falconsai/nsfw_image_detection"


class Watermark(Scorer):
    model: str = "prithivMLmods/Watermark-Detection-SigLIP2"


class Aesthetic(Model):
    """LAION's aesthetic predictors: a linear map or a small network on CLIP's vector of an image."""

    model: str
    """The CLIP that the head was trained on, as open_clip opens it: `hf-hub:ID`, or a folder. LAION's heads are mostly
    of OpenAI's ViT-L/14."""
    head: str
    """The head's file, safetensors or `.pth`: `sa_0_4_vit_l_14_linear.pth` of LAION-AI/aesthetic-predictor, or
    `sac+logos+ava1-l14-linearMSE.pth` of christophschuhmann/improved-aesthetic-predictor."""
    threshold: float = Field(allow_inf_nan=False)
    """The score, about 1 to 10, below which an image is dropped."""


class Images(Table):
    """Which images get captions at all; those that don't are quarantined, with the reason."""

    min_side: int = Field(1, ge=1)
    """Of the shorter side, in pixels."""
    max_aspect: float = Field(0, ge=0)
    """The longer side over the shorter; 0 allows any."""
    duplicates: Literal["caption_once", "drop", "ignore"] = "caption_once"
    """A repeated image of a shard: the first one's captions serve it too, or it is dropped."""
    duplicate_bits: int | None = Field(None, ge=0, le=16)
    """By default an image is repeated when its file has the same bytes. With a number: when at most so many bits of a
    64-bit difference hash differ, so that a resized or recompressed copy counts as well; 4 is usual. The hash knows
    light and dark alone, so that drawings on an even ground are soon alike to it; with hardly an edge, none is."""
    nsfw: Nsfw | None = None
    watermark: Watermark | None = None
    aesthetic: Aesthetic | None = None


class Relabel(Table):
    shards: str | list[str] | None = None
    """Shards to relabel; by default `data.shards`."""
    output: str | None = None
    """Folder or URL (`s3://BUCKET/PREFIX`) for what relabelling writes; by default `runs/NAME/relabel`."""
    format: Literal["shards", "parquet", "folder"] = "shards"
    """`shards`: with everything that was in them. `parquet`: captions only, a file for each shard, keyed like it.
    `folder`: `SHARD/KEY.jpg` with the caption in `SHARD/KEY.txt`, for trainers that want that."""
    folder_caption: str = "mix"
    """Of `folder`: which caption `KEY.txt` holds; all of them are in `KEY.recap.json`."""
    batch_size: int = Field(16, ge=1)
    """Images that are encoded together."""
    num_slots: int = Field(64, ge=1)
    """Captions that are decoded together, where the captioner can fill the place of one that has ended."""
    mix: dict[str, float] = {"short": 1.0, "long": 1.0}
    """Weights of the draw that `KEY.mix.txt` holds, for other trainers; ours draws anew in every epoch."""
    seed: int = 0
    checks: Checks = Checks()
    images: Images = Images()
    decode_timeout: float = Field(60, gt=0)
    """Seconds after which an image that is still being decoded is quarantined."""
    engine: Literal["local", "ray"] = "local"
    """`local`: this machine's devices, or torchrun's or Slurm's ranks. `ray`: a Ray cluster."""
    workers: int | None = Field(None, ge=1)
    """Processes; by default one for each GPU, else one."""

    @field_validator("output")
    @classmethod
    def _one_form(cls, output: str | None) -> str | None:
        """Of a folder's name: with a slash at its end, storages would take it for another."""
        return output if output is None else output.removeprefix("file://").rstrip("/") or "/"

    def own(self) -> dict[str, object]:
        """What the captions depend on: all but where the work is done, and where it goes."""
        return self.model_dump(exclude={"shards", "output", "decode_timeout", "engine", "workers"})
