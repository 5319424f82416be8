"""Pictures → metrics: those of the parts, over the headline sets and over every set; what is wrong is one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import evaluate, fid
from eval.clip_score import ClipScorer
from eval.config import ClipScore, Evaluate, Features, JudgeRef
from eval.evaluate import read_drawn
from eval.features import features, iterate_images, open_network
from eval.generate import image_path
from eval.prompts import Prompt
from eval.scores import Scores
from recap.errors import UserError
from recap.rundir import StageDir

NUM_DRAWN, NUM_PROBES = 20, 6
JUDGE = '''
class Judge:
    name = "judge of reds"
    metrics = {"redness": "how red the picture is", "rare": "asked by no prompt of the headline sets",
               "never": "asked by no prompt"}

    @classmethod
    def open(cls, folder, device):
        return cls()

    def images(self, images, prompts):
        return [{"redness": image.getpixel((0, 0))[0] / 255 if prompt.about.get("red") else None,
                 "rare": 0.25 if prompt.set == "probe" else None, "never": None}
                for image, prompt in zip(images, prompts)]
'''


def pictures(folder: Path, count: int, seed: int) -> None:
    """Write images of 16 coloured squares."""
    folder.mkdir(parents=True)
    squares = np.random.default_rng(seed).integers(256, size=(count, 4, 4, 3), dtype=np.uint8)
    for index, pixels in enumerate(squares.repeat(8, axis=1).repeat(8, axis=2)):
        Image.fromarray(pixels).save(image_path(folder, index))


@pytest.fixture(scope="module")
def config(world_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    real = tmp_path_factory.mktemp("real") / "images"
    pictures(real, 16, seed=1)
    return Evaluate(reference=str(real), batch_size=5,
                    features=Features(model=f"local-dir:{world_models / 'features'}"),
                    clip_score=ClipScore(model=f"local-dir:{world_models / 'clip'}"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, config: Evaluate) -> Path:
    stage = StageDir(tmp_path_factory.mktemp("reference"), {})
    result = evaluate.reference(stage, config, "cpu")
    assert result["num_images"] == 16 and result["excluded"] == {}
    return stage.path / "reference.npz"


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """As if an arm had drawn it: 14 pictures of the set `seen`, and among them 6 of the set `probe`."""
    folder = tmp_path / "alt"
    pictures(folder, NUM_DRAWN, seed=0)
    rows = [{"index": index, "prompt": f"scene {index}", "set": "probe" if 4 <= index < 4 + NUM_PROBES else "seen",
             "about": {"red": index % 2 == 0, "says": "a\u2028b"}, "seed": index, "windows": 1}
            for index in range(NUM_DRAWN)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                                          encoding="utf-8")
    return folder


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JudgeRef:
    name = f"judge_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    return JudgeRef(target=f"{name}:Judge", model=str(tmp_path))


def scored(drawn: Path, reference: Path, config: Evaluate) -> tuple[dict[str, object], Path]:
    stage = StageDir(drawn.parent / "eval", {})
    metrics = evaluate.run(stage, drawn, reference, config, "cpu")
    assert json.loads((stage.path / "metrics.json").read_bytes()) == metrics
    return metrics, stage.path


def test_metrics_are_those_of_the_parts(drawn: Path, reference: Path, config: Evaluate,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    metrics, folder = scored(drawn, reference, config)
    images = list(iterate_images(str(drawn), "test", []))
    network = open_network(config.features, "evaluate.features", "cpu")
    found = features(images, network, 7)
    scores, _ = ClipScorer(config.clip_score.model, "cpu").score(images, [f"scene {i}" for i in range(NUM_DRAWN)])
    expected = fid.frechet_distance(fid.statistics(found), fid.load(reference)[0])
    assert metrics["fid"] == pytest.approx(expected, rel=1e-4)
    assert metrics["clip_score"] == pytest.approx(scores.mean(), abs=1e-4)
    assert (metrics["num_images"], metrics["num_reference"], metrics["clip_truncated"]) == (NUM_DRAWN, 16, 0)
    assert (metrics["judge"], metrics["headline_sets"]) == (None, ["seen", "probe"])
    np.testing.assert_allclose(Scores.load(folder / "scores.json").columns["clip_score"], scores, atol=1e-4)
    with np.load(folder / "features.npz") as content:
        assert content["features"].dtype == np.float32 and content["index"].tolist() == list(range(NUM_DRAWN))
        np.testing.assert_allclose(content["features"], found, rtol=1e-3, atol=1e-3)
    assert "far too high" in capsys.readouterr().err  # fewer images than features


def test_headline_figures_are_over_the_chosen_sets(drawn: Path, reference: Path, config: Evaluate,
                                                   tmp_path: Path) -> None:
    metrics, folder = scored(drawn, reference, config.model_copy(update={"sets": ["seen"]}))
    seen = [index for index in range(NUM_DRAWN) if not 4 <= index < 4 + NUM_PROBES]
    with np.load(folder / "features.npz") as content:
        assert content["index"].tolist() == seen
        expected = fid.frechet_distance(fid.statistics(content["features"]), fid.load(reference)[0])
    scores = Scores.load(folder / "scores.json")
    assert metrics["fid"] == pytest.approx(expected, rel=1e-6)
    assert metrics["clip_score"] == pytest.approx(np.mean([scores.columns["clip_score"][index] for index in seen]))
    assert (metrics["num_images"], metrics["headline_sets"]) == (len(seen), ["seen"])
    assert [metrics["sets"][name]["num_images"] for name in ("seen", "probe")] == [len(seen), NUM_PROBES]
    assert metrics["sets"]["seen"]["clip_score"] == metrics["clip_score"] != metrics["sets"]["probe"]["clip_score"]


def test_a_judges_metrics_are_means_over_what_was_asked(drawn: Path, reference: Path, config: Evaluate,
                                                        judge: JudgeRef) -> None:
    metrics, folder = scored(drawn, reference, config.model_copy(update={"sets": ["seen"], "judge": judge}))
    red = {index: Image.open(image_path(drawn, index)).getpixel((0, 0))[0] / 255 for index in range(0, NUM_DRAWN, 2)}
    scores = json.loads((folder / "scores.json").read_bytes())
    assert scores["schema"] == 1 and scores["sets"][3:5] == ["seen", "probe"]
    assert scores["redness"] == [red.get(index) for index in range(NUM_DRAWN)]
    assert scores["never"] == [None] * NUM_DRAWN
    assert metrics["redness"] == pytest.approx(np.mean([value for index, value in red.items() if not 4 <= index < 10]))
    assert metrics["sets"]["probe"]["rare"] == 0.25
    assert "rare" not in metrics and "rare" not in metrics["sets"]["seen"] and "never" not in metrics
    assert metrics["judge"]["name"] == "judge of reds"
    assert metrics["judge"]["metrics"]["redness"] == "how red the picture is"


@pytest.mark.parametrize(("sets", "says"), [
    (["sene"], "evaluate.sets: no prompt set 'sene' in generate.prompts: did you mean seen?"),
    (["seen", "xyz"], "no prompt set 'xyz' in generate.prompts: the sets are seen, probe"),
    (["lonely"], "evaluate.sets: 1 pictures to take FID over"),
])
def test_sets_that_cannot_be_taken(drawn: Path, reference: Path, config: Evaluate, sets: list[str], says: str) -> None:
    if sets == ["lonely"]:
        listing = drawn / "prompts.jsonl"
        listing.write_text(listing.read_text(encoding="utf-8").replace('"probe"', '"lonely"', 1), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        scored(drawn, reference, config.model_copy(update={"sets": sets}))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_real_images_against_themselves(config: Evaluate, tmp_path: Path, drawn: Path) -> None:
    own = config.model_copy(update={"reference": str(drawn)})
    found = evaluate.reference(StageDir(tmp_path / "reference", {}), own, "cpu")
    metrics = evaluate.run(StageDir(tmp_path / "eval", {}), drawn, tmp_path / "reference", own, "cpu")
    assert found["num_images"] == NUM_DRAWN and metrics["fid"] == pytest.approx(0, abs=1e-9)


def test_another_networks_reference_is_refused(drawn: Path, reference: Path, config: Evaluate, tmp_path: Path) -> None:
    found, about = fid.load(reference)
    for change, says in [({"features": "clean-fid"}, "with features 'clean-fid'"), ({"resize": "none"}, "with resize")]:
        fid.save(tmp_path / "other.npz", found, about | change)
        with pytest.raises(UserError, match=says):
            evaluate.run(StageDir(tmp_path / "eval", {}), drawn, tmp_path / "other.npz", config, "cpu")


def test_prompts_come_back_as_they_were_listed(drawn: Path) -> None:
    found = read_drawn(drawn)
    assert found[5].path == image_path(drawn, 5)
    assert found[5].prompt == Prompt("scene 5", "probe", {"red": False, "says": "a\u2028b"})


def test_incomplete_folders_are_named(drawn: Path) -> None:
    image_path(drawn, 7).unlink()
    with pytest.raises(UserError, match=r"1 of 20 pictures are missing \(00007\.png first\)"):
        read_drawn(drawn)
    for damaged in ('{"index": 0}\n', '{"index": 0, "prompt": "a", "set": "b", "about": 3}\n', ""):
        (drawn / "prompts.jsonl").write_text(damaged)
        with pytest.raises(UserError, match=r"is damaged: delete .*done\.json"):
            read_drawn(drawn)
    (drawn / "prompts.jsonl").unlink()
    with pytest.raises(UserError, match=r"no prompts\.jsonl"):
        read_drawn(drawn)


def test_a_broken_picture_is_named(drawn: Path, reference: Path, config: Evaluate, tmp_path: Path) -> None:
    image_path(drawn, 3).write_bytes(image_path(drawn, 3).read_bytes()[:50])
    with pytest.raises(UserError, match=r"00003\.png is not a whole image"):
        evaluate.run(StageDir(tmp_path / "eval", {}), drawn, reference, config, "cpu")


def test_too_few_references(config: Evaluate, tmp_path: Path, drawn: Path) -> None:
    for path in sorted(drawn.glob("*.png"))[1:]:
        path.unlink()
    own = config.model_copy(update={"reference": str(drawn)})
    with pytest.raises(UserError, match="1 usable images"):
        evaluate.reference(StageDir(tmp_path / "reference", {}), own, "cpu")
