"""Which prompts and captions are shown, and how."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scored_runs import make_run, png

from eval.comparisons import Run, compare, summarize
from eval.config import Report
from eval.drawn import loose_path, stats_path
from eval.exhibits import Exhibit, exhibits, picture, shorten
from eval.generate import forget
from eval.measures import measures_of
from eval.report import ReportInput, run
from eval.verdict import Findings
from recap.rundir import StageDir
from recap.sample import Sample, decode_image
from recap.shards import ShardWriter, read_shard

ARMS = ["alt", "mix", "long"]


def shown(runs: list[Run], num: int) -> list[Exhibit]:
    arms = list(dict.fromkeys(run.arm for run in runs))
    measures = measures_of(runs[0].metrics)
    return exhibits(Findings(arms, measures, summarize(arms, runs), compare(arms, runs)), runs, num)


def scored(root: Path, gains: list[float]) -> list[Run]:
    """Arms whose pictures of each prompt differ in CLIP score by so much."""
    runs = [make_run(root, seed, arm, prompts=len(gains)) for seed in (0, 1) for arm in ARMS]
    for each in runs:
        gain = {"alt": 0.0, "mix": 1.0, "long": 5.0}[each.arm] * (1 if each.seed == 0 else -1)
        each.scores.columns["clip_score"] = [20 + gain * value for value in gains]
    return runs


def test_the_best_and_worst_are_those_of_the_measure_and_the_rest_a_draw(tmp_path: Path) -> None:
    gains = [0.0, 3.0, -1.0, 2.0, -4.0, 1.0, 0.0, 0.5]
    best, worst, draw = shown(scored(tmp_path, gains), 3)
    assert (best.title, worst.title) == ("Where “mix” gains most on “alt”", "Where “mix” loses most to “alt”")
    assert [row.index for row in best.rows] == [1, 3, 5] and [row.index for row in worst.rows] == [4, 2]
    assert [drawing.figure for drawing in best.rows[0].drawings] == ["20.00", "23.00", "35.00"]
    other = shown(scored(tmp_path / "other", gains[::-1]), 3)[2]
    assert [row.index for row in draw.rows] == [row.index for row in other.rows]  # whatever was measured
    for row in draw.rows:
        assert bool(row.drawings) == (row.index not in {1, 3, 5, 4, 2})  # no picture is on the page twice


def test_equals_go_by_hash(tmp_path: Path) -> None:
    best, draw = shown(scored(tmp_path, [1.0] * 12), 4)
    assert [row.index for row in best.rows] == [row.index for row in draw.rows]


def test_less_of_an_error_is_a_gain(tmp_path: Path) -> None:
    runs = scored(tmp_path, [0.0, 3.0, -1.0, 2.0])
    judges = [{"name": "x", "metrics": {"clip_error": {"lower_is_better": True, "is_share": False, "about": ""}}}]
    for each in runs:
        each.metrics.update(judges=judges, clip_error=0.0)
        each.scores.columns["clip_error"] = each.scores.columns["clip_score"]
    best, worst, _ = shown(runs, 2)
    assert [row.index for row in best.rows] == [2] and [row.index for row in worst.rows] == [1, 3]
    assert "By the difference in clip error" in best.note


def test_a_prompt_that_is_not_asked_for_it_is_in_no_comparison(tmp_path: Path) -> None:
    runs = scored(tmp_path, [0.0, 3.0, 1.0])
    runs[1].scores.columns["clip_score"][1] = None
    assert [row.index for row in shown(runs, 3)[0].rows] == [2]


def test_one_arm_alone_or_pictures_of_other_prompts(tmp_path: Path) -> None:
    runs = scored(tmp_path, [0.0, 3.0, 1.0])
    alone, = shown(runs[:1], 2)
    assert alone.title == "A draw" and len(alone.rows) == 2
    assert shown(runs, 0) == []
    for each in runs:
        each.metrics["is_paired"] = False
    assert shown(runs, 2) == []


def test_of_pictures_that_were_not_kept_the_thumbnails_are_shown(tmp_path: Path) -> None:
    runs = scored(tmp_path, [float(place) for place in range(6)])
    for each in runs:
        _into_a_shard(each.images, 6)
        forget(each.images)
        _keep(each.images / "thumbnails.tar", {0, 2, 3})
    best, draw = shown(runs, 3)
    assert [row.index for row in best.rows] == [3, 2] and {row.index for row in draw.rows} == {0, 2, 3}
    assert all(len(row.drawings) == 3 for row in best.rows)


def _into_a_shard(folder: Path, num: int) -> None:
    with ShardWriter(str(folder / "00000.tar")) as writer:
        for index in range(num):
            writer.write(Sample("00000", f"{index:08d}", {"png": loose_path(folder, index).read_bytes()}))
            loose_path(folder, index).unlink()
    stats_path(folder / "00000.tar").write_text(json.dumps({"count": num}))


def _keep(thumbnails: Path, indices: set[int]) -> None:
    kept = [sample for sample in read_shard(str(thumbnails), []) if int(sample.key) in indices]
    with ShardWriter(str(thumbnails)) as writer:
        for sample in kept:
            writer.write(sample)


def test_a_picture_that_is_missing_or_broken_is_left_out(tmp_path: Path) -> None:
    runs = scored(tmp_path, [1.0, 2.0])
    loose_path(runs[0].images, 0).unlink()
    loose_path(runs[1].images, 1).write_bytes(b"no picture")
    rows = {row.index: [drawing.arm for drawing in row.drawings] for row in shown(runs, 2)[0].rows}
    assert rows == {0: ["mix", "long"], 1: ["alt", "long"]}


# --- thumbnails and texts ------------------------------------------------------------------------------------------


def test_thumbnails() -> None:
    small, large = picture(png(0, 64)), picture(png(0, 700))
    assert small.pixelated and small.src.startswith("data:image/png;base64,") and small.width == small.height == 64
    assert not large.pixelated and large.src.startswith("data:image/jpeg;base64,") and large.width == 320
    assert not picture(png(0, 700), 128).pixelated and picture(png(0, 700), 200).width == 200


def test_many_pictures_become_smaller(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, 0, arm, prompts=130) for arm in ARMS]
    photo = Image.fromarray(np.full((330, 330, 3), 90, np.uint8))
    for each in runs:
        for index in range(130):
            photo.save(loose_path(each.images, index))
    few, many = (shown(runs, num)[-1].rows[0].drawings or shown(runs, num)[0].rows[0].drawings for num in (2, 130))
    assert few[0].picture.width == 320 and 128 <= many[0].picture.width < 320


@pytest.mark.full
def test_the_file_of_five_arms_and_64_prompts_is_under_15_mb(shared_data: Path, tmp_path: Path) -> None:
    photos = [sample.image() for sample in read_shard(str(shared_data / "photos/subjects-00000.tar"), [])][:64]
    runs = [make_run(tmp_path, 0, f"arm-{place}", place / 4, prompts=64) for place in range(5)]
    for index, photo in enumerate(photos):
        file = io.BytesIO()
        photo.resize((512, 512)).save(file, "PNG")
        for each in runs:
            loose_path(each.images, index).write_bytes(file.getvalue())
    assert max(decode_image(file.getvalue()).size) == 512
    content = ReportInput(name="five", config={}, arms=[each.arm for each in runs], styles=[], runs=runs, relabelled=[])
    run(StageDir(tmp_path / "report", {}), content, Report(num_prompts=64))
    html = (tmp_path / "report/index.html").read_bytes()
    assert html.count(b"<img ") == 5 * 64 and len(html) < 15_000_000


def test_a_long_text_is_cut_for_the_eye() -> None:
    cut = shorten("word " * 400)
    assert f"{cut.shown} {cut.rest}".split() == ["word"] * 400 and len(cut.shown) <= 480
    assert shorten("y" * 5000).shown == "y" * 480 and shorten("short").rest == ""
