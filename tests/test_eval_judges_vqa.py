"""Answers' probabilities are those of the stock classes' forward pass; the picture matters, the neighbours don't."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from test_recap_captioners_vlm import write
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

from eval.config import Vqa
from eval.judge import judge_images
from eval.judges.vqa import VqaJudge, check, fill
from eval.judges.vqa_models import Asked, BlipAnswerer, ChatAnswerer, open_answerer, share
from eval.prompts import Prompt
from recap import progress
from recap.captioners.vocabulary import learn_vocabulary
from recap.errors import UserError
from recap.shards import read_shard
from recap.world.base import unpack

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230)}
TEXTS = ["Yes No yes no", "Does this figure show", "Please answer yes or no.", "Question: Choices: Answer:", *COLOURS]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "initializer_range": 0.5}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
OPT = {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2,
       "num_attention_heads": 2, "max_position_embeddings": 200, "init_std": 0.3}
LLAMA = {**SMALL, "model_type": "llama", "max_position_embeddings": 200}
BLIPS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "blip2-opt": (Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, OPT),
    "blip2-t5": (Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, T5),
    "instructblip-llama": (InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipProcessor, LLAMA),
    "instructblip-t5": (InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipProcessor, T5),
}
CHATS = ["llava", "qwen", "florence", "paligemma"]
ANSWERS = ("Yes", "No", "a long green answer", "a long blue answer", "a")
QUESTION = 'Does this figure show "red"? Please answer yes or no.'


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", size, colour)
            for size, colour in zip([(70, 50), (40, 90), (64, 64)], COLOURS.values(), strict=True)]


def blip(name: str, folder: Path) -> Path:
    """A checkpoint folder of BLIP-2 or InstructBLIP, with random weights."""
    configuration, kind, processors, language = BLIPS[name]
    tokenizer = learn_vocabulary(TEXTS * 5, 400)
    parts = [BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer]
    if kind is InstructBlipForConditionalGeneration:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "does", "this", "figure", "show", "?", *COLOURS]
        parts.append(BertTokenizer(vocab={word: place for place, word in enumerate(words)}))
    processor = processors(*parts, 4)
    start, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = {"bos_token_id": start, "eos_token_id": start, "pad_token_id": pad, "decoder_start_token_id": pad}
    torch.manual_seed(0)
    model = kind(configuration(
        vision_config={**SMALL, "image_size": 32, "patch_size": 8}, num_query_tokens=4,
        qformer_config={**SMALL, "encoder_hidden_size": 32, "cross_attention_frequency": 1, "vocab_size": 40,
                        "max_position_embeddings": 60},
        text_config={**language, **ids, "vocab_size": len(processor.tokenizer)},
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>")))
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name → checkpoint of each class."""
    root = tmp_path_factory.mktemp("vqa")
    return {name: blip(name, root / name) for name in BLIPS} | {name: write(name, root / name) for name in CHATS}


def table(folder: Path, **more: Any) -> Vqa:
    return Vqa(model=str(folder), **{"dtype": "float32", **more})


def likelihoods(folder: Path, images: list[Image.Image], asked: list[Asked], **more: Any) -> list[list[float]]:
    found = open_answerer(table(folder, **more), "cpu").log_probs(images, asked)
    return [[math.exp(sum(tokens)) for tokens in each] for each in found]


# --- against the stock classes -------------------------------------------------------------------------------------


def stock_blip(model: Any, processor: Any, image: Image.Image, answer: str) -> float:
    """The same by the stock processor, which puts placeholders before the text, and one forward pass."""
    inputs = dict(processor(images=image, text=QUESTION, return_tensors="pt"))
    decoder_only = model.config.use_decoder_only_language_model
    if not decoder_only:  # learn_vocabulary's tokenizer adds no end, as T5's own does
        inputs = longer(inputs, [processor.tokenizer.eos_token_id])
    else:  # nor a beginning, as OPT's and Llama's do
        inputs = begun(inputs, model.config.num_query_tokens, processor.tokenizer.bos_token_id)
    ids = processor.tokenizer(f" {answer}" if decoder_only else answer, add_special_tokens=False)["input_ids"]
    if decoder_only:
        inputs = longer(inputs, ids[:-1])
    else:
        inputs["decoder_input_ids"] = torch.tensor([[model.config.text_config.decoder_start_token_id, *ids[:-1]]])
    return told(model, inputs, ids)


def longer(inputs: dict[str, torch.Tensor], ids: list[int]) -> dict[str, torch.Tensor]:
    return inputs | {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.long)], 1),
                     "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + len(ids), dtype=torch.long)}


def begun(inputs: dict[str, torch.Tensor], place: int, token: int) -> dict[str, torch.Tensor]:
    ids = inputs["input_ids"][0].tolist()
    return inputs | {"input_ids": torch.tensor([[*ids[:place], token, *ids[place:]]]),
                     "attention_mask": torch.ones(1, len(ids) + 1, dtype=torch.long)}


@torch.no_grad()
def told(model: Any, inputs: dict[str, torch.Tensor], ids: list[int]) -> float:
    shares = model(**inputs).logits[0, -len(ids):].softmax(-1)
    return float(torch.stack([shares[place, token] for place, token in enumerate(ids)]).prod())


@pytest.mark.parametrize("name", BLIPS)
def test_probabilities_are_those_of_a_direct_forward_pass(folders: dict[str, Path], name: str) -> None:
    _, kind, processors, _ = BLIPS[name]
    image = pictures()[0]
    found, = likelihoods(folders[name], [image], [Asked(0, QUESTION, ANSWERS)])
    model, processor = kind.from_pretrained(folders[name]).eval(), processors.from_pretrained(folders[name])
    direct = [stock_blip(model, processor, image, answer) for answer in ANSWERS]
    assert found == pytest.approx(direct, rel=1e-4, abs=1e-9)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", CHATS)
def test_probabilities_of_a_chat_model_are_those_of_a_direct_forward_pass(folders: dict[str, Path], name: str) -> None:
    image = pictures()[2]
    model = AutoModelForImageTextToText.from_pretrained(folders[name]).eval()
    processor = AutoProcessor.from_pretrained(folders[name])
    answerer = opened_chat(folders[name])
    prompt = answerer.conversation.chat.ask(QUESTION)
    direct = []
    for answer in ANSWERS:
        inputs = dict(processor(text=[prompt], images=[[image]], return_tensors="pt"))
        inputs.pop("labels", None)  # PaliGemma's processor makes some
        ids = answerer.tokens(QUESTION, answer)
        assert processor.tokenizer.decode(ids).strip() == answer
        if answerer.conversation.is_seq2seq:
            inputs["decoder_input_ids"] = torch.tensor([[*answerer.text.start, *ids[:-1]]])
        else:
            types = {key: torch.nn.functional.pad(inputs[key], (0, len(ids) - 1), value=int(name == "paligemma"))
                     for key in ("token_type_ids", "mm_token_type_ids") if key in inputs}
            inputs = longer(inputs, ids[:-1]) | types
        direct.append(told(model, inputs, ids))
    found, = answerer.log_probs([image], [Asked(0, QUESTION, ANSWERS)])
    assert [math.exp(sum(tokens)) for tokens in found] == pytest.approx(direct, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", [*BLIPS, *CHATS])
def test_another_picture_has_other_probabilities(folders: dict[str, Path], name: str) -> None:
    asked = [Asked(place, QUESTION, ("Yes",)) for place in range(3)]
    found = [each[0] for each in likelihoods(folders[name], pictures(), asked)]
    swapped = [each[0] for each in likelihoods(folders[name], pictures()[::-1], asked)]
    assert swapped == pytest.approx(found[::-1], abs=1e-6)
    assert min(abs(found[one] - found[other]) / found[one] for one, other in ((0, 1), (0, 2), (1, 2))) > 1e-4


@pytest.mark.parametrize("name", [*BLIPS, *CHATS])
def test_a_probability_does_not_depend_on_the_batch(folders: dict[str, Path], name: str) -> None:
    """Padding included: questions and answers of several lengths."""
    asked = [Asked(place, question, answers) for place in range(3)
             for question, answers in ((QUESTION, ANSWERS[:2]), ("red?", ANSWERS), (f"{QUESTION} Or no.", ANSWERS[2:]))]
    together = likelihoods(folders[name], pictures(), asked, batch_size=50)
    answerer = open_answerer(table(folders[name], batch_size=1), "cpu")
    for each, found in zip(asked, together, strict=True):
        image = pictures()[each.image]
        for answer, value in zip(each.answers, found, strict=True):
            (tokens,), = answerer.log_probs([image], [Asked(0, each.question, (answer,))])
            alone = math.exp(sum(tokens))
            assert abs(value - alone) < min(1e-5, 1e-4 * alone)  # random weights find every answer unlikely


def test_a_probability_is_a_share_of_the_whole_vocabulary(folders: dict[str, Path]) -> None:
    answerer = open_answerer(table(folders["blip2-opt"]), "cpu")
    found = answerer.log_probs(pictures()[:1], [Asked(0, QUESTION, ("Yes", "No"))])[0]
    assert [len(tokens) for tokens in found] == [1, 1]
    assert 0 < sum(math.exp(tokens[0]) for tokens in found) < 1  # not only of the two


def test_answers_that_begin_alike_are_read_together() -> None:
    assert share([[1], [2], [3, 4], [3, 5], [3, 4, 6]]) == {(3, 4): [4, 2, 3, 0, 1]}
    assert share([[1], [2]]) == {(): [0, 1]}
    assert share([[1, 2], [3, 4]]) == {(1,): [0], (3,): [1]}


def test_what_a_template_puts_behind_an_answer_is_no_part_of_it(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write("qwen", tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n{% endfor %}", " .<|im_end|>\n{% endfor %}"))
    assert "." in opened_chat(folder).conversation.text.close
    assert opened_chat(folder).tokens(QUESTION, "Yes") == opened_chat(folders["qwen"]).tokens(QUESTION, "Yes")


def opened_chat(folder: Path) -> ChatAnswerer:
    answerer = open_answerer(table(folder), "cpu")
    assert isinstance(answerer, ChatAnswerer)
    return answerer


def test_special_tokens_in_a_prompt_are_no_special_tokens(folders: dict[str, Path]) -> None:
    for name, special in (("blip2-opt", "<|endoftext|>"), ("instructblip-t5", "<|endoftext|>"), ("llava", "</s>")):
        odd, plain = likelihoods(folders[name], pictures()[:1], [
            Asked(0, f"red{special}<image>?", ("Yes",)), Asked(0, "red  ?", ("Yes",))])
        assert odd == pytest.approx(plain, rel=1e-4)


def test_a_question_beyond_the_models_positions_is_one_line(folders: dict[str, Path]) -> None:
    for name in ("blip2-opt", "instructblip-llama", "florence"):
        with pytest.raises(UserError, match=r"^evaluate\.vqa: \d+ tokens of .* has positions for \d+: shorten"):
            likelihoods(folders[name], pictures()[:1], [Asked(0, "red " * 300, ("Yes",))])


def test_a_q_former_reads_what_it_has_positions_for(folders: dict[str, Path],
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    progress.warn.cache_clear()
    asked = [Asked(0, "red " * count, ("yes",)) for count in (10, 100)]
    assert all(each[0] > 0 for each in likelihoods(folders["instructblip-t5"], pictures()[:1], asked))
    assert "reads 60 tokens of a longer question" in capsys.readouterr().err


def test_an_answer_without_tokens_is_one_line(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"^evaluate\.vqa: no tokens are left of the answer ''"):
        likelihoods(folders["blip2-t5"], pictures()[:1], [Asked(0, "red?", ("yes", ""))])


# --- the judge -----------------------------------------------------------------------------------------------------


def opened(folder: Path, **more: Any) -> VqaJudge:
    return VqaJudge.open(table(folder, **more), "cpu")


CHOICES = ("red", "blue", "blue red", "yes yes yes")
ABOUT_COLOURS = ("what colour is it?", "what colour is it not?", "yes or no?", "red or blue?")


def tifa(path: Path, **answers: str) -> Path:
    """Questions about each prompt."""
    rows = [{"id": f"p{place}", "caption": prompt, "question": question, "choices": CHOICES, "answer": answer,
             "element_type": "color"} for place, (prompt, answer) in enumerate(answers.items())
            for question in ABOUT_COLOURS]
    path.write_text(json.dumps(rows))
    return path


def dsg(path: Path, *dependencies: str) -> Path:
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item_id", "text", "tuple", "proposition_id", "dependency", "question_natural_language"])
        rows.writerows(["item", "a red field", "", number, dependency, f"Is it {number}?"]
                       for number, dependency in enumerate(dependencies, 1))
    return path


def test_vqa_score_is_the_probability_of_yes(folders: dict[str, Path]) -> None:
    prompts = [Prompt(f"a {{text}} {name} field") for name in COLOURS]  # a prompt's own braces stay
    for name, yes, more in (("blip2-t5", "Yes", {}), ("instructblip-t5", "yes", {}),
                            ("blip2-opt", "a green answer", {"yes": "a green answer"})):
        judge = opened(folders[name], **more)
        found = judge_images(judge, pictures(), prompts)
        asked = [Asked(place, f'Does this figure show "{prompt.text}"? Please answer yes or no.', (yes,))
                 for place, prompt in enumerate(prompts)]
        assert list(judge.metrics) == ["vqa_score"]
        assert [each["vqa_score"] for each in found] == pytest.approx(
            [each[0] for each in likelihoods(folders[name], pictures(), asked)])


def test_a_question_of_tifa_is_answered_by_the_likeliest_choice(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, prompts = folders["blip2-opt"], [Prompt("a field"), Prompt("a wall")]
    answerer = open_answerer(table(folder), "cpu")
    shares = {}
    for answer in CHOICES:
        judge = opened(folder, questions=str(tifa(tmp_path / "q.json", **{"a field": answer})))
        (found, nothing) = judge.images(pictures()[:2], prompts)
        assert nothing["tifa"] is None and nothing["vqa_score"] is not None
        shares[answer] = found["tifa"]
    asked = [Asked(0, f"Question: {question} Choices: {', '.join(CHOICES)}. Answer:", CHOICES)
             for question in ABOUT_COLOURS]
    likely = [dict(zip(CHOICES, each, strict=True)) for each in answerer.log_probs(pictures()[:1], asked)]
    best = [max(each, key=lambda name: sum(each[name]) / len(each[name])) for each in likely]
    assert shares == {answer: best.count(answer) / len(ABOUT_COLOURS) for answer in CHOICES}
    assert best != [max(each, key=lambda name: sum(each[name])) for each in likely]  # which favours what is short


def test_a_question_of_dsg_is_answered_by_yes_and_so_are_those_it_depends_on(folders: dict[str, Path],
                                                                             tmp_path: Path) -> None:
    folder, image = folders["blip2-t5"], pictures()[:1]
    likely = {number: likelihoods(folder, image, [Asked(0, f"Is it {number}?", ("Yes", "No"))])[0]
              for number in range(1, 5)}
    yes = {number: found[0] / sum(found) > 0.5 for number, found in likely.items()}
    for dependencies in (("0", "0", "0", "0"), ("0", "1", "1,2", "3"), ("4", "4", "4", "0")):
        judge = opened(folder, questions=str(dsg(tmp_path / "q.csv", *dependencies)), question_template="{question}")
        found, = judge.images(image, [Prompt("a  red field")])
        right = [yes[number] and all(yes[int(parent)] for parent in each.split(",") if parent != "0")
                 for number, each in enumerate(dependencies, 1)]
        assert found["dsg"] == pytest.approx(sum(right) / 4)
    # Whichever the model likes better: the other way round, what was wrong is right.
    other = opened(folder, questions=str(dsg(tmp_path / "q.csv", "0", "0", "0", "0")), question_template="{question}",
                   yes="No", no="Yes")
    assert other.images(image, [Prompt("a red field")])[0]["dsg"] == pytest.approx(1 - sum(yes.values()) / 4)


def test_prompts_without_questions_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress.warn.cache_clear()
    table = Vqa(questions=str(tifa(tmp_path / "q.json", **{"a field": "red"})))
    check(table, [Prompt("a field"), Prompt("a wall"), Prompt("a door")])
    said = capsys.readouterr().err
    assert "evaluate.vqa.questions" in said and "asks nothing about 2 of 3 prompts, 'a wall' first" in said
    check(Vqa(), [Prompt("a wall")])
    (tmp_path / "q.json").write_text("[]")
    with pytest.raises(UserError, match=r"q\.json"):
        check(table, [Prompt("a field")])


def test_the_name_says_all_that_a_score_depends_on(folders: dict[str, Path], tmp_path: Path) -> None:
    name = opened(folders["blip2-t5"], questions=str(tifa(tmp_path / "q.json", a="red"))).name
    assert re.fullmatch(r"blip2-t5@\w{16} float32, P\('Yes'\) to 'Does this figure show \"\{text\}\"\? .*'; "
                        r"q\.json@\w{16} as 'Question: .*': the choice of the highest mean log-likelihood, nothing "
                        r"generated", name)
    assert name != opened(folders["blip2-t5"], questions=str(tifa(tmp_path / "q.json", a="blue"))).name
    assert opened(folders["blip2-t5"]).name == name.partition(";")[0]
    assert opened(folders["instructblip-t5"]).name.startswith("instructblip-t5@")


def test_texts_go_to_their_places_and_nowhere_else() -> None:
    assert fill("{question} ({choices})", question="{choices}?", choices="{question}") == "{choices}? ({question})"
    assert fill("{{text}} {other}", text="a") == "{a} {other}"


@pytest.mark.parametrize("more", [{"template": "Is it so?"}, {"question_template": "{choices}"}, {"yes": " "}])
def test_a_template_without_its_place_is_refused(more: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Vqa(**more)


# --- opening -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^evaluate\.vqa\.model: no folder at"):
        opened(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=r"^evaluate\.vqa\.model: cannot load"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"^evaluate\.vqa\.questions: no file at"):
        opened(tmp_path / "nothing", questions=str(tmp_path / "q.json"))


def test_pickled_weights_and_a_checkpoints_own_code_are_not_opened(folders: dict[str, Path], tmp_path: Path) -> None:
    blip("blip2-t5", tmp_path)
    weights = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match=r"^evaluate\.vqa\.model: cannot load"):
        opened(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    (tmp_path / "config.json").write_text(json.dumps(
        config | {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForImageTextToText": "evil.M"}}))
    with pytest.raises(UserError, match=r"^evaluate\.vqa\.model: cannot load"):
        opened(tmp_path)


def test_bfloat16_is_near_float32(folders: dict[str, Path]) -> None:
    for name in ("blip2-t5", "instructblip-llama", "llava"):
        asked = [Asked(0, "red?", ("Yes",))]
        (exact,), = likelihoods(folders[name], pictures()[:1], asked)
        (found,), = likelihoods(folders[name], pictures()[:1], asked, dtype="bfloat16")
        assert found == pytest.approx(exact, rel=0.5)


# --- what it means -------------------------------------------------------------------------------------------------


def test_a_model_that_learned_yes_and_no_tells_pictures_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    answerer, template = open_answerer(table(folders["blip2-opt"]), "cpu"), Vqa().template
    assert isinstance(answerer, BlipAnswerer)
    captioner = answerer.captioner
    captioner.base.requires_grad_(True)
    captioner.encoder_is_trained = True
    pairs = [(image, fill(template, text=text), "Yes" if text == name else "No")
             for name, image in zip(COLOURS, pictures(), strict=True) for text in COLOURS]
    pixels = captioner.preprocess([image for image, _, _ in pairs])
    optimizer = torch.optim.AdamW(captioner.base.parameters(), lr=5e-3)
    for _ in range(100):
        loss = captioner.loss(captioner.encode(pixels), [each[1] for each in pairs], [each[2] for each in pairs])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    captioner.base.save_pretrained(tmp_path)
    captioner.processor.save_pretrained(tmp_path)
    judge = opened(tmp_path)
    found = {text: [each["vqa_score"] for each in judge.images(pictures(), [Prompt(text)] * 3)] for text in COLOURS}
    for place, text in enumerate(COLOURS):
        assert [round(value or 0) for value in found[text]] == [int(place == other) for other in range(3)]


def test_the_worlds_trained_captioner_judges_photos(tmp_path: Path, shared_data: Path) -> None:
    """It never learned to answer, so only that it is asked can be shown."""
    unpack("blip2", tmp_path / "blip2")
    samples = [*read_shard(str(shared_data / "photos" / "coco-open-00000.tar"), [])][:4]
    odd = [Image.new("RGB", (1, 1), "red"), Image.new("RGB", (2000, 10), "blue")]
    images = [sample.image() for sample in samples] + odd
    found = opened(tmp_path / "blip2").images(images, [Prompt("a photo of a dog " * 10)] * len(images))
    scores = [each["vqa_score"] for each in found]
    assert all(score is not None and 0 < score < 1 for score in scores) and len(set(scores)) == len(scores)
