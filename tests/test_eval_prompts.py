import json
from pathlib import Path

import pytest

from eval.config import Generate
from eval.prompts import load_prompts, prompt_inputs
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import ShardWriter


def prompts_of(path: Path, text: str, **options: object) -> list[str]:
    path.write_text(text, encoding="utf-8")
    return load_prompts(Generate(prompts=str(path), **options))


def test_each_kind_of_file(tmp_path: Path) -> None:
    assert prompts_of(tmp_path / "a.txt", "a cat\r\n  two\u2028 dogs \n") == ["a cat", "two dogs"]
    table = 'Category\tPrompt\nx\t"Hello" on a sign\ny\ta cat\n'
    assert prompts_of(tmp_path / "a.tsv", table) == ['"Hello" on a sign', "a cat"]
    lines = '{"prompt": "a cat", "tag": 1}\n{"prompt": "a dog"}'
    assert prompts_of(tmp_path / "a.jsonl", lines) == ["a cat", "a dog"]
    both = Generate(prompts=[str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl")], num_prompts=3)
    assert load_prompts(both) == ["a cat", "two dogs", "a cat"]


def test_real_prompt_sets(shared_data: Path) -> None:
    folder = shared_data / "prompts"
    counts = {"PartiPrompts.tsv": 1632, "dpg_bench.jsonl": 1065, "geneval.jsonl": 553}
    for name, count in counts.items():
        assert len(load_prompts(Generate(prompts=str(folder / name)))) == count
    assert load_prompts(Generate(prompts=str(folder / "PartiPrompts.tsv"), num_prompts=2)) == ["bond", "element"]


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.txt", b"a cat\n\na dog\n", "line 2 of"),
    ("a.txt", b"a cat\n  \n", "line 2 of"),
    ("a.txt", b"", "no prompts in"),
    ("a.txt", b"caf\xe9", "not UTF-8 at byte 3"),
    ("a.tsv", b"Prompts\na cat\n", "no column Prompt"),
    ("a.tsv", b"x\tPrompt\ny\n", "line 2 of"),
    ("a.tsv", b"", "no column Prompt"),
    ("a.jsonl", b'{"prompt": "a cat"}\n{"text": "a dog"}\n', "line 2 of"),
    ("a.jsonl", b'{"prompt": 3}\n', "line 1 of"),
    ("a.jsonl", b'{"prompt": "\\ud800"}\n', "line 1 of"),
    ("a.jsonl", b"[" * 100_000, "line 1 of"),
    ("a.csv", b"a cat\n", "cannot read"),
])
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_prompts(Generate(prompts=str(tmp_path / name)))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_mixed_inputs(tmp_path: Path) -> None:
    for prompts, says in [([], "generate.prompts is empty"), (str(tmp_path / "no.txt"), "no file at"),
                          (str(tmp_path / "*.tar"), "check the path"), (["a.txt", "b.tar"], "mixes shards")]:
        with pytest.raises(UserError, match=says):
            load_prompts(Generate(prompts=prompts))


def test_captions_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(str(tmp_path / "00000.tar")) as writer:
        for index, text in enumerate([b"a cat", b"", b"\xff\xfe", b"a dog"]):
            writer.write(Sample("00000", f"{index}", {"short.txt": text, "json": json.dumps({}).encode()}))
    config = Generate(prompts=str(tmp_path / "*.tar"), kind="short")
    assert load_prompts(config) == ["a cat", "a dog"]
    assert "passed over 2 samples without a usable short caption" in capsys.readouterr().err
    assert prompt_inputs(config) == [str(tmp_path / "00000.tar")]
    with pytest.raises(UserError, match="no prompts in"):
        load_prompts(config.model_copy(update={"kind": "long"}))
