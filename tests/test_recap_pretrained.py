"""Checkpoints: hub ids and local folders alike, and only from files that cannot run code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recap.captioners import open_captioner
from recap.config import Model
from recap.config.captioner import Captioner
from recap.errors import UserError
from recap.pretrained import find_local, identity

SHOW = ("import sys; from recap.config.captioner import Captioner; from recap.captioners import open_captioner; "
        "opened = lambda revision: open_captioner(Captioner(model=sys.argv[1], revision=revision, dtype='float32'), "
        "'cpu'); [print(revision, opened(revision).text.end, file=sys.stderr) for revision in sys.argv[2:]]")


def opened(cache: Path, model: str, *revisions: str) -> str:
    """Open a captioner in a process of its own, with its own hub cache and no network; all that it says."""
    env = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", SHOW, model, *revisions], env=env, capture_output=True, text=True
                          ).stderr


def test_a_hub_id_is_opened_from_the_hubs_cache_as_a_folder_is(world_models: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(world_models / "blip2", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    eos = open_captioner(Captioner(model=str(world_models / "blip2"), dtype="float32"), "cpu").text.end
    by_commit, by_branch = f"{commit} {eos}\n", f"main {eos}\n"
    said = opened(tmp_path, "someone/tiny", commit, "main")
    assert said.startswith(by_commit) and said.endswith(by_branch)
    assert "read at revision main, which can change" in said.removeprefix(by_commit)


def test_pickled_weights_are_refused(world_models: Path, tmp_path: Path) -> None:
    shutil.copytree(world_models / "blip2", tmp_path / "blip2")
    (tmp_path / "blip2" / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "blip2" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"captioner\.model: cannot load") as caught:
        open_captioner(Captioner(model=str(tmp_path / "blip2")), "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "no config", "a layer missing"])
def test_a_damaged_checkpoint_is_one_clear_line(world_models: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(world_models / "blip2", tmp_path / "blip2")
    weights = tmp_path / "blip2" / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "no config":
        (tmp_path / "blip2" / "config.json").write_text("{")
    else:
        save_file({name: tensor for name, tensor in load_file(weights).items() if "layers.1" not in name}, weights,
                  metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"captioner\.model: ") as caught:
        open_captioner(Captioner(model=str(tmp_path / "blip2"), dtype="float32"), "cpu")
    assert "\n" not in str(caught.value)


def test_a_path_is_never_taken_for_a_hub_id(tmp_path: Path) -> None:
    for name in ("./models/blip2", "/no/such", "~/no-such", "a/b/c", "local-dir:models"):
        with pytest.raises(UserError, match="no folder at"):
            find_local(Model(model=name), "train")
    assert find_local(Model(model="Salesforce/blip2-opt-2.7b"), "captioner") is None
    assert find_local(Model(model=f"local-dir:{tmp_path}"), "captioner") == tmp_path


def test_the_identity_of_a_folder_changes_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = identity(Model(model=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert identity(Model(model=str(tmp_path))) != before
    assert identity(Model(model="someone/tiny", revision="abc")) == "someone/tiny@abc"
