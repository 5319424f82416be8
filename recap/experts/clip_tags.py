"""CLIP as a tagger (Radford et al. 2021, arXiv 2103.00020, section 3.1): which of a list of tags fit an image best."""

from typing import Any

import numpy as np
import torch

from eval.clip_score import ClipScorer
from recap.config.stitch import ClipTags, Stitch
from recap.errors import UserError
from recap.experts import View
from recap.experts.checkpoint import provenance
from recap.experts.settings import read_tags
from recap.facts import Facts, Tag
from recap.rundir import digest

WHERE = "stitch.clip_tags"


class ClipTagsExpert:
    """The few tags of a list that fit an image best, by an open_clip model in float32.

    A score is a tag's share of the softmax over the list, of cosines times the scale that the model learned. It tells
    how much better the tag fits than the rest, not how likely the thing is there: what is in the image shares 1
    between them, so ten things that fit alike have 0.1 each, and words of one meaning take from each other. It depends
    on the list. In ours a tag that fits no better than any other has 0.0014; hence the low threshold.
    """

    def __init__(self, config: Stitch, device: str) -> None:
        ref = config.clip_tags
        self.tags = read_tags(ref)
        self.threshold, self.max_tags = ref.threshold, ref.max_tags
        self.provenance: dict[str, Any] = provenance(ref, WHERE) | {"num_tags": len(self.tags),
                                                                    "list": digest(self.tags)}
        self.scorer = _open(ref, device)
        self.vectors = self.scorer.embed_texts(_texts(self.tags, ref.template, self.scorer))

    def preprocess(self, views: list[View]) -> torch.Tensor:
        """Pixels as the model reads them, (B, 3, H, W)."""
        return self.scorer.preprocess([view.image for view in views])

    def look(self, batch: torch.Tensor) -> list[Facts]:
        """Compare one batch to all tags. At most `max_tags` for each image, from the threshold on, the surest first."""
        shares = _softmax(self.scorer.logit_scale * self.scorer.embed_pixels(batch) @ self.vectors.T)
        return [self._facts(row) for row in shares]

    def _facts(self, shares: np.ndarray) -> Facts:
        best = np.argsort(-shares, kind="stable")[:self.max_tags]
        return Facts(tags=[Tag(self.tags[place], round(float(shares[place]), 4)) for place in best
                           if shares[place] >= self.threshold])


def _open(ref: ClipTags, device: str) -> ClipScorer:
    try:
        return ClipScorer(ref.model, device, ref.revision)
    except ValueError as error:
        raise UserError(f"{WHERE}.model: {error}: check the id or the folder") from error


def _texts(tags: list[str], template: str, scorer: ClipScorer) -> list[str]:
    """What is compared to images, a text for each tag."""
    texts = [template.replace("{}", tag) for tag in tags]
    for tag, text in zip(tags, texts, strict=True):
        if (length := scorer.num_tokens(text)) > scorer.context_length:
            raise UserError(f"{WHERE}: the tag {tag[:60]!r} makes {length} tokens, and the model reads "
                            f"{scorer.context_length}: shorten it, or the template")
    return texts


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return shares
