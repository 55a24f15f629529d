"""How alike the same expert's weights are in every two layers, summed up block by block over a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.stats.layout import check_ascending
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
        cosine: (E, L, L) float64, cosine of concat(gate, up, down); NaN for unusable experts, in their cells alone.
        centred: (E, L, L) float64, the same after subtracting each layer's mean expert; NaN where the blocks came
            without a mean.
        part_cosine: (3, E, L, L) float64, cosine of gate, up, and down alone.
        part_centred: (3, E, L, L) float64, the same, centred.
        norms: (E, L) float64, length of concat(gate, up, down), not centred; NaN where not finite.
        unusable: the experts without a cosine, by layer.
        layers: (L,) true model indices.
    """

    cosine: NDArray[np.float64]
    centred: NDArray[np.float64]
    part_cosine: NDArray[np.float64]
    part_centred: NDArray[np.float64]
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


class SameIndex:
    """Sums G_e = Σ_blocks X Xᵀ for every expert index e, X (L, n) being a block of expert e in all layers.

    Trained experts of a layer share a mean, which alone makes cosines between layers. Centring takes it away: x̃_le =
    x_le − m_l with m_l = (1/E) Σ_e x_le, the layer's mean expert, coordinate by coordinate. The mean of a block is
    known when all experts of that block are at hand, so one pass is enough if it goes block by block (`add`), and not
    if it goes expert by expert (`add_expert` without `mean`: raw cosines alone). An expert that is zero or not finite
    within a block has no part in that block's mean.

    Blocks may be of any size and come in any order. Products are float32, sums float64. State: 6·E·L² float64.
    """

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        """Start at zero.

        Args:
            layers: (L,) true model indices, ascending.
            experts: E, the same in every layer.

        Raises:
            ValueError: if layers do not ascend, or there are no layers or experts.
        """
        check_ascending(layers)
        if not layers or experts < 1:
            raise ValueError(f"needs layers and experts, got {len(layers)} and {experts}")
        self.layers = tuple(int(layer) for layer in layers)
        self.experts = experts
        shape = (len(PARTS), experts, len(layers))
        self._raw = np.zeros((*shape, len(layers)))
        self._centred = np.zeros((*shape, len(layers)))
        self._non_finite = np.zeros(shape, dtype=np.bool_)
        self._coordinates = np.zeros(shape[:2], dtype=np.int64)
        self._with_mean = np.zeros(shape[:2], dtype=np.int64)

    def add(self, part: Part, slab: NDArray[np.float32] | Sequence[NDArray[np.float32]]) -> None:
        """Add the same coordinates of every expert in every layer.

        Args:
            part: the matrix the block is of.
            slab: (L, E, n) float32, or L arrays (E, n); not written to.

        Raises:
            ValueError: if the layers' blocks differ in shape, or do not have L layers and E experts.
        """
        shapes = {layer.shape for layer in slab}
        if len(shapes) > 1:
            raise ValueError(f"layers of different widths have no cosine: {sorted(shapes)}")
        block = np.asarray(slab, dtype=np.float32)
        if block.ndim != 3 or block.shape[:2] != (len(self.layers), self.experts):
            raise ValueError(f"needs ({len(self.layers)}, {self.experts}, n) weights, got {block.shape}")
        mean = np.stack([block_mean(layer) for layer in block])
        for expert in range(self.experts):
            self.add_expert(part, expert, block[:, expert], mean)

    def add_expert(
        self, part: Part, expert: int, block: NDArray[np.float32], mean: NDArray[np.float32] | None = None
    ) -> None:
        """Add some coordinates of one expert in every layer.

        Args:
            part: the matrix the block is of.
            expert: its index.
            block: (L, n) float32; not written to.
            mean: (L, n) float32, `block_mean` of each layer over the same coordinates; none: no centred cosine.

        Raises:
            ValueError: if a shape does not fit.
        """
        if block.ndim != 2 or len(block) != len(self.layers) or (mean is not None and mean.shape != block.shape):
            raise ValueError(f"needs ({len(self.layers)}, n) weights and their mean, got {block.shape}")
        row = PARTS.index(part)
        spoilt: NDArray[np.bool_] = np.logical_not(np.isfinite(block).all(axis=1))
        kept = np.where(spoilt[:, None], np.float32(0.0), block) if spoilt.any() else block
        spoilt |= _add_gram(self._raw[row, expert], kept)
        if mean is not None:
            # A zero expert is left at zero; its cosines are blanked by its raw length.
            self._with_mean[row, expert] += block.shape[1]
            spoilt |= _add_gram(self._centred[row, expert], np.where(spoilt[:, None], np.float32(0.0), kept - mean))
        self._coordinates[row, expert] += block.shape[1]
        self._non_finite[row, expert] |= spoilt

    def finish(self) -> ExpertSimilarity:
        """Turn the sums into cosines; more blocks may follow.

        Raises:
            ValueError: if experts were given different numbers of coordinates.
        """
        uneven = [PARTS[row] for row, counts in enumerate(self._coordinates) if len(set(counts.tolist())) > 1]
        if uneven:
            raise ValueError(f"experts were given different numbers of weights: {', '.join(uneven)}")
        uncentred = self._with_mean != self._coordinates
        centred = np.where(uncentred[:, :, None, None], np.nan, self._centred)
        return similarity_from_sums(self._raw, centred, self._non_finite, self.layers)


def similarity_from_sums(
    raw: NDArray[np.float64],
    centred: NDArray[np.float64],
    non_finite: NDArray[np.bool_],
    layers: Sequence[int],
    asked: NDArray[np.bool_] | None = None,
) -> ExpertSimilarity:
    """Turn sums of inner products into cosines.

    Args:
        raw: (3, E, L, L) float64, ⟨x_le, x_me⟩ by part, symmetric.
        centred: (3, E, L, L) float64, the same of experts less their layer's mean; NaN where there was none.
        non_finite: (3, E, L) bool, experts that are not finite in a part; they have no cosine.
        layers: (L,) true model indices.
        asked: (L, L) bool, pairs of layers that were summed; all by default.
    """
    left_out = np.zeros((len(layers), len(layers)), np.bool_) if asked is None else ~asked
    raw, centred = (np.where(left_out, np.nan, sums) for sums in (raw, centred))
    raw_square = np.einsum("pell->pel", raw)
    bad: NDArray[np.bool_] = np.asarray(non_finite.any(axis=0))
    whole_square = np.where(bad, np.nan, raw_square.sum(axis=0))
    part_square = np.where(non_finite, np.nan, raw_square)
    unusable = tuple(
        UnusableExpert(int(layers[row]), int(expert), "non-finite" if bad[expert, row] else "zero")
        for row, expert in np.argwhere(np.logical_not(whole_square.T > 0))
    )
    return ExpertSimilarity(
        cosine=_cosine(raw.sum(axis=0), whole_square),
        centred=_cosine(centred.sum(axis=0), whole_square),
        part_cosine=_cosine(raw, part_square),
        part_centred=_cosine(centred, part_square),
        norms=np.sqrt(whole_square),
        unusable=unusable,
        layers=tuple(int(layer) for layer in layers),
    )


def block_mean(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean expert of a block: of the experts that are neither zero nor non-finite in it.

    Args:
        block: (E, n) float32, the same coordinates of all experts of a layer.

    Returns:
        (n,) float32; zero if no expert is usable.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.einsum("en,en->e", block, block)
    used = np.isfinite(square) & (square > 0)
    total = (block if used.all() else block[used]).sum(axis=0, dtype=np.float64)
    mean: NDArray[np.float32] = (total / max(int(used.sum()), 1)).astype(np.float32)
    return mean


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


def _add_gram(total: NDArray[np.float64], block: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Add X Xᵀ of a block (L, n) to `total` (L, L); (L,) true for rows whose squares overflow, which are left out."""
    with np.errstate(over="ignore", invalid="ignore"):
        gram = block @ block.T
    overflown: NDArray[np.bool_] = ~np.isfinite(np.diagonal(gram))
    if overflown.any():
        gram = np.where(overflown[:, None] | overflown[None, :], np.float32(0.0), gram)
    total += gram
    return overflown


def _cosine(gram: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines of Gram matrices (…, L, L); NaN where `size` (…, L), the square before centring, is zero or NaN."""
    square = np.einsum("...ll->...l", gram)
    with np.errstate(invalid="ignore"):
        usable = (size > 0) & (square > FLOAT32_NOISE**2 * size)
    length = np.sqrt(np.where(usable, square, np.nan))
    cosine: NDArray[np.float64] = np.clip(gram / (length[..., :, None] * length[..., None, :]), -1.0, 1.0)
    return cosine
