"""Runs of one experiment on several base models, pooled into one result that a project can keep."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from eval.comparisons import Run, baseline, claim, compare, compare_sets, summarize
from eval.measures import measures_of
from eval.reference import load
from eval.report import settings
from eval.verdict import Findings
from recap.errors import UserError
from recap.storage import write_bytes

SCHEMA = 1
REFERENCE = "reference/features.npz"
OWN = ("name", "runs", "device", "train.model")
"""Settings in which pooled runs may differ."""
SCORED_BY = ("distances", "clip_model", "judges", "headline_sets", "num_images", "num_reference")


def pool(folders: list[Path], out: Path, title: str, command: str) -> Findings:
    """Compare arms over all base models and seeds of finished runs; write what `report.beside` reads.

    Args:
        folders: `runs/NAME` of runs that differ in their base model alone.
        out: JSON file: `runs`, `comparisons` and `set_comparisons` as in report.json; `base_models`, each with its own
            comparisons of the arm that the headline speaks of; and `title`, `command`, `date`, `hardware`,
            `environment`, `config`, `captions`, those of the first run.
        title, command: for its readers.

    Raises:
        UserError: a run is not finished, or runs differ in more than their base model.
    """
    reports = [_report(folder) for folder in folders]
    per_run = [[Run(each["seed"], each["arm"], folder / f"seed-{each['seed']}/generate/{each['arm']}",
                    folder / f"seed-{each['seed']}/eval/{each['arm']}", place) for each in report["runs"]]
               for place, (folder, report) in enumerate(zip(folders, reports, strict=True))]
    for folder, report, runs in zip(folders, reports, per_run, strict=True):
        _check_fresh(folder, report, runs)
        _check_alike(folders[0], folder, reports[0], report)
        _check_pictures(per_run[0][0], runs)
    _check_models(folders, reports)
    arms, runs = reports[0]["config"]["arms"], [run for each in per_run for run in each]
    found = Findings(arms, measures_of(runs[0].metrics), summarize(arms, runs), compare(arms, runs))
    write_bytes(str(out), _by_line({
        "schema": SCHEMA, "title": title, "command": command, "date": datetime.now(UTC).date().isoformat(),
        "hardware": reports[0]["environment"].get("hardware", ""), "environment": reports[0]["environment"],
        "config": reports[0]["config"],
        "base_models": [{"model": _model(report), "comparisons": _claimed(report)} for report in reports],
        "runs": [{"base_model": run.base_model, "seed": run.seed, "arm": run.arm, "metrics": run.metrics}
                 for run in runs],
        "comparisons": found.comparisons, "set_comparisons": compare_sets(arms, runs, _set_pairs(reports[0])),
        "captions": reports[0]["captions"]}).encode())
    return found


def _by_line(result: dict[str, Any]) -> str:
    """JSON with a line for each run and each comparison, in six digits: small enough to keep with a project."""
    parts = [f"{json.dumps(key)}: {_lines(_rounded(value))}" for key, value in result.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return "[\n" + ",\n".join(json.dumps(each, ensure_ascii=False) for each in value) + "\n]"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _report(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "report" / "report.json").read_bytes())
        return found
    except (OSError, ValueError):
        raise UserError(f"no finished run in {folder}: it has no report/report.json") from None


def _model(report: dict[str, Any]) -> str:
    return str(report["config"].get("train", {}).get("model"))


def _set_pairs(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [(a, b) for a, b in report["config"].get("report", {}).get("compare_sets", [])]


def _claimed(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run alone says of the arm that the headline speaks of."""
    arms = report["config"]["arms"]
    return [each for each in report["comparisons"] if (each["a"], each["b"]) == (claim(arms), baseline(arms))]


# --- what must be equal --------------------------------------------------------------------------------------------


def _check_fresh(folder: Path, report: dict[str, Any], runs: list[Run]) -> None:
    if any(run.metrics != each["metrics"] for run, each in zip(runs, report["runs"], strict=True)):
        raise UserError(f"the report in {folder} is older than its evaluations: run `recap report` again")


def _check_alike(first: Path, other: Path, report: dict[str, Any], others: dict[str, Any]) -> None:
    ours, theirs = ([line for line in settings(each["config"]).splitlines() if line.split(" = ")[0] not in OWN]
                    for each in (report, others))
    if differing := [line for line in theirs if line not in ours] or [line for line in ours if line not in theirs]:
        raise UserError(f"{other} is another experiment than {first} ({differing[0][:100]}): pool runs that differ in "
                        "their base model alone")
    if report["captions"] != others["captions"]:
        raise UserError(f"{other} was trained on other captions than {first}: copy stitch, captioner and relabel from "
                        "one run to the others, and train on those")
    a, b = (load(folder / REFERENCE).features for folder in (first, other))
    if a.shape != b.shape or not np.allclose(a, b):
        raise UserError(f"{other} has other real images than {first}: pool runs of one experiment")


def _check_pictures(first: Run, runs: list[Run]) -> None:
    for run in runs:
        if run.drawn != first.drawn:
            raise UserError(f"{run.images} was drawn from other prompts or noise than {first.images}: pool runs of one "
                            "experiment")
        if differing := [key for key in SCORED_BY if _scored_by(run, key) != _scored_by(first, key)]:
            raise UserError(f"{run.evaluated} has other {differing[0]} than {first.evaluated}: evaluate both alike")


def _scored_by(run: Run, key: str) -> Any:
    found = run.metrics.get(key)
    return {name: each["network"] for name, each in found.items()} if key == "distances" and found else found


def _check_models(folders: list[Path], reports: list[dict[str, Any]]) -> None:
    known: dict[str, Path] = {}
    for folder, report in zip(folders, reports, strict=True):
        if (model := _model(report)) in known:
            raise UserError(f"{folder} and {known[model]} both begin with {model}: pool runs on different base models")
        known[model] = folder
