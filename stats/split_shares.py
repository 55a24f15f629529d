"""Shares of groups of prompts with the variance that prompts give them, taken from splits and never from tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from moescope.stats.layout import padding_mask

LARGEST = 700.0
"""Logarithm of the largest ratio that the end of an interval may be; float64 overflows at 709."""


@dataclass(frozen=True, slots=True, eq=False)
class SplitShares:
    """Selections of G groups of prompts (domains, runs), and how far they vary from split to split.

    Attributes:
        counts: (G, L, E) float64, selections; 0 in the padding.
        totals: (G, L) float64, selections of the layer.
        splits: (G, L) int64, splits that hold any.
        variance: (G, L, E) float64, variance of `counts` given the totals, from the group's own splits; NaN with fewer
            than two.
        dispersion: (G, L, E) float64, variance of a split's count over that of a Poisson count: the group's over all
            experts of the layer, and for experts that are burstier than the layer is, over all groups, so much more;
            never below 1. NaN for experts that no group with two splits uses.
    """

    counts: NDArray[np.float64]
    totals: NDArray[np.float64]
    splits: NDArray[np.int64]
    variance: NDArray[np.float64]
    dispersion: NDArray[np.float64]

    def share(self) -> NDArray[np.float64]:
        """(G, L, E) share of the layer's selections; NaN for a layer without any."""
        return self.counts / positive(self.totals)[:, :, None]


@dataclass(frozen=True, slots=True, eq=False)
class Contrast:
    """Shares of one group against another, expert by expert.

    Attributes:
        difference: (L, E) float64, share in the one minus share in the other.
        ratio: (L, E) float64, share in the one over share in the other; infinite where only the one is used, NaN where
            neither is.
        low: (L, E) float64, lower end of the interval of the ratio; NaN where the expert is unused in either.
        high: (L, E) float64, its upper end.
        p_value: (L, E) float64, two-sided test of equal shares, not corrected; NaN where either group has fewer than
            two splits or neither uses the expert.
    """

    difference: NDArray[np.float64]
    ratio: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p_value: NDArray[np.float64]


def split_shares(split_counts: NDArray[np.int64], experts: Sequence[int]) -> SplitShares:
    """Sum over splits, and measure how far splits vary around the group's own share.

    A group's share is the ratio estimator p = Σ x / Σ n over its splits; Var(Σ x) = S/(S-1) Σ (x - p n)², with S
    splits that hold selections (W. G. Cochran, Sampling Techniques, 3rd ed., 1977, ch. 6). The dispersion is the moment
    estimate of a quasi-Poisson model, Σ (x - p n)²/n over groups and splits, over Σ (S - 1) p (P. McCullagh, J. Nelder,
    Generalized Linear Models, 2nd ed., 1989, ch. 4).

    Args:
        split_counts: (S, G, L, E) int64, selections by split and group.
        experts: (L,) routed experts; columns beyond a layer's number are ignored.

    Raises:
        ValueError: if shapes disagree.
    """
    if split_counts.ndim != 4 or split_counts.shape[2] != len(experts):
        raise ValueError(f"expected (splits, groups, {len(experts)} layers, experts), got {split_counts.shape}")
    _, groups, depth, columns = split_counts.shape
    outside = padding_mask(experts, columns)
    counts = np.where(outside, 0, split_counts.sum(axis=0)).astype(np.float64)
    totals = counts.sum(axis=2)
    splits = np.zeros((groups, depth), np.int64)
    variance = np.full((groups, depth, columns), np.nan)
    scatter, expected = np.zeros(counts.shape), np.zeros(counts.shape)
    for group in range(groups):  # one at a time: with all domains of a large model at once, memory would not be small
        x = np.where(outside, 0, split_counts[:, group]).astype(np.float64)
        n = x.sum(axis=2)
        share = counts[group] / np.maximum(totals[group], 1)[:, None]
        squares = np.square(x - share * n[:, :, None])
        held = (n > 0).sum(axis=0)
        splits[group] = held
        correction = held / np.where(held > 1, held - 1.0, np.nan)
        variance[group] = squares.sum(axis=0) * correction[:, None]
        scatter[group] = np.einsum("sle,sl->le", squares, 1 / np.where(n > 0, n, np.inf))
        expected[group] = np.maximum(held - 1, 0)[:, None] * share
    of_experts = scatter.sum(axis=0) / positive(expected.sum(axis=0))
    of_layers = scatter.sum(axis=(0, 2)) / positive(expected.sum(axis=(0, 2)))
    of_groups = np.nan_to_num(scatter.sum(axis=2) / positive(expected.sum(axis=2)))
    burstier = np.maximum(of_experts / positive(of_layers)[:, None], 1.0)
    dispersion = np.maximum(of_groups[:, :, None] * burstier, 1.0)
    return SplitShares(counts, totals, splits, variance, dispersion)


def contrasts_with_the_rest(shares: SplitShares, level: float = 0.95) -> Iterator[Contrast]:
    """Each group against all others together; a group without others gives NaN.

    Args:
        shares: at least one group.
        level: of the intervals.
    """
    for group in range(len(shares.counts)):
        others = np.arange(len(shares.counts)) != group
        known = (shares.splits[others] > 1).any(axis=0)[:, None]
        yield _contrast(
            _side(shares, group),
            _Side(
                shares.counts[others].sum(axis=0),
                # groups hold different prompts, so their variances add up
                np.where(known, np.nansum(shares.variance[others], axis=0), np.nan),
                shares.splits[others].max(axis=0, initial=0),
                shares.dispersion[others].max(axis=0, initial=1.0),
            ),
            level,
        )


def contrast_of_two(shares: SplitShares, level: float = 0.95) -> Contrast:
    """The second group against the first.

    Args:
        shares: two groups of different prompts.
        level: of the intervals.
    """
    return _contrast(_side(shares, 1), _side(shares, 0), level)


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """One side of a contrast; the fields are those of `SplitShares` without the groups."""

    counts: NDArray[np.float64]
    variance: NDArray[np.float64]
    splits: NDArray[np.int64]
    dispersion: NDArray[np.float64]


def _side(shares: SplitShares, group: int) -> _Side:
    return _Side(shares.counts[group], shares.variance[group], shares.splits[group], shares.dispersion[group])


def _contrast(one: _Side, two: _Side, level: float) -> Contrast:
    """Compare two sides by t tests whose variance is the larger of the side's own and that of its dispersion.

    Its own alone would miss the prompts that a small group happens not to hold: where none of them uses an expert,
    nothing varies. The dispersion alone would trust that each expert is as bursty here as elsewhere.
    """
    n, m = positive(one.counts.sum(axis=1))[:, None], positive(two.counts.sum(axis=1))[:, None]
    p, q, common = one.counts / n, two.counts / m, (one.counts + two.counts) / (n + m)
    p_variance = np.maximum(one.variance, one.dispersion * common * n) / n**2
    q_variance = np.maximum(two.variance, two.dispersion * common * m) / m**2
    splits = np.minimum(one.splits, two.splits)[:, None]
    degrees = np.where(splits > 1, splits - 1.0, np.nan)
    used = (p > 0) & (q > 0)
    safe_p, safe_q = np.where(used, p, np.nan), np.where(used, q, np.nan)
    log_ratio = np.log(safe_p / safe_q)
    reach = stdtrit(degrees, (1 + level) / 2) * np.sqrt(p_variance / safe_p**2 + q_variance / safe_q**2)
    with np.errstate(divide="ignore", invalid="ignore"):  # infinite and NaN are the answers
        ratio = p / q
    return Contrast(
        difference=p - q,
        ratio=ratio,
        low=np.exp(log_ratio - reach),
        high=np.exp(np.minimum(log_ratio + reach, LARGEST)),
        p_value=2 * stdtr(degrees, -np.abs(p - q) / np.sqrt(positive(p_variance + q_variance))),
    )


def positive(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values, NaN where they are not above 0: a divisor that says so instead of failing."""
    return np.where(values > 0, values, np.nan)
