"""CLIPScore and RefCLIPScore as Hessel et al. 2021 (arXiv 2104.08718) define them, for captions.

`eval.clip_score` scores pictures, on another scale: 100·max(cos, 0) without a prefix. Published CLIPScores are of CLIP
ViT-B/32; another model gives other figures, so name it beside them.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

PREFIX = "A photo depicts "
"""What goes before every caption and reference."""
WEIGHT = 2.5


class Embedder(Protocol):
    """What CLIPScore needs of texts; `eval.clip_score.ClipScorer` is one."""

    context_length: int

    def num_tokens(self, text: str) -> int:
        """Tokens of a text with its begin and end marks, uncut."""

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """Embed texts: (N, D), rows of length 1."""


def clipscore_hessel(image_embeddings: np.ndarray, caption_embeddings: np.ndarray) -> np.ndarray:
    """CLIPScore (Hessel et al. 2021, arXiv 2104.08718, section 3): 2.5·max(cos, 0).

    Args:
        image_embeddings: (N, D), rows of length 1.
        caption_embeddings: (N, D), rows of length 1, of captions behind `PREFIX`.

    Returns:
        (N,) float64 in [0, 2.5].
    """
    _check_unit("images", image_embeddings)
    _check_unit("captions", caption_embeddings)
    if image_embeddings.shape != caption_embeddings.shape:
        raise ValueError(f"embeddings of images and captions differ in shape: {image_embeddings.shape} and "
                         f"{caption_embeddings.shape}")
    cosines = (image_embeddings.astype(np.float64) * caption_embeddings).sum(axis=1)
    return WEIGHT * np.maximum(cosines, 0)


def ref_clipscore(scores: np.ndarray, caption_embeddings: np.ndarray,
                  reference_embeddings: Sequence[np.ndarray]) -> np.ndarray:
    """RefCLIPScore (Hessel et al. 2021, section 3): harmonic mean of CLIPScore and the best cosine to a reference.

    Args:
        scores: (N,) of `clipscore_hessel`.
        caption_embeddings: (N, D), rows of length 1.
        reference_embeddings: N of (R, D), rows of length 1, R ≥ 1 of each image, behind `PREFIX` as well.

    Returns:
        (N,) float64 in [0, 1.43]; 0 where either is 0.
    """
    if not len(scores) == len(caption_embeddings) == len(reference_embeddings):
        raise ValueError(f"{len(scores)} scores, {len(caption_embeddings)} captions and references of "
                         f"{len(reference_embeddings)} images do not belong together")
    for place, of_image in enumerate(reference_embeddings):
        _check_unit(f"the references of image {place}", of_image)
    nearest = np.array([max(0.0, float((of_image @ caption).max()))
                        for of_image, caption in zip(reference_embeddings, caption_embeddings, strict=True)])
    total = scores + nearest
    return np.where(total > 0, 2 * scores * nearest / np.where(total > 0, total, 1), 0)


def clipscores(embedder: Embedder, image_embeddings: np.ndarray, captions: Sequence[str],
               references: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray, int]:
    """CLIPScore and RefCLIPScore of captions, by a model that the caller brings.

    Args:
        embedder: the model's text side.
        image_embeddings: (N, D), rows of length 1, of the same model.
        captions: N of them.
        references: of each image, one or more.

    Returns:
        CLIPScores, (N,); RefCLIPScores, (N,); and how many captions go beyond the model's 77 tokens, and so count by
        their beginning: these are scores of short captions.
    """
    if not len(image_embeddings) == len(captions) == len(references) or not all(references):
        raise ValueError(f"{len(image_embeddings)} images, {len(captions)} captions and references of "
                         f"{len(references)} images, one or more each, are needed in equal number")
    texts = [PREFIX + caption for caption in captions]
    num_cut = sum(embedder.num_tokens(text) > embedder.context_length for text in texts)
    said = embedder.embed_texts(texts)
    flat = embedder.embed_texts([PREFIX + text for each in references for text in each])
    of_people = np.split(flat, np.cumsum([len(each) for each in references])[:-1])
    scores = clipscore_hessel(image_embeddings, said)
    return scores, ref_clipscore(scores, said, of_people), num_cut


def _check_unit(what: str, vectors: np.ndarray) -> None:
    if vectors.ndim != 2 or not len(vectors) or not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
        raise ValueError(f"embeddings of {what} must be a table of vectors of length 1, not {vectors.shape} of others")
