"""Shares, entropy and surprisal of single tokens, against sums written out."""

import numpy as np
import pytest
from scipy.stats import entropy

from moescope.stats.token_routing import expert_surprisal, share_entropy, weight_shares

TOP_K = (2, 3)
RNG = np.random.default_rng(3)
WEIGHTS = RNG.random((5, 2, 3)).astype(np.float16)


def test_shares_sum_to_one_over_a_layers_own_k() -> None:
    shares = weight_shares(WEIGHTS, TOP_K)
    for token in range(5):
        for layer, k in enumerate(TOP_K):
            own = WEIGHTS[token, layer, :k].astype(np.float64)
            np.testing.assert_allclose(shares[token, layer, :k], own / own.sum(), rtol=1e-6)
            assert (shares[token, layer, k:] == 0).all()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0, 0, 0], [1 / 3, 1 / 3, 1 / 3]),
        ([np.nan, 3, 1], [0, 0.75, 0.25]),
        ([-1, 3, 1], [0, 0.75, 0.25]),
        ([np.inf, 0, 1], [0, 0, 1]),
    ],
)
def test_weights_that_make_no_share(weights: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(weight_shares(np.array([[weights]], np.float16), (3,))[0, 0], expected)


def test_entropy_is_scipys() -> None:
    shares = weight_shares(WEIGHTS, TOP_K)
    np.testing.assert_allclose(share_entropy(shares), entropy(shares.astype(np.float64), base=2, axis=2), rtol=1e-6)


def test_entropy_at_its_ends() -> None:
    found = share_entropy(np.array([[[1, 0, 0, 0], [0.25] * 4]], np.float32))
    np.testing.assert_array_equal(found, [[0, 2]])
    assert not np.signbit(found).any()


def test_surprisal_is_that_of_the_counts() -> None:
    counts = np.array([[90, 0, 10, 0], [1, 2, 3, 4]])  # the last of the first layer is padding
    ids = np.array([[[0, 2, 3], [3, 1, 0]], [[1, 0, 0], [0, 1, 2]]], np.uint8)
    found = expert_surprisal(ids, TOP_K, counts, (3, 4))
    first = -np.log2(np.array([90.5, 0.5, 10.5]) / 101.5)
    second = -np.log2(np.array([1.5, 2.5, 3.5, 4.5]) / 12)
    expected = [
        [(first[0] + first[2]) / 2, second[[3, 1, 0]].mean()],
        [(first[1] + first[0]) / 2, second[[0, 1, 2]].mean()],
    ]
    np.testing.assert_allclose(found, expected)


def test_even_use_gives_log2_of_the_experts() -> None:
    ids = np.zeros((1, 1, 1), np.uint8)
    np.testing.assert_allclose(expert_surprisal(ids, (1,), np.full((1, 8), 7), (8,)), [[3.0]])
