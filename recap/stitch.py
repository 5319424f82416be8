"""Experts' facts → captions in every style, for the first images of some shards. To resume, run the same command again.

What is written are shards again: the members of the input, `KEY.STYLE.txt` for every style, and `KEY.facts.json`, which
says what the captions were made of.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from recap import progress
from recap.config import Data, Stitch, Style
from recap.errors import BadSample, UserError
from recap.experts import Expert, Facts, merge, open_experts
from recap.llm import TemplateWriter
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shard_work import Stats, batches, once, stats_of, total
from recap.shards import Reject, ShardWriter, shard_name

SCHEMA = 1


@dataclass(frozen=True)
class Stitcher:
    """All that turns an image into its caption members."""

    experts: dict[str, Expert]
    writer: TemplateWriter
    styles: list[str]


def run(stage: StageDir, shards: list[str], config: Stitch, styles: dict[str, Style], data: Data,
        device: str) -> dict[str, Any]:
    """Write captions for the first `num_images` usable images; each shard, then its quarantine, then its stats.

    Returns:
        `images_in`, `images_out`, `quarantined` (reason → number), and `nothing_seen`: images of which no expert knew
        anything, whose captions are empty talk.

    Raises:
        UserError: no image could be used.
    """
    stitcher = functools.cache(lambda: Stitcher(open_experts(config, device), TemplateWriter(), list(styles)))
    found: list[Stats] = []
    wanted = config.num_images

    def work(shard: str) -> Stats:
        return stitch_shard(shard, stage.path, stitcher(), config.batch_size, wanted, data, bar)

    with progress.bar("stitch", config.num_images) as bar:
        for shard in shards:
            stats, new = once(stage, shard, work)
            found.append(stats)
            if not new:
                bar.update(stats["successes"])
            wanted -= stats["successes"]
            if not wanted:
                break
    result = total(found, "nothing_seen")
    _judge(result, config, shards)
    return result


def _judge(result: Stats, config: Stitch, shards: list[str]) -> None:
    """Say what the numbers mean for the captioner that will learn from these captions."""
    done = result["images_out"]
    if not done:
        raise UserError(f"stitch: no image of {', '.join(shards[:3])} could be used ({result['quarantined']}): "
                        "check stitch.shards")
    if done < config.num_images:
        progress.warn(f"only {done} images, as the shards hold no more: stitch.num_images asks for {config.num_images}")
    if result["nothing_seen"] > done / 2:
        progress.warn(f"the experts saw nothing in {result['nothing_seen']} of {done} images, so their captions say "
                      "nothing: lower stitch.detr.threshold, or add experts")


def stitch_shard(shard: str, out: Path, stitcher: Stitcher, batch_size: int, wanted: int, data: Data,
                 bar: Any) -> Stats:
    """Write captions for the first `wanted` usable images of a shard; its stats."""
    rejects: list[Reject] = []
    done = nothing_seen = 0
    num_words: Counter[str] = Counter()
    with ShardWriter(str(out / f"{shard_name(shard)}.tar")) as writer:
        for batch in batches(shard, batch_size, data, rejects, wanted):
            for sample, facts in stitch_batch(batch, stitcher):
                writer.write(sample)
                num_words.update({style: len(sample.members[f"{style}.txt"].split()) for style in stitcher.styles})
                nothing_seen += not facts.seen
            done += len(batch)
            bar.update(len(batch))
    mean_words = {style: round(num_words[style] / done, 2) if done else 0.0 for style in stitcher.styles}
    return stats_of(shard, out, done, rejects, nothing_seen=nothing_seen, mean_words=mean_words)


def stitch_batch(batch: list[tuple[Sample, Image.Image]], stitcher: Stitcher) -> Iterator[tuple[Sample, Facts]]:
    """Samples with their decoded images → the samples with their captions, and the facts behind them."""
    images = [image for _, image in batch]
    alt_texts = [_alt_text(sample) for sample, _ in batch]
    found = {name: expert.look(images, alt_texts) for name, expert in stitcher.experts.items()}
    for place, (sample, image) in enumerate(batch):
        by_expert = {name: facts[place] for name, facts in found.items()}
        facts = merge(by_expert.values())
        captions = stitcher.writer.write(facts, image.size, stitcher.styles)
        members = {f"{style}.txt": caption.encode() for style, caption in captions.items()}
        record = json.dumps(_record(by_expert, stitcher, image), ensure_ascii=False).encode()
        yield Sample(sample.shard, sample.key, sample.members | members | {"facts.json": record}), facts


def _alt_text(sample: Sample) -> str:
    """What the shard says. Alt-text that can't be read comes so far only where it is optional, and counts as none."""
    try:
        return sample.caption("alt") or ""
    except BadSample:
        return ""


def _record(by_expert: dict[str, Facts], stitcher: Stitcher, image: Image.Image) -> dict[str, Any]:
    """`KEY.facts.json`: who said what, and with what it was made. Boxes are in pixels of the upright image."""
    return {
        "schema": SCHEMA, "width": image.width, "height": image.height,
        "experts": {name: {**stitcher.experts[name].provenance, "facts": asdict(facts)}
                    for name, facts in by_expert.items()},
        "writer": stitcher.writer.provenance,
    }
