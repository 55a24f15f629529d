"""What the figures hold: data, axis titles, labels of layers, and a reason where there is nothing to show."""

from collections.abc import Callable

import numpy as np
import plotly.graph_objects as go
import pytest

from moescope.stats.activation import Activation
from moescope.stats.correlation import LayerCorrelation, layer_correlation
from moescope.stats.periodicity import PeriodicPattern, PeriodicPatterns
from moescope.stats.similarity import router_similarity
from moescope.viz.activation import activation_heatmap
from moescope.viz.correlation import correlation_heatmap
from moescope.viz.periodicity import periodic_bars, periodic_boxes
from moescope.viz.report_data import ReportData
from moescope.viz.similarity import router_cosine_heatmap, router_norm_heatmap

GAPS = (1, 3, 5, 9, 10, 11)
NAN = float("nan")
PATTERNS = PeriodicPatterns(
    kind="frequency",
    patterns=(
        PeriodicPattern(2, 0.8, 0.1, 3, (0, 1, 2, 3), (0.7, 0.8, NAN, 0.9), "strong"),
        PeriodicPattern(4, 0.5, 0.0, 1, (0,), (0.5,), "moderate"),
        PeriodicPattern(6, -0.6, 0.3, 2, (0, 1), (-0.9, -0.3), "weak"),
        PeriodicPattern(50, NAN, NAN, 0, (), (), "not measurable"),
    ),
)


def axes(figure: go.Figure) -> tuple[str, str]:
    return figure.layout.xaxis.title.text, figure.layout.yaxis.title.text


def notes(figure: go.Figure) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def test_activation_shows_every_recorded_measure(make_report: Callable[..., ReportData]) -> None:
    report = make_report(layers=GAPS, experts=(16, 16, 16, 12, 12, 12))
    figure = activation_heatmap(report.activations)
    assert axes(figure) == ("Expert index", "Layer index")
    assert [trace.name for trace in figure.data] == [
        "selection frequency",
        "mean router probability",
        "routing weight share",
    ]
    for trace, activation in zip(figure.data, report.activations, strict=True):
        np.testing.assert_allclose(trace.z, activation.matrix, rtol=1e-6)
        assert np.isnan(trace.z[3:, 12:]).all()
        assert list(trace.y) == ["1", "3", "5", "9", "10", "11"]
    assert figure.layout.yaxis.type == "category"


def test_activation_views_are_switched_by_buttons(make_report: Callable[..., ReportData]) -> None:
    figure = activation_heatmap(make_report().activations)
    assert [trace.visible for trace in figure.data] == [True, False, False]
    buttons = figure.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == [
        "Selection frequency",
        "Mean router probability",
        "Routing weight share",
    ]
    assert [button.args[0]["visible"] for button in buttons] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]


def test_a_single_view_needs_no_button(make_report: Callable[..., ReportData]) -> None:
    figure = activation_heatmap(make_report().activations[:1])
    assert figure.data[0].visible is True
    assert figure.layout.updatemenus == ()


def test_one_busy_expert_does_not_set_the_colours() -> None:
    matrix = np.full((20, 64), 0.01)
    matrix[0, 0] = 0.37
    activation = Activation("frequency", matrix, tuple(range(20)), (64,) * 20, (2,) * 20, 10)
    assert activation_heatmap([activation]).data[0].zmax == pytest.approx(0.01)


def test_correlation_by_distance() -> None:
    rng = np.random.default_rng(0)
    activation = Activation("weight", rng.random((6, 8)), GAPS, (8,) * 6, (2,) * 6, 10)
    correlation = layer_correlation(activation, delta_max=30)
    figure = correlation_heatmap(correlation)
    trace = figure.data[0]
    assert axes(figure) == ("Layer distance Δ (model layers)", "Starting layer index")
    assert "routing weight share" in figure.layout.title.text
    assert list(trace.x) == list(range(1, 11))
    assert list(trace.y) == ["1", "3", "5", "9", "10", "11"]
    np.testing.assert_allclose(trace.z, correlation.matrix[:, :10], rtol=1e-6)
    assert np.isfinite(trace.z).sum() == 15
    assert trace.customdata[1][7] == 11
    assert (trace.zmin, trace.zmid, trace.zmax) == (-1, 0, 1)


def test_bars_carry_mean_spread_pairs_and_strength() -> None:
    figure = periodic_bars(PATTERNS)
    (trace,) = figure.data
    assert axes(figure) == ("Interval Δ (model layers)", "Pearson correlation r")
    np.testing.assert_array_equal(trace.y, [0.8, 0.5, -0.6, NAN])
    np.testing.assert_array_equal(trace.error_y.array, [0.1, 0.0, 0.3, NAN])
    assert trace.customdata[0] == pytest.approx((2, 0.1, 3, 4, "strong"))
    assert list(trace.x) == [
        "2<br>3 pairs<br>strong",
        "4<br>1 pair<br>moderate",
        "6<br>2 pairs<br>weak",
        "50<br>0 pairs<br>not<br>measurable",
    ]
    assert len(set(trace.marker.color)) == 4
    assert [shape.y0 for shape in figure.layout.shapes] == [0.7, 0.4]
    bottom, top = figure.layout.yaxis.range
    assert bottom < -0.9
    assert top > 1.0


def test_boxes_hold_every_measurable_pair() -> None:
    figure = periodic_boxes(PATTERNS)
    assert axes(figure) == ("Interval Δ (model layers)", "Pearson correlation r")
    assert [list(trace.y) for trace in figure.data] == [[0.7, 0.8, 0.9], [0.5], [-0.9, -0.3], []]
    assert [tuple(pair) for pair in figure.data[0].customdata] == [(0, 2), (1, 3), (3, 5)]
    assert len(figure.layout.xaxis.categoryarray) == 4
    assert figure.layout.yaxis.range[0] < -0.9


def test_router_cosine_is_square_and_keeps_weak_colours_visible() -> None:
    similarity = router_similarity(np.random.default_rng(0).normal(size=(6, 16, 64)), GAPS)
    figure = router_cosine_heatmap(similarity)
    (trace,) = figure.data
    assert axes(figure) == ("Layer index", "Layer index")
    assert list(trace.x) == list(trace.y) == ["1", "3", "5", "9", "10", "11"]
    np.testing.assert_allclose(trace.z, similarity.cosine, rtol=1e-6)
    largest = np.abs(similarity.cosine - np.eye(6)).max()
    assert trace.zmax == -trace.zmin == pytest.approx(max(0.05, largest))
    assert trace.zmax < 0.5
    assert figure.layout.yaxis.scaleanchor == "x"


def test_router_norms_and_rows() -> None:
    similarity = router_similarity(np.random.default_rng(0).normal(size=(6, 16, 64)), GAPS)
    figure = router_norm_heatmap(similarity)
    assert axes(figure) == ("Layer distance Δ (model layers)", "Starting layer index")
    assert [trace.name for trace in figure.data] == ["norm correlation", "mean row cosine"]
    np.testing.assert_allclose(figure.data[0].z, similarity.norm_correlation[:, :10], rtol=1e-6)
    np.testing.assert_allclose(figure.data[1].z, similarity.row_cosine[:, :10], rtol=1e-6)
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == ["Norm correlation", "Mean row cosine"]


def empty_figures() -> list[object]:
    nothing = np.full((1, 4), NAN)
    activation = Activation("frequency", nothing, (3,), (4,), (2,), 0)
    correlation = layer_correlation(activation)
    none = LayerCorrelation("frequency", np.empty((0, 3)), np.empty((0, 0)), (1, 2, 3), ())
    lone = router_similarity(np.ones((1, 4, 8)), (3,))
    dead = router_similarity(np.zeros((2, 4, 8)), (3, 4))
    unmeasured = PeriodicPatterns("frequency", PATTERNS.patterns[3:])
    return [
        pytest.param(activation_heatmap([activation]), "No routed tokens", id="no tokens"),
        pytest.param(activation_heatmap([]), "No routed tokens", id="no measure"),
        pytest.param(correlation_heatmap(correlation), "No two layers", id="one layer"),
        pytest.param(correlation_heatmap(none), "No two layers", id="no layer"),
        pytest.param(periodic_bars(PeriodicPatterns("frequency", ())), "no interval", id="bars, no interval"),
        pytest.param(periodic_boxes(PeriodicPatterns("frequency", ())), "no interval", id="boxes, no interval"),
        pytest.param(periodic_bars(unmeasured), "Δ = 50: not measurable", id="bars, no pair"),
        pytest.param(periodic_boxes(unmeasured), "Δ = 50: not measurable", id="boxes, no pair"),
        pytest.param(router_cosine_heatmap(None), "not read", id="cosine, no weights"),
        pytest.param(router_norm_heatmap(None), "not read", id="norms, no weights"),
        pytest.param(router_cosine_heatmap(dead), "No router can be compared", id="cosine, zero weights"),
        pytest.param(router_norm_heatmap(lone), "No two routers", id="norms, one layer"),
    ]


@pytest.mark.parametrize(("figure", "reason"), empty_figures())
def test_a_figure_without_data_says_so(figure: go.Figure, reason: str) -> None:
    assert figure.data == ()
    assert len(notes(figure)) == 1
    assert reason in notes(figure)[0]
    assert all(axes(figure))


def test_one_router_has_a_cosine_with_itself() -> None:
    figure = router_cosine_heatmap(router_similarity(np.ones((1, 4, 8)), (3,)))
    assert figure.data[0].z == pytest.approx(np.ones((1, 1)))
    assert figure.data[0].zmax == 1.0


def test_the_subject_is_text_not_markup() -> None:
    title = router_cosine_heatmap(None, "a <b>&amp; \n</script>").layout.title.text
    assert "a &lt;b&gt;&amp;amp;  &lt;/script&gt;" in title


def test_a_long_subject_is_cut() -> None:
    title = router_cosine_heatmap(None, "x" * 500).layout.title.text
    assert title.count("x") < 150
    assert "…" in title
