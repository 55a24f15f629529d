"""What ranks of a recording engine write, made up so that it adds up."""

import numpy as np

from moescope.adapters.vllm_parts import Part
from moescope.profiler.profile import LayerInfo
from moescope.profiler.staged import StagedSums


def make_part(layers: tuple[int, ...], seed: int = 0, *, rank: dict[str, int] | None = None, domains: int = 2) -> Part:
    """A part whose counts add up: 4 experts, top-1."""
    rng = np.random.default_rng(seed)
    tokens = np.random.default_rng(99).integers(0, 5, (domains, 2, 16)).astype(np.int64)
    cells = np.zeros((domains, 2, 16, len(layers), 4), np.int64)
    for where in np.ndindex(domains, 2, 16, len(layers)):
        cells[where] = np.bincount(rng.integers(0, 4, tokens[where[:3]]), minlength=4)
    weight = cells.sum(axis=2) << 24
    return Part(
        layers=tuple(LayerInfo(index, 4, 1) for index in layers),
        scoring="softmax",
        groups=2,
        domains=("b", "a")[:domains],
        rank={"dp": 0, "pp": 0, "tp": 0, "dp_size": 1, "pp_size": 1, "writes": True} | (rank or {}),
        requests=3,
        description={"vllm": "0.32.0", "model": "m", "architecture": "A", "dtype": "float32", "device": "cpu"},
        sums=StagedSums(tokens=tokens, cells=cells, weight=weight),
        run="u",
        created="2026-01-01T00:00:00+00:00",
    )
