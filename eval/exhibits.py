"""What the report shows of pictures and captions: picked by measure or by a hash, never by hand, and embedded."""

import base64
import hashlib
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from eval.comparisons import Run, claim
from eval.drawn import FORGOTTEN_FILE, THUMBNAILS_FILE, Drawn, by_hash
from eval.drawn import picture as read_picture
from eval.measures import DISTANCES, Measure
from eval.thumbnails import PIXEL_ART, THUMBNAIL, thumbnail
from eval.verdict import Findings
from recap.caption_statistics import captions_of, num_clip_tokens
from recap.chunks import CONTENT_TOKENS
from recap.errors import BadSample
from recap.sample import Sample, decode_image
from recap.shards import Reject, read_shard, shard_name

MANY_PICTURES = 240
"""With more pictures of arms on a page they become smaller, so that the file does not grow as fast."""
ENOUGH_SAMPLES = 2000
"""Shards are read, in the order of their hash, until so many samples were seen."""
SHOWN_CHARACTERS = 480
"""Of a text; the rest is a click away."""


@dataclass(frozen=True)
class Picture:
    """A thumbnail inside the page."""

    src: str
    """A data: URL."""
    width: int
    height: int
    """Of the thumbnail, in pixels."""
    pixelated: bool
    """Whether it is enlarged with its pixels kept sharp."""


@dataclass(frozen=True)
class Text:
    """A text from outside, as much as is shown at once and the rest."""

    shown: str
    rest: str


@dataclass(frozen=True)
class Caption:
    """One caption of an image."""

    style: str
    text: Text
    num_clip_tokens: int

    @property
    def num_windows(self) -> int:
        return max(1, -(-self.num_clip_tokens // CONTENT_TOKENS))


@dataclass(frozen=True)
class Card:
    """An image with its captions before (the alt-text) and after."""

    key: str
    picture: Picture
    before: Caption | None
    after: list[Caption]


@dataclass(frozen=True)
class Drawing:
    """What one arm drew of a prompt."""

    arm: str
    picture: Picture
    figure: str
    """What the leading measure says of it."""


@dataclass(frozen=True)
class Row:
    """A prompt, drawn by every arm from the same noise."""

    index: int
    """Of its picture among all."""
    prompt: Text
    drawings: list[Drawing]
    """None where the row is on the page already."""


@dataclass(frozen=True)
class Exhibit:
    """Some prompts, and why these."""

    title: str
    note: str
    rows: list[Row]


def hash_of(key: str) -> str:
    """What picks are ordered by: as good as random, and the same in every report."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def picture(image: Image.Image, side: int = THUMBNAIL) -> Picture:
    """Shrink to at most `side` pixels, and embed: JPEG, but PNG where pixels are few and count."""
    image = image.copy()
    image.thumbnail((side, side))
    extension, content = thumbnail(image)
    kind = "png" if extension == "png" else "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", *image.size, kind == "png")


def shorten(text: str) -> Text:
    """Cut a long text for the eye, at white space where there is some near."""
    if len(text) <= SHOWN_CHARACTERS * 1.2:
        return Text(text, "")
    space = text.rfind(" ", SHOWN_CHARACTERS // 2, SHOWN_CHARACTERS)
    cut = space if space > 0 else SHOWN_CHARACTERS
    return Text(text[:cut], text[cut:].strip())


# --- captions ------------------------------------------------------------------------------------------------------


def captions(shards: list[str], styles: list[str], num_cards: int) -> list[Card]:
    """`num_cards` cards to show: the samples of the smallest hashes, of those that were read."""
    chosen: list[tuple[str, Sample]] = []
    for sample in _some_samples(shards):
        chosen.append((hash_of(sample.uid), sample))
        if len(chosen) > 4 * num_cards + 64:
            chosen = _smallest(2 * num_cards, chosen)
    cards: list[Card] = []
    for _, sample in _smallest(2 * num_cards, chosen):  # twice as many, as some may have nothing to show
        if len(cards) < num_cards and (card := _card(sample, styles)):
            cards.append(card)
    return cards


def _smallest(count: int, found: list[tuple[str, Sample]]) -> list[tuple[str, Sample]]:
    return heapq.nsmallest(count, found, key=lambda pair: pair[0])


def _some_samples(shards: list[str]) -> Iterator[Sample]:
    """Whole shards until there are enough: no shard's beginning is preferred, and no large data set is read whole."""
    num_seen = 0
    for shard in sorted(shards, key=lambda shard: hash_of(shard_name(shard))):
        rejects: list[Reject] = []
        for sample in read_shard(shard, rejects):
            num_seen += 1
            yield sample
        if num_seen >= ENOUGH_SAMPLES:
            return


def _card(sample: Sample, styles: list[str]) -> Card | None:
    try:
        image = picture(sample.image())
    except BadSample:
        return None
    found = _captions(sample, ["alt", *styles])
    before = next((caption for caption in found if caption.style == "alt"), None)
    after = [caption for caption in found if caption.style != "alt"]
    return Card(sample.uid, image, before, after) if after else None


def _captions(sample: Sample, kinds: list[str]) -> list[Caption]:
    known = {each.kind: each for each in captions_of(sample) if not each.fault}
    return [Caption(each.kind, shorten(each.text), num_clip_tokens(each.text) if each.num_clip_tokens is None
                    else each.num_clip_tokens) for kind in kinds if (each := known.get(kind))]


# --- pictures ------------------------------------------------------------------------------------------------------


def exhibits(found: Findings, runs: Sequence[Run], num_prompts: int) -> list[Exhibit]:
    """Prompts of the headline sets as every arm drew them: where the arm of the headline gains most on the baseline by
    the leading measure, where it loses most, and a draw.

    The pictures are of each arm's first seed, and of each prompt its first, and so is what they are picked by. Equals
    go by hash, and so does the draw. Of pictures that were not kept there may be thumbnails;
    a prompt without is left out.

    Returns:
        At most three exhibits of up to `num_prompts` rows; none of sets of pictures that are not of the same prompts.
    """
    first = {arm: min((run for run in runs if run.arm == arm), key=lambda run: run.seed) for arm in found.arms
             if any(run.arm == arm for run in runs)}
    if not all(run.metrics.get("is_paired", True) for run in first.values()) or not num_prompts:
        return []
    candidates = _candidates(list(first.values()))
    num_asked = len({each.prompt_index for each in _headline(first[found.summaries[0].arm])})
    of = "all prompts" if len(candidates) == num_asked else \
        f"the {len(candidates):,} of {num_asked:,} prompts whose pictures were kept"
    picks = [*_by_gain(found, first, candidates, num_prompts, of),
             ("A draw", f"By a hash of the prompt, of {of}.", candidates[:num_prompts])]
    num_pictures = len({each.index for *_, drawn in picks for each in drawn}) * len(first)
    side = max(PIXEL_ART, int(THUMBNAIL * math.sqrt(min(1, MANY_PICTURES / max(1, num_pictures)))))
    shown: set[int] = set()
    exhibits = []
    for title, note, drawn in picks:
        rows = [_row(each, first, found.lead, side, each.index in shown) for each in drawn]
        exhibits.append(Exhibit(title, note, [row for row in rows if row.drawings or row.index in shown]))
        shown |= {each.index for each in drawn}
    return [each for each in exhibits if each.rows]


def _candidates(runs: list[Run]) -> list[Drawn]:
    """The first picture of each prompt of the headline sets that all arms have kept, by hash."""
    kept = set.intersection(*map(_kept, runs))
    first: dict[int, Drawn] = {}
    for each in _headline(runs[0]):
        if each.index in kept:
            first.setdefault(each.prompt_index, each)
    return by_hash(list(first.values()))


def _headline(run: Run) -> list[Drawn]:
    return [each for each in run.drawn if each.prompt.set in run.metrics["headline_sets"]]


def _kept(run: Run) -> set[int]:
    if not (run.images / FORGOTTEN_FILE).is_file():
        return {each.index for each in run.drawn}
    return {int(sample.key) for sample in read_shard(str(run.images / THUMBNAILS_FILE), []) if sample.key.isdecimal()}


def _by_gain(found: Findings, first: dict[str, Run], candidates: list[Drawn], num: int, of: str
             ) -> list[tuple[str, str, list[Drawn]]]:
    """Where the claim gains most, and where it loses most."""
    a, b, lead = claim(found.arms), found.baseline, found.lead
    if a is None or not {a, b} <= first.keys() or lead in DISTANCES:
        return []
    ours, theirs = (first[arm].scores.columns[lead.key] for arm in (a, b))
    sign = -1 if lead.lower_is_better else 1
    gains = {each.index: sign * (one - other) for each in candidates
             if (one := ours[each.index]) is not None and (other := theirs[each.index]) is not None}
    known = [each for each in candidates if each.index in gains]
    note = f"By the difference in {lead.name} of the pictures shown, of {of}; equals by a hash of the prompt."
    best = [each for each in sorted(known, key=lambda each: -gains[each.index]) if gains[each.index] > 0]
    worst = [each for each in sorted(known, key=lambda each: gains[each.index]) if gains[each.index] < 0]
    return [(f"Where “{a}” gains most on “{b}”", note, best[:num]),
            (f"Where “{a}” loses most to “{b}”", note, worst[:num])]


def _row(each: Drawn, first: dict[str, Run], lead: Measure, side: int, is_shown: bool) -> Row:
    drawings = [] if is_shown else [
        Drawing(arm, shown, _figure(run, each.index, lead)) for arm, run in first.items()
        if (shown := _shown(run, each.index, side))]
    return Row(each.index, shorten(each.prompt.text), drawings)


def _shown(run: Run, index: int, side: int) -> Picture | None:
    content = read_picture(run.images, index)
    try:
        return None if content is None else picture(decode_image(content), side)
    except BadSample:  # which the page does without
        return None


def _figure(run: Run, index: int, measure: Measure) -> str:
    """What is written below a picture; a judgement that is a plain yes or no as such."""
    if measure in DISTANCES:
        return ""
    value = run.scores.columns[measure.key][index]
    if measure.is_share and not measure.lower_is_better and value in (0, 1):
        return "✓" if value else "✗"
    return measure.text(value)
