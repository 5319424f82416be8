"""What is kept of real images comes back, and nothing else is taken for it."""

import io
from pathlib import Path

import numpy as np
import pytest

from eval.fid import statistics
from eval.mmd import cubic, mean_within
from eval.reference import Reference, kept, load, of_features, save
from recap.errors import UserError


def reference(table: str = "features", num: int = 40) -> Reference:
    return of_features(np.random.default_rng(0).normal(size=(num, 6)), {"network": "a network"}, table)


@pytest.mark.parametrize("table", ["features", "dinov2", "cmmd"])
def test_it_comes_back(tmp_path: Path, table: str) -> None:
    found = reference(table)
    save(tmp_path / f"{table}.npz", found)
    back = load(tmp_path / f"{table}.npz")
    np.testing.assert_array_equal(back.features, found.features)
    np.testing.assert_array_equal(back.statistics.sigma, found.statistics.sigma)
    assert (back.num, back.statistics.n, back.within) == (40, 40, found.within) and back.about["network"] == "a network"
    assert (back.radii is None) == (table != "features") and (back.within is None) == (table == "dinov2")
    if back.radii and found.radii:
        np.testing.assert_array_equal(back.radii.squared[5], found.radii.squared[5])


def test_it_is_of_all_images() -> None:
    values = np.random.default_rng(0).normal(size=(40, 6))
    assert reference().within == pytest.approx(mean_within(values, cubic))
    np.testing.assert_allclose(reference().statistics.mu, statistics(values).mu)
    assert reference(num=4).radii is None


def test_it_is_found_in_its_folder_or_the_one_above(tmp_path: Path) -> None:
    save(tmp_path / "reference" / "features.npz", reference())
    assert kept(str(tmp_path)) == kept(str(tmp_path / "reference")) == tmp_path / "reference"
    assert kept(str(tmp_path / "none")) is None


def changed(**members: np.ndarray) -> bytes:
    """A file with other members than it had."""
    buffer = io.BytesIO()
    found = reference()
    known = {"features": found.features, "mu": found.statistics.mu, "sigma": found.statistics.sigma,
             "within": np.float64(found.within or 0), "about": np.str_('{"schema": 2}'),
             **{f"radii_{k}": values for k, values in (found.radii.squared if found.radii else {}).items()}}
    np.savez(buffer, **{**known, **members})  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("content", [
    b"", b"no zip at all", changed(mu=np.array([{"a": 1}], dtype=object)), changed(about=np.str_('{"schema": 1}')),
    changed(sigma=np.eye(2)), changed(features=np.zeros((40, 5))), changed(radii_3=np.zeros(5)),
    changed(radii_4=np.zeros(40)), changed(mu=np.full(6, np.nan)), changed(features=np.full((40, 6), np.inf)),
])
def test_other_files_are_refused_unpickled(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.npz.*run `recap reference` again") as caught:
        load(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value)
    (tmp_path / "good.npz").write_bytes(changed())
    assert load(tmp_path / "good.npz").num == 40


def test_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reference statistics at"):
        load(tmp_path / "none.npz")
