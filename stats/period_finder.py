"""Does some period stand out, though nobody named it beforehand, and though near layers may be alike anyway?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from moescope.stats.activation import Activation, Measure
from moescope.stats.pairwise import pairwise_pearson
from moescope.stats.reliability import CONFIDENCE, check_splits, jackknife
from moescope.stats.smooth_alignment import SmoothAlignment, smooth_alignment
from moescope.stats.standardised import (
    StandardisedRows,
    chunk_sizes,
    normal_scores,
    random_orders,
    rank_rows,
    standardised_rows,
)

SIMULATIONS = 2000
LEVEL = 0.05
POWER = 0.8
FEWEST_PAIRS = 3
QUANTILES = (0.025, 0.5, 0.975)
TIE = 1e-6
LEAST_VARIANCE = 1e-9
"""Contrasts are single precision: their spread is never taken for less."""


@dataclass(frozen=True, slots=True, eq=False)
class PeriodNull:
    """What a scan of all periods gives where there is none.

    Attributes:
        mean: (P,) float64, mean of the statistic, over the simulated scans and the observed one.
        sd: (P,) float64, its standard deviation.
        effect_quantiles: (3, P) float64, 2.5%, 50% and 97.5% quantiles of the effect.
        p: (P,) float64, for each period as if nobody had looked at another.
        p_family: (P,) float64, for each period given that all were looked at: against the largest standardised
            statistic of a scan.
        p_period: p-value for "there is a period", the smallest of `p_family`; NaN where nothing could be scanned.
        threshold: (P,) float64, statistic above which `p_family` is below 5%.
        detectable: (P,) float64, the smallest effect that would be found four times out of five, at the 5% level of the
            family.
        simulations: scans simulated.
    """

    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    effect_quantiles: NDArray[np.float64]
    p: NDArray[np.float64]
    p_family: NDArray[np.float64]
    p_period: float
    threshold: NDArray[np.float64]
    detectable: NDArray[np.float64]
    simulations: int


@dataclass(frozen=True, slots=True)
class Harmonic:
    """A multiple of the period.

    Attributes:
        delta: distance in model layers.
        pairs: pairs of layers behind `contrast`.
        correlation: mean Pearson correlation of the pairs at this distance, the documented number.
        contrast: how far the correlation of normal scores lies above that of the neighbouring distances.
    """

    delta: int
    pairs: int
    correlation: float
    contrast: float


@dataclass(frozen=True, slots=True, eq=False)
class PeriodFinding:
    """All periods that fit into the model twice, against two kinds of nothing.

    Attributes:
        kind: the activation measure it rests on.
        periods: (P,) periods scanned, in model layers; empty where the model is too shallow.
        pairs: (P,) int64, pairs of layers at the period and its multiples.
        effect: (P,) float64, mean contrast over these pairs: by how much layers at a multiple of the period correlate
            more than layers one nearer and one further apart. In correlations of normal scores, as measured: noise of
            short runs weakens it.
        effect_interval: (2, P) float64, 95% interval by jackknife over splits of the prompts; NaN without splits.
        statistic: (P,) float64, Student's t of the contrasts, as a normal deviate.
        unaligned: against experts in random order: no alignment of any kind.
        smooth: against alignment that decays with the distance between layers, in blocks, or drifts with depth.
        model: the smooth alignment that was fitted; None where nothing could be scanned.
        p: p-value for "there is a period": that of `smooth`, which has no alignment as a special case.
        period: the period found, in model layers, or None: both nulls are rejected at the 5% level; of periods and
            multiples that reach it, the one that explains most.
        harmonics: the period and its multiples; empty without.
        seed: seed of the simulations.
    """

    kind: Measure
    periods: tuple[int, ...]
    pairs: NDArray[np.int64]
    effect: NDArray[np.float64]
    effect_interval: NDArray[np.float64]
    statistic: NDArray[np.float64]
    unaligned: PeriodNull
    smooth: PeriodNull
    model: SmoothAlignment | None
    p: float
    period: int | None
    harmonics: tuple[Harmonic, ...]
    seed: int

    @property
    def looks(self) -> int:
        """Periods that were looked at."""
        return len(self.periods)

    @property
    def smallest_detectable(self) -> float:
        """Smallest effect that this run could have seen at the period where it sees best; NaN without a scan."""
        return float(self.smooth.detectable.min()) if self.periods else float("nan")


def find_period(
    activation: Activation,
    split_counts: NDArray[np.int64] | None = None,
    simulations: int = SIMULATIONS,
    seed: int = 0,
) -> PeriodFinding:
    """Scan all periods and hold the best against what a scan finds where there is none.

    Every pair of layers gets a contrast: its correlation less half that of the pairs one layer nearer and half that of
    the pairs one layer further apart, at either end. Whatever is smooth in distance and depth cancels. A period's
    statistic is Student's t of the contrasts at all its multiples. As it is measured in their own spread, it does not
    grow where neighbouring layers are nearly copies. Profiles are taken as normal scores of their ranks, so that no
    single busy expert decides.

    Both nulls simulate whole sets of profiles with each layer's own values and pass them through the same scan: means
    over overlapping pairs keep their dependence, and the largest of many looks is held against the largest of as many.
    The first puts experts into random order. The second gives them the correlation of `smooth_alignment`: only against
    it "period" means more than "near layers are alike".

    Args:
        activation: the vectors to compare, one a layer. Layers with another number of experts than most, constant ones
            and those without records take no part.
        split_counts: (S, L, E) int64, selections by split of the prompts, for intervals where the measure is the
            frequency; None without.
        simulations: scans to simulate for each null.
        seed: the same seed gives the same p-values.

    Raises:
        ValueError: if `simulations` is below 1, or shapes disagree.
    """
    if simulations < 1:
        raise ValueError(f"simulations must be at least 1, got {simulations}")
    rows = _scores(activation.matrix, activation.experts)
    comb = _Comb(np.asarray(activation.layers, dtype=np.int64)[rows.index])
    observed = comb.scan(rows.values[None].astype(np.float32))
    unaligned_seed, smooth_seed = np.random.SeedSequence(seed).spawn(2)
    model = smooth_alignment(rows.correlation, comb.position, rows.width) if comb.periods.size else None
    unaligned = _null(comb, observed, _unaligned(rows, comb, simulations, unaligned_seed), simulations)
    smooth = _null(comb, observed, _smooth(rows, comb, model, simulations, smooth_seed), simulations)
    effect = observed.effect[0]
    reached = (unaligned.p_family <= LEVEL) & (smooth.p_family <= LEVEL)
    # a multiple of the true period shares its contrasts but has fewer pairs: the sum explained picks the period itself
    best = int(np.argmax(np.where(reached, effect * np.sqrt(comb.pairs), -np.inf))) if reached.any() else None
    return PeriodFinding(
        kind=activation.kind,
        periods=tuple((comb.periods * comb.unit).tolist()),
        pairs=comb.pairs,
        effect=effect,
        effect_interval=_intervals(activation, split_counts, rows.index, comb),
        statistic=observed.statistic[0],
        unaligned=unaligned,
        smooth=smooth,
        model=model,
        p=smooth.p_period,
        period=None if best is None else int(comb.periods[best] * comb.unit),
        harmonics=() if best is None else _harmonics(activation, rows, comb, int(comb.periods[best])),
        seed=seed,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Scan:
    """Statistic, effect and the effect's standard error (B, P) of B sets of profiles."""

    statistic: NDArray[np.float64]
    effect: NDArray[np.float64]
    error: NDArray[np.float64]


class _Comb:
    """Contrasts between pairs of layers on an even grid, gathered by period."""

    def __init__(self, layers: NDArray[np.int64]) -> None:
        """Lay out the pairs.

        Args:
            layers: (n,) true model indices of the layers that take part, ascending.
        """
        steps = np.diff(layers)
        # where only every second layer is an MoE layer, that is the step
        self.unit = int(np.gcd.reduce(steps)) if len(steps) else 1
        self.slot = (layers - layers[:1]) // self.unit
        self.position = self.slot.astype(np.float64)
        self.size = int(self.slot[-1]) + 1 if len(layers) else 0
        present = np.zeros(self.size, bool)
        present[self.slot] = True
        self.pair = np.triu(present[:, None] & present, 1).astype(np.float32)
        nearer, further = _neighbour_sums(self.pair[None])
        self.cells = np.flatnonzero((self.pair > 0) & (nearer[0] > 0) & (further[0] > 0))
        self.nearer_share = (0.5 / np.maximum(nearer[0], 1)).astype(np.float32)
        self.further_share = (0.5 / np.maximum(further[0], 1)).astype(np.float32)
        self.gap = self.cells % max(self.size, 1) - self.cells // max(self.size, 1)
        scanned = np.arange(2, self.size // 2 + 1)
        pairs = np.array([(self.gap % period == 0).sum() for period in scanned], dtype=np.int64)
        self.periods, self.pairs = scanned[pairs >= FEWEST_PAIRS], pairs[pairs >= FEWEST_PAIRS]
        self.belongs = (self.gap[:, None] % self.periods == 0).astype(np.float32)

    def contrasts(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, C) contrast of each pair of layers, of B sets of standardised rows (B, n, E)."""
        grid = np.zeros((len(values), self.size, values.shape[2]), np.float32)
        grid[:, self.slot] = values
        correlation = (grid @ grid.swapaxes(1, 2)) * self.pair
        nearer, further = _neighbour_sums(correlation)
        contrast = correlation - nearer * self.nearer_share - further * self.further_share
        chosen: NDArray[np.float32] = contrast.reshape(len(values), -1)[:, self.cells]
        return chosen

    def scan(self, values: NDArray[np.float32]) -> _Scan:
        """Every period of B sets of standardised rows (B, n, E)."""
        contrast = self.contrasts(values)
        effect = (contrast @ self.belongs).astype(np.float64) / self.pairs
        squares = (contrast**2 @ self.belongs).astype(np.float64)
        degrees = self.pairs - 1
        error = np.sqrt(np.maximum((squares - self.pairs * effect**2) / degrees, LEAST_VARIANCE) / self.pairs)
        return _Scan(_normal_deviate(effect / error, degrees), effect, error)


def _neighbour_sums(matrix: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """For each cell of (B, G, G): sums over the cells one nearer to the diagonal, and over those one further."""
    nearer, further = np.zeros_like(matrix), np.zeros_like(matrix)
    nearer[:, :-1] += matrix[:, 1:]
    nearer[:, :, 1:] += matrix[:, :, :-1]
    further[:, 1:] += matrix[:, :-1]
    further[:, :, :-1] += matrix[:, :, 1:]
    return nearer, further


def _normal_deviate(t: NDArray[np.float64], degrees: NDArray[np.int64]) -> NDArray[np.float64]:
    """Student's t as a normal deviate of about the same probability (D. L. Wallace, Ann. Math. Stat. 30, 1959)."""
    deviate: NDArray[np.float64] = np.sign(t) * _wallace(degrees) * np.sqrt(degrees * np.log1p(t**2 / degrees))
    return deviate


def _student(deviate: NDArray[np.float64], degrees: NDArray[np.int64]) -> NDArray[np.float64]:
    """The t that `_normal_deviate` turns into this."""
    t: NDArray[np.float64] = np.sign(deviate) * np.sqrt(
        degrees * np.expm1((deviate / _wallace(degrees)) ** 2 / degrees)
    )
    return t


def _wallace(degrees: NDArray[np.int64]) -> NDArray[np.float64]:
    """Wallace's factor."""
    factor: NDArray[np.float64] = (8 * degrees + 1) / (8 * degrees + 3)
    return factor


def _scores(matrix: NDArray[np.float64], experts: Sequence[int]) -> StandardisedRows:
    """The layers that take part, as standardised normal scores."""
    return standardised_rows(normal_scores(rank_rows(matrix, experts), experts), experts)


def _unaligned(rows: StandardisedRows, comb: _Comb, simulations: int, seed: np.random.SeedSequence) -> Iterator[_Scan]:
    """Scans of the rows with experts in random order."""
    if not comb.periods.size:
        return
    values = rows.values.astype(np.float32)[None]
    rng = np.random.default_rng(seed)
    for orders in random_orders(rng, simulations, len(rows.index), np.zeros(rows.width, np.int64)):
        yield comb.scan(np.take_along_axis(values, orders, axis=2))


def _smooth(
    rows: StandardisedRows,
    comb: _Comb,
    model: SmoothAlignment | None,
    simulations: int,
    seed: np.random.SeedSequence,
) -> Iterator[_Scan]:
    """Scans of normal rows with the model's correlation, each given the values of the observed row in its own order."""
    if model is None:
        return
    root = np.linalg.cholesky(model.correlation).astype(np.float32)
    ordered = np.sort(rows.values, axis=1).astype(np.float32)
    rng = np.random.default_rng(seed)
    for size in chunk_sizes(simulations, max(rows.values.size, comb.size**2)):
        drawn = root @ rng.standard_normal((size, *rows.values.shape), dtype=np.float32)
        order = np.argsort(drawn, axis=2)
        np.put_along_axis(drawn, order, np.broadcast_to(ordered, drawn.shape), axis=2)
        yield comb.scan(drawn)


def _null(comb: _Comb, observed: _Scan, scans: Iterator[_Scan], simulations: int) -> PeriodNull:
    """What was observed against what was simulated."""
    parts = list(scans)
    if not parts:
        nothing = np.full(len(comb.periods), np.nan)
        return PeriodNull(
            nothing, nothing, np.stack([nothing] * 3), nothing, nothing, float("nan"), nothing, nothing, simulations
        )
    statistic = np.concatenate([part.statistic for part in parts])
    effect = np.concatenate([part.effect for part in parts])
    error = np.concatenate([part.error for part in parts])
    # the observed scan among them: as one of all it stands out no more often than any other, however few there are
    everything = np.concatenate([observed.statistic, statistic])
    mean = everything.mean(axis=0)
    sd = np.maximum(everything.std(axis=0), TIE)
    largest = ((statistic - mean) / sd).max(axis=1)
    found = (observed.statistic[0] - mean) / sd
    p_family = (1 + (largest[:, None] >= found - TIE).sum(axis=0)) / (1 + simulations)
    threshold = mean + sd * np.quantile(largest, 1 - LEVEL)
    return PeriodNull(
        mean=mean,
        sd=sd,
        effect_quantiles=np.quantile(effect, QUANTILES, axis=0),
        p=(1 + (statistic >= observed.statistic[0] - TIE).sum(axis=0)) / (1 + simulations),
        p_family=p_family,
        p_period=float(p_family.min()),
        threshold=threshold,
        # the effect that lifts a simulated scan above the threshold, for as many scans as the power asks for
        detectable=np.quantile(_student(threshold, comb.pairs - 1) * error - effect, POWER, axis=0),
        simulations=simulations,
    )


def _harmonics(activation: Activation, rows: StandardisedRows, comb: _Comb, period: int) -> tuple[Harmonic, ...]:
    """Each multiple of a period that has a contrast."""
    contrast = comb.contrasts(rows.values[None].astype(np.float32))[0]
    pearson = pairwise_pearson(activation.matrix, activation.experts)[np.ix_(rows.index, rows.index)]
    gap = comb.slot[None, :] - comb.slot[:, None]
    found = []
    for delta in range(period, comb.size, period):
        here = contrast[comb.gap == delta]
        if here.size:
            mean = float(pearson[gap == delta].mean())
            found.append(Harmonic(delta * comb.unit, int(here.size), mean, float(here.mean())))
    return tuple(found)


def _intervals(
    activation: Activation, split_counts: NDArray[np.int64] | None, index: NDArray[np.intp], comb: _Comb
) -> NDArray[np.float64]:
    """95% interval of each period's effect, by jackknife over splits."""
    unknown = np.full(len(comb.periods), np.nan)
    if split_counts is None or activation.kind != "frequency" or not unknown.size:
        return np.stack([unknown, unknown])
    check_splits(split_counts, activation.experts, activation.layers)
    used = split_counts[split_counts.any(axis=(1, 2))]

    def effects(without: int | None) -> NDArray[np.float64]:
        kept = np.delete(used, [] if without is None else [without], axis=0).sum(axis=0).astype(np.float64)
        rows = _scores(kept, activation.experts)
        if not np.array_equal(rows.index, index):  # a layer lives on this split alone
            return unknown
        effect: NDArray[np.float64] = comb.scan(rows.values[None].astype(np.float32)).effect[0]
        return effect

    effect, error = jackknife(effects, len(used))
    reach = stdtrit(max(len(used) - 1, 1), (1 + CONFIDENCE) / 2) * error
    return np.stack([effect - reach, effect + reach])
