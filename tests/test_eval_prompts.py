"""Prompt sets from files and shards; what is wrong with them is one line."""

import json
from pathlib import Path

import pytest

from eval.config import Generate
from eval.prompts import MAX_ABOUT, MAX_PROMPT, Prompt, load_prompts, prompt_inputs, prompt_sets
from recap.config import validate
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import ShardWriter


def texts_of(path: Path, text: str, **options: object) -> list[str]:
    path.write_text(text, encoding="utf-8")
    prompts = load_prompts(Generate(prompts=str(path), **options))
    assert {prompt.set for prompt in prompts} == {path.stem}
    return [prompt.text for prompt in prompts]


def test_each_kind_of_file(tmp_path: Path) -> None:
    assert texts_of(tmp_path / "a.txt", "a cat\r\n  two\u2028 dogs \n") == ["a cat", "two dogs"]
    table = 'Category\tPrompt\nx\t"Hello" on a sign\ny\ta cat\n'
    assert texts_of(tmp_path / "b.tsv", table) == ['"Hello" on a sign', "a cat"]
    lines = '{"prompt": "a cat", "tag": 1}\n{"prompt": "a dog"}'
    assert texts_of(tmp_path / "c.jsonl", lines) == ["a cat", "a dog"]
    rows = 'Text,CAPTION,id\r\nx,"a ""big"" cat,\r\non a mat",1\r\ny,=HYPERLINK(1),2\r\n'
    assert texts_of(tmp_path / "d.csv", rows) == ['a "big" cat, on a mat', "=HYPERLINK(1)"]


def test_categories_of_tables_travel_with_the_prompt(tmp_path: Path) -> None:
    for name, separator in (("a.tsv", "\t"), ("a.csv", ",")):
        rows = [["prompt", "Category", "note", "challenge"], ["a cat", "Animals", "x", "Basic"], ["a dog", "", "y"]]
        (tmp_path / name).write_text("\n".join(map(separator.join, rows)))
        assert load_prompts(Generate(prompts=str(tmp_path / name))) == [
            Prompt("a cat", "a", {"Category": "Animals", "Challenge": "Basic"}), Prompt("a dog", "a", {})]


def test_annotations_give_the_first_caption_of_every_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({
        "info": {}, "images": [{"id": 9}, {"id": 4}, {"id": 7}, {"id": 5}],
        "annotations": [{"image_id": 4, "id": 1, "caption": "a\ncat "}, {"image_id": 9, "id": 2, "caption": "a dog"},
                        {"image_id": 4, "id": 3, "caption": "a hen"}, {"image_id": 7, "id": 4, "caption": "an ox"}]}))
    assert load_prompts(Generate(prompts=str(path))) == [
        Prompt("a dog", "captions_val2014", {"image_id": 9}), Prompt("a cat", "captions_val2014", {"image_id": 4}),
        Prompt("an ox", "captions_val2014", {"image_id": 7})]
    assert "has 1 images without a caption" in capsys.readouterr().err


def test_a_draw_is_of_the_seed_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    texts = [f"scene {place}" for place in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(texts))

    def drawn(seed: int | None, num: int = 50) -> list[int]:
        config = Generate(prompts=str(tmp_path / "a.txt"), num_prompts=num, prompts_seed=seed)
        return [texts.index(prompt.text) for prompt in load_prompts(config)]

    assert drawn(None) == list(range(50))
    found = drawn(0)
    assert found == drawn(0) == sorted(found) and len(set(found)) == 50
    assert 60 < sum(found) / 50 < 140 and len(set(found) & set(drawn(1))) < 30
    assert set(drawn(0, 20)) < set(found) and drawn(0, 500) == list(range(200))
    with pytest.raises(UserError, match=r"prompts_seed draws generate\.num_prompts of every set: say how many"):
        validate({"prompts_seed": 1}, Generate, "mine.toml")


def test_files_are_sets_and_the_limit_is_of_each(tmp_path: Path) -> None:
    (tmp_path / "reference-short.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n{"prompt": "a fox"}')
    (tmp_path / "probe.v2.jsonl").write_text('{"prompt": "a hen"}\n{"prompt": "an owl"}')
    (tmp_path / "z.txt").write_text("an ant\n")
    config = Generate(prompts=[str(tmp_path / "*.jsonl"), str(tmp_path / "z.txt")], num_prompts=2)
    assert prompt_sets(config) == ["probe.v2", "reference-short", "z"]
    assert [(prompt.set, prompt.text) for prompt in load_prompts(config)] == [
        ("probe.v2", "a hen"), ("probe.v2", "an owl"), ("reference-short", "a cat"), ("reference-short", "a dog"),
        ("z", "an ant")]


def test_what_else_a_row_says_travels_with_the_prompt(tmp_path: Path) -> None:
    about = {"asks": "a cat\u2028on a mat", "scene": {"things": [1, None, True]}, "set": "mine"}
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a cat", **about}) + '\n{"prompt": "a dog"}\n')
    assert load_prompts(Generate(prompts=str(tmp_path / "a.jsonl"))) == [
        Prompt("a cat", "a", about), Prompt("a dog", "a", {})]


def test_two_files_of_one_stem_are_refused(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    for name in ("a.txt", "a.jsonl", "deeper/a.txt"):
        (tmp_path / name).write_text('{"prompt": "a cat"}\n')
    for first, second in [("a.txt", "a.jsonl"), ("a.txt", "deeper/a.txt")]:
        with pytest.raises(UserError, match=r"generate\.prompts: .*rename one of them") as caught:
            load_prompts(Generate(prompts=[str(tmp_path / first), str(tmp_path / second)]))
        assert first in str(caught.value) and second in str(caught.value) and "\n" not in str(caught.value)


def test_real_prompt_sets(shared_data: Path) -> None:
    folder = shared_data / "prompts"
    counts = {"PartiPrompts.tsv": 1632, "dpg_bench.jsonl": 1065, "geneval.jsonl": 553, "t2i_compbench_val.jsonl": 2400}
    for name, count in counts.items():
        assert len(load_prompts(Generate(prompts=str(folder / name)))) == count
    parti = Generate(prompts=str(folder / "PartiPrompts.tsv"), num_prompts=2)
    about = {"Category": "Abstract", "Challenge": "Basic"}
    assert load_prompts(parti) == [Prompt("bond", "PartiPrompts", about), Prompt("element", "PartiPrompts", about)]
    assert all(set(prompt.about) == {"Category", "Challenge"} for prompt in load_prompts(
        Generate(prompts=str(folder / "PartiPrompts.tsv"))))
    composed = load_prompts(Generate(prompts=str(folder / "t2i_compbench_val.jsonl")))
    assert len({prompt.about["category"] for prompt in composed}) == 8
    asked = load_prompts(Generate(prompts=str(folder / "geneval.jsonl"), num_prompts=1))
    assert asked[0].about == {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.txt", b"a cat\n\na dog\n", "line 2 of"),
    ("a.txt", b"a cat\n  \n", "line 2 of"),
    ("a.txt", b"", "no prompts of the set a in"),
    ("a.txt", b"caf\xe9", "not UTF-8 at byte 3"),
    ("a.tsv", b"Prompts\na cat\n", "no column Prompt"),
    ("a.tsv", b"x\tPrompt\ny\n", "line 2 of"),
    ("a.tsv", b"", "no column Prompt"),
    ("a.jsonl", b'{"prompt": "a cat"}\n{"text": "a dog"}\n', "line 2 of"),
    ("a.jsonl", b'{"prompt": 3}\n', "line 1 of"),
    ("a.jsonl", b'["prompt"]\n', "line 1 of"),
    ("a.jsonl", b'{"prompt": "\\ud800"}\n', "line 1 of"),
    ("a.jsonl", b'{"prompt": "a cat", "x": "\\ud800"}\n', "line 1 of"),
    ("a.jsonl", b'{"prompt": "a cat", "x": NaN}\n', "line 1 of"),
    ("a.jsonl", b"[" * 100_000, "line 1 of"),
    ("a.jsonl", b'{"prompt": "a cat", "x": "%s"}\n' % (b"x" * MAX_ABOUT), "line 1 of .* leave at most 16,384"),
    ("a.jsonl", b'{"prompt": "a cat"}\n\n', "line 2 of"),
    ("a.jsonl", b'{"prompt": "%s"}\n' % (b"x" * (MAX_PROMPT + 1)), "line 1 of .* leave at most 16,384"),
    ("a.txt", b"a cat\n" + b"x" * (MAX_PROMPT + 1), "line 2 of .* leave at most 16,384"),
    ("a.tsv", b"Prompt\tCategory\na cat\t%s\n" % (b"x" * MAX_ABOUT), "line 2 of .* leave at most 16,384"),
    ("a.csv", b"a cat\n", "no column Prompt, Caption or Text, only a cat:"),
    ("a.csv", b"", "only nothing"),
    ("a.csv", b"caption\na cat\n\na dog\n", "line 3 of"),
    ("a.csv", b"caption\na cat\na red car, on a hill\n", "line 3 of .* has 2 cells, and the header 1"),
    ("a.tsv", b"Prompt\na red\tcar\n", "line 2 of .* has 2 cells, and the header 1"),
    ("a.csv", b'id,caption\n1,"a cat\n', r"line 2 of .* is no CSV \(unexpected end of data\)"),
    ("a.csv", b'caption\n"a" cat\n', "line 2 of .* is no CSV"),
    ("a.csv", b"caption\n" + b"x" * 200_000, "line 2 of .* is no CSV .*field larger"),
    ("a.csv", b"caf\xe9", "not UTF-8 at byte 3"),
    ("a.json", b'{"images": [{"id": 1}]}', "as COCO's captions are"),
    ("a.json", b'[1, 2]', "as COCO's captions are"),
    ("a.json", b'{"images": [{"id": 1e999}], "annotations": []}', "as COCO's captions are"),
    ("a.json", b'{"images": [], "annotations": [{"image_id": 1, "caption": "\\ud800"}]}', "as COCO's captions are"),
    ("a.json", b'{"images": [], "annotations": [{"image_id": 1, "caption": 3}]}', "as COCO's captions are"),
    ("a.json", b"[" * 100_000, "as COCO's captions are"),
    ("a.json", b'{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": " "}]}', "image 1 of"),
    ("a.json", b'{"images": [], "annotations": []}', "no prompts of the set a in"),
    ("a.yaml", b"a cat\n", "cannot read"),
])
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_prompts(Generate(prompts=str(tmp_path / name)))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_mixed_inputs(tmp_path: Path) -> None:
    for prompts, says in [([], "generate.prompts is empty"), (str(tmp_path / "no.txt"), "nothing at"),
                          (str(tmp_path / "*.tar"), "check the path"), (["a.txt", "b.tar"], "mixes shards")]:
        with pytest.raises(UserError, match=says):
            load_prompts(Generate(prompts=prompts))


def test_captions_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(str(tmp_path / "00000.tar")) as writer:
        for index, text in enumerate([b"a cat", b"", b"\xff\xfe", b"a dog"]):
            writer.write(Sample("00000", f"{index}", {"short.txt": text, "rich.txt": b"a hen", "json": b"{}"}))
    config = Generate(prompts=str(tmp_path / "*.tar"), kind="short")
    assert load_prompts(config) == [Prompt("a cat", "short", {}), Prompt("a dog", "short", {})]
    assert "passed over 2 samples without a usable short caption" in capsys.readouterr().err
    assert prompt_inputs(config) == [str(tmp_path / "00000.tar")] and prompt_sets(config) == ["short"]
    both = config.model_copy(update={"kind": ["rich", "short"], "num_prompts": 1})
    assert load_prompts(both) == [Prompt("a hen", "rich", {}), Prompt("a cat", "short", {})]
    for kind, says in [("long", "no prompts of the set long in"), (["short", "short"], "each caption kind once")]:
        with pytest.raises(UserError, match=says):
            load_prompts(config.model_copy(update={"kind": kind}))
