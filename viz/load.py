"""How evenly each layer's experts are loaded."""

from collections.abc import Sequence

import plotly.graph_objects as go

from moescope.stats.activation import LayerLoad
from moescope.viz import theme


def load_by_layer(loads: Sequence[LayerLoad], subject: str = "") -> go.Figure:
    """Load of the busiest expert over the mean load, one bar a layer.

    Args:
        loads: one a MoE layer, in model order.
        subject: what they were measured on, for the second line of the title.
    """
    figure = theme.new_figure("Expert load by layer", subject, "Layer index", "busiest expert / mean")
    loaded = [load for load in loads if load.selections]
    if not loaded:
        return theme.say_no_data(figure, "No expert was selected: there is nothing to show.")
    figure.add_trace(
        go.Bar(
            x=theme.layer_labels([load.layer for load in loaded]),
            y=[load.max_over_mean for load in loaded],
            customdata=[(len(load.dead_experts), load.experts) for load in loaded],
            marker_color=theme.MODERATE_COLOUR,
            hovertemplate=(
                "layer %{x}<br>busiest expert: %{y:.2f} × mean<br>%{customdata[0]} of %{customdata[1]} never chosen"
                "<extra></extra>"
            ),
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero")
    figure.add_hline(y=1.0, line={"dash": "dash", "width": 1.2, "color": theme.FAINT_INK})
    return figure
