"""What CLIP answers about pictures: which colour a thing has, and whether a text or its opposite fits better."""

import numpy as np
from PIL import Image

from eval.clip_score import ClipScorer
from eval.judges.geneval import TEMPLATES
from eval.judges.positions import opposite
from eval.judges.vocabulary import COLOURS
from recap.caption_text import SENTENCE_END


class ClipAnswers:
    """Answers by a CLIP model."""

    def __init__(self, scorer: ClipScorer) -> None:
        self.scorer = scorer
        self._colours: dict[str, np.ndarray] = {}

    @property
    def name(self) -> str:
        """Model and version, for the report."""
        return self.scorer.name.split(",")[0]

    def colours(self, crops: list[Image.Image], names: list[str]) -> list[str]:
        """The likeliest of GenEval's colours for each thing, by its picture and what it is."""
        if not crops:
            return []
        vectors = self.scorer.embed_images(crops)
        return [COLOURS[int((self._vectors(name) @ vector).argmax())]
                for name, vector in zip(names, vectors, strict=True)]

    def _vectors(self, name: str) -> np.ndarray:
        """A vector of length 1 for each colour of a class, (10, D): the mean of what its templates give."""
        if name not in self._colours:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            mean = self.scorer.embed_texts(texts).reshape(len(COLOURS), len(TEMPLATES), -1).mean(axis=1)
            self._colours[name] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return self._colours[name]

    def preferences(self, images: list[Image.Image], texts: list[str]) -> list[float | None]:
        """How much CLIP gives each text, of 1, against the same with its positions swapped; None where it has none."""
        pairs = {index: pair for index, text in enumerate(texts) if (pair := self._pair(text))}
        if not pairs:
            return [None] * len(images)
        vectors = self.scorer.embed_texts([text for pair in pairs.values() for text in pair]).reshape(len(pairs), 2, -1)
        pictures = self.scorer.embed_images([images[index] for index in pairs])
        gains = self.scorer.logit_scale * (pictures * (vectors[:, 0] - vectors[:, 1])).sum(axis=1)
        given = dict(zip(pairs, (1 / (1 + np.exp(-gains))).tolist(), strict=True))
        return [given.get(index) for index in range(len(images))]

    def _pair(self, text: str) -> tuple[str, str] | None:
        """A text and its opposite; of one that is longer than CLIP reads, those of its first sentence that has one."""
        for part in [text] if self._fits(text) else SENTENCE_END.split(text):
            swapped = opposite(part)
            if swapped and self._fits(part) and self._fits(swapped):
                return part.strip(), swapped.strip()
        return None

    def _fits(self, text: str) -> bool:
        return self.scorer.num_tokens(text) <= self.scorer.context_length
