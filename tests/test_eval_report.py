import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scored_runs import HOSTILE, PAYLOAD, make_run, png

from eval.beside import read_beside
from eval.comparisons import compare, compare_sets, summarize
from eval.config import ClipScore, Report
from eval.exhibits import captions
from eval.measures import measures_of
from eval.pool import pool
from eval.reference import of_features, save
from eval.report import Point, ReportInput, Run, run
from eval.verdict import Findings
from recap.errors import UserError
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shards import ShardWriter

ARMS = ["base", "alt", "mix", "shuffled"]


def relabelled(path: Path) -> str:
    with ShardWriter(str(path)) as writer:
        for index, text in enumerate(HOSTILE):
            png(index, 200).save(path.with_suffix(".jpg"))
            record = {"schema": 1, "captions": {"short": {"num_clip_tokens": 7}, "long": "no object"}}
            writer.write(Sample(path.stem, f"{index:04d}<i>", {
                "jpg": path.with_suffix(".jpg").read_bytes(), "txt": text.encode(), "short.txt": text[::-1].encode(),
                "long.txt": text.encode(), "recap.json": json.dumps(record).encode() if index % 2 else b"{{["}))
    return str(path)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> ReportInput:
    root = tmp_path_factory.mktemp("runs")
    effects = {"base": -0.5, "alt": 0.0, "mix": 1.0, "shuffled": 0.0}
    runs = [make_run(root, seed, arm, effects[arm]) for seed in (0, 1) for arm in ARMS if arm != "base" or seed == 0]
    counts = {"relabel": {"images_in": 10, "images_out": 7, "quarantined": {"undecodable_image": 2, PAYLOAD: 1},
                          "empty_captions": 1, "seconds": 3.2}}
    return ReportInput(name="tiny", config={"name": "tiny", "train": {"lr": 1e-5, "note": PAYLOAD}}, arms=ARMS,
                       styles=["short", "long"], runs=runs, relabelled=[relabelled(root / "00000.tar")], counts=counts,
                       environment={"python": "3.11", "hardware": "2 CPU cores"},
                       seconds={"relabel": 30.0, "seed-0/train/alt": 4000.0, "seed-1/train/alt": 4000.0})


@pytest.fixture(scope="module")
def report(content: ReportInput, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stage = StageDir(tmp_path_factory.mktemp("report"), {})
    run(stage, content, Report(num_captions=7, num_prompts=6))
    return stage.path


class Page(HTMLParser):
    """What a browser would make of the page: its elements with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_hostile_text_stays_text(report: Path) -> None:
    html = (report / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "link"}
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert {attrs["src"][:11] for tag, attrs in page.elements if tag == "img"} <= {"data:image/"}  # type: ignore[index]
    text = " ".join(page.text)
    for each in HOSTILE[:3]:
        assert each.strip()[:200] in text
    assert "{{ 7 * 7 }}" in text and "49" not in [part.strip() for part in page.text]
    assert "timm <b>net</b>" in text and PAYLOAD in text and "0000<i>" in text
    assert all(attrs.get("dir") == "auto" for tag, attrs in page.elements if attrs.get("class") == "text")


def test_one_file_that_fetches_nothing(report: Path) -> None:
    html = (report / "index.html").read_text(encoding="utf-8")
    references = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']([^"']*)|url\(([^)]*)|@import""", html)
    assert references and all(source.startswith(("data:", "#")) for source, _ in references if source != "x")
    assert "http://" not in html and "https://" not in html
    assert "default-src 'none'" in html


def test_the_whole_of_a_long_text_is_there(report: Path) -> None:
    html = (report / "index.html").read_text(encoding="utf-8")
    page = Page(html[html.index("<body>"):])
    assert max(len(text.strip()) for text in page.text) < 5000  # shown in part, the rest a click away
    assert any("more characters" in text for text in page.text)
    assert "".join(page.text).count("x") >= 2 * 5000


def test_report_json(report: Path, content: ReportInput) -> None:
    found = json.loads((report / "report.json").read_bytes())
    assert found["schema"] == 1 and found["config"] == content.config and found["counts"] == content.counts
    assert [(each["seed"], each["arm"]) for each in found["runs"]] == [(each.seed, each.arm) for each in content.runs]
    assert {"fid", "clip_score", "num_images"} <= set(found["runs"][0]["metrics"])
    assert list(dict.fromkeys((each["a"], each["b"]) for each in found["comparisons"])) == [  # every two arms once
        ("base", "alt"), ("mix", "alt"), ("shuffled", "alt"), ("mix", "base"), ("shuffled", "base"),
        ("mix", "shuffled")]
    by_arm = {each["a"]: each for each in found["comparisons"] if each["b"] == "alt" and each["metric"] == "clip_score"}
    assert set(by_arm["mix"]) >= {"a", "b", "metric", "difference", "ci", "p", "verdict"}
    assert {arm: each["verdict"] for arm, each in by_arm.items()} == {
        "mix": "better", "base": "worse", "shuffled": "can't tell"}
    assert {each["ci"] for each in found["comparisons"] if each["metric"] == "fid"} == {None}  # too few pictures
    assert found["captions"]["alt-text"]["alt"]["num_captions"] == 6  # the seventh is empty
    assert found["captions"]["relabelled"]["long"]["share_over_77"] > 0


def test_the_words_fit_the_numbers(report: Path, content: ReportInput, tmp_path: Path) -> None:
    html = (report / "index.html").read_text(encoding="utf-8")
    assert "“mix” match their prompts better than those of “alt”" in html and "The control is not shown to fail" in html
    assert "over 40 prompts" in html
    assert "2.2 h" in html and "train 2.2 h" in html and "one training seed" not in html
    alone = ReportInput(name="x", config={}, arms=["alt"], styles=[], runs=content.runs[1:2], relabelled=[])
    run(StageDir(tmp_path / "alone", {}), alone, Report())
    assert "There is no arm to compare with “alt”." in (tmp_path / "alone" / "index.html").read_text(encoding="utf-8")


def test_a_failing_control_and_disagreeing_measures_are_said(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, 0, "alt"), make_run(tmp_path, 0, "mix", 1.0), make_run(tmp_path, 0, "shuffled", 1.0)]
    runs[1].metrics["fid"] = 50.0  # without an interval
    given = ReportInput(name="x", config={}, arms=["alt", "mix", "shuffled"], styles=[], runs=runs, relabelled=[])
    run(StageDir(tmp_path / "report", {}), given, Report(num_prompts=1))
    html = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "The control fails" in html and "FID, which has no interval here, points the other way." in html
    assert "one training seed" in html


def test_the_table_fits_a_terminal(content: ReportInput, tmp_path: Path) -> None:
    found = run(StageDir(tmp_path, {}), content, Report(num_prompts=0, num_captions=0))
    lines = found["summary"].splitlines()
    assert len(lines) > 5 and max(map(len, lines)) <= 80 and lines[5] == ""
    assert lines[6].startswith("Pictures of the arm “mix” match their prompts better than those of “alt”. ")
    assert "two training seeds: the interval speaks of these very models" in " ".join(lines[6:])
    assert re.search(r"^mix +35\.00 +\d+\.\d\d +\+\d\.\d\d \[\+\d\.\d\d, \+\d\.\d\d\] better$", lines[3])


def test_bad_runs_are_named(content: ReportInput, tmp_path: Path) -> None:
    def report_of(*runs: Run) -> None:
        given = ReportInput(name="x", config={}, arms=["alt", "mix"], styles=[], runs=list(runs), relabelled=[])
        run(StageDir(tmp_path / "report", {}), given, Report())

    alt = make_run(tmp_path, 0, "alt")
    with pytest.raises(UserError, match="did not draw the same prompts"):
        report_of(alt, make_run(tmp_path, 0, "mix", prompts=30))
    with pytest.raises(UserError, match=r"no readable metrics\.json"):
        report_of(alt, Run(0, "mix", tmp_path, tmp_path))
    with pytest.raises(UserError, match="no arm to show"):
        report_of()


def test_cards_are_picked_by_hash(content: ReportInput) -> None:
    cards = captions(content.relabelled, ["short", "long"], 3)
    assert [card.key for card in cards] == [card.key for card in captions(content.relabelled, ["short"], 5)][:3]
    assert cards[0].before and [caption.style for caption in cards[0].after] == ["short", "long"]


# --- with a judge, prompt sets, and another result beside it ---------------------------------------------------------


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three seeds with a judge's metric, a probe set, FID intervals and another run's result."""
    root = tmp_path_factory.mktemp("judged")
    effects = {"alt": 0.0, "mix": 1.0}
    runs = [make_run(root, seed, arm, effect, 60, judged=True) for seed in (0, 1, 2) for arm, effect in effects.items()]
    beside = {"schema": 1, "title": f"At length {PAYLOAD}", "command": "recap run <here>", "date": "2026-01-31",
              "hardware": "one GPU", "extra": 1,
              "runs": [{"seed": seed, "arm": arm, "metrics": each.metrics} for seed, arm, each in
                       [(run.seed, run.arm, run) for run in runs]],
              "comparisons": [{"a": "mix", "b": "alt", "metric": "all_right", "difference": 0.3, "ci": [0.2, 0.4],
                               "p": 0.001, "verdict": "better", "num_prompts": 48}],
              "set_comparisons": [{"arm": PAYLOAD, "a": "x", "b": "y", "metric": "all_right", "difference": 0.125,
                                   "ci": [0.11, 0.14], "p": 0.001, "verdict": "better", "means": [0.375, 0.25]}]}
    (root / "beside.json").write_text(json.dumps(beside))
    given = ReportInput(name="judged", config={}, arms=list(effects), styles=["short"], runs=runs,
                        relabelled=[relabelled(root / "00000.tar")])
    stage = StageDir(root / "report", {})
    run(stage, given, Report(num_prompts=4, beside=str(root / "beside.json"), compare_sets=[("probe<i>", "half")]))
    return stage.path


def test_the_judges_metric_leads_and_every_measure_is_compared(judged: Path) -> None:
    html = (judged / "index.html").read_text(encoding="utf-8")
    assert re.search(r"match their prompts better than those of “alt”: all right \d+\.\d % against \d+\.\d %", html)
    assert "over 48 prompts" in html and "speak of other prompts and of training anew" in html
    found = json.loads((judged / "report.json").read_bytes())["comparisons"]
    by_metric = {each["metric"]: each for each in found}
    assert set(by_metric) == {"all_right", "clip_score", "fid", "kid", "precision"}
    assert {key: each["verdict"] for key, each in by_metric.items()} == dict.fromkeys(by_metric, "better") | {
        "precision": "can't tell"}
    assert all(each["over"] == "prompts and seeds" for each in found)
    fid = by_metric["fid"]
    assert fid["ci"][1] < 0 and fid["ratio"] < 1 and fid["num_prompts"] == 48


def test_probe_sets_stand_apart(judged: Path) -> None:
    html = (judged / "index.html").read_text(encoding="utf-8")
    assert "<em>probe&lt;i&gt;</em>" in html and "By the kind of prompt" in html
    assert "my &lt;b&gt;judge&lt;/b&gt;" in html


def test_two_forms_of_the_same_prompts_are_compared_within_every_arm(judged: Path, tmp_path: Path) -> None:
    found = json.loads((judged / "report.json").read_bytes())["set_comparisons"]
    assert [(each["arm"], each["a"], each["b"], each["metric"]) for each in found] == [
        (arm, "probe<i>", "half", "all_right") for arm in ("alt", "mix")]
    for each in found:
        first, second = each["means"]
        assert each["difference"] == pytest.approx(first - second)
        assert (each["num_prompts"], each["num_seeds"], each["over"]) == (6, 3, "prompts and seeds")
    html = (judged / "index.html").read_text(encoding="utf-8")
    assert "drawn by every arm: probe&lt;i&gt; against half" in html
    assert "37.5 %" in html and "+12.5 points" in html  # of the result beside
    runs = [make_run(tmp_path, 0, "alt", judged=True)]
    values = runs[0].scores.columns["all_right"]
    values[-1] = None  # neither the mean nor the difference then counts the pair
    each = compare_sets(["alt"], runs, [("probe<i>", "half")])[0]
    assert each["means"] == pytest.approx([np.mean(values[-8:-5]), np.mean(values[-4:-1])])  # type: ignore[arg-type]
    assert each["difference"] == pytest.approx(each["means"][0] - each["means"][1])
    for pair, message in ((("half", "none"), "no prompt set 'none'"), (("short", "half"), "short has 32 prompts and")):
        with pytest.raises(UserError, match=message):
            compare_sets(["alt"], runs, [pair])


def test_another_result_is_shown_beside_and_escaped(judged: Path, tmp_path: Path) -> None:
    html = (judged / "index.html").read_text(encoding="utf-8")
    assert "At length &lt;img" in html and "recap run &lt;here&gt;" in html and "+20.0 to +40.0" in html
    assert not {tag for tag, _ in Page(html).elements} & {"script", "here"}


EFFECTS = {"base": -0.5, "alt": 0.0, "mix": 1.0, "oracle": 1.2}


def finished(root: Path, model: str, seeds: tuple[int, ...] = (0, 1, 2), **config: object) -> Path:
    """The folder of a run with a report, as `recap run` leaves it."""
    runs = [make_run(root, seed, arm, effect, judged=True) for seed in seeds for arm, effect in EFFECTS.items()
            if arm != "base" or seed == seeds[0]]
    (root / "reference").mkdir()
    save(root / "reference/features.npz", of_features(np.random.default_rng(0).normal(size=(20, 4)), {}))
    report = {"config": {"name": root.name, "arms": list(EFFECTS), "seeds": list(seeds), "train": {"model": model},
                         **config},
              "environment": {"hardware": "2 CPU cores"}, "captions": {},
              "comparisons": compare(list(EFFECTS), runs),
              "runs": [{"seed": run.seed, "arm": run.arm, "metrics": run.metrics} for run in runs]}
    (root / "report").mkdir()
    (root / "report/report.json").write_text(json.dumps(report))
    return root


def test_runs_are_pooled_into_a_result_that_can_be_shown(tmp_path: Path, content: ReportInput) -> None:
    folders = [finished(tmp_path / name, f"models/{name}") for name in ("a", "b")]
    found = pool(folders, tmp_path / "all.json", "All of it", "recap run …")
    assert {each.arm: len(each.values["fid"]) for each in found.summaries} == {
        "base": 1, "alt": 3, "mix": 3, "oracle": 3}  # one of every seed, the mean over base models
    assert len(found.comparisons) == 6 * 5  # every two arms by five measures
    assert all((each["num_seeds"], each["num_base_models"], each["over"]) == (3, 2, "prompts and seeds")
               for each in found.comparisons)
    kept = read_beside(str(tmp_path / "all.json"))
    assert [each.difference for each in kept.comparisons] == pytest.approx(
        [each["difference"] for each in found.comparisons], rel=1e-5)
    assert max(map(len, (tmp_path / "all.json").read_text().splitlines())) < 2000  # a line a run, a line a comparison
    assert (kept.findings().against("mix", found.lead) or {})["verdict"] == "better"
    run(StageDir(tmp_path / "report", {}), content, Report(beside=str(tmp_path / "all.json"), num_prompts=0))
    html = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "On a alone: all right" in html and "of 3 training seeds on each of 2 base models" in html
    assert html.count("by 3 training seeds on each of 2 base models, and of these models only") == 1


def test_an_arm_that_is_not_trained_stands_beside_every_seed(tmp_path: Path) -> None:
    runs = [Run(each["seed"], each["arm"], tmp_path / f"a/seed-{each['seed']}/generate/{each['arm']}",
                tmp_path / f"a/seed-{each['seed']}/eval/{each['arm']}")
            for each in json.loads((finished(tmp_path / "a", "m") / "report/report.json").read_bytes())["runs"]]
    found = Findings(list(EFFECTS), measures_of(runs[0].metrics), summarize(list(EFFECTS), runs),
                     compare(list(EFFECTS), runs))
    for measure in found.measures[:2]:
        base, alt = (np.mean(each.values[measure.key]) for each in found.summaries[:2])
        assert (found.between("base", "alt", measure) or {})["difference"] == pytest.approx(base - alt)


@pytest.mark.parametrize(("change", "message"), [
    ({"seeds": (0,)}, "another experiment"), ({"generate": {"guidance_scale": 3}}, "guidance_scale"),
    ({"model": "models/a"}, "both begin with models/a"),
])
def test_runs_that_differ_in_more_than_their_base_model_are_not_pooled(
        change: dict[str, object], message: str, tmp_path: Path) -> None:
    a = finished(tmp_path / "a", "models/a", seeds=(0, 1))
    b = finished(tmp_path / "b", **{"model": "models/b", "seeds": (0, 1)} | change)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        pool([a, b], tmp_path / "all.json", "", "")


def test_what_has_changed_since_the_report_is_not_pooled(tmp_path: Path) -> None:
    a, b = (finished(tmp_path / name, name, seeds=(0,)) for name in ("a", "b"))
    with pytest.raises(UserError, match="no finished run"):
        pool([tmp_path / "c"], tmp_path / "all.json", "", "")
    prompts = b / "seed-0/generate/mix/prompts.jsonl"
    before = prompts.read_bytes()
    prompts.write_bytes(before.replace(b' 3"', b' 4"'))
    with pytest.raises(UserError, match="other prompts or noise"):
        pool([a, b], tmp_path / "all.json", "", "")
    prompts.unlink()
    with pytest.raises(UserError, match=r"no prompts\.jsonl"):
        pool([a, b], tmp_path / "all.json", "", "")
    prompts.write_bytes(before)
    report = b / "report/report.json"
    whole = report.read_text()
    report.write_text(whole.replace('"captions": {}', '"captions": {"relabelled": {}}'))
    with pytest.raises(UserError, match="trained on other captions"):
        pool([a, b], tmp_path / "all.json", "", "")
    report.write_text(whole)
    save(b / "reference/features.npz", of_features(np.random.default_rng(1).normal(size=(20, 4)), {}))
    with pytest.raises(UserError, match="other real images"):
        pool([a, b], tmp_path / "all.json", "", "")
    metrics = json.loads((a / "seed-0/eval/mix/metrics.json").read_bytes())
    (a / "seed-0/eval/mix/metrics.json").write_text(json.dumps(metrics | {"fid": 1.0}))
    with pytest.raises(UserError, match="older than its evaluations"):
        pool([a, b], tmp_path / "all.json", "", "")


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is not the result of a run"), ('{"schema": 2, "runs": []}', "schema"), ("[]", "is not the result"),
    ('{"schema": 1, "runs": [{"arm": "alt"}]}', "metrics"),
    ('{"schema": 1, "runs": [{"arm": "alt", "metrics": {"judges": [{"metrics": {"<b>": ""}}]}}]}', "names are like"),
    (json.dumps({"schema": 1, "runs": [{"arm": f"a{i}", "metrics": {"fid": 1}} for i in range(51)]}), "51 arms"),
    ('{"schema": 1, "runs": [{"arm": "alt", "metrics": {"mine": 1}}]}', "no metric that is known"),
    (f'{{"schema": 1, "runs": [{{"arm": "alt", "metrics": {{"fid": 1{"0" * 400}}}}}]}}', "no metric that is known"),
    ('{"schema": 1, "runs": [{"arm": "alt", "metrics": {"fid": 1}}], "comparisons": [{"a": "mix", "b": "alt", '
     '"metric": "fid", "difference": 1, "verdict": "best"}]}', "verdict"),
])
def test_what_is_no_result_is_refused(text: str, message: str, tmp_path: Path, content: ReportInput) -> None:
    (tmp_path / "beside.json").write_text(text)
    with pytest.raises(UserError, match=message):
        run(StageDir(tmp_path / "report", {}), content, Report(beside=str(tmp_path / "beside.json")))
    with pytest.raises(UserError, match="no file at"):
        run(StageDir(tmp_path / "report", {}), content, Report(beside=str(tmp_path / "none.json")))


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of nine arms with names of all lengths, of which there is everything to show that can be."""
    root = tmp_path_factory.mktemp("nine")
    arms = ["alt", "mix", "short", *(f"an-arm-of-a-rather-long-name-{number}" for number in range(6))]
    runs = [make_run(root, 0, arm, place / 8, prompts=60, judged=True) for place, arm in enumerate(arms)]
    swept = [Point(arm, kind, value, {"fid": 40 - value * place, "clip_score": 20 + value + place, "all_right": 0.5,
                                      "num_images": 48})
             for place, arm in enumerate(arms) for kind in ("guidance_scale", "num_inference_steps", "train_steps")
             for value in (1.0, 2.5, 10.0)]
    config = {"generate": {"num_inference_steps": 5}, "train": {"steps": 4}, "arm": {"mix": {"captions": {"short": 1}}}}
    content = ReportInput(name="nine", config=config, arms=arms, styles=["short", "long"], runs=runs, swept=swept,
                          relabelled=[relabelled(root / "00000.tar")], guidance=dict.fromkeys(arms, 5.0))
    stage = StageDir(root / "report", {})
    run(stage, content, Report(num_prompts=2, compare_sets=[("probe<i>", "half")]))
    return stage.path


def test_all_there_is_to_show_is_on_the_page(nine: Path) -> None:
    page = Page((nine / "index.html").read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.text).split())
    for each in ("Every measure", "FID∞", "Over training steps", "Over guidance", "Over sampler steps",
                 "FID against CLIP score", "By the kind of prompt", "Prompts in the style of the captions",
                 "Where “mix” gains most on “alt”", "A draw", "Vocabulary", "Reading ease", "my <b>judge</b>",
                 "resize: bicubic", "p is Holm's over the 24 comparisons of the headline."):
        assert each in text, each
    assert text.count("Holm's over the") == 1
    assert {attrs.get("loading") for tag, attrs in page.elements if tag == "img"} == {"lazy"}
    anchors = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert {(attrs["href"] or "")[1:] for tag, attrs in page.elements if tag == "a"} <= anchors


def test_what_is_not_there_has_no_place_on_the_page(report: Path) -> None:
    html = (report / "index.html").read_text(encoding="utf-8")
    for each in ("Every measure", "Curves", "By the kind of prompt", "How close they come", "Facts covered"):
        assert each not in html, each
    assert "How it was measured" in html and "Half as many pictures give 2.4 to 2.55 more" in html  # too few for FID


def test_programs_get_the_curves_and_the_adjusted_p(nine: Path) -> None:
    found = json.loads((nine / "report.json").read_bytes())
    assert found["schema"] == 1 and len(found["swept"]) == 9 * 3 * 3
    assert found["swept"][0] == {"arm": "alt", "kind": "guidance_scale", "value": 1.0, "metrics": {
        "fid": 40.0, "clip_score": 21.0, "all_right": 0.5, "num_images": 48}}
    family = [each for each in found["comparisons"] if each["p_holm"] is not None]
    assert len(family) == 8 * 3 and all(each["p_holm"] >= each["p"] and each["b"] == "alt" for each in family)


def test_the_usual_guidance_and_steps_join_their_curves(nine: Path) -> None:
    html = (nine / "index.html").read_text(encoding="utf-8")
    for each in ("mix: guidance scale 5,", "mix: sampler steps 5,", "mix: training steps 4,"):
        assert each in html, each


def test_closeness_to_references_is_on_the_page(content: ReportInput, world_models: Path, tmp_path: Path) -> None:
    clip = ClipScore(model=f"local-dir:{world_models / 'clip'}")
    given = replace(content, clip=clip, reference=content.relabelled)
    run(StageDir(tmp_path, {}), given, Report(num_prompts=0, num_captions=0, references=["long"]))
    assert "How close they come to the references" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert list(json.loads((tmp_path / "report.json").read_bytes())["closeness"]["long"]["kinds"]) == [
        "alt", "short", "long", "reference"]


@pytest.fixture(scope="module")
def served(report: Path, nine: Path) -> Iterator[str]:
    """The report, and one of nine arms, over HTTP, with a page beside them that measures both in frames and says so in
    its title.
    """
    shutil.copy(nine / "index.html", report / "nine.html")
    (report / "measure.html").write_text("""<!doctype html><title>…</title><body><script>
        const widths = [320, 390, 768, 1280], found = [];
        for (const page of ["index.html", "nine.html"]) for (const width of widths) {
            const frame = document.createElement("iframe");
            frame.style.width = width + "px"; frame.style.height = "900px"; frame.style.border = 0;
            frame.onload = async () => {
                const inner = frame.contentDocument, root = inner.documentElement;
                for (const image of inner.images) image.loading = "eager";
                await Promise.allSettled([...inner.images].map(image => image.decode()));
                found.push([width, root.scrollWidth - root.clientWidth, inner.title, inner.scripts.length,
                            [...inner.images].filter(image => !image.naturalWidth).length]);
                if (found.length === 2 * widths.length) document.title = JSON.stringify(found);
            };
            frame.src = page; document.body.append(frame);
        }</script>""")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(report))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.full
def test_in_a_browser_nothing_runs_and_nothing_overflows(served: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    found = subprocess.run([
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom", f"{served}/measure.html",
    ], capture_output=True, text=True, timeout=120, check=True).stdout
    measured = json.loads("".join(Page(found[:found.index("</title>")]).text))
    assert sorted(width for width, *_ in measured) == [320, 320, 390, 390, 768, 768, 1280, 1280]
    for width, overflow, title, num_scripts, num_broken in measured:
        assert overflow <= 0, f"{overflow} px too wide at {width} px"
        assert title in ("tiny · Recap report", "nine · Recap report") and num_scripts == 0 and num_broken == 0
