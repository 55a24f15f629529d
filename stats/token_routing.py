"""How single tokens are routed: how spread a token's weights are, and how unusual its experts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.stats.layout import padding_mask


def weight_shares(weights: NDArray[np.floating], top_k: Sequence[int]) -> NDArray[np.float32]:
    """Routing weights of a token in a layer, divided by their sum.

    Args:
        weights: (T, L, K), not below 0 but for rounding; what is negative, or not finite, counts as 0.
        top_k: (L,) experts of a token in each layer; what lies past them is ignored.

    Returns:
        (T, L, K) float32, summing to 1 over a layer's own k, 0 past it; equal where all weights are 0.
    """
    used = ~padding_mask(top_k, weights.shape[2])
    kept = np.where(used & np.isfinite(weights), np.maximum(weights, 0), 0).astype(np.float32)
    sums = kept.sum(axis=2, keepdims=True)
    equal = (used / np.asarray(top_k)[:, None]).astype(np.float32)
    return np.where(sums > 0, kept / np.where(sums > 0, sums, 1), equal)


def share_entropy(shares: NDArray[np.float32]) -> NDArray[np.float64]:
    """Shannon entropy of a token's shares in a layer.

    Args:
        shares: (T, L, K), summing to 1.

    Returns:
        (T, L) float64, bits: 0 where one expert has all the weight, log2 k where k experts have the same.
    """
    exact = shares.astype(np.float64)
    bits: NDArray[np.float64] = -(exact * np.log2(np.where(exact > 0, exact, 1))).sum(axis=2)
    return bits + 0.0  # no negative zero


def expert_surprisal(
    ids: NDArray[np.unsignedinteger], top_k: Sequence[int], counts: NDArray[np.int64], experts: Sequence[int]
) -> NDArray[np.float64]:
    """How unusual a token's experts are in a layer: the mean of -log2 q over its k experts.

    q is an expert's share of the layer's selections, with half a selection added to each expert (Krichevsky and
    Trofimov, IEEE Trans. Inf. Theory 27, 1981), so that an expert that was never counted is finite.

    Args:
        ids: (T, L, K), expert ids; ignored past a layer's own k.
        top_k: (L,) experts of a token in each layer.
        counts: (L, E), selections of each expert, over the tokens to compare with.
        experts: (L,) experts of each layer.

    Returns:
        (T, L) float64, bits: log2 E where all experts are used alike; less for common experts, more for rare ones.
    """
    own = ~padding_mask(experts, counts.shape[1])
    added = np.where(own, counts + 0.5, 0)
    bits = -np.log2(np.where(own, added, 1) / added.sum(axis=1, keepdims=True))
    used = ~padding_mask(top_k, ids.shape[2])
    taken = np.where(used, bits[np.arange(len(top_k))[:, None], ids], 0)
    mean: NDArray[np.float64] = taken.sum(axis=2) / np.asarray(top_k)
    return mean
