"""How alike the same expert's weights are in every two layers, from sums over a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.stats.pairwise import by_distance

Part = Literal["gate", "up", "down"]
Fault = Literal["zero", "non-finite"]

PARTS: tuple[Part, ...] = ("gate", "up", "down")

FLOAT32_NOISE = 1e-6
"""What centring leaves of an expert, as a fraction of its length, below which it is float32 rounding."""


@dataclass(frozen=True, slots=True)
class UnusableExpert:
    """An expert that has no cosine with any other.

    Attributes:
        layer: true model index.
        expert: index within the layer.
        fault: `zero`, all its weights are; or `non-finite`, some weight is, or the sum of its squares.
    """

    layer: int
    expert: int
    fault: Fault


@dataclass(frozen=True, slots=True, eq=False)
class ExpertSimilarity:
    """Cosine of the same expert index between all layers.

    Attributes:
        cosine: (E, L, L) float64, cosine of concat(gate, up, down); NaN for unusable experts, in their cells alone, and
            for pairs of layers that were not summed expert by expert.
        centred: (E, L, L) float64, the same after subtracting each layer's mean expert.
        part_cosine: (3, E, L, L) float64, cosine of gate, up, and down alone.
        part_centred: (3, E, L, L) float64, the same, centred.
        together: (L, L) float64, cosine of all experts of two layers, each layer laid out as one vector; not centred.
            NaN for a layer with an expert that is not finite.
        part_together: (3, L, L) float64, of gate, up, and down alone.
        norms: (E, L) float64, length of concat(gate, up, down), not centred; NaN where not finite.
        unusable: the experts without a cosine, by layer.
        layers: (L,) true model indices.
    """

    cosine: NDArray[np.float64]
    centred: NDArray[np.float64]
    part_cosine: NDArray[np.float64]
    part_centred: NDArray[np.float64]
    together: NDArray[np.float64]
    part_together: NDArray[np.float64]
    norms: NDArray[np.float64]
    unusable: tuple[UnusableExpert, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class DistanceSimilarity:
    """The cosines of all experts whose layers lie one distance apart.

    Attributes:
        delta: the distance, in model layers.
        cosine: (L, E) float64, cell (i, e) is expert e of layer i against expert e of the layer Δ further on; NaN where
            the model has no such layer or the cosine is not defined.
        mean: mean over the measurable cells; NaN if there is none.
        median: their median; NaN if there is none.
        std: their standard deviation (ddof 0); NaN if there is none.
        num_pairs: pairs of layers with a measurable cell.
    """

    delta: int
    cosine: NDArray[np.float64]
    mean: float
    median: float
    std: float
    num_pairs: int

    def values(self) -> NDArray[np.float64]:
        """(n,) the measurable cosines, layer by layer: what a histogram takes."""
        values: NDArray[np.float64] = self.cosine[np.isfinite(self.cosine)]
        return values


def similarity_from_sums(
    raw: NDArray[np.float64],
    centred: NDArray[np.float64],
    means: NDArray[np.float64],
    non_finite: NDArray[np.bool_],
    layers: Sequence[int],
    *,
    one_by_one: NDArray[np.bool_] | None = None,
    asked: NDArray[np.bool_] | None = None,
) -> ExpertSimilarity:
    """Turn sums of inner products into cosines.

    Trained experts of a layer share a mean, which alone makes cosines between layers. Centring takes it away: x̃_le =
    x_le − m_l with m_l = (1/E) Σ_e x_le, the layer's mean expert, coordinate by coordinate, over the experts that are
    neither zero nor non-finite, of which there are n_l.

    What all experts together come to as they are follows: Σ_e ⟨x_le, x_ke⟩ = Σ_e ⟨x̃_le, x̃_ke⟩ + (n_l + n_k − E)·⟨m_l,
    m_k⟩. Nothing large cancels in that. The other way round, raw sums less those of the means, would lose to rounding
    what sets experts apart where they share most of their weights.

    Args:
        raw: (3, E, L, L) float64, ⟨x_le, x_ke⟩ by part, symmetric.
        centred: (3, E, L, L) float64, ⟨x̃_le, x̃_ke⟩.
        means: (3, L, L) float64, ⟨m_l, m_k⟩.
        non_finite: (3, E, L) bool, experts that are not finite in a part; they have no cosine.
        layers: (L,) true model indices.
        one_by_one: (L, L) bool, pairs of layers of which `raw` was summed; all by default.
        asked: (L, L) bool, pairs of which `centred` and `means` were summed; all by default.
    """
    every = np.ones((len(layers), len(layers)), np.bool_)
    raw = np.where(every if one_by_one is None else one_by_one, raw, np.nan)
    centred, means = (np.where(every if asked is None else asked, sums, np.nan) for sums in (centred, means))
    raw_square = np.einsum("pell->pel", raw)
    bad: NDArray[np.bool_] = np.asarray(non_finite.any(axis=0))
    whole_square = np.where(bad, np.nan, raw_square.sum(axis=0))
    part_square = np.where(non_finite, np.nan, raw_square)
    unusable = tuple(
        UnusableExpert(int(layers[row]), int(expert), "non-finite" if bad[expert, row] else "zero")
        for row, expert in np.argwhere(np.logical_not(whole_square.T > 0))
    )
    used = np.einsum("pel->pl", np.logical_not(non_finite) & (raw_square > 0), dtype=np.int64)
    summed = centred.sum(axis=1) + (used[:, :, None] + used[:, None, :] - raw.shape[1]) * means
    spoilt: NDArray[np.bool_] = np.asarray(non_finite.any(axis=1))
    summed = np.where(spoilt[:, :, None] | spoilt[:, None, :], np.nan, summed)
    return ExpertSimilarity(
        cosine=_cosine(raw.sum(axis=0), whole_square),
        centred=_cosine(centred.sum(axis=0), whole_square),
        part_cosine=_cosine(raw, part_square),
        part_centred=_cosine(centred, part_square),
        together=_cosine(summed.sum(axis=0), np.einsum("pll->l", summed)),
        part_together=_cosine(summed, np.einsum("pll->pl", summed)),
        norms=np.sqrt(whole_square),
        unusable=unusable,
        layers=tuple(int(layer) for layer in layers),
    )


def similarity_by_distance(
    cosine: NDArray[np.float64], layers: Sequence[int], deltas: Sequence[int]
) -> tuple[DistanceSimilarity, ...]:
    """Sum the cosines at the same index up by distance.

    Args:
        cosine: (E, L, L) float64, of an `ExpertSimilarity`: raw (the documented output), centred, or of one part.
        layers: (L,) true model indices, ascending.
        deltas: distances in model layers; repeats are dropped.

    Returns:
        One result a distance, in the order asked for.

    Raises:
        ValueError: if a distance is below 1.
    """
    if any(delta < 1 for delta in deltas):
        raise ValueError(f"distances must be at least 1, got {tuple(deltas)}")
    chosen = tuple(dict.fromkeys(int(delta) for delta in deltas))
    views = np.stack([by_distance(expert, layers, chosen) for expert in cosine], axis=1)
    return tuple(_at_distance(delta, views[:, :, column]) for column, delta in enumerate(chosen))


def _at_distance(delta: int, cosine: NDArray[np.float64]) -> DistanceSimilarity:
    """Mean, median and spread of the cosines (L, E) `delta` apart."""
    finite = np.isfinite(cosine)
    values = cosine[finite]
    return DistanceSimilarity(
        delta=delta,
        cosine=cosine,
        mean=float(values.mean()) if values.size else float("nan"),
        median=float(np.median(values)) if values.size else float("nan"),
        std=float(values.std()) if values.size else float("nan"),
        num_pairs=int(finite.any(axis=1).sum()),
    )


def _cosine(gram: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines of Gram matrices (…, L, L); NaN where `size` (…, L), the square before centring, is zero or NaN."""
    square = np.einsum("...ll->...l", gram)
    with np.errstate(invalid="ignore"):
        usable = (size > 0) & (square > FLOAT32_NOISE**2 * size)
    length = np.sqrt(np.where(usable, square, np.nan))
    cosine: NDArray[np.float64] = np.clip(gram / (length[..., :, None] * length[..., None, :]), -1.0, 1.0)
    return cosine
