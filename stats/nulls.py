"""Layer correlation beside what chance alone would have given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from moescope.stats.activation import Activation, Measure
from moescope.stats.layer_divergence import expected_divergence, pairwise_divergence
from moescope.stats.pairwise import pairwise_pearson
from moescope.stats.reliability import CONFIDENCE, check_splits, jackknife
from moescope.stats.standardised import StandardisedRows, random_orders, rank_rows, standardised_rows

Method = Literal["pearson", "spearman"]

PERMUTATIONS = 10_000
QUANTILES = (0.025, 0.5, 0.975)
TIE = 1e-6
"""Permuted correlations are single precision: closer ones are counted as equal, which errs towards chance."""


@dataclass(frozen=True, slots=True, eq=False)
class CorrelationNull:
    """Mean correlation at each distance between layers, held against experts in random order.

    All p-values ask how often chance gives at least as much, (1 + times) / (1 + permutations); the least possible is
    1 / (1 + permutations) (B. Phipson and G. K. Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010).

    Attributes:
        method: which correlation.
        deltas: (Δ,) distances in model layers that at least one pair of comparable layers has.
        pairs: (Δ,) int64, pairs of layers behind each mean.
        mean: (Δ,) float64, mean correlation of these pairs.
        null_mean: (Δ,) float64, mean under chance, exact.
        null_sd: (Δ,) float64, standard deviation under chance, exact.
        null_quantiles: (3, Δ) float64, 2.5%, 50% and 97.5% quantiles under chance.
        p: (Δ,) float64, for each distance as if nobody had looked at another.
        p_family: (Δ,) float64, for each distance given that all were looked at: against the largest standardised
            mean of all distances. The smallest is the p-value of the largest.
        threshold: (Δ,) float64, mean correlation above which `p_family` is below 5%: the smallest that can be seen.
        cell_p: (L, L) float64, for each pair of layers by itself; NaN where layers cannot be compared.
        experts: experts that took part.
        permutations: random orders drawn.
        seed: seed of the orders.
    """

    method: Method
    deltas: tuple[int, ...]
    pairs: NDArray[np.int64]
    mean: NDArray[np.float64]
    null_mean: NDArray[np.float64]
    null_sd: NDArray[np.float64]
    null_quantiles: NDArray[np.float64]
    p: NDArray[np.float64]
    p_family: NDArray[np.float64]
    threshold: NDArray[np.float64]
    cell_p: NDArray[np.float64]
    experts: int
    permutations: int
    seed: int

    @property
    def looks(self) -> int:
        """Distances that were looked at."""
        return len(self.deltas)

    @property
    def p_largest(self) -> float:
        """Family-wise p-value of the largest standardised mean; NaN without any."""
        return float(np.nanmin(self.p_family)) if np.isfinite(self.p_family).any() else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class DivergenceNull:
    """Mean Jensen-Shannon divergence at each distance, held against experts in random order; low means alike.

    Attributes:
        deltas: (Δ,) distances in model layers.
        mean: (Δ,) float64, bits.
        null_mean: (Δ,) float64, bits, exact.
        null_sd: (Δ,) float64, bits, exact.
        p: (Δ,) float64, how often chance gives as little, by the normal limit of permuted sums.
    """

    deltas: tuple[int, ...]
    mean: NDArray[np.float64]
    null_mean: NDArray[np.float64]
    null_sd: NDArray[np.float64]
    p: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class LayerNulls:
    """Layer correlation with its nulls, in three measures, and checked in two ways.

    Attributes:
        kind: the activation measure it rests on.
        layers: (L,) true model indices.
        pearson: (L, L) float64, Pearson correlation of every pair of layers.
        spearman: (L, L) float64, Spearman rank correlation.
        divergence: (L, L) float64, Jensen-Shannon divergence, bits.
        free: Pearson against any order of the experts.
        ranks: Spearman against the same orders.
        groups: groups of experts that the router first chooses among; 1 for none.
        within_groups: Pearson against orders within these groups; None without groups.
        without_dead: Pearson and its null over the experts that are used in every layer; None where all are.
        dead_experts: experts without use in some layer that has others, left out in `without_dead`.
        distances: the divergence against chance.
        intervals: (2, Δ) float64, 95% interval of the mean Pearson correlation at each distance of `free`, by jackknife
            over splits of the prompts; NaN without splits.
    """

    kind: Measure
    layers: tuple[int, ...]
    pearson: NDArray[np.float64]
    spearman: NDArray[np.float64]
    divergence: NDArray[np.float64]
    free: CorrelationNull
    ranks: CorrelationNull
    groups: int
    within_groups: CorrelationNull | None
    without_dead: CorrelationNull | None
    dead_experts: tuple[int, ...]
    distances: DivergenceNull
    intervals: NDArray[np.float64]


def layer_nulls(
    activation: Activation,
    split_counts: NDArray[np.int64] | None = None,
    groups: int = 1,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> LayerNulls:
    """Hold the correlation between layers against experts in random order, a new order in every layer.

    Two layers without any alignment of their expert indices look the same in any order. A whole set of layers is
    permuted at once, so means over overlapping pairs keep their dependence. Layers with another number of experts than
    most, constant ones and those without records take no part.

    Args:
        activation: the vectors to compare, one a layer.
        split_counts: (S, L, E) int64, selections by split of the prompts, for intervals where the measure is the
            frequency; None without.
        groups: groups of equal size that the router first chooses among; 1 for none.
        permutations: random orders to draw.
        seed: the same seed gives the same p-values.

    Raises:
        ValueError: if `permutations` or `groups` is below 1, groups do not divide the experts, or shapes disagree.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    rows = standardised_rows(activation.matrix, activation.experts)
    if groups < 1 or rows.width % groups:
        raise ValueError(f"groups must divide the {rows.width} experts, got {groups}")
    rank_matrix = rank_rows(activation.matrix, activation.experts)
    ranked = standardised_rows(rank_matrix, activation.experts)
    everywhere = np.zeros(rows.width, np.int64)
    free, ranks = _nulls({"pearson": rows, "spearman": ranked}, everywhere, activation.layers, permutations, seed)
    within_groups = without_dead = None
    if groups > 1:
        blocks = np.repeat(np.arange(groups), rows.width // groups)
        (within_groups,) = _nulls({"pearson": rows}, blocks, activation.layers, permutations, seed)
    dead = np.flatnonzero((activation.matrix[rows.index, : rows.width] == 0).any(axis=0))
    if dead.size:
        alive = np.full((len(activation.layers), rows.width - dead.size), np.nan)
        alive[rows.index] = np.delete(activation.matrix[rows.index, : rows.width], dead, axis=1)
        living = standardised_rows(alive, alive.shape[1:] * len(alive))
        (without_dead,) = _nulls(
            {"pearson": living}, np.zeros(living.width, np.int64), activation.layers, permutations, seed
        )
    divergence = pairwise_divergence(activation.matrix, activation.experts)
    return LayerNulls(
        kind=activation.kind,
        layers=activation.layers,
        pearson=pairwise_pearson(activation.matrix, activation.experts),
        spearman=pairwise_pearson(rank_matrix, activation.experts),
        divergence=divergence,
        free=free,
        ranks=ranks,
        groups=groups,
        within_groups=within_groups,
        without_dead=without_dead,
        dead_experts=tuple(dead.tolist()),
        distances=_divergence_null(activation, rows.index, divergence),
        intervals=_intervals(activation, split_counts, free),
    )


def distance_weights(layers: Sequence[int], index: NDArray[np.intp]) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Weights that turn a matrix over pairs of layers into means by distance.

    Args:
        layers: (L,) true model indices.
        index: (n,) rows that take part.

    Returns:
        The distances between any two of them, and (n², Δ) float64 weights of the cells i < j, each column of sum 1.
    """
    own = np.asarray(layers, dtype=np.int64)[index]
    gap = (own[None, :] - own[:, None]).ravel()
    deltas = np.unique(gap[gap > 0])
    belongs = gap[:, None] == deltas[None, :]
    return tuple(deltas.tolist()), belongs / np.maximum(belongs.sum(axis=0), 1)


def _nulls(
    measures: dict[Method, StandardisedRows],
    blocks: NDArray[np.int64],
    layers: Sequence[int],
    permutations: int,
    seed: int,
) -> tuple[CorrelationNull, ...]:
    """One null a measure; all see the same random orders."""
    rng = np.random.default_rng(seed)
    depth = max((len(rows.index) for rows in measures.values()), default=0)
    drawn = [_Drawn(rows, layers) for rows in measures.values()]
    for orders in random_orders(rng, permutations if depth else 0, depth, blocks):
        for part in drawn:
            part.add(orders)
    return tuple(part.result(method, blocks, permutations, seed) for method, part in zip(measures, drawn, strict=True))


class _Drawn:
    """Counts what permuted rows give, chunk by chunk."""

    def __init__(self, rows: StandardisedRows, layers: Sequence[int]) -> None:
        self.rows = rows
        self.values = rows.values.astype(np.float32)
        self.depth = len(layers)
        self.deltas, self.weights = distance_weights(layers, rows.index)
        self.observed = rows.correlation
        self.at_least = np.zeros_like(self.observed)
        self.means: list[NDArray[np.float32]] = []

    def add(self, orders: NDArray[np.intp]) -> None:
        """Take in a chunk of orders (B, n, E)."""
        permuted = np.take_along_axis(self.values[None], orders[:, : len(self.values)], axis=2)
        correlation = permuted @ permuted.swapaxes(1, 2)
        self.at_least += (correlation >= self.observed.astype(np.float32) - TIE).sum(axis=0)
        self.means.append(correlation.reshape(len(orders), -1) @ self.weights.astype(np.float32))

    def result(self, method: Method, blocks: NDArray[np.int64], permutations: int, seed: int) -> CorrelationNull:
        """The null of what was drawn."""
        means = np.concatenate([*self.means, np.empty((0, len(self.deltas)), np.float32)]).astype(np.float64)
        mean = self.observed.ravel() @ self.weights
        expected, variance = _exact_moments(self.rows.values, blocks)
        null_mean, null_sd = expected.ravel() @ self.weights, np.sqrt(variance.ravel() @ self.weights**2)
        scale = np.where(null_sd > 0, null_sd, np.nan)
        if means.size:
            p = (1 + (means >= mean - TIE).sum(axis=0)) / (1 + permutations)
            largest = np.nanmax((means - null_mean) / scale, axis=1, initial=-np.inf)
            p_family = (1 + (largest[:, None] >= (mean - TIE - null_mean) / scale).sum(axis=0)) / (1 + permutations)
            quantiles = np.quantile(means, QUANTILES, axis=0)
            threshold = null_mean + scale * np.quantile(largest, CONFIDENCE)
        else:
            p = p_family = threshold = np.full(len(mean), np.nan)
            quantiles = np.full((len(QUANTILES), len(mean)), np.nan)
        cell_p = np.full((self.depth, self.depth), np.nan)
        cells = (1 + self.at_least) / (1 + permutations)
        np.fill_diagonal(cells, np.nan)
        cell_p[np.ix_(self.rows.index, self.rows.index)] = cells
        return CorrelationNull(
            method=method,
            deltas=self.deltas,
            pairs=(self.weights > 0).sum(axis=0),
            mean=mean,
            null_mean=null_mean,
            null_sd=null_sd,
            null_quantiles=quantiles,
            p=p,
            p_family=np.where(np.isfinite(scale), p_family, np.nan),
            threshold=threshold,
            cell_p=cell_p,
            experts=self.rows.width,
            permutations=permutations,
            seed=seed,
        )


def _exact_moments(
    rows: NDArray[np.float64], blocks: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance (n, n) of the inner product of two rows in random order within blocks.

    For a block of size m with sums a, b and sums of squared deviations A, B: mean ab/m, variance AB/(m - 1)
    (W. Hoeffding, Ann. Math. Stat. 22, 1951). Orders of different pairs of layers are independent of each other, two by
    two, so variances of means over pairs add up.
    """
    mean = np.zeros((len(rows), len(rows)))
    variance = np.zeros_like(mean)
    for block in np.unique(blocks):
        part = rows[:, blocks == block]
        size = part.shape[1]
        total = part.sum(axis=1)
        squares = np.square(part - total[:, None] / size).sum(axis=1)
        mean += np.outer(total, total) / size
        variance += np.outer(squares, squares) / max(size - 1, 1)
    return mean, variance


def _divergence_null(
    activation: Activation, index: NDArray[np.intp], divergence: NDArray[np.float64]
) -> DivergenceNull:
    """The divergence by distance against its exact moments."""
    deltas, weights = distance_weights(activation.layers, index)
    width = activation.experts[index[0]] if len(index) else 0
    expected, variance = expected_divergence(activation.matrix[index, :width])
    mean = divergence[np.ix_(index, index)].ravel() @ weights
    null_mean, null_sd = expected.ravel() @ weights, np.sqrt(variance.ravel() @ weights**2)
    return DivergenceNull(
        deltas=deltas,
        mean=mean,
        null_mean=null_mean,
        null_sd=null_sd,
        p=ndtr((mean - null_mean) / np.where(null_sd > 0, null_sd, np.nan)),
    )


def _intervals(
    activation: Activation, split_counts: NDArray[np.int64] | None, null: CorrelationNull
) -> NDArray[np.float64]:
    """95% interval of the mean correlation at each distance, by jackknife over splits."""
    unknown = np.full((2, len(null.deltas)), np.nan)
    if split_counts is None or activation.kind != "frequency":
        return unknown
    check_splits(split_counts, activation.experts, activation.layers)
    used = split_counts[split_counts.any(axis=(1, 2))]
    if not len(used):
        return unknown
    index = standardised_rows(activation.matrix, activation.experts).index
    _, weights = distance_weights(activation.layers, index)

    def means(without: int | None) -> NDArray[np.float64]:
        kept = np.delete(used, [] if without is None else [without], axis=0).sum(axis=0).astype(np.float64)
        pairwise = pairwise_pearson(kept, activation.experts)[np.ix_(index, index)]
        by_distance: NDArray[np.float64] = pairwise.ravel() @ weights
        return by_distance

    mean, error = jackknife(means, len(used))
    reach = stdtrit(max(len(used) - 1, 1), (1 + CONFIDENCE) / 2) * error
    return np.stack([mean - reach, mean + reach])
