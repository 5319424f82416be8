"""Shards in, the same shards with captions out. A shard is the unit of work; to resume, run the same command again.

read ─▶ decode ─▶ filter ─▶ preprocess ─▶ encode once ─▶ captions in every style ─▶ check ─▶ write ─▶ publish
processes           a thread      ─────────── the model ───────────                          a thread
"""

import functools
import gc
import hashlib
import json
import random
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from recap import engines, progress
from recap.caption_checks import CaptionChecks, Found, action
from recap.caption_statistics import CaptionStatistics, partial_file
from recap.captioners import Captioner, open_captioner
from recap.captioners.text import Caption
from recap.chunks import split
from recap.clip_bpe import clip_tokenizer
from recap.config import Data, Draw, Style
from recap.config.captioner import Captioner as CaptionerConfig
from recap.config.relabel import Relabel
from recap.data_card import write_card
from recap.decoders import Decoders
from recap.engines import Report
from recap.environment import environment
from recap.errors import BadSample, UserError
from recap.image_filters import ImageScores, Seen, check_size
from recap.meter import Meter
from recap.outputs import Output, open_output, written
from recap.rundir import StageDir, Stale, digest, hash_files, plain
from recap.sample import Sample
from recap.shard_work import (
    NUM_DECODERS,
    Decoded,
    Stats,
    ahead,
    batches,
    decoded,
    reasons,
    stats_of,
    total,
    warn_of,
)
from recap.shards import Reject, count_images, shard_name
from recap.storage import clean, names, read_bytes, write_json

SCHEMA = 1


MAX_WRITING = 2
"""Batches of captions that wait to be written."""
SWITCH_INTERVAL = 1e-4
"""Seconds after which a thread that computes lets others go on. With Python's 5 ms, the model's thread, which waits for
the device some hundreds of times a second, would wait for the writer as well each time."""


@dataclass(frozen=True)
class Job:
    """All that a worker has to know, wherever it is."""

    out: str
    """Folder or URL."""
    captioner: CaptionerConfig
    tuned: Path | None
    styles: dict[str, Style]
    config: Relabel
    data: Data
    settings: str
    """What the captions depend on, as a hash, for the stats."""

    def open(self, device: str, report: Report) -> "Relabeller":
        return Relabeller(self, device, report)


def run(stage: StageDir, shards: list[str], captioner: CaptionerConfig, tuned: Path | None, styles: dict[str, Style],
        config: Relabel, data: Data, device: str, stale: Stale = "refuse") -> dict[str, Any]:
    """Caption every image in every style; write each shard, then its quarantine, then its stats. At the end, the card.

    Returns:
        `images_in`, `images_out`, `quarantined` (reason → number), `captions` (`STYLE/FAULT` → number), `versions`.

    Raises:
        UserError: no image could be used; or there are shards that were made with other settings, and `stale` is
            `refuse`.
    """
    out = config.output or str(stage.path)
    settings = digest({name: value for name, value in stage.reads.items() if name not in ("inputs", "output")})
    job = Job(out, captioner, tuned, styles, config, data, settings)
    if progress.is_main():
        clean(out)
    found = _finished_before(job, shards, stale)
    left = [shard for shard in shards if shard not in found]
    with Meter(stage.path, count_images(shards), len(shards), found.values()) as meter:
        for shard, stats in engines.work(job, left, config.engine, config.workers, device, meter):
            found[shard] = stats
            stage.log(event="shard", shard=shard_name(shard), **stats)
            meter.shard(shard, stats["count"], reasons(stats))
    if not progress.is_main():
        return {}
    clean(out)  # what lost workers have left
    return _finish(job, stage, [found.get(shard) or read_stats(out, shard) for shard in shards], shards)


def _finished_before(job: Job, shards: list[str], stale: Stale) -> dict[str, Stats]:
    """The stats of the shards that an earlier try has finished; not of those that are to be made again."""
    present = names(job.out)
    done = [shard for shard in shards if stats_name(shard) in present]
    found = dict(zip(done, ahead(lambda shard: read_stats(job.out, shard), done, 32), strict=True))
    others = [shard for shard, stats in found.items() if stats["settings"] != job.settings]
    if others and stale == "refuse":
        raise UserError(f"relabel: {job.out} holds {len(others)} shards of other settings, {shard_name(others[0])} for "
                        "one: choose another relabel.output, or keep them with --go-on, or make them again with --redo")
    return {shard: stats for shard, stats in found.items() if stale != "redo" or shard not in others}


def _finish(job: Job, stage: StageDir, found: list[Stats], shards: list[str]) -> dict[str, Any]:
    """The sums over all shards, and the set's card."""
    result = total(found) | {"captions": dict(sum((Counter(stats["captions"]) for stats in found), Counter[str]()))}
    if not result["images_out"]:
        raise UserError(f"relabel: no image of {', '.join(shards[:3])} could be used ({result['quarantined']}): "
                        "check data.shards")
    if job.config.format != "folder":  # which holds no shards to read again
        settings = json.loads(json.dumps(stage.reads, default=plain))
        outputs = [written(job.config.format, job.out, shard_name(shard)) for shard in shards]
        write_card(job.out, outputs, result, settings, environment())
    return result | {"versions": environment()}


def stats_name(shard: str) -> str:
    return f"{shard_name(shard)}_stats.json"


def read_stats(out: str, shard: str) -> Stats:
    return json.loads(read_bytes(f"{out}/{stats_name(shard)}"))


@dataclass(slots=True)
class Item:
    """A sample on its way through."""

    sample: Sample
    image: Image.Image
    place: int
    """Of the image whose captions it gets, among those of the shard that are captioned: mostly its own."""
    scores: dict[str, float]
    """Of the image."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch on its way to the model."""

    shard: str
    items: list[Item]
    pixels: Any
    """Of the images that no item before showed; None where there is none."""
    rejects: list[Reject]
    """Found while the batch was read."""
    is_last: bool = False
    """Of its shard."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A caption as it is written."""

    caption: Caption
    found: Found
    instead: dict[str, Any]
    """How it came to be, where that is not as its style says: `draw`, which one it is; `text`, `alt`."""


Captioned = tuple[Item, dict[str, Chosen]]
"""With the captions that it gets, by style."""


class Relabeller:
    """Relabels shards, one after the other, on one device."""

    def __init__(self, job: Job, device: str, report: Report) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL)
        self.job, self.config, self.device, self.report = job, job.config, device, report
        self.batch_size, self.num_slots = job.config.batch_size, job.config.num_slots
        self.prepared_with: dict[str, int] = {}
        """Shard → the batch size that its images were prepared with."""
        self.resources = ExitStack()
        self.decoders = self.resources.enter_context(Decoders(NUM_DECODERS, job.config.decode_timeout))
        self.publisher = self.resources.enter_context(ThreadPoolExecutor(1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.resources.close()

    @functools.cached_property
    def captioner(self) -> Captioner:
        """Opened when there is something to caption."""
        return open_captioner(self.job.captioner, self.device, self.job.tuned)

    @functools.cached_property
    def checks(self) -> CaptionChecks:
        return CaptionChecks(self.config.checks, self.job.styles, self.device)

    @functools.cached_property
    def scores(self) -> ImageScores:
        return ImageScores(self.config.images, self.device)

    @functools.cached_property
    def source(self) -> dict[str, Any]:
        """Captioner, revision and adapter, as `KEY.recap.json` names them."""
        captioner, tuned = self.job.captioner, self.job.tuned
        return {"captioner": captioner.model, "revision": captioner.revision,
                "adapter": hash_files(tuned) if tuned else None}

    def relabel(self, shards: Iterable[str]) -> Iterator[tuple[str, Stats]]:
        """Shards with their stats, as soon as they are published; the next one is begun before that."""
        self.captioner, self.checks, self.scores  # noqa: B018  (opened here, not in a thread beside)
        publishing: Future[tuple[str, Stats]] | None = None
        with Ahead(chain.from_iterable(map(self._prepare, shards))) as parts:
            while True:
                if publishing:  # for a next shard there may be a long wait
                    either: list[Future[Any]] = [publishing, parts.coming]
                    wait(either, return_when=FIRST_COMPLETED)
                    if publishing.done():
                        yield publishing.result()
                        publishing = None
                if (first := next(parts, None)) is None:
                    break
                written = self._write(first.shard, _of_one_shard(first, parts))
                if publishing:
                    yield publishing.result()
                publishing = written
        if publishing:
            yield publishing.result()

    # --- in a thread of its own ---

    def _prepare(self, shard: str) -> Iterator[Prepared]:
        """The batches of a shard; the last one is empty, and has the rejects of its end."""
        rejects: list[Reject] = []
        self.prepared_with[shard] = self.batch_size
        seen = Seen(self.config.images)
        samples = self._large_enough(decoded(shard, self.job.data, self.decoders, rejects), rejects)
        for batch in batches(samples, self.batch_size):
            items, new = [], []
            for (sample, image), scored in zip(batch, self.scores.look([image for _, image in batch]), strict=True):
                place, is_new = (0, False) if scored.reason else seen.place(sample.image_bytes, image)
                reason = scored.reason or ("duplicate_image" if self._is_dropped(is_new) else None)
                if reason:
                    rejects.append(Reject(sample.shard, sample.key, reason, json.dumps(scored.scores)))
                else:
                    items.append(Item(sample, image, place, scored.scores))
                    new += [image] if is_new else []
            yield Prepared(shard, items, self.captioner.preprocess(new) if new else None, rejects.copy())
            rejects.clear()
        yield Prepared(shard, [], None, rejects, is_last=True)

    def _large_enough(self, samples: Iterable[Decoded], rejects: list[Reject]) -> Iterator[Decoded]:
        for sample, image in samples:
            try:
                check_size(image, self.config.images)
                yield sample, image
            except BadSample as error:
                rejects.append(Reject(sample.shard, sample.key, error.reason, error.detail))

    def _is_dropped(self, is_new: bool) -> bool:
        return not is_new and self.config.images.duplicates == "drop"

    # --- where the model is ---

    def _write(self, shard: str, parts: Iterator[Prepared]) -> Future[tuple[str, Stats]]:
        """Caption and write a shard; where the device's memory does not suffice, again from its beginning with less."""
        try:
            return self._try(shard, parts)
        except torch.OutOfMemoryError as error:
            progress.warn(f"{shard}: {str(error).splitlines()[0][:200]}")
        for _ in parts:  # what was prepared of it; and only now, outside of `except`, its tensors can go
            pass
        self._take_less(self.prepared_with[shard])
        with Ahead(self._prepare(shard)) as again:
            return self._write(shard, again)

    def _take_less(self, failed: int) -> None:
        """Halve the batch, unless what failed had been prepared before it was halved last."""
        if failed == 1 and self.num_slots == 1:
            raise UserError("relabel: the device's memory does not suffice for a single image: take a smaller "
                            "captioner, captioner.dtype=bfloat16 or captioner.quantization")
        if failed <= self.batch_size:
            self.batch_size, self.num_slots = max(1, self.batch_size // 2), max(1, self.num_slots // 2)
            progress.warn(f"out of memory: goes on with relabel.batch_size={self.batch_size}, "
                          f"relabel.num_slots={self.num_slots}")
        gc.collect()
        torch.cuda.empty_cache()

    def _try(self, shard: str, parts: Iterator[Prepared]) -> Future[tuple[str, Stats]]:
        rejects: list[Reject] = []
        counts: Counter[str] = Counter()
        statistics = CaptionStatistics(["alt", *self.job.styles, "mix"])
        with ExitStack() as stack:
            output = stack.enter_context(
                open_output(self.config.format, self.job.out, shard_name(shard), self.config.folder_caption))
            writing: deque[Future[None]] = deque()
            stack.callback(wait, writing)  # before the output is closed
            for batch in self._finished(parts, rejects, counts):
                counts["successes"] += len(batch)
                writing.append(self.publisher.submit(self._put, output, statistics, batch))
                if len(writing) > MAX_WRITING:
                    writing.popleft().result()
                self.report(shard, counts["successes"] + len(rejects), Counter(reject.reason for reject in rejects))
            while writing:
                writing.popleft().result()
            return self.publisher.submit(self._publish, shard, stack.pop_all(), rejects, counts, statistics)

    def _finished(self, parts: Iterable[Prepared], rejects: list[Reject], counts: Counter[str]
                  ) -> Iterator[list[Captioned]]:
        """The samples of a shard with their captions, in file order; checked in batches, as they come."""
        items: deque[Item] = deque()
        captions: dict[int, dict[str, Caption]] = {}
        ready: list[Item] = []
        size = self.config.batch_size

        def pixels() -> Iterator[Any]:
            for part in parts:
                items.extend(part.items)
                rejects.extend(part.rejects)
                if part.pixels is not None:
                    yield part.pixels

        for place, found in self.captioner.captions(pixels(), self.job.styles, self.num_slots):
            captions[place] = found
            while items and items[0].place in captions:
                ready.append(items.popleft())
            while len(ready) >= size:
                yield self._check(ready[:size], captions, rejects, counts)
                del ready[:size]
        yield self._check([*ready, *items], captions, rejects, counts)

    def _check(self, items: list[Item], captions: dict[int, dict[str, Caption]], rejects: list[Reject],
               counts: Counter[str]) -> list[Captioned]:
        """Of a batch, the samples whose captions are no reason to drop them."""
        alt_texts = [_alt_text(item.sample) for item in items]
        found = self.checks.check([item.image for item in items], alt_texts, [captions[item.place] for item in items])
        kept: list[Captioned] = []
        for item, alt_text, each in zip(items, alt_texts, found, strict=True):
            try:
                kept.append((item, {style: self._choose(item, style, caption, each[style], alt_text, counts)
                                    for style, caption in captions[item.place].items()}))
            except BadSample as error:
                rejects.append(Reject(item.sample.shard, item.sample.key, error.reason, error.detail))
        return kept

    def _choose(self, item: Item, style: str, caption: Caption, found: Found, alt_text: str,
                counts: Counter[str]) -> Chosen:
        """What a sample gets for a caption, after its checks. BadSample, where a fault is a reason to drop it."""
        counts.update(f"{style}/{fault}" for fault in found.faults)
        what = action(found.faults, self.config.checks, alt_text)
        if what == "resample":
            draws = [self._draw(item, style, number) for number in range(self.config.checks.max_resamples)]
            again = self.checks.check([item.image] * len(draws), [alt_text] * len(draws),
                                      [{style: draw} for draw in draws])
            for number, (draw, each) in enumerate(zip(draws, again, strict=True), 1):
                if not each[style].faults:
                    counts[f"{style}/resampled"] += 1
                    return Chosen(draw, each[style], {"draw": number})
            what = action(found.faults, self.config.checks, alt_text, drawn=True)
        if what == "drop":
            raise BadSample(f"caption_{found.faults[0]}", f"the {style} caption: {', '.join(found.faults)}")
        if what == "alt":
            counts[f"{style}/alt_text_kept"] += 1
            return Chosen(Caption(alt_text, True), found, {"text": "alt"})
        return Chosen(caption, found, {})

    def _draw(self, item: Item, style: str, number: int) -> Caption:
        """A caption drawn by lot, the same whenever it is drawn again."""
        seed = int.from_bytes(hashlib.sha256(
            f"{self.config.seed}/{item.sample.uid}/{style}/{number}".encode()).digest()[:6])
        draw = Draw(**self.job.styles[style].model_dump() | {"num_beams": 1},
                    temperature=self.config.checks.temperature, seed=seed)
        features = self.captioner.encode(self.captioner.preprocess([item.image]))
        return self.captioner.caption(features, draw)[0]

    # --- in a thread of its own ---

    def _put(self, output: Output, statistics: CaptionStatistics, batch: list[Captioned]) -> None:
        for item, chosen in batch:
            sample = Sample(item.sample.shard, item.sample.key, item.sample.members | self._members(item, chosen))
            output.write(sample)
            statistics.add(sample)

    def _members(self, item: Item, chosen: dict[str, Chosen]) -> dict[str, bytes]:
        """The members that relabelling adds. A style that the shard already had is replaced in its place."""
        sample = item.sample
        texts = {f"{style}.txt": each.caption.text.encode() for style, each in chosen.items()}
        present = sample.members | texts  # a style of an earlier relabelling counts as well
        kinds = [kind for kind in sorted(self.config.mix) if f"{kind}.txt" in present]
        if kinds:
            draw = random.Random(f"{self.config.seed}/{sample.key}")
            kind = draw.choices(kinds, [self.config.mix[kind] for kind in kinds])[0]
            texts["mix.txt"] = present[f"{kind}.txt"]
        record = _earlier_record(sample)
        record["captions"] |= {style: self._provenance(style, each) for style, each in chosen.items()}
        if item.scores:
            record["image"] = item.scores
        return texts | {"recap.json": json.dumps(record).encode()}  # ASCII: an earlier one may hold lone surrogates

    def _provenance(self, name: str, chosen: Chosen) -> dict[str, Any]:
        """How a caption came to be, for `KEY.recap.json`."""
        style = self.job.styles[name]
        windows = split(chosen.caption.text, clip_tokenizer())
        return {**self.source, "prompt": style.prompt,
                "decoding": style.model_dump(exclude={"prompt"}) | chosen.instead,
                "num_clip_tokens": windows.num_tokens, "num_clip_windows": len(windows.ids),
                "scores": chosen.found.scores, "flags": chosen.found.faults}

    def _publish(self, shard: str, output: ExitStack, rejects: list[Reject], counts: Counter[str],
                 statistics: CaptionStatistics) -> tuple[str, Stats]:
        """Give the shard its name, then write its quarantine and its captions' statistics, then its stats, which mark
        the end.
        """
        output.close()
        successes = counts.pop("successes", 0)
        write_json(partial_file(written(self.config.format, self.job.out, shard_name(shard))), statistics.partial())
        warn_of(rejects, shard, self.job.out)
        stats = stats_of(shard, self.job.out, successes, rejects, captions=dict(sorted(counts.items())),
                         settings=self.job.settings)
        write_json(f"{self.job.out}/{stats_name(shard)}", stats)
        return shard, stats


def _of_one_shard(first: Prepared, parts: Iterator[Prepared]) -> Iterator[Prepared]:
    yield first
    while not first.is_last:
        yield (first := next(parts))


class Ahead:
    """An iterator of which the next item is made in a thread."""

    def __init__(self, items: Iterator[Prepared]) -> None:
        self.items = items
        self.thread = ThreadPoolExecutor(1)
        self.coming = self._ask()

    def _ask(self) -> Future[Prepared | None]:
        return self.thread.submit(next, self.items, None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Prepared:
        item = self.coming.result()
        if item is None:
            raise StopIteration
        self.coming = self._ask()
        return item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)  # it may wait for a shard that does not come


def _alt_text(sample: Sample) -> str:
    """What the shard says. Alt-text that can't be read comes so far only where it is optional, and counts as none."""
    try:
        return sample.caption("alt") or ""
    except BadSample:
        return ""


def _earlier_record(sample: Sample) -> dict[str, Any]:
    """What an earlier relabelling said of styles that are not asked for now; it stays."""
    try:
        found = json.loads(sample.members["recap.json"])
        if found["schema"] == SCHEMA and isinstance(found["captions"], dict):
            return found
    except (KeyError, ValueError, TypeError, RecursionError):
        pass
    return {"schema": SCHEMA, "captions": {}}
