"""The use of experts as plain data."""

from typing import Any

import numpy as np

from moescope.stats.specialisation import ALPHA
from moescope.stats.use import Coverage
from moescope.viz.report_data import ExpertsUsed

NOT_COMPUTED = "the use of experts was not computed"
ONE_DOMAIN = "the profile has one domain"
NO_PAIRS = "pairs of experts were not recorded"
NOT_PLACED = "experts cannot be placed: layers differ, or their number is not even"
MOST_PAIRS = 200
"""Pairs of experts that are listed: all of them would be most of the file."""


def use_trees(used: ExpertsUsed | None) -> dict[str, Any]:
    """Each part under its key; null with a reason where it is missing."""
    if used is None:
        absent = {"layers": None, "reason": NOT_COMPUTED}
        return dict.fromkeys(
            ("expert_use", "coverage", "phases", "specialisation", "coactivation", "placement"), absent
        )
    return {
        "expert_use": _use(used),
        "coverage": _coverage(used),
        "phases": _phases(used),
        "specialisation": _specialisation(used),
        "coactivation": _coactivation(used),
        "placement": _placement(used),
    }


def _use(used: ExpertsUsed) -> dict[str, Any]:
    use = used.use
    return {
        "hot_from": use.hot_from,
        "layers": [
            {
                "layer": layer,
                "effective_experts": use.effective[place],
                "entropy": use.entropy[place],
                "gini": use.gini[place],
                "jain": use.jain[place],
                "hot_experts": np.flatnonzero(use.hot[place]),
            }
            for place, layer in enumerate(use.layers)
        ],
    }


def _coverage(used: ExpertsUsed) -> dict[str, Any]:
    found = used.coverage
    return {
        "least_tokens": found.minimum,
        "layers": [
            {
                "layer": layer,
                "experts_under": found.under[place],
                "tokens_enough": _enough(found, place),
            }
            for place, layer in enumerate(found.layers)
        ],
    }


def _enough(found: Coverage, place: int) -> float | None:
    """Tokens in all after which every expert of a layer has enough; None if one was never chosen."""
    more = found.more_tokens[place, : found.experts[place]]
    return float(found.tokens + more.max()) if np.isfinite(more).all() else None


def _phases(used: ExpertsUsed) -> dict[str, Any]:
    found = used.phases
    return {
        "num_domains": found.domains,
        "layers": [
            {
                "layer": layer,
                "jensen_shannon": found.between.jensen_shannon[place],
                "total_variation": found.between.total_variation[place],
                "independent_jensen_shannon": found.floor[place],
            }
            for place, layer in enumerate(found.layers)
        ],
    }


def _specialisation(used: ExpertsUsed) -> dict[str, Any]:
    found = used.specialisation
    if found is None:
        return {"layers": None, "reason": ONE_DOMAIN}
    tests = int(np.isfinite(found.p_corrected).sum())
    return {
        "num_looks": tests,
        "alpha": ALPHA,
        "layers": [
            {
                "layer": layer,
                "p_value_all_looks": found.layer_p_corrected[place],
                "information": found.information.corrected[place],
                "information_low": found.information.low[place],
                "information_high": found.information.high[place],
            }
            for place, layer in enumerate(found.layers)
        ],
        "preferred": [
            {
                "layer": one.layer,
                "expert": one.expert,
                "domain": used.domains[one.domain],
                "share": one.share,
                "ratio": one.ratio,
                "interval_low": one.low,
                "interval_high": one.high,
                "p_value_all_looks": one.p_corrected,
            }
            for one in found.most_specialised(tests)
        ],
    }


def _coactivation(used: ExpertsUsed) -> dict[str, Any]:
    found = used.coactivation
    if found is None:
        return {"layers": None, "reason": NO_PAIRS}
    return {
        "layers": [
            {
                "layer": layer,
                "modularity": found.modularity[place],
                "chance_modularity": found.chance_modularity[place],
                "clusters": found.clusters[place, : found.experts[place]],
            }
            for place, layer in enumerate(found.layers)
        ],
        "strongest": [
            {
                "layer": pair.layer,
                "expert_i": pair.first,
                "expert_j": pair.second,
                "tokens": pair.together,
                "expected_tokens": pair.expected,
                "excess": pair.excess,
            }
            for pair in found.strongest(MOST_PAIRS)
        ],
    }


def _placement(used: ExpertsUsed) -> dict[str, Any]:
    found = used.placement
    if found is None:
        return {"layers": None, "reason": NOT_PLACED}
    return {
        "num_gpus": found.gpus,
        "num_redundant": found.redundant,
        "layers": [
            {
                "layer": layer,
                "in_order": found.contiguous[place],
                "by_load": found.greedy[place],
                "by_load_replicated": found.replicated[place],
            }
            for place, layer in enumerate(found.layers)
        ],
    }
