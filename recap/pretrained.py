"""Opening checkpoints: a hub id or a local folder, one clear line when it is not there, nothing in it ever executed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from recap.config import Model
from recap.errors import UserError
from recap.progress import warn
from recap.rundir import folder_identity

T = TypeVar("T")
SCHEMES = ("local-dir:", "hf-hub:")  # as timm and open_clip write them
SAFE_FILES = ["*.json", "*.txt", "*.safetensors"]
"""All that is fetched: configuration, vocabulary, weights. No pickle, no Python."""
NEEDLESS_FILES = ["*.fp16.*", "*.non_ema.*", "safety_checker/*"]


def load_pretrained(loader: Callable[..., T], ref: Model, where: str, **options: Any) -> T:
    """Call `loader(folder, …)`, a library's `from_pretrained`; `where` names the table for messages.

    Raises:
        UserError: the folder is not there, the hub cannot be reached, or the checkpoint is not of the right kind.
    """
    folder = checkpoint_folder(ref, where)
    try:
        return loader(str(folder), **options)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{where}.model: cannot load {ref.model}: {_one_line(error)}") from error


def checkpoint_folder(ref: Model, where: str) -> Path:
    """The folder of a checkpoint: the local one that is named, else the hub's in the hub's own cache."""
    return find_local(ref, where) or _fetch(ref, where)


def find_local(ref: Model, where: str) -> Path | None:
    """The local folder that a reference names; None for a hub id. `UserError` for a path with nothing there."""
    name = _without_scheme(ref.model)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    is_hub_id = not ref.model.startswith("local-dir:") and not name.startswith((".", "/", "~")) and name.count("/") <= 1
    if not is_hub_id:
        raise UserError(f"{where}.model: no folder at {name}: check the path, or give a hub id")
    return None


def identity(ref: Model) -> Any:
    """What a fingerprint holds of a checkpoint: its files, or its id and revision."""
    path = Path(_without_scheme(ref.model)).expanduser()
    return folder_identity(path) if path.is_dir() else f"{ref.model}@{ref.revision}"


def _fetch(ref: Model, where: str) -> Path:
    from huggingface_hub import snapshot_download
    if ref.revision == "main":
        warn(f"{where}.model {ref.model} is read at revision main, which can change: pin a commit in {where}.revision")
    try:
        return Path(snapshot_download(_without_scheme(ref.model), revision=ref.revision, allow_patterns=SAFE_FILES,
                                      ignore_patterns=NEEDLESS_FILES))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}.model: no folder {ref.model}, and the hub does not give it at revision "
                        f"{ref.revision}: give a local folder, or check the id and the connection "
                        f"({_one_line(error)})") from error


def _without_scheme(name: str) -> str:
    for scheme in SCHEMES:
        name = name.removeprefix(scheme)
    return name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
