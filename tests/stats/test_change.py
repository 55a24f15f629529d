"""Tests of two runs: alarms are rare where only prompts differ, what was planted is found, numbers are scipy's."""

from typing import Any

import numpy as np
import pytest
from drawn_splits import draw_splits, skewed_routers
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, ttest_rel
from scipy.stats import t as student

from moescope.stats.comparison import all_distances, change_tests, distances

EXPERTS = (24, 24, 20)


def two_runs(
    rng: np.random.Generator, moved: float = 0.0, prompts: tuple[int, int] = (160, 160), **how: Any
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    routers = skewed_routers(2, 3, 24, rng, 2.0)
    routers[:, 2, 20:] = 0
    routers[1, 1, 5] += moved
    routers /= routers.sum(axis=2, keepdims=True)
    drawn = draw_splits(routers, prompts, rng, **how)
    return drawn[:, 0], drawn[:, 1]


@pytest.mark.parametrize(
    ("prompts", "how"),
    [((160, 160), {}), ((24, 24), {}), ((30, 300), {}), ((80, 60), {"lengths": 1.2}), ((100, 60), {"bursts": True})],
    ids=["even", "few prompts", "unequal", "lengths that differ", "bursts"],
)
def test_where_only_prompts_differ_alarms_are_rare(prompts: tuple[int, int], how: dict[str, Any]) -> None:
    rng = np.random.default_rng(21)
    layers, experts = [], []
    for seed in range(200):
        found = change_tests(*two_runs(rng, 0.0, prompts, **how), EXPERTS, seed=seed, replicates=199)
        layers.append(found.layer_p_corrected.min() <= 0.05)
        experts.append(np.nanmin(found.p_corrected) <= 0.05)
    assert np.mean(layers) <= 0.07
    assert np.mean(experts) <= 0.07


def test_over_the_same_prompts_alarms_are_rare_and_smaller_changes_are_seen() -> None:
    rng = np.random.default_rng(22)
    layers, experts, paired_power, power = [], [], [], []
    for seed in range(200):
        base, _ = two_runs(rng)
        one, two = rng.poisson(base), rng.poisson(base)
        found = change_tests(one, two, EXPERTS, paired=True, seed=seed, replicates=199)
        layers.append(found.layer_p_corrected.min() <= 0.05)
        experts.append(np.nanmin(found.p_corrected) <= 0.05)
        if seed < 20:
            shifted = two.copy()
            shifted[:, 1, 5] += shifted[:, 1].sum(axis=1) // 100
            paired_power.append(
                change_tests(one, shifted, EXPERTS, paired=True, replicates=9).p_corrected[1, 5] <= 0.05
            )
            power.append(change_tests(one, shifted, EXPERTS, replicates=9).p_corrected[1, 5] <= 0.05)
    assert np.mean(layers) <= 0.07
    assert np.mean(experts) <= 0.07
    assert np.mean(paired_power) > np.mean(power) + 0.4


def test_a_planted_change_is_found_where_it_is() -> None:
    one, two = two_runs(np.random.default_rng(23), moved=0.5)
    found = change_tests(one, two, EXPERTS)
    assert found.layer_p_corrected[1] == 0.001
    assert min(found.layer_p_corrected[[0, 2]]) > 0.05
    assert np.unravel_index(np.nanargmin(found.p_corrected), (3, 24)) == (1, 5)
    assert found.p_corrected[1, 5] < 1e-4
    shares = [run.sum(axis=0)[1] / run[:, 1].sum() for run in (one, two)]
    np.testing.assert_allclose(found.difference[1], shares[1] - shares[0], atol=1e-12)
    back = change_tests(two, one, EXPERTS)
    np.testing.assert_allclose(back.difference, -found.difference)
    np.testing.assert_allclose(back.p_value, found.p_value, rtol=1e-9)


def test_pairs_of_equal_splits_are_tested_as_scipy_does() -> None:
    rng = np.random.default_rng(24)
    one, two = (rng.multinomial(5000, rng.dirichlet(np.full(6, 5.0)), size=(16, 1)).astype(np.int64) for _ in range(2))
    found = change_tests(one, two, (6,), paired=True)
    wanted = ttest_rel(two[:, 0], one[:, 0], axis=0).statistic
    np.testing.assert_allclose(found.p_value[0], 2 * student.sf(np.abs(wanted), 15), rtol=1e-9)
    assert (found.p_corrected[0] >= false_discovery_control(found.p_value[0]) - 1e-15).all()


def test_equal_runs_do_not_differ() -> None:
    one, _ = two_runs(np.random.default_rng(25))
    found = change_tests(one, one, EXPERTS)
    assert (found.layer_p_value == 1).all()
    assert np.nanmin(found.p_value) == 1


@pytest.mark.parametrize("paired", [False, True])
def test_what_cannot_be_tested_is_undefined(paired: bool) -> None:
    one, two = two_runs(np.random.default_rng(26))
    one[:, 0] = 0
    two[1:, 2] = 0
    found = change_tests(one, two, EXPERTS, paired=paired)
    assert np.isnan(found.layer_p_value).tolist() == [True, False, True]
    assert np.isnan(found.layer_p_corrected).tolist() == [True, False, True]
    assert np.isfinite(found.p_value).any(axis=1).tolist() == [False, True, False]
    assert np.isnan(found.difference[2, 20:]).all()
    nothing = change_tests(one * 0, two * 0, EXPERTS, paired=paired)
    assert np.isnan(nothing.layer_p_value).all()
    assert np.isnan(nothing.p_corrected).all()


def test_the_seed_decides_the_draws() -> None:
    one, two = two_runs(np.random.default_rng(27))
    a, b, c = (change_tests(one, two, EXPERTS, seed=seed, replicates=49).layer_p_value for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_padding_is_ignored() -> None:
    one, two = two_runs(np.random.default_rng(28))
    clean = change_tests(one, two, EXPERTS)
    one[:, 2, 20:] = 50
    dirty = change_tests(one, two, EXPERTS)
    np.testing.assert_array_equal(dirty.layer_p_value, clean.layer_p_value)
    np.testing.assert_array_equal(dirty.p_value, clean.p_value)


def test_every_run_against_every_other() -> None:
    rng = np.random.default_rng(29)
    runs = [rng.random((3, 24)) for _ in range(4)]
    found = all_distances(runs, EXPERTS)
    for row in range(4):
        for column in range(4):
            expected = distances(runs[row], runs[column], EXPERTS)
            np.testing.assert_allclose(found.jensen_shannon[row, column], expected.jensen_shannon, atol=1e-12)
            np.testing.assert_allclose(found.total_variation[row, column], expected.total_variation, atol=1e-12)
    assert all_distances([], EXPERTS).jensen_shannon.shape == (0, 0, 3)


def test_what_does_not_belong_together() -> None:
    one, two = two_runs(np.random.default_rng(30))
    with pytest.raises(ValueError, match="shape"):
        change_tests(one, two[:4], EXPERTS)
    with pytest.raises(ValueError, match="splits"):
        change_tests(one, two, (24,))
    with pytest.raises(ValueError, match="replicates"):
        change_tests(one, two, EXPERTS, replicates=0)
