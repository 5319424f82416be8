"""The pixel-reading expert: a small DETR that names the shapes, each by size, colour and kind, and the background."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor

from recap.config.stitch import Stitch
from recap.experts import View
from recap.experts.detr import DetrExpert
from recap.facts import Facts
from recap.rundir import StageDir
from recap.world.base.drawings import Drawings
from recap.world.base.fit import Schedule, fit
from recap.world.base.fp16 import save_fp16
from recap.world.facts import compare, read
from recap.world.scene import BACKGROUNDS, COLOURS, KINDS, PATTERNS, PLACES, SIZES, Background, Scene, box

SCHEDULE = Schedule(steps=8000, batch_size=32, lr=1e-3, warmup_steps=300, weight_decay=1e-4)
NUM_DRAWINGS = 30_000
LABELS = ([f"{size} {colour} {kind}" for size in SIZES for colour in COLOURS for kind in KINDS]
          + [Background(colour, pattern).name for colour in BACKGROUNDS for pattern in PATTERNS])
"""The background is a thing as large as the picture."""
BATCH = 100
NUM_QUERIES = 10
NOTHING = len(LABELS)
NOTHING_WEIGHT = 0.2
"""Of queries that have nothing to find, as they are many."""
BOX_WEIGHT = 5.0
ENLARGED = 2
"""The detector looks at pictures of twice the size, as its backbone reduces them eightfold."""


def build(size: int) -> DetrForObjectDetection:
    """A DETR with a small ResNet, for pictures of `size` pixels, enlarged."""
    backbone = {"model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2],
                "layer_type": "basic", "out_features": ["stage2"]}
    config = DetrConfig(
        backbone_config=backbone, d_model=64, num_queries=NUM_QUERIES, encoder_layers=2, decoder_layers=3,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, dropout=0.0,
        id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)})
    return DetrForObjectDetection(config)


def processor(size: int) -> DetrImageProcessor:
    """Enlarges pictures of `size` pixels, so that small shapes cover several cells of the backbone's map."""
    return DetrImageProcessor(size={"height": size * ENLARGED, "width": size * ENLARGED}, do_pad=False)


def train(stage: StageDir, seed: int, size: int, schedule: Schedule) -> dict[str, float]:
    """Write `stage.path/model`; returns coverage and precision of the facts that it states of held-out drawings."""
    torch.manual_seed(seed)
    model = build(size).requires_grad_(True)  # transformers freezes the backbone, as it is used to trained ones
    drawings = Drawings.draw(f"{seed}/detr", NUM_DRAWINGS, size)
    classes, boxes = (torch.stack(parts) for parts in zip(*(_wanted(s, size) for s in drawings.scenes), strict=True))
    inputs: Any = processor(size)

    def loss(step: int) -> torch.Tensor:
        chosen = drawings.choose(step, schedule.batch_size)
        pixels = inputs(images=list(drawings.pixels[chosen]), return_tensors="pt").pixel_values
        found = model(pixel_values=pixels)
        return set_loss(found.logits, found.pred_boxes, classes[chosen], boxes[chosen])

    fit(stage, "detr", model, loss, schedule)
    save(model, stage.path / "model", size)
    return figures(stage.path / "model", Drawings.draw(f"{seed}/detr/held out", 1000, size))


def figures(folder: Path, drawings: Drawings) -> dict[str, float]:
    """Coverage and precision of the facts that the expert states of drawings, at its usual threshold."""
    size = drawings.pixels.shape[-1]
    truths = [compare(read(said), scene.metadata(size))
              for said, scene in zip(expert_facts(folder, drawings.images()), drawings.scenes, strict=True)]
    covered, wrong = sum(truth.covered for truth in truths), sum(truth.wrong for truth in truths)
    return {"coverage": covered / sum(truth.total for truth in truths), "precision": covered / max(covered + wrong, 1)}


def expert_facts(folder: Path, images: list[Image.Image]) -> Iterator[str]:
    """What the expert in a folder states of every picture, at its usual threshold, in words."""
    expert = DetrExpert(Stitch.model_validate({"detr": {"model": str(folder)}}), "cpu")
    for start in range(0, len(images), BATCH):
        part = images[start:start + BATCH]
        for facts in expert.look(expert.preprocess([View(image) for image in part])):
            yield spoken(facts, part[0].width)


def spoken(facts: Facts, size: int) -> str:
    """What was detected, in words that `recap.world.facts` reads. A box is in the place nearest to its middle."""
    words = []
    for seen in facts.objects:
        x, y = ((seen.box[0] + seen.box[2]) / 2 / size, (seen.box[1] + seen.box[3]) / 2 / size)
        place = min(PLACES, key=lambda name: math.dist(PLACES[name], (x, y)))
        words.append(seen.label if "background" in seen.label else f"a {seen.label} at the {place}")
    return "; ".join(words)


def set_loss(logits: torch.Tensor, found: torch.Tensor, classes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """DETR's loss on classes and boxes (Carion et al. 2020, Eq. 2, without the generalised IoU), a scalar.

    Each query keeps one place, instead of being matched anew in every picture, in which DETR is slow: it took thousands
    of steps to tell left from right.

    Args:
        logits: (B, Q, LABELS + 1).
        found, boxes: (B, Q, 4), centre x, centre y, width, height, shares of the picture.
        classes: (B, Q) int64, NOTHING where there is nothing.
    """
    weight = torch.ones(logits.shape[-1])
    weight[NOTHING] = NOTHING_WEIGHT
    there = (classes != NOTHING).float()
    off = ((found - boxes).abs().sum(-1) * there).sum() / there.sum()
    return F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight) + BOX_WEIGHT * off


def _wanted(scene: Scene, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class (Q,) and box (Q, 4) for every query: one for each place, one for the background, and some for nothing."""
    names, corners = [""] * NUM_QUERIES, torch.zeros(NUM_QUERIES, 4)
    for shape in scene.shapes:
        query = list(PLACES).index(shape.place)
        names[query], corners[query] = shape.full_name, torch.tensor(box(shape, size)) / size
    names[len(PLACES)], corners[len(PLACES)] = scene.background.name, torch.tensor([0.0, 0.0, 1.0, 1.0])
    classes = torch.tensor([LABELS.index(name) if name else NOTHING for name in names])
    return classes, torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)


def save(model: DetrForObjectDetection, folder: Path, size: int) -> None:
    """A transformers folder with its image processor, fp16."""
    save_fp16(model, folder)
    processor(size).save_pretrained(folder)
