"""What stands out in the weights of a checkpoint, in sentences with their numbers."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from moescope.stats.expert_matching import Kind, PairVerdict, Verdict
from moescope.stats.expert_similarity import PARTS, DistanceSimilarity, UnusableExpert
from moescope.stats.pairwise import by_distance, finite_mean
from moescope.stats.weight_similarity import WeightChange, WeightCoverage, WeightSimilarity
from moescope.viz.weights import clearest_first
from moescope.viz.wording import signed

ALIKE, APART = 0.5, 0.1
"""Mean cosine of two experts of a layer from which they are called alike, and up to which apart: a rule of thumb."""
SHARED = 0.1
"""Gap between raw and centred mean cosine from which a reader is told what makes it."""
MOST_NAMED = 12
"""Unusable experts named one by one."""
MOST_DISTANCES = 4
"""Distances named one by one: those with the highest cosine, as far as it is above chance, and one in any case."""
BY_CHANCE = 3.0
"""Standard deviations of one pair's null from which a distance is named as above chance: a rule of thumb."""

MEANING: dict[Kind, str] = {
    "same index": "experts keep their index and neurons their order",
    "experts permuted": "experts are the same in another order, with neurons in place",
    "neurons permuted": "experts keep their index, with neurons in another order",
    "both": "experts are the same, in another order and with neurons in another order",
    "none": "no relation",
    "not measurable": "no test could be made",
}
"""What each kind of relation says about two layers."""


def verdict_in_words(result: WeightSimilarity | WeightChange) -> str:
    """What the matches say together, with the mean cosine and the null level it has to pass."""
    found, change = result.verdict, isinstance(result, WeightChange)
    what = "layers" if change else "pairs of layers"
    if found is None:
        return f"No {what} were matched, so no relation was tested."
    if found.kind == "not measurable":
        return f"Not measurable: of {len(found.pairs):,} matched {what} none has enough usable experts for a test."
    if found.kind == "none":
        best = found.pairs[clearest_first(found)[0]]
        text = (
            f"None: no relation in {_of(found, what)}. The closest, {_layers(best)}, has mean cosine "
            f"{best.cosine:.3f}; the null level is {best.level:.3f} (p = {best.p_value:.2g})"
        )
    else:
        chosen = [pair for pair in found.pairs if pair.kind == found.kind]
        cosine, level = (float(np.mean([getattr(pair, name) for pair in chosen])) for name in ("cosine", "level"))
        others = found.related - len(chosen)
        text = (
            f"{found.kind.capitalize()}: in {len(chosen):,} of {_of(found, what)} {MEANING[found.kind]}; mean cosine "
            f"{cosine:.3f}, null level {level:.3f}" + (f". Related in another way: {others:,}" if others else "")
        )
    if result.coverage.sketched:
        weight = "does not rule a relation out" if found.kind == "none" else "says where to look"
        return f"{text}. This is a sketch: it {weight}; the pass over all weights decides."
    return f"{text}."


def weight_findings(result: WeightSimilarity | WeightChange, *, by_distance: bool = True) -> list[str]:
    """Sentences for the head of a page: what a careful reader asks first; the verdict itself is `verdict_in_words`.

    Args:
        result: the results.
        by_distance: False leaves out the sentence on each distance, for where a table says the same.
    """
    found = _change(result) if isinstance(result, WeightChange) else _similarity(result, by_distance)
    return [sentence for sentence in (*found, _unusable(result.unusable), _coverage(result.coverage)) if sentence]


def pairs_by_distance(found: Verdict) -> dict[int, tuple[int, int]]:
    """By distance in model layers, nearest first: related pairs and tested pairs."""
    tested = [pair for pair in found.pairs if pair.kind != "not measurable"]
    counts = Counter(pair.second - pair.first for pair in tested)
    related = Counter(pair.second - pair.first for pair in tested if pair.kind != "none")
    return {delta: (related[delta], counts[delta]) for delta in sorted(counts)}


def _similarity(result: WeightSimilarity, each_distance: bool) -> list[str]:
    return [
        _stacked(result),
        _same_index(result) if each_distance else "",
        _peak(result),
        _within(result),
        _amount_matched(result),
    ]


def _stacked(result: WeightSimilarity) -> str:
    """Whether layers are copies of others, and how far apart."""
    found = result.verdict
    if found is None:
        return "Whether layers are copies of other layers was not tested: no pairs of layers were matched."
    if found.kind == "not measurable":
        return "Whether layers are copies of other layers cannot be told: no test could be made."
    if not found.related:
        return (
            f"Nothing says that this model is stacked: none of {_of(found, 'pairs of layers')} is related, in place, "
            "with experts permuted" + (", or with neurons permuted." if _has_features(result) else ".")
        )
    spread = pairs_by_distance(found)
    related = {delta: counts for delta, counts in spread.items() if counts[0]}
    listed = ", ".join(f"Δ = {delta} ({one} of {all_} tested)" for delta, (one, all_) in list(related.items())[:6])
    more = f" and {len(related) - 6} more" if len(related) > 6 else ""
    return (
        f"Layers {'seem to ' if result.coverage.sketched else ''}repeat: {found.related:,} of {len(found.pairs):,} "
        f"matched pairs of layers are related, at {listed}{more}{_period(list(related), list(spread))}."
    )


def _period(related: Sequence[int], tested: Sequence[int]) -> str:
    """What the distances of related layers have in common, if others were tested; "" if nothing.

    Layers that repeat every three are related at every twelve, too: a period is one only if no divisor of it could be.
    """
    step = math.gcd(*related)
    if len(related) < 2 or min(related) > step or all(delta % step == 0 for delta in tested):
        return ""
    untested = [divisor for divisor in range(1, step) if step % divisor == 0 and divisor not in tested]
    if untested:
        return f", all multiples of {step} (Δ = {', '.join(map(str, untested))} not tested)"
    return f", all multiples of {step}, as in a model stacked from {step} layers"


def _same_index(result: WeightSimilarity) -> str:
    """Mean cosine at each distance, raw and centred, beside the null level of the matched pairs."""
    both = zip(result.by_distance, result.centred_by_distance, strict=True)
    measured = [(raw, own) for raw, own in both if raw.num_pairs]
    if not measured:
        return "No two layers at the distances asked for have experts that can be compared."
    highest = sorted(measured, key=_height, reverse=True)[:MOST_DISTANCES]
    nulls = [pair.weights.same_index for pair in result.matches if pair.weights is not None and pair.weights.same_index]
    chance = max((null.mean + BY_CHANCE * null.std for null in nulls), default=-np.inf)
    highest = [both for both in highest if _height(both) > chance] or highest[:1]
    listed = "; ".join(_at_distance(result, raw, own) for raw, own in measured if (raw, own) in highest)
    left_out = len(measured) - len(highest)
    more = f"; lower at the other {left_out} distances" if left_out else ""
    gap = max((raw.mean - own.mean for raw, own in measured if own.num_pairs), default=0.0)
    shared = (
        " The raw cosine may come from a mean that all experts share; the centred one is what counts."
        if gap > SHARED
        else ""
    )
    return f"Same expert, mean over experts and pairs of layers: {listed}{more}.{shared}"


def _height(both: tuple[DistanceSimilarity, DistanceSimilarity]) -> float:
    """The centred mean cosine at a distance; the raw one where nothing could be centred."""
    raw, centred = both
    return centred.mean if centred.num_pairs else raw.mean


def _at_distance(result: WeightSimilarity, raw: DistanceSimilarity, centred: DistanceSimilarity) -> str:
    second = f"{signed(centred.mean)} centred" if centred.num_pairs else "not centred"
    nulls = [
        pair.weights.same_index
        for pair in result.matches
        if pair.second - pair.first == raw.delta and pair.weights is not None and pair.weights.same_index is not None
    ]
    mean, spread = (float(np.mean([getattr(null, name) for null in nulls] or 0.0)) for name in ("mean", "std"))
    pairs = "pair" if raw.num_pairs == 1 else "pairs"
    null = f", by chance {signed(mean)} ± {spread:.3f} for one pair" if nulls else ""
    return f"Δ = {raw.delta}: {signed(raw.mean)} raw, {second}{null} ({raw.num_pairs} {pairs} of layers)"


def _peak(result: WeightSimilarity) -> str:
    """Where among all distances the centred cosine is highest; distances with two pairs of layers at least."""
    layers = result.same_index.layers
    deltas = list(range(1, layers[-1] - layers[0] + 1))
    matrix = by_distance(finite_mean(result.same_index.centred, axis=0), layers, deltas)
    usable = [column for column in range(len(deltas)) if np.isfinite(matrix[:, column]).sum() > 1]
    if len(usable) < 2:
        return ""
    means = [float(np.nanmean(matrix[:, column])) for column in usable]
    best = int(np.argmax(means))
    return (
        f"Over the {len(usable)} distances with two pairs of layers or more, the centred cosine of the same expert "
        f"is highest at Δ = {deltas[usable[best]]} ({signed(means[best])}); at the median distance it is "
        f"{signed(median(means))}. This by itself is not a test."
    )


def _within(result: WeightSimilarity) -> str:
    """Whether the experts of a layer look like copies of one dense layer."""
    finite = np.flatnonzero(np.isfinite(result.within))
    if not finite.size:
        return ""
    values = result.within[finite]
    middle, low, high = float(np.median(values)), int(finite[values.argmin()]), int(finite[values.argmax()])
    if middle >= ALIKE:
        meaning = "that high as in experts that were all copied from one dense layer (upcycled)"
    elif middle <= APART:
        meaning = "no sign is left of experts that were copied from one dense layer (upcycled)"
    else:
        meaning = "they share a part, as upcycling leaves it, but training side by side does, too"
    return (
        f"Two different experts of one layer have mean cosine {signed(middle)} in the median layer, from "
        f"{signed(result.within[low])} in layer {result.layers[low]} to {signed(result.within[high])} in layer "
        f"{result.layers[high]}: {meaning}."
    )


def _amount_matched(result: WeightSimilarity) -> str:
    """How many of all pairs were matched."""
    depth = len(result.layers)
    every = depth * (depth - 1) // 2
    if result.verdict is None or len(result.matches) >= every:
        return ""
    return (
        f"{len(result.matches):,} of {every:,} pairs of layers were matched, chosen beforehand by distance and depth; "
        "of the others nothing is said."
    )


def _change(change: WeightChange) -> list[str]:
    return [_own_index(change), _most_changed(change), _by_part(change), _by_router(change)]


def _own_index(change: WeightChange) -> str:
    """How many experts are where they were."""
    matches = [match for pair in change.matches if (match := pair.weights or pair.features) is not None]
    measured = sum(match.measured for match in matches)
    if not measured:
        return "Whether experts keep their index was not tested: no layers were matched."
    own = sum(match.identity for match in matches)
    return (
        f"Matched one to one, {own:,} of {measured:,} experts have the expert of their own index as partner, in "
        f"{len(matches):,} of {len(change.layers):,} layers."
    )


def _most_changed(change: WeightChange) -> str:
    matrix = change.relative_change
    if not np.isfinite(matrix).any():
        return "No expert is usable in both checkpoints: the change cannot be measured."
    finite = matrix[np.isfinite(matrix)]
    if not finite.any():
        return "No expert has changed: the weights are the same."
    row, expert = np.unravel_index(int(np.nanargmax(matrix)), matrix.shape)
    by_layer = finite_mean(matrix, axis=1)
    most = int(np.nanargmax(by_layer))
    return (
        f"An expert has changed by {_percent(float(np.median(finite)))} of its length in the median (cosine "
        f"{float(np.nanmedian(change.cosine)):.4f}), most in layer {change.layers[most]} (mean "
        f"{_percent(float(by_layer[most]))}); the one that changed most is expert {expert} of layer "
        f"{change.layers[row]} ({_percent(float(matrix[row, expert]))})."
    )


def _by_part(change: WeightChange) -> str:
    medians = [(name, _median(matrix)) for name, matrix in zip(PARTS, change.part_relative_change, strict=True)]
    measured = [(name, value) for name, value in medians if math.isfinite(value)]
    if not any(value for _, value in measured):
        return ""
    listed = ", ".join(f"{name} {_percent(value)}" for name, value in measured)
    return f"By part, median relative change: {listed}."


def _by_router(change: WeightChange) -> str:
    value = _median(change.router_relative_change)
    missing = int((~np.isfinite(change.router_relative_change)).sum())
    lost = f" {missing:,} router row{'s' * (missing > 1)} cannot be compared." if missing else ""
    if not math.isfinite(value):
        return lost.strip()
    if not np.nan_to_num(change.router_relative_change).any():
        return f"The {'other rows of the ' * bool(missing)}routers have not changed.{lost}"
    cosine = _median(change.router_cosine)
    return f"Router rows have changed by {_percent(value)} in the median (cosine {cosine:.4f}).{lost}"


def _unusable(experts: Sequence[UnusableExpert]) -> str:
    """The experts that have no cosine, by name."""
    if not experts:
        return ""
    listed = ", ".join(f"layer {one.layer} expert {one.expert} ({one.fault})" for one in experts[:MOST_NAMED])
    more = f" and {len(experts) - MOST_NAMED:,} more" if len(experts) > MOST_NAMED else ""
    return f"Left out, as they have no cosine: {listed}{more}."


def _coverage(coverage: WeightCoverage) -> str:
    if not coverage.sketched:
        return ""
    return (
        f"The numbers rest on {coverage.coordinates:,} of the {coverage.coordinates_total:,} weights of each expert "
        f"({_percent(coverage.coordinates / coverage.coordinates_total)}): a sketch, to say where to look."
    )


def _of(found: Verdict, what: str) -> str:
    return f"{len(found.pairs):,} matched {what}"


def _layers(pair: PairVerdict) -> str:
    return f"layer {pair.first}" if pair.first == pair.second else f"layers {pair.first} and {pair.second}"


def _has_features(result: WeightSimilarity) -> bool:
    return any(pair.features is not None for pair in result.matches)


def _median(matrix: NDArray[np.float64]) -> float:
    finite = matrix[np.isfinite(matrix)]
    return float(np.median(finite)) if finite.size else float("nan")


def _percent(share: float) -> str:
    """A share with three digits that count."""
    return f"{share * 100:.3g}%"
