"""Arms × prompt sets, and every measure × arms."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from scored_runs import make_run

from eval.comparisons import Run, compare, summarize
from eval.matrix import is_own, matrix
from eval.measures import measures_of
from eval.scoreboard import cautions, facts, scoreboard
from eval.verdict import Findings

EFFECTS = {"base": 1.4, "alt": 0.0, "mix": 1.0, "short": 0.2}


def found_of(runs: list[Run], arms: list[str]) -> Findings:
    return Findings(arms, measures_of(runs[0].metrics), summarize(arms, runs), compare(arms, runs))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root, seed, arm, effect, 60, judged=True) for seed in (0, 1, 2) for arm, effect in EFFECTS.items()]


# --- by the kind of prompt -----------------------------------------------------------------------------------------


def test_each_cell_holds_the_mean_of_its_arm_and_set(judged: list[Run]) -> None:
    found = matrix(found_of(judged, list(EFFECTS)), judged, {"mix": ["short", "long"], "alt": ["alt"]})
    assert found and [(each.name, each.num_images, each.is_probe) for each in found.columns] == [
        ("short", 48, False), ("probe<i>", 6, True), ("half", 6, True)]
    rows = dict(found.rows)
    of_mix = [run.metrics["sets"]["short"]["all_right"] for run in judged if run.arm == "mix"]
    assert rows["mix"][0].text == f"{100 * sum(of_mix) / 3:.1f} %" and rows["mix"][0].beneath
    assert (rows["alt"][0].shade, rows["base"][0].shade) == (0, 100) and 0 < rows["mix"][0].shade < 100


def test_the_best_is_marked_only_where_it_is_shown_to_be_better(judged: list[Run], tmp_path: Path) -> None:
    found = matrix(found_of(judged, list(EFFECTS)), judged, {})
    assert found and found.has["best"]
    best = [(arm, column.name) for arm, cells in found.rows for cell, column in zip(cells, found.columns, strict=True)
            if cell.is_best]
    assert ("mix", "short") in best and not [arm for arm, _ in best if arm == "base"]  # which is a control
    alone = [make_run(tmp_path, 0, arm, effect, 60, judged=True) for arm, effect in (("alt", 0.0), ("short", 0.1))]
    none = matrix(found_of(alone, ["alt", "short"]), alone, {})
    assert none and dict(none.rows)["short"][0].shade == 100 and not none.has["best"]


def test_a_style_is_that_of_prompts_by_name(judged: list[Run]) -> None:
    found = matrix(found_of(judged, list(EFFECTS)), judged, {"mix": ["short", "long"], "base": []})
    assert found and {arm: cells[0].is_own for arm, cells in found.rows} == {
        "base": False, "alt": False, "mix": True, "short": True}
    assert is_own(["rich"], "dpg-Rich_2") and not is_own(["rich"], "richer") and not is_own([], "short")


def test_no_grid_of_one_prompt_set_or_of_none(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, 0, arm) for arm in ("alt", "mix")]
    assert matrix(found_of(runs, ["alt", "mix"]), runs, {}) is None
    for run in runs:
        bare = {key: value for key, value in run.metrics.items() if key != "clip_score"}
        (run.evaluated / "metrics.json").write_text(json.dumps(bare | {"sets": {"a": {}, "b": {}}}))
    again = [replace(run) for run in runs]  # which read them anew
    assert matrix(found_of(again, ["alt", "mix"]), again, {}) is None


# --- every measure -------------------------------------------------------------------------------------------------


def test_every_measure_is_listed_with_its_verdict(judged: list[Run]) -> None:
    rows = {row.measure.label: row.cells for row in scoreboard(found_of(judged, list(EFFECTS)), judged)}
    assert list(rows) == ["All right", "CLIP score", "FID", "FID∞", "KID ×1000", "Precision"]
    arms = list(EFFECTS)
    assert rows["FID"][arms.index("mix")] == ("35.00", "better")
    assert rows["FID∞"][arms.index("mix")] == ("33.00", "better")
    assert rows["KID ×1000"][arms.index("mix")] == ("15.00", "better")
    assert rows["Precision"][arms.index("mix")] == ("50.0 %", "can't tell")
    assert {cells[arms.index("alt")][1] for cells in rows.values()} == {""}


def test_nothing_is_listed_twice_where_the_headline_is_all(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, 0, arm) for arm in ("alt", "mix")]
    assert scoreboard(found_of(runs, ["alt", "mix"]), runs) == []


def test_who_measured_is_named_with_resize_and_numbers(judged: list[Run]) -> None:
    found = {fact.name: fact.text for fact in facts(judged)}
    assert found["All right"] == "my <b>judge</b>" and found["CLIP score"] == "open_clip tiny"
    assert found["FID, KID ×1000, Precision"] == (
        "timm <b>net</b> 01ab, 64 features; resize: bicubic; 48 pictures against 5,000 real images")


def test_too_few_pictures_are_said_with_the_bias(judged: list[Run], tmp_path: Path) -> None:
    assert cautions(judged) == []
    runs = [make_run(tmp_path, 0, "alt"), make_run(tmp_path, 0, "mix", 1.0)]
    said, = cautions(runs)
    assert said.startswith("FID: no interval: 40 images are too few for 64 features (at least 256). ")
    assert "Half as many pictures give 2.4 to 2.5 more" in said


def test_arms_of_other_sizes_or_numbers_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, 0, "alt", judged=True), make_run(tmp_path, 0, "mix", judged=True)]
    runs[1].metrics.update(num_images=1234, resolutions={"64×64": 1200, "32×32": 34})
    numbers, sizes = cautions(runs)
    assert "alt 32; mix 1,234" in numbers and "FIDs differ for that alone" in numbers
    assert "alt 32×32; mix 64×64, 32×32" in sizes
