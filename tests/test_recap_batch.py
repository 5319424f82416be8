"""Requests as files for a service, and its answers as files: what came back is not asked again."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_recap_llm_server import captions_of, completion

from recap import batch
from recap.config import load
from recap.errors import UserError
from recap.llm.answers import Answers, key_of
from recap.pipeline import Experiment, Plan, run


@pytest.fixture
def exp(world_shards: Path, world_models: Path, tmp_path: Path) -> Experiment:
    path = tmp_path / "batch.toml"
    path.write_text(f'''
runs = "{tmp_path}/runs"
stitch.shards = "{world_shards}/train/*.tar"
stitch.num_images = 12
stitch.experts = ["detr", "alt_text"]
stitch.detr = {{ model = "{world_models}/detr", threshold = 0.01 }}
stitch.writer = "llm"
stitch.llm = {{ model = "tiny", server = "http://127.0.0.1:9/v1", prompt_price = 1.0, completion_price = 2.0 }}
''')
    return load(path, [], Experiment)


def requests(found: batch.Exported) -> list[dict[str, Any]]:
    return [json.loads(line) for file in found.files for line in file.read_text().splitlines()]


def answered(request: dict[str, Any], text: str | None = None) -> dict[str, Any]:
    body = completion(text or json.dumps(captions_of(request["body"])))
    return {"id": "x", "custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_what_is_exported_is_answered_and_imported_is_stitched_without_a_server(exp: Experiment,
                                                                                tmp_path: Path) -> None:
    found = batch.export(exp, tmp_path / "requests")
    lines = requests(found)
    assert found.num_requests == len(lines) == len({line["custom_id"] for line in lines}) <= 12
    assert all(line["custom_id"] == key_of(line["body"]) and line["url"] == "/v1/chat/completions" for line in lines)
    assert 0 < found.most < 1
    back = write(tmp_path / "answers.jsonl", [answered(line) for line in reversed(lines)])
    assert batch.read(exp, [back]).counts == {"kept": len(lines)}
    run(exp, "stitch")
    result = Plan(exp).stitch().dir.result()
    assert result["images_out"] == 12 and not result["flags"] and result["possible_double_payments"] == 0
    assert batch.export(exp, tmp_path / "more").num_requests == 0


def test_bad_answers_are_exported_once_more(exp: Experiment, tmp_path: Path) -> None:
    lines = requests(batch.export(exp, tmp_path / "requests"))
    batch.read(exp, [write(tmp_path / "answers.jsonl", [answered(line, "no JSON") for line in lines])])
    again = requests(batch.export(exp, tmp_path / "again"))
    assert len(again) == len(lines) and not {line["custom_id"] for line in again} & {
        line["custom_id"] for line in lines}
    assert all("could not be used" in line["body"]["messages"][1]["content"] for line in again)


def test_what_failed_or_is_none_of_ours_is_counted_and_changes_nothing(exp: Experiment, tmp_path: Path) -> None:
    lines = requests(batch.export(exp, tmp_path / "requests"))
    failed = [{"custom_id": lines[0]["custom_id"], "response": None, "error": {"message": "expired"}},
              {"custom_id": lines[1]["custom_id"], "response": {"status_code": 500, "body": {"error": "oops"}}}]
    odd = ["{half", "[]", "", {"custom_id": lines[3]["custom_id"]}, answered({**lines[2], "custom_id": "0" * 64})]
    found = batch.read(exp, [write(tmp_path / "answers.jsonl", [*failed, *odd])])
    assert found.counts == {"failed": 2, "unknown": 1, "malformed": 3} and "expired" in found.why
    assert batch.export(exp, tmp_path / "again").num_requests == len(lines)


def test_what_failed_once_may_be_answered_later_in_any_order(exp: Experiment, tmp_path: Path) -> None:
    lines = requests(batch.export(exp, tmp_path / "requests"))
    failed = write(tmp_path / "errors.jsonl", [
        {"custom_id": line["custom_id"], "response": None, "error": {"message": "expired"}} for line in lines])
    answers = write(tmp_path / "answers.jsonl", [answered(line) for line in lines])
    assert batch.read(exp, [failed, failed, answers, failed]).counts == {"failed": 3 * len(lines), "kept": len(lines)}
    run(exp, "stitch")
    result = Plan(exp).stitch().dir.result()
    assert not result["flags"] and result["possible_double_payments"] == 0 and result["cost"] > 0


def test_files_are_bounded(exp: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_REQUESTS", 5)
    found = batch.export(exp, tmp_path / "requests")
    assert [len(file.read_text().splitlines()) for file in found.files] == [
        min(5, found.num_requests - start) for start in range(0, found.num_requests, 5)]
    assert found.files[0].name == "requests-000.jsonl"


def test_what_cannot_be_done_is_one_clear_line(exp: Experiment, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set it to llm"):
        batch.export(exp.model_copy(update={"stitch": exp.stitch.model_copy(update={"writer": "template"})}), tmp_path)
    batch.export(exp, tmp_path / "requests")
    with pytest.raises(UserError, match="is there already"):
        batch.export(exp, tmp_path / "requests")
    blocked = write(tmp_path / "blocked", ["a file"])
    other = exp.model_copy(update={"name": "other"})
    with pytest.raises(UserError, match="cannot be written"):
        batch.export(other, blocked)
    assert Answers(Plan(other).answers).unanswered() == 0
    here = exp.stitch.model_copy(update={"llm": exp.stitch.llm.model_copy(update={"server": None})})
    with pytest.raises(UserError, match=r"stitch\.llm\.server is not set"):
        batch.export(exp.model_copy(update={"stitch": here}), tmp_path / "here")
    with pytest.raises(UserError, match="cannot be read"):
        batch.read(exp, [tmp_path / "none.jsonl"])
