"""Bars and boxes of the layer correlation at chosen intervals."""

import math

import plotly.graph_objects as go

from moescope.stats.periodicity import MODERATE, STRONG, PeriodicPattern, PeriodicPatterns
from moescope.viz import theme
from moescope.viz.activation import NAMES

COLOURS = {
    "strong": theme.STRONG_COLOUR,
    "moderate": theme.MODERATE_COLOUR,
    "weak": theme.WEAK_COLOUR,
    "not measurable": theme.NEUTRAL_COLOUR,
}


def periodic_bars(patterns: PeriodicPatterns, subject: str = "") -> go.Figure:
    """Mean correlation at each interval, ± one standard deviation over the pairs.

    Args:
        patterns: one result an interval.
        subject: what they were measured on, for the second line of the title.
    """
    figure = _figure("Mean correlation at each interval", patterns, subject)
    if not any(pattern.num_pairs for pattern in patterns.patterns):
        return theme.say_no_data(figure, _reason(patterns))
    shown = patterns.patterns
    figure.add_trace(
        go.Bar(
            x=[_label(pattern) for pattern in shown],
            y=[pattern.mean for pattern in shown],
            error_y={
                "type": "data",
                "array": [pattern.std for pattern in shown],
                "color": theme.INK,
                "thickness": 1.2,
                "width": 6,
            },
            marker_color=[COLOURS[pattern.strength] for pattern in shown],
            customdata=[(p.delta, p.std, p.num_pairs, len(p.correlations), p.strength) for p in shown],
            width=[min(0.6, 0.12 * len(shown))] * len(shown),
            hovertemplate=(
                "Δ %{customdata[0]}<br>mean r %{y:.4f} ± %{customdata[1]:.4f}<br>"
                "%{customdata[2]} of %{customdata[3]} pairs measurable<br>%{customdata[4]}<extra></extra>"
            ),
        )
    )
    _finish(figure, patterns, [pattern.mean - pattern.std for pattern in shown])
    return figure


def periodic_boxes(patterns: PeriodicPatterns, subject: str = "") -> go.Figure:
    """Distribution of the correlations at each interval, every pair a point.

    Args:
        patterns: one result an interval.
        subject: what they were measured on, for the second line of the title.
    """
    figure = _figure("Correlation of every pair at each interval", patterns, subject)
    if not any(pattern.num_pairs for pattern in patterns.patterns):
        return theme.say_no_data(figure, _reason(patterns))
    for pattern in patterns.patterns:
        measured = [
            (start, r) for start, r in zip(pattern.starts, pattern.correlations, strict=True) if math.isfinite(r)
        ]
        figure.add_trace(
            go.Box(
                x=[_label(pattern)] * len(measured),
                y=[r for _, r in measured],
                customdata=[(start, start + pattern.delta) for start, _ in measured],
                name=f"Δ {pattern.delta}",
                boxpoints="all",
                boxmean=True,
                jitter=0.5,
                pointpos=0,
                width=min(0.5, 0.1 * len(patterns.patterns)),
                line={"color": theme.INK, "width": 1.2},
                fillcolor=COLOURS[pattern.strength],
                marker={"color": theme.INK, "size": 4, "opacity": 0.45},
                hoveron="points",
                hovertemplate="layers %{customdata[0]} → %{customdata[1]}<br>r %{y:.4f}<extra></extra>",
            )
        )
    lowest = [r for pattern in patterns.patterns for r in pattern.correlations]
    _finish(figure, patterns, lowest)
    return figure


def _figure(title: str, patterns: PeriodicPatterns, subject: str) -> go.Figure:
    """The frame both figures share."""
    title = f"{title} ({NAMES[patterns.kind]})"
    return theme.new_figure(title, subject, "Interval Δ (model layers)", "Pearson correlation r")


def _finish(figure: go.Figure, patterns: PeriodicPatterns, values: list[float]) -> None:
    """Thresholds, and a vertical range that holds every value down to -1."""
    labels = [_label(pattern) for pattern in patterns.patterns]
    bottom = min([value for value in values if math.isfinite(value)], default=0.0)
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=labels, range=[-0.5, len(labels) - 0.5])
    figure.update_yaxes(range=[min(0.0, bottom * 1.05 - 0.05 if bottom < 0 else 0.0), 1.05], zeroline=True)
    figure.update_yaxes(zerolinecolor=theme.NEUTRAL_COLOUR)
    figure.update_layout(showlegend=False, margin_r=110)
    for threshold, name in ((STRONG, "strong"), (MODERATE, "moderate")):
        figure.add_hline(
            y=threshold,
            line={"dash": "dash", "width": 1.2, "color": theme.FAINT_INK},
            annotation={
                "text": f"{name} > {threshold}",
                "x": 1.0,
                "xanchor": "left",
                "yanchor": "middle",
                "font": {"color": theme.FAINT_INK},
            },
        )


def _label(pattern: PeriodicPattern) -> str:
    """Interval, number of pairs and strength, one under the other."""
    pairs = f"{pattern.num_pairs} pair{'' if pattern.num_pairs == 1 else 's'}"
    return f"{pattern.delta}<br>{pairs}<br>{pattern.strength.replace(' ', '<br>')}"


def _reason(patterns: PeriodicPatterns) -> str:
    """Why there is nothing to show."""
    if not patterns.patterns:
        return "The model has no two MoE layers: there is no interval to show."
    intervals = ", ".join(str(pattern.delta) for pattern in patterns.patterns)
    return f"No two layers can be compared at Δ = {intervals}: not measurable."
