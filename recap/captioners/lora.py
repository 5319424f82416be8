"""LoRA (Hu et al. 2021, arXiv 2106.09685) by peft, on the parts of a model that are asked for."""

import json
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_LAYERS
from safetensors import SafetensorError, safe_open
from torch import nn

from recap.config.finetune import Lora
from recap.errors import UserError


def add_lora(model: Any, config: Lora, parts: dict[str, str], kind: str, name: str) -> PeftModel:
    """Wrap a frozen model in a new adapter.

    Args:
        model: of transformers.
        config: rank and layers.
        parts: field of `config` → where that part of the model is (`language_model` → `model.language_model`).
        kind: the language model's `model_type`, whose usual layers are taken where none are named.
        name: hub id or folder of the base, for the adapter's own record.

    Raises:
        UserError: a part has no such layer, or the model no such part.
    """
    layers = {field: getattr(config, field) for field in ("language_model", "qformer", "vision_model")}
    if layers["language_model"] is None:
        layers["language_model"] = list(USUAL_LAYERS.get(kind, ["q_proj", "v_proj"]))
    patterns = [_pattern(model, field, names, parts) for field, names in layers.items() if names]
    if not patterns:
        raise UserError("finetune.lora names no layer: name those of a part, e.g. language_model = ['q_proj']")
    adapter = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout,
                         target_modules="|".join(patterns))
    wrapped = get_peft_model(model, adapter)
    wrapped.peft_config["default"].base_model_name_or_path = name  # not the hub cache's folder, another one everywhere
    return wrapped


def _pattern(model: nn.Module, field: str, names: list[str], parts: dict[str, str]) -> str:
    """The regular expression of the layers named in one part."""
    if field not in parts:
        raise UserError(f"finetune.lora.{field}: this captioner has no such part: leave it out")
    linear = {path.rpartition(".")[2] for path, module in model.named_modules()
              if path.startswith(f"{parts[field]}.") and isinstance(module, nn.Linear)}
    if unknown := [name for name in names if name not in linear]:
        raise UserError(f"finetune.lora.{field}: no linear layer {unknown[0]!r} there: its layers are "
                        f"{', '.join(sorted(linear))}")
    return rf"{re.escape(parts[field])}\.(?:.*\.)?({'|'.join(map(re.escape, names))})"


def load_lora(model: Any, folder: Path) -> PeftModel:
    """Put a saved adapter on its base.

    Raises:
        UserError: there is none in the folder, it is of another base, or it is damaged.
    """
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"captioner.tuned: no peft adapter in {folder}: it needs adapter_config.json and "
                        "adapter_model.safetensors, as `recap finetune` writes them")
    try:
        kind = json.loads((folder / "adapter_config.json").read_bytes())["peft_type"]
        if kind != "LORA":  # some kinds fetch what they name
            raise ValueError(f"it is of kind {kind!r}, not LORA")
        wrapped = PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            found = set(file.keys())
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise _misfit(folder, " ".join(str(error).split())[:200]) from None
    wanted = set(get_peft_model_state_dict(wrapped))
    if found != wanted:  # peft loads what fits, and leaves the rest of the adapter as it was born: without effect
        raise _misfit(folder, f"{len(found - wanted)} of its weights are unknown here, {len(wanted - found)} are "
                              "missing")
    return wrapped


def untrained(parts: list[nn.Module]) -> list[nn.Module]:
    """Those of a model's parts in which nothing is trained."""
    return [part for part in parts if not any(p.requires_grad for p in part.parameters())]


def _misfit(folder: Path, reason: str) -> UserError:
    return UserError(f"captioner.tuned: the adapter in {folder} is of another base than this one, or damaged: {reason}")
