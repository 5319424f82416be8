"""Everything that a run found → `index.html`, one file that needs no network, beside `report.json` for programs."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from eval.beside import Beside, read_beside
from eval.caption_table import Source, caption_table
from eval.charts import Row, dot_chart
from eval.comparisons import ArmSummary, Run, compare, compare_sets, summarize
from eval.config import JudgeRef, Report
from eval.exhibits import captions, grid
from eval.fid import load
from eval.judge import open_judge
from eval.measures import FID, NONE, Measure, measures_of, signed
from eval.verdict import Findings, for_terminal, p_text, verdict
from recap.errors import UserError
from recap.rundir import StageDir
from recap.storage import write_bytes, write_json

SCHEMA = 1
MAX_COMPARISONS = 500
"""In a table of the page; `report.json` lists them all."""
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
    relabelled: list[str]
    """Relabelled shards; none where the experiment brought its own."""
    stitched: list[str] = field(default_factory=list)
    """Shards with the stitched captions that the captioner was tuned on."""
    reference: list[str] = field(default_factory=list)
    """Shards of the real images, where it is shards."""
    statistics: Path | None = None
    """Of the real images, as `reference.npz`; without them FIDs are not compared."""
    judge: JudgeRef | None = None
    device: str = "cpu"
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage → its result: `images_in`, `images_out`, `quarantined` (reason → images), and other numbers."""
    environment: dict[str, str] = field(default_factory=dict)
    """Versions and hardware."""
    guidance: dict[str, float] = field(default_factory=dict)
    """Arm → the guidance scale that it was drawn with."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage (`relabel`, `seed-0/train/alt`) → how long it took."""


def run(stage: StageDir, content: ReportInput, config: Report) -> dict[str, Any]:
    """Write `index.html` and `report.json` into the stage's folder.

    Returns:
        `summary`, for the terminal.
    """
    if not content.runs:
        raise UserError("the report has no arm to show: give at least one in arms")
    found = find(content)
    judge = open_judge(content.judge, content.device) if content.judge else None
    said = caption_table(_sources(content, config), judge)
    headline, sentences = verdict(found)
    forms = compare_sets(content.arms, content.runs, config.compare_sets)
    page = _template().render(
        title=config.title or content.name, note=config.note, content=content, headline=headline, sentences=sentences,
        found=found, pairs=_pairs(found), charts=_charts(found), sets=_sets(content.runs, found),
        forms=_forms(found, forms), captions=said,
        beside=_beside(config.beside), grid=grid(content.arms, content.runs, config.num_prompts, found.lead),
        cards=captions(content.relabelled, content.styles, config.num_captions),
        metrics=content.runs[0].metrics, num_seeds=len({each.seed for each in content.runs}),
        guidance=_guidance(content.guidance),
        settings=settings(content.config), flows=_flows(content.counts), times=_times(content.seconds))
    # Keys and texts from the web may hold lone surrogates, which no encoding takes.
    write_bytes(str(stage.path / "index.html"), page.encode("utf-8", "replace"))
    write_json(str(stage.path / "report.json"), {
        "schema": SCHEMA,
        "runs": [{"seed": each.seed, "arm": each.arm, "metrics": each.metrics} for each in content.runs],
        "comparisons": found.comparisons, "set_comparisons": forms, "captions": said, "counts": content.counts,
        "config": content.config, "environment": content.environment})
    return {"summary": for_terminal(found)}


def find(content: ReportInput) -> Findings:
    """Means over seeds, and all pairs of arms."""
    reference = load(content.statistics)[0] if content.statistics else None
    return Findings(content.arms, measures_of(content.runs[0].metrics), summarize(content.arms, content.runs),
                    compare(content.arms, content.runs, reference))


def _sources(content: ReportInput, config: Report) -> list[Source]:
    """Where captions are read from: before, after, and what people would write."""
    return [Source("alt-text", content.relabelled, ["alt"]), Source("stitched", content.stitched, content.styles),
            Source("relabelled", content.relabelled, content.styles),
            Source("references", content.reference if config.references else [], config.references)]


def _sets(runs: list[Run], found: Findings) -> list[dict[str, Any]]:
    """A row for each arm and prompt set: means over seeds of the leading measure and of CLIP score."""
    shown = [measure for measure in found.headline if measure is not FID]
    rows = []
    for name in runs[0].metrics["sets"]:
        arms = []
        for arm in [each.arm for each in found.summaries]:
            values = [run.metrics["sets"].get(name, {}) for run in runs if run.arm == arm]
            arms.append([measure.text(_mean([each.get(measure.key) for each in values])) for measure in shown])
        rows.append({"set": name, "num": runs[0].metrics["sets"][name]["num_images"], "arms": arms,
                     "probe": name not in runs[0].metrics["headline_sets"]})
    return rows


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _pairs(found: Findings) -> list[dict[str, str]]:
    """A row for each comparison, in words: arms, measure, difference, interval, ratio, p and verdict."""
    measures = {measure.key: measure for measure in found.measures}
    return [{"a": each["a"], "b": each["b"], **_in_words(each, measure)}
            for each in found.comparisons[:MAX_COMPARISONS] if (measure := measures.get(each["metric"]))]


def _forms(found: Findings, comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of prompt sets, with the arm that drew them and both its values."""
    measures = {measure.key: measure for measure in found.measures}
    return [{"arm": each["arm"], "sets": (each["a"], each["b"]), "of_a": measure.text(each["means"][0]),
             "of_b": measure.text(each["means"][1]), **_in_words(each, measure)}
            for each in comparisons[:MAX_COMPARISONS] if (measure := measures.get(each["metric"]))]


def _in_words(each: dict[str, Any], measure: Measure) -> dict[str, str]:
    ratio = "" if each.get("ratio") is None else f"{each['ratio']:.2f}"
    if each.get("ratio_ci"):
        ratio += " ({:.2f} to {:.2f})".format(*each["ratio_ci"])
    return {"measure": f"{measure.label} {measure.arrow}",
            "prompts": f"{each['num_prompts']:,}" if each.get("num_prompts") else "",
            "difference": f"{measure.change(each['difference'])}{measure.unit}", "interval": measure.interval(each),
            "ratio": ratio, "p": "" if each["p"] is None else p_text(each["p"]), "verdict": each["verdict"]}


def _guidance(scales: dict[str, float]) -> str:
    """`5 (mix: 3)`: that of most arms, and those that differ."""
    if not scales:
        return ""
    usual = statistics.mode(scales.values())
    own = ", ".join(f"{arm}: {scale:g}" for arm, scale in scales.items() if scale != usual)
    return f"{usual:g} ({own})" if own else f"{usual:g}"


def spread(summary: ArmSummary, measure: Measure) -> str:
    """Mean and standard deviation over seeds: `23.10 ± 0.42`, `63.2 ± 1.1 %`."""
    mean, deviation = measure.text(summary.mean(measure)), measure.text(summary.spread(measure))
    return mean if deviation == NONE else f"{mean.removesuffix(' %')} ± {deviation}"


@dataclass(frozen=True)
class _Besides:
    """Another run's result, and what it says."""

    about: Beside
    found: Findings
    pairs: list[dict[str, str]]
    forms: list[dict[str, Any]]
    headline: str
    sentences: list[str]
    models: list[str]
    """Of each base model, what it alone says, in a sentence."""
    num_seeds: int


def _beside(path: str | None) -> _Besides | None:
    if path is None:
        return None
    about = read_beside(path)
    found = about.findings()
    forms = _forms(found, [each.model_dump() for each in about.set_comparisons])
    return _Besides(about, found, _pairs(found), forms, *verdict(found), _by_model(about, found),
                    len({run.seed for run in about.runs}))


def _by_model(about: Beside, found: Findings) -> list[str]:
    """`On stable-diffusion-0 alone: object accuracy +3.1 points, 95 % interval +1.0 to +5.2.`"""
    lead = found.lead
    return [f"On {Path(each.model).name} alone: {lead.name} {lead.change(own.difference)}{lead.unit}, 95 % interval "
            f"{lead.interval(own.model_dump())}."
            for each in about.base_models for own in each.comparisons if own.metric == lead.key]


# --- charts --------------------------------------------------------------------------------------------------------


def _charts(found: Findings) -> list[dict[str, Any]]:
    """The charts as title, note and SVG: a chart of values for each headline measure, and one of differences."""
    return [*(_values(found, measure) for measure in found.headline), *_differences(found, found.lead)]


def _values(found: Findings, measure: Measure) -> dict[str, Any]:
    scale = 100 if measure.is_share else 1
    rows, reference = [], 0.0
    for each in found.summaries:
        values = [scale * value for value in each.values.get(measure.key, [])]
        if values:
            rows.append(Row(each.arm, values, measure.text(each.mean(measure)), tone=_tone(found, each.arm, measure)))
        if each.arm == found.baseline and values:
            reference = sum(values) / len(values)
    direction = "Lower is better." if measure.lower_is_better else "Higher is better."
    return {"title": measure.label, "note": f"{measure.about} {direction}",
            "svg": dot_chart(rows, reference, f"{measure.label} of every arm")}


def _differences(found: Findings, measure: Measure) -> list[dict[str, Any]]:
    scale = 100 if measure.is_share else 1
    rows = [Row(arm, [scale * each["difference"]], measure.change(each["difference"]),
                (scale * each["ci"][0], scale * each["ci"][1]), _tone(found, arm, measure))
            for arm in found.arms if (each := found.against(arm, measure)) and each["ci"]]
    if not rows:
        return []
    title = f"{measure.label} against {found.baseline}"
    return [{"title": title, "note": f"Mean difference{measure.unit and ' in' + measure.unit}, with its 95 % interval.",
             "svg": dot_chart(rows, 0.0, title)}]


def _tone(found: Findings, arm: str, measure: Measure) -> str:
    if arm == found.baseline:
        return "reference"
    result = found.against(arm, measure)
    return result["verdict"] if result and result["verdict"] in ("better", "worse") else "plain"


# --- template ------------------------------------------------------------------------------------------------------


def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["spread"] = spread
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
        named = result.get("flags", {}) | (result["captions"] if stage == "relabel" and "captions" in result else {})
        others |= {name.replace("_", " ").replace("/", ": "): value for name, value in named.items()}
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


def settings(config: dict[str, Any]) -> str:
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
