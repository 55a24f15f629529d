"""From a profile to what a report shows: the statistics, computed once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moescope.stats.activation import (
    Activation,
    Measure,
    layer_loads,
    mean_probability,
    selection_frequency,
    weight_share,
)
from moescope.stats.coactivation import coactivation
from moescope.stats.correlation import layer_correlation
from moescope.stats.nulls import LayerNulls, layer_nulls
from moescope.stats.period_finder import PeriodFinding, find_period
from moescope.stats.periodicity import default_intervals, periodic_patterns
from moescope.stats.placement import held_out_placement
from moescope.stats.reliability import layer_reliability
from moescope.stats.similarity import router_similarity, similarity_at_distances
from moescope.stats.specialisation import specialisation
from moescope.stats.use import LEAST_TOKENS, expert_coverage, expert_use, phase_contrast
from moescope.stats.weight_similarity import WeightSimilarity
from moescope.viz.report_data import DomainView, ExpertsUsed, ReportData

if TYPE_CHECKING:  # the hand-over type only; viz never reads files or runs models
    from moescope.profiler.profile import RoutingProfile
    from moescope.profiler.sidecars import RouterTables, TokenSample

PERMUTED_PRODUCTS = 2 * 10**9
"""Products of shares that the nulls of a report may take, unless told otherwise: some seconds of one core."""

PLACED_ON = (8, 4, 2)
"""GPUs that experts are tried on: the first number that divides them."""

FEWEST_PERMUTATIONS, MOST_PERMUTATIONS = 1_000, 10_000


def activations(profile: "RoutingProfile", domain: str | None = None) -> dict[Measure, Activation]:
    """Every recorded measure of a profile as an activation matrix.

    Args:
        profile: The profile.
        domain: One of its domains; None adds all up.

    Returns:
        By measure; "probability" is absent where it was not recorded.

    Raises:
        ValueError: The profile has no such domain.
    """
    if domain is not None and domain not in profile.domains:
        raise ValueError(f"domain {domain!r} is not in the profile; it has {', '.join(profile.domains)}")
    part = slice(None) if domain is None else [profile.domains.index(domain)]
    model = profile.model
    tops, experts, layers = model.top_k, model.experts, model.layer_indices
    tokens = int(profile.token_counts[part].sum())
    counts = profile.selection_counts[part].sum(axis=(0, 1))
    views: dict[Measure, Activation] = {
        "frequency": selection_frequency(counts, tops, tokens, experts, layers),
        "weight": weight_share(profile.weight_sums[part].sum(axis=(0, 1)), tokens, tops, experts, layers),
    }
    if profile.probability_sums is not None and profile.probability_tokens is not None:
        sums = profile.probability_sums[part].sum(axis=(0, 1))
        views["probability"] = mean_probability(
            sums, int(profile.probability_tokens[part].sum()), tops, experts, layers
        )
    return views


def analyze(
    profile: "RoutingProfile",
    *,
    measure: Measure = "frequency",
    intervals: Sequence[int] | None = None,
    delta_max: int = 30,
    correlate: bool = True,
    router_weights: Sequence[NDArray[Any]] | None = None,
    routers: "RouterTables | None" = None,
    sample: "TokenSample | None" = None,
    weights: WeightSimilarity | None = None,
    permutations: int | None = None,
) -> ReportData:
    """Compute what a report shows of a profile.

    The nulls multiply many small matrices: on a busy machine they are several times faster where the environment
    variable OPENBLAS_NUM_THREADS is 1 before numpy is imported, as the command line has it.

    Args:
        profile: A checked profile.
        measure: What correlation and periodic patterns rest on.
        intervals: Layer distances Δ of the periodic patterns; None takes 12, 24 and 36 where the model is deep enough,
            every Δ otherwise.
        delta_max: Largest Δ of the correlation matrix.
        correlate: False leaves correlation and periodic patterns out.
        router_weights: Router weights (E, H) of each MoE layer, or None if they were not read.
        routers: Router weights that were compared before, where they are not at hand now.
        sample: The router's distributions for some tokens, for the 3-D view.
        weights: What a pass over the experts' weights of this model has found, for its own part of the report.
        permutations: Random orders of the experts that correlation is held against, and simulations of the search for
            a period. None takes 1,000 to 10,000, fewer for larger models; 0 leaves both out.

    Raises:
        ValueError: The measure was not recorded, or `permutations` is negative.
    """
    if permutations is not None and permutations < 0:
        raise ValueError(f"permutations must not be negative, got {permutations}")
    views = activations(profile)
    if measure not in views:
        raise ValueError(f"measure {measure!r} was not recorded; the profile has {', '.join(sorted(views))}")
    layers = profile.model.layer_indices
    chosen = tuple(intervals) if intervals is not None else default_intervals(layers)
    correlation = layer_correlation(views[measure], delta_max)
    if not correlate:
        chosen = ()
        nothing = np.full_like(correlation.pairwise, np.nan)
        correlation = replace(correlation, matrix=np.full_like(correlation.matrix, np.nan), pairwise=nothing)
    reach = max((*chosen, delta_max))
    full = correlation if reach == delta_max or not correlate else layer_correlation(views[measure], reach)
    counts = profile.selection_counts.sum(axis=(0, 1))
    splits = profile.split_counts.sum(axis=1)
    nulls, period = (
        _against_chance(views[measure], splits, profile.model.groups, permutations) if correlate else (None, None)
    )
    similarity = None
    if router_weights:
        similarity = router_similarity(router_weights, layers, delta_max)
    elif routers is not None:
        tables = (routers.cosine, routers.row_norms, routers.row_cosine)
        similarity = similarity_at_distances(*tables, routers.layers, routers.experts, delta_max)
    engines = {f"{run.engine.name} on {run.engine.device} in {run.engine.dtype}" for run in profile.runs}
    versions = {run.engine.name: run.engine.version for run in profile.runs}
    versions |= {k: str(v) for run in profile.runs for k, v in run.engine.options.items() if k == "torch"}
    order: list[Measure] = [
        measure,
        *(name for name in ("frequency", "probability", "weight") if name in views and name != measure),
    ]
    return ReportData(
        model_id=profile.model.id,
        architecture=profile.model.architecture,
        scoring=profile.model.scoring,
        groups=profile.model.groups,
        engine="; ".join(sorted(engines)),
        versions={"moescope": profile.version, **versions},
        created=profile.created,
        prompts=sum(run.prompts for run in profile.runs),
        tokens_by_phase=dict(zip(profile.phases, profile.token_counts.sum(axis=0).tolist(), strict=True)),
        tokens_by_domain=dict(zip(profile.domains, profile.token_counts.sum(axis=1).tolist(), strict=True)),
        activations=tuple(views[name] for name in order),
        correlation=correlation,
        periodic=periodic_patterns(full, chosen),
        router_similarity=similarity,
        loads=layer_loads(counts, profile.model.top_k, profile.tokens, profile.model.experts, layers),
        remarks=_remarks([run.settings for run in profile.runs]),
        correlated=correlate,
        domains=_by_domain(profile, measure, chosen, delta_max),
        sample=sample,
        weights=weights,
        reliability=layer_reliability(splits, profile.model.experts, layers, profile.tokens),
        nulls=nulls,
        period=period,
        used=_used(profile, views["frequency"]),
    )


def _used(profile: "RoutingProfile", frequency: Activation) -> ExpertsUsed:
    """How experts are used, over the splits of the prompts where that is asked."""
    model = profile.model
    experts, layers = model.experts, model.layer_indices
    seen = np.flatnonzero(profile.split_counts.any(axis=(0, 2, 3)))
    pairs = profile.coactivation
    gpus = next((number for number in PLACED_ON if not any(width % number for width in experts)), None)
    alike = len(set(experts)) == 1
    return ExpertsUsed(
        use=expert_use(frequency),
        phases=phase_contrast(profile.selection_counts, profile.token_counts, experts, layers),
        domains=tuple(profile.domains[place] for place in seen),
        specialisation=specialisation(profile.split_counts[:, seen], experts, layers) if len(seen) > 1 else None,
        coactivation=None if pairs is None else coactivation(pairs, model.top_k, profile.tokens, experts, layers),
        placement=held_out_placement(profile.split_counts.sum(axis=1), experts, layers, gpus, gpus)
        if gpus is not None and alike
        else None,
        coverage=expert_coverage(
            profile.selection_counts.sum(axis=(0, 1)), profile.tokens, LEAST_TOKENS, experts, layers
        ),
    )


def affordable_permutations(layers: int, experts: int) -> int:
    """Permutations that a report of so many layers and experts takes by itself."""
    affordable = PERMUTED_PRODUCTS // max(layers * layers * experts, 1)
    return min(max(affordable, FEWEST_PERMUTATIONS), MOST_PERMUTATIONS)


def _against_chance(
    activation: Activation, splits: NDArray[np.int64], groups: int, permutations: int | None
) -> tuple[LayerNulls | None, PeriodFinding | None]:
    """Correlation and periods against their nulls; nothing where `permutations` is 0."""
    if permutations is None:
        permutations = affordable_permutations(*activation.matrix.shape)
    if not permutations:
        return None, None
    nulls = layer_nulls(activation, splits, groups, permutations)
    return nulls, find_period(activation, splits, simulations=permutations)


def _by_domain(
    profile: "RoutingProfile", measure: Measure, intervals: Sequence[int], delta_max: int
) -> tuple[DomainView, ...]:
    """Each domain that has tokens by itself, the one with the most first; none where there is but one."""
    tokens = dict(zip(profile.domains, profile.token_counts.sum(axis=1).tolist(), strict=True))
    names = sorted((name for name in tokens if tokens[name]), key=lambda name: (-tokens[name], name))
    views = []
    for name in names if len(names) > 1 else ():
        activation = activations(profile, name)[measure]
        full = layer_correlation(activation, max((*intervals, delta_max)))
        views.append(
            DomainView(
                name=name,
                tokens=tokens[name],
                activation=activation,
                correlation=full,
                periodic=periodic_patterns(full, intervals),
            )
        )
    return tuple(views)


def _remarks(settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the runs' settings say that a reader should know, in sentences; a forged entry says nothing."""
    remarks = []
    verified = [entry for entry in (one.get("verified") for one in settings) if isinstance(entry, Mapping)]
    requests, rows = (_total(verified, name) for name in ("requests", "token_layers"))
    if requests:
        against = str(verified[0].get("against", "the engine's own capture"))
        remarks.append(
            f"verified: {requests:,} requests, {rows:,} choices of a token in a layer, id by id against {against}: "
            "no difference"
        )
    cached = _total(settings, "skipped_by_prefix_cache")
    if cached:
        remarks.append(f"{cached:,} prompt tokens came from the engine's prefix cache and were not routed")
    aborted = _total(settings, "aborted_requests")
    if aborted:
        remarks.append(
            f"{aborted:,} requests were ended by their clients or by a stop string; what the engine had routed for "
            "them by then counts, which can be more tokens than their outputs have"
        )
    outside, tokens = (_total(settings, name) for name in ("left_out_requests", "left_out_tokens"))
    if outside:
        remarks.append(f"{outside:,} requests with streaming input, of {tokens:,} tokens, were not counted")
    remarks += [f"the recording ended early: {one['ended']}" for one in settings if isinstance(one.get("ended"), str)]
    long = _total(settings, "skipped_long_prompts")
    if long:
        remarks.append(f"{long:,} prompts were left out because they are too long")
    conversations = _total(settings, "skipped_conversations")
    if conversations:
        remarks.append(f"conversations left out because they have no turn of the user: {conversations:,}")
    return tuple(remarks)


def _total(entries: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(value for entry in entries if isinstance(value := entry.get(name), int))
