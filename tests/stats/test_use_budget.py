"""Everything about the use of experts at the size of the largest models: seconds, and a fraction of their profile."""

import time
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from moescope.stats.activation import selection_frequency
from moescope.stats.coactivation import coactivation
from moescope.stats.comparison import change_tests
from moescope.stats.placement import placement_preview
from moescope.stats.specialisation import specialisation
from moescope.stats.use import expert_coverage, expert_use, phase_contrast

TOP_K, TOKENS, DOMAINS = 8, 2000, 12
#: The aim is 2 s on two free cores; tests share theirs.
SECONDS, BYTES = 6.0, 500e6


def routed_pairs(depth: int, width: int) -> NDArray[np.int64]:
    """(L, E, E) pairs of tokens that were really routed, a few different layers over and over."""
    rng = np.random.default_rng(0)
    pairs = np.empty((depth, width, width), np.int64)
    for row in range(depth):
        if row < 4:
            scores = rng.gumbel(size=(TOKENS, width)) + np.log(rng.gamma(1.0, size=width))
            chosen = np.zeros((TOKENS, width))
            np.put_along_axis(chosen, np.argpartition(-scores, TOP_K, axis=1)[:, :TOP_K], 1.0, axis=1)
            pairs[row] = chosen.T @ chosen
        else:
            pairs[row] = pairs[row % 4]
    return pairs


@pytest.mark.parametrize(("depth", "width"), [(94, 128), (62, 256)])
def test_the_largest_models_take_seconds(depth: int, width: int) -> None:
    pairs = routed_pairs(depth, width)
    counts = np.diagonal(pairs, axis1=1, axis2=2).copy()
    parts = np.random.default_rng(1).multinomial(counts, np.full(16 * DOMAINS, 1 / (16 * DOMAINS)))
    splits = np.ascontiguousarray(parts.transpose(2, 0, 1)).reshape(16, DOMAINS, depth, width)
    phases = np.stack([splits[:8].sum(axis=0), splits[8:].sum(axis=0)], axis=1)
    tokens = np.full((DOMAINS, 2), TOKENS // (2 * DOMAINS))
    experts, layers, top_k = (width,) * depth, tuple(range(depth)), (TOP_K,) * depth

    tracemalloc.start()
    started = time.perf_counter()
    expert_use(selection_frequency(counts, top_k, TOKENS, experts, layers))
    expert_coverage(counts, TOKENS, 128, experts, layers)
    phase_contrast(phases, tokens, experts, layers)
    specialisation(splits, experts, layers).most_specialised()
    coactivation(pairs, top_k, TOKENS, experts, layers).strongest()
    change_tests(splits[:, ::2].sum(axis=1), splits[:, 1::2].sum(axis=1), experts)
    placement_preview(counts, experts, layers, 8, 16)
    seconds = time.perf_counter() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < SECONDS
    assert peak < BYTES
