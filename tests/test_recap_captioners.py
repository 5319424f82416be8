"""BLIP-2's silent traps: the image must matter, the neighbours must not, captions must learn to end."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from recap.captioners import open_captioner
from recap.captioners.blip2 import IGNORE, Blip2
from recap.config import Captioner, Finetune, Style
from recap.errors import UserError

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230), "yellow": (240, 230, 20)}
PROMPTS = {"short": Style(prompt="A short caption:", max_new_tokens=16),
           "long": Style(prompt="A detailed caption:", max_new_tokens=48)}


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (70, 50), colour) for colour in COLOURS.values()]


def captions(style: str) -> list[str]:
    return [name if style == "short" else f"All of the picture is {name}, from its left to its right."
            for name in COLOURS]


def opened(models: Path, adapter: Path | None = None) -> Blip2:
    captioner = open_captioner(Captioner(model=str(models / "blip2"), dtype="float32"), "cpu", adapter)
    assert isinstance(captioner, Blip2)
    return captioner


@pytest.fixture(scope="module")
def tuned(world_models: Path) -> Blip2:
    """A captioner after a short, real training on four images in two styles."""
    torch.manual_seed(0)
    captioner = opened(world_models)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    captioner.add_adapter(Finetune(lora_rank=8, lora_dropout=0.0, lora_targets=targets))
    optimizer = torch.optim.AdamW(captioner.trainable().values(), lr=1e-2, weight_decay=0)
    pixels = captioner.preprocess(pictures()).repeat(2, 1, 1, 1)
    prompts = [PROMPTS[style].prompt for style in ("short", "long") for _ in COLOURS]
    captioner.set_training(True)
    for _ in range(250):
        captioner.loss(pixels, prompts, captions("short") + captions("long")).backward()
        optimizer.step()
        optimizer.zero_grad()
    captioner.set_training(False)
    return captioner


def test_swapping_the_images_raises_the_loss(tuned: Blip2) -> None:
    pixels = tuned.preprocess(pictures())
    prompts = [PROMPTS["long"].prompt] * 4
    with torch.no_grad():
        right = tuned.loss(pixels, prompts, captions("long"))
        swapped = tuned.loss(pixels.roll(1, 0), prompts, captions("long"))
    assert swapped > right + 0.1


def test_a_tuned_captioner_says_what_it_learned_in_the_style_asked_for_and_ends(tuned: Blip2) -> None:
    features = tuned.encode(tuned.preprocess(pictures()))
    for style in ("short", "long"):
        found = tuned.caption(features, PROMPTS[style])
        assert [caption.text for caption in found] == captions(style)
        assert all(caption.ended for caption in found)


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3, "no_repeat_ngram_size": 4}])
def test_a_caption_does_not_depend_on_its_neighbours(tuned: Blip2, decoding: dict[str, int]) -> None:
    style = PROMPTS["long"].model_copy(update=decoding)
    images = [Image.radial_gradient("L").convert("RGB").rotate(30 * turn) for turn in range(4)] + pictures()
    pixels = tuned.preprocess(images)
    together = tuned.caption(tuned.encode(pixels), style)
    alone = [tuned.caption(tuned.encode(pixels[i:i + 1]), style)[0] for i in range(len(images))]
    backwards = tuned.caption(tuned.encode(pixels.flip(0)), style)[::-1]
    assert together == alone == backwards


def test_beams_find_captions_that_are_at_least_as_likely(tuned: Blip2) -> None:
    images = [Image.radial_gradient("L").convert("RGB").rotate(30 * turn) for turn in range(4)]
    pixels = tuned.preprocess(images)
    losses = []
    for num_beams in (1, 4):
        style = PROMPTS["long"].model_copy(update={"num_beams": num_beams})
        found = tuned.caption(tuned.encode(pixels), style)
        with torch.no_grad():
            losses.append([tuned.loss(pixels[i:i + 1], [style.prompt], [found[i].text]).item() for i in range(4)])
    assert all(beams <= greedy + 1e-4 for greedy, beams in zip(*losses, strict=True))


def test_no_run_of_tokens_comes_twice_where_that_is_forbidden(tuned: Blip2) -> None:
    features = tuned.encode(tuned.preprocess(pictures()))
    for forbidden, times in ((0, 2), (1, 1)):  # "… from its left to its right."
        found = tuned.caption(features, PROMPTS["long"].model_copy(update={"no_repeat_ngram_size": forbidden}))
        assert [caption.text.split().count("its") for caption in found] == [times] * len(found)


def test_the_loss_of_a_pair_does_not_depend_on_its_neighbours(tuned: Blip2) -> None:
    pixels = tuned.preprocess(pictures()[:2])
    texts = ["red", "a much longer caption, so that the other one is padded " * 3]
    prompts = [PROMPTS["short"].prompt, PROMPTS["long"].prompt]
    with torch.no_grad():
        alone = [tuned.loss(pixels[i:i + 1], prompts[i:i + 1], texts[i:i + 1]).item() for i in range(2)]
        together = tuned.loss(pixels, prompts, texts).item()
    lengths = [len(tuned._caption_ids(text)) + 1 for text in texts]  # the mean is over tokens
    assert together == pytest.approx(sum(a * n for a, n in zip(alone, lengths, strict=True)) / sum(lengths), rel=1e-5)


def test_the_loss_is_that_of_the_stock_model_with_its_placeholders(world_models: Path) -> None:
    captioner = opened(world_models)
    model = Blip2ForConditionalGeneration.from_pretrained(world_models / "blip2")
    placeholders = [model.config.image_token_index] * model.config.num_query_tokens
    prompt = captioner._prompt_ids("A short caption:")
    caption = [*captioner._caption_ids("a red circle"), captioner.eos]
    pixels = captioner.preprocess(pictures()[:1])
    ids = torch.tensor([placeholders + prompt + caption])
    labels = torch.tensor([[IGNORE] * (len(placeholders) + len(prompt)) + caption])
    stock = model(pixel_values=pixels, input_ids=ids, labels=labels).loss
    ours = captioner.loss(pixels, ["A short caption:"], ["a red circle"])
    assert ours.item() == pytest.approx(stock.item(), abs=1e-6)


def test_greedy_captions_are_those_of_the_stock_generate(world_models: Path) -> None:
    captioner = opened(world_models)
    model = Blip2ForConditionalGeneration.from_pretrained(world_models / "blip2").eval()
    processor = Blip2Processor.from_pretrained(world_models / "blip2")
    for image in pictures():
        inputs = processor(images=image, text="A short caption:", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
        features = captioner.encode(captioner.preprocess([image]))
        assert captioner.caption(features, PROMPTS["short"])[0] == captioner._read(ids)


def test_a_prompt_begins_with_bos_and_a_caption_ends_with_the_models_own_end(world_models: Path) -> None:
    captioner = opened(world_models)
    assert captioner._prompt_ids("A short caption:")[0] == 2
    assert captioner.eos == captioner.tokenizer.convert_tokens_to_ids("Ċ")  # how byte-level BPE writes "\n"


def test_only_the_language_models_adapter_is_trained(world_models: Path) -> None:
    captioner = opened(world_models)
    captioner.add_adapter(Finetune(lora_rank=4))
    assert all("language_model" in name and "lora" in name for name in captioner.trainable())
    assert len(captioner.trainable()) == 2 * 2 * 3  # A and B, of q and v, in three layers


def test_a_saved_adapter_gives_the_same_captions_and_opens_in_peft(tuned: Blip2, world_models: Path,
                                                                   tmp_path: Path) -> None:
    from peft import PeftModel
    tuned.save(tmp_path / "adapter")
    again = opened(world_models, tmp_path / "adapter")
    pixels = again.preprocess(pictures())
    for style in PROMPTS.values():
        assert again.caption(again.encode(pixels), style) == tuned.caption(tuned.encode(pixels), style)
    stock = PeftModel.from_pretrained(Blip2ForConditionalGeneration.from_pretrained(world_models / "blip2"),
                                      str(tmp_path / "adapter"))
    assert {name.split(".")[-2] for name, _ in stock.named_parameters() if "lora" in name} == {"default"}
    assert not list((tmp_path / "adapter").glob("*.bin"))


def test_a_caption_over_the_limit_is_cut_at_a_sentence_end_else_a_word(world_models: Path) -> None:
    captioner = opened(world_models)
    assert captioner.fit("A red circle. A blue ring.", 100) == "A red circle. A blue ring."
    limit = len(captioner._caption_ids("A red circle. A blue"))
    assert captioner.fit("A red circle. A blue ring.", limit) == "A red circle."
    cut = captioner.fit("A red circle and a blue ring", limit)
    assert "A red circle and a blue ring".startswith(f"{cut} ")


def test_a_very_long_caption_is_cut_at_once(world_models: Path) -> None:
    captioner = opened(world_models)
    cut = captioner.fit("Red cats sleep. " * 6000, 50)
    assert cut.endswith("sleep.") and 40 < len(captioner._caption_ids(cut)) <= 50


@pytest.mark.parametrize("place", ["nothing", "no-adapter"])
def test_an_adapter_that_is_none_is_one_clear_line(world_models: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "no-adapter").mkdir()
    with pytest.raises(UserError, match="no peft adapter"):
        opened(world_models, tmp_path / place)


@pytest.mark.parametrize("model", ["no/such/folder", "./nowhere", "someone/not-cached"])
def test_a_checkpoint_that_is_not_there_is_one_clear_line(model: str) -> None:
    with pytest.raises(UserError, match=r"captioner\.model") as caught:
        open_captioner(Captioner(model=model), "cpu")
    assert "\n" not in str(caught.value)
