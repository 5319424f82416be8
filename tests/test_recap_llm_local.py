"""A chat model that is opened here, or served by transformers: a tiny one that has learned to answer."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recap_captioners_served import is_up
from test_recap_llm_server import STYLES, scene
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recap import look
from recap.config import Data
from recap.config.stitch import Llm, Stitch
from recap.errors import UserError
from recap.llm.local import LocalWriter
from recap.llm.prompt import DEFAULT, read_prompt, shown
from recap.llm.server import ServerWriter
from recap.rundir import StageDir
from recap.shards import read_shard
from recap.stitch import run

TEMPLATE = ("{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
SPECIAL = ["<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
SAID = {"short": "An animal.", "long": "An animal stands in the middle of the picture.",
        "rich": "An animal stands in the middle of the picture, and there is nothing else to be seen in it."}


def write_chat_model(folder: Path) -> Path:
    """A small Llama that has learned to answer every request alike; some it answers badly."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([DEFAULT.read_text(), json.dumps(SAID)] * 4, vocab_size=900, special_tokens=SPECIAL,
                            show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, chat_template=TEMPLATE,
                                        additional_special_tokens=SPECIAL[2:])
    tokenizer.pad_token, tokenizer.eos_token = SPECIAL[:2]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=1, pad_token_id=0))
    instructions = read_prompt(Llm(), STYLES)
    answer = tokenizer(json.dumps(SAID) + "<|end|>", add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    known = 0  # requests in a row that it would have answered right before it learned from them
    for step in range(1000):  # some 150 are enough, more on one processor than on another
        told = instructions[-100 - 40 * step:]
        asked = f"<|system|>{told}<|end|><|user|><facts>\n{shown(scene(7 * step % 100))}\n</facts><|end|><|assistant|>"
        ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
        row = torch.tensor([ids + answer])
        labels = torch.tensor([[-100] * len(ids) + answer])
        out = model(input_ids=row, labels=labels)
        known = known + 1 if out.logits[0, len(ids) - 1:-1].argmax(-1).tolist() == answer else 0
        if known == 30:
            break
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    else:
        pytest.fail("the chat model has not learned its answer")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model")


def writer_of(folder: Path, out: Path, **settings: Any) -> LocalWriter:
    config = Llm(model=str(folder), dtype="float32", **({"max_tokens": 160} | settings))
    return LocalWriter(config, STYLES, out / "answers.sqlite", "cpu")


# --- opened here ---------------------------------------------------------------------------------------------------


def test_it_writes_captions_and_what_it_wrote_is_kept(chat_model: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [scene(index) for index in range(10)]
    writer = writer_of(chat_model, tmp_path, batch_size=4)
    took = writer.prepare(scenes, 10)
    found = [writer.write(each) for each in scenes]
    assert sum(each.captions == SAID for each in found) >= 8
    assert all(each.flags[:1] in ([], ["rewritten"], ["template"]) for each in found)
    assert took["requests"] >= 10 and took["prompt_tokens"] > 1000 and took["cost"] == 0
    monkeypatch.setattr("recap.llm.local.load_model", lambda *_: pytest.fail("opened"))
    again = writer_of(chat_model, tmp_path, batch_size=4)
    assert again.prepare(scenes, 10) == took
    assert [again.write(each) for each in scenes] == found


def test_an_answer_is_that_of_the_stock_generate_whatever_is_beside_it(chat_model: Path, tmp_path: Path) -> None:
    writer = writer_of(chat_model, tmp_path)
    bodies = [writer.replay(scene(index))[0][0][0] for index in (0, 11, 25)]
    together = writer._answer(bodies)
    model = LlamaForCausalLM.from_pretrained(chat_model).eval()
    for body, answer in zip(bodies, together, strict=True):
        assert writer._answer([body]) == [answer]
        ids = writer.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_tensors="pt",
                                                   return_dict=True)
        out = model.generate(**ids, max_new_tokens=160, do_sample=False)[0, ids["input_ids"].shape[1]:]
        assert answer.text == writer.tokenizer.decode(out, skip_special_tokens=True)
        assert answer.prompt_tokens == ids["input_ids"].shape[1]


def test_an_answer_that_does_not_end_is_said_to_be_cut(chat_model: Path, tmp_path: Path) -> None:
    writer = writer_of(chat_model, tmp_path, max_tokens=9)
    writer.prepare([scene(0)], 1)
    assert writer.write(scene(0)).flags == ["template", "not_ended"]


def test_another_model_is_asked_anew(chat_model: Path, tmp_path: Path) -> None:
    shutil.copytree(chat_model, tmp_path / "other")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "other")
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "other")
    first, second = writer_of(chat_model, tmp_path), writer_of(tmp_path / "other", tmp_path)
    first.prepare([scene(0)], 1)
    second.prepare([scene(0)], 1)
    assert first.write(scene(0)) != second.write(scene(0))


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": 0.7}, "decodes greedily"), ({"options": {"seed": 1}}, "decodes greedily"),
    ({"model": "/no/such/model"}, r"stitch\.llm\.model: no folder")])
def test_what_cannot_be_done_here_is_one_clear_line(chat_model: Path, tmp_path: Path, settings: dict[str, Any],
                                                    message: str) -> None:
    with pytest.raises(UserError, match=message):
        LocalWriter(Llm(**({"model": str(chat_model)} | settings)), STYLES, tmp_path / "answers.sqlite", "cpu")


def test_a_model_without_a_chat_template_is_one_clear_line(chat_model: Path, tmp_path: Path) -> None:
    shutil.copytree(chat_model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"stitch\.llm\.model: .* has no chat template"):
        writer_of(tmp_path / "model", tmp_path).prepare([scene(0)], 1)


# --- served --------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(chat_model: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a `transformers serve` that has the model."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("transformers"), "serve", str(chat_model), "--host", "127.0.0.1", "--port",
             str(port), "--device", "cpu", "--dtype", "float32"],
            env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while not is_up(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"transformers serve did not start: {(tmp_path / 'log').read_text()[-2000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.full
def test_what_transformers_serves_is_what_the_model_says_here(served: str, chat_model: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    scenes = [scene(index) for index in range(6)]
    there = ServerWriter(Llm(model=str(chat_model), server=served, max_tokens=160, concurrency=2), STYLES,
                         tmp_path / "there.sqlite")
    there.prepare(scenes, 6)
    here = writer_of(chat_model, tmp_path)
    here.prepare(scenes, 6)
    assert [there.write(each) for each in scenes] == [here.write(each) for each in scenes]


@pytest.mark.full
def test_of_real_photos_none_is_lost(served: str, chat_model: Path, tmp_path: Path, shared_data: Path,
                                     world_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    shard = str(shared_data / "photos" / "archive-00000.tar")
    config = Stitch(num_images=24, experts=["alt_text"], writer="llm",
                    llm=Llm(model=str(chat_model), server=served, max_tokens=160, concurrency=4))
    facts = StageDir(tmp_path / "facts", {})
    facts.begin()
    look.run(facts, "alt_text", None, [shard], config, Data(), "cpu")
    stage = StageDir(tmp_path / "stitch", {})
    stage.begin()
    result = run(stage, [shard], config, STYLES, {"alt_text": facts.path}, tmp_path / "answers.sqlite", "cpu")
    assert result["images_in"] == result["images_out"] + sum(result["quarantined"].values())
    assert len(list(read_shard(str(tmp_path / "stitch" / "archive-00000.tar"), []))) == result["images_out"] == 24
