"""Expert similarity against plain float64 numpy, and verdicts on models whose history is known."""

from itertools import combinations, permutations

import numpy as np
import pytest
from weight_sums import grams, within
from weight_sums import same_index as similarity

from moescope.profiler.weight_features import draw_probes
from moescope.stats.expert_features import feature_grams, normalise_features
from moescope.stats.expert_grams import centre, raw_cosine, within_cosine
from moescope.stats.expert_matching import (
    ExpertMatch,
    LayerPair,
    Verdict,
    match_experts,
    permuted_diagonal,
    verdict,
)
from moescope.stats.expert_similarity import (
    PARTS,
    ExpertSimilarity,
    UnusableExpert,
    similarity_by_distance,
)

EXPERTS, NEURONS, HIDDEN = 16, 24, 32
PROBES = draw_probes(HIDDEN)

Layer = dict[str, np.ndarray]


def layer(rng: np.random.Generator, experts: int = EXPERTS) -> Layer:
    inner, outer = (experts, NEURONS, HIDDEN), (experts, HIDDEN, NEURONS)
    return {part: rng.normal(size=outer if part == "down" else inner).astype(np.float32) for part in PARTS}


def mixed(first: Layer, second: Layer, weight: float) -> Layer:
    rest = np.sqrt(1 - weight**2)
    return {part: (weight * first[part] + rest * second[part]).astype(np.float32) for part in PARTS}


def experts_permuted(weights: Layer, rng: np.random.Generator) -> Layer:
    order = rng.permutation(EXPERTS)
    return {part: block[order] for part, block in weights.items()}


def neurons_permuted(weights: Layer, rng: np.random.Generator) -> Layer:
    result = {part: block.copy() for part, block in weights.items()}
    for expert in range(EXPERTS):
        order = rng.permutation(NEURONS)
        result["gate"][expert] = result["gate"][expert][order]
        result["up"][expert] = result["up"][expert][order]
        result["down"][expert] = result["down"][expert][:, order]
    return result


def stacked(history: str, cosine: float, depth: int, seed: int) -> list[Layer]:
    rng = np.random.default_rng(seed)
    first = layer(rng)
    layers = [first]
    for _ in range(depth - 1):
        copy = mixed(first, layer(rng), cosine)
        if history in ("experts permuted", "both"):
            copy = experts_permuted(copy, rng)
        if history in ("neurons permuted", "both"):
            copy = neurons_permuted(copy, rng)
        layers.append(copy)
    return layers


def unrelated(seed: int, depth: int = 3, shared: float = 0.0, norms: bool = False) -> list[Layer]:
    rng = np.random.default_rng(seed)
    mean = {part: block[:1] for part, block in layer(rng).items()}
    layers = []
    for _ in range(depth):
        size = rng.uniform(0.3, 3.0, size=(EXPERTS, 1, 1)) if norms else 1.0
        own = layer(rng)
        layers.append({part: (shared * mean[part] + size * own[part]).astype(np.float32) for part in PARTS})
    return layers


def flat(block: np.ndarray) -> np.ndarray:
    return block.reshape(len(block), -1)


def features(weights: Layer) -> np.ndarray:
    """(E, 4, J), as `moescope.profiler.weight_sums.FeatureSums` sums them over blocks."""
    with np.errstate(invalid="ignore", over="ignore"):
        gate, up = (weights[part] @ PROBES.inward[0].numpy() for part in ("gate", "up"))
        down = weights["down"].swapaxes(1, 2) @ PROBES.outward[0].numpy()
        pairs = ((gate, gate), (up, up), (gate, up), (down, down))
        return normalise_features(np.stack([(a * b).sum(axis=1, dtype=float) for a, b in pairs], axis=1))


def judge(layers: list[Layer], alpha: float = 0.01, seed: int = 0, draws: int = 199) -> Verdict:
    seen = [features(weights) for weights in layers]
    pairs = []
    for i, j in combinations(range(len(layers)), 2):
        weights = match_experts(grams(layers[i], layers[j]), draws, (seed, i, j, 0))
        blind = match_experts(feature_grams(seen[i], seen[j]), draws, (seed, i, j, 1))
        pairs.append(LayerPair(i, j, weights, blind))
    return verdict(pairs, alpha)


def same_index(layers: list[Layer], indices: tuple[int, ...] | None = None) -> ExpertSimilarity:
    return similarity(layers, indices or tuple(range(len(layers))))


def plain_cosine(layers: list[Layer], parts: tuple[str, ...] = PARTS, centred: bool = False) -> np.ndarray:
    """(E, L, L) by one product an expert, in float64."""
    stack = np.stack([np.concatenate([flat(weights[p]) for p in parts], axis=1) for weights in layers]).astype(float)
    if centred:
        stack -= stack.mean(axis=1, keepdims=True)
    stack /= np.linalg.norm(stack, axis=2, keepdims=True)
    return np.einsum("aed,bed->eab", stack, stack)


# Same index.


def test_cosines_equal_plain_numpy() -> None:
    layers = unrelated(1, depth=6, shared=1.0, norms=True)
    result = same_index(layers)
    np.testing.assert_allclose(result.cosine, plain_cosine(layers), atol=1e-5)
    np.testing.assert_allclose(result.centred, plain_cosine(layers, centred=True), atol=1e-5)
    for row, part in enumerate(PARTS):
        np.testing.assert_allclose(result.part_cosine[row], plain_cosine(layers, (part,)), atol=1e-5)
        np.testing.assert_allclose(result.part_centred[row], plain_cosine(layers, (part,), True), atol=1e-5)
    one_expert = [{part: weights[part].reshape(1, -1) for part in PARTS} for weights in layers]
    np.testing.assert_allclose(result.together, plain_cosine(one_expert)[0], atol=1e-5)
    for row, part in enumerate(PARTS):
        np.testing.assert_allclose(result.part_together[row], plain_cosine(one_expert, (part,))[0], atol=1e-5)
    whole = np.concatenate([flat(layers[2][part]) for part in PARTS], axis=1)
    np.testing.assert_allclose(result.norms[:, 2], np.linalg.norm(whole, axis=1), rtol=1e-5)
    assert result.unusable == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_an_unusable_expert_is_named_and_spoils_its_own_cells_alone(value: float) -> None:
    layers = unrelated(4)
    expected, centred = plain_cosine(layers), same_index(layers).centred
    for part in PARTS:
        layers[1][part][5] = value
    result = same_index(layers, (3, 4, 6))
    assert result.unusable == (UnusableExpert(4, 5, "non-finite" if value else "zero"),)
    own = np.zeros(expected.shape, dtype=bool)
    own[5, 1, :] = own[5, :, 1] = True
    for found, right in ((result.cosine, expected), (result.centred, centred)):
        np.testing.assert_array_equal(np.isnan(found), own)
        # The layer's mean has an expert less, which moves centred cosines a little.
        tolerance = 1e-5 if right is expected else 0.05
        np.testing.assert_allclose(found[~own], right[~own], atol=tolerance)


def test_a_part_that_is_not_finite_leaves_the_other_parts() -> None:
    layers = unrelated(5)
    layers[0]["up"][2, 0, 0] = np.nan
    result = same_index(layers)
    assert np.isnan(result.part_cosine[:, 2, 0, 1]).tolist() == [False, True, False]
    assert np.isnan(result.part_together[:, 0, 1]).tolist() == [False, True, False]
    assert np.isnan(result.together[0, 1])
    assert np.isnan(result.cosine[2, 0, 1])
    assert result.unusable == (UnusableExpert(0, 2, "non-finite"),)


def test_one_layer_and_one_expert() -> None:
    result = same_index(unrelated(6, depth=1))
    np.testing.assert_allclose(result.cosine, np.ones((EXPERTS, 1, 1)), atol=1e-6)
    assert np.isnan(similarity_by_distance(result.cosine, (0,), (1,))[0].mean)
    single = [layer(np.random.default_rng(seed), experts=1) for seed in range(2)]
    alone = same_index(single)
    assert np.isfinite(alone.cosine).all()
    assert np.isnan(alone.centred).all()  # nothing is left of the only expert


def test_features_of_layers_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="different widths"):
        feature_grams(np.ones((4, 4, 2)), np.ones((5, 4, 2)))


def test_the_same_index_is_the_diagonal_of_all_against_all() -> None:
    layers = unrelated(2, shared=0.5)
    diagonal = np.diagonal(raw_cosine(grams(layers[0], layers[1])))
    np.testing.assert_allclose(diagonal, same_index(layers).cosine[:, 0, 1], atol=1e-9)


def test_cosines_by_distance() -> None:
    layers = unrelated(9, depth=4)
    layers[1]["gate"][3] = np.nan
    indices = (1, 2, 4, 5)
    result = same_index(layers, indices)
    one, two = similarity_by_distance(result.cosine, indices, (1, 2, 1))
    assert (one.delta, two.delta) == (1, 2)
    assert one.cosine.shape == (4, EXPERTS)
    assert np.isnan(one.cosine).all(axis=1).tolist() == [False, True, False, True]
    np.testing.assert_array_equal(two.cosine[1], result.cosine[:, 1, 2])
    assert np.flatnonzero(np.isnan(two.cosine[1])).tolist() == [3]
    values = one.values()
    assert values.shape == (2 * EXPERTS - 1,)
    assert (one.mean, one.median, one.std) == pytest.approx((values.mean(), np.median(values), values.std()))
    assert (one.num_pairs, two.num_pairs) == (2, 1)
    with pytest.raises(ValueError, match="at least 1"):
        similarity_by_distance(result.cosine, indices, (0,))


# All against all.


def test_centring_equals_projecting_the_mean_out() -> None:
    layers = unrelated(10, shared=1.0, norms=True)
    left_out = 4
    layers[0]["down"][left_out, 0, 0] = np.inf
    sides = []
    for weights in layers[:2]:
        parts = [flat(weights[part]).astype(float) for part in PARTS]
        usable = np.isfinite(parts[2]).all(axis=1)
        table = np.concatenate([block[usable] / np.linalg.norm(block[usable], axis=1)[:, None] for block in parts], 1)
        mean = table.mean(axis=0)
        sides.append(table - np.outer(table @ mean, mean) / (mean @ mean))
    pair = centre(grams(layers[0], layers[1]))
    assert pair.rows.tolist() == [expert for expert in range(EXPERTS) if expert != left_out]
    assert pair.columns.tolist() == list(range(EXPERTS))
    np.testing.assert_allclose(pair.left, sides[0] @ sides[0].T, atol=1e-5)
    np.testing.assert_allclose(pair.between, sides[0] @ sides[1].T, atol=1e-5)
    lengths = np.outer(*(np.linalg.norm(side, axis=1) for side in sides))
    np.testing.assert_allclose(pair.cosine, sides[0] @ sides[1].T / lengths, atol=1e-5)


def test_moments_of_a_permuted_diagonal_are_exact() -> None:
    table = np.random.default_rng(11).normal(size=(5, 5))
    means = [table[np.arange(5), list(order)].mean() for order in permutations(range(5))]
    assert permuted_diagonal(table) == pytest.approx((np.mean(means), np.std(means)))


def test_experts_of_one_origin_are_alike_within_their_layer() -> None:
    assert within_cosine(within(unrelated(12, depth=1)[0])) == pytest.approx(0.0, abs=0.02)
    assert within_cosine(within(unrelated(12, depth=1, shared=3.0)[0])) == pytest.approx(0.9, abs=0.02)
    assert np.isnan(within_cosine(within(layer(np.random.default_rng(0), experts=1))))


def test_a_permutation_is_found() -> None:
    rng = np.random.default_rng(13)
    first, second = unrelated(13)[:2]
    order = rng.permutation(EXPERTS)
    second = mixed({part: first[part][order] for part in PARTS}, second, 0.3)
    result = match_experts(grams(first, second))
    assert order[result.partner].tolist() == list(range(EXPERTS))
    assert result.partner_cosine == pytest.approx(0.3, abs=0.1)
    assert (result.identity, result.measured) == ((order == np.arange(EXPERTS)).sum(), EXPERTS)


def test_a_non_finite_expert_leaves_the_match() -> None:
    layers = stacked("experts permuted", 0.9, 2, 14)
    layers[0]["gate"][6, 1, 1] = np.nan
    weights = match_experts(grams(layers[0], layers[1]))
    blind = match_experts(feature_grams(*(features(weights) for weights in layers)))
    for match in (weights, blind):
        assert match.measured == EXPERTS - 1
        assert np.flatnonzero(match.partner < 0).tolist() == [6]
        assert np.isnan(match.partner_cosine).tolist() == [expert == 6 for expert in range(EXPERTS)]
        assert np.flatnonzero(np.isnan(match.cosine)).tolist() == [6]
    assert verdict([LayerPair(0, 1, weights, blind)]).kind == "experts permuted"


# Features.


def test_features_are_blind_to_the_order_of_neurons_and_see_their_pairing() -> None:
    rng = np.random.default_rng(15)
    weights = layer(rng)
    plain, moved = features(weights), features(neurons_permuted(weights, rng))
    np.testing.assert_allclose(moved, plain, atol=1e-5)
    torn = {**weights, "up": weights["up"][:, ::-1]}
    apart = features(torn)
    np.testing.assert_allclose(apart[:, [0, 1, 3]], plain[:, [0, 1, 3]], atol=1e-5)
    assert np.abs(apart[:, 2] - plain[:, 2]).mean() > 0.1


def test_features_forget_the_size_of_a_part_and_leave_out_unusable_experts() -> None:
    weights = layer(np.random.default_rng(16))
    plain = features(weights)
    np.testing.assert_allclose(features({**weights, "up": 7 * weights["up"]}), plain, rtol=1e-5, atol=1e-5)
    assert np.sqrt((plain[:, [0, 1, 3]] ** 2).mean()) == pytest.approx(1.0, abs=0.2)
    weights["up"][3] = 0.0
    weights["down"][5, 0, 0] = np.inf
    assert np.flatnonzero(np.isnan(features(weights)).all(axis=(1, 2))).tolist() == [3, 5]
    assert np.flatnonzero(np.isnan(features(weights)).any(axis=(1, 2))).tolist() == [3, 5]


def test_probes_cover_the_width_segment_by_segment() -> None:
    for hidden, segments in ((1, 1), (127, 1), (128, 2), (300, 4), (2050, 32), (8000, 64)):
        probes = draw_probes(hidden)
        assert probes.inward.shape == probes.outward.shape == (segments, -(-hidden // segments), 256 // segments)
        ends = [probes.segment_of(coordinate) for coordinate in range(hidden)]
        assert [segment for segment, _ in ends] == sorted(segment for segment, _ in ends)
        assert ends[-1] == (segments - 1, hidden)
    with pytest.raises(ValueError, match="probes"):
        draw_probes(0)


# Verdicts.


@pytest.mark.parametrize("history", ["same index", "experts permuted", "neurons permuted", "both"])
@pytest.mark.parametrize("cosine", [1.0, 0.9, 0.5])
def test_a_copy_is_told_by_its_history(history: str, cosine: float) -> None:
    # Two copies of 0.5 are 0.25 to each other, and their features 0.06: too faint to match.
    depth = 2 if history == "both" and cosine == 0.5 else 6
    pairs = depth * (depth - 1) // 2
    result = judge(stacked(history, cosine, depth, seed=17))
    assert (result.kind, result.related, result.tests) == (history, pairs, 4 * pairs)
    between_copies = cosine**2
    for pair in result.pairs:
        assert pair.kind == history
        assert pair.cosine > pair.level
        assert pair.p_value <= 0.01
        if history in ("same index", "experts permuted"):
            expected = cosine if pair.first == 0 else between_copies
            assert pair.cosine == pytest.approx(expected, abs=0.06)
    assert str(result).startswith(f"{history}: {pairs} of {pairs} layer pairs")


@pytest.mark.parametrize("history", ["same index", "experts permuted"])
def test_a_faint_copy_is_told_where_weights_are_compared(history: str) -> None:
    pair = judge(stacked(history, 0.1, 2, seed=18)).pairs[0]
    assert pair.kind == history
    assert pair.cosine == pytest.approx(0.1, abs=0.03)


def test_a_copy_under_a_shared_mean_and_other_norms_is_told() -> None:
    layers = unrelated(19, depth=2, shared=1.0, norms=True)
    rng = np.random.default_rng(19)
    for history, copy in (
        ("same index", layers[0]),
        ("experts permuted", experts_permuted(layers[0], rng)),
        ("neurons permuted", neurons_permuted(layers[0], rng)),
        ("both", neurons_permuted(experts_permuted(layers[0], rng), rng)),
    ):
        assert judge([layers[0], mixed(copy, layers[1], 0.95)]).kind == history


def test_one_pair_among_unrelated_ones_is_named() -> None:
    layers = unrelated(20, depth=4)
    layers[3] = mixed(layers[1], layers[3], 0.5)
    result = judge(layers)
    assert [(pair.first, pair.second) for pair in result.pairs if pair.kind == "same index"] == [(1, 3)]
    assert (result.kind, result.related) == ("same index", 1)
    assert str(result.pairs[4]).startswith("layers 1 and 3: same index (mean cosine 0.")


def test_false_alarms_keep_to_alpha() -> None:
    """200 unrelated models at alpha 0.01: plain, with a mean that all layers share, and with norms from 0.3 to 3."""
    alarms = 0
    for seed in range(200):
        shared, norms = ((0.0, False), (1.0, False), (0.0, True), (1.0, True))[seed % 4]
        alarms += judge(unrelated(seed, 2, shared, norms), seed=seed).related > 0
    assert alarms <= 2


def test_the_same_seed_gives_the_same() -> None:
    found = grams(*unrelated(21, depth=2))
    first, second, other = (match_experts(found, 20, seed).best_match for seed in (1, 1, 2))
    assert first is not None
    assert second is not None
    assert other is not None
    np.testing.assert_array_equal(first.draws, second.draws)
    assert not np.array_equal(first.draws, other.draws)
    assert 0 < first.p_value <= 1


def test_few_experts_have_few_orders() -> None:
    weights = layer(np.random.default_rng(23), experts=4)
    match = match_experts(grams(weights, weights), draws=999)
    assert match.same_index is not None
    assert match.same_index.value == pytest.approx(1.0)
    assert match.same_index.p_value == pytest.approx(1 / 24, abs=0.02)  # one of 4! orders is this one
    assert verdict([LayerPair(0, 1, match)]).kind == "none"


def test_what_cannot_be_measured() -> None:
    few = [layer(np.random.default_rng(seed), experts=2) for seed in range(2)]
    match = match_experts(grams(*few))
    assert (match.same_index, match.best_match) == (None, None)
    result = verdict([LayerPair(0, 1, match)])
    assert (result.kind, result.pairs[0].kind, result.tests) == ("not measurable", "not measurable", 0)
    assert str(result.pairs[0]) == "layers 0 and 1: not measurable"
    assert verdict([]).kind == "not measurable"
    zero = {part: np.zeros_like(block) for part, block in few[0].items()}
    assert match_experts(grams(zero, few[1])).measured == 0
    twins = {part: np.repeat(block[:1], 2, axis=0) for part, block in few[0].items()}
    assert match_experts(grams(twins, few[1])).measured == 0


def test_what_a_verdict_refuses() -> None:
    found = grams(*unrelated(22, depth=2))

    def drawn(count: int) -> ExpertMatch:
        return match_experts(found, count)

    with pytest.raises(ValueError, match="at least 99 draws, got 98"):
        verdict([LayerPair(0, 1, drawn(98))])
    assert verdict([LayerPair(0, 1, drawn(99))]).kind == "none"
    with pytest.raises(ValueError, match="same number of draws"):
        verdict([LayerPair(0, 1, drawn(99)), LayerPair(0, 2, drawn(120))])
    with pytest.raises(ValueError, match="alpha"):
        verdict([], alpha=0.0)
    with pytest.raises(ValueError, match="at least 2 draws"):
        drawn(1)
