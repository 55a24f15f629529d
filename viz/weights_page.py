"""The weights of a checkpoint on one page: routers and experts layer against layer, or what training has changed."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from moescope.stats.expert_matching import PairVerdict, Verdict
from moescope.stats.weight_similarity import WeightChange, WeightCoverage, WeightSimilarity
from moescope.viz.findings import router_finding
from moescope.viz.page import Page, Section
from moescope.viz.weight_findings import verdict_in_words, weight_findings
from moescope.viz.weights import clearest_first, expert_distance_lines, within_layer_bars
from moescope.viz.wording import counted, in_bytes, index_ranges, minute, short_name

MOST_ROWS = 200
"""Pairs in the table; `weights.json` has all."""
MEASURED = ("relation", "mean cosine", "null level", "p, corrected", "own index")
"""Columns of the table that similarity and change have in common."""


def weights_subject(result: WeightSimilarity | WeightChange) -> str:
    """The line that says what a figure of weights was measured on."""
    against = f" against {short_name(result.against_id)}" if isinstance(result, WeightChange) else ""
    sketch = " · sketch" if result.coverage.sketched else ""
    layers, experts = counted(len(result.layers), "MoE layer"), counted(result.experts, "expert")
    return f"{short_name(result.model_id)}{against} · {layers} · {experts}{sketch}"


def similarity_page(result: WeightSimilarity, figures: Mapping[str, go.Figure]) -> Page:
    """Everything that is known of a checkpoint's weights, in reading order.

    Args:
        result: the results.
        figures: figures by the names of their files.
    """
    routers = router_finding(result.routers)
    return Page(
        title=f"Weight similarity in {result.model_id}",
        subject=weights_subject(result),
        verdict=_verdict(result),
        facts=_similarity_facts(result),
        notes=(),
        findings=[*weight_findings(result), *([routers] if routers else [])],
        sections=[*expert_sections(result, figures), *_router_sections(result, figures)],
        tables=_tables(result.verdict, "Pairs of layers", ("layers", "Δ"), _pair_cells),
        footer=_footer(result),
    )


def change_page(change: WeightChange, figures: Mapping[str, go.Figure]) -> Page:
    """Everything that is known of the change from one checkpoint to another, in reading order.

    Args:
        change: the results.
        figures: figures by the names of their files.
    """
    return Page(
        title=f"Weights of {change.model_id} against {change.against_id}",
        subject=weights_subject(change),
        verdict=_verdict(change),
        facts=_change_facts(change),
        notes=(),
        findings=weight_findings(change),
        sections=[
            Section(
                "change",
                "Change by layer and expert",
                "Relative change is the length of the difference over the length of the expert held against: light "
                "experts changed most. The other views give the cosine of the two, and the same for the router's row "
                "of each expert. Grey cells have no value.",
                figures["expert_weight_change.html"],
                _tall(len(change.layers)),
                page="expert_weight_change.html",
            ),
            Section(
                "parts",
                "Change by part",
                "Mean over experts, layer by layer: gate, up and down by themselves, and the rows of the router.",
                figures["expert_weight_change_by_layer.html"],
                460,
                page="expert_weight_change_by_layer.html",
            ),
            Section(
                "matches",
                "Experts matched one to one",
                f"Experts of a layer here (rows) against those of the same layer in {short_name(change.against_id)} "
                "(columns), without what all experts of a layer share; a circle marks the best one-to-one partner. "
                "Circles off the diagonal on strong cells are experts that came to another index; on pale cells they "
                "mean nothing, as matching finds a partner for everyone.",
                figures["expert_match_matrix.html"],
                _matrix_height(figures),
                page="expert_match_matrix.html",
            ),
        ],
        tables=_tables(change.verdict, "Layers", ("layer",), _layer_cells),
        footer=_footer(change),
    )


def expert_sections(result: WeightSimilarity, figures: Mapping[str, go.Figure]) -> list[Section]:
    """The sections on experts, for the page of weights and for the report of a profile.

    Args:
        result: the results.
        figures: figures by the names of their files.
    """
    depth = len(result.layers)
    every = depth * (depth - 1) // 2
    return [
        Section(
            "expert-distance",
            "Expert similarity by distance",
            "Cosine between an expert's weights and those of the expert of the same index Δ layers on. Centred means "
            "without the mean expert of each layer, mean over experts; raw is of all experts of a layer laid out as "
            "one vector, and may come from that shared mean alone. A peak that comes back at multiples of one Δ is "
            "what stacked layers leave.",
            expert_distance_lines(result),
            380,
        ),
        Section(
            "expert-layers",
            "Expert similarity between layers",
            "Mean over experts of the cosine at the same index, for two layers: stripes beside the diagonal are layers "
            "that repeat. The raw view, of all experts of a layer laid out as one vector, may show no more than a mean "
            "that all experts share. The colour range is that of the pairs off the diagonal; grey pairs were not "
            "compared.",
            figures["expert_layer_similarity.html"],
            680,
            page="expert_layer_similarity.html",
        ),
        Section(
            "expert-histogram",
            "The same expert, Δ layers apart",
            "How many experts have which cosine with the expert of their index Δ layers on; lines mark mean and "
            "median. A second hill means that some layers or experts repeat and others do not.",
            figures["expert_weight_similarity.html"],
            440,
            page="expert_weight_similarity.html",
        ),
        Section(
            "expert-scatter",
            "Expert by expert",
            "The same cosines, a point for each expert of each starting layer: whether a few experts or a few layers "
            "stand apart.",
            figures["expert_weight_similarity_scatter.html"],
            480,
            page="expert_weight_similarity_scatter.html",
        ),
        Section(
            "expert-matches",
            "Experts matched one to one",
            "All experts of a layer against all of another, without what the experts of a layer share. A circle marks "
            "the best one-to-one partner: circles on the diagonal mean that experts keep their index, circles on "
            "strong cells elsewhere that they were permuted; circles on pale cells mean nothing, as matching finds a "
            f"partner for everyone. {len(result.matches):,} of {every:,} pairs of layers were matched; the clearest "
            "can be chosen here.",
            figures["expert_match_matrix.html"],
            _matrix_height(figures),
            page="expert_match_matrix.html",
        ),
        Section(
            "within",
            "Similarity within a layer",
            "Mean cosine of two different experts of one layer, not centred. Experts that were all copied from one "
            "dense layer start at 1 and move apart in training.",
            within_layer_bars(result),
            340,
        ),
    ]


def _router_sections(result: WeightSimilarity, figures: Mapping[str, go.Figure]) -> list[Section]:
    return [
        Section(
            "routers",
            "Router similarity",
            "Cosine of the router weights of two layers. The colour range is that of the pairs off the diagonal.",
            figures["router_similarity_matrix.html"],
            640,
            page="router_similarity_matrix.html",
        ),
        Section(
            "norms",
            "Router rows at a distance",
            "Whether the same experts have long router rows in layers Δ apart; the second view is the mean cosine "
            "of the rows themselves.",
            figures["router_norm_correlation.html"],
            _tall(len(result.layers)),
            page="router_norm_correlation.html",
        ),
    ]


def _verdict(result: WeightSimilarity | WeightChange) -> tuple[bool | None, str] | None:
    """Whether a relation was found, and what the test says; none where nothing was to be matched."""
    if result.verdict is None:
        return None
    return True if result.verdict.related else None, verdict_in_words(result)


def _matrix_height(figures: Mapping[str, go.Figure]) -> int:
    """Pixels of the match matrix, few where it only says that there is none."""
    return 720 if figures["expert_match_matrix.html"].data else 260


def _similarity_facts(result: WeightSimilarity) -> list[tuple[str, str]]:
    return [
        ("Model", f"{result.model_id} ({result.architecture})"),
        *_shared_facts(result),
        ("Expert", f"gate, up and down of {result.hidden:,} × {result.width:,}, stored as {', '.join(result.dtypes)}"),
        *_run_facts(result),
    ]


def _change_facts(change: WeightChange) -> list[tuple[str, str]]:
    return [
        ("Model", f"{change.model_id} ({change.architecture})"),
        ("Held against", change.against_id),
        *_shared_facts(change),
        *_run_facts(change),
    ]


def _shared_facts(result: WeightSimilarity | WeightChange) -> list[tuple[str, str]]:
    return [
        ("MoE layers", f"{len(result.layers)} (model layers {index_ranges(result.layers)})"),
        ("Experts", f"{result.experts:,} in each"),
    ]


def _run_facts(result: WeightSimilarity | WeightChange) -> list[tuple[str, str]]:
    return [
        ("Read", _read(result.coverage)),
        ("Engine", result.engine),
        ("Time", f"{result.seconds:,.0f} s" if result.seconds >= 10 else f"{result.seconds:.1f} s"),
        ("Measured", minute(result.created)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
    ]


def _read(coverage: WeightCoverage) -> str:
    """Bytes read, and whether that was a sketch."""
    amount = f"{in_bytes(coverage.bytes_read)} of {in_bytes(coverage.bytes_total)}"
    if not coverage.sketched:
        return f"{amount}: every weight"
    return f"{amount}: a sketch, {coverage.coordinates:,} of {coverage.coordinates_total:,} weights of each expert"


def _tables(
    found: Verdict | None, what: str, columns: tuple[str, ...], cells: Callable[[PairVerdict], tuple[str | int, ...]]
) -> list[tuple[str, Sequence[str], Sequence[Sequence[str | int]]]]:
    """One row a matched pair, clearest first; no table without any."""
    if found is None:
        return []
    order = clearest_first(found)[:MOST_ROWS]
    shown = (
        f"the clearest {len(order):,} of {len(found.pairs):,}" if len(order) < len(found.pairs) else f"{len(order):,}"
    )
    rows = [(*cells(found.pairs[place]), *_measured_cells(found.pairs[place])) for place in order]
    alpha = f"{found.alpha:.0%} chance of any false alarm over {found.tests:,} tests"
    return [(f"{what} matched: {shown} ({alpha})", (*columns, *MEASURED), rows)]


def _pair_cells(pair: PairVerdict) -> tuple[str | int, ...]:
    return f"{pair.first} and {pair.second}", pair.second - pair.first


def _layer_cells(pair: PairVerdict) -> tuple[str | int, ...]:
    return (pair.first,)


def _measured_cells(pair: PairVerdict) -> tuple[str, ...]:
    return (
        pair.kind,
        _number(pair.cosine, ".3f"),
        _number(pair.level, ".3f"),
        _number(pair.p_value, ".2g"),
        _number(pair.identity, ".0%"),
    )


def _number(value: float, form: str) -> str:
    """The number, or `-` where it is not defined."""
    return format(value, form) if math.isfinite(value) else "-"


def _tall(depth: int) -> int:
    """Height of a figure with one row a layer, in pixels."""
    return int(np.clip(11 * depth + 200, 380, 1100))


def _footer(result: WeightSimilarity | WeightChange) -> str:
    return f"moescope {result.versions.get('moescope', '')} · measured {minute(result.created)}"
