"""CLIP score: how well a picture fits a text, by an open_clip model, on torchmetrics' scale of 0 to 100.

CLIPScore has variants (2.5·max(cos, 0) with a prefix in Hessel et al. 2021, arXiv 2104.08718); ours is 100·max(cos, 0)
without a prefix, and its name says so. CLIP reads 77 tokens: a longer text is scored sentence by sentence, so that its
end counts as much as its beginning.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError

SCALE = "100·max(cos, 0)"
LOCAL, HUB = "local-dir:", "hf-hub:"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
TEXT_BATCH = 256
# Up to a full stop (with what closes a quotation) before white space, a full stop of Chinese or Japanese, a line's end.
_SENTENCE = re.compile(r""".+?(?:[.!?…]["'”’»)\]]*(?=\s)|[。！？]["'”’»」』)\]]*|\n|$)""", re.DOTALL)

# What tokenizers take for the begin and the end of a text; what stands after an end would not be read.
_MARK = re.compile(r"<\|?((?:start|end)_?of_?text)\|?>", re.IGNORECASE)
AS_TEXT = r"< \1 >"


class ClipScorer:
    """Scores pictures against texts.

    Args:
        model: `local-dir:FOLDER` or a folder with `open_clip_config.json` and safetensors weights; or `hf-hub:ID`.
        device: a torch device.
        revision: commit, tag or branch on the hub.

    Raises:
        ValueError: there is no such model, it has no safetensors weights, or they do not fit its configuration.
    """

    def __init__(self, model: str, device: str, revision: str = "main") -> None:
        import open_clip  # takes seconds, as it brings torchvision
        folder = _folder(model, revision)
        _check(folder)
        try:
            self._model, _, self._preprocess = open_clip.create_model_and_transforms(
                f"{LOCAL}{folder}", device=device, weights_only=True)
            self._tokenizer = open_clip.get_tokenizer(f"{LOCAL}{folder}")
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"cannot open {model} with open_clip: {_one_line(error)}") from error
        self._model.eval()
        self._device = device
        self.context_length = int(self._tokenizer.context_length)
        self.version = _version(folder)
        self.name = f"open_clip {self.version}, {SCALE}, no prefix, long texts by sentence"
        """Model, version and scale, for the report."""

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by before a softmax over texts, as the model learned it."""
        return float(self._model.logit_scale.detach().exp())

    @torch.no_grad()
    def score(self, images: list[Image.Image], texts: list[str]) -> tuple[np.ndarray, int]:
        """Score each image against its text.

        Args:
            images: RGB.
            texts: as many; one that fills more than CLIP's context is scored sentence by sentence, and averaged.

        Returns:
            Scores, (N,) float64 in [0, 100]; and how many texts lost tokens all the same, because one sentence of
            theirs is longer than the context.
        """
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images for {len(texts)} texts")
        if not images:
            return np.zeros(0), 0
        return self.score_embedded(self.embed_images(images), texts)

    def score_embedded(self, image_vectors: np.ndarray, texts: list[str]) -> tuple[np.ndarray, int]:
        """The same of images that are embedded already: (N, D), a row for each text."""
        parts = [self._parts(text) for text in texts]
        truncated = sum(map(self.is_cut, texts))
        owner = np.repeat(np.arange(len(parts)), [len(each) for each in parts])
        text_vectors = self.embed_texts([part for each in parts for part in each])
        cosines = (image_vectors[owner] * text_vectors).sum(axis=1)
        totals = np.bincount(owner, weights=100 * np.maximum(cosines, 0), minlength=len(parts))
        return totals / np.bincount(owner, minlength=len(parts)), truncated

    def _parts(self, text: str) -> list[str]:
        if self._fits(text):
            return [text]
        return [part for found in _SENTENCE.findall(text) if (part := found.strip())] or [text]

    def _fits(self, text: str) -> bool:
        return self.num_tokens(text) <= self.context_length

    def num_tokens(self, text: str) -> int:
        """Tokens of a text with its begin and end marks, uncut."""
        text = _MARK.sub(AS_TEXT, text)
        from open_clip import SimpleTokenizer
        tokenizer: Any = self._tokenizer
        if isinstance(tokenizer, SimpleTokenizer):
            return len(tokenizer.encode(text)) + 2
        return len(tokenizer.tokenizer(tokenizer.clean_fn(text), truncation=False, verbose=False).input_ids)

    def embed_images(self, images: list[Image.Image]) -> np.ndarray:
        """Embed images, RGB, in one batch: (N, D) float64, rows of length 1."""
        return self.embed_pixels(self.preprocess(images))

    def preprocess(self, images: list[Image.Image]) -> torch.Tensor:
        """Images, RGB, as the model reads them: (N, 3, H, W)."""
        return torch.stack([self._preprocess(image) for image in images])

    def embed_pixels(self, pixels: torch.Tensor) -> np.ndarray:
        """Embed preprocessed images in one batch: (N, D) float64, rows of length 1."""
        return _unit(self.encode_pixels(pixels))

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """The same on the model's device, in its own type, and of whatever length."""
        found: torch.Tensor = self._model.encode_image(pixels.to(self._device))
        return found

    @property
    def visual(self) -> Any:
        """The image encoder, with `image_size`, `image_mean` and `image_std`."""
        return self._model.visual

    def is_cut(self, text: str) -> bool:
        """Whether a text loses tokens even by sentence, because one of them is longer than the context."""
        return any(not self._fits(part) for part in self._parts(text))

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """Embed texts, one vector each; what is over the context is cut. (N, D) float64, rows of length 1."""
        texts = [_MARK.sub(AS_TEXT, text) for text in texts]
        batches = [texts[i:i + TEXT_BATCH] for i in range(0, len(texts), TEXT_BATCH)]
        return np.concatenate([_unit(self._model.encode_text(self._tokenizer(batch).to(self._device)))
                               for batch in batches])


def _unit(vectors: torch.Tensor) -> np.ndarray:
    """Vectors of length 1, float64 on the CPU."""
    return torch.nn.functional.normalize(vectors.double(), dim=-1).cpu().numpy()


def _folder(model: str, revision: str) -> Path:
    """The folder of a model; from the hub, only configuration, vocabulary and safetensors are ever fetched."""
    path = Path(model.removeprefix(LOCAL)).expanduser()
    if not model.startswith(HUB):
        if path.is_dir():
            return path
        if model.startswith(LOCAL):
            raise ValueError(f"no folder at {path}")
    try:
        return Path(snapshot_download(model.removeprefix(HUB), revision=revision,
                                      allow_patterns=["open_clip_*.json", "open_clip_*.safetensors", "token*",
                                                      "vocab*", "merges.txt", "special_tokens_map.json"]))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot fetch {model} from the hub: {_one_line(error)}") from error


def _version(folder: Path) -> str:
    """Hub id and commit, or name and hash of the weights in a folder."""
    if folder.parent.name == "snapshots":  # in the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return f"{folder.parents[1].name.removeprefix('models--').replace('--', '/')}@{folder.name[:12]}"
    weights = next(folder / name for name in WEIGHTS if (folder / name).is_file())
    with open(weights, "rb") as file:
        return f"{folder.resolve().name}@{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


def _check(folder: Path) -> None:
    """Refuse what would run code on loading: pickled weights, a tokenizer that brings its own Python."""
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ValueError(f"no {WEIGHTS[0]} in {folder} (pickled weights are not opened)")
    try:
        config = json.loads((folder / "open_clip_config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"no readable open_clip_config.json in {folder}: {_one_line(error)}") from error
    if "trust_remote_code" in json.dumps(config):
        raise ValueError(f"{folder / 'open_clip_config.json'} asks for trust_remote_code, which is never given")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
