"""Does the pattern of expert use come back every so many layers?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moescope.stats.activation import Measure
from moescope.stats.correlation import LayerCorrelation
from moescope.stats.pairwise import by_distance

Strength = Literal["strong", "moderate", "weak", "not measurable"]

STRONG = 0.7
MODERATE = 0.4
USUAL_INTERVALS = (12, 24, 36)
MOST_DEFAULT_INTERVALS = 12


@dataclass(frozen=True, slots=True)
class PeriodicPattern:
    """The correlations of all pairs of layers that lie one interval apart.

    Attributes:
        delta: the interval, in model layers.
        mean: mean over the measurable pairs; NaN if there is none.
        std: standard deviation over the measurable pairs (ddof 0); NaN if there is none.
        num_pairs: measurable pairs, those behind `mean` and `std`.
        starts: (P,) first layer of each pair the model has, in layer order.
        correlations: (P,) correlation of each pair, in layer order; NaN where it is not defined.
        strength: `strong` above 0.7, `moderate` above 0.4, else `weak`; `not measurable` without a measurable pair.
    """

    delta: int
    mean: float
    std: float
    num_pairs: int
    starts: tuple[int, ...]
    correlations: tuple[float, ...]
    strength: Strength


@dataclass(frozen=True, slots=True)
class PeriodicPatterns:
    """One pattern an interval, in the order asked for.

    Attributes:
        kind: the activation measure the correlations rest on.
        patterns: (I,) one result an interval.
    """

    kind: Measure
    patterns: tuple[PeriodicPattern, ...]


def periodic_patterns(correlation: LayerCorrelation, intervals: Sequence[int]) -> PeriodicPatterns:
    """Summarise the layer correlation at each interval.

    Intervals need not lie within the correlation's `delta_max`; one longer than the model gives no pair and a NaN mean.

    Args:
        correlation: correlation of every pair of layers.
        intervals: distances in model layers; repeats are dropped.

    Raises:
        ValueError: if an interval is below 1.
    """
    if any(interval < 1 for interval in intervals):
        raise ValueError(f"intervals must be at least 1, got {tuple(intervals)}")
    patterns = tuple(_pattern(correlation, int(delta)) for delta in dict.fromkeys(intervals))
    return PeriodicPatterns(kind=correlation.kind, patterns=patterns)


def default_intervals(layers: Sequence[int]) -> tuple[int, ...]:
    """Intervals worth looking at in a model of this depth.

    Args:
        layers: (L,) true model indices.

    Returns:
        Those of 12, 24 and 36 that at least two pairs of layers span; in a model too shallow for any of them, every
        distance that at least one pair spans, the shortest twelve at most.
    """
    present = set(layers)
    pairs = {delta: sum(layer + delta in present for layer in present) for delta in USUAL_INTERVALS}
    usual = tuple(delta for delta in USUAL_INTERVALS if pairs[delta] >= 2)
    if usual:
        return usual
    distances = {later - earlier for earlier in present for later in present if later > earlier}
    return tuple(sorted(distances)[:MOST_DEFAULT_INTERVALS])


def _pattern(correlation: LayerCorrelation, delta: int) -> PeriodicPattern:
    """Mean, spread and strength of the pairs `delta` apart."""
    present = set(correlation.layers)
    column = by_distance(correlation.pairwise, correlation.layers, (delta,))[:, 0]
    pairs = [
        (layer, r) for layer, r in zip(correlation.layers, column.tolist(), strict=True) if layer + delta in present
    ]
    measured = column[np.isfinite(column)]
    mean = float(measured.mean()) if measured.size else float("nan")
    return PeriodicPattern(
        delta=delta,
        mean=mean,
        std=float(measured.std()) if measured.size else float("nan"),
        num_pairs=int(measured.size),
        starts=tuple(layer for layer, _ in pairs),
        correlations=tuple(r for _, r in pairs),
        strength=_strength(mean),
    )


def _strength(mean: float) -> Strength:
    """Name of a mean correlation."""
    if np.isnan(mean):
        return "not measurable"
    if mean > STRONG:
        return "strong"
    return "moderate" if mean > MODERATE else "weak"
