"""How a chat model is asked for captions, and what is made of its answers: what is bad is asked for once more.

An image's captions are a dialogue: requests are yielded, answers are sent in, and in the end the captions are returned.
Who sends the requests, and when, is no matter of the dialogue: see `server.py`, `local.py`, `batch.py`.
"""

import hashlib
import json
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from recap.config.stitch import Llm
from recap.facts import Facts
from recap.filters import PROBLEMS, problems, ungrounded
from recap.llm import Scene, Written
from recap.llm.answers import Answer, Answers, Body, key_of
from recap.llm.prompt import read_prompt, shown
from recap.llm.template import TemplateWriter
from recap.sample import visible

NUM_TRIES = 2
MAX_BRACES = 32
"""Places of an answer where an object is looked for."""
UNREADABLE = {
    "unanswered": "it was not answered",
    "not_json": "it was not one JSON object with a caption under each key",
    "not_ended": "it did not end within the limit on its length",
}

Dialogue = Generator[Body, Answer | None, Written]


class ChatWriter:
    """Captions by a chat model, checked; where two tries are bad, by the template."""

    def __init__(self, config: Llm, styles: Iterable[str], answers: Path, identity: dict[str, str]) -> None:
        """Identity is what a request names the model by, and what its answers depend on besides."""
        self.config, self.styles, self.identity = config, list(styles), identity
        self.answers = Answers(answers)
        self.template = TemplateWriter(self.styles)
        self.instructions = read_prompt(config, self.styles)
        self.provenance: dict[str, Any] = {"name": "llm", **identity, "prompt": f"sha256:{_hash(self.instructions)}",
                                           "temperature": config.temperature, "max_tokens": config.max_tokens,
                                           "options": config.options}

    def dialogue(self, scene: Scene) -> Dialogue:
        """Ask for the captions of an image; where they are bad, once more, saying why."""
        found: list[str] = []
        for attempt in range(NUM_TRIES):
            answer = yield self._request(scene, found)
            captions, found = self.read(answer, scene.facts)
            if not found:
                stated = [each for caption in captions.values() for each in ungrounded(caption, scene.facts)]
                return Written(captions, ["rewritten"] if attempt else [], list(dict.fromkeys(stated)))
            if answer is None:
                break
        return Written(self.template.write(scene).captions, ["template", *found])

    def read(self, answer: Answer | None, facts: Facts) -> tuple[dict[str, str], list[str]]:
        """The captions of an answer, and for which problems they can't be used."""
        if answer is None:
            return {}, ["unanswered"]
        said = _json_object(_without_thoughts(answer.text), self.styles)
        if said is None:
            return {}, ["not_json" if answer.finish_reason != "length" else "not_ended"]
        captions = {style: visible(said[style]) for style in self.styles}
        found = {problem for style, caption in captions.items() for problem in problems(caption, style, facts)}
        return captions, sorted(found)

    def write(self, scene: Scene) -> Written:
        """The captions, by the answers that are there."""
        return self.replay(scene)[1]

    def replay(self, scene: Scene) -> tuple[list[tuple[Body, Answer | None]], Written]:
        """Go through the dialogue of an image with the answers that are there.

        Returns:
            The requests with their answers, up to the first that has none; and the captions, as if that were never
            answered.
        """
        asked: list[tuple[Body, Answer | None]] = []
        dialogue = self.dialogue(scene)
        body = next(dialogue)
        while True:
            answer = self.answers.get(key_of(body))
            asked.append((body, answer))
            try:
                body = dialogue.send(answer)
            except StopIteration as end:
                return asked, end.value

    def _request(self, scene: Scene, complaints: list[str]) -> Body:
        told = {**PROBLEMS, **UNREADABLE}
        again = ("\n\nAn earlier answer could not be used: " + "; ".join(told[each] for each in complaints)
                 + ". Write the captions anew." if complaints else "")
        limit = {} if "max_completion_tokens" in self.config.options else {"max_tokens": self.config.max_tokens}
        return {**self.identity, "temperature": self.config.temperature, **limit, **self.config.options, "messages": [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": f"<facts>\n{shown(scene)}\n</facts>{again}"}]}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_thoughts(text: str) -> str:
    """What a model says after it has thought; its drafts are no answers, and thoughts that don't end have none."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def _json_object(text: str, keys: list[str]) -> dict[str, str] | None:
    """The last JSON object in a text that has a string under each key; models like to say something around it."""
    decoder = json.JSONDecoder()
    last, start = None, text.find("{")
    for _ in range(MAX_BRACES):
        if start < 0:
            break
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            found, end = None, start + 1
        if isinstance(found, dict) and all(isinstance(found.get(key), str) for key in keys):
            last = found
        start = text.find("{", end)
    return last
