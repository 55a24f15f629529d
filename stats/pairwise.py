"""Every layer against every other in one matrix product, and the view of that by distance in the model."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.stats.layout import padding_mask

CONSTANT_TOLERANCE = 1e-12
"""A row whose spread is below this fraction of its size is constant: what is left of it is rounding noise."""


def pairwise_pearson(rows: NDArray[np.float64], widths: Sequence[int]) -> NDArray[np.float64]:
    """Pearson correlation of every row with every other.

    Rows are standardised once and multiplied once, so the cost is that of one (L, E) by (E, L) product.

    Args:
        rows: (L, E) float64; columns beyond a row's width are ignored.
        widths: (L,) entries of each row that count.

    Returns:
        (L, L) float64 within [-1, 1]. NaN where the two rows differ in width, or where either is constant (its spread
        within rounding of zero) or holds a value that is not finite.
    """
    rows = np.asarray(rows, dtype=np.float64)
    width = np.asarray(widths, dtype=np.int64)
    inside = ~padding_mask(widths, rows.shape[1])
    usable = (np.isfinite(rows) | ~inside).all(axis=1) & (width > 0)
    values = np.where(inside & usable[:, None], rows, 0.0)

    # Scaling by the largest entry keeps squares from under- or overflowing and makes the tolerance relative.
    largest = np.abs(values).max(axis=1, initial=0.0)
    values /= np.where(largest > 0, largest, 1.0)[:, None]
    mean = values.sum(axis=1) / np.maximum(width, 1)
    centred = np.where(inside, values - mean[:, None], 0.0)
    norm = np.sqrt(np.einsum("le,le->l", centred, centred))
    usable &= norm > CONSTANT_TOLERANCE * np.sqrt(np.maximum(width, 1))

    standardised = centred / np.where(usable, norm, 1.0)[:, None]
    correlation = np.clip(standardised @ standardised.T, -1.0, 1.0)
    comparable = (width[:, None] == width[None, :]) & usable[:, None] & usable[None, :]
    return np.where(comparable, correlation, np.nan)


def by_distance(pairwise: NDArray[np.float64], layers: Sequence[int], deltas: Sequence[int]) -> NDArray[np.float64]:
    """View an all-pairs matrix by starting layer and distance in model layers.

    Args:
        pairwise: (L, L) float64, value for each pair of layers.
        layers: (L,) true model indices.
        deltas: (D,) distances in model layers.

    Returns:
        (L, D) float64; cell (i, d) belongs to layer `layers[i]` and the layer `deltas[d]` further on, and is NaN where
        the model has no MoE layer there.
    """
    position = {layer: row for row, layer in enumerate(layers)}
    partner = np.array([[position.get(layer + delta, -1) for delta in deltas] for layer in layers], dtype=np.intp)
    partner = partner.reshape(len(layers), len(deltas))
    if not partner.size:
        return np.empty(partner.shape)
    start = np.arange(len(layers))[:, None]
    return np.where(partner >= 0, pairwise[start, partner], np.nan)


def finite_mean(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Mean along an axis over what is finite; NaN where nothing is.

    Args:
        values: float64, any shape.
        axis: the axis that the result lacks.
    """
    finite = np.isfinite(values)
    count = finite.sum(axis=axis)
    return np.where(count > 0, np.where(finite, values, 0.0).sum(axis=axis) / np.maximum(count, 1), np.nan)
