"""How evenly experts are used, which are hot or dead, how many tokens reach each, and what the phases change."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.stats.activation import Activation, layer_loads, normalised_entropy
from moescope.stats.comparison import Distances, distances
from moescope.stats.layout import check_ascending, padding_mask

HOT = 2.0
"""Times the mean load from which an expert is called hot."""

LEAST_TOKENS = 128
"""Tokens that an expert should see where a quantisation is calibrated, unless told otherwise."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertUse:
    """Balance of each layer's load over its experts.

    As a token selects k different experts, no expert can have more than 1/k of the selections: max over mean ends at
    E/k, Jain's index begins at k/E and the effective number at k.

    Attributes:
        layers: (L,) true model indices.
        experts: (L,) routed experts.
        max_over_mean: (L,) load of the busiest expert over the mean: 1 is even.
        jain: (L,) Jain's fairness index (Σx)² / (E Σx²): 1 is even, 1/E is one expert alone.
        entropy: (L,) -Σ p ln p / ln E: 1 is even, 0 one expert alone; NaN with one expert.
        gini: (L,) Gini coefficient, half the relative mean difference: 0 is even, 1 - 1/E one expert alone.
        effective: (L,) effective number of experts exp(-Σ p ln p), the Hill number of order 1: as many equally used
            experts have the same entropy.
        dead: (L, E) bool, never selected in a layer that has selections.
        hot: (L, E) bool, selected at least `hot_from` times as often as the mean.
        hot_from: factor of `hot`.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    max_over_mean: NDArray[np.float64]
    jain: NDArray[np.float64]
    entropy: NDArray[np.float64]
    gini: NDArray[np.float64]
    effective: NDArray[np.float64]
    dead: NDArray[np.bool_]
    hot: NDArray[np.bool_]
    hot_from: float


@dataclass(frozen=True, slots=True, eq=False)
class Coverage:
    """Experts that too few tokens reached, and how many more tokens of the same kind would reach them.

    Attributes:
        layers: (L,) true model indices.
        experts: (L,) routed experts.
        minimum: tokens that an expert should see.
        tokens: tokens routed, T.
        seen: (L, E) int64, tokens that reached the expert; 0 in the padding.
        short: (L, E) int64, tokens that it lacks; 0 where there are enough and in the padding.
        under: (L,) int64, experts that lack any.
        more_tokens: (L, E) float64, further tokens to route until the expert has enough if it is selected as often as
            so far: (minimum - c) T / c, rounded up; 0 where there are enough, infinite for an expert never selected,
            NaN in the padding.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    minimum: int
    tokens: int
    seen: NDArray[np.int64]
    short: NDArray[np.int64]
    under: NDArray[np.int64]
    more_tokens: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class PhaseContrast:
    """Prefill against decode, over the same mix of domains.

    Attributes:
        layers: (L,) true model indices.
        experts: (L,) routed experts.
        prefill: (L, E) float64, share of selections; each domain weighted by its decoded tokens. Padding is NaN.
        decode: (L, E) the same of decoded tokens.
        between: (L,) distances between the two.
        floor: (L,) Jensen-Shannon divergence that independent selections alone would give, in bits. Tokens of a prompt
            are not independent, so a distance has to be many times the floor to mean anything; it is no test.
        domains: number of domains that have tokens in both phases; others are left out.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    prefill: NDArray[np.float64]
    decode: NDArray[np.float64]
    between: Distances
    floor: NDArray[np.float64]
    domains: int


def expert_use(activation: Activation, hot_from: float = HOT) -> ExpertUse:
    """Balance measures of each layer.

    Jain's index: R. Jain, D. Chiu, W. Hawe, DEC-TR-301, 1984. Hill number: M. O. Hill, Ecology 54, 1973. Gini: with x
    ascending, 2 Σ i x(i) / (E Σ x) - (E + 1) / E.

    Args:
        activation: shares (L, E); the bounds told at `ExpertUse` are those of the selection frequency.
        hot_from: times the mean share from which an expert is called hot.

    Returns:
        Every measure of a layer without tokens is NaN, and none of its experts is dead or hot.

    Raises:
        ValueError: if `hot_from` is not positive.
    """
    if not hot_from > 0:
        raise ValueError(f"hot_from must be positive, got {hot_from}")
    share = activation.matrix
    columns = share.shape[1]
    inside = ~padding_mask(activation.experts, columns)
    width = np.asarray(activation.experts, dtype=np.float64)
    load = np.where(inside, share, 0.0)
    total = np.where(load.any(axis=1), load.sum(axis=1), np.nan)
    ascending = np.sort(np.where(inside, share, -1.0), axis=1)
    # the padding sorts in front, so ranks begin after it
    rank = np.arange(1, columns + 1) - (columns - width)[:, None]
    ranked = np.where(rank > 0, rank * ascending, 0.0).sum(axis=1)
    over_mean = share * width[:, None] / total[:, None]
    entropy = np.where(np.isfinite(total), normalised_entropy(activation), np.nan)
    return ExpertUse(
        layers=activation.layers,
        experts=activation.experts,
        max_over_mean=np.where(inside, over_mean, -np.inf).max(axis=1),
        jain=total**2 / (width * np.square(load).sum(axis=1)),
        entropy=entropy,
        gini=2 * ranked / (width * total) - (width + 1) / width,
        effective=np.exp(np.where(width > 1, entropy * np.log(width), total * 0.0)),
        dead=inside & (share == 0) & np.isfinite(total)[:, None],
        hot=inside & (over_mean >= hot_from),
        hot_from=hot_from,
    )


def expert_coverage(
    selection_counts: NDArray[np.int64], tokens: int, minimum: int, experts: Sequence[int], layers: Sequence[int]
) -> Coverage:
    """Which experts fewer than `minimum` tokens reached: with so few, a quantisation cannot be calibrated for them.

    Args:
        selection_counts: (L, E) int64, times an expert was among a token's top-k: the tokens that reached it.
        tokens: tokens routed, T.
        minimum: tokens that each expert should see.
        experts: (L,) routed experts; columns beyond a layer's number are padding.
        layers: (L,) true model indices, ascending.

    Raises:
        ValueError: if shapes disagree, layers do not ascend, or a number is negative.
    """
    if minimum < 0:
        raise ValueError(f"minimum cannot be negative, got {minimum}")
    loads = layer_loads(selection_counts, (0,) * len(layers), tokens, experts, layers)  # checks the shapes
    inside = ~padding_mask(experts, selection_counts.shape[1])
    seen = np.where(inside, selection_counts, 0)
    short = np.where(inside, np.maximum(minimum - seen, 0), 0)
    more = np.ceil(short * float(tokens) / np.where(seen > 0, seen, 1))
    more = np.where((short > 0) & (seen == 0), np.inf, more)
    return Coverage(
        layers=tuple(load.layer for load in loads),
        experts=tuple(load.experts for load in loads),
        minimum=minimum,
        tokens=tokens,
        seen=seen,
        short=short,
        under=(short > 0).sum(axis=1),
        more_tokens=np.where(inside, more, np.nan),
    )


def phase_contrast(
    selection_counts: NDArray[np.int64],
    token_counts: NDArray[np.int64],
    experts: Sequence[int],
    layers: Sequence[int],
) -> PhaseContrast:
    """Use of experts in prefill against decode, freed from what the domains' different shares of each would add.

    The floor is the delta method's: with m = (p + q) / 2, JS ≈ Σ (p - q)² / (8 m ln 2), and independent selections
    have Var(p - q) = m (1 - m) (1/n + 1/n'), so that a layer of U used experts has (U - 1) (1/n + 1/n') / (8 ln 2).

    Args:
        selection_counts: (D, 2, L, E) int64, selections by domain and phase: prefill, decode.
        token_counts: (D, 2) int64, tokens routed.
        experts: (L,) routed experts; columns beyond a layer's number are padding.
        layers: (L,) true model indices, ascending.

    Returns:
        Everything is NaN if no domain has tokens in both phases.

    Raises:
        ValueError: if shapes disagree or layers do not ascend.
    """
    if selection_counts.ndim != 4 or selection_counts.shape[:2] != token_counts.shape or token_counts.shape[1] != 2:
        raise ValueError(f"got counts of shape {selection_counts.shape} and tokens of shape {token_counts.shape}")
    if selection_counts.shape[2] != len(experts) or len(experts) != len(layers):
        raise ValueError(
            f"got {selection_counts.shape[2]} layers of counts, {len(layers)} indices, {len(experts)} widths"
        )
    check_ascending(layers)
    both = (token_counts > 0).all(axis=1)
    outside = padding_mask(experts, selection_counts.shape[3])
    counts = np.where(outside, 0, selection_counts[both])
    total = counts.sum(axis=-1, keepdims=True, dtype=np.float64)
    shares = counts / np.where(total > 0, total, np.nan)  # (D, 2, L, E)
    mix = token_counts[both, 1] / max(int(token_counts[both, 1].sum()), 1)
    prefill, decode = np.einsum("d,dple->ple", mix, shares)
    if not both.any():
        prefill = decode = np.full(outside.shape, np.nan)
    # a reweighted share is that of Σ w² / n: the reciprocal of its effective number of selections
    spread = np.einsum("d,dpl->l", mix**2, 1 / np.where(total > 0, total, np.nan)[..., 0])
    used = ((prefill > 0) | (decode > 0)).sum(axis=1)
    return PhaseContrast(
        layers=tuple(int(layer) for layer in layers),
        experts=tuple(int(width) for width in experts),
        prefill=np.where(outside, np.nan, prefill),
        decode=np.where(outside, np.nan, decode),
        between=distances(prefill, decode, experts),
        floor=np.where(np.isfinite(prefill[:, 0]), (used - 1) * spread / (8 * np.log(2)), np.nan),
        domains=int(both.sum()),
    )
