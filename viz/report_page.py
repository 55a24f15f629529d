"""A profile's report as one page."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio

from moescope.viz import theme
from moescope.viz.activation import NAMES, colour_end
from moescope.viz.chance import corrected_heatmap, distance_against_chance, period_scan, reliability_by_layer
from moescope.viz.correlation import correlation_heatmap
from moescope.viz.findings import findings
from moescope.viz.load import load_by_layer
from moescope.viz.page import Page, Section, packed
from moescope.viz.periodicity import periodic_bars, periodic_boxes
from moescope.viz.report_data import DomainView, ExpertsUsed, ReportData
from moescope.viz.use import effective_by_layer, phases_by_layer, placement_by_layer, specialised_experts
from moescope.viz.use_findings import TableRows, specialised_table, together_table
from moescope.viz.weights_page import expert_sections
from moescope.viz.wording import by_layer, experts_in_words, index_ranges, minute, subject

LOWEST, HIGHEST = 380, 1100
"""Least and greatest height of a figure with one row a layer, in pixels."""
ROW = 11
MOST_DOMAINS = 16
"""Domains to choose from on the page: those with the most tokens, so that the page stays small."""


def report_page(report: ReportData, figures: Mapping[str, go.Figure]) -> Page:
    """Everything that a report shows, in reading order.

    Args:
        report: the results.
        figures: figures by the names of their files.
    """
    return Page(
        title=f"Expert routing of {report.model_id}",
        subject=subject(report),
        verdict=_verdict(report),
        facts=_facts(report),
        notes=_notes(report),
        findings=findings(report),
        sections=_sections(report, figures),
        domains=[view.name for view in _selectable(report)],
        tables=[*_use_tables(report.used), _tokens(report)],
        footer=f"moescope {report.versions.get('moescope', '')} · recorded {minute(report.created)}",
    )


def _verdict(report: ReportData) -> tuple[bool, str]:
    if report.violations:
        return False, f"Counts do NOT add up in layers {index_ranges(report.violations)}: trust no number below."
    top_k = by_layer([load.top_k for load in report.loads], report.layers)
    return True, (
        f"Counts add up: in each of the {len(report.layers)} MoE layers {report.tokens:,} tokens × top-{top_k} "
        "selections, with the tokens taken from the requests' own lengths."
    )


def _facts(report: ReportData) -> list[tuple[str, str]]:
    spread = ", ".join(f"{name} {tokens:,}" for name, tokens in report.tokens_by_phase.items())
    return [
        ("Model", f"{report.model_id} ({report.architecture}, {report.scoring} router)"),
        ("Engine", report.engine),
        ("MoE layers", f"{len(report.layers)} (model layers {index_ranges(report.layers)})"),
        ("Experts", experts_in_words(report)),
        ("Tokens", f"{report.tokens:,} ({spread})"),
        ("Prompts", f"{report.prompts:,}"),
        ("Recorded", minute(report.created)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]


def _notes(report: ReportData) -> list[str]:
    notes = list(report.remarks)
    if len(report.domains) > MOST_DOMAINS:
        notes.append(
            f"of {len(report.domains)} domains the {MOST_DOMAINS} with the most tokens can be chosen above; "
            "`moescope export` has all"
        )
    return notes


def _tokens(report: ReportData) -> tuple[str, Sequence[str], Sequence[Sequence[str | int]]]:
    rows: list[Sequence[str | int]] = [(name, tokens) for name, tokens in report.tokens_by_domain.items()]
    return "Tokens by domain", ("domain", "tokens"), rows


def _sections(report: ReportData, figures: Mapping[str, go.Figure]) -> list[Section]:
    tall = int(np.clip(ROW * len(report.layers) + 160, LOWEST, HIGHEST))
    heatmap = figures["expert_activation_heatmap.html"]
    measured = isinstance(heatmap.data[0], go.Heatmap) if heatmap.data else False
    name = NAMES[report.measure]
    sections = [
        Section(
            "activation",
            "Expert activation",
            "Each row is a layer, each column an expert: bright experts take more than their share. Colour ends at the "
            "99.5th percentile; hover for a cell's own value.",
            heatmap,
            tall,
            variants=_variants(report, _activation_patch) if measured else {},
            page="expert_activation_heatmap.html",
        ),
    ]
    if measured:
        sections.append(
            Section(
                "layer",
                "One layer, expert by expert",
                f"The {name} of every expert of the chosen layer; the dashed line is uniform use, 1/E.",
                _layer_figure(name),
                360,
                of="activation",
                experts=[load.experts for load in report.loads],
                layers=theme.layer_labels(report.layers),
            )
        )
    sections += [
        Section(
            "load",
            "Expert load by layer",
            "How many times the mean load the busiest expert of a layer carries; 1 is perfectly even.",
            load_by_layer(report.loads),
            340,
        ),
        *(_correlation_sections(report, figures, tall) if report.correlated else ()),
        *_reliability_sections(report, tall),
        *(_use_sections(report.used) if report.used is not None else ()),
        Section(
            "routers",
            "Router similarity",
            "Cosine of the router weights of two layers: what the weights themselves have in common, whatever the "
            "prompts were. The colour range is that of the pairs off the diagonal.",
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
            tall,
            page="router_norm_correlation.html",
        ),
        *(expert_sections(report.weights, figures) if report.weights is not None else ()),
        Section(
            "tokens",
            "Token by token",
            f"The router's probabilities {_sampled(report)}, one surface a layer, stacked; turn it with the mouse. "
            "Height and colour are the probability.",
            figures["expert_activation_3d.html"],
            720,
            page="expert_activation_3d.html",
        ),
    ]
    return sections


def _correlation_sections(report: ReportData, figures: Mapping[str, go.Figure], tall: int) -> list[Section]:
    correlation = figures["layer_correlation_matrix.html"]
    bars, boxes = figures["periodic_pattern_analysis.html"], figures["periodic_pattern_analysis_detailed.html"]
    alone = (
        " A domain by itself is not held against chance: it has fewer tokens, and each would be as many looks more."
        if report.domains and report.nulls is not None
        else ""
    )
    return [
        Section(
            "correlation",
            "Layer correlation",
            "Each cell compares the expert use of a layer with that of the layer Δ further on: a column of one strong "
            "colour means that the pattern comes back every Δ layers. Grey cells lie past the end of the model."
            f"{alone}",
            correlation,
            tall,
            variants=_differences(report, correlation, lambda view: correlation_heatmap(view.correlation)),
            page="layer_correlation_matrix.html",
        ),
        *_chance_sections(report),
        Section(
            "periods",
            "Periodic patterns",
            "Mean correlation over all pairs of layers at each interval, ± one standard deviation of the pairs. The "
            "pairs share layers, so the line is a spread, not a confidence interval; the grey band is 95% of what "
            f"experts in random order give.{alone}",
            bars,
            variants=_differences(report, bars, lambda view: periodic_bars(view.periodic)),
            page="periodic_pattern_analysis.html",
        ),
        Section(
            "pairs",
            "Every pair of layers",
            "The correlations behind each bar above, one point a pair; hover to see which layers.",
            boxes,
            variants=_differences(report, boxes, lambda view: periodic_boxes(view.periodic)),
            page="periodic_pattern_analysis_detailed.html",
        ),
    ]


def _chance_sections(report: ReportData) -> list[Section]:
    sections = []
    if report.nulls is not None:
        sections.append(
            Section(
                "chance",
                "Correlation against chance",
                "Mean correlation at each distance, with its 95% interval over parts of the prompts. In the band lie "
                f"95% of {report.nulls.free.permutations:,} random orders of the experts; only what is above the "
                "dashed line (a full mark) is more than the largest of as many looks would be by chance. Near layers "
                "that are alike rise above it too: that alone is no period."
                f"{_groups_note(report.nulls.groups)}",
                distance_against_chance(report.nulls),
            )
        )
    if report.period is not None:
        sections.append(
            Section(
                "scan",
                "Search for a period",
                "For each period: whether layers at its multiples correlate more than layers one nearer or further "
                "apart. A period counts (a full mark) where it is above both dashed lines, that of experts in random "
                "order and that of alignment that only fades with distance. Multiples and divisors of a period can "
                "rise with it; the one that explains most is reported.",
                period_scan(report.period),
            )
        )
    return sections


def _groups_note(groups: int) -> str:
    """How to read the second null of a router with groups."""
    if groups == 1:
        return ""
    return (
        f" The router first chooses among {groups} groups: the second band and line are of orders within the groups; "
        "what is above the first alone may come from which groups are busy."
    )


def _reliability_sections(report: ReportData, tall: int) -> list[Section]:
    found = report.reliability
    if found is None:
        return []
    sections = [
        Section(
            "reliability",
            "Reliability by layer",
            "How a layer's selection frequencies would correlate with those of another run of this size on other "
            f"prompts of the same kind, ± 95% over parts of the prompts. At {found.target:.1f} (dashed) a correlation "
            "of two such layers is weakened by a tenth; an open mark is not shown to be above 0.",
            reliability_by_layer(found),
            380,
        )
    ]
    if report.correlated:
        sections.append(
            Section(
                "corrected",
                "Layer correlation without sampling noise",
                "The correlation that endless prompts would show, by the correction for attenuation. Grey cells lie "
                "past the end of the model, or a layer's reliability is not shown to be above 0.",
                corrected_heatmap(found, report.correlation.deltas[-1]),
                tall,
            )
        )
    return sections


def _use_sections(used: ExpertsUsed) -> list[Section]:
    sections = [
        Section(
            "effective",
            "Effective experts by layer",
            "As many equally used experts as would spread a layer's use so; hover for entropy, Gini and Jain.",
            effective_by_layer(used.use),
            340,
        )
    ]
    if used.specialisation is not None:
        sections.append(
            Section(
                "specialisation",
                "Experts that a domain prefers",
                "How many experts of a layer a domain uses more than all others together do, each shown over parts of "
                "the prompts with 5% for any false alarm among all looks. The clearest are in the table below.",
                specialised_experts(used.specialisation, used.domains),
                int(np.clip(26 * len(used.domains) + 140, LOWEST, HIGHEST)),
            )
        )
    if used.phases.domains:
        sections.append(
            Section(
                "phases",
                "Prefill against decode",
                "How far apart the phases' use of experts is, over the same mix of domains. The dashed line is what "
                "independent selections alone would give; tokens of a prompt are not independent, so it is no test.",
                phases_by_layer(used.phases),
                360,
            )
        )
    if used.placement is not None:
        sections.append(
            Section(
                "placement",
                "Experts on GPUs",
                f"How many times the mean load the busiest of {used.placement.gpus} GPUs would carry: experts in "
                "order, and placed by the load of half of the prompts. All are measured on the other half.",
                placement_by_layer(used.placement),
                360,
            )
        )
    return sections


def _use_tables(used: ExpertsUsed | None) -> list[TableRows]:
    if used is None:
        return []
    tables = (
        specialised_table(used.specialisation, used.domains) if used.specialisation is not None else None,
        together_table(used.coactivation) if used.coactivation is not None else None,
    )
    return [table for table in tables if table is not None]


def _layer_figure(name: str) -> go.Figure:
    """The frame of one layer's bars; the page fills it."""
    figure = theme.new_figure("", "", "Expert index", name)
    figure.add_trace(
        go.Bar(
            x=[],
            y=[],
            marker_color=theme.MODERATE_COLOUR,
            hovertemplate="expert %{x}<br>%{y:.4~%}<br>%{customdata:.3~f} × uniform<extra></extra>",
        )
    )
    figure.update_xaxes(type="category", nticks=33)
    figure.update_yaxes(tickformat=".2~%", rangemode="tozero")
    figure.update_layout(
        bargap=0.15,
        shapes=[
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": 0,
                "y1": 0,
                "line": {"dash": "dash", "width": 1.2, "color": theme.FAINT_INK},
            }
        ],
    )
    return figure


def _variants(report: ReportData, patch: Callable[[DomainView], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A patch for each domain, by its place in the selector."""
    return {str(place): patch(view) for place, view in enumerate(_selectable(report))}


def _selectable(report: ReportData) -> list[DomainView]:
    """The domains to choose from, by name."""
    return sorted(report.domains[:MOST_DOMAINS], key=lambda view: view.name)


def _sampled(report: ReportData) -> str:
    sample = report.sample
    if sample is None:
        return "for the first tokens of one prompt"
    return (
        f"for {len(sample.token_ids)} tokens, the first of one prompt, in {len(sample.layers)} of the "
        f"{len(report.layers)} MoE layers"
    )


def _activation_patch(view: DomainView) -> dict[str, Any]:
    matrix = view.activation.matrix
    return {"data": [{"z": packed(matrix), "zmax": colour_end(matrix)}]}


def _differences(
    report: ReportData, base: go.Figure, draw: Callable[[DomainView], go.Figure]
) -> dict[str, dict[str, Any]]:
    """For each domain, what its figure has otherwise than that of all domains."""
    traces = _plain(base)["data"]
    return _variants(report, lambda view: _patch(_plain(draw(view)), traces))


def _plain(figure: go.Figure) -> dict[str, Any]:
    """A figure as plotly.js takes it."""
    plain: dict[str, Any] = json.loads(pio.to_json(figure, validate=False))
    return plain


def _patch(figure: dict[str, Any], base: list[dict[str, Any]]) -> dict[str, Any]:
    others = [*base, *({} for _ in figure["data"][len(base) :])]
    traces = [
        {name: value for name, value in trace.items() if name not in other or other[name] != value}
        for trace, other in zip(figure["data"], others, strict=False)
    ]
    layout = {name: figure["layout"][name] for name in ("xaxis", "yaxis", "annotations") if name in figure["layout"]}
    return {"data": traces, "layout": layout}
