"""The data card of a relabelled set: what is in it, how it was made, and what is known of its captions.

`README.md`, as the Hugging Face hub shows it, and `statistics.json` with all figures, both beside the shards. Captions
come from the web: on the card they are text, whatever they hold.
"""

import datetime
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from recap import __version__
from recap.caption_statistics import (
    BINS,
    MAX_COMPARED,
    SCHEMA,
    WINDOW,
    CaptionStatistics,
    captions_of,
    closeness,
    draw,
    draw_captions,
    of_shard,
    partial_file,
    read_captions,
)
from recap.errors import UserError
from recap.shard_work import ahead, total
from recap.shards import expand
from recap.show import Row, Text, plain, ways
from recap.storage import exists, open_seekable, read_bytes, write_bytes, write_json

NUM_EXAMPLES = 5
NUM_READ = 32
"""Small files at a time; a set has several for each shard."""
SETTINGS = ("captioner", "styles", "relabel")
"""Tables of the experiment that a card shows; what else the stage read is inputs' names, sizes and hashes."""
MARKDOWN = re.compile(r"([\\`*_\[\]|~$@]|:(?=//|[\w+-]+:)|(?<=www)\.)", re.IGNORECASE)
"""What means something within a line: emphasis, code, links, cells, formulas, mentions, emoji by name, addresses."""


@dataclass(frozen=True)
class Content:
    """What a card is made of."""

    shards: list[str]
    result: dict[str, Any]
    """`images_in`, `images_out`, `quarantined` (reason → images), and other counts."""
    settings: dict[str, Any]
    """The experiment's tables, JSON-like."""
    versions: dict[str, str]
    """Of what captioned it."""
    statistics: dict[str, dict[str, Any]]
    """As `CaptionStatistics.summary` gives them."""
    examples: list[Row]
    closeness: dict[str, Any] | None = None
    """As `recap.caption_statistics.closeness` gives it."""
    date: datetime.date = field(default_factory=datetime.date.today)

    @property
    def is_captions_only(self) -> bool:
        return all(url.endswith(".parquet") for url in self.shards)


# --- making one ----------------------------------------------------------------------------------------------------


def make_card(folder: str, reference: str | None = None, kind: str | None = None, clip: str | None = None,
              device: str = "cpu") -> str:
    """Write the card of a finished set anew, from its shards, their stats, and `done.json` and `config.json`, if there.

    Args:
        folder: path or URL.
        reference: captions to compare with, see `read_reference`.
        kind: of caption, where the reference is shards.
        clip: an open_clip model whose text encoder compares them, as `eval.clip_score.ClipScorer` takes it.
        device: of that model.

    Returns:
        Where the card is.

    Raises:
        UserError: the set is not finished, or there is nothing to compare with.
    """
    folder = folder.rstrip("/")
    shards = _shards(folder)
    urls = [url.removesuffix(PurePosixPath(url).suffix) + "_stats.json" for url in shards]
    stats = list(ahead(_read_json, urls, NUM_READ))
    if None in stats:
        raise UserError(f"{shards[stats.index(None)]} has no stats, so the set is not finished: run the same "
                        "`recap relabel` again first")
    result = _read_json(f"{folder}/done.json") or total([found for found in stats if found])
    settings = (_read_json(f"{folder}/config.json") or {}).get("reads", {})
    compared = compare(shards, reference, kind, clip, device) if reference or clip else None
    return write_card(folder, shards, result, settings, result.get("versions", {}), compared)


def write_card(folder: str, shards: list[str], result: dict[str, Any], settings: dict[str, Any],
               versions: dict[str, str], compared: dict[str, Any] | None = None) -> str:
    """Write `README.md` and `statistics.json` of a set whose shards are all there; where the first is.

    Args:
        folder: path or URL.
        shards: the relabelled ones, tars or parquets.
        result: of the stage.
        settings: what the stage read; of it the experiment's tables are shown.
        versions: of Python and packages, as they captioned the set.
        compared: closeness to reference captions.
    """
    examples = _examples(shards)
    kinds = dict.fromkeys(caption.kind for row in examples for caption in row.captions)
    statistics = statistics_of(shards, list(kinds)).summary()
    counts = {name: value for name, value in result.items() if name not in ("fingerprint", "versions")}
    write_json(f"{folder}/statistics.json", {"schema": SCHEMA, "images": counts, "captions": statistics,
                                             "closeness": compared})
    content = Content(shards, counts, {name: settings[name] for name in SETTINGS if name in settings}, versions,
                      statistics, examples, compared)
    write_bytes(f"{folder}/README.md", card(content).encode("utf-8", "replace"))
    return f"{folder}/README.md"


def statistics_of(shards: list[str], kinds: list[str]) -> CaptionStatistics:
    """Statistics of a set's captions: what was counted with each shard, and where it was not, what is read now."""
    whole = CaptionStatistics(kinds)
    for url, found in zip(shards, ahead(_read_json, map(partial_file, shards), NUM_READ), strict=True):
        whole.merge(CaptionStatistics.from_partial(found) if found and found.get("schema") == SCHEMA
                    else of_shard(url, kinds))
    return whole


def compare(shards: list[str], reference: str | None, kind: str | None, clip: str | None, device: str
            ) -> dict[str, Any]:
    """How close the captions of a set come to reference captions."""
    if not reference or not clip:
        raise UserError("closeness to other captions needs both --reference and --clip: give both, or neither")
    from eval.clip_score import ClipScorer
    first = next(iter(_examples(shards)), None)
    kinds = [caption.kind for caption in first.captions if caption.text] if first else []
    try:
        scorer = ClipScorer(clip, device)
    except ValueError as error:
        raise UserError(f"--clip: {error}") from error
    return {"reference": PurePosixPath(reference).name} | closeness(
        draw_captions(shards, kinds), read_reference(reference, kind), scorer)


def read_reference(path: str, kind: str | None) -> list[str]:
    """Reference captions in a drawn order, as many as `closeness` can use.

    Args:
        path: a text file (`.txt`) with a caption a line; or shards, a path, URL or pattern.
        kind: of caption, in shards.
    """
    if path.endswith(".txt"):
        if not exists(path):
            raise UserError(f"--reference: nothing at {path}: check the path")
        with io.TextIOWrapper(open_seekable(path), encoding="utf-8", errors="replace") as file:
            lines = ((f"{place}", " ".join(line.split())) for place, line in enumerate(file) if line.strip())
            return draw(lines, 2 * MAX_COMPARED)
    if not kind:
        raise UserError("--reference names shards: say with --kind which of their captions, e.g. alt")
    return draw_captions(expand(path, "--reference"), [kind], 2 * MAX_COMPARED)[kind]


def _shards(folder: str) -> list[str]:
    for pattern in (f"{folder}/*.tar", f"{folder}/*.parquet"):
        try:
            return expand(pattern, "recap card")
        except UserError:
            continue
    raise UserError(f"recap card: no .tar and no .parquet in {folder}: name the folder that `recap relabel` wrote to")


def _examples(shards: list[str]) -> list[Row]:
    """Relabelled samples of one shard, drawn; no others are read for it."""
    for url in draw(((url.rsplit("/", 1)[-1], url) for url in shards), len(shards)):
        rows = (Row(sample, captions_of(sample)) for sample in read_captions(url, []))
        if found := draw(((row.sample.uid, row) for row in rows if row.is_relabelled), NUM_EXAMPLES):
            return found
    return []


def _read_json(url: str) -> dict[str, Any] | None:
    """An object of a file of ours, or None where there is none."""
    if not exists(url):
        return None
    try:
        found = json.loads(read_bytes(url))
    except ValueError as error:
        raise UserError(f"{url} is damaged ({error}): delete it, and run the same `recap relabel` again") from error
    return found if isinstance(found, dict) else None


# --- what it says --------------------------------------------------------------------------------------------------


def card(content: Content) -> str:
    """The card, as Markdown."""
    num, examples = content.result.get("images_out", 0), content.examples
    parts = [
        _front_matter(content, num),
        "# Relabelled images",
        _about(content, num),
        "## Loading", _loading(content),
        "## How it was made", *_made(content),
        "## Images", _images(content.result),
        "## Captions", _figures(content.statistics),
        "Words of a caption, and the share of captions that have so many:", _histogram(content.statistics),
        *_closeness(content.closeness),
        "## Checks", _checks(content),
        "## Examples", f"From {escape(examples[0].sample.shard)}, drawn and not picked." if examples else "None.",
        *map(_example, examples),
        "## Limits", LIMITS,
        "## Rights", RIGHTS,
        f"Card written by Recap {__version__} on {content.date.isoformat()}; all figures are in `statistics.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def _about(content: Content, num: int) -> str:
    kinds = {caption.kind: caption.made is not None for row in content.examples for caption in row.captions}
    made = ", ".join(escape(kind) for kind, is_made in kinds.items() if is_made)
    others = ", ".join(escape(kind) for kind, is_made in kinds.items() if not is_made and kind not in ("alt", "mix"))
    return (f"{num:,} images in {_shard_names(content.shards)}. "
            + (f"A model captioned them in the styles {made}; nobody has read all that it wrote. " if made else "")
            + ("`mix` is one of these, drawn for each image. " if "mix" in kinds else "")
            + (f"The shards came with captions of other kinds: {others}. " if others else "")).strip()


LIMITS = f"""- Captions hold their model's errors: things that are not there, wrong numbers, colours and places, and the
  prejudices of what it was trained on. Flags say what was checked; no flag does not mean right.
- Alt-text is as the web had it, and says of its picture what it says.
- Readability is by formulas made for English prose and by spelling, so it compares kinds of captions here, no more.
- Different words and distinct-2 hang on the number of captions; the moving-average type–token ratio, over {WINDOW}
  words in a row, does not."""
RIGHTS = """Images, alt-text and metadata are the input's own, and so are the rights in them. No licence is stated here,
because none is known: before you share this set, find out under which terms its images may be shared, and say so."""


def escape(text: str, limit: int = 600) -> str:
    """Text within a line, which Markdown shows as it is: not as markup, HTML, a link or a formula."""
    text = plain(text)
    text = text if len(text) <= limit else f"{text[:limit]} … and {len(text) - limit:,} more characters"
    text = MARKDOWN.sub(r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers, in all columns but the first, to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _front_matter(content: Content, num: int) -> str:
    pattern = "*.parquet" if content.is_captions_only else "*.tar"
    return ("---\nannotations_creators:\n- machine-generated\ntask_categories:\n- text-to-image\n- image-to-text\n"
            f"size_categories:\n- {size_category(num)}\ntags:\n- synthetic-captions\n- recaptioned\n"
            f'configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: "{pattern}"\n---')


def size_category(num: int) -> str:
    """The hub's word for so many samples: `n<1K`, `1K<n<10K`, … `n>1T`."""
    ends = [f"{factor}{unit}" for unit in "KMB" for factor in (1, 10, 100)] + ["1T"]
    for place, end in enumerate(ends):
        if num < 1000 * 10**place:
            return f"{ends[place - 1]}<n<{end}" if place else f"n<{end}"
    return f"n>{ends[-1]}"


def _shard_names(shards: list[str]) -> str:
    names = [escape(PurePosixPath(url).name) for url in shards]
    return f"{len(names):,} shards, {names[0]} to {names[-1]}" if len(names) > 1 else f"one shard, {names[0]}"


def _loading(content: Content) -> str:
    named = next((caption.kind for row in content.examples for caption in row.captions if caption.made), "short")
    if content.is_captions_only:
        return ("A row holds an image's `key`, which is its key in the shard of the same name, and a column for each "
                "kind of caption.\n\n    from datasets import load_dataset\n"
                '    captions = load_dataset("parquet", data_files="*.parquet", split="train")\n'
                f'    captions[0]["key"], captions[0]["{named}"]')
    image = next((row.sample.image_extension for row in content.examples), "jpg")
    return ("Every image has its file, alt-text (`txt`) and metadata (`json`) as they came, a caption of each kind "
            "(`KIND.txt`), and `recap.json`, which says how each caption was made.\n\n"
            "    from datasets import load_dataset\n"
            '    samples = load_dataset("webdataset", data_files="*.tar", split="train", streaming=True)\n\n'
            "    from glob import glob\n    import webdataset\n"
            '    samples = webdataset.WebDataset(sorted(glob("*.tar")), shardshuffle=False).decode("pil")\n\n'
            f'    for sample in samples:\n        sample["{image}"], sample["txt"], sample["{named}.txt"]')


def _made(content: Content) -> Iterator[str]:
    made = ways(content.examples)
    names = list(dict.fromkeys(name for way in made for name in way))
    if made:
        yield "As the examples' records say:"
        yield "\n".join(f"| {' | '.join(line)} |" for line in (
            names, ["---"] * len(names), *([escape(way.get(name, "")) for name in names] for way in made)))
    if content.versions:
        yield f"With {', '.join(escape(f'{name} {value}') for name, value in content.versions.items())}."
    if content.settings:
        # In a block of code nothing is markup, and JSON in ASCII has no line ends of its own.
        text = json.dumps(content.settings, indent=2)
        yield "Settings:"
        yield "\n".join(f"    {line}" for line in text.splitlines())


def _images(result: dict[str, Any]) -> str:
    rows = [["read", f"{result.get('images_in', 0):,}"], ["captioned", f"{result.get('images_out', 0):,}"]]
    quarantined = sorted(result.get("quarantined", {}).items(), key=lambda pair: -pair[1])
    return _table(["images", "number"], rows + [[f"quarantined: {escape(reason)}", f"{count:,}"]
                                                for reason, count in quarantined])


def _figures(statistics: dict[str, dict[str, Any]]) -> str:
    def numbers(name: str, spell: str) -> list[str]:
        return [_spelt(found[name], spell, name in found["estimated"]) for found in statistics.values()]

    def spread(name: str) -> list[str]:
        return [f"{found[name]['median']:.4g} ({found[name]['p5']:.4g} to {found[name]['p95']:.4g})"
                for found in statistics.values()]

    def means(name: str) -> list[str]:
        return [f"{found[name]['mean']:,.1f}" for found in statistics.values()]

    rows = {
        "captions": numbers("num_captions", ",d"), "of which without words": numbers("num_empty", ",d"),
        "words, mean": means("words"), "words, median (5 to 95 of 100)": spread("words"),
        "CLIP tokens, mean": means("clip_tokens"), "CLIP tokens, median (5 to 95 of 100)": spread("clip_tokens"),
        "longer than CLIP reads (77 tokens)": numbers("share_over_77", ".1%"),
        "different words": numbers("vocabulary", ",d"),
        f"type–token ratio over {WINDOW} words": numbers("mattr", ".3f"),
        "different pairs of words, of all (distinct-2)": numbers("distinct_2", ".3f"),
        "the same as another image's": numbers("share_repeated", ".1%"),
        "Flesch reading ease": numbers("reading_ease", ".1f"),
        "Flesch–Kincaid grade": numbers("grade", ".1f"),
        "not ended": numbers("share_not_ended", ".1%"),
    }
    return _table(["", *map(escape, statistics)], [[name, *cells] for name, cells in rows.items()])


def _spelt(value: float | None, spell: str, estimated: bool) -> str:
    return "–" if value is None else f"{'about ' if estimated else ''}{value:{spell}}"


def _histogram(statistics: dict[str, dict[str, Any]]) -> str:
    ends = [*(f"{start} to {end - 1}" for start, end in pairwise(BINS)), f"{BINS[-1]} or more"]
    rows = []
    for start, name in zip(BINS, ends, strict=True):
        counts = [found["words"]["histogram"][str(start)] for found in statistics.values()]
        if any(counts):
            rows.append([name, *(f"{count / found['num_captions']:.1%}" if count else ""
                                 for count, found in zip(counts, statistics.values(), strict=True))])
    return _table(["words", *map(escape, statistics)], rows)


def _closeness(found: dict[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    yield "## Closeness to other captions"
    yield (f"{found['num_captions']:,} captions of each kind against as many of {escape(found['reference'])}, as the "
           f"text encoder of {escape(found['model'])} sees them. In the last row is the reference's other half: as "
           "close as captions can come. Distances compare at this number of captions only.")
    yield _table(["captions", "Fréchet distance", "MMD²", "read in part by CLIP"],
                 [[escape(kind), f"{each['frechet']:.4f}", f"{each['mmd2']:.5f}", f"{each['num_cut']:,}"]
                  for kind, each in found["kinds"].items()])


def _checks(content: Content) -> str:
    """What was checked, what happened to captions at fault, and how many of each kind have the flag."""
    checks = content.settings.get("relabel", {}).get("checks") or {}
    actions = {name: value.get("action", "") if isinstance(value, dict) else value for name, value in checks.items()
               if isinstance(value, dict | str) and name not in ("words", "otherwise")}
    checked = {kind: found for kind, found in content.statistics.items() if found["num_checked"]}
    flags = dict.fromkeys([*actions, *(flag for found in checked.values() for flag in found["flags"])])
    rows = [[escape(flag), escape(str(actions.get(flag, ""))),
             *(f"{found['flags'].get(flag, 0):,} ({found['flags'].get(flag, 0) / found['num_checked']:.2%})"
               for found in checked.values())] for flag in flags]
    return _table(["flag", "what happens", *map(escape, checked)], rows) if rows else "No caption has a flag."


def _example(row: Row) -> str:
    texts = [Text(caption) for caption in row.captions if caption.kind == "alt" or caption.made is not None]
    lines = [f"| {'before: alt-text' if text.kind == 'alt' else escape(text.kind)} | {escape(text.whole)} |"
             for text in texts]
    return "\n".join([f"| {escape(row.sample.uid)} | |", "| --- | --- |", *lines])
