"""Opening checkpoints: a hub id or a local folder, one clear line when it is not there, nothing in it ever executed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from recap.config import Model
from recap.errors import UserError
from recap.progress import warn
from recap.rundir import folder_identity

T = TypeVar("T")
SCHEMES = ("local-dir:", "hf-hub:")  # as timm and open_clip write them


def load_pretrained(loader: Callable[..., T], ref: Model, where: str, **options: Any) -> T:
    """Call `loader(ref.model, …)`, a library's `from_pretrained`; `where` names the table for messages.

    Raises:
        UserError: the folder is not there, the hub cannot be reached, or the checkpoint is not of the right kind.
    """
    local = find_local(ref, where)
    if not local and ref.revision == "main":
        warn(f"{where}.model {ref.model} is read at revision main, which can change: pin a commit in {where}.revision")
    revision = {} if local else {"revision": ref.revision}
    try:
        return loader(ref.model, **revision, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}.model: cannot load {ref.model}"
                        f"{'' if local else ' (no local folder of that name; the hub was asked)'}: {reason}") from error


def find_local(ref: Model, where: str) -> Path | None:
    """The local folder that a reference names; None for a hub id. `UserError` for a path with nothing there."""
    name = ref.model
    for scheme in SCHEMES:
        name = name.removeprefix(scheme)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    is_hub_id = not ref.model.startswith("local-dir:") and not name.startswith((".", "/", "~")) and name.count("/") <= 1
    if not is_hub_id:
        raise UserError(f"{where}.model: no folder at {name}: check the path, or give a hub id")
    return None


def identity(ref: Model) -> Any:
    """What a fingerprint holds of a checkpoint: its files, or its id and revision."""
    path = Path(ref.model.removeprefix("local-dir:")).expanduser()
    return folder_identity(path) if path.is_dir() else f"{ref.model}@{ref.revision}"
