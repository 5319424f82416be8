"""Images → what one expert sees in them, a parquet file for each shard. To resume, run the same command again.

Every expert looks at each image once, whatever captions are then written from what it found.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from recap import progress
from recap.config import Data
from recap.config.stitch import Stitch
from recap.decoders import Decoders
from recap.errors import UserError
from recap.experts import Expert, View, open_expert
from recap.facts import Found, read_facts, write_facts
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shard_work import NUM_DECODERS, Decoded, Stats, batches, decoded, in_background, once, stats_of, total
from recap.shards import Reject, shard_name

T = TypeVar("T")
Shown = tuple[str, int, int]
"""An image's key, width and height."""
MAX_ASPECT = 50
"""Of an image that is longer than this times its width the first part is shown: resized, it would have no width."""


def run(stage: StageDir, name: str, tagger: Path | None, shards: list[str], config: Stitch, data: Data,
        device: str) -> dict[str, Any]:
    """Look at the first `num_images` usable images; each shard's facts, then its quarantine, then its stats.

    Args:
        stage: where to.
        name: of the expert.
        tagger: facts of another expert, whose tags this one looks for.
        shards: images.
        config, data: of the experiment.
        device: of the expert's model.

    Returns:
        `images_in`, `images_out`, `quarantined` (reason → number), `nothing_seen`; and of what this command looked at,
        `images_per_second` and `waiting_share`, of the time in which the model waited for images.

    Raises:
        UserError: no image could be used.
    """
    found: list[Stats] = []
    wanted = config.num_images
    with progress.bar(name, config.num_images) as bar, Decoders(NUM_DECODERS) as decoders:
        look = Look(stage.path, lambda: open_expert(name, config, device), tagger, config.batch_size, data, decoders,
                    bar)
        for shard in shards:
            stats, new = once(stage, shard, functools.partial(look.shard, wanted=wanted))
            found.append(stats)
            if not new:
                bar.update(stats["successes"])
            wanted -= stats["successes"]
            if not wanted:
                break
    result = total(found, "nothing_seen")
    if not result["images_out"]:
        raise UserError(f"stitch: no image of {', '.join(shards[:3])} could be used ({result['quarantined']}): "
                        "check stitch.shards")
    return result | look.clock.rates()


class Clock:
    """How long a model worked, and how long it waited for images."""

    def __init__(self) -> None:
        self.num_images, self.working, self.waiting = 0, 0.0, 0.0

    def waiting_for(self, items: Iterator[T]) -> Iterator[T]:
        """The items; the time until one is there is waiting, and that which the caller takes for it is work."""
        started = time.perf_counter()
        for item in items:
            given = time.perf_counter()
            self.waiting += given - started
            yield item
            started = time.perf_counter()
            self.working += started - given

    def rates(self) -> dict[str, float]:
        """Images/s, and the share of time that was spent waiting; nothing where no image was looked at."""
        seconds = self.working + self.waiting
        return {"images_per_second": round(self.num_images / seconds, 2),
                "waiting_share": round(self.waiting / seconds, 4)} if seconds else {}


@dataclass
class Look:
    """One expert's look at shards."""

    out: Path
    """Where its facts go."""
    open: Callable[[], Expert]
    tagger: Path | None
    """Facts of another expert, whose tags this one looks for."""
    batch_size: int
    data: Data
    decoders: Decoders
    bar: Any
    clock: Clock = field(default_factory=Clock)

    @functools.cached_property
    def expert(self) -> Expert:
        """Opened when there is something to look at."""
        return self.open()

    def shard(self, shard: str, wanted: int) -> Stats:
        """Write what the expert sees in the first `wanted` usable images of a shard; its stats."""
        expert = self.expert  # opened before the clock runs
        rejects: list[Reject] = []
        found: list[Found] = []
        tags = _tags(self.tagger / f"{shard_name(shard)}.parquet") if self.tagger else {}
        samples = batches(decoded(shard, self.data, self.decoders, rejects), self.batch_size, wanted)
        for shown, inputs in self.clock.waiting_for(in_background(self._prepare(batch, tags) for batch in samples)):
            found += [Found(*image, facts) for image, facts in zip(shown, expert.look(inputs), strict=True)]
            self.clock.num_images += len(shown)
            self.bar.update(len(shown))
        write_facts(self.out / f"{shard_name(shard)}.parquet", found, expert.provenance)
        return stats_of(shard, self.out, len(found), rejects, nothing_seen=sum(not each.facts.seen for each in found))

    def _prepare(self, batch: list[Decoded], tags: dict[str, list[str]]) -> tuple[list[Shown], Any]:
        """The images of a batch, and what the expert reads of them."""
        views = [View(_first_part(image), _alt_text(sample), tags.get(sample.key, [])) for sample, image in batch]
        return [(sample.key, *image.size) for sample, image in batch], self.expert.preprocess(views)


def _first_part(image: Image.Image) -> Image.Image:
    """All of an image, if it is not too long; else from the left, or the top, so that boxes are in its pixels still."""
    limit = MAX_ASPECT * min(image.size)
    return image.crop((0, 0, min(image.width, limit), min(image.height, limit))) if max(image.size) > limit else image


def _alt_text(sample: Sample) -> str:
    """What the shard says. Alt-text that can't be read comes so far only where it is optional, and counts as none."""
    return sample.readable("alt") or ""


def _tags(path: Path) -> dict[str, list[str]]:
    """Key → what was named in its image, by another expert."""
    found, _ = read_facts(path)
    return {key: list(dict.fromkeys([*(tag.label for tag in each.facts.tags),
                                     *(seen.label for seen in each.facts.objects)])) for key, each in found.items()}
