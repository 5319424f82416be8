"""Captions of shards before and after relabelling, for a person: in the terminal, or as one page that needs no network.

What is shown comes from the web. Characters that a terminal obeys are written out, a long text is cut and its length
said, and pictures are decoded as every stage decodes them.
"""

import base64
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2

from recap.caption_statistics import Caption, captions_of, draw, read_captions
from recap.chunks import split
from recap.clip_bpe import clip_tokenizer
from recap.errors import BadSample, UserError
from recap.sample import Sample
from recap.shards import Reject, expand
from recap.storage import write_bytes

COLUMNS = 80
"""Of a terminal; lines are never longer."""
FIRST, MOST = 480, 20_000
"""Characters of a text that are shown at once, and on a page after a click."""
THUMBNAIL, SMALL = 640, 128
"""Longest side of a picture on a page, in pixels; one up to `SMALL` is enlarged with its pixels kept sharp."""
MAX_NUM = 500
MAX_WAYS = 12
"""Ways in which captions were made, that a page lists."""
MARKS = "\u200c\u200d\u200e\u200f"
"""Invisible characters that scripts and emoji need; they move no more than their neighbours."""
BOLD, DIM, YELLOW = "1", "2", "33"


# --- which samples -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A sample with its captions."""

    sample: Sample
    captions: list[Caption]

    @property
    def flags(self) -> set[str]:
        return {flag for caption in self.captions for flag in caption.flags}

    @property
    def is_relabelled(self) -> bool:
        return any(caption.made is not None for caption in self.captions)


@dataclass
class Found:
    """Samples that were drawn or asked for, and what the shards hold."""

    shards: list[str]
    rows: list[Row] = field(default_factory=list)
    choice: str = ""
    """How many these are, and how they were chosen."""
    num_samples: int = 0
    num_relabelled: int = 0
    num_flagged: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    """Flag → samples with it."""
    rejects: list[Reject] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The shards, in words."""
        names = [plain(PurePosixPath(url).name) for url in self.shards]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    @property
    def notes(self) -> list[str]:
        """What else a reader should know of the shards."""
        notes = []
        if not self.num_relabelled:
            notes.append("Not relabelled: no sample has captions by a captioner.")
        elif self.num_relabelled < self.num_samples:
            notes.append(f"Only {self.num_relabelled:,} of {self.num_samples:,} samples are relabelled.")
        if self.num_flagged:
            notes.append(f"Samples with a flagged caption: {self.num_flagged:,} ({_counts(self.flags)}).")
        if self.rejects:
            reasons = Counter(reject.reason for reject in self.rejects)
            notes.append(f"Samples that cannot be read: {len(self.rejects):,} ({_counts(reasons)}).")
        return notes


def show(shards: list[str], num: int = 5, keys: list[str] | None = None, only_flagged: bool = False, seed: int = 0,
         page: Path | None = None, colour: bool = False) -> str:
    """What a terminal shows of samples of shards. With `page`, an HTML file shows them instead, with their pictures.

    Args:
        shards: tars, relabelled or not, or parquets of captions only; paths, URLs or patterns of them.
        num: of samples, drawn from all of them.
        keys: samples to show instead, from every shard that has them.
        only_flagged: draw from those of which a caption has a flag.
        seed: of the draw.
        page: where to write.
        colour: whether the terminal shows colours.

    Raises:
        UserError: there is no such shard, or no such sample; or the page can't be written.
    """
    found = find(expand(shards, "recap show"), num, keys or [], only_flagged, seed)
    if page is None:
        return "\n".join(terminal(found, colour))
    try:
        write_bytes(str(page), render(found).encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"recap show --page: cannot write {page} ({error.strerror or error}): name a file") from error
    return f"{page}: {found.choice}"


def find(shards: list[str], num: int, keys: list[str], only_flagged: bool, seed: int) -> Found:
    """Read shards, and keep the samples that are to be shown."""
    if not 0 < num <= MAX_NUM:
        raise UserError(f"recap show: {num} samples: ask for 1 to {MAX_NUM}")
    found = Found(shards)
    rows = ((row.sample.uid, row) for row in _rows(found) if not only_flagged or row.flags)
    if keys:
        found.rows = [row for _, row in rows if row.sample.key in keys]
        if missing := set(keys) - {row.sample.key for row in found.rows}:
            raise UserError(f"recap show: no sample {plain(min(missing))} in {found.name}: check the key, which is a "
                            "member's name up to the first dot")
        found.choice = f"{len(found.rows):,} of {found.num_samples:,} samples, as asked for"
    else:
        found.rows = draw(rows, num, seed)
        of = f"{found.num_flagged:,} flagged samples" if only_flagged else f"{found.num_samples:,} samples"
        found.choice = f"{len(found.rows):,} of {of}, drawn with seed {seed}"
    return found


def _rows(found: Found) -> Iterator[Row]:
    for url in found.shards:
        for sample in read_captions(url, found.rejects):
            row = Row(sample, captions_of(sample))
            found.num_samples += 1
            found.num_relabelled += row.is_relabelled
            found.num_flagged += bool(row.flags)
            found.flags.update(row.flags)
            yield row


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{plain(name)} {count:,}" for name, count in counter.most_common(10))


# --- what is shown of each -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """An image of a sample, or why there is none."""

    width: int = 0
    height: int = 0
    src: str = ""
    """A thumbnail as a data: URL."""
    fault: str = ""

    @property
    def size(self) -> str:
        return f"{self.width:,} × {self.height:,} pixels" if self.src else self.fault


@dataclass(frozen=True)
class Text:
    """A caption with what is said of it."""

    caption: Caption
    same_as: str = ""
    """Another kind with the same text, which a mix has."""

    @property
    def kind(self) -> str:
        return self.caption.kind

    @cached_property
    def whole(self) -> str:
        if self.caption.fault:
            return f"(cannot be read: {self.caption.fault})"
        return plain(self.caption.text) or "(nothing)"

    @cached_property
    def first(self) -> str:
        """Of a long text the beginning, up to white space where there is some near."""
        if len(self.whole) <= 1.2 * FIRST:
            return self.whole
        return self.whole[:max(self.whole.rfind(" ", FIRST // 2, FIRST), 0) or FIRST]

    @property
    def rest(self) -> str:
        return self.whole[len(self.first):].strip()

    @cached_property
    def facts(self) -> list[str]:
        """Tokens, windows, scores; nothing of a text that cannot be read."""
        if self.caption.fault:
            return []
        windows = split(self.caption.text, clip_tokenizer())
        tokens = f"{windows.num_tokens:,} token{'' if windows.num_tokens == 1 else 's'}"
        came = self.caption.made is None and self.kind not in ("alt", "mix")
        return [*(["came with the shard"] if came else []),
                f"{tokens} in {len(windows.ids)} windows" if len(windows.ids) > 1 else tokens,
                *(f"{plain(name)} {value:.4g}" for name, value in self.caption.scores.items())]

    @property
    def flags(self) -> list[str]:
        return [plain(flag) for flag in self.caption.flags]


@dataclass(frozen=True)
class View:
    """All that is shown of a sample."""

    key: str
    shard: str
    picture: Picture
    before: Text | None
    after: list[Text]
    others: list[Text]
    """Captions that the shard came with."""


def view(row: Row) -> View:
    by_text = {caption.text: caption.kind for caption in reversed(row.captions) if caption.made is not None}
    texts = [Text(caption, by_text.get(caption.text, "") if caption.kind == "mix" else "") for caption in row.captions]
    after = [text for text in texts if text.caption.made is not None or (text.kind == "mix" and row.is_relabelled)]
    others = [text for text in texts if text not in after and text.kind != "alt"]
    return View(plain(row.sample.key), plain(row.sample.shard), picture(row.sample),
                next((text for text in texts if text.kind == "alt"), None), after, others)


def picture(sample: Sample) -> Picture:
    try:
        image = sample.image()
    except BadSample as error:
        only_captions = "no picture: these are captions only"
        return Picture(fault=only_captions if error.reason == "missing_image" else f"no picture: {error.reason}")
    width, height = image.size
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    kind = "png" if max(image.size) <= SMALL else "jpeg"  # JPEG blurs what is small
    image.save(out := io.BytesIO(), kind)
    return Picture(width, height, f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}")


def plain(text: str) -> str:
    r"""One line of characters that a reader sees; others as Python writes them (`\x1b`, `\u202e`), at most `MOST`."""
    cut = f"… and {len(text) - MOST:,} more characters" if len(text) > MOST else ""
    return "".join(c if c.isprintable() or c in MARKS else c.encode("unicode_escape").decode()
                   for c in text[:MOST]) + cut


# --- in the terminal -----------------------------------------------------------------------------------------------


def terminal(found: Found, colour: bool) -> Iterator[str]:
    """Lines of at most `COLUMNS` columns."""
    def paint(text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if colour else text

    for line in wrap(f"{found.name}: {found.choice}", COLUMNS):
        yield paint(line, BOLD)
    for note in found.notes:
        yield from wrap(note, COLUMNS)
    for each in map(view, found.rows):
        yield ""
        for line in wrap(f"{each.shard}/{each.key} · {each.picture.size}", COLUMNS):
            yield paint(line, BOLD)
        texts = [("before", each.before), *((text.kind, text) for text in each.after),
                 *((text.kind, text) for text in each.others)]
        margin = max(min(12, width(plain(name))) for name, _ in texts) + 4
        for name, text in texts:
            yield from _entry(name, text, margin, paint)
    yield ""


def _entry(name: str, text: Text | None, margin: int, paint: Any) -> Iterator[str]:
    """A caption behind its kind, with what is said of it below."""
    label = name if len(name) <= 12 else f"{name[:11]}…"
    if text is None:
        yield paint(f"  {label:<{margin - 2}}(alt-text is not in it)", DIM)
        return
    if text.same_as:
        yield paint(f"  {label:<{margin - 2}}the same as {text.same_as[:40]}", DIM)
        return
    more = f" … and {len(text.rest):,} more characters" if text.rest else ""
    for number, line in enumerate(wrap(text.first + more, COLUMNS - margin)):
        yield paint(f"  {label:<{margin - 2}}" if number == 0 else " " * margin, DIM) + line
    for line in wrap(" · ".join(text.facts), COLUMNS - margin):
        yield " " * margin + paint(line, DIM)
    for line in wrap(f"flags: {', '.join(text.flags)}" if text.flags else "", COLUMNS - margin):
        yield " " * margin + paint(line, YELLOW)


def wrap(text: str, columns: int) -> list[str]:
    """A text in lines of at most so many columns: between words, and inside a word that fills a line. None if empty."""
    lines, line = [], ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if width(joined) <= columns:
            line = joined
            continue
        lines += [line] if line else []
        line = ""
        for letter in word:
            if width(line + letter) > columns:
                lines.append(line)
                line = ""
            line += letter
    return [*lines, line] if line else lines


def width(text: str) -> int:
    """Columns of a terminal that a text takes: wide characters two, those that join the one before none."""
    return sum(0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(c) in "WF")
               for c in text)


# --- as a page -----------------------------------------------------------------------------------------------------


def render(found: Found) -> str:
    """The page, whole in itself; every text is escaped."""
    return _template().render(found=found, views=list(map(view, found.rows)), ways=ways(found.rows), small=SMALL)


def ways(rows: list[Row]) -> list[dict[str, str]]:
    """How the captions that are shown were made, each way once: `style`, `captioner`, `prompt`, `decoding`, …"""
    made = [{"style": caption.kind} | {name: said(value) for name, value in caption.made.items() if value}
            for row in rows for caption in row.captions if caption.made is not None]
    return list({json.dumps(way): way for way in made}.values())[:MAX_WAYS]


def said(value: Any) -> str:
    """A value of a record, as a line of text of at most 400 characters."""
    if isinstance(value, dict):
        value = ", ".join(f"{name} {json.dumps(each)}" for name, each in value.items())
    text = plain(value if isinstance(value, str) else json.dumps(value))
    return text if len(text) <= 400 else f"{text[:400]}…"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("recap", "."), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True)
    return environment.get_template("show.html")
