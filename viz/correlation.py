"""Heatmaps by starting layer and distance."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.stats.correlation import LayerCorrelation
from moescope.viz import theme
from moescope.viz.activation import NAMES


def correlation_heatmap(correlation: LayerCorrelation, subject: str = "") -> go.Figure:
    """Distance Δ across, starting layer downwards, Pearson r as colour: a bright column is a period.

    Args:
        correlation: what to show; distances no pair of layers spans are left out.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure(
        f"Correlation of {NAMES[correlation.kind]} between layers",
        subject,
        "Layer distance Δ (model layers)",
        "Starting layer index",
    )
    if not np.isfinite(correlation.matrix).any():
        return theme.say_no_data(figure, "No two layers within reach can be compared: there is nothing to show.")
    figure.add_trace(distance_heatmap(correlation.matrix, correlation.deltas, correlation.layers, "Pearson r"))
    distance_axes(figure)
    return figure


def distance_heatmap(
    matrix: NDArray[np.float64], deltas: Sequence[int], layers: Sequence[int], name: str, limit: float = 1.0
) -> go.Heatmap:
    """Heatmap trace of a matrix by starting layer and distance.

    Args:
        matrix: (L, Δ) float64 within [-1, 1]; NaN is left blank.
        deltas: (Δ,) distances in model layers.
        layers: (L,) true model indices.
        name: what the value is called.
        limit: value at which the colour saturates, on both sides of 0.
    """
    span = max(layers) - min(layers)
    shown = [column for column, delta in enumerate(deltas) if delta <= span]
    kept = [deltas[column] for column in shown]
    return go.Heatmap(
        z=matrix[:, shown].astype(np.float32),
        x=kept,
        y=theme.layer_labels(layers),
        customdata=np.add.outer(np.asarray(layers), np.asarray(kept)).astype(np.int32),
        name=name,
        colorscale=theme.DIVERGING,
        zmin=-limit,
        zmid=0.0,
        zmax=limit,
        colorbar={"title": {"text": theme.bar_title(name)}},
        hoverongaps=False,
        hovertemplate=f"layers %{{y}} → %{{customdata}}, Δ %{{x}}<br>{name} %{{z:.4f}}<extra></extra>",
    )


def distance_axes(figure: go.Figure) -> None:
    """Axes of a heatmap by starting layer and distance."""
    deltas = figure.data[0].x
    figure.update_xaxes(dtick=1 if len(deltas) <= 36 else None, range=[deltas[0] - 0.5, deltas[-1] + 0.5])
    theme.layers_downwards(figure)
    figure.update_layout(plot_bgcolor=theme.NO_DATA_COLOUR)
