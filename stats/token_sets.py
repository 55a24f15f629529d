"""Tokens choose sets of k experts: entropy of a choice, and what chance gives where sets are dealt at random.

An expert "drawn from a token" is one of its k with equal probability. Where T tokens fall into groups at random, the
counts c of the groups have the moments of sampling without replacement: with π an expert's share of tokens, a group of
n tokens has Var(c) = n (T - n) / (T - 1) · π (1 - π). All chance levels here are sums of these, so they hold for sets
as they are, k = 1 giving the familiar ones (G. Miller, "Note on the bias of information estimates", 1955).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, rel_entr

from moescope.stats.layout import padding_mask

LN2 = float(np.log(2))

EXACT_UP_TO = 1024
"""Tokens of a group up to which its floor is exact: then the second order is within a few percent."""

CHUNK_VALUES = 1 << 20
"""Probabilities held at a time."""


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
    together: NDArray[np.int64], top_k: Sequence[int], one: int, two: int, experts: Sequence[int]
) -> NDArray[np.float64]:
    """Jensen-Shannon divergence, in bits, of two groups of tokens if all their tokens were dealt to them at random.

    The divergence is a sum over experts, and of the C tokens that have an expert, n of T random ones get c with the
    hypergeometric probability, however sets hang together. So its mean is exact: Σ over experts and c of that
    probability times the expert's term. Groups of more than `EXACT_UP_TO` tokens take its second order,
    (U - k) (1/n + 1/n') / (8 k ln 2). Tokens of one request are not independent, so a distance has to be several times
    the floor to mean anything.

    Args:
        together: (L, E) int64, selections of both groups together.
        top_k: (L,) experts that a token selects.
        one: tokens of the one group, n.
        two: tokens of the other, n'.
        experts: (L,) routed experts; columns beyond a layer's number are ignored.

    Returns:
        (L,) float64; NaN where either has no tokens.
    """
    if one < 1 or two < 1:
        return np.full(len(together), np.nan)
    inside = np.where(padding_mask(experts, together.shape[1]), 0, together)
    k = np.asarray(top_k, np.float64)
    if min(one, two) > EXACT_UP_TO:
        floor: NDArray[np.float64] = freedom(inside, top_k) * (1 / one + 1 / two) / (8 * k * LN2)
        return floor
    values, place = np.unique(inside, return_inverse=True)
    terms: NDArray[np.float64] = _expected_terms(values, min(one, two), one + two)[place].reshape(inside.shape)
    total: NDArray[np.float64] = terms.sum(axis=1) / k
    return total


def _expected_terms(chosen: NDArray[np.int64], drawn: int, tokens: int) -> NDArray[np.float64]:
    """(n,) mean term, with k = 1, of experts that `chosen` (n,) of the tokens have, if `drawn` are one group."""
    found = np.zeros(len(chosen))
    got, rest = np.arange(drawn + 1), tokens - drawn
    step = max(1, CHUNK_VALUES // len(got))
    for start in range(0, len(chosen), step):
        own = chosen[start : start + step, None]
        left = own - got
        possible = (left >= 0) & (left <= rest)
        ways = _log_choose(drawn, got) + _log_choose(rest, np.clip(left, 0, rest)) - _log_choose(tokens, own)
        chance = np.exp(np.where(possible, ways, -np.inf))
        p, q = np.broadcast_to(got / drawn, left.shape), np.maximum(left, 0) / rest
        middle = (p + q) / 2
        found[start : start + step] = (chance * (rel_entr(p, middle) + rel_entr(q, middle))).sum(axis=1)
    return found / (2 * LN2)


def _log_choose(many: int, few: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logarithm of the number of ways to choose `few` of `many`."""
    ways: NDArray[np.float64] = gammaln(many + 1) - gammaln(few + 1) - gammaln(many - few + 1)
    return ways
