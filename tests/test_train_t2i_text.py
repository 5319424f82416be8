"""Windows of 77: bit-equal to the plain encoding where there is one, and nothing of a long text unread."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recap.config import Model
from train_t2i.sample import load_pipeline
from train_t2i.text import WINDOW, encode, encode_prompts, encode_unconditional, text_encoders, tokenize, tokenizers

SENTENCE = "A red circle lies to the left of a small blue ring, under a grey sky. "
LONG = SENTENCE * 9
KINDS = ["sd1", "sd2", "sdxl"]


@pytest.fixture(scope="module")
def pipes(tiny_pipelines: Path) -> dict[str, Any]:
    return {kind: load_pipeline(Model(model=str(tiny_pipelines / kind)), "train", "cpu") for kind in KINDS}


@pytest.fixture(params=KINDS)
def pipe(request: pytest.FixtureRequest, pipes: dict[str, Any]) -> Any:
    return pipes[request.param]


@pytest.mark.parametrize("text", ["", "a red circle", "circle " * 75, "wow!!! a cat! !", "Ünïcödé, 🎨 & <|tags|>!",
                                  "half <|endoftext|> of it"])
@torch.no_grad()
def test_one_window_is_the_plain_encoding_bit_for_bit(pipe: Any, text: str) -> None:
    """Of Stable Diffusion XL, the states before the last layer of both encoders, and the second one's projection."""
    ours, nothing = encode_prompts([text], pipe), encode_unconditional(1, pipe)
    assert ours.mask is None
    # Embeddings, those of no text, and with XL the pooled ones of both.
    plain = pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    found = [each for each in (ours.states, nothing.states, ours.pooled, nothing.pooled) if each is not None]
    assert len(found) == len(plain) and all(map(torch.equal, found, plain))


@torch.no_grad()
def test_every_window_is_encoded_as_a_text_of_its_own_and_none_is_lost(pipe: Any) -> None:
    block = SENTENCE * 4  # fills most of a window
    three, one = (encode_prompts([text], pipe) for text in (block * 2 + SENTENCE, block))
    last = encode_prompts([SENTENCE], pipe)
    assert three.states.shape == (1, 3 * WINDOW, one.states.shape[-1])
    wanted = torch.cat([one.states, one.states, last.states], dim=1)
    torch.testing.assert_close(three.states, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_pooled_projection_is_the_first_windows(pipes: dict[str, Any]) -> None:
    long, short = (encode_prompts([text, "a dog"], pipes["sdxl"]).pooled
                   for text in (SENTENCE * 4 + "Behind it stands a green star.", SENTENCE * 4))
    assert long is not None and short is not None and long.shape == (2, 24)
    torch.testing.assert_close(long, short, rtol=0, atol=1e-5)


@torch.no_grad()
def test_windows_that_fill_a_batch_are_masked_zeros_and_only_they(pipe: Any) -> None:
    embeds = encode_prompts(["a cat", LONG, SENTENCE * 5], pipe)
    windows = embeds.states.shape[1] // WINDOW
    assert windows == 3 and embeds.mask is not None and embeds.mask.dtype == torch.bool
    wanted = [[True] * WINDOW * n + [False] * WINDOW * (windows - n) for n in (1, 3, 2)]
    assert embeds.mask.tolist() == wanted
    assert not embeds.states[~embeds.mask].any()
    alone = encode_prompts([SENTENCE * 5], pipe)
    torch.testing.assert_close(embeds.states[2:, :2 * WINDOW], alone.states, rtol=0, atol=1e-5)


def test_what_max_windows_cuts_is_counted(pipe: Any) -> None:
    tokens = tokenize("circle " * 200, tokenizers(pipe), max_windows=2)
    assert (len(tokens.ids), tokens.num_cut) == (2, 50)
    assert tokenize("circle " * 200, tokenizers(pipe)).num_cut == 0


@given(st.lists(st.sampled_from(["a", "red circle.", "!!!", "!", "supercalifragilistic", "é!", "🎨"]), max_size=150))
def test_all_tokenizers_give_equally_many_windows_that_begin_end_and_fill_as_they_do(pipes: dict[str, Any],
                                                                                     words: list[str]) -> None:
    ours = tokenizers(pipes["sdxl"])
    ids = tokenize(" ".join(words), ours).ids
    assert ids.shape[1:] == (2, WINDOW) and (ids[:, :, 0] == ours[0].bos_token_id).all()
    for window in ids:
        for row, tokenizer in zip(window, ours, strict=True):
            end = row.tolist().index(tokenizer.eos_token_id)
            assert (row[end + 1:] == tokenizer.pad_token_id).all()


def test_a_second_tokenizer_that_needs_more_windows_takes_the_first_ones_tokens(pipes: dict[str, Any]) -> None:
    text = "wow " + "!!!" * 30  # 30 tokens of one, and 90 of the other, which reads each mark as padding
    first, second = tokenize(text, tokenizers(pipes["sdxl"])).ids[0]
    end = first.tolist().index(49407)
    assert torch.equal(first[:end + 1], second[:end + 1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_text_in_many_windows_attends_as_in_one(pipes: dict[str, Any], kind: str) -> None:
    pipe = pipes[kind]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    one, four = (encode_unconditional(n, pipe) for n in (1, 4))
    assert four.states.shape[1] == 4 * WINDOW
    added = None if one.pooled is None else {"text_embeds": one.pooled, "time_ids": torch.tensor([[32.0] * 6])}
    drawn = [pipe.unet(latents, 500, each.states, added_cond_kwargs=added).sample for each in (one, four)]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-5)
    other = pipe.unet(latents, 500, encode_prompts([LONG], pipe).states, added_cond_kwargs=added).sample
    assert (other - drawn[0]).abs().max() > 1e-3


@pytest.mark.parametrize("zeros", [True, False])
@torch.no_grad()
def test_no_text_is_zeros_where_the_pipeline_says_so(pipes: dict[str, Any], zeros: bool,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipes["sdxl"]
    monkeypatch.setattr(pipe, "_internal_dict", {**pipe.config, "force_zeros_for_empty_prompt": zeros})
    found = encode_unconditional(2, pipe)
    assert found.pooled is not None
    assert bool(found.states.any()) is bool(found.pooled.any()) is not zeros


def test_all_windows_of_a_batch_go_through_an_encoder_together(pipe: Any) -> None:
    calls: list[int] = []
    handles = [encoder.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
               for encoder in text_encoders(pipe)]
    encode([tokenize(text, tokenizers(pipe)).ids for text in (LONG, "a cat")], text_encoders(pipe))
    for handle in handles:
        handle.remove()
    assert calls == [4] * len(handles)
