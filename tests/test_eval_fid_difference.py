"""Intervals of FID differences: they cover, they are blind to nothing, and they are not given where they would lie."""

import numpy as np
import pytest

from eval.fid import Statistics, distance_to, frechet_distance, statistics
from eval.fid_difference import Fids, fid_difference, resample_fid, why_no_interval

DIM, NUM = 8, 200


def features(mean: float, seed: int, num: int = NUM) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, size=(num, DIM))


REFERENCE = Statistics(np.zeros(DIM), np.eye(DIM), 100_000)


def difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict[str, object]:
    return fid_difference([resample_fid(a, REFERENCE, seed, 200)], [resample_fid(b, REFERENCE, seed, 200)])


def test_the_quick_distance_is_the_distance() -> None:
    found = statistics(features(0.3, 1))
    assert distance_to(REFERENCE)(found) == pytest.approx(frechet_distance(found, REFERENCE), rel=1e-9)


def test_intervals_cover_the_true_difference_and_ratio() -> None:
    true = [DIM * mean ** 2 for mean in (0.5, 0.7)]  # Gaussians of unit variance: the squared distance of the means
    hits = ratios = 0
    for trial in range(60):
        found = difference(features(0.5, 2 * trial), features(0.7, 2 * trial + 1), trial)
        low, high = found["ci"]
        hits += low <= true[0] - true[1] <= high
        low, high = found["ratio_ci"]
        ratios += low <= true[0] / true[1] <= high
        assert found["verdict"] == "better"
    assert hits >= 53 and ratios >= 53


def test_difference_and_ratio_lie_within_their_intervals() -> None:
    """Where two arms differ in bias: of many images for each feature, and of as few as are taken."""
    for num in (2 * DIM, 20 * DIM):
        for trial in range(20):
            wide, narrow = features(0.5, 2 * trial, num) * 1.4, features(0.5, 2 * trial + 1, num) * 0.6
            found = difference(wide, narrow, trial)
            assert found["ci"][0] <= found["difference"] <= found["ci"][1]
            assert found["ratio"] is None or found["ratio_ci"][0] <= found["ratio"] <= found["ratio_ci"][1]


def test_equal_arms_are_rarely_told_apart() -> None:
    verdicts = [difference(features(0.5, 2 * trial), features(0.5, 2 * trial + 1), trial)["verdict"]
                for trial in range(60)]
    assert verdicts.count("can't tell") >= 54


def test_seeds_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    def arm(mean: float, scatter: float) -> list[Fids]:
        return [resample_fid(features(mean + shift, 100 + index), REFERENCE, 0, 100)
                for index, shift in enumerate(rng.normal(0, scatter, size=5))]
    calm, wild = fid_difference(arm(0.5, 0), arm(0.6, 0)), fid_difference(arm(0.5, 0.2), arm(0.6, 0.2))
    assert np.ptp(wild["ci"]) > 2 * np.ptp(calm["ci"])
    assert calm["over"] == wild["over"] == "prompts and seeds"


@pytest.mark.parametrize("scatter", [0.0, 0.1])
def test_intervals_cover_over_seeds(scatter: float) -> None:
    """Whether training anew moves an arm or not: FIDs of 5 seeds that share the luck of their prompts."""
    true, hits = DIM * (0.5 ** 2 - 0.7 ** 2), 0
    rng = np.random.default_rng(0)
    for trial in range(60):
        luck = rng.normal(0, 0.5, size=(NUM, DIM))
        arms = [[resample_fid(mean + rng.normal(0, scatter / DIM, size=DIM) + luck
                              + rng.normal(0, 0.75 ** 0.5, size=(NUM, DIM)), REFERENCE, trial, 60) for _ in range(5)]
                for mean in (0.5, 0.7)]
        low, high = fid_difference(*arms)["ci"]
        hits += low <= true <= high
    assert hits >= 54


def test_a_seed_on_several_base_models_counts_as_one() -> None:
    rng = np.random.default_rng(1)
    moved = rng.normal(0, 0.2, size=5)
    a, b = ([resample_fid(features(mean + shift + model, 100 + index), REFERENCE, 0, 100)
             for model in (0.0, 0.1) for index, shift in enumerate(shifts)]
            for mean, shifts in ((0.5, moved), (0.6, np.zeros(5))))
    alike = fid_difference(a, b, seeds=[*range(5)] * 2)
    apart = fid_difference(a, b)
    assert alike["difference"] == pytest.approx(apart["difference"]) and np.ptp(alike["ci"]) > 1.2 * np.ptp(apart["ci"])
    assert fid_difference(a[:4], b[:4], seeds=[0, 1, 0, 1])["over"] == "prompts"


def test_where_no_interval_is_given() -> None:
    assert why_no_interval(2000, 4000, 64) is None
    assert "too long" in str(why_no_interval(50_000, 50_000, 2048))
    assert "100 images are too few" in str(why_no_interval(100, 4000, 64))
    assert "200 real images are too few" in str(why_no_interval(2000, 200, 64))
