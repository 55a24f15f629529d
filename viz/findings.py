"""What stands out in a profile, in sentences with their numbers."""

from collections.abc import Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from moescope.stats.periodicity import MODERATE, STRONG
from moescope.stats.similarity import RouterSimilarity
from moescope.viz.activation import NAMES
from moescope.viz.certainty import distance_finding, period_finding, reliability_finding
from moescope.viz.report_data import ReportData
from moescope.viz.use_findings import use_findings
from moescope.viz.weight_findings import weight_findings

FEW_SELECTIONS = 100
"""Below so many selections an expert on average a profile's shape is mostly chance: its relative error is about 10%."""


def findings(report: ReportData) -> list[str]:
    """Sentences for the head of a report: periods and distances, how much the run can carry, load, routers, weights."""
    if not report.tokens:
        return ["No tokens were routed: there is nothing to find."]
    found = [
        *_periods(report),
        amount(report),
        _load(report),
        *(use_findings(report.used) if report.used is not None else ()),
        router_finding(report.router_similarity) if report.router_similarity is not None else "",
        *(weight_findings(report.weights)[:2] if report.weights is not None else ()),
    ]
    return [sentence for sentence in found if sentence]


def _periods(report: ReportData) -> tuple[str, ...]:
    """What was found against chance; where that was left out, what was measured."""
    if not report.correlated:
        return ()
    if report.period is None or report.nulls is None:
        return (_distances(report),)
    return period_finding(report.period), distance_finding(report.nulls)


def _distances(report: ReportData) -> str:
    """The distances whose mean correlation is highest, against all others; nothing is held against chance."""
    shown = _by_mean(report.correlation.matrix, report.correlation.deltas)
    if not shown:
        return "No distance is spanned by two comparable pairs of layers: periods cannot be measured."
    others = [mean for _, mean, _ in shown if mean <= MODERATE]
    high = [entry for entry in shown if entry[1] > MODERATE]
    name = NAMES[report.measure]
    if not high:
        delta, mean, count = shown[0]
        return (
            f"No layer distance stands out in {name}: the highest mean correlation is {mean:+.2f} at Δ = {delta} "
            f"({count} pairs of layers)."
        )
    listed = ", ".join(f"Δ = {delta} ({mean:+.2f} over {count} pairs)" for delta, mean, count in high[:4])
    more = f" and {len(high) - 4} more" if len(high) > 4 else ""
    rest = f"; at every other distance the mean is {max(others):+.2f} or lower" if others else ""
    strength = "strongly" if high[0][1] > STRONG else "moderately"
    return (
        f"Expert use of layers is {strength} correlated at {listed}{more}{rest}. It was not held "
        "against chance, which was left out."
    )


def _load(report: ReportData) -> str:
    loaded = [load for load in report.loads if load.selections]
    if not loaded:
        return ""
    busiest = max(loaded, key=lambda load: load.max_over_mean)
    dead = sum(len(load.dead_experts) for load in loaded)
    experts = sum(load.experts for load in loaded)
    none = "Every expert was chosen at least once" if not dead else f"{dead:,} of {experts:,} experts were never chosen"
    return (
        f"{none}. The busiest expert of a layer carries {median(load.max_over_mean for load in loaded):.2f} times the "
        f"mean load in the median layer, and {busiest.max_over_mean:.2f} times in layer {busiest.layer}."
    )


def router_finding(similarity: RouterSimilarity) -> str:
    """The distance at which the same experts' router rows are most alike; "" if no two pairs can be compared."""
    shown = _by_mean(similarity.row_cosine, similarity.deltas)
    if not shown:
        return ""
    delta, mean, _ = shown[0]
    return (
        f"Router rows of the same expert are most alike at Δ = {delta}: mean cosine {mean:+.3f}, against "
        f"{median(value for _, value, _ in shown):+.3f} at the median distance."
    )


def _by_mean(matrix: NDArray[np.float64], deltas: Sequence[int]) -> list[tuple[int, float, int]]:
    """Distances that two pairs of layers span at least, the highest mean first: Δ, mean, pairs."""
    finite = np.isfinite(matrix)
    pairs = finite.sum(axis=0)
    usable = np.flatnonzero(pairs >= 2)
    means = np.where(finite, matrix, 0.0)[:, usable].sum(axis=0) / pairs[usable]
    order = np.argsort(-means, kind="stable")
    return [(deltas[usable[i]], float(means[i]), int(pairs[usable[i]])) for i in order]


def amount(report: ReportData) -> str:
    """How much the run can carry: what was measured of it, else the number of selections."""
    if report.reliability is not None:
        return reliability_finding(report.reliability)
    return caution(report) or (
        f"{report.tokens:,} tokens give {_selections(report):,.0f} selections an expert on average."
    )


def caution(report: ReportData) -> str:
    """A warning where the run is too short to carry a correlation, else ""."""
    if report.reliability is not None:
        return reliability_finding(report.reliability) if report.reliability.too_short else ""
    mean = _selections(report)
    if mean >= FEW_SELECTIONS:
        return ""
    return (
        f"This is a short run: {report.tokens:,} tokens give {mean:,.0f} selections an expert on average. Below "
        f"{FEW_SELECTIONS:,} the noise of counting hides real correlations; profile more prompts before you "
        "conclude anything."
    )


def _selections(report: ReportData) -> float:
    """Mean selections of an expert in the layer where they are fewest."""
    return min((load.selections / load.experts for load in report.loads if load.experts), default=0.0)
