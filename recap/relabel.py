"""Shards in, the same shards with captions out. A shard is the unit of work; to resume, run the same command again."""

import functools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from recap import progress
from recap.captioners import Captioner, open_captioner
from recap.captioners.text import Caption
from recap.chunks import split
from recap.clip_bpe import clip_tokenizer
from recap.config import Data, Relabel, Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.errors import UserError
from recap.rundir import StageDir, hash_files
from recap.sample import Sample
from recap.shard_work import Stats, batches, once, stats_of, total, warn_of
from recap.shards import Reject, ShardWriter, count_images, shard_name

SCHEMA = 1


@dataclass(frozen=True)
class Labeller:
    """All that turns an image into its caption members."""

    captioner: Captioner
    styles: dict[str, Style]
    config: Relabel
    source: dict[str, Any]
    """Captioner, revision and adapter, as `KEY.recap.json` names them."""


def run(stage: StageDir, shards: list[str], captioner_config: CaptionerConfig, tuned: Path | None,
        styles: dict[str, Style], config: Relabel, data: Data, device: str) -> dict[str, Any]:
    """Caption every image in every style; write each shard, then its quarantine, then its stats."""
    labeller = functools.cache(lambda: open_labeller(captioner_config, tuned, styles, config, device))
    found = []

    def work(shard: str) -> Stats:
        return relabel_shard(shard, stage.path, labeller(), data, bar)

    with progress.bar("relabel", count_images(shards)) as bar:
        for shard in shards:
            stats, new = once(stage, shard, work)
            found.append(stats)
            if not new:
                bar.update(stats["count"])
    result = total(found, "empty_captions", "not_ended")
    if not result["images_out"]:
        raise UserError(f"relabel: no image of {', '.join(shards[:3])} could be used ({result['quarantined']}): "
                        "check data.shards")
    return result


def open_labeller(captioner_config: CaptionerConfig, tuned: Path | None, styles: dict[str, Style], config: Relabel,
                  device: str) -> Labeller:
    source = {"captioner": captioner_config.model, "revision": captioner_config.revision,
              "adapter": hash_files(tuned) if tuned else None}
    return Labeller(open_captioner(captioner_config, device, tuned), styles, config, source)


def relabel_shard(shard: str, out: Path, labeller: Labeller, data: Data, bar: Any) -> Stats:
    """Relabel one shard; its stats."""
    rejects: list[Reject] = []
    counts = Counter(successes=0, empty_captions=0, not_ended=0)
    with ShardWriter(str(out / f"{shard_name(shard)}.tar")) as writer:
        for batch in batches(shard, labeller.config.batch_size, data, rejects):
            for sample in label(batch, labeller, counts):
                writer.write(sample)
            counts["successes"] += len(batch)
            bar.update(len(batch))
    bar.update(len(rejects))
    warn_of(rejects, shard, out)
    return stats_of(shard, out, rejects=rejects, **counts)


def label(batch: list[tuple[Sample, Image.Image]], labeller: Labeller, counts: Counter[str]) -> Iterator[Sample]:
    """Samples with their decoded images → the samples with their captions. Each image is encoded once."""
    captioner = labeller.captioner
    features = captioner.encode(captioner.preprocess([image for _, image in batch]))
    by_style = {name: captioner.caption(features, style) for name, style in labeller.styles.items()}
    for place, (sample, _) in enumerate(batch):
        captions = {name: found[place] for name, found in by_style.items()}
        counts["empty_captions"] += sum(not caption.text for caption in captions.values())
        counts["not_ended"] += sum(not caption.ended for caption in captions.values())
        yield Sample(sample.shard, sample.key, sample.members | _members(sample, captions, labeller))


def _members(sample: Sample, captions: dict[str, Caption], labeller: Labeller) -> dict[str, bytes]:
    """The members that relabelling adds. A style that the shard already had is replaced in its place."""
    texts = {f"{name}.txt": caption.text.encode() for name, caption in captions.items()}
    present = sample.members | texts  # a style of an earlier relabelling counts as well
    kinds = [kind for kind in sorted(labeller.config.mix) if f"{kind}.txt" in present]
    if kinds:
        draw = random.Random(f"{labeller.config.seed}/{sample.key}")
        kind = draw.choices(kinds, [labeller.config.mix[kind] for kind in kinds])[0]
        texts["mix.txt"] = present[f"{kind}.txt"]
    record = _earlier_record(sample)
    record["captions"] |= {name: _provenance(labeller, name, caption) for name, caption in captions.items()}
    return texts | {"recap.json": json.dumps(record).encode()}  # ASCII: an earlier record may hold lone surrogates


def _provenance(labeller: Labeller, name: str, caption: Caption) -> dict[str, Any]:
    """How a caption came to be, for `KEY.recap.json`."""
    style = labeller.styles[name]
    windows = split(caption.text, clip_tokenizer())
    flags = [flag for flag, holds in {"empty": not caption.text, "not_ended": not caption.ended}.items() if holds]
    return {**labeller.source, "prompt": style.prompt,
            "decoding": style.model_dump(exclude={"prompt"}),
            "num_clip_tokens": windows.num_tokens, "num_clip_windows": len(windows.ids),
            "scores": {}, "flags": flags}


def _earlier_record(sample: Sample) -> dict[str, Any]:
    """What an earlier relabelling said of styles that are not asked for now; it stays."""
    try:
        found = json.loads(sample.members["recap.json"])
        if found["schema"] == SCHEMA and isinstance(found["captions"], dict):
            return found
    except (KeyError, ValueError, TypeError, RecursionError):
        pass
    return {"schema": SCHEMA, "captions": {}}
