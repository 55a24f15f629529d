# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of the recorder: the same sums as `moescope.profiler.choices`, with one launch a step.

Import this module only where Triton is installed. Launch sizes do not depend on data, and nothing synchronises.
"""

import triton
import triton.language as tl
from torch import Tensor

from moescope.profiler.choices import SCALE, WEIGHT_LIMIT
from moescope.profiler.tokens import SPLITS

_SCALE = tl.constexpr(SCALE)
_SPLITS = tl.constexpr(SPLITS)
_WEIGHT_LIMIT = tl.constexpr(WEIGHT_LIMIT)
_HALF_ULP = tl.constexpr(float(1 << 23))


@triton.jit
def _fixed(values):
    """Round non-negative float32 to units of 2**-24, half to even, without float64."""
    scaled = values * _SCALE  # a power of two: exact
    # adding 2**23 leaves no room for a fraction, so the addition rounds; from 2**23 on there is none
    rounded = tl.where(scaled < _HALF_ULP, (scaled + _HALF_ULP) - _HALF_ULP, scaled)
    return rounded.to(tl.int64)


@triton.jit(do_not_specialize=["rows"])
def _add_choices(
    ids_ptr,
    weights_ptr,
    cells_ptr,
    scales_ptr,
    counts_ptr,
    weight_sums_ptr,
    faults_ptr,
    pairs_ptr,
    rows,
    layer_stride,
    layers: tl.constexpr,
    experts: tl.constexpr,
    k: tl.constexpr,
    PAIRS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    layer = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    choice = tl.arange(0, K)
    here = (row < rows)[:, None] & (choice < k)[None, :]
    offset = layer * layer_stride + row[:, None].to(tl.int64) * k + choice[None, :]
    cell = tl.load(cells_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    counted = here & (cell >= 0)[:, None]
    ids = tl.load(ids_ptr + offset, mask=counted, other=-1)
    weights = tl.load(weights_ptr + offset, mask=counted, other=0.0)
    weights = tl.div_rn(weights, tl.load(scales_ptr + layer))

    inside = counted & (ids >= 0) & (ids < experts)
    good = (weights >= 0.0) & (weights < _WEIGHT_LIMIT)
    expert = tl.where(inside, ids, 0).to(tl.int64)
    bins = (cell[:, None] * layers + layer) * experts + expert
    tl.atomic_add(counts_ptr + bins, tl.full([ROWS, K], 1, tl.int64), mask=inside, sem="relaxed")
    bins = ((cell // _SPLITS)[:, None] * layers + layer) * experts + expert
    fixed = _fixed(tl.where(good, weights, 0.0))
    tl.atomic_add(weight_sums_ptr + bins, fixed, mask=inside & good, sem="relaxed")

    outside = tl.sum(tl.sum((counted & (~inside)).to(tl.int64), 1), 0)
    tl.atomic_add(faults_ptr + layer, outside, mask=outside > 0, sem="relaxed")
    bad = tl.sum(tl.sum((counted & (~good)).to(tl.int64), 1), 0)
    tl.atomic_add(faults_ptr + 2 * layers + layer, bad, mask=bad > 0, sem="relaxed")
    # engines' top-k kernels turn NaN scores into weights of 0
    heavy = tl.where(here, ((weights != 0.0) | (~inside)).to(tl.int32), 0)
    empty = tl.sum(((cell >= 0) & (row < rows) & (tl.max(heavy, 1) == 0)).to(tl.int64), 0)
    tl.atomic_add(faults_ptr + 3 * layers + layer, empty, mask=empty > 0, sem="relaxed")
    # two choices of one row are the same expert: compare all pairs of different columns
    marked = tl.where(inside, ids, -1 - choice[None, :])
    same = (marked[:, :, None] == marked[:, None, :]) & (choice[:, None] < choice[None, :])[None, :, :]
    twice = tl.sum((tl.max(tl.max(same.to(tl.int32), 2), 1)).to(tl.int64), 0)
    tl.atomic_add(faults_ptr + layers + layer, twice, mask=twice > 0, sem="relaxed")
    if PAIRS:
        both = inside[:, :, None] & inside[:, None, :]
        bins_both = (layer * experts + expert[:, :, None]) * experts + expert[:, None, :]
        tl.atomic_add(pairs_ptr + bins_both, tl.full([ROWS, K, K], 1, tl.int64), mask=both, sem="relaxed")
    # poison: a row that no layer writes again is found. A small tile is held by several threads at once, so all of
    # them must have read it first.
    tl.debug_barrier()
    tl.store(ids_ptr + offset, -1, mask=here)


@triton.jit(do_not_specialize=["rows"])
def _stage_distributions(
    logits_ptr,
    sample_ptr,
    out_ptr,
    rows,
    row_stride,
    experts: tl.constexpr,
    SIGMOID: tl.constexpr,
    E: tl.constexpr,
) -> None:
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(sample_ptr + slot).to(tl.int64)
    if (row >= 0) & (row < rows):
        expert = tl.arange(0, E)
        there = expert < experts
        logits = tl.load(logits_ptr + row * row_stride + expert, mask=there, other=float("-inf")).to(tl.float32)
        if SIGMOID:
            scores = tl.where(there, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
        else:
            scores = tl.exp(logits - tl.max(logits, 0))
        tl.store(out_ptr + slot * experts + expert, scores / tl.sum(scores, 0), mask=there)


@triton.jit
def _add_distributions(
    distributions_ptr,
    cells_ptr,
    sums_ptr,
    faults_ptr,
    layer_stride,
    layers: tl.constexpr,
    experts: tl.constexpr,
    E: tl.constexpr,
) -> None:
    slot = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    cell = tl.load(cells_ptr + slot).to(tl.int64)
    if cell >= 0:
        expert = tl.arange(0, E)
        there = expert < experts
        values = tl.load(distributions_ptr + layer * layer_stride + slot * experts + expert, mask=there, other=0.0)
        good = (values >= 0.0) & (values <= 2.0)
        target = sums_ptr + ((cell // _SPLITS) * layers + layer) * experts + expert
        tl.atomic_add(target, _fixed(tl.where(good, values, 0.0)), mask=there, sem="relaxed")
        bad = tl.max((there & (~good)).to(tl.int64), 0)
        tl.atomic_add(faults_ptr + 3 * layers + layer, bad, mask=bad > 0, sem="relaxed")


def add_choices(
    ids: Tensor,
    weights: Tensor,
    cells: Tensor,
    scales: Tensor,
    counts: Tensor,
    weight_sums: Tensor,
    faults: Tensor,
    pairs: Tensor | None = None,
) -> None:
    """As `moescope.profiler.choices.add_choices`, and `add_pairs` if `pairs` are given, in one launch.

    `ids` and `weights` are (L, T, K) whose rows lie one after the other; layers may be further apart.
    """
    layers, rows, k = ids.shape
    if rows == 0:
        return
    block = 16 if rows <= 2048 else 64
    _add_choices[(triton.cdiv(rows, block), layers)](
        ids,
        weights,
        cells,
        scales,
        counts,
        weight_sums,
        faults,
        faults if pairs is None else pairs,
        rows,
        ids.stride(0),
        layers,
        counts.shape[2],
        k,
        PAIRS=pairs is not None,
        K=triton.next_power_of_2(k),
        ROWS=block,
        num_warps=4,
    )


def stage_distributions(logits: Tensor, sample: Tensor, out: Tensor, *, sigmoid: bool) -> None:
    """Write the router's distribution of sampled rows of one layer; safe to capture in a CUDA graph.

    Args:
        logits: (T, E) float, raw router logits.
        sample: (R,) int32, rows; negative or >= T: nothing is written.
        out: (R, E) float32.
        sigmoid: Sigmoid scores divided by their sum rather than a softmax.
    """
    experts = logits.shape[1]
    _stage_distributions[(len(sample),)](
        logits,
        sample,
        out,
        len(logits),
        logits.stride(0),
        experts,
        SIGMOID=sigmoid,
        E=triton.next_power_of_2(experts),
        num_warps=1,
    )


def add_distributions(distributions: Tensor, cells: Tensor, sums: Tensor, faults: Tensor) -> None:
    """As `moescope.profiler.choices.add_distributions`; layers of `distributions` (L, R, E) may be further apart."""
    layers, rows, experts = distributions.shape
    if rows == 0:
        return
    _add_distributions[(rows, layers)](
        distributions,
        cells,
        sums,
        faults,
        distributions.stride(0),
        layers,
        experts,
        E=triton.next_power_of_2(experts),
        num_warps=1,
    )
