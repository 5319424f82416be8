"""What comparisons say: a headline, sentences with their figures, and a table for the terminal."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from eval.comparisons import ArmSummary, baseline, claim
from eval.measures import FID, Measure, headline_measures
from eval.statistics import MIN_SEEDS


@dataclass(frozen=True)
class Findings:
    """What was found of arms, by measure."""

    arms: list[str]
    measures: list[Measure]
    summaries: list[ArmSummary]
    comparisons: list[dict[str, Any]]

    @cached_property
    def headline(self) -> list[Measure]:
        return headline_measures(self.measures)

    @property
    def lead(self) -> Measure:
        """What the headline goes by: the judge's first metric, or else CLIP score."""
        return self.headline[0]

    @property
    def baseline(self) -> str:
        return baseline(self.arms)

    def against(self, arm: str, measure: Measure) -> dict[str, Any] | None:
        """The comparison of an arm with the baseline, if there is one."""
        return self.between(arm, self.baseline, measure)

    def between(self, a: str, b: str, measure: Measure) -> dict[str, Any] | None:
        """The comparison of two arms, if there is one."""
        return next((each for each in self.comparisons
                     if (each["a"], each["b"], each["metric"]) == (a, b, measure.key)), None)

    def mean(self, arm: str, measure: Measure) -> float | None:
        return next((each.mean(measure) for each in self.summaries if each.arm == arm), None)


def verdict(found: Findings) -> tuple[str, list[str]]:
    """A headline, and sentences that say on what it stands."""
    a, b, lead = claim(found.arms), found.baseline, found.lead
    result = found.against(a, lead) if a else None
    if a is None or result is None:
        return "There is no second arm to compare.", []
    headline = f"Pictures of the arm “{a}” match their prompts {result['verdict']} than those of “{b}”"
    if result["verdict"] == "can't tell":
        headline = f"No difference between the arms “{a}” and “{b}” could be shown"
    if lead.is_share:
        ours, theirs = (lead.text(found.mean(arm, lead)) for arm in (a, b))
        headline += f": {lead.label.lower()} {ours} against {theirs}"
    scores = [_score_sentence(a, b, measure, each) for measure in found.headline[:-1]
              if (each := found.against(a, measure))]
    return f"{headline}.", [*scores, *_fid_sentences(a, b, found), *_disagreement(a, found), *_control(a, found),
                            *_seed_sentences(result)]


def _score_sentence(a: str, b: str, measure: Measure, found: dict[str, Any]) -> str:
    return (f"{measure.label} of {a} against {b}: {measure.change(found['difference'])}{measure.unit}, 95 % interval "
            f"{measure.interval(found)}, {p_text(found['p'])}, over {found['num_prompts']:,} prompts.")


def _fid_sentences(a: str, b: str, found: Findings) -> list[str]:
    ours, theirs = found.mean(a, FID), found.mean(b, FID)
    if ours is None or theirs is None:
        return []
    sentence = f"FID, lower is better: {ours:.2f} for {a}, {theirs:.2f} for {b}"
    result = found.against(a, FID)
    if result is None:
        return [f"{sentence}."]
    if result["ci"] is None:
        return [f"{sentence}; {result['note']}."]
    ratio = " ({:.2f} to {:.2f})".format(*result["ratio_ci"]) if result.get("ratio_ci") else ""
    ratio = f", ratio {result['ratio']:.2f}{ratio}" if result.get("ratio") is not None else ""
    return [f"{sentence}; difference {FID.change(result['difference'])}, 95 % interval {FID.interval(result)}{ratio}: "
            f"{result['verdict']}."]


def _disagreement(a: str, found: Findings) -> list[str]:
    results = [(measure, each) for measure in found.headline if (each := found.against(a, measure))]
    words = {each["verdict"] for measure, each in results if measure is not FID or each["ci"]}
    if FID not in [measure for measure, each in results if each["ci"]]:  # then its sign must do
        ours, theirs = found.mean(a, FID), found.mean(found.baseline, FID)
        if ours is not None and theirs is not None and ours != theirs:
            words.add("better" if ours < theirs else "worse")
    return ["The measures disagree."] if {"better", "worse"} <= words else []


def _control(a: str, found: Findings) -> list[str]:
    """What arm `shuffled` did: captions of other images must not beat the baseline, by no measure of the headline."""
    b = found.baseline
    results = [(measure, each) for measure in found.headline if (each := found.against("shuffled", measure))]
    if not results:
        return []
    beaten = [(measure, each) for measure, each in results if each["verdict"] == "better"]
    if not beaten:
        lead, first = results[0]
        return [f"The control holds: captions of other images (shuffled) do not beat {b} ({lead.label} "
                f"{lead.change(first['difference'])}{lead.unit}, 95 % interval {lead.interval(first)})."]
    told = [f"by {measure.label} ({measure.change(each['difference'])}{measure.unit}, 95 % interval "
            f"{measure.interval(each)})" for measure, each in beaten]
    than = {"better": "is better than", "worse": "is worse than"}
    beside = [f"; {a} {than.get(each['verdict'], 'cannot be told from')} shuffled by {measure.label}"
              for measure, _ in beaten if (each := found.between(a, "shuffled", measure))]
    return [f"The control fails: captions of other images (shuffled) also beat {b} {' and '.join(told)}, so not all of "
            f"the difference comes of what captions say{''.join(beside)}."]


def _seed_sentences(result: dict[str, Any]) -> list[str]:
    num_seeds, num_models = result.get("num_seeds") or 1, result.get("num_base_models") or 1
    per_model = num_seeds // num_models
    if per_model < MIN_SEEDS:
        count = "There is one training seed" if per_model == 1 else "There are two training seeds"
        return [f"{count}: the interval speaks of these very models, and training anew may move them by more."]
    models = f" on each of {num_models} base models, and of these models only" if num_models > 1 else ""
    return [f"The intervals speak of other prompts and of training anew, by {per_model} training seeds{models}."]


def p_text(p: float | None) -> str:
    """`p = 0.012`, `p < 0.001`."""
    if p is None:
        return "no p-value"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def arms_table(found: Findings) -> str:
    """The result for a terminal, at most 80 columns."""
    lead, columns = found.lead, [found.headline[-1], *reversed(found.headline[:-1])]
    widths = [9, 9, 12][:len(columns)]
    names = [f"{measure.label.split()[0][:10]} {measure.arrow}" for measure in columns]
    against = f"{lead.label[:16]} against {found.baseline[:12]}" if found.comparisons else ""
    lines = [_line("arm", names, widths, against)]
    for each in found.summaries:
        values = [measure.text(each.mean(measure)) for measure in columns]
        lines.append(_line(each.arm, values, widths, _against(lead, found.against(each.arm, lead))))
    return "\n".join(lines)


def _line(name: str, cells: list[str], widths: list[int], last: str) -> str:
    name = name if len(name) <= 14 else name[:13] + "…"
    middle = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{name:<14}{middle}   {last}".rstrip()


def _against(lead: Measure, found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = map(lead.change, found["ci"])
    return f"{lead.change(found['difference'])} [{low}, {high}] {found['verdict']}"
