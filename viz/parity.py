"""The earlier tool's own numbers, for notebooks and plots that were made with them.

This project descends from a tool with other definitions (and some faults). Its documented file is written here by its
own definitions; `analysis_data` in `moescope.viz.structured` has this project's.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from moescope.stats.activation import Activation
from moescope.stats.correlation import layer_correlation
from moescope.stats.pairwise import by_distance
from moescope.stats.periodicity import MODERATE, STRONG
from moescope.stats.similarity import similarity_at_distances
from moescope.viz.analysis import activations
from moescope.viz.errors import ExportError
from moescope.viz.structured import NO_VARIANCE, to_strict_json
from moescope.viz.weight_trees import NO_ROUTERS

if TYPE_CHECKING:  # the hand-over type only; viz never reads files or runs models
    from moescope.profiler.profile import RoutingProfile
    from moescope.profiler.sidecars import RouterTables

INTERVALS: Final = (12, 24, 36)


def parity_data(
    profile: "RoutingProfile",
    *,
    intervals: Sequence[int] | None = None,
    delta_max: int = 30,
    routed_scaling_factor: float | None = None,
    routers: "RouterTables | None" = None,
) -> dict[str, Any]:
    """The documented `analysis_data.json` with the earlier tool's definitions, each named under `definitions`.

    Args:
        profile: A checked profile.
        intervals: Distances Δ of the periodic patterns; None takes 12, 24 and 36. One that no pair spans is left out.
        delta_max: Largest Δ of the correlation matrix.
        routed_scaling_factor: What the model multiplies its routing weights with, which a profile does not hold; None
            is 1. Sigmoid routers only.
        routers: Router weights that were compared, or None.

    Returns:
        A tree of dict, list, str, int, finite float, bool and None.

    Raises:
        ExportError: The profile does not hold what the earlier tool measured, or the factor does not apply.
    """
    matrix, definition = _matrix(profile, routed_scaling_factor)
    model = profile.model
    chosen = tuple(intervals) if intervals is not None else INTERVALS
    activation = Activation(
        "probability", matrix, tuple(range(len(model.layers))), model.experts, model.top_k, profile.tokens
    )
    correlation = layer_correlation(activation, delta_max)
    layers = model.layer_indices
    data = {
        "metadata": {
            "model_info": {
                "num_moe_layers": len(layers),
                "layer_indices": layers,
                "num_experts_per_layer": dict(zip(layers, model.experts, strict=True)),
                "top_k_per_layer": dict(zip(layers, model.top_k, strict=True)),
                "total_tokens_analyzed": profile.tokens,
                "model_id": model.id,
                "architecture": model.architecture,
                "scoring": model.scoring,
            },
            "export_format": "json",
            "include_raw_data": False,
        },
        "definitions": definition
        | {
            "layer_correlation": "Pearson over experts of expert_activation between two layers",
            "delta": "distance counted in MoE layers; dense layers in between do not count",
            "layer_i, layer_j": "true indices of the two layers in the model",
            "num_pairs": "pairs of MoE layers delta apart, those without a defined correlation (null) included",
            "mean_correlation": "mean over all pairs; null as soon as one of them is null",
            "std_correlation": "standard deviation over all pairs with ddof 0; null as soon as one of them is null",
            "strength": "strong: mean > 0.7, moderate: mean > 0.4, else weak; a null mean is weak",
        },
        "expert_activation": {
            "matrix": matrix,
            "layer_indices": layers,
            "per_layer_stats": {
                str(layer.index): {
                    "avg_activation": matrix[slot, : layer.experts],
                    "var_activation": None,
                    "num_tokens": profile.tokens,
                    "num_experts": layer.experts,
                }
                for slot, layer in enumerate(model.layers)
            },
            "var_activation_reason": NO_VARIANCE,
        },
        "layer_correlation": {
            "correlation_matrix": correlation.matrix,
            "deltas": correlation.deltas,
            "layer_indices": layers,
            "layer_pairs": [
                {"layer_i": layers[slot], "layer_j": layers[later], "delta": delta, "correlation": r}
                for slot, later, delta, r in correlation.pairs()
            ],
        },
        "periodic_patterns": {
            str(delta): _pattern(correlation.pairwise, delta) for delta in chosen if delta < len(layers)
        },
        "router_similarity": _routers(routers, delta_max),
    }
    strict: dict[str, Any] = to_strict_json(data)
    return strict


def _routers(routers: "RouterTables | None", delta_max: int) -> dict[str, Any]:
    """Router similarity, with distances in MoE layers."""
    if routers is None:
        return {
            "cosine_similarity_matrix": None,
            "column_norm_correlation": None,
            "router_layers": None,
            "reason": NO_ROUTERS,
        }
    tables = (routers.cosine, routers.row_norms, routers.row_cosine)
    places = range(len(routers.layers))
    return {
        "cosine_similarity_matrix": routers.cosine,
        "column_norm_correlation": similarity_at_distances(
            *tables, places, routers.experts, delta_max
        ).norm_correlation,
        "router_layers": routers.layers,
    }


def _matrix(profile: "RoutingProfile", factor: float | None) -> tuple[NDArray[np.float64], dict[str, str]]:
    """The activation matrix (L, E) by the model's scoring, and its definition in words."""
    model = profile.model
    views = activations(profile)
    if model.scoring == "softmax":
        if factor is not None:
            raise ExportError("--routed-scaling-factor applies to sigmoid routers; this model's is softmax")
        if "probability" not in views:
            raise ExportError(
                "--format parity needs the router probabilities, which this profile does not hold; "
                "record it with --probabilities all (or sample)"
            )
        words = "mean over tokens of the softmax over all experts of the router logits, not renormalised over the top-k"
        return views["probability"].matrix, {
            "expert_activation": words,
            "tokens_behind_expert_activation": f"{views['probability'].tokens} of {profile.tokens}",
        }
    if model.architecture.startswith("MiniMax"):
        raise ExportError(
            f"--format parity is not possible for {model.architecture}: the earlier tool took a softmax of its logits, "
            "which the model does not route by and a profile does not hold"
        )
    scale = 1.0 if factor is None else factor
    if not math.isfinite(scale) or scale <= 0:
        raise ExportError(f"--routed-scaling-factor {scale} must be a number above 0")
    view = views["weight"]
    sums = profile.weight_sums.sum(axis=(0, 1))
    matrix = np.where(np.isnan(view.matrix), np.nan, sums * (scale / max(profile.tokens, 1)))
    known = "not held by the profile and not given: taken as 1.0" if factor is None else f"given as {scale}"
    return matrix, {
        "expert_activation": "mean over tokens of the top-k routing weights scattered into zeros (sigmoid scores, "
        "normalised over the top-k as the model does, times routed_scaling_factor); rows sum to that factor where the "
        "model normalises",
        "routed_scaling_factor": known,
    }


def _pattern(pairwise: NDArray[np.float64], delta: int) -> dict[str, Any]:
    """One interval, in MoE layers; a missing correlation spoils mean and spread, as it did in the earlier tool."""
    depth = len(pairwise)
    found = by_distance(pairwise, range(depth), (delta,))[: max(depth - delta, 0), 0]
    mean = float(found.mean()) if found.size else float("nan")
    return {
        "mean_correlation": mean,
        "std_correlation": float(found.std()) if found.size else float("nan"),
        "num_pairs": int(found.size),
        "all_correlations": found,
        "strength": "strong" if mean > STRONG else "moderate" if mean > MODERATE else "weak",
    }
