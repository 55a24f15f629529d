"""Figures of router weight similarity."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.stats.similarity import RouterSimilarity
from moescope.viz import theme
from moescope.viz.correlation import distance_axes, distance_heatmap

NO_WEIGHTS = "Router weights were not read for this profile."
SMALLEST_LIMIT = 0.05
COSINE_BAR = {
    "title": {"text": "cosine (colour range of the pairs off the diagonal)", "side": "bottom"},
    "orientation": "h",
    "lenmode": "pixels",
    "len": 420,
    "yref": "container",
    "y": 0.0,
    "yanchor": "bottom",
}
"""Below the square, which stays in the middle however wide the window is."""


def router_cosine_heatmap(similarity: RouterSimilarity | None, subject: str = "") -> go.Figure:
    """Cosine of the flattened router weights, layer by layer.

    The colour saturates at the largest value off the diagonal, which is 1 by definition and would drown the rest.

    Args:
        similarity: what to show; None where router weights were not read.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("Router similarity between layers", subject, "Layer index", "Layer index")
    if similarity is None:
        return theme.say_no_data(figure, NO_WEIGHTS)
    if not np.isfinite(similarity.cosine).any():
        return theme.say_no_data(figure, "No router can be compared with another: there is nothing to show.")
    figure.add_trace(layer_square(similarity.cosine, similarity.layers, "cosine"))
    square_axes(figure)
    return figure


def layer_square(cosine: NDArray[np.float64], layers: Sequence[int], name: str) -> go.Heatmap:
    """Heatmap trace of a cosine, layer by layer; the colour saturates at the largest value off the diagonal.

    Args:
        cosine: (L, L) float64 within [-1, 1]; NaN is left blank.
        layers: (L,) true model indices.
        name: what the value is called.
    """
    limit = colour_limit(cosine[~np.eye(len(layers), dtype=bool)])
    labels = theme.layer_labels(layers)
    return go.Heatmap(
        z=cosine.astype(np.float32),
        x=labels,
        y=labels,
        name=name,
        colorscale=theme.DIVERGING,
        zmin=-limit,
        zmid=0.0,
        zmax=limit,
        colorbar=COSINE_BAR,
        hoverongaps=False,
        hovertemplate=f"layers %{{y}} and %{{x}}<br>{name} %{{z:.4f}}<extra></extra>",
    )


def square_axes(figure: go.Figure) -> None:
    """Axes of a heatmap with as many rows as columns, and room below for its colour bar."""
    theme.layers_downwards(figure)
    figure.update_xaxes(type="category", constrain="domain")
    figure.update_yaxes(scaleanchor="x", constrain="domain")
    figure.update_layout(plot_bgcolor=theme.NO_DATA_COLOUR, margin_b=theme.MARGIN["b"] + 70)


def router_norm_heatmap(similarity: RouterSimilarity | None, subject: str = "") -> go.Figure:
    """Correlation of expert row norms by starting layer and distance; as a second view the mean cosine of the rows.

    Args:
        similarity: what to show; None where router weights were not read.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure(
        "Router rows at a distance", subject, "Layer distance Δ (model layers)", "Starting layer index"
    )
    if similarity is None:
        return theme.say_no_data(figure, NO_WEIGHTS)
    views = [
        ("norm correlation", similarity.norm_correlation, 1.0),
        ("mean row cosine", similarity.row_cosine, colour_limit(similarity.row_cosine)),
    ]
    measured = [view for view in views if np.isfinite(view[1]).any()]
    if not measured:
        return theme.say_no_data(figure, "No two routers within reach can be compared: there is nothing to show.")
    for name, matrix, limit in measured:
        figure.add_trace(distance_heatmap(matrix, similarity.deltas, similarity.layers, name, limit))
    distance_axes(figure)
    theme.add_view_buttons(figure, [name.capitalize() for name, _, _ in measured])
    return figure


def colour_limit(values: NDArray[np.float64]) -> float:
    """Symmetric colour limit that uses the whole map: the largest magnitude, within [0.05, 1]."""
    finite = np.abs(values[np.isfinite(values)])
    return float(np.clip(finite.max(initial=0.0), SMALLEST_LIMIT, 1.0)) if finite.size else 1.0
