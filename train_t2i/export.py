"""What a training leaves: a diffusers folder with its card, LoRA weights, a single file, a repository of the hub."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict

from recap.checkpoint import publish, with_prefix
from recap.errors import UserError
from recap.storage import NETWORKS
from train_t2i.card import card
from train_t2i.config import Train
from train_t2i.ema import trainable
from train_t2i.model import choose_trained, with_zero_terminal_snr
from train_t2i.sample import load_pipeline
from train_t2i.single_file import write_single_file

PIPELINE, LORA = "pipeline", "lora"
PARTS = ("unet", "text_encoder", "text_encoder_2")
"""What may be trained of a pipeline, by its name there."""


def averaged_pipeline(config: Train, averages: dict[str, torch.Tensor], device: str = "cpu") -> Any:
    """The pipeline that training began with, float32, with the averaged weights in it.

    What is frozen is read anew: the training may hold it in less precision.

    Args:
        config: names the base.
        averages: parameter of `model.Diffusion` → weights, of all that is trained.
        device: a torch device.
    """
    pipe = load_pipeline(config, "train", "cpu")
    choose_trained(pipe, config)
    for part in PARTS:
        if (module := getattr(pipe, part, None)) is not None:
            module.eval()  # new adapters begin with their dropout on
    if config.zero_terminal_snr:
        pipe.scheduler = with_zero_terminal_snr(pipe.scheduler)
    with torch.no_grad():
        for part in PARTS:
            for name, parameter in trainable(getattr(pipe, part, None) or torch.nn.Module()):
                parameter.copy_(averages[f"{part}.{name}"])
    return pipe.to(device)


def write(folder: Path, pipe: Any, config: Train, about: dict[str, Any]) -> None:
    """Write `folder/pipeline`, and with `config.lora` first `folder/lora`, for `pipe.load_lora_weights`.

    Args:
        folder: of the stage, or of a snapshot.
        pipe: as `averaged_pipeline` makes it; LoRA is merged into its weights.
        config: what was asked for.
        about: for the card, see there.
    """
    if config.lora:
        _publish(folder / LORA, lambda temporary: _save_lora(temporary, pipe, config, about))
        pipe.fuse_lora(components=[part for part in PARTS if getattr(pipe, part, None) is not None])
        pipe.unload_lora_weights()
    _publish(folder / PIPELINE, lambda temporary: _save(temporary, pipe, config, about))
    if config.single_file:
        write_single_file(pipe, folder / f"{PIPELINE}.safetensors")


def push(folder: Path, config: Train) -> None:
    """Upload the result to the hub.

    Raises:
        UserError: the hub does not take it, or is not there.
    """
    from huggingface_hub import HfApi
    name = config.push_to_hub
    assert name is not None  # noqa: S101
    try:
        api = HfApi()
        repo = api.create_repo(name, exist_ok=True).repo_id  # with the user's name, where none was given
        api.upload_folder(repo_id=repo, folder_path=folder / (LORA if config.lora else PIPELINE))
        if config.single_file:
            api.upload_file(repo_id=repo, path_or_fileobj=folder / f"{PIPELINE}.safetensors",
                            path_in_repo=f"{repo.rpartition('/')[2]}.safetensors")
    except Exception as error:
        is_of_network = type(error).__module__.partition(".")[0] in NETWORKS
        if not is_of_network and not isinstance(error, OSError | ValueError | RuntimeError):
            raise
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"train.push_to_hub: {name} does not take the result ({problem}): it is in {folder}; log in "
                        "with `hf auth login`, and run the same command again") from error


def _save(folder: Path, pipe: Any, config: Train, about: dict[str, Any]) -> None:
    pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").write_text(card(config, about), encoding="utf-8")


def _save_lora(folder: Path, pipe: Any, config: Train, about: dict[str, Any]) -> None:
    layers: dict[str, Any] = {}
    for name in PARTS:
        part: Any = getattr(pipe, name, None)
        if hasattr(part, "peft_config"):
            layers[f"{name}_lora_layers"] = _lora_layers(part, name)
            # Without it, who loads the file takes alpha to be the rank; with the training's dropout, draws with that.
            layers[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict() | {"lora_dropout": 0.0}
    pipe.save_lora_weights(folder, **layers, safe_serialization=True)
    (folder / "README.md").write_text(card(config, about), encoding="utf-8")


def _lora_layers(part: Any, name: str) -> dict[str, torch.Tensor]:
    """By PEFT's names, with a text encoder's layers in `text_model`, where all of them once were.

    diffusers' own names cover the attention alone, and it reads no file in which names of both kinds are mixed.
    """
    layers: dict[str, torch.Tensor] = get_peft_model_state_dict(part)
    return layers if name == "unet" or hasattr(part, "text_model") else with_prefix("text_model", layers)


def _publish(folder: Path, fill: Any) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    publish(temporary, folder)
