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

RAMPS = ((0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0))
"""Stretches, as shares of the depth, over which a part of the alignment may fade in or out with depth: too long for any
period that is looked at, which is at most half of the depth."""

LARGEST_ALIGNMENT = 0.999
"""Share of a layer that is aligned at most, so that no two layers are equal."""

PASSES = 2
"""Fits in turn: the first with equal weights, the next by what is left of the spread of so high a correlation."""

LEAST_SPREAD = 0.05
"""Spread, as 1 - r², below which a correlation is not weighted any higher."""

JUMP_ERROR = 0.6
"""Jumps are believed where they leave less than this share of the squared error; blocks leave about a third."""

NEIGHBOURHOOD = 7
"""Steps between layers among which a jump is looked for."""

USUAL_PERCENTILE = 70


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
    """Fit alignment that only decays with distance and changes slowly with depth.

    Two layers share independent parts. A part correlates by ρ^t or exp(-(t/ℓ)²/2) at distance t, and is there in all
    depths alike, or fades in or out along a ramp: over layers i and j it is e(i) e(j) κ(|i - j|). Their weights, none
    negative, are fitted by least squares over all pairs (C. L. Lawson and R. J. Hanson, Solving Least Squares Problems,
    1974), each weighted by the precision 1/(1 - r²) of its correlation: any mixture of exponential decays, a plateau,
    drifts from one alignment to another, alignment that depth strengthens or weakens, and noise of each layer's own.
    All parts fall with distance and change slowly with depth, so a period cannot enter, and all are positive definite,
    so their mixture is.

    A second fit adds parts that fall in jumps: the more a correlation of neighbours falls short of its surroundings,
    the further they lie apart, so that layers in blocks lie together. It is taken where it leaves much less of the
    squared error.

    Args:
        correlation: (n, n) float64, correlation of the layers, n ≥ 2.
        positions: (n,) float64, ascending, where the layers lie.
        experts: experts behind each correlation.
    """
    depth = positions[-1] - positions[0]
    strengths = _strengths((positions - positions[0]) / depth)
    decays = _decays(positions, depth)
    slow = (strengths[..., None] * decays[:, :, None, :]).reshape(*correlation.shape, -1)
    even, even_error = _fit(slow, correlation)
    best = SmoothAlignment(even, positions, jumps=False)
    neighbours = correlation.diagonal(1)
    usual = percentile_filter(neighbours, USUAL_PERCENTILE, size=NEIGHBOURHOOD, mode="nearest")
    fall = np.maximum(usual - neighbours - (1 - usual**2) / np.sqrt(max(experts - 1, 1)), 0.0)
    if fall.any():
        moved = positions[0] + depth * np.concatenate([[0.0], np.cumsum(fall / fall.sum())])
        uneven, uneven_error = _fit(np.concatenate([slow, _decays(moved, depth)], axis=2), correlation)
        if uneven_error < JUMP_ERROR * even_error:
            best = SmoothAlignment(uneven, moved, jumps=True)
    return best


def _strengths(place: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, n, S) product of a part's strengths in two layers; `place` (n,) is their depth from 0 to 1."""
    rising = np.stack([np.interp(place, ramp, (0.0, 1.0)) for ramp in RAMPS], axis=1)
    strength = np.concatenate([np.ones((len(place), 1)), rising, 1 - rising], axis=1)
    products: NDArray[np.float64] = strength[:, None] * strength
    return products


def _decays(positions: NDArray[np.float64], depth: float) -> NDArray[np.float64]:
    """(n, n, K) how a part of strength 1 correlates between two layers."""
    distance = np.abs(positions[:, None] - positions)[..., None]
    lengths = np.asarray(TREND_LENGTHS) * depth
    return np.concatenate([np.asarray(DECAYS) ** distance, np.exp(-0.5 * (distance / lengths) ** 2)], axis=2)


def _fit(parts: NDArray[np.float64], seen: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Mixture (n, n) of parts (n, n, T) that is closest to the correlation seen (n, n), and its squared error."""
    above = np.triu_indices(len(seen), 1)
    columns = parts[above]
    precision = np.ones(len(columns))
    for _ in range(PASSES):
        mixture = parts @ _weights(columns * precision[:, None], seen[above] * precision)
        aligned = np.maximum(mixture.diagonal(), np.finfo(float).tiny)
        shrunk = np.sqrt(np.minimum(1.0, LARGEST_ALIGNMENT / aligned))
        mixture *= shrunk[:, None] * shrunk
        precision = 1 / np.maximum(1 - mixture[above] ** 2, LEAST_SPREAD)
    error = float(np.square(seen[above] - mixture[above]).sum())
    np.fill_diagonal(mixture, 1.0)
    return mixture, error


def _weights(columns: NDArray[np.float64], seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights ≥ 0 of the columns by least squares."""
    # normal equations: some hundred columns over thousands of pairs; the ridge keeps near twins apart
    gram = columns.T @ columns
    gram += 1e-8 * np.trace(gram) / len(gram) * np.eye(len(gram))
    factor = np.linalg.cholesky(gram)
    weights, _ = nnls(factor.T, np.linalg.solve(factor, columns.T @ seen))
    found: NDArray[np.float64] = weights
    return found
