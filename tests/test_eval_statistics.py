import numpy as np
import pytest

from eval.statistics import holm, paired_difference, paired_ratio, unpaired_difference


@pytest.mark.parametrize("scores", ["normal", "yes or no", "skewed", "five seeds"])
def test_false_alarms_are_about_five_percent(scores: str) -> None:
    """Of 2,000 pairs of arms without a difference; pictures of a prompt have much in common, which pairing removes."""
    rng, alarms, misses = np.random.default_rng(0), 0, 0
    for seed in range(2000):
        prompts = rng.normal(scale=2, size=200)
        if scores == "normal":
            a, b = (prompts + rng.normal(size=200) for _ in range(2))
        elif scores == "yes or no":
            a, b = ((prompts + rng.normal(size=200) > 0).astype(float) for _ in range(2))
        elif scores == "skewed":
            a, b = (np.exp(prompts / 4 + rng.normal(size=200) / 2) for _ in range(2))
        else:
            a, b = (prompts + 0.3 * rng.normal(size=(5, 1)) + rng.normal(size=(5, 200)) for _ in range(2))
        found = paired_difference(a, b, seed, num_resamples=1000)
        alarms += found["verdict"] != "can't tell"
        misses += not found["ci"][0] <= 0 <= found["ci"][1]
    assert 0.035 <= alarms / 2000 <= 0.065, alarms / 2000
    assert 0.035 <= misses / 2000 <= 0.075, misses / 2000


def test_unpaired_arms() -> None:
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(2000):
        alarms += unpaired_difference(rng.normal(size=60), 3 * rng.normal(size=40))["verdict"] != "can't tell"
    assert 0.035 <= alarms / 2000 <= 0.065
    found = unpaired_difference(rng.normal(1, 1, size=200), rng.normal(size=300), lower_is_better=True)
    assert found["verdict"] == "worse" and found["ci"][0] < 1 < found["ci"][1] and found["over"] == "images"
    missing = np.array([1.0, np.nan, 3.0])
    assert unpaired_difference(missing, np.zeros(2))["difference"] == 2


def test_a_planted_effect_is_found_with_its_sign() -> None:
    rng = np.random.default_rng(1)
    prompts = rng.normal(scale=5, size=200)
    a, b = prompts + 0.5 + rng.normal(size=200), prompts + rng.normal(size=200)
    found = paired_difference(a, b, seed=0)
    assert found["verdict"] == "better" and found["ci"][0] < 0.5 < found["ci"][1] and found["p"] < 0.01
    assert found["difference"] == pytest.approx(np.mean(a - b))
    assert paired_difference(b, a, seed=0)["verdict"] == "worse"
    assert paired_difference(a, b, seed=0, lower_is_better=True)["verdict"] == "worse"


def test_the_interval_covers() -> None:
    rng = np.random.default_rng(2)
    covered = []
    for seed in range(400):
        a = rng.exponential(size=80)  # skewed, as scores are
        low, high = paired_difference(a, np.zeros(80), seed, num_resamples=400)["ci"]
        covered.append(low <= 1 <= high)
    assert 0.90 <= np.mean(covered) <= 0.98


def test_draws_are_seeded_and_equal_scores_tell_nothing() -> None:
    a, b = np.random.default_rng(3).normal(size=(2, 50))
    assert paired_difference(a, b, seed=5) == paired_difference(a, b, seed=5)
    same = paired_difference(a, a, seed=0)
    assert same == {"difference": 0.0, "ci": [0.0, 0.0], "p": 1.0, "verdict": "can't tell", "num_prompts": 50,
                    "over": "prompts"}
    assert paired_difference([1.0], [0.0], seed=0)["verdict"] == "can't tell"


def test_many_prompts_fit_into_memory() -> None:
    a = np.random.default_rng(4).normal(size=30_000)
    assert paired_difference(a + 1, a, seed=0, num_resamples=200)["verdict"] == "better"


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([float("nan")], [1.0]), ([[[1.0]]], [[[1.0]]])])
def test_what_is_not_paired_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="paired scores"):
        paired_difference(a, b, seed=0)


@pytest.mark.parametrize("scatter", [0.0, 0.05, 0.3])
@pytest.mark.parametrize(("num_models", "shared"), [(1, 0.0), (2, 0.0), (2, 1.0)])
def test_the_interval_covers_over_seeds(num_models: int, shared: float, scatter: float) -> None:
    """Whether training anew moves an arm by nothing, as other prompts would, or by far more, alike or not."""
    rng, covered, widths = np.random.default_rng(4), [], []
    seeds = [*range(5)] * num_models
    of_model = np.repeat([0.5, -0.5][:num_models], 5)[:, None] if num_models > 1 else 0.0  # these are spoken of
    for seed in range(200):
        prompts = rng.normal(size=200)
        a, b = (prompts + rng.normal(0, 0.5, size=(len(seeds), 200)) for _ in range(2))
        of_seed = rng.normal(size=(5, 1))[seeds] * shared + rng.normal(size=(len(seeds), 1)) * (1 - shared)
        found = paired_difference(a + of_model + scatter * of_seed, b, seed, 50, seeds)
        covered.append(found["ci"][0] <= 0 <= found["ci"][1])
        assert covered[-1] == (found["p"] >= 0.05)
        widths.append(np.ptp(found["ci"]))
    assert np.mean(covered) >= 0.92
    if not scatter:  # not far wider than they need be: pictures alone scatter, by 0.5 in each arm
        assert np.mean(widths) < 1.5 * 2 * 1.96 * (0.5 / len(seeds) / 200) ** 0.5


def test_seeds_are_spoken_of_from_three_on() -> None:
    rng = np.random.default_rng(3)
    prompts = rng.normal(size=300)
    shifts = np.array([-1.0, 0.0, 1.0])[:, None]  # training anew moves this arm by far more than prompts do
    a, b = prompts + 0.2 + shifts, np.tile(prompts, (3, 1))
    wide, narrow = paired_difference(a, b, 0), paired_difference(a[:2], b[:2], 0)
    assert wide["over"] == "prompts and seeds" and narrow["over"] == "prompts"
    assert wide["verdict"] == "can't tell" and np.ptp(wide["ci"]) > 10 * np.ptp(narrow["ci"])


def test_a_seed_without_a_score_leaves_an_interval_over_prompts() -> None:
    a = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [np.nan] * 3])
    found = paired_difference(a, np.zeros((3, 3)), 0)
    assert found["over"] == "prompts" and np.isfinite(found["ci"]).all()


def test_prompts_without_a_score_are_passed_over() -> None:
    a = np.array([[1.0, np.nan, 3.0, np.nan], [1.0, 2.0, np.nan, np.nan]])
    found = paired_difference(a, np.zeros((2, 4)), 0)
    assert found["num_prompts"] == 3 and found["difference"] == 2.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []


def test_a_ratio_lies_in_its_interval() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.gamma(4, size=500), rng.gamma(4, size=500) / 2
    true_ratio = a.mean() / b.mean()
    found = paired_ratio(a, b, 0)
    assert found["ratio"] == pytest.approx(true_ratio)
    spread = true_ratio * 1.96 * (2 * 0.5 ** 2 / 500) ** 0.5  # a gamma of shape 4 scatters by half its mean
    assert found["ratio_ci"] == pytest.approx([true_ratio - spread, true_ratio + spread], rel=0.02)
    covered = [paired_ratio(rng.gamma(4, size=200), rng.gamma(4, size=200) / 2, 0)["ratio_ci"] for _ in range(100)]
    assert sum(low <= 2 <= high for low, high in covered) >= 88
    near = rng.normal(0.02, 1, size=(2, 500))  # KIDs of arms as good as real images: a ratio would say nothing
    assert paired_ratio(near[0], near[1], 0) == {"ratio": None, "ratio_ci": None}
    assert paired_ratio(a - 100, b, 0) == {"ratio": None, "ratio_ci": None}
