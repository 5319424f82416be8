"""Batches of decoded samples: in the order of the file, whatever is decoded ahead, and no more in memory than fits."""

import io
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recap import shard_work
from recap.config import Data
from recap.decoders import Decoders
from recap.sample import Sample
from recap.shards import Reject, ShardWriter

SIZES = [(4, 4), (40, 40), (4, 4), (40, 40), (40, 40), (4, 4)]


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """Small and large images, and one that is none."""
    with ShardWriter(str(tmp_path / "00000.tar")) as writer:
        for key, size in enumerate(SIZES):
            Image.new("RGB", size).save(file := io.BytesIO(), "PNG")
            writer.write(Sample("00000", str(key), {"png": file.getvalue()}))
        writer.write(Sample("00000", "bad", {"png": b"no image"}))
    return str(tmp_path / "00000.tar")


def batches(shard: str, rejects: list[Reject], limit: int | None = None) -> list[list[tuple[str, tuple[int, int]]]]:
    with Decoders(1) as decoders:
        samples = shard_work.decoded(shard, Data(shards=shard, alt_text="optional"), decoders, rejects)
        found = list(shard_work.batches(samples, 4, limit))
    return [[(sample.key, image.size) for sample, image in batch] for batch in found]


def test_large_images_are_decoded_in_their_turn_alone(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, str] = {}
    check = Sample.check

    def noted(sample: Sample, *how: Any) -> Image.Image:
        threads[sample.key] = threading.current_thread().name
        return check(sample, *how)

    monkeypatch.setattr(Sample, "check", noted)
    monkeypatch.setattr(shard_work, "LARGE_PIXELS", 100)
    rejects: list[Reject] = []
    found = batches(shard, rejects)
    assert [each for batch in found for each in batch] == [(str(key), size) for key, size in enumerate(SIZES)]
    assert [reject.key for reject in rejects] == ["bad"]
    here = threading.current_thread().name
    assert [key for key, thread in threads.items() if thread == here] == ["1", "3", "4"]


def test_a_batch_ends_where_its_images_would_fill_the_memory(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_work, "MAX_BATCH_PIXELS", 1700)
    assert [len(batch) for batch in batches(shard, [])] == [4, 2]
    monkeypatch.setattr(shard_work, "MAX_BATCH_PIXELS", 1000)
    assert [len(batch) for batch in batches(shard, [])] == [2, 2, 1, 1]
    assert [len(batch) for batch in batches(shard, [], limit=3)] == [2, 1]
