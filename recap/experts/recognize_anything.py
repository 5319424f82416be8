"""The package `ram` of xinyu1205/recognize-anything: how its models are opened, and the scores of their tags."""

import io
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from recap.config.stitch import Ram, Tag2text
from recap.errors import UserError
from recap.experts import View
from recap.experts.settings import RAM_PACKAGE
from recap.facts import Tag
from recap.rundir import hash_file

SAFE, UNSAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
SEPARATOR = " | "
OLD_NAMES = ("vision_multi", "tagging_head")
"""What the package renames when it reads an older checkpoint."""


class RecognizeAnything:
    """A model of the package `ram`, in float32, and the scores of the tags that it names.

    The package says which classes are above their thresholds, but not by how much: its classification head is
    listened to. It opens the tokenizer `bert-base-uncased`, so the hub or its cache must have that. It is written for
    transformers before 4.50; facts are files, so one environment can look and another go on.

    Args:
        kind: the function of `ram.models` that opens the model.
        table: of the experiment file.
        device: of the model.
        unread: what weights begin with that may be missing, as nothing reads them.
        options: more for that function.

    Raises:
        UserError: the package can't be imported, or the checkpoint is not there, not safe to read, or another model's.
    """

    def __init__(self, kind: str, table: Ram | Tag2text, device: str, unread: tuple[str, ...] = (),
                 **options: Any) -> None:
        where = f"stitch.{kind}"
        path = _file(table.checkpoint, where)
        stored = _names(path, where)
        with _quietly():
            opener, transform = _import(kind, where)
            self.model: Any = _open(opener, path, where, image_size=table.image_size, **options)
        _check_whole(self.model, stored, unread, path, where)
        self.model.to(device).eval()
        self.model.fc.register_forward_hook(self._hear)
        self.device = device
        self.transform: Any = transform(image_size=table.image_size)
        self.logits = torch.empty(0)
        self.provenance: dict[str, Any] = {
            "checkpoint": path.name, "revision": f"sha256:{hash_file(path)}", "vit": options["vit"],
            "image_size": table.image_size, "ram": _version()}

    def preprocess(self, views: list[View]) -> torch.Tensor:
        """Pixels squeezed into a square, normalised: (B, 3, image_size, image_size)."""
        return torch.stack([self.transform(view.image) for view in views])

    def _hear(self, head: Any, inputs: Any, output: torch.Tensor) -> None:
        """Keep the logits: (B, classes) of Tag2Text's head, (B, classes, 1) of RAM's."""
        self.logits = output.detach().flatten(1)

    def tags(self, said: list[str]) -> list[list[Tag]]:
        """The tags that the model has just named, the surest first; `said` has those of an image as `a | b | c`.

        A score is the sigmoid of the class's logit. Tag2Text's list has some names twice, as a noun and as a verb:
        such a tag is given once, with the higher score.
        """
        return [self._scored(names.split(SEPARATOR), scores)
                for names, scores in zip(said, self.logits.double().sigmoid().tolist(), strict=True)]

    def _scored(self, names: list[str], scores: list[float]) -> list[Tag]:
        best: dict[str, float] = {}
        for name, score in zip(self.model.tag_list.tolist(), scores, strict=True):
            best[name] = max(score, best.get(name, 0.0))
        tags = [Tag(name, round(best[name], 4)) for name in dict.fromkeys(names) if name]  # no tag at all is ""
        return sorted(tags, key=lambda tag: -tag.score)


# --- opening -------------------------------------------------------------------------------------------------------


def _file(checkpoint: str, where: str) -> Path:
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise UserError(f"{where}.checkpoint: no file at {path}: check the path")
    return path


def _names(path: Path, where: str) -> set[str]:
    """What the weights in a checkpoint are called. A pickle that asks for more than tensors is not read any further."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name.replace(*OLD_NAMES) for name in found["model"]}
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError,
            pickle.UnpicklingError) as error:
        raise UserError(f"{where}.checkpoint: {path} is damaged, not a checkpoint of {where.split('.')[-1]}, or holds "
                        f"code, which is never run: download it again ({_one_line(error)})") from error


def _import(kind: str, where: str) -> tuple[Any, Any]:
    """The function that opens a model, and the one that makes its image transform."""
    try:
        import ram
        import ram.models
        return getattr(ram.models, kind), ram.get_transform
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where} needs the package ram of recognize-anything, and it cannot be imported "
                        f"({_one_line(error)}): pip install git+{RAM_PACKAGE} fairscale, in an environment with "
                        "'transformers<4.50', which it is written for") from error


def _open(opener: Any, path: Path, where: str, **options: Any) -> Any:
    try:
        with _weights_only():
            return opener(pretrained=str(path), **options)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{where}: the package ram cannot open {path}, or the tokenizer bert-base-uncased, with "
                        f"{options}: check both ({_one_line(error)})") from error


@contextmanager
def _weights_only() -> Iterator[None]:
    """No `torch.load` runs what a pickle asks for, whatever its caller and the environment say."""
    before = {name: os.environ.pop(name, None) for name in (SAFE, UNSAFE)}  # torch loads nothing where both are set
    os.environ[SAFE] = "1"
    try:
        yield
    finally:
        del os.environ[SAFE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _quietly() -> Iterator[None]:
    """The package prints each weight that it ties, and when imported turns off all warnings."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        yield


def _check_whole(model: Any, stored: set[str], unread: tuple[str, ...], path: Path, where: str) -> None:
    """Refuse a checkpoint that lacks weights, which the package would leave random without a word."""
    if missing := sorted(name for name, _ in model.named_parameters()
                         if name not in stored and not name.startswith(unread)):
        raise UserError(f"{where}.checkpoint: {path} lacks {len(missing)} weights of a {type(model).__name__}, "
                        f"{missing[0]} first: it is another model, or damaged")


def _version() -> str:
    try:
        return version("ram")
    except PackageNotFoundError:  # on the path, not installed
        return "unknown"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
