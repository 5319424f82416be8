"""The `[generate]`, `[evaluate]` and `[report]` tables."""

from pydantic import Field

from recap.config import Model, Table


class Generate(Table):
    prompts: str | list[str] = Field(default_factory=list)
    """What every arm draws: a file .txt (one a line), .tsv (column `Prompt`) or .jsonl (field `prompt`), or shards."""
    kind: str = "alt"
    """Where `prompts` are shards: the caption kind that serves as the prompt."""
    num_prompts: int | None = Field(None, ge=1)
    """Only the first so many; all by default."""
    batch_size: int = Field(8, ge=1)
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(7.5, ge=0)
    seed: int = 0
    """Image i is drawn from noise of (seed, i): the same for every arm, whatever the batch."""


class Features(Model):
    model: str = "clean-fid"
    """The FID network: `clean-fid` (its Inception-v3) or a timm model (`local-dir:FOLDER`, `hf-hub:ID`)."""


class ClipScore(Model):
    model: str = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    """An open_clip model: `local-dir:FOLDER`, `hf-hub:ID`."""


class Evaluate(Table):
    reference: str | list[str] = Field(default_factory=list)
    """Real images for FID: a folder of images, or shards."""
    batch_size: int = Field(32, ge=1)
    features: Features = Features()
    clip_score: ClipScore = ClipScore()


class Report(Table):
    title: str | None = None
    note: str | None = None
    """What a reader must know before the figures, shown above them."""
    num_captions: int = Field(8, ge=0)
    """Images shown with their captions before and after."""
    num_prompts: int = Field(8, ge=0)
    """Prompts shown as drawn by every arm."""
