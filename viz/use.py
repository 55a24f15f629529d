"""How experts are used: evenness, specialisation, phases, and what placements of the load would give."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from moescope.stats.placement import HeldOutPlacement
from moescope.stats.specialisation import ALPHA, Specialisation
from moescope.stats.use import ExpertUse, PhaseContrast
from moescope.viz import theme
from moescope.viz.lines import lines_by_layer


def effective_by_layer(use: ExpertUse, subject: str = "") -> go.Figure:
    """As many equally used experts as would spread a layer's use so, one bar a layer.

    Args:
        use: evenness of each layer.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("Effective experts by layer", subject, "Layer index", "effective experts")
    if not np.isfinite(use.effective).any():
        return theme.say_no_data(figure, "No expert was selected: there is nothing to show.")
    columns = (use.experts, use.entropy, use.gini, use.jain, use.hot.sum(axis=1), use.dead.sum(axis=1))
    figure.add_trace(
        go.Bar(
            x=theme.layer_labels(use.layers),
            y=use.effective,
            customdata=list(zip(*columns, strict=True)),
            marker_color=theme.MODERATE_COLOUR,
            hovertemplate=(
                "layer %{x}<br>%{y:.2f} of %{customdata[0]} experts<br>entropy %{customdata[1]:.3f}, Gini "
                "%{customdata[2]:.3f}, Jain %{customdata[3]:.3f}<br>%{customdata[4]} hot, %{customdata[5]} never chosen"
                "<extra></extra>"
            ),
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero")
    return figure


def specialised_experts(found: Specialisation, domains: Sequence[str], subject: str = "") -> go.Figure:
    """How many experts of a layer each domain certainly prefers, as a heatmap of domain and layer.

    Args:
        found: every domain against all others.
        domains: their names, in the order of `found`.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("Experts that a domain prefers", subject, "Layer index", "")
    if not np.isfinite(found.p_corrected).any():
        return theme.say_no_data(figure, "The prompts fall into too few parts to tell preference from chance.")
    preferred = (np.nan_to_num(found.p_corrected, nan=1.0) <= ALPHA) & (found.ratio > 1)
    figure.add_trace(
        go.Heatmap(
            z=preferred.sum(axis=2),
            x=theme.layer_labels(found.layers),
            y=[theme.plain(theme.clip(name, 30)) for name in domains],
            colorscale=theme.SEQUENTIAL,
            zmin=0,
            colorbar={"title": {"text": theme.bar_title("experts")}},
            hovertemplate="%{y}<br>layer %{x}: %{z} experts<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    return figure


def phases_by_layer(found: PhaseContrast, subject: str = "") -> go.Figure:
    """Distance between prefill and decode, layer by layer, over what independent selections would give.

    Args:
        found: the two phases over the same mix of domains.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("Prefill against decode", subject, "Layer index", "Jensen-Shannon divergence (bits)")
    if not np.isfinite(found.between.jensen_shannon).any():
        return theme.say_no_data(figure, "No domain has tokens in both phases: there is nothing to compare.")
    lines = (
        ("measured", found.between.jensen_shannon, theme.STRONG_COLOUR, None),
        ("independent selections", found.floor, theme.FAINT_INK, "dash"),
    )
    return lines_by_layer(figure, found.layers, lines, "%{y:.5f} bits")


def placement_by_layer(found: HeldOutPlacement, subject: str = "") -> go.Figure:
    """Load of the busiest GPU over the mean, under three placements, on prompts that they were not made from.

    Args:
        found: the placements.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure(f"Experts on {found.gpus} GPUs", subject, "Layer index", "busiest GPU / mean")
    if not np.isfinite(found.contiguous).any():
        return theme.say_no_data(figure, "The prompts fall into too few parts to place experts by some and try others.")
    lines = (
        ("in order", found.contiguous, theme.FAINT_INK, "dash"),
        ("by load", found.greedy, theme.STRONG_COLOUR, None),
        (f"by load, {found.redundant} busiest doubled", found.replicated, theme.LINE_COLOURS[1], None),
    )
    return lines_by_layer(figure, found.layers, lines, "%{y:.3f} × mean")
