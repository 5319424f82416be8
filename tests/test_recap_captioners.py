"""Every family keeps the protocol: the image matters, the neighbours don't, captions learn to end, files open again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationMixin, GPT2LMHeadModel

from recap.captioners import Tunable, open_captioner, open_tunable
from recap.captioners.text import NoRepeat, Text
from recap.captioners.vocabulary import learn_vocabulary
from recap.config import Style
from recap.config.captioner import Captioner, Part
from recap.config.finetune import Finetune
from recap.errors import UserError

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230), "yellow": (240, 230, 20)}
STYLES = {"short": Style(prompt="A short caption:", max_new_tokens=16),
          "long": Style(prompt="A detailed caption:", max_new_tokens=48)}
ALL_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TINY = {"hidden_size": 64, "num_layers": 2, "vocab_size": 400, "image_size": 32, "dropout": 0.0}
FAMILIES = ["blip2", "blip", "clipcap-mlp", "clipcap-transformer", "transformer", "cnn_lstm", "cnn_lstm-attention"]
TRAINING = {"blip2": (5e-3, 100), "blip": (2e-3, 50), "clipcap-mlp": (2e-3, 50), "clipcap-transformer": (2e-3, 60),
            "transformer": (2e-3, 150), "cnn_lstm": (3e-3, 350), "cnn_lstm-attention": (1e-2, 200)}
"""Learning rate and steps until four pictures are known by heart."""
WORDS = [f"{name} {text}" for name in COLOURS for text in ("All of the picture is", "from its left to its right.")]


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (70, 50), colour) for colour in COLOURS.values()]


def captions(style: str) -> list[str]:
    return [name if style == "short" else f"all of the picture is {name}, from its left to its right."
            for name in COLOURS]


def config_of(case: str, models: Path) -> Captioner:
    family, _, variant = case.partition("-")
    tables: dict[str, Any] = {
        "blip2": {"model": str(models / "blip2")},
        "blip": {"model": str(models / "blip")},
        "clipcap": {"clipcap": {"clip": str(models / "clip-1"), "gpt2": str(models / "gpt2"),
                                "mapper": variant or "mlp", "num_layers": 2, "num_heads": 4,
                                "train_gpt2": variant != "transformer"}},
        "transformer": {"transformer": {**TINY, "encoder": "none", "patch_size": 8, "num_heads": 4}},
        "cnn_lstm": {"cnn_lstm": {**TINY, "num_layers": 1, "encoder": str(models / "cnn"), "train_encoder": True,
                                  "attention": variant == "attention"}},
    }
    return Captioner(family=family, dtype="float32", **tables[family])


def trained(case: str, models: Path) -> tuple[Tunable, Captioner]:
    """A captioner after a short, real training on four images in two styles."""
    config = config_of(case, models)
    captioner = open_tunable(config, "cpu")
    torch.manual_seed(0)
    captioner.prepare(Finetune(lora={"rank": 8, "dropout": 0.0, "language_model": ALL_LAYERS}), WORDS)
    lr, steps = TRAINING[case]
    if case == "clipcap-transformer":  # behind a GPT-2 that knows nothing yet, and is frozen, no mapper can say much
        captioner.model.gpt.requires_grad_(True)
    optimizer = torch.optim.AdamW(captioner.trainable().values(), lr=lr, weight_decay=0)
    pixels = captioner.preprocess(pictures() * 2)
    prompts = [STYLES[style].prompt for style in ("short", "long") for _ in COLOURS]
    captioner.set_training(True)
    for _ in range(steps):
        loss = captioner.loss(captioner.encode(pixels), prompts, captions("short") + captions("long"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(captioner.trainable().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    captioner.set_training(False)
    return captioner, config


@pytest.fixture(scope="module")
def tuned_by_case(world_models: Path) -> dict[str, tuple[Tunable, Captioner]]:
    return {case: trained(case, world_models) for case in FAMILIES}


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tuned(case: str, tuned_by_case: dict[str, tuple[Tunable, Captioner]]) -> Tunable:
    return tuned_by_case[case][0]


def say(captioner: Tunable, images: list[Image.Image], style: Style) -> list[Any]:
    with torch.no_grad():
        return captioner.caption(captioner.encode(captioner.preprocess(images)), style)


def loss_of(captioner: Tunable, images: list[Image.Image], prompts: list[str], texts: list[str]) -> float:
    with torch.no_grad():
        return captioner.loss(captioner.encode(captioner.preprocess(images)), prompts, texts).item()


def test_swapping_the_images_raises_the_loss(tuned: Tunable) -> None:
    prompts = [STYLES["long"].prompt] * 4
    right = loss_of(tuned, pictures(), prompts, captions("long"))
    swapped = loss_of(tuned, pictures()[1:] + pictures()[:1], prompts, captions("long"))
    assert swapped > right + 0.1


def test_a_tuned_captioner_says_what_it_learned_in_the_style_asked_for_and_ends(tuned: Tunable) -> None:
    for style in ("short", "long"):
        found = say(tuned, pictures(), STYLES[style])
        assert [caption.text for caption in found] == captions(style)
        assert all(caption.ended for caption in found)


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3, "no_repeat_ngram_size": 4}])
def test_a_caption_does_not_depend_on_its_neighbours(tuned: Tunable, decoding: dict[str, int]) -> None:
    style = STYLES["long"].model_copy(update=decoding)
    images = [Image.radial_gradient("L").convert("RGB").rotate(30 * turn) for turn in range(3)] + pictures()[:2]
    together = say(tuned, images, style)
    assert together == [say(tuned, [image], style)[0] for image in images] == say(tuned, images[::-1], style)[::-1]


def test_the_loss_of_a_pair_does_not_depend_on_its_neighbours(tuned: Tunable) -> None:
    texts = ["red", "a much longer caption, so that the other one is padded " * 3]
    prompts = [STYLES["short"].prompt, STYLES["long"].prompt]
    alone = [loss_of(tuned, pictures()[i:i + 1], prompts[i:i + 1], texts[i:i + 1]) for i in range(2)]
    together = loss_of(tuned, pictures()[:2], prompts, texts)
    lengths = [tuned.num_tokens(text) for text in texts]  # the mean is over tokens
    assert together == pytest.approx(sum(a * n for a, n in zip(alone, lengths, strict=True)) / sum(lengths), rel=1e-4)


def test_the_first_token_is_learned_after_no_prompt_at_all(tuned: Tunable) -> None:
    """A caption of one word: were its first token not counted, any word would cost what its end does."""
    losses = [[loss_of(tuned, pictures()[place:place + 1], [""], [text]) * tuned.num_tokens(text) for text in COLOURS]
              for place in range(len(COLOURS))]
    spread = torch.tensor(losses).std(dim=1)
    assert (spread > 0.1).all(), spread


def test_what_was_saved_says_the_same(tuned: Tunable, case: str, world_models: Path, tmp_path: Path) -> None:
    tuned.save(tmp_path / "tuned")
    again = open_tunable(config_of(case, world_models), "cpu", tmp_path / "tuned")
    for style in STYLES.values():
        assert say(again, pictures(), style) == say(tuned, pictures(), style)
    assert not [file for file in (tmp_path / "tuned").rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_on_meta_it_has_as_many_parameters(tuned: Tunable, case: str, world_models: Path) -> None:
    bare = open_tunable(config_of(case, world_models), "meta")
    bare.prepare(Finetune(lora={"rank": 8, "language_model": ALL_LAYERS}), WORDS)
    assert all(p.is_meta for p in bare.model.parameters())
    count = sum(p.numel() for p in bare.model.parameters())
    assert count == sum(p.numel() for p in tuned.model.parameters())
    if case != "clipcap-transformer":  # whose GPT-2 was let loose above
        assert {n: p.shape for n, p in bare.trainable().items()} == {n: p.shape for n, p in tuned.trainable().items()}


def test_what_is_frozen_has_no_dropout(tuned: Tunable) -> None:
    tuned.set_training(True)
    frozen = {id(module) for part in tuned.frozen() for module in part.modules()}
    assert all(module.training != (id(module) in frozen) for module in tuned.model.modules() if not len(list(
        module.children())))
    tuned.set_training(False)
    assert not any(module.training for module in tuned.model.modules())


def test_a_style_is_decoded_as_it_asks(tuned: Tunable, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    real = GenerationMixin.generate

    def spy(self: Any, *inputs: Any, **options: Any) -> Any:
        asked.append(options)
        return real(self, *inputs, **options)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    for num_beams in (1, 4):
        style = STYLES["long"].model_copy(update={"num_beams": num_beams, "max_new_tokens": 40})
        assert [caption.text for caption in say(tuned, pictures(), style)] == captions("long")
        assert (asked[-1]["num_beams"], asked[-1]["max_new_tokens"], asked[-1]["do_sample"]) == (num_beams, 40, False)


def test_what_the_prompt_says_may_be_said_again(tuned: Tunable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = NoRepeat.__call__

    def spy(self: NoRepeat, input_ids: Any, scores: Any) -> Any:
        seen.append(input_ids.shape[1] - self.start)
        return real(self, input_ids, scores)

    monkeypatch.setattr(NoRepeat, "__call__", spy)
    say(tuned, pictures()[:1], STYLES["long"].model_copy(update={"no_repeat_ngram_size": 2}))
    assert seen[:3] == [0, 1, 2]  # before the first token of a caption, no token counts
    rule, scores = NoRepeat(1, 2), torch.zeros(1, 9)
    assert torch.isinf(rule(torch.tensor([[3, 4, 5]]), scores)).nonzero()[:, 1].tolist() == [5]


def test_it_captions_in_bfloat16_too(tuned: Tunable, case: str, world_models: Path, tmp_path: Path) -> None:
    tuned.save(tmp_path / "tuned")
    config = config_of(case, world_models).model_copy(update={"dtype": "bfloat16"})
    found = say(open_tunable(config, "cpu", tmp_path / "tuned"), pictures(), STYLES["short"])
    assert [caption.text for caption in found] == captions("short")


# --- their users' own classes --------------------------------------------------------------------------------------


def saved(case: str, tuned_by_case: dict[str, tuple[Tunable, Captioner]], folder: Path) -> Tunable:
    captioner = tuned_by_case[case][0]
    captioner.save(folder)
    return captioner


def test_blip_opens_as_its_users_open_it(tuned_by_case: dict[str, tuple[Tunable, Captioner]], tmp_path: Path) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor
    ours = saved("blip", tuned_by_case, tmp_path / "blip")
    model = BlipForConditionalGeneration.from_pretrained(tmp_path / "blip").eval()
    processor = BlipProcessor.from_pretrained(tmp_path / "blip")
    inputs = processor(images=pictures()[0], text="A short caption:", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
    said = processor.decode(ids, skip_special_tokens=True).replace("a short caption : ", "")
    assert said == say(ours, pictures()[:1], STYLES["short"])[0].text == "red"


def test_a_transformer_opens_as_its_users_open_it(tuned_by_case: dict[str, tuple[Tunable, Captioner]],
                                                  tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel
    saved("transformer", tuned_by_case, tmp_path / "t")
    model = VisionEncoderDecoderModel.from_pretrained(tmp_path / "t").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "t")(pictures()[1], return_tensors="pt").pixel_values
    prompt = [model.config.decoder_start_token_id, *tokenizer("A short caption:")["input_ids"]]
    ids = model.generate(pixels, decoder_input_ids=torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0]
    assert tokenizer.decode(ids[len(prompt):], skip_special_tokens=True).strip() == "green"


def test_clipcap_has_the_names_of_its_authors_code(tuned_by_case: dict[str, tuple[Tunable, Captioner]],
                                                   tmp_path: Path, world_models: Path) -> None:
    """`clip_project.` and `gpt.`, every weight there: their classes load it strictly. And theirs opens here."""
    from safetensors.torch import load_file
    ours = saved("clipcap-mlp", tuned_by_case, tmp_path / "ours")
    state = load_file(tmp_path / "ours" / "model.safetensors")
    mapper = {name for name in state if name.startswith("clip_project.")}
    assert mapper == {f"clip_project.model.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    gpt = GPT2LMHeadModel.from_pretrained(world_models / "gpt2", dtype=torch.float32)
    gpt.load_state_dict({name.removeprefix("gpt."): value for name, value in state.items() if name not in mapper})
    (tmp_path / "theirs").mkdir()
    torch.save(state, tmp_path / "theirs" / "coco_weights.pt")
    theirs = open_tunable(config_of("clipcap-mlp", world_models), "cpu", tmp_path / "theirs")
    assert say(theirs, pictures(), STYLES["long"]) == say(ours, pictures(), STYLES["long"])


def test_a_transformer_mapper_is_read_from_the_shapes_of_its_weights(
        tuned_by_case: dict[str, tuple[Tunable, Captioner]], tmp_path: Path, world_models: Path) -> None:
    ours = saved("clipcap-transformer", tuned_by_case, tmp_path / "ours")
    config = config_of("clipcap-transformer", world_models)
    other = config.model_copy(update={"clipcap": config.clipcap.model_copy(update={"mapper": "mlp", "num_layers": 5,
                                                                                   "prefix_length": 3})})
    again = open_tunable(other, "cpu", tmp_path / "ours")
    assert say(again, pictures(), STYLES["short"]) == say(ours, pictures(), STYLES["short"])


def test_a_transformer_of_pretrained_parts_learns_and_opens_again(world_models: Path, tmp_path: Path) -> None:
    """The encoder of a ViT that classifies has no pooler, which nothing reads."""
    from transformers import AutoTokenizer, ViTConfig, ViTForImageClassification, ViTImageProcessorPil
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                                        intermediate_size=64, patch_size=8)).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    config = Captioner(family="transformer", dtype="float32",
                       transformer={"encoder": str(tmp_path / "vit"), "decoder": str(world_models / "gpt2")})
    captioner = open_tunable(config, "cpu")
    captioner.prepare(Finetune(), [])
    assert len(captioner.text.tokenizer) == len(AutoTokenizer.from_pretrained(world_models / "gpt2"))
    names = set(captioner.trainable())
    assert any("crossattention" in name for name in names) and not any(name.startswith("encoder.") for name in names)
    captioner.save(tmp_path / "tuned")
    again = open_tunable(config, "cpu", tmp_path / "tuned")
    texts = captions("long")
    assert loss_of(again, pictures(), [""] * 4, texts) == loss_of(captioner, pictures(), [""] * 4, texts)


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3}])
def test_an_lstm_that_keeps_its_state_says_what_one_says_that_begins_anew(
        decoding: dict[str, int], tuned_by_case: dict[str, tuple[Tunable, Captioner]]) -> None:
    from recap.captioners.cnn_lstm import LstmCache
    captioner = tuned_by_case["cnn_lstm-attention"][0]
    images = [Image.radial_gradient("L").convert("RGB").rotate(30 * turn) for turn in range(3)] + pictures()
    regions = captioner.encode(captioner.preprocess(images))
    prompt = torch.tensor([captioner.text.prompt_ids("A detailed")]).expand(len(images), -1)
    asked = {"regions": regions, "max_new_tokens": 24, "do_sample": False, "eos_token_id": captioner.text.end,
             "pad_token_id": captioner.text.pad, **decoding}
    with torch.no_grad():
        anew = captioner.model.generate(prompt, **asked)
        assert torch.equal(captioner.model.generate(prompt, past_key_values=LstmCache(), **asked), anew)


def test_a_cnn_with_buffers_that_are_not_saved_opens_again(tmp_path: Path) -> None:
    config = Captioner(family="cnn_lstm", dtype="float32",
                       cnn_lstm={**TINY, "num_layers": 1, "encoder": "resnetblur18"})
    captioner = open_tunable(config, "cpu")
    captioner.prepare(Finetune(), WORDS)
    captioner.save(tmp_path)
    captioner.set_training(False)
    pixels = captioner.preprocess(pictures())
    with torch.no_grad():
        assert torch.equal(open_tunable(config, "cpu", tmp_path).encode(pixels), captioner.encode(pixels))


def test_the_transformer_mapper_reads_the_prompt_and_no_padding(
        tuned_by_case: dict[str, tuple[Tunable, Captioner]]) -> None:
    """GPT-2 is frozen behind it: were the mapper to see the image alone, nothing could learn the styles."""
    captioner = tuned_by_case["clipcap-transformer"][0]
    features = captioner.encode(captioner.preprocess(pictures()[:1])).expand(3, -1)
    asked = ["", STYLES["short"].prompt, STYLES["long"].prompt + STYLES["long"].prompt]
    together = captioner.model.prefix(features, captioner.text.prompts(asked, "cpu"))
    alone = [captioner.model.prefix(features[:1], captioner.text.prompts([prompt], "cpu"))[0] for prompt in asked]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)
    distances = torch.cdist(together.flatten(1), together.flatten(1))
    assert (distances[~torch.eye(3, dtype=torch.bool)] > 0.1).all(), distances


# --- figures to match ----------------------------------------------------------------------------------------------


def test_clipcaps_mappers_have_the_papers_parameters() -> None:
    from recap.captioners.clipcap import Mlp, TransformerMapper

    def count(mapper: torch.nn.Module) -> int:
        return sum(p.numel() for p in mapper.parameters())
    with torch.device("meta"):
        assert count(Mlp(512, 10 * 768)) == 31_468_800
        assert count(TransformerMapper(512, 768, 10, 10, 8, 8)) == 41_745_408
        assert count(TransformerMapper(640, 768, 10, 10, 8, 8)) == 42_728_448  # RN50x4
        assert count(TransformerMapper(512, 768, 40, 40, 8, 8)) == 53_587_968


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text() -> Text:
    tokenizer = learn_vocabulary(["A red circle. A blue ring and a square."] * 3, 400)
    return Text(tokenizer, start=(0,), end=0, pad=1, max_length=40)


def test_a_caption_over_the_limit_is_cut_at_a_sentence_end_else_a_word(text: Text) -> None:
    assert text.fit("A red circle. A blue ring.", 100) == "A red circle. A blue ring."
    limit = len(text.caption_ids("A red circle. A blue")) - 1
    assert text.fit("A red circle. A blue ring.", limit) == "A red circle."
    cut = text.fit("A red circle and a blue ring", limit)
    assert "A red circle and a blue ring".startswith(f"{cut} ")


def test_the_text_of_a_special_token_in_a_caption_ends_nothing(text: Text) -> None:
    end = text.tokenizer.convert_ids_to_tokens(text.end)
    ids = text.caption_ids(f"A red {end} circle. {end}")
    assert ids.count(text.end) == 1 and ids[-1] == text.end
    assert text.read(ids).text == "A red circle."


def test_a_very_long_caption_is_cut_at_once(text: Text) -> None:
    cut = text.fit("Red cats sleep. " * 6000, 50)
    assert cut.endswith("sleep.") and len(text.caption_ids(cut)) - 1 <= 50


def test_a_style_longer_than_the_model_has_positions_for_is_one_clear_line(text: Text) -> None:
    assert text.decoding(Style(prompt="", max_new_tokens=38))["max_new_tokens"] == 38
    with pytest.raises(UserError, match="has positions for 38: lower it"):
        text.decoding(Style(prompt="", max_new_tokens=39))


def test_any_text_makes_a_round_trip_through_a_learned_vocabulary(text: Text) -> None:
    for each in ("a red circle", "Straße, 東京 🎈", "tab\tnewline"):
        ids = text.caption_ids(each)
        assert ids[-1] == text.end and text.tokenizer.decode(ids[:-1]) == f" {each}"


def test_a_learned_vocabulary_is_the_same_each_time() -> None:
    words = ["a red circle", "two rings and a bar", "a red ring"]
    assert learn_vocabulary(words, 300).get_vocab() == learn_vocabulary(iter(words), 300).get_vocab()


# --- one clear line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["no/such/folder", "./nowhere", "someone/not-cached"])
@pytest.mark.parametrize("family", ["blip2", "blip", "transformer", "cnn_lstm", "clipcap"])
def test_a_checkpoint_that_is_not_there_is_one_clear_line(family: str, model: str, world_models: Path) -> None:
    parts = {"clip": str(world_models / "clip-1"), "gpt2": str(world_models / "gpt2")}
    with pytest.raises(UserError, match=r"captioner\.model") as caught:
        open_captioner(Captioner(family=family, model=model, clipcap=parts), "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["blip2", "blip", "transformer", "cnn_lstm"])
def test_a_checkpoint_of_another_class_is_one_clear_line(family: str, world_models: Path) -> None:
    other = world_models / ("blip" if family == "blip2" else "blip2")
    for device in ("cpu", "meta"):
        with pytest.raises(UserError, match=r"^captioner\.model: .* a model of type 'blip(-2)?', and .* is needed"):
            open_tunable(Captioner(family=family, model=str(other)), device)


@pytest.mark.parametrize(("family", "part", "value"), [
    ("clipcap", "clip", "./none"), ("clipcap", "gpt2", "./none"), ("clipcap", "clip", "{models}/blip"),
    ("transformer", "encoder", "./none"), ("transformer", "decoder", "./none"), ("cnn_lstm", "encoder", "./none"),
    ("cnn_lstm", "encoder", "resnet1000"), ("cnn_lstm", "encoder", "{models}/blip")])
def test_a_part_that_is_not_there_is_one_clear_line(family: str, part: str, value: str, world_models: Path) -> None:
    own = {"clipcap": {"clip": str(world_models / "clip-1"), "gpt2": str(world_models / "gpt2")},
           "transformer": {"encoder": "none", **TINY, "num_heads": 4}, "cnn_lstm": {}}[family]
    config = Captioner(family=family, dtype="float32",
                       **{family: {**own, part: value.format(models=world_models)}})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"^captioner\.{family}\.{part}: ") as caught:
        open_tunable(config, "cpu").prepare(Finetune(), WORDS)
    assert "\n" not in str(caught.value)


def test_a_part_can_be_pinned_to_a_revision(tmp_path: Path) -> None:
    assert Part.of("openai-community/gpt2@abc").revision == "abc"
    assert Part.of("openai-community/gpt2").revision == "main"
    (tmp_path / "a@b").mkdir()
    assert Part.of(str(tmp_path / "a@b")).model == str(tmp_path / "a@b")


@pytest.mark.parametrize("family", ["transformer", "cnn_lstm"])
def test_a_captioner_of_parts_cannot_caption_before_it_is_tuned(family: str) -> None:
    config = Captioner(family=family, transformer={"encoder": "none", **TINY, "num_heads": 4},
                       cnn_lstm={"encoder": "resnet10t"})
    with pytest.raises(UserError, match="before it is tuned"):
        open_captioner(config, "cpu").preprocess(pictures())


def test_a_clipcap_of_another_clip_is_one_clear_line(tuned_by_case: dict[str, tuple[Tunable, Captioner]],
                                                     tmp_path: Path, world_models: Path) -> None:
    saved("clipcap-mlp", tuned_by_case, tmp_path / "ours")
    (tmp_path / "ours" / "clipcap.json").write_text(json.dumps({"clip": "0123"}))
    with pytest.raises(UserError, match="of another CLIP"):
        open_tunable(config_of("clipcap-mlp", world_models), "cpu", tmp_path / "ours")


def test_a_damaged_clipcap_is_one_clear_line(tuned_by_case: dict[str, tuple[Tunable, Captioner]], tmp_path: Path,
                                             world_models: Path) -> None:
    saved("clipcap-mlp", tuned_by_case, tmp_path / "ours")
    whole = (tmp_path / "ours" / "model.safetensors").read_bytes()
    (tmp_path / "ours" / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(UserError, match="cannot read a ClipCap"):
        open_tunable(config_of("clipcap-mlp", world_models), "cpu", tmp_path / "ours")


@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", "list"])
def test_a_pt_that_holds_no_clipcap_is_one_clear_line(content: bytes | str, tmp_path: Path, world_models: Path) -> None:
    if content == "list":
        torch.save([torch.zeros(2)], tmp_path / "x.pt")
    else:
        (tmp_path / "x.pt").write_bytes(content)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot read a ClipCap in"):
        open_tunable(config_of("clipcap-mlp", world_models), "cpu", tmp_path)


@pytest.mark.parametrize("changes", [{"encoder": "hf-hub:someone/else"}, {"encoder_args": {"pretrained": True}},
                                     {"encoder_args": {"checkpoint_path": "/etc/passwd"}}])
def test_a_cnn_lstm_that_would_fetch_weights_from_elsewhere_is_refused(
        changes: dict[str, Any], tuned_by_case: dict[str, tuple[Tunable, Captioner]], tmp_path: Path,
        world_models: Path) -> None:
    saved("cnn_lstm", tuned_by_case, tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**record, **changes}))
    with pytest.raises(UserError, match=r"is no architecture of timm's"):
        open_tunable(config_of("cnn_lstm", world_models), "cpu", tmp_path)


def test_nobody_is_asked_whether_to_run_a_tokenizers_own_code(world_models: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(_: str = "") -> str:
        raise AssertionError("asked")
    monkeypatch.setattr("builtins.input", ask)
    shutil.copytree(world_models / "gpt2", tmp_path / "gpt2")
    record = json.loads((tmp_path / "gpt2" / "tokenizer_config.json").read_text())
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text(json.dumps({
        **record, "tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["someone/else--odd.Odd", None]}}))
    config = config_of("clipcap-mlp", world_models)
    captioner = open_tunable(config.model_copy(update={"clipcap": config.clipcap.model_copy(
        update={"gpt2": str(tmp_path / "gpt2")})}), "cpu")
    assert type(captioner.text.tokenizer).__module__.startswith("transformers.")


def test_a_served_captioner_takes_no_adapter() -> None:
    from recap.config import validate
    with pytest.raises(UserError, match="have the server serve it"):
        validate({"family": "vlm", "server": "http://127.0.0.1:1/v1", "tuned": "adapter"}, Captioner, "file")


def test_an_unknown_family_is_one_clear_line() -> None:
    from recap.config import validate
    with pytest.raises(UserError, match=r"no captioner family 'blop2': did you mean blip2\?"):
        validate({"family": "blop2"}, Captioner, "file")


def test_quantization_without_cuda_is_one_clear_line(world_models: Path) -> None:
    with pytest.raises(UserError, match="runs on CUDA, not on cpu"):
        open_tunable(Captioner(model=str(world_models / "blip2"), quantization="4bit"), "cpu")
