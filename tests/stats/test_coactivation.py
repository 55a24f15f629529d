"""The chance level against every set counted out, and pairs and clusters that were planted."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from moescope.stats.coactivation import coactivation, pair_probabilities


def counted_out(weights: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Pair probabilities from the probability of every set of k experts."""
    pairs, total = np.zeros((len(weights),) * 2), 0.0
    for chosen in combinations(range(len(weights)), k):
        probability = np.prod(weights[list(chosen)])
        pairs[np.ix_(chosen, chosen)] += probability
        total += probability
    found: NDArray[np.float64] = pairs / total
    return found


def routed(weights: NDArray[np.float64], k: int, tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(tokens, E) choices, drawn from sets of k in proportion to the product of their weights."""
    chosen = np.zeros((tokens, len(weights)), np.int64)
    open_ones = np.arange(tokens)
    while len(open_ones):  # Bernoulli draws, kept where exactly k came up
        share = weights / (weights + 1)
        drawn = rng.random((len(open_ones), len(weights))) < share
        kept = drawn.sum(axis=1) == k
        chosen[open_ones[kept]] = drawn[kept]
        open_ones = open_ones[~kept]
    return chosen


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("skew", [2.0, 0.5])
def test_the_chance_level_is_that_of_all_sets(k: int, skew: float) -> None:
    rng = np.random.default_rng(k)
    expected = counted_out(rng.gamma(skew, size=8) + 0.02, k)
    np.testing.assert_allclose(pair_probabilities(np.diagonal(expected), k), expected, atol=1e-9)


@pytest.mark.parametrize(("experts", "k"), [(128, 8), (256, 8), (60, 4), (8, 2), (2, 1), (3, 2), (64, 63)])
def test_pairs_add_up_at_any_size(experts: int, k: int) -> None:
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(experts, 5.0)) * k
    for _ in range(50):  # shares stay below 1
        share = np.minimum(share, 0.98)
        share *= k / share.sum()
    found = pair_probabilities(share, k)
    np.testing.assert_allclose(found.sum(axis=1), k * share, rtol=1e-8)
    np.testing.assert_array_equal(np.diagonal(found), share)
    np.testing.assert_allclose(found, found.T, atol=1e-15)
    assert found.min() > -1e-12


def test_equal_experts_have_the_textbook_probability() -> None:
    found = pair_probabilities(np.full(6, 0.5), 3)
    np.testing.assert_allclose(found[np.triu_indices(6, 1)], 3 * 2 / (6 * 5))


def test_experts_that_all_or_no_tokens_choose_are_left_out_of_chance() -> None:
    inner = counted_out(np.array([1.0, 2.0, 3.0, 4.0]), 2)
    share = np.array([1.0, *np.diagonal(inner), 0.0])
    found = pair_probabilities(share, 3)
    np.testing.assert_allclose(found[1:5, 1:5], inner, atol=1e-9)
    np.testing.assert_allclose(found[0], share, atol=1e-12)
    assert not found[5].any()
    np.testing.assert_array_equal(
        pair_probabilities(np.array([1.0, 1.0, 0.0]), 2), np.diag([1, 1, 0]) + np.eye(3)[[1, 0, 2]] * [[1, 1, 0]] * 1.0
    )


@pytest.mark.parametrize("share", [[0.5, 0.5, 0.5], [1.5, 0.5, 0.0], [np.nan, 1.0, 1.0], [-0.5, 1.0, 1.5]])
def test_shares_that_no_routing_has(share: list[float]) -> None:
    assert np.isnan(pair_probabilities(np.array(share), 2)).all()


def test_independent_choices_are_at_chance_and_planted_pairs_above() -> None:
    rng = np.random.default_rng(1)
    weights = rng.gamma(2.0, size=12) * 0.3
    chosen = routed(weights, 3, 20_000, rng)
    found = coactivation((chosen.T @ chosen)[None], (3,), 20_000, (12,), (7,))
    upper = np.triu_indices(12, 1)
    z = (found.observed[0] - found.expected[0])[upper] / np.sqrt(found.expected[0][upper])
    assert np.abs(z).max() < 4
    assert 0.5 < z.std() < 1.3
    assert np.nanmax(np.abs(found.excess)) < 0.03
    assert found.modularity[0] < 0.01

    again = chosen.copy()
    where = (chosen[:, 4] == 1) & (chosen[:, 9] == 0)
    for token in np.flatnonzero(where):
        other = rng.permutation(np.flatnonzero((chosen[token] == 1) & (np.arange(12) != 4)))[0]
        again[token, [9, other]] = 1, 0
    found = coactivation((again.T @ again)[None], (3,), 20_000, (12,), (7,))
    best = found.strongest(top=3)[0]
    assert (best.layer, best.first, best.second) == (7, 4, 9)
    assert best.together == (again[:, 4] & again[:, 9]).sum()
    assert best.lift == pytest.approx(best.together / best.expected)
    assert best.lift > 1.2
    assert best.excess == found.excess[0, 4, 9] == found.excess[0, 9, 4]


def test_the_excess_is_the_correlation_beyond_that_of_chance() -> None:
    rng = np.random.default_rng(2)
    chosen = routed(rng.gamma(2.0, size=6) * 0.4, 2, 3000, rng)
    found = coactivation((chosen.T @ chosen)[None], (2,), 3000, (6,), (0,))
    share = chosen.mean(axis=0)
    spread = np.sqrt(np.outer(share * (1 - share), share * (1 - share)))
    chance = (found.expected[0] / 3000 - np.outer(share, share)) / spread
    np.testing.assert_allclose(
        (found.excess[0] + chance)[np.triu_indices(6, 1)],
        np.corrcoef(chosen.T)[np.triu_indices(6, 1)],
        atol=1e-9,
    )


def test_planted_clusters_are_found() -> None:
    rng = np.random.default_rng(3)
    groups = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
    order = rng.permutation(12)
    labels = groups[order]
    chosen = np.zeros((6000, 12), np.int64)
    for token in range(6000):
        weights = np.where(labels == rng.integers(3), 6.0, 0.7)
        chosen[token, rng.choice(12, 3, replace=False, p=weights / weights.sum())] = 1
    found = coactivation((chosen.T @ chosen)[None], (3,), 6000, (12,), (0,))
    np.testing.assert_array_equal(found.clusters[0], labels)
    inside = labels[:, None] == labels[None, :]
    np.fill_diagonal(inside, val=False)
    excess = (found.observed[0] - found.expected[0])[inside].sum()
    assert found.modularity[0] == pytest.approx(excess / (6000 * 3 * 2))
    assert found.modularity[0] > 0.1
    assert found.chance_modularity[0] < 0.02


def test_where_tokens_choose_independently_clusters_are_those_of_chance() -> None:
    rng = np.random.default_rng(5)
    chosen = (rng.random((12, 2000, 32)).argsort(axis=2) < 4).astype(np.int64)
    stacked = chosen.swapaxes(1, 2) @ chosen
    found = coactivation(stacked, (4,) * 12, 2000, (32,) * 12, range(12))
    assert found.modularity.mean() == pytest.approx(found.chance_modularity.mean(), rel=0.15)
    again = coactivation(stacked, (4,) * 12, 2000, (32,) * 12, range(12))
    np.testing.assert_array_equal(found.chance_modularity, again.chance_modularity)


def test_padding_dead_layers_and_single_choices() -> None:
    rng = np.random.default_rng(4)
    pairs = np.zeros((3, 8, 8), np.int64)
    small = routed(np.ones(5), 2, 500, rng)
    single = routed(np.ones(8) * 0.2, 1, 500, rng)
    pairs[0, :5, :5], pairs[1] = small.T @ small, single.T @ single
    found = coactivation(pairs, (2, 1, 2), 500, (5, 8, 8), (0, 1, 9))
    assert not found.expected[0, 5:].any()
    assert np.isnan(found.excess[0, 5:]).all()
    assert (found.clusters[0, 5:] == -1).all()
    assert not found.expected[1][~np.eye(8, dtype=bool)].any()
    assert np.isnan(found.expected[2]).all()
    assert np.isnan(found.modularity).tolist() == [False, True, True]
    one = np.outer([1, 0, 1, 0], [1, 0, 1, 0]).astype(np.int64)
    once = coactivation(one[None], (2,), 1, (4,), (0,))
    np.testing.assert_array_equal(once.expected[0], one)
    assert (once.modularity[0], once.clusters.max()) == (0, -1)
    assert np.isnan(coactivation(np.ones((1, 1, 1), np.int64), (1,), 1, (1,), (0,)).excess).all()
    nothing = coactivation(np.zeros((1, 4, 4), np.int64), (2,), 0, (4,), (0,))
    assert np.isnan(nothing.excess).all()
    assert nothing.strongest() == ()


@pytest.mark.parametrize(
    ("shape", "layers"), [((2, 4, 3), (0, 1)), ((4, 4), (0, 1)), ((2, 4, 4), (0,)), ((2, 4, 4), (1, 0))]
)
def test_what_does_not_belong_together(shape: tuple[int, ...], layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape|ascend"):
        coactivation(np.zeros(shape, np.int64), (2, 2), 4, (4, 4), layers)
