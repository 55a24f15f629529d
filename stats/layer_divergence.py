"""Jensen-Shannon divergence between layers, and what experts in random order would give."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.stats.layout import padding_mask

CHUNK_VALUES = 1 << 20


def pairwise_divergence(matrix: NDArray[np.float64], experts: Sequence[int]) -> NDArray[np.float64]:
    """Jensen-Shannon divergence of every layer from every other.

    H((p + q)/2) - (H(p) + H(q))/2 with the entropy H in bits (J. Lin, IEEE Trans. Inf. Theory 37, 1991).

    Args:
        matrix: (L, E) float64, one distribution a row, scaled to sum 1 here; padding is ignored.
        experts: (L,) routed experts of each layer.

    Returns:
        (L, L) float64, 0 for equal, 1 for disjoint; NaN for layers of different width or without a distribution.
    """
    width = np.asarray(experts, dtype=np.int64)
    p = _distributions(np.where(padding_mask(experts, matrix.shape[1]), 0.0, matrix))
    entropy = _self_information(p).sum(axis=1)
    mixed = np.stack([_self_information((row + p) / 2).sum(axis=1) for row in p]) if len(p) else np.empty((0, 0))
    same = width[:, None] == width[None, :]
    return np.where(same, np.clip(mixed - (entropy[:, None] + entropy) / 2, 0.0, 1.0), np.nan)


def expected_divergence(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of the divergence of two layers over all orders of the experts of one of them, exactly.

    The divergence is a sum of f(p_e, q_π(e)), so its mean is Σ f / E and its variance Σ d² / (E - 1), d being f less
    its row and column means (W. Hoeffding, "A combinatorial central limit theorem", Ann. Math. Stat. 22, 1951).

    Args:
        matrix: (L, E) float64, one distribution a row, without padding.

    Returns:
        (L, L) means in bits and variances in bits²; the diagonal and what is below it are 0.
    """
    p = _distributions(matrix)
    depth, width = p.shape
    mean, variance = np.zeros((depth, depth)), np.zeros((depth, depth))
    own = _self_information(p)
    step = max(1, CHUNK_VALUES // max(width * width, 1))
    for i in range(depth):
        for start in range(i + 1, depth, step):
            others = slice(start, min(start + step, depth))
            terms = _self_information((p[i][None, :, None] + p[others, None, :]) / 2)
            terms -= (own[i][None, :, None] + own[others, None, :]) / 2
            by_row, by_column = terms.mean(axis=2), terms.mean(axis=1)
            grand = by_row.mean(axis=1)
            mean[i, others] = grand * width
            # Σ d² by sums of squares, so that d itself need not be held
            squares = np.einsum("bef,bef->b", terms, terms)
            squares -= width * (np.square(by_row).sum(axis=1) + np.square(by_column).sum(axis=1))
            variance[i, others] = np.maximum(squares + (width * grand) ** 2, 0.0) / max(width - 1, 1)
    return mean, variance


def _distributions(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows scaled to sum 1; NaN where that cannot be."""
    total = values.sum(axis=1, keepdims=True)
    scaled: NDArray[np.float64] = values / np.where(total > 0, total, np.nan)
    return scaled


def _self_information(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """-p log₂ p, 0 at 0."""
    information: NDArray[np.float64] = -p * np.log2(np.where(p > 0, p, 1.0))
    return information
