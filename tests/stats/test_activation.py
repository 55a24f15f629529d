"""Activation matrices and layer loads against counts worked out by hand and by np.bincount."""

from typing import Any

import numpy as np
import pytest

from moescope.stats.activation import layer_loads, mean_probability, selection_frequency, weight_share


def routed_counts(tokens: int, experts: tuple[int, ...], top_k: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Counts of a real routing: k distinct experts a token, padded to the widest layer."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((len(experts), max(experts)), dtype=np.int64)
    for row, (width, k) in enumerate(zip(experts, top_k, strict=True)):
        for _ in range(tokens):
            counts[row, rng.choice(width, size=k, replace=False)] += 1
    return counts


def test_frequency_is_counts_over_k_tokens() -> None:
    counts = np.array([[3, 1, 0, 4], [2, 2, 2, 2]])
    activation = selection_frequency(counts, (2, 2), 4, (4, 4), (1, 5))
    np.testing.assert_array_equal(activation.matrix, [[0.375, 0.125, 0, 0.5], [0.25, 0.25, 0.25, 0.25]])
    assert (activation.kind, activation.layers, activation.tokens) == ("frequency", (1, 5), 4)


def test_frequency_rows_sum_to_one_with_padding_and_mixed_top_k() -> None:
    experts, top_k = (5, 8, 3), (2, 4, 1)
    activation = selection_frequency(routed_counts(40, experts, top_k), top_k, 40, experts, (0, 1, 2))
    np.testing.assert_allclose(np.nansum(activation.matrix, axis=1), 1.0, rtol=1e-14)
    np.testing.assert_array_equal(np.isnan(activation.matrix).sum(axis=1), [3, 0, 5])


def test_frequency_does_not_hide_missing_counts() -> None:
    counts = np.array([[3, 1, 0, 3]])
    activation = selection_frequency(counts, (2,), 4, (4,), (0,))
    assert activation.matrix.sum() == pytest.approx(7 / 8)


def test_no_tokens_give_nan_rows() -> None:
    zeros = np.zeros((2, 4))
    assert np.isnan(selection_frequency(zeros.astype(np.int64), (2, 2), 0, (4, 4), (0, 1)).matrix).all()
    assert np.isnan(mean_probability(zeros, 0, (2, 2), (4, 4), (0, 1)).matrix).all()
    assert np.isnan(weight_share(zeros, 0, (2, 2), (4, 4), (0, 1)).matrix).all()


def test_mean_probability_averages_over_its_own_tokens() -> None:
    probabilities = np.random.default_rng(1).dirichlet(np.ones(6), size=(3, 10))
    activation = mean_probability(probabilities.sum(axis=1), 10, (2,) * 3, (6,) * 3, (3, 4, 5))
    np.testing.assert_allclose(activation.matrix, probabilities.mean(axis=1), rtol=1e-14)
    assert (activation.kind, activation.tokens) == ("probability", 10)


def test_weight_share_ignores_scale_and_padding() -> None:
    sums = np.array([[1.0, 3.0, 99.0], [2.5, 2.5, 5.0]])
    activation = weight_share(sums, 4, (1, 1), (2, 3), (0, 1))
    np.testing.assert_array_equal(activation.matrix, [[0.25, 0.75, np.nan], [0.25, 0.25, 0.5]])


def test_loads_name_dead_and_busiest_experts() -> None:
    loads = layer_loads(np.array([[4, 0, 3, 0, 1], [2, 3, 3, 0, 9]]), (2, 2), 4, (5, 3), (3, 4))
    assert loads[0].dead_experts == (1, 3)
    assert loads[0].max_over_mean == pytest.approx(4 / (8 / 5))
    assert loads[0].invariant_holds
    assert loads[1].dead_experts == ()
    assert (loads[1].layer, loads[1].selections, loads[1].max_over_mean) == (4, 8, pytest.approx(9 / 8))


@pytest.mark.parametrize(
    ("row", "holds"),
    [([4, 2, 2], True), ([4, 2, 1], False), ([4, 2, 3], False), ([5, 2, 1], False)],
    ids=["exact", "lost a selection", "one too many", "an expert twice in a token"],
)
def test_invariant(row: list[int], holds: bool) -> None:
    (load,) = layer_loads(np.array([row]), (2,), 4, (3,), (0,))
    assert load.invariant_holds is holds


def test_load_without_tokens_has_no_dead_experts() -> None:
    (load,) = layer_loads(np.zeros((1, 4), dtype=np.int64), (2,), 0, (4,), (0,))
    assert load.dead_experts == ()
    assert np.isnan(load.max_over_mean)
    assert load.invariant_holds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": (0,)}, "one row"),
        ({"experts": (4,)}, "one row"),
        ({"top_k": (2, 2, 2)}, "one row"),
        ({"experts": (4, 5)}, "only 4 columns"),
        ({"layers": (1, 0)}, "ascend"),
        ({"layers": (1, 1)}, "ascend"),
        ({"tokens": -1}, "negative"),
        ({"counts": np.zeros(4, dtype=np.int64)}, "one row"),
    ],
)
def test_shapes_that_do_not_belong_together(arguments: dict[str, Any], message: str) -> None:
    good = {
        "counts": np.zeros((2, 4), dtype=np.int64),
        "top_k": (2, 2),
        "tokens": 4,
        "experts": (4, 4),
        "layers": (0, 1),
    }
    case = good | arguments
    values = (case["counts"], case["top_k"], case["tokens"], case["experts"], case["layers"])
    with pytest.raises(ValueError, match=message):
        selection_frequency(*values)
    with pytest.raises(ValueError, match=message):
        layer_loads(*values)
    with pytest.raises(ValueError, match=message):
        weight_share(case["counts"], case["tokens"], case["top_k"], case["experts"], case["layers"])
    with pytest.raises(ValueError, match=message):
        mean_probability(case["counts"], case["tokens"], case["top_k"], case["experts"], case["layers"])
