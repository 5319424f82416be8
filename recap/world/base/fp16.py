"""Writing weights in half precision, for libraries that open them in single precision again."""

import json
from pathlib import Path
from typing import Any


def save_fp16(model: Any, folder: Path) -> None:
    """Write a transformers model's folder: fp16 on disk, and float32 where it is opened, as a CPU needs it."""
    model.half().save_pretrained(folder)
    say_float32(folder / "config.json")


def say_float32(config: Path) -> None:
    """Put `float32` in place of `float16` wherever a transformers configuration names the dtype to open weights in."""
    content = json.loads(config.read_text())
    for part in [content, *(value for value in content.values() if isinstance(value, dict))]:
        if "dtype" in part:
            part["dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2) + "\n")
