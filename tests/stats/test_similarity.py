"""Router similarity against plain loops over pairs of layers and experts."""

import numpy as np
import pytest

from moescope.stats.pairwise import finite_mean
from moescope.stats.similarity import router_similarity


def routers(depth: int, experts: int = 6, hidden: int = 10, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(depth, experts, hidden)) * rng.uniform(0.5, 2.0, size=(depth, experts, 1))


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


@pytest.mark.parametrize("layers", [tuple(range(8)), (1, 3, 5, 7, 9, 11, 13, 15), (3, 4, 5, 9, 10, 11, 20, 21)])
def test_matches_the_loop(layers: tuple[int, ...]) -> None:
    weights = routers(8)
    result = router_similarity(weights, layers, delta_max=7)
    for i, first in enumerate(weights):
        for j, second in enumerate(weights):
            assert result.cosine[i, j] == pytest.approx(cosine(first.ravel(), second.ravel()), abs=1e-12)
    np.testing.assert_allclose(result.row_norms, np.linalg.norm(weights, axis=2), rtol=1e-12)
    pairs = 0
    for i, layer in enumerate(layers):
        for d, delta in enumerate(result.deltas):
            if layer + delta not in layers:
                assert np.isnan(result.norm_correlation[i, d])
                assert np.isnan(result.row_cosine[i, d])
                continue
            pairs += 1
            first, second = weights[i], weights[layers.index(layer + delta)]
            norms = np.corrcoef(np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1))[0, 1]
            rows = np.mean([cosine(a, b) for a, b in zip(first, second, strict=True)])
            assert result.norm_correlation[i, d] == pytest.approx(norms, abs=1e-9)
            assert result.row_cosine[i, d] == pytest.approx(rows, abs=1e-12)
    assert pairs >= 10


def test_float32_is_compared_in_float64() -> None:
    weights = routers(3).astype(np.float32)
    expected = cosine(weights[0].ravel().astype(np.float64), weights[1].ravel().astype(np.float64))
    assert router_similarity(weights, (0, 1, 2)).cosine[0, 1] == pytest.approx(expected, abs=1e-12)


def test_the_weights_are_left_alone() -> None:
    weights = routers(3)
    before = weights.copy()
    router_similarity(weights, (0, 1, 2))
    np.testing.assert_array_equal(weights, before)


def test_layers_of_different_shapes_are_not_comparable() -> None:
    wide, narrow = routers(2, experts=6), routers(2, experts=4)
    result = router_similarity([wide[0], narrow[0], wide[1], narrow[1]], (0, 1, 2, 3), delta_max=3)
    comparable = np.array([[(i - j) % 2 == 0 for j in range(4)] for i in range(4)])
    np.testing.assert_array_equal(np.isfinite(result.cosine), comparable)
    assert result.cosine[0, 2] == pytest.approx(cosine(wide[0].ravel(), wide[1].ravel()), abs=1e-12)
    assert result.cosine[1, 3] == pytest.approx(cosine(narrow[0].ravel(), narrow[1].ravel()), abs=1e-12)
    assert np.isfinite(result.row_cosine).tolist() == [[False, True, False]] * 2 + [[False] * 3] * 2
    assert np.isnan(result.row_norms[1]).tolist() == [False] * 4 + [True] * 2
    assert result.experts == (6, 4, 6, 4)


def test_a_zero_row_leaves_the_mean_and_a_zero_layer_has_no_cosine() -> None:
    weights = routers(3)
    weights[0, 2] = 0.0
    weights[2] = 0.0
    result = router_similarity(weights, (0, 1, 2), delta_max=2)
    others = [cosine(weights[0, e], weights[1, e]) for e in range(6) if e != 2]
    assert result.row_cosine[0, 0] == pytest.approx(np.mean(others), abs=1e-12)
    assert result.cosine[0, 1] == pytest.approx(cosine(weights[0].ravel(), weights[1].ravel()), abs=1e-12)
    assert np.isnan(result.cosine[2]).all()
    assert np.isnan(result.row_cosine[:, 1]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_weight_spoils_its_layer_and_its_row(value: float) -> None:
    weights = routers(3)
    weights[1, 3, 0] = value
    result = router_similarity(weights, (0, 1, 2), delta_max=2)
    assert np.isnan(result.cosine[1]).all()
    assert np.isnan(result.cosine[:, 1]).all()
    assert result.cosine[0, 2] == pytest.approx(cosine(weights[0].ravel(), weights[2].ravel()), abs=1e-12)
    others = [cosine(weights[0, e], weights[1, e]) for e in range(6) if e != 3]
    assert result.row_cosine[0, 0] == pytest.approx(np.mean(others), abs=1e-12)


def test_one_layer() -> None:
    result = router_similarity(routers(1), (5,), delta_max=2)
    assert result.cosine == pytest.approx(np.ones((1, 1)))
    assert np.isnan(result.row_cosine).all()


@pytest.mark.parametrize(
    ("weights", "layers", "delta_max", "message"),
    [
        (routers(3), (0, 1), 5, "3 router weights for 2 layers"),
        (routers(2)[:, 0], (0, 1), 5, "matrices"),
        (routers(2), (1, 0), 5, "ascend"),
        (routers(2), (0, 1), 0, "delta_max"),
    ],
)
def test_what_is_refused(weights: np.ndarray, layers: tuple[int, ...], delta_max: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router_similarity(weights, layers, delta_max)


def test_a_mean_leaves_out_what_is_not_finite() -> None:
    values = np.array([[[1.0, 0.5], [0.5, np.nan]], [[0.5, np.nan], [np.inf, np.nan]]])
    np.testing.assert_array_equal(finite_mean(values, axis=0), [[0.75, 0.5], [0.5, np.nan]])
    np.testing.assert_array_equal(finite_mean(values[0], axis=1), [0.75, 0.5])
