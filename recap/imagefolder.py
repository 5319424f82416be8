"""Stitched shards → a Hugging Face imagefolder beside them: images, metadata.jsonl, and a data card.

    load_dataset("runs/NAME/stitch/imagefolder")

The card says that all of it is one split. Without that, datasets takes a shard named train-00000, or a key with "test"
in it, for a split, and drops the captions.
"""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from recap.errors import BadSample
from recap.sample import Sample
from recap.shards import read_shard

MAX_NAME = 200
"""Bytes of a file's name, which many file systems bound."""
SETTINGS_APART = ("model", "checkpoint", "revision")


@dataclass
class Style:
    """What is counted of the captions of one style."""

    lengths: Counter[int] = field(default_factory=Counter)
    """Words of a caption → number of captions."""
    words: set[str] = field(default_factory=set)

    def add(self, caption: str) -> None:
        words = caption.lower().split()
        self.lengths[len(words)] += 1
        self.words.update(word.strip(".,;:!?“”\"'()") for word in words)

    def row(self, name: str) -> str:
        total = self.lengths.total()
        mean = sum(length * count for length, count in self.lengths.items()) / total
        return f"| {name} | {mean:.1f} | {self._quantile(0.05)} to {self._quantile(0.95)} | {len(self.words):,} |"

    def _quantile(self, share: float) -> int:
        lengths = sorted(self.lengths.elements())
        return lengths[round(share * (len(lengths) - 1))]


def write_imagefolder(out: Path, shards: list[Path], styles: list[str], about: dict[str, Any]) -> None:
    """Write the folder whole, or not at all.

    Args:
        out: the folder.
        shards: with `KEY.STYLE.txt` for every style.
        styles: the captions' columns; `alt` is added where a sample has alt-text.
        about: `result` of the stage, `experts` (name → provenance), `writer` (provenance), `prompt` (or empty).
    """
    half = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    counted = {style: Style() for style in styles}
    with (half / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for shard in shards:
            for sample in read_shard(str(shard), []):
                row = {"file_name": _write_image(half, sample), **_captions(sample, styles)}
                metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
                for style in styles:
                    counted[style].add(row[style])
    (half / "README.md").write_text(card(counted, about), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    half.rename(out)


def _captions(sample: Sample, styles: list[str]) -> dict[str, str]:
    """Style → caption, and the alt-text where there is one that can be read."""
    captions = {style: sample.caption(style) or "" for style in styles}
    try:
        alt = sample.caption("alt")
    except BadSample:
        alt = None
    return captions | ({"alt": alt} if alt else {})


def _write_image(folder: Path, sample: Sample) -> str:
    """Write the encoded image; its name, which is the key's as far as a file can bear it."""
    name = quote(sample.key, safe="")
    if len(name) > MAX_NAME:
        name = hashlib.sha256(sample.key.encode()).hexdigest()
    path = f"{sample.shard}/{name}.{sample.image_extension.lower()}"
    (folder / sample.shard).mkdir(exist_ok=True)
    (folder / path).write_bytes(sample.image_bytes)
    return path


# --- the data card -------------------------------------------------------------------------------------------------


def card(counted: dict[str, Style], about: dict[str, Any]) -> str:
    """Markdown, as the Hugging Face hub shows it."""
    result, experts, writer = about["result"], about["experts"], about["writer"]
    who = "a template" if writer["name"] == "template" else f"the chat model `{writer['model']}`"
    parts = [
        "---\nlanguage: en\ntask_categories:\n- image-to-text\n- text-to-image\ntags:\n- stitched-captions\n"
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: \"**\"\n---",
        "# Stitched captions",
        f"{result['images_out']:,} images, with captions in the styles {', '.join(counted)} that {who} wrote from "
        f"what {_number(len(experts))} found in each. Nobody has read them: they hold these models' errors.",
        "## Images", _images(result),
        "## Captions", "| style | words, mean | 5 to 95 of 100 captions | different words |\n|---|---|---|---|\n"
                       + "\n".join(style.row(name) for name, style in counted.items()),
        "## Experts", "| expert | checkpoint | revision | settings |\n|---|---|---|---|\n"
                      + "\n".join(_expert(name, provenance) for name, provenance in experts.items()),
        "## Writer", _writer(writer, result),
    ]
    if about["prompt"]:
        parts += ["## Prompt", "\n".join(f"    {line}".rstrip() for line in about["prompt"].splitlines())]
    parts.append("Images and alt-text are the shards' own, and so are the rights in them.")
    return "\n\n".join(parts) + "\n"


def _number(count: int) -> str:
    return "one model or source" if count == 1 else f"{count} models or sources"


def _images(result: dict[str, Any]) -> str:
    lost = ", ".join(f"{count} {reason}" for reason, count in result["quarantined"].items()) or "none"
    return (f"- read: {result['images_in']:,}\n- captioned: {result['images_out']:,}\n- quarantined: {lost}\n"
            f"- of which no expert knew anything: {result['nothing_seen']:,}")


def _expert(name: str, provenance: dict[str, Any]) -> str:
    checkpoint = provenance.get("model") or provenance.get("checkpoint") or ""
    settings = ", ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in provenance.items()
                         if key not in SETTINGS_APART)
    cells = [name, checkpoint, provenance.get("revision") or "", settings]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _writer(writer: dict[str, Any], result: dict[str, Any]) -> str:
    lines = [f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in writer.items()]
    if "requests" in result:
        done, flags = result["images_out"], dict(result["flags"])
        share = result["ungrounded"] / done if done else 0.0
        lines += [
            f"- images whose captions state something that no expert saw: {result['ungrounded']:,} ({share:.1%})",
            f"- written anew after a bad answer: {flags.pop('rewritten', 0):,}",
            f"- by the template, after two bad answers: {flags.pop('template', 0):,}"
            + "".join(f"; {problem} {count:,}" for problem, count in flags.items()),
            f"- requests: {result['requests']:,}; tokens: {result['prompt_tokens']:,} in, "
            f"{result['completion_tokens']:,} out; cost: {result['cost']:g}",
            f"- requests that may have been paid for without an answer: {result['possible_double_payments']:,}",
        ]
    return "\n".join(lines)
