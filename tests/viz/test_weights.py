"""Figures of weights: each shows the numbers it was given, names its axes, and says so where there are none."""

from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from weight_results import weight_change, weight_similarity

from moescope.stats.expert_similarity import similarity_by_distance
from moescope.viz.weight_change import change_heatmap, change_lines
from moescope.viz.weights import (
    MOST_CELLS,
    MOST_DISTANCES,
    clearest_first,
    expert_distance_lines,
    expert_histogram,
    expert_layer_heatmap,
    expert_scatter,
    match_heatmap,
    within_layer_bars,
)


def titles(figure: go.Figure) -> tuple[str, str]:
    return figure.layout.xaxis.title.text, figure.layout.yaxis.title.text


def labels(figure: go.Figure) -> list[str]:
    return [button.label for menu in figure.layout.updatemenus for button in menu.buttons]


def test_the_histogram_counts_every_cosine_and_marks_mean_and_median() -> None:
    result = weight_similarity(zero=(1, 2))
    figure = expert_histogram(result, "subject")
    assert titles(figure) == ("Cosine of gate, up and down together", "Experts")
    assert labels(figure) == ["Δ = 3, centred", "Δ = 3, raw", "Δ = 1, centred", "Δ = 1, raw"]
    assert [trace.visible for trace in figure.data] == [True] * 3 + [False] * 9
    for delta, start in ((3, 0), (1, 6)):
        for cosine, offset in ((result.same_index.centred, 0), (result.same_index.cosine, 3)):
            rows = [(i, j) for i, a in enumerate(result.layers) for j, b in enumerate(result.layers) if b - a == delta]
            values = np.concatenate([cosine[:, i, j] for i, j in rows])
            values = values[np.isfinite(values)]
            bars, mean, median = figure.data[start + offset : start + offset + 3]
            assert bars.y.sum() == len(values)
            edges = bars.customdata
            for (low, high), count in zip(edges, bars.y, strict=True):
                assert ((values > low) & (values < high)).sum() == count
            assert mean.x == pytest.approx([values.mean()] * 2)
            assert median.x == pytest.approx([np.median(values)] * 2)
            assert (mean.name, mean.line.dash) == (f"mean {values.mean():+.4f}", "solid")
            assert (median.name, median.line.dash) == (f"median {np.median(values):+.4f}", "dash")


def test_equal_cosines_make_a_histogram_too() -> None:
    result = weight_similarity(experts=4)
    same = np.ones_like(result.same_index.cosine)
    figure = expert_histogram(
        replace(result, same_index=replace(result.same_index, cosine=same, centred=same * np.nan))
    )
    assert labels(figure) == ["Δ = 1, raw", "Δ = 3, raw"]
    assert figure.data[0].y.sum() == 6 * 4


def test_the_scatter_has_a_point_for_each_expert_of_each_starting_layer() -> None:
    result = weight_similarity(layers=(2, 3, 5, 6, 8), zero=(1, 2))
    figure = expert_scatter(result)
    assert titles(figure) == ("Expert index", "Cosine with the same expert, Δ layers on")
    assert labels(figure) == ["Δ = 1, centred", "Δ = 1, raw", "Δ = 3, centred", "Δ = 3, raw"]
    points = figure.data[3]
    place = {layer: row for row, layer in enumerate(result.layers)}
    assert sorted(set(points.customdata.tolist())) == [2, 3, 5]
    assert len(points.x) == 3 * 8 - 1, "an expert without weights has no point"
    np.testing.assert_array_equal(points.marker.color, points.customdata)
    for expert, start, cosine in zip(points.x, points.customdata, points.y, strict=True):
        expected = result.same_index.cosine[expert, place[start], place[start + 3]]
        assert cosine == pytest.approx(expected, abs=1e-6)


def test_of_many_distances_the_scatter_draws_those_most_alike() -> None:
    result = weight_similarity(deltas=range(1, 40), layers=range(10), experts=4, match=False)
    means = {one.delta: one.mean for one in result.centred_by_distance if one.num_pairs}
    order = sorted(means, key=lambda delta: -means[delta])
    expected = [f"Δ = {delta}, {name}" for delta in order for name in ("centred", "raw")]
    assert labels(expert_histogram(result)) == expected
    assert labels(expert_scatter(result)) == expected[: 2 * MOST_DISTANCES]


def test_many_points_are_painted_and_few_are_shapes() -> None:
    assert isinstance(expert_scatter(weight_similarity()).data[0], go.Scatter)
    many = weight_similarity(layers=range(27), experts=128, size=2, deltas=(1,), match=False)
    assert isinstance(expert_scatter(many).data[0], go.Scattergl)


def test_the_layer_matrix_switches_between_raw_centred_and_parts() -> None:
    result = weight_similarity(shared=1.0)
    figure = expert_layer_heatmap(result)
    assert titles(figure) == ("Layer index", "Layer index")
    assert labels(figure) == ["Centred", "Raw", "Gate, centred", "Up, centred", "Down, centred"]
    same = result.same_index
    for trace, cosine in zip(figure.data, (same.centred, same.together[None], *same.part_centred), strict=True):
        np.testing.assert_allclose(trace.z, cosine.mean(axis=0), atol=1e-6)
        assert list(trace.y) == [str(layer) for layer in result.layers]
        apart = ~np.eye(len(result.layers), dtype=bool)
        assert trace.zmax == -trace.zmin == pytest.approx(np.abs(cosine.mean(axis=0)[apart]).max())
    nan = np.full_like(same.centred, np.nan)
    raw = replace(same, centred=nan, part_centred=np.full_like(same.part_centred, np.nan))
    figure = expert_layer_heatmap(replace(result, same_index=raw))
    assert labels(figure) == ["Raw", "Gate", "Up", "Down"]
    np.testing.assert_allclose(figure.data[1].z, same.part_together[0], atol=1e-6)


def test_means_by_distance_peak_at_the_period() -> None:
    result = weight_similarity(shared=1.0)
    figure = expert_distance_lines(result)
    assert titles(figure) == ("Layer distance Δ (model layers)", "Mean cosine of the same expert")
    raw, centred = figure.data
    assert (raw.name, centred.name) == ("raw", "centred")
    assert list(centred.x) == [1, 2, 3, 4, 5, 6]
    assert list(centred.customdata) == [6, 5, 4, 3, 2, 1]
    assert set(np.argsort(-centred.y)[:2] + 1) == {3, 6}
    for line, cosine in ((raw, result.same_index.together[None]), (centred, result.same_index.centred)):
        expected = [entry.mean for entry in similarity_by_distance(cosine, result.layers, range(1, 7))]
        np.testing.assert_allclose(line.y, expected)


def test_within_layers_one_bar_each() -> None:
    result = weight_similarity(shared=1.0)
    figure = within_layer_bars(result)
    assert titles(figure) == ("Layer index", "Mean cosine of two experts")
    np.testing.assert_array_equal(figure.data[0].y, result.within)


@pytest.mark.parametrize("origin", ["stacked", "experts permuted"])
def test_the_match_matrix_shows_the_clearest_pairs_and_their_partners(origin: str) -> None:
    result = weight_similarity(origin)  # type: ignore[arg-type]
    figure = match_heatmap(result.matches, result.verdict)
    assert titles(figure) == ("Expert of the later layer", "Expert of the earlier layer")
    assert len(labels(figure)) == 8
    assert result.verdict is not None
    order = clearest_first(result.verdict)
    related = [result.verdict.pairs[place].kind != "none" for place in order]
    assert related == sorted(related, reverse=True)
    assert 0 < sum(related) < len(related)
    kind = "same index" if origin == "stacked" else origin
    assert all(f": {kind} (" in label for label in labels(figure)[: sum(related)])
    for index, place in enumerate(order[:8]):
        heatmap, partners = figure.data[2 * index : 2 * index + 2]
        match, pair = result.matches[place].weights, result.matches[place]
        assert match is not None
        np.testing.assert_allclose(heatmap.z, match.table, atol=1e-6)
        assert labels(figure)[index].startswith(f"Layers {pair.first} and {pair.second}: ")
        assert dict(zip(partners.y, partners.x, strict=True)) == dict(enumerate(match.partner))
    assert (figure.layout.yaxis.range[0], figure.layout.xaxis.range[0]) == (7.5, -0.5), "the first expert is on top"


def test_an_expert_without_weights_has_no_partner() -> None:
    result = weight_similarity(zero=(0, 2), pairs=[(0, 3)])
    heatmap, partners = match_heatmap(result.matches, result.verdict).data
    assert np.isnan(heatmap.z[2]).all()
    assert 2 not in partners.y


def test_where_neurons_are_permuted_the_table_is_that_of_features() -> None:
    result = weight_similarity(pairs=[(0, 3)])
    (pair,), found = result.matches, result.verdict
    assert found is not None
    other = weight_similarity(pairs=[(0, 1)]).matches[0].weights
    judged = replace(found, pairs=(replace(found.pairs[0], kind="both"),))
    figure = match_heatmap([replace(pair, features=other)], judged)
    assert other is not None
    np.testing.assert_allclose(figure.data[0].z, other.table, atol=1e-6)
    assert labels(figure) == []


def test_match_matrices_of_many_experts_are_few() -> None:
    result = weight_similarity(layers=range(2), experts=256, size=4, draws=9, alpha=0.1)
    assert result.verdict is not None
    many = replace(result.verdict, pairs=result.verdict.pairs * 9)
    cells = sum(trace.z.size for trace in match_heatmap(result.matches * 9, many).data[::2])
    assert 4 * 256**2 == cells <= MOST_CELLS


@pytest.mark.parametrize(("experts", "step"), [(4, 1), (16, 1), (17, 2), (128, 8)])
def test_ticks_of_a_match_are_whole_experts_and_the_same_on_both_axes(experts: int, step: int) -> None:
    result = weight_similarity(layers=(0, 3), experts=experts, deltas=(3,))
    figure = match_heatmap(result.matches, result.verdict)
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        assert (axis.tick0, axis.dtick) == (0, step)


def test_without_data_the_figures_say_so() -> None:
    lone = weight_similarity(layers=(4,))
    for draw in (expert_histogram, expert_scatter, expert_layer_heatmap, expert_distance_lines):
        figure = draw(lone)
        assert figure.data == ()
        assert "No expert can be compared" in figure.layout.annotations[0].text
    assert "No pairs of layers" in match_heatmap((), None).layout.annotations[0].text
    few = weight_similarity(experts=1, layers=(0, 1))
    assert few.verdict is not None
    assert few.verdict.kind == "not measurable"
    assert match_heatmap(few.matches, few.verdict).data == ()
    assert within_layer_bars(few).data == ()


def test_change_is_shown_by_layer_and_expert() -> None:
    change = weight_change(zero=(0, 1))
    figure = change_heatmap(change, "subject")
    assert titles(figure) == ("Expert index", "Layer index")
    assert labels(figure) == ["Relative change", "Cosine", "Router relative change", "Router cosine"]
    shown = (change.relative_change, change.cosine, change.router_relative_change, change.router_cosine)
    for trace, matrix in zip(figure.data, shown, strict=True):
        np.testing.assert_allclose(trace.z, matrix, atol=1e-6)
        assert list(trace.y) == [str(layer) for layer in change.layers]
    assert np.isnan(figure.data[0].z[0, 1])
    assert figure.data[0].zmin == 0.0
    assert figure.data[1].reversescale is True, "much change is light in either view"


def test_change_is_shown_by_part() -> None:
    change = weight_change(zero=(0, 1))
    figure = change_lines(change)
    assert titles(figure) == ("Layer index", "Relative change, mean over experts")
    assert [trace.name for trace in figure.data] == ["gate", "up", "down", "router"] * 2
    shown = (*change.part_relative_change, change.router_relative_change, *change.part_cosine, change.router_cosine)
    for trace, matrix in zip(figure.data, shown, strict=True):
        np.testing.assert_allclose(trace.y, np.nanmean(matrix, axis=1))
    assert figure.layout.updatemenus[0].buttons[1].args[1] == {"yaxis.title.text": "Cosine, mean over experts"}


def test_weights_that_did_not_change_are_drawn() -> None:
    figure = change_heatmap(weight_change(strength=0.0))
    assert all(trace.zmax > trace.zmin for trace in figure.data)


def test_a_change_without_usable_experts_says_so() -> None:
    change = weight_change(experts=4)
    names = ("cosine", "relative_change", "part_cosine", "part_relative_change")
    names += ("router_cosine", "router_relative_change")
    empty = replace(change, **{name: np.full_like(getattr(change, name), np.nan) for name in names})
    for draw in (change_heatmap, change_lines):
        assert "No expert is usable" in draw(empty).layout.annotations[0].text
