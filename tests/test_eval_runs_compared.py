"""`recap report RUN1 RUN2 …`: a verdict where runs were drawn and scored alike, and the reason where they were not."""

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import recap_here
from finished_runs import Made, finish, write_report

from eval.comparisons import Run
from eval.finished import read_runs
from eval.runs_compared import compare_runs
from recap.errors import UserError

SEEDS = (0, 1, 2)
FIRST = Made(seeds=SEEDS, config={"train": {"lr": 1e-5, "steps": 100}})
SECOND = Made({"alt": 0.0, "mix": 1.8}, seeds=SEEDS, config={"train": {"lr": 2e-5, "steps": 100}})
PAYLOAD = "<img src=x onerror=alert(1)><script>document.title='pwned'</script>"


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Two runs, of which the second is drawn with some values of its own → their comparisons."""
    def of(first: Made = FIRST, **changes: Any) -> list[dict[str, Any]]:
        runs = [finish(tmp_path / "first", first), finish(tmp_path / "second", replace(SECOND, **changes))]
        compare_runs(runs, tmp_path / "out")
        found: list[dict[str, Any]] = json.loads((tmp_path / "out/compared.json").read_bytes())["comparisons"]
        return found
    return of


def of_measure(found: list[dict[str, Any]], arm: str, metric: str) -> dict[str, Any]:
    each, = (each for each in found if (each["a"], each["b"], each["metric"]) == (arm, arm, metric))
    return each


def test_runs_that_were_drawn_and_scored_alike_get_a_verdict(pair: Callable[..., list[dict[str, Any]]],
                                                             tmp_path: Path) -> None:
    found = pair()
    for metric in ("clip_score", "fid"):
        better, same = of_measure(found, "mix", metric), of_measure(found, "alt", metric)
        assert better["verdict"] == "better" and better["over"] == "prompts and seeds" and better["num_prompts"] == 40
        assert same["verdict"] == "can't tell" and same["difference"] == 0
    assert of_measure(found, "mix", "clip_score")["difference"] == pytest.approx(0.8)
    assert {(each["a"], each["b"]) for each in found} == {("alt", "alt"), ("mix", "mix")}
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "“mix” of second" in page and "train.lr" in page and "train.steps" not in page


def test_headline_ps_are_corrected_as_one_family(pair: Callable[..., list[dict[str, Any]]]) -> None:
    found = pair(effects={"alt": 0.0, "mix": 1.0})  # the same run again
    family = [each for each in found if each["p_holm"] is not None]
    assert sorted({each["metric"] for each in family}) == ["all_right", "clip_score", "fid"] and len(family) == 6
    assert all(each["p_holm"] >= each["p"] and each["verdict"] == "can't tell" for each in family)


@pytest.mark.parametrize(("changes", "metric", "why"), [
    ({"prompts": [f"other {place}" for place in range(40)]}, "clip_score", "other prompts"),
    ({"prompts": [f"prompt {place}" for place in range(60)]}, "fid", "60 pictures against 40: FID falls with"),
    ({"prompts": [f"prompt {place}" for place in range(60)]}, "kid", "60 pictures against 40: KID ×1000 depends on"),
    ({"prompts": [f"prompt {place}" for place in range(60)]}, "all_right", "60 pictures against 40: other prompts"),
    ({"network": "clean-fid"}, "fid", "other FID network: clean-fid, not timm net"),
    ({"num_reference": 60}, "fid", "60 real images against 50"),
    ({"reference_seed": 7}, "fid", "other real images"),
    ({"clip_model": "ViT-L"}, "clip_score", "other CLIP model: ViT-L, not open_clip tiny"),
    ({"judge": "reader 2"}, "all_right", "other judge: reader 2, not reader 1"),
])
def test_what_was_drawn_or_scored_otherwise_stands_beside_without_a_verdict(
        changes: dict[str, Any], metric: str, why: str, pair: Callable[..., list[dict[str, Any]]], tmp_path: Path
        ) -> None:
    each = of_measure(pair(**changes), "mix", metric)
    assert each["note"].startswith(why) and None not in each["means"]
    assert {each[key] for key in ("difference", "ci", "p", "p_holm", "verdict", "num_prompts")} == {None}
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    table = (tmp_path / "out/table.md").read_text(encoding="utf-8").replace("\\", "")
    assert why in page and (why in table or metric == "kid")  # which is no headline's


def test_what_is_alike_is_compared_beside_what_is_not(pair: Callable[..., list[dict[str, Any]]]) -> None:
    found = pair(network="clean-fid", clip_model="ViT-L")
    assert {each["metric"] for each in found if each["verdict"]} == {"all_right"}


def test_real_images_that_were_copied_are_the_same(pair: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    pair()
    path = tmp_path / "second/reference/features.npz"
    with np.load(path) as content:
        members = dict(content)
    about = json.loads(str(members["about"])) | {"data": "other files"}
    np.savez(path, **members | {"about": np.str_(json.dumps(about))})
    first, second = read_runs([tmp_path / "first", tmp_path / "second"])
    assert second.has_real_images_of(first, "features") is True
    path.unlink()
    first, second = read_runs([tmp_path / "first", tmp_path / "second"])
    assert second.has_real_images_of(first, "features") is None


def test_other_seeds_leave_an_interval_for_these_very_models(pair: Callable[..., list[dict[str, Any]]]) -> None:
    each = of_measure(pair(seeds=(0, 1)), "mix", "clip_score")
    assert each["over"] == "prompts" and each["verdict"] == "better" and each["num_seeds"] == 2


def test_arms_that_the_headlines_speak_of_are_compared_though_called_otherwise(
        pair: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    found = pair(replace(FIRST, judge=None), effects={"alt": 0.0, "long": 1.8}, judge=None)
    assert {(each["a"], each["b"]) for each in found} == {("alt", "alt"), ("long", "mix")}
    headline = re.search(r"<h1>(.*)</h1>", (tmp_path / "out/index.html").read_text(encoding="utf-8"))
    assert headline and headline[1] == "“long” of second is better than “mix” of first."
    assert re.search(r"CLIP score: 2\d\.\d\d against 2\d\.\d\d, difference \+0\.\d\d, 95 % interval \+.* \(Holm\)\.",
                     (tmp_path / "out/table.md").read_text(encoding="utf-8"))


def test_tables_and_the_page_give_the_same_figures(pair: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    found = pair(clip_model="ViT-L")
    with open(tmp_path / "out/comparisons.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run_a"], row["run_b"], row["a"], row["metric"], row["difference"], row["verdict"]) for row in rows] \
        == [("second", "first", each["a"], each["metric"], "" if each["difference"] is None
             else repr(each["difference"]), each["verdict"] or "") for each in found]
    with open(tmp_path / "out/metrics.csv", newline="", encoding="utf-8") as file:
        values = [row for row in csv.DictReader(file) if row["measure"] == "fid" and row["run"] == "second"]
    assert len(values) == 2 * len(SEEDS)
    said = json.loads((tmp_path / "out/compared.json").read_bytes())["runs"]
    assert [float(row["value"]) for row in values] == [run["metrics"]["fid"] for run in said if run["run"] == "second"]


def test_of_three_runs_each_is_held_against_the_first(tmp_path: Path) -> None:
    runs = [finish(tmp_path / name / "run", replace(FIRST, seeds=(0,))) for name in ("a", "b", "c")]
    said = compare_runs(runs)
    assert (tmp_path / "a/compared-a-run-b-run-c-run/index.html").is_file() and "b/run" in said
    found = json.loads((tmp_path / "a/compared-a-run-b-run-c-run/compared.json").read_bytes())
    assert found["names"] == ["a/run", "b/run", "c/run"]
    assert {(each["run_a"], each["run_b"]) for each in found["comparisons"]} == {("b/run", "a/run"), ("c/run", "a/run")}


# --- the page ------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """The elements of a page, and the scripts and event handlers among them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of runs whose names, models and settings are as bad as can be."""
    root = tmp_path_factory.mktemp("runs")
    made = replace(FIRST, network=PAYLOAD, clip_model="x" * 3000,
                   config={"train": {PAYLOAD: PAYLOAD, "note": "y" * 3000}})
    runs = [finish(root / ("without-an-end-" * 9), made), finish(root / "<b>=1+1", replace(SECOND, judge=PAYLOAD))]
    compare_runs(runs, root / "out")
    return root / "out"


def test_hostile_text_stays_text_and_nothing_is_fetched(hostile: Path) -> None:
    html = (hostile / "index.html").read_text(encoding="utf-8")
    page = Tags(html)
    assert not page.tags & {"script", "img", "iframe", "link"} and not page.handlers
    assert "default-src 'none'" in html and "http://" not in html and "https://" not in html
    assert "--paper" in html and "prefers-color-scheme: dark" in html and "{%" not in html  # the report's own clothes
    assert "<" not in (hostile / "table.md").read_text(encoding="utf-8")


@pytest.mark.full
def test_in_a_browser_nothing_overflows(hostile: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    (hostile / "measure.html").write_text("""<!doctype html><title>…</title><body><script>
        const found = [];
        for (const width of [320, 390, 768, 1280]) {
            const frame = document.createElement("iframe");
            frame.style.width = width + "px"; frame.style.height = "900px"; frame.style.border = 0;
            frame.onload = () => {
                const inner = frame.contentDocument, root = inner.documentElement;
                for (const each of inner.querySelectorAll("details")) each.open = true;
                found.push([width, root.scrollWidth - root.clientWidth, inner.scripts.length]);
                if (found.length === 4) document.title = JSON.stringify(found);
            };
            frame.src = "index.html"; document.body.append(frame);
        }</script>""")
    done = subprocess.run([
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom",
        f"file://{hostile / 'measure.html'}"], capture_output=True, text=True, timeout=120, check=True).stdout
    measured = json.loads(re.findall(r"<title>(.*?)</title>", done)[0])
    assert sorted(width for width, *_ in measured) == [320, 390, 768, 1280]
    assert all(overflow <= 0 and scripts == 0 for _, overflow, scripts in measured), measured


# --- what a user can mend ------------------------------------------------------------------------------------------


def test_folders_that_are_no_finished_runs_are_refused(tmp_path: Path) -> None:
    run = finish(tmp_path / "run", replace(FIRST, seeds=(0,)))
    (tmp_path / "begun/seed-0").mkdir(parents=True)
    (tmp_path / "broken/report").mkdir(parents=True)
    (tmp_path / "broken/report/report.json").write_text('{"schema": 1, "runs": [{"arm": "../../etc", "metrics": {}}]}')
    for others, said in (([tmp_path / "none"], "no folder"), ([tmp_path / "begun"], "no finished run in"),
                         ([tmp_path / "broken"], "is not the report of a run (runs.0.arm"),
                         ([tmp_path / "run/../run"], "is named twice"), ([], "alone")):
        with pytest.raises(UserError, match=re.escape(said)):
            compare_runs([run, *others])


def test_figures_of_an_older_recap_are_to_be_evaluated_again(tmp_path: Path) -> None:
    runs = [finish(tmp_path / name, replace(FIRST, seeds=(0,))) for name in ("new", "old")]
    path = runs[1] / "seed-0/eval/mix/metrics.json"
    old = {key: value for key, value in json.loads(path.read_bytes()).items() if key not in ("distances", "judges")}
    path.write_text(json.dumps(old | {"judge": None, "features": "timm net"}))
    with pytest.raises(UserError, match=r"older Recap.*distances.*evaluate it again"):
        compare_runs(runs)


def test_a_report_that_is_older_than_its_evaluations_is_refused(tmp_path: Path) -> None:
    runs = [finish(tmp_path / name, replace(FIRST, seeds=(0,))) for name in ("one", "two")]
    path = runs[1] / "seed-0/eval/mix/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"fid": 1.0}))
    with pytest.raises(UserError, match="older than its evaluations"):
        compare_runs(runs)
    write_report(runs[1], [Run(0, arm, runs[1] / f"seed-0/generate/{arm}", runs[1] / f"seed-0/eval/{arm}")
                           for arm in FIRST.effects], FIRST)
    compare_runs(runs)


def test_no_run_is_written_over(tmp_path: Path) -> None:
    runs = [finish(tmp_path / name, replace(FIRST, seeds=(0,))) for name in ("one", "two")]
    with pytest.raises(UserError, match="choose another --out"):
        compare_runs(runs, runs[0])


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "of what? give -c FILE"),
    (["runs/a", "train.lr=1"], "train.lr=1 overrides a file's value, and no file was named"),
    (["-c", "x.toml", "runs/a"], "give one of them"),
    (["-c", "x.toml", "--out", "y"], "leave --out away"),
    (["runs/a", "runs/b", "--redo"], "--redo is for an experiment's own report"),
    (["runs/a"], "runs/a alone"),
    (["-c", "none.toml", "train.lr=1"], "no experiment file at none.toml"),
])
def test_the_command_takes_one_experiment_or_several_runs(
        arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert recap_here("report", *arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("recap: ") and said in last


def test_the_command_compares_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
                                   ) -> None:
    for name in ("one", "two"):
        finish(tmp_path / "runs" / name, replace(FIRST, seeds=(0,)))
    monkeypatch.chdir(tmp_path)
    assert recap_here("report", "runs/one", "runs/two") == 0
    assert "compared-one-two/index.html" in capsys.readouterr().out
    assert recap_here("report", "runs/one", "runs/two", "-o", "elsewhere") == 0
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == [
        "compared.json", "comparisons.csv", "index.html", "metrics.csv", "table.md"]
