"""The sums of a pass over weights, by plain numpy over experts that are all at hand."""

from collections.abc import Mapping, Sequence

import numpy as np

from moescope.stats.expert_grams import PairGrams, pair_grams, without_faults
from moescope.stats.expert_similarity import PARTS, ExpertSimilarity, similarity_from_sums

#: Gate, up and down of all experts of a layer, (E, …) each.
Weights = Mapping[str, np.ndarray]


def same_index(layers: Sequence[Weights], indices: Sequence[int]) -> ExpertSimilarity:
    """The same expert of every two layers; an expert that is zero or not finite has no part in its layer's mean."""
    raw, centred, means, faults = [], [], [], []
    for part in PARTS:
        finite, stack = _finite([layer[part] for layer in layers])
        used = stack.any(axis=2, keepdims=True)
        mean = stack.sum(axis=1, keepdims=True) / np.maximum(used.sum(axis=1, keepdims=True), 1)
        for sums, table in ((raw, stack), (centred, stack - mean), (means, mean)):
            sums.append(np.einsum("len,men->elm", table, table))
        faults.append(~finite.T)
    return similarity_from_sums(*map(np.stack, (raw, centred, [found[0] for found in means], faults)), indices)


def within(layer: Weights) -> np.ndarray:
    """(3, E, E) inner products within a layer, NaN for experts that are not finite."""
    spoilt = np.logical_or.reduce([~np.isfinite(_flat(layer[part])).all(axis=1) for part in PARTS])
    return without_faults(_products(layer, layer), spoilt)


def grams(one: Weights, other: Weights) -> PairGrams:
    """Inner products within and between two layers."""
    return pair_grams(within(one), _products(one, other), within(other))


def _products(one: Weights, other: Weights) -> np.ndarray:
    pairs = [_finite([one[part], other[part]])[1] for part in PARTS]
    return np.stack([left @ right.T for left, right in pairs])


def _finite(blocks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Which experts are finite, (L, E), and all of them in float64, (L, E, n), those that are not as zero."""
    stack = np.stack([_flat(block) for block in blocks]).astype(float)
    finite = np.isfinite(stack).all(axis=2)
    return finite, np.where(finite[:, :, None], stack, 0.0)


def _flat(block: np.ndarray) -> np.ndarray:
    return block.reshape(len(block), -1)
