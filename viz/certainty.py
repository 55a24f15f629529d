"""How sure a finding is, against what and after how many looks, in sentences with their numbers."""

import numpy as np

from moescope.stats.nulls import LayerNulls
from moescope.stats.period_finder import LEVEL, PeriodFinding
from moescope.stats.periodicity import PeriodicPattern
from moescope.stats.reliability import Reliability
from moescope.viz.wording import index_ranges, p_value

MOST_LISTED = 4
"""Distances that a sentence names; the others are counted."""


def period_finding(found: PeriodFinding) -> str:
    """Whether there is a period, how sure that is, and if there is none, what could have been seen."""
    if not found.looks:
        return "No period can be looked for: too few layers can be compared for one to come back."
    if found.period is None:
        return _no_period(found)
    place = found.periods.index(found.period)
    low, high = found.effect_interval[:, place]
    interval = f", 95% interval {low:+.2f} to {high:+.2f}" if np.isfinite([low, high]).all() else ""
    means = ", ".join(f"{each.correlation:+.2f} at Δ = {each.delta}" for each in found.harmonics[:MOST_LISTED])
    more = f" and {len(found.harmonics) - MOST_LISTED} more" * (len(found.harmonics) > MOST_LISTED)
    return (
        f"Expert use repeats every {found.period} layers: over {found.pairs[place]} pairs, layers at a multiple of "
        f"that correlate by {found.effect[place]:.2f} more than layers one nearer or further apart{interval}. "
        f"{p_value(found.smooth.p_family[place])} against alignment that only fades with distance, "
        f"{p_value(found.unaligned.p_family[place])} against experts in random order, each for the best of "
        f"{_looks(found)}. Mean r is {means}{more}."
    )


def _no_period(found: PeriodFinding) -> str:
    """That no period was found, and how much of one would have been."""
    looked = f"No period was found: {_looks(found)}"
    aligned, fading = found.unaligned.p_period, found.smooth.p_period
    if aligned <= LEVEL < fading:
        why = (
            f". Expert use is aligned ({p_value(aligned)} against experts in random order), but no more so at a period "
            f"than alignment that only fades with distance would be ({p_value(fading)} for the best)"
        )
    else:
        why = (
            f"; {p_value(fading)} for the best against alignment that only fades with distance, {p_value(aligned)} "
            "against experts in random order (both have to be small at the same period)"
        )
    seen = found.smallest_detectable
    could = (
        f" One whose layers correlate by {seen:.2f} more than layers one nearer or further apart would have been found "
        "four times out of five."
    )
    return f"{looked}{why}.{could if np.isfinite(seen) else ''}"


def _looks(found: PeriodFinding) -> str:
    one = f"{found.looks} periods looked at" if found.looks > 1 else "one period looked at"
    return f"{one} ({index_ranges(found.periods)})"


def distance_finding(nulls: LayerNulls) -> str:
    """At which distances layers correlate more than chance allows; "" where no two can be compared."""
    null = nulls.free
    if not np.isfinite(null.p_family).any():
        return ""
    above = np.flatnonzero(null.p_family <= LEVEL)
    if not above.size:
        standing = (null.mean - null.null_mean) / np.where(null.null_sd > 0, null.null_sd, np.nan)
        best = int(np.nanargmax(standing))
        return (
            f"At none of {null.looks} distances do layers correlate more than with experts in random order: what "
            f"stands out most is mean r = {null.mean[best]:+.2f} at Δ = {null.deltas[best]}, "
            f"{p_value(null.p_largest)} for the largest of {null.looks} looks; there, anything above "
            f"{null.threshold[best]:+.2f} would have counted.{_within_groups(nulls)}"
        )
    order = above[np.argsort(-null.mean[above], kind="stable")]
    listed = ", ".join(_distance(nulls, int(place)) for place in order[:MOST_LISTED])
    more = f" and {len(order) - MOST_LISTED} more" * (len(order) > MOST_LISTED)
    return (
        f"At {len(above)} of {null.looks} distances layers correlate more than with experts in random order, each with "
        f"p ≤ {LEVEL} for all looks together: {listed}{more}.{_within_groups(nulls)}{_doubts(nulls, int(order[0]))}"
    )


def _distance(nulls: LayerNulls, place: int) -> str:
    """One distance with its interval and what chance gives."""
    null, (low, high) = nulls.free, nulls.intervals[:, place]
    interval = f", 95% interval {low:+.2f} to {high:+.2f}" if np.isfinite([low, high]).all() else ""
    return (
        f"Δ = {null.deltas[place]} (mean r {null.mean[place]:+.2f}{interval}; chance up to "
        f"{null.threshold[place]:+.2f}; {p_value(null.p_family[place])})"
    )


def _within_groups(nulls: LayerNulls) -> str:
    """What is left where experts change places within the router's groups alone; "" without groups."""
    null = nulls.within_groups
    if null is None:
        return ""
    among = f" Within the router's {nulls.groups} groups of experts, whichever of them are busy,"
    above = np.flatnonzero(null.p_family <= LEVEL)
    if not above.size:
        return f"{among} they do at no distance ({p_value(null.p_largest)} for the largest of {null.looks} looks)."
    order = above[np.argsort(null.p_family[above], kind="stable")]
    listed = ", ".join(f"Δ = {null.deltas[i]} ({p_value(null.p_family[i])})" for i in order[:MOST_LISTED])
    more = f" and {len(order) - MOST_LISTED} more" * (len(order) > MOST_LISTED)
    return f"{among} they do at {len(above)} of {null.looks}: {listed}{more}."


def _doubts(nulls: LayerNulls, place: int) -> str:
    """What speaks against the distance that stands out most: ranks, or the experts that are used everywhere."""
    delta = nulls.free.deltas[place]
    checks = ((nulls.ranks, "Ranks"), (nulls.without_dead, "The experts used in every layer"))
    doubts = ""
    for null, name in checks:
        if null is not None and delta in null.deltas:
            p = null.p_family[null.deltas.index(delta)]
            if not p <= LEVEL:
                doubts += f" {name} alone do not show it at Δ = {delta} ({p_value(p)})."
    return doubts


def reliability_finding(found: Reliability) -> str:
    """How far another run would give the same, and how many tokens would be enough; "" without tokens."""
    if not found.tokens:
        return ""
    if not np.isfinite(found.reliability_error).any():
        parts = f"{found.splits} part{'s' * (found.splits != 1)}"
        return (
            f"How far other prompts would give the same cannot be told: the prompts fall into {parts} that can be held "
            "against each other, and three are needed; profile more prompts."
        )
    if not found.defined.any():
        return (
            f"{found.tokens:,} tokens are too few: in no layer is expert use shown to be more than the draw of the "
            "prompts, so a low correlation says nothing; profile more prompts."
        )
    values = found.reliability[found.defined]
    lowest = int(np.nanargmin(np.where(found.defined, found.reliability, np.nan)))
    unsure = int((~found.defined).sum())
    lacking = f"; in {unsure} of {len(found.layers)} layers it is not shown to be above 0" if unsure else ""
    return (
        "Over other prompts of this kind, another run of this size would give profiles that correlate by "
        f"{np.median(values):.2f} with these in the median layer, by {values.min():.2f} in layer "
        f"{found.layers[lowest]}{lacking}. {_tokens_enough(found)}"
    )


def _tokens_enough(found: Reliability) -> str:
    """Whether the run is long enough for most layers."""
    wanted = found.tokens_enough_for_most
    aim = f"for {found.target:.1f} in half of the layers"
    if not found.too_short:
        return f"That is enough: {aim}, about {_rounded(wanted)} tokens would do, and there are {found.tokens:,}."
    if np.isfinite(wanted):
        return (
            f"That is too little to conclude from a low correlation, since noise lowers all: {aim}, about "
            f"{_rounded(wanted)} tokens are needed, and there are {found.tokens:,}."
        )
    return (
        "That is too little to conclude from a low correlation, since noise lowers all; how many tokens would be "
        "enough cannot be told yet."
    )


def _rounded(tokens: float) -> str:
    """Tokens to two digits, at least one."""
    return f"{int(float(f'{max(tokens, 1.0):.2g}')):,}"


def standing(pattern: PeriodicPattern, nulls: LayerNulls | None) -> str:
    """What to call the mean correlation at an interval.

    The documented strength; but what was held against chance is not called weak: it is more than chance, or no more.
    """
    if nulls is None or pattern.delta not in nulls.free.deltas:
        return pattern.strength
    p = nulls.free.p_family[nulls.free.deltas.index(pattern.delta)]
    if not np.isfinite(p):
        return pattern.strength
    verdict = f"{'more' if p <= LEVEL else 'no more'} than chance, {p_value(p)}"
    return verdict if pattern.strength == "weak" else f"{pattern.strength}, {verdict}"
