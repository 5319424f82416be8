"""Recognize Anything, an image tagger (Zhang et al. 2023, arXiv 2306.03514), through the package `ram`."""

import torch

from recap.config.stitch import Stitch
from recap.experts.recognize_anything import RecognizeAnything
from recap.facts import Facts


class RamExpert(RecognizeAnything):
    """Tags out of 4585, each above a threshold of its own that the package brings, the surest first."""

    def __init__(self, config: Stitch, device: str) -> None:
        super().__init__("ram", config.ram, device, unread=("tag_encoder.", "text_decoder."), vit=config.ram.vit)

    @torch.no_grad()
    def look(self, batch: torch.Tensor) -> list[Facts]:
        """Tag one batch."""
        english, _ = self.model.generate_tag(batch.to(self.device))
        return [Facts(tags=tags) for tags in self.tags(english)]
