"""Everything that a run found → `index.html`, one file that needs no network, beside `report.json` for programs."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from eval.charts import Row, dot_chart
from eval.comparisons import ArmSummary, Run, arms_table, baseline, compare, signed, summarize, verdict
from eval.config import Report
from eval.exhibits import captions, grid
from recap.errors import UserError
from recap.rundir import StageDir
from recap.shards import write_bytes, write_json

SCHEMA = 1
__all__ = ["ReportInput", "Run", "run"]


@dataclass(frozen=True)
class ReportInput:
    """What the report is made of."""

    name: str
    config: dict[str, Any]
    """The resolved experiment, JSON-like."""
    arms: list[str]
    """In the order of the report."""
    styles: list[str]
    """Caption styles that relabelling added."""
    runs: list[Run]
    relabelled: list[Path]
    """Relabelled shards; none where the experiment brought its own."""
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage → its result: `images_in`, `images_out`, `quarantined` (reason → images), and other numbers."""
    environment: dict[str, str] = field(default_factory=dict)
    """Versions and hardware."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage (`relabel`, `seed-0/train/alt`) → how long it took."""


def run(stage: StageDir, content: ReportInput, config: Report) -> dict[str, Any]:
    """Write `index.html` and `report.json` into the stage's folder.

    Returns:
        `table`, the arms in plain text, for the terminal.
    """
    if not content.runs:
        raise UserError("the report has no arm to show: give at least one in arms")
    summaries = summarize(content.arms, content.runs)
    comparisons = compare(content.arms, content.runs)
    cards, lengths = captions(content.relabelled, content.styles, config.num_captions)
    rows = grid(content.arms, content.runs, config.num_prompts)
    headline, sentences = verdict(content.arms, summaries, comparisons)
    page = _template().render(
        title=config.title or content.name, note=config.note, content=content, headline=headline, sentences=sentences,
        baseline=baseline(content.arms), summaries=summaries, charts=_charts(content.arms, summaries, comparisons),
        against={each["a"]: each for each in comparisons}, grid=rows, cards=cards, lengths=lengths,
        metrics=content.runs[0].metrics, num_seeds=len({each.seed for each in content.runs}),
        settings=_settings(content.config), flows=_flows(content.counts), times=_times(content.seconds))
    # Keys and texts from the web may hold lone surrogates, which no encoding takes.
    write_bytes(str(stage.path / "index.html"), page.encode("utf-8", "replace"))
    write_json(str(stage.path / "report.json"), {
        "schema": SCHEMA,
        "runs": [{"seed": each.seed, "arm": each.arm, "metrics": each.metrics} for each in content.runs],
        "comparisons": comparisons, "captions": lengths, "counts": content.counts, "config": content.config,
        "environment": content.environment})
    return {"table": arms_table(summaries, comparisons)}


# --- charts --------------------------------------------------------------------------------------------------------


def _charts(arms: list[str], summaries: list[ArmSummary], comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The charts as title, note and SVG."""
    by_arm = {each.arm: each for each in summaries}
    against = {each["a"]: each for each in comparisons}
    reference = by_arm[baseline(list(by_arm))]
    tones = {arm: "reference" if arm == reference.arm else _tone(against.get(arm)) for arm in by_arm}
    fid = [Row(each.arm, each.fids, f"{each.fid:.2f}", tone="reference" if each is reference else "plain")
           for each in summaries]
    clip = [Row(each.arm, each.clip_scores, f"{each.clip_score:.2f}", tone=tones[each.arm]) for each in summaries]
    charts = [{"title": "FID", "note": "Distance to real images. Lower is better.",
               "svg": dot_chart(fid, reference.fid, "FID of every arm")},
              {"title": "CLIP score", "note": "Match of picture and prompt. Higher is better.",
               "svg": dot_chart(clip, reference.clip_score, "CLIP score of every arm")}]
    differences = [Row(arm, [found["difference"]], signed(found["difference"]), tuple(found["ci"]), _tone(found))
                   for arm, found in against.items()]
    if differences:
        title = f"CLIP score against {reference.arm}"
        charts.append({"title": title, "note": "Mean difference over prompts, with its 95 % interval.",
                       "svg": dot_chart(differences, 0.0, title)})
    return charts


def _tone(found: dict[str, Any] | None) -> str:
    return found["verdict"] if found and found["verdict"] in ("better", "worse") else "plain"


# --- template ------------------------------------------------------------------------------------------------------


def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"signed": signed, "duration": duration, "count": "{:,}".format}
    return environment.get_template("report.html")


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _flows(counts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Per stage: how many images came in, went out, and were quarantined for which reason; and its other numbers."""
    flows = []
    for stage, result in counts.items():
        known = {"images_in", "images_out", "quarantined", "seconds", "fingerprint"}
        others = {name.replace("_", " "): value for name, value in result.items()
                  if name not in known and isinstance(value, int | float) and not isinstance(value, bool)}
        quarantined = result.get("quarantined") or {}
        flows.append({"stage": stage, "in": result.get("images_in"), "out": result.get("images_out"), "others": others,
                      "quarantined": sorted(quarantined.items(), key=lambda pair: -pair[1])})
    return flows


def _times(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds by kind of stage, over seeds and arms: `seed-0/train/alt` counts as `train`."""
    totals: dict[str, float] = {}
    for stage, value in seconds.items():
        kind = stage.split("/")[-2] if "/" in stage else stage
        totals[kind] = totals.get(kind, 0.0) + value
    return totals


def _settings(config: dict[str, Any]) -> str:
    """The experiment as `table.key = value` lines: TOML, and also what a command line overrides."""
    lines: list[str] = []
    for name, value in config.items():
        block = [f"{key} = {json.dumps(leaf, ensure_ascii=False)}" for key, leaf in _leaves(value, name)]
        lines += ["", *block] if isinstance(value, dict) and block else block
    return "\n".join(lines).strip()


def _leaves(value: Any, key: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for name, child in value.items() for leaf in _leaves(child, f"{key}.{name}")]
    return [] if value is None else [(key, value)]
