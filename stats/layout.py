"""The layout all statistics share: rows are layers by true model index, columns experts, padded to the widest."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def padding_mask(experts: Sequence[int], width: int) -> NDArray[np.bool_]:
    """(L, width) mask, true where a column lies beyond the layer's own number of experts."""
    mask: NDArray[np.bool_] = np.arange(width)[None, :] >= np.asarray(experts, dtype=np.int64)[:, None]
    return mask


def check_ascending(layers: Sequence[int]) -> None:
    """Refuse layer indices that repeat or go back.

    Raises:
        ValueError: if they do.
    """
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise ValueError(f"layers must ascend without repeats, got {tuple(layers)}")


def check_groups(counts: NDArray[np.int64], tokens: NDArray[np.int64], layers: Sequence[int], what: str) -> None:
    """Refuse counts (G, L, E) that do not go with tokens (G,) and ascending layers (L,).

    Args:
        counts: selections of each group.
        tokens: tokens of each.
        layers: true model indices.
        what: what the groups are called.

    Raises:
        ValueError: if they do not.
    """
    if counts.ndim != 3 or len(counts) != len(tokens) or counts.shape[1] != len(layers):
        raise ValueError(f"got counts of shape {counts.shape} for {len(tokens)} {what}, {len(layers)} layers")
    check_ascending(layers)


def by_layer_rows(rows: Sequence[NDArray[np.float64]], depth: int) -> NDArray[np.float64]:
    """(G, L) of G rows over L layers; (0, L) of none."""
    return np.array(rows, np.float64).reshape(-1, depth)
