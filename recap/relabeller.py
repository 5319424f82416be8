"""Relabels shards on one device, with all that surrounds the model in threads and processes beside it.

read ─▶ decode ─▶ filter ─▶ preprocess ─▶ encode once ─▶ captions in every style ─▶ check ─▶ write ─▶ publish
processes           a thread      ─────────── the model ───────────                          a thread   another
"""

import functools
import json
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

from recap import progress
from recap.caption_checks import CaptionChecks
from recap.caption_statistics import CaptionStatistics, partial_file
from recap.captioners import Captioner, open_captioner
from recap.captioners.text import Caption
from recap.choosing import Chooser, Chosen, Item
from recap.decoders import Decoders
from recap.engines import Report, Result
from recap.errors import BadSample, UserError
from recap.image_filters import ImageScores, Seen, check_size
from recap.memory import free_memory, in_halves, is_out_of_memory
from recap.outputs import Output, open_output, written
from recap.record import Recorder
from recap.rundir import hash_files
from recap.seal import Seal
from recap.shard_work import NUM_DECODERS, Decoded, batches, decoded, stats_of, stats_url, warn_of
from recap.shards import Reject, shard_name
from recap.storage import Identity, identities, remove, write_json

if TYPE_CHECKING:
    from recap.relabel import Job

MAX_WRITING = 2
"""Batches of captions that wait to be written."""
MAX_PUBLISHING = 2
"""Shards that wait to be published, while the next is captioned."""
SWITCH_INTERVAL = 1e-4
"""Seconds after which a thread that computes lets others go on. With Python's 5 ms, the model's thread, which waits for
the device some hundreds of times a second, would wait for the writer as well each time."""


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
    error: MemoryError | None = None
    """Why there is no more of the shard."""


@dataclass(slots=True)
class Read:
    """What has to be known of a shard later that is begun to be read."""

    batch_size: int
    """That its images are prepared with."""
    input: Identity | None
    """What tells this version of it from another."""


class Relabeller:
    """Relabels shards, one after the other, on one device."""

    def __init__(self, job: "Job", device: str, report: Report) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL)
        self.job, self.config, self.device, self.report = job, job.config, device, report
        self.batch_size, self.num_slots = job.config.batch_size, job.config.num_slots
        self.read: dict[str, Read] = {}
        self.publishing: deque[Future[Result]] = deque()
        self.resources = ExitStack()
        self.decoders = self.resources.enter_context(Decoders(NUM_DECODERS, job.config.decode_timeout))
        self.writer = self.resources.enter_context(ThreadPoolExecutor(1))
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
    def scores(self) -> ImageScores:
        return ImageScores(self.config.images, self.device)

    @functools.cached_property
    def chooser(self) -> Chooser:
        checks = CaptionChecks(self.config.checks, self.job.styles, self.device)
        return Chooser(self.config, self.job.styles, self.captioner, checks)

    @functools.cached_property
    def recorder(self) -> Recorder:
        captioner, tuned = self.job.captioner, self.job.tuned
        source = {"captioner": captioner.model, "revision": captioner.revision,
                  "adapter": hash_files(tuned) if tuned else None}
        return Recorder(source, self.job.styles, self.config.mix, self.config.seed)

    def process(self, shards: Iterable[str]) -> Iterator[Result]:
        """Shards with their stats, as soon as they are published; the next one is begun before that."""
        self.captioner, self.scores, self.chooser, self.recorder  # noqa: B018  (opened here, not in a thread beside)
        with Ahead(chain.from_iterable(map(self._prepare, shards))) as parts:
            while True:
                yield from self._published(parts.coming)  # for a next shard there may be a long wait
                if (first := next(parts, None)) is None:
                    break
                for _ in self._caption(first.shard, _of_one_shard(first, parts)):
                    yield from self._published()
        while self.publishing:
            yield self.publishing.popleft().result()

    def _published(self, coming: "Future[Any] | None" = None) -> Iterator[Result]:
        """The shards that are published by now, or before something else comes."""
        while self.publishing:
            if coming:
                either: list[Future[Any]] = [self.publishing[0], coming]
                wait(either, return_when=FIRST_COMPLETED)
            if not self.publishing[0].done() and len(self.publishing) <= MAX_PUBLISHING:
                return
            yield self.publishing.popleft().result()

    # --- in a thread of its own ---

    def _prepare(self, shard: str) -> Iterator[Prepared]:
        """The batches of a shard; the last one is empty, and has the rejects of its end, or says that it is none."""
        try:
            yield from self._batches(shard)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            yield Prepared(shard, [], None, [], is_last=True, error=MemoryError(str(error)))

    def _batches(self, shard: str) -> Iterator[Prepared]:
        rejects: list[Reject] = []
        self.read[shard] = Read(self.batch_size, identities([shard]).get(shard))
        seen = Seen(self.config.images)
        samples = self._large_enough(decoded(shard, self.job.data, self.decoders, rejects), rejects)
        for batch in batches(samples, self.batch_size):
            items, new = [], []
            looked = in_halves(self.scores.look, [image for _, image in batch])
            for (sample, image), scored in zip(batch, looked, strict=True):
                place, is_new = (0, False) if scored.reason else seen.place(sample.image_bytes, image)
                reason = scored.reason or ("duplicate_image" if self._is_dropped(is_new) else None)
                if reason:
                    rejects.append(Reject(sample.shard, sample.key, reason, json.dumps(scored.scores)))
                else:
                    items.append(Item(sample, self.chooser.keep(image), place, scored.scores))
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

    def _caption(self, shard: str, parts: Iterator[Prepared]) -> Iterator[None]:
        """Caption a shard; where the device's memory does not suffice, again from its beginning with less.

        Yields, often, to let the caller do something else.
        """
        try:
            yield from self._try(shard, parts)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            progress.warn(f"{shard}: {str(error).strip().partition(chr(10))[0][:200]}")
        for _ in parts:  # what was prepared of it; and only now, outside of `except`, its tensors can go
            pass
        self._take_less(self.read[shard].batch_size)
        with Ahead(self._prepare(shard)) as again:
            yield from self._caption(shard, again)

    def _take_less(self, failed: int) -> None:
        """Halve the batch, unless what failed had been prepared before it was halved last."""
        if failed == 1 and self.num_slots == 1:
            raise UserError("relabel: the device's memory does not suffice for a single image: take a smaller "
                            "captioner, captioner.dtype=bfloat16 or captioner.quantization")
        if failed <= self.batch_size:
            self.batch_size, self.num_slots = max(1, self.batch_size // 2), max(1, self.num_slots // 2)
            progress.warn(f"out of memory: goes on with relabel.batch_size={self.batch_size}, "
                          f"relabel.num_slots={self.num_slots}")
        free_memory()

    def _try(self, shard: str, parts: Iterator[Prepared]) -> Iterator[None]:
        with ExitStack() as stack:
            output = stack.enter_context(open_output(self.config.format, self.job.out, shard_name(shard),
                                                     self.job.styles, self.config.folder_caption))
            made = Made(shard, self, output)
            stack.callback(wait, made.writing)  # before the output is closed
            captioned = self.captioner.captions(made.pixels(parts), self.job.styles, self.num_slots)
            for place, captions in captioned:
                made.captioned(place, captions)
                yield
            made.end()
            self.publishing.append(self.publisher.submit(self._publish, made, stack.pop_all()))

    # --- in a thread of its own ---

    def _publish(self, made: "Made", output: ExitStack) -> Result:
        """Give the shard its name, then write its quarantine and its captions' statistics, then its stats, which mark
        the end.
        """
        shard, out, counts = made.shard, self.job.out, made.counts
        with output:
            remove(stats_url(out, shard))  # an earlier try's, of another input or other settings
        write_json(partial_file(written(self.config.format, out, shard_name(shard))), made.statistics.partial())
        warn_of(made.rejects, shard, out)
        stats = stats_of(shard, out, made.num_written, made.rejects, captions=dict(sorted(counts.items())),
                         settings=self.job.settings, input=self.read[shard].input, seal=made.seal.content())
        write_json(stats_url(out, shard), stats)
        return shard, stats


class Made:
    """What becomes of a shard: samples with their captions, checked and written in batches, in file order."""

    def __init__(self, shard: str, relabeller: Relabeller, output: Output) -> None:
        self.shard, self.relabeller, self.output = shard, relabeller, output
        self.items: deque[Item] = deque()
        """That are not captioned yet, or behind one that is not."""
        self.captions: dict[int, dict[str, Caption]] = {}
        """By place."""
        self.ready: list[Item] = []
        self.writing: deque[Future[None]] = deque()
        self.rejects: list[Reject] = []
        self.counts: Counter[str] = Counter()
        """Of faults, and of what followed."""
        self.num_written = 0
        self.statistics = CaptionStatistics(["alt", *relabeller.job.styles, "mix"])
        self.seal = Seal(relabeller.job.styles)

    def pixels(self, parts: Iterable[Prepared]) -> Iterator[Any]:
        """What the captioner is given, while the shard is read."""
        for part in parts:
            if part.error:
                raise part.error
            self.items.extend(part.items)
            self.rejects.extend(part.rejects)
            self._go_on()  # with images that were captioned before
            if part.pixels is not None:
                yield part.pixels

    def captioned(self, place: int, captions: dict[str, Caption]) -> None:
        self.captions[place] = captions
        self._go_on()

    def end(self) -> None:
        """The captioner is done with the shard."""
        self._finish([*self.ready, *self.items])
        self.wait()

    def wait(self) -> None:
        while self.writing:
            self.writing.popleft().result()

    def _go_on(self) -> None:
        while self.items and self.items[0].place in self.captions:
            self.ready.append(self.items.popleft())
        size = self.relabeller.config.batch_size
        while len(self.ready) >= size:
            self._finish(self.ready[:size])
            del self.ready[:size]

    def _finish(self, items: list[Item]) -> None:
        choices = self.relabeller.chooser.choose(items, [self.captions[item.place] for item in items], self.counts)
        for item, choice in zip(items, choices, strict=True):
            if isinstance(choice, BadSample):
                self.rejects.append(Reject(item.sample.shard, item.sample.key, choice.reason, choice.detail))
        kept = [(item, choice) for item, choice in zip(items, choices, strict=True)
                if not isinstance(choice, BadSample)]
        self.num_written += len(kept)
        self.writing.append(self.relabeller.writer.submit(self._write, kept))
        if len(self.writing) > MAX_WRITING:
            self.writing.popleft().result()
        quarantined = Counter(reject.reason for reject in self.rejects)
        self.relabeller.report(self.shard, self.num_written + len(self.rejects), quarantined)

    def _write(self, captioned: list[tuple[Item, dict[str, Chosen]]]) -> None:
        """In the writer's thread."""
        for item, chosen in captioned:
            sample, record = self.relabeller.recorder.add(item, chosen)
            self.output.write(sample)
            self.statistics.add(sample)
            self.seal.add(sample, record)


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
