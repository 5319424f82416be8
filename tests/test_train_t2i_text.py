"""Chunked encodings: bit-equal to the plain one at one window, and nothing of a long text unread."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from recap.config import Model
from train_t2i.sample import draw, image_seed, load_pipeline, plan
from train_t2i.text import encode_prompts, encode_unconditional

LONG = "A red circle lies to the left of a small blue ring, under a grey sky. " * 9


@pytest.fixture(scope="module")
def pipe(world_models: Path) -> StableDiffusionPipeline:
    return load_pipeline(Model(model=str(world_models / "stable-diffusion-0")), "train", "cpu")


@pytest.mark.parametrize("text", ["", "a red circle", "circle " * 75, "Ünïcödé, 🎨 & <|tags|>!"])
def test_one_window_is_the_plain_encoding_bit_for_bit(pipe: StableDiffusionPipeline, text: str) -> None:
    ids = pipe.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        plain = pipe.text_encoder(ids)[0]
        chunked = encode_prompts([text], pipe.tokenizer, pipe.text_encoder)
    assert torch.equal(chunked.states, plain)
    assert chunked.mask is None


def test_each_window_is_encoded_with_its_own_bos_and_eos(pipe: StableDiffusionPipeline) -> None:
    sentence = "A red circle lies to the left of a small blue ring, under a grey sky. " * 4  # fills most of a window
    with torch.no_grad():
        three = encode_prompts([sentence * 3], pipe.tokenizer, pipe.text_encoder).states
        one = encode_prompts([sentence], pipe.tokenizer, pipe.text_encoder).states
    assert three.shape == (1, 3 * 77, one.shape[-1])
    torch.testing.assert_close(three, one.repeat(1, 3, 1), rtol=0, atol=1e-5)


def test_filling_windows_are_masked_and_only_they(pipe: StableDiffusionPipeline) -> None:
    embeds = encode_prompts(["a cat", LONG], pipe.tokenizer, pipe.text_encoder)
    windows = embeds.states.shape[1] // 77
    assert windows > 1 and embeds.mask is not None
    assert embeds.mask.sum(dim=1).tolist() == [77, 77 * windows]
    assert embeds.mask[0, :77].all()


def test_what_max_windows_cuts_is_counted(pipe: StableDiffusionPipeline) -> None:
    embeds = encode_prompts(["circle " * 200], pipe.tokenizer, pipe.text_encoder, max_windows=2)
    assert (embeds.states.shape[1], embeds.num_cut) == (154, 50)


def test_the_unconditional_of_n_windows_attends_as_that_of_one(pipe: StableDiffusionPipeline) -> None:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        empty = [encode_unconditional(n, pipe.tokenizer, pipe.text_encoder) for n in (1, 4)]
        one, four = (pipe.unet(latents, 500, states).sample for states in empty)
    torch.testing.assert_close(four, one, rtol=0, atol=1e-5)


def test_prompts_are_batched_by_windows_and_all_are_drawn(pipe: StableDiffusionPipeline) -> None:
    prompts = ["a cat", LONG, "a dog", "a cow", LONG + "!"]
    batches = plan(pipe, prompts, 2)
    assert sorted(index for batch in batches for index in batch) == [0, 1, 2, 3, 4]
    assert batches == [[0, 2], [3], [1, 4]]


def test_a_picture_depends_on_its_prompt_and_seed_alone(pipe: StableDiffusionPipeline) -> None:
    options = {"num_inference_steps": 3, "guidance_scale": 5.0}
    together = draw(pipe, ["a cat", "a dog", "a cow"], [image_seed(0, i) for i in range(3)], **options)
    for index, prompt in enumerate(["a cat", "a dog", "a cow"]):
        alone = draw(pipe, [prompt], [image_seed(0, index)], **options)[0]
        difference = torch.tensor([abs(a - b) for a, b in zip(alone.tobytes(), together[index].tobytes(), strict=True)])
        assert difference.max() <= 1  # of 255: the sums of a batched matrix product may round the other way


def test_no_two_images_of_any_run_are_drawn_from_the_same_noise() -> None:
    noises = {tuple(torch.randn(4, generator=torch.Generator().manual_seed(image_seed(seed, index))).tolist())
              for seed in range(10) for index in range(200)}
    assert len(noises) == 2000


def test_a_stock_pipeline_draws_the_same_from_a_plain_prompt(pipe: StableDiffusionPipeline) -> None:
    ours = draw(pipe, ["a cat"], [7], num_inference_steps=3, guidance_scale=5.0)[0]
    noise = torch.Generator().manual_seed(7)
    stock = pipe("a cat", generator=noise, num_inference_steps=3, guidance_scale=5.0).images[0]
    assert ours.tobytes() == stock.tobytes()
