"""Question files of TIFA's and DSG's kind: read, matched to prompts, scored; what is malformed is one line."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.judges.questions import DSG_COLUMNS, Question, QuestionSet, load_questions, share_right
from eval.prompts import Prompt
from recap import progress
from recap.errors import UserError

CATS = "Three cats and two dogs sitting on the grass."
BEACH = "On a gray day a surfer walks on a beach."


def tifa_row(**changed: Any) -> dict[str, Any]:
    return {"id": "drawbench_52", "caption": CATS, "question": "how many cats are in the picture?",
            "choices": ["1", "2", "3", "4"], "answer": "3", "element_type": "counting", "element": "three"} | changed


def dsg_row(number: str, dependency: str, question: str, **changed: str) -> dict[str, str]:
    return {"item_id": "vrd_57", "text": "bench near trees", "keywords": "", "proposition_id": number,
            "dependency": dependency, "category_broad": "entity", "category_detailed": "whole",
            "tuple": "entity - whole (bench, trees)", "question_natural_language": question} | changed


BENCH = [dsg_row("1", "0", "Is there a bench?"), dsg_row("2", "0", "Are there trees?"),
         dsg_row("3", "1,2", 'Is the "bench" near,\nthe trees?')]


def tifa(tmp_path: Path, *rows: Any) -> QuestionSet:
    (tmp_path / "set.json").write_text(json.dumps(rows))
    return load_questions(str(tmp_path / "set.json"))


def table(rows: list[dict[str, str]], columns: list[str] | None = None, delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns or list(rows[0]), delimiter=delimiter, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def dsg(tmp_path: Path, content: str, name: str = "set.csv") -> QuestionSet:
    (tmp_path / name).write_text(content, newline="")
    return load_questions(str(tmp_path / name))


# --- reading -------------------------------------------------------------------------------------------------------


def test_questions_of_tifa_have_choices_and_one_right_answer(tmp_path: Path) -> None:
    found = tifa(tmp_path, tifa_row(), tifa_row(question="are there  cats?", choices=["yes", "no"], answer="yes"),
                 tifa_row(id="coco_301091", caption=BEACH))
    assert found.kind == "tifa"
    assert found.of(Prompt(CATS)) == (Question("how many cats are in the picture?", ("1", "2", "3", "4"), "3"),
                                      Question("are there cats?", ("yes", "no"), "yes"))


@pytest.mark.parametrize(("name", "delimiter"), [("set.csv", ","), ("set.tsv", "\t")])
def test_questions_of_dsg_know_what_they_depend_on(tmp_path: Path, name: str, delimiter: str) -> None:
    found = dsg(tmp_path, table(BENCH, delimiter=delimiter), name)
    assert found.kind == "dsg"
    assert found.of(Prompt("bench near trees")) == (
        Question("Is there a bench?"), Question("Are there trees?"),
        Question('Is the "bench" near, the trees?', parents=(0, 1)))


def test_the_name_tells_another_content(tmp_path: Path) -> None:
    first, again = tifa(tmp_path, tifa_row()).name, tifa(tmp_path, tifa_row()).name
    assert first == again != tifa(tmp_path, tifa_row(answer="2")).name
    assert first.startswith("set.json@")


def test_what_a_question_depends_on_and_is_not_there_is_passed_over_and_counted(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DSG-1k itself has such rows."""
    progress.warn.cache_clear()
    rows = [dsg_row("2", "0", "Is there a bench?"), dsg_row("3", "2, right", "Is it right?"),
            dsg_row("4", "1,2", "Is it near?")]
    found = dsg(tmp_path, table(rows)).of(Prompt("bench near trees"))
    assert [question.parents for question in found] == [(), (0,), (0,)]
    assert "2 dependencies that are no question of their prompt, 'right' of vrd_57 first" in capsys.readouterr().err


# --- matching ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_known_by_its_text_whatever_its_white_space(tmp_path: Path) -> None:
    found = tifa(tmp_path, tifa_row(caption=f"  {CATS.replace(' ', '  ')}\n"))
    assert found.of(Prompt(CATS)) == found.of(Prompt(CATS.replace("and", " and\t"))) != ()
    assert found.of(Prompt(BEACH)) == ()


def test_an_id_alone_brings_no_questions(tmp_path: Path) -> None:
    """Two files that number from 0 would agree on all ids."""
    found = tifa(tmp_path, tifa_row(), tifa_row(id="7", caption=BEACH, question="is this a beach?"))
    assert found.of(Prompt("A beach.", about={"id": 7})) == ()
    assert found.of(Prompt(CATS, about={"id": "7"})) == found.of(Prompt(CATS)) != ()


def test_prompts_without_questions_are_told(tmp_path: Path) -> None:
    found = tifa(tmp_path, tifa_row())
    assert found.without([Prompt(BEACH), Prompt(CATS), Prompt("a")]) == [Prompt(BEACH), Prompt("a")]


# --- scoring -------------------------------------------------------------------------------------------------------


def test_a_question_whose_parent_is_answered_wrong_counts_as_wrong(tmp_path: Path) -> None:
    asked = dsg(tmp_path, table(BENCH)).of(Prompt("bench near trees"))
    assert share_right(asked, [True, True, True]) == 1
    assert share_right(asked, [True, False, True]) == pytest.approx(1 / 3)
    assert share_right(asked, [True, True, False]) == pytest.approx(2 / 3)


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), max_size=3)), min_size=10, max_size=10))
def test_dependencies_only_lower_a_share(drawn: list[tuple[bool, list[int]]]) -> None:
    right = [own for own, _ in drawn]
    linked = tuple(Question("?", parents=tuple(parents)) for _, parents in drawn)
    assert 0 <= share_right(linked, right) <= share_right((Question("?"),) * 10, right) == sum(right) / 10
    assert (share_right(linked, right) == 1) == all(right)


# --- what is malformed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "message"), [
    (tifa_row(choices=["1", "2"]), "row 2 of .*: the answer '3' is none of its choices"),
    (tifa_row(choices=["3", "3"]), "row 2 of .* has one choice only"),
    (tifa_row(choices="1, 2, 3"), "row 2 of .* has no list of choices"),
    (tifa_row(choices=["3", None]), "row 2 of .* has no choice: fill it"),
    (tifa_row(question=" \n"), "row 2 of .* has no question: fill it"),
    (tifa_row(question="is it? " * 1429), "row 2 of .*: its question has 10,002 characters: give at most 1,000"),
    (tifa_row(question="a \ud800"), "row 2 of .*: its question is not valid Unicode"),
    (tifa_row(caption=None), "row 2 of .* has no caption"),
    (tifa_row(caption=BEACH), "row 2 of .*: another row gives drawbench_52 another prompt"),
    ({"caption": CATS}, "row 2 of .* has no id"),
    ("a question", "row 2 of .* is no question: give its id, caption"),
])
def test_a_malformed_row_of_tifa_is_one_line_with_its_number(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^evaluate.vqa.questions: {message}") as error:
        tifa(tmp_path, tifa_row(), row)
    assert "\n" not in str(error.value)


GOOD = table(BENCH[:1])
ROW = "vrd_57,bench near trees,,2,0,entity,whole,,Is it green?\r\n"


@pytest.mark.parametrize(("content", "message"), [
    (f"{GOOD}\r\n{ROW}", "line 3 of .* is empty: delete it"),
    (GOOD + ROW.replace(",2,", ",1,"), "line 3 of .*: vrd_57 has a proposition_id 1 already"),
    (GOOD + ROW.replace("vrd_57", ""), "line 3 of .* has no item_id"),
    (GOOD + ROW.replace("Is it green?", " "), "line 3 of .* has no question_natural_language"),
    (GOOD + ROW.replace("green", "very " * 2000), r"line 3 of .*: its question_natural_language has 10,00\d char"),
    (GOOD + ROW.replace("Is it green?", "x" * 200_000), r"line 3 of .* is no row of a table \(field larger than"),
    (GOOD + ROW.replace(",,Is", ",Is"), "line 3 of .* has 8 values for 9 columns"),
    (GOOD + ROW.replace("Is it green?", '"Is it" green?'), "line 3 of .* is no row of a table .*: mend its quotes"),
    (GOOD + ROW.replace("bench near", "tree near"), "line 3 of .*: another row gives vrd_57 another prompt"),
    (GOOD.splitlines()[0], ".* holds no questions"),
    ("", ".* has no column item_id, only nothing"),
])
def test_a_malformed_row_of_dsg_is_one_line_with_its_number(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^evaluate.vqa.questions: {message}") as error:
        dsg(tmp_path, content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", DSG_COLUMNS)
def test_a_missing_column_is_named(tmp_path: Path, missing: str) -> None:
    with pytest.raises(UserError, match=f"has no column {missing}, only "):
        dsg(tmp_path, table(BENCH, [name for name in BENCH[0] if name != missing]))


def test_empty_lines_at_the_end_are_no_rows(tmp_path: Path) -> None:
    assert dsg(tmp_path, f"{table(BENCH)}\r\n\r\n").of(Prompt("bench near trees"))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("set.json", b"[{", "is not JSON"), ("set.json", b"[" * 100_000, "is not JSON"),
    ("set.json", b'{"id": 1}', "is not a list of questions"), ("set.json", b"[]", "holds no questions"),
    ("set.json", b"[\xff]", "is not UTF-8 at byte 1"), ("set.txt", b"", r"cannot read .*give \.json, \.csv, \.tsv"),
])
def test_another_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^evaluate.vqa.questions: .*{message}"):
        load_questions(str(tmp_path / name))


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^evaluate\.vqa\.questions: no file at .*nothing\.json"):
        load_questions(str(tmp_path / "nothing.json"))


@given(st.text(max_size=60))
def test_any_text_makes_a_round_trip_or_is_refused_as_such(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    rows = [dsg_row("1", "0", text)]
    try:
        found = dsg(tmp_path_factory.mktemp("any"), table(rows)).of(Prompt("bench near trees"))
    except UserError as error:
        assert not text.split() and "has no question_natural_language" in str(error)
    else:
        assert [question.text for question in found] == [" ".join(text.split())]
