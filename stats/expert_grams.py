"""All experts of a layer against all of another: inner products block by block, and the cosines they give."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CENTRED_NOISE = 1e-6
"""Square of what centring leaves of an expert of length 1, below which it is float32 rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class PairGrams:
    """Inner products of the experts of two layers.

    Attributes:
        left: (E, E) float64, within the first layer; row and column NaN for an unusable expert.
        between: (E, E) float64, cell (e, f) is expert e of the first with expert f of the second.
        right: (E, E) float64, within the second layer.
    """

    left: NDArray[np.float64]
    between: NDArray[np.float64]
    right: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class CentredPair:
    """Usable experts of two layers as unit vectors less their layer's mean, by their inner products.

    Attributes:
        left: (m, m) float64, within the first layer.
        between: (m, n) float64, between the layers.
        right: (n, n) float64, within the second layer.
        rows: (m,) expert indices of the first layer.
        columns: (n,) expert indices of the second layer.
        cosine: (m, n) float64, cosine of the centred experts.
    """

    left: NDArray[np.float64]
    between: NDArray[np.float64]
    right: NDArray[np.float64]
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    cosine: NDArray[np.float64]


class LayerGram:
    """Sums A Aᵀ of one layer over blocks A (E, n) of all its experts. State: E² float64."""

    def __init__(self, experts: int) -> None:
        """Start at zero, for E `experts`."""
        self.coordinates = 0
        self._total = np.zeros((experts, experts))
        self._spoilt = np.zeros(experts, dtype=np.bool_)

    def add(self, block: NDArray[np.float32]) -> None:
        """Add the same coordinates of every expert, (E, n) float32; any part, any size, any order.

        Raises:
            ValueError: if the block is not of E experts.
        """
        self._spoilt |= _add_product(self._total, block, block)
        self.coordinates += block.shape[1]

    def finish(self) -> NDArray[np.float64]:
        """(E, E) float64; rows and columns of experts that are not finite are NaN."""
        spoilt = self._spoilt | ~np.isfinite(np.diagonal(self._total))
        return np.where(spoilt[:, None] | spoilt[None, :], np.nan, self._total)

    def within_cosine(self) -> float:
        """Mean cosine of two different experts of the layer, not centred; NaN with fewer than two usable experts.

        Experts that were all copied from one dense layer have this near 1.
        """
        gram, usable = _unit(self.finish())
        count = int(usable.sum())
        return float((gram.sum() - np.trace(gram)) / (count * (count - 1))) if count > 1 else float("nan")


class CrossMatch:
    """Sums C = Σ_blocks A Bᵀ over blocks A, B (E, n) of two layers. State: E² float64."""

    def __init__(self, experts: int) -> None:
        """Start at zero, for E `experts` in each layer."""
        self.coordinates = 0
        self._total = np.zeros((experts, experts))

    def add(self, left: NDArray[np.float32], right: NDArray[np.float32]) -> None:
        """Add the same coordinates of every expert of both layers, (E, n) float32 each.

        Raises:
            ValueError: if the blocks differ in shape or are not of E experts.
        """
        _add_product(self._total, left, right)
        self.coordinates += left.shape[1]

    def finish(self, left: LayerGram, right: LayerGram) -> PairGrams:
        """Join the sums with those of the two layers, which are collected once a layer and not once a pair.

        Raises:
            ValueError: if the three were not given the same number of coordinates.
        """
        counts = (left.coordinates, self.coordinates, right.coordinates)
        if len(set(counts)) > 1:
            raise ValueError(f"layers and their pair saw different numbers of weights: {counts}")
        first, second = left.finish(), right.finish()
        spoilt = np.isnan(np.diagonal(first))[:, None] | np.isnan(np.diagonal(second))[None, :]
        return PairGrams(left=first, between=np.where(spoilt, np.nan, self._total), right=second)


def raw_cosine(grams: PairGrams) -> NDArray[np.float64]:
    """(E, E) float64 cosine of the experts as they are; NaN for zero and non-finite experts in their own cells."""
    lengths = [np.sqrt(np.diagonal(gram)) for gram in (grams.left, grams.right)]
    first, second = (np.where(length > 0, length, np.nan) for length in lengths)
    cosine: NDArray[np.float64] = np.clip(grams.between / np.outer(first, second), -1.0, 1.0)
    return cosine


def centre(grams: PairGrams) -> CentredPair:
    """Take each layer's mean expert away.

    Every expert is first scaled to length 1, so that a large one does not make up the mean by itself: ã_e = a_e/‖a_e‖ −
    (1/m) Σ_i a_i/‖a_i‖ over the m usable experts. With H = I − 1/m, all inner products of ã follow from those of a: ÃÃᵀ
    = H K H and ÃB̃ᵀ = H C H for the matrices of raw cosines K and C. Zero and non-finite experts are left out, and so
    are experts that equal the mean within rounding.
    """
    first, second = _unit(grams.left)[1], _unit(grams.right)[1]
    while True:
        left, _ = _unit(grams.left, first)
        right, _ = _unit(grams.right, second)
        between = np.nan_to_num(raw_cosine(grams)[np.ix_(first, second)])
        left, between, right = _double_centre(left), _double_centre(between), _double_centre(right)
        squares = np.diagonal(left), np.diagonal(right)
        if all((square > CENTRED_NOISE).all() for square in squares):
            break
        first[np.flatnonzero(first)[squares[0] <= CENTRED_NOISE]] = False
        second[np.flatnonzero(second)[squares[1] <= CENTRED_NOISE]] = False
    cosine = np.clip(between / np.sqrt(np.outer(*squares)), -1.0, 1.0)
    return CentredPair(left, between, right, np.flatnonzero(first), np.flatnonzero(second), cosine)


def _unit(
    gram: NDArray[np.float64], usable: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Cosines (m, m) among the m usable experts of a layer, and which of the E are usable."""
    square = np.diagonal(gram)
    chosen = square > 0 if usable is None else usable
    length = np.sqrt(square[chosen])
    return gram[np.ix_(chosen, chosen)] / np.outer(length, length), chosen


def _double_centre(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """H M H: the matrix less its row and column means."""
    if not matrix.size:
        return matrix
    halfway = matrix - matrix.mean(axis=0, keepdims=True)
    centred: NDArray[np.float64] = halfway - halfway.mean(axis=1, keepdims=True)
    return centred


def _add_product(
    total: NDArray[np.float64], left: NDArray[np.float32], right: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Add A Bᵀ to `total` (E, E), non-finite experts as zero; (E,) true for those of `left`.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if left.ndim != 2 or left.shape != right.shape or len(left) != len(total):
        raise ValueError(
            f"layers of different widths have no cosine: {left.shape}, {right.shape}, {len(total)} experts"
        )
    spoilt: NDArray[np.bool_] = np.logical_not(np.isfinite(left).all(axis=1))
    first = np.where(spoilt[:, None], np.float32(0.0), left) if spoilt.any() else left
    second = first
    if right is not left:
        other = np.logical_not(np.isfinite(right).all(axis=1))
        second = np.where(other[:, None], np.float32(0.0), right) if other.any() else right
    with np.errstate(over="ignore", invalid="ignore"):
        total += first @ second.T
    return spoilt
