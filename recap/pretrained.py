"""Opening checkpoints: a hub id or a local folder, one clear line when it is not there, nothing in it ever executed."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from recap.config import Model
from recap.config.captioner import Captioner, Part
from recap.config.stitch import Llm
from recap.errors import UserError
from recap.progress import warn
from recap.rundir import folder_identity

T = TypeVar("T")
SCHEMES = ("local-dir:", "hf-hub:")  # as timm and open_clip write them
CONFIG_FILES = ["*.json", "*.txt", "*.jinja"]
SAFE_FILES = [*CONFIG_FILES, "*.safetensors"]
"""All that is fetched: configuration, vocabulary, weights. No pickle, no Python."""
NEEDLESS_FILES = ["*.fp16.*", "*.non_ema.*", "safety_checker/*"]


def load_pretrained(loader: Callable[..., T], ref: Model, where: str, weights: bool = True, **options: Any) -> T:
    """Call `loader(folder, …)`, a library's `from_pretrained`; `where` names the table for messages.

    Without `weights`, no more than the configuration is fetched from the hub.

    Raises:
        UserError: the folder is not there, the hub cannot be reached, or the checkpoint is not of the right kind.
    """
    folder = checkpoint_folder(ref, where, weights)
    try:
        return loader(str(folder), **options)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{_key(ref, where)}: cannot load {ref.model}: {_one_line(error)}") from error


def load_model(kind: Any, ref: Captioner | Part | Llm, device: str, where: str = "captioner", unread: str = "") -> Any:
    """A captioner's model, or a part of it, frozen, on its device.

    Args:
        kind: its class in transformers.
        ref: the checkpoint.
        device: on `meta` it is made from its configuration, without weights.
        where: for messages.
        unread: what weights begin with that may be missing, as nothing reads them.

    Raises:
        UserError: as `load_pretrained`; weights are missing, which transformers would leave random with a warning; or
            bitsandbytes cannot run here.
    """
    import torch
    if not hasattr(kind, "from_config"):
        _check_kind(kind, ref, where, device != "meta")
    if device == "meta":
        config = load_pretrained(_config_class(kind).from_pretrained, ref, where, weights=False,
                                 trust_remote_code=False)
        with torch.device("meta"):
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        return model.requires_grad_(False)
    options = _quantized(ref, device, where) if ref.quantization != "none" else {"dtype": getattr(torch, ref.dtype)}
    model, info = load_pretrained(kind.from_pretrained, ref, where, use_safetensors=True, output_loading_info=True,
                                  trust_remote_code=False, **options)  # unsaid, transformers would ask
    if missing := sorted(name for name in info["missing_keys"] if not unread or not name.startswith(unread)):
        raise UserError(f"{_key(ref, where)}: {ref.model} lacks {len(missing)} weights of a {type(model).__name__}, "
                        f"{missing[0]} first: it is another model, or damaged")
    model.requires_grad_(False)
    return model if ref.quantization != "none" else model.to(device)


def _check_kind(kind: Any, ref: Model, where: str, weights: bool) -> None:
    """Refuse a checkpoint of another class, which transformers would open as far as it fits."""
    found, _ = load_pretrained(kind.config_class.get_config_dict, ref, where, weights)
    if found.get("model_type") != kind.config_class.model_type:
        raise UserError(f"{_key(ref, where)}: {ref.model} holds a model of type {found.get('model_type')!r}, and "
                        f"{kind.config_class.model_type!r} is needed: name another, or the family that it is of")


def _config_class(kind: Any) -> Any:
    if hasattr(kind, "from_config"):  # one of transformers' Auto classes
        from transformers import AutoConfig
        return AutoConfig
    return kind.config_class


def _quantized(ref: Captioner | Llm, device: str, where: str) -> dict[str, Any]:
    import torch
    from transformers import BitsAndBytesConfig
    if not device.startswith("cuda"):
        raise UserError(f"{where}.quantization: {ref.quantization} runs on CUDA, not on {device}: leave it out")
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{where}.quantization needs bitsandbytes: pip install 'recap-t2i[quantization]'")
    dtype = getattr(torch, ref.dtype)
    bits = {"8bit": {"load_in_8bit": True}, "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                                     "bnb_4bit_compute_dtype": dtype}}[ref.quantization]
    return {"quantization_config": BitsAndBytesConfig(**bits), "device_map": {"": device}, "dtype": dtype}


def checkpoint_folder(ref: Model, where: str, weights: bool = True) -> Path:
    """The folder of a checkpoint: the local one that is named, else the hub's in the hub's own cache."""
    return find_local(ref, where) or _fetch(ref, where, weights)


def find_local(ref: Model, where: str) -> Path | None:
    """The local folder that a reference names; None for a hub id. `UserError` for a path with nothing there."""
    name = _without_scheme(ref.model)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    is_hub_id = not ref.model.startswith("local-dir:") and not name.startswith((".", "/", "~")) and name.count("/") <= 1
    if not is_hub_id:
        raise UserError(f"{_key(ref, where)}: no folder at {name}: check the path, or give a hub id")
    return None


def identity(ref: Model) -> Any:
    """What a fingerprint holds of a checkpoint: its files, or its id and revision."""
    path = Path(_without_scheme(ref.model)).expanduser()
    return folder_identity(path) if path.is_dir() else f"{ref.model}@{ref.revision}"


def _fetch(ref: Model, where: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    if ref.revision == "main":
        pin = f"write {ref.model}@COMMIT" if isinstance(ref, Part) else f"pin a commit in {where}.revision"
        warn(f"{_key(ref, where)} {ref.model} is read at revision main, which can change: {pin}")
    try:
        return Path(snapshot_download(_without_scheme(ref.model), revision=ref.revision,
                                      allow_patterns=SAFE_FILES if weights else CONFIG_FILES,
                                      ignore_patterns=NEEDLESS_FILES))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{_key(ref, where)}: no folder {ref.model}, and the hub does not give it at revision "
                        f"{ref.revision}: give a local folder, or check the id and the connection "
                        f"({_one_line(error)})") from error


def _key(ref: Model, where: str) -> str:
    """Where the experiment file names a checkpoint: its table's `model`, or a key of its own."""
    return where if isinstance(ref, Part) else f"{where}.model"


def _without_scheme(name: str) -> str:
    for scheme in SCHEMES:
        name = name.removeprefix(scheme)
    return name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
