"""Experts' facts → captions in every style, for the first images of some shards. To resume, run the same command again.

What is written are shards again: the members of the input, `KEY.STYLE.txt` for every style, and `KEY.facts.json`, which
says what the captions were made of.
"""

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
from recap.shards import Reject, ShardWriter, read_shard, shard_name, write_json, write_rejects

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
    stitcher: Stitcher | None = None
    totals: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    with progress.bar("stitch", config.num_images) as bar:
        for shard in shards:
            wanted = config.num_images - totals["successes"]
            if wanted <= 0:
                break
            stats = _stats_of(stage.path, shard)
            if stats is None:
                stitcher = stitcher or Stitcher(open_experts(config, device), TemplateWriter(), list(styles))
                stats = stitch_shard(shard, stage.path, stitcher, config.batch_size, wanted, data, bar)
                stage.log(event="shard", shard=shard_name(shard), **stats)
            else:
                bar.update(stats["successes"])
            totals.update({name: stats[name] for name in ("count", "successes", "nothing_seen")})
            statuses.update(stats["status_dict"])
    del statuses["success"]
    _judge(totals, statuses, config, shards)
    return {"images_in": totals["count"], "images_out": totals["successes"], "quarantined": dict(statuses),
            "nothing_seen": totals["nothing_seen"]}


def _judge(totals: Counter[str], statuses: Counter[str], config: Stitch, shards: list[str]) -> None:
    """Say what the numbers mean for the captioner that will learn from these captions."""
    done = totals["successes"]
    if not done:
        raise UserError(f"stitch: no image of {', '.join(shards[:3])} could be used ({dict(statuses)}): "
                        "check stitch.shards")
    if done < config.num_images:
        progress.warn(f"only {done} images, as the shards hold no more: stitch.num_images asks for {config.num_images}")
    if totals["nothing_seen"] > done / 2:
        progress.warn(f"the experts saw nothing in {totals['nothing_seen']} of {done} images, so their captions say "
                      "nothing: lower stitch.detr.threshold, or add experts")


def stitch_shard(shard: str, out: Path, stitcher: Stitcher, batch_size: int, wanted: int, data: Data,
                 bar: Any) -> dict[str, Any]:
    """Write captions for the first `wanted` usable images of a shard; its stats, named as img2dataset names them.

    Batches are formed within the shard, in file order, so the result does not depend on interruption.
    """
    rejects: list[Reject] = []
    name = shard_name(shard)
    done = nothing_seen = 0
    num_words: Counter[str] = Counter()
    with ShardWriter(str(out / f"{name}.tar")) as writer:
        for batch in _batches(shard, batch_size, wanted, data, rejects):
            for sample, facts in stitch_batch(batch, stitcher):
                writer.write(sample)
                num_words.update({style: len(sample.members[f"{style}.txt"].split()) for style in stitcher.styles})
                nothing_seen += not facts.seen
            done += len(batch)
            bar.update(len(batch))
    _write_quarantine(out / f"{name}_quarantine.jsonl", shard, rejects)
    reasons = Counter(reject.reason for reject in rejects)
    stats = {"count": done + len(rejects), "successes": done, "nothing_seen": nothing_seen,
             "mean_words": {style: round(num_words[style] / done, 2) if done else 0.0 for style in stitcher.styles},
             "status_dict": {"success": done, **reasons}}
    write_json(str(out / f"{name}_stats.json"), stats)
    return stats


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


def _batches(shard: str, size: int, wanted: int, data: Data,
             rejects: list[Reject]) -> Iterator[list[tuple[Sample, Image.Image]]]:
    """The first `wanted` usable samples of a shard with their images, in batches; what comes after them is not read."""
    batch: list[tuple[Sample, Image.Image]] = []
    for sample in read_shard(shard, rejects):
        try:
            batch.append((sample, sample.check(data.alt_text)))
        except BadSample as error:
            rejects.append(Reject(sample.shard, sample.key, error.reason, error.detail))
        if len(batch) == min(size, wanted):
            yield batch
            wanted -= len(batch)
            batch = []
            if not wanted:
                return
    if batch:
        yield batch


def _write_quarantine(path: Path, shard: str, rejects: list[Reject]) -> None:
    path.unlink(missing_ok=True)  # an earlier try may have found faults that have been mended since
    if rejects:
        write_rejects(str(path), rejects)
        listed = ", ".join(f"{reason} {count}" for reason, count in Counter(r.reason for r in rejects).items())
        progress.warn(f"{shard}: {len(rejects)} samples quarantined ({listed}), see {path}")


def _stats_of(out: Path, shard: str) -> dict[str, Any] | None:
    """The stats of a shard that is done: they are written last."""
    path = out / f"{shard_name(shard)}_stats.json"
    return json.loads(path.read_bytes()) if path.is_file() else None
