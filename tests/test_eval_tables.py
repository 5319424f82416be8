"""Tables for papers and programs: what is written reads back, whatever it is called. And what trackers are told."""

import csv
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from finished_runs import Made, finish
from hypothesis import example, given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.curves import Kind, Point
from eval.finished import FinishedRun, read_runs
from eval.tables import COMPARISONS, METRICS, markdown, to_csv, write_tables
from eval.trackers import log_report
from recap.rundir import StageDir
from train_t2i.config import Train

ARMS = {"base": -0.5, "alt": 0.0, "mix": 1.0, "shuffled": 0.0}


@dataclass(frozen=True)
class Scripted:
    """A scored arm of which no more than its figures is there."""

    arm: str
    fid: float
    num_images: int = 100
    seed: int = 0
    base_model: int = 0
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Any]:
        return {"fid": self.fid, "judges": [], "num_images": self.num_images, **self.others}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    root = tmp_path_factory.mktemp("runs")
    made = Made(ARMS, seeds=(0, 1), judge="my | <b>judge</b>\n| x |", clip_model="=HYPERLINK(1)")
    return read_runs([finish(root / "one", made), finish(root / "two", Made())])[0]


@pytest.fixture(scope="module")
def folder(run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tables")
    write_tables(out, run.findings, run.runs, {"torch": "2.11", "hardware": "2 <i>cores</i>"})
    return out


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_tables(text: str) -> list[list[list[str]]]:
    """Markdown tables as cells, their escapes undone; every row as wide as its header."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]] for line in block.splitlines()]
        assert {len(line) for line in lines} == {len(lines[0])}
        assert set(lines[1]) <= {"---", "---:"}
        found.append([[re.sub(r"\\(.)", r"\1", cell) for cell in line] for line in (lines[0], *lines[2:])])
    return found


def test_every_figure_reads_back_from_csv_as_it_was(run: FinishedRun, folder: Path) -> None:
    rows = read_csv(folder / "metrics.csv")
    assert tuple(rows[0]) == METRICS
    found = {(row["arm"], int(row["seed"]), row["measure"]): float(row["value"]) for row in rows}
    keys = [measure.key for measure in run.findings.measures]
    assert {"all_right", "clip_score", "fid", "kid", "precision"} <= set(keys)
    assert {key: value for key, value in found.items() if key[2] != "fid_infinity"} == {
        (each.arm, each.seed, key): each.metrics[key] for each in run.runs for key in keys}
    assert found["mix", 1, "fid_infinity"] == run.of("mix")[1].metrics["fid_infinity"]


def test_every_comparison_reads_back_from_csv_as_it_was(run: FinishedRun, folder: Path) -> None:
    rows = read_csv(folder / "comparisons.csv")
    assert tuple(rows[0]) == COMPARISONS and len(rows) == len(run.comparisons) > 0
    for row, each in zip(rows, run.comparisons, strict=True):
        assert (row["a"], row["b"], row["metric"], row["verdict"]) == tuple(
            each[key] for key in ("a", "b", "metric", "verdict"))
        values = [each["difference"], *(each["ci"] or (None, None)), each["p"], each["p_holm"], each["num_prompts"],
                  each["num_seeds"]]
        assert [row[key] for key in COMPARISONS[3:8] + COMPARISONS[9:11]] == [
            "" if value is None else repr(value) for value in values]
        assert row["note"] == (each["note"] or "")
    assert {row["ci_low"] == "" for row in rows} == {False, True}


def test_the_markdown_table_has_arms_with_their_spread_and_what_they_are_worth(run: FinishedRun, folder: Path) -> None:
    text = (folder / "table.md").read_text(encoding="utf-8")
    arms, against = read_tables(text)
    assert arms[0] == ["Arm", "All right ↑", "CLIP score ↑", "FID ↓"] and [row[0] for row in arms[1:]] == list(ARMS)
    fids = [each.metrics["fid"] for each in run.of("mix")]
    assert arms[3][3] == f"{sum(fids) / 2:.2f} ± {abs(fids[0] - fids[1]) / 2 ** 0.5:.2f}"
    assert "±" not in arms[1][3]  # base is drawn once
    assert [(row[0], row[1]) for row in against[1:]] == [
        (arm, label) for arm in ARMS if arm != "alt" for label in ("All right", "CLIP score", "FID")]
    row = next(row for row in against if row[:2] == ["mix", "FID"])
    found = run.findings.between("mix", "alt", run.findings.measures[2])
    assert found is not None and row[2] == f"{found['difference']:+.2f}".replace("-", "−") and row[5] == "better"
    assert " to " in row[3] and row[4] == ("&lt; 0.001" if found["p_holm"] < 0.001 else f"{found['p_holm']:.3f}")


def test_it_says_beneath_what_the_table_stands_on(folder: Path) -> None:
    text = (folder / "table.md").read_text(encoding="utf-8")
    for said in ("40 pictures of 40 prompts by every arm and seed, and 50 real images", "2 training seeds", "(Holm)",
                 "FID: timm net, 4 features, clean.", "CLIP score: =HYPERLINK(1).", "torch 2.11"):
        assert said in text
    assert r"All right: my \| &lt;b&gt;judge&lt;/b&gt;\\n\| x \|." in text and "<" not in text


@given(st.lists(st.text(), min_size=1, max_size=4))
@example(["a|b\\", "<img src=x onerror=alert(1)>", "a\n| b |\u2028", "\ud800"])
def test_whatever_text_is_in_a_markdown_table_stays_in_its_cell(cells: list[str]) -> None:
    lines = markdown(["arm", *cells], [["x", *cells]] * 2).split("\n")
    assert len(lines) == 4
    for line in lines:
        assert len(line.splitlines()) == 1
        bars = re.sub(r"\\.", "", line).count("|")
        assert bars == len(cells) + 2 and "<" not in line


@given(st.lists(st.one_of(st.text(), st.floats(allow_nan=False), st.integers(), st.none()), min_size=1))
@example(["=1+1", "+1", "-1", "@x", "  =1", "\t=1", "＝1", "a,\"b\"\r\nc", "\ud800", -1.5, None])
def test_no_text_in_csv_is_a_formula_and_numbers_stay_numbers(cells: list[str | float | None]) -> None:
    _, row = csv.reader(io.StringIO(to_csv(["x"] * len(cells), [cells]).decode(), newline=""))
    assert len(row) == len(cells)
    for cell, read in zip(cells, row, strict=True):
        if isinstance(cell, str):
            assert not read.strip().startswith(tuple("=+-@＝＋－＠")) and "\n" not in read and "\r" not in read
        else:
            assert read == ("" if cell is None else repr(cell))


# --- trackers ------------------------------------------------------------------------------------------------------


def told(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "recap"), {"scalars": 0})
    found.Reload()
    return found


def experiment(*trackers: str) -> dict[str, Any]:
    train = Train(trackers=trackers, steps=100).model_dump(mode="json")
    return {"train": train, "arm": {"base": {"captions": {}}, "alt": {"captions": {"alt": 1}}}}


def at(step: int, fid: float, kind: Kind = "train_steps", **others: Any) -> Point:
    return Point("alt", kind, step, Scripted("alt", fid, **others).metrics)


def test_tensorboard_is_told_of_every_arm_by_training_step(tmp_path: Path) -> None:
    runs = [Scripted("alt", 3.0), Scripted("base", 9.0),
            Scripted("alt", 3.5, seed=1, others={"fid_infinity": 2.5, "clip_score": 21.0})]
    swept = [at(75, 4.0), at(50, 4.5), at(5, 7.0, "guidance_scale")]
    for _ in range(2):  # a report that is written again tells each figure once
        log_report(StageDir(tmp_path, {}), experiment("tensorboard"), runs, swept, "cpu")
    found = told(tmp_path / "seed-0/alt").Scalars("fid/over_100_pictures")
    assert [(each.step, each.value) for each in found] == [(50, 4.5), (75, 4.0), (100, 3.0)]
    assert [each.step for each in told(tmp_path / "seed-0/base").Scalars("fid/over_100_pictures")] == [0]
    tags = told(tmp_path / "seed-1/alt").Tags()["scalars"]
    assert sorted(tags) == ["clip_score/over_100_pictures", "fid/over_100_pictures", "fid_infinity/over_100_pictures"]


def test_figures_of_other_numbers_of_pictures_are_another_curve(tmp_path: Path) -> None:
    swept = [at(50, 8.0, num_images=20), at(100, 6.0, num_images=20)]
    log_report(StageDir(tmp_path, {}), experiment("tensorboard"), [Scripted("alt", 3.0)], swept, "cpu")
    found = told(tmp_path / "seed-0/alt")
    assert [(each.step, each.value) for each in found.Scalars("fid/over_20_pictures")] == [(50, 8.0), (100, 6.0)]
    assert [(each.step, each.value) for each in found.Scalars("fid/over_100_pictures")] == [(100, 3.0)]


def test_what_all_prompts_gave_stands_before_a_point_of_the_same_step(tmp_path: Path) -> None:
    log_report(StageDir(tmp_path, {}), experiment("tensorboard"), [Scripted("alt", 3.0)], [at(100, 3.1)], "cpu")
    found = told(tmp_path / "seed-0/alt").Scalars("fid/over_100_pictures")
    assert [(each.step, each.value) for each in found] == [(100, 3.0)]


@pytest.mark.parametrize("config", [experiment(), {}])
def test_without_trackers_nothing_is_written(config: dict[str, Any], tmp_path: Path) -> None:
    log_report(StageDir(tmp_path, {}), config, [Scripted("alt", 3.0)], [], "cpu")
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_fails_costs_a_warning_and_not_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                                 ) -> None:
    (tmp_path / "seed-0").write_text("a file where the folder should be")
    log_report(StageDir(tmp_path, {}), experiment("tensorboard"), [Scripted("alt", 3.0)], [], "cpu")
    said = capsys.readouterr().err
    assert said.startswith("warning: train.trackers: tensorboard could not be told") and "metrics.csv" in said
