"""What comparisons say: a headline, sentences with their figures, and both with a table for the terminal."""

import textwrap
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from eval.comparisons import CONTROLS, ArmSummary, baseline, claim
from eval.measures import CLIP_SCORE, DISTANCES, FID, Measure, headline_measures
from eval.statistics import CANT_TELL, MIN_SEEDS


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
        """What the headline goes by: the judges' first metric, or else CLIP score, or a distance where there are no
        prompts.
        """
        return self.headline[0]

    @property
    def baseline(self) -> str:
        return baseline(self.arms)

    @property
    def num_adjusted(self) -> int:
        """Comparisons whose p-values are adjusted as one family."""
        return sum(each.get("p_holm") is not None for each in self.comparisons)

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
    if a is None:
        controls = [arm for arm in found.arms if arm in CONTROLS]
        return f"There is no arm to compare with “{b}”{' but controls' if controls else ''}.", []
    result = found.against(a, lead)
    if result is None:
        return f"“{a}” and “{b}” were not compared by {lead.name}.", []
    said = [sentence for measure in found.headline for sentence in _sentences(a, b, measure, found)]
    return _headline(a, b, found, result["verdict"]), [
        *said, *_disagreement(a, found), *_control(a, found), *_family(found), *_seed_sentences(result)]


def _headline(a: str, b: str, found: Findings, word: str) -> str:
    lead = found.lead
    if word == CANT_TELL:
        said = f"No difference between the arms “{a}” and “{b}” could be shown"
    elif lead in DISTANCES:
        way = "come closer to real ones" if word == "better" else "stay farther from real ones"
        said = f"Pictures of the arm “{a}” {way} than those of “{b}”"
    else:
        said = f"Pictures of the arm “{a}” match their prompts {word} than those of “{b}”"
    if lead == CLIP_SCORE:  # its scale says nothing to most readers
        return f"{said}."
    ours, theirs = (lead.text(found.mean(arm, lead)) for arm in (a, b))
    return f"{said}: {lead.name} {ours} against {theirs}{', lower is better' if lead.lower_is_better else ''}."


def _sentences(a: str, b: str, measure: Measure, found: Findings) -> list[str]:
    """What one measure of the headline says, in at most one sentence."""
    if measure == FID:
        return _fid_sentences(a, b, found)
    result = found.against(a, measure)
    if result is None:
        return []
    lower = ", lower is better," if measure.lower_is_better else ""
    over = f", over {result['num_prompts']:,} prompts" if result.get("num_prompts") else ""
    p = f", {p_text(p_of(result))}" if result["ci"] else ""
    return [f"{measure.label}{lower} of {a} against {b}: {measure.figures(result)}{p}{over}: {result['verdict']}."]


def _fid_sentences(a: str, b: str, found: Findings) -> list[str]:
    ours, theirs = found.mean(a, FID), found.mean(b, FID)
    if ours is None or theirs is None:
        return []
    sentence = f"FID, lower is better: {ours:.2f} for {a}, {theirs:.2f} for {b}"
    result = found.against(a, FID)
    if result is None:
        return [f"{sentence}."]
    if result["ci"] is None:
        return [f"{sentence}; {result.get('note') or 'no interval'}: {result['verdict']}."]
    ratio = " ({:.2f} to {:.2f})".format(*result["ratio_ci"]) if result.get("ratio_ci") else ""
    ratio = f", ratio {result['ratio']:.2f}{ratio}" if result.get("ratio") is not None else ""
    over = f" over {result['num_prompts']:,} prompts" if result.get("num_prompts") else ""
    p = "" if p_of(result) is None else f", {p_text(p_of(result))}"
    return [f"{sentence}; less the bias of their number of pictures, the difference{over} is "
            f"{FID.figures(result)}{ratio}{p}: {result['verdict']}."]


def _disagreement(a: str, found: Findings) -> list[str]:
    results = [(measure, each) for measure in found.headline if (each := found.against(a, measure))]
    words = {each["verdict"] for _, each in results}
    if {"better", "worse"} <= words:
        return ["The measures disagree."]
    ours, theirs, fid = found.mean(a, FID), found.mean(found.baseline, FID), found.against(a, FID)
    if ours is None or theirs is None or (fid and fid["ci"]):
        return []
    opposed = ours > theirs if "better" in words else ours < theirs if "worse" in words else False
    return ["FID, which has no interval here, points the other way."] if opposed else []


def _control(a: str, found: Findings) -> list[str]:
    """What arm `shuffled` did: captions of other images must not beat the baseline, by no measure of the headline."""
    results = [(measure, each) for measure in found.headline if (each := found.against("shuffled", measure))]
    if not results:
        return []
    beaten = [measure for measure, each in results if each["verdict"] == "better"]
    fate = "holds" if results[0][1]["verdict"] == "worse" else "is not shown to fail"
    if beaten:
        fate = f"fails by {' and '.join(each.name for each in beaten)}"
    told = ", ".join(f"{_than(each)} {found.baseline} by {measure.name} ({measure.figures(each)})"
                     for measure, each in results)
    return [f"The control {fate}: captions of other images (shuffled) are {told}.",
            *(_unearned(a, measure, found) for measure in beaten)]


def _unearned(a: str, measure: Measure, found: Findings) -> str:
    """What it means where captions that say nothing of their images beat the baseline."""
    each = found.between(a, "shuffled", measure)
    beside = f"; {a} is {_than(each)} shuffled by it" if each else ""
    return f"So a better {measure.name} need not come of what captions say{beside}."


def _than(result: dict[str, Any]) -> str:
    return {"better": "better than", "worse": "worse than"}.get(result["verdict"], "not told from")


def _family(found: Findings) -> list[str]:
    return [f"p is Holm's over the {found.num_adjusted} comparisons of the headline."] if found.num_adjusted > 1 else []


def _seed_sentences(result: dict[str, Any]) -> list[str]:
    if result["ci"] is None:
        return []
    if result.get("over") == "images":
        return ["It is not known which pictures belong together, so they are compared as wholes: the interval "
                "speaks of other pictures of these very models."]
    num_seeds, num_models = result.get("num_seeds") or 1, result.get("num_base_models") or 1
    if num_seeds < MIN_SEEDS or result.get("over") == "prompts":
        count = {1: "There is one training seed", 2: "There are two training seeds"}.get(
            num_seeds, "Some training seeds have no scores")
        return [f"{count}: the interval speaks of these very models, and training anew may move them by more."]
    models = f" on each of {num_models} base models, and of these models only" if num_models > 1 else ""
    return [f"The intervals speak of other prompts and of training anew, by {num_seeds} training seeds{models}."]


def p_of(result: dict[str, Any]) -> float | None:
    """The p-value of a comparison that its verdict heeds: Holm's where it belongs to the family."""
    adjusted: float | None = result.get("p_holm")
    return result["p"] if adjusted is None else adjusted


def p_text(p: float | None) -> str:
    """`p = 0.012`, `p < 0.001`."""
    if p is None:
        return "no p-value"
    text = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return text.replace(" ", "\u00a0")  # no line ends within it


def for_terminal(found: Findings) -> str:
    """The table, and headline and sentences as a paragraph: at most 80 columns."""
    headline, sentences = verdict(found)
    return f"{_arms_table(found)}\n\n{textwrap.fill(' '.join([headline, *sentences]), 79)}"


def _arms_table(found: Findings) -> str:
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
    interval = " [{}, {}]".format(*map(lead.change, found["ci"])) if found["ci"] else ""
    return f"{lead.change(found['difference'])}{interval} {found['verdict']}"
