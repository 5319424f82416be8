"""A judge that asks: VQAScore, and the share of a question set's questions that a picture answers right.

VQAScore (Lin et al. 2024, arXiv 2404.01291) is the probability of "Yes" to 'Does this figure show "{prompt}"?', as
the paper defines it: from the softmax over the whole vocabulary, and of the answer's tokens alone. (Its authors' code
for T5 averages in the token that ends the answer.)
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from PIL import Image

from eval.config import Vqa
from eval.judge import Metric
from eval.judges.questions import Question, QuestionSet, load_questions, share_right
from eval.judges.vqa_models import WHERE, Answerer, Asked, open_answerer
from eval.prompts import Prompt
from recap.pretrained import checkpoint_folder
from recap.progress import warn
from recap.rundir import hash_files

SCORE = "vqa_score"
ABOUT = {
    SCORE: "How likely the model finds “yes” when asked whether the picture shows its prompt (VQAScore)",
    "tifa": "Share of TIFA's questions about the prompt for which the model finds the right choice the likeliest",
    "dsg": "Share of DSG's questions about the prompt that the model says yes to, those they depend on included",
}
"""Metric → what it is."""
RULES = {
    "tifa": "the choice of the highest mean log-likelihood, nothing generated",
    "dsg": "yes/(yes+no) > 0.5, and its parents' as well",
}
"""Kind of questions → when one is answered right."""


class VqaJudge:
    """Asks a vision-language model about every picture; see `eval.judge.Judge`."""

    def __init__(self, table: Vqa, answerer: Answerer, questions: QuestionSet | None, version: str) -> None:
        self.table, self.answerer, self.questions = table, answerer, questions
        self.yes, self.no = table.yes or answerer.yes_no[0], table.no or answerer.yes_no[1]
        names = [SCORE, *([questions.kind] if questions else [])]
        self.metrics: Mapping[str, Metric | str] = {name: Metric(ABOUT[name]) for name in names}
        kind = table.dtype if table.quantization == "none" else table.quantization
        self.name = f"{version} {kind}, P({self.yes!r}) to {table.template!r}"
        if questions:
            self.name += f"; {questions.name} as {table.question_template!r}: {RULES[questions.kind]}"

    @classmethod
    def open(cls, table: Vqa, device: str) -> Self:
        """Read the questions, then open the model.

        Raises:
            UserError: one of them is not there, or not what it should be.
        """
        questions = load_questions(table.questions) if table.questions else None
        answerer = open_answerer(table, device)
        return cls(table, answerer, questions, _version(table))

    def images(self, images: list[Image.Image], prompts: list[Prompt]) -> list[dict[str, float | None]]:
        """VQAScore of every picture, and the share of its prompt's questions answered right; None where it has none."""
        about = [self.questions.of(prompt) if self.questions else () for prompt in prompts]
        asked = []
        for image, (prompt, questions) in enumerate(zip(prompts, about, strict=True)):
            asked.append(Asked(image, fill(self.table.template, text=prompt.text), (self.yes,)))
            asked += [self._asked(image, question) for question in questions]
        found = iter(self.answerer.log_probs(images, asked))
        return [self._values(next(found), questions, [next(found) for _ in questions]) for questions in about]

    def _asked(self, image: int, question: Question) -> Asked:
        choices = question.choices or (self.yes, self.no)
        text = fill(self.table.question_template, question=question.text, choices=", ".join(choices))
        return Asked(image, text, choices)

    def _values(self, yes: list[list[float]], questions: tuple[Question, ...],
                answered: list[list[list[float]]]) -> dict[str, float | None]:
        values: dict[str, float | None] = {SCORE: math.exp(sum(yes[0]))}
        if self.questions:
            right = [_is_right(question, found) for question, found in zip(questions, answered, strict=True)]
            values[self.questions.kind] = share_right(questions, right) if questions else None
        return values


def check(table: Vqa, prompts: list[Prompt]) -> None:
    """Read the questions before hours of work, and say how many prompts have none. `UserError` for a faulty file."""
    questions = load_questions(table.questions) if table.questions else None
    if questions and (without := questions.without(prompts)):
        warn(f"{WHERE}.questions: {questions.name} asks nothing about {len(without):,} of {len(prompts):,} prompts, "
             f"{without[0].text[:80]!r} first: their pictures get no {questions.kind}")


def fill(template: str, **texts: str) -> str:
    """Put texts in their places; what looks like a place in a text itself stays as it is."""
    return re.sub(r"\{(" + "|".join(texts) + r")\}", lambda place: texts[place[1]], template)


def _is_right(question: Question, found: list[list[float]]) -> bool:
    """Whether the right answer is the likeliest.

    Args:
        question: with choices; or of yes and no, where yes is right.
        found: log-probabilities of every answer's tokens.
    """
    if not question.choices:
        yes, no = (sum(tokens) for tokens in found)
        return yes > no  # as yes/(yes+no) > 0.5
    means = [sum(tokens) / len(tokens) for tokens in found]
    return question.choices[means.index(max(means))] == question.answer


def _version(table: Vqa) -> str:
    """Hub id and commit, or name and hash of a folder."""
    folder = checkpoint_folder(table, WHERE)
    if folder.parent.name == "snapshots" and not Path(table.model).expanduser().is_dir():
        return f"{table.model}@{folder.name[:12]}"
    return f"{folder.resolve().name}@{hash_files(folder)}"
