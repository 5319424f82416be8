import os
import shutil
from pathlib import Path

import cleanfid.fid
import numpy as np
import pytest
import timm
import torch
import torchvision
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from inception import random_inception
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.clip_score import ClipScorer
from eval.config import Dino, Features
from eval.features import IMAGENET_MEAN, IMAGENET_STD, FeatureNetwork, features, open_network
from eval.fid import frechet_distance, statistics
from eval.mmd import unit
from recap.errors import UserError
from recap.shards import read_shard
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


def test_a_vit_is_opened_at_another_size(tmp_path: Path) -> None:
    """As DINOv2 is for FD-DINOv2; its positions are timm's interpolation of its own."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path, model_args={"img_size": 64}, safe_serialization=True)
    own, other = (open_network(Dino(model=f"local-dir:{tmp_path}", size=size), "evaluate.dinov2", "cpu")
                  for size in (None, 32))
    image = Image.fromarray(pixels(0, 80, 80))
    assert (own.size, other.size, other.dim) == ((64, 64), (32, 32), 192)
    assert features([image], other, 1).shape == (1, 192) and own.resize != other.resize
    with pytest.raises(UserError, match=r"evaluate\.features\.model: cannot load"):  # a CNN has no such thing
        convolutions = timm.create_model("resnet10t", num_classes=7)
        timm.models.save_for_hf(convolutions, tmp_path / "cnn", safe_serialization=True)
        open_network(Features(model=f"local-dir:{tmp_path / 'cnn'}", size=32), "evaluate.features", "cpu")


def test_clean_fid_without_its_weights_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/tmp/inception-2015-12-05.pt").exists():  # noqa: S108  (where clean-fid keeps it)
        pytest.skip("clean-fid's weights are on this machine")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match="cannot fetch or open clean-fid's Inception") as caught:
        open_network(Features(), "evaluate.features", "cpu")
    assert "\n" not in str(caught.value)


# --- clean-fid's Inception, of random weights, in the file format of the real one -----------------------------------


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    random_inception(path)
    return path


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_inception_is_clean_fids(inception: Path, shared_data: Path, tmp_path: Path) -> None:
    """Features of real photos, and with them FID, as clean-fid itself has it from the same weights."""
    samples = list(read_shard(str(shared_data / "photos" / "coco-open-00000.tar"), []))[:12]
    for index, sample in enumerate(samples):
        sample.image().save(tmp_path / f"{index:02d}.png")
    theirs = cleanfid.fid.get_folder_features(
        str(tmp_path), InceptionV3W(str(inception.parent), download=False), num_workers=0, batch_size=6,
        device=torch.device("cpu"), mode="clean", verbose=False)
    ours = features([sample.image() for sample in samples],
                    open_network(Features(model=f"clean-fid:{inception}"), "evaluate.features", "cpu"), 5)
    assert ours.shape == (12, 2048)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
    fids = [frechet_distance(statistics(each[:6]), statistics(each[6:])) for each in (ours, theirs)]
    assert fids[0] == pytest.approx(fids[1], rel=1e-3)


def test_inception_of_another_file_has_another_name(inception: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    other.write_bytes(inception.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot fetch or open clean-fid's Inception") as caught:
        open_network(Features(model=f"clean-fid:{other}"), "evaluate.features", "cpu")
    assert "\n" not in str(caught.value)
    name = open_network(Features(model=f"clean-fid:{inception}"), "evaluate.features", "cpu").name
    assert name.startswith("clean-fid inception-2015-12-05 ") and len(name.split()[-1]) == 16


# --- other networks ------------------------------------------------------------------------------------------------


def test_an_open_clip_encoder(world_models: Path) -> None:
    ref = Features(model=f"local-dir:{world_models / 'clip'}")
    network = open_network(ref, "evaluate.cmmd", "cpu")
    images = [Image.fromarray(pixels(seed, 32, 32)) for seed in range(3)]
    scorer = ClipScorer(ref.model, "cpu")
    assert network.size == (32, 32) and network.name == f"open_clip {scorer.version}"
    np.testing.assert_allclose(unit(features(images, network, 2)), scorer.embed_images(images), atol=1e-5)


def test_a_torchvision_network_from_a_file(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(weights=None).eval()
    image = pixels(0, 224, 224)
    expected = {}
    for suffix, write in ((".pth", torch.save), (".safetensors", save_file)):
        write(model.state_dict(), tmp_path / f"weights{suffix}")
        network = open_network(Features(model="torchvision:resnet18", weights=str(tmp_path / f"weights{suffix}")),
                               "evaluate.features", "cpu")
        expected[suffix] = features([image], network, 1)
    model.fc = torch.nn.Identity()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        direct = model((torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - mean) / std)
    np.testing.assert_allclose(expected[".pth"], direct, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(expected[".pth"], expected[".safetensors"])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize(("ref", "says"), [
    (Features(model="torchvision:resnet18"), "evaluate.features.weights: name the file"),
    (Features(model="torchvision:resnet18", weights="none.pth"), "cannot open torchvision:resnet18 with none.pth"),
    (Features(model="torchvision:resnet999", weights="evil.pth"), "cannot open torchvision:resnet999"),
    (Features(model="torchvision:resnet18", weights="evil.pth"), "cannot open torchvision:resnet18 with evil.pth"),
    (Features(model="x", target="no_such_module:Network"), "evaluate.features.target: cannot open no_such_module"),
    (Features(model="x", target="eval.features:FeatureNetwork"), "evaluate.features.target: cannot open"),
])
def test_networks_that_cannot_be_opened(ref: Features, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                        ) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), "evil.pth")
    with pytest.raises(UserError) as caught:
        open_network(ref, "evaluate.features", "cpu")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("ran").exists()


def test_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_network.py").write_text(
        "from eval.features import FeatureNetwork\n"
        "class Mean:\n"
        "    @staticmethod\n"
        "    def open(folder, device):\n"
        "        return FeatureNetwork('means of ' + folder, (8, 8), 3, lambda x: x.mean(dim=(2, 3)))\n")
    monkeypatch.syspath_prepend(tmp_path)
    network = open_network(Features(model="here", target="own_network:Mean"), "evaluate.features", "cpu")
    found = features([np.full((20, 20, 3), 51, dtype=np.uint8)], network, 4)
    np.testing.assert_allclose(found, [[51, 51, 51]], rtol=1e-6)
    assert network.name == "means of here"


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3)), np.zeros((8, 8), dtype=np.uint8),
                                   np.zeros((3, 8, 8), dtype=np.uint8)])
def test_arrays_that_are_no_images_are_refused(network: FeatureNetwork, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="an image is an array"):
        features([image], network, 1)
