"""What a run says of itself while it works, read from elsewhere."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from recap import meter, status
from recap.errors import UserError
from recap.meter import Meter


def stats(good: int, **bad: int) -> dict[str, Any]:
    return {"count": good + sum(bad.values()), "status_dict": {"success": good, **bad}}


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "progress.json").read_bytes())
    return found


@pytest.fixture(autouse=True)
def always_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "WRITE_EVERY", -1.0)


def test_an_earlier_try_counts_but_not_in_the_rate(tmp_path: Path) -> None:
    with Meter(tmp_path, 30, 3, [stats(8, undecodable_image=2)]) as found:
        assert "10 of 30 (33.3%)" in status.status(tmp_path)
        assert "0.0 images/s" in status.status(tmp_path)
        found.images("cpu", "b", 4, {"undecodable_image": 1})
        found.shard("b", 10, {"undecodable_image": 1, "no_image": 1})
    text = status.status(tmp_path)
    assert "state        done" in text and "20 of 30 (66.7%)" in text and "2 of 3 (66.7%)" in text
    assert text.splitlines()[-2:] == ["quarantined  undecodable_image                     3",
                                      "             no_image                              1"]


def test_a_shard_that_is_done_again_counts_once(tmp_path: Path) -> None:
    with Meter(tmp_path, None, 1, []) as found:
        found.images("cpu 0", "a", 70, {"no_image": 3})
        assert said(tmp_path)["images"] == 70
        found.images("cpu 1", "a", 20, {"no_image": 1})
        assert (said(tmp_path)["images"], said(tmp_path)["quarantined"]) == (20, {"no_image": 1})
        found.shard("a", 100, {"no_image": 5})
    assert (said(tmp_path)["images"], said(tmp_path)["quarantined"]) == (100, {"no_image": 5})
    assert said(tmp_path)["workers"]["cpu 1"] >= 0


def test_a_run_that_fails_says_so(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Meter(tmp_path, 10, 1, []):
        raise ZeroDivisionError
    assert "state        stopped" in status.status(tmp_path)


def test_ranks_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = [stats(10)]
    for rank, images in (("0", 5), ("1", 7), ("10", 2)):
        monkeypatch.setenv("RANK", rank)
        with Meter(tmp_path, 40, 4, finished) as found:
            found.images("cpu", rank, images, {})
            found.shard(rank, images, {"no_image": 1})
    text = status.status(tmp_path)
    assert "3 ranks done" in text and "24 of 40" in text and "4 of 4" in text and "no_image" in text
    assert [rank["images"] for rank in status.read(tmp_path)] == [5, 7, 2]


def test_ranks_of_an_earlier_run_do_not_count_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        with Meter(tmp_path, 40, 4, []) as found:
            found.shard(rank, 10, {"no_image": 1})
    monkeypatch.delenv("RANK")
    time.sleep(0.01)
    with Meter(tmp_path, 40, 4, [stats(9, no_image=1)] * 3) as found:
        found.shard("3", 10, {})
        monkeypatch.setenv("RANK", "2")
        assert "30 of 40" not in status.status(tmp_path) and "40 of 40" in status.status(tmp_path)
        with Meter(tmp_path, 40, 4, []):
            assert [rank["pid"] for rank in status.read(tmp_path)] == [os.getpid()] * 2
    text = status.status(tmp_path)
    assert "2 ranks done" in text and "40 of 40" in text and "4 of 4" in text
    assert text.splitlines()[-1] == "quarantined  no_image                              3"


def test_a_lost_worker_has_no_rate_any_more(tmp_path: Path) -> None:
    with Meter(tmp_path, None, 1, []) as found:
        for place in range(100):
            found.images(f"node-{place}", "a", place, {})
            found.lost(f"node-{place - 1}")
        found.shard("a", 100, {})
        assert list(said(tmp_path)["workers"]) == ["node-99"] and not found.begun


def test_a_rate_is_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(meter.time, "monotonic", lambda: now)
    rate = meter.Rate()
    for place in range(600):
        now += 1
        rate.add(3 if place < 300 else 8)
    assert rate.per_second() == 8 and len(rate.counts) < 65
    now += 61
    assert rate.per_second() == pytest.approx(8 * 61 / 122, abs=0.1)


def test_a_killed_run_is_silent_and_has_no_rate(tmp_path: Path) -> None:
    with Meter(tmp_path, 10, 1, []) as found:
        found.images("cpu", "a", 5, {})
        killed = said(tmp_path)
    assert "rate" in status.table([killed], killed["time"] + 60)
    text = status.table([killed], killed["time"] + 7300)
    assert "state        silent" in text and "2 h 1 min ago" in text and "rate" not in text


def test_lines_fit_a_terminal(tmp_path: Path) -> None:
    with Meter(tmp_path, 10**9, 10**5, []) as found:
        found.images("worker-node-0123456789:1234567", "a", 10**8, {"captions_of_another_image": 10**8})
        assert max(map(len, status.status(tmp_path).splitlines())) <= 80


def test_where_nothing_has_begun_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no relabelling has begun in"):
        status.status(tmp_path)


@pytest.mark.parametrize("estimate", [8, 20])
def test_an_estimate_that_was_wrong_gives_way(tmp_path: Path, estimate: int) -> None:
    with Meter(tmp_path, estimate, 2, [stats(6)]) as found:
        found.images("cpu", "00001.tar", 6, {})
        assert found.bar.total == max(estimate, 12)
        found.shard("00001.tar", 6, {})
    assert "images       12 of 12 (100.0%)" in status.status(tmp_path)
