"""Balance, coverage and phases against scipy, against definitions written out, and against routings that were drawn."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import entropy

from moescope.stats.activation import Activation, selection_frequency
from moescope.stats.use import expert_coverage, expert_use, phase_contrast

EXPERTS = (16, 12, 2)
LAYERS = (1, 3, 4)


def counts(seed: int = 0) -> NDArray[np.int64]:
    """Skewed selections, one expert dead, rows of equal sums, noise in the padding."""
    rng = np.random.default_rng(seed)
    drawn = np.full((3, 16), 7, np.int64)
    for row, width in enumerate(EXPERTS):
        share = rng.dirichlet(np.full(width, 0.7))
        share[0] = 0
        drawn[row, :width] = rng.multinomial(4000, share / share.sum())
    return drawn


def frequency(drawn: NDArray[np.int64], experts: tuple[int, ...] = EXPERTS) -> Activation:
    tokens = int(drawn[0, : experts[0]].sum()) // 2
    return selection_frequency(drawn, (2,) * len(experts), tokens, experts, LAYERS[: len(experts)])


def test_balance_is_that_of_scipy_and_of_the_definitions() -> None:
    drawn = counts()
    use = expert_use(frequency(drawn), hot_from=1.5)
    for row, width in enumerate(EXPERTS):
        x = drawn[row, :width].astype(float)
        nats = entropy(x)
        assert use.max_over_mean[row] == pytest.approx(x.max() / x.mean(), rel=1e-12)
        assert use.jain[row] == pytest.approx(x.sum() ** 2 / (width * (x**2).sum()), rel=1e-12)
        assert use.entropy[row] == pytest.approx(nats / np.log(width), abs=1e-12)
        assert use.effective[row] == pytest.approx(np.exp(nats), rel=1e-12)
        difference = np.abs(x[:, None] - x[None, :]).mean()
        assert use.gini[row] == pytest.approx(difference / (2 * x.mean()), abs=1e-12)
        assert np.flatnonzero(use.dead[row]).tolist() == np.flatnonzero(x == 0).tolist()
        assert np.flatnonzero(use.hot[row]).tolist() == np.flatnonzero(x >= 1.5 * x.mean()).tolist()
    assert use.hot.any()


@pytest.mark.parametrize(
    ("row", "expected"),
    [([5, 5, 5, 5], (1, 1, 1, 0, 4)), ([20, 0, 0, 0], (4, 0.25, 0, 0.75, 1)), ([10, 10, 0, 0], (2, 0.5, 0.5, 0.5, 2))],
    ids=["even", "one alone", "two of four"],
)
def test_ends_of_the_scales(row: list[int], expected: tuple[float, ...]) -> None:
    use = expert_use(frequency(np.array([row]), (4,)))
    found = (use.max_over_mean[0], use.jain[0], use.entropy[0], use.gini[0], use.effective[0])
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("nothing", [np.nan, 0.0])
def test_a_layer_without_tokens_is_undefined_and_no_other(nothing: float) -> None:
    matrix = frequency(counts()).matrix.copy()
    matrix[1] = nothing
    use = expert_use(Activation("frequency", matrix, LAYERS, EXPERTS, (2, 2, 2), 2000))
    for values in (use.max_over_mean, use.jain, use.entropy, use.gini, use.effective):
        assert np.isnan(values).tolist() == [False, True, False]
    assert not use.dead[1].any()
    assert not use.hot[1].any()


def test_a_single_expert_is_even() -> None:
    use = expert_use(frequency(np.array([[8]]), (1,)))
    assert (use.max_over_mean[0], use.jain[0], use.gini[0], use.effective[0]) == (1, 1, 0, 1)
    assert np.isnan(use.entropy[0])


def test_hot_from_is_positive() -> None:
    with pytest.raises(ValueError, match="hot_from"):
        expert_use(frequency(counts()), hot_from=0)


def test_coverage_by_hand() -> None:
    found = expert_coverage(np.array([[100, 30, 0, 70], [120, 80, 9, 9]]), 100, 50, (4, 2), (0, 5))
    assert found.under.tolist() == [2, 0]
    assert found.short.tolist() == [[0, 20, 50, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(found.more_tokens, [[0, 67, np.inf, 0], [0, 0, np.nan, np.nan]])


def test_the_tokens_asked_for_are_enough() -> None:
    rng = np.random.default_rng(3)
    share = np.array([0.01, 0.04, 0.15, 0.3, 0.5])
    first = rng.multinomial(20_000, share)[None, :]
    found = expert_coverage(first, 20_000, 1000, (5,), (0,))
    assert found.under[0] == 2
    more = int(found.more_tokens[0].max())
    after = first + rng.multinomial(more, share)
    assert after.min() == pytest.approx(1000, rel=0.15)


@pytest.mark.parametrize("arguments", [{"minimum": -1}, {"tokens": -1}, {"layers": (4, 3, 1)}, {"experts": (16, 12)}])
def test_coverage_of_what_does_not_belong_together(arguments: dict[str, object]) -> None:
    good = {"selection_counts": counts(), "tokens": 2000, "minimum": 5, "experts": EXPERTS, "layers": LAYERS}
    with pytest.raises(ValueError, match=r"negative|ascend|one row"):
        expert_coverage(**(good | arguments))  # type: ignore[arg-type]


def phases(rng: np.random.Generator, shift: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Three domains with routers of their own, of which the last is decoded most; k = 1."""
    tokens = np.array([[9000, 500], [6000, 800], [1500, 4000]])
    drawn = np.zeros((3, 2, 3, 16), np.int64)
    for row, width in enumerate(EXPERTS):
        for domain in range(3):
            router = rng.dirichlet(np.full(width, 2.0))
            other = rng.dirichlet(np.full(width, 2.0)) if shift else router
            for phase, share in enumerate((router, other)):
                drawn[domain, phase, row, :width] = rng.multinomial(tokens[domain, phase], share)
    return drawn, tokens


def test_a_mix_of_domains_alone_is_no_difference_of_phases() -> None:
    rng = np.random.default_rng(4)
    ratios = []
    for _ in range(100):
        found = phase_contrast(*phases(rng, shift=False), EXPERTS, LAYERS)
        ratios.append(found.between.jensen_shannon / found.floor)
        assert found.domains == 3
    np.testing.assert_allclose(np.mean(ratios, axis=0), 1, atol=0.35)
    apart = phase_contrast(*phases(rng, shift=True), EXPERTS, LAYERS)
    assert (apart.between.jensen_shannon > 10 * apart.floor).all()


def test_one_domain_is_compared_as_it_is() -> None:
    drawn, tokens = phases(np.random.default_rng(5), shift=True)
    tokens[1:, 1] = 0
    found = phase_contrast(drawn, tokens, EXPERTS, LAYERS)
    own = drawn[0, :, 0] / drawn[0, :, 0].sum(axis=1, keepdims=True)
    np.testing.assert_allclose([found.prefill[0], found.decode[0]], own)
    assert found.domains == 1
    assert np.isnan(found.prefill[1, 12:]).all()


def test_without_a_domain_in_both_phases_nothing_is_known() -> None:
    drawn, tokens = phases(np.random.default_rng(6), shift=True)
    tokens[:, 1] = 0
    found = phase_contrast(drawn, tokens, EXPERTS, LAYERS)
    assert found.domains == 0
    for values in (found.prefill, found.decode, found.floor, found.between.jensen_shannon):
        assert np.isnan(values).all()


def test_phases_of_what_does_not_belong_together() -> None:
    drawn, tokens = phases(np.random.default_rng(7), shift=False)
    for arguments in (
        (drawn, tokens[:2], EXPERTS, LAYERS),
        (drawn, tokens, EXPERTS[:2], LAYERS),
        (drawn, tokens, EXPERTS, LAYERS[::-1]),
    ):
        with pytest.raises(ValueError, match=r"shape|layers"):
            phase_contrast(*arguments)
