"""CLIP's tokenizer: open_clip's ids, transformers' class."""

from importlib.util import find_spec

import ftfy
import open_clip
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from recap import clip_bpe
from recap.clip_bpe import clip_tokenizer
from recap.errors import UserError

TEXTS = ["a photo of a cat", "don't", "we'll they've I'm", "Café déjà vu naïve", "🎉👩‍👩‍👧 party!!",
         "it's 3.50$ (50% off)…", "ÀÉÎ ſ ß", "漢字 кот ไทย", "a_b-c/d\\e", "\u00ad soft \u200b zero", "½ ² ٣",
         "x\t\n y"]
OPEN_CLIP = open_clip.get_tokenizer("ViT-B-32")
LATIN = st.characters(max_codepoint=0x24F, exclude_categories=["Cc"], exclude_characters="&<\u00a0")


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_open_clip(text: str) -> None:
    assert clip_tokenizer()(text)["input_ids"] == [49406, *OPEN_CLIP.encode(text), 49407]


@given(st.text(LATIN, max_size=40))
def test_ids_are_those_of_open_clip_for_any_latin_text(text: str) -> None:
    assume(ftfy.fix_text(text) == text)  # open_clip repairs text first; transformers takes it as it is
    assert clip_tokenizer()(text, add_special_tokens=False)["input_ids"] == OPEN_CLIP.encode(text)


def test_it_pads_with_the_end_token_and_gives_offsets() -> None:
    tokenizer = clip_tokenizer()
    encoding = tokenizer("a red circle", padding="max_length", return_offsets_mapping=True)
    assert tokenizer.is_fast
    assert len(tokenizer) == 49408
    assert encoding["input_ids"][:6] == [49406, 320, 736, 7117, 49407, 49407]
    assert len(encoding["input_ids"]) == tokenizer.model_max_length == 77
    assert encoding["offset_mapping"][2] == (2, 5)


def test_without_open_clip_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_bpe, "find_spec", lambda name: None if name == "open_clip" else find_spec(name))
    with pytest.raises(UserError, match="pip install open_clip_torch"):
        clip_bpe.bpe_file()
