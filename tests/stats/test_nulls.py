"""Nulls of the layer correlation against scipy, against every order there is, and against themselves."""

from itertools import permutations

import numpy as np
import pytest
from activations import make_activation
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon
from scipy.stats import kstest, pearsonr, permutation_test, rankdata, spearmanr

from moescope.stats.activation import selection_frequency
from moescope.stats.layer_divergence import expected_divergence, pairwise_divergence
from moescope.stats.nulls import LayerNulls, layer_nulls
from moescope.stats.standardised import normal_scores, rank_rows


def independent(rng: np.random.Generator, depth: int = 8, width: int = 16, spread: float = 1.0) -> NDArray[np.float64]:
    return rng.dirichlet(np.full(width, spread), size=depth)


def nulls(matrix: NDArray[np.float64], permutations: int = 500, **options: int) -> LayerNulls:
    return layer_nulls(make_activation(matrix), permutations=permutations, **options)


def test_the_three_measures_are_those_of_scipy() -> None:
    matrix = independent(np.random.default_rng(0))
    matrix[:, :3] = np.round(matrix[:, :3], 1)
    matrix /= matrix.sum(axis=1, keepdims=True)
    found = nulls(matrix, 10)
    for i in range(8):
        for j in range(8):
            assert found.pearson[i, j] == pytest.approx(pearsonr(matrix[i], matrix[j])[0], abs=1e-9)
            assert found.spearman[i, j] == pytest.approx(spearmanr(matrix[i], matrix[j])[0], abs=1e-9)
            assert found.divergence[i, j] == pytest.approx(jensenshannon(matrix[i], matrix[j], base=2) ** 2, abs=1e-9)
    for delta, r, rho, divergence in zip(
        found.free.deltas, found.free.mean, found.ranks.mean, found.distances.mean, strict=True
    ):
        pairs = [(i, i + delta) for i in range(8 - delta)]
        assert r == pytest.approx(np.mean([pearsonr(matrix[i], matrix[j])[0] for i, j in pairs]), abs=1e-9)
        assert rho == pytest.approx(np.mean([spearmanr(matrix[i], matrix[j])[0] for i, j in pairs]), abs=1e-9)
        assert divergence == pytest.approx(np.mean([found.divergence[i, j] for i, j in pairs]), abs=1e-9)


def test_moments_under_chance_are_those_of_every_order() -> None:
    rng = np.random.default_rng(1)
    matrix = independent(rng, depth=2, width=6)
    orders = np.array(list(permutations(range(6))))
    r = np.array([np.corrcoef(matrix[0], matrix[1][order])[0, 1] for order in orders])
    found = nulls(matrix, 10).free
    assert found.null_mean[0] == pytest.approx(r.mean(), abs=1e-9)
    assert found.null_sd[0] == pytest.approx(r.std(), abs=1e-9)

    within = np.array([order for order in orders if set(order[:3]) == {0, 1, 2}])
    r = np.array([np.corrcoef(matrix[0], matrix[1][order])[0, 1] for order in within])
    grouped = nulls(matrix, 10, groups=2).within_groups
    assert grouped is not None
    assert grouped.null_mean[0] == pytest.approx(r.mean(), abs=1e-9)
    assert grouped.null_sd[0] == pytest.approx(r.std(), abs=1e-9)

    divergence = np.array([jensenshannon(matrix[0], matrix[1][order], base=2) ** 2 for order in orders])
    mean, variance = expected_divergence(matrix)
    assert mean[0, 1] == pytest.approx(divergence.mean(), abs=1e-9)
    assert variance[0, 1] == pytest.approx(divergence.var(), abs=1e-9)


def test_p_of_a_pair_is_that_of_scipy() -> None:
    matrix = independent(np.random.default_rng(2), depth=2, width=7)
    matrix[1] = 0.6 * matrix[0] + 0.4 * matrix[1]
    exact = permutation_test(
        (matrix[0],),
        lambda x: pearsonr(x, matrix[1])[0],
        permutation_type="pairings",
        alternative="greater",
        n_resamples=np.inf,
    )
    found = nulls(matrix, 20_000).free
    assert found.cell_p[0, 1] == pytest.approx(exact.pvalue, abs=0.01)
    assert found.p[0] == pytest.approx(exact.pvalue, abs=0.01)
    assert found.p[0] == found.p_family[0] == found.p_largest


def test_means_spread_as_the_exact_moments_say() -> None:
    matrix = independent(np.random.default_rng(3), depth=10, width=16, spread=0.3)
    found = nulls(matrix, 4000)
    for null in (found.free, found.ranks):
        np.testing.assert_allclose(null.null_sd, 1 / np.sqrt(null.pairs * 15), rtol=1e-9)
        assert (null.null_quantiles[0] < null.null_mean).all()
        assert (null.null_mean < null.null_quantiles[2]).all()
    np.testing.assert_allclose(
        np.ptp(found.ranks.null_quantiles, axis=0)[:-3],
        2 * 1.96 * found.ranks.null_sd[:-3],
        rtol=0.1,
    )


def test_p_values_are_uniform_where_there_is_nothing() -> None:
    rng = np.random.default_rng(4)
    runs = [nulls(independent(rng), 199, seed=seed) for seed in range(150)]
    for p in (
        [run.free.p[0] for run in runs],
        [run.free.p_largest for run in runs],
        [run.ranks.p_largest for run in runs],
        [run.free.cell_p[2, 5] for run in runs],
        [run.distances.p[0] for run in runs],
    ):
        assert kstest(p, "uniform").pvalue > 0.002
        assert np.mean(np.array(p) <= 0.05) < 0.12


def test_alignment_is_found_and_only_where_it_is() -> None:
    rng = np.random.default_rng(5)
    base = independent(rng, depth=3, width=32)
    matrix = np.tile(base, (3, 1)) * 0.7 + independent(rng, depth=9, width=32) * 0.3
    found = nulls(matrix, 2000)
    for null in (found.free, found.ranks):
        assert null.looks == 8
        assert (null.p_family[[2, 5]] < 0.01).all()
        assert null.p_largest < 0.01
        assert (null.p_family[[0, 1, 3, 4]] > 0.05).all()
        assert (null.mean[[2, 5]] > null.threshold[[2, 5]]).all()
        assert (null.mean[[0, 1, 3, 4]] < null.threshold[[0, 1, 3, 4]]).all()
    assert found.distances.p[2] < 1e-6
    assert found.distances.p[0] > 0.05
    assert (found.free.p <= found.free.p_family).all()


def test_groups_explain_what_they_explain() -> None:
    rng = np.random.default_rng(6)
    busy = np.repeat([4.0, 1.0, 1.0, 0.2], 8)
    matrix = independent(rng, depth=8, width=32, spread=20) * busy
    matrix /= matrix.sum(axis=1, keepdims=True)
    found = nulls(matrix, 999, groups=4)
    assert found.within_groups is not None
    assert found.free.p_largest == 0.001
    assert found.within_groups.p_largest > 0.05
    np.testing.assert_allclose(found.free.mean, found.within_groups.mean)


def test_shared_dead_experts_are_taken_out() -> None:
    rng = np.random.default_rng(7)
    matrix = independent(rng, depth=8, width=32, spread=20)
    matrix[:, :4] = 0
    matrix /= matrix.sum(axis=1, keepdims=True)
    found = nulls(matrix, 999)
    assert found.dead_experts == (0, 1, 2, 3)
    assert found.without_dead is not None
    assert found.free.p_largest == 0.001
    assert found.without_dead.p_largest > 0.05
    assert found.without_dead.experts == 28
    assert nulls(independent(rng), 10).without_dead is None


def test_dead_experts_are_taken_out_beside_many_dead_layers() -> None:
    matrix = independent(np.random.default_rng(15), depth=9, width=32)
    matrix[:, 4] = 0
    matrix[4:] = np.nan
    found = nulls(matrix, 20)
    assert found.without_dead is not None
    assert found.without_dead.pairs.tolist() == [3, 2, 1]
    assert found.without_dead.mean[2] == pytest.approx(
        np.corrcoef(np.delete(matrix[0], 4), np.delete(matrix[3], 4))[0, 1], abs=1e-9
    )


def test_a_dead_layer_is_no_dead_expert_and_spoils_no_other() -> None:
    rng = np.random.default_rng(8)
    matrix = independent(rng)
    matrix[3] = np.nan
    matrix[5] = 1 / 16
    found = nulls(matrix, 99)
    assert found.dead_experts == ()
    assert np.isnan(found.free.cell_p[[3, 5]]).all()
    kept = [0, 1, 2, 4, 6, 7]
    off = ~np.eye(6, dtype=bool)
    assert np.isfinite(found.free.cell_p[np.ix_(kept, kept)][off]).all()
    assert found.free.pairs.sum() == 15
    assert np.isfinite(found.free.p).all()


def test_layers_of_other_width_take_no_part() -> None:
    rng = np.random.default_rng(9)
    matrix = independent(rng, depth=5)
    matrix[2, 12:] = np.nan
    activation = make_activation(matrix, (0, 1, 2, 5, 6), (16, 16, 12, 16, 16))
    found = layer_nulls(activation, permutations=50)
    assert found.free.deltas == (1, 4, 5, 6)
    assert found.free.pairs.tolist() == [2, 1, 2, 1]
    assert np.isnan(found.free.cell_p[2]).all()


def test_intervals_hold_what_other_prompts_would_give() -> None:
    rng = np.random.default_rng(10)
    truth = rng.dirichlet(np.full(32, 3.0), size=6)
    held = []
    for _ in range(30):
        splits = rng.multinomial(300, truth, size=(16, 6))
        activation = selection_frequency(splits.sum(axis=0), (2,) * 6, 2400, (32,) * 6, range(6))
        found = layer_nulls(activation, splits, permutations=1)
        again = rng.multinomial(4800, truth, size=(200, 6))
        expected = np.mean(
            [[np.diagonal(np.corrcoef(run), delta).mean() for delta in range(1, 6)] for run in again], axis=0
        )
        held.append((found.intervals[0] <= expected) & (expected <= found.intervals[1]))
    assert 0.88 < np.mean(held) <= 1


def test_the_same_seed_gives_the_same() -> None:
    matrix = independent(np.random.default_rng(11))
    one, two, other = nulls(matrix, seed=1), nulls(matrix, seed=1), nulls(matrix, seed=2)
    np.testing.assert_array_equal(one.free.cell_p, two.free.cell_p)
    assert (one.free.cell_p != other.free.cell_p).any()


@pytest.mark.parametrize("shape", [(0, 0), (1, 8), (2, 2), (5, 2), (3, 1)])
def test_small_models(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(12).random(shape)
    found = nulls(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1e-9), 20)
    assert found.pearson.shape == (shape[0], shape[0])
    if shape[1] == 2:
        assert (found.free.p > 0.2).all() or shape[0] > 2
        assert np.isfinite(found.free.p_largest)
    else:
        assert found.free.looks == 0
        assert np.isnan(found.free.p_largest)


def test_one_token() -> None:
    matrix = np.zeros((4, 8))
    matrix[:, 3] = 1
    found = nulls(matrix, 200)
    assert found.free.mean.tolist() == pytest.approx([1, 1, 1])
    assert found.without_dead is not None
    assert found.without_dead.looks == 0


def test_ranks_and_scores() -> None:
    matrix = np.array([[0.1, 0.4, 0.1, 0.4, np.nan], [3, 1, 2, 5, 4], [np.nan] * 5])
    ranks = rank_rows(matrix, (4, 5, 5))
    np.testing.assert_array_equal(ranks[0], [1.5, 3.5, 1.5, 3.5, np.nan])
    np.testing.assert_array_equal(ranks[1], rankdata(matrix[1]))
    assert np.isnan(ranks[2]).all()
    scores = normal_scores(ranks, (4, 5, 5))
    np.testing.assert_allclose(scores[1].sum(), 0, atol=1e-12)


def test_a_distribution_that_is_none_has_no_divergence() -> None:
    matrix = np.array([[0.5, 0.5], [0.0, 0.0], [np.nan, 1.0], [1.0, 0.0]])
    found = pairwise_divergence(matrix, (2,) * 4)
    assert np.isnan(found[[1, 2]]).all()
    assert np.isfinite(found[[0, 3]][:, [0, 3]]).all()


def test_what_does_not_fit_is_refused() -> None:
    matrix = independent(np.random.default_rng(13))
    with pytest.raises(ValueError, match="permutations"):
        nulls(matrix, 0)
    with pytest.raises(ValueError, match="groups must divide the 16 experts, got 3"):
        nulls(matrix, 10, groups=3)
    with pytest.raises(ValueError, match="expected"):
        layer_nulls(make_activation(matrix), np.zeros((16, 3, 16), np.int64), permutations=10)
