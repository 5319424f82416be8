"""What the experts that open a checkpoint of transformers have in common."""

from typing import Any, Literal

from transformers.utils import logging

from recap.config import Model
from recap.config.captioner import Captioner
from recap.pretrained import find_local, load_model
from recap.rundir import hash_files


def open_model(kind: Any, ref: Model, device: str, where: str,
               dtype: Literal["float32", "bfloat16"] = "float32") -> Any:
    """A model of one class of transformers, opened as captioners are: refused where it is of another, or not whole.

    Args:
        kind: the class.
        ref: the checkpoint.
        device: of the model.
        where: the table that names it, for messages.
        dtype: of its weights.

    Raises:
        UserError: as `load_model`.
    """
    logging.disable_progress_bar()
    return load_model(kind, Captioner(model=ref.model, revision=ref.revision, dtype=dtype), device, where).eval()


def provenance(ref: Model, where: str) -> dict[str, Any]:
    """A table as it stands, and of a local folder what its files hash to in place of a revision.

    Raises:
        UserError: the folder is not there.
    """
    local = find_local(ref, where)
    return ref.model_dump() | ({"revision": f"sha256:{hash_files(local)}"} if local else {})
