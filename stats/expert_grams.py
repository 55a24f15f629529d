"""All experts of a layer against all of another: the cosines that their inner products give."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CENTRED_NOISE = 1e-6
"""Square of what centring leaves of an expert of length 1, below which it is float32 rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class PairGrams:
    """Inner products of the experts of two layers.

    Attributes:
        left: (P, E, E) float64, within the first layer, by part; row and column NaN for a non-finite expert.
        between: (P, E, E) float64, cell (e, f) is expert e of the first with expert f of the second.
        right: (P, E, E) float64, within the second layer.
    """

    left: NDArray[np.float64]
    between: NDArray[np.float64]
    right: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class CentredPair:
    """Usable experts of two layers without what their layer shares, by their inner products.

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


def without_faults(total: NDArray[np.float64], spoilt: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Inner products within a layer (P, E, E), NaN for experts (E,) that are not finite or whose squares are not."""
    left_out = spoilt | ~np.isfinite(_diagonal(total)).all(axis=0)
    return np.where(left_out[:, None] | left_out[None, :], np.nan, total)


def pair_grams(left: NDArray[np.float64], between: NDArray[np.float64], right: NDArray[np.float64]) -> PairGrams:
    """Join sums of two layers: those within each (`without_faults`), and those between them, all (P, E, E)."""
    spoilt = np.isnan(_diagonal(left))[:, :, None] | np.isnan(_diagonal(right))[:, None, :]
    return PairGrams(left=left, between=np.where(spoilt, np.nan, between), right=right)


def within_cosine(gram: NDArray[np.float64]) -> float:
    """Mean cosine of two different experts of a layer, not centred; NaN with fewer than two usable experts.

    Experts that were all copied from one dense layer have this near 1.

    Args:
        gram: (P, E, E) float64, of `without_faults`.
    """
    cosine = raw_cosine(PairGrams(left=gram, between=gram, right=gram))
    apart = cosine[np.isfinite(cosine) & ~np.eye(len(cosine), dtype=np.bool_)]
    return float(apart.mean()) if apart.size else float("nan")


def raw_cosine(grams: PairGrams) -> NDArray[np.float64]:
    """(E, E) float64 cosine of the concatenated parts as they are; NaN for unusable experts in their own cells."""
    left, right = (np.sqrt(_diagonal(gram).sum(axis=0)) for gram in (grams.left, grams.right))
    first, second = (np.where(length > 0, length, np.nan) for length in (left, right))
    cosine: NDArray[np.float64] = np.clip(grams.between.sum(axis=0) / np.outer(first, second), -1.0, 1.0)
    return cosine


def centre(grams: PairGrams) -> CentredPair:
    """Take away what all experts of a layer share.

    Every part of every expert is first scaled to length 1 (a zero part stays zero), so that no part and no expert makes
    up the mean by itself. Then the direction m of the layer's mean expert is projected out: ã_e = a_e − m ⟨a_e, m⟩/⟨m,
    m⟩. Subtracting m, as in `similarity_from_sums`, is this with ⟨a_e, m⟩ equal for all experts; where experts hold
    different amounts of what is shared, subtraction leaves the difference, and layers that share m look alike. The ã of
    a layer sum to zero.

    All inner products of ã follow from those of a, K_a = AAᵀ, C = ABᵀ: with k_a = K_a 1/(1ᵀK_a 1),
    ÃÃᵀ = K_a − k_a 1ᵀK_a and ÃB̃ᵀ = (I − k_a 1ᵀ) C (I − 1 k_bᵀ). Zero and non-finite experts are left out, and so are
    experts of which nothing but the mean is left within rounding.
    """
    first, second = (_usable(gram) for gram in (grams.left, grams.right))
    scale_left, scale_right = (_scale(gram) for gram in (grams.left, grams.right))
    whole_left = (grams.left * scale_left[:, :, None] * scale_left[:, None, :]).sum(axis=0)
    whole_right = (grams.right * scale_right[:, :, None] * scale_right[:, None, :]).sum(axis=0)
    whole_between = (grams.between * scale_left[:, :, None] * scale_right[:, None, :]).sum(axis=0)
    while True:
        left, right = _kept(whole_left, first, first), _kept(whole_right, second, second)
        from_left, from_right = _without_mean(left), _without_mean(right)
        between = from_left @ _kept(whole_between, first, second) @ from_right.T
        left, right = from_left @ left @ from_left.T, from_right @ right @ from_right.T
        squares = np.diagonal(left), np.diagonal(right)
        if all((square > CENTRED_NOISE).all() for square in squares):
            break
        first[np.flatnonzero(first)[squares[0] <= CENTRED_NOISE]] = False
        second[np.flatnonzero(second)[squares[1] <= CENTRED_NOISE]] = False
    cosine = np.clip(between / np.sqrt(np.outer(*squares)), -1.0, 1.0)
    return CentredPair(left, between, right, np.flatnonzero(first), np.flatnonzero(second), cosine)


def _diagonal(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """(P, E) squared lengths from (P, E, E)."""
    square: NDArray[np.float64] = np.einsum("pee->pe", gram)
    return square


def _usable(gram: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(E,) true where an expert is finite and not zero."""
    usable: NDArray[np.bool_] = np.asarray(_diagonal(gram).sum(axis=0) > 0)
    return usable


def _scale(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """(P, E) what makes each part of length 1; zero where it is zero."""
    square = _diagonal(gram)
    positive = square > 0
    return np.where(positive, 1.0 / np.sqrt(np.where(positive, square, 1.0)), 0.0)


def _kept(gram: NDArray[np.float64], rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The cells of usable experts."""
    return np.nan_to_num(gram[np.ix_(rows, columns)])


def _without_mean(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """(m, m) matrix I − k 1ᵀ that projects a layer's mean expert out; the identity if the mean is zero."""
    shared = gram.sum(axis=1)
    total = shared.sum()
    identity = np.eye(len(gram))
    if total <= CENTRED_NOISE * np.trace(gram):
        return identity
    projection: NDArray[np.float64] = identity - shared[:, None] / total
    return projection
