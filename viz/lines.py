"""Named lines side by side, the legend above the plot."""

from collections.abc import Sequence

import plotly.graph_objects as go

from moescope.viz import theme

Line = tuple[str, object, str, str | None]
"""Name, values, colour and dash of a line."""

LEGEND = {"orientation": "h", "x": 0.0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "font": {"size": 12}}


def lines_by_layer(figure: go.Figure, layers: Sequence[int], lines: Sequence[Line], hover: str) -> go.Figure:
    """Lines over layers, from zero upwards.

    Args:
        figure: what to draw into.
        layers: (L,) true model indices.
        lines: each with (L,) values.
        hover: how plotly writes a value, e.g. `%{y:.3f} × mean`.
    """
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero")
    return draw_lines(figure, theme.layer_labels(layers), lines, f"layer %{{x}}: {hover}")


def draw_lines(figure: go.Figure, x: object, lines: Sequence[Line], hover: str) -> go.Figure:
    """Lines over any axis.

    Args:
        figure: what to draw into.
        x: where the values lie.
        lines: each with as many values.
        hover: how plotly writes a point.
    """
    for name, values, colour, dash in lines:
        figure.add_trace(
            go.Scatter(
                x=x,
                y=values,
                name=name,
                mode="lines+markers",
                line={"color": colour, "width": 1.6, "dash": dash},
                marker={"size": 5},
                hovertemplate=f"{hover}<extra>{name}</extra>",
            )
        )
    figure.update_layout(legend=LEGEND, showlegend=True)
    return figure
