"""Everything that a run found → `index.html`, one file that needs no network, beside `report.json` for programs."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from eval.beside import Beside, read_beside
from eval.caption_table import NUM_SAMPLES, Source, caption_table, close_to
from eval.charts import Row, dot_chart
from eval.comparisons import Run, compare, compare_sets, summarize
from eval.config import ClipScore, JudgeRef, Report
from eval.curves import TITLES, Kind, Point, curves
from eval.exhibits import captions, exhibits
from eval.judge import open_judge
from eval.matrix import matrix
from eval.measures import CLIP_SCORE, DISTANCES, Measure, measures_of, signed
from eval.provenance import duration, flows, settings, times
from eval.scoreboard import cautions, facts, scoreboard
from eval.tables import with_spread, write_tables
from eval.trackers import log_report
from eval.verdict import Findings, for_terminal, p_of, p_text, verdict
from recap.errors import UserError
from recap.rundir import StageDir
from recap.storage import write_bytes, write_json

SCHEMA = 1
MAX_COMPARISONS = 500
"""In a table of the page; `report.json` lists them all."""
__all__ = ["Point", "ReportInput", "Run", "run", "settings"]


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
    judge: JudgeRef | None = None
    """Who says what captions cover; nobody by default."""
    clip: ClipScore | None = None
    """Whose text encoder says how close captions come to references; by default they are not compared."""
    device: str = "cpu"
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage → its result: `images_in`, `images_out`, `quarantined` (reason → images), and other numbers."""
    environment: dict[str, str] = field(default_factory=dict)
    """Versions and hardware."""
    guidance: dict[str, float] = field(default_factory=dict)
    """Arm → the guidance scale that it was drawn with."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage (`relabel`, `seed-0/train/alt`) → how long it took."""
    swept: list[Point] = field(default_factory=list)
    """Points of curves, beside the runs."""


def run(stage: StageDir, content: ReportInput, config: Report) -> dict[str, Any]:
    """Write `index.html`, `report.json`, `table.md`, `metrics.csv` and `comparisons.csv` into the stage's folder.

    The trackers of the training are told the figures, too.

    Returns:
        `summary`, for the terminal.
    """
    if not content.runs:
        raise UserError("the report has no arm to show: give at least one in arms")
    found = find(content)
    said = _captions(content, config)
    close = _closeness(content, config, said)
    forms = compare_sets(content.arms, content.runs, config.compare_sets)
    page = _template().render(
        title=config.title or content.name, note=config.note, content=content, found=found,
        **_compared(content, found), forms=_forms(found, forms),
        curves=curves(found, content.swept, _usual_points(content)),
        matrix=matrix(found, content.runs, _trained_on(content.config)), beside=_beside(config.beside),
        exhibits=exhibits(found, content.runs, config.num_prompts),
        cards=captions(content.relabelled, content.styles, config.num_captions), captions=said, closeness=close,
        num_samples=NUM_SAMPLES, has_facts=any(row["num_judged"] for rows in said.values() for row in rows.values()),
        settings=settings(content.config), flows=flows(content.counts), times=times(content.seconds))
    # Keys and texts from the web may hold lone surrogates, which no encoding takes.
    write_bytes(str(stage.path / "index.html"), page.encode("utf-8", "replace"))
    write_json(str(stage.path / "report.json"), {
        "schema": SCHEMA,
        "runs": [{"seed": each.seed, "arm": each.arm, "metrics": each.metrics} for each in content.runs],
        "comparisons": found.comparisons, "set_comparisons": forms, "swept": [asdict(each) for each in content.swept],
        "captions": said, "closeness": close, "counts": content.counts,
        "config": content.config, "environment": content.environment})
    write_tables(stage.path, found, content.runs, content.environment)
    log_report(stage, content.config, content.runs, content.swept, content.device)
    return {"summary": for_terminal(found)}


def find(content: ReportInput) -> Findings:
    """Means over seeds, and all pairs of arms."""
    return Findings(content.arms, measures_of(content.runs[0].metrics), summarize(content.arms, content.runs),
                    compare(content.arms, content.runs))


def _compared(content: ReportInput, found: Findings) -> dict[str, Any]:
    """What the page says of arms, and by what it was measured."""
    headline, sentences = verdict(found)
    metrics = content.runs[0].metrics
    return {"headline": headline, "sentences": sentences, "pairs": _pairs(found), "charts": _charts(found),
            "scoreboard": scoreboard(found, content.runs), "facts": facts(content.runs),
            "cautions": cautions(content.runs), "metrics": metrics, "is_paired": metrics.get("is_paired", True),
            "has_prompts": metrics.get("is_paired", True) and CLIP_SCORE in found.measures,
            "num_prompts": metrics.get("num_prompts", metrics["num_images"]), "clip_score": CLIP_SCORE,
            "distances": DISTANCES, "num_seeds": len({each.seed for each in content.runs}),
            "guidance": _guidance(content.guidance)}


def _usual_points(content: ReportInput) -> list[Point]:
    """Of each arm's first run, where it stands on each curve."""
    first: dict[str, Run] = {}
    for each in content.runs:
        first.setdefault(each.arm, each)
    return [Point(arm, kind, float(value), run.metrics) for arm, run in first.items() for kind in TITLES
            if (value := _usual(content, arm, kind)) is not None]


def _usual(content: ReportInput, arm: str, kind: Kind) -> float | None:
    if kind == "guidance_scale":
        return content.guidance.get(arm)
    table, name = ("train", "steps") if kind == "train_steps" else ("generate", kind)
    value: float | None = content.config.get(table, {}).get(name)
    return value


def _trained_on(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Arm → kinds of captions that it was trained on."""
    return {arm: [kind for kind, weight in about.get("captions", {}).items() if weight]
            for arm, about in config.get("arm", {}).items()}


# --- captions ------------------------------------------------------------------------------------------------------


def _sources(content: ReportInput, config: Report) -> list[Source]:
    """Where captions are read from: before, after, and what people would write."""
    return [Source("alt-text", content.relabelled, ["alt"]), Source("stitched", content.stitched, content.styles),
            Source("relabelled", content.relabelled, content.styles), _references(content, config)]


def _references(content: ReportInput, config: Report) -> Source:
    return Source("references", content.reference if config.references else [], config.references)


def _captions(content: ReportInput, config: Report) -> dict[str, dict[str, dict[str, Any]]]:
    """What `caption_table` finds, by the experiment's own judge if it reads captions."""
    sources = [each for each in _sources(content, config) if each.shards]
    judge = open_judge(content.judge, content.device) if content.judge and sources else None
    return caption_table(sources, judge if hasattr(judge, "caption") else None)


def _closeness(content: ReportInput, config: Report, said: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of all kinds that were found in the relabelled shards."""
    kinds = [*said.get("alt-text", {}), *said.get("relabelled", {})]
    if content.clip is None or not kinds:
        return {}
    return close_to(_references(content, config), Source("relabelled", content.relabelled, kinds), content.clip,
                    content.device)


# --- comparisons ---------------------------------------------------------------------------------------------------


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
            "ratio": ratio, "p": _p_in_words(each), "verdict": each["verdict"]}


def _p_in_words(each: dict[str, Any]) -> str:
    """`p = 0.012`, `p = 0.012, by Holm p = 0.036`."""
    if each["p"] is None:
        return ""
    return p_text(each["p"]) + (f", by Holm {p_text(each['p_holm'])}" if each.get("p_holm") is not None else "")


def _guidance(scales: dict[str, float]) -> str:
    """`5 (mix: 3)`: that of most arms, and those that differ."""
    if not scales:
        return ""
    usual = statistics.mode(scales.values())
    own = ", ".join(f"{arm}: {scale:g}" for arm, scale in scales.items() if scale != usual)
    return f"{usual:g} ({own})" if own else f"{usual:g}"


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
    rows, reference = [], 0.0
    for each in found.summaries:
        values = [measure.written(value) for value in each.values.get(measure.key, [])]
        if values:
            rows.append(Row(each.arm, values, measure.text(each.mean(measure)), tone=_tone(found, each.arm, measure)))
        if each.arm == found.baseline and values:
            reference = sum(values) / len(values)
    direction = "Lower is better." if measure.lower_is_better else "Higher is better."
    return {"title": measure.label, "note": f"{measure.about} {direction}",
            "svg": dot_chart(rows, reference, f"{measure.label} of every arm")}


def _differences(found: Findings, measure: Measure) -> list[dict[str, Any]]:
    rows = [Row(arm, [measure.written(each["difference"])], measure.change(each["difference"]),
                (measure.written(each["ci"][0]), measure.written(each["ci"][1])), _tone(found, arm, measure))
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


def tied(text: str) -> str:
    """With no line's end before a percent sign."""
    return text.replace(" %", "\u00a0%")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"spread": with_spread, "p_of": p_of}
    environment.filters |= {"signed": signed, "duration": duration, "count": "{:,}".format, "tied": tied}
    return environment.get_template("report.html")
