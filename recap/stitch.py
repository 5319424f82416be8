"""Experts' facts → captions in every style, for the images that the experts have seen. To resume, run again.

What is written are shards again: the members of the input, `KEY.STYLE.txt` for every style, and `KEY.facts.json`, which
says what the captions were made of; and the same as an imagefolder.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recap import progress
from recap.config.stitch import Stitch
from recap.errors import UserError
from recap.facts import Found, count_facts, merge, read_facts
from recap.imagefolder import write_imagefolder
from recap.llm import Scene, Writer, Written, open_writer
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shard_work import Stats, once, quarantine_file, stats_of, total, warn_of
from recap.shards import ShardWriter, read_rejects, read_shard, shard_name

SCHEMA = 1


def run(stage: StageDir, shards: list[str], config: Stitch, styles: list[str], looked: dict[str, Path],
        answers: Path, device: str) -> Stats:
    """Write captions for the images that the experts have seen; each shard, then its quarantine, then its stats.

    Args:
        stage: where to.
        shards: whose first `num_images` usable images every expert has seen.
        config: of the stage.
        styles: to write captions in.
        looked: expert → the folder of its facts.
        answers: the file in which a chat model's answers are kept.
        device: of a chat model that is opened here.

    Returns:
        `images_in`, `images_out`, `quarantined` (reason → number); `nothing_seen`, images of which no expert knew
        anything, whose captions are empty talk; of a chat model `flags` (`Written.flags` → number of images),
        `ungrounded` (images whose captions state what no expert saw) and `ungrounded_share`, and what its requests
        took.
    """
    writer = open_writer(config, styles, answers, device)
    shards = _looked_at(shards, looked)
    num_images = sum(count_facts(_files(shard, looked)[0]) for shard in shards)
    took = writer.prepare(scenes_of(shards, looked), num_images)
    found: list[Stats] = []
    with progress.bar("stitch", num_images) as bar:
        for shard in shards:
            stats, new = once(stage, shard, lambda shard: stitch_shard(shard, stage.path, writer, looked, styles, bar))
            found.append(stats)
            if not new:
                bar.update(stats["successes"])
    result = total(found, "nothing_seen")
    if config.writer != "template":
        flags = sum((Counter(stats["flags"]) for stats in found), Counter[str]())
        ungrounded = sum(stats["ungrounded"] for stats in found)
        result |= {"flags": dict(flags), "ungrounded": ungrounded,
                   "ungrounded_share": round(ungrounded / max(result["images_out"], 1), 4), **took}
    _judge(result, config)
    if shards:
        about = {"result": result, "experts": Looked.read(shards[0], looked).provenance, "writer": writer.provenance,
                 "prompt": writer.instructions}
        written_shards = [stage.path / f"{shard_name(shard)}.tar" for shard in shards]
        write_imagefolder(stage.path / "imagefolder", written_shards, styles, about)
    return result


def _files(shard: str, looked: dict[str, Path]) -> list[Path]:
    """What the experts found in a shard."""
    return [folder / f"{shard_name(shard)}.parquet" for folder in looked.values()]


def scenes_of(shards: list[str], looked: dict[str, Path]) -> Iterator[Scene]:
    """What there is to write of: all that every expert has looked at, in the order of the shards."""
    for shard in _looked_at(shards, looked):
        found = Looked.read(shard, looked)
        yield from map(found.scene, found.images)


def _looked_at(shards: list[str], looked: dict[str, Path]) -> list[str]:
    """The shards of those images; what comes after them was not needed."""
    return list(itertools.takewhile(lambda shard: all(file.is_file() for file in _files(shard, looked)), shards))


def _judge(result: Stats, config: Stitch) -> None:
    """Say what the numbers mean for the captioner that will learn from these captions."""
    done, flags = result["images_out"], result.get("flags", {})
    if done < config.num_images:
        progress.warn(f"only {done} images, as the shards hold no more: stitch.num_images asks for {config.num_images}")
    if result["nothing_seen"] > done / 2:
        progress.warn(f"the experts saw nothing in {result['nothing_seen']} of {done} images, so their captions say "
                      "nothing: lower their thresholds (stitch.detr.threshold), or add experts")
    if flags.get("template"):
        problems = ", ".join(f"{name} {count}" for name, count in sorted(flags.items(), key=lambda item: -item[1])
                             if name not in ("template", "rewritten"))
        progress.warn(f"the captions of {flags['template']} of {done} images are the template's, as the chat model's "
                      f"were bad twice ({problems})")


@dataclass(frozen=True)
class Looked:
    """What every expert found in the images of one shard."""

    by_expert: dict[str, dict[str, Found]]
    """Expert → key → what it found."""
    provenance: dict[str, dict[str, Any]]
    """Expert → what it was found with."""

    @classmethod
    def read(cls, shard: str, looked: dict[str, Path]) -> "Looked":
        files = {name: read_facts(file) for name, file in zip(looked, _files(shard, looked), strict=True)}
        (first, (images, _)), *others = files.items()
        for name, (found, _) in others:
            if list(found) != list(images):
                raise UserError(f"stitch: {looked[first]} and {looked[name]} are facts of different images of {shard}: "
                                "delete both folders and run the same command")
        return cls({name: found for name, (found, _) in files.items()},
                   {name: provenance for name, (_, provenance) in files.items()})

    @property
    def images(self) -> dict[str, Found]:
        """Key → width and height; every expert has seen the same images."""
        return next(iter(self.by_expert.values()))

    def scene(self, key: str) -> Scene:
        """What they found in one image, together."""
        image = self.images[key]
        return Scene(merge(found[key].facts for found in self.by_expert.values()), image.width, image.height)


def stitch_shard(shard: str, out: Path, writer: Writer, looked: dict[str, Path], styles: list[str], bar: Any) -> Stats:
    """Write captions for those images of a shard that were looked at; its stats."""
    found = Looked.read(shard, looked)
    rejects = read_rejects(Path(quarantine_file(shard, next(iter(looked.values())))))
    num_words, flags, ungrounded = Counter[str](), Counter[str](), 0
    with ShardWriter(str(out / f"{shard_name(shard)}.tar")) as shard_writer:
        for sample in _seen(shard, found):
            written = writer.write(found.scene(sample.key))
            shard_writer.write(_captioned(sample, written, found, writer))
            num_words.update({style: len(caption.split()) for style, caption in written.captions.items()})
            flags.update(written.flags)
            ungrounded += bool(written.ungrounded)
            bar.update(1)
    warn_of(rejects, shard, out)
    done = len(found.images)
    return stats_of(shard, out, done, rejects, flags=dict(flags), ungrounded=ungrounded,
                    nothing_seen=sum(not found.scene(key).facts.seen for key in found.images),
                    mean_words={style: round(num_words[style] / done, 2) if done else 0.0 for style in styles})


def _seen(shard: str, found: Looked) -> Iterator[Sample]:
    """The samples whose images were looked at; what comes after them is not read."""
    left = len(found.images)
    for sample in read_shard(shard, []):
        if not left:
            return
        if sample.key in found.images:
            left -= 1
            yield sample
    if left:
        raise UserError(f"stitch: {shard} is not what the experts looked at, {left} of its images are gone: put it "
                        "back, or run again with --redo")


def _captioned(sample: Sample, written: Written, found: Looked, writer: Writer) -> Sample:
    """The sample with its captions, and with who said what, and with what it was made."""
    image = found.images[sample.key]
    experts = {name: {**found.provenance[name], "facts": asdict(each[sample.key].facts)}
               for name, each in found.by_expert.items()}
    record = {"schema": SCHEMA, "width": image.width, "height": image.height, "experts": experts,
              "writer": {**writer.provenance, "flags": written.flags, "ungrounded": written.ungrounded}}
    captions = {f"{style}.txt": caption.encode() for style, caption in written.captions.items()}
    members = sample.members | captions | {"facts.json": json.dumps(record, ensure_ascii=False).encode()}
    return Sample(sample.shard, sample.key, members)
