"""What a sample gets after its captions were checked: a caption as it is, one drawn anew, the alt-text; or it is
dropped. Which of these, says `[relabel.checks]`.
"""

import functools
import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, cast

from PIL import Image

from recap.caption_checks import CaptionChecks, Found, action, faults
from recap.captioners import Captioner
from recap.captioners.text import Caption
from recap.config import Draw, Style
from recap.config.relabel import Checks, Relabel
from recap.errors import BadSample
from recap.memory import in_halves
from recap.sample import Sample

MAX_KEPT_SIDE = 2048
"""Pixels of an image that is kept for its checks."""


@dataclass(slots=True)
class Item:
    """A sample on its way through."""

    sample: Sample
    image: Image.Image | None
    """None where no check will look at it, and none of its captions can be drawn anew."""
    place: int
    """Of the image whose captions it gets, among those of the shard that are captioned: mostly its own."""
    scores: dict[str, float]
    """Of the image."""

    @property
    def alt_text(self) -> str:
        """What the shard says. Alt-text that can't be read comes so far only where it is optional, and counts as
        none.
        """
        return self.sample.readable("alt") or ""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A caption as it is written."""

    caption: Caption
    found: Found
    instead: dict[str, Any] = field(default_factory=dict)
    """How it came to be, where that is not as its style says: `draw`, which one it is; `text`, `alt`, and `because`,
    the faults of the caption in whose place that is."""


Choice = dict[str, Chosen] | BadSample
"""By style; or why the sample is dropped."""
Place = tuple[int, str]
"""Which item of a batch, and which style."""


class Chooser:
    """Checks captions, and decides what becomes of those at fault."""

    def __init__(self, config: Relabel, styles: dict[str, Style], captioner: Captioner, checks: CaptionChecks) -> None:
        self.config, self.styles, self.captioner, self.checks = config, styles, captioner, checks

    def keep(self, image: Image.Image) -> Image.Image | None:
        """What has to be kept of an image, besides what the captioner is given."""
        if not self.checks.models and "resample" not in _actions(self.config.checks):
            return None
        if max(image.size) > MAX_KEPT_SIDE:
            image = image.copy()
            image.thumbnail((MAX_KEPT_SIDE, MAX_KEPT_SIDE))
        return image

    def choose(self, items: list[Item], captions: list[dict[str, Caption]], counts: Counter[str]) -> list[Choice]:
        """What each of some items gets.

        Args:
            items: that were captioned.
            captions: of each, by style.
            counts: is told of every fault, `STYLE/FAULT`, and of what follows.
        """
        found = self._check(items, captions)
        counts.update(f"{style}/{fault}" for each in found for style, one in each.items() for fault in one.faults)
        first = {(number, style): Chosen(captions[number][style], one)
                 for number, each in enumerate(found) for style, one in each.items()}
        drawn = self._draw_anew(items, first)
        counts.update(f"{style}/resampled" for _, style in drawn)
        return [self._of_one(items[number], {style: first[number, style] for style in each},
                             {style: drawn[number, style] for style in each if (number, style) in drawn}, counts)
                for number, each in enumerate(found)]

    def _check(self, items: list[Item], captions: list[dict[str, Caption]]) -> list[dict[str, Found]]:
        def check(some: list[tuple[Item, dict[str, Caption]]]) -> list[dict[str, Found]]:
            images = cast(list[Image.Image], [item.image for item, _ in some])  # kept, where a check looks at them
            return self.checks.check(images, [item.alt_text for item, _ in some], [each for _, each in some])
        return in_halves(check, list(zip(items, captions, strict=True))) if items else []

    def _of_one(self, item: Item, first: dict[str, Chosen], drawn: dict[str, Chosen], counts: Counter[str]) -> Choice:
        try:
            if self.config.format == "folder" and self.config.folder_caption == "alt" and not item.alt_text:
                raise BadSample("no_alt_caption", "relabel.folder_caption asks for one")
            return {style: drawn.get(style) or self._settle(item, style, each, counts) for style, each in first.items()}
        except BadSample as error:
            return error

    def _settle(self, item: Item, style: str, chosen: Chosen, counts: Counter[str]) -> Chosen:
        """What becomes of a caption that was not drawn anew, or in vain. BadSample, where the sample is dropped."""
        found, checks = chosen.found.faults, self.config.checks
        what = action(found, checks, item.alt_text, drawn=True)
        if what == "drop":
            fault = next(each for each in found if action([each], checks, item.alt_text, drawn=True) == "drop")
            raise BadSample(f"caption_{fault}", f"the {style} caption: {', '.join(found)}")
        if what == "alt" and (own := self._of_alt_text(item.alt_text, style, chosen.found.scores)):
            counts[f"{style}/alt_text_kept"] += 1
            return Chosen(Caption(item.alt_text, True), own, {"text": "alt", "because": found})
        return chosen

    def _of_alt_text(self, alt_text: str, style: str, scores: dict[str, float]) -> Found | None:
        """What checks say of the alt-text; None where it is no better itself: no text, or CLIP prefers the caption."""
        own = faults(alt_text, True, style, self.styles[style].prompt, self.config.checks)
        if set(own) - {"too_short", "too_long"} or scores.get("alt_clip_score", 0) < scores.get("clip_score", 0):
            return None
        return Found(own, {"clip_score": scores["alt_clip_score"]} if "alt_clip_score" in scores else {})

    # --- captions that are drawn anew ---

    def _draw_anew(self, items: list[Item], first: dict[Place, Chosen]) -> dict[Place, Chosen]:
        """Of the captions that ask for it, the first draws without a fault."""
        left = [place for place, each in first.items()
                if action(each.found.faults, self.config.checks, items[place[0]].alt_text) == "resample"]
        drawn: dict[Place, Chosen] = {}
        for number in range(1, self.config.checks.max_resamples + 1):
            captions = self._draw(items, left, number)
            found = self._check([items[place] for place, _ in left], [
                {style: captions[place, style]} for place, style in left])
            drawn |= {place: Chosen(captions[place], each[place[1]], {"draw": number})
                      for place, each in zip(left, found, strict=True) if not each[place[1]].faults}
            left = [place for place in left if place not in drawn]
        return drawn

    def _draw(self, items: list[Item], places: list[Place], number: int) -> dict[Place, Caption]:
        """Captions drawn by lot, each the same whenever and beside whatever it is drawn."""
        by_style: dict[str, list[int]] = defaultdict(list)
        for place, style in places:
            by_style[style].append(place)
        drawn: dict[Place, Caption] = {}
        for style, some in by_style.items():
            draw = functools.partial(self._draw_batch, style, number)
            captions = in_halves(draw, [items[place] for place in some])
            drawn |= {(place, style): caption for place, caption in zip(some, captions, strict=True)}
        return drawn

    def _draw_batch(self, style: str, number: int, items: list[Item]) -> list[Caption]:
        draw = Draw(**self.styles[style].model_dump() | {"num_beams": 1}, temperature=self.config.checks.temperature,
                    seeds=[_seed(self.config.seed, item.sample.uid, style, number) for item in items])
        images = cast(list[Image.Image], [item.image for item in items])  # kept, where captions can be drawn anew
        return self.captioner.caption(self.captioner.encode(self.captioner.preprocess(images)), draw)


def _seed(*of: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, of)).encode()).digest()[:6])


def _actions(checks: Checks) -> set[str]:
    """All that may happen to a caption."""
    content = checks.model_dump()
    return {value for each in content.values() for value in (each.values() if isinstance(each, dict) else [each])
            if isinstance(value, str)}
