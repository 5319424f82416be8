"""`[stitch]`: which experts look at the images, and who writes captions from what they see."""

import json
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from recap.config import Model, Table


class Detr(Model):
    model: str = "facebook/detr-resnet-50"
    threshold: float = Field(0.7, ge=0, le=1)
    """Detections below this score are not facts."""


class Owlvit(Model):
    model: str = "google/owlvit-base-patch32"
    threshold: float = Field(0.1, ge=0, le=1)
    """Detections below this score are not facts."""
    queries: list[str] = Field([], max_length=64)
    """What to look for in every image: `["a dog", "a traffic light"]`."""
    tags_from: str | None = None
    """Another expert, whose tags and objects are looked for in each image, beside the queries."""

    @model_validator(mode="after")
    def _looks_for_what_others_see(self) -> "Owlvit":
        if self.tags_from == "owlvit":
            raise ValueError("tags_from is owlvit itself: name another expert")
        return self


class Blip2(Model):
    model: str = "Salesforce/blip2-opt-2.7b"
    prompt: str = ""
    """What the sentence goes on from; empty for a plain caption."""
    max_new_tokens: int = Field(48, ge=1)
    num_beams: int = Field(5, ge=1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


FlorenceTask = Literal["<OD>", "<DENSE_REGION_CAPTION>", "<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>",
                       "<OCR>", "<OCR_WITH_REGION>"]


class Florence2(Model):
    model: str = "florence-community/Florence-2-large"
    """A checkpoint in transformers' own format: those by Microsoft bring code, which is never run."""
    tasks: list[FlorenceTask] = Field(["<OD>", "<MORE_DETAILED_CAPTION>", "<OCR_WITH_REGION>"], min_length=1)
    """`<OCR>` gives all writing as one, without the spaces between its lines; `<OCR_WITH_REGION>` line by line."""
    max_new_tokens: int = Field(1024, ge=1)
    num_beams: int = Field(3, ge=1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class ClipTags(Model):
    model: str = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    """An open_clip model: `hf-hub:ID`, or a folder with `open_clip_config.json` and safetensors weights."""
    tags: str | None = None
    """A text file with a tag on each line, instead of our list of everyday things."""
    template: str = "a photo of {}"
    """The text that a tag is compared to images by; `{}` stands for the tag."""
    threshold: float = Field(0.02, ge=0, le=1)
    """Tags below this share of the softmax over the list are not facts."""
    max_tags: int = Field(10, ge=1)

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, template: str) -> str:
        if "{}" not in template:
            raise ValueError("write {} where the tag stands")
        return template


class Ram(Table):
    """Recognize Anything (Zhang et al. 2023, arXiv 2306.03514), through the package `ram`."""

    checkpoint: str = ""
    """`ram_swin_large_14m.pth`, where it lies."""
    vit: Literal["swin_b", "swin_l"] = "swin_l"
    image_size: Literal[224, 384] = 384


class Tag2text(Table):
    """Tag2Text (Huang et al. 2023, arXiv 2303.05657), through the package `ram`."""

    checkpoint: str = ""
    """`tag2text_swin_14m.pth`, where it lies."""
    image_size: Literal[224, 384] = 384


class Llm(Model):
    """The chat model that writes the captions, where `stitch.writer` is `llm`."""

    model: str = "Qwen/Qwen2.5-7B-Instruct"
    """The name that the server knows it by; without a server, a hub id or a folder."""
    server: str | None = None
    """An OpenAI-compatible server: `https://api.openai.com/v1`, `http://localhost:8000/v1` (vLLM, Ollama, `transformers
    serve`, …). Its key is read from OPENAI_API_KEY. Without one the model is opened here."""
    prompt: str | None = None
    """A text file of instructions, instead of ours (`recap/llm/prompt.txt`), which it may begin from."""
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(1024, ge=1)
    """Of an answer, which holds the captions of all styles."""
    options: dict[str, Any] = {}
    """More that is sent to the server: `{ response_format = { type = "json_object" } }`, `{ seed = 0 }`."""
    concurrency: int = Field(32, ge=1)
    """Images whose captions are asked for at a time."""
    requests_per_minute: float | None = Field(None, gt=0)
    timeout: float = Field(120, gt=0)
    """Seconds that an answer may take."""
    max_retries: int = Field(8, ge=0)
    """Of a request that was refused, or lost."""
    prompt_price: float = Field(0, ge=0)
    """Of a million tokens sent."""
    completion_price: float = Field(0, ge=0)
    """Of a million tokens answered."""
    budget: float | None = Field(None, ge=0)
    """What all captions of the run may cost, earlier tries included; then it stops, and can go on with a larger one."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of a model that is opened here."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """The same, on CUDA, by bitsandbytes."""
    batch_size: int = Field(8, ge=1)
    """Images that a model opened here writes of at a time."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> "Llm":
        if taken := sorted({"model", "messages", "n", "stream"} & set(self.options)):
            raise ValueError(f"options.{taken[0]} is set by recap: leave it out")
        for name in ("max_tokens", "max_completion_tokens"):
            limit = self.options.get(name, 1)
            if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
                raise ValueError(f"options.{name} is {limit!r}: give a whole number of tokens")
        try:
            json.dumps(self.options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"options can't be sent to a server ({error}): give numbers, texts, lists and tables"
                             ) from None
        if self.budget is not None and not (self.prompt_price or self.completion_price):
            raise ValueError("budget needs prompt_price and completion_price, of a million tokens: set them, too")
        return self

    def own(self) -> dict[str, Any]:
        """What captions depend on; not how fast they are asked for, where, and at what price."""
        return self.model_dump(include={"model", "revision", "temperature", "max_tokens", "options", "dtype",
                                        "quantization"})


class Stitch(Table):
    shards: str | list[str] | None = None
    """Images to write captions for; by default `data.shards`."""
    num_images: int = Field(100, ge=1)
    """How many, from the first shard on. RECAP tuned its captioner on 100 images."""
    experts: list[str] = ["detr", "alt_text"]
    """Whose findings a caption is written from. What each has found is kept, so that another mix costs nothing."""
    writer: Literal["template", "llm"] = "template"
    """`template` puts facts into plain sentences; `llm` has a chat model write them, and checks what it writes."""
    batch_size: int = Field(8, ge=1)
    """Images that an expert looks at together."""
    detr: Detr = Detr()
    owlvit: Owlvit = Owlvit()
    blip2: Blip2 = Blip2()
    florence2: Florence2 = Florence2()
    clip_tags: ClipTags = ClipTags()
    ram: Ram = Ram()
    tag2text: Tag2text = Tag2text()
    llm: Llm = Llm()

    def tagger(self, expert: str) -> str | None:
        """The expert whose tags another looks for."""
        return self.owlvit.tags_from if expert == "owlvit" else None
