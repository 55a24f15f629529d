"""Distances against scipy's and plain numpy's, and the noise of a run against runs that are really drawn."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon
from scipy.stats import pearsonr

from moescope.stats.activation import Activation, selection_frequency
from moescope.stats.comparison import (
    Comparison,
    ExpertMove,
    compare_activations,
    distances,
    sampling_noise,
    within_run,
)

EXPERTS = (16, 12, 16)
LAYERS = (1, 3, 4)
TOP_K = 2


def draw(
    router: NDArray[np.float64], rng: np.random.Generator, prompts: int = 160, tokens: int = 40
) -> NDArray[np.int64]:
    """Selections by split (16, L, E): each prompt prefers experts of its own, and lies in one split as a whole."""
    splits = np.zeros((16, *router.shape), np.int64)
    for _ in range(prompts):
        split = rng.integers(16)
        for row, width in enumerate(EXPERTS):
            taste = rng.dirichlet(router[row, :width] * 40)
            splits[split, row, :width] += rng.multinomial(tokens * TOP_K, taste)
    return splits


def routers(rng: np.random.Generator) -> NDArray[np.float64]:
    router = np.zeros((3, 16))
    for row, width in enumerate(EXPERTS):
        router[row, :width] = rng.dirichlet(np.full(width, 2.0)) * 0.9 + 0.1 / width
    return router


def frequency(splits: NDArray[np.int64]) -> Activation:
    counts = splits.sum(axis=0)
    return selection_frequency(counts, (TOP_K,) * 3, int(counts[0].sum()) // TOP_K, EXPERTS, LAYERS)


def compared(one: NDArray[np.int64], two: NDArray[np.int64], top: int = 20) -> Comparison:
    return compare_activations(
        frequency(one), frequency(two), within_run(one, EXPERTS), within_run(two, EXPERTS, seed=1), top
    )


def test_distances_are_those_of_scipy_and_numpy() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 50, (3, 16)).astype(float), rng.integers(0, 9, (3, 16)).astype(float)
    one[0, :4] = two[0, 2:6] = 0
    found = distances(one, two, EXPERTS)
    for row, width in enumerate(EXPERTS):
        p, q = one[row, :width], two[row, :width]
        assert found.jensen_shannon[row] == pytest.approx(jensenshannon(p, q, base=2) ** 2, rel=1e-12)
        assert found.total_variation[row] == pytest.approx(np.abs(p / p.sum() - q / q.sum()).sum() / 2, rel=1e-12)


def test_distances_are_symmetric_and_end_at_0_and_1() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.random((3, 16)), rng.random((3, 16))
    there, back = distances(one, two, EXPERTS), distances(two, one, EXPERTS)
    np.testing.assert_allclose(there.jensen_shannon, back.jensen_shannon, rtol=1e-12)
    np.testing.assert_allclose(there.total_variation, back.total_variation, rtol=1e-12)
    same = distances(one, 3 * one, EXPERTS)
    np.testing.assert_allclose([same.jensen_shannon, same.total_variation], 0, atol=1e-15)
    apart = distances(np.eye(3, 16), np.eye(3, 16, k=5), EXPERTS)
    np.testing.assert_array_equal([apart.jensen_shannon, apart.total_variation], 1)


def test_padding_is_ignored() -> None:
    rng = np.random.default_rng(2)
    one, two = rng.random((3, 16)), rng.random((3, 16))
    clean = distances(one, two, EXPERTS)
    one[1, 12:], two[1, 12:] = np.nan, 1e9
    dirty = distances(one, two, EXPERTS)
    np.testing.assert_array_equal(dirty.jensen_shannon, clean.jensen_shannon)
    np.testing.assert_array_equal(dirty.total_variation, clean.total_variation)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_layer_without_anything_is_undefined_and_no_other(value: float) -> None:
    rng = np.random.default_rng(3)
    one, two = rng.random((3, 16)), rng.random((3, 16))
    one[1] = value
    found = distances(one, two, EXPERTS)
    assert np.isnan(found.jensen_shannon).tolist() == [False, True, False]
    assert np.isnan(found.total_variation).tolist() == [False, True, False]


def test_equal_profiles_do_not_differ() -> None:
    rng = np.random.default_rng(4)
    splits = draw(routers(rng), rng)
    found = compared(splits, splits)
    np.testing.assert_array_equal(found.between.jensen_shannon, 0)
    np.testing.assert_array_equal(found.between.total_variation, 0)
    np.testing.assert_array_equal(found.ratio.jensen_shannon, 0)
    np.testing.assert_allclose(found.correlation, 1)
    assert found.moved == ()


def test_the_difference_and_pearson_r_of_each_layer() -> None:
    rng = np.random.default_rng(5)
    one, two = draw(routers(rng), rng), draw(routers(rng), rng)
    found = compared(one, two)
    a, b = frequency(one).matrix, frequency(two).matrix
    np.testing.assert_array_equal(found.difference, b - a)
    assert np.isnan(found.difference[1, 12:]).all()
    for row, width in enumerate(EXPERTS):
        assert found.correlation[row] == pytest.approx(pearsonr(a[row, :width], b[row, :width])[0])
    back = compared(two, one)
    np.testing.assert_array_equal(back.difference, -found.difference)
    np.testing.assert_allclose(back.between.jensen_shannon, found.between.jensen_shannon)
    assert [(m.layer, m.expert) for m in back.moved] == [(m.layer, m.expert) for m in found.moved]


def test_a_planted_shift_is_found() -> None:
    rng = np.random.default_rng(6)
    router = routers(rng)
    shifted = router.copy()
    shifted[1, 7] += 0.4
    shifted[1] /= shifted[1].sum()
    found = compared(draw(router, rng), draw(shifted, rng), top=5)
    first = found.moved[0]
    assert (first.layer, first.expert) == (3, 7)
    assert first.difference == pytest.approx(shifted[1, 7] - router[1, 7], abs=0.05)
    assert first.ratio == pytest.approx(first.after / first.before)
    assert len(found.moved) == 5
    assert np.argmax(found.between.jensen_shannon) == np.argmax(found.ratio.jensen_shannon) == 1
    assert found.ratio.jensen_shannon[1] > 10
    assert max(found.ratio.jensen_shannon[[0, 2]]) < 3


def test_experts_are_sorted_by_size_of_the_move_and_ties_by_place() -> None:
    one = Activation("frequency", np.array([[0.5, 0.5, 0.0, 0.0]] * 2), (2, 9), (4, 4), (2, 2), 10)
    two = Activation(
        "frequency", np.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.375, 0.5, 0.125]]), (2, 9), (4, 4), (2, 2), 10
    )
    moved = compare_activations(one, two).moved
    assert [(move.layer, move.expert) for move in moved] == [(9, 0), (9, 2), (9, 1), (9, 3)]
    assert [move.ratio for move in moved] == [0, float("inf"), 0.75, float("inf")]
    assert np.isnan(ExpertMove(0, 0, 0.0, 0.0).ratio)


def test_runs_of_one_distribution_differ_by_their_noise_and_others_by_far_more() -> None:
    rng = np.random.default_rng(7)
    router, other = routers(rng), routers(rng)
    same = [compared(draw(router, rng), draw(router, rng, prompts)) for prompts in (160, 160, 160, 40, 40, 640)]
    for name in ("jensen_shannon", "total_variation"):
        ratio = np.mean([getattr(found.ratio, name) for found in same])
        assert 0.75 < ratio < 1.33, name
    for found in same:
        assert found.within_reference is not None
        assert found.within_other is not None
        levels = [found.within_reference.distances.jensen_shannon, found.within_other.distances.jensen_shannon]
        assert found.between.jensen_shannon.mean() < np.max(levels, axis=0).mean()
    apart = compared(draw(router, rng), draw(other, rng))
    assert apart.ratio.jensen_shannon.min() > 10
    assert apart.ratio.total_variation.min() > 3


def test_the_level_within_is_that_of_halves() -> None:
    rng = np.random.default_rng(8)
    splits = np.zeros((16, 3, 16), np.int64)
    splits[3], splits[11] = draw(routers(rng), rng).sum(axis=0), draw(routers(rng), rng).sum(axis=0)
    level = within_run(splits, EXPERTS, seed=5, partitions=3)
    expected = distances(splits[3].astype(float), splits[11].astype(float), EXPERTS)
    np.testing.assert_allclose(level.distances.jensen_shannon, expected.jensen_shannon)
    np.testing.assert_allclose(level.distances.total_variation, expected.total_variation)
    assert (level.splits, level.partitions, level.seed) == (2, 3, 5)
    noise = sampling_noise(level, level)
    np.testing.assert_allclose(noise.jensen_shannon, expected.jensen_shannon / 2)
    np.testing.assert_allclose(noise.total_variation, expected.total_variation / np.sqrt(2))


def test_the_seed_decides_the_halves() -> None:
    rng = np.random.default_rng(9)
    splits = draw(routers(rng), rng)
    one, same, other = (within_run(splits, EXPERTS, seed).distances.jensen_shannon for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).all()
    np.testing.assert_allclose(one, other, rtol=0.3)


@pytest.mark.parametrize("used", [0, 1])
def test_without_two_splits_there_is_no_level(used: int) -> None:
    rng = np.random.default_rng(10)
    splits = np.zeros((16, 3, 16), np.int64)
    splits[:used] = draw(routers(rng), rng).sum(axis=0)
    level = within_run(splits, EXPERTS)
    assert level.splits == used
    assert np.isnan(level.distances.jensen_shannon).all()
    found = compared(splits, draw(routers(rng), rng))
    assert np.isnan(found.noise.jensen_shannon).all()
    assert np.isnan(found.ratio.total_variation).all()
    assert np.isfinite(found.between.jensen_shannon).all() == bool(used)


def test_no_tokens_leave_everything_undefined() -> None:
    rng = np.random.default_rng(11)
    nothing = np.zeros((16, 3, 16), np.int64)
    found = compared(draw(routers(rng), rng), nothing)
    for values in (found.difference, found.between.jensen_shannon, found.between.total_variation, found.correlation):
        assert np.isnan(values).all()
    assert found.moved == ()


def test_without_splits_the_noise_is_unknown() -> None:
    rng = np.random.default_rng(12)
    found = compare_activations(frequency(draw(routers(rng), rng)), frequency(draw(routers(rng), rng)))
    assert found.within_reference is None
    assert np.isnan(found.noise.jensen_shannon).all()
    assert np.isfinite(found.between.jensen_shannon).all()


def test_what_does_not_belong_together_is_refused() -> None:
    one = Activation("frequency", np.full((1, 4), 0.25), (2,), (4,), (2,), 10)
    for other in (
        Activation("weight", one.matrix, (2,), (4,), (2,), 10),
        Activation("frequency", one.matrix, (3,), (4,), (2,), 10),
        Activation("frequency", one.matrix, (2,), (3,), (2,), 10),
        Activation("frequency", np.full((1, 5), 0.2), (2,), (4,), (2,), 10),
    ):
        with pytest.raises(ValueError, match=r"same measure|differ in shape"):
            compare_activations(one, other)
    with pytest.raises(ValueError, match="negative"):
        compare_activations(one, one, top=-1)
    with pytest.raises(ValueError, match="shape"):
        distances(one.matrix, one.matrix, (4, 4))
    with pytest.raises(ValueError, match="splits"):
        within_run(np.zeros((16, 2, 4), np.int64), (4,))
    with pytest.raises(ValueError, match="partitions"):
        within_run(np.zeros((16, 1, 4), np.int64), (4,), partitions=0)
