"""Reliability against halves that are really enumerated, and against runs that are really drawn twice."""

import time
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from moescope.stats.reliability import Reliability, layer_reliability

PER_SPLIT = 400


def draw(
    truth: NDArray[np.float64], rng: np.random.Generator, splits: int = 16, selections: int = PER_SPLIT
) -> NDArray[np.int64]:
    """Selections (S, L, E) of profiles (L, E) that sum to 1, every layer with as many."""
    return rng.multinomial(selections, truth, size=(splits, len(truth)))


def profiles(rng: np.random.Generator, depth: int = 6, width: int = 32, common: float = 0.0) -> NDArray[np.float64]:
    """Profiles (L, E) of which the logarithms correlate with `common`."""
    shared, own = rng.normal(size=(1, width)), rng.normal(size=(depth, width))
    weights = np.exp(0.5 * (np.sqrt(common) * shared + np.sqrt(1 - common) * own))
    return weights / weights.sum(axis=1, keepdims=True)


def measure(splits: NDArray[np.int64], **options: float) -> Reliability:
    depth, width = splits.shape[1:]
    return layer_reliability(splits, (width,) * depth, range(depth), int(splits[:, 0].sum()) // 2, **options)


def test_equals_spearman_brown_over_every_halving() -> None:
    rng = np.random.default_rng(0)
    splits = draw(profiles(rng), rng, splits=6)
    depth = splits.shape[1]
    between, within = np.zeros((depth, depth)), np.zeros(depth)
    for half in combinations(range(6), 3):
        rest = [split for split in range(6) if split not in half]
        one, two = splits[list(half)].sum(axis=0), splits[rest].sum(axis=0)
        for i in range(depth):
            within[i] += np.cov(one[i])
            for j in range(depth):
                between[i, j] += np.cov(one[i], two[j])[0, 1]
    halves = between / np.sqrt(np.outer(within, within))
    found = measure(splits)
    np.testing.assert_allclose(found.split_half, halves.diagonal(), rtol=1e-9)
    np.testing.assert_allclose(found.reliability, 2 * halves.diagonal() / (1 + halves.diagonal()), rtol=1e-9)
    expected = halves / np.sqrt(np.outer(halves.diagonal(), halves.diagonal()))
    np.testing.assert_allclose(found.corrected, expected, rtol=1e-9)
    np.testing.assert_allclose(found.across.diagonal(), found.reliability)


def test_the_standard_error_is_the_jackknife() -> None:
    rng = np.random.default_rng(1)
    splits = draw(profiles(rng), rng, splits=7)
    whole = measure(splits)
    without = [measure(np.delete(splits, out, axis=0)) for out in range(7)]
    for name in ("reliability", "corrected"):
        values = np.stack([getattr(found, name) for found in without])
        np.testing.assert_allclose(
            getattr(whole, f"{name}_error"), np.sqrt(6 / 7 * ((values - values.mean(0)) ** 2).sum(0)), atol=1e-9
        )


def test_reliability_is_the_correlation_with_another_run() -> None:
    rng = np.random.default_rng(2)
    truth = profiles(rng, depth=1, width=128)
    runs = [draw(truth, rng, selections=60) for _ in range(40)]
    estimated = np.mean([measure(run).reliability[0] for run in runs])
    between = np.corrcoef(np.stack([run.sum(axis=0)[0] for run in runs]))
    real = between[~np.eye(40, dtype=bool)].mean()
    assert 0.4 < real < 0.95
    assert estimated == pytest.approx(real, abs=0.03)


def test_sizes_of_splits_do_not_bias() -> None:
    rng = np.random.default_rng(3)
    truth = profiles(rng, depth=1, width=64)
    sizes = np.array([2000, 1000, 100, 100, 50, 50, 20, 10])
    estimated, runs = [], []
    for _ in range(60):
        splits = np.stack([rng.multinomial(size, truth) for size in sizes])
        runs.append(splits.sum(axis=0)[0])
        estimated.append(measure(splits).reliability[0])
    between = np.corrcoef(np.stack(runs))[~np.eye(60, dtype=bool)].mean()
    assert np.mean(estimated) == pytest.approx(between, abs=0.02)


def test_corrected_finds_the_true_correlation_that_noise_hides() -> None:
    rng = np.random.default_rng(4)
    truth = profiles(rng, depth=8, width=256, common=0.7)
    splits = draw(truth, rng, selections=60)
    found, off = measure(splits), ~np.eye(8, dtype=bool)
    plain = np.corrcoef(splits.sum(axis=0))[off].mean()
    real = np.corrcoef(truth)[off].mean()
    assert plain < 0.75 * real
    assert found.corrected[off].mean() == pytest.approx(real, abs=0.03)
    again = np.stack([measure(draw(truth, rng, selections=60)).corrected for _ in range(20)]).std(axis=0)
    assert found.corrected_error[off].mean() == pytest.approx(again[off].mean(), rel=0.3)


def test_what_layers_share_by_their_tokens_is_not_a_correlation() -> None:
    rng = np.random.default_rng(5)
    same = draw(np.full((1, 64), 1 / 64), rng, selections=100)
    splits = np.concatenate([same, same], axis=1)
    assert np.corrcoef(splits.sum(axis=0))[0, 1] == pytest.approx(1)
    found = measure(splits)
    assert abs(found.across[0, 1]) < 0.5
    assert not found.defined.any()
    assert np.isnan(found.corrected).all()
    assert found.too_short


def test_tokens_enough_are_enough() -> None:
    rng = np.random.default_rng(6)
    truth = profiles(rng, depth=5, width=64)
    short = measure(draw(truth, rng, selections=30))
    assert short.too_short
    times = short.tokens_enough_for_most / short.tokens
    long = measure(draw(truth, rng, selections=round(30 * times)))
    assert np.median(long.reliability) == pytest.approx(short.target, abs=0.02)
    assert not measure(draw(truth, rng, selections=round(60 * times))).too_short


def test_half_of_the_layers_without_signal_are_rarely_called_defined() -> None:
    rng = np.random.default_rng(7)
    alarms = [measure(draw(np.full((20, 16), 1 / 16), rng, selections=40)).defined.mean() for _ in range(40)]
    assert np.mean(alarms) < 0.08


def test_undefined_layers_spoil_no_other() -> None:
    rng = np.random.default_rng(8)
    splits = draw(profiles(rng), rng)
    clean = measure(splits)
    splits[:, 2] = 0
    splits[:, 4] = 7
    found = measure(splits)
    bad = [2, 4]
    assert np.isnan(found.reliability[bad]).all()
    assert not found.defined[bad].any()
    assert np.isnan(found.corrected[bad]).all()
    assert np.isnan(found.tokens_enough[bad]).all()
    kept = [0, 1, 3, 5]
    np.testing.assert_allclose(found.corrected[np.ix_(kept, kept)], clean.corrected[np.ix_(kept, kept)])
    assert found.defined[kept].all()


def test_layers_of_different_width_are_not_compared() -> None:
    rng = np.random.default_rng(9)
    splits = draw(profiles(rng, depth=3, width=16), rng)
    splits[:, 1, 12:] = 0
    found = layer_reliability(splits, (16, 12, 16), (0, 1, 5), 800)
    assert np.isnan(found.across[[0, 1], [1, 2]]).all()
    assert np.isfinite(found.across[0, 2])
    assert found.defined.all()
    dirty = splits.copy()
    dirty[:, 1, 12:] = 99
    np.testing.assert_array_equal(layer_reliability(dirty, (16, 12, 16), (0, 1, 5), 800).across, found.across)


@pytest.mark.parametrize("shape", [(0, 2, 8), (16, 0, 8), (1, 3, 8), (2, 1, 8), (16, 2, 2), (16, 1, 1)])
def test_small_runs(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(10)
    found = measure_any(rng.integers(0, 9, shape))
    assert found.across.shape == (shape[1], shape[1])
    if shape[0] < 3:
        assert np.isnan(found.reliability_error).all()
        assert not found.defined.any()


def measure_any(splits: NDArray[np.int64]) -> Reliability:
    return layer_reliability(splits, (splits.shape[2],) * splits.shape[1], range(splits.shape[1]), 1)


def test_one_token_says_nothing() -> None:
    splits = np.zeros((16, 4, 8), np.int64)
    splits[3, :, 2] = 1
    found = layer_reliability(splits, (8,) * 4, range(4), 1)
    assert found.splits == 1
    assert np.isnan(found.reliability).all()
    assert found.too_short


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(splits, 3 layers, experts\)"):
        layer_reliability(np.zeros((16, 2, 8), np.int64), (8,) * 3, range(3), 1)
    with pytest.raises(ValueError, match="ascend"):
        layer_reliability(np.zeros((16, 2, 8), np.int64), (8,) * 2, (1, 1), 1)
    with pytest.raises(ValueError, match="target"):
        layer_reliability(np.zeros((16, 2, 8), np.int64), (8,) * 2, (0, 1), 1, target=1)


def test_a_large_model_takes_part_of_a_second() -> None:
    rng = np.random.default_rng(11)
    splits = rng.integers(0, 1000, (16, 94, 128))
    start = time.perf_counter()
    measure(splits)
    assert time.perf_counter() - start < 1
