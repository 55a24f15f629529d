"""Placements against the policy written out in plain loops, and against what no placement can beat."""

import numpy as np
import pytest
from numpy.typing import NDArray

from moescope.stats.placement import held_out_placement, placement_imbalance, placement_preview


def plain_policy(load: list[float], gpus: int, redundant: int) -> list[list[int]]:
    """Replicate and pack one layer, by the words of EPLB's documentation."""
    slots = list(range(len(load)))
    for _ in range(redundant):
        slots.append(max(range(len(load)), key=lambda expert: load[expert] / slots.count(expert)))
    each = [load[expert] / slots.count(expert) for expert in slots]
    packs: list[list[int]] = [[] for _ in range(gpus)]
    total = [0.0] * gpus
    for slot in sorted(range(len(slots)), key=lambda slot: -each[slot]):
        gpu = min((g for g in range(gpus) if len(packs[g]) < len(slots) // gpus), key=total.__getitem__)
        packs[gpu].append(slots[slot])
        total[gpu] += each[slot]
    return packs


def skewed(depth: int, width: int, seed: int = 0) -> NDArray[np.int64]:
    return np.rint(np.random.default_rng(seed).gamma(0.6, size=(depth, width)) * 1e6).astype(np.int64)


@pytest.mark.parametrize(
    ("width", "gpus", "redundant"), [(16, 4, 0), (16, 4, 8), (24, 8, 8), (8, 8, 0), (6, 2, 12), (2, 1, 0)]
)
def test_the_policy_is_that_of_plain_loops(width: int, gpus: int, redundant: int) -> None:
    load = skewed(5, width)
    found = placement_preview(load, (width,) * 5, range(5), gpus, redundant)
    for row in range(5):
        for placement, extra in ((found.greedy, 0), (found.replicated, redundant)):
            packs = plain_policy(load[row].tolist(), gpus, extra)
            slots = [expert for pack in packs for expert in pack]
            assert placement.physical_to_logical[row].tolist() == slots
            copies = [slots.count(expert) for expert in range(width)]
            assert placement.replicas[row].tolist() == copies
            totals = [sum(load[row, expert] / copies[expert] for expert in pack) for pack in packs]
            assert placement.imbalance[row] == pytest.approx(max(totals) / (sum(totals) / gpus), rel=1e-12)
    in_order = load.reshape(5, gpus, -1).sum(axis=2)
    np.testing.assert_allclose(found.contiguous.imbalance, in_order.max(axis=1) / in_order.mean(axis=1))
    np.testing.assert_array_equal(found.contiguous.physical_to_logical, np.tile(np.arange(width), (5, 1)))


def test_replicas_help_where_one_expert_is_too_busy() -> None:
    load = np.array([[700, 100, 100, 100]])
    found = placement_preview(load, (4,), (3,), 2, 2)
    assert found.contiguous.imbalance[0] == pytest.approx(1.6)
    assert found.greedy.imbalance[0] == pytest.approx(1.6)
    assert found.replicated.replicas[0].tolist() == [3, 1, 1, 1]
    assert found.replicated.imbalance[0] == pytest.approx((2 * 700 / 3 + 100) / 500)


def test_on_other_prompts_a_placement_is_measured_by_their_load() -> None:
    made_of, other = skewed(3, 16, 1), skewed(3, 16, 2)
    found = placement_preview(made_of, (16,) * 3, range(3), 4, 4)
    again = placement_imbalance(made_of, found.replicated.physical_to_logical, 4)
    np.testing.assert_array_equal(again, found.replicated.imbalance)
    assert (placement_imbalance(other, found.replicated.physical_to_logical, 4) > again).all()


def test_layers_without_load_are_undefined() -> None:
    load = skewed(2, 8)
    load[1] = 0
    found = placement_preview(load, (8, 8), (0, 4), 2, 2)
    for placement in (found.contiguous, found.greedy, found.replicated):
        assert np.isnan(placement.imbalance).tolist() == [False, True]
        assert (placement.replicas >= 1).all()


@pytest.mark.parametrize(
    ("experts", "gpus", "redundant"),
    [((8, 8), 3, 0), ((8, 8), 4, 2), ((8, 6), 2, 0), ((8,), 2, 0), ((8, 8), 0, 0), ((8, 8), 2, -2)],
)
def test_what_cannot_be_divided(experts: tuple[int, ...], gpus: int, redundant: int) -> None:
    with pytest.raises(ValueError, match=r"divided|expected|must be"):
        placement_preview(skewed(2, 8), experts, (0, 1), gpus, redundant)


def test_a_placement_is_tried_on_the_splits_that_it_was_not_made_from() -> None:
    rng = np.random.default_rng(3)
    splits = rng.poisson(rng.gamma(0.6, size=(3, 16)) * 50, size=(16, 3, 16))
    splits[5] = 0  # holds nothing and so belongs to neither half
    used = np.delete(splits, 5, axis=0)
    found = held_out_placement(splits, (16,) * 3, (0, 1, 2), 4, 4)
    made = placement_preview(used[::2].sum(axis=0), (16,) * 3, (0, 1, 2), 4, 4)
    other = used[1::2].sum(axis=0)
    for name in ("contiguous", "greedy", "replicated"):
        slots = getattr(made, name).physical_to_logical
        np.testing.assert_array_equal(getattr(found, name), placement_imbalance(other, slots, 4))
    assert (found.greedy != made.greedy.imbalance).all()
    assert np.isnan(held_out_placement(splits[:1], (16,) * 3, (0, 1, 2), 4, 4).greedy).all()
