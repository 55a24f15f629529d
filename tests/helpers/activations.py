"""Activation matrices as the statistics take them."""

import numpy as np
from numpy.typing import NDArray

from moescope.stats.activation import Activation


def make_activation(
    matrix: NDArray[np.float64], layers: tuple[int, ...] | None = None, experts: tuple[int, ...] | None = None
) -> Activation:
    """Selection frequencies (L, E) of layers that choose two experts."""
    depth, width = matrix.shape
    return Activation(
        kind="frequency",
        matrix=matrix,
        layers=layers or tuple(range(depth)),
        experts=experts or (width,) * depth,
        top_k=(2,) * depth,
        tokens=100,
    )
