import io
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from eval.fid import Statistics, frechet_distance, load, save, statistics
from recap.errors import UserError


def draws(seed: int, n: int = 400, dim: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)


def test_closed_form_of_diagonal_gaussians() -> None:
    rng = np.random.default_rng(0)
    (mu1, mu2), (var1, var2) = rng.normal(size=(2, 50)), rng.uniform(0.1, 4, size=(2, 50))
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(var1) - np.sqrt(var2)) ** 2).sum()
    found = frechet_distance(Statistics(mu1, np.diag(var1), 100), Statistics(mu2, np.diag(var2), 100))
    assert found == pytest.approx(expected, rel=1e-10)


def test_agrees_with_a_matrix_square_root() -> None:
    a, b = statistics(draws(0)), statistics(draws(1))
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma).real
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


class _Given(torch.nn.Module):
    """Hands on features that were computed elsewhere."""

    num_features = 24

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def test_agrees_with_torchmetrics() -> None:
    real, drawn = draws(2), draws(3)
    metric = FrechetInceptionDistance(feature=_Given()).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(drawn), real=False)
    assert frechet_distance(statistics(drawn), statistics(real)) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_fewer_images_than_features() -> None:
    few = draws(4, n=10, dim=64)
    found, other = statistics(few), statistics(draws(5, n=12, dim=64))
    assert frechet_distance(found, found) == pytest.approx(0, abs=1e-12 * np.trace(found.sigma))
    assert 0 < frechet_distance(found, other) < 1e6  # scipy's square root has given 4.5e53 here


def test_statistics_are_float64_and_need_two() -> None:
    features = draws(6).astype(np.float32)
    found = statistics(features)
    assert found.mu.dtype == found.sigma.dtype == np.float64
    np.testing.assert_allclose(found.sigma, np.cov(features.astype(np.float64).T), rtol=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        statistics(features[:1])
    with pytest.raises(ValueError, match="24 and 23"):
        frechet_distance(found, statistics(features[:, 1:]))


def test_saved_statistics_come_back(tmp_path: Path) -> None:
    found = statistics(draws(7))
    save(tmp_path / "reference.npz", found, {"features": "a network"})
    back, about = load(tmp_path / "reference.npz")
    assert np.array_equal(back.mu, found.mu) and np.array_equal(back.sigma, found.sigma) and back.n == 400
    assert about["features"] == "a network"


def test_other_files_are_refused_unpickled(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1), n=2, about="{}")
    other = io.BytesIO()
    np.savez(other, mu=np.zeros(3), sigma=np.eye(2), n=2, about='{"schema": 1}')
    for content in (b"", b"no zip at all", buffer.getvalue(), other.getvalue()):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.npz.*run `recap reference` again"):
            load(tmp_path / "bad.npz")
    with pytest.raises(UserError, match="no reference statistics at"):
        load(tmp_path / "none.npz")
