"""How much each expert is used: selection frequency, mean router probability, weight share, and the load they make."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.stats.layout import check_ascending, padding_mask

Measure = Literal["frequency", "probability", "weight"]


@dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """One number for each expert of each MoE layer; every measured row sums to 1.

    Attributes:
        kind: what the number is. `frequency`: c/(k·T), the share of the layer's selections; `probability`: the router's
            full distribution averaged over tokens; `weight`: the share of the layer's routing weight.
        matrix: (L, E) float64, dimensionless. Padded cells are NaN, and so is a row nothing was recorded for.
        layers: (L,) true model indices, ascending.
        experts: (L,) routed experts of each layer.
        top_k: (L,) experts a token selects in each layer.
        tokens: tokens behind the matrix.
    """

    kind: Measure
    matrix: NDArray[np.float64]
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """How one layer's selections spread over its experts.

    Attributes:
        layer: true model index.
        experts: routed experts of the layer.
        top_k: experts a token selects.
        tokens: tokens routed, from the requests' own lengths.
        selections: times any expert was selected, as recorded.
        busiest: selections of the busiest expert.
        dead_experts: ids of the experts never selected; empty if there were no selections at all.
    """

    layer: int
    experts: int
    top_k: int
    tokens: int
    selections: int
    busiest: int
    dead_experts: tuple[int, ...]

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean load: 1 is perfectly even; NaN without selections."""
        return self.busiest * self.experts / self.selections if self.selections else float("nan")

    @property
    def invariant_holds(self) -> bool:
        """Whether selections sum to k·T and no expert was selected more often than there were tokens."""
        return self.selections == self.top_k * self.tokens and self.busiest <= self.tokens


def selection_frequency(
    selection_counts: NDArray[np.int64],
    top_k: Sequence[int],
    tokens: int,
    experts: Sequence[int],
    layers: Sequence[int],
) -> Activation:
    """Share of each layer's selections that went to each expert, c/(k·T).

    Rows sum to 1 exactly where the counts satisfy the invariant Σ c = k·T; they are not forced to. No tokens, or a
    layer with k = 0, gives a row of NaN.

    Args:
        selection_counts: (L, E) int64, times an expert was among a token's top-k.
        top_k: (L,) experts a token selects.
        tokens: tokens routed, T.
        experts: (L,) routed experts; columns beyond a layer's number are padding.
        layers: (L,) true model indices, ascending.

    Raises:
        ValueError: if shapes disagree, layers do not ascend, or `tokens` is negative.
    """
    selections = np.asarray(top_k, dtype=np.float64) * tokens
    return _activation("frequency", selection_counts, selections, top_k, tokens, experts, layers)


def mean_probability(
    probability_sums: NDArray[np.float64],
    probability_tokens: int,
    top_k: Sequence[int],
    experts: Sequence[int],
    layers: Sequence[int],
) -> Activation:
    """Router probability of each expert, averaged over the tokens whose full distribution was recorded.

    Args:
        probability_sums: (L, E) float64, per-token distributions (each sums to 1) added up.
        probability_tokens: tokens behind the sums; 0 gives rows of NaN.
        top_k: (L,) experts a token selects.
        experts: (L,) routed experts; columns beyond a layer's number are padding.
        layers: (L,) true model indices, ascending.

    Raises:
        ValueError: if shapes disagree, layers do not ascend, or `probability_tokens` is negative.
    """
    divisors = np.full(len(layers), float(probability_tokens))
    return _activation("probability", probability_sums, divisors, top_k, probability_tokens, experts, layers)


def weight_share(
    weight_sums: NDArray[np.float64],
    tokens: int,
    top_k: Sequence[int],
    experts: Sequence[int],
    layers: Sequence[int],
) -> Activation:
    """Share of each layer's summed routing weight that each expert received.

    Args:
        weight_sums: (L, E) float64, routing weights as the model applies them, summed over tokens. A layer whose sum
            is 0 gives a row of NaN.
        tokens: tokens behind the sums.
        top_k: (L,) experts a token selects.
        experts: (L,) routed experts; columns beyond a layer's number are padding.
        layers: (L,) true model indices, ascending.

    Raises:
        ValueError: if shapes disagree, layers do not ascend, or `tokens` is negative.
    """
    sums = np.asarray(weight_sums, dtype=np.float64)
    _check(sums.shape, top_k, tokens, experts, layers)
    totals = np.where(padding_mask(experts, sums.shape[1]), 0.0, sums).sum(axis=1)
    return _activation("weight", sums, totals, top_k, tokens, experts, layers)


def layer_loads(
    selection_counts: NDArray[np.int64],
    top_k: Sequence[int],
    tokens: int,
    experts: Sequence[int],
    layers: Sequence[int],
) -> tuple[LayerLoad, ...]:
    """Dead experts, the busiest expert and the count invariant of each layer.

    Args:
        selection_counts: (L, E) int64, times an expert was among a token's top-k.
        top_k: (L,) experts a token selects.
        tokens: tokens routed, T, from the requests' own lengths.
        experts: (L,) routed experts; columns beyond a layer's number are padding.
        layers: (L,) true model indices, ascending.

    Raises:
        ValueError: if shapes disagree, layers do not ascend, or `tokens` is negative.
    """
    counts = np.asarray(selection_counts)
    _check(counts.shape, top_k, tokens, experts, layers)
    loads = []
    for row, k, width, layer in zip(counts, top_k, experts, layers, strict=True):
        own = row[:width]
        selections = int(own.sum())
        loads.append(
            LayerLoad(
                layer=int(layer),
                experts=int(width),
                top_k=int(k),
                tokens=int(tokens),
                selections=selections,
                busiest=int(own.max(initial=0)),
                dead_experts=tuple(np.flatnonzero(own == 0).tolist()) if selections else (),
            )
        )
    return tuple(loads)


def normalised_entropy(activation: Activation) -> NDArray[np.float64]:
    """How evenly each layer spreads over its experts: -Σ p ln p / ln E, 1 if perfectly even, 0 if all go to one.

    Args:
        activation: vectors (L, E) that sum to 1.

    Returns:
        (L,) float64, dimensionless; NaN where nothing was recorded or the layer has a single expert.
    """
    p = activation.matrix
    logs = np.log(p, where=p > 0, out=np.zeros_like(p))
    entropy = -np.where(p > 0, p * logs, 0.0).sum(axis=1)
    width = np.asarray(activation.experts, dtype=np.float64)
    known = np.isfinite(p).any(axis=1) & (width > 1)
    share: NDArray[np.float64] = np.where(known, entropy, np.nan) / np.log(np.where(width > 1, width, 2.0))
    return share


def _activation(
    kind: Measure,
    sums: NDArray[np.int64] | NDArray[np.float64],
    divisors: NDArray[np.float64],
    top_k: Sequence[int],
    tokens: int,
    experts: Sequence[int],
    layers: Sequence[int],
) -> Activation:
    """Divide each row by its divisor (0 gives NaN) and blank the padding."""
    values = np.asarray(sums, dtype=np.float64)
    _check(values.shape, top_k, tokens, experts, layers)
    matrix = values / np.where(divisors > 0, divisors, np.nan)[:, None]
    matrix[padding_mask(experts, values.shape[1])] = np.nan
    return Activation(
        kind=kind,
        matrix=matrix,
        layers=tuple(int(layer) for layer in layers),
        experts=tuple(int(width) for width in experts),
        top_k=tuple(int(k) for k in top_k),
        tokens=int(tokens),
    )


def _check(
    shape: tuple[int, ...], top_k: Sequence[int], tokens: int, experts: Sequence[int], layers: Sequence[int]
) -> None:
    """Refuse shapes that cannot belong together."""
    if len(shape) != 2 or not shape[0] == len(layers) == len(experts) == len(top_k):
        raise ValueError(
            f"expected one row of a (layers, experts) array per layer, got shape {shape} for {len(layers)} layers, "
            f"{len(experts)} expert numbers and {len(top_k)} top-k values"
        )
    if any(width > shape[1] for width in experts):
        raise ValueError(f"a layer has {max(experts)} experts, but the array has only {shape[1]} columns")
    check_ascending(layers)
    if tokens < 0:
        raise ValueError(f"tokens cannot be negative, got {tokens}")
