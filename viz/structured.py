"""The results as plain data under the documented keys, strict JSON throughout: a cell without a value is null."""

import json
import math
import pickle
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final, Literal

import numpy as np

from moescope.stats.activation import Activation, LayerLoad
from moescope.stats.periodicity import PeriodicPattern
from moescope.viz.certainty_trees import certainty_summary, null_tree, period_tree, reliability_tree
from moescope.viz.report_data import ReportData
from moescope.viz.use_trees import use_trees
from moescope.viz.weight_trees import expert_tree, router_tree

StructuredFormat = Literal["json", "jsonl", "pickle"]
#: How the name of a file in each format ends.
SUFFIXES: Final[Mapping[StructuredFormat, str]] = {"json": ".json", "jsonl": ".jsonl", "pickle": ".pkl"}

NOT_RECORDED = "not recorded in this profile"
NO_VARIANCE = "the variance over tokens needs the probabilities of single tokens, which are not kept"
LEFT_OUT = "correlation and periodic patterns were left out"


def encode(data: Mapping[str, Any], export_format: StructuredFormat, indent: int | None = None) -> bytes:
    """Structured data as the content of a file.

    Args:
        data: a tree of dict, list, str, int, finite float, bool and None.
        export_format: `json`; `jsonl`, one object with one top-level key a line; or `pickle`, protocol 4, of nothing
            but those built-in types. moescope never reads a pickle.
        indent: spaces a level, in `json` alone.

    Raises:
        ValueError: if a number is not finite.
    """
    if export_format == "pickle":
        return pickle.dumps(dict(data), protocol=4)
    parts = [data] if export_format == "json" else [{key: value} for key, value in data.items()]
    lines = (json.dumps(part, ensure_ascii=False, allow_nan=False, indent=indent) + "\n" for part in parts)
    return "".join(lines).encode("utf-8")


def schema(name: Literal["analysis_data", "analysis_summary", "weights"]) -> dict[str, Any]:
    """The published JSON Schema (draft 2020-12) of `analysis_data`, `analysis_summary` or `weights`."""
    text = files("moescope.viz").joinpath("schema", f"{name}.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def analysis_data(report: ReportData, export_format: str = "json") -> dict[str, Any]:
    """All results, for `analysis_data.{json,jsonl,pkl}`.

    The documented keys keep their documented meaning, so `expert_activation` is the mean router probability and is
    null, with a `reason`, where that was not recorded. Selection frequency and weight share have keys of their own.
    `measure` names what the correlations rest on; it lies within each interval of `periodic_patterns`, whose own
    keys are intervals.

    Args:
        report: the results.
        export_format: the format it is going to be written in, noted in the metadata.

    Returns:
        A tree of dict, list, str, int, finite float, bool and None.
    """
    data = {
        "metadata": {
            "model_info": _model_info(report),
            "export_format": export_format,
            "include_raw_data": False,
            "measure": report.measure,
            "engine": report.engine,
            "versions": report.versions,
            "created": report.created,
            "prompts": report.prompts,
            "remarks": list(report.remarks),
            "tokens_by_phase": report.tokens_by_phase,
            "tokens_by_domain": report.tokens_by_domain,
            "invariant_holds": not report.violations,
            "invariant_violations": report.violations,
        },
        "expert_activation": _expert_activation(report),
        "selection_frequency": _activation(report.activation("frequency"), report)
        | {"per_layer_stats": {str(load.layer): _load(load) for load in report.loads}},
        "weight_share": _activation(report.activation("weight"), report),
        "layer_correlation": _layer_correlation(report),
        "periodic_patterns": {
            str(pattern.delta): _pattern(pattern, report.measure) for pattern in report.periodic.patterns
        },
        "correlation_null": null_tree(report.nulls, report.reliability),
        "period_finder": period_tree(report.period),
        "reliability": reliability_tree(report.reliability),
        **use_trees(report.used),
        "router_similarity": router_tree(report.router_similarity),
        "expert_similarity": expert_tree(report.weights),
    }
    strict: dict[str, Any] = to_strict_json(data)
    return strict


def analysis_summary(report: ReportData) -> dict[str, Any]:
    """The key findings, for `analysis_summary.json`.

    Args:
        report: the results.

    Returns:
        A tree of dict, list, str, int, finite float, bool and None.
    """
    loaded = [load for load in report.loads if load.selections]
    data = {
        "model": _model_info(report),
        "key_findings": {
            "num_moe_layers": len(report.layers),
            "measure": report.measure,
            "periodic_patterns": {
                str(pattern.delta): {
                    "mean_correlation": pattern.mean,
                    "std_correlation": pattern.std,
                    "num_pairs": pattern.num_pairs,
                    "strength": pattern.strength,
                }
                for pattern in report.periodic.patterns
            },
            **certainty_summary(report),
            "invariant_holds": not report.violations,
            "dead_experts": sum(len(load.dead_experts) for load in loaded),
            "load_max_over_mean": max((load.max_over_mean for load in loaded), default=None),
        },
    }
    strict: dict[str, Any] = to_strict_json(data)
    return strict


def to_strict_json(value: Any) -> Any:
    """The value as `json.dumps(…, allow_nan=False)` takes it.

    Arrays and sequences become lists, numpy scalars Python ones, keys text, and numbers that are not finite None.

    Raises:
        TypeError: if a value has no JSON form.
    """
    match value:
        case None | bool() | str():
            return value
        case int() | np.integer():
            return int(value)
        case float() | np.floating():
            return float(value) if math.isfinite(value) else None
        case np.bool_():
            return bool(value)
        case np.ndarray():
            return to_strict_json(value.tolist())
        case Mapping():
            return {str(key): to_strict_json(item) for key, item in value.items()}
        case list() | tuple():
            return [to_strict_json(item) for item in value]
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def _model_info(report: ReportData) -> dict[str, Any]:
    """The model and how much of it was seen."""
    return {
        "num_moe_layers": len(report.layers),
        "layer_indices": report.layers,
        "num_experts_per_layer": {load.layer: load.experts for load in report.loads},
        "top_k_per_layer": {load.layer: load.top_k for load in report.loads},
        "total_tokens_analyzed": report.tokens,
        "model_id": report.model_id,
        "architecture": report.architecture,
        "scoring": report.scoring,
        "router_groups": report.groups,
    }


def _activation(activation: Activation | None, report: ReportData) -> dict[str, Any]:
    """A matrix by layer and expert; null with a reason where it was not recorded."""
    if activation is None:
        return {"matrix": None, "reason": NOT_RECORDED, "layer_indices": report.layers}
    return {
        "matrix": activation.matrix,
        "layer_indices": activation.layers,
        "measure": activation.kind,
        "num_tokens": activation.tokens,
    }


def _expert_activation(report: ReportData) -> dict[str, Any]:
    """Mean router probability, with the documented statistics of each layer."""
    probability = report.activation("probability")
    means = dict(zip(probability.layers, probability.matrix, strict=True)) if probability else {}
    return _activation(probability, report) | {
        "per_layer_stats": {
            str(load.layer): {
                "avg_activation": means[load.layer][: load.experts] if probability else None,
                "var_activation": None,
                "num_tokens": probability.tokens if probability else load.tokens,
                "num_experts": load.experts,
            }
            for load in report.loads
        },
        "var_activation_reason": NO_VARIANCE,
    }


def _load(load: LayerLoad) -> dict[str, Any]:
    """How a layer's selections spread."""
    return {
        "num_tokens": load.tokens,
        "num_experts": load.experts,
        "selections": load.selections,
        "max_over_mean": load.max_over_mean,
        "dead_experts": load.dead_experts,
    }


def _layer_correlation(report: ReportData) -> dict[str, Any]:
    """The matrix by starting layer and distance, and its pairs one by one."""
    correlation = report.correlation
    pairs = [
        {"layer_i": layer, "layer_j": later, "delta": delta, "correlation": r}
        for layer, later, delta, r in correlation.pairs()
    ]
    return {
        "correlation_matrix": correlation.matrix,
        "deltas": correlation.deltas,
        "layer_indices": correlation.layers,
        "layer_pairs": pairs,
        "measure": correlation.kind,
    } | ({} if report.correlated else {"reason": LEFT_OUT})


def _pattern(pattern: PeriodicPattern, measure: str) -> dict[str, Any]:
    """One interval; `all_correlations` holds the measurable pairs, as many as `num_pairs`."""
    return {
        "mean_correlation": pattern.mean,
        "std_correlation": pattern.std,
        "num_pairs": pattern.num_pairs,
        "all_correlations": [r for r in pattern.correlations if math.isfinite(r)],
        "strength": pattern.strength,
        "measure": measure,
    }
