"""The router's distribution token by token, as stacked surfaces."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from moescope.viz import theme
from moescope.viz.activation import COLOUR_PERCENTILE

if TYPE_CHECKING:  # a hand-over type
    from moescope.profiler.sidecars import TokenSample

MOST_EXPERTS = 64
CAMERA = {"eye": {"x": 1.8, "y": -1.8, "z": 1.5}, "center": {"x": 0.0, "y": 0.0, "z": -0.12}}
GAP = 0.25
"""Air between two surfaces, as a share of the highest probability."""
LONGEST_TOKEN = 12
NO_SAMPLE = "No tokens were kept beside this profile: the view needs a run that records distributions."


def activation_surface(sample: "TokenSample | None", subject: str = "") -> go.Figure:
    """One surface a layer: expert across, token along, probability as height and colour.

    Surfaces are stacked with an offset; colour (up to the 99.5th percentile) and hover text give the probability
    itself. Of more than 64 experts the 64 with the highest mean probability over the tokens and layers shown are drawn,
    in the order of their indices.

    Args:
        sample: What to show; None where none was kept.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("Router probability, token by token", subject, "", "")
    if sample is None or not sample.probabilities.size:
        return theme.say_no_data(figure, NO_SAMPLE)
    values = sample.probabilities.astype(np.float32)
    chosen = np.sort(np.argsort(-values.mean(axis=(0, 1)), kind="stable")[:MOST_EXPERTS])
    values = values[:, :, chosen]
    step = float(values.max()) * (1 + GAP)
    brightest = float(np.percentile(values, COLOUR_PERCENTILE))
    tokens = [f"{row} {theme.plain(text.strip()[:LONGEST_TOKEN])}".rstrip() for row, text in enumerate(sample.texts)]
    depth = len(sample.layers)
    for place, layer in enumerate(sample.layers):
        figure.add_trace(
            go.Surface(
                z=values[place] + np.float32(step * place),
                surfacecolor=values[place],
                x=[str(expert) for expert in chosen],
                y=tokens,
                customdata=values[place],
                name=f"layer {layer}",
                colorscale=theme.SEQUENTIAL,
                cmin=0.0,
                cmax=brightest,
                showscale=place == depth - 1,
                colorbar={"title": {"text": theme.bar_title("probability")}, "tickformat": ".2~%", "len": 0.7},
                contours={"x": {"highlight": False}, "y": {"highlight": False}, "z": {"highlight": False}},
                hovertemplate=(
                    f"layer {layer}, expert %{{x}}<br>token %{{y}}<br>probability %{{customdata:.3~%}}<extra></extra>"
                ),
            )
        )
    experts = max(sample.experts)
    across = "Expert index" if experts <= MOST_EXPERTS else f"Expert index ({MOST_EXPERTS} most probable of {experts})"
    axis = {"backgroundcolor": "rgba(0,0,0,0)", "gridcolor": theme.NEUTRAL_COLOUR, "showspikes": False}
    figure.update_layout(
        scene={
            "camera": CAMERA,
            "aspectmode": "manual",
            "aspectratio": {"x": 1.3, "y": 1.2, "z": 1.15},
            "xaxis": {**axis, "title": {"text": across}, "type": "category", "nticks": 9},
            "yaxis": {**axis, "title": {"text": "Token"}, "type": "category", "nticks": 11},
            "zaxis": {
                **axis,
                "title": {"text": ""},
                "tickvals": [step * place for place in range(depth)],
                "ticktext": [f"layer {layer}" for layer in sample.layers],
            },
        },
        margin={"l": 10, "r": 10, "b": 10, "t": theme.MARGIN["t"]},
    )
    return figure
