"""Figures of expert weight similarity: how alike the experts of different layers are, from their weights alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from moescope.stats.expert_matching import ExpertMatch, LayerPair, PairVerdict, Verdict
from moescope.stats.expert_similarity import DistanceSimilarity
from moescope.stats.pairwise import by_distance, finite_mean
from moescope.stats.weight_similarity import WeightSimilarity
from moescope.viz import theme
from moescope.viz.similarity import COSINE_BAR, colour_limit, layer_square, square_axes
from moescope.viz.wording import counted

BINS = 40
MOST_DISTANCES = 6
"""Distances whose experts are drawn one by one: each is a point for every expert of every layer."""
MOST_DRAWN_AS_SHAPES = 3000
"""More points than this are painted by WebGL; as shapes they would take seconds."""
MOST_MATRICES = 8
MOST_FILLED = 48
"""Experts of a layer up to which the circle of a partner fits into its cell."""
MOST_CELLS = 1 << 18
"""Cells of all match matrices of a figure together, so that its file stays below 2 MB."""

NO_EXPERTS = "No expert can be compared with that of another layer: there is nothing to show."
NO_MATCHES = "No pairs of layers were matched: there is nothing to show."


@dataclass(frozen=True, slots=True, eq=False)
class _DistanceView:
    """The cosines at one distance, raw or centred."""

    name: str
    similarity: DistanceSimilarity
    layers: tuple[int, ...]

    @property
    def label(self) -> str:
        """What its button says."""
        return f"Δ = {self.similarity.delta}, {self.name}"


def expert_histogram(result: WeightSimilarity, subject: str = "") -> go.Figure:
    """Distribution of the cosine between the same expert of two layers Δ apart, with its mean and median.

    The reader switches between distances, centred and raw, the most alike first; a distance that no pair of layers
    spans is left out.

    Args:
        result: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure(
        "Weight similarity of the same expert", subject, "Cosine of gate, up and down together", "Experts"
    )
    views = list(_distance_views(result))
    if not views:
        return theme.say_no_data(figure, NO_EXPERTS)
    for view in views:
        for trace in _histogram(view):
            figure.add_trace(trace)
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(bargap=0.0, showlegend=True)
    theme.add_view_buttons(figure, [view.label for view in views], traces_each=3)
    return figure


def expert_scatter(result: WeightSimilarity, subject: str = "") -> go.Figure:
    """Expert across, cosine with the same expert Δ layers further on upwards, starting layer as colour.

    The reader switches between distances, centred and raw; of many distances the six most alike can be chosen.

    Args:
        result: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure(
        "Weight similarity expert by expert", subject, "Expert index", "Cosine with the same expert, Δ layers on"
    )
    views = list(_distance_views(result))
    deltas = list(dict.fromkeys(view.similarity.delta for view in views))[:MOST_DISTANCES]
    shown = [view for view in views if view.similarity.delta in deltas]
    if not shown:
        return theme.say_no_data(figure, NO_EXPERTS)
    for view in shown:
        figure.add_trace(_points(view))
    figure.update_xaxes(range=[-0.02 * result.experts - 0.5, 1.02 * result.experts - 0.5])
    figure.update_yaxes(zeroline=True, zerolinecolor=theme.NEUTRAL_COLOUR)
    figure.update_layout(showlegend=False)
    theme.add_view_buttons(figure, [view.label for view in shown])
    return figure


def expert_layer_heatmap(result: WeightSimilarity, subject: str = "") -> go.Figure:
    """Cosine at the same index, layer by layer: centred, mean over experts; raw, all experts together; each matrix.

    The parts are centred, unless only raw cosines were measured.

    Args:
        result: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("Expert similarity between layers", subject, "Layer index", "Layer index")
    similarity = result.same_index
    centred = bool(np.isfinite(similarity.centred).any())
    parts = finite_mean(similarity.part_centred, axis=1) if centred else similarity.part_together
    suffix = ", centred" if centred else ""
    means = {"Centred": finite_mean(similarity.centred, axis=0), "Raw": similarity.together} | {
        f"{name}{suffix}": part for name, part in zip(("Gate", "Up", "Down"), parts, strict=True)
    }
    apart = ~np.eye(len(similarity.layers), dtype=np.bool_)
    measured = {name: mean for name, mean in means.items() if np.isfinite(mean[apart]).any()}
    if not measured:
        return theme.say_no_data(figure, NO_EXPERTS)
    for name, mean in measured.items():
        figure.add_trace(layer_square(mean, similarity.layers, f"mean cosine ({name.lower()})"))
    square_axes(figure)
    theme.add_view_buttons(figure, list(measured))
    return figure


def expert_distance_lines(result: WeightSimilarity, subject: str = "") -> go.Figure:
    """Mean cosine at the same index by distance: a peak is a distance at which layers repeat.

    Centred cosines are those of single experts; raw ones, of all experts of a layer together.

    Args:
        result: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure(
        "Expert similarity by distance", subject, "Layer distance Δ (model layers)", "Mean cosine of the same expert"
    )
    layers = result.same_index.layers
    deltas = np.arange(1, layers[-1] - layers[0] + 1)
    lines = (
        ("raw", result.same_index.together, theme.NEUTRAL_COLOUR, 5),  # wide, to be seen below the other
        ("centred", finite_mean(result.same_index.centred, axis=0), theme.STRONG_COLOUR, 2),
    )
    for name, cosine, colour, width in lines:
        matrix = by_distance(cosine, layers, deltas.tolist())
        pairs = np.isfinite(matrix).sum(axis=0)
        measured = pairs > 0
        if measured.any():
            figure.add_trace(
                go.Scatter(
                    x=deltas[measured],
                    y=finite_mean(matrix, axis=0)[measured],
                    customdata=pairs[measured],
                    name=name,
                    mode="lines+markers",
                    line={"color": colour, "width": width},
                    marker={"size": 3 * width},
                    hovertemplate=f"Δ %{{x}}, {name}<br>mean cosine %{{y:.4f}}<br>%{{customdata}} pairs of layers"
                    "<extra></extra>",
                )
            )
    if not figure.data:
        return theme.say_no_data(figure, NO_EXPERTS)
    figure.update_xaxes(dtick=1 if len(deltas) <= 36 else None)
    figure.update_yaxes(zeroline=True, zerolinecolor=theme.NEUTRAL_COLOUR)
    figure.update_layout(showlegend=True)
    return figure


def within_layer_bars(result: WeightSimilarity, subject: str = "") -> go.Figure:
    """Mean cosine of two different experts of one layer, not centred, one bar a layer.

    Args:
        result: what to show.
        subject: what it was measured on, for the second line of the title.
    """
    figure = theme.new_figure("Similarity within a layer", subject, "Layer index", "Mean cosine of two experts")
    if not np.isfinite(result.within).any():
        return theme.say_no_data(figure, "The experts of a layer were not compared with each other.")
    figure.add_trace(
        go.Bar(
            x=theme.layer_labels(result.layers),
            y=result.within,
            marker_color=theme.MODERATE_COLOUR,
            hovertemplate="layer %{x}<br>mean cosine of two experts %{y:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(zeroline=True, zerolinecolor=theme.NEUTRAL_COLOUR)
    return figure


def match_heatmap(
    matches: Sequence[LayerPair],
    verdict: Verdict | None,
    subject: str = "",
    x_title: str = "Expert of the later layer",
    y_title: str = "Expert of the earlier layer",
) -> go.Figure:
    """Every expert of a layer against every one of another, the best one-to-one partner of each marked by a circle.

    The reader chooses among the pairs with the clearest relation: eight, or fewer of many experts. Where neurons are
    permuted, the cosine is that of features that do not depend on their order, else of the weights.

    Args:
        matches: pairs of layers.
        verdict: what the matches say, pair by pair in the same order; none if there are no matches.
        subject: what it was measured on, for the second line of the title.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.
    """
    figure = theme.new_figure("Experts matched one to one", subject, x_title, y_title)
    shown = _shown_matches(matches, verdict)
    if not shown:
        return theme.say_no_data(figure, NO_MATCHES)
    for judged, match in shown:
        for trace in _match(judged, match):
            figure.add_trace(trace)
    square_axes(figure)
    # Numbers, not categories: ticks of 256 categories are as many elements to draw.
    experts = len(shown[0][1].table)
    ticks = {"tick0": 0, "dtick": 1 << max(0, (experts - 1).bit_length() - 4)}  # at most 16, the same on both axes
    figure.update_xaxes(type="linear", range=[-0.5, experts - 0.5], **ticks)
    figure.update_yaxes(type="linear", autorange=None, range=[experts - 0.5, -0.5], **ticks)
    figure.update_layout(showlegend=False)
    theme.add_view_buttons(figure, [_pair_label(judged) for judged, _ in shown], traces_each=2)
    return figure


def clearest_first(verdict: Verdict) -> list[int]:
    """Places of a verdict's pairs: related ones first, then others tested, each by how far above its null level."""

    def rank(place: int) -> tuple[int, float]:
        pair = verdict.pairs[place]
        order = {"none": 1, "not measurable": 2}.get(pair.kind, 0)
        return order, pair.level - pair.cosine if order < 2 else 0.0

    return sorted(range(len(verdict.pairs)), key=rank)


def _distance_views(result: WeightSimilarity) -> Iterator[_DistanceView]:
    """Centred and raw cosines at each distance that is asked for and has any, the most alike first."""
    pairs = list(zip(result.centred_by_distance, result.by_distance, strict=True))
    heights = [next((one.mean for one in pair if np.isfinite(one.mean)), -np.inf) for pair in pairs]
    for place in np.argsort(np.negative(heights), kind="stable"):
        for name, similarity in zip(("centred", "raw"), pairs[place], strict=True):
            if similarity.num_pairs:
                yield _DistanceView(name, similarity, result.layers)


def _histogram(view: _DistanceView) -> list[go.Bar | go.Scatter]:
    """Bars, mean and median of one view; binned here, as the values would make the page large."""
    values = view.similarity.values()
    lowest, highest = float(values.min()), float(values.max())
    room = max((highest - lowest) * 1e-3, 1e-6)
    counts, edges = np.histogram(values, bins=BINS, range=(lowest - room, highest + room))
    lines = (("mean", view.similarity.mean, "solid"), ("median", view.similarity.median, "dash"))
    return [
        go.Bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts,
            width=edges[1] - edges[0],
            customdata=np.stack([edges[:-1], edges[1:]], axis=-1),
            name=f"{counted(len(values), 'expert')} in {counted(view.similarity.num_pairs, 'pair')} of layers",
            marker={"color": theme.MODERATE_COLOUR, "line": {"width": 0}},
            hovertemplate="cosine %{customdata[0]:.4f} to %{customdata[1]:.4f}<br>%{y:,} experts<extra></extra>",
        ),
        *(
            go.Scatter(
                x=[place, place],
                y=[0, int(counts.max()) * 1.05],
                name=f"{name} {place:+.4f}",
                mode="lines",
                line={"color": theme.INK, "width": 2, "dash": dash},
                hovertemplate=f"{name} %{{x:.4f}}<extra></extra>",
            )
            for name, place, dash in lines
        ),
    ]


def _points(view: _DistanceView) -> go.Scatter | go.Scattergl:
    """One point an expert of a starting layer."""
    row, expert = np.nonzero(np.isfinite(view.similarity.cosine))
    start = np.asarray(view.layers, dtype=np.int32)[row]
    kind = go.Scatter if len(row) <= MOST_DRAWN_AS_SHAPES else go.Scattergl
    first, last = int(view.layers[0]), int(start.max())
    return kind(
        x=expert.astype(np.int32),
        y=view.similarity.cosine[row, expert].astype(np.float32),
        customdata=start,
        mode="markers",
        name=view.label,
        marker={
            "color": start,
            "colorscale": theme.SEQUENTIAL,
            "cmin": first,
            "cmax": max(last, first + 1),
            "size": 6 if kind is go.Scatter else 4,
            "opacity": 0.8,
            "colorbar": {"title": {"text": theme.bar_title("starting layer")}, "tickformat": "d"},
        },
        hovertemplate=(
            f"expert %{{x}}, layer %{{customdata}} and the one {view.similarity.delta} on<br>cosine %{{y:.4f}}"
            "<extra></extra>"
        ),
    )


def _shown_matches(matches: Sequence[LayerPair], verdict: Verdict | None) -> list[tuple[PairVerdict, ExpertMatch]]:
    """The pairs to draw, clearest first, with the table behind each verdict."""
    if verdict is None:
        return []
    shown = []
    for place in clearest_first(verdict):
        judged, pair = verdict.pairs[place], matches[place]
        by_features = judged.kind in ("neurons permuted", "both")
        match = pair.features if by_features or pair.weights is None else pair.weights
        if match is not None and np.isfinite(match.table).any():
            shown.append((judged, match))
    most = max(1, min(MOST_MATRICES, MOST_CELLS // max(len(shown[0][1].table) ** 2, 1))) if shown else 0
    return shown[:most]


def _match(judged: PairVerdict, match: ExpertMatch) -> tuple[go.Heatmap, go.Scatter]:
    """One pair: all cosines, and a circle on each best partner."""
    experts = len(match.table)
    limit = colour_limit(match.table)
    found = np.flatnonzero(match.partner >= 0)
    pair = _pair_label(judged)
    heatmap = go.Heatmap(
        z=match.table.astype(np.float32),
        name=pair,
        colorscale=theme.DIVERGING,
        zmin=-limit,
        zmid=0.0,
        zmax=limit,
        colorbar=COSINE_BAR | {"title": {"text": "centred cosine", "side": "bottom"}},
        hoverongaps=False,
        hovertemplate=f"{pair}<br>experts %{{y}} and %{{x}}<br>centred cosine %{{z:.4f}}<extra></extra>",
    )
    # A filled circle is seen on every colour, but would hide a cell that is smaller than itself.
    small = experts > MOST_FILLED
    partners = go.Scatter(
        x=match.partner[found].astype(np.int32),
        y=found.astype(np.int32),
        mode="markers",
        name="best partner",
        marker={
            "symbol": "circle-open" if small else "circle",
            "size": 7 if small else float(np.clip(160 / experts, 5, 10)),
            "color": theme.INK if small else "white",
            "line": {"width": 1, "color": theme.INK},
        },
        hoverinfo="skip",
    )
    return heatmap, partners


def _pair_label(judged: PairVerdict) -> str:
    """Which layers, and what was found."""
    layers = f"Layers {judged.first} and {judged.second}" if judged.first != judged.second else f"Layer {judged.first}"
    return f"{layers}: {judged.kind}" + ("" if np.isnan(judged.cosine) else f" ({judged.cosine:.2f})")
