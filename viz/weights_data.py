"""The results of a pass over weights as plain data, strict JSON throughout: what is not defined is null."""

from typing import Any

from moescope.stats.weight_similarity import WeightChange, WeightSimilarity
from moescope.viz.structured import to_strict_json
from moescope.viz.weight_trees import change_tree, expert_tree, router_tree


def weights_data(result: WeightSimilarity | WeightChange) -> dict[str, Any]:
    """All results, for `weights.json`; its keys and those of `analysis_data` mean the same.

    Args:
        result: the results; of a change, `expert_change` stands in place of the similarities.

    Returns:
        A tree of dict, list, str, int, finite float, bool and None; see `schema("weights")`.
    """
    data: dict[str, Any] = {"metadata": _metadata(result)}
    if isinstance(result, WeightChange):
        data["expert_change"] = change_tree(result)
    else:
        data["router_similarity"] = router_tree(result.routers)
        data["expert_similarity"] = expert_tree(result)
    strict: dict[str, Any] = to_strict_json(data)
    return strict


def _metadata(result: WeightSimilarity | WeightChange) -> dict[str, Any]:
    shared = {
        "model_id": result.model_id,
        "architecture": result.architecture,
        "engine": result.engine,
        "seconds": result.seconds,
        "versions": result.versions,
        "created": result.created,
    }
    if isinstance(result, WeightChange):
        return shared | {"against_id": result.against_id}
    return shared | {"hidden": result.hidden, "expert_width": result.width, "dtypes": result.dtypes}
