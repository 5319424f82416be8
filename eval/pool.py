"""Several runs of one experiment, as on several base models, pooled into one result that a project can keep."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.comparisons import Findings, Run, compare, summarize
from eval.fid import load
from eval.measures import measures_of
from recap.errors import UserError
from recap.shards import write_json

SCHEMA = 1
REFERENCE = "reference/reference.npz"
APART = 1000
"""Seeds of the second run are counted from here, of the third from twice as much, so that none is taken for another."""


def pool(folders: list[Path], out: Path, title: str, command: str) -> Findings:
    """Compare arms over all seeds of finished runs, and write the result to `out`, as `report.beside` reads it.

    Args:
        folders: `runs/NAME` of runs with the same arms, prompts and reference.
        out: JSON file: `runs` and `comparisons` as in report.json, and `title`, `command`, `date`, `hardware`.
        title, command: for its readers.

    Raises:
        UserError: a run is not finished, or runs differ in arms or reference.
    """
    reports = [_report(folder) for folder in folders]
    arms = reports[0]["config"]["arms"]
    for folder, report in zip(folders, reports, strict=True):
        if report["config"]["arms"] != arms:
            raise UserError(f"{folder} has other arms than {folders[0]}: pool runs of one experiment")
        if (folder / REFERENCE).read_bytes() != (folders[0] / REFERENCE).read_bytes():
            raise UserError(f"{folder} has other real images than {folders[0]}: pool runs of one experiment")
    runs = [Run(APART * place + each["seed"], each["arm"], folder / f"seed-{each['seed']}/generate/{each['arm']}",
                folder / f"seed-{each['seed']}/eval/{each['arm']}")
            for place, (folder, report) in enumerate(zip(folders, reports, strict=True)) for each in report["runs"]]
    reference = load(folders[0] / REFERENCE)[0]
    found = Findings(arms, measures_of(runs[0].metrics), summarize(arms, runs), compare(arms, runs, reference))
    write_json(str(out), {
        "schema": SCHEMA, "title": title, "command": command, "date": datetime.now(UTC).date().isoformat(),
        "hardware": reports[0]["environment"].get("hardware", ""), "environment": reports[0]["environment"],
        "runs": [{"seed": run.seed, "arm": run.arm, "metrics": run.metrics} for run in runs],
        "comparisons": found.comparisons, "captions": reports[0]["captions"]})
    return found


def _report(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "report" / "report.json").read_bytes())
        return found
    except (OSError, ValueError):
        raise UserError(f"no finished run in {folder}: it has no report/report.json") from None
