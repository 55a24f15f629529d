"""Counting choices into sums that stay: the plain torch reference, which the Triton kernels are held against."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.profiler.errors import InvariantError
from moescope.profiler.profile import FIXED_POINT_BITS, LayerInfo
from moescope.profiler.tokens import SPLITS

#: What must never be seen in a forward; each is counted by layer on the device and fails the run at the next drain.
FAULTS: Final = (
    "expert ids outside 0..E-1",
    "tokens sent to one expert twice",
    "routing weights that are NaN, infinite or negative",
    "tokens with NaN or infinite router scores",
)
#: Fixed point: sums of weights and probabilities are integers in units of 2**-24.
SCALE: Final = float(1 << FIXED_POINT_BITS)
#: What a staging buffer holds where nothing was staged.
POISON: Final = -1
#: Largest routing weight that is believed; fixed-point sums of 2**38 such weights still fit into int64.
WEIGHT_LIMIT: Final = 4096.0


def check_faults(faults: Tensor | NDArray[np.int64], layers: Sequence[LayerInfo], what: str = "") -> None:
    """Assert that no fault was counted; synchronises where they are on a device.

    Args:
        faults: (4, L) int64; see `FAULTS`.
        layers: The L layers.
        what: Words put before the message, e.g. the batch.

    Raises:
        InvariantError: Naming the layer and the fault.
    """
    for fault, counts in zip(FAULTS, faults.tolist(), strict=True):
        for layer, count in zip(layers, counts, strict=True):
            if count:
                raise InvariantError(f"{what}layer {layer.index}: {count:,} {fault}")


def to_fixed(values: Tensor) -> Tensor:
    """Round to units of 2**-24, half to even; what is NaN or infinite counts 0.

    Args:
        values: float32, any shape.

    Returns:
        int64, the same shape.
    """
    return torch.nan_to_num(values * SCALE, nan=0.0, posinf=0.0, neginf=0.0).round().long()


def add_choices(
    ids: Tensor,
    weights: Tensor,
    cells: Tensor,
    scales: Tensor,
    counts: Tensor,
    weight_sums: Tensor,
    faults: Tensor,
) -> None:
    """Add the choices of some rows to the sums of their cells, and poison the rows.

    Args:
        ids: (L, T, K) int32, logical expert ids; set to -1 on return.
        weights: (L, T, K) float32, routing weights.
        cells: (T,) int32, the cell of each row, domain-major, then phase, then split; negative: the row does not count.
        scales: (L,) float32, factor that each layer's weights carry; divided out.
        counts: (C, L, E) int64, added to.
        weight_sums: (C // 16, L, E) int64 in units of 2**-24, added to.
        faults: (4, L) int64, added to; see `FAULTS`.
    """
    layers, _, _ = ids.shape
    experts = counts.shape[2]
    counted = cells >= 0
    chosen = ids[:, counted].long()
    cell = cells[counted].long()
    if len(cell):
        units = weights[:, counted] / scales[:, None, None]
        outside = (chosen < 0) | (chosen >= experts)
        ordered = chosen.masked_fill(outside, POISON).sort(dim=-1).values
        twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(dim=-1)
        bad = ~((units >= 0) & (units < WEIGHT_LIMIT))
        faults[0] += outside.sum(dim=(1, 2))
        faults[1] += twice.sum(dim=1)
        faults[2] += bad.sum(dim=(1, 2))
        # engines' top-k kernels turn NaN scores into weights of 0
        faults[3] += ((units == 0) & ~outside).all(dim=-1).sum(dim=1)
        layer = torch.arange(layers, device=ids.device)[:, None, None]
        inside = chosen.clamp(0, experts - 1)
        ones = (~outside).long()
        bins = (cell[None, :, None] * layers + layer) * experts + inside
        counts.view(-1).scatter_add_(0, bins.reshape(-1), ones.reshape(-1))
        bins = (cell[None, :, None] // SPLITS * layers + layer) * experts + inside
        fixed = torch.where(outside | bad, 0, to_fixed(units.masked_fill(bad, 0.0)))
        weight_sums.view(-1).scatter_add_(0, bins.reshape(-1), fixed.reshape(-1))
    ids.fill_(POISON)


def add_distributions(distributions: Tensor, cells: Tensor, sums: Tensor, faults: Tensor) -> None:
    """Add sampled router distributions to the sums of their domains and phases.

    Args:
        distributions: (L, R, E) float32, one distribution a sampled row.
        cells: (R,) int32, the cell of each row; negative: the row does not count.
        sums: (C // 16, L, E) int64 in units of 2**-24, added to.
        faults: (4, L) int64, added to.
    """
    counted = cells >= 0
    values = distributions[:, counted]
    faults[3] += (~torch.isfinite(values).all(dim=-1)).sum(dim=1)
    sums.index_add_(0, cells[counted].long() // SPLITS, to_fixed(values).transpose(0, 1).contiguous())


def add_pairs(ids: Tensor, cells: Tensor, pairs: Tensor) -> None:
    """Count which experts were chosen together.

    Args:
        ids: (L, T, K) int32, logical expert ids.
        cells: (T,) int32; negative: the row does not count.
        pairs: (L, E, E) int64, added to; the diagonal counts the choices themselves.
    """
    experts = pairs.shape[1]
    for layer in range(len(ids)):
        chosen = ids[layer][cells >= 0].long()
        first = chosen[:, :, None].expand(-1, -1, chosen.shape[1]).reshape(-1)
        second = chosen[:, None, :].expand(-1, chosen.shape[1], -1).reshape(-1)
        inside = (first >= 0) & (first < experts) & (second >= 0) & (second < experts)
        bins = torch.where(inside, first * experts + second, 0)
        pairs[layer].view(-1).scatter_add_(0, bins, inside.long())
