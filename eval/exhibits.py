"""What the report shows of pictures and captions: picked by a hash of the key, never by hand, and embedded."""

import base64
import hashlib
import heapq
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from eval.comparisons import Run
from eval.evaluate import read_drawn
from eval.features import read_image
from eval.measures import Measure
from recap.chunks import CONTENT_TOKENS, split
from recap.clip_bpe import clip_tokenizer
from recap.errors import BadSample
from recap.sample import Sample
from recap.shards import Reject, read_shard, shard_name

THUMBNAIL = 320
"""Longest side of an embedded picture, in pixels."""
PIXEL_ART = 128
"""Pictures smaller than this are enlarged with their pixels kept sharp."""
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
class GridRow:
    """A prompt, drawn by every arm from the same noise."""

    prompt: Text
    set: str
    drawings: list[Drawing]


def hash_of(key: str) -> str:
    """What picks are ordered by: as good as random, and the same in every report."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def picture(image: Image.Image) -> Picture:
    """Shrink and embed: JPEG, but PNG where pixels are few and count."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    small = max(image.size) < PIXEL_ART
    buffer = io.BytesIO()
    if small:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=82, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/{'png' if small else 'jpeg'};base64,{data}", *image.size, small)


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
    recorded = _recorded(sample)
    found = []
    for kind in kinds:
        try:
            text = sample.caption(kind)
        except BadSample:
            continue
        if text is not None:
            tokens = recorded.get(kind, {}).get("num_clip_tokens")
            if not isinstance(tokens, int):
                tokens = split(text, clip_tokenizer()).num_tokens
            found.append(Caption(kind, shorten(text), tokens))
    return found


def _recorded(sample: Sample) -> dict[str, dict[str, Any]]:
    """What `KEY.recap.json` says of each style; nothing where it is missing or damaged."""
    try:
        found = json.loads(sample.members.get("recap.json", b"{}"))["captions"]
        return {style: entry for style, entry in found.items() if isinstance(entry, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


# --- pictures ------------------------------------------------------------------------------------------------------


def grid(arms: list[str], runs: list[Run], num_prompts: int, lead: Measure) -> list[GridRow]:
    """The same prompts of the headline sets, drawn by every arm; of several seeds, the first that an arm has."""
    first = {arm: min((run for run in runs if run.arm == arm), key=lambda run: run.seed, default=None) for arm in arms}
    shown = {arm: (run, read_drawn(run.images)) for arm, run in first.items() if run is not None}
    if not shown:
        return []
    run, drawn = next(iter(shown.values()))
    prompts = [each.prompt for each in drawn]
    headline = [index for index, prompt in enumerate(prompts) if prompt.set in run.metrics["headline_sets"]]
    picks = sorted(headline, key=lambda index: hash_of(f"{index}/{prompts[index].text}"))[:num_prompts]
    return [GridRow(shorten(prompts[index].text), prompts[index].set, [
        Drawing(arm, picture(read_image(drawn[index].path)), _figure(run, index, lead))
        for arm, (run, drawn) in shown.items()]) for index in sorted(picks)]


def _figure(run: Run, index: int, measure: Measure) -> str:
    """What is written below a picture; a judgement that is a plain yes or no as such."""
    value = run.scores.columns[measure.key][index]
    if measure.is_share and value in (0, 1):
        return "✓" if value else "✗"
    return measure.text(value)
