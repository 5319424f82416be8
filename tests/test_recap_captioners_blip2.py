"""BLIP-2's silent traps, on both of its language models, against the stock classes; and PixLore's parameters."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recap_here
from peft import PeftModel
from PIL import Image
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

from recap.captioners import open_tunable
from recap.captioners.blip2 import Blip2
from recap.captioners.info import info
from recap.captioners.text import IGNORE
from recap.captioners.vocabulary import learn_vocabulary
from recap.config import Style
from recap.config.captioner import Captioner
from recap.config.finetune import Finetune, Lora
from recap.errors import UserError

SHORT = Style(prompt="A short caption:", max_new_tokens=12)
COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230)}


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (70, 50), colour) for colour in COLOURS.values()]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLIP-2 with a T5, as `Salesforce/blip2-flan-t5-xl` is one."""
    folder = tmp_path_factory.mktemp("blip2-t5")
    tokenizer = learn_vocabulary([f"a {name} picture, short caption" for name in COLOURS] * 3, 400)
    processor: Any = Blip2Processor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, 4)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**small, "image_size": 32, "patch_size": 8, "initializer_range": 0.5},
        qformer_config={**small, "encoder_hidden_size": 32, "cross_attention_frequency": 1, "initializer_range": 0.5},
        text_config={"model_type": "t5", "vocab_size": len(processor.tokenizer), "d_model": 32, "d_kv": 16, "d_ff": 64,
                     "num_layers": 2, "num_heads": 2, "eos_token_id": tokenizer.eos_token_id,
                     "pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id},
        num_query_tokens=4, image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"))
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def opened(folder: Path, adapter: Path | None = None) -> Blip2:
    captioner = open_tunable(Captioner(model=str(folder), dtype="float32"), "cpu", adapter)
    assert isinstance(captioner, Blip2)
    return captioner


def test_the_loss_is_that_of_the_stock_model_with_its_placeholders(world_models: Path) -> None:
    captioner = opened(world_models / "blip2")
    model = Blip2ForConditionalGeneration.from_pretrained(world_models / "blip2", dtype=torch.float32)
    placeholders = [model.config.image_token_index] * model.config.num_query_tokens
    prompt = captioner.text.prompt_ids("A short caption:")
    caption = captioner.text.caption_ids("a red circle")
    pixels = captioner.preprocess(pictures()[:1])
    ids = torch.tensor([placeholders + prompt + caption])
    labels = torch.tensor([[IGNORE] * (len(placeholders) + len(prompt)) + caption])
    stock = model(pixel_values=pixels, input_ids=ids, labels=labels).loss
    ours = captioner.loss(captioner.encode(pixels), ["A short caption:"], ["a red circle"])
    assert ours.item() == pytest.approx(stock.item(), abs=1e-6)


def test_the_loss_of_a_t5_is_that_of_the_stock_model(t5: Path) -> None:
    captioner = opened(t5)
    model = Blip2ForConditionalGeneration.from_pretrained(t5)
    placeholders = [model.config.image_token_index] * model.config.num_query_tokens
    pixels = captioner.preprocess(pictures()[:1])
    ids = torch.tensor([placeholders + captioner.text.prompt_ids("A short caption:")])
    labels = torch.tensor([captioner.text.caption_ids("a red picture")])
    stock = model(pixel_values=pixels, input_ids=ids, labels=labels).loss
    ours = captioner.loss(captioner.encode(pixels), ["A short caption:"], ["a red picture"])
    assert ours.item() == pytest.approx(stock.item(), abs=1e-6)


def test_greedy_captions_are_those_of_the_stock_generate(world_models: Path) -> None:
    captioner = opened(world_models / "blip2")
    model = Blip2ForConditionalGeneration.from_pretrained(world_models / "blip2", dtype=torch.float32).eval()
    processor = Blip2Processor.from_pretrained(world_models / "blip2")
    for image in pictures():
        inputs = processor(images=image, text="A short caption:", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
        assert captioner.caption(captioner.encode(captioner.preprocess([image])), SHORT)[0] == captioner.text.read(ids)


def test_a_prompt_begins_with_bos_and_a_caption_ends_with_the_models_own_end(world_models: Path) -> None:
    captioner = opened(world_models / "blip2")
    assert captioner.text.prompt_ids("A short caption:")[0] == 2
    assert captioner.text.end == captioner.text.tokenizer.convert_tokens_to_ids("Ċ")  # byte-level BPE's "\n"


def test_a_t5_learns_the_image_the_prompt_and_the_end(t5: Path, tmp_path: Path) -> None:
    captioner = opened(t5)
    torch.manual_seed(0)
    captioner.prepare(Finetune(lora=Lora(rank=8, dropout=0, language_model=["q", "k", "v", "o", "wi", "wo"])), [])
    optimizer = torch.optim.AdamW(captioner.trainable().values(), lr=5e-3)
    pixels = captioner.preprocess(pictures() * 2)
    prompts = ["A short caption:"] * 3 + ["A much longer one, so that prompts are padded:"] * 3
    captions = [*COLOURS, *(f"a {name} picture" for name in COLOURS)]
    for _ in range(400):
        captioner.loss(captioner.encode(pixels), prompts, captions).backward()
        optimizer.step()
        optimizer.zero_grad()
    features = captioner.encode(captioner.preprocess(pictures()))
    found = captioner.caption(features, SHORT)
    assert [caption.text for caption in found] == [*COLOURS] and all(caption.ended for caption in found)
    with torch.no_grad():
        right, swapped = (captioner.loss(each, prompts[:3], captions[:3]) for each in (features, features.roll(1, 0)))
    assert swapped > right + 0.1
    captioner.save(tmp_path / "adapter")
    again = opened(t5, tmp_path / "adapter")
    assert again.caption(features, SHORT.model_copy(update={"num_beams": 3})) == captioner.caption(
        features, SHORT.model_copy(update={"num_beams": 3}))


def test_only_the_language_models_adapter_is_trained_unless_other_parts_are_named(world_models: Path) -> None:
    captioner = opened(world_models / "blip2")
    captioner.prepare(Finetune(lora=Lora(rank=4)), [])
    assert all("language_model" in name and "lora" in name for name in captioner.trainable())
    assert len(captioner.trainable()) == 2 * 2 * 3  # A and B, of q and v, in three layers
    assert not captioner.encoder_is_trained
    parts = Lora(rank=4, language_model=[], qformer=["query", "value"], vision_model=["qkv"])
    captioner = opened(world_models / "blip2")
    captioner.prepare(Finetune(lora=parts), [])
    assert {name.split(".")[2] for name in captioner.trainable()} == {"qformer", "vision_model"}
    assert captioner.encoder_is_trained
    captioner.loss(captioner.encode(captioner.preprocess(pictures())), ["x"] * 3, ["y"] * 3).backward()
    assert all(p.grad is not None for p in captioner.trainable().values())


def test_what_is_not_trained_has_no_dropout_whichever_part_is(world_models: Path) -> None:
    captioner = opened(world_models / "blip2")
    captioner.prepare(Finetune(lora=Lora(rank=4, language_model=[], vision_model=["qkv"])), [])
    captioner.set_training(True)
    training = {name for name, module in captioner.base.named_children() if module.training}
    assert {"language_model", "qformer"}.isdisjoint(training) and "vision_model" in training


def test_a_layer_at_the_top_of_its_part_is_adapted(world_models: Path) -> None:
    captioner = opened(world_models / "blip2")
    captioner.prepare(Finetune(lora=Lora(rank=4, language_model=["q_proj", "lm_head"])), [])
    assert any("language_model.lm_head.lora_A" in name for name in captioner.trainable())


def test_a_saved_adapter_opens_in_peft(world_models: Path, tmp_path: Path) -> None:
    captioner = opened(world_models / "blip2")
    captioner.prepare(Finetune(lora=Lora(rank=4)), [])
    captioner.save(tmp_path / "adapter")
    base = Blip2ForConditionalGeneration.from_pretrained(world_models / "blip2")
    stock = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert {name.split(".")[-2] for name, _ in stock.named_parameters() if "lora" in name} == {"default"}
    assert not list((tmp_path / "adapter").glob("*.bin"))
    assert str(world_models / "blip2") == stock.peft_config["default"].base_model_name_or_path


@pytest.mark.parametrize("place", ["nothing", "no-adapter"])
def test_an_adapter_that_is_none_is_one_clear_line(world_models: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "no-adapter").mkdir()
    with pytest.raises(UserError, match="no peft adapter"):
        opened(world_models / "blip2", tmp_path / place)


def test_an_adapter_for_another_base_is_one_clear_line(world_models: Path, t5: Path, tmp_path: Path) -> None:
    captioner = opened(world_models / "blip2")
    captioner.prepare(Finetune(lora=Lora(rank=4)), [])
    captioner.save(tmp_path / "opt")
    with pytest.raises(UserError, match="of another base") as caught:
        opened(t5, tmp_path / "opt")
    assert "\n" not in str(caught.value)
    fewer = json.loads((world_models / "blip2" / "config.json").read_text())
    fewer["text_config"]["num_hidden_layers"] = 2
    model = Blip2ForConditionalGeneration(Blip2Config.from_dict(fewer))
    model.save_pretrained(tmp_path / "fewer")
    Blip2Processor.from_pretrained(world_models / "blip2").save_pretrained(tmp_path / "fewer")
    with pytest.raises(UserError, match=r"4 of its weights are unknown here"):
        opened(tmp_path / "fewer", tmp_path / "opt")


def test_an_adapter_of_another_kind_is_one_clear_line(world_models: Path, tmp_path: Path) -> None:
    captioner = opened(world_models / "blip2")
    captioner.prepare(Finetune(lora=Lora(rank=4)), [])
    captioner.save(tmp_path)
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**record, "peft_type": "XLORA"}))
    with pytest.raises(UserError, match="of kind 'XLORA', not LORA"):
        opened(world_models / "blip2", tmp_path)


def test_a_checkpoint_that_lacks_weights_is_one_clear_line(world_models: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    model = tmp_path / "model"
    Blip2Processor.from_pretrained(world_models / "blip2").save_pretrained(model)
    (model / "config.json").write_bytes((world_models / "blip2" / "config.json").read_bytes())
    weights = load_file(world_models / "blip2" / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "fc1.weight" not in name},
              model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \d+ weights of a Blip2ForConditionalGeneration"):
        opened(model)


# --- figures to match ----------------------------------------------------------------------------------------------


def test_pixlores_recipe_trains_5_242_880_parameters_of_opt_2_7b(world_models: Path, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """From a folder with a configuration and no weights, of OPT-2.7B's sizes (vision and Q-Former: transformers')."""
    config = Blip2Config(text_config={
        "model_type": "opt", "vocab_size": 50304, "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048})
    Blip2Processor.from_pretrained(world_models / "blip2").save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    found = info(Captioner(model=str(tmp_path)), Finetune(lora=Lora(rank=16, language_model=["q_proj", "v_proj"])))
    assert found.trained == 5_242_880
    assert f"{100 * found.trained / found.total:.3f}" == "0.140"
    recipe = Path(__file__).parents[1] / "configs" / "pixlore_blip2.toml"
    assert recap_here("captioner", "info", "-c", str(recipe), f"captioner.model={tmp_path}") == 0
    assert re.search(r"^all +3,7\d\d,\d{3},\d{3} +5,242,880 +0\.140 %$", capsys.readouterr().out, re.M)
