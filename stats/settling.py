"""How soon does a profile look like that of the whole run?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.stats.comparison import distances
from moescope.stats.layout import by_layer_rows, check_groups, padding_mask
from moescope.stats.pairwise import pairwise_pearson
from moescope.stats.token_sets import choice_shares, settling_floor


@dataclass(frozen=True, slots=True, eq=False)
class Settling:
    """The profile after the first C parts of a run, against that of the whole.

    Attributes:
        layers: (L,) true model indices.
        tokens: (C,) tokens up to there; the last are all.
        requests: (C,) requests up to there.
        distance: (C, L) Jensen-Shannon divergence of the experts' shares from those of the whole, in bits; 0 at the
            end, by definition.
        floor: (C, L) the same if the tokens so far were a random part of all.
        dead: (C,) experts that were not selected yet, over all layers.
        correlation: (C,) root mean square difference of the correlations between layers from those of the whole; NaN
            where no two layers can be correlated.
    """

    layers: tuple[int, ...]
    tokens: NDArray[np.int64]
    requests: NDArray[np.int64]
    distance: NDArray[np.float64]
    floor: NDArray[np.float64]
    dead: NDArray[np.int64]
    correlation: NDArray[np.float64]


def settling(
    counts: NDArray[np.int64],
    tokens: NDArray[np.int64],
    requests: NDArray[np.int64],
    top_k: Sequence[int],
    experts: Sequence[int],
    layers: Sequence[int],
) -> Settling:
    """Add the parts up and hold each sum against the whole.

    The floor is that of `settling_floor`, 0 at the end.

    Args:
        counts: (C, L, E) int64, selections of each part.
        tokens: (C,) int64, its tokens; parts without any are left out.
        requests: (C,) int64, its requests.
        top_k: (L,) experts that a token selects.
        experts: (L,) routed experts; columns beyond a layer's number are padding.
        layers: (L,) true model indices, ascending.

    Raises:
        ValueError: if shapes disagree or layers do not ascend.
    """
    check_groups(counts, tokens, layers, "parts")
    there = tokens > 0
    sums = counts[there].cumsum(axis=0)
    so_far = tokens[there].cumsum()
    whole = counts.sum(axis=0)
    reference = pairwise_pearson(choice_shares(whole, experts), experts)
    pairs = np.triu_indices(len(layers), k=1)
    every = int(tokens.sum())
    floor = [settling_floor(whole, top_k, drawn, every, experts) for drawn in so_far[:-1].tolist()]
    return Settling(
        layers=tuple(int(layer) for layer in layers),
        tokens=so_far,
        requests=requests[there].cumsum(),
        distance=by_layer_rows([distances(part, whole, experts).jensen_shannon for part in sums], len(layers)),
        floor=by_layer_rows([*floor, *[np.zeros(len(layers))] * min(len(so_far), 1)], len(layers)),
        dead=((sums == 0) & ~padding_mask(experts, counts.shape[2])).sum(axis=(1, 2)),
        correlation=np.array([_difference(part, reference, experts, pairs) for part in sums]),
    )


def _difference(
    part: NDArray[np.int64],
    reference: NDArray[np.float64],
    experts: Sequence[int],
    pairs: tuple[NDArray[np.intp], NDArray[np.intp]],
) -> float:
    """Root mean square difference of the correlations that both have."""
    differences = (pairwise_pearson(choice_shares(part, experts), experts) - reference)[pairs]
    finite = differences[np.isfinite(differences)]
    return float(np.sqrt(np.square(finite).mean())) if finite.size else float("nan")
