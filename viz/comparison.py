"""Figures of a comparison: where experts are used more or less, how far layers lie apart, who moved most."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.stats.activation import Measure
from moescope.stats.comparison import LEVEL
from moescope.stats.pairwise import finite_mean
from moescope.viz import theme
from moescope.viz.activation import COLOUR_PERCENTILE, NAMES
from moescope.viz.comparison_data import (
    ComparedPair,
    EveryDistance,
    layer_p_values,
    moved_p_values,
    ratio_in_words,
)
from moescope.viz.theme import clip

MOST_BARS = 20
MOST_NUMBERED = 12
"""Sides up to which their distances stand in the cells."""
MOST_NOISE_LINES = 4
"""With more comparisons than this, one line shows the highest noise of all of them."""
LONGEST_LABEL = 40
LONGEST_TICK = 18
DASHES = ("solid", "longdash", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up")
UNSURE_OPACITY = 0.4

NO_TOKENS = "One side of every comparison has no tokens: there is nothing to compare."


def difference_heatmap(pairs: Sequence[ComparedPair], subject: str = "") -> go.Figure:
    """Experts across, layers downwards, share gained or lost as colour; the reader switches between comparisons.

    Colour ends, on both sides of 0, at the 99.5th percentile of the absolute difference of the view; the hover text
    gives both shares.

    Args:
        pairs: comparisons of the same layers and experts; the first is shown first.
        subject: what was compared, for the second line of the title.
    """
    title = f"Difference in {NAMES[pairs[0].result.kind]}{_only_pair(pairs)}" if pairs else "Difference"
    figure = theme.new_figure(title, subject, "Expert index", "Layer index")
    measured = [pair for pair in pairs if np.isfinite(pair.result.difference).any()]
    if not measured:
        return theme.say_no_data(figure, NO_TOKENS)
    for pair in measured:
        figure.add_trace(_difference(pair))
    theme.layers_downwards(figure)
    figure.update_layout(plot_bgcolor=theme.NO_DATA_COLOUR)
    theme.add_view_buttons(figure, [_pair_label(pair) for pair in measured])
    return figure


def distance_lines(pairs: Sequence[ComparedPair], subject: str = "") -> go.Figure:
    """Distance by layer, a line for each comparison, and dashed the distance that the draw of prompts alone makes.

    The reader switches between Jensen-Shannon divergence and total variation.

    Args:
        pairs: comparisons of the same layers; with more than four, one dashed line shows the highest noise.
        subject: what was compared, for the second line of the title.
    """
    views = {"jensen_shannon": "Jensen-Shannon divergence (bits)", "total_variation": "Total variation (share)"}
    title = f"Distance in {NAMES[pairs[0].result.kind]} by layer" if pairs else "Distance by layer"
    figure = theme.new_figure(title, subject, "Layer index", views["jensen_shannon"])
    measured = [pair for pair in pairs if np.isfinite(pair.result.between.jensen_shannon).any()]
    if not measured:
        return theme.say_no_data(figure, NO_TOKENS)
    for view in views:
        for index, pair in enumerate(measured):
            figure.add_trace(_distance_line(pair, index, view))
        for trace in _noise_lines(measured, view):
            figure.add_trace(trace)
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(showlegend=True, legend={"tracegroupgap": 0, "itemwidth": 50})
    theme.add_view_buttons(
        figure,
        [name.rsplit(" (", 1)[0] for name in views.values()],
        traces_each=len(figure.data) // len(views),
        y_titles=list(views.values()),
    )
    return figure


def moved_bars(pairs: Sequence[ComparedPair], subject: str = "") -> go.Figure:
    """The experts whose share moved most, at most twenty, largest on top; the reader switches between comparisons.

    Args:
        pairs: comparisons; the first is shown first.
        subject: what was compared, for the second line of the title.
    """
    title = "Experts that moved most" + (f" in {NAMES[pairs[0].result.kind]}{_only_pair(pairs)}" if pairs else "")
    figure = theme.new_figure(title, subject, "Difference in share (percentage points)", "Expert")
    moved = [pair for pair in pairs if pair.result.moved]
    if not moved:
        equal = any(np.isfinite(pair.result.difference).any() for pair in pairs)
        return theme.say_no_data(figure, "No expert moved." if equal else NO_TOKENS)
    for pair in moved:
        figure.add_trace(_bars(pair))
    figure.update_xaxes(tickformat="+.2~%", zeroline=True, zerolinecolor=theme.INK)
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_layout(showlegend=False)
    theme.add_view_buttons(figure, [_pair_label(pair) for pair in moved])
    return figure


def distance_matrix(every: EveryDistance, measure: Measure, subject: str = "") -> go.Figure:
    """Mean distance over the layers of each side from each; on the diagonal, that of two halves of one.

    The reader switches between Jensen-Shannon divergence and total variation.

    Args:
        every: distances of all sides.
        measure: what they rest on.
        subject: what was compared, for the second line of the title.
    """
    figure = theme.new_figure(f"Mean distance in {NAMES[measure]}", subject, "", "")
    views = {"jensen_shannon": "Jensen-Shannon (bits)", "total_variation": "Total variation (share)"}
    places = list(range(len(every.names)))
    ticks = [theme.plain(clip(name, LONGEST_TICK)) for name in every.names]
    both = [[(_label(row), _label(column)) for column in every.names] for row in every.names]
    matrices = []
    for view in views:
        mean = finite_mean(getattr(every.between, view), -1)
        np.fill_diagonal(mean, finite_mean(getattr(every.within, view), -1))
        matrices.append(mean)
    if not np.isfinite(matrices[0]).any():
        return theme.say_no_data(figure, NO_TOKENS)
    for (view, name), mean in zip(views.items(), matrices, strict=True):
        figure.add_trace(
            go.Heatmap(
                z=mean,
                x=places,
                y=places,
                customdata=both,
                name=view,
                colorscale=theme.SEQUENTIAL,
                zmin=0.0,
                colorbar={"title": {"text": theme.bar_title(name)}, "nticks": 5},
                hoverongaps=False,
                texttemplate="%{z:.3~g}" if len(places) <= MOST_NUMBERED else None,
                hovertemplate=f"%{{customdata[0]}} and %{{customdata[1]}}<br>%{{z:.4~g}} {name}<extra></extra>",
            )
        )
    figure.update_xaxes(tickvals=places, ticktext=ticks)
    figure.update_yaxes(tickvals=places, ticktext=ticks, autorange="reversed")
    figure.update_layout(plot_bgcolor=theme.NO_DATA_COLOUR)
    theme.add_view_buttons(figure, [name.rsplit(" (", 1)[0] for name in views.values()])
    return figure


def _difference(pair: ComparedPair) -> go.Heatmap:
    """One view; float32 is more than a colour or a hover text can show and halves the page."""
    result = pair.result
    size = np.abs(result.difference[np.isfinite(result.difference)])
    limit = float(np.percentile(size, COLOUR_PERCENTILE)) or float(size.max()) or 1.0 / max(result.experts)
    return go.Heatmap(
        z=result.difference.astype(np.float32),
        x=np.arange(result.difference.shape[1]),
        y=theme.layer_labels(result.layers),
        customdata=np.stack([result.reference, result.other, _expert_p_values(pair)], axis=-1).astype(np.float32),
        name=_label(pair.other.name),
        colorscale=theme.DIVERGING,
        zmin=-limit,
        zmid=0.0,
        zmax=limit,
        colorbar={"title": {"text": theme.bar_title("difference")}, "tickformat": "+.2~%"},
        hoverongaps=False,
        hovertemplate=(
            "layer %{y}, expert %{x}<br>%{z:+.4~%}<br>"
            f"{_hover(pair.reference.name)} %{{customdata[0]:.4~%}}<br>"
            f"{_hover(pair.other.name)} %{{customdata[1]:.4~%}}"
            + ("<br>p for all experts %{customdata[2]:.2~g}" if pair.change is not None else "")
            + "<extra></extra>"
        ),
    )


def _expert_p_values(pair: ComparedPair) -> NDArray[np.float64]:
    """(L, E) p-value of each expert for all experts; NaN where it was not tested."""
    return np.full_like(pair.result.difference, np.nan) if pair.change is None else pair.change.p_corrected


def _distance_line(pair: ComparedPair, index: int, view: str) -> go.Scatter:
    """One comparison in one view."""
    result, p = pair.result, layer_p_values(pair)
    unknown = np.full(len(result.layers), np.nan)
    halves = [
        unknown if level is None else getattr(level.distances, view)
        for level in (result.within_reference, result.within_other)
    ]
    symbol = SYMBOLS[index // len(theme.LINE_COLOURS) % len(SYMBOLS)]
    told = [getattr(result.noise, view), getattr(result.ratio, view), result.correlation, *halves, p]
    return go.Scatter(
        x=result.layers,
        y=getattr(result.between, view),
        customdata=np.stack(told, axis=-1),
        name=_label(pair.other.name),
        legendgroup=str(index),
        mode="lines+markers",
        line={"color": _colour(index), "width": 2, "dash": DASHES[index // len(theme.LINE_COLOURS) % len(DASHES)]},
        marker={"size": 7, "symbol": [f"{symbol}-open" if one > LEVEL else symbol for one in p]},
        hovertemplate=(
            f"{_hover(pair.other.name)}, layer %{{x}}<br>%{{y:.4~g}}<br>noise %{{customdata[0]:.4~g}}<br>"
            "%{customdata[1]:.3~g} × noise<br>"
            f"halves of {_hover(pair.reference.name)} %{{customdata[3]:.4~g}}, "
            f"of {_hover(pair.other.name)} %{{customdata[4]:.4~g}}<br>"
            "Pearson r %{customdata[2]:.4f}"
            + ("<br>p for all layers %{customdata[5]:.2~g}" if pair.change is not None else "")
            + "<extra></extra>"
        ),
    )


def _noise_lines(pairs: Sequence[ComparedPair], view: str) -> list[go.Scatter]:
    """The noise of each comparison, or of many the highest; none where it is not known."""
    levels: list[NDArray[np.float64]] = [getattr(pair.result.noise, view) for pair in pairs]
    if len(pairs) > MOST_NOISE_LINES:
        stack = np.stack(levels)
        highest = np.where(np.isfinite(stack).any(axis=0), np.nanmax(np.nan_to_num(stack, nan=-1.0), axis=0), np.nan)
        shown = [("highest noise of all", highest, theme.FAINT_INK, "noise")]
    else:
        shown = [
            (f"{_label(pair.other.name)}: noise", level, _colour(index), str(index))
            for index, (pair, level) in enumerate(zip(pairs, levels, strict=True))
        ]
    return [
        go.Scatter(
            x=pairs[0].result.layers,
            y=level,
            name=name,
            legendgroup=group,
            mode="lines",
            line={"color": colour, "width": 1.2, "dash": "dot"},
            hovertemplate="noise, layer %{x}<br>%{y:.4~g}<extra></extra>",
        )
        for name, level, colour, group in shown
        if np.isfinite(level).any()
    ]


def _bars(pair: ComparedPair) -> go.Bar:
    """One view."""
    shown, p = pair.result.moved[:MOST_BARS], moved_p_values(pair)[:MOST_BARS]
    return go.Bar(
        x=[move.difference for move in shown],
        y=[f"layer {move.layer}, expert {move.expert}" for move in shown],
        orientation="h",
        customdata=[
            (move.before, move.after, ratio_in_words(move.ratio), one) for move, one in zip(shown, p, strict=True)
        ],
        name=_label(pair.other.name),
        marker={
            "color": [theme.DIVERGING[-1 if move.difference > 0 else 0][1] for move in shown],
            "opacity": [UNSURE_OPACITY if one > LEVEL else 1.0 for one in p],
        },
        hovertemplate=(
            "%{y}<br>%{x:+.4~%}<br>"
            f"{_hover(pair.reference.name)} %{{customdata[0]:.4~%}}<br>"
            f"{_hover(pair.other.name)} %{{customdata[1]:.4~%}}<br>"
            "%{customdata[2]}"
            + ("<br>p for all experts %{customdata[3]:.2~g}" if pair.change is not None else "")
            + "<extra></extra>"
        ),
    )


def _colour(index: int) -> str:
    return theme.LINE_COLOURS[index % len(theme.LINE_COLOURS)]


def _label(name: str) -> str:
    """A name for legends and buttons."""
    return theme.plain(clip(name, LONGEST_LABEL))


def _pair_label(pair: ComparedPair) -> str:
    """Which two a view compares."""
    return f"{_label(pair.other.name)} − {_label(pair.reference.name)}"


def _only_pair(pairs: Sequence[ComparedPair]) -> str:
    """What is compared, for the title; nothing where buttons say it."""
    return f": {_pair_label(pairs[0])}" if len(pairs) == 1 else ""


def _hover(name: str) -> str:
    """A name inside a hover template, which reads %{…} as a field."""
    return _label(name).replace("%{", "% {")
