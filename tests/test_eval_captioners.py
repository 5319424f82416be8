"""Captioners side by side: the same images for all, figures with intervals, one table, and nothing done twice."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import recap, recap_here
from test_recap_pipeline import CONFIG, settings

from eval.captioners import compare
from recap.caption_sets import CaptionedImage, ImageRef
from recap.config import Style, load
from recap.config.finetune import Finetune, Validation
from recap.errors import UserError
from recap.finetune import read_images, read_test_images
from recap.pipeline import Experiment
from recap.shards import Reject, ShardWriter, read_shard

STYLES = {"short": Style(prompt="A short caption:", max_new_tokens=8),
          "long": Style(prompt="A detailed caption:", max_new_tokens=16)}


@pytest.fixture(scope="module")
def shard(world_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captioned") / "00000.tar"
    rejects: list[Reject] = []
    with ShardWriter(str(path)) as writer:
        for sample in read_shard(str(world_shards / "evaluation" / "00000.tar"), rejects):
            exact = sample.members["exact.txt"]
            sample.members |= {"long.txt": exact, "short.txt": b" ".join(exact.split()[:5])}
            writer.write(sample)
    return path


@pytest.fixture(scope="module")
def experiment(shard: Path, world_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with three captioners."""
    path = tmp_path_factory.mktemp("compare") / "three.toml"
    path.write_text(f'''
runs = "{path.parent}/runs"
styles.short = {{ prompt = "A short caption:", max_new_tokens = 8 }}
styles.long = {{ prompt = "A detailed caption:", max_new_tokens = 16 }}
captioner.dtype = "float32"
finetune = {{ shards = "{shard}", steps = 2, batch_size = 4, test_share = 0.4, validation.share = 0.2 }}
compare.metrics = ["clipscore"]
evaluate.clip_score.model = "local-dir:{world_models}/clip"
evaluate.judge = {{ target = "recap.world.judge:WorldJudge", model = "{world_models}/reader" }}
[compare.captioners.untuned.captioner]
model = "{world_models}/blip2"
tuned = "none"
[compare.captioners.blip2]
captioner.model = "{world_models}/blip2"
finetune.lora.rank = 2
[compare.captioners.from-scratch.captioner]
family = "transformer"
transformer = {{ encoder = "none", hidden_size = 32, num_layers = 1, num_heads = 2, vocab_size = 400, image_size = 32 }}
''')
    return path


@pytest.fixture(scope="module")
def compared(experiment: Path) -> tuple[Path, str]:
    """Where the results are, and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert recap_here("compare", "-c", str(experiment)) == 0
    return experiment.parent / "runs" / "three" / "compare", out.getvalue()


def result(compared: tuple[Path, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((compared[0] / "compare.json").read_text())
    return found


def test_every_captioner_has_a_row_of_figures_with_intervals(compared: tuple[Path, str]) -> None:
    rows = result(compared)["captioners"]
    assert [row["name"] for row in rows] == ["untuned", "blip2", "from-scratch"]
    for row in rows:
        for style in ("short", "long"):
            metrics = row["styles"][style]["metrics"]
            low, high = metrics["cider_d"]["ci"]
            assert low <= metrics["cider_d"]["value"] <= high
            assert {"bleu_4", "rouge_l", "length_ratio", "loops", "vocabulary", "facts_covered", "clipscore_hessel",
                    "ref_clipscore"} <= metrics.keys()
            assert row["styles"][style]["images_per_second"] > 0 and 0 <= row["styles"][style]["ended"] <= 1
    assert rows[0]["trainable_parameters"] == 0 and rows[0]["training_seconds"] is None
    assert rows[1]["trainable_parameters"] < 0.1 * rows[1]["parameters"]
    assert rows[2]["training_images_per_second"] > 0 and rows[2]["steps"] == 2
    assert "differences" not in rows[0]["styles"]["long"] and rows[1]["styles"]["long"]["differences"]["cider_d"]["p"]


def test_stars_are_held_to_how_many_there_are(compared: tuple[Path, str]) -> None:
    apart = [found["differences"]["cider_d"] for row in result(compared)["captioners"][1:]
             for found in row["styles"].values()]
    assert len(apart) == 4 and all(each["p_holm"] >= each["p"] for each in apart)
    assert min(each["p_holm"] for each in apart) == min(1.0, 4 * min(each["p"] for each in apart))
    assert all(each["verdict"] == "can't tell" for each in apart if each["p_holm"] >= 0.05)


def test_all_caption_the_same_images(compared: tuple[Path, str]) -> None:
    uids = []
    for name in ("untuned", "blip2", "from-scratch"):
        captions = json.loads((compared[0] / name / "captions" / "captions.json").read_text())
        uids.append(set(captions["long"]))
        assert captions["short"].keys() == captions["long"].keys()
    assert uids[0] == uids[1] == uids[2] and len(uids[0]) == 6  # of 16


def test_train_validation_and_test_share_no_image(shard: Path, tmp_path: Path) -> None:
    config = Finetune(test_share=0.4, validation=Validation(share=0.2), seed=3)
    held_in, held_out = read_images(tmp_path, [str(shard)], config, STYLES)
    test = read_test_images(tmp_path, [str(shard)], config, STYLES)
    parts = [{image.uid for image in part} for part in (held_in, held_out, test)]
    assert [len(part) for part in parts] == [8, 2, 6] and len(set.union(*parts)) == 16


def test_the_table_fits_a_terminal_and_the_page_stands_alone(compared: tuple[Path, str]) -> None:
    table = compared[1].split("The page:")[0]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "blip2" in table and "CIDEr-D" in table
    page = (compared[0] / "index.html").read_text()
    assert "from-scratch" in page and "<th>RefCLIPScore</th>" in page
    assert page.count('src="data:image/') == 6 and "http" not in page


def test_the_same_command_again_does_nothing_anew(compared: tuple[Path, str], experiment: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    before = (compared[0] / "blip2" / "captioner" / "done.json").stat().st_mtime_ns
    compare(load(experiment, [], Experiment), downstream=False, redo=False)
    out, err = capsys.readouterr()
    assert err.count("done before") == 5
    assert (compared[0] / "blip2" / "captioner" / "done.json").stat().st_mtime_ns == before
    assert out == compared[1]


def test_one_that_was_tuned_before_speaks_as_it_was_tuned(compared: tuple[Path, str], experiment: Path,
                                                          world_models: Path) -> None:
    adapter = experiment.parent / "runs" / "three" / "compare" / "blip2" / "captioner" / "best"
    captioners = f'{{a={{captioner={{model="{world_models}/blip2", tuned="{adapter}"}}}}}}'
    before = load(experiment, ["name=before", f"compare.captioners={captioners}"], Experiment)
    compare(before, downstream=False, redo=False)
    folder = experiment.parent / "runs" / "before" / "compare"
    said = [json.loads((path / "captions" / "captions.json").read_text())
            for path in (folder / "a", compared[0] / "blip2", compared[0] / "untuned")]
    assert said[0] == said[1] != said[2]
    row = json.loads((folder / "compare.json").read_text())["captioners"][0]
    assert row["tuned"] == "before" and row["trainable_parameters"] is None
    assert "what those “tuned before” have seen" in " ".join((folder / "index.html").read_text().split())


def test_captions_without_words_are_not_scored() -> None:
    from eval.captioner_scores import _references
    images = [CaptionedImage(name, ImageRef(name), (("long", text),)) for name, text in (("a", "🙂"), ("b", "a dog"))]
    assert _references(images, "long") == {"b": ["a dog"]}


@pytest.mark.parametrize(("override", "message"), [
    ("compare.captioners.blip2.finetune.seed=1", "compare.captioners.blip2: finetune.seed says which images"),
    ("compare.captioners.blip2.captioner.model=./none", "captioner.model: no folder at ./none"),
    ("evaluate.judge.model=./none", "evaluate.judge"),
    ('compare.metrics=["spice"]', "compare.metrics: SPICE needs"),
    ("finetune.test_share=0", "set finetune.test_share"),
    ("compare.captioners={}", "at least 1 item"),
    ("compare.baseline=blop", "no captioner 'blop' there"),
    ("compare.captioners.blip2.finetune.lrr=1", "compare.captioners.blip2: unknown key finetune.lrr"),
    ("compare.captioners.blip2.captioner.family=blop", "no captioner family 'blop'"),
])
def test_what_a_user_can_mend_is_one_line(experiment: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compare(load(experiment, ["name=other", override], Experiment), downstream=False, redo=False)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_experiment_without_captioners_to_compare_is_one_clear_line() -> None:
    done = recap("compare", "-c", str(CONFIG))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("recap: this experiment has no [compare] table") and done.stderr.count("\n") == 1


@pytest.mark.full
def test_downstream_an_arm_is_trained_on_each_ones_captions(world_models: Path, world_shards: Path,
                                                            tmp_path: Path) -> None:
    done = recap("compare", "-c", str(CONFIG), "--downstream", *settings(world_models, world_shards, tmp_path),
                 'arms=["mix"]', "finetune.test_share=0.3", "compare.captioners.untuned.captioner.tuned=none",
                 "compare.captioners.cnn.captioner.family=cnn_lstm", "compare.captioners.cnn.captioner.model=",
                 f"compare.captioners.cnn.captioner.cnn_lstm.encoder={world_models}/cnn", timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "tiny" / "compare" / "compare.json").read_text())
    for row in found["captioners"]:
        assert row["downstream"].keys() == {"seed-0/mix"}
        assert {"fid", "clip_score", "object_accuracy"} <= row["downstream"]["seed-0/mix"].keys()
    relabelled = [next((tmp_path / "tiny" / "compare" / name / "relabel").glob("*.tar")) for name in ("untuned", "cnn")]
    texts = [next(iter(read_shard(str(shard), []))).caption("short") for shard in relabelled]
    assert texts[0] != texts[1]
    assert "object accuracy" in done.stdout and "seed-0/mix" in done.stdout
