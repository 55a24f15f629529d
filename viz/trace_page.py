"""What the tokens of a trace say, on one page."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from moescope.viz.page import Page, Section
from moescope.viz.trace_analysis import TraceAnalysis
from moescope.viz.trace_figures import most_particular, token_name
from moescope.viz.trace_findings import trace_findings, trace_notes
from moescope.viz.wording import by_layer, counted, index_ranges, minute, short_name

MOST_IDS = 40
"""Token ids in the table; `trace.json` has all."""

Table = tuple[str, Sequence[str], Sequence[Sequence[str | int]]]


def trace_subject(analysis: TraceAnalysis) -> str:
    """The line that says what a figure was measured on."""
    experts = by_layer(analysis.experts, analysis.layers)
    top_k = by_layer(analysis.top_k, analysis.layers)
    return (
        f"{short_name(analysis.model_id)} · {counted(len(analysis.layers), 'MoE layer')} · {experts} experts, "
        f"top-{top_k} · {counted(analysis.tokens, 'token')} of {counted(analysis.requests, 'request')}"
    )


def trace_page(analysis: TraceAnalysis, figures: Mapping[str, go.Figure]) -> Page:
    """Everything that is known of a trace's tokens, in reading order.

    Args:
        analysis: the results.
        figures: by the ids of the sections; see `trace_figures` of the report.
    """
    return Page(
        title=f"Token routing in {analysis.model_id}",
        subject=trace_subject(analysis),
        verdict=None,
        facts=_facts(analysis),
        notes=trace_notes(analysis),
        findings=trace_findings(analysis),
        sections=[
            Section(id_, title, how, figures[id_], _height(id_, analysis)) for id_, title, how in _sections(analysis)
        ],
        tables=[table for table in (_experts(analysis), _ids(analysis)) if table[2]],
        footer=f"moescope {analysis.version} · recorded {minute(analysis.created)}",
    )


def _facts(analysis: TraceAnalysis) -> list[tuple[str, str]]:
    seconds = analysis.seconds
    return [
        ("Model", f"{analysis.model_id} ({analysis.architecture})"),
        ("MoE layers", f"{len(analysis.layers)} (model layers {index_ranges(analysis.layers)})"),
        (
            "Experts",
            f"{by_layer(analysis.experts, analysis.layers)}, top-{by_layer(analysis.top_k, analysis.layers)}",
        ),
        ("Tokens", f"{analysis.tokens:,} of {counted(analysis.requests, 'request')}"),
        ("Engine", analysis.engine),
        ("Recorded", minute(analysis.created)),
        ("Read in", f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"),
    ]


def _sections(analysis: TraceAnalysis) -> list[tuple[str, str, str]]:
    """Id, title and how to read each figure."""
    return [
        (
            "repetition",
            "Experts kept at the next token",
            "Share of a token's experts that the token before it in its request went to as well. The dashed line is "
            "what any two tokens share; the line between, two tokens of one request in any order. What lies above "
            "that one comes from standing next to each other.",
        ),
        (
            "lags",
            "Experts shared with earlier tokens",
            "The same for tokens further back. Where the line meets the level of a random token of the request, the "
            "order of tokens is forgotten.",
        ),
        (
            "held",
            "Experts held for several tokens",
            "Share of a token's experts that all the tokens before it had, up to so many in a row (logarithmic). By "
            "chance it falls as the powers of the experts' popularity.",
        ),
        (
            "agreement",
            "What a layer tells of another",
            "Variance explained: how much of which experts a token has in the layer of a column follows from those in "
            "the layer of a row, whatever the experts are called; 1 is all, 0 is chance. Mutual information: of one "
            "expert drawn from each, as a share of what it could be. Same index: experts with the same index in both, "
            "beyond chance; stripes are layers that repeat. What both owe to the token's id is agreement, too.",
        ),
        (
            "agreement-distance",
            "Agreement of layers by distance",
            "Means over all pairs of layers Δ apart.",
        ),
        (
            "vocabulary",
            "What the token id decides",
            "How far the id of a token decides its experts: 0 is chance, 1 means that an id always has the same "
            "experts. Over the most frequent ids.",
        ),
        (
            "vocabulary-tokens",
            "Token ids with experts of their own",
            "How far the experts of a token id lie from those of all frequent ids, less what so few tokens bring by "
            "chance. The ids that differ most.",
        ),
        (
            "settling",
            "How soon the profile settles",
            "The profile of the first requests against that of all, in the order of their numbers. Above the dashed "
            "line, requests differ more than tokens drawn at random would: mixed prompts settle sooner. At the end the "
            "distance is 0 by definition.",
        ),
        (
            "position",
            "Position in the request",
            "Routing at each position (buckets that double) against all other positions, beyond chance. Later "
            "positions are those of longer requests, and where a prompt ends, generated tokens; both are "
            "part of the difference.",
        ),
        (
            "position-lines",
            "Position, mean of layers",
            "The same, mean over layers, with the levels that random groups of as many tokens would have.",
        ),
        (
            "time",
            f"Course of request {analysis.longest}",
            "The longest request in windows: routing in each against the rest of it, or the window before, beyond "
            "chance. Blocks are stretches of one kind of text.",
        ),
        (
            "time-lines",
            "Course, mean of layers",
            "The same, mean over layers, with its chance levels: they are high, as windows are short.",
        ),
    ]


def _height(section: str, analysis: TraceAnalysis) -> int:
    depth = len(analysis.layers)
    if section == "agreement":
        return 700
    if section == "vocabulary-tokens":
        return 160 + 18 * min(len(analysis.vocabulary.tokens), MOST_IDS)
    return int(min(max(11 * depth + 200, 380), 1100)) if section in ("position", "time") else 400


def _experts(analysis: TraceAnalysis) -> Table:
    rows: list[tuple[str | int, ...]] = [
        (
            f"{one.layer}",
            f"{one.expert}",
            one.selections,
            f"{one.bits:.2f}",
            ", ".join(
                f"{token_name(analysis, token)} {share:.0%} ({expected:.1%})"
                for (token, share), expected in zip(one.tokens, one.expected, strict=True)
                if share > expected
            ),
        )
        for one in analysis.vocabulary.specific
    ]
    columns = ("layer", "expert", "selections", "bits", "tokens: share of its selections by frequent ids (by chance)")
    return f"Experts with the most particular tokens: {len(rows)}", columns, rows


def _ids(analysis: TraceAnalysis) -> Table:
    found = analysis.vocabulary
    rows: list[tuple[str | int, ...]] = []
    for place in most_particular(analysis)[:MOST_IDS].tolist():
        effective = found.effective[place]
        rows.append(
            (
                token_name(analysis, int(found.tokens[place])),
                int(found.occurrences[place]),
                f"{found.specificity[place].mean():.2f}",
                f"{effective.mean():.1f} of {found.effective_all.mean():.1f}",
            )
        )
    columns = ("token id", "occurrences", "bits from all, mean of layers", "effective experts, mean of layers")
    return f"Token ids with experts of their own: {len(rows)} of {len(found.tokens)}", columns, rows
