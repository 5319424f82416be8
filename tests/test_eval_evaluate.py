"""Pictures → metrics: those of the parts, over the headline sets and over every set; what is wrong is one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval import evaluate, fid
from eval.clip_score import ClipScorer
from eval.config import ClipScore, Cmmd, Dino, Evaluate, Features, JudgeRef
from eval.drawn import loose_path
from eval.features import features, open_network
from eval.mmd import cmmd
from eval.reference import load, save
from eval.scores import Scores
from recap.errors import UserError
from recap.rundir import StageDir

NUM_DRAWN, NUM_PROBES = 20, 6
CHECKPOINTS = dict.fromkeys(["features", "dinov2", "cmmd", "clip_score", "judge"], "these")
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
        Image.fromarray(pixels).save(loose_path(folder, index))


def refer(stage: StageDir, config: Evaluate) -> dict[str, Any]:
    return evaluate.reference(stage, config, stage.path.parent / "measured", CHECKPOINTS, "cpu")


def evaluated(drawn: Path, reference: Path, config: Evaluate, keep: bool = True) -> tuple[dict[str, Any], Path]:
    folder = drawn.parent / "eval"
    measured = drawn.parent / "measured"
    return evaluate.run(StageDir(folder, {}), drawn, reference, config, measured, CHECKPOINTS, keep, "cpu"), folder


@pytest.fixture(scope="module")
def config(world_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    real = tmp_path_factory.mktemp("real") / "images"
    pictures(real, 16, seed=1)
    return Evaluate(reference=str(real), batch_size=5,
                    features=Features(model=f"local-dir:{world_models / 'features'}"),
                    clip_score=ClipScore(model=f"local-dir:{world_models / 'clip'}"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, config: Evaluate) -> Path:
    stage = StageDir(tmp_path_factory.mktemp("reference") / "reference", {})
    result = refer(stage, config)
    assert result["num_images"] == 16 and result["excluded"] == {}
    return stage.path


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


def scored(drawn: Path, reference: Path, config: Evaluate) -> tuple[dict[str, Any], Path]:
    metrics, folder = evaluated(drawn, reference, config)
    assert json.loads((folder / "metrics.json").read_bytes()) == metrics
    return metrics, folder


def images_of(drawn: Path) -> list[Image.Image]:
    return [Image.open(loose_path(drawn, index)).convert("RGB") for index in range(NUM_DRAWN)]


def test_metrics_are_those_of_the_parts(drawn: Path, reference: Path, config: Evaluate,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    metrics, folder = scored(drawn, reference, config)
    images = images_of(drawn)
    network = open_network(config.features, "evaluate.features", "cpu")
    found = features(images, network, 7)
    scores, _ = ClipScorer(config.clip_score.model, "cpu").score(images, [f"scene {i}" for i in range(NUM_DRAWN)])
    expected = fid.frechet_distance(fid.statistics(found), load(reference / "features.npz").statistics)
    assert metrics["fid"] == pytest.approx(expected, rel=1e-4)
    assert metrics["clip_score"] == pytest.approx(scores.mean(), abs=1e-4)
    assert (metrics["num_images"], metrics["num_prompts"], metrics["num_reference"]) == (NUM_DRAWN, NUM_DRAWN, 16)
    assert (metrics["judges"], metrics["headline_sets"], metrics["clip_truncated"]) == ([], ["seen", "probe"], 0)
    assert metrics["resolutions"] == {"32×32": NUM_DRAWN}
    np.testing.assert_allclose(Scores.load(folder / "scores.json").columns["clip_score"], scores, atol=1e-4)
    about = metrics["distances"]["fid"]
    assert about["network"] == network.name and about["dim"] == network.dim and "too few" in about["why"]
    said = " ".join(capsys.readouterr().err.split())
    assert f"{about['bias']:.3g} more" in said and about["bias"] > 0  # fewer images than features
    assert "fid_infinity" not in metrics and "fid" not in Scores.load(folder / "scores.json").columns


def test_headline_figures_are_over_the_chosen_sets(drawn: Path, reference: Path, config: Evaluate) -> None:
    metrics, folder = scored(drawn, reference, config.model_copy(update={"sets": ["seen"]}))
    seen = [index for index in range(NUM_DRAWN) if not 4 <= index < 4 + NUM_PROBES]
    images = images_of(drawn)
    found = features([images[index] for index in seen], open_network(config.features, "", "cpu"), 7)
    expected = fid.frechet_distance(fid.statistics(found), load(reference / "features.npz").statistics)
    scores = Scores.load(folder / "scores.json")
    assert metrics["fid"] == pytest.approx(expected, rel=1e-4)
    assert [index for index, value in enumerate(scores.columns["kid"]) if value is not None] == seen
    assert scores.means(["seen"])["kid"] == pytest.approx(metrics["kid"])
    assert metrics["clip_score"] == pytest.approx(np.mean([scores.columns["clip_score"][index] for index in seen]))
    assert (metrics["num_images"], metrics["headline_sets"]) == (len(seen), ["seen"])
    assert [metrics["sets"][name]["num_images"] for name in ("seen", "probe")] == [len(seen), NUM_PROBES]
    assert metrics["sets"]["seen"]["clip_score"] == metrics["clip_score"] != metrics["sets"]["probe"]["clip_score"]
    assert "kid" not in metrics["sets"]["seen"]


def test_several_networks_give_their_distances(drawn: Path, config: Evaluate, world_models: Path) -> None:
    clip = f"local-dir:{world_models / 'clip'}"
    own = config.model_copy(update={"dinov2": Dino(model=config.features.model, size=None), "cmmd": Cmmd(model=clip)})
    refer(StageDir(drawn.parent / "reference", {}), own)
    metrics, _ = scored(drawn, drawn.parent / "reference", own)
    assert metrics["fd_dinov2"] == pytest.approx(metrics["fid"])
    embedded = [ClipScorer(clip, "cpu").embed_images([image.resize((32, 32)) for image in each])
                for each in (images_of(drawn), [Image.open(path).convert("RGB")
                                                for path in sorted(Path(str(own.reference)).glob("*.png"))])]
    assert metrics["cmmd"] == pytest.approx(cmmd(*embedded).value, rel=0.05)  # the world's CLIP reads 32 pixels
    assert metrics["distances"]["cmmd"]["network"].startswith("open_clip clip@")


def test_pictures_of_one_prompt_are_averaged(drawn: Path, reference: Path, config: Evaluate) -> None:
    rows = [json.loads(line) | {"prompt_index": place // 2, "set": "seen"} for place, line in
            enumerate((drawn / "prompts.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n"))]
    (drawn / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    metrics, folder = scored(drawn, reference, config)
    scores = Scores.load(folder / "scores.json")
    by_hand = np.array(scores.columns["clip_score"], dtype=float).reshape(-1, 2).mean(axis=1)
    np.testing.assert_allclose(scores.by_prompt("clip_score", ["seen"]), by_hand)
    assert (metrics["num_images"], metrics["num_prompts"]) == (NUM_DRAWN, NUM_DRAWN // 2)
    scores.columns["clip_score"][3:6] = [None, None, None]
    assert scores.by_prompt("clip_score", ["seen"])[1] == scores.columns["clip_score"][2]
    assert np.isnan(scores.by_prompt("clip_score", ["seen"])[2])


def test_a_judges_metrics_are_means_over_what_was_asked(drawn: Path, reference: Path, config: Evaluate,
                                                        judge: JudgeRef) -> None:
    metrics, folder = scored(drawn, reference, config.model_copy(update={"sets": ["seen"], "judge": judge}))
    red = {index: Image.open(loose_path(drawn, index)).getpixel((0, 0))[0] / 255 for index in range(0, NUM_DRAWN, 2)}
    scores = json.loads((folder / "scores.json").read_bytes())
    assert scores["schema"] == 2 and scores["sets"][3:5] == ["seen", "probe"]
    assert scores["redness"] == [red.get(index) for index in range(NUM_DRAWN)]
    assert scores["never"] == [None] * NUM_DRAWN
    assert metrics["redness"] == pytest.approx(np.mean([value for index, value in red.items() if not 4 <= index < 10]))
    assert metrics["sets"]["probe"]["rare"] == 0.25
    assert "rare" not in metrics and "rare" not in metrics["sets"]["seen"] and "never" not in metrics
    [judged] = metrics["judges"]
    assert judged["name"] == "judge of reds"
    assert judged["metrics"]["redness"] == {"about": "how red the picture is", "lower_is_better": False,
                                            "is_share": True}


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


def test_real_images_against_themselves(config: Evaluate, drawn: Path) -> None:
    own = config.model_copy(update={"reference": str(drawn)})
    found = refer(StageDir(drawn.parent / "reference", {}), own)
    metrics, _ = evaluated(drawn, drawn.parent / "reference", own)
    assert found["num_images"] == NUM_DRAWN and metrics["fid"] == pytest.approx(0, abs=1e-9)
    assert metrics["precision"] == metrics["coverage"] == 1


def test_another_networks_reference_is_refused(drawn: Path, reference: Path, config: Evaluate, tmp_path: Path) -> None:
    found = load(reference / "features.npz")
    for change, says in [({"network": "clean-fid"}, "with network 'clean-fid'"), ({"resize": "none"}, "with resize")]:
        save(tmp_path / "other" / "features.npz", replace(found, about=found.about | change))
        with pytest.raises(UserError, match=says):
            evaluated(drawn, tmp_path / "other", config)


def test_a_broken_picture_is_named(drawn: Path, reference: Path, config: Evaluate) -> None:
    loose_path(drawn, 3).write_bytes(loose_path(drawn, 3).read_bytes()[:50])
    with pytest.raises(UserError, match=r"picture 3 of .*alt is not a whole image"):
        evaluated(drawn, reference, config)


def test_two_judges_of_one_metric(drawn: Path, reference: Path, config: Evaluate, judge: JudgeRef) -> None:
    path = Path(judge.model) / f"{judge.target.partition(':')[0]}.py"
    path.write_text(path.read_text().replace("redness", "clip_score"))
    with pytest.raises(UserError, match=r"calls a metric 'clip_score': give names like"):
        evaluated(drawn, reference, config.model_copy(update={"judge": judge}))


def test_too_few_references(config: Evaluate, drawn: Path) -> None:
    for path in sorted(drawn.glob("*.png"))[1:]:
        path.unlink()
    with pytest.raises(UserError, match="1 usable images"):
        refer(StageDir(drawn.parent / "reference", {}), config.model_copy(update={"reference": str(drawn)}))


def test_pictures_without_prompts_have_distances_alone(drawn: Path, reference: Path, config: Evaluate) -> None:
    (drawn / "prompts.jsonl").write_text("".join(json.dumps({"index": index, "prompt": ""}) + "\n"
                                                 for index in range(NUM_DRAWN)))
    metrics, folder = evaluated(drawn, reference, config)
    assert "clip_score" not in metrics and metrics["clip_model"] is None and metrics["fid"] > 0
    assert set(Scores.load(folder / "scores.json").columns) == {"kid", "precision", "density"}
