"""Questions about what prompts say, which pictures drawn from them should answer: files in TIFA's and DSG's formats.

TIFA (Hu et al. 2023, arXiv 2303.11897): questions with choices, one of them right. DSG (Cho et al. 2024, arXiv
2310.18235): questions that a good picture answers with yes, each of which may depend on others.
"""

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.prompts import Prompt
from recap.errors import UserError
from recap.progress import warn
from recap.rundir import hash_file

WHERE = "evaluate.vqa.questions"
MAX_CHARS = 1000
"""Of a question or a choice; the longest of DSG-1k has 124."""
DSG_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")
"""Names under which a prompt's row may give the item that it is."""
Kind = Literal["tifa", "dsg"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a picture."""

    text: str
    choices: tuple[str, ...] = ()
    """All answers to choose from; empty where they are yes and no, and yes is right."""
    answer: str = ""
    """The right one of the choices."""
    parents: tuple[int, ...] = ()
    """Places, among the questions of its item, of those without which it makes no sense."""


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and all that is asked about it."""

    text: str
    questions: tuple[Question, ...]


class QuestionSet:
    """The questions of a file, found by a prompt's text: numbers as ids would agree by chance."""

    def __init__(self, kind: Kind, name: str, items: dict[str, Item]) -> None:
        self.kind = kind
        self.name = name
        """The file and the hash of its content."""
        self._by_text: dict[str, Item] = {}
        for item in items.values():
            self._by_text.setdefault(item.text, item)

    def of(self, prompt: Prompt) -> tuple[Question, ...]:
        """What is asked about a prompt; of two items with its text, the first one's questions."""
        item = self._by_text.get(" ".join(prompt.text.split()))
        return item.questions if item else ()

    def without(self, prompts: list[Prompt]) -> list[Prompt]:
        """The prompts that nothing is asked about."""
        return [prompt for prompt in prompts if not self.of(prompt)]


def share_right(questions: tuple[Question, ...], right: list[bool]) -> float:
    """The share of questions that are answered right, where one whose parent is answered wrong does not count as such.

    As in DSG's own code, it is what the parent itself was answered that matters, not whether that counted.
    """
    counted = [own and all(right[parent] for parent in question.parents)
               for question, own in zip(questions, right, strict=True)]
    return sum(counted) / len(counted)


def load_questions(path: str) -> QuestionSet:
    """Read a file of questions: a `.json` list as TIFA's, a `.csv` or `.tsv` table as DSG's.

    Raises:
        UserError: no such file, another kind of file, or a malformed row (with its number).
    """
    file = Path(path)
    if file.suffix not in READERS:
        raise UserError(f"{WHERE}: cannot read {path}: give {', '.join(READERS)}")
    if not file.is_file():
        raise UserError(f"{WHERE}: no file at {path}: check the path")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{WHERE}: {path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    kind, read = READERS[file.suffix]
    items = read(path, text)
    if not items:
        raise UserError(f"{WHERE}: {path} holds no questions: give another file")
    return QuestionSet(kind, f"{file.name}@{hash_file(file)}", items)


def _field(value: Any, name: str, row: str, most: int | None = None) -> str:
    """A text of a row, white space made one space."""
    if not isinstance(value, str) or not (text := " ".join(value.split())):
        raise UserError(f"{WHERE}: {row} has no {name}: fill it or delete the row")
    if most is not None and len(text) > most:
        raise UserError(f"{WHERE}: {row}: its {name} has {len(text):,} characters: give at most {most:,}")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell lone surrogates, which no tokenizer takes
        raise UserError(f"{WHERE}: {row}: its {name} is not valid Unicode: mend it") from None
    return text


def _same_text(texts: dict[str, str], item: str, text: str, row: str) -> None:
    if texts.setdefault(item, text) != text:
        raise UserError(f"{WHERE}: {row}: another row gives {item} another prompt: give each prompt its own id")


# --- TIFA ----------------------------------------------------------------------------------------------------------


def _read_tifa(path: str, content: str) -> dict[str, Item]:
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{WHERE}: {path} is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(rows, list):
        raise UserError(f"{WHERE}: {path} is not a list of questions: give TIFA's format")
    texts: dict[str, str] = {}
    questions: dict[str, list[Question]] = defaultdict(list)
    for number, content_of_row in enumerate(rows, start=1):
        row = f"row {number} of {path}"
        if not isinstance(content_of_row, dict):
            raise UserError(f"{WHERE}: {row} is no question: give its id, caption, question, choices and answer")
        item = _field(content_of_row.get("id"), "id", row)
        _same_text(texts, item, _field(content_of_row.get("caption"), "caption", row), row)
        questions[item].append(_tifa_question(content_of_row, row))
    return {item: Item(texts[item], tuple(asked)) for item, asked in questions.items()}


def _tifa_question(content: dict[str, Any], row: str) -> Question:
    given = content.get("choices")
    if not isinstance(given, list):
        raise UserError(f"{WHERE}: {row} has no list of choices: give one")
    choices = tuple(dict.fromkeys(_field(choice, "choice", row, MAX_CHARS) for choice in given))
    answer = _field(content.get("answer"), "answer", row)
    if answer not in choices:
        raise UserError(f"{WHERE}: {row}: the answer {answer[:80]!r} is none of its choices: add it")
    if len(choices) < 2:
        raise UserError(f"{WHERE}: {row} has one choice only: give others")
    return Question(_field(content.get("question"), "question", row, MAX_CHARS), choices, answer)


# --- DSG -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Proposition:
    number: str
    question: str
    dependency: list[str]


def _read_dsg(path: str, content: str) -> dict[str, Item]:
    texts: dict[str, str] = {}
    found: dict[str, dict[str, _Proposition]] = defaultdict(dict)
    for row, values in _table(path, content):
        item = _field(values["item_id"], "item_id", row)
        _same_text(texts, item, _field(values["text"], "text", row), row)
        number = _field(values["proposition_id"], "proposition_id", row)
        if number in found[item]:
            raise UserError(f"{WHERE}: {row}: {item} has a proposition_id {number} already: number them anew")
        question = _field(values["question_natural_language"], "question_natural_language", row, MAX_CHARS)
        found[item][number] = _Proposition(number, question, values["dependency"].replace(",", " ").split())
    lost: Counter[str] = Counter()
    items = {item: Item(texts[item], _linked(propositions, item, lost)) for item, propositions in found.items()}
    if lost:
        warn(f"{WHERE}: {path} names {lost.total()} dependencies that are no question of their prompt, "
             f"{next(iter(lost))} first: they are passed over")
    return items


def _linked(propositions: dict[str, _Proposition], item: str, lost: Counter[str]) -> tuple[Question, ...]:
    """DSG-1k itself holds dependencies like "5, right", and on a question that is not there."""
    places = {number: place for place, number in enumerate(propositions)}
    questions = []
    for each in propositions.values():
        named = [number for number in each.dependency if number != "0"]
        lost.update(f"{number[:80]!r} of {item}" for number in named if number not in places)
        questions.append(Question(each.question, parents=tuple(places[number] for number in named if number in places)))
    return tuple(questions)


def _table(path: str, content: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(which row, column → value)."""
    # Split at line ends alone, and kept: a quoted value may hold them, and other separators are text.
    lines = content.rstrip("\r\n").split("\n")
    reader = csv.reader((f"{line}\n" for line in lines), delimiter="\t" if path.endswith(".tsv") else ",", strict=True)
    header: list[str] = []
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{WHERE}: line {reader.line_num} of {path} is no row of a table ({error}): mend its quotes"
                            ) from None
        if values is None:
            return
        row = f"line {reader.line_num} of {path}"
        if not header:
            header = values
            if missing := [name for name in DSG_COLUMNS if name not in header]:
                only = ", ".join(header)[:200] or "nothing"
                raise UserError(f"{WHERE}: {path} has no column {missing[0]}, only {only}: name it in its first line")
        elif not values:
            raise UserError(f"{WHERE}: {row} is empty: delete it")
        elif len(values) != len(header):
            raise UserError(f"{WHERE}: {row} has {len(values)} values for {len(header)} columns: mend it")
        else:
            yield row, dict(zip(header, values, strict=True))


READERS: dict[str, tuple[Kind, Callable[[str, str], dict[str, Item]]]] = {
    ".json": ("tifa", _read_tifa), ".csv": ("dsg", _read_dsg), ".tsv": ("dsg", _read_dsg)}
"""Ending → kind of questions, and how they are read: (path, content) → items."""
