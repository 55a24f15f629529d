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
