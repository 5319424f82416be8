"""The `[compare]`, `[generate]`, `[evaluate]` and `[report]` tables."""

from typing import Any, Literal

from pydantic import Field, model_validator

from recap.config import Model, Name, Table


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


class Generate(Table):
    prompts: str | list[str] = Field(default_factory=list)
    """What every arm draws: files .txt (one a line), .tsv (column `Prompt`) or .jsonl (field `prompt`), or shards.

    Braces and globs may be used. Each file is a prompt set, named by its stem: figures are given for each."""
    kind: str | list[str] = "alt"
    """Where `prompts` are shards: the caption kinds that serve as prompts, each a prompt set of its name."""
    num_prompts: int | None = Field(None, ge=1)
    """Only the first so many of every prompt set; all by default."""
    batch_size: int = Field(8, ge=1)
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(7.5, ge=0)
    """For the arms that have none of their own (`arm.NAME.guidance_scale`)."""
    seed: int = 0
    """Picture i of a prompt set is drawn from noise of (seed, i): the same for every arm, whatever the batch."""


class Features(Model):
    model: str = "clean-fid"
    """The FID network: `clean-fid` (its Inception-v3) or a timm model (`local-dir:FOLDER`, `hf-hub:ID`)."""


class ClipScore(Model):
    model: str = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    """An open_clip model: `local-dir:FOLDER`, `hf-hub:ID`."""


class JudgeRef(Table):
    """A judge of one's own. Its class is imported, and so its code is run: name only code that you trust."""

    target: str
    """`package.module:Class`, importable (installed, or on PYTHONPATH), with the interface of `eval.judge.Judge`."""
    model: str
    """The folder that `Class.open(folder, device)` is given."""


class Evaluate(Table):
    reference: str | list[str] = Field(default_factory=list)
    """Real images for FID: a folder of images, or shards."""
    batch_size: int = Field(32, ge=1)
    features: Features = Features()
    clip_score: ClipScore = ClipScore()
    judge: JudgeRef | None = None
    """Who else looks at every picture; by default nobody."""
    sets: list[str] | None = Field(None, min_length=1)
    """The prompt sets of the headline figures (FID, CLIP score, the judge's metrics, comparisons); by default all.

    The others are drawn and scored as well, and shown set by set."""


class Report(Table):
    title: str | None = None
    note: str | None = None
    """What a reader must know before the figures, shown above them."""
    num_captions: int = Field(8, ge=0)
    """Images shown with their captions before and after."""
    num_prompts: int = Field(8, ge=0)
    """Prompts shown as drawn by every arm."""
    references: list[str] = []
    """Caption kinds of the shards in `evaluate.reference`, compared with the captions that were written."""
    compare_sets: list[tuple[str, str]] = []
    """Pairs of prompt sets that are forms of the same prompts, in the same order, such as whole and cut: what an arm
    draws from the one is compared with what it draws from the other."""
    beside: str | None = None
    """A result's JSON, as `report.json`, shown beside this run's own; see `eval/beside.py`."""
