"""The ablation: each expert left out, and alone; what the captions state, and what captioners learn from them."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.ablation import ablate, mixes_of
from recap.config import load
from recap.config.stitch import Owlvit, Stitch
from recap.errors import UserError
from recap.pipeline import Experiment
from recap.shards import ShardWriter, read_rejects, read_shard


def test_every_expert_is_left_out_and_stands_alone_and_no_mix_comes_twice() -> None:
    assert mixes_of(Stitch(experts=["detr", "alt_text"])) == {
        "all": ["detr", "alt_text"], "without-detr": ["alt_text"], "without-alt_text": ["detr"]}
    assert list(mixes_of(Stitch(experts=["detr", "blip2", "ram"]))) == [
        "all", "without-detr", "without-blip2", "without-ram", "only-detr", "only-blip2", "only-ram"]


def test_without_an_expert_goes_who_looks_for_what_it_names() -> None:
    mixes = mixes_of(Stitch(experts=["ram", "owlvit", "alt_text"], owlvit=Owlvit(tags_from="ram")))
    assert mixes == {
        "all": ["ram", "owlvit", "alt_text"], "without-ram-owlvit": ["alt_text"], "without-owlvit": ["ram", "alt_text"],
        "without-alt_text": ["ram", "owlvit"], "only-ram": ["ram"], "only-owlvit": ["owlvit"]}


@pytest.fixture(scope="module")
def experiment(world_shards: Path, world_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ablate") / "world.toml"
    path.write_text(f'''
runs = "{path.parent}/runs"
styles.short = {{ prompt = "A short caption:", max_new_tokens = 8 }}
styles.rich = {{ prompt = "A rich description:", max_new_tokens = 16 }}
stitch.shards = "{world_shards}/train/*.tar"
stitch.num_images = 12
stitch.detr = {{ model = "{world_models}/detr", threshold = 0.01 }}
captioner = {{ model = "{world_models}/blip2", dtype = "float32" }}
finetune = {{ steps = 2, batch_size = 4, max_tokens = 64, lora.rank = 2 }}
evaluate.judge = {{ target = "recap.world.judge:WorldJudge", model = "{world_models}/reader" }}
[ablate]
references = "{spoilt(world_shards, path.parent)}"
num_images = 6
num_samples = 2
kinds = {{ short = "reference-short", rich = "reference-rich" }}
''')
    return path


def spoilt(world_shards: Path, out: Path) -> Path:
    """A copy of the references whose second image can't be decoded."""
    first, second, *others = read_shard(str(next(world_shards.glob("evaluation/*.tar"))), [])
    with ShardWriter(str(out / "references.tar")) as writer:
        for sample in (first, replace(second, members=second.members | {"png": b"no image"}), *others):
            writer.write(sample)
    return out / "references.tar"


@pytest.fixture(scope="module")
def ablated(experiment: Path) -> tuple[Path, str]:
    """Where the results are, and what was printed."""
    return experiment.parent / "runs" / "world" / "ablate", printed(experiment)


def printed(experiment: Path) -> str:
    with redirect_stdout(io.StringIO()) as out:
        ablate(load(experiment, [], Experiment), redo=False)
    return out.getvalue()


def result(ablated: tuple[Path, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ablated[0] / "ablate.json").read_text())
    return found


def test_every_mix_has_figures_of_its_captions_and_of_its_captioner(ablated: tuple[Path, str]) -> None:
    found = result(ablated)
    assert list(found["mixes"]) == [row["name"] for row in found["stitched"]] == [
        row["name"] for row in found["captioners"]] == ["all", "without-detr", "without-alt_text"]
    for row in found["stitched"]:
        assert row["images"] == 12 and list(row["styles"]) == ["short", "rich"]
        for style in row["styles"].values():
            low, high = style["metrics"]["facts_covered"]["ci"]
            assert low <= style["metrics"]["facts_covered"]["value"] <= high
            assert ("differences" in style) == (row["name"] != "all")
    for row in found["captioners"]:
        for style in row["styles"].values():
            assert style["num_images"] == 5 and {"cider_d", "facts_covered"} <= set(style["metrics"])


def test_an_image_of_the_references_that_cannot_be_read_is_left_out_and_listed(ablated: tuple[Path, str]) -> None:
    bad, = read_rejects(ablated[0] / "references_quarantine.jsonl")
    assert bad.reason == "undecodable_image"
    captions = json.loads((ablated[0] / "without-detr" / "captions" / "captions.json").read_text())
    assert len(captions["short"]) == 5 and bad.key not in captions["short"]


def test_who_saw_nothing_states_nothing(ablated: tuple[Path, str]) -> None:
    of_alt_text = next(row for row in result(ablated)["stitched"] if row["name"] == "without-detr")
    assert of_alt_text["styles"]["short"]["metrics"]["facts_covered"]["value"] == 0
    short = (ablated[0] / "without-detr" / "stitch" / "imagefolder" / "metadata.jsonl").read_text().splitlines()
    assert {json.loads(line)["short"] for line in short} == {"An image."}


def test_the_experts_look_once_for_all_mixes(ablated: tuple[Path, str]) -> None:
    facts = ablated[0].parent / "facts"
    assert sorted(child.name for child in facts.iterdir()) == ["alt_text", "detr"]
    assert not list(ablated[0].glob("*/facts"))


def test_the_table_fits_a_terminal_and_the_page_shows_both(ablated: tuple[Path, str]) -> None:
    assert all(len(line) <= 80 for line in ablated[1].splitlines() if not line.startswith("The page"))
    assert "without-detr" in ablated[1] and "facts covered" in ablated[1]
    page = (ablated[0] / "index.html").read_text()
    assert "Experts: rich" in page and page.count("<article>") == 2


def test_a_second_command_does_nothing_at_once(experiment: Path, ablated: tuple[Path, str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in ablated[0].rglob("*.safetensors")}
    assert before and printed(experiment) == ablated[1]
    assert {path: path.stat().st_mtime_ns for path in ablated[0].rglob("*.safetensors")} == before


@pytest.mark.parametrize(("override", "message"), [
    ('stitch.experts=["detr"]', "name two at least"), ("captioner.tuned=none", "leave finetune.dataset"),
    ("ablate.references=none.tar", "ablate.references"), ('ablate.kinds.lang="x"', r"no \[styles\.lang\]"),
    ("captioner.model=./none", r"captioner\.model"), ("ablate.references=LEARNED", "learn from")])
def test_what_cannot_be_ablated_is_one_clear_line(experiment: Path, world_shards: Path, override: str,
                                                  message: str) -> None:
    override = override.replace("LEARNED", f"{world_shards}/train/*.tar")
    with pytest.raises(UserError, match=message):
        ablate(load(experiment, [override, "name=other"], Experiment), redo=False)
    assert not (experiment.parent / "runs" / "other").exists()
