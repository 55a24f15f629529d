"""Do layers at a given distance favour the same expert indices?"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.stats.activation import Activation, Measure
from moescope.stats.pairwise import by_distance, pairwise_pearson


@dataclass(frozen=True, slots=True, eq=False)
class LayerCorrelation:
    """Pearson correlation over experts between the activation vectors of two layers.

    Attributes:
        kind: the activation measure it rests on.
        matrix: (L, Δ) float64; cell (i, d) compares layer `layers[i]` with the layer `deltas[d]` further on in the
            model. NaN where there is no such layer or the correlation is not defined.
        pairwise: (L, L) float64, the same for every pair of layers.
        deltas: (Δ,) distances in model layers, 1..delta_max.
        layers: (L,) true model indices.
    """

    kind: Measure
    matrix: NDArray[np.float64]
    pairwise: NDArray[np.float64]
    deltas: tuple[int, ...]
    layers: tuple[int, ...]

    def pairs(self) -> Iterator[tuple[int, int, int, float]]:
        """Layer, later layer, distance and r (NaN where it is not defined) of each pair within reach, row by row."""
        present = set(self.layers)
        for layer, row in zip(self.layers, self.matrix.tolist(), strict=True):
            for delta, r in zip(self.deltas, row, strict=True):
                if layer + delta in present:
                    yield layer, layer + delta, delta, r


def layer_correlation(activation: Activation, delta_max: int = 30) -> LayerCorrelation:
    """Correlate the activation of each layer with that of the layers after it.

    C[i, Δ] = Pearson over experts of p[layer i] and p[layer i + Δ], with Δ counted in model layers: a dense layer in
    between counts towards the distance. A constant vector, a vector with a NaN, or two layers with different numbers
    of experts give NaN in the cells concerned and nowhere else.

    Args:
        activation: the vectors to compare, one a layer.
        delta_max: largest distance of `matrix`, in model layers.

    Raises:
        ValueError: if `delta_max` is below 1.
    """
    if delta_max < 1:
        raise ValueError(f"delta_max must be at least 1, got {delta_max}")
    deltas = tuple(range(1, delta_max + 1))
    pairwise = pairwise_pearson(activation.matrix, activation.experts)
    return LayerCorrelation(
        kind=activation.kind,
        matrix=by_distance(pairwise, activation.layers, deltas),
        pairwise=pairwise,
        deltas=deltas,
        layers=activation.layers,
    )
