"""The `[compare]`, `[generate]`, `[evaluate]` and `[report]` tables."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from recap.config import Model, Name, Table

NETWORKS = ("features", "dinov2", "cmmd")
"""Tables of `[evaluate]` that name a feature network."""
NO_CLIP = "none"
"""In place of a model's name: a judge does without CLIP."""


class Compare(Table):
    """Captioners to compare: each is this experiment with some values of its own."""

    captioners: dict[Name, dict[str, Any]] = Field(min_length=1)
    """Name → tables that differ (`captioner.family = "blip"`, `finetune.lr = 1e-4`). `captioner.tuned = "none"` is the
    base as it is; a folder is a captioner that was tuned before. All others learn from the same images, and all are
    scored on the same others, `finetune.test_share` of them."""
    baseline: Name | None = None
    """The one that the others are compared with; by default the first."""
    num_images: int = Field(1000, ge=2)
    """At most so many images are captioned and scored."""
    batch_size: int = Field(32, ge=1)
    """Images captioned at once."""
    metrics: list[Literal["meteor", "spice", "clipscore"]] = []
    """Beside those of words: METEOR and SPICE, which need Java and pycocoevalcap (and SPICE CoreNLP); CLIPScore and
    RefCLIPScore, by the model of `evaluate.clip_score`."""
    num_samples: int = Field(12, ge=0)
    """Images on the page."""

    @model_validator(mode="after")
    def _baseline_is_there(self) -> "Compare":
        if self.baseline is not None and self.baseline not in self.captioners:
            raise ValueError(f"compare.baseline: no captioner {self.baseline!r} there: take one of "
                             f"{', '.join(self.captioners)}")
        return self


class Ablate(Table):
    """Captions stitched from fewer experts, and what captioners learn from them."""

    references: str | list[str]
    """Shards of other images with captions of people, which all captioners are scored on."""
    kinds: dict[Name, str] = {}
    """Style → the caption kind of its references in those shards (`short = "human"`), where it isn't of that name."""
    num_images: int = Field(500, ge=2)
    """At most so many of them are captioned and scored."""
    batch_size: int = Field(32, ge=1)
    """Images captioned at once."""
    num_samples: int = Field(12, ge=0)
    """Images on the page."""


class GenerateSweep(Table):
    """Curves: values drawn and measured beside the usual one, one at a time, for all arms of the first seed."""

    guidance_scale: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = []
    num_inference_steps: list[Annotated[int, Field(ge=1)]] = []
    train_steps: list[Annotated[int, Field(ge=1)]] = []
    """Steps of the training after which it kept a snapshot (`train.snapshot_every`)."""
    num_prompts: int | None = Field(None, ge=1)
    """Of every prompt set, for these points; by default as many as `generate.num_prompts`."""

    @field_validator("guidance_scale", "num_inference_steps", "train_steps")
    @classmethod
    def _each_once(cls, values: list[float]) -> list[float]:
        if twice := [each for place, each in enumerate(values) if each in values[:place]]:
            raise ValueError(f"{twice[0]} is named twice: name it once")
        return values


class Generate(Table):
    prompts: str | list[str] = Field(default_factory=list)
    """What every arm draws: files, or shards. Braces and globs may be used. Each file is a prompt set, named by its
    stem: figures are given for each.

    `.txt`: one a line. `.tsv`, `.csv`: a column `Prompt`, `Caption` or `Text`, in any case; columns `Category` and
    `Challenge` travel with it. `.jsonl`: a field `prompt`; all others travel with it. `.json`: annotations as COCO's,
    of which the first caption of every image is taken, in the order of the images."""
    kind: str | list[str] = "alt"
    """Where `prompts` are shards: the caption kinds that serve as prompts, each a prompt set of its name."""
    num_prompts: int | None = Field(None, ge=1)
    """Only so many of every prompt set, the first ones or a draw; all by default."""
    prompts_seed: int | None = None
    """Draw the `num_prompts` of a set by this seed, keeping their order, in place of the first ones. What is called
    COCO-30k is such a draw of 30,000 from captions_val2014.json; papers' own are lists, which a `.txt` may hold."""
    num_images_per_prompt: int = Field(1, ge=1)
    batch_size: int = Field(8, ge=1)
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(7.5, ge=0, allow_inf_nan=False)
    """For the arms that have none of their own (`arm.NAME.guidance_scale`)."""
    seed: int = 0
    """Picture k of prompt i of a set is drawn from noise of (seed + k, i): the same for every arm, whatever the
    batch."""
    shard_size: int = Field(256, ge=1)
    """Pictures in a shard, which is what a process does at a time, and what a kill may cost."""
    keep: bool = True
    """Keep the pictures once they are measured; false keeps thumbnails of up to 512 prompts."""
    engine: Literal["local", "ray"] = "local"
    """`local`: this machine's devices, or torchrun's or Slurm's ranks. `ray`: a Ray cluster."""
    workers: int | None = Field(None, ge=1)
    """Processes; by default one for each GPU, else one."""
    sweep: GenerateSweep | None = None
    """Curves over guidance, sampler steps or training steps; by default none."""

    @model_validator(mode="after")
    def _a_draw_has_a_size(self) -> "Generate":
        if self.prompts_seed is not None and self.num_prompts is None:
            raise ValueError("generate.prompts_seed draws generate.num_prompts of every set: say how many")
        return self

    def own(self) -> dict[str, Any]:
        """What the pictures depend on, and how they lie in shards: all but where the work is done, and what of it is
        kept.
        """
        return self.model_dump(exclude={"keep", "engine", "workers", "sweep"})


class Features(Model):
    model: str = "clean-fid"
    """`clean-fid`: its Inception-v3, or `clean-fid:FILE`, the same from a file of your own. `hf-hub:ID`,
    `local-dir:FOLDER` or a folder: a timm model, or an open_clip model's image encoder. `torchvision:NAME`: with
    `weights`. With `target`, the folder that a network of your own is opened from."""
    size: int | None = Field(None, ge=1)
    """Side of a timm ViT's input in pixels, where that is not its own."""
    weights: str | None = None
    """Of `torchvision:NAME`: a file with its state dict, .pth or safetensors."""
    target: str | None = None
    """`package.module:Class`, importable, with `open(folder, device)`, which gives a `eval.features.FeatureNetwork`.
    It is imported, and so its code is run: name only code that you trust."""


class Dino(Features):
    model: str = "hf-hub:timm/vit_large_patch14_dinov2.lvd142m"
    size: int | None = Field(224, ge=1)
    """224, as FD-DINOv2 is published; the model itself is made for 518."""


class Cmmd(Features):
    model: str = "hf-hub:timm/vit_large_patch14_clip_336.openai"


class ClipScore(Model):
    model: str = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    """An open_clip model: `local-dir:FOLDER`, `hf-hub:ID`."""


class JudgeRef(Table):
    """A judge of one's own. Its class is imported, and so its code is run: name only code that you trust."""

    target: str
    """`package.module:Class`, importable (installed, or on PYTHONPATH), with the interface of `eval.judge.Judge`."""
    model: str
    """The folder that `Class.open(folder, device)` is given."""


class Detector(Model):
    """A transformers object detector, which says what a picture shows of the objects that its prompt names."""

    model: str = "facebook/detr-resnet-50"
    threshold: float = Field(0.3, ge=0, le=1)
    """Detections of this score and below do not count. This and the next three are GenEval's values."""
    counting_threshold: float = Field(0.9, ge=0, le=1)
    """The same where a prompt asks for a number."""
    max_objects: int = Field(16, ge=1)
    """Of one class in one picture; more are not counted."""
    position_margin: float = Field(0.1, ge=0)
    """How far the middles of two boxes must lie apart to be left, right, above or below, as a share of their sizes."""
    clip: ClipScore = ClipScore()
    """Tells colours, and a prompt from the same with its positions swapped; `clip.model = "none"` leaves both out.

    GenEval takes OpenAI's ViT-L/14, and TISE OpenAI's ViT-B/32."""
    clip_preference: float = Field(0.6, ge=0.5, le=1)
    """What CLIP must give the true one of two texts, of 1, for a position to count as right; TISE's value."""


class Vqa(Model):
    """A transformers model that answers questions about pictures: BLIP-2, InstructBLIP, or one with a chat template."""

    model: str = "Salesforce/instructblip-flan-t5-xl"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """On CUDA, by bitsandbytes."""
    template: str = 'Does this figure show "{text}"? Please answer yes or no.'
    """What VQAScore asks; `{text}` stands for the prompt of the picture."""
    yes: str | None = Field(None, pattern=r"\S")
    """The answer whose probability is VQAScore; by default `yes` of InstructBLIP, as in VQAScore's own code, and `Yes`
    of all others."""
    no: str | None = Field(None, pattern=r"\S")
    """What stands against `yes` in questions of DSG; by default `no` or `No`."""
    questions: str | None = None
    """Questions about what prompts say: a .json file as TIFA's, or a .csv or .tsv file as DSG's; by default none."""
    question_template: str = "Question: {question} Choices: {choices}. Answer:"
    """How one of them is asked; `{choices}`, which may be left out, stands for the answers to choose from."""
    batch_size: int = Field(16, ge=1)
    """Questions that BLIP-2 or InstructBLIP reads at once; a model with a chat template reads them one by one."""

    @field_validator("template")
    @classmethod
    def _asks_about_the_prompt(cls, template: str) -> str:
        if "{text}" not in template:
            raise ValueError("write {text} where the prompt stands")
        return template

    @field_validator("question_template")
    @classmethod
    def _asks_the_question(cls, template: str) -> str:
        if "{question}" not in template:
            raise ValueError("write {question} where the question stands")
        return template


class Evaluate(Table):
    reference: str | list[str] = Field(default_factory=list)
    """Real images: a folder of images, or shards; or what `recap reference` wrote."""
    batch_size: int = Field(32, ge=1)
    features: Features = Features()
    """The network of FID, KID, precision, recall, density and coverage."""
    dinov2: Dino | None = None
    """The network of FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675); by default none."""
    cmmd: Cmmd | None = None
    """The network of CMMD; by default none."""
    clip_score: ClipScore = ClipScore()
    judge: JudgeRef | None = None
    """Who else looks at every picture; by default nobody."""
    detector: Detector | None = None
    """Objects, counts, colours and places that prompts name, looked for in the pictures; by default not."""
    vqa: Vqa | None = None
    """Questions about the pictures, answered; by default none."""
    sets: list[str] | None = Field(None, min_length=1)
    """The prompt sets of the headline figures (distances, CLIP score, judges' metrics, comparisons); by default all.

    The others are drawn and scored as well, and shown set by set."""
    engine: Literal["local", "ray"] = "local"
    """`local`: this machine's devices, or torchrun's or Slurm's ranks. `ray`: a Ray cluster."""
    workers: int | None = Field(None, ge=1)
    """Processes; by default one for each GPU, else one."""

    def own(self) -> dict[str, Any]:
        """What the figures depend on: all but where the work is done."""
        return self.model_dump(exclude={"reference", "batch_size", "engine", "workers"})


class Report(Table):
    title: str | None = None
    note: str | None = None
    """What a reader must know before the figures, shown above them."""
    num_captions: int = Field(8, ge=0)
    """Images shown with their captions before and after."""
    num_prompts: int = Field(8, ge=0)
    """Prompts of each kind shown as drawn by every arm: where the headline's arm gains most, where it loses most, and a
    draw."""
    references: list[str] = []
    """Caption kinds of the shards in `evaluate.reference`, compared with the captions that were written."""
    compare_sets: list[tuple[str, str]] = []
    """Pairs of prompt sets that are forms of the same prompts, in the same order, such as whole and cut: what an arm
    draws from the one is compared with what it draws from the other."""
    beside: str | None = None
    """A result's JSON, as `report.json`, shown beside this run's own; see `eval/beside.py`."""
