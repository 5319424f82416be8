"""What measures images one by one: the feature networks, CLIP score, the judges. Each is opened by every worker."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval.clip_score import ClipScorer
from eval.config import NETWORKS, Evaluate
from eval.features import open_network
from eval.judge import JUDGES, Judge, judge_images, metrics_of, open_named
from eval.prompts import Prompt
from recap.pretrained import load_pretrained

Values = dict[str, np.ndarray]
"""Column → (N, …), a row an image."""


@dataclass(frozen=True)
class Gauge:
    """Something that looks at images."""

    name: str
    """Model and version."""
    measure: Callable[[list[Any], list[Prompt]], Values]
    """Of prepared images and, where it needs them, what they were drawn from."""
    prepare: Callable[[Image.Image], Any] = lambda image: image
    """What threads do with an image beforehand."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else a report must say of it, JSON-like."""
    remarks: Callable[[], list[str]] = list
    """What is to be said of all that it looked at, such as how many prompts asked nothing of it; a line each."""


def gauges(config: Evaluate, with_prompts: bool) -> list[str]:
    """The names of those that the table asks for, as `open_gauge` takes them."""
    networks = [name for name in NETWORKS if getattr(config, name) is not None]
    return [*networks, *(["clip_score"] if with_prompts else []),
            *(name for name in JUDGES if with_prompts and getattr(config, name) is not None)]


def open_gauge(name: str, config: Evaluate, device: str) -> Gauge:
    """Open one of `gauges`. `UserError` where its model is not there."""
    if name in NETWORKS:
        return _network(name, config, device)
    if name == "clip_score":
        return _clip_score(config, device)
    return _judge(open_named(name, config, device))


def _network(name: str, config: Evaluate, device: str) -> Gauge:
    network = open_network(getattr(config, name), f"evaluate.{name}", device)

    def measure(images: list[Any], prompts: list[Prompt]) -> Values:
        return {"features": network(torch.stack(images)).astype(np.float32)}

    return Gauge(network.name, measure, network.prepare, {"dim": network.dim, "resize": network.resize})


def _clip_score(config: Evaluate, device: str) -> Gauge:
    scorer = load_pretrained(lambda folder: ClipScorer(folder, device), config.clip_score, "evaluate.clip_score")

    def measure(images: list[Any], prompts: list[Prompt]) -> Values:
        texts = [prompt.text for prompt in prompts]
        scores, _ = scorer.score_embedded(scorer.embed_pixels(torch.stack(images)), texts)
        return {"clip_score": scores, "is_cut": np.array([scorer.is_cut(text) for text in texts])}

    return Gauge(scorer.name, measure, lambda image: scorer.preprocess([image])[0],
                 {"context_length": scorer.context_length})


def _judge(judge: Judge) -> Gauge:
    metrics = metrics_of(judge)

    def measure(images: list[Any], prompts: list[Prompt]) -> Values:
        rows = judge_images(judge, images, prompts)
        return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in metrics}  # None is NaN

    about = {name: {"about": each.about, "lower_is_better": each.lower_is_better, "is_share": each.is_share}
             for name, each in metrics.items()}
    return Gauge(judge.name, measure, about={"metrics": about}, remarks=getattr(judge, "remarks", list))


def to_text(gauge: Gauge) -> str:
    """Name and `about`, as they are kept beside what it measured."""
    return json.dumps({"name": gauge.name, **gauge.about})
