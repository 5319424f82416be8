"""Every measure of every arm, held against the baseline, and by what and of how much it was measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.comparisons import Run
from eval.measures import CLIP_SCORE, DISTANCES, Measure
from eval.verdict import Findings

ENDLESS = {f"{each.key}_infinity": (each, Measure(f"{each.key}_infinity", f"{each.label}∞", lower_is_better=True))
           for each in DISTANCES if each.key in ("fid", "fd_dinov2")}
"""Key in metrics.json → the distance that it is of endless pictures, and how it is written."""


@dataclass(frozen=True)
class Row:
    """One measure."""

    measure: Measure
    cells: list[tuple[str, str]]
    """Of every arm its value, and the verdict on it against the baseline's; none of the baseline itself."""


@dataclass(frozen=True)
class Fact:
    """By what some measures were taken."""

    name: str
    text: str


def scoreboard(found: Findings, runs: Sequence[Run]) -> list[Row]:
    """A row for each measure; none where the headline's are all there are."""
    rows = []
    for measure in found.measures:
        rows.append(Row(measure, [(measure.text(each.mean(measure)), _verdict(found, each.arm, measure))
                                  for each in found.summaries]))
        rows += [Row(endless, [(endless.text(_mean(runs, each.arm, key)), _verdict(found, each.arm, measure))
                               for each in found.summaries])
                 for key, (of, endless) in ENDLESS.items() if of == measure and any(key in run.metrics for run in runs)]
    return rows if len(rows) > len(found.headline) else []


def _verdict(found: Findings, arm: str, measure: Measure) -> str:
    """The difference of two FIDs that is compared is that of endless pictures, so both have one verdict."""
    result = found.against(arm, measure)
    return str(result["verdict"]) if result else ""


def _mean(runs: Iterable[Run], arm: str, key: str) -> float | None:
    values = [run.metrics[key] for run in runs if run.arm == arm and key in run.metrics]
    return sum(values) / len(values) if values else None


# --- by what -------------------------------------------------------------------------------------------------------


def facts(runs: Sequence[Run]) -> list[Fact]:
    """Networks, CLIP model and judges, with what each measured."""
    metrics = runs[0].metrics
    labels = {each.key: each.label for each in DISTANCES}
    by_network: dict[str, list[str]] = {}
    for key, about in metrics.get("distances", {}).items():
        network = (f"{about['network']}, {about['dim']:,} features; resize: {about['resize']}; "
                   f"{metrics['num_images']:,} pictures against {about['num_reference']:,} real images")
        by_network.setdefault(network, []).append(labels.get(key, key))
    clip = [Fact(CLIP_SCORE.label, metrics["clip_model"])] if metrics.get("clip_model") else []
    return [*(_judge(each) for each in metrics.get("judges", [])), *clip,
            *(Fact(", ".join(names), network) for network, names in by_network.items())]


def _judge(judge: dict[str, Any]) -> Fact:
    measures = [key.replace("_", " ") for key in judge["metrics"]]
    return Fact(f"{', '.join(measures)[:1].upper()}{', '.join(measures)[1:]}", judge["name"])


def cautions(runs: Sequence[Run]) -> list[str]:
    """What makes figures mean less than they seem to, each in a sentence or two."""
    numbers = {run.arm: f"{run.metrics['num_images']:,}" for run in runs}
    sizes = {run.arm: ", ".join(run.metrics.get("resolutions", {})) for run in runs}
    return [*_few(runs), *_unlike(numbers, "numbers of pictures", "so that their FIDs differ for that alone"),
            *_unlike(sizes, "sizes of pictures", "which a distance or a judge may take for a difference")]


def _few(runs: Sequence[Run]) -> list[str]:
    """Of each Fréchet distance that has no interval, why, and how much of it comes of the number of pictures."""
    said = []
    for measure, _ in ENDLESS.values():
        found = [run.metrics.get("distances", {}).get(measure.key, {}) for run in runs]
        if why := next((each["why"] for each in found if each.get("why")), None):
            biases = [each["bias"] for each in found if each]
            more = " to ".join(dict.fromkeys([f"{min(biases):.3g}", f"{max(biases):.3g}"]))
            said.append(f"{measure.label}: {why}. Half as many pictures give {more} more, so every {measure.label} "
                        "here is too high by about that or more, and compares with no published figure.")
    return said


def _unlike(of_arms: dict[str, str], what: str, why: str) -> list[str]:
    """Arms that differ in what should be the same."""
    told = "; ".join(f"{arm} {value}" for arm, value in of_arms.items())
    return [f"Arms differ in their {what}, {why}: {told}."] if len(set(of_arms.values())) > 1 else []
