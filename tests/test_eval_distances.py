"""KID, CMMD, precision and its like: against torch-fidelity, by hand, and in what arms are compared by."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

import eval.manifold
import eval.mmd
from eval.distances import KEYS, distances
from eval.fid import frechet, statistics
from eval.manifold import manifold, radii_of
from eval.mmd import cmmd, cubic, gaussian, kid, mean_within, squared_mmd, unit
from eval.reference import of_features


def draws(seed: int, num: int = 300, dim: int = 16, shift: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, size=(num, dim))


def test_kid_agrees_with_torch_fidelity() -> None:
    """Whose subsets, where they are as large as the sets, are the sets."""
    a, b = draws(0), draws(1, shift=0)
    found = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subsets=1, kid_subset_size=300,
                                   verbose=False)
    assert kid(a, b).value == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-9)


def test_kid_is_what_subsets_are_about() -> None:
    a, b = draws(0, 600), draws(1, 500, shift=0)
    found = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subsets=400, kid_subset_size=100,
                                   verbose=False)
    error = found["kernel_inception_distance_std"] / 400 ** 0.5
    assert abs(kid(a, b).value - found["kernel_inception_distance_mean"]) < 4 * error


def test_precision_and_recall_agree_with_torch_fidelity() -> None:
    a, b = draws(0, 200, 4, 0.5), draws(1, 250, 4, 0)
    expected = prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), verbose=False)
    found = manifold(a, b)
    assert 0.5 < found["precision"].value < 0.99
    assert found["precision"].value == pytest.approx(expected["precision"], rel=1e-6)
    assert found["recall"].value == pytest.approx(expected["recall"], rel=1e-6)


def test_density_and_coverage_by_their_definition() -> None:
    a, b = draws(2, 60, 3), draws(3, 50, 3, 0)
    found = manifold(a, b)
    among = np.sort(np.linalg.norm(b[:, None] - b, axis=2), axis=1)[:, 5]
    held = np.linalg.norm(a[:, None] - b, axis=2) <= among
    assert found["density"].value == pytest.approx(held.sum() / (5 * 60), rel=1e-12)
    assert found["coverage"].value == pytest.approx(held.any(axis=0).mean(), rel=1e-12)
    np.testing.assert_allclose(found["density"].pseudovalues, held.sum(axis=1) / 5)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = draws(0, 70), draws(1, 90, shift=0)
    whole = [kid(a, b), cmmd(a, b), *manifold(a, b).values()]
    monkeypatch.setattr(eval.mmd, "BLOCK", 16)
    monkeypatch.setattr(eval.manifold, "BLOCK", 16)
    for one, other in zip(whole, [kid(a, b), cmmd(a, b), *manifold(a, b).values()], strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-9)
        if one.pseudovalues is not None:
            np.testing.assert_allclose(one.pseudovalues, other.pseudovalues, rtol=1e-6, atol=1e-9)


def test_identical_images_and_copies_of_one() -> None:
    a = draws(0, 40)
    same = manifold(a, a)
    assert same["precision"].value == same["recall"].value == same["coverage"].value == 1
    one = np.repeat(a[:1], 40, axis=0)
    assert manifold(one, a)["coverage"].value <= 0.5 and manifold(one, a)["precision"].value == 1


@pytest.mark.parametrize("kernel", [cubic, gaussian])
def test_mmd_has_no_bias(kernel: eval.mmd.Kernel) -> None:
    """Two sets of one distribution: 0 in the mean, below it as often as not, however few images."""
    found = [squared_mmd(draws(seed, 12, 4), draws(seed + 10_000, 15, 4), kernel).value for seed in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20
    assert 0.3 < np.mean(np.array(found) < 0) < 0.8


def test_cmmd_is_the_gaussian_mmd_of_unit_vectors() -> None:
    a, b = draws(0, 30), draws(1, 40, shift=0)
    x, y = unit(a), unit(b)
    within = [np.exp(-np.linalg.norm(v[:, None] - v, axis=2) ** 2 / 200) for v in (x, y)]
    across = np.exp(-np.linalg.norm(x[:, None] - y, axis=2) ** 2 / 200).mean()
    means = [(k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in within]
    assert cmmd(a, b).value == pytest.approx(1000 * (sum(means) - 2 * across), rel=1e-9)
    assert cmmd(7 * a, b).value == pytest.approx(cmmd(a, b).value)


@pytest.mark.parametrize("kernel", [cubic, gaussian])
def test_pseudovalues_scatter_as_the_figure_does(kernel: eval.mmd.Kernel) -> None:
    reference = draws(999, 2000, 4, 0)
    within = mean_within(reference, kernel)
    found = [squared_mmd(draws(seed, 150, 4, 0.5), reference, kernel, within) for seed in range(200)]
    for each in found[:3]:
        assert each.pseudovalues is not None and each.pseudovalues.mean() == pytest.approx(each.value)
    scatter = np.std([each.value for each in found])
    told = np.mean([np.std(each.pseudovalues) / 150 ** 0.5 for each in found if each.pseudovalues is not None])
    assert told == pytest.approx(scatter, rel=0.2)


def test_pictures_of_a_prompt_are_alike_and_no_pair() -> None:
    """KID and FID∞ of arms of one distribution, of which one's pictures of a prompt differ little."""
    reference = statistics(draws(9, 20_000, 4, 0))
    real, rng = draws(8, 2000, 4, 0), np.random.default_rng(0)
    prompts = np.repeat(np.arange(60), 5)
    found: dict[str, list[list[float]]] = {"kid": [[], []], "fid": [[], []]}
    for _ in range(60):
        scenes = rng.normal(0.4, 1, size=(60, 4))
        alike = scenes.repeat(5, axis=0) * 0.95 + 0.02 + 0.3122 * rng.normal(size=(300, 4))
        apart = rng.normal(0.4, 1, size=(300, 4))
        for place, each in enumerate((alike, apart)):
            found["kid"][place].append(kid(each, real, prompts=prompts).value)
            found["fid"][place].append(float(frechet(each, reference, prompts).unbiased or 0))
    for alike, apart in found.values():
        error = (np.var(alike) / 60 + np.var(apart) / 60) ** 0.5
        assert abs(np.mean(alike) - np.mean(apart)) < 4 * error


def test_what_is_known_of_the_reference_makes_no_difference() -> None:
    a, b = draws(0, 100), draws(1, 400, shift=0)
    for table, keys in KEYS.items():
        found = distances(table, a, of_features(b, {}, table))
        assert tuple(found) == keys
    by_hand = {"kid": kid(a, b).value, "precision": manifold(a, b)["precision"].value}
    found = distances("features", a, of_features(b, {}))
    assert {key: found[key].value for key in by_hand} == pytest.approx(by_hand, rel=1e-5)  # kept in float32
    few = distances("features", a[:5], of_features(b, {}))
    assert tuple(few) == ("fid", "kid")


def test_all_pictures_may_be_of_one_prompt() -> None:
    a, b = draws(0, 40), draws(1, shift=0)
    assert kid(a, b, prompts=np.zeros(40, dtype=int)).value == kid(a, b).value
    found = frechet(draws(0, 400), statistics(draws(1, 4000)), np.repeat([0, 1], 200))
    assert found.pseudovalues is None and found.why == "no interval: 2 prompts are too few (at least 4)"


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        kid(draws(0, 1), draws(1))
    with pytest.raises(ValueError, match="more than 5"):
        radii_of(draws(0, 5))
