"""What is said of comparisons, in sentences and in the terminal."""

from dataclasses import replace
from typing import Any

import pytest
from scored_runs import Scripted, findings

from eval.comparisons import summarize
from eval.measures import measures_of
from eval.verdict import Findings, for_terminal, verdict


@pytest.mark.parametrize(("score", "fid", "words"), [
    ((-4, -5, -3), (1, 0.5, 2), "The control holds: captions of other images (shuffled) are worse than alt by CLIP "
                                "score (−4.00, 95 % interval −5.00 to −3.00), worse than alt by FID (+1.00"),
    ((-4, -5, -3), (-9, -10, -8), "The control fails by FID: captions of other images (shuffled) are worse than alt by "
                                  "CLIP score (−4.00, 95 % interval −5.00 to −3.00), better than alt by FID (−9.00"),
    ((3, 2, 4), (-9, -10, -8), "The control fails by CLIP score and FID"),
    ((4, -0.1, 8.1), (-3, 0, 0), "The control is not shown to fail: captions of other images (shuffled) are not told "
                                 "from alt by CLIP score (+4.00, 95 % interval −0.10 to +8.10), not told from alt by "
                                 "FID (−3.00, no interval: too few)."),
])
def test_what_the_control_did(score: tuple[float, float, float], fid: tuple[float, float, float], words: str) -> None:
    found = findings(["alt", "mix", "shuffled"], mix=("mix", "clip_score", 5, 4, 6),
                     score=("shuffled", "clip_score", *score), fid=("shuffled", "fid", *fid))
    said = " ".join(verdict(found)[1])
    assert words in said
    assert ("So a better FID need not come of what captions say." in said) == ("by FID:" in words or "and FID" in words)


def test_measures_that_disagree() -> None:
    arms = ["alt", "mix"]
    assert "The measures disagree." in verdict(findings(
        arms, a=("mix", "clip_score", 5, 4, 6), b=("mix", "fid", 10, 9, 11)))[1]
    without = verdict(findings(arms, a=("mix", "clip_score", 5, 4, 6), b=("mix", "fid", 10, 0, 0)))[1]
    assert "FID, which has no interval here, points the other way." in without
    assert "The measures disagree." not in without
    agreeing = verdict(findings(arms, a=("mix", "clip_score", -5, -6, -4), b=("mix", "fid", 10, 0, 0)))[1]
    assert not [each for each in agreeing if "disagree" in each or "other way" in each]


def test_without_an_arm_to_compare() -> None:
    assert verdict(findings(["base", "alt"]))[0] == "There is no arm to compare with “alt” but controls."
    assert "“mix” and “alt” were not compared by CLIP score" in verdict(findings(["alt", "mix"]))[0]


# --- by other measures than a judge's shares -------------------------------------------------------------------------


def compared(metrics: dict[str, Any], metric: str, **values: Any) -> Findings:
    """Arms alt and mix, with these metrics each, compared by one of them."""
    runs = [Scripted(arm, {key: value[place] if isinstance(value, tuple) else value for key, value in metrics.items()})
            for place, arm in enumerate(("alt", "mix"))]
    each = {"a": "mix", "b": "alt", "metric": metric, "difference": -0.5, "ci": [-0.9, -0.1], "p": 0.01,
            "num_prompts": 80, "num_seeds": 3, "over": "prompts and seeds", "verdict": "better", **values}
    return Findings(["alt", "mix"], measures_of(runs[0].metrics), summarize(["alt", "mix"], runs), [each])


def test_a_leading_measure_of_which_less_is_better_is_said_to_be_one() -> None:
    judges = [{"metrics": {"count_error": {"about": "", "lower_is_better": True, "is_share": False}}}]
    headline, said = verdict(compared({"count_error": (0.9, 0.4), "clip_score": 20.0, "judges": judges}, "count_error"))
    assert headline == ("Pictures of the arm “mix” match their prompts better than those of “alt”: count error 0.40 "
                        "against 0.90, lower is better.")
    assert said[0].replace("\u00a0", " ") == (
        "Count error, lower is better, of mix against alt: −0.50, 95 % interval −0.90 to −0.10, p = 0.010, over 80 "
        "prompts: better.")


@pytest.mark.parametrize(("word", "words"), [
    ("better", "come closer to real ones than those of “alt”: FID 20.00 against 21.50, lower is better."),
    ("worse", "stay farther from real ones than those of “alt”: FID 20.00 against 21.50"),
    ("can't tell", "No difference between the arms “mix” and “alt” could be shown: FID 20.00 against 21.50"),
])
def test_pictures_without_prompts_go_by_their_distance(word: str, words: str) -> None:
    found = compared({"fid": (21.5, 20.0)}, "fid", verdict=word)
    assert words in verdict(found)[0] and found.lead.key == "fid"
    assert "CLIP" not in " ".join([*verdict(found)[1], for_terminal(found)])


def test_without_an_interval_the_terminal_says_so_much_and_no_more() -> None:
    found = compared({"fid": (21.5, 20.0)}, "fid", ci=None, p=None, note="no interval: too few", verdict="can't tell")
    assert "−0.50 can't tell" in for_terminal(found)
    assert verdict(found)[1] == [
        "FID, lower is better: 20.00 for mix, 21.50 for alt; no interval: too few: can't tell."]


def test_pictures_that_are_not_paired_are_said_to_be_so() -> None:
    said = verdict(compared({"fid": (21.5, 20.0)}, "fid", over="images", num_prompts=None))[1]
    assert any("not known which pictures belong together" in sentence for sentence in said)
    assert not any("seed" in sentence for sentence in said)


def test_every_figure_is_given_with_its_verdict() -> None:
    found = findings(["alt", "mix"], a=("mix", "clip_score", 5, -1, 6), b=("mix", "fid", 10, 9, 11))
    assert [sentence.rsplit(": ", 1)[1] for sentence in verdict(found)[1][:2]] == ["can't tell.", "worse."]


def test_holms_p_stands_in_for_the_plain_one_and_is_named_once() -> None:
    found = compared({"clip_score": 20.0, "fid": 20.0}, "clip_score", p_holm=0.02)
    more = replace(found, comparisons=[*found.comparisons, {**found.comparisons[0], "metric": "fid", "p_holm": 0.04}])
    said = " ".join(verdict(more)[1]).replace("\u00a0", " ")
    assert "p = 0.020" in said and "p = 0.040" in said and "p = 0.010" not in said
    assert said.count("p is Holm's over the 2 comparisons of the headline.") == 1
    assert "Holm" not in " ".join(verdict(found)[1])  # of one there is nothing to adjust
