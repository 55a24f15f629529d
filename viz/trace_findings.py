"""What the tokens of a trace say, in sentences with their numbers and chance beside them."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.stats.layer_agreement import LayerAgreement, excess_by_distance
from moescope.stats.pairwise import by_distance, finite_mean
from moescope.stats.repetition import Repetition
from moescope.stats.token_groups import TokenGroups
from moescope.stats.vocabulary import VocabularyUse
from moescope.viz.trace_analysis import TraceAnalysis
from moescope.viz.trace_figures import most_particular, position_names, token_name, window_names
from moescope.viz.wording import counted

CLEAR = 2.0
"""Times its floor from which a distance is called clear at least: tokens of a request are not independent."""
FEW_REQUESTS = 30
"""Requests below which it is said that results need not hold for others."""
SLIGHT = 0.01
"""Share of experts beyond chance that is not worth a sentence of its own."""
SETTLED_FROM = 0.1
"""Share of the tokens at which the sentence on settling looks."""


def trace_findings(analysis: TraceAnalysis) -> list[str]:
    """Sentences for the head of a page: first what a reader asks first.

    Args:
        analysis: the results.
    """
    found = (
        _repetition(analysis.repetition),
        _order(analysis.repetition),
        _next_layer(analysis.agreement),
        _same_index(analysis.agreement),
        _vocabulary(analysis),
        _specific(analysis),
        _settling(analysis),
        _first_token(analysis.position),
        _later(analysis.position),
        _time(analysis),
    )
    return [sentence for sentence in found if sentence]


def trace_notes(analysis: TraceAnalysis) -> list[str]:
    """Sentences on what the numbers rest on, where that is not every token."""
    notes = []
    if analysis.requests < FEW_REQUESTS:
        notes.append(
            f"These are the tokens of {counted(analysis.requests, 'request')}. Chance levels of layers, token ids, "
            "settling and position take tokens as independent draws, which those of one request are not: with so few, "
            "what is beyond chance holds for these requests, and need not for others."
        )
    if analysis.chosen:
        notes.append("Requests were chosen by number: all numbers are those of these requests.")
    if analysis.agreement.tokens < analysis.tokens:
        notes.append(
            f"Pairs of layers rest on {analysis.agreement.tokens:,} tokens spread evenly over the trace "
            f"({_percent(analysis.agreement.tokens / analysis.tokens)}); --pair-tokens takes more."
        )
    if analysis.anchors < analysis.tokens:
        notes.append(
            f"Tokens further back than one, experts held for several tokens, and random tokens of the request rest on "
            f"{analysis.anchors:,} tokens drawn at random ({_percent(analysis.anchors / analysis.tokens)}); the share "
            "kept at the next token is that of all."
        )
    return notes


def _repetition(found: Repetition) -> str:
    if not found.pairs:
        return "No token has its predecessor in this trace: what tokens keep cannot be said."
    return (
        f"A token keeps {_percent(_mean(found.kept))} of the experts of the token before it, mean of "
        f"{len(found.layers)} layers{_interval(found.kept_interval, _percent)}{_range(found.kept, found.layers)}; by "
        "chance, any two tokens of the trace share "
        f"{_percent(_mean(found.chance))}, two of one request {_percent(_mean(found.within))}. An expert stays for "
        f"{_mean(found.run):.2f} tokens, by chance {_mean(found.run_chance):.2f}."
    )


def _order(found: Repetition) -> str:
    """Whether neighbours are more alike than tokens of a request are anyway, and how far back."""
    kept, within, chance = (_mean(values) for values in (found.kept, found.within, found.chance))
    if not all(map(math.isfinite, (kept, within, chance))):
        return ""
    if max(abs(kept - chance), abs(kept - within)) < SLIGHT and _within(found.order_interval, SLIGHT):
        return "Neighbours share what any two tokens do: the order of tokens leaves no trace in the routing."
    unsure = (
        ""
        if np.isfinite(found.order_interval).all()
        else " From so few requests, how sure this is cannot be said: tokens of one request are no independent draws."
    )
    shares = {lag: _mean(row) for lag, row in zip(found.lags, found.at_lag, strict=True)}
    measured = {lag: share for lag, share in shares.items() if math.isfinite(share)}
    far = max(measured, default=1)
    where = f" Tokens {far} apart share {_percent(measured[far])}." if far > 1 else ""
    return (
        f"Of what neighbours share beyond chance, {_points(within - chance)}"
        f"{_interval(found.request_interval, _points)} come from the request's own mix of experts and "
        f"{_points(kept - within)}{_interval(found.order_interval, _points)} from standing next to each "
        f"other.{unsure}{where}"
    )


def _next_layer(found: LayerAgreement) -> str:
    pairs = np.arange(len(found.layers) - 1)
    after = found.explained[pairs, pairs + 1] if len(pairs) else np.empty(0)
    if not np.isfinite(after).any():
        return "What a layer tells of the next cannot be measured: there are too few layers or tokens."
    chance = _mean(found.explained_chance[pairs, pairs + 1])
    best = np.unravel_index(int(np.nanargmax(found.explained)), found.explained.shape)
    told, most = found.explained[best], found.explained_noise[best]
    which = (
        f"Most is told by layer {found.layers[best[0]]} of layer {found.layers[best[1]]}: {_percent(float(told))}."
        if told > most
        else f"No layer tells more of another than chance may (up to {_percent(float(most))} in one pair)."
    )
    return (
        f"A token's experts in one MoE layer explain {_percent(_mean(after))} of the variance of those in the next "
        f"(mean of {np.isfinite(after).sum()} pairs; by chance {chance:.2%}, already taken off). {which}"
    )


def _same_index(found: LayerAgreement) -> str:
    """The distance at which tokens keep the index of their experts most."""
    deltas = list(range(1, found.layers[-1] - found.layers[0] + 1))
    beyond, reach = excess_by_distance(found, deltas)
    if not np.isfinite(beyond).any():
        return ""
    sure = np.where(beyond > reach, beyond, np.nan)
    best = int(np.nanargmax(sure if np.isfinite(sure).any() else beyond))
    excess, interval = float(beyond[best]), np.array([beyond[best] - reach[best], beyond[best] + reach[best]])
    at = f"{_points(excess)}{_interval(interval, _points)}"
    unsure = "" if math.isfinite(reach[best]) else " (too few requests to say how sure that is)"
    if excess < SLIGHT or excess <= reach[best]:
        return (
            "Token by token, layers share experts of the same index no more than chance may, at any distance (largest "
            f"excess {at}, at Δ = {deltas[best]}){unsure}."
        )
    overlap, chance = (
        float(finite_mean(by_distance(matrix, found.layers, deltas[best : best + 1]), 0)[0])
        for matrix in (found.overlap, found.overlap_chance)
    )
    return (
        f"Token by token, experts of the same index are shared most by layers Δ = {deltas[best]} apart: "
        f"{_percent(overlap)}, by chance {_percent(chance)}, so {at}{unsure}; at the median distance "
        f"{_points(_median(beyond))} beyond chance."
    )


def _vocabulary(analysis: TraceAnalysis) -> str:
    found = analysis.vocabulary
    if not np.isfinite(found.decided).any():
        return "What token ids decide cannot be measured: there are too few different tokens, or too few of each."
    return (
        f"The token id decides {_percent(_mean(found.decided))} of which experts are chosen, mean of layers (0% by "
        f"chance, 100% where an id always has the same experts){_range(found.decided, found.layers)}; over the "
        f"{len(found.tokens):,} most frequent ids, {_percent(found.covered)} of the tokens."
    )


def _specific(analysis: TraceAnalysis) -> str:
    found = analysis.vocabulary
    if not found.specific:
        return ""
    best = found.specific[0]
    ids = [place for place in most_particular(analysis) if _stands_out(found, int(place))][:3]
    named = ", ".join(token_name(analysis, int(found.tokens[place])) for place in ids)
    which = (
        f"The ids whose experts differ most from those of others: {named}." if ids else "No id has experts of its own."
    )
    if not best.clear:
        return f"No expert has token ids of its own beyond chance. {which}"
    (token, share), expected = best.tokens[0], best.expected[0]
    return (
        f"The expert with the most particular tokens is expert {best.expert} of layer {best.layer}: {_percent(share)} "
        f"of its selections by frequent ids are of token {token_name(analysis, token)}, which is {_percent(expected)} "
        f"of these tokens. {which}"
    )


def _stands_out(found: VocabularyUse, place: int) -> bool:
    """Whether the experts of a frequent id are clearly others, mean over layers."""
    return _mean(found.specificity[place]) >= (CLEAR - 1) * _mean(found.specificity_floor[place])


def _settling(analysis: TraceAnalysis) -> str:
    found = analysis.settling
    if len(found.tokens) < 2:
        return ""
    place = int(np.argmin(np.abs(found.tokens[:-1] - SETTLED_FROM * analysis.tokens)))
    late = int(found.dead[place] - found.dead[-1])
    unused = f" {late:,} experts had still to be selected for the first time." if late else ""
    distance, floor = _mean(found.distance[place]), _mean(found.floor[place])
    correlation = (
        f", and correlations between layers are {found.correlation[place]:.3f} off"
        if math.isfinite(found.correlation[place])
        else ""
    )
    return (
        f"After {found.tokens[place]:,} tokens ({_percent(float(found.tokens[place]) / analysis.tokens)}) the experts' "
        f"shares lie {distance:.2g} bits from those of the whole, {_times(distance, floor)} what as many tokens drawn "
        f"at random would{correlation}.{unused} Requests are taken in order: where their kinds come one after the "
        "other, a profile settles late."
    )


def _first_token(found: TokenGroups) -> str:
    if len(found.tokens) < 2 or not np.isfinite(found.from_rest[0]).any() or found.starts[1] != 1:
        return ""
    distance, floor = _mean(found.from_rest[0]), _mean(found.rest_floor[0])
    clear = "" if distance >= max(CLEAR, found.clear) * floor else ": no more than so few tokens bring"
    return (
        f"The first token of a request is routed {distance:.2g} bits from all others, {_times(distance, floor)} chance"
        f"{clear}."
    )


def _later(found: TokenGroups) -> str:
    """The position after the first whose routing is furthest from all others, in units of chance."""
    if len(found.tokens) < 3:
        return ""
    return _furthest(found, position_names(found), slice(1, None), "After the first token, position", "others")


def _time(analysis: TraceAnalysis) -> str:
    found = analysis.time
    if len(found.tokens) < 3:
        return f"The longest request has {counted(int(found.tokens.sum()), 'token')}: too few to look at its course."
    course = _mean(found.from_before.ravel()), _mean(found.before_floor.ravel())
    return (
        f"In the longest request ({analysis.longest}; {int(found.tokens.sum()):,} tokens), windows of "
        f"{analysis.window} tokens lie {course[0]:.2g} bits from the one before, {_times(*course)} chance. "
        + _furthest(found, window_names(found), slice(None), "The window that begins at", "the rest of the request")
    )


def _furthest(found: TokenGroups, names: Sequence[str], within: slice, what: str, others: str) -> str:
    distance, floor = finite_mean(found.from_rest, 1)[within], finite_mean(found.rest_floor, 1)[within]
    ratio = distance / np.where(floor > 0, floor, np.nan)
    if not np.isfinite(ratio).any():
        return ""
    place = int(np.nanargmax(ratio))
    clear = "" if ratio[place] >= max(CLEAR, found.clear) else ": no more than the order of tokens brings"
    name = list(names)[within][place]
    many = name.endswith("+") or "-" in name
    return (
        f"{what}{'s' * many} {name} stand{'s' * (not many)} furthest from {others}: "
        f"{distance[place]:.2g} bits, {_times(float(distance[place]), float(floor[place]))} chance{clear}."
    )


def _interval(interval: NDArray[np.float64], written: Callable[[float], str]) -> str:
    """A 95% interval in brackets; nothing where there is none."""
    low, high = interval.tolist()
    return f" (95% interval {written(low)} to {written(high)})" if math.isfinite(low + high) else ""


def _within(interval: NDArray[np.float64], reach: float) -> bool:
    """Whether all of an interval is so near to 0; not where there is none."""
    return bool((np.abs(interval) < reach).all())


def _range(values: NDArray[np.float64], layers: Sequence[int]) -> str:
    """From which layer to which; nothing for one layer."""
    if np.isfinite(values).sum() < 2:
        return ""
    low, high = int(np.nanargmin(values)), int(np.nanargmax(values))
    return (
        f", from {_percent(float(values[low]))} in layer {layers[low]} to {_percent(float(values[high]))} in layer "
        f"{layers[high]}"
    )


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values[np.isfinite(values)]))


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{share + 0.0:.1%}"


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f} points"


def _times(value: float, floor: float) -> str:
    """How many times its floor."""
    if floor <= 0:
        return "∞ ×" if value > 0 else "1.0 ×"
    ratio = value / floor
    return f"{ratio:.1f} ×" if ratio < 100 else f"{ratio:,.0f} ×"
