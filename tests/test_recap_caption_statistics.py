"""Statistics of captions: known figures, independent computations, parts that join, and what hostile records can do."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.caption_tokens import tokenize
from recap import caption_statistics
from recap.caption_statistics import (
    CaptionStatistics,
    Distinct,
    Tally,
    captions_of,
    closeness,
    draw,
    draw_captions,
    embed,
    frechet_distance,
    lengths,
    num_clip_tokens,
    num_syllables,
    of_shard,
    partial_file,
    read_captions,
)
from recap.chunks import split
from recap.clip_bpe import clip_tokenizer
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import Reject, ShardWriter

WORDS = ["a", "the", "dog", "cat", "runs", "sleeps", "red", "green", "fence", "garden", "under", "over", "behind"]


def entry(**values: Any) -> dict[str, Any]:
    return {"captioner": "c", "revision": "main", "adapter": None, "prompt": "p", "decoding": {}, "scores": {},
            "flags": []} | values


def sample(key: str, captions: dict[str, str], recorded: dict[str, Any] | None = None, shard: str = "0") -> Sample:
    members = {"txt" if kind == "alt" else f"{kind}.txt": text.encode() for kind, text in captions.items()}
    if recorded is not None:
        members["recap.json"] = json.dumps({"schema": 1, "captions": recorded}).encode()
    return Sample(shard, key, members)


def tally(*captions: str) -> Tally:
    found = Tally()
    for caption in captions:
        found.add(caption, num_clip_tokens(caption), None)
    return found


# --- lengths, words --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 400), min_size=1, max_size=60))
def test_percentiles_are_those_of_numpy(values: list[int]) -> None:
    found = lengths(Counter(values))
    assert found["mean"] == pytest.approx(np.mean(values), abs=0.006)
    for name, share in (("p5", 5), ("median", 50), ("p95", 95)):
        assert found[name] == pytest.approx(np.percentile(values, share), abs=0.006)
    counts, _ = np.histogram(values, [*caption_statistics.BINS, 10**6])
    assert list(found["histogram"].values()) == counts.tolist()


def test_lengths_are_in_the_projects_words_and_in_clips_tokens() -> None:
    captions = ["A dog's bone, on (blue) grass.", "", "word " * 75, "word " * 76]
    found = tally(*captions).summary()
    assert found["num_captions"] == 4 and found["num_empty"] == 1
    assert found["words"]["mean"] == pytest.approx(np.mean([len(tokenize(text)) for text in captions]), abs=0.01)
    assert found["clip_tokens"]["mean"] == pytest.approx(
        np.mean([split(text, clip_tokenizer()).num_tokens for text in captions]), abs=0.01)
    assert found["share_over_77"] == 0.25  # 75 tokens, BOS and EOS are what one window holds


def test_vocabulary_pairs_and_repeats() -> None:
    found = tally("a red dog", "a red dog", "A red dog", "a green cat").summary()
    assert found["vocabulary"] == 5
    assert found["distinct_2"] == round(4 / 8, 4)  # "a red", "red dog", "a green", "green cat", of 8 pairs
    assert found["share_repeated"] == 0.5  # to the letter
    assert found["estimated"] == [] and found["flags"] == {} and found["share_not_ended"] is None


def test_moving_average_is_that_of_every_window() -> None:
    draws = random.Random(0)
    captions = [" ".join(draws.choices(WORDS, k=draws.randrange(30))) for _ in range(40)]
    words = [word for caption in captions for word in tokenize(caption)]
    size = caption_statistics.WINDOW
    windows = [len(set(words[start:start + size])) / size for start in range(len(words) - size + 1)]
    assert tally(*captions).summary()["mattr"] == pytest.approx(np.mean(windows), abs=1e-4)
    assert tally("too short").summary()["mattr"] is None
    assert tally(*captions * 3).summary()["mattr"] == pytest.approx(np.mean(windows), abs=0.02)  # not so distinct_2


# --- readability ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "ease", "grade"), [
    # 6 words, 6 syllables; 13 words, 26 syllables: the examples of Wikipedia's article on Flesch's formulas.
    ("The cat sat on the mat.", 116.15, -1.45),
    ("The Australian platypus is seemingly a hybrid of a mammal and reptilian creature.", 24.44, 13.08),
    ("The cat sat on the mat. The cat sat on the mat", 116.15, -1.45),
])
def test_readability_of_known_sentences(text: str, ease: float, grade: float) -> None:
    found = tally(text).summary()
    assert found["reading_ease"] == pytest.approx(ease, abs=0.01) and found["grade"] == pytest.approx(grade, abs=0.01)


def test_what_is_not_english_has_no_readability() -> None:
    assert tally("日本語の説明文です。", "123 456", "").summary()["reading_ease"] is None


# Drawn from the words of human captions (IIW-400) after the rules were written, and counted by hand.
HELD_OUT = {
    1: "height shoots hangs blur side throats foot propped placed crouch drives droop fall lens watch wisps "
       "mound slip made slits help paved bird fair haired shed",
    2: "swirling away divides parking hairy perfect combined valley although instead doorknob button sandals "
       "cutout flashbulb folded fashioned filtered enough petite leaning others racing driveway broadly mixture "
       "browner locale ocean limit equipped silver bordered arranged onto reaching akin seaweed stories",
    3: "optimal happily enshrouded adornment juxtaposed lowercase testament areas developed horizon zebrafish "
       "actual embankment primary appealing together engravings counterpoint natural occupied",
    4: "continuous accentuates overlooking ventilation",
    5: "decoratively",
}


def test_syllables_of_words_that_the_rules_were_not_written_for() -> None:
    right = [num_syllables(word) == number for number, words in HELD_OUT.items() for word in words.split()]
    assert len(right) == 90 and np.mean(right) >= 0.95
    assert [num_syllables(word) for word in ("dog's", "don't", "wide-brimmed", "xyz")] == [1, 1, 2, 1]


# --- parts that join -----------------------------------------------------------------------------------------------


def some_samples(seed: int, num: int, shard: str) -> list[Sample]:
    draws = random.Random(seed)
    return [sample(str(key), {"alt": draws.choice(["IMG.jpg", "dog"]),
                              "short": " ".join(draws.choices(WORDS, k=draws.randrange(12)))},
                   {"short": entry(flags=draws.choice([[], ["not_ended"]]))}, shard) for key in range(num)]


def counted(samples: list[Sample]) -> CaptionStatistics:
    found = CaptionStatistics(["alt", "short"])
    for each in samples:
        found.add(each)
    return found


@settings(max_examples=12)
@given(st.permutations(range(5)), st.integers(1, 4))
def test_workers_parts_join_to_the_same_figures_in_whatever_order(order: list[int], groups: int) -> None:
    shards = [some_samples(seed, 25, str(seed)) for seed in range(5)]
    wholes = [CaptionStatistics(["alt", "short"]) for _ in range(groups)]
    for place, seed in enumerate(order):
        text = json.dumps(counted(shards[seed]).partial())
        wholes[place % groups].merge(CaptionStatistics.from_partial(json.loads(text)))
    for other in wholes[1:]:
        wholes[0].merge(other)
    expected = CaptionStatistics(["alt", "short"])
    for each in shards:
        expected.merge(counted(each))
    assert wholes[0].summary() == expected.summary()
    assert wholes[0].partial() == expected.partial()
    flat = counted([each for shard in shards for each in shard]).summary()
    for kind in flat:  # all but the windows of words, which end with their shard
        assert flat[kind] | {"mattr": 0} == wholes[0].summary()[kind] | {"mattr": 0}


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(0, 600), st.integers(0, 600))
def test_counts_of_parts_join_to_those_of_the_whole(seed: int, num: int, cut: int) -> None:
    draws = random.Random(seed)
    values = [draws.randrange(1000) for _ in range(num)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_statistics, "MAX_KEPT", 64)
        whole, parts = Distinct(), [Distinct(), Distinct()]
        for place, value in enumerate(values):
            whole.add(str(value))
            parts[place < cut].add(str(value))
        parts[0].merge(parts[1])
        assert parts[0] == whole and len(whole.counts) <= 64
        if not whole.level:
            assert whole.number == len(set(values))
            repeated = sum(count for count in Counter(values).values() if count > 1)
            assert whole.share_repeated(num) == (round(repeated / num, 4) if num else None)


def test_a_large_vocabulary_is_estimated_in_bounded_memory() -> None:
    found = Distinct()
    for value in range(200_000):
        found.add(f"w{value}", 1 + value % 2)
    assert found.level and len(found.counts) <= caption_statistics.MAX_KEPT
    assert found.number == pytest.approx(200_000, rel=0.04)
    assert found.share_repeated(300_000) == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize(("times", "expected", "error"), [
    ([1] * 100_000, 0, 0), ([1, 1, 1, 2] * 25_000, 0.4, 0.01), ([9_000] + [1] * 21_000, 0.3, 0.03)])
def test_the_share_of_repeats_is_that_of_the_sample(times: list[int], expected: float, error: float) -> None:
    found = Distinct()
    for value, each in enumerate(times):
        found.add(f"a dog, {value}", each)
    assert found.level
    assert found.share_repeated(sum(times)) == pytest.approx(expected, abs=error)


def test_a_written_part_is_small_whatever_was_counted() -> None:
    found = Tally()
    for number in range(3000):
        found.add(" ".join(f"w{number * 9 + place}" for place in range(9)) + ".", 9, None)
    part = json.dumps(found.partial())
    assert len(part) < 3 * 8 * caption_statistics.MAX_WRITTEN + 1000
    for _ in range(2):  # and what comes of it is written as it was
        found = Tally.from_partial(json.loads(part))
        assert json.dumps(found.partial()) == part
    summary = found.summary()
    assert summary["vocabulary"] == pytest.approx(27_000, rel=0.07)
    assert summary["estimated"] == ["vocabulary", "distinct_2", "share_repeated"]
    assert summary["distinct_2"] == pytest.approx(1, abs=0.07) and summary["share_repeated"] == 0


@settings(max_examples=10)
@given(st.permutations(range(6)))
def test_parts_of_many_values_join_alike_in_whatever_order(order: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_statistics, "MAX_KEPT", 64)
        patch.setattr(caption_statistics, "MAX_WRITTEN", 16)
        wholes = [Distinct(), Distinct()]
        for whole, places in zip(wholes, (range(6), order), strict=True):
            for place in places:
                part = Distinct()
                for value in range(30 * place, 90 * place):
                    part.add(str(value), 1 + value % 3)
                whole.merge(Distinct.from_partial(part.partial()))
        assert wholes[0] == wholes[1] and 0 < len(wholes[0].counts) <= 64


def test_of_long_texts_nothing_is_remembered() -> None:
    caption_statistics._remembered_hash.cache_clear()
    caption_statistics._remembered_syllables.cache_clear()
    word = "ab" * 1000
    found = tally(f"{word} {word} dog")
    assert found.summary()["vocabulary"] == 2
    assert caption_statistics._remembered_hash.cache_info().currsize == 1  # of `dog`
    assert caption_statistics._remembered_syllables.cache_info().currsize == 1


def test_only_the_named_kinds_and_known_flags_are_counted() -> None:
    found = CaptionStatistics(["short"])
    for number in range(200):
        found.add(sample(str(number), {f"kind{number}": "x", "short": "a dog"},
                         {"short": entry(flags=[f"flag{number}", f"flag{number + 1}", "empty", "empty"]),
                          f"kind{number}": entry()}))
    assert list(found.summary()) == ["short"]
    assert found.summary()["short"]["flags"] == {"empty": 200, "other": 200}  # captions, not mentions


# --- records and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [
    b"", b"{", b"[]", b'{"captions": []}', b'{"captions": {"short": 1}}', b"[" * 100_000, b"9" * 10_000,
    b'{"captions": {"short": {}, "pad": "' + b"x" * 1_000_000 + b'"}}', b'{"captions": {"../x": {}}}', b"\xff",
])
def test_a_record_that_is_none_says_nothing(record: bytes) -> None:
    found = captions_of(Sample("0", "k", {"txt": b"alt", "short.txt": b"a dog", "recap.json": record}))
    assert [(each.kind, each.text, each.made) for each in found] == [("alt", "alt", None), ("short", "a dog", None)]


def test_of_a_record_only_plain_values_stay() -> None:
    recorded = entry(flags=["ok", 3, None, "x" * 99, "a\x1b"], num_clip_tokens=10**50,
                     scores={"clip": 3.5, "bad": "<b>", "nan": float("nan"), "inf": float("inf"), "yes": True})
    found = captions_of(sample("k", {"short": "a dog", "mix": "a dog", "people": "Ein Hund"}, {"short": recorded}))
    assert [each.kind for each in found] == ["short", "mix", "people"]
    assert found[0].flags == ("ok",) and found[0].scores == {"clip": 3.5} and found[0].num_clip_tokens is None
    lists = captions_of(sample("k", {"short": "a dog"}, {"short": entry(flags="all", scores=[1])}))
    assert lists[0].flags == () and lists[0].scores == {}


@pytest.mark.parametrize(("said", "counted"), [
    (7, 7), (40, 40), (6, 8), (0, 8), (47, 8), (10**6, 8), (True, 8), ("7", 8)])
def test_a_number_of_tokens_that_cannot_be_is_counted_anew(said: Any, counted: int) -> None:
    found = CaptionStatistics(["short"])
    found.add(sample("k", {"short": "a dog, a cat and a bird"}, {"short": entry(num_clip_tokens=said)}))
    assert found.summary()["short"]["clip_tokens"]["mean"] == counted


def test_captions_are_read_from_shards_and_from_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    captions = {"alt": "IMG", "short": "a dog", "mix": "a dog"}
    recorded = {"short": entry(flags=["not_ended"])}
    with ShardWriter(str(tmp_path / "0.tar")) as writer:
        writer.write(sample("k", captions, recorded))
        writer.write(Sample("0", "l", {"txt": b"\xff", "short.txt": b"a cat"}))
    pq.write_table(pa.table({"key": ["k"], "sha256": ["00"], "short": ["a dog"], "long": pa.array([None], pa.string()),
                             "mix": ["a dog"], "recap": [json.dumps({"schema": 1, "captions": recorded})]}),
                   tmp_path / "0.parquet")
    whole = of_shard(str(tmp_path / "0.tar"), ["alt", "short", "mix"]).summary()
    assert {kind: found["num_captions"] for kind, found in whole.items()} == {"alt": 1, "short": 2, "mix": 1}
    assert whole["short"]["flags"] == {"not_ended": 1} and whole["short"]["num_checked"] == 1
    (found,) = read_captions(str(tmp_path / "0.parquet"), [])
    assert found.key == "k" and sorted(found.members) == ["mix.txt", "recap.json", "short.txt"]
    assert of_shard(str(tmp_path / "0.parquet"), ["alt", "short"]).summary()["short"]["share_not_ended"] == 1
    assert partial_file("s3://b/0.tar") == partial_file("s3://b/0.parquet") == "s3://b/0_captions.json"
    (tmp_path / "1.parquet").write_bytes(b"PAR1 nonsense")
    rejects: list[Reject] = []
    with pytest.raises(UserError, match="no parquet of captions"):
        list(read_captions(str(tmp_path / "1.parquet"), rejects))


# --- closeness -------------------------------------------------------------------------------------------------------


def test_frechet_distance_is_that_of_scipys_root() -> None:
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 8)), rng.normal(0.3, 1.5, size=(200, 8)) @ rng.normal(size=(8, 8))
    sigmas = [np.cov(each, rowvar=False) for each in (a, b)]
    apart = a.mean(axis=0) - b.mean(axis=0)
    expected = apart @ apart + np.trace(sigmas[0] + sigmas[1] - 2 * np.real(sqrtm(sigmas[0] @ sigmas[1])))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    few = rng.normal(size=(5, 8))  # fewer vectors than dimensions
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)


class Letters:
    """A scorer whose vector of a text is made of its letters; it reads 5 words."""

    name, context_length = "letters, and more", 5

    def num_tokens(self, text: str) -> int:
        return len(text.split())

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        counts = np.array([[1 + text.count(letter) for letter in "abcdefgh"] for text in texts], dtype=np.float64)
        vectors: np.ndarray = counts / np.linalg.norm(counts, axis=1, keepdims=True)
        return vectors


def test_mmd_is_the_mean_over_pairs() -> None:
    rng = random.Random(1)
    near, far = ([" ".join(rng.choices(words, k=3)) for _ in range(60)] for words in (WORDS[:10], ["hag", "feed"]))
    reference = [" ".join(rng.choices(WORDS[:10], k=3)) for _ in range(100)]
    scorer: Any = Letters()
    found = closeness({"near": near, "far": far}, reference, scorer)
    assert found["num_captions"] == 50 and found["model"] == "letters" and list(found["kinds"]) == ["near", "far",
                                                                                                    "reference"]
    x, y = scorer.embed_texts(reference[:50]), scorer.embed_texts(far[:50])

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-((a - b) ** 2).sum() / (2 * found["bandwidth"] ** 2)))

    within = [np.mean([kernel(a, b) for i, a in enumerate(each) for j, b in enumerate(each) if i != j])
              for each in (x, y)]
    expected = within[0] + within[1] - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert found["kinds"]["far"]["mmd2"] == pytest.approx(expected, abs=1e-4)
    assert found["kinds"]["far"]["frechet"] > found["kinds"]["near"]["frechet"]
    assert abs(found["kinds"]["reference"]["mmd2"]) < 0.02 < found["kinds"]["far"]["mmd2"]
    with pytest.raises(UserError, match="4 references"):
        closeness({"near": near}, reference[:3], scorer)


def test_long_captions_are_read_by_their_sentences() -> None:
    scorer: Any = Letters()
    whole = "aa bb cc. dd ee ff gg."
    vectors, num_cut = embed([whole, "a b c d e f g", "a. " * 100, "abc"], scorer)
    parts = scorer.embed_texts(["aa bb cc.", "dd ee ff gg."]).sum(axis=0)
    assert vectors[0] == pytest.approx(parts / np.linalg.norm(parts))
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert num_cut == 2  # a sentence that is too long, and too many sentences


@pytest.mark.full
def test_the_worlds_text_encoder_tells_its_own_captions(world_models: Path) -> None:
    from eval.clip_score import ClipScorer
    texts = [f"{word} {other}" for word in WORDS for other in WORDS]
    found = closeness({"same": texts[1::2], "other": [str(number) * 3 for number in range(98)]}, texts[::2],
                      ClipScorer(str(world_models / "clip"), "cpu"))
    assert found["num_captions"] == 42 and found["kinds"]["same"]["frechet"] < found["kinds"]["other"]["frechet"]


def test_captions_are_drawn_alike_for_all_kinds(tmp_path: Path) -> None:
    for shard in "012":
        with ShardWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for key in range(20):
                captions = {"alt": f"alt {shard} {key}", "short": f"short {shard} {key}" if key else ""}
                writer.write(sample(str(key), captions, shard=shard))
    shards = [str(tmp_path / f"{shard}.tar") for shard in "012"]
    found = draw_captions(shards, ["alt", "short"], 30)
    assert found["alt"] == [text.replace("short", "alt") for text in found["short"]]
    assert len(found["alt"]) == 30 == len(set(found["alt"]))
    assert found == draw_captions(shards[::-1], ["alt", "short"], 30)
    assert len(draw_captions(shards, ["alt", "short"], 1000)["alt"]) == 57
    names = [(str(number), number) for number in range(50)]
    assert draw(names, 5) == draw(names[::-1], 9)[:5] != draw(names, 5, seed=1)
