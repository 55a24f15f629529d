"""Tokens choose sets of k experts: entropy of a choice, and what chance gives where sets are dealt at random.

An expert "drawn from a token" is one of its k with equal probability. Where T tokens fall into groups at random, the
counts c of the groups have the moments of sampling without replacement: with π an expert's share of tokens, a group of
n tokens has Var(c) = n (T - n) / (T - 1) · π (1 - π). All chance levels here are sums of these, so they hold for sets
as they are, k = 1 giving the familiar ones (G. Miller, "Note on the bias of information estimates", 1955).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.stats.layout import padding_mask

LN2 = float(np.log(2))


def choice_shares(counts: NDArray[np.int64], experts: Sequence[int]) -> NDArray[np.float64]:
    """Share of the selections of each expert.

    Args:
        counts: (…, L, E) int64, selections.
        experts: (L,) routed experts; columns beyond a layer's number count as 0.

    Returns:
        (…, L, E) float64, each row sums to 1; NaN where there are no selections.
    """
    inside = np.where(padding_mask(experts, counts.shape[-1]), 0, counts)
    total = inside.sum(axis=-1, keepdims=True)
    shares: NDArray[np.float64] = inside / np.where(total > 0, total, np.nan)
    return shares


def entropy_bits(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """-Σ p log₂ p over the last axis of shares (…, E); NaN where a share is."""
    logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    entropy: NDArray[np.float64] = -(shares * logs).sum(axis=-1)
    return entropy + 0.0


def freedom(counts: NDArray[np.int64], top_k: Sequence[int]) -> NDArray[np.float64]:
    """Σ (1 - π) over the experts that are used: how many are free to vary, U - k where U are used.

    Args:
        counts: (…, L, E) int64, selections by layer.
        top_k: (L,) experts that a token selects.

    Returns:
        (…, L) float64.
    """
    free: NDArray[np.float64] = np.maximum((counts > 0).sum(axis=-1) - np.asarray(top_k, np.float64), 0.0)
    return free


def divergence_floor(
    counts: NDArray[np.int64], top_k: Sequence[int], one: NDArray[np.int64], two: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Jensen-Shannon divergence that two random groups of tokens have, in bits, to second order.

    JS ≈ Σ (p - q)² / (8 p ln 2), and tokens that are independent have Var(p - q) = p (1 - π) (1/n + 1/n') / k, as
    p = π / k. The floor is (U - k) (1/n + 1/n') / (8 k ln 2). It is
    too high where n k is not several times U. Tokens of one request are not independent, so a distance has to be
    several times the floor to mean anything.

    Args:
        counts: (L, E) int64, selections of both together.
        top_k: (L,) experts that a token selects.
        one: (G,) int64, tokens of the one, n.
        two: (G,) int64, tokens of the other, n'.

    Returns:
        (G, L) float64; NaN where either has no tokens.
    """
    with np.errstate(divide="ignore"):
        spread = 1 / one.astype(np.float64) + 1 / two.astype(np.float64)
    spread = np.where(np.isfinite(spread), spread, np.nan)
    floor: NDArray[np.float64] = spread[:, None] * freedom(counts, top_k) / (8 * LN2 * np.asarray(top_k))
    return floor
