"""What weights say as plain data, under the keys that reports and the pass over weights have in common."""

from collections.abc import Sequence
from typing import Any

from moescope.stats.expert_matching import ExpertMatch, LayerPair, Null, PairVerdict, Verdict
from moescope.stats.expert_similarity import PARTS, UnusableExpert
from moescope.stats.pairwise import finite_mean
from moescope.stats.similarity import RouterSimilarity
from moescope.stats.weight_similarity import WeightChange, WeightCoverage, WeightSimilarity

NO_ROUTERS = "router weights were not read"
NO_EXPERTS = "the experts' weights were not read"


def router_tree(similarity: RouterSimilarity | None) -> dict[str, Any]:
    """Similarity of router weights; null with a reason where they were not read."""
    if similarity is None:
        return {
            "cosine_similarity_matrix": None,
            "column_norm_correlation": None,
            "router_layers": None,
            "reason": NO_ROUTERS,
        }
    return {
        "cosine_similarity_matrix": similarity.cosine,
        "column_norm_correlation": similarity.norm_correlation,
        "row_cosine": similarity.row_cosine,
        "deltas": similarity.deltas,
        "router_layers": similarity.layers,
    }


def expert_tree(result: WeightSimilarity | None) -> dict[str, Any]:
    """Similarity of experts; null with a reason where they were not read."""
    if result is None:
        return {"by_distance": None, "reason": NO_EXPERTS}
    same = result.same_index
    return {
        "layer_indices": result.layers,
        "num_experts": result.experts,
        "by_distance": {
            str(raw.delta): {
                "num_pairs": raw.num_pairs,
                "mean_cosine": raw.mean,
                "median_cosine": raw.median,
                "std_cosine": raw.std,
                "mean_centred_cosine": own.mean,
                "median_centred_cosine": own.median,
                "std_centred_cosine": own.std,
                "cosine": raw.cosine,
                "centred_cosine": own.cosine,
            }
            for raw, own in zip(result.by_distance, result.centred_by_distance, strict=True)
        },
        "layer_similarity": {
            "cosine": same.together,
            "centred_cosine": finite_mean(same.centred, axis=0),
            "part_cosine": dict(zip(PARTS, same.part_together, strict=True)),
            "part_centred_cosine": {
                part: finite_mean(own, axis=0) for part, own in zip(PARTS, same.part_centred, strict=True)
            },
        },
        "within_layer_cosine": result.within,
        "norms": same.norms.T,
        "unusable_experts": unusable_tree(result.unusable),
        "matches": match_trees(result.matches, result.verdict),
        "verdict": verdict_tree(result.verdict),
        "coverage": coverage_tree(result.coverage),
    }


def change_tree(change: WeightChange) -> dict[str, Any]:
    """What training has changed, expert by expert."""
    return {
        "layer_indices": change.layers,
        "num_experts": change.experts,
        "cosine": change.cosine,
        "relative_change": change.relative_change,
        "part_cosine": dict(zip(PARTS, change.part_cosine, strict=True)),
        "part_relative_change": dict(zip(PARTS, change.part_relative_change, strict=True)),
        "router_cosine": change.router_cosine,
        "router_relative_change": change.router_relative_change,
        "unusable_experts": unusable_tree(change.unusable),
        "matches": match_trees(change.matches, change.verdict),
        "verdict": verdict_tree(change.verdict),
        "coverage": coverage_tree(change.coverage),
    }


def unusable_tree(experts: Sequence[UnusableExpert]) -> list[dict[str, Any]]:
    """Experts that have no cosine, and why."""
    return [{"layer": one.layer, "expert": one.expert, "fault": one.fault} for one in experts]


def coverage_tree(coverage: WeightCoverage) -> dict[str, Any]:
    """How much of the weights was read."""
    return {
        "sketched": coverage.sketched,
        "weights_per_expert_read": coverage.coordinates,
        "weights_per_expert": coverage.coordinates_total,
        "bytes_read": coverage.bytes_read,
        "bytes_total": coverage.bytes_total,
    }


def verdict_tree(verdict: Verdict | None) -> dict[str, Any] | None:
    """What the matches say together."""
    if verdict is None:
        return None
    return {
        "kind": verdict.kind,
        "num_pairs": len(verdict.pairs),
        "num_related": verdict.related,
        "num_tests": verdict.tests,
        "alpha": verdict.alpha,
    }


def match_trees(matches: Sequence[LayerPair], verdict: Verdict | None) -> list[dict[str, Any]]:
    """One entry a matched pair, with its verdict; without the tables of all experts against all."""
    pairs = verdict.pairs if verdict is not None else ()
    return [
        _pair_tree(judged)
        | {"weights": _match_tree(match.weights), "neuron_order_free_features": _match_tree(match.features)}
        for match, judged in zip(matches, pairs, strict=True)
    ]


def _pair_tree(pair: PairVerdict) -> dict[str, Any]:
    return {
        "layer_i": pair.first,
        "layer_j": pair.second,
        "delta": pair.second - pair.first,
        "kind": pair.kind,
        "mean_cosine": pair.cosine,
        "null_level": pair.level,
        "p_value_corrected": pair.p_value,
        "share_with_own_index": pair.identity,
    }


def _match_tree(match: ExpertMatch | None) -> dict[str, Any] | None:
    if match is None:
        return None
    return {
        "centred_cosine": match.cosine,
        "cosine": match.raw_cosine,
        "partner": [int(expert) if expert >= 0 else None for expert in match.partner],
        "partner_centred_cosine": match.partner_cosine,
        "num_own_index": match.identity,
        "num_matched": match.measured,
        "same_index_test": _null_tree(match.same_index),
        "best_match_test": _null_tree(match.best_match),
    }


def _null_tree(null: Null | None) -> dict[str, Any] | None:
    if null is None:
        return None
    return {"value": null.value, "null_mean": null.mean, "null_std": null.std, "z": null.z, "p_value": null.p_value}
