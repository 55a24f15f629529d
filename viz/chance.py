"""Correlation and periods beside what chance gives, and how reliable each layer's profile is."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from moescope.stats.nulls import LayerNulls
from moescope.stats.period_finder import LEVEL, PeriodFinding
from moescope.stats.reliability import CONFIDENCE, Reliability
from moescope.viz import theme
from moescope.viz.activation import NAMES
from moescope.viz.correlation import distance_axes, distance_heatmap

FADING_COLOUR, UNALIGNED_COLOUR, GROUPS_COLOUR = theme.LINE_COLOURS[1], theme.NEUTRAL_COLOUR, theme.LINE_COLOURS[2]
BAND_OPACITY = 0.3
MOST_TICKS = 36


def distance_against_chance(nulls: LayerNulls, subject: str = "") -> go.Figure:
    """Mean correlation at each distance with its 95% interval, over the bands that chance gives.

    Args:
        nulls: layer correlation and its nulls.
        subject: what it was measured on, for the second line of the title.
    """
    null = nulls.free
    figure = theme.new_figure(
        f"Correlation of {NAMES[nulls.kind]} against chance",
        subject,
        "Layer distance Δ (model layers)",
        "mean Pearson correlation r",
    )
    if not null.deltas:
        return theme.say_no_data(figure, "No two layers can be compared: there is nothing to show.")
    _band(figure, null.deltas, null.null_quantiles[0], null.null_quantiles[2], "95% of random orders", UNALIGNED_COLOUR)
    if nulls.within_groups is not None:
        low, _, high = nulls.within_groups.null_quantiles
        _band(figure, null.deltas, low, high, "95% within router groups", GROUPS_COLOUR)
    _threshold(figure, null.deltas, null.threshold, "p = 0.05 for all distances together", FADING_COLOUR)
    if nulls.within_groups is not None:
        threshold = nulls.within_groups.threshold
        _threshold(figure, null.deltas, threshold, "p = 0.05 within router groups", GROUPS_COLOUR)
    low, high = nulls.intervals
    figure.add_trace(
        _points(
            null.deltas,
            null.mean,
            null.p_family <= LEVEL,
            (null.mean - low, high - null.mean),
            list(zip(null.pairs, low, high, null.p_family, null.p, strict=True)),
            "Δ %{x}<br>mean r %{y:.4f} over %{customdata[0]} pairs<br>"
            "95%: %{customdata[1]:.4f} to %{customdata[2]:.4f}<br>"
            "p %{customdata[3]:.2g} for all distances, %{customdata[4]:.2g} alone<extra></extra>",
        )
    )
    figure.update_xaxes(dtick=1 if null.looks <= MOST_TICKS else None)
    figure.update_layout(legend=_LEGEND)
    return figure


def period_scan(found: PeriodFinding, subject: str = "") -> go.Figure:
    """Statistic of each period, with what both nulls give and the thresholds for all periods together.

    Args:
        found: the search for a period.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure(
        f"Search for a period in {NAMES[found.kind]}",
        subject,
        "Period (model layers)",
        "statistic (standard normal where nothing repeats)",
    )
    if not found.looks:
        return theme.say_no_data(figure, "Too few layers can be compared for a period to come back.")
    reach = float(ndtri((1 + CONFIDENCE) / 2))
    nulls = (
        (found.unaligned, "random order", UNALIGNED_COLOUR),
        (found.smooth, "fading with distance", FADING_COLOUR),
    )
    for null, name, colour in nulls:
        low, high = null.mean - reach * null.sd, null.mean + reach * null.sd
        _band(figure, found.periods, low, high, f"95% if {name}", colour)
        _threshold(figure, found.periods, null.threshold, f"p = 0.05 for all periods, {name}", colour)
    both = (found.unaligned.p_family <= LEVEL) & (found.smooth.p_family <= LEVEL)
    figure.add_trace(
        _points(
            found.periods,
            found.statistic,
            both,
            None,
            list(
                zip(
                    found.pairs,
                    found.effect,
                    *found.effect_interval,
                    found.smooth.p_family,
                    found.unaligned.p_family,
                    found.smooth.detectable,
                    strict=True,
                )
            ),
            "period %{x}: statistic %{y:.2f}<br>%{customdata[0]} pairs, effect %{customdata[1]:.4f} "
            "(95%: %{customdata[2]:.4f} to %{customdata[3]:.4f})<br>p for all periods: %{customdata[4]:.2g} fading, "
            "%{customdata[5]:.2g} random order<br>effect needed here: %{customdata[6]:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(dtick=1 if found.looks <= MOST_TICKS else None)
    figure.update_layout(legend=_LEGEND)
    return figure


def reliability_by_layer(found: Reliability, subject: str = "") -> go.Figure:
    """Reliability of each layer's profile with its 95% interval, and the target.

    Args:
        found: reliability of the layers.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("Reliability by layer", subject, "Layer index", "reliability")
    if not np.isfinite(found.reliability).any():
        return theme.say_no_data(figure, "Reliability needs selections in two parts of the prompts at least.")
    labels = theme.layer_labels(found.layers)
    reach = float(stdtrit(max(found.splits - 1, 1), (1 + CONFIDENCE) / 2)) * found.reliability_error
    figure.add_trace(
        _points(
            labels,
            found.reliability,
            found.defined,
            (reach, reach),
            list(zip(found.reliability_error, found.tokens_enough, strict=True)),
            "layer %{x}: %{y:.4f} ± %{customdata[0]:.4f} (standard error)<br>"
            f"{found.target:.1f} after about %{{customdata[1]:,.0f}} tokens<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero")
    figure.add_hline(y=found.target, line={"dash": "dash", "width": 1.2, "color": theme.FAINT_INK})
    figure.update_layout(showlegend=False)
    return figure


def corrected_heatmap(found: Reliability, delta_max: int, subject: str = "") -> go.Figure:
    """Layer correlation freed from the noise of the draw of prompts, by starting layer and distance.

    Args:
        found: reliability of the layers.
        delta_max: largest distance to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure(
        "Layer correlation without sampling noise", subject, "Layer distance Δ (model layers)", "Starting layer index"
    )
    deltas = range(1, delta_max + 1)
    row = {layer: place for place, layer in enumerate(found.layers)}
    matrix = np.full((len(found.layers), delta_max), np.nan)
    for layer, place in row.items():
        for delta in deltas:
            if layer + delta in row:
                matrix[place, delta - 1] = found.corrected[place, row[layer + delta]]
    if not np.isfinite(matrix).any():
        return theme.say_no_data(figure, "No two layers are reliable enough to be freed from their noise.")
    figure.add_trace(distance_heatmap(matrix, deltas, found.layers, "corrected r"))
    distance_axes(figure)
    return figure


_LEGEND = {"orientation": "h", "x": 0.0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "font": {"size": 12}}


def _band(
    figure: go.Figure,
    x: Sequence[int],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    name: str,
    colour: str,
) -> None:
    """A band between two lines, without outline."""
    outline = {"x": list(x), "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(y=low, showlegend=False, **outline))
    figure.add_trace(go.Scatter(y=high, name=name, fill="tonexty", fillcolor=_translucent(colour), **outline))


def _threshold(figure: go.Figure, x: Sequence[int], y: NDArray[np.float64], name: str, colour: str) -> None:
    line = {"dash": "dash", "width": 1.4, "color": colour}
    figure.add_trace(go.Scatter(x=list(x), y=y, name=name, mode="lines", line=line, hoverinfo="skip"))


def _points(
    x: Sequence[int] | Sequence[str],
    y: NDArray[np.float64],
    filled: NDArray[np.bool_],
    reach: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
    customdata: list[tuple[float, ...]],
    hovertemplate: str,
) -> go.Scatter:
    """What was measured, joined by a faint line; full marks are what counts."""
    colour = theme.STRONG_COLOUR
    bars = {} if reach is None else {"error_y": {"array": reach[1], "arrayminus": reach[0], "thickness": 1.2}}
    return go.Scatter(
        x=list(x),
        y=y,
        mode="lines+markers",
        name="measured (full: counts)",
        line={"width": 1, "color": colour},
        marker={
            "size": 8,
            "symbol": ["circle" if full else "circle-open" for full in filled],
            "color": colour,
            "line": {"width": 1.5, "color": colour},
        },
        customdata=customdata,
        hovertemplate=hovertemplate,
        **bars,
    )


def _translucent(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{BAND_OPACITY})"
