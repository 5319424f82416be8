"""What captions say, counted by source and kind."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.caption_table import Source, caption_table, close_to
from eval.config import ClipScore
from eval.judge import CaptionFacts, Metric
from recap.sample import Sample, caption_extension
from recap.shards import ShardWriter


class WordJudge:
    """Facts are words: those of the image stand in its metadata."""

    name = "words"
    metrics: Mapping[str, Metric | str] = {"any": "nothing"}

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


def test_words_and_readability_are_those_of_the_caption_statistics(shard: str) -> None:
    found = caption_table([Source("ours", [shard], ["short", "long"])], None)["ours"]
    assert (found["short"]["vocabulary"], found["long"]["vocabulary"]) == (2, 4)
    assert found["long"]["mattr"] == (4 + 4 + 3 + 2) / 4 / 100  # `a`, `cat`, and at first `dog` and `runs`
    assert found["short"]["mattr"] is None and found["short"]["reading_ease"] == pytest.approx(121.22)
    assert found["short"]["grade"] == pytest.approx(-3.4)


# --- closeness to references ---------------------------------------------------------------------------------------


def shard_of(path: Path, **kinds: list[str]) -> str:
    with ShardWriter(str(path)) as writer:
        for place, texts in enumerate(zip(*kinds.values(), strict=True)):
            members = {caption_extension(kind): text.encode() for kind, text in zip(kinds, texts, strict=True)}
            writer.write(Sample(path.stem, f"{place}", members))
    return str(path)


def test_captions_like_the_references_are_closer_to_them(world_models: Path, tmp_path: Path) -> None:
    scenes = [f"A {colour} {shape} at the {place}." for colour in ("red", "blue", "green", "black")
              for shape in ("circle", "square", "star") for place in ("left", "right", "top")]
    captions = shard_of(tmp_path / "0.tar", alt=[f"IMG_{place}.jpg" for place in range(36)], short=scenes)
    references = shard_of(tmp_path / "1.tar", human=scenes * 2)
    found = close_to(Source("references", [references], ["human"]), Source("ours", [captions], ["alt", "short"]),
                     ClipScore(model=f"local-dir:{world_models / 'clip'}"), "cpu")
    assert list(found) == ["human"] and found["human"]["num_captions"] == 36 and "clip@" in found["human"]["model"]
    kinds = found["human"]["kinds"]
    assert list(kinds) == ["alt", "short", "reference"]
    assert kinds["short"]["frechet"] < kinds["alt"]["frechet"] and kinds["short"]["mmd2"] < kinds["alt"]["mmd2"]


def test_too_few_captions_are_said_and_no_end_of_the_report(
        world_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions, references = shard_of(tmp_path / "0.tar", short=["a dog"]), shard_of(tmp_path / "1.tar", human=["a cat"])
    clip = ClipScore(model=f"local-dir:{world_models / 'clip'}")
    ours = Source("ours", [captions], ["short"])
    assert close_to(Source("references", [references], ["human"]), ours, clip, "cpu") == {}
    assert "report.references: human: closeness needs 2 captions" in capsys.readouterr().err
    assert close_to(Source("references", [], []), ours, clip, "cpu") == {}
