"""`recap report RUN1 RUN2 …`: finished runs side by side, and against each other where that means anything.

Two arms of different runs are compared only if they drew the same prompts, and were scored by the same networks and
against the same real images. Else their figures stand beside each other, and it is said why nothing follows from them.
"""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from eval.comparisons import Run, adjusted, claim
from eval.distances import FRECHET, KEYS
from eval.finished import FinishedRun, read_runs
from eval.measures import DISTANCES, Measure
from eval.statistics import CANT_TELL, mean_over_runs, paired_difference
from eval.tables import (
    COMPARISONS,
    METRICS,
    arms_table,
    comparison_row,
    drawn,
    markdown,
    metric_rows,
    notes,
    p_cell,
    scored_by,
    to_csv,
    with_spread,
)
from eval.verdict import p_of, p_text
from recap.data_card import escape
from recap.errors import UserError
from recap.show import plain
from recap.storage import write_bytes, write_json

SCHEMA = 1
MAX_NAME = 150
"""Characters of the folder that is named after the runs."""
MAX_VALUE = 300
"""Characters of a setting on the page."""


def compare_runs(folders: Sequence[Path], out: Path | None = None) -> str:
    """Compare finished runs, each with the first; write `index.html`, `compared.json`, `table.md`, `metrics.csv` and
    `comparisons.csv`.

    Args:
        folders: `runs/NAME` of two runs or more.
        out: the folder to write to, by default `compared-NAME-NAME` beside the first run.

    Returns:
        What was found, for the terminal.

    Raises:
        UserError: a folder is not that of a finished run, or comes twice, or its figures are an older Recap's; or `out`
            is a stage's or a run's.
    """
    runs = read_runs(folders)
    out = out or folders[0].resolve().parent / f"compared-{'-'.join(each.name.replace('/', '-') for each in runs)}"[
        :MAX_NAME]
    if any((out / name).exists() for name in ("config.json", "done.json", "report")):
        raise UserError(f"report: {out} is the folder of a run or of a stage: choose another --out")
    found = compared(runs)
    said = [said_of(other, runs[0], found) for other in runs[1:]]
    sentences = [" ".join(each).strip() for each in said]
    page = _template().render(runs=runs, first=runs[0], said=said, found=_by_run(runs, found),
                              settings=_settings(runs), about=[_about(each) for each in runs])
    write_bytes(str(out / "index.html"), page.encode("utf-8", "replace"))
    write_json(str(out / "compared.json"), _for_programs(runs, found))
    write_bytes(str(out / "table.md"), _markdown(runs, sentences, found).encode("utf-8", "replace"))
    write_bytes(str(out / "metrics.csv"), to_csv(("run", *METRICS), [
        [each.name, *row] for each in runs for row in metric_rows(each.runs, each.findings.measures)]))
    write_bytes(str(out / "comparisons.csv"), to_csv(("run_a", "run_b", *COMPARISONS), [
        [each["run_a"], each["run_b"], *comparison_row(each)] for each in found]))
    return "\n\n".join([*(textwrap.fill(each, 79) for each in sentences), f"The page: {out / 'index.html'}"])


# --- comparisons ---------------------------------------------------------------------------------------------------


def compared(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """Arms of every run against those of the first: those of the same name, and those that the headlines speak of.

    A row for each measure that both have: as of `eval.comparisons.compare`, with `run_a` (the other run), `run_b` (the
    first), and `means` of both. What can't be compared has no difference and no verdict, and says why in `note`. The
    p-values of the headline measures are adjusted for their number, as one family.
    """
    first, found = runs[0], []
    for other in runs[1:]:
        for a, b in _arm_pairs(other, first):
            known = {measure.key for measure in other.findings.measures}
            found += [_compared(other, first, a, b, measure) for measure in first.findings.measures
                      if measure.key in known]
    headline = [measure.key for measure in first.findings.headline]
    return adjusted(found, [each["metric"] in headline for each in found])


def _arm_pairs(other: FinishedRun, first: FinishedRun) -> list[tuple[str, str]]:
    """Arms of the same name, in the first run's order; and the two claims, where they are of other names."""
    same = [(arm, arm) for arm in first.findings.arms if arm in other.findings.arms]
    a, b = claim(other.findings.arms), claim(first.findings.arms)
    return [*same, *([(a, b)] if a and b and a != b else [])]


def _compared(other: FinishedRun, first: FinishedRun, a: str, b: str, measure: Measure) -> dict[str, Any]:
    ours, theirs = other.of(a), first.of(b)
    row = {"run_a": other.name, "run_b": first.name, "a": a, "b": b, "metric": measure.key,
           "means": [_mean(ours, measure), _mean(theirs, measure)],
           "num_seeds": min(len(ours), len(theirs))}
    if measure not in other.findings.measures:
        why: str | None = "what is called so is another measure"
    else:
        why = incomparable(ours[0], theirs[0], measure) or _other_real_images(other, first, measure) \
            or _other_prompts(ours, theirs) or _no_values(ours, theirs, measure)
    if why:
        return row | {"difference": None, "ci": None, "p": None, "verdict": None, "num_prompts": None,
                      "note": plain(why)}
    return row | _difference(ours, theirs, measure)


def _mean(runs: Sequence[Run], measure: Measure) -> float | None:
    values = [run.metrics[measure.key] for run in runs if run.metrics.get(measure.key) is not None]
    return float(np.mean(values)) if values else None


def _difference(ours: Sequence[Run], theirs: Sequence[Run], measure: Measure) -> dict[str, Any]:
    """By the same seeds, where both runs have them; else between means over each one's own, which then speak of these
    very models only.
    """
    one, other = (np.array([run.headline(measure.key) for run in runs]) for runs in (ours, theirs))
    seeds = [run.seed for run in ours]
    if seeds != [run.seed for run in theirs]:
        one, other = mean_over_runs(one), mean_over_runs(other)
        return paired_difference(one, other, 0, lower_is_better=measure.lower_is_better)
    return paired_difference(one, other, 0, seeds=seeds, lower_is_better=measure.lower_is_better)


# --- why not -------------------------------------------------------------------------------------------------------


def incomparable(one: Run, other: Run, measure: Measure) -> str | None:
    """Why a measure of two runs says nothing of which is better, as far as metrics.json tells."""
    ours, theirs = one.metrics, other.metrics
    if not (ours.get("is_paired", True) and theirs.get("is_paired", True)):
        return "it is not known which pictures are of the same prompts"
    if ours["num_images"] != theirs["num_images"]:
        return (f"{ours['num_images']:,} pictures against {theirs['num_images']:,}"
                + (f": {measure.label} {_falls(measure)} their number" if measure in DISTANCES else ": other prompts"))
    if ours["headline_sets"] != theirs["headline_sets"]:
        return (f"other prompt sets in the headline: {', '.join(ours['headline_sets'])}; "
                f"and {', '.join(theirs['headline_sets'])}")
    if measure in DISTANCES:
        return _other_network(ours["distances"][measure.key], theirs["distances"][measure.key], measure)
    by, theirs_by = (scored_by(metrics, measure.key) for metrics in (ours, theirs))
    if by != theirs_by:
        return f"other {'CLIP model' if measure.key == 'clip_score' else 'judge'}: {by}, not {theirs_by}"
    return None


def _falls(measure: Measure) -> str:
    return "falls with" if measure.key in FRECHET.values() else "depends on"


def _other_network(ours: dict[str, Any], theirs: dict[str, Any], measure: Measure) -> str | None:
    for name, what in (("network", f"{measure.label} network"), ("resize", "resize"), ("dim", "number of features")):
        if ours[name] != theirs[name]:
            return f"other {what}: {ours[name]}, not {theirs[name]}"
    if ours["num_reference"] != theirs["num_reference"]:
        return f"{ours['num_reference']:,} real images against {theirs['num_reference']:,}"
    return None


def _other_real_images(other: FinishedRun, first: FinishedRun, measure: Measure) -> str | None:
    table = next((table for table, keys in KEYS.items() if measure.key in keys and measure in DISTANCES), None)
    if table is None:
        return None
    are_same = other.has_real_images_of(first, table)
    if are_same is None:
        return "the statistics of the real images are not there any more"
    return None if are_same else "other real images"


def _other_prompts(ours: Sequence[Run], theirs: Sequence[Run]) -> str | None:
    first = theirs[0]
    if any(run.asked != first.asked or run.scores.sets != first.scores.sets or
           run.scores.prompts != first.scores.prompts for run in [*ours, *theirs]):
        return "other prompts"
    return None


def _no_values(ours: Sequence[Run], theirs: Sequence[Run], measure: Measure) -> str | None:
    runs = [*ours, *theirs]
    if any(measure.key not in run.scores.columns for run in runs):
        whys = (run.metrics["distances"].get(measure.key, {}).get("why") for run in runs)
        return next((why for why in whys if why), "no value for each picture")
    known = [(~np.isnan(np.array([run.headline(measure.key) for run in each]))).any(axis=0) for each in (ours, theirs)]
    return None if (known[0] & known[1]).any() else "no prompt gives both a value"


# --- words ---------------------------------------------------------------------------------------------------------


def said_of(other: FinishedRun, first: FinishedRun, found: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """What the arms that the headlines speak of say of two runs, and its figures: by the first headline measure that
    both have.
    """
    a, b = claim(other.findings.arms), claim(first.findings.arms)
    own = {each["metric"]: each for each in found if (each["run_a"], each["a"], each["b"]) == (other.name, a, b)}
    lead = next((measure for measure in first.findings.headline if measure.key in own), None)
    if lead is None:
        return f"{other.name} and {first.name} have no arm or measure in common that the headline speaks of.", ""
    each = own[lead.key]
    ours, theirs = (lead.text(mean) for mean in each["means"])
    values = f"{lead.label}: {ours} against {theirs}"
    if each["difference"] is None:
        return f"“{a}” of {other.name} and “{b}” of {first.name} can't be compared: {each['note']}.", f"{values}."
    if each["verdict"] == CANT_TELL:
        headline = f"No difference between “{a}” of {other.name} and “{b}” of {first.name} could be shown."
    else:
        headline = f"“{a}” of {other.name} is {each['verdict']} than “{b}” of {first.name}."
    return headline, f"{values}, difference {lead.figures(each)}, {p_text(p_of(each))} (Holm)."


def _rows(found: Sequence[dict[str, Any]], first: FinishedRun) -> list[dict[str, Any]]:
    """Comparisons in words."""
    measures = {measure.key: measure for measure in first.findings.measures}
    headline = {measure.key for measure in first.findings.headline}
    rows = []
    for each in found:
        measure = measures[each["metric"]]
        is_told = each["difference"] is not None
        rows.append({
            "arms": each["a"] if each["a"] == each["b"] else f"{each['a']} against {each['b']}",
            "measure": f"{measure.label} {measure.arrow}", "of_a": measure.text(each["means"][0]),
            "of_b": measure.text(each["means"][1]), "is_headline": each["metric"] in headline,
            "difference": f"{measure.change(each['difference'])}{measure.unit}" if is_told else "",
            "interval": measure.interval(each) if is_told else "",
            "p": p_cell(p_of(each)) if is_told else "",
            "verdict": each["verdict"] if is_told else "", "why": each.get("note") or ""})
    return rows


def _by_run(runs: Sequence[FinishedRun], found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Other run → its comparisons in words."""
    return {other.name: _rows([each for each in found if each["run_a"] == other.name], runs[0]) for other in runs[1:]}


def _settings(runs: Sequence[FinishedRun]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, and each one's value."""
    keys = dict.fromkeys(key for each in runs for key in each.settings)
    values = [(key, [each.settings.get(key, "–") for each in runs]) for key in keys]
    return [(key, [value if len(value) <= MAX_VALUE else f"{value[:MAX_VALUE]}…" for value in own])
            for key, own in values if len(set(own)) > 1]


def _about(run: FinishedRun) -> dict[str, Any]:
    """What was drawn, and who measured it."""
    metrics = run.runs[0].metrics
    return {"drawn": drawn(metrics), "environment": run.environment,
            "by": {measure.label: name for measure in run.findings.headline
                   if (name := scored_by(metrics, measure.key))}}


# --- files ---------------------------------------------------------------------------------------------------------


def _for_programs(runs: Sequence[FinishedRun], found: list[dict[str, Any]]) -> dict[str, Any]:
    return {"schema": SCHEMA, "names": [each.name for each in runs], "comparisons": found,
            "runs": [{"run": each.name, "seed": run.seed, "arm": run.arm, "metrics": run.metrics}
                     for each in runs for run in each.runs],
            "settings": {key: dict(zip([each.name for each in runs], values, strict=True))
                         for key, values in _settings(runs)}}


def _markdown(runs: Sequence[FinishedRun], sentences: Sequence[str], found: Sequence[dict[str, Any]]) -> str:
    parts = [part for each in runs for part in (
        f"**{escape(each.name)}**", arms_table(each.findings), *notes(each.findings, each.runs))]
    return "\n\n".join([*map(escape, sentences), *parts, *(
        _against(name, runs[0].name, [row for row in rows if row["is_headline"]])
        for name, rows in _by_run(runs, found).items())]) + "\n"


def _against(name: str, first: str, rows: Sequence[dict[str, Any]]) -> str:
    header = [f"{name} against {first}", "Measure", name, first, "Difference", "95 % interval", "p (Holm)", "Verdict"]
    return markdown(header, [[row["arms"], row["measure"], row["of_a"], row["of_b"], row["difference"],
                              row["interval"], row["p"], row["verdict"] or f"not compared: {row['why']}"]
                             for row in rows])


def _template() -> jinja2.Template:
    """The page, in the clothes of the report's."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = re.search(r"<style>(.*?)</style>", (folder / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    environment.globals |= {"with_spread": with_spread, "style": style[1] if style else ""}
    return environment.get_template("runs_compared.html")
