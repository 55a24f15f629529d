"""How evenly GPUs would be loaded by the experts placed on them: as they come, greedily, and with replicas."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Experts on GPUs, every GPU holding the same number.

    Attributes:
        gpus: number of GPUs, G.
        physical_to_logical: (L, E + r) int64, expert in each slot; GPU g holds slots g (E + r) / G and on.
        replicas: (L, E) int64, slots that hold the expert, which share its load evenly.
        imbalance: (L,) float64, load of the busiest GPU over the mean of all: 1 is even. A step takes as long as its
            busiest GPU. NaN without load.
    """

    gpus: int
    physical_to_logical: NDArray[np.int64]
    replicas: NDArray[np.int64]
    imbalance: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class PlacementPreview:
    """Three placements of one load.

    Attributes:
        layers: (L,) true model indices.
        contiguous: experts in order, as engines place them by default.
        greedy: experts from the busiest down, each to the least loaded GPU with room.
        replicated: the same after the busiest experts were replicated; equal to `greedy` without redundant experts.
    """

    layers: tuple[int, ...]
    contiguous: Placement
    greedy: Placement
    replicated: Placement


def placement_preview(
    load: NDArray[np.int64] | NDArray[np.float64],
    experts: Sequence[int],
    layers: Sequence[int],
    gpus: int,
    redundant: int = 0,
) -> PlacementPreview:
    """Imbalance over GPUs as it is and as it could be.

    Greedy is Graham's longest processing time first (SIAM J. Appl. Math. 17, 1969), with as many experts on each GPU;
    replication adds one slot at a time to the expert whose replicas are busiest. Together they are the global policy of
    DeepSeek's EPLB (github.com/deepseek-ai/EPLB), without its groups and nodes; ties go to the lower id.

    Args:
        load: (L, E), load of each expert, such as its selections. On the load that a placement was made from it looks
            better than it will be: measure on other prompts with `placement_imbalance`.
        experts: (L,) routed experts, the same number E in each layer.
        layers: (L,) true model indices.
        gpus: GPUs; divides E.
        redundant: slots beyond E, r; `gpus` divides E + r.

    Raises:
        ValueError: if shapes disagree, layers differ in experts, or experts do not divide evenly over the GPUs.
    """
    depth, width = load.shape
    if not depth == len(experts) == len(layers) or any(own != width for own in experts):
        raise ValueError(f"expected {depth} layers of {width} experts each, got {tuple(experts)}")
    if gpus < 1 or redundant < 0:
        raise ValueError(f"there must be a GPU and no fewer than 0 redundant experts, got {gpus} and {redundant}")
    if width % gpus or (width + redundant) % gpus:
        raise ValueError(
            f"{width} experts and {redundant} redundant ones cannot be divided evenly over {gpus} GPUs; "
            f"choose GPUs that divide {width}, and redundant experts in multiples of them"
        )
    in_order = np.tile(np.arange(width), (depth, 1))
    single = np.ones((depth, width), np.int64)
    values = np.asarray(load, dtype=np.float64)
    replicated, replicas = _replicated(values, redundant)

    def placed(slots: NDArray[np.int64], copies: NDArray[np.int64]) -> Placement:
        return Placement(gpus, slots, copies, placement_imbalance(values, slots, gpus))

    return PlacementPreview(
        layers=tuple(int(layer) for layer in layers),
        contiguous=placed(in_order, single),
        greedy=placed(_packed(values, in_order, single, gpus), single),
        replicated=placed(_packed(values, replicated, replicas, gpus), replicas),
    )


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutPlacement:
    """What placements made from some prompts give on others.

    Attributes:
        layers: (L,) true model indices.
        gpus: number of GPUs.
        redundant: slots beyond the number of experts, in the last placement.
        contiguous: (L,) float64, load of the busiest GPU over the mean with experts in order.
        greedy: (L,) float64, the same with experts placed by load.
        replicated: (L,) float64, the same after the busiest experts were replicated.
    """

    layers: tuple[int, ...]
    gpus: int
    redundant: int
    contiguous: NDArray[np.float64]
    greedy: NDArray[np.float64]
    replicated: NDArray[np.float64]


def held_out_placement(
    split_counts: NDArray[np.int64], experts: Sequence[int], layers: Sequence[int], gpus: int, redundant: int
) -> HeldOutPlacement:
    """Place experts by the load of every second split that holds selections, and measure on the others.

    Args:
        split_counts: (S, L, E) int64, selections by split of the prompts.
        experts: (L,) routed experts, the same number E in each layer.
        layers: (L,) true model indices.
        gpus: GPUs; divides E.
        redundant: slots beyond E; `gpus` divides E + redundant.

    Returns:
        NaN in layers without load in either half, so everywhere with fewer than two splits.

    Raises:
        ValueError: as `placement_preview`.
    """
    used = split_counts[split_counts.any(axis=(1, 2))]
    preview = placement_preview(used[::2].sum(axis=0), experts, layers, gpus, redundant)
    other = used[1::2].sum(axis=0)
    return HeldOutPlacement(
        layers=preview.layers,
        gpus=gpus,
        redundant=redundant,
        contiguous=placement_imbalance(other, preview.contiguous.physical_to_logical, gpus),
        greedy=placement_imbalance(other, preview.greedy.physical_to_logical, gpus),
        replicated=placement_imbalance(other, preview.replicated.physical_to_logical, gpus),
    )


def placement_imbalance(
    load: NDArray[np.int64] | NDArray[np.float64], physical_to_logical: NDArray[np.int64], gpus: int
) -> NDArray[np.float64]:
    """Load of the busiest GPU over the mean, under a placement.

    Args:
        load: (L, E), load of each expert; replicas share it evenly.
        physical_to_logical: (L, P) expert in each slot; every expert with load has one.
        gpus: GPUs; divides P.

    Returns:
        (L,) float64; NaN in a layer without load.
    """
    depth, slots = physical_to_logical.shape
    replicas = np.zeros(load.shape, np.int64)
    np.add.at(replicas, (np.arange(depth)[:, None], physical_to_logical), 1)
    each = np.take_along_axis(load / np.maximum(replicas, 1), physical_to_logical, axis=1)
    by_gpu = each.reshape(depth, gpus, slots // gpus).sum(axis=2)
    mean = by_gpu.mean(axis=1)
    imbalance: NDArray[np.float64] = by_gpu.max(axis=1) / np.where(mean > 0, mean, np.nan)
    return imbalance


def _replicated(load: NDArray[np.float64], redundant: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(L, E + r) experts in slots, and (L, E) their numbers: each further slot to the expert busiest by replica."""
    depth, width = load.shape
    rows = np.arange(depth)
    slots = np.tile(np.arange(width + redundant), (depth, 1))
    replicas = np.ones((depth, width), np.int64)
    for slot in range(width, width + redundant):
        slots[:, slot] = busiest = np.argmax(load / replicas, axis=1)
        replicas[rows, busiest] += 1
    return slots, replicas


def _packed(
    load: NDArray[np.float64], slots: NDArray[np.int64], replicas: NDArray[np.int64], gpus: int
) -> NDArray[np.int64]:
    """(L, P) the slots' experts dealt to GPUs, busiest first, each to the least loaded GPU that has room."""
    depth, count = slots.shape
    room = count // gpus
    rows = np.arange(depth)
    each = np.take_along_axis(load / replicas, slots, axis=1)
    order = np.argsort(-each, axis=1, kind="stable")
    packed = np.empty_like(slots)
    total, held = np.zeros((depth, gpus)), np.zeros((depth, gpus), np.int64)
    for slot in order.T:
        gpu = np.argmin(np.where(held < room, total, np.inf), axis=1)
        packed[rows, gpu * room + held[rows, gpu]] = slots[rows, slot]
        total[rows, gpu] += each[rows, slot]
        held[rows, gpu] += 1
    return packed
