"""Rows of one width, each centred and of length 1, so that a correlation is an inner product."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from moescope.stats.pairwise import CONSTANT_TOLERANCE

CHUNK_VALUES = 1 << 20
"""Values of simulated profiles held at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class StandardisedRows:
    """The layers that can be compared with each other.

    Attributes:
        values: (n, E) float64, rows of mean 0 and length 1.
        index: (n,) their rows in the array they came from.
    """

    values: NDArray[np.float64]
    index: NDArray[np.intp]

    @property
    def width(self) -> int:
        """Experts of each row."""
        return int(self.values.shape[1])

    @property
    def correlation(self) -> NDArray[np.float64]:
        """(n, n) correlation of every row with every other."""
        product: NDArray[np.float64] = np.clip(self.values @ self.values.T, -1.0, 1.0)
        return product


def standardised_rows(matrix: NDArray[np.float64], experts: Sequence[int]) -> StandardisedRows:
    """Keep the layers of the commonest number of experts that vary and are finite, and standardise them.

    Args:
        matrix: (L, E) float64; columns beyond a layer's number of experts are ignored.
        experts: (L,) routed experts of each layer.
    """
    width = Counter(experts).most_common(1)[0][0] if len(experts) else 0
    index = np.flatnonzero(np.asarray(experts, dtype=np.int64) == width)
    rows = np.asarray(matrix[index, :width], dtype=np.float64)
    finite = np.isfinite(rows).all(axis=1) & (width > 0)
    index, rows = index[finite], rows[finite]
    largest = np.abs(rows).max(axis=1, initial=0.0)
    rows = rows / np.where(largest > 0, largest, 1.0)[:, None]
    centred = rows - rows.mean(axis=1, keepdims=True) if rows.size else rows
    length = np.linalg.norm(centred, axis=1)
    varies = length > CONSTANT_TOLERANCE * np.sqrt(max(width, 1))
    return StandardisedRows(centred[varies] / length[varies, None], index[varies])


def rank_rows(matrix: NDArray[np.float64], experts: Sequence[int]) -> NDArray[np.float64]:
    """Each row as ranks over its experts, ties at their mean; padding, and rows that are not finite, are NaN.

    Args:
        matrix: (L, E) float64.
        experts: (L,) routed experts of each layer.
    """
    ranks = np.full(matrix.shape, np.nan)
    for row, values, width in zip(ranks, matrix, experts, strict=True):
        own = values[:width]
        if np.isfinite(own).all():
            ordered = np.sort(own)
            row[:width] = (np.searchsorted(ordered, own, "left") + np.searchsorted(ordered, own, "right") + 1) / 2
    return ranks


def normal_scores(ranks: NDArray[np.float64], experts: Sequence[int]) -> NDArray[np.float64]:
    """Ranks as quantiles of the normal distribution, Φ⁻¹((rank - 3/8) / (E + 1/4)).

    No expert, however busy, then outweighs the others (G. Blom, Statistical Estimates and Transformed Beta-Variables,
    1958).

    Args:
        ranks: (L, E) float64, from `rank_rows`.
        experts: (L,) routed experts of each layer.
    """
    width = np.asarray(experts, dtype=np.float64)[:, None]
    scores: NDArray[np.float64] = ndtri((ranks - 0.375) / (width + 0.25))
    return scores


def random_orders(
    rng: np.random.Generator, count: int, rows: int, blocks: NDArray[np.int64]
) -> Iterator[NDArray[np.intp]]:
    """Random orders of the experts, a new one for each row, in chunks.

    Args:
        rng: source of randomness.
        count: sets of orders to draw.
        rows: rows of a set.
        blocks: (E,) ascending; experts change places only within the same number.

    Yields:
        (chunk, rows, E) positions.
    """
    for size in chunk_sizes(count, rows * len(blocks)):
        # sorting random keys; the whole part of a key keeps it in its block
        keys = rng.random((size, rows, len(blocks)), dtype=np.float32)
        yield np.argsort(keys + blocks.astype(np.float32), axis=2)


def chunk_sizes(count: int, values: int) -> list[int]:
    """Split `count` repetitions of `values` values each into chunks that fit into `CHUNK_VALUES`."""
    most = max(1, CHUNK_VALUES // max(values, 1))
    return [min(most, count - start) for start in range(0, count, most)]
