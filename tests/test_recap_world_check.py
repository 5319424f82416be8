"""`recap world check` and `recap world sheet`, with the shipped checkpoints on a world of another seed."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from recap.errors import UserError
from recap.rundir import StageDir, hash_files
from recap.sample import Sample
from recap.shards import ShardWriter, read_shard
from recap.world import base
from recap.world.check import BY_EYE
from recap.world.cli import app
from recap.world.draw import draw
from recap.world.init import init
from recap.world.reader import WEIGHTS, Reader


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, shards, a run whose relabelled captions are the exact descriptions, and a claim with alt's FID."""
    out = tmp_path_factory.mktemp("check")
    init(out / "models")
    draw(out / "shards", num_train=20, num_tuning=0, num_validation=0, num_evaluation=100, num_reference=300, seed=3)
    relabelled(out / "run", [sample.caption("exact") or "" for sample in train(out)], out)
    alt = {"arm": "alt", "metrics": {"fid": 500.0, "num_images": 90}}
    ends = {("mix", "alt", "object_accuracy"): [0.01, 0.03], ("shuffled", "alt", "object_accuracy"): [-0.05, -0.02],
            ("shuffled", "alt", "fid"): [-1.0, 2.0], ("mix", "oracle", "object_accuracy"): [-0.05, -0.01],
            ("clean", "oracle", "object_accuracy"): [-0.01, 0.001], ("mix", "base", "clip_score"): None}
    compared = [{"a": a, "b": b, "metric": metric, "ci": ci} for (a, b, metric), ci in ends.items()]
    (out / "claim.json").write_text(json.dumps(
        {"runs": [alt, {"arm": "mix", "metrics": {"fid": 1.0}}], "comparisons": compared}))
    return out


def train(world: Path) -> list[Sample]:
    return [*read_shard(str(world / "shards/train/00000.tar"), [])]


def relabelled(run: Path, captions: list[str], world: Path) -> None:
    with ShardWriter(str(run / "relabel/00000.tar")) as writer:
        for sample, caption in zip(train(world), captions, strict=True):
            writer.write(replace(sample, members={**sample.members, "long.txt": caption.encode()}))
    (run / "relabel/done.json").write_text("{}")


def check(world: Path, **paths: str) -> tuple[int, list[str]]:
    wanted = {"models": "models", "shards": "shards", "run": "run", "claim": "claim.json"} | paths
    result = CliRunner().invoke(app, ["check", *(part for name, path in wanted.items()
                                                 for part in (f"--{name}", str(world / path)))])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, [line for line in result.stdout.splitlines() if line.startswith(("ok", "FAIL"))]


def test_all_gates_hold_of_what_is_shipped(world: Path) -> None:
    status, gates = check(world)
    assert status == 0, gates
    assert len(gates) == 12 and all(gate.startswith("ok") and len(gate) <= 80 for gate in gates)
    assert "relabelled long captions: facts stated" in gates[4] and " 1.000 ≥ 0.700" in gates[4]


def test_what_is_shipped_was_trained_with_todays_settings_and_is_no_larger_than_agreed() -> None:
    for part in base.PARTS:
        record = json.loads((base.SHIPPED / part / "done.json").read_bytes())
        assert record["fingerprint"] == StageDir(base.SHIPPED, base._reads(part)).fingerprint, f"train {part} again"
    assert sum(path.stat().st_size for path in base.SHIPPED.rglob("*") if path.is_file()) < 40e6


def test_untrained_models_fail(world: Path, world_models: Path) -> None:
    status, gates = check(world, models=str(world_models))
    assert status == 1
    assert [gate[:4] for gate in gates[:4]] == ["FAIL"] * 4, gates


def test_captions_of_other_images_and_a_vae_too_far_from_them_fail(world: Path, tmp_path: Path) -> None:
    relabelled(tmp_path / "run", [sample.caption("exact") or "" for sample in train(world)[::-1]], world)
    (tmp_path / "claim.json").write_text((world / "claim.json").read_text().replace("500.0", "0.5"))
    status, gates = check(world, run=str(tmp_path / "run"), claim=str(tmp_path / "claim.json"))
    assert status == 1
    assert [gate[:4] for gate in gates[:7]] == ["ok  ", "ok  ", "ok  ", "ok  ", "FAIL", "FAIL", "FAIL"]


def test_a_claim_that_is_not_shown_and_controls_that_fail(world: Path, tmp_path: Path) -> None:
    claim = json.loads((world / "claim.json").read_bytes())
    for each, ci in zip(claim["comparisons"], ([-0.01, 0.03], [0.01, 0.02], [-2.0, -1.0], [0.01, 0.02], None),
                        strict=False):
        each["ci"] = ci
    (tmp_path / "claim.json").write_text(json.dumps(claim))
    status, gates = check(world, claim=str(tmp_path / "claim.json"))
    assert status == 1
    assert [re.sub(" +", " ", gate) for gate in gates[7:]] == [
        "FAIL claim: object accuracy, mix − alt, low end -0.010 ≥ 0.000",
        "FAIL control: object accuracy, mix − oracle, low end 0.010 ≤ 0.000",
        "FAIL control: object accuracy, shuffled − alt, low end 0.010 ≤ 0.000",
        "FAIL control: FID, shuffled − alt, high end -1.000 ≥ 0.000"]  # of clean the claim says nothing


def test_the_reader_that_is_shipped_was_judged_by_eye(world: Path) -> None:
    judged = json.loads((BY_EYE / "judged.json").read_bytes())
    assert judged["reader"] == hash_files(world / "models/reader"), "draw a sheet and judge it anew"
    numbers = [wrong["picture"] for wrong in judged["wrong"]] + judged["undecided"]["pictures"]
    assert judged["pictures"] == 100 and set(numbers) <= set(range(1, 101))
    with Image.open(BY_EYE / "sheet.png") as page:
        assert page.size == (10 * 160, 10 * 216)


@pytest.mark.parametrize(("paths", "message"), [
    ({"shards": "none"}, "recap world draw"), ({"run": "none"}, "recap relabel"),
    ({"claim": "none"}, "no FID of an arm"), ({"run": "other"}, "says nothing of its scene"),
])
def test_what_is_missing_is_named(world: Path, paths: dict[str, str], message: str) -> None:
    with ShardWriter(str(world / "other/relabel/00000.tar")) as writer:
        writer.write(replace(train(world)[0], members={"png": train(world)[0].members["png"], "json": b"{}"}))
    (world / "other/relabel/done.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        check(world, **paths)


def test_a_damaged_reader_is_named(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="no reader's weights in"):
        Reader.open(tmp_path, "cpu")


def test_a_sheet_shows_pictures_from_all_over_a_folder(world: Path, tmp_path: Path) -> None:
    for index, sample in enumerate(train(world)):
        sample.image().save(tmp_path / f"{index:05d}.png")

    def sheet(folder: Path, num: int) -> Image.Image:
        out = tmp_path / "sheet.jpg"
        result = CliRunner().invoke(app, ["sheet", str(folder), str(out), "--models", str(world / "models"),
                                          "--num", str(num)])
        if result.exception:
            raise result.exception
        return Image.open(out).copy()

    page = sheet(tmp_path, 15)
    assert page.width == 10 * 160 and page.height == 2 * 216
    assert np.asarray(page).std() > 20
    assert sheet(tmp_path, 100).height == 2 * 216  # all twenty
    with pytest.raises(UserError, match="no picture to show"):
        sheet(tmp_path / "none", 10)
    (tmp_path / "00000.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="is no picture"):
        sheet(tmp_path, 10)
    for out in ("sheet", str(tmp_path / "none" / "sheet.png")):
        with pytest.raises(UserError, match="cannot write"):
            raise CliRunner().invoke(app, ["sheet", str(tmp_path), out]).exception or AssertionError
