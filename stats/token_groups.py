"""Groups of tokens, by position or by time: how each is routed against all the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moescope.stats.comparison import distances
from moescope.stats.layout import by_layer_rows, check_groups
from moescope.stats.token_sets import choice_shares, clear_ratio, divergence_floor, entropy_bits


@dataclass(frozen=True, slots=True, eq=False)
class TokenGroups:
    """G groups of tokens in order.

    Attributes:
        layers: (L,) true model indices.
        starts: (G,) first position of each.
        tokens: (G,) tokens of each.
        entropy: (G, L) -Σ p ln p / ln E of the experts' shares: 1 is even, 0 one expert alone; NaN without tokens or
            with one expert. Few tokens cannot be even.
        from_rest: (G, L) Jensen-Shannon divergence in bits from all other groups.
        rest_floor: (G, L) the same if all tokens were dealt to the groups at random.
        from_before: (G, L) Jensen-Shannon divergence in bits from the group before.
        before_floor: (G, L) the same if the tokens of the two were dealt to them at random.
        clear: times the floor that the mean over layers of no group's distance reaches if tokens are dealt at random,
            19 times out of 20, even if all layers are routed alike; see `clear_ratio`.
    """

    layers: tuple[int, ...]
    starts: NDArray[np.int64]
    tokens: NDArray[np.int64]
    entropy: NDArray[np.float64]
    from_rest: NDArray[np.float64]
    rest_floor: NDArray[np.float64]
    from_before: NDArray[np.float64]
    before_floor: NDArray[np.float64]
    clear: float


def token_groups(
    counts: NDArray[np.int64],
    tokens: NDArray[np.int64],
    starts: NDArray[np.int64],
    top_k: Sequence[int],
    experts: Sequence[int],
    layers: Sequence[int],
) -> TokenGroups:
    """Distances and their floors; see `divergence_floor`.

    Args:
        counts: (G, L, E) int64, selections of each group.
        tokens: (G,) int64, its tokens.
        starts: (G,) int64, its first position.
        top_k: (L,) experts that a token selects.
        experts: (L,) routed experts; columns beyond a layer's number are padding.
        layers: (L,) true model indices, ascending.

    Raises:
        ValueError: if shapes disagree or layers do not ascend.
    """
    check_groups(counts, tokens, layers, "groups")
    whole, every = counts.sum(axis=0), int(tokens.sum())
    used = (whole > 0).sum(axis=1)
    width, sizes = np.asarray(experts, np.float64), tokens.tolist()
    missing = [np.full(len(layers), np.nan)] * min(len(sizes), 1)
    from_before = [distances(own, before, experts).jensen_shannon for before, own in pairwise(counts)]
    before_floor = [
        divergence_floor(counts[group] + counts[group + 1], top_k, sizes[group], sizes[group + 1], experts)
        for group in range(len(sizes) - 1)
    ]
    floors = {size: divergence_floor(whole, top_k, size, every - size, experts) for size in set(sizes)}
    return TokenGroups(
        layers=tuple(int(layer) for layer in layers),
        starts=starts,
        tokens=tokens,
        entropy=entropy_bits(choice_shares(counts, experts)) / np.where(width > 1, np.log2(width), np.nan),
        from_rest=by_layer_rows([distances(own, whole - own, experts).jensen_shannon for own in counts], len(layers)),
        rest_floor=by_layer_rows([floors[size] for size in sizes], len(layers)),
        from_before=by_layer_rows([*missing, *from_before], len(layers)),
        before_floor=by_layer_rows([*missing, *before_floor], len(layers)),
        clear=clear_ratio(max(float(np.min(used / np.asarray(top_k))) - 1, 1.0), len(sizes)),
    )
