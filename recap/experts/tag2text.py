"""Tag2Text, a tagger and captioner (Huang et al. 2023, arXiv 2303.05657), through the package `ram`."""

import torch

from recap.config.stitch import Stitch
from recap.experts.recognize_anything import RecognizeAnything
from recap.facts import Facts, Sentence

NOT_TAGS = [127, 2961, 3351, 3265, 3338, 3355, 3359]
"""Classes that the authors leave out, as they disturb the caption: "quarter", "back", and numbers."""
MAX_TOKENS = 50
"""Of a caption, its prompt included; the authors' demo."""


class Tag2textExpert(RecognizeAnything):
    """Tags out of 3429, above 0.68 or, for people, 0.7; and a sentence that is written from the tags and the image."""

    def __init__(self, config: Stitch, device: str) -> None:
        # The package has no other Swin for it.
        super().__init__("tag2text", config.tag2text, device, vit="swin_b", delete_tag_index=NOT_TAGS)

    @torch.no_grad()
    def look(self, batch: torch.Tensor) -> list[Facts]:
        """Tag and caption one batch."""
        captions, said = self.model.generate(batch.to(self.device), max_length=MAX_TOKENS, return_tag_predict=True)
        return [Facts(tags=tags, sentences=[Sentence(text, "tag2text")] if (text := caption.strip()) else [])
                for tags, caption in zip(self.tags(said), captions, strict=True)]
