"""How good a validation's pictures are, as torchmetrics that the processes of a training sync.

KID (Bińkowski et al. 2018, arXiv 1801.01401) is unbiased, which FID is not of so few pictures. Yet it is noisy: read
its course over steps, whose pictures are of the same prompts and noise, and not its size.
"""

import warnings
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torchmetrics import Metric
from torchmetrics.image.kid import KernelInceptionDistance

from recap.config.captioner import Part
from recap.errors import BadSample, UserError
from recap.pretrained import load_pretrained
from recap.sample import IMAGE_EXTENSIONS, decode_image
from recap.timm_features import TimmFeatures
from train_t2i.config import Validation

BATCH = 32
"""Images that the networks look at at once."""


def share(num: int, accelerator: Accelerator) -> range:
    """Which of some things in a row are this process's: all processes' shares one after the other are the row again."""
    rank, count = accelerator.process_index, accelerator.num_processes
    return range(num * rank // count, num * (rank + 1) // count)


class Figures:
    """`kid` and `clip_score`, each where the table asks for it."""

    def __init__(self, config: Validation, num_pictures: int, accelerator: Accelerator) -> None:
        """Open all that will be needed, so that nothing turns out to be missing after hours.

        Raises:
            UserError: a model or the real images are not there, or there are too few images or pictures.
        """
        self.clip, self.accelerator = config.clip_score, accelerator
        self.kid = Kid(config, num_pictures, accelerator) if config.reference is not None else None
        if self.clip is not None:
            ClipScore(self.clip, torch.device("cpu"))

    def of(self, pictures: list[Image.Image], prompts: list[str]) -> dict[str, float]:
        """Figures of all pictures, of which these are this process's share. All processes must call it.

        Draws from torch's global generator, which must be in the same state for the same KID.
        """
        found: dict[str, float] = {}
        if self.kid is not None:
            found["kid"] = self.kid(pictures)
        if self.clip is not None:
            score = ClipScore(self.clip, self.accelerator.device)
            score.update(pictures, prompts)
            found["clip_score"] = float(score.compute())
        return found


# --- CLIP score ------------------------------------------------------------------------------------------------------


class ClipScore(Metric):
    """Mean of 100·max(cos, 0) between pictures and their prompts; long prompts sentence by sentence."""

    full_state_update = False
    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, model: str, device: torch.device) -> None:
        """Open an open_clip model, `local-dir:FOLDER`, `hf-hub:ID` or `hf-hub:ID@REVISION`."""
        super().__init__()
        from eval.clip_score import ClipScorer
        self.scorer = load_pretrained(lambda folder: ClipScorer(folder, str(device)), Part.of(model),
                                      "train.validation.clip_score")
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.to(device)

    def update(self, pictures: list[Image.Image], prompts: list[str]) -> None:
        """Take in pictures, RGB, each with its prompt; a process may have none."""
        for start in range(0, len(pictures), BATCH):
            scores, _ = self.scorer.score(pictures[start:start + BATCH], prompts[start:start + BATCH])
            self.total += scores.sum()
            self.count += len(scores)

    def compute(self) -> torch.Tensor:
        return self.total / self.count


# --- KID -------------------------------------------------------------------------------------------------------------


class Kid:
    """KID between pictures and real images, whose features each process computes once, of its share.

    It is the mean over 100 subsets that are as large as the smaller of the two sets: with fewer pictures than images,
    all pictures are in every one of them.
    """

    def __init__(self, config: Validation, num_pictures: int, accelerator: Accelerator) -> None:
        """Open the network and find the images.

        Raises:
            UserError: one of them is not there, or there are fewer than two images or pictures.
        """
        assert config.reference is not None and config.features is not None  # noqa: S101
        self.device = accelerator.device
        self.network = load_pretrained(lambda folder: TimmFeatures(Path(folder)), Part.of(config.features),
                                       "train.validation.features")
        files = image_files(Path(config.reference).expanduser(), config.num_references)
        if num_pictures < 2:
            raise UserError("train.validation.reference: KID needs two pictures at least: give more prompts, or "
                            "leave it out")
        self.files = [files[place] for place in share(len(files), accelerator)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it keeps features, as is meant
            self.metric = KernelInceptionDistance(nn.Identity(), subset_size=min(num_pictures, len(files)),
                                                  reset_real_features=False)
        self.is_begun = False

    def __call__(self, pictures: list[Image.Image]) -> float:
        """KID of all processes' pictures; all must call it."""
        self.network.to(self.device)
        if not self.is_begun:
            self.metric.update(self._features(map(read_image, self.files)), real=True)
            self.is_begun = True
        # Lists of tensors are synced one by one, so every process has one of each, be it empty.
        self.metric.update(self._features(pictures), real=False)
        self.network.cpu()
        mean, _ = self.metric.compute()
        self.metric.reset()
        return float(mean)

    @torch.no_grad()
    def _features(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """(N, D) float64."""
        stream = iter(images)
        found = [torch.zeros(0, self.network.dim, dtype=torch.float64, device=self.device)]
        while batch := [self.network.resize(image) for image in islice(stream, BATCH)]:
            found.append(self.network(torch.stack(batch).to(self.device)).double())
        return torch.cat(found)


def image_files(folder: Path, most: int) -> list[Path]:
    """The images in a folder and those below it, sorted by name; of more than `most`, so many, evenly spread."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower()[1:] in IMAGE_EXTENSIONS
                   and not path.name.startswith("."))
    if len(found) < 2:
        raise UserError(f"train.validation.reference: {len(found)} images ({', '.join(IMAGE_EXTENSIONS)}) in {folder}, "
                        "and KID needs two at least: check the path")
    num = min(most, len(found))
    return [found[place * len(found) // num] for place in range(num)]


def read_image(path: Path) -> Image.Image:
    try:
        return decode_image(path.read_bytes())
    except (OSError, BadSample) as error:
        raise UserError(f"train.validation.reference: {path} is not a whole image ({error}): delete or replace it, and "
                        "run again") from None
