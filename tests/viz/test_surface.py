"""The 3-D view and the load figure: what they draw is what was measured."""

from collections.abc import Callable
from dataclasses import replace
from html import unescape

import numpy as np
import plotly.graph_objects as go
import pytest
from browser import HOSTILE

from moescope.profiler.sidecars import TokenSample
from moescope.stats.activation import LayerLoad
from moescope.viz.load import load_by_layer
from moescope.viz.report_data import ReportData
from moescope.viz.surface import NO_SAMPLE, activation_surface

GRADIENT = ((0.0, "#19448e"), (0.25, "#4a6fa5"), (0.5, "#7d8db8"), (0.75, "#c49fbb"), (1.0, "#f4b3c2"))


def sample(layers: tuple[int, ...], experts: tuple[int, ...], tokens: int = 5) -> TokenSample:
    rng = np.random.default_rng(1)
    values = np.zeros((len(layers), tokens, max(experts)), np.float32)
    for row, width in enumerate(experts):
        values[row, :, :width] = rng.dirichlet(np.full(width, 0.2), tokens)
    texts = tuple(f" t{token}" for token in range(tokens))
    return TokenSample(layers, experts, np.arange(tokens, dtype=np.int32), texts, values)


def test_height_less_its_offset_is_the_probability() -> None:
    one = sample((1, 4, 9), (16, 12, 16))
    figure = activation_surface(one, "a model")
    step = float(one.probabilities.max()) * 1.25
    assert [type(trace) for trace in figure.data] == [go.Surface] * 3
    for place, (trace, layer) in enumerate(zip(figure.data, one.layers, strict=True)):
        assert trace.name == f"layer {layer}"
        np.testing.assert_allclose(np.asarray(trace.z) - step * place, one.probabilities[place], atol=1e-6)
        np.testing.assert_array_equal(trace.surfacecolor, one.probabilities[place])
        np.testing.assert_array_equal(trace.customdata, one.probabilities[place])
        assert list(trace.x) == [str(expert) for expert in range(16)]
        assert list(trace.y) == [f"{token} t{token}" for token in range(5)]
        assert f"layer {layer}, expert %{{x}}<br>token %{{y}}" in trace.hovertemplate
    assert [trace.showscale for trace in figure.data] == [False, False, True]
    assert list(figure.layout.scene.zaxis.ticktext) == ["layer 1", "layer 4", "layer 9"]
    np.testing.assert_allclose(figure.layout.scene.zaxis.tickvals, [0, step, 2 * step])
    assert "a model" in figure.layout.title.text


def test_surfaces_do_not_cut_one_another() -> None:
    figure = activation_surface(sample(tuple(range(10)), (32,) * 10, 50))
    for lower, upper in zip(figure.data, figure.data[1:], strict=False):
        assert np.max(lower.z) < np.min(upper.z)


def test_the_documented_look() -> None:
    one = sample((0, 1), (16, 16))
    figure = activation_surface(one)
    assert figure.layout.scene.camera.eye.to_plotly_json() == {"x": 1.8, "y": -1.8, "z": 1.5}
    for trace in figure.data:
        assert trace.colorscale == GRADIENT
        assert trace.cmin == 0
        assert trace.cmax == pytest.approx(np.percentile(one.probabilities, 99.5))
    assert figure.layout.scene.xaxis.title.text == "Expert index"
    assert figure.layout.scene.yaxis.title.text == "Token"


def test_of_many_experts_the_most_probable_in_the_order_of_their_indices() -> None:
    one = sample((0, 5), (200, 200), 8)
    figure = activation_surface(one)
    mean = one.probabilities.mean(axis=(0, 1))
    chosen = sorted(sorted(range(200), key=lambda expert: -mean[expert])[:64])
    for place, trace in enumerate(figure.data):
        assert [int(label) for label in trace.x] == chosen
        np.testing.assert_array_equal(trace.surfacecolor, one.probabilities[place][:, chosen])
    assert figure.layout.scene.xaxis.title.text == "Expert index (64 most probable of 200)"
    assert figure.layout.scene.xaxis.type == "category", "labels are names, not places"


def test_all_of_64_experts() -> None:
    figure = activation_surface(sample((0,), (64,)))
    assert [int(label) for label in figure.data[0].x] == list(range(64))
    assert figure.layout.scene.xaxis.title.text == "Expert index"


def test_one_token_and_one_layer() -> None:
    (trace,) = activation_surface(sample((7,), (4,), 1)).data
    assert np.asarray(trace.z).shape == (1, 4)
    assert trace.showscale is True


def test_tokens_are_text_cut_before_they_are_escaped() -> None:
    texts = (*HOSTILE.values(), "", "  ", "a < b", "x" * 11 + "<b>")
    one = replace(sample((0,), (4,), len(texts)), texts=texts)
    labels = activation_surface(one).data[0].y
    assert len(set(labels)) == len(texts), "each token has a place of its own"
    for row, (label, text) in enumerate(zip(labels, texts, strict=True)):
        assert "<" not in label
        assert label.isprintable()
        assert label.split(" ")[0] == str(row)
        assert len(unescape(label)) <= len(f"{row} ") + 12
        assert unescape(label).replace("<", "").count("&") == text.strip()[:12].count("&"), "no entity is cut"
    assert labels[-1].endswith(" xxxxxxxxxxx&lt;")


@pytest.mark.parametrize("nothing", [None, sample((0,), (4,), 0)], ids=["none", "no tokens"])
def test_without_a_sample_the_figure_says_why(nothing: TokenSample | None) -> None:
    figure = activation_surface(nothing)
    assert figure.data == ()
    assert [note.text for note in figure.layout.annotations] == [NO_SAMPLE]
    assert "records distributions" in NO_SAMPLE


def test_load_is_that_of_the_busiest_expert_over_the_mean() -> None:
    loads = [
        LayerLoad(3, 8, 2, 20, 40, 15, (1, 2)),
        LayerLoad(4, 8, 2, 20, 0, 0, ()),
        LayerLoad(9, 4, 2, 20, 40, 10, ()),
    ]
    figure = load_by_layer(loads, "a <model>")
    (bars,) = figure.data
    assert list(bars.x) == ["3", "9"], "a layer without selections has no load"
    assert list(bars.y) == [15 / (40 / 8), 1.0]
    assert [tuple(cell) for cell in bars.customdata] == [(2, 8), (0, 4)]
    assert [shape.y0 for shape in figure.layout.shapes] == [1.0]
    assert figure.layout.xaxis.type == "category"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("Layer index", "busiest expert / mean")
    assert "a &lt;model&gt;" in figure.layout.title.text


def test_load_of_a_drawn_report(make_report: Callable[..., ReportData]) -> None:
    report = make_report()
    (bars,) = load_by_layer(report.loads).data
    counts = np.asarray(report.activations[0].matrix) * 600
    np.testing.assert_allclose(bars.y, counts.max(axis=1) / counts.mean(axis=1))


def test_load_of_nothing() -> None:
    figure = load_by_layer([LayerLoad(3, 8, 2, 0, 0, 0, ())])
    assert figure.data == ()
    assert "No expert was selected" in figure.layout.annotations[0].text
