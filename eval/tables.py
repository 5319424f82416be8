"""What was found, as tables for papers, model cards and programs: `table.md`, `metrics.csv`, `comparisons.csv`.

Names come from experiment files and other people's results: in Markdown they are text, and in CSV no formula.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.comparisons import ArmSummary, Scored
from eval.measures import NONE, Measure
from eval.verdict import Findings
from recap.data_card import escape
from recap.show import plain
from recap.storage import write_bytes

METRICS = ("arm", "seed", "base_model", "measure", "value")
"""Columns of metrics.csv."""
COMPARISONS = ("a", "b", "metric", "difference", "ci_low", "ci_high", "p", "p_holm", "verdict", "num_prompts",
               "num_seeds", "note")
"""Columns of comparisons.csv."""
FORMULA = tuple("=+-@＝＋－＠")
"""What spreadsheets take for the beginning of a formula."""
Cell = str | int | float | None


def write_tables(folder: Path, found: Findings, runs: Sequence[Scored], environment: Mapping[str, str]) -> None:
    """Write the three files.

    Args:
        folder: an existing one.
        found: arms, measures and comparisons.
        runs: what each arm of each seed scored.
        environment: versions and hardware.
    """
    write_bytes(str(folder / "table.md"), table(found, runs, environment).encode("utf-8", "replace"))
    write_bytes(str(folder / "metrics.csv"), to_csv(METRICS, metric_rows(runs, found.measures)))
    write_bytes(str(folder / "comparisons.csv"), to_csv(COMPARISONS, map(comparison_row, found.comparisons)))


# --- Markdown ------------------------------------------------------------------------------------------------------


def table(found: Findings, runs: Sequence[Scored], environment: Mapping[str, str]) -> str:
    """Arms by headline measures; each arm against the baseline; and on what that stands."""
    against = _against(found)
    parts = [arms_table(found),
             markdown([f"Against {found.baseline}", "Measure", "Difference", "95 % interval", "p (Holm)", "Verdict"],
                      against) if against else "",
             *notes(found, runs),
             f"Made with {', '.join(escape(f'{name} {value}') for name, value in environment.items())}."
             if environment else ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def arms_table(found: Findings) -> str:
    """Means of the headline measures, with their spread over seeds."""
    return markdown(["Arm", *(f"{measure.label} {measure.arrow}" for measure in found.headline)],
                    [[each.arm, *(with_spread(each, measure) for measure in found.headline)]
                     for each in found.summaries])


def _against(found: Findings) -> list[list[str]]:
    return [[each.arm, measure.label, f"{measure.change(result['difference'])}{measure.unit}",
             measure.interval(result), p_cell(result.get("p_holm")), result["verdict"]]
            for each in found.summaries for measure in found.headline
            if (result := found.against(each.arm, measure))]


def with_spread(summary: ArmSummary, measure: Measure) -> str:
    """Mean and standard deviation over seeds: `23.10 ± 0.42`, `63.2 ± 1.1 %`."""
    mean, deviation = measure.text(summary.mean(measure)), measure.text(summary.spread(measure))
    return mean if deviation == NONE else f"{mean.removesuffix(' %')} ± {deviation}"


def p_cell(p: float | None) -> str:
    """`0.012`, `< 0.001`."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def notes(found: Findings, runs: Sequence[Scored]) -> list[str]:
    """Paragraphs: how much was drawn, and who measured it."""
    metrics = runs[0].metrics
    num_seeds = len({run.seed for run in runs})
    spread = f" Means over {num_seeds} training seeds ± their standard deviation." if num_seeds > 1 else ""
    corrected = any(each.get("p_holm") is not None for each in found.comparisons)
    family = (" p-values of the headline measures against the baseline are corrected for their number (Holm); verdicts "
              "heed it." if corrected else "")
    return [f"{drawn(metrics)}.{spread}{family}", " ".join(measured_by(metrics, found.headline))]


def drawn(metrics: Mapping[str, Any]) -> str:
    """`1,000 pictures of 500 prompts by every arm and seed, and 5,000 real images`"""
    of = f" of {metrics['num_prompts']:,} prompts" if metrics.get("num_prompts") else ""
    return f"{metrics['num_images']:,} pictures{of} by every arm and seed, and {metrics['num_reference']:,} real images"


def measured_by(metrics: Mapping[str, Any], measures: Sequence[Measure]) -> list[str]:
    """For each measure a sentence in Markdown: its network, its model, or its judge."""
    by = {measure.key: (measure.label, scored_by(metrics, measure.key)) for measure in measures}
    return [f"{escape(label)}: {escape(name)}." for label, name in by.values() if name]


def scored_by(metrics: Mapping[str, Any], key: str) -> str | None:
    """The network, model or judge behind a measure, by its name."""
    if key in metrics.get("distances", {}):
        about = metrics["distances"][key]
        return f"{about['network']}, {about['dim']:,} features, {about['resize']}"
    if key == "clip_score":
        return None if metrics.get("clip_model") is None else str(metrics["clip_model"])
    return next((str(judge["name"]) for judge in metrics.get("judges") or [] if key in judge["metrics"]), None)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of text; all columns but the first to the right."""
    lines = [[escape(cell) for cell in header], ["---", *["---:"] * (len(header) - 1)],
             *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- CSV -----------------------------------------------------------------------------------------------------------


def metric_rows(runs: Iterable[Scored], measures: Sequence[Measure]) -> list[list[Cell]]:
    return [[run.arm, run.seed, run.base_model, key, value]
            for run in runs for key, value in figures(run.metrics, measures).items()]


def figures(metrics: Mapping[str, Any], measures: Sequence[Measure]) -> dict[str, float]:
    """Of a metrics.json the measures that it has; of Fréchet distances also what endless images would give."""
    keys = [key for measure in measures for key in (measure.key, f"{measure.key}_infinity")]
    return {key: metrics[key] for key in keys if metrics.get(key) is not None}


def comparison_row(each: Mapping[str, Any]) -> list[Cell]:
    """A comparison, as `eval.comparisons.compare` gives it."""
    low, high = each.get("ci") or (None, None)
    return [each["a"], each["b"], each["metric"], each.get("difference"), low, high, each.get("p"), each.get("p_holm"),
            each.get("verdict"), each.get("num_prompts"), each.get("num_seeds"), each.get("note")]


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> bytes:
    """UTF-8, a line a row. Numbers are whole, so that they read back as they were; None is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_inert(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return text.getvalue().encode("utf-8", "replace")


def _inert(text: str) -> str:
    """Text of one line, which no spreadsheet takes for a formula: one that begins as such gets an apostrophe."""
    line = plain(text)
    return f"'{line}" if line.lstrip().startswith(FORMULA) else line
