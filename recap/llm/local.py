"""Captions by a chat model of transformers that is opened here: greedy, in batches, each answer kept at once."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from recap import progress
from recap.config.stitch import Llm
from recap.errors import UserError
from recap.llm import Scene
from recap.llm.answers import Answer, Body, key_of
from recap.llm.chat import ChatWriter
from recap.llm.meter import Meter
from recap.pretrained import find_local, load_model, load_pretrained
from recap.rundir import hash_files

WHERE = "stitch.llm"


class LocalWriter(ChatWriter):
    """Captions by `AutoModelForCausalLM` with its chat template. No code that a checkpoint brings along is run."""

    def __init__(self, config: Llm, styles: Iterable[str], answers: Path, device: str) -> None:
        if config.temperature or config.options:
            raise UserError(f"{WHERE}: a model opened here decodes greedily: leave temperature and options out, "
                            "or name a server")
        local = find_local(config, WHERE)
        super().__init__(config, styles, answers, {
            "model": config.model, "revision": f"sha256:{hash_files(local)}" if local else config.revision,
            "dtype": config.dtype, "quantization": config.quantization})
        self.device = device

    @cached_property
    def model(self) -> Any:
        """Opened when something is to be asked."""
        logging.disable_progress_bar()
        model = load_model(AutoModelForCausalLM, self.config, self.device, WHERE).eval()
        ends = model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]
        model.generation_config = GenerationConfig(  # the checkpoint's own would sample
            eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_token_id, do_sample=False)
        return model

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_pretrained(AutoTokenizer.from_pretrained, self.config, WHERE, trust_remote_code=False,
                                    padding_side="left")
        if tokenizer.chat_template is None:
            raise UserError(f"{WHERE}.model: {self.config.model} has no chat template: name a chat model")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def prepare(self, scenes: Iterable[Scene], total: int) -> dict[str, Any]:
        """Ask for all that has not been answered yet."""
        meter = Meter(self.config)
        with progress.bar("write", total) as bar:
            for some in _batches(scenes, self.config.batch_size):
                while missing := {key_of(body): body for scene in some for body in self._missing(scene)}:
                    for key, answer in zip(missing, self._answer(list(missing.values())), strict=True):
                        self.answers.put(key, answer)
                for scene in some:
                    for body, answered in self.replay(scene)[0]:
                        meter.count(body, answered, 1)
                bar.update(len(some))
        return meter.result()

    def _missing(self, scene: Scene) -> list[Body]:
        return [body for body, answer in self.replay(scene)[0] if answer is None]

    @torch.no_grad()
    def _answer(self, bodies: list[Body]) -> list[Answer]:
        model, prompts = self.model, [self._prompt(body) for body in bodies]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        length = inputs["input_ids"].shape[1]
        out = model.generate(input_ids=inputs["input_ids"].to(self.device),
                             attention_mask=inputs["attention_mask"].to(self.device),
                             max_new_tokens=self.config.max_tokens)[:, length:].tolist()
        sizes = inputs["attention_mask"].sum(dim=1).tolist()
        return [self._read(ids, size) for ids, size in zip(out, sizes, strict=True)]

    def _prompt(self, body: Body) -> str:
        messages = body["messages"]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError:  # some know no system's turn
            joined = "\n\n".join(message["content"] for message in messages)
            one = [{"role": "user", "content": joined}]
            return str(self.tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True))

    def _read(self, ids: list[int], prompt_tokens: int) -> Answer:
        """New tokens up to the first that ends an answer."""
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        said = ids if end is None else ids[:end]
        return Answer(self.tokenizer.decode(said, skip_special_tokens=True), "length" if end is None else "stop",
                      prompt_tokens, len(said) + (end is not None))


def _batches(scenes: Iterable[Scene], size: int) -> Iterator[list[Scene]]:
    rest = iter(scenes)
    while some := list(islice(rest, size)):
        yield some
