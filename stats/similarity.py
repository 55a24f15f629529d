"""How alike the routers of different layers are, from their weights alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.stats.layout import check_ascending
from moescope.stats.pairwise import by_distance, pairwise_pearson


@dataclass(frozen=True, slots=True, eq=False)
class RouterSimilarity:
    """Similarity of router weights between layers.

    Attributes:
        cosine: (L, L) float64, cosine of the flattened router weights; NaN where shapes differ.
        row_norms: (L, E) float64, Euclidean norm of each expert's router row; padding is NaN.
        norm_correlation: (L, Δ) float64, Pearson over experts of the row norms of a layer and the one Δ further on.
            Elsewhere documented as "column norm": the router is stored there as (H, E).
        row_cosine: (L, Δ) float64, mean over experts of the cosine between the same expert's rows.
        row_cosine_pairs: (L, L) float64, the same for every pair of layers.
        deltas: (Δ,) distances in model layers, 1..delta_max.
        layers: (L,) true model indices.
        experts: (L,) routed experts of each layer.
    """

    cosine: NDArray[np.float64]
    row_norms: NDArray[np.float64]
    norm_correlation: NDArray[np.float64]
    row_cosine: NDArray[np.float64]
    row_cosine_pairs: NDArray[np.float64]
    deltas: tuple[int, ...]
    layers: tuple[int, ...]
    experts: tuple[int, ...]


def router_similarity(
    weights: NDArray[Any] | Sequence[NDArray[Any]], layers: Sequence[int], delta_max: int = 30
) -> RouterSimilarity:
    """Compare the router weights of every layer with those of every other.

    Layers of different shapes are not comparable: NaN. A zero or non-finite layer has no cosine; a zero or non-finite
    row is left out of `row_cosine`'s mean. Computed in float64, one copy of the weights.

    Args:
        weights: (L, E, H) floating, or L arrays (E, H); row e is the router direction of expert e.
        layers: (L,) true model indices, ascending.
        delta_max: largest distance of the matrices by Δ, in model layers.

    Raises:
        ValueError: if the number of weights and layers differ, a weight is not a matrix, layers do not ascend, or
            `delta_max` is below 1.
    """
    if len(weights) != len(layers):
        raise ValueError(f"got {len(weights)} router weights for {len(layers)} layers")
    if any(weight.ndim != 2 for weight in weights):
        raise ValueError("router weights must be (experts, hidden) matrices")
    check_ascending(layers)
    if delta_max < 1:
        raise ValueError(f"delta_max must be at least 1, got {delta_max}")

    depth = len(layers)
    experts = tuple(int(weight.shape[0]) for weight in weights)
    cosine = np.full((depth, depth), np.nan)
    row_cosine = np.full((depth, depth), np.nan)
    row_norms = np.full((depth, max(experts, default=0)), np.nan)
    for shape in dict.fromkeys(weight.shape for weight in weights):
        members = [row for row, weight in enumerate(weights) if weight.shape == shape]
        block = np.ix_(members, members)
        stack = np.stack([weights[row] for row in members], dtype=np.float64)
        row_norms[members, : shape[0]], cosine[block], row_cosine[block] = _compare(stack)

    return similarity_at_distances(cosine, row_norms, row_cosine, layers, experts, delta_max)


def similarity_at_distances(
    cosine: NDArray[np.float64],
    row_norms: NDArray[np.float64],
    row_cosine: NDArray[np.float64],
    layers: Sequence[int],
    experts: Sequence[int],
    delta_max: int = 30,
) -> RouterSimilarity:
    """View routers that were compared before by distance.

    Args:
        cosine: (L, L) float64, cosine of the flattened weights.
        row_norms: (L, E) float64, length of each expert's row; padding is NaN.
        row_cosine: (L, L) float64, mean over experts of the cosine between the same expert's rows.
        layers: (L,) true model indices, ascending.
        experts: (L,) routed experts of each layer.
        delta_max: largest distance, in model layers.

    Raises:
        ValueError: if `delta_max` is below 1.
    """
    if delta_max < 1:
        raise ValueError(f"delta_max must be at least 1, got {delta_max}")
    deltas = tuple(range(1, delta_max + 1))
    return RouterSimilarity(
        cosine=cosine,
        row_norms=row_norms,
        norm_correlation=by_distance(pairwise_pearson(row_norms, experts), layers, deltas),
        row_cosine=by_distance(row_cosine, layers, deltas),
        row_cosine_pairs=row_cosine,
        deltas=deltas,
        layers=tuple(int(layer) for layer in layers),
        experts=tuple(experts),
    )


def _compare(stack: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Row norms (n, E), layer cosine (n, n) and mean row cosine (n, n) of n routers (n, E, H); overwrites `stack`.

    Both cosines are Gram matrices: of the flattened layers, and of the flattened layers with every row scaled to
    length 1, since Σ_e cos(a_e, b_e) = ⟨â, b̂⟩.
    """
    norms = np.sqrt(np.einsum("leh,leh->le", stack, stack))
    finite = np.isfinite(norms)
    usable = finite & (norms > 0)
    stack[~finite] = 0.0
    flat = stack.reshape(len(stack), -1)

    length = np.sqrt(np.where(finite, norms**2, 0.0).sum(axis=1))
    comparable = finite.all(axis=1) & (length > 0)
    unit = np.where(comparable, length, np.nan)
    cosine = np.clip(flat @ flat.T / np.outer(unit, unit), -1.0, 1.0)

    stack /= np.where(usable, norms, 1.0)[:, :, None]
    shared = usable.astype(np.float64) @ usable.T
    row_cosine = np.clip(flat @ flat.T / np.where(shared > 0, shared, np.nan), -1.0, 1.0)
    return norms, cosine, row_cosine
