"""Does a token go to the experts that the token before went to?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from moescope.stats.layout import check_ascending
from moescope.stats.reliability import CONFIDENCE, jackknife


@dataclass(frozen=True, slots=True, eq=False)
class Repetition:
    """How much of a token's experts earlier tokens of its request had too, and how much they would by chance.

    Attributes:
        layers: (L,) true model indices.
        pairs: tokens that were compared with the one before.
        kept: (L,) share of a token's k experts that the token before had too.
        kept_interval: (2,) 95% interval of its mean over layers, by jackknife over splits of the requests; NaN below
            three splits, as for the other two.
        order_interval: (2,) the same of `kept` less `within`: what comes from standing next to each other.
        request_interval: (2,) the same of `within` less `chance`: what comes from the request.
        chance: (L,) the same for two tokens drawn from the whole trace.
        within: (L,) the same for a token and a random other one of its request: what the request's own mix of experts
            gives without any order.
        run: (L,) mean length of a run, consecutive tokens of a request that all have one expert; runs that a request's
            end cuts are as long as they were seen.
        run_chance: (L,) the same if each token kept no more than `chance`.
        top_kept: (L,) share of pairs with the same expert of the largest weight; None without weights.
        top_chance: (L,) the same for two tokens drawn from the whole trace.
        lags: (G,) tokens back.
        at_lag: (G, L) share of a token's experts that the token so far back had too.
        lag_pairs: (G,) tokens that were compared at each lag.
        held: (M, L) share of a token's experts that all the m - 1 tokens before had too, m = 1 to M.
        held_chance: (M, L) the same for m tokens drawn from the whole trace.
        held_windows: (M,) tokens behind `held`.
    """

    layers: tuple[int, ...]
    pairs: int
    kept: NDArray[np.float64]
    kept_interval: NDArray[np.float64]
    order_interval: NDArray[np.float64]
    request_interval: NDArray[np.float64]
    chance: NDArray[np.float64]
    within: NDArray[np.float64]
    run: NDArray[np.float64]
    run_chance: NDArray[np.float64]
    top_kept: NDArray[np.float64] | None
    top_chance: NDArray[np.float64] | None
    lags: tuple[int, ...]
    at_lag: NDArray[np.float64]
    lag_pairs: NDArray[np.int64]
    held: NDArray[np.float64]
    held_chance: NDArray[np.float64]
    held_windows: NDArray[np.int64]


def repetition(
    counts: NDArray[np.int64],
    tokens: int,
    split_kept: NDArray[np.int64],
    split_pairs: NDArray[np.int64],
    split_random_kept: NDArray[np.int64],
    split_random_pairs: NDArray[np.int64],
    lags: Sequence[int],
    lag_kept: NDArray[np.int64],
    lag_pairs: NDArray[np.int64],
    held: NDArray[np.int64],
    held_windows: NDArray[np.int64],
    top_k: Sequence[int],
    layers: Sequence[int],
    top_kept: NDArray[np.int64] | None = None,
    top_counts: NDArray[np.int64] | None = None,
) -> Repetition:
    """Shares of what was kept beside chance.

    Chance is exact: over all orders of the trace's T tokens, m of them in a row all have an expert that c of T have
    with probability c (c - 1) … (c - m + 1) / (T (T - 1) … (T - m + 1)), the moments of drawing without replacement.
    Tokens of a request hang together, so intervals come from leaving out one split of the requests at a time.
    Runs: a run begins where a token has an expert that the token before it has not, so there are k (T - pairs) of them
    at first tokens and k · pairs - kept elsewhere.

    Args:
        counts: (L, E) int64, selections.
        tokens: tokens behind them, T.
        split_kept: (S, L) int64, experts shared with the token before, over all pairs, by split of the request.
        split_pairs: (S,) int64, pairs of such tokens.
        split_random_kept: (S, L) int64, experts shared with a random other token of the request.
        split_random_pairs: (S,) int64, pairs of such tokens.
        lags: (G,) tokens back.
        lag_kept: (G, L) int64, experts shared with the token so far back.
        lag_pairs: (G,) int64, pairs of such tokens.
        held: (M, L) int64, experts shared with all of the m - 1 tokens before.
        held_windows: (M,) int64, tokens that have so many before them.
        top_k: (L,) experts that a token selects.
        layers: (L,) true model indices, ascending.
        top_kept: (L,) int64, pairs with the same expert of the largest weight; None without weights.
        top_counts: (L, E) int64, how often an expert had the largest weight; None without weights.

    Returns:
        NaN where there is nothing to compare.

    Raises:
        ValueError: if layers do not ascend.
    """
    check_ascending(layers)
    k = np.asarray(top_k, np.float64)
    chance = _in_a_row(counts, tokens, len(held)) / k
    one_more = chance[1] if len(chance) > 1 else _in_a_row(counts, tokens, 2)[1] / k
    kept, pairs = split_kept.sum(axis=0), int(split_pairs.sum())
    first = tokens - pairs
    used = np.flatnonzero((split_pairs > 0) & (split_random_pairs > 0))

    def shares(without: int | None) -> NDArray[np.float64]:
        """What is kept, what of it the order brings, and what the request; means over layers."""
        there = np.ones(len(split_pairs), np.bool_)
        if without is not None:
            there[used[without]] = False
        neighbour, other = (
            float((shared[there].sum(axis=0) / (k * _or_nan(number[there].sum()))).mean())
            for shared, number in ((split_kept, split_pairs), (split_random_kept, split_random_pairs))
        )
        return np.array([neighbour, neighbour - other, other - one_more.mean()])

    share, error = jackknife(shares, len(used))
    reach = stdtrit(max(len(used) - 1, 1), (1 + CONFIDENCE) / 2) * error
    intervals = np.stack([share - reach, share + reach], axis=1)
    return Repetition(
        layers=tuple(int(layer) for layer in layers),
        pairs=pairs,
        kept=kept / (k * _or_nan(pairs)),
        kept_interval=intervals[0],
        order_interval=intervals[1],
        request_interval=intervals[2],
        chance=one_more,
        within=split_random_kept.sum(axis=0) / (k * _or_nan(split_random_pairs.sum())),
        run=k * tokens / _or_nan(k * tokens - kept),
        run_chance=tokens / (first + pairs * (1 - np.nan_to_num(one_more))) if tokens else np.full(len(k), np.nan),
        top_kept=None if top_kept is None else top_kept / _or_nan(pairs),
        top_chance=None if top_counts is None else _in_a_row(top_counts, tokens, 2)[1],
        lags=tuple(int(lag) for lag in lags),
        at_lag=lag_kept / (k * _or_nan(lag_pairs)[:, None]),
        lag_pairs=lag_pairs,
        held=held / (k * _or_nan(held_windows)[:, None]),
        held_chance=chance,
        held_windows=held_windows,
    )


def _in_a_row(counts: NDArray[np.int64], tokens: int, most: int) -> NDArray[np.float64]:
    """(most, L) expected number of experts that m random tokens all have, m = 1 to `most`; NaN beyond the tokens."""
    share = np.ones(counts.shape)
    found = np.full((most, len(counts)), np.nan)
    for m in range(min(most, tokens)):
        share = share * np.maximum(counts - m, 0) / (tokens - m)
        found[m] = share.sum(axis=1)
    return found


def _or_nan(count: "NDArray[np.int64] | NDArray[np.float64] | int") -> NDArray[np.float64]:
    """The number, NaN for 0."""
    return np.where(np.asarray(count) > 0, np.asarray(count, np.float64), np.nan)
