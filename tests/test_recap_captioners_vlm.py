"""Vision-language models of several classes: asked as their templates ask, the image matters, the neighbours don't."""

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BartConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GemmaConfig,
    GemmaTokenizer,
    GPT2Tokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    RobertaTokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from recap.captioners import open_tunable
from recap.captioners.vlm import Vlm
from recap.config import Style
from recap.config.captioner import Captioner
from recap.config.finetune import Finetune, Lora
from recap.errors import UserError

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230), "yellow": (240, 230, 20)}
STYLES = {"short": Style(prompt="A short caption:", max_new_tokens=8),
          "long": Style(prompt="A detailed caption of what is there:", max_new_tokens=24)}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BART_LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
SIZE, WIDTH = 32, 64
LANGUAGE: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2,
                            "num_attention_heads": 4, "initializer_range": 0.2}
SIGHT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "image_size": SIZE, "patch_size": 8, "initializer_range": 0.2}
TEXTS = ["A short caption: red green blue yellow", "A detailed caption of what is there:", "USER: ASSISTANT:",
         *[f"All of it is {name}, from left to right." for name in COLOURS]] * 5


def pictures() -> list[Image.Image]:
    """Of several sizes, so that what is dynamic in a model's resolution differs."""
    sizes = [(70, 50), (40, 90), (64, 64), (120, 40)]
    return [Image.new("RGB", size, colour) for size, colour in zip(sizes, COLOURS.values(), strict=True)]


def captions(style: str) -> list[str]:
    return [name if style == "short" else f"All of it is {name}, from left to right." for name in COLOURS]


# --- tiny models of the real classes -------------------------------------------------------------------------------


def bpe(special: list[str], metaspace: bool = False) -> dict[str, Any]:
    """Vocabulary and merges, learned from `TEXTS`: of bytes, or as sentencepiece has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    learned = Tokenizer(models.BPE())
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else bytewise
    alphabet = ["\n", "▁", *map(chr, range(33, 127))] if metaspace else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False,
                                  initial_alphabet=alphabet)
    learned.train_from_iterator(TEXTS, trainer)
    found = json.loads(learned.to_str())["model"]
    return {"vocab": found["vocab"], "merges": [tuple(pair) for pair in found["merges"]]}


def padding(token: str) -> dict[str, str]:
    return {"pad_token": token}


def ending(token: str) -> dict[str, str]:
    return {"eos_token": token}


LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")


def llava() -> tuple[Any, Any]:
    learned = bpe(["<unk>", "<s>", "</s>", "<pad>", "<image>"], metaspace=True)
    tokenizer = LlamaTokenizer(**learned, **padding("<pad>"), add_bos_token=True,
                               extra_special_tokens={"image_token": "<image>"})
    sight = CLIPVisionConfig(**SIGHT)
    config = LlavaConfig(vision_config=sight, text_config=LlamaConfig(**LANGUAGE, vocab_size=len(tokenizer)),
                         image_token_id=tokenizer.image_token_id, vision_feature_layer=-1)
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor = LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=LLAVA_TEMPLATE)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    return model, processor


def qwen() -> tuple[Any, Any]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer(**bpe(special), **padding("<|endoftext|>"), **ending("<|im_end|>"),
                               additional_special_tokens=special[1:])
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    config = Qwen2VLConfig(
        text_config={**LANGUAGE, "vocab_size": len(tokenizer), "num_key_value_heads": 2,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 8,
                       "initializer_range": 0.2},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
    images: dict[str, Any] = {"patch_size": 8, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(**images), tokenizer, Qwen2VLVideoProcessor(**images),
                                 chat_template=QWEN_TEMPLATE)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], repetition_penalty=1.5,
                                   pad_token_id=ids["<|endoftext|>"], do_sample=True, temperature=2.0)
    return model, processor


def idefics() -> tuple[Any, Any]:
    special = ["<|endoftext|>", "<|im_start|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>",
               "<global-img>", *[f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]]
    tokenizer = GPT2Tokenizer(**bpe(special), **padding("<|endoftext|>"), **ending("<end_of_utterance>"),
                              bos_token=special[1], unk_token=special[0], additional_special_tokens=special[2:])
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    config = Idefics3Config(
        text_config={**LANGUAGE, "model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0},
        vision_config=SIGHT, image_token_id=ids["<image>"], scale_factor=2)
    images = Idefics3ImageProcessor(size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=ids["<end_of_utterance>"], pad_token_id=0, bos_token_id=1)
    return model, processor


def florence() -> tuple[Any, Any]:
    tokenizer = RobertaTokenizer(**bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>"]),
                                 extra_special_tokens={"image_token": "<image>"})
    language = BartConfig(
        vocab_size=len(tokenizer), d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=100, init_std=0.2,
        dropout=0.0)
    sight = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
             "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 2], "num_groups": [2, 2],
             "window_size": 2, "projection_dim": WIDTH, "initializer_range": 0.2}
    config = Florence2Config(text_config=language.to_dict(), vision_config=sight,
                             image_token_id=tokenizer.image_token_id)
    images = CLIPImageProcessor(size={"height": SIZE, "width": SIZE}, do_center_crop=False)
    images.image_seq_length = 17
    model = Florence2ForConditionalGeneration(config)
    model.generation_config.update(decoder_start_token_id=2, bos_token_id=0, eos_token_id=2, pad_token_id=1,
                                   forced_bos_token_id=0, forced_eos_token_id=2, num_beams=3)
    return model, Florence2Processor(images, tokenizer)


def paligemma() -> tuple[Any, Any]:
    tokenizer = GemmaTokenizer(**bpe(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], metaspace=True))
    images = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer)
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**LANGUAGE, vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=16).to_dict(),
        vision_config=SiglipVisionConfig(**SIGHT, projection_dim=WIDTH, vision_use_head=False).to_dict(),
        projection_dim=WIDTH, image_token_id=processor.image_token_id)
    model = PaliGemmaForConditionalGeneration(config)
    model.generation_config.update(bos_token_id=2, eos_token_id=1, pad_token_id=0)
    return model, processor


CLASSES = {build.__name__: build for build in (llava, qwen, idefics, florence, paligemma)}


def write(name: str, folder: Path) -> Path:
    """A checkpoint folder of a class, with random weights."""
    torch.manual_seed(0)
    model, processor = CLASSES[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def opened(folder: Path, adapter: Path | None = None) -> Vlm:
    captioner = open_tunable(Captioner(family="vlm", model=str(folder), dtype="float32"), "cpu", adapter)
    assert isinstance(captioner, Vlm)
    return captioner


def lora(folder: Path, **parts: list[str]) -> Finetune:
    layers = BART_LINEAR if folder.name == "florence" else LINEAR
    return Finetune(lora=Lora(rank=8, dropout=0.0, **({"language_model": layers} | parts)))


@pytest.fixture(scope="module", params=list(CLASSES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(request.param, tmp_path_factory.mktemp("vlm") / request.param)


@pytest.fixture(scope="module")
def base(folder: Path) -> Vlm:
    return opened(folder)


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Vlm:
    """After a short, real training on four images in two styles."""
    captioner = opened(folder)
    torch.manual_seed(0)
    captioner.prepare(lora(folder), [])
    is_bart = folder.name == "florence"
    optimizer = torch.optim.AdamW(captioner.trainable().values(), lr=3e-3 if is_bart else 1e-2, weight_decay=0)
    captioner.set_training(True)
    seen = captioner.encode(captioner.preprocess(pictures() * 2))
    prompts = [STYLES[style].prompt for style in STYLES for _ in COLOURS]
    for _ in range(90 if is_bart else 50):
        captioner.loss(seen, prompts, captions("short") + captions("long")).backward()
        optimizer.step()
        optimizer.zero_grad()
    captioner.set_training(False)
    return captioner


# --- what every class has to do ------------------------------------------------------------------------------------


def test_swapping_the_images_raises_the_loss(tuned: Vlm) -> None:
    prompts = [STYLES["long"].prompt] * 4
    others = pictures()[1:] + pictures()[:1]
    swapped = [other.resize(image.size) for other, image in zip(others, pictures(), strict=True)]
    with torch.no_grad():
        right = tuned.loss(tuned.encode(tuned.preprocess(pictures())), prompts, captions("long"))
        wrong = tuned.loss(tuned.encode(tuned.preprocess(swapped)), prompts, captions("long"))
    assert wrong > right + 0.1


def test_a_tuned_model_says_what_it_learned_in_the_style_asked_for_and_ends(tuned: Vlm) -> None:
    seen = tuned.encode(tuned.preprocess(pictures()))
    for name, style in STYLES.items():
        found = tuned.caption(seen, style)
        assert [caption.text for caption in found] == captions(name)
        assert all(caption.ended for caption in found)


def strange() -> list[Image.Image]:
    """Pictures that no model was tuned on: their captions go on for long, and differ."""
    sizes = [(70, 50), (40, 90), (64, 64), (33, 31)]
    return [Image.radial_gradient("L").rotate(30 * turn).convert("RGB").resize(size) for turn, size in enumerate(sizes)]


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3, "no_repeat_ngram_size": 4}])
def test_a_caption_does_not_depend_on_its_neighbours(tuned: Vlm, base: Vlm, decoding: dict[str, int]) -> None:
    style = STYLES["long"].model_copy(update=decoding)
    images = [*pictures()[:2], *strange()]
    for captioner in (tuned, base):
        together = captioner.caption(captioner.encode(captioner.preprocess(images)), style)
        alone = [captioner.caption(captioner.encode(captioner.preprocess([image])), style)[0] for image in images]
        backwards = captioner.caption(captioner.encode(captioner.preprocess(images[::-1])), style)[::-1]
        assert together == alone == backwards
    assert len(set(together)) > 1


def test_the_loss_of_a_pair_does_not_depend_on_its_neighbours(base: Vlm) -> None:
    images, prompts = strange(), [STYLES[style].prompt for style in ("short", "long", "long", "short")]
    texts = ["red", "a much longer caption, so that others are padded " * 2, *captions("long")[:2]]
    with torch.no_grad():
        together = base.loss(base.encode(base.preprocess(images)), prompts, texts).item()
        alone = [base.loss(base.encode(base.preprocess([image])), [prompt], [text]).item()
                 for image, prompt, text in zip(images, prompts, texts, strict=True)]
    lengths = [base.num_tokens(text) for text in texts]  # the mean is over tokens
    assert together == pytest.approx(sum(a * n for a, n in zip(alone, lengths, strict=True)) / sum(lengths), rel=1e-5)


def test_greedy_captions_are_those_of_the_stock_generate(base: Vlm, folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    for image in [*pictures(), *strange()]:
        inputs = stock_prompt(processor, image, STYLES["short"].prompt)
        ids = model.generate(**inputs, max_new_tokens=9 if base.is_seq2seq else 8, do_sample=False, num_beams=1,
                             repetition_penalty=1.0, forced_eos_token_id=None)
        new = ids[0, 2 if base.is_seq2seq else inputs["input_ids"].shape[1]:].tolist()
        seen = base.encode(base.preprocess([image]))
        assert base.caption(seen, STYLES["short"])[0] == base.text.read(new)


def stock_prompt(processor: Any, image: Image.Image, prompt: str) -> dict[str, Any]:
    """What the processor itself makes of an image and a prompt, as its users call it."""
    if not processor.chat_template:
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        return {name: value for name, value in inputs.items() if name != "labels"}
    turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}
    return dict(processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=True, return_dict=True,
                                              return_tensors="pt"))


def stock_pair(processor: Any, image: Image.Image, prompt: str, caption: str) -> dict[str, Any]:
    """The same with the caption, and hand-made labels on it and its end."""
    if isinstance(processor, PaliGemmaProcessor):
        return dict(processor(text=prompt, images=image, suffix=caption, return_tensors="pt"))
    if isinstance(processor, Florence2Processor):
        ids = processor.tokenizer(caption)["input_ids"]
        return stock_prompt(processor, image, prompt) | {
            "decoder_input_ids": torch.tensor([[2, *ids[:-1]]]), "labels": torch.tensor([[-100, *ids[1:]]])}
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
             {"role": "assistant", "content": [{"type": "text", "text": caption}]}]
    text = processor.apply_chat_template(turns)
    if isinstance(processor, LlavaProcessor):  # its template doesn't say what LLaVA was trained to end with
        text = f"{text.rstrip()}</s>"
    has_bos = text.startswith(processor.tokenizer.bos_token or "none")
    inputs = dict(processor(text=text, images=[image], return_tensors="pt", add_special_tokens=not has_bos))
    start = stock_prompt(processor, image, prompt)["input_ids"].shape[1]
    ids = inputs["input_ids"][0].tolist()
    end = processor.tokenizer.eos_token_id
    length = ids.index(end, start) + 1 - start
    labels = [-100] * start + ids[start:start + length]
    return inputs | {"labels": torch.tensor([labels + [-100] * (len(ids) - len(labels))])}


def test_the_loss_is_that_of_the_stock_model_on_its_processors_own_inputs(base: Vlm, folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    for image, caption in zip(strange(), [*captions("long")[:3], "Red."], strict=True):
        inputs = stock_pair(processor, image, STYLES["long"].prompt, caption)
        with torch.no_grad():
            stock = model(**inputs).loss
            ours = base.loss(base.encode(base.preprocess([image])), [STYLES["long"].prompt], [caption])
        assert ours.item() == pytest.approx(stock.item(), abs=1e-5)
        learned = [token for token in inputs["labels"][0].tolist() if token != -100]
        assert learned == base.text.caption_ids(caption)
        assert len(learned) == base.num_tokens(caption)


def test_each_image_is_read_and_seen_once_however_many_styles(base: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    reader = type(base.processor.image_processor)
    call = reader.__call__

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls["read"] += 1
        return call(*args, **kwargs)

    monkeypatch.setattr(reader, "__call__", counted)
    vision = base.base.get_encoder(modality="image")
    hook = vision.register_forward_hook(lambda *_: calls.update(["seen"]))
    seen = base.encode(base.preprocess(pictures()))
    for style in STYLES.values():
        base.caption(seen, style)
        base.caption(seen, style.model_copy(update={"num_beams": 3}))
        base.loss(seen, [style.prompt] * 4, captions("short"))
    hook.remove()
    assert calls == {"read": 1, "seen": 1}


def test_only_the_language_models_adapter_is_trained_and_the_vision_model_is_not_dropped_out(folder: Path) -> None:
    captioner = opened(folder)
    captioner.prepare(lora(folder), [])
    assert captioner.trainable()
    assert all("lora" in name and ("language_model" in name or "text_model" in name) for name in captioner.trainable())
    assert not any("vision" in name or "visual" in name for name in captioner.trainable())
    assert not captioner.encoder_is_trained
    captioner.set_training(True)
    assert not any(module.training for module in captioner.base.get_encoder(modality="image").modules())
    assert any(module.training for module in captioner.base.get_decoder().modules())


def test_the_vision_model_is_trained_where_its_layers_are_named(folder: Path) -> None:
    captioner = opened(folder)
    layer = {"qwen": "qkv", "florence": "qkv"}.get(folder.name, "v_proj")
    captioner.prepare(lora(folder, vision_model=[layer]), [])
    assert captioner.encoder_is_trained
    captioner.set_training(True)
    captioner.loss(captioner.encode(captioner.preprocess(pictures()[:1])), ["A caption:"], ["red"]).backward()
    trained = [p for name, p in captioner.trainable().items() if ("vis" in name) and "lora_B" in name]
    assert trained
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_a_saved_adapter_gives_the_same_captions_and_opens_in_peft(tuned: Vlm, folder: Path, tmp_path: Path) -> None:
    tuned.save(tmp_path / "adapter")
    again = opened(folder, tmp_path / "adapter")
    for style in STYLES.values():
        assert again.caption(again.encode(again.preprocess(pictures())), style) == tuned.caption(
            tuned.encode(tuned.preprocess(pictures())), style)
    stock = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), str(tmp_path / "adapter"))
    assert any("lora" in name for name, _ in stock.named_parameters())
    assert not list((tmp_path / "adapter").glob("*.bin"))


def test_what_looks_like_a_special_token_in_a_caption_is_left_out(base: Vlm) -> None:
    token = base.processor.image_token
    assert base.text.caption_ids(f"red {token} ring") == base.text.caption_ids("red   ring")
    assert base.loss(base.encode(base.preprocess(pictures()[:1])), ["A caption:"], [f"a {token}{token}"]).isfinite()


def test_pictures_of_any_shape_are_captioned(base: Vlm) -> None:
    images = [Image.new("RGB", size, "red") for size in ((1, 1), (3, 40), (1, 3000), (2500, 3), (640, 480))]
    assert len(base.caption(base.encode(base.preprocess(images)), STYLES["short"])) == len(images)


def test_what_preprocess_gives_passes_between_processes(base: Vlm) -> None:
    made = base.preprocess(pictures())
    again = pickle.loads(pickle.dumps(made))  # noqa: S301
    assert base.caption(base.encode(again), STYLES["short"]) == base.caption(base.encode(made), STYLES["short"])


def test_without_weights_a_model_has_its_parameters_and_its_adapter(folder: Path) -> None:
    captioner = open_tunable(Captioner(family="vlm", model=str(folder)), "meta")
    captioner.prepare(lora(folder), [])
    captioner.set_training(True)
    assert captioner.trainable()
    assert all(parameter.is_meta for parameter in captioner.model.parameters())


# --- one class is enough -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("llava", tmp_path_factory.mktemp("vlm") / "llava")


def test_a_caption_may_repeat_what_the_prompt_says_but_not_itself(llava_folder: Path) -> None:
    captioner = opened(llava_folder)
    captioner.prepare(lora(llava_folder), [])
    optimizer = torch.optim.AdamW(captioner.trainable().values(), lr=1e-2)
    seen = captioner.encode(captioner.preprocess(pictures()[:1]))
    style = Style(prompt="All of it is red, from left to right.", max_new_tokens=24)
    said = "All of it is red, All of it is red, All of it is red."
    for _ in range(30):
        captioner.loss(seen, [style.prompt], [said]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert captioner.caption(seen, style)[0].text == said
    forbidden = captioner.caption(seen, style.model_copy(update={"no_repeat_ngram_size": 3}))[0].text
    assert forbidden.startswith("All of it is red,")
    assert forbidden.count("All of it") == 1


def test_a_template_without_a_place_for_an_image_is_one_clear_line(llava_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llava_folder, tmp_path / "llava")
    (tmp_path / "llava" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}")
    with pytest.raises(UserError, match="no place for one"):
        opened(tmp_path / "llava")


def test_an_assistants_text_may_have_to_be_a_plain_string(llava_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llava_folder, tmp_path / "llava")
    (tmp_path / "llava" / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] <image>\n{{ m['content'][1]['text'] }} [/INST]"
        "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}")
    text = opened(tmp_path / "llava").text
    assert (text.header, text.space, text.close, text.end) == (" [/INST]", " ", " ", 2)


def test_a_prompt_that_a_model_does_not_take_is_one_clear_line(tmp_path: Path) -> None:
    captioner = opened(write("florence", tmp_path / "florence"))
    seen = captioner.encode(captioner.preprocess(pictures()[:1]))
    captioner.caption(seen, Style(prompt="<DETAILED_CAPTION>", max_new_tokens=4))
    with pytest.raises(UserError, match="does not take the prompt '<CAPTION> of it'"):
        captioner.caption(seen, Style(prompt="<CAPTION> of it", max_new_tokens=4))
    with pytest.raises(UserError, match="positions for 97"):
        captioner.caption(seen, Style(prompt="A caption:", max_new_tokens=98))


def test_a_processor_that_lacks_a_package_is_one_clear_line(llava_folder: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("Package `num2words` is required to run SmolVLM processor.")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lacking)
    with pytest.raises(UserError, match="needs a package: Package `num2words`"):
        opened(llava_folder)


def test_a_part_that_it_does_not_have_is_one_clear_line(llava_folder: Path) -> None:
    with pytest.raises(UserError, match=r"finetune\.lora\.qformer: this captioner has no such part"):
        opened(llava_folder).prepare(lora(llava_folder, qformer=["query"]), [])


def test_a_checkpoint_that_is_none_of_these_is_one_clear_line(tmp_path: Path) -> None:
    BartConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"captioner\.model") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_bfloat16_weights_caption_and_learn(llava_folder: Path) -> None:
    captioner = open_tunable(Captioner(family="vlm", model=str(llava_folder)), "cpu")
    captioner.prepare(lora(llava_folder), [])
    seen = captioner.encode(captioner.preprocess(pictures()))
    captioner.loss(seen, ["A caption:"] * 4, captions("short")).backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in captioner.trainable().values())
    assert len(captioner.caption(seen, STYLES["short"])) == 4
