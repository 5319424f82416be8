"""The Fréchet distance, and its pseudovalues: intervals of differences cover, and none is given where it would lie."""

import cleanfid.fid
import numpy as np
import pytest
import scipy
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance

from eval.fid import Statistics, distance_to, frechet, frechet_distance, statistics, why_no_interval
from eval.statistics import paired_difference, paired_ratio

DIM, NUM = 8, 200
REFERENCE = Statistics(np.zeros(DIM), np.eye(DIM), 100_000)


def draws(seed: int, n: int = 400, dim: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)


def features(mean: float, seed: int, num: int = NUM) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, size=(num, DIM))


def pseudovalues(values: np.ndarray) -> np.ndarray:
    found = frechet(values, REFERENCE).pseudovalues
    assert found is not None
    return found


# --- the distance --------------------------------------------------------------------------------------------------


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
    assert distance_to(a)(b) == pytest.approx(expected, rel=1e-8)


@pytest.mark.skipif(scipy.__version__ >= "1.18", reason="clean-fid 0.1.35 asks sqrtm for what scipy 1.18 no longer has")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agrees_with_clean_fid() -> None:
    a, b = statistics(draws(0)), statistics(draws(1))
    expected = cleanfid.fid.frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


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


def test_features_that_are_the_same_in_all_images() -> None:
    a, b = draws(0), draws(1)
    both = [np.concatenate([each, np.zeros((400, 3)), each[:, :2]], axis=1) for each in (a, b)]
    expected = frechet_distance(*(statistics(np.concatenate([each, each[:, :2]], axis=1)) for each in (a, b)))
    assert frechet_distance(*map(statistics, both)) == pytest.approx(expected, rel=1e-6)
    constant = statistics(np.ones((400, 24)))
    assert frechet_distance(constant, constant) == 0
    assert frechet_distance(statistics(a), constant) == pytest.approx(frechet_distance(constant, statistics(a)))


def test_fewer_images_than_features() -> None:
    few = draws(4, n=10, dim=64)
    found, other = statistics(few), statistics(draws(5, n=12, dim=64))
    assert frechet_distance(found, found) == pytest.approx(0, abs=1e-12 * np.trace(found.sigma))
    assert 0 < frechet_distance(found, other) < 1e6  # scipy's square root has given 4.5e53 here


@given(st.integers(0, 1000), st.integers(2, 12), st.integers(1, 6))
def test_it_is_a_distance(seed: int, num: int, dim: int) -> None:
    a, b = (statistics(np.random.default_rng(seed + side).normal(size=(num, dim))) for side in (0, 5000))
    assert frechet_distance(a, b) >= 0
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6, abs=1e-9)


def test_statistics_are_float64_and_need_two() -> None:
    values = draws(6).astype(np.float32)
    found = statistics(values)
    assert found.mu.dtype == found.sigma.dtype == np.float64
    np.testing.assert_allclose(found.sigma, np.cov(values.astype(np.float64).T), rtol=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        statistics(values[:1])
    with pytest.raises(ValueError, match="24 and 23"):
        frechet_distance(found, statistics(values[:, 1:]))


# --- pseudovalues --------------------------------------------------------------------------------------------------


def test_influence_is_what_one_image_more_changes() -> None:
    """Against the distance itself, with the weight of one image a little larger."""
    reference, values = statistics(draws(0, 2000, 6)), draws(1, 300, 6)
    found = frechet(values, reference).pseudovalues
    assert found is not None
    for place in (0, 100, 299):
        weights = np.full(300, 1 / 300) * (1 - 1e-5)
        weights[place] += 1e-5
        mu = weights @ values
        sigma = (values - mu).T @ ((values - mu) * weights[:, None]) * 300 / 299
        changed = frechet_distance(Statistics(mu, sigma, 300), reference)
        derivative = (changed - frechet_distance(statistics(values), reference)) / 1e-5
        assert found[place] - found.mean() == pytest.approx(derivative, rel=0.02, abs=0.05)


def test_the_mean_of_pseudovalues_is_of_endless_images() -> None:
    true = DIM * 0.5 ** 2
    few = [frechet(features(0.5, seed, 64), REFERENCE) for seed in range(40)]
    assert np.mean([each.value for each in few]) > 1.15 * true
    assert np.mean([each.unbiased for each in few]) == pytest.approx(true, rel=0.05)
    assert few[0].bias == pytest.approx(few[0].value - float(few[0].unbiased or 0))


def test_intervals_cover_the_true_difference_and_ratio() -> None:
    true = [DIM * mean ** 2 for mean in (0.5, 0.7)]  # Gaussians of unit variance: the squared distance of the means
    hits = ratios = 0
    for trial in range(100):
        a, b = pseudovalues(features(0.5, 2 * trial)), pseudovalues(features(0.7, 2 * trial + 1))
        found = paired_difference(a, b, trial, 400, lower_is_better=True)
        hits += found["ci"][0] <= true[0] - true[1] <= found["ci"][1]
        low, high = paired_ratio(a, b, trial)["ratio_ci"]
        ratios += low <= true[0] / true[1] <= high
        assert found["verdict"] == "better"
    assert hits >= 90 and ratios >= 90


def test_intervals_cover_where_arms_differ_in_bias() -> None:
    """Of as few images as are taken: the wide arm's FID is too high by far more than the narrow one's."""
    rng, hits = np.random.default_rng(0), 0
    true = frechet_distance(Statistics(np.zeros(DIM), 1.96 * np.eye(DIM), 10), REFERENCE) - frechet_distance(
        Statistics(np.zeros(DIM), 0.36 * np.eye(DIM), 10), REFERENCE)
    for trial in range(100):
        a, b = (pseudovalues(scale * rng.normal(size=(4 * DIM, DIM))) for scale in (1.4, 0.6))
        low, high = paired_difference(a, b, trial, 400)["ci"]
        hits += low <= true <= high
    assert hits >= 88


def test_equal_arms_are_rarely_told_apart() -> None:
    rng, verdicts = np.random.default_rng(0), []
    for trial in range(200):
        luck = rng.normal(size=(NUM, DIM))
        a, b = (pseudovalues(0.5 + 0.7 * luck + 0.71 * rng.normal(size=(NUM, DIM))) for _ in range(2))
        verdicts.append(paired_difference(a, b, trial, 400)["verdict"])
    assert verdicts.count("can't tell") >= 186  # at most 7 % of false alarms


@pytest.mark.parametrize("scatter", [0.0, 0.1])
def test_intervals_cover_over_seeds(scatter: float) -> None:
    """Whether training anew moves an arm or not: FIDs of 5 seeds that share the luck of their prompts."""
    true, hits = DIM * (0.5 ** 2 - 0.7 ** 2), 0
    rng = np.random.default_rng(0)
    for trial in range(60):
        luck = rng.normal(0, 0.5, size=(NUM, DIM))
        arms = [np.array([pseudovalues(mean + rng.normal(0, scatter / DIM, size=DIM) + luck
                                       + rng.normal(0, 0.75 ** 0.5, size=(NUM, DIM))) for _ in range(5)])
                for mean in (0.5, 0.7)]
        low, high = paired_difference(*arms, trial)["ci"]
        hits += low <= true <= high
    assert hits >= 54


def test_where_no_interval_is_given() -> None:
    assert why_no_interval(2000, 4000, 64) is None
    assert "100 images are too few" in str(why_no_interval(100, 4000, 64))
    assert "200 real images are too few" in str(why_no_interval(2000, 200, 64))
    few = frechet(draws(0, 40, 24), statistics(draws(1, 400, 24)))
    assert few.pseudovalues is None and few.unbiased is None and few.bias > 0
