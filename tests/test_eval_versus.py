"""`recap evaluate A B`: folders and pipelines from anywhere, compared; what does not fit is one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import recap_here
from PIL import Image

from eval.versus import _arms
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import ShardWriter

NUM = 24


def folder_of(folder: Path, seed: int, num: int = NUM, red: int = 0, name: str = "{:03d}.png", side: int = 32) -> Path:
    """Pictures of coloured squares, some of more red than others."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(num):
        squares = rng.integers(200, size=(4, 4, 3), dtype=np.uint8).repeat(side // 4, axis=0).repeat(side // 4, axis=1)
        squares[..., 0] += np.uint8(red)
        Image.fromarray(squares).save(folder / name.format(index))
    return folder


@pytest.fixture(scope="module")
def settings(world_models: Path) -> list[str]:
    return [f"evaluate.features.model=local-dir:{world_models / 'features'}", "device=cpu",
            f"evaluate.clip_score.model=local-dir:{world_models / 'clip'}"]


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "real", 99, 40)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a scene of {index} squares\n" for index in range(NUM)))
    return path


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report" / "report.json").read_bytes())
    return found


def comparison(out: Path, metric: str) -> dict[str, Any]:
    [found] = [each for each in report(out)["comparisons"] if each["metric"] == metric]
    return found


def test_two_folders_are_compared(tmp_path: Path, settings: list[str], real: Path, prompts: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder_of(tmp_path / "old" / "draws", 0), folder_of(tmp_path / "new" / "draws", 0, red=50)
    out = tmp_path / "out"
    command = ["evaluate", str(a), str(b), "--reference", str(real), "--prompts", str(prompts), "-o", str(out),
               *settings]
    assert recap_here(*command) == 0
    said = capsys.readouterr().out
    assert "old-draws" in said and "new-draws" in said and f"The report: {out / 'report' / 'index.html'}" in said
    assert max(map(len, said.splitlines()[:-1])) <= 80
    found = comparison(out, "kid")
    assert (found["a"], found["b"], found["verdict"], found["num_prompts"]) == ("new-draws", "old-draws", "worse", NUM)
    assert comparison(out, "clip_score")["over"] == "prompts"
    page = (out / "report" / "index.html").read_text()
    assert "old-draws" in page and "a scene of 3 squares" in page

    assert recap_here(*command) == 0
    assert "done before" in capsys.readouterr().err
    Image.new("RGB", (32, 32)).save(b / "005.png")  # a changed image is noticed
    assert recap_here(*command) == 2
    assert re.search(r"new-draws was made with other settings or inputs.*--redo", capsys.readouterr().err, re.DOTALL)
    assert recap_here(*command, "--redo") == 0
    assert "measured anew" in capsys.readouterr().err


def test_a_pipeline_against_a_folder(tmp_path: Path, settings: list[str], real: Path, world_models: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"a red square {index}"}) + "\n" for index in range(6)))
    given, out = folder_of(tmp_path / "given", 0, 6), tmp_path / "out"
    assert recap_here("evaluate", str(given), str(world_models / "stable-diffusion-0"), "--reference", str(real),
                      "--prompts", str(prompts), "-o", str(out), *settings, "generate.num_inference_steps=2") == 0
    assert {run["arm"] for run in report(out)["runs"]} == {"given", "stable-diffusion-0"}
    assert comparison(out, "clip_score")["num_prompts"] == 6


def test_folders_without_prompts_are_paired_by_name(tmp_path: Path, settings: list[str], real: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder_of(tmp_path / "a", 0), folder_of(tmp_path / "b", 0, NUM + 5, red=50)
    out = tmp_path / "out"
    assert recap_here("evaluate", str(a), str(b), "--reference", str(real), "-o", str(out), *settings) == 0
    assert f"5 of {NUM + 5} images of {b} are left out" in " ".join(capsys.readouterr().err.split())
    found = comparison(out, "kid")
    assert (found["over"], found["num_prompts"], found["verdict"]) == ("prompts", NUM, "worse")
    assert "clip_score" not in report(out)["runs"][0]["metrics"]


def test_folders_of_other_names_are_not_paired(tmp_path: Path, settings: list[str], real: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    a = folder_of(tmp_path / "a", 0, name="cat-{}.png")
    b = folder_of(tmp_path / "b", 1, NUM + 8, red=50, name="dog {}.jpg", side=64)
    out = tmp_path / "out"
    assert recap_here("evaluate", str(a), str(b), "--reference", str(real), "-o", str(out), *settings) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"8 of {NUM + 8} images of {b} are left out: another has {NUM}, and FID falls" in said
    assert "32×32" in said and "64×64" in said  # of other sizes, which is said
    assert {run["metrics"]["num_images"] for run in report(out)["runs"]} == {NUM}
    assert comparison(out, "kid")["over"] == "images" and comparison(out, "fid")["verdict"] == "can't tell"


def test_a_reference_is_kept_and_taken(tmp_path: Path, settings: list[str], real: Path, prompts: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.tex").write_text("mine")
    assert recap_here("reference", str(real), "-o", str(kept), *settings) == 0
    assert "40 images by timm" in capsys.readouterr().out and (kept / "reference" / "features.npz").is_file()
    os.utime(real / "000.png")
    assert recap_here("reference", str(real), "-o", str(kept), *settings) == 2
    assert "1 of 40 differ, ['000.png'" in capsys.readouterr().err
    assert recap_here("reference", str(real), "-o", str(kept), "--redo", *settings) == 0
    assert (kept / "thesis.tex").read_text() == "mine"
    a, b = folder_of(tmp_path / "a", 0), folder_of(tmp_path / "b", 1)
    for name, reference in (("by folder", real), ("by kept", kept)):
        assert recap_here("evaluate", str(a), str(b), "--reference", str(reference), "--prompts", str(prompts), "-o",
                          str(tmp_path / name.replace(" ", "-")), *settings) == 0
    one, other = (report(tmp_path / name)["runs"] for name in ("by-folder", "by-kept"))
    assert one == other
    (kept / "reference" / "features.npz").unlink()
    assert recap_here("evaluate", str(a), str(b), "--reference", str(kept), "-o", str(tmp_path / "no"), *settings) == 2


def test_given_pictures_outlive_keep_false_and_other_captions_are_noticed(
        tmp_path: Path, settings: list[str], real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = tmp_path / "captions.tar"
    with ShardWriter(str(shard)) as writer:
        for index in range(NUM):
            writer.write(Sample("captions", f"{index:03d}", {"txt": b"a photo", "long.txt": f"scene {index}".encode()}))
    a, b = folder_of(tmp_path / "a", 0), folder_of(tmp_path / "b", 1)
    command = ["evaluate", str(a), str(b), "--reference", str(real), "--prompts", str(shard), "-o",
               str(tmp_path / "out"), *settings, "generate.keep=false"]
    assert recap_here(*command, "generate.kind=alt") == 0
    assert recap_here(*command, "generate.kind=long") == 2
    assert "kind: alt → long" in capsys.readouterr().err
    assert recap_here(*command, "generate.kind=long", "--redo") == 0
    assert "scene 3" in (tmp_path / "out" / "seed-0" / "generate" / "b" / "prompts.jsonl").read_text()


@pytest.mark.parametrize(("arguments", "says"), [
    (["A"], "1 folder was named: give two or more"),
    (["A", "A"], "is named twice"),
    (["A", "nowhere/at/all"], "no folder at nowhere/at/all"),
    (["A", "EMPTY", "--reference", "REAL"], "no image in"),
    (["A", "PIPELINE", "--reference", "REAL"], "is a pipeline, and there is nothing to draw: give --prompts FILE"),
    (["A", "B", "--prompts", "FEW", "--reference", "REAL"], "has an image 003, and there are 3 prompts"),
    (["A", "B", "--prompts", "EMPTY_LINE", "--reference", "REAL"], "line 2 of"),
    (["A", "B"], "evaluate.reference is empty"),
    (["A", "B", "--reference", "nothing.tar"], "nothing.tar"),
    (["A", "BROKEN", "--reference", "REAL"], "004.png is not a whole image"),
    (["A", "B", "--reference", "REAL", "evaluate.dinov2.model=clean-fid:no.pt"], "evaluate.dinov2: no file at no.pt"),
    ([], "evaluate: of what? give -c FILE"),
])
def test_what_does_not_fit_is_one_line(tmp_path: Path, settings: list[str], real: Path, world_models: Path,
                                       arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    few, empty_line = tmp_path / "few.txt", tmp_path / "line.txt"
    few.write_text("a\nb\nc\n")
    empty_line.write_text("a\n\nc\n")
    (tmp_path / "empty").mkdir()
    broken = folder_of(tmp_path / "broken", 3)
    (broken / "004.png").write_bytes((broken / "004.png").read_bytes()[:60])
    known = {"A": folder_of(tmp_path / "a", 0), "B": folder_of(tmp_path / "b", 1), "REAL": real, "FEW": few,
             "EMPTY": tmp_path / "empty", "EMPTY_LINE": empty_line, "BROKEN": broken,
             "PIPELINE": world_models / "stable-diffusion-0"}
    given = [str(known.get(each, each)) for each in arguments]
    assert recap_here("evaluate", *given, *(["-o", str(tmp_path / "out"), *settings] if given else [])) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recap: ")]
    assert says in line


def test_weights_that_are_missing_offline_are_one_line(tmp_path: Path, real: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder_of(tmp_path / "a", 0), folder_of(tmp_path / "b", 1)
    assert recap_here("evaluate", str(a), str(b), "--reference", str(real), "-o", str(tmp_path / "out"), "device=cpu",
                      "evaluate.features.model=hf-hub:timm/resnet18.a1_in1k") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recap: ")]
    assert "evaluate.features.model" in line and "hub" in line


@pytest.mark.parametrize(("places", "names"), [
    (["x/alt", "x/mix"], ["alt", "mix"]),
    (["x/one/images", "x/two/images"], ["one-images", "two-images"]),
    (["org/model a", "org/b"], ["model-a", "b"]),
    (["a b", "a-b"], ["a-b-0", "a-b-1"]),
    (["x/mix", "y/alt"], ["x-mix", "y-alt"]),  # whatever stands first is what the others are held against
    (["x/ft", "x/base"], ["x-ft", "x-base"]),
])
def test_arms_are_called_by_their_folders(places: list[str], names: list[str], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _arms(places) == names
    with pytest.raises(UserError, match="named twice"):
        _arms(["x/a", "x/b", "x/a"])


@pytest.mark.full
def test_a_killed_evaluation_goes_on(tmp_path: Path, settings: list[str], real: Path) -> None:
    """Killed again and again, wherever it is: in the end the figures of an evaluation that was not."""
    a, b = folder_of(tmp_path / "a", 0, 900), folder_of(tmp_path / "b", 1, 900, red=30)

    def command(out: str) -> list[str]:
        return [str(Path(sys.executable).with_name("recap")), "evaluate", str(a), str(b), "--reference", str(real),
                "-o", str(tmp_path / out), *settings]

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=300)
    for seconds in (5, 6, 7, 8):
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command("killed"), check=True, capture_output=True, timeout=300)
    assert report(tmp_path / "killed")["comparisons"] == report(tmp_path / "whole")["comparisons"]
    assert report(tmp_path / "killed")["runs"] == report(tmp_path / "whole")["runs"]
