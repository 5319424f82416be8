"""The model card of what was trained: what it is, from what, how to draw with it."""

import json
import re
from typing import Any

from recap import __version__
from recap.data_card import escape
from recap.pretrained import find_local
from train_t2i.config import Train

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def card(config: Train, about: dict[str, Any]) -> str:
    """Markdown with the hub's front matter.

    Args:
        config: of the training.
        about: `captions` (kind → weight), `steps`, `images` seen, `seed`.
    """
    kind = "LoRA" if config.lora else "fine-tuned"
    captions = ", ".join(f"{escape(name)} ({weight:g})" for name, weight in about["captions"].items())
    parts = " and ".join(name for name, trained in (("UNet", config.train_unet),
                                                    ("text encoder", config.train_text_encoder)) if trained)
    how = f"LoRA of rank {config.lora.rank}" if config.lora else "all weights"
    rows = {
        "base": escape(_base(config)), "trained": f"{parts}, {how}",
        "captions, by weight": captions, "caption dropout": f"{config.caption_dropout:g}",
        "images seen": f"{about['images']:,} ({about['steps']:,} steps of {config.batch_size})",
        "resolution": f"{config.resolution}{', aspect-ratio buckets' if config.buckets else ''}",
        "learning rate": f"{config.lr:g}, {config.lr_scheduler}, {config.warmup_steps} steps of warm-up",
        "weights": f"averaged over steps (EMA, decay {config.ema_decay:g})", "precision": config.precision,
        "seed": str(about["seed"]), "made with": f"recap {__version__}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""{_front_matter(config)}
# {escape(_base(config))}, {kind} on {captions} captions

| | |
|---|---|
{table}

```python
from diffusers import DiffusionPipeline
{_use(config)}
image = pipe("a prompt").images[0]
```

Long prompts were trained in windows of 75 tokens, up to {config.max_windows} of them. To draw them so:

```python
from train_t2i.sample import prompt_embeds

image = pipe(**prompt_embeds(pipe, ["a prompt of any length"])).images[0]
```
"""


def _front_matter(config: Train) -> str:
    """YAML, of which JSON is a part."""
    tags = ["text-to-image", "stable-diffusion", "diffusers", "recap", *(["lora"] if config.lora else [])]
    fields = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    if HUB_ID.fullmatch(_base(config)) and find_local(config, "train") is None:  # the hub refuses any other
        fields = {"base_model": _base(config), **fields}
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---", ""])


def _use(config: Train) -> str:
    """Python that opens the pipeline."""
    if config.lora is None:
        return '\npipe = DiffusionPipeline.from_pretrained("FOLDER_OR_ID")'
    base = ascii(_base(config)) + (f", revision={config.revision!a}" if config.revision != "main" else "")
    lines = [f"\npipe = DiffusionPipeline.from_pretrained({base})", 'pipe.load_lora_weights("FOLDER_OR_ID")']
    if config.zero_terminal_snr:
        lines += ['zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}',
                  "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **zero_snr)"]
        lines[0] = "from diffusers import DDIMScheduler\n" + lines[0]
    return "\n".join(lines)


def _base(config: Train) -> str:
    """Hub id or folder, as diffusers takes it."""
    return config.model.removeprefix("hf-hub:").removeprefix("local-dir:")
