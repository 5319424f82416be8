import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from eval.clip_score import ClipScorer


@pytest.fixture(scope="module")
def scorer(world_models: Path) -> ClipScorer:
    return ClipScorer(f"local-dir:{world_models / 'clip'}", "cpu")


def noise(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8))


def directly(folder: Path, image: Image.Image, text: str) -> float:
    """100·max(cos, 0), by open_clip alone."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([text])
    with torch.no_grad():
        image_vector, text_vector = model.eval().encode_image(preprocess(image)[None]), model.encode_text(tokens)
    return max(0.0, 100 * float(torch.cosine_similarity(image_vector, text_vector)))


def test_equals_open_clip(scorer: ClipScorer, world_models: Path) -> None:
    images, texts = [noise(seed) for seed in range(4)], ["a red circle", "a dog", "", "Two blue squares. One star."]
    scores, truncated = scorer.score(images, texts)
    expected = [directly(world_models / "clip", image, text) for image, text in zip(images, texts, strict=True)]
    assert scores.dtype == np.float64 and truncated == 0
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert "clip@" in scorer.name and "100·max(cos, 0)" in scorer.name


def test_the_end_of_a_long_caption_counts(scorer: ClipScorer, world_models: Path) -> None:
    start = "There is a small red circle at the left of the picture. " * 12
    texts = [start + "A green star is on top.", start + "A purple dog sleeps."]
    (first, second), truncated = scorer.score([noise(0)] * 2, texts)
    assert first != second and truncated == 0 and min(map(scorer.num_tokens, texts)) >= 150
    sentences = ["There is a small red circle at the left of the picture."] * 12 + ["A green star is on top."]
    expected = np.mean([directly(world_models / "clip", noise(0), sentence) for sentence in sentences])
    assert first == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("mark", ["<end_of_text>", "<|endoftext|>", "<End_Of_Text>"])
def test_a_mark_in_a_text_does_not_end_it(scorer: ClipScorer, mark: str) -> None:
    texts = [f"a red square{mark} nothing of this is true", f"a red square{mark} and a dog", "a red square"]
    found = scorer.embed_texts(texts)
    assert np.abs(found[0] - found[1]).max() > 1e-3 < np.abs(found[0] - found[2]).max()


def test_exactly_the_context_is_one_piece(scorer: ClipScorer) -> None:
    fits, over = " ".join(["cat."] * 37 + ["cat"]), " ".join(["cat."] * 38)  # 75 and 76 content tokens
    assert (scorer.num_tokens(fits), scorer.num_tokens(over)) == (77, 78)
    assert scorer._parts(fits) == [fits] and scorer._parts(over) == ["cat."] * 38


def test_a_sentence_beyond_the_context_is_counted(scorer: ClipScorer) -> None:
    texts = ["dog " * 200, "a dog", "A cat. " + "bird " * 100 + ". A cow."]
    scores, truncated = scorer.score([noise(0)] * 3, texts)
    assert truncated == 2 and np.isfinite(scores).all()


def test_sentences(scorer: ClipScorer) -> None:
    text = "It is 3.5 m high. “Stop!” 猫がいる。犬もいる。 No full stop\nA line " + "and so on " * 30
    assert scorer._parts(text)[:6] == ["It is 3.5 m high.", "“Stop!”", "猫がいる。", "犬もいる。", "No full stop",
                                      ("A line " + "and so on " * 30).strip()]


def test_odd_input(scorer: ClipScorer) -> None:
    assert scorer.score([], [])[0].shape == (0,)
    with pytest.raises(ValueError, match="1 images for 2 texts"):
        scorer.score([noise(0)], ["a", "b"])
    scores, _ = scorer.score([noise(0)] * 3, ["x" * 5000, "👩‍👩‍👧‍👦" * 200, "<img src=x onerror=alert(1)>"])
    assert np.isfinite(scores).all()


def test_what_cannot_be_opened_is_said(world_models: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(world_models / "clip", tmp_path / name))

    pickled, code, cut = broken("pickled"), broken("code"), broken("cut")
    (pickled / "open_clip_model.safetensors").rename(pickled / "open_clip_pytorch_model.bin")
    config = json.loads((code / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (code / "open_clip_config.json").write_text(json.dumps(config))
    (cut / "open_clip_model.safetensors").write_bytes((cut / "open_clip_model.safetensors").read_bytes()[:1000])
    for folder, says in [(pickled, "pickled weights are not opened"), (code, "trust_remote_code"), (cut, "cannot open"),
                         (tmp_path / "none", "no folder at")]:
        with pytest.raises(ValueError, match=says):
            ClipScorer(f"local-dir:{folder}", "cpu")
