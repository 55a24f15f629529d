"""Layer correlation and periodic patterns against np.corrcoef, pair by pair."""

import time

import numpy as np
import pytest

from moescope.stats.activation import Activation
from moescope.stats.correlation import layer_correlation
from moescope.stats.periodicity import default_intervals, periodic_patterns


def make_activation(
    matrix: np.ndarray, layers: tuple[int, ...] | None = None, experts: tuple[int, ...] | None = None
) -> Activation:
    """An activation around any matrix."""
    depth, width = matrix.shape
    return Activation(
        kind="probability",
        matrix=np.asarray(matrix, dtype=np.float64),
        layers=layers or tuple(range(depth)),
        experts=experts or (width,) * depth,
        top_k=(2,) * depth,
        tokens=100,
    )


def reference(activation: Activation, deltas: tuple[int, ...]) -> np.ndarray:
    """One np.corrcoef a cell, by the definition."""
    result = np.full((len(activation.layers), len(deltas)), np.nan)
    for i, layer in enumerate(activation.layers):
        for d, delta in enumerate(deltas):
            if layer + delta not in activation.layers:
                continue
            j = activation.layers.index(layer + delta)
            if activation.experts[i] != activation.experts[j]:
                continue
            first = activation.matrix[i, : activation.experts[i]]
            second = activation.matrix[j, : activation.experts[j]]
            if np.isnan(first).any() or np.isnan(second).any() or np.ptp(first) == 0 or np.ptp(second) == 0:
                continue
            result[i, d] = np.corrcoef(first, second)[0, 1]
    return result


def dirichlet(depth: int, width: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(width, spread), size=depth)


@pytest.mark.parametrize(
    "layers",
    [tuple(range(20)), tuple(range(3, 23)), tuple(range(1, 40, 2)), (0, 1, 2, 3, 8, 9, 10, 20, 21, 22, 23, 24, 25, 26)],
    ids=["contiguous", "after dense layers", "every second", "gaps"],
)
@pytest.mark.parametrize("spread", [0.05, 1.0, 1e6], ids=["skewed", "plain", "nearly uniform"])
def test_matches_corrcoef(layers: tuple[int, ...], spread: float) -> None:
    activation = make_activation(dirichlet(len(layers), 16, spread=spread), layers)
    result = layer_correlation(activation, delta_max=12)
    expected = reference(activation, result.deltas)
    assert np.isfinite(expected).sum() > 20
    np.testing.assert_allclose(result.matrix, expected, rtol=0, atol=1e-12)
    assert (result.kind, result.deltas, result.layers) == ("probability", tuple(range(1, 13)), layers)


def test_distance_is_counted_in_model_layers() -> None:
    matrix = dirichlet(3, 8)
    result = layer_correlation(make_activation(matrix, (1, 3, 5)), delta_max=4)
    assert np.isnan(result.matrix[:, 0]).all()
    assert result.matrix[0, 1] == pytest.approx(np.corrcoef(matrix[0], matrix[1])[0, 1], abs=1e-12)
    assert result.matrix[0, 3] == pytest.approx(np.corrcoef(matrix[0], matrix[2])[0, 1], abs=1e-12)
    assert np.isfinite(result.matrix).sum() == 3


def test_padded_layers_compare_only_with_their_own_width() -> None:
    matrix = dirichlet(6, 16)
    experts = (16, 12, 16, 12, 12, 16)
    for row, width in enumerate(experts):
        matrix[row, width:] = np.nan
    activation = make_activation(matrix, experts=experts)
    result = layer_correlation(activation, delta_max=5)
    expected = reference(activation, result.deltas)
    assert np.isfinite(expected).sum() == 6
    np.testing.assert_allclose(result.matrix, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spoiled", ["constant", "nan", "infinite", "noise"])
def test_one_bad_layer_spoils_only_its_own_cells(spoiled: str) -> None:
    good = dirichlet(10, 16)
    bad = good.copy()
    rounding_noise = (1 / 3) * (1 + np.finfo(float).eps * (np.arange(16) % 2))
    bad[4] = {"constant": np.full(16, 0.1), "nan": good[4], "infinite": good[4], "noise": rounding_noise}[spoiled]
    if spoiled in {"nan", "infinite"}:
        bad[4, 7] = {"nan": np.nan, "infinite": np.inf}[spoiled]
    result = layer_correlation(make_activation(bad), delta_max=9)
    untouched = layer_correlation(make_activation(good), delta_max=9).matrix
    concerned = np.array([[i == 4 or i + delta == 4 for delta in result.deltas] for i in range(10)])
    assert np.isnan(result.matrix[concerned]).all()
    np.testing.assert_array_equal(result.matrix[~concerned], untouched[~concerned])
    assert np.isfinite(untouched[~concerned]).sum() == 36


def test_a_small_real_difference_is_not_taken_for_a_constant() -> None:
    first = np.full(8, 0.125)
    first[0] += 1e-9
    second = np.full(8, 0.125)
    second[0] += 3e-9
    assert layer_correlation(make_activation(np.stack([first, second])), 1).matrix[0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scale_does_not_matter(scale: float) -> None:
    matrix = dirichlet(2, 8)
    expected = np.corrcoef(matrix)[0, 1]
    assert layer_correlation(make_activation(matrix * scale), 1).matrix[0, 0] == pytest.approx(expected, abs=1e-12)


def test_values_stay_within_one() -> None:
    row = dirichlet(1, 64)[0]
    result = layer_correlation(make_activation(np.stack([row, row, 2 * row - 7, -3 * row])), 3).matrix
    assert result[0, 0] == pytest.approx(1.0)
    assert result[0, 2] == pytest.approx(-1.0)
    assert np.nanmax(np.abs(result)) <= 1.0


def test_two_experts_correlate_perfectly_or_inversely() -> None:
    result = layer_correlation(make_activation(np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])), 2).matrix
    np.testing.assert_allclose(result[0], [1.0, -1.0], atol=1e-12)


def test_one_layer_and_no_layer() -> None:
    assert np.isnan(layer_correlation(make_activation(dirichlet(1, 8)), 3).matrix).tolist() == [[True, True, True]]
    assert layer_correlation(make_activation(np.empty((0, 0))), 3).matrix.shape == (0, 3)


def test_delta_max_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="delta_max must be at least 1, got 0"):
        layer_correlation(make_activation(dirichlet(3, 8)), 0)


def test_a_large_model_takes_milliseconds() -> None:
    activation = make_activation(dirichlet(94, 256))
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        layer_correlation(activation, 30)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.1


def test_patterns_match_the_loop() -> None:
    layers = (0, 1, 2, 3, 6, 7, 8, 9, 14, 15, 18, 19, 20)
    matrix = dirichlet(len(layers), 16)
    matrix[5] = 0.0625
    activation = make_activation(matrix, layers)
    intervals = (6, 1, 12)
    patterns = periodic_patterns(layer_correlation(activation, 2), intervals)
    assert [pattern.delta for pattern in patterns.patterns] == [6, 1, 12]
    assert patterns.kind == "probability"
    for pattern, column in zip(patterns.patterns, reference(activation, intervals).T, strict=True):
        measured = [r for r in column if not np.isnan(r)]
        starts = tuple(layer for layer in layers if layer + pattern.delta in layers)
        assert pattern.starts == starts
        assert len(pattern.correlations) == len(starts)
        assert pattern.num_pairs == len(measured) >= 2
        assert pattern.mean == pytest.approx(sum(measured) / len(measured), abs=1e-12)
        variance = sum((r - sum(measured) / len(measured)) ** 2 for r in measured) / len(measured)
        assert pattern.std == pytest.approx(variance**0.5, abs=1e-12)
        np.testing.assert_allclose([r for r in pattern.correlations if not np.isnan(r)], measured, atol=1e-12)
    assert len(patterns.patterns[0].correlations) == patterns.patterns[0].num_pairs + 1


def test_a_dead_layer_does_not_turn_an_interval_weak() -> None:
    base = dirichlet(4, 16)
    matrix = np.tile(base, (3, 1)) + dirichlet(12, 16, seed=1) * 0.05
    matrix[5] = np.nan
    (pattern,) = periodic_patterns(layer_correlation(make_activation(matrix)), (4,)).patterns
    assert pattern.strength == "strong"
    assert (pattern.num_pairs, len(pattern.correlations)) == (6, 8)


def test_what_cannot_be_measured_is_not_called_weak() -> None:
    deep, dead = periodic_patterns(layer_correlation(make_activation(np.full((6, 4), 0.25))), (50, 2)).patterns
    assert (deep.strength, deep.num_pairs, deep.correlations) == ("not measurable", 0, ())
    assert (dead.strength, dead.num_pairs, len(dead.correlations)) == ("not measurable", 0, 4)
    assert np.isnan([deep.mean, deep.std, dead.mean, dead.std]).all()


@pytest.mark.parametrize(("r", "strength"), [(0.9, "strong"), (0.55, "moderate"), (0.1, "weak"), (-0.9, "weak")])
def test_strength(r: float, strength: str) -> None:
    rng = np.random.default_rng(0)
    first, noise = rng.normal(size=(2, 400))
    first = (first - first.mean()) / first.std()
    noise -= noise.mean() + first * (noise @ first) / 400
    second = r * first + np.sqrt(1 - r * r) * noise / noise.std()
    (pattern,) = periodic_patterns(layer_correlation(make_activation(np.stack([first, second]))), (1,)).patterns
    assert pattern.mean == pytest.approx(r, abs=1e-9)
    assert pattern.strength == strength


def test_intervals_are_checked_and_repeats_dropped() -> None:
    correlation = layer_correlation(make_activation(dirichlet(6, 8)))
    assert [pattern.delta for pattern in periodic_patterns(correlation, (2, 3, 2)).patterns] == [2, 3]
    with pytest.raises(ValueError, match="at least 1"):
        periodic_patterns(correlation, (0,))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (range(94), (12, 24, 36)),
        (range(38), (12, 24, 36)),
        (range(37), (12, 24)),
        (range(3, 61), (12, 24, 36)),
        (range(26), (12, 24)),
        (range(14), (12,)),
        (range(13), tuple(range(1, 13))),
        (range(6), (1, 2, 3, 4, 5)),
        (range(1, 14, 2), (2, 4, 6, 8, 10, 12)),
        (range(0, 60, 5), tuple(range(5, 60, 5))),
        ((7,), ()),
        ((), ()),
    ],
)
def test_default_intervals(layers: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert default_intervals(layers) == expected
