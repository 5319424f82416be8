import json
import math
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eval.caption_java import meteor, meteor_statistics, spice
from eval.caption_measures import Measure, difference, intervals
from eval.caption_scores import DocumentFrequencies, bleu, bleu_statistics, cider_d, rouge_l
from eval.caption_tokens import tokenize
from eval.captions import (
    compare_captioners,
    describe,
    distinct,
    document_frequencies,
    evaluate_captions,
    loops,
    repeats,
    score_captions,
    summarize,
    vocabulary,
    with_meteor,
)
from eval.clip_score import ClipScorer
from eval.clipscore_hessel import clipscore_hessel, clipscores, ref_clipscore

Words = list[str]
NAMES = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d", "mean_words", "mean_reference_words",
         "length_ratio", "repetition", "reference_repetition", "loops", "distinct_1", "distinct_2", "vocabulary"}

some_words = st.sampled_from(["a", "dog", "cat", "red", "on", "mat", "the", "sits"])
captions_drawn = st.lists(some_words, min_size=1, max_size=12)
images_drawn = st.lists(st.tuples(captions_drawn, st.lists(captions_drawn, min_size=1, max_size=4)), min_size=2,
                        max_size=8)


# --- real captions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fixture(shared_data: Path) -> tuple[list[Words], list[list[Words]]]:
    """coco-caption's own demonstration: 1,000 captions with their references, tokenized."""
    entries = json.loads((shared_data / "captions/coco_fakecap_tokenized.json").read_bytes())
    return [entry["test"].split() for entry in entries], [[text.split() for text in entry["refs"]] for entry in entries]


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> dict[str, list[str]]:
    """Five captions by people of each of 51 COCO photos."""
    with tarfile.open(shared_data / "photos/coco-open-00000.tar") as tar:
        files = (tar.extractfile(member) for member in tar if member.name.endswith(".json"))
        found = [json.load(file) for file in files if file]
    return {each["key"]: each["captions"] for each in found}


def test_the_published_figures(fixture: tuple[list[Words], list[list[Words]]]) -> None:
    candidates, references = fixture
    found = bleu(bleu_statistics(candidates, references).sum(axis=0))
    np.testing.assert_allclose(found, [0.57940, 0.40439, 0.27854, 0.19083], atol=5e-5)
    assert rouge_l(candidates, references).mean() == pytest.approx(0.39625, abs=5e-5)
    frequencies = DocumentFrequencies.of(references)
    assert cider_d(candidates, references, frequencies).mean() == pytest.approx(0.59979, abs=5e-5)


def test_the_published_meteor(fixture: tuple[list[Words], list[list[Words]]]) -> None:
    pytest.importorskip("pycocoevalcap")
    statistics = with_java(meteor_statistics, *fixture)
    assert statistics.shape == (1000, 23)
    assert meteor(statistics.sum(axis=0)) == pytest.approx(0.19525, abs=5e-5)


def variants(photos: dict[str, list[str]]) -> Iterator[tuple[str, list[Words], list[list[Words]]]]:
    """Captions of people as candidates: good, of another photo, cut, twice as long."""
    words = [[tokenize(text) for text in texts] for texts in photos.values()]
    rest = [texts[1:] for texts in words]
    yield "first", [texts[0] for texts in words], rest
    yield "of the next photo", [texts[0] for texts in words[1:] + words[:1]], rest
    yield "of the seventh next", [texts[3] for texts in words[7:] + words[:7]], words
    yield "five words", [texts[0][:5] for texts in words], rest
    yield "two joined", [texts[0] + texts[1] for texts in words], rest
    yield "a reference", [texts[2] for texts in words], rest


def test_agrees_with_pycocoevalcap(photos: dict[str, list[str]]) -> None:
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    for name, candidates, references in variants(photos):
        given_references = {i: [" ".join(words) for words in each] for i, each in enumerate(references)}
        given = {i: [" ".join(words)] for i, words in enumerate(candidates)}
        statistics = bleu_statistics(candidates, references)
        of_corpus, of_each = Bleu().compute_score(given_references, given, verbose=0)
        np.testing.assert_allclose(bleu(statistics.sum(axis=0)), of_corpus, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(bleu(statistics), np.transpose(of_each), atol=1e-4, err_msg=name)
        _, of_each = Rouge().compute_score(given_references, given)
        np.testing.assert_allclose(rouge_l(candidates, references), of_each, atol=1e-9, err_msg=name)
        _, of_each = Cider().compute_score(given_references, given)
        ours = cider_d(candidates, references, DocumentFrequencies.of(references))
        np.testing.assert_allclose(ours, of_each, atol=1e-9, err_msg=name)


@pytest.mark.full
def test_meteor_agrees_with_pycocoevalcap(photos: dict[str, list[str]]) -> None:
    module = pytest.importorskip("pycocoevalcap.meteor.meteor")
    _, candidates, references = next(variants(photos))
    candidates, references = [*candidates, ["café", "naïve"], []], [*references, [["café", "naïve"]], [["a", "dog"]]]
    statistics = with_java(meteor_statistics, candidates, references)
    of_corpus, of_each = module.Meteor().compute_score(
        {i: [" ".join(words) for words in each] for i, each in enumerate(references)},
        {i: [" ".join(words)] for i, words in enumerate(candidates)})
    np.testing.assert_allclose(meteor(statistics), of_each, atol=1e-9)
    assert meteor(statistics.sum(axis=0)) == pytest.approx(of_corpus, abs=1e-9)
    assert meteor(statistics)[-2:].tolist() == [1, 0]


# --- words -----------------------------------------------------------------------------------------------------------

HARD = {
    "I don't know; it's Sarah's, they'll WON'T can't": "i do n't know it 's sarah 's they 'll wo n't ca n't",
    "You cannot, you’re gonna, wanna 'tis": "you can not you 're gon na wan na 't is",
    "A $5 bill, £3 or €4; 50% off, 10¢.": "a $ 5 bill # 3 or $ 4 50 % off 10 cents",
    "A twin-hulled, 10-year-old boat - 1,000.50 kg": "a twin-hulled 10-year-old boat 1,000.50 kg",
    "A well—lit room – with “quotes” and ‘more’...": "a well lit room with quotes and more",
    "Mr. Smith of the U.S. at 5 p.m.": "mr. smith of the u.s. at 5 p.m.",
    "On St. John's Ave. No. 5, a lab., no.": "on st. john 's ave. no. 5 a lab. no",
    "Black/white and AT&T, R&B (left) [right]": "black/white and at&t r&b -lrb- left -rrb- -lsb- right -rsb-",
    "o'clock O'Neill rock'n'roll ma'am '90s 1990's": "o'clock o'neill rock 'n' roll ma'am '90s 1990 's",
    "See www.example.com/a, x@y.com #tag @me IMG_20.jpg": "see www.example.com / a x@y.com #tag @me img_20 jpg",
    "5x7 print 3.5mm 1/2 ½ 3rd 10:30am 4.5-inch": "5x7 print 3.5 mm 1/2 1/2 3rd 10:30 am 4.5-inch",
    "What?! Wow!! Really? Yes!": "what ?! wow !! really yes",
    "😀 café 猫がいる &amp; naïve\u200bshe\u00adll": "café 猫がいる & naïve shell",
    "Two\nlines\tof  text": "two lines of text",
    "... -- .": "",
}


@pytest.mark.parametrize("caption", HARD)
def test_hard_words(caption: str) -> None:
    assert " ".join(tokenize(caption)) == HARD[caption]


def by_java(captions: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Words]:
    """What Stanford's tokenizer makes of them; its parts with a space in them (1 1/2) taken apart, as BLEU does."""
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    found = with_java(ptb.PTBTokenizer().tokenize, {i: [{"caption": text}] for i, text in enumerate(captions)})
    return [found[i][0].split() for i in range(len(captions))]


def test_hard_words_are_java_s(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [caption for caption in HARD if HARD[caption] and "she" not in caption]  # a soft hyphen is odd there
    assert by_java(captions, monkeypatch) == [HARD[caption].split() for caption in captions]


def test_words_are_java_s_on_real_captions(shared_data: Path, photos: dict[str, list[str]],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    long = [json.loads(line)["IIW"] for line in (shared_data / "long_captions/IIW-400.jsonl").open()]
    rows = pq.read_table(shared_data / "alttext/web_alttext_10000.parquet").column("TEXT").to_pylist()
    for captions, share in [([text for each in photos.values() for text in each], 1.0), (long, 0.99),
                            ([str(text).replace("\x85", " ") for text in rows[:2000]], 0.99)]:
        java = by_java(captions, monkeypatch)
        same = [tokenize(text) == words for text, words in zip(captions, java, strict=True)]
        assert np.mean(same) >= share


@given(st.text(max_size=80))
def test_any_text_has_clean_words(text: str) -> None:
    words = tokenize(text)
    assert all(word and word == word.lower() and not any(map(str.isspace, word)) for word in words)
    assert words == tokenize(f"  {text}\n")


@pytest.mark.parametrize("text", ["😀" * 20_000, "a.b," * 8_000, "<a b=" * 8_000, "n't" * 8_000, "A&" * 10_000])
def test_a_long_text_is_read_in_linear_time(text: str) -> None:
    started = time.process_time()
    tokenize(text)
    assert time.process_time() - started < 10  # some hundredths; minutes if it were not


# --- what must hold --------------------------------------------------------------------------------------------------


@given(images_drawn)
def test_scores_are_in_their_ranges(images: list[tuple[Words, list[Words]]]) -> None:
    candidates, references = [each[0] for each in images], [each[1] for each in images]
    statistics = bleu_statistics(candidates, references)
    for scores in (bleu(statistics), bleu(statistics.sum(axis=0)), rouge_l(candidates, references)):
        assert (scores >= 0).all() and (scores <= 1 + 1e-9).all()
    found = cider_d(candidates, references, DocumentFrequencies.of(references))
    assert (found >= 0).all() and (found <= 10 + 1e-9).all()


@given(images_drawn)
def test_a_caption_equal_to_a_reference(images: list[tuple[Words, list[Words]]]) -> None:
    references = [each[1] for each in images]
    candidates = [each[0] for each in references]
    assert rouge_l(candidates, references) == pytest.approx(1)
    found = bleu(bleu_statistics(candidates, references))
    for words, each in zip(candidates, found, strict=True):
        assert each[:len(words)] == pytest.approx(1) and not each[len(words):].any()  # none so long: 0


@given(images_drawn, st.randoms(use_true_random=False))
def test_order_does_not_matter(images: list[tuple[Words, list[Words]]], random: Any) -> None:
    candidates = {f"image {i}": " ".join(words) for i, (words, _) in enumerate(images)}
    references = {f"image {i}": [" ".join(words) for words in each] for i, (_, each) in enumerate(images)}
    keys = random.sample([*candidates], len(candidates))
    shuffled = {key: random.sample(references[key], len(references[key])) for key in keys}
    first = evaluate_captions(candidates, references, seed=1, num_resamples=20)["metrics"]
    second = evaluate_captions({key: candidates[key] for key in keys}, shuffled, seed=1, num_resamples=20)["metrics"]
    for name, each in first.items():
        assert second[name]["value"] == pytest.approx(each["value"], abs=1e-12)
        assert second[name]["ci"] == pytest.approx(each["ci"], abs=1e-9)


def test_frozen_frequencies_free_a_score_from_its_company(photos: dict[str, list[str]], tmp_path: Path) -> None:
    candidates = {key: texts[0] for key, texts in photos.items()}
    references = {key: texts[1:] for key, texts in photos.items()}
    frozen = document_frequencies(references)
    frozen.save(tmp_path / "df.json")
    kept = DocumentFrequencies.load(tmp_path / "df.json")
    assert (kept.num_images, kept.counts) == (frozen.num_images, frozen.counts)
    whole = score_captions(candidates, references, kept)
    few = [*candidates][:3]
    part = score_captions({key: candidates[key] for key in few}, {key: references[key] for key in few}, kept)
    np.testing.assert_array_equal(part.measures["cider_d"].scores, whole.measures["cider_d"].scores[:3])
    alone = score_captions({few[0]: candidates[few[0]]}, {few[0]: references[few[0]]}, kept)
    assert alone.measures["cider_d"].value == whole.measures["cider_d"].scores[0]
    document_frequencies(dict(reversed(references.items()))).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "df.json").read_bytes()
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 2, "num_images": 3, "counts": {}}',
                                  '{"schema": 1, "num_images": 3, "counts": {"a": "b"}}',
                                  '{"schema": 1, "num_images": 3, "counts": {"a": 4}}',
                                  '{"schema": 1, "num_images": 1, "counts": {"a": 1}}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "df.json").write_text(text)
    with pytest.raises(ValueError, match=r"document frequencies|CIDEr-D") as caught:
        DocumentFrequencies.load(tmp_path / "df.json")
    assert "\n" not in str(caught.value)


def test_a_longest_common_subsequence_by_hand() -> None:
    found = rouge_l([["a", "b", "c", "d"]], [[["a", "c", "x", "d", "y"]]])  # a c d
    precision, recall = 3 / 4, 3 / 5
    assert found[0] == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))


def test_a_caption_without_words_scores_nothing() -> None:
    candidates, references = [[], ["a", "dog"]], [[["a", "dog"]], [["a", "cat"]]]
    assert rouge_l(candidates, references)[0] == 0
    assert cider_d(candidates, references, DocumentFrequencies.of(references))[0] == 0
    assert not bleu(bleu_statistics(candidates, references))[0].any()
    found = evaluate_captions(["", "😀"], [["a dog"], ["a cat"]], seed=0, num_resamples=50)["metrics"]
    assert found["bleu_1"] == {"value": 0.0, "ci": [0.0, 0.0]} and found["distinct_1"]["value"] == 0


# --- repetition and diversity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("caption", "again", "stuck"), [
    ("A dog on a mat.", False, False), ("", False, False), ("a very very good dog", False, False),
    ("a dog on a mat a dog on a mat a dog", True, True), ("big big big big big", True, True),
    ("A dog. A cat. A dog.", True, True), ("A dog. A cat.", False, False),
    ("a bowl on the left side of it and a cup on the left side of that", True, False),
    ("a man and a man and a man and a man", True, True)])
def test_repetition(caption: str, again: bool, stuck: bool) -> None:
    assert repeats(caption) == again and loops(caption) == stuck


def test_a_description_needs_no_second_image() -> None:
    found = describe(["a dog, a dog"], [["a dog", "a big dog runs"]])
    assert found == {"mean_words": 4, "mean_reference_words": 3, "length_ratio": 4 / 3, "repetition": 0,
                     "reference_repetition": 0, "loops": 0, "distinct_1": 0.5, "distinct_2": 2 / 3, "vocabulary": 2}


def test_diversity_by_hand() -> None:
    captions = [["a", "dog", "runs"], ["a", "cat", "a"], ["a"]]
    assert distinct(captions, 1).value == 4 / 7 and distinct(captions, 2).value == 1 and vocabulary(captions).value == 4
    assert distinct(captions, 1).without.tolist() == [2 / 4, 3 / 4, 4 / 6]
    assert vocabulary(captions).without.tolist() == [2, 3, 4]


def test_intervals_of_diversity_cover() -> None:
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 1001)
    drawn = [[[str(word) for word in rng.choice(1000, size=8, p=share / share.sum())] for _ in range(80)]
             for _ in range(200)]
    for of in (vocabulary, lambda captions: distinct(captions, 1)):
        expected = np.mean([of(captions).value for captions in drawn])
        found = [of(captions).interval for captions in drawn]
        covered = [low <= expected <= high for low, high in filter(None, found)]
        assert 0.90 <= np.mean(covered) <= 1


# --- uncertainty -----------------------------------------------------------------------------------------------------


def as_text(words: list[Words]) -> list[str]:
    return [" ".join(each) for each in words]


def test_every_figure_has_an_interval(photos: dict[str, list[str]]) -> None:
    candidates = {key: texts[0] for key, texts in photos.items()}
    references = {key: texts[1:] for key, texts in photos.items()}
    found = evaluate_captions(candidates, references, seed=3, num_resamples=300)
    assert found == evaluate_captions(candidates, references, seed=3, num_resamples=300)
    assert set(found["metrics"]) == NAMES and json.loads(json.dumps(found)) == found
    assert (found["num_images"], found["num_references"]) == (51, 204)
    assert found["document_frequencies"] == {"num_images": 51}
    for name, each in found["metrics"].items():
        low, high = each["ci"]
        assert low <= each["value"] <= high, name
    assert found["metrics"]["cider_d"]["ci"][1] - found["metrics"]["cider_d"]["ci"][0] > 0.1


def test_intervals_of_corpus_figures_cover() -> None:
    rng = np.random.default_rng(1)
    vocabulary_drawn, covered = np.array([*"abcdefgh"]), []
    sets = [[[*rng.choice(vocabulary_drawn, size=rng.integers(4, 12))] for _ in range(120)] for _ in range(100)]
    rows = [bleu_statistics(each[:60], [[words] for words in each[60:]]) for each in sets]
    expected = bleu(np.concatenate(rows).sum(axis=0))[1]
    for seed, statistics in enumerate(rows):
        interval = intervals({"bleu_2": Measure(statistics, lambda sums: bleu(sums)[..., 1])}, seed, 300)["bleu_2"]
        assert interval is not None
        covered.append(interval[0] <= expected <= interval[1])
    assert np.mean(covered) >= 0.88


def test_one_image_has_no_interval() -> None:
    frequencies = document_frequencies([["a dog"], ["a cat"]])
    found = evaluate_captions(["a dog"], [["a dog"]], seed=0, frequencies=frequencies)["metrics"]
    assert all(each["ci"] is None for each in found.values()) and found["rouge_l"]["value"] == pytest.approx(1)


def test_the_better_captioner_is_found(fixture: tuple[list[Words], list[list[Words]]]) -> None:
    candidates, references = fixture[0][:200], [as_text(each) for each in fixture[1][:200]]
    good = score_captions(as_text(candidates), references)
    worse = [words if place % 2 else [*words[:4], *words[:4]] for place, words in enumerate(candidates)]
    bad = score_captions(as_text(worse), references)
    found = compare_captioners(good, bad, seed=0, num_resamples=500)
    assert set(found) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d", "repetition", "loops"}
    for name, each in found.items():
        assert each["verdict"] == "better" and each["p"] < 0.01 and each["num_images"] == 200, name
        assert each["difference"] == pytest.approx(good.measures[name].value - bad.measures[name].value)
        assert each["ci"][0] < each["difference"] < each["ci"][1] and each["over"] == "images"
    assert all(each["verdict"] == "worse" for each in compare_captioners(bad, good, 0, 500).values())
    same = compare_captioners(good, good, seed=0, num_resamples=50)
    assert all(each["verdict"] == "can't tell" and each["p"] == 1 for each in same.values())
    assert json.loads(json.dumps(found)) == found


def test_false_alarms_of_corpus_figures_are_few() -> None:
    rng = np.random.default_rng(2)
    alarms = []
    for seed in range(150):
        words = [[[*rng.choice([*"abcdef"], size=rng.integers(5, 10))] for _ in range(40)] for _ in range(3)]
        references = [[each] for each in words[2]]
        a, b = (Measure(bleu_statistics(each, references), lambda sums: bleu(sums)[..., 1]) for each in words[:2])
        alarms.append(difference(a, b, seed, 200)["p"] < 0.05)
    assert np.mean(alarms) <= 0.10


def test_only_the_same_images_are_compared() -> None:
    one, other = (score_captions(["a dog", "a cat"], [["a dog"], [text]]) for text in ("a cat", "a bird"))
    with pytest.raises(ValueError, match="score both on the same"):
        compare_captioners(one, other, seed=0)
    third = score_captions(["a dog", "a cat"], [["a dog"], ["a cat"]], document_frequencies([["x"], ["y"], ["z"]]))
    with pytest.raises(ValueError, match="different document frequencies"):
        compare_captioners(one, third, seed=0)


def test_scores_of_others_join_in() -> None:
    references = {"x": ["a dog"], "y": ["a cat"]}
    scored = score_captions({"y": "a cat", "x": "a dog"}, references).with_scores("spice", {"x": 0.5, "y": 1.0})
    assert scored.keys == ["x", "y"] and scored.measures["spice"].scores.tolist() == [0.5, 1.0]
    assert summarize(scored, seed=0, num_resamples=20)["metrics"]["spice"]["value"] == 0.75
    listed = score_captions(["a dog", "a cat"], [["a dog"], ["a cat"]])
    assert listed.with_scores("spice", np.array([0.5, 1.0])).measures["spice"].value == 0.75
    for wrong in ({"x": 0.5}, {"x": 0.5, "y": 1.0, "z": 1.0}, {"x": 0.5, "y": math.nan}):
        with pytest.raises(ValueError, match=r"spice|finite"):
            scored.with_scores("spice", wrong)


# --- what users get wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("candidates", "references", "says"), [
    ({}, {}, "no captions to score"), ([], [], "no captions to score"),
    ({"a": "x", "b": "y"}, {"a": ["x"]}, "1 image without references: 'b'"),
    ({"a": "x"}, {"a": ["x"], "b": ["x"], "c": ["x"]}, "2 images without caption: 'b', 'c'"),
    ({"a": "x", "b": "y"}, {"a": ["x"], "b": []}, "image 'b' has no references"),
    ({"a": "x", "b": "y"}, {"a": ["x"], "b": ["...", ""]}, "image 'b' has no references with words"),
    ({"a": "x", "b": "y"}, {"a": ["x"], "b": "y"}, "references of image 'b' must be a list of texts"),
    ({"a": "x", "b": "y"}, {"a": ["x"], "b": None}, "references of image 'b' must be a list of texts"),
    ({"a": "x", "b": None}, {"a": ["x"], "b": ["y"]}, "caption of image 'b' is no text but NoneType"),
    (["x"], [["x"], ["y"]], "1 captions for the references of 2 images"),
    (["x"], {"a": ["x"]}, "both be by key, or both be lists"), ("xy", [["x"], ["y"]], "both be by key"),
    (["a dog"], [["a dog"]], "CIDEr-D cannot weigh words by 1 image:"),
])
def test_what_cannot_be_scored_is_said_in_one_line(candidates: Any, references: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        evaluate_captions(candidates, references, seed=0)
    assert "\n" not in str(caught.value)


# --- METEOR and SPICE ------------------------------------------------------------------------------------------------


def with_java(function: Any, *arguments: Any) -> Any:
    """Skip where there is no Java."""
    import shutil
    if shutil.which("java") is None:
        pytest.skip("needs Java")
    return function(*arguments)


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty command `java`, first on the PATH, to be written by a test; and a package with what SPICE wants."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "packages/pycocoevalcap/meteor").mkdir(parents=True)
    (tmp_path / "packages/pycocoevalcap/spice/lib").mkdir(parents=True)
    (tmp_path / "packages/pycocoevalcap/__init__.py").touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "pycocoevalcap", raising=False)
    java = tmp_path / "bin/java"
    java.touch(mode=0o755)
    return java


@pytest.mark.parametrize(("script", "says"), [
    ("exec sleep 60", "METEOR did not end within 1 s"),
    ("echo 'Error: out of memory' >&2; exit 3", r"METEOR failed in Java \(exit status 3\): Error: out of memory"),
    ("echo hello", "METEOR answered something else than statistics of 1 captions: hello"),
    ("true", "METEOR answered something else")])
def test_java_that_fails_is_told_in_one_line(fake_java: Path, script: str, says: str) -> None:
    fake_java.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(ValueError, match=says) as caught:
        meteor_statistics([["a"]], [[["b"]]], timeout_s=1)
    assert "\n" not in str(caught.value)


def test_spice_is_read(fake_java: Path) -> None:
    lib = fake_java.parents[1] / "packages/pycocoevalcap/spice/lib"
    with pytest.raises(ValueError, match=r"SPICE needs stanford-corenlp-3\.6\.0\.jar and"):
        spice([["a"]], [[["b"]]])
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (lib / name).touch()
    scores = '[{"image_id": 1, "scores": {"All": {"f": 0.5}}}, {"image_id": 0, "scores": {"All": {"f": 0.25}}}]'
    fake_java.write_text(f"#!/bin/sh\nwhile [ $1 != -out ]; do shift; done\necho '{scores}' > $2\n")
    assert spice([["a"], ["b"]], [[["b"]], [["b"]]]).tolist() == [0.25, 0.5]
    with pytest.raises(ValueError, match="SPICE left no scores of 3 captions"):
        spice([["a"]] * 3, [[["b"]]] * 3)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, fake_java: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="METEOR needs the package pycocoevalcap: `pip install pycocoevalcap`"):
        meteor_statistics([["a"]], [[["b"]]])
    monkeypatch.setenv("PATH", str(fake_java.parents[1]))
    with pytest.raises(ValueError, match="SPICE needs Java, and there is no java on the PATH"):
        spice([["a"]], [[["b"]]])


def test_meteor_joins_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """By statistics as METEOR would give them: so many of ten words found in a row."""
    def found_in(candidates: list[Words], references: list[list[Words]]) -> np.ndarray:
        rows = np.zeros((len(candidates), 23))
        rows[:, :4], rows[:, 20] = [10, 10, 4, 4], 1
        rows[:, 4:6] = rows[:, 21:23] = np.array([[len(words)] for words in candidates])
        return rows

    monkeypatch.setattr("eval.captions.meteor_statistics", found_in)
    references = [[f"a {place}"] for place in range(30)]
    good = with_meteor(score_captions(["one two three four five"] * 15 + ["one two three four"] * 15, references))
    bad = with_meteor(score_captions(["one two"] * 30, references))
    found = summarize(good, seed=0, num_resamples=200)["metrics"]["meteor"]
    assert found["ci"][0] < found["value"] < found["ci"][1]
    assert compare_captioners(good, bad, seed=0, num_resamples=300)["meteor"]["verdict"] == "better"


# --- CLIPScore -------------------------------------------------------------------------------------------------------


def unit(*vectors: list[float]) -> np.ndarray:
    found = np.array(vectors, float)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_clipscore_by_hand() -> None:
    images, captions = unit([1, 0], [1, 0], [1, 0]), unit([0.6, 0.8], [-1, 0], [1, 0])
    scores = clipscore_hessel(images, captions)
    assert scores == pytest.approx([1.5, 0, 2.5])
    found = ref_clipscore(scores, captions, [unit([0.6, 0.8], [0, 1]), unit([1, 0]), unit([0, 1])])
    assert found == pytest.approx([2 * 1.5 * 1 / 2.5, 0, 0])


def test_clipscore_refuses_what_is_no_embedding() -> None:
    right = unit([1, 0], [0, 1])
    for images, captions in [(2 * right, right), (right, right[:1]), (right, 3 * right), (right[0], right[0])]:
        with pytest.raises(ValueError, match="embeddings of"):
            clipscore_hessel(images, captions)
    with pytest.raises(ValueError, match="references of image 1"):
        ref_clipscore(np.ones(2), right, [right, np.zeros((0, 2))])
    with pytest.raises(ValueError, match="do not belong together"):
        ref_clipscore(np.ones(2), right, [right])


def test_clipscore_by_a_model(world_models: Path) -> None:
    scorer = ClipScorer(f"local-dir:{world_models / 'clip'}", "cpu")
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    captions, references = ["a red square", "a blue square"], [["red", "a square"], ["a blue square"]]
    seen = scorer.embed_images(images)
    scores, with_references, num_cut = clipscores(scorer, seen, captions, references)
    text = scorer.embed_texts(["A photo depicts " + caption for caption in captions])
    assert scores == pytest.approx(2.5 * np.maximum((seen * text).sum(axis=1), 0))
    assert with_references[1] == pytest.approx(2 * scores[1] / (scores[1] + 1))  # its reference is the caption itself
    with pytest.raises(ValueError, match="in equal number"):
        clipscores(scorer, seen, captions, [["a"], []])
    assert num_cut == 0 and clipscores(scorer, seen, ["a " * 80, "a dog"], references)[2] == 1


