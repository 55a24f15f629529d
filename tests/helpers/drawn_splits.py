"""Selections drawn prompt by prompt, so that splits vary as real ones do."""

import numpy as np
from numpy.typing import NDArray


def draw_splits(
    routers: NDArray[np.float64],
    prompts: tuple[int, ...],
    rng: np.random.Generator,
    concentration: float = 20.0,
    selections: int = 200,
    lengths: float = 0.0,
    bursts: bool = False,
) -> NDArray[np.int64]:
    """Every prompt prefers experts of its own around its group's router, and lies in one split as a whole.

    Args:
        routers: (G, L, E), mean share of each expert for each group of prompts; 0 in the padding.
        prompts: (G,) prompts of each group.
        rng: the draw.
        concentration: of a prompt's taste; small is bursty.
        selections: of a prompt in a layer, on average of the logarithm.
        lengths: standard deviation of the logarithm of a prompt's length.
        bursts: every expert is favoured thirtyfold by a prompt in thirty.

    Returns:
        (16, G, L, E) int64.
    """
    groups, depth, width = routers.shape
    counts = np.zeros((16, groups, depth, width), np.int64)
    for group in range(groups):
        split = rng.integers(16, size=prompts[group])
        length = np.maximum(selections * np.exp(lengths * rng.normal(size=prompts[group])), 1).astype(int)
        for layer in range(depth):
            taste = rng.gamma(routers[group, layer] * concentration, size=(prompts[group], width))
            if bursts:
                taste = np.where(rng.random(taste.shape) < 1 / 30, 30 * taste, taste)
            taste += 1e-12 * (routers[group, layer] > 0)
            np.add.at(counts[:, group, layer], split, rng.multinomial(length, taste / taste.sum(1, keepdims=True)))
    return counts


def skewed_routers(
    groups: int, depth: int, width: int, rng: np.random.Generator, skew: float = 0.5
) -> NDArray[np.float64]:
    """(G, L, E) routers of very uneven popularity, the same for every group."""
    return np.repeat(rng.dirichlet(np.full(width, skew), size=depth)[None], groups, axis=0)
