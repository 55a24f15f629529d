"""Tokens choose sets of k experts: entropy of a choice, and what chance gives where sets are dealt at random.

An expert "drawn from a token" is one of its k with equal probability. Where T tokens fall into groups at random, the
counts c of the groups have the moments of sampling without replacement: with π an expert's share of tokens, a group of
n tokens has Var(c) = n (T - n) / (T - 1) · π (1 - π). All chance levels here are sums of these, so they hold for sets
as they are, k = 1 giving the familiar ones (G. Miller, "Note on the bias of information estimates", 1955).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri, gammaln, rel_entr

from moescope.stats.layout import padding_mask

LN2 = float(np.log(2))

EXACT_UP_TO = 1024
"""Tokens of a group up to which its floor is exact: then the second order is within a few percent."""

CHUNK_VALUES = 1 << 20
"""Probabilities held at a time."""

LEVEL = 0.05
"""Chance of a false alarm over all looks."""

KNOTS = 160
"""Numbers of tokens that have an expert for which a mean is computed; between them it is interpolated."""

Shares = NDArray[np.float64]
Term = Callable[[Shares, Shares, Shares], Shares]
"""From the shares of tokens that have an expert, of those drawn, of the others and of all, to the expert's part."""


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


def clear_ratio(free: float, looks: int) -> float:
    """Times its floor that the largest of so many divergences of random groups stays below, 19 times out of 20.

    Near its floor a divergence is spread as χ² over its degrees of freedom; with several looks each has its part of the
    5% (Bonferroni).

    Args:
        free: degrees of freedom of one divergence; fewer are more careful.
        looks: divergences that are looked at.

    Returns:
        1 or more; 1 without any freedom.
    """
    return max(float(chdtri(free, LEVEL / max(looks, 1))) / free, 1.0) if free > 0 else 1.0


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
    if min(one, two) > EXACT_UP_TO:
        return freedom(inside, top_k) * (1 / one + 1 / two) / (8 * np.asarray(top_k, np.float64) * LN2)
    return _mean_divergence(inside, top_k, min(one, two), one + two, _js_of_rest)


def settling_floor(
    whole: NDArray[np.int64], top_k: Sequence[int], drawn: int, tokens: int, experts: Sequence[int]
) -> NDArray[np.float64]:
    """Jensen-Shannon divergence, in bits, of `drawn` random ones of T tokens from all of them.

    As `divergence_floor`; the second order is (U - k) (1/n - 1/T) / (8 k ln 2).

    Args:
        whole: (L, E) int64, selections of all tokens.
        top_k: (L,) experts that a token selects.
        drawn: tokens drawn, n.
        tokens: all tokens, T.
        experts: (L,) routed experts; columns beyond a layer's number are ignored.

    Returns:
        (L,) float64; NaN where none is drawn.
    """
    return _part_of_whole(whole, top_k, drawn, tokens, experts, _js_of_whole, 8.0)


def specificity_floor(
    whole: NDArray[np.int64], top_k: Sequence[int], drawn: int, tokens: int, experts: Sequence[int]
) -> NDArray[np.float64]:
    """Kullback-Leibler divergence, in bits, of `drawn` random ones of T tokens from all of them.

    This is also what entropy of so few tokens misses of that of all. As `divergence_floor`; the second order is
    (U - k) (1/n - 1/T) / (2 k ln 2), for k = 1 the bias of Miller and Madow (1955).

    Args:
        whole: (L, E) int64, selections of all tokens.
        top_k: (L,) experts that a token selects.
        drawn: tokens drawn, n.
        tokens: all tokens, T.
        experts: (L,) routed experts; columns beyond a layer's number are ignored.

    Returns:
        (L,) float64; NaN where none is drawn.
    """
    return _part_of_whole(whole, top_k, drawn, tokens, experts, _kl_of_whole, 2.0)


def _part_of_whole(
    whole: NDArray[np.int64],
    top_k: Sequence[int],
    drawn: int,
    tokens: int,
    experts: Sequence[int],
    term: Term,
    order: float,
) -> NDArray[np.float64]:
    if drawn < 1:
        return np.full(len(whole), np.nan)
    inside = np.where(padding_mask(experts, whole.shape[1]), 0, whole)
    if drawn > EXACT_UP_TO:
        return freedom(inside, top_k) * (1 / drawn - 1 / tokens) / (order * np.asarray(top_k, np.float64) * LN2)
    return _mean_divergence(inside, top_k, drawn, tokens, term)


def _mean_divergence(
    chosen: NDArray[np.int64], top_k: Sequence[int], drawn: int, tokens: int, term: Term
) -> NDArray[np.float64]:
    """(L,) mean over all ways to draw of a divergence that is a sum of terms over experts (L, E), in bits."""
    values, place = np.unique(chosen, return_inverse=True)
    if len(values) > KNOTS:
        knots = np.unique(np.geomspace(1, values[-1], KNOTS).astype(np.int64))
        mean = np.where(
            values > 0,
            np.interp(np.log(values + (values == 0)), np.log(knots), _mean_terms(knots, drawn, tokens, term)),
            0.0,
        )
    else:
        mean = _mean_terms(values, drawn, tokens, term)
    total: NDArray[np.float64] = mean[place].reshape(chosen.shape).sum(axis=1) / (np.asarray(top_k) * LN2)
    return total


def _mean_terms(chosen: NDArray[np.int64], drawn: int, tokens: int, term: Term) -> NDArray[np.float64]:
    """(n,) mean term of experts that `chosen` (n,) of the tokens have, with k = 1 and in nats."""
    found = np.zeros(len(chosen))
    got, rest = np.arange(drawn + 1), tokens - drawn
    step = max(1, CHUNK_VALUES // len(got))
    for start in range(0, len(chosen), step):
        own = chosen[start : start + step, None]
        left = own - got
        possible = (left >= 0) & (left <= rest)
        ways = _log_choose(drawn, got) + _log_choose(rest, np.clip(left, 0, rest)) - _log_choose(tokens, own)
        chance = np.exp(np.where(possible, ways, -np.inf))
        shares = (got / drawn, np.maximum(left, 0) / max(rest, 1), own / tokens)
        found[start : start + step] = (chance * term(*np.broadcast_arrays(*shares))).sum(axis=1)
    return found


def _js_of_rest(part: Shares, rest: Shares, whole: Shares) -> Shares:
    """Jensen-Shannon divergence of those drawn from the others."""
    return _jensen_shannon(part, rest)


def _js_of_whole(part: Shares, rest: Shares, whole: Shares) -> Shares:
    """Jensen-Shannon divergence of those drawn from all."""
    return _jensen_shannon(part, whole)


def _jensen_shannon(one: Shares, two: Shares) -> Shares:
    middle = (one + two) / 2
    term: Shares = (rel_entr(one, middle) + rel_entr(two, middle)) / 2
    return term


def _kl_of_whole(part: Shares, rest: Shares, whole: Shares) -> Shares:
    """Kullback-Leibler divergence of those drawn from all; an expert that none has adds nothing."""
    term: Shares = rel_entr(np.where(whole > 0, part, 0.0), whole)
    return term


def _log_choose(many: int, few: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logarithm of the number of ways to choose `few` of `many`."""
    ways: NDArray[np.float64] = gammaln(many + 1) - gammaln(few + 1) - gammaln(many - few + 1)
    return ways
