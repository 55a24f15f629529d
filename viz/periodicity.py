"""Bars and boxes of the layer correlation at chosen intervals."""

import math

import plotly.graph_objects as go

from moescope.stats.nulls import LayerNulls
from moescope.stats.period_finder import LEVEL
from moescope.stats.periodicity import MODERATE, STRONG, PeriodicPattern, PeriodicPatterns
from moescope.viz import theme
from moescope.viz.activation import NAMES
from moescope.viz.certainty import standing

COLOURS = {
    "strong": theme.STRONG_COLOUR,
    "moderate": theme.MODERATE_COLOUR,
    "weak": theme.WEAK_COLOUR,
    "not measurable": theme.NEUTRAL_COLOUR,
}


def periodic_bars(patterns: PeriodicPatterns, subject: str = "", nulls: LayerNulls | None = None) -> go.Figure:
    """Mean correlation at each interval, ± one standard deviation over the pairs, and the band that chance gives.

    Args:
        patterns: one result an interval.
        subject: what they were measured on, for the second line of the title.
        nulls: what the correlation was held against; None draws no band.
    """
    figure = _figure("Mean correlation at each interval", patterns, subject)
    if not any(pattern.num_pairs for pattern in patterns.patterns):
        return theme.say_no_data(figure, _reason(patterns))
    shown = patterns.patterns
    figure.add_trace(
        go.Bar(
            x=[_label(pattern, nulls) for pattern in shown],
            y=[pattern.mean for pattern in shown],
            error_y={
                "type": "data",
                "array": [pattern.std for pattern in shown],
                "color": theme.INK,
                "thickness": 1.2,
                "width": 6,
            },
            marker_color=[COLOURS[pattern.strength] for pattern in shown],
            customdata=[
                (p.delta, p.std, p.num_pairs, len(p.correlations), standing(p, nulls), *_chance(p, nulls))
                for p in shown
            ],
            width=[min(0.6, 0.12 * len(shown))] * len(shown),
            hovertemplate=(
                "Δ %{customdata[0]}<br>mean r %{y:.4f} ± %{customdata[1]:.4f}<br>"
                "%{customdata[2]} of %{customdata[3]} pairs measurable<br>%{customdata[4]}"
                + ("<br>chance: %{customdata[5]:+.3f} to %{customdata[6]:+.3f}" if nulls is not None else "")
                + "<extra></extra>"
            ),
        )
    )
    bands = {_label(pattern, nulls): _chance(pattern, nulls) for pattern in shown if _chance(pattern, nulls)}
    if bands:
        figure.add_trace(
            go.Bar(
                x=list(bands),
                base=[low for low, _ in bands.values()],
                y=[high - low for low, high in bands.values()],
                width=[min(0.75, 0.15 * len(shown))] * len(bands),
                marker={"color": theme.NEUTRAL_COLOUR, "opacity": 0.45},
                hoverinfo="skip",
            )
        )
        figure.update_layout(barmode="overlay")
    _finish(figure, patterns, nulls, [pattern.mean - pattern.std for pattern in shown])
    return figure


def periodic_boxes(patterns: PeriodicPatterns, subject: str = "", nulls: LayerNulls | None = None) -> go.Figure:
    """Distribution of the correlations at each interval, every pair a point.

    Args:
        patterns: one result an interval.
        subject: what they were measured on, for the second line of the title.
        nulls: what the correlation was held against, for the labels; None names the strength alone.
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
                x=[_label(pattern, nulls)] * len(measured),
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
    _finish(figure, patterns, nulls, lowest)
    return figure


def _figure(title: str, patterns: PeriodicPatterns, subject: str) -> go.Figure:
    """The frame both figures share."""
    title = f"{title} ({NAMES[patterns.kind]})"
    return theme.new_figure(title, subject, "Interval Δ (model layers)", "Pearson correlation r")


def _finish(figure: go.Figure, patterns: PeriodicPatterns, nulls: LayerNulls | None, values: list[float]) -> None:
    """Thresholds, and a vertical range that holds every value down to -1."""
    labels = [_label(pattern, nulls) for pattern in patterns.patterns]
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


def _label(pattern: PeriodicPattern, nulls: LayerNulls | None) -> str:
    """Interval, number of pairs and strength, one under the other; "weak" gives way to what chance says."""
    pairs = f"{pattern.num_pairs} pair{'' if pattern.num_pairs == 1 else 's'}"
    called: str = pattern.strength
    if called == "weak" and nulls is not None and pattern.delta in nulls.free.deltas:
        above = nulls.free.p_family[nulls.free.deltas.index(pattern.delta)] <= LEVEL
        called = "above chance" if above else "no more<br>than chance"
    return f"{pattern.delta}<br>{pairs}<br>{called if '<br>' in called else called.replace(' ', '<br>')}"


def _chance(pattern: PeriodicPattern, nulls: LayerNulls | None) -> tuple[float, ...]:
    """The ends of the band that chance gives at an interval; nothing where that is not known."""
    if nulls is None or pattern.delta not in nulls.free.deltas:
        return ()
    low, _, high = nulls.free.null_quantiles[:, nulls.free.deltas.index(pattern.delta)]
    return (float(low), float(high)) if math.isfinite(low) else ()


def _reason(patterns: PeriodicPatterns) -> str:
    """Why there is nothing to show."""
    if not patterns.patterns:
        return "The model has no two MoE layers: there is no interval to show."
    intervals = ", ".join(str(pattern.delta) for pattern in patterns.patterns)
    return f"No two layers can be compared at Δ = {intervals}: not measurable."
