"""Heatmap of how much each expert of each layer is used."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.stats.activation import Activation
from moescope.viz import theme

NAMES = {
    "frequency": "selection frequency",
    "probability": "mean router probability",
    "weight": "routing weight share",
}
"""What each measure is called in figures and texts."""

COLOUR_PERCENTILE = 99.5


def activation_heatmap(views: Sequence[Activation], subject: str = "") -> go.Figure:
    """Experts across, layers downwards, use as colour; the reader switches between the views.

    Colour starts at 0 and ends at the 99.5th percentile of the view, so that one busy expert does not darken all
    others; the hover text gives the value itself, and uniform use, 1/E, where all layers have as many experts.

    Args:
        views: activations of the same model; the first is shown first.
        subject: what they were measured on, for the second line of the title.
    """
    figure = theme.new_figure("Expert activation by layer", subject, "Expert index", "Layer index")
    measured = [view for view in views if np.isfinite(view.matrix).any()]
    if not measured:
        return theme.say_no_data(figure, "No routed tokens were recorded: there is nothing to show.")
    for view in measured:
        figure.add_trace(_heatmap(view))
    theme.layers_downwards(figure)
    figure.update_layout(plot_bgcolor=theme.NO_DATA_COLOUR)
    theme.add_view_buttons(figure, [NAMES[view.kind].capitalize() for view in measured])
    return figure


def colour_end(matrix: NDArray[np.float64]) -> float:
    """Value at which the colour of a view ends; 1 where nothing was recorded."""
    finite = matrix[np.isfinite(matrix)]
    return float(np.percentile(finite, COLOUR_PERCENTILE)) if finite.size else 1.0


def _heatmap(view: Activation) -> go.Heatmap:
    """One view; float32 is more than a colour or a hover text can show and halves the page."""
    uniform = f"<br>uniform use {1 / view.experts[0]:.3%}" if len(set(view.experts)) == 1 else ""
    name = NAMES[view.kind]
    return go.Heatmap(
        z=view.matrix.astype(np.float32),
        x=np.arange(view.matrix.shape[1]),
        y=theme.layer_labels(view.layers),
        name=name,
        colorscale=theme.SEQUENTIAL,
        zmin=0.0,
        zmax=colour_end(view.matrix),
        colorbar={"title": {"text": theme.bar_title(name)}, "tickformat": ".2~%"},
        hoverongaps=False,
        hovertemplate=f"layer %{{y}}, expert %{{x}}<br>{name} %{{z:.4~%}}{uniform}<extra></extra>",
    )
