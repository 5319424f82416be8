import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.beside import read_beside
from eval.comparisons import compare, compare_sets, summarize
from eval.config import Report
from eval.exhibits import captions, picture, shorten
from eval.fid import Statistics, save
from eval.generate import image_path
from eval.measures import measures_of
from eval.pool import pool
from eval.report import ReportInput, Run, run
from eval.scores import Scores
from eval.verdict import Findings, verdict
from recap.errors import UserError
from recap.rundir import StageDir
from recap.sample import Sample
from recap.shards import ShardWriter

PAYLOAD = "<img src=x onerror=alert(1)><script>document.title='pwned'</script>"
HOSTILE = [PAYLOAD, "مرحبا بالعالم\u202egnp.exe", "👩‍👩‍👧‍👦🦄 " * 60, "x" * 5000,
           "{{ 7 * 7 }} {% raw %}", "'\"></div><!--", ""]
ARMS = ["base", "alt", "mix", "shuffled"]
NUM_PROMPTS = 40


@dataclass(frozen=True)
class Scripted:
    """A scored arm of which no more than its figures is there."""

    arm: str
    metrics: dict[str, Any]
    seed: int = 0
    base_model: int = 0


def png(seed: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(size, size, 3), dtype=np.uint8))


SETS = ["short", "probe<i>", "half"]


def make_run(root: Path, seed: int, arm: str, better_by: float = 0.0, prompts: int = NUM_PROMPTS,
             judged: bool = False) -> Run:
    """A scored arm, as `generate` and `evaluate` leave it; the last fifth of its prompts are two probe sets."""
    images, evaluated = root / f"seed-{seed}/generate/{arm}", root / f"seed-{seed}/eval/{arm}"
    images.mkdir(parents=True)
    evaluated.mkdir(parents=True)
    places = [(index >= prompts * 4 // 5) + (index >= prompts * 9 // 10) for index in range(prompts)]
    sets = [SETS[place] for place in places] if judged else ["prompts"] * prompts
    rows = [{"index": i, "prompt": f"{HOSTILE[i % 6]} {i}", "set": name} for i, name in enumerate(sets)]
    (images / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for index in range(prompts):
        png(index).save(image_path(images, index))
    noise = np.random.default_rng([seed, len(arm)]).normal(size=prompts)
    scores = (20 + np.arange(prompts) / 10 + better_by + 0.3 * noise).tolist()
    columns: dict[str, list[float | None]] = {"clip_score": scores}
    judge = None
    if judged:
        draw = np.random.default_rng(seed)
        columns["all_right"] = [float(draw.random() < 0.4 + 0.4 * better_by) for _ in range(prompts)]
        judge = {"name": "my <b>judge</b>", "metrics": {"all_right": "share of pictures with all that was asked"}}
    headline = SETS[:1] if judged else ["prompts"]
    found = Scores(sets, columns)
    metrics = {"fid": 40 - 5 * better_by, **found.means(headline), "num_images": len(found.rows(headline)),
               "num_reference": 16, "clip_truncated": 1, "features": "timm <b>net</b>", "feature_dim": 4,
               "clip_model": "open_clip tiny", "judge": judge, "headline_sets": headline, "sets": found.by_set()}
    found.save(evaluated / "scores.json")
    features = np.random.default_rng([seed, len(arm), 7]).normal(size=(metrics["num_images"], 4)) - better_by
    np.savez(evaluated / "features.npz", features=features.astype(np.float32), index=np.arange(len(features)))
    (evaluated / "metrics.json").write_text(json.dumps(metrics))
    return Run(seed, arm, images, evaluated)


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
    assert references and all(source.startswith("data:") for source, _ in references if source != "x")
    assert "http://" not in html and "https://" not in html
    assert "default-src 'none'" in html


def test_the_whole_of_a_long_text_is_there(report: Path) -> None:
    html = (report / "index.html").read_text(encoding="utf-8")
    page = Page(html[html.index("<body>"):])
    assert max(len(text.strip()) for text in page.text) < 5000  # shown in part, the rest a click away
    assert any("more characters" in text for text in page.text)
    assert "".join(page.text).count("x") >= 2 * 5000
    cut = shorten("word " * 400)
    assert f"{cut.shown} {cut.rest}".split() == ["word"] * 400 and len(cut.shown) <= 480
    assert shorten("y" * 5000).shown == "y" * 480 and shorten("short").rest == ""


def test_report_json(report: Path, content: ReportInput) -> None:
    found = json.loads((report / "report.json").read_bytes())
    assert found["schema"] == 1 and found["config"] == content.config and found["counts"] == content.counts
    assert [(each["seed"], each["arm"]) for each in found["runs"]] == [(each.seed, each.arm) for each in content.runs]
    assert {"fid", "clip_score", "num_images"} <= set(found["runs"][0]["metrics"])
    assert [(each["a"], each["b"]) for each in found["comparisons"]] == [  # every two arms once
        ("base", "alt"), ("mix", "alt"), ("shuffled", "alt"), ("mix", "base"), ("shuffled", "base"),
        ("mix", "shuffled")]
    by_arm = {each["a"]: each for each in found["comparisons"] if each["b"] == "alt"}
    assert set(by_arm["mix"]) >= {"a", "b", "metric", "difference", "ci", "p", "verdict"}
    assert {arm: each["verdict"] for arm, each in by_arm.items()} == {
        "mix": "better", "base": "worse", "shuffled": "can't tell"}
    assert {each["metric"] for each in found["comparisons"]} == {"clip_score"}  # no reference: no FID
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


def findings(arms: list[str], **comparisons: tuple[str, str, float, float, float]) -> Findings:
    """Of arms a, b and a measure: difference, low and high; all FIDs are 20 but that of mix, 30."""
    runs = [Scripted(arm, {"fid": 30.0 if arm == "mix" else 20.0, "clip_score": 20.0}) for arm in arms]
    measures = {each.key: each for each in measures_of(runs[0].metrics)}
    found = []
    for a, key, difference, low, high in comparisons.values():
        good = "better" if (difference < 0) == measures[key].lower_is_better else "worse"
        found.append({"a": a, "b": "alt", "metric": key, "difference": difference, "p": 0.01, "num_seeds": 3,
                      "ci": [low, high] if high > low else None, "note": "no interval: too few",
                      "verdict": "can't tell" if low <= 0 <= high else good})
    return Findings(arms, list(measures.values()), summarize(arms, runs), found)


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
    assert "No prompt gives both “mix” and “alt” a value of CLIP score" in verdict(findings(["alt", "mix"]))[0]


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


def test_thumbnails() -> None:
    small, large = picture(png(0, 64)), picture(png(0, 700))
    assert small.pixelated and small.src.startswith("data:image/png;base64,") and small.width == small.height == 64
    assert not large.pixelated and large.src.startswith("data:image/jpeg;base64,") and large.width == 320


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
    save(root / "reference.npz", Statistics(np.full(4, -2.0), np.eye(4), 500), {"features": "x"})
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
                        relabelled=[relabelled(root / "00000.tar")], statistics=root / "reference.npz")
    stage = StageDir(root / "report", {})
    run(stage, given, Report(num_prompts=4, beside=str(root / "beside.json"), compare_sets=[("probe<i>", "half")]))
    return stage.path


def test_the_judges_metric_leads_and_every_measure_is_compared(judged: Path) -> None:
    html = (judged / "index.html").read_text(encoding="utf-8")
    assert re.search(r"match their prompts better than those of “alt”: all right \d+\.\d % against \d+\.\d %", html)
    assert "over 48 prompts" in html and "speak of other prompts and of training anew" in html
    found = json.loads((judged / "report.json").read_bytes())["comparisons"]
    by_metric = {each["metric"]: each for each in found}
    assert set(by_metric) == {"all_right", "clip_score", "fid"}
    assert all(each["verdict"] == "better" and each["over"] == "prompts and seeds" for each in found)
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
    reference = Statistics(np.full(4, -1.0), np.eye(4), 500)
    save(root / "reference/reference.npz", reference, {"features": "x"})
    report = {"config": {"name": root.name, "arms": list(EFFECTS), "seeds": list(seeds), "train": {"model": model},
                         **config},
              "environment": {"hardware": "2 CPU cores"}, "captions": {},
              "comparisons": compare(list(EFFECTS), runs, reference),
              "runs": [{"seed": run.seed, "arm": run.arm, "metrics": run.metrics} for run in runs]}
    (root / "report").mkdir()
    (root / "report/report.json").write_text(json.dumps(report))
    return root


def test_runs_are_pooled_into_a_result_that_can_be_shown(tmp_path: Path, content: ReportInput) -> None:
    folders = [finished(tmp_path / name, f"models/{name}") for name in ("a", "b")]
    found = pool(folders, tmp_path / "all.json", "All of it", "recap run …")
    assert {each.arm: len(each.values["fid"]) for each in found.summaries} == {
        "base": 1, "alt": 3, "mix": 3, "oracle": 3}  # one of every seed, the mean over base models
    assert len(found.comparisons) == 6 * 3  # every two arms by three measures
    assert all((each["num_seeds"], each["num_base_models"], each["over"]) == (3, 2, "prompts and seeds")
               for each in found.comparisons)
    kept = read_beside(str(tmp_path / "all.json"))
    assert [each.difference for each in kept.comparisons] == pytest.approx(
        [each["difference"] for each in found.comparisons], rel=1e-5)
    assert max(map(len, (tmp_path / "all.json").read_text().splitlines())) < 1000  # a line a run, a line a comparison
    assert (kept.findings().against("mix", found.lead) or {})["verdict"] == "better"
    run(StageDir(tmp_path / "report", {}), content, Report(beside=str(tmp_path / "all.json"), num_prompts=0))
    html = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    assert "On a alone: all right" in html and "of 3 training seeds on each of 2 base models" in html
    assert html.count("by 3 training seeds on each of 2 base models, and of these models only") == 1


def test_an_arm_that_is_not_trained_stands_beside_every_seed(tmp_path: Path) -> None:
    runs = [Run(each["seed"], each["arm"], *(tmp_path / f"a/seed-{each['seed']}/{stage}/{each['arm']}"
                                             for stage in ("generate", "eval")))
            for each in json.loads((finished(tmp_path / "a", "m") / "report/report.json").read_bytes())["runs"]]
    found = Findings(list(EFFECTS), measures_of(runs[0].metrics), summarize(list(EFFECTS), runs),
                     compare(list(EFFECTS), runs))
    for measure in found.measures[:-1]:
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
    prompts.write_bytes(before.replace(b" 3", b" 4"))
    with pytest.raises(UserError, match="other prompts or noise"):
        pool([a, b], tmp_path / "all.json", "", "")
    prompts.unlink()
    with pytest.raises(UserError, match=r"no readable prompts\.jsonl"):
        pool([a, b], tmp_path / "all.json", "", "")
    prompts.write_bytes(before)
    report = b / "report/report.json"
    whole = report.read_text()
    report.write_text(whole.replace('"captions": {}', '"captions": {"relabelled": {}}'))
    with pytest.raises(UserError, match="trained on other captions"):
        pool([a, b], tmp_path / "all.json", "", "")
    report.write_text(whole)
    save(b / "reference/reference.npz", Statistics(np.zeros(4), np.eye(4), 500), {"features": "x"})
    with pytest.raises(UserError, match="other real images"):
        pool([a, b], tmp_path / "all.json", "", "")
    metrics = json.loads((a / "seed-0/eval/mix/metrics.json").read_bytes())
    (a / "seed-0/eval/mix/metrics.json").write_text(json.dumps(metrics | {"fid": 1.0}))
    with pytest.raises(UserError, match="older than its evaluations"):
        pool([a, b], tmp_path / "all.json", "", "")


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is not the result of a run"), ('{"schema": 2, "runs": []}', "schema"), ("[]", "is not the result"),
    ('{"schema": 1, "runs": [{"arm": "alt"}]}', "metrics"),
    ('{"schema": 1, "runs": [{"arm": "alt", "metrics": {"judge": {"metrics": {"<b>": ""}}}}]}', "names are like"),
    (json.dumps({"schema": 1, "runs": [{"arm": f"a{i}", "metrics": {}} for i in range(51)]}), "51 arms"),
    ('{"schema": 1, "runs": [{"arm": "alt", "metrics": {}}], "comparisons": [{"a": "mix", "b": "alt", "metric": "fid", '
     '"difference": 1, "verdict": "best"}]}', "verdict"),
])
def test_what_is_no_result_is_refused(text: str, message: str, tmp_path: Path, content: ReportInput) -> None:
    (tmp_path / "beside.json").write_text(text)
    with pytest.raises(UserError, match=message):
        run(StageDir(tmp_path / "report", {}), content, Report(beside=str(tmp_path / "beside.json")))
    with pytest.raises(UserError, match="no file at"):
        run(StageDir(tmp_path / "report", {}), content, Report(beside=str(tmp_path / "none.json")))


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The report, and one of nine arms, over HTTP, with a page beside them that measures both in frames and says so in
    its title.
    """
    root = tmp_path_factory.mktemp("nine")
    arms = ["alt", "mix", *(f"an-arm-{number}" for number in range(7))]
    nine = ReportInput(name="nine", config={}, arms=arms, styles=[], relabelled=[],
                       runs=[make_run(root, 0, arm, prompts=60, judged=True) for arm in arms])
    stage = StageDir(root / "report", {})
    run(stage, nine, Report(num_prompts=2))
    shutil.copy(stage.path / "index.html", report / "nine.html")
    (report / "measure.html").write_text("""<!doctype html><title>…</title><body><script>
        const widths = [320, 390, 768, 1280], found = [];
        for (const page of ["index.html", "nine.html"]) for (const width of widths) {
            const frame = document.createElement("iframe");
            frame.style.width = width + "px"; frame.style.height = "900px"; frame.style.border = 0;
            frame.onload = () => {
                const inner = frame.contentDocument, root = inner.documentElement;
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
