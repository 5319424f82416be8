"""What becomes of captions that checks find at fault."""

from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image

from recap.caption_checks import CaptionChecks, Found
from recap.captioners.text import Caption, Lot
from recap.choosing import MAX_KEPT_SIDE, Chooser, Chosen, Item
from recap.config import Draw, Style
from recap.config.relabel import Checks, ClipCheck, Relabel
from recap.errors import BadSample
from recap.sample import Sample

STYLES = {"short": Style(prompt="A short caption:", max_new_tokens=6),
          "long": Style(prompt="In detail:", max_new_tokens=9)}
GOOD = Caption("A brown dog runs along a beach.", True)


class Drawing:
    """A captioner whose draws say which seeds they had, and are fine from a given number on."""

    def __init__(self, fine_from: int = 1) -> None:
        self.fine_from, self.calls = fine_from, []  # type: int, list[tuple[int, list[int]]]

    def preprocess(self, images: list[Image.Image]) -> Any:
        return images

    def encode(self, pixels: Any) -> Any:
        return pixels

    def caption(self, features: Any, style: Style) -> list[Caption]:
        assert isinstance(style, Draw) and len(features) == len(style.seeds) and style.num_beams == 1
        self.calls.append((len(features), style.seeds))
        is_fine = len(self.calls) >= self.fine_from
        return [Caption(f"A dog numbered {seed} sits on a chair.", is_fine) for seed in style.seeds]


def chooser(captioner: Any = None, **checks: Any) -> Chooser:
    config = Relabel(checks=Checks(**checks))
    return Chooser(config, STYLES, captioner, CaptionChecks(config.checks, STYLES, "cpu"))


def item(key: str, alt_text: str = "a dog on a beach", image: Image.Image | None = None) -> Item:
    return Item(Sample("00000", key, {"txt": alt_text.encode()}), image or Image.new("RGB", (8, 8)), 0, {})


def chosen(found: Any) -> dict[str, Chosen]:
    assert isinstance(found, dict)
    return found


def test_a_dropped_sample_is_counted_under_the_fault_that_drops_it() -> None:
    counts: Counter[str] = Counter()
    found = chooser(too_short="flag", not_ended="drop").choose([item("a")], [{"short": Caption("Dog", False)}], counts)
    assert isinstance(found[0], BadSample) and found[0].reason == "caption_not_ended"
    assert counts == {"short/too_short": 1, "short/not_ended": 1}


@pytest.mark.parametrize(("alt_text", "is_taken"), [
    ("red shoe", True), ("IMG_1234.jpg", False), ("", False), ("buy buy buy buy buy buy buy buy", False)])
def test_the_alt_text_takes_the_place_only_if_it_is_a_text(alt_text: str, is_taken: bool) -> None:
    counts: Counter[str] = Counter()
    cut = Caption("A dog and a", False)
    found = chosen(chooser(not_ended="alt").choose([item("a", alt_text)], [{"long": cut}], counts)[0])["long"]
    if is_taken:
        assert found.caption == Caption(alt_text, True) and found.found.faults == ["too_short"]
        assert found.instead == {"text": "alt", "because": ["too_short", "not_ended"]}
    else:
        assert found.caption == cut and "not_ended" in found.found.faults and not found.instead
    assert counts["long/alt_text_kept"] == is_taken


@pytest.mark.parametrize(("alt_score", "is_taken"), [(21.0, True), (19.0, False)])
def test_alt_text_that_clip_likes_less_does_not(alt_score: float, is_taken: bool,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    own = chooser()
    own.config = Relabel(checks=Checks(clip_score=ClipCheck(threshold=25, action="alt")))
    scores = {"clip_score": 20.0, "alt_clip_score": alt_score}
    monkeypatch.setattr(own.checks, "check", lambda *_: [{"short": Found(["low_clip_score"], scores)}])
    found = chosen(own.choose([item("a")], [{"short": GOOD}], Counter())[0])["short"]
    assert (found.caption.text == "a dog on a beach") is is_taken
    assert found.found.scores == ({"clip_score": 21.0} if is_taken else scores)


def test_captions_are_drawn_anew_together_and_no_longer_than_needed() -> None:
    captioner, counts = Drawing(fine_from=2), Counter[str]()
    cut = Caption("A dog and a", False)
    captions = [{"short": cut, "long": GOOD}, {"short": GOOD, "long": GOOD}, {"short": cut, "long": GOOD}]
    items = [item(key) for key in "abc"]
    found = [chosen(each) for each in chooser(captioner, not_ended="resample", max_resamples=5).choose(
        items, captions, counts)]
    assert [number for number, _ in captioner.calls] == [2, 2]
    assert [each["short"].instead for each in found] == [{"draw": 2}, {}, {"draw": 2}]
    assert counts == {"short/not_ended": 2, "short/resampled": 2}
    alone = Drawing(fine_from=2)
    again = chooser(alone, not_ended="resample", max_resamples=5).choose(items[2:], captions[2:], Counter())
    assert chosen(again[0]) == found[2]  # whatever it is drawn beside


def test_where_every_draw_is_at_fault_something_else_happens() -> None:
    cut = Caption("A dog and a", False)
    for otherwise, expected in (("flag", cut.text), ("alt", "a dog on a beach")):
        own = chooser(Drawing(fine_from=99), not_ended="resample", otherwise=otherwise)
        assert chosen(own.choose([item("a")], [{"short": cut}], Counter())[0])["short"].caption.text == expected
    own = chooser(Drawing(fine_from=99), not_ended="resample", otherwise="drop")
    assert isinstance(own.choose([item("a")], [{"short": cut}], Counter())[0], BadSample)


def test_no_more_is_kept_of_an_image_than_checks_need() -> None:
    large = Image.new("RGB", (5000, 100))
    assert chooser().keep(large) is None
    own = chooser(repetition="resample")
    kept, small = own.keep(large), Image.new("RGB", (20, 20))
    assert kept is not None and kept.size == (MAX_KEPT_SIDE, 41) and own.keep(small) is small
    assert large.size == (5000, 100)


def test_a_lot_draws_from_the_softmax_and_from_no_other_row() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    rule = Lot(0.5, list(range(20_000)))
    drawn = rule(torch.zeros(20_000, 1, dtype=torch.long), logits.expand(20_000, 4)).argmax(-1)  # type: ignore[arg-type]
    shares = torch.bincount(drawn, minlength=4) / 20_000
    assert torch.allclose(shares, (logits / 0.5).softmax(0), atol=0.01)
    for rows in ([3], [3, 4, 5]):
        few = Lot(0.5, rows)
        steps = [few(torch.zeros(len(rows), 1, dtype=torch.long), logits.expand(len(rows), 4))[0]  # type: ignore[arg-type]
                 for _ in range(3)]
        again = Lot(0.5, [3])
        assert all(torch.equal(step, again(torch.zeros(1, 1, dtype=torch.long), logits[None])[0])  # type: ignore[arg-type]
                   for step in steps)
