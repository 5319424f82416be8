import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from cleanfid.resize import build_resizer
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.config import Features
from eval.features import FeatureNetwork, features, iterate_images, open_network
from recap.errors import UserError
from recap.sample import Sample
from recap.shards import Reject, ShardWriter
from recap.timm_features import clean_resizer


@pytest.fixture(scope="module")
def network(world_models: Path) -> FeatureNetwork:
    return open_network(Features(model=f"local-dir:{world_models / 'features'}"), "evaluate.features", "cpu")


def pixels(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def test_resize_is_clean_fids() -> None:
    for height, width in [(512, 512), (100, 333), (640, 480)]:
        image = pixels(0, height, width)
        assert np.array_equal(clean_resizer((299, 299))(image), build_resizer("clean")(image))
    wide = clean_resizer((20, 40))(pixels(1, 64, 64))
    assert wide.shape == (20, 40, 3) and wide.dtype == np.float32


def test_resize_agrees_with_antialiased_torch() -> None:
    image = pixels(2, 200, 150)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    other = torch.nn.functional.interpolate(tensor, (64, 48), mode="bicubic", antialias=True).clip(0, 255)
    np.testing.assert_allclose(clean_resizer((64, 48))(image), other[0].permute(1, 2, 0), atol=2e-3)


def test_features_are_timms(network: FeatureNetwork, world_models: Path) -> None:
    model = timm.create_model(f"local-dir:{world_models / 'features'}", pretrained=True, num_classes=0).eval()
    image = pixels(3, *network.size)
    with torch.no_grad():
        expected = model((torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5).double()
    found = features([Image.fromarray(image)], network, 4)
    assert found.shape == (1, network.dim) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_features_do_not_depend_on_the_batch(network: FeatureNetwork) -> None:
    images = [Image.fromarray(pixels(seed, 50 + seed, 90)) for seed in range(7)]
    told: list[int] = []
    found = features(iter(images), network, 3, told.append)
    np.testing.assert_allclose(found, np.concatenate([features([image], network, 1) for image in images]), atol=1e-5)
    assert told == [3, 3, 1]
    assert features([], network, 3).shape == (0, network.dim)


def test_the_name_tells_weights_apart(network: FeatureNetwork, world_models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world_models / "features", tmp_path / "features"))
    weights = load_file(folder / "model.safetensors")
    weights = {name: value + 1 for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors")
    assert open_network(Features(model=f"local-dir:{folder}"), "evaluate.features", "cpu").name != network.name
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="Missing key"):  # never random without a word
        open_network(Features(model=f"local-dir:{folder}"), "evaluate.features", "cpu")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights are not opened"):
        open_network(Features(model=f"local-dir:{folder}"), "evaluate.features", "cpu")


def test_a_classifier_is_dropped(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=7)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    found = open_network(Features(model=f"local-dir:{tmp_path}"), "evaluate.features", "cpu")
    assert found.dim == model.num_features and found.name.startswith("timm resnet10t")


def test_clean_fid_without_its_weights_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/tmp/inception-2015-12-05.pt").exists():  # noqa: S108  (where clean-fid keeps it)
        pytest.skip("clean-fid's weights are on this machine")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match="clean-fid cannot fetch or open") as caught:
        open_network(Features(), "evaluate.features", "cpu")
    assert "\n" not in str(caught.value)


def test_images_of_a_folder_and_of_shards(tmp_path: Path, shared_data: Path) -> None:
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for index, name in enumerate(["b.png", "a.webp", "below/c.JPG"]):
        Image.new("RGB", (10 + index, 10)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    sizes = [image.width for image in iterate_images(str(folder), "evaluate.reference", [])]
    assert sizes == [11, 10, 12]
    (folder / "a.webp").write_bytes((folder / "a.webp").read_bytes()[:20])
    with pytest.raises(UserError, match=r"a\.webp is not a whole image"):
        list(iterate_images(str(folder), "evaluate.reference", []))
    rejects: list[Reject] = []
    photos = shared_data / "photos" / "coco-open-00000.tar"
    assert len(list(iterate_images(str(photos), "evaluate.reference", rejects))) == 51 and not rejects


def test_a_broken_image_in_a_shard_is_counted(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "0.tar")) as writer:
        writer.write(Sample("0", "a", {"jpg": b"no image"}))
        writer.write(Sample("0", "b", {"txt": b"no image at all"}))
    rejects: list[Reject] = []
    assert list(iterate_images([str(tmp_path / "0.tar")], "evaluate.reference", rejects)) == []
    assert [reject.reason for reject in rejects] == ["undecodable_image", "missing_image"]


def test_no_images(tmp_path: Path) -> None:
    cases: list[tuple[str | list[str], str]] = [
        (str(tmp_path), "no image"), ([], "is empty"), (str(tmp_path / "none.tar"), "check the path")]
    for source, says in cases:
        with pytest.raises(UserError, match=says):
            list(iterate_images(source, "evaluate.reference", []))
