"""What captions say, counted by source and kind."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.caption_table import Source, caption_table
from eval.judge import CaptionFacts
from recap.sample import Sample
from recap.shards import ShardWriter


class WordJudge:
    """Facts are words: those of the image stand in its metadata."""

    name = "words"
    metrics: dict[str, str] = {"any": "nothing"}

    def images(self, images: Any, prompts: Any) -> list[dict[str, float | None]]:
        raise NotImplementedError

    def caption(self, caption: str, metadata: dict[str, Any]) -> CaptionFacts:
        said, true = set(caption.split()), set(metadata["words"])
        return CaptionFacts(len(said & true), len(said - true), len(true))


@pytest.fixture
def shard(tmp_path: Path) -> str:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    texts = [("dog", "a dog runs"), ("cat", "a cat " * 50), ("", "no image\xff")]
    with ShardWriter(str(tmp_path / "00000.tar")) as writer:
        for index, (short, long) in enumerate(texts):
            metadata = {"words": ["a", "dog", "runs", "fast"]} if index == 0 else {"other": 1}
            writer.write(Sample("00000", f"{index}", {
                "png": image.getvalue(), "json": json.dumps(metadata).encode(), "short.txt": short.encode(),
                "long.txt": long.encode("latin-1")}))
    return str(tmp_path / "00000.tar")


def test_captions_are_counted_measured_and_judged(shard: str) -> None:
    found = caption_table([Source("ours", [shard], ["short", "long"]), Source("none", [], ["short"])], WordJudge())
    assert set(found) == {"ours"}
    short, long = found["ours"]["short"], found["ours"]["long"]
    assert (short["num_captions"], short["mean_words"], short["share_over_77"]) == (2, 1, 0)  # an empty one is none
    assert (short["num_judged"], short["covered"], short["precision"]) == (1, 0.25, 1)
    assert long["num_captions"] == 2 and long["share_over_77"] == 0.5  # the third is not UTF-8
    assert (long["covered"], long["precision"]) == (0.75, 1)


def test_without_a_judge_nothing_is_said_of_facts(shard: str) -> None:
    found = caption_table([Source("ours", [shard], ["short"])], None)["ours"]["short"]
    assert found["num_judged"] == 0 and found["covered"] is None and found["precision"] is None
