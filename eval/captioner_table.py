"""Captioners side by side: for the terminal, and on a page with pictures."""

import textwrap
from functools import cache
from typing import Any

import jinja2

from eval.captioner_scores import FACTS, Scored
from eval.captions import LONG
from recap.sheet import thumbnail

WIDTH = 18
"""Of a captioner's name in the terminal."""
TUNED = {"here": "–", "before": "before", "no": "–"}
"""What stands instead of the seconds of tuning."""
EXTRAS = {"METEOR": "meteor", "SPICE": "spice", "CLIPScore": "clipscore_hessel", "RefCLIPScore": "ref_clipscore"}


def table(result: dict[str, Any]) -> str:
    """The table for the terminal, at most 80 columns wide."""
    rows = result["captioners"]
    lines = [f"{'':<{WIDTH}}{'parameters':>13}{'trained':>13}{'tuned in':>11}{'images/s':>11}{'steps':>9}"]
    for row in rows:
        seconds, rate, steps = row["training_seconds"], row["training_images_per_second"], row["steps"]
        lines.append(f"{row['name'][:WIDTH - 1]:<{WIDTH}}{_count(row['parameters']):>13}"
                     f"{_count(row['trainable_parameters']):>13}"
                     f"{f'{seconds:.0f} s' if seconds else TUNED[row['tuned']]:>11}"
                     f"{f'{rate:.1f}' if rate else '–':>11}{_count(steps):>9}")
    for style in dict.fromkeys(style for row in rows for style in row["styles"]):
        lines += ["", f"{style:<{WIDTH}}{'CIDEr-D':>22}{'BLEU-4':>8}{'words':>7}{'of ref.':>9}{'ended':>7}{'found':>7}"]
        lines += [_style_row(row, style) for row in rows if style in row["styles"]]
    if any(row["downstream"] for row in rows):
        lines += ["", *_downstream_rows(rows)]
    notes = [f"CIDEr-D with its 95 % interval over images; * differs from {result['baseline']}, p < 0.05 (Holm).",
             "of ref.: length against the references. found: facts that a judge finds stated.", *_on_long(result)]
    return "\n".join([*lines, "", *(line for note in notes for line in textwrap.wrap(note, 80))])


def _on_long(result: dict[str, Any]) -> list[str]:
    long = [style for style, found in result["captioners"][0]["styles"].items()
            if found["metrics"]["mean_reference_words"]["value"] > LONG]
    said = f"CIDEr-D says little of captions as long as these ({', '.join(long)}): read facts and length."
    return [said] if long else []


def _style_row(row: dict[str, Any], style: str) -> str:
    found = row["styles"][style]
    metrics = found["metrics"]
    low, high = metrics["cider_d"]["ci"]
    apart = found.get("differences", {}).get("cider_d", {})
    star = "*" if apart.get("verdict") in ("better", "worse") else " "
    cider = f"{metrics['cider_d']['value']:.2f} [{low:.2f}, {high:.2f}]{star}"
    facts = metrics.get("facts_covered")
    return (f"{row['name'][:WIDTH - 1]:<{WIDTH}}{cider:>22}{metrics['bleu_4']['value']:>8.3f}"
            f"{metrics['mean_words']['value']:>7.1f}{f'''{100 * metrics['length_ratio']['value']:.0f} %''':>9}"
            f"{f'''{100 * found['ended']:.0f} %''':>7}{f'''{100 * facts['value']:.0f} %''' if facts else '–':>7}")


def _downstream_rows(rows: list[dict[str, Any]]) -> list[str]:
    """What the diffusion arms trained on each one's captions are worth."""
    lines = ["One training each, without intervals:",
             f"{'drawn by':<{WIDTH}}{'arm':<18}{'object accuracy':>17}{'CLIP score':>12}{'FID':>9}"]
    for row in rows:
        for arm, found in row["downstream"].items():
            accuracy = found.get("object_accuracy")
            lines.append(f"{row['name'][:WIDTH - 1]:<{WIDTH}}{arm:<18}"
                         f"{f'{100 * accuracy:.1f} %' if accuracy is not None else '–':>17}"
                         f"{found['clip_score']:>12.2f}{found['fid']:>9.2f}")
    return lines


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def page(name: str, result: dict[str, Any], found: list[Scored], num_samples: int) -> str:
    """The page: the table, what differs from the baseline, and pictures with what each captioner says of them."""
    samples = [{"picture": thumbnail(image.image), "uid": image.uid, "styles": [
        {"name": style, "references": [text for kind, text in image.captions if kind == style],
         "captions": [(each.name, each.captions[style][image.uid]) for each in found
                      if image.uid in each.captions.get(style, {})]}
        for style in found[0].styles if any(kind == style for kind, _ in image.captions)]}
        for image in found[0].images[:num_samples]]
    return _template().render(name=name, result=result, samples=samples, facts=FACTS, extras=_extras(result),
                              notes=_on_long(result))


def _extras(result: dict[str, Any]) -> dict[str, str]:
    """Heading → figure, of those that were asked for."""
    known = {name for row in result["captioners"] for found in row["styles"].values() for name in found["metrics"]}
    return {heading: name for heading, name in EXTRAS.items() if name in known}


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("eval", "."), autoescape=True)
    return environment.get_template("captioners.html")
