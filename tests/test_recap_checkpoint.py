"""Checkpoints: whole or not there, whenever the kill comes."""

from pathlib import Path

import pytest
import torch

from recap import checkpoint


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_what_is_saved_is_loaded_and_the_newest_counts(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, {"a.b": torch.full((2,), float(step))}, {"step": step})
    tensors, state = checkpoint.load(tmp_path) or ({}, {})
    assert state == {"step": 2} and tensors["a.b"].tolist() == [2.0, 2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_while_saving_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   renames: int) -> None:
    checkpoint.save(tmp_path, {"a": torch.ones(1)}, {"step": 1})
    rename, done = Path.rename, []

    def some(self: Path, target: Path) -> Path:
        if len(done) == renames:
            killed()
        done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", some)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, {"a": torch.zeros(1)}, {"step": 2})
    assert (checkpoint.load(tmp_path) or ({}, {}))[1] == {"step": 1}


def test_half_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"a": torch.ones(1)}, {"step": 1})
    (tmp_path / "checkpoint" / "state.safetensors").unlink()
    assert checkpoint.load(tmp_path) is None


def test_an_optimizers_moments_come_back(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    first = torch.optim.AdamW(weights, lr=0.1)
    sum(w.square().sum() for w in weights).backward()
    first.step()
    second = torch.optim.AdamW(weights, lr=0.1)
    checkpoint.load_optimizer(second, checkpoint.optimizer_tensors(first))
    assert str(first.state_dict()) == str(second.state_dict())
