import json
from pathlib import Path

import numpy as np
import pytest

from eval import evaluate, fid
from eval.clip_score import ClipScorer
from eval.config import ClipScore, Evaluate, Features
from eval.evaluate import read_drawn
from eval.features import features, iterate_images, open_network
from eval.generate import image_path
from recap.errors import UserError
from recap.rundir import StageDir


@pytest.fixture(scope="module")
def config(world_models: Path, world_shards: Path) -> Evaluate:
    return Evaluate(reference=str(world_shards / "eval" / "*.tar"), batch_size=5,
                    features=Features(model=f"local-dir:{world_models / 'features'}"),
                    clip_score=ClipScore(model=f"local-dir:{world_models / 'clip'}"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, config: Evaluate) -> Path:
    stage = StageDir(tmp_path_factory.mktemp("reference"), {})
    result = evaluate.reference(stage, config, "cpu")
    assert result["num_images"] == 16 and result["excluded"] == {}
    return stage.path / "reference.npz"


@pytest.fixture
def drawn(tmp_path: Path, world_shards: Path) -> Path:
    """The training scenes, as if an arm had drawn them."""
    folder = tmp_path / "alt"
    folder.mkdir()
    images = list(iterate_images(str(world_shards / "train" / "*.tar"), "test", []))[:20]
    rows = [{"index": index, "prompt": f"scene {index}", "seed": index, "windows": 1} for index in range(len(images))]
    for index, image in enumerate(images):
        image.save(image_path(folder, index))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_metrics_are_those_of_the_parts(drawn: Path, reference: Path, config: Evaluate, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    stage = StageDir(tmp_path / "eval", {})
    metrics = evaluate.run(stage, drawn, reference, config, "cpu")
    images = list(iterate_images(str(drawn), "test", []))
    network = open_network(config.features, "evaluate.features", "cpu")
    scorer = ClipScorer(config.clip_score.model, "cpu")
    expected = fid.frechet_distance(fid.statistics(features(images, network, 7)), fid.load(reference)[0])
    scores, _ = scorer.score(images, [f"scene {index}" for index in range(20)])
    assert metrics["fid"] == pytest.approx(expected, rel=1e-4)
    assert metrics["clip_score"] == pytest.approx(scores.mean(), abs=1e-4)
    assert (metrics["num_images"], metrics["num_reference"], metrics["clip_truncated"]) == (20, 16, 0)
    assert json.loads((stage.path / "metrics.json").read_bytes()) == metrics
    np.testing.assert_allclose(json.loads((stage.path / "scores.json").read_bytes()), scores, atol=1e-4)
    assert "far too high" in capsys.readouterr().err  # fewer images than features


def test_real_images_against_themselves(config: Evaluate, tmp_path: Path, drawn: Path) -> None:
    own = config.model_copy(update={"reference": str(drawn)})
    found = evaluate.reference(StageDir(tmp_path / "reference", {}), own, "cpu")
    metrics = evaluate.run(StageDir(tmp_path / "eval", {}), drawn, tmp_path / "reference", own, "cpu")
    assert found["num_images"] == 20 and metrics["fid"] == pytest.approx(0, abs=1e-9)


def test_another_networks_reference_is_refused(drawn: Path, reference: Path, config: Evaluate, tmp_path: Path) -> None:
    found, about = fid.load(reference)
    for change, says in [({"features": "clean-fid"}, "with features 'clean-fid'"), ({"resize": "none"}, "with resize")]:
        fid.save(tmp_path / "other.npz", found, about | change)
        with pytest.raises(UserError, match=says):
            evaluate.run(StageDir(tmp_path / "eval", {}), drawn, tmp_path / "other.npz", config, "cpu")


def test_incomplete_folders_are_named(drawn: Path) -> None:
    image_path(drawn, 7).unlink()
    with pytest.raises(UserError, match=r"1 of 20 pictures are missing \(00007\.png first\)"):
        read_drawn(drawn)
    (drawn / "prompts.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(UserError, match="is damaged"):
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
