"""Statistics of tokens: against plain loops, at chance where routing is random, found where it is planted."""

import itertools

import numpy as np
import pytest

from moescope.stats.layer_agreement import excess_by_distance, layer_agreement
from moescope.stats.repetition import Repetition, repetition
from moescope.stats.settling import settling
from moescope.stats.token_groups import token_groups
from moescope.stats.token_sets import divergence_floor, entropy_bits
from moescope.stats.vocabulary import vocabulary_use


def deal(rng: np.random.Generator, tokens: int, experts: int, k: int, skew: float = 0.7) -> np.ndarray:
    """(T, k) sets of unequal popularity."""
    weight = np.arange(1, experts + 1) ** -skew
    noise = rng.gumbel(size=(tokens, experts)) + np.log(weight)
    return np.argsort(-noise, axis=1)[:, :k].astype(np.uint8)


def tally(chosen: np.ndarray, experts: int) -> np.ndarray:
    """(L, E) selections of ids (T, L, K)."""
    return np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in chosen.swapaxes(0, 1)])


def repeated(chosen: np.ndarray, experts: int, held: int = 3) -> Repetition:
    """Repetition of one request, counted with sets."""
    tokens, depth, k = chosen.shape
    sets = [[set(ids.tolist()) for ids in token] for token in chosen]
    pairs = [(sets[t], sets[t - 1]) for t in range(1, tokens)]
    any_two = list(itertools.permutations(range(0, tokens, max(tokens // 60, 1)), 2))
    return repetition(
        tally(chosen, experts),
        tokens,
        split_kept=np.array([[sum(len(a[s] & b[s]) for a, b in pairs) for s in range(depth)]]),
        split_pairs=np.array([len(pairs)]),
        split_random_kept=np.array([[sum(len(sets[i][s] & sets[j][s]) for i, j in any_two) for s in range(depth)]]),
        split_random_pairs=np.array([len(any_two)]),
        lags=(1,),
        lag_kept=np.array([[sum(len(a[s] & b[s]) for a, b in pairs) for s in range(depth)]]),
        lag_pairs=np.array([len(pairs)]),
        held=np.array(
            [
                [
                    sum(len(set.intersection(*(sets[t - i][s] for i in range(m)))) for t in range(m - 1, tokens))
                    for s in range(depth)
                ]
                for m in range(1, held + 1)
            ]
        ),
        held_windows=np.array([max(tokens - m, 0) for m in range(held)]),
        top_k=[k] * depth,
        layers=range(depth),
    )


def runs(chosen: np.ndarray, layer: int) -> list[int]:
    """Length of each run of an expert."""
    found = []
    for expert in np.unique(chosen[:, layer]):
        has = (chosen[:, layer] == expert).any(axis=1)
        found += [len(list(group)) for value, group in itertools.groupby(has.tolist()) if value]
    return found


def test_chance_is_the_mean_over_all_orders_of_the_tokens() -> None:
    chosen = deal(np.random.default_rng(0), 5, 4, 2)[:, None]
    every = [repeated(chosen[list(order)], 4) for order in itertools.permutations(range(5))]
    np.testing.assert_allclose(every[0].chance, np.mean([found.kept for found in every], axis=0))
    np.testing.assert_allclose(every[0].held_chance, np.mean([found.held for found in every], axis=0))
    np.testing.assert_allclose(every[0].within, every[0].chance)  # all pairs of the one request


def test_sticky_routing_is_above_chance_and_random_routing_is_at_it() -> None:
    rng = np.random.default_rng(1)
    chosen = deal(rng, 3000, 16, 2)[:, None].repeat(2, axis=1)
    for t in range(1, len(chosen)):
        if rng.random() < 0.6:
            chosen[t, 1] = chosen[t - 1, 1]
    found = repeated(chosen, 16)
    chance = found.chance
    assert abs(found.kept[0] - chance[0]) < 0.02
    assert abs(found.kept[1] - (0.6 + 0.4 * chance[1])) < 0.03
    assert abs(found.held[2, 0] - found.held_chance[2, 0]) < 0.02
    assert found.held[2, 1] > 0.36
    for layer in range(2):
        assert np.isclose(found.run[layer], np.mean(runs(chosen, layer)))
    assert abs(found.run[0] - found.run_chance[0]) < 0.05
    assert found.run[1] > 2 * found.run_chance[1]
    assert abs(found.within[1] - chance[1]) < 0.03  # in random order nothing sticks


def of_splits(kept: np.ndarray, others: np.ndarray, pairs: np.ndarray, counts: np.ndarray) -> Repetition:
    none = np.zeros((1, 1), int)
    return repetition(
        counts[None],
        int(pairs.sum()) + len(pairs),
        split_kept=kept[:, None],
        split_pairs=pairs,
        split_random_kept=others[:, None],
        split_random_pairs=pairs,
        lags=(1,),
        lag_kept=none,
        lag_pairs=none[0],
        held=none,
        held_windows=none[0],
        top_k=[1],
        layers=[0],
    )


def test_intervals_hold_what_other_requests_would_give() -> None:
    """Requests have shares of their own, far apart: tokens alone would make the interval too short."""
    rng = np.random.default_rng(24)
    pairs, holds, short = np.full(16, 5000), 0, 0
    for _ in range(200):
        own = rng.beta(2, 2, 16)
        found = of_splits(rng.binomial(pairs, own), rng.binomial(pairs, own), pairs, np.array([40008, 40008]))
        holds += bool(found.kept_interval[0] < 0.5 < found.kept_interval[1])
        short += bool(found.order_interval[0] < 0 < found.order_interval[1])
        np.testing.assert_allclose(
            found.request_interval, found.kept_interval - found.order_interval.mean() - 0.5, atol=0.01
        )
    assert 0.9 < holds / 200 < 0.99
    assert 0.9 < short / 200 < 0.99
    few = of_splits(pairs[:2] // 2, pairs[:2] // 2, pairs[:2], np.array([5001, 5001]))
    assert np.isnan([few.kept_interval, few.order_interval, few.request_interval]).all()
    assert few.kept[0] == 0.5


def test_one_token_has_nothing_to_repeat() -> None:
    found = repeated(np.zeros((1, 1, 1), np.uint8), 2)
    for values in (found.kept, found.chance, found.within, found.at_lag, found.held[1:], found.held_chance[1:]):
        assert np.isnan(values).all()
    assert (found.run, found.run_chance) == (1.0, 1.0)


# ------------------------------------------------------------------------------------------------------ layers


def reference(chosen: np.ndarray, i: int, j: int, experts: int) -> tuple[float, float]:
    """R² by least squares on indicators, and information from a joint table counted in a loop."""
    tokens, _, k = chosen.shape
    x, y = (np.zeros((tokens, experts)) for _ in "xy")
    joint = np.zeros((experts, experts))
    for t in range(tokens):
        x[t, chosen[t, i]] = y[t, chosen[t, j]] = 1
        for a, b in itertools.product(chosen[t, i], chosen[t, j]):
            joint[a, b] += 1 / (tokens * k * k)
    x, y = x - x.mean(0), y - y.mean(0)
    rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    independent = np.outer(joint.sum(1), joint.sum(0))
    where = joint > 0
    return 1 - (rest**2).sum() / (y**2).sum(), float((joint * np.log2(joint / independent, where=where))[where].sum())


def test_agreement_is_least_squares_and_information() -> None:
    rng = np.random.default_rng(2)
    chosen = np.stack([deal(rng, 400, 7, 2) for _ in range(3)], axis=1)
    chosen[:200, 1] = chosen[:200, 0]
    found = layer_agreement(chosen, [2] * 3, [7] * 3, [0, 2, 5])
    for i, j in itertools.permutations(range(3), 2):
        explained, information = reference(chosen, i, j, 7)
        chance = found.explained_chance[i, j]
        assert np.isclose(chance, 6 / 399)
        assert np.isclose(found.explained[i, j] * (1 - chance) + chance, explained)
        assert np.isclose(found.information[i, j] + found.bias[i, j], information)
        same = np.mean([len(set(t[i]) & set(t[j])) / 2 for t in chosen.tolist()])
        assert np.isclose(found.overlap[i, j], same)
        others = [len(set(a[i]) & set(b[j])) / 2 for a in chosen[:100].tolist() for b in chosen[100:200].tolist()]
        assert abs(found.overlap_chance[i, j] - np.mean(others)) < 0.06
    assert np.isnan(np.diag(found.explained)).all()


def test_random_pairing_has_the_chance_that_is_taken_off() -> None:
    rng = np.random.default_rng(3)
    one, two = deal(rng, 500, 8, 3), deal(rng, 500, 8, 3)
    draws = [
        layer_agreement(np.stack([one, two[rng.permutation(500)]], axis=1), [3, 3], [8, 8], [0, 1]) for _ in range(150)
    ]
    explained = [found.explained[0, 1] for found in draws]
    information = [found.information[0, 1] for found in draws]
    assert abs(np.mean(explained)) < 4 * np.std(explained) / np.sqrt(150)
    assert abs(np.mean(information)) < 0.1 * draws[0].bias[0, 1]


@pytest.mark.parametrize(("experts", "k", "skew"), [(64, 1, 1.5), (32, 4, 0.7)])
def test_sparse_pairs_of_experts_tell_nothing_by_chance(experts: int, k: int, skew: float) -> None:
    rng = np.random.default_rng(21)
    informed, bias = [], []
    for _ in range(10):
        chosen = np.stack([deal(rng, 300, experts, k, skew) for _ in range(2)], axis=1)
        found = layer_agreement(chosen, [k, k], [experts] * 2, [0, 1])
        informed.append(found.information[0, 1])
        bias.append(found.bias[0, 1])
    assert abs(np.mean(informed)) < 0.1 * np.mean(bias)


def test_a_layer_that_copies_another_is_found_whatever_its_experts_are_called() -> None:
    rng = np.random.default_rng(4)
    one = deal(rng, 2000, 12, 3)
    chosen = np.stack([one, one, rng.permutation(12).astype(np.uint8)[one], deal(rng, 2000, 12, 3)], axis=1)
    found = layer_agreement(chosen, [3] * 4, [12] * 4, range(4))
    np.testing.assert_allclose(found.explained[:3, :3][~np.eye(3, dtype=bool)], 1)
    assert found.overlap[0, 1] == 1
    assert found.overlap[0, 2] < 0.9
    np.testing.assert_allclose(found.information[0, 1], found.information[0, 2], atol=1e-9)
    assert np.nanmax(np.abs(found.explained[3])) < 0.01
    assert abs(found.overlap[0, 3] - found.overlap_chance[0, 3]) < 0.02


def test_the_same_index_is_sure_over_requests_not_tokens() -> None:
    """Each request has a favourite in each layer, drawn apart: many tokens agree or not at all, by luck."""
    rng = np.random.default_rng(25)
    splits = np.repeat(np.arange(12, dtype=np.uint8), 40)
    holds = 0
    for _ in range(60):
        chosen = rng.integers(0, 4, (12, 2, 1)).astype(np.uint8)[splits]
        found = layer_agreement(chosen, [1, 1], [4, 4], [0, 1], splits=splits)
        beyond, reach = excess_by_distance(found, [1])
        holds += bool(abs(beyond[0]) < reach[0])
    assert holds >= 51
    copied = chosen.repeat(2, axis=1)[:, :2]
    beyond, reach = excess_by_distance(layer_agreement(copied, [1, 1], [4, 4], [0, 1], splits=splits), [1, 2])
    assert beyond[0] > 2 * reach[0]
    assert np.isnan(beyond[1])
    without = layer_agreement(chosen, [1, 1], [4, 4], [0, 1], splits=splits).overlap_without[3]
    rest = layer_agreement(chosen[splits != 3], [1, 1], [4, 4], [0, 1])
    np.testing.assert_allclose(without[0, 1], (rest.overlap - rest.overlap_chance)[0, 1])
    one = excess_by_distance(layer_agreement(chosen, [1, 1], [4, 4], [0, 1]), [1])
    assert np.isnan(one[1]).all()


def test_information_reaches_its_ceiling_where_sets_do_not_overlap() -> None:
    group = np.random.default_rng(5).integers(0, 4, 4000)
    sets = (group[:, None] * 2 + np.arange(2)).astype(np.uint8)
    found = layer_agreement(np.stack([sets, 7 - sets], axis=1), [2, 2], [8, 8], [0, 1])
    assert abs(found.ceiling[0, 1] - 2) < 0.01
    np.testing.assert_allclose(found.informed[0, 1], 1)


def test_agreement_without_spread_or_tokens_is_nan() -> None:
    for tokens, experts, k in ((0, 4, 2), (1, 4, 2), (50, 2, 2), (2, 8, 2)):
        chosen = deal(np.random.default_rng(6), max(tokens, 1), experts, k)[:tokens, None].repeat(2, axis=1)
        assert np.isnan(layer_agreement(chosen, [k, k], [experts] * 2, [0, 1]).explained).all()
    wide = np.stack([deal(np.random.default_rng(7), 60, 4, 1), deal(np.random.default_rng(8), 60, 6, 1)], axis=1)
    found = layer_agreement(wide, [1, 1], [4, 6], [0, 1])
    assert np.isfinite(found.explained[0, 1])
    assert np.isnan(found.overlap[0, 1])
    with pytest.raises(ValueError, match="got ids of shape"):
        layer_agreement(wide, [1], [4], [0])


# ------------------------------------------------------------------------------------------------------ vocabulary


def by_id(chosen: np.ndarray, ids: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, occurrences = np.unique(ids, return_counts=True)
    return np.stack([tally(chosen[ids == token], experts) for token in tokens]), occurrences, tokens


def test_ids_that_decide_are_found_and_ids_that_do_not_are_at_chance() -> None:
    rng = np.random.default_rng(9)
    ids = rng.integers(0, 30, 3000)
    decided = deal(rng, 30, 10, 2)[ids]
    chosen = np.stack([decided, deal(rng, 3000, 10, 2)], axis=1)
    counts, occurrences, tokens = by_id(chosen, ids, 10)
    found = vocabulary_use(counts, occurrences, tokens, tally(chosen, 10), 3000, [2, 2], [10, 10], [0, 1])
    assert abs(found.decided[0] - 1) < 1e-3
    assert abs(found.decided[1]) < 0.01
    np.testing.assert_allclose(found.effective[:, 0], 2)
    assert abs(np.mean(found.effective[:, 1]) - found.effective_all[1]) < 0.25
    np.testing.assert_allclose((found.specificity.T * occurrences).sum(1) / 3000, found.information, atol=1e-3)
    assert found.covered == 1
    assert all(one.layer == 0 for one in found.specific[:8])
    best = found.specific[0]
    wanted = {int(token) for token in tokens if (decided[ids == token][0] == best.expert).any()}
    assert {token for token, share in best.tokens if share > 0} <= wanted
    assert np.isclose(best.tokens[0][1], (ids == best.tokens[0][0]).sum() / best.from_frequent)


def test_the_bias_of_ids_is_that_of_random_ids() -> None:
    rng = np.random.default_rng(10)
    chosen, ids = deal(rng, 1500, 9, 3)[:, None], np.repeat(np.arange(15), 100)
    biased = []
    for _ in range(100):
        counts, occurrences, tokens = by_id(chosen[rng.permutation(1500)], ids, 9)
        found = vocabulary_use(counts, occurrences, tokens, tally(chosen, 9), 1500, [3], [9], [0])
        biased.append(found.information[0])
    assert abs(np.mean(biased)) < 0.05 * found.bias[0]


def test_many_experts_and_rare_ids_tell_nothing_by_chance() -> None:
    rng = np.random.default_rng(20)
    popular = np.arange(1, 101) ** -1.0
    found = []
    for _ in range(8):
        ids = rng.choice(100, 600, p=popular / popular.sum())
        chosen = np.stack([deal(rng, 600, 64, 4), deal(rng, 600, 64, 4, 1.5)], axis=1)
        counts, occurrences, tokens = by_id(chosen, ids, 64)
        found.append(
            vocabulary_use(counts, occurrences, tokens, tally(chosen, 64), 600, [4, 4], [64, 64], [0, 1], most=500)
        )
    assert np.abs(np.mean([use.decided for use in found], axis=0)).max() < 0.015
    rare = [use.specificity[use.occurrences < 5].mean(axis=0) for use in found]
    assert np.abs(np.mean(rare, axis=0)).max() < 0.05 * found[0].specificity_floor[-1].min()
    every = [one for use in found for one in use.specific]
    assert len(every) > 20
    assert abs(np.mean([one.bits for one in every])) < 0.05 * np.mean([one.bias for one in every])
    assert sum(any(one.clear for one in use.specific) for use in found) <= 2


def test_a_single_id_tells_nothing() -> None:
    chosen = deal(np.random.default_rng(11), 5, 4, 2)[:, None]
    counts, occurrences, tokens = by_id(chosen, np.zeros(5, int), 4)
    found = vocabulary_use(counts, occurrences, tokens, tally(chosen, 4), 5, [2], [4], [0])
    assert np.isnan(found.information).all()
    assert found.specific == ()


# ------------------------------------------------------------------------------------------- settling and groups


def test_a_random_order_settles_along_its_floor() -> None:
    rng = np.random.default_rng(12)
    chosen = np.stack([deal(rng, 4000, 20, 4), deal(rng, 4000, 20, 4)], axis=1)
    tokens = np.array([200, 0, 800, 3000])
    parts = np.stack([tally(part, 20) for part in np.split(chosen, tokens.cumsum()[:-1])])
    found = settling(parts, tokens, np.array([2, 0, 8, 30]), [4, 4], [20, 20], [3, 4])
    assert found.tokens.tolist() == [200, 1000, 4000]
    assert found.requests.tolist() == [2, 10, 40]
    assert (found.distance[-1] == 0).all()
    assert (found.floor[-1] == 0).all()
    np.testing.assert_allclose(found.distance[:2].mean(1), found.floor[:2].mean(1), rtol=0.5)
    share = [tally(chosen[:200], 20), tally(chosen, 20)]
    r = [np.corrcoef(part)[0, 1] for part in share]
    assert np.isclose(found.correlation[0], abs(r[0] - r[1]))
    assert found.dead.tolist() == [int((part == 0).sum()) for part in parts.cumsum(0)[[0, 2, 3]]]


def test_few_tokens_of_many_experts_settle_along_their_floor() -> None:
    rng = np.random.default_rng(22)
    chosen = deal(rng, 1000, 64, 1, 1.5)[:, None]
    draws = []
    for _ in range(60):
        parts = np.stack([tally(part, 64) for part in np.split(chosen[rng.permutation(1000)], [10, 100])])
        found = settling(parts, np.array([10, 90, 900]), np.ones(3, int), [1], [64], [0])
        draws.append(found.distance[:, 0])
    np.testing.assert_allclose(np.mean(draws, axis=0), found.floor[:, 0], rtol=0.06)


def test_the_floor_is_what_random_groups_have() -> None:
    rng = np.random.default_rng(13)
    chosen = deal(rng, 2000, 16, 4)[:, None]
    tokens, starts = np.array([400, 600, 1000]), np.array([0, 400, 1000])
    draws = []
    for _ in range(100):
        parts = np.stack([tally(part, 16) for part in np.split(chosen[rng.permutation(2000)], starts[1:])])
        found = token_groups(parts, tokens, starts, [4], [16], [0])
        draws.append(np.stack([found.from_rest[:, 0], np.nan_to_num(found.from_before[:, 0])]))
    mean = np.mean(draws, axis=0)
    np.testing.assert_allclose(mean[0], found.rest_floor[:, 0], rtol=0.1)
    np.testing.assert_allclose(mean[1, 1:], found.before_floor[1:, 0], rtol=0.1)
    assert np.isnan(found.from_before[0]).all()
    assert np.isnan(found.before_floor[0]).all()


def test_the_floor_is_the_mean_over_all_ways_to_deal_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = deal(np.random.default_rng(15), 7, 5, 2)[:, None]
    together = tally(chosen, 5)
    found = []
    for group in itertools.combinations(range(7), 3):
        own = tally(chosen[list(group)], 5)
        found.append(token_groups(np.stack([own, together - own]), np.array([3, 4]), np.arange(2), [2], [5], [0]))
    exact = divergence_floor(together, [2], 3, 4, [5])
    np.testing.assert_allclose(exact, np.mean([groups.from_rest[0] for groups in found], axis=0))
    np.testing.assert_allclose(exact, divergence_floor(together, [2], 4, 3, [5]))
    many = tally(deal(np.random.default_rng(16), 4000, 20, 4)[:, None], 20)
    exact = divergence_floor(many, [4], 1000, 3000, [20])
    monkeypatch.setattr("moescope.stats.token_sets.EXACT_UP_TO", 10)
    np.testing.assert_allclose(divergence_floor(many, [4], 1000, 3000, [20]), exact, rtol=0.02)


@pytest.mark.parametrize("copies", [1, 6])
def test_random_groups_are_seldom_clear(copies: int) -> None:
    rng = np.random.default_rng(23)
    alarms = 0
    for _ in range(60):
        chosen = deal(rng, 1200, 8, 2)[:, None].repeat(copies, axis=1)
        parts = np.stack([tally(part, 8) for part in np.split(chosen, 20)])
        found = token_groups(parts, np.full(20, 60), np.arange(20) * 60, [2] * copies, [8] * copies, range(copies))
        alarms += bool((found.from_rest.mean(axis=1) / found.rest_floor.mean(axis=1)).max() > found.clear)
    assert alarms <= 6


def test_a_group_that_is_routed_otherwise_stands_out() -> None:
    rng = np.random.default_rng(14)
    chosen = deal(rng, 900, 16, 2)[:, None]
    chosen[:300] = 15 - chosen[:300]
    found = token_groups(
        np.stack([tally(part, 16) for part in np.split(chosen, 3)]),
        np.full(3, 300),
        np.array([0, 300, 600]),
        [2],
        [16],
        [0],
    )
    ratio = found.from_before[:, 0] / found.before_floor[:, 0]
    assert ratio[1] > max(10, found.clear)
    assert ratio[2] < 3
    p = tally(chosen[:300], 16)[0] / 600
    assert np.isclose(found.entropy[0, 0], -(p[p > 0] * np.log2(p[p > 0])).sum() / 4)


def test_few_and_no_tokens_are_nan_and_not_errors() -> None:
    empty = np.zeros((2, 1, 4), np.int64)
    found = token_groups(empty, np.zeros(2, np.int64), np.arange(2), [1], [4], [0])
    assert np.isnan(found.entropy).all()
    assert np.isnan(found.from_rest).all()
    one = settling(empty[:1] + 1, np.array([4]), np.array([1]), [1], [4], [0])
    assert np.isnan(one.correlation).all()
    assert (one.distance == 0).all()
    assert np.isnan(divergence_floor(empty[0], [1], 0, 3, [4])).all()
    assert np.isnan(entropy_bits(np.array([np.nan, 0.5])))
