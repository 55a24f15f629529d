"""Figures of what the tokens of a trace say."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.stats.layer_agreement import LayerAgreement
from moescope.stats.pairwise import by_distance, finite_mean
from moescope.stats.repetition import Repetition
from moescope.stats.settling import Settling
from moescope.stats.token_groups import TokenGroups
from moescope.viz import theme
from moescope.viz.lines import Line, draw_lines, lines_by_layer
from moescope.viz.similarity import square_axes
from moescope.viz.trace_analysis import TraceAnalysis

MOST_TOKENS = 40
"""Token ids in the heatmap."""
LONGEST_TOKEN = 18

NO_PAIRS = "No token has its predecessor in this trace: there is nothing to compare."
CHANCE = (theme.FAINT_INK, "dash")
NOTICED = (theme.LINE_COLOURS[1], None)
MEASURED = (theme.STRONG_COLOUR, None)


def repetition_by_layer(found: Repetition, subject: str = "") -> go.Figure:
    """Share of a token's experts that the token before had, layer by layer, beside two levels of chance.

    Args:
        found: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("Experts kept at the next token", subject, "Layer index", "share of experts")
    if not found.pairs:
        return theme.say_no_data(figure, NO_PAIRS)
    lines: list[Line] = [
        ("the token before", found.kept, *MEASURED),
        ("a random token of the request", found.within, *NOTICED),
        ("any token of the trace (chance)", found.chance, *CHANCE),
    ]
    if found.top_kept is not None and found.top_chance is not None:
        lines += [
            ("same first expert as the token before", found.top_kept, theme.LINE_COLOURS[2], None),
            ("the same by chance", found.top_chance, theme.LINE_COLOURS[2], "dot"),
        ]
    return lines_by_layer(figure, found.layers, lines, "%{y:.1%}")


def repetition_by_lag(found: Repetition, subject: str = "") -> go.Figure:
    """Share of a token's experts that the token so far back had: mean, highest and lowest of the layers.

    Args:
        found: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("Experts shared with earlier tokens", subject, "Tokens back", "share of experts")
    there = found.lag_pairs > 0
    if not there.any():
        return theme.say_no_data(figure, NO_PAIRS)
    lags, shares = [str(lag) for lag in np.array(found.lags)[there]], found.at_lag[there]
    lines: tuple[Line, ...] = (
        ("mean of layers", shares.mean(axis=1), *MEASURED),
        ("highest layer", shares.max(axis=1), theme.MODERATE_COLOUR, "dot"),
        ("lowest layer", shares.min(axis=1), theme.WEAK_COLOUR, "dot"),
        ("a random token of the request", np.full(len(lags), finite_mean(found.within, 0)), *NOTICED),
        ("any token of the trace (chance)", np.full(len(lags), finite_mean(found.chance, 0)), *CHANCE),
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero")
    return draw_lines(figure, lags, lines, "%{x} back: %{y:.1%}")


def held_by_length(found: Repetition, subject: str = "") -> go.Figure:
    """Share of a token's experts that each of the tokens before had too, by how many; mean over layers.

    Args:
        found: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure(
        "Experts held for several tokens", subject, "Tokens in a row that have the expert", "share of experts"
    )
    there = found.held_windows > 0
    if not there[1:].any():
        return theme.say_no_data(figure, NO_PAIRS)
    lengths = [str(m + 1) for m in np.flatnonzero(there)]
    lines: tuple[Line, ...] = (
        ("mean of layers", _shown(found.held[there].mean(axis=1)), *MEASURED),
        ("chance", _shown(finite_mean(found.held_chance[there], 1)), *CHANCE),
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="log", exponentformat="none", dtick=1)
    return draw_lines(figure, lengths, lines, "%{x} in a row: %{y:.2%}")


def agreement_heatmap(found: LayerAgreement, subject: str = "") -> go.Figure:
    """What the experts of a token in one layer tell of those in another: views explained, information, same index.

    Args:
        found: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("What a layer tells of another", subject, "Told of: layer", "Layer that tells")
    beyond = found.overlap - found.overlap_chance
    views = (
        ("Variance explained", found.explained, found.explained_chance, "share explained"),
        ("Mutual information", found.informed, np.zeros_like(beyond), "share of what it could be"),
        ("Same index", beyond, found.overlap_chance, "share beyond chance"),
    )
    measured = [view for view in views if np.isfinite(view[1]).any()]
    if not measured:
        return theme.say_no_data(figure, "No two layers can be compared: there is nothing to show.")
    labels = theme.layer_labels(found.layers)
    for name, matrix, chance, bar in measured:
        figure.add_trace(
            go.Heatmap(
                z=matrix.astype(np.float32),
                x=labels,
                y=labels,
                name=name,
                customdata=chance.astype(np.float32),
                colorscale=theme.SEQUENTIAL,
                zmin=0.0,
                zmax=max(float(np.nanmax(matrix)), 0.01),
                colorbar={"title": {"text": theme.bar_title(bar)}},
                hoverongaps=False,
                hovertemplate="layer %{y} of layer %{x}<br>%{z:.3f}, chance taken off %{customdata:.4f}<extra></extra>",
            )
        )
    square_axes(figure)
    theme.add_view_buttons(figure, [name for name, *_ in measured])
    return figure


def agreement_by_distance(found: LayerAgreement, subject: str = "") -> go.Figure:
    """Mean over pairs of layers Δ apart: variance explained, and experts of the same index beside chance.

    Args:
        found: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure(
        "Agreement of layers by distance", subject, "Layer distance Δ (model layers)", "mean over pairs of layers"
    )
    deltas = list(range(1, found.layers[-1] - found.layers[0] + 1))
    lines: list[Line] = [
        (name, finite_mean(by_distance(matrix, found.layers, deltas), 0), *style)
        for name, matrix, style in (
            ("variance explained", found.explained, MEASURED),
            ("same index", found.overlap, NOTICED),
            ("same index by chance", found.overlap_chance, CHANCE),
        )
        if np.isfinite(matrix).any()
    ]
    if not lines or not deltas:
        return theme.say_no_data(figure, "No two layers can be compared: there is nothing to show.")
    figure.update_yaxes(rangemode="tozero")
    return draw_lines(figure, deltas, lines, "Δ = %{x}: %{y:.3f}")


def vocabulary_by_layer(analysis: TraceAnalysis, subject: str = "") -> go.Figure:
    """How much of a layer's choice the token id decides.

    Args:
        analysis: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("What the token id decides", subject, "Layer index", "share of what it could")
    found = analysis.vocabulary
    if not np.isfinite(found.decided).any():
        return theme.say_no_data(figure, "There are not enough different tokens: there is nothing to show.")
    lines: tuple[Line, ...] = (
        ("decided by the token id", found.decided, *MEASURED),
        ("chance", np.zeros(len(found.layers)), *CHANCE),
    )
    return lines_by_layer(figure, found.layers, lines, "%{y:.1%}")


def vocabulary_heatmap(analysis: TraceAnalysis, subject: str = "") -> go.Figure:
    """The frequent token ids with the most particular experts, by layer.

    Args:
        analysis: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("Token ids with experts of their own", subject, "Layer index", "Token id")
    found = analysis.vocabulary
    if len(found.tokens) < 2 or not np.isfinite(found.specificity).any():
        return theme.say_no_data(figure, "There are not enough different tokens: there is nothing to show.")
    order = most_particular(analysis)[:MOST_TOKENS]
    bits = np.maximum(found.specificity[order], 0.0)
    figure.add_trace(
        go.Heatmap(
            z=bits.astype(np.float32),
            x=theme.layer_labels(found.layers),
            y=[theme.plain(token_name(analysis, int(token))) for token in found.tokens[order]],
            customdata=np.broadcast_to(found.occurrences[order, None], bits.shape),
            colorscale=theme.SEQUENTIAL,
            zmin=0.0,
            zmax=max(float(np.nanpercentile(bits, 99.5)), 1e-3),
            colorbar={"title": {"text": theme.bar_title("bits beyond chance")}},
            hoverongaps=False,
            hovertemplate=(
                "token %{y}, %{customdata:,} times<br>layer %{x}: %{z:.3f} bits from all frequent ids<extra></extra>"
            ),
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed", dtick=1, tickfont={"size": 11})
    figure.update_layout(plot_bgcolor=theme.NO_DATA_COLOUR)
    return figure


def most_particular(analysis: TraceAnalysis) -> NDArray[np.intp]:
    """Places of the frequent ids, those first whose experts differ most from those of all, mean over layers."""
    return np.argsort(-np.nan_to_num(finite_mean(analysis.vocabulary.specificity, 1), nan=-np.inf), kind="stable")


def token_name(analysis: TraceAnalysis, token: int) -> str:
    """A token id with its text, where that is known."""
    text = analysis.texts.get(token)
    return str(token) if text is None else f"{token} {theme.clip(repr(text), LONGEST_TOKEN)}"


def settling_lines(found: Settling, subject: str = "") -> go.Figure:
    """How far the profile after n tokens is from that of all: views shares, correlation, experts not yet selected.

    Args:
        found: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    titles = ("Jensen-Shannon divergence (bits)", "difference of r (root mean square)", "experts not yet selected")
    figure = theme.new_figure("How soon the profile settles", subject, "Tokens", titles[0])
    if len(found.tokens) < 2:
        return theme.say_no_data(figure, "The trace is too short to be taken in parts: there is nothing to show.")
    views: tuple[tuple[Line, Line], ...] = (
        (
            ("from the whole, mean of layers", finite_mean(found.distance, 1), *MEASURED),
            ("tokens drawn at random (chance)", finite_mean(found.floor, 1), *CHANCE),
        ),
        (
            ("from the whole, pairs of layers", found.correlation, *MEASURED),
            ("the whole", np.zeros(len(found.tokens)), *CHANCE),
        ),
        (
            ("not yet selected", found.dead, *MEASURED),
            ("never selected", np.full(len(found.tokens), found.dead[-1]), *CHANCE),
        ),
    )
    for lines in views:
        draw_lines(figure, [f"{tokens:,}" for tokens in found.tokens], lines, "%{x} tokens: %{y:.4~g}")
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero")
    theme.add_view_buttons(
        figure, ["Shares", "Correlation of layers", "Unused experts"], traces_each=2, y_titles=titles
    )
    return figure


def groups_heatmap(found: TokenGroups, names: Sequence[str], title: str, axis: str, subject: str = "") -> go.Figure:
    """Groups of tokens by layer: views distance from all others, from the group before, evenness.

    Args:
        found: what to show.
        names: (G,) of the groups.
        title: what the figure shows.
        axis: what the groups are.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure(title, subject, axis, "Layer index")
    views = (
        ("From the others", _beyond(found.from_rest, found.rest_floor), "bits beyond chance"),
        ("From the one before", _beyond(found.from_before, found.before_floor), "bits beyond chance"),
        ("Evenness", found.entropy, "entropy / ln E"),
    )
    measured = [view for view in views if np.isfinite(view[1]).any()]
    if len(names) < 2 or not np.isfinite(found.from_rest).any():
        return theme.say_no_data(figure, "There is only one group of tokens: there is nothing to compare.")
    for name, matrix, bar in measured:
        bits = bar != "entropy / ln E"
        figure.add_trace(
            go.Heatmap(
                z=matrix.T.astype(np.float32),
                x=list(names),
                y=theme.layer_labels(found.layers),
                name=name,
                customdata=np.broadcast_to(found.tokens, matrix.T.shape),
                colorscale=theme.SEQUENTIAL,
                zmin=0.0 if bits else float(np.nanmin(matrix)),
                zmax=max(float(np.nanmax(matrix)), 1e-4),
                colorbar={"title": {"text": theme.bar_title(bar)}},
                hoverongaps=False,
                hovertemplate=(
                    f"{axis.lower()} %{{x}}, %{{customdata:,}} tokens<br>layer %{{y}}: %{{z:.4f}}<extra></extra>"
                ),
            )
        )
    figure.update_xaxes(type="category")
    theme.layers_downwards(figure)
    figure.update_layout(plot_bgcolor=theme.NO_DATA_COLOUR)
    theme.add_view_buttons(figure, [name for name, *_ in measured])
    return figure


def groups_lines(found: TokenGroups, names: Sequence[str], title: str, axis: str, subject: str = "") -> go.Figure:
    """Mean over layers of each group's distance from all others and from the group before, with their floors.

    Args:
        found: what to show.
        names: (G,) of the groups.
        title: what the figure shows.
        axis: what the groups are.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure(title, subject, axis, "Jensen-Shannon divergence (bits)")
    if len(names) < 2 or not np.isfinite(found.from_rest).any():
        return theme.say_no_data(figure, "There is only one group of tokens: there is nothing to compare.")
    lines: tuple[Line, ...] = (
        ("from the others", finite_mean(found.from_rest, 1), *MEASURED),
        ("by chance", finite_mean(found.rest_floor, 1), *CHANCE),
        ("from the one before", finite_mean(found.from_before, 1), *NOTICED),
        ("that by chance", finite_mean(found.before_floor, 1), theme.LINE_COLOURS[1], "dot"),
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero")
    return draw_lines(figure, list(names), lines, "%{x}: %{y:.4f} bits")


def position_names(found: TokenGroups) -> list[str]:
    """First and last position of each bucket; the last is open."""
    starts = found.starts.tolist()
    ends = [*(start - 1 for start in starts[1:]), None]
    return [
        f"{start}+" if end is None and start else str(start) if end in (None, start) else f"{start}-{end}"
        for start, end in zip(starts, ends, strict=True)
    ]


def window_names(found: TokenGroups) -> list[str]:
    """First position of each window."""
    return [f"{start:,}" for start in found.starts.tolist()]


def _beyond(distance: NDArray[np.float64], floor: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance beyond its floor, at least 0."""
    return np.maximum(distance - floor, 0.0)


def _shown(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without zeros, which a logarithmic axis cannot show."""
    return np.where(values > 0, values, np.nan)
