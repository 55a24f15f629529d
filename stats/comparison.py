"""How far two activations of the same layers and experts lie apart, and how far that is beyond a run's own noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr, stdtr

from moescope.stats.activation import Activation, Measure
from moescope.stats.layout import padding_mask
from moescope.stats.multiplicity import holm
from moescope.stats.pairwise import pairwise_pearson
from moescope.stats.split_shares import SplitShares, contrast_of_two, positive, split_shares

PARTITIONS = 64
"""Random halvings that a within-run level is averaged over."""

LEVEL = 0.05

REPLICATES = 999
"""Draws of the noise that a layer's distance is held against."""


@dataclass(frozen=True, slots=True, eq=False)
class Distances:
    """Distance between two distributions over experts, one number a layer.

    Attributes:
        jensen_shannon: (L,) float64, Jensen-Shannon divergence in bits: 0 for equal, 1 for disjoint distributions.
        total_variation: (L,) float64, half the summed absolute difference: the share that would have to move.
    """

    jensen_shannon: NDArray[np.float64]
    total_variation: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class WithinRun:
    """Distance between two halves of one run, averaged over random halvings of its splits.

    Each half has half the prompts, so this is an upper estimate of the run's own share in a distance to another run;
    `sampling_noise` brings it to the size of the whole.

    Attributes:
        distances: (L,) means; NaN where fewer than two splits hold selections.
        splits: splits that hold selections, out of those there are.
        partitions: halvings averaged over.
        seed: seed of the halvings.
    """

    distances: Distances
    splits: int
    partitions: int
    seed: int


@dataclass(frozen=True, slots=True)
class ExpertMove:
    """One expert whose share differs.

    Attributes:
        layer: true model index.
        expert: expert id.
        before: share in the reference.
        after: share in the other.
    """

    layer: int
    expert: int
    before: float
    after: float

    @property
    def difference(self) -> float:
        """Share gained (+) or lost (-)."""
        return self.after - self.before

    @property
    def ratio(self) -> float:
        """After over before; infinite for an expert that the reference never used, NaN if neither did."""
        if self.before:
            return self.after / self.before
        return float("inf") if self.after else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """An activation against a reference, layer by layer and expert by expert.

    Attributes:
        kind: the activation measure compared.
        layers: (L,) true model indices.
        experts: (L,) routed experts of each layer.
        reference: (L, E) float64, shares in the reference; padding is NaN.
        other: (L, E) float64, shares in the other.
        difference: (L, E) float64, other minus reference; padding and layers without tokens in either are NaN.
        between: (L,) distances between the two.
        correlation: (L,) float64, Pearson r over experts; NaN where either is constant or was not recorded.
        moved: the experts with the largest absolute difference, largest first; none that did not move.
        within_reference: distance between halves of the reference, or None if not known for this measure.
        within_other: the same of the other.
        noise: (L,) distances to be expected if both were drawn from the same prompts; see `sampling_noise`.
        ratio: (L,) `between` over `noise`: near 1 where only the draw of the prompts differs; NaN without a noise.
    """

    kind: Measure
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    reference: NDArray[np.float64]
    other: NDArray[np.float64]
    difference: NDArray[np.float64]
    between: Distances
    correlation: NDArray[np.float64]
    moved: tuple[ExpertMove, ...]
    within_reference: WithinRun | None
    within_other: WithinRun | None
    noise: Distances
    ratio: Distances


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """Tests of two runs over splits of their prompts, layer by layer and expert by expert.

    Attributes:
        layer_p_value: (L,) float64, of no difference in the layer, one layer at a time; NaN where either run has fewer
            than two splits.
        layer_p_corrected: (L,) float64, corrected for the layers by the largest distance of any.
        difference: (L, E) float64, share in the second run minus share in the first.
        p_value: (L, E) float64, of an equal share, one expert at a time; NaN where it cannot be tested.
        p_corrected: (L, E) float64, corrected by Holm for all experts of all layers.
        paired: whether the two runs had the same prompts.
        replicates: draws of the noise behind the tests of layers.
        seed: seed of the draws.
    """

    layer_p_value: NDArray[np.float64]
    layer_p_corrected: NDArray[np.float64]
    difference: NDArray[np.float64]
    p_value: NDArray[np.float64]
    p_corrected: NDArray[np.float64]
    paired: bool
    replicates: int
    seed: int

    @property
    def layers_changed(self) -> NDArray[np.bool_]:
        """(L,) layers that differ at the 5% level for all layers together."""
        changed: NDArray[np.bool_] = self.layer_p_corrected <= LEVEL
        return changed

    @property
    def experts_changed(self) -> NDArray[np.bool_]:
        """(L, E) experts that differ at the 5% level for all experts of all layers together."""
        changed: NDArray[np.bool_] = self.p_corrected <= LEVEL
        return changed


def distances(one: NDArray[np.float64], two: NDArray[np.float64], experts: Sequence[int]) -> Distances:
    """Distance between the distributions over experts of two runs, layer by layer.

    With m = (p + q) / 2: Jensen-Shannon divergence ½ Σ p log₂(p/m) + ½ Σ q log₂(q/m) (J. Lin, "Divergence measures
    based on the Shannon entropy", IEEE Trans. Inf. Theory 37, 1991), total variation ½ Σ |p - q|. Both are symmetric
    and lie in [0, 1].

    Args:
        one: (L, E) counts or shares, each row scaled to sum 1 here.
        two: (L, E), the same of the other.
        experts: (L,) routed experts; columns beyond a layer's number are ignored.

    Returns:
        NaN in a layer where either row sums to 0 or holds a NaN.

    Raises:
        ValueError: if shapes disagree.
    """
    if one.ndim != 2 or one.shape != two.shape or one.shape[0] != len(experts):
        raise ValueError(f"got arrays of shape {one.shape} and {two.shape} for {len(experts)} layers")
    p, q = _distributions(one, experts), _distributions(two, experts)
    middle = (p + q) / 2
    divergence = (rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=1) / (2 * np.log(2))
    return Distances(
        # rounding alone leaves [0, 1]; NaN stays NaN
        jensen_shannon=np.clip(divergence, 0.0, 1.0),
        total_variation=np.clip(np.abs(p - q).sum(axis=1) / 2, 0.0, 1.0),
    )


def within_run(
    split_counts: NDArray[np.int64], experts: Sequence[int], seed: int = 0, partitions: int = PARTITIONS
) -> WithinRun:
    """Distance between halves of one run: its splits, dealt at random into two, again and again.

    A prompt lies in one split as a whole, so the level holds what prompts differ in, not only what tokens do.

    Args:
        split_counts: (S, L, E) int64, selections by split of the prompts; splits without any are left out.
        experts: (L,) routed experts; columns beyond a layer's number are ignored.
        seed: seed of the halvings; the same seed gives the same level.
        partitions: halvings to average over.

    Raises:
        ValueError: if shapes disagree or `partitions` is below 1.
    """
    if split_counts.ndim != 3 or split_counts.shape[1] != len(experts):
        raise ValueError(f"expected (splits, {len(experts)} layers, experts), got shape {split_counts.shape}")
    if partitions < 1:
        raise ValueError(f"partitions must be at least 1, got {partitions}")
    used = split_counts[split_counts.any(axis=(1, 2))]
    count, depth = len(used), len(experts)
    divergence, variation = np.full((partitions, depth), np.nan), np.full((partitions, depth), np.nan)
    rng = np.random.default_rng(seed)
    total = used.sum(axis=0)
    for row in range(partitions if count > 1 else 0):
        half = used[rng.permutation(count)[: count // 2]].sum(axis=0)
        found = distances(half.astype(np.float64), (total - half).astype(np.float64), experts)
        divergence[row], variation[row] = found.jensen_shannon, found.total_variation
    # a layer of which any half is empty has no level: the mean keeps the NaN
    return WithinRun(Distances(divergence.mean(axis=0), variation.mean(axis=0)), count, partitions, seed)


def sampling_noise(one: WithinRun, two: WithinRun) -> Distances:
    """Distance to be expected between two whole runs that differ in nothing but the draw of their prompts.

    The variance of the difference between halves of run A is 4 Var(A), that between runs Var(A) + Var(B). A small
    Jensen-Shannon divergence is quadratic in the difference, total variation linear, so the levels within give
    (w_A + w_B) / 4 and √(w_A² + w_B²) / 2. With few selections an expert the divergence is no longer quadratic and
    this becomes too low; the levels within, by themselves, remain an upper estimate.

    Args:
        one: the level within one run.
        two: the level within the other.
    """
    a, b = one.distances, two.distances
    return Distances(
        jensen_shannon=(a.jensen_shannon + b.jensen_shannon) / 4,
        total_variation=np.hypot(a.total_variation, b.total_variation) / 2,
    )


def compare_activations(
    reference: Activation,
    other: Activation,
    within_reference: WithinRun | None = None,
    within_other: WithinRun | None = None,
    top: int = 20,
) -> Comparison:
    """Compare an activation with a reference.

    Args:
        reference: what `other` is compared with.
        other: the same measure over the same layers and experts; top-k and tokens may differ.
        within_reference: level within the reference's run, None if not known.
        within_other: level within the other's run, None if not known.
        top: experts to name in `moved`, at most.

    Raises:
        ValueError: if measure, layers or experts differ, or `top` is negative.
    """
    if (reference.kind, reference.layers, reference.experts) != (other.kind, other.layers, other.experts):
        raise ValueError("only the same measure over the same layers and experts can be compared")
    if reference.matrix.shape != other.matrix.shape:
        raise ValueError(f"matrices differ in shape: {reference.matrix.shape} and {other.matrix.shape}")
    if top < 0:
        raise ValueError(f"top cannot be negative, got {top}")
    between = distances(reference.matrix, other.matrix, reference.experts)
    if within_reference is None or within_other is None:
        nothing = np.full(len(reference.layers), np.nan)
        noise = Distances(nothing, nothing)
    else:
        noise = sampling_noise(within_reference, within_other)
    difference = other.matrix - reference.matrix
    depth = len(reference.layers)
    pairs = pairwise_pearson(np.concatenate([reference.matrix, other.matrix]), reference.experts * 2)
    return Comparison(
        kind=reference.kind,
        layers=reference.layers,
        experts=reference.experts,
        reference=reference.matrix,
        other=other.matrix,
        difference=difference,
        between=between,
        correlation=np.diagonal(pairs, offset=depth).copy(),
        moved=_moved(reference, other, difference, top),
        within_reference=within_reference,
        within_other=within_other,
        noise=noise,
        ratio=Distances(
            _over(between.jensen_shannon, noise.jensen_shannon), _over(between.total_variation, noise.total_variation)
        ),
    )


def change_tests(
    reference: NDArray[np.int64],
    other: NDArray[np.int64],
    experts: Sequence[int],
    *,
    paired: bool = False,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Change:
    """Whether two runs differ by more than the draw of their prompts, in which layers and which experts.

    Experts of different prompts: as in `moescope.stats.split_shares`. Experts of the same prompts: a t test on the
    differences by split. Layers: Σ (p - q)² / (p + q), for small differences in proportion to the Jensen-Shannon
    divergence, against the same of noise alone: each split's residual around its run's share without it, with a random
    sign, the wild cluster bootstrap of A. Cameron, J. Gelbach, D. Miller (Rev. Econ. Stat. 90, 2008). The correction
    for layers is that of P. Westfall, S. Young (Resampling-based multiple testing, 1993): the largest over all layers,
    each relative to its mean under noise.

    Args:
        reference: (S, L, E) int64, selections by split of the first run's prompts.
        other: (S, L, E) int64, of the second's.
        experts: (L,) routed experts; columns beyond a layer's number are ignored.
        paired: the runs had the same prompts in the same splits: two models, or two settings, over one prompt set with
            one seed. What the prompts share then cancels, and smaller differences are seen.
        seed: seed of the signs.
        replicates: draws of the noise; a p-value of a layer is at least 1 / (replicates + 1).

    Raises:
        ValueError: if shapes disagree or `replicates` is below 1.
    """
    if reference.shape != other.shape or reference.ndim != 3:
        raise ValueError(f"got splits of shape {reference.shape} and {other.shape}")
    if reference.shape[1] != len(experts):
        raise ValueError(f"got splits of {reference.shape[1]} layers and {len(experts)} expert numbers")
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, got {replicates}")
    both = np.where(padding_mask(experts, reference.shape[2]), 0, np.stack([reference, other], axis=1))
    shares = split_shares(both, experts)
    residuals = _residuals(both, shares)
    # a split pulls its run's share towards itself, the more the larger it is: as the jackknife, scale that back
    part = both.sum(axis=3) / np.maximum(shares.totals, 1)
    outlying = residuals / np.where(part < 1, 1 - part, np.nan)[..., None]
    if paired:
        noise = outlying[:, 1] - outlying[:, 0]
        first, second = shares.share()
        difference = second - first
        held = np.where((shares.splits > 1).all(axis=0), shares.splits.min(axis=0), np.nan)[:, None]
        error = np.sqrt(positive(np.square(noise).sum(axis=0) * (held - 1) / held))
        p_value = 2 * stdtr(held - 1, -np.abs(difference) / error)
    else:
        noise = np.concatenate([outlying[:, 0], outlying[:, 1]])
        contrast = contrast_of_two(shares)
        difference, p_value = contrast.difference, contrast.p_value
    layer_p_value, layer_p_corrected = _layer_tests(noise, shares, seed, replicates)
    return Change(
        layer_p_value=layer_p_value,
        layer_p_corrected=layer_p_corrected,
        difference=np.where(padding_mask(experts, reference.shape[2]), np.nan, difference),
        p_value=p_value,
        p_corrected=holm(p_value),
        paired=paired,
        replicates=replicates,
        seed=seed,
    )


def all_distances(runs: Sequence[NDArray[np.float64]], experts: Sequence[int]) -> Distances:
    """Distance of every run from every other.

    Args:
        runs: N arrays (L, E), counts or shares.
        experts: (L,) routed experts; columns beyond a layer's number are ignored.

    Returns:
        Both distances as (N, N, L) float64, symmetric, 0 on the diagonal; NaN where a row sums to 0 or holds a NaN.

    Raises:
        ValueError: if shapes disagree.
    """
    shape = (len(runs), len(runs), len(experts))
    divergence, variation = np.empty(shape), np.empty(shape)
    for row, one in enumerate(runs):
        for column, two in enumerate(runs[: row + 1]):
            found = distances(one, two, experts)
            divergence[row, column] = divergence[column, row] = found.jensen_shannon
            variation[row, column] = variation[column, row] = found.total_variation
    return Distances(divergence, variation)


def _residuals(both: NDArray[np.int64], shares: SplitShares) -> NDArray[np.float64]:
    """(S, 2, L, E) what each split adds to its run's share beyond its part; sums to 0 over splits."""
    totals = positive(shares.totals)[:, :, None]
    residuals: NDArray[np.float64] = (both - shares.counts / totals * both.sum(axis=3, keepdims=True)) / totals
    return residuals


def _layer_tests(
    noise: NDArray[np.float64], shares: SplitShares, seed: int, replicates: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(L,) p-values, plain and corrected, of the distance between two runs against signed sums of `noise` (N, L, E)."""
    first, second = shares.share()
    scale = 1 / np.sqrt(np.where(first + second > 0, first + second, np.inf))
    testable = shares.splits.min(axis=0) > 1
    flat = np.where(testable[None, :, None], noise * scale, 0.0).reshape(len(noise), -1)
    rng = np.random.default_rng(seed)
    drawn = np.empty((replicates, len(testable)))
    for start in range(0, replicates, 64):  # a few at a time: all would take many times the memory of the profile
        block = drawn[start : start + 64]
        signs = rng.choice([-1.0, 1.0], size=(len(block), len(noise)))
        block[:] = np.square((signs @ flat).reshape(len(block), *scale.shape)).sum(axis=2)
    observed = np.where(testable, np.square((second - first) * scale).sum(axis=1), np.nan)
    level = positive(drawn.mean(axis=0))
    largest = np.nan_to_num(drawn / level).max(axis=1)
    plain = (1 + (drawn >= observed).sum(axis=0)) / (replicates + 1)
    relative = observed / level
    corrected = (1 + np.greater_equal.outer(largest, relative).sum(axis=0)) / (replicates + 1)
    known = np.isfinite(relative)
    return np.where(known, plain, np.nan), np.where(known, corrected, np.nan)


def _distributions(values: NDArray[np.float64], experts: Sequence[int]) -> NDArray[np.float64]:
    """Rows scaled to sum 1, padding 0; a row that cannot be is NaN."""
    inside = np.where(padding_mask(experts, values.shape[1]), 0.0, values)
    totals = inside.sum(axis=1)
    scaled: NDArray[np.float64] = inside / np.where(totals > 0, totals, np.nan)[:, None]
    return scaled


def _over(value: NDArray[np.float64], level: NDArray[np.float64]) -> NDArray[np.float64]:
    """Value over level, NaN where the level is 0 or NaN."""
    ratio: NDArray[np.float64] = value / np.where(level > 0, level, np.nan)
    return ratio


def _moved(
    reference: Activation, other: Activation, difference: NDArray[np.float64], top: int
) -> tuple[ExpertMove, ...]:
    """The cells of the largest absolute difference; ties in order of layer and expert."""
    size = np.nan_to_num(np.abs(difference), nan=0.0).ravel()
    order = np.argsort(-size, kind="stable")[:top]
    rows, columns = np.unravel_index(order[size[order] > 0], difference.shape)
    return tuple(
        ExpertMove(
            reference.layers[row], column, float(reference.matrix[row, column]), float(other.matrix[row, column])
        )
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
    )
