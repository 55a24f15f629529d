"""Figures of what training has changed: the same experts in two checkpoints."""

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.stats.expert_similarity import PARTS
from moescope.stats.pairwise import finite_mean
from moescope.stats.weight_similarity import WeightChange
from moescope.viz import theme
from moescope.viz.activation import COLOUR_PERCENTILE

NOTHING = "No expert is usable in both checkpoints: there is nothing to show."
SMALLEST_SPAN = 1e-6
"""Colour range of weights that have not changed at all."""


def change_heatmap(change: WeightChange, subject: str = "") -> go.Figure:
    """Experts across, layers downwards, change as colour; the reader switches between change, cosine and routers.

    Colour begins and ends at the 0.5th and 99.5th percentile of the view.

    Args:
        change: what to show.
        subject: what was compared, for the second line of the title.
    """
    figure = theme.new_figure("Change of each expert", subject, "Expert index", "Layer index")
    views = (
        ("relative change", change.relative_change),
        ("cosine", change.cosine),
        ("router relative change", change.router_relative_change),
        ("router cosine", change.router_cosine),
    )
    measured = [(name, matrix) for name, matrix in views if np.isfinite(matrix).any()]
    if not measured:
        return theme.say_no_data(figure, NOTHING)
    for name, matrix in measured:
        figure.add_trace(_heatmap(name, matrix, change.layers))
    theme.layers_downwards(figure)
    figure.update_layout(plot_bgcolor=theme.NO_DATA_COLOUR)
    theme.add_view_buttons(figure, [name.capitalize() for name, _ in measured])
    return figure


def change_lines(change: WeightChange, subject: str = "") -> go.Figure:
    """Mean over experts of the change of gate, up, down and the router's rows, layer by layer.

    The reader switches between relative change and cosine.

    Args:
        change: what to show.
        subject: what was compared, for the second line of the title.
    """
    views = {
        "Relative change": (change.part_relative_change, change.router_relative_change),
        "Cosine": (change.part_cosine, change.router_cosine),
    }
    titles = [f"{name}, mean over experts" for name in views]
    figure = theme.new_figure("Change of each part by layer", subject, "Layer index", titles[0])
    if not any(np.isfinite(matrix).any() for pair in views.values() for matrix in pair):
        return theme.say_no_data(figure, NOTHING)
    for view, (parts, router) in views.items():
        for place, (name, matrix) in enumerate(zip((*PARTS, "router"), (*parts, router), strict=True)):
            figure.add_trace(
                go.Scatter(
                    x=change.layers,
                    y=finite_mean(matrix, axis=1),
                    name=name,
                    mode="lines+markers",
                    line={
                        "color": theme.LINE_COLOURS[place],
                        "width": 2,
                        "dash": "dot" if name == "router" else "solid",
                    },
                    marker={"size": 6},
                    hovertemplate=f"{name}, layer %{{x}}<br>{view.lower()} %{{y:.4~g}}<extra></extra>",
                )
            )
    figure.update_xaxes(dtick=1 if len(change.layers) <= 36 else None)
    figure.update_layout(showlegend=True)
    theme.add_view_buttons(figure, list(views), traces_each=len(PARTS) + 1, y_titles=titles)
    return figure


def _heatmap(name: str, matrix: NDArray[np.float64], layers: tuple[int, ...]) -> go.Heatmap:
    """One view; much change is light, whichever way it is measured."""
    finite = matrix[np.isfinite(matrix)]
    low, high = (float(np.percentile(finite, share)) for share in (100 - COLOUR_PERCENTILE, COLOUR_PERCENTILE))
    alike = name.endswith("cosine")
    return go.Heatmap(
        z=matrix.astype(np.float32),
        x=np.arange(matrix.shape[1]),
        y=theme.layer_labels(layers),
        name=name,
        colorscale=theme.SEQUENTIAL,
        reversescale=alike,
        zmin=low if alike else 0.0,
        zmax=max(high, (low if alike else 0.0) + SMALLEST_SPAN),
        colorbar={"title": {"text": theme.bar_title(name)}},
        hoverongaps=False,
        hovertemplate=f"layer %{{y}}, expert %{{x}}<br>{name} %{{z:.5~g}}<extra></extra>",
    )
