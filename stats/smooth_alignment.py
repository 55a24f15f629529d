"""Layers whose profiles are alike the more, the nearer they lie: the alternative that a period has to beat."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import percentile_filter
from scipy.optimize import nnls

DECAYS = (0.3, 0.5, 0.65, 0.75, 0.82, 0.87, 0.91, 0.94, 0.96, 0.975, 0.985, 0.993, 1.0)
"""What is left of a correlation after one layer; 1 is an alignment that all layers share."""

TREND_LENGTHS = (0.25, 0.5, 1.0)
"""Lengths, as shares of the depth, of drifts so smooth that they have no kink at distance 0."""

LARGEST_ALIGNMENT = 0.999
"""Sum of the weights at most, so that no two layers are equal."""

PASSES = 2
"""Fits in turn: the first with equal weights, the next by what is left of the spread of so high a correlation."""

LEAST_SPREAD = 0.05
"""Spread, as 1 - r², below which a correlation is not weighted any higher."""

JUMP_ERROR = 0.6
"""Jumps are believed where they leave less than this share of the squared error; blocks leave about a third."""

NEIGHBOURHOOD = 7
"""Steps between layers among which a jump is looked for."""

USUAL_PERCENTILE = 70
STEP_FLOOR = 0.02
"""Share of the depth that is spread evenly even where correlation falls only in jumps."""


@dataclass(frozen=True, slots=True, eq=False)
class SmoothAlignment:
    """A covariance of layers without any period.

    Attributes:
        correlation: (n, n) float64, positive definite, diagonal 1.
        positions: (n,) float64, where each layer lies; evenly but for jumps, the ends where they are.
        jumps: whether the correlation falls at some steps rather than evenly: layers in blocks.
    """

    correlation: NDArray[np.float64]
    positions: NDArray[np.float64]
    jumps: bool


def smooth_alignment(correlation: NDArray[np.float64], positions: NDArray[np.float64], experts: int) -> SmoothAlignment:
    """Fit alignment that only decays with distance.

    Between two layers at distance t it is Σ a_k ρ_k^t + Σ b_m exp(-(t/ℓ_m)²/2) with weights a, b ≥ 0 by least squares
    over all pairs (C. L. Lawson and R. J. Hanson, Solving Least Squares Problems, 1974), each weighted by the precision
    1/(1 - r²) of its correlation: any mixture of exponential decays, a plateau, slow drifts, and noise of each layer's
    own. All terms fall with t, so a period cannot enter, and all are positive definite, so their mixture is.

    A second fit moves the layers: the more a correlation of neighbours falls short of its surroundings, the longer the
    step, so that layers in blocks lie together. It is taken where it leaves much less of the squared error.

    Args:
        correlation: (n, n) float64, correlation of the layers, n ≥ 2.
        positions: (n,) float64, ascending, where the layers lie.
        experts: experts behind each correlation.
    """
    first, second = np.triu_indices(len(positions), 1)
    seen = correlation[first, second]
    degrees = max(experts - 1, 1)
    even, even_error = _fit(positions, seen)
    best = SmoothAlignment(even, positions, jumps=False)
    neighbours = correlation.diagonal(1)
    usual = percentile_filter(neighbours, USUAL_PERCENTILE, size=NEIGHBOURHOOD, mode="nearest")
    fall = np.maximum(usual - neighbours - (1 - usual**2) / np.sqrt(degrees), 0.0)
    if fall.any():
        depth = positions[-1] - positions[0]
        steps = (1 - STEP_FLOOR) * depth * fall / fall.sum() + STEP_FLOOR * np.diff(positions)
        moved = positions[0] + np.concatenate([[0.0], np.cumsum(steps)])
        uneven, uneven_error = _fit(moved, seen)
        if uneven_error < JUMP_ERROR * even_error:
            best = SmoothAlignment(uneven, moved, jumps=True)
    return best


def _fit(positions: NDArray[np.float64], seen: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Covariance (n, n) at these positions that is closest to what is seen, and its squared error."""
    distance = np.abs(positions[:, None] - positions)
    lengths = np.asarray(TREND_LENGTHS) * (positions[-1] - positions[0])
    terms = np.concatenate(
        [np.asarray(DECAYS) ** distance[..., None], np.exp(-0.5 * (distance[..., None] / lengths) ** 2)], axis=-1
    )
    above = np.triu_indices(len(positions), 1)
    columns = terms[above]
    precision = np.ones(len(seen))
    for _ in range(PASSES):
        weights = _weights(columns * precision[:, None], seen * precision)
        precision = 1 / np.maximum(1 - (columns @ weights) ** 2, LEAST_SPREAD)
    covariance = terms @ weights
    error = float(np.square(seen - covariance[above]).sum())
    np.fill_diagonal(covariance, 1.0)
    return covariance, error


def _weights(columns: NDArray[np.float64], seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights ≥ 0 of the terms, of sum below 1, by least squares."""
    # normal equations: a handful of columns over thousands of pairs; the ridge keeps near twins apart
    gram = columns.T @ columns
    gram += 1e-8 * np.trace(gram) / len(gram) * np.eye(len(gram))
    factor = np.linalg.cholesky(gram)
    weights, _ = nnls(factor.T, np.linalg.solve(factor, columns.T @ seen))
    scaled: NDArray[np.float64] = weights * min(1.0, LARGEST_ALIGNMENT / max(weights.sum(), np.finfo(float).tiny))
    return scaled
