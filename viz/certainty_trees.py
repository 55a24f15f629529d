"""Nulls, the search for a period and reliability as plain data."""

from typing import Any

import numpy as np

from moescope.stats.nulls import CorrelationNull, LayerNulls
from moescope.stats.period_finder import LEVEL, PeriodFinding
from moescope.stats.reliability import Reliability
from moescope.viz.report_data import ReportData

NOT_COMPUTED = "not held against chance: permutations were 0, or correlation was left out"
NO_RELIABILITY = "reliability was not computed"


def null_tree(nulls: LayerNulls | None, reliability: Reliability | None) -> dict[str, Any]:
    """Mean correlation at each distance against chance; null with a reason where that was left out."""
    if nulls is None:
        return {"distances": None, "reason": NOT_COMPUTED}
    return {
        "measure": nulls.kind,
        "layer_indices": nulls.layers,
        "num_experts": nulls.free.experts,
        "router_groups": nulls.groups,
        "permutations": nulls.free.permutations,
        "seed": nulls.free.seed,
        "num_looks": nulls.free.looks,
        "p_value_largest": nulls.free.p_largest,
        "within_groups_p_value_largest": None if nulls.within_groups is None else nulls.within_groups.p_largest,
        "distances": [_distance(nulls, reliability, place) for place in range(nulls.free.looks)],
        "experts_not_used_everywhere": nulls.dead_experts,
        "pair_p_values": nulls.free.cell_p,
    }


def _distance(nulls: LayerNulls, reliability: Reliability | None, place: int) -> dict[str, Any]:
    """One distance: what was measured, what chance gives, and two checks."""
    null, delta = nulls.free, nulls.free.deltas[place]
    apart = nulls.distances.deltas.index(delta)
    ranks, everywhere = _at(nulls.ranks, delta), _at(nulls.without_dead, delta)
    corrected = reliability.corrected_at(delta) if reliability is not None and nulls.kind == "frequency" else None
    return {
        "delta": delta,
        "num_pairs": null.pairs[place],
        "mean_correlation": null.mean[place],
        "interval_low": nulls.intervals[0, place],
        "interval_high": nulls.intervals[1, place],
        "corrected_correlation": corrected,
        "chance_mean": null.null_mean[place],
        "chance_sd": null.null_sd[place],
        "chance_low": null.null_quantiles[0, place],
        "chance_high": null.null_quantiles[2, place],
        "threshold": null.threshold[place],
        "p_value": null.p[place],
        "p_value_all_looks": null.p_family[place],
        **_within_groups(nulls, place),
        "rank_correlation": ranks["mean"],
        "rank_p_value_all_looks": ranks["p"],
        "used_everywhere_correlation": everywhere["mean"],
        "used_everywhere_p_value_all_looks": everywhere["p"],
        "mean_divergence": nulls.distances.mean[apart],
        "divergence_chance_mean": nulls.distances.null_mean[apart],
        "divergence_chance_sd": nulls.distances.null_sd[apart],
        "divergence_p_value": nulls.distances.p[apart],
    }


def _within_groups(nulls: LayerNulls, place: int) -> dict[str, float | None]:
    """What chance gives where experts keep to their router groups; null without groups."""
    null = nulls.within_groups
    found = {
        "chance_mean": None if null is None else null.null_mean[place],
        "chance_low": None if null is None else null.null_quantiles[0, place],
        "chance_high": None if null is None else null.null_quantiles[2, place],
        "threshold": None if null is None else null.threshold[place],
        "p_value": None if null is None else null.p[place],
        "p_value_all_looks": None if null is None else null.p_family[place],
    }
    return {f"within_groups_{name}": value for name, value in found.items()}


def _at(null: CorrelationNull | None, delta: int) -> dict[str, float | None]:
    """Mean and p-value of another null at a distance, if it has that."""
    if null is None or delta not in null.deltas:
        return {"mean": None, "p": None}
    place = null.deltas.index(delta)
    return {"mean": float(null.mean[place]), "p": float(null.p_family[place])}


def period_tree(found: PeriodFinding | None) -> dict[str, Any]:
    """All periods that were looked at; null with a reason where the search was left out."""
    if found is None:
        return {"periods": None, "reason": NOT_COMPUTED}
    return {
        "measure": found.kind,
        **_outcome(found),
        "simulations": found.smooth.simulations,
        "seed": found.seed,
        "layers_in_blocks": None if found.model is None else found.model.jumps,
        "periods": [
            {
                "period": period,
                "num_pairs": found.pairs[place],
                "effect": found.effect[place],
                "interval_low": found.effect_interval[0, place],
                "interval_high": found.effect_interval[1, place],
                "statistic": found.statistic[place],
                "detectable_effect": found.smooth.detectable[place],
            }
            | {
                f"{name}_{key}": value
                for name, null in (("fading", found.smooth), ("unaligned", found.unaligned))
                for key, value in (
                    ("effect_low", null.effect_quantiles[0, place]),
                    ("effect_high", null.effect_quantiles[2, place]),
                    ("p_value", null.p[place]),
                    ("p_value_all_looks", null.p_family[place]),
                )
            }
            for place, period in enumerate(found.periods)
        ],
        "harmonics": [
            {
                "delta": harmonic.delta,
                "num_pairs": harmonic.pairs,
                "mean_correlation": harmonic.correlation,
                "contrast": harmonic.contrast,
            }
            for harmonic in found.harmonics
        ],
    }


def _outcome(found: PeriodFinding) -> dict[str, Any]:
    """What the search came to."""
    return {
        "period": found.period,
        "p_value_fading": found.smooth.p_period,
        "p_value_unaligned": found.unaligned.p_period,
        "smallest_detectable_effect": found.smallest_detectable,
        "num_looks": found.looks,
    }


def reliability_tree(found: Reliability | None) -> dict[str, Any]:
    """Reliability of each layer's selection frequencies; null with a reason where it was not computed."""
    if found is None:
        return {"layers": None, "reason": NO_RELIABILITY}
    return {
        "num_splits": found.splits,
        "num_tokens": found.tokens,
        "target": found.target,
        "tokens_enough_for_half_of_layers": found.tokens_enough_for_most,
        "too_short": found.too_short,
        "layers": [
            {
                "layer": layer,
                "reliability": found.reliability[place],
                "standard_error": found.reliability_error[place],
                "above_zero": found.defined[place],
                "tokens_enough": found.tokens_enough[place],
            }
            for place, layer in enumerate(found.layers)
        ],
        "corrected_correlation": found.corrected,
        "corrected_standard_error": found.corrected_error,
    }


def certainty_summary(report: ReportData) -> dict[str, Any]:
    """The key numbers, for `analysis_summary`: each null where it was left out."""
    period, nulls, reliability = report.period, report.nulls, report.reliability
    return {
        "period": None if period is None else _outcome(period),
        "distances_above_chance": None
        if nulls is None
        else [
            {"delta": delta, "mean_correlation": mean, "p_value_all_looks": p}
            for delta, mean, p in zip(nulls.free.deltas, nulls.free.mean, nulls.free.p_family, strict=True)
            if p <= LEVEL
        ],
        "reliability": None
        if reliability is None
        else {
            "median": float(np.median(reliability.reliability)) if reliability.layers else None,
            "tokens_enough_for_half_of_layers": reliability.tokens_enough_for_most,
            "too_short": reliability.too_short,
        },
    }
