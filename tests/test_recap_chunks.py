"""77-token windows: nothing is lost, and cuts fall where a reader would pause."""

import json
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recap.chunks import CONTENT_TOKENS, split
from recap.clip_bpe import clip_tokenizer


def content(text: str) -> list[int]:
    return clip_tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]


def words(window: list[int]) -> str:
    return clip_tokenizer().decode(window)


def check(text: str) -> list[list[int]]:
    windows = split(text, clip_tokenizer()).ids
    assert list(chain(*windows)) == content(text)
    assert all(len(window) <= CONTENT_TOKENS for window in windows)
    return windows


@given(st.text(max_size=600))
def test_no_token_of_any_text_is_lost(text: str) -> None:
    windows = check(text)
    assert all(windows) or windows == [[]]


@given(st.lists(st.sampled_from(["a", "red", "circle.", "left,", "3.5", "don't", "\n", "supercalifragilistic", "é!"]),
                max_size=300))
def test_no_token_of_sentences_is_lost(parts: list[str]) -> None:
    check(" ".join(parts))


def test_prompts_and_long_captions_lose_nothing(shared_data: Path) -> None:
    lines = (shared_data / "prompts" / "dpg_bench.jsonl").read_text().splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    assert len(texts) == 1065
    for file in sorted((shared_data / "long_captions").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            texts += [text for text in json.loads(line).values() if isinstance(text, str)]
    several = [text for text in texts if len(check(text)) > 1]
    assert len(several) > 500


def test_a_short_text_is_one_window_and_the_empty_one_too() -> None:
    assert split("a cat", clip_tokenizer()).ids == [content("a cat")]
    assert split("", clip_tokenizer()).ids == [[]]


def test_a_text_is_cut_after_the_last_sentence_that_fits() -> None:
    windows = check("The cat, a black one, sits on the mat. " * 12)
    assert len(windows) > 1
    assert all(words(window).rstrip().endswith("mat .") for window in windows)


def test_a_long_sentence_is_cut_at_a_phrase_end_then_between_words() -> None:
    assert words(check("a red circle on the left, " * 20)[0]).rstrip().endswith("left ,")
    assert words(check("circle " * 100)[0]).split() == ["circle"] * 75


@pytest.mark.parametrize("text", ["3.5 " * 60, "v2.0.1 is out " * 30])
def test_a_dot_inside_a_number_ends_no_sentence(text: str) -> None:
    assert not any(words(window).rstrip().endswith(("3 .", "2 .", "0 .")) for window in check(text))


def test_what_a_limit_cuts_is_counted() -> None:
    windows = split("circle " * 200, clip_tokenizer(), max_windows=2)
    assert (len(windows.ids), windows.num_cut, windows.num_tokens) == (2, 50, 200)
