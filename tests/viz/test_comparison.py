"""What a comparison holds: figures, text, structured data, remarks, and a reason where there is nothing to show."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from builders import MODEL, random_profile

from moescope.profiler.errors import ProfileError
from moescope.profiler.profile import LayerInfo, ModelInfo, RoutingProfile, merge
from moescope.viz.comparison import difference_heatmap, distance_lines, distance_matrix, moved_bars
from moescope.viz.comparison_data import ComparisonData, compare_profiles, distinct_names
from moescope.viz.comparison_report import (
    comparison_data,
    comparison_text,
    every_finding,
    findings,
    write_comparison,
)
from moescope.viz.summary import WIDTH

HOSTILE = "<b>&amp; %{x} </b></script><script>alert(1)</script>"
WORDS = ["chemistry", "code", "dialogue", "law"]


def titles(figure: go.Figure) -> tuple[str, str]:
    return figure.layout.xaxis.title.text, figure.layout.yaxis.title.text


def profiles(count: int, **changes: Any) -> list[RoutingProfile]:
    made = [random_profile(seed, **changes) for seed in range(count)]
    return [replace(p, runs=(replace(p.runs[0], prompts_sha256=str(i)),)) for i, p in enumerate(made)]


def empty(profile: RoutingProfile) -> RoutingProfile:
    return replace(profile, **{name: np.zeros_like(array) for name, array in profile.arrays().items()})


@pytest.fixture
def data() -> ComparisonData:
    return compare_profiles(profiles(3), ["base", "one", "two"])


def test_difference_is_drawn_with_both_values(data: ComparisonData) -> None:
    figure = difference_heatmap(data.pairs, data.subject)
    assert titles(figure) == ("Expert index", "Layer index")
    assert len(figure.data) == 2
    for trace, pair in zip(figure.data, data.pairs, strict=True):
        np.testing.assert_allclose(trace.z, pair.result.difference, rtol=1e-6)
        np.testing.assert_allclose(trace.customdata[..., 0], pair.result.reference, rtol=1e-6)
        np.testing.assert_allclose(trace.customdata[..., 1], pair.result.other, rtol=1e-6)
        assert list(trace.y) == ["1", "3", "4"]
        assert np.isnan(trace.z[1, 6:]).all()
        assert trace.zmid == 0
        limit = np.nanpercentile(np.abs(pair.result.difference), 99.5)
        assert trace.zmax == -trace.zmin == pytest.approx(limit)
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == ["one − base", "two − base"]


def test_a_single_comparison_is_named_in_the_title() -> None:
    pairs = compare_profiles(profiles(2), ["base", "tuned"]).pairs
    for figure in (difference_heatmap(pairs), moved_bars(pairs)):
        assert figure.layout.title.text.endswith("in selection frequency: tuned − base")
        assert figure.layout.updatemenus == ()


def test_distance_lines_carry_noise_and_switch_axis_titles(data: ComparisonData) -> None:
    figure = distance_lines(data.pairs)
    assert titles(figure) == ("Layer index", "Jensen-Shannon divergence (bits)")
    assert [trace.name for trace in figure.data] == ["one", "two", "one: noise", "two: noise"] * 2
    for start, view in ((0, "jensen_shannon"), (4, "total_variation")):
        for index, pair in enumerate(data.pairs):
            line, noise = figure.data[start + index], figure.data[start + 2 + index]
            assert line.x == noise.x == (1, 3, 4)
            np.testing.assert_array_equal(line.y, getattr(pair.result.between, view))
            np.testing.assert_array_equal(noise.y, getattr(pair.result.noise, view))
            assert noise.line.dash == "dot"
    assert [trace.visible for trace in figure.data] == [True] * 4 + [False] * 4
    second = figure.layout.updatemenus[0].buttons[1]
    assert second.method == "update"
    assert second.args[0]["visible"] == [False] * 4 + [True] * 4
    assert second.args[1] == {"yaxis.title.text": "Total variation (share)"}


def test_of_many_comparisons_only_the_highest_noise_is_drawn() -> None:
    pairs = compare_profiles(profiles(8)).pairs
    figure = distance_lines(pairs)
    assert len(figure.data) == 2 * 8
    highest = np.max([pair.result.noise.jensen_shannon for pair in pairs], axis=0)
    np.testing.assert_array_equal(figure.data[7].y, highest)
    assert difference_heatmap(pairs).layout.updatemenus[0].type == "dropdown"


def test_bars_are_the_experts_that_moved_most(data: ComparisonData) -> None:
    figure = moved_bars(data.pairs)
    assert titles(figure) == ("Difference in share (percentage points)", "Expert")
    moved = data.pairs[0].result.moved
    assert list(figure.data[0].x) == [move.difference for move in moved]
    assert figure.data[0].y[0] == f"layer {moved[0].layer}, expert {moved[0].expert}"
    assert figure.data[0].orientation == "h"
    assert len(set(figure.data[0].marker.color)) == 2
    many = compare_profiles(profiles(2), top=100).pairs
    assert len(many[0].result.moved) > 20
    assert len(moved_bars(many).data[0].x) == 20


def test_without_tokens_the_figures_say_so() -> None:
    one, two = profiles(2)
    data = compare_profiles([one, empty(two)])
    for draw in (difference_heatmap, distance_lines, moved_bars):
        for pairs in (data.pairs, ()):
            figure = draw(pairs)
            assert figure.data == ()
            assert "no tokens" in figure.layout.annotations[0].text
    assert "profile 2: no tokens were recorded for this" in data.remarks
    assert findings(data)[0] == "profile 2 against profile 1: no layer has tokens on both sides"
    json.dumps(comparison_data(data), allow_nan=False)
    assert "-" in comparison_text(data)


def test_equal_profiles_moved_nothing() -> None:
    one = profiles(1)[0]
    data = compare_profiles([one, one], ["a", "b"])
    assert moved_bars(data.pairs).layout.annotations[0].text == "No expert moved."
    assert difference_heatmap(data.pairs).data[0].zmax > 0
    assert any("share 1 run" in remark for remark in data.remarks)
    assert findings(data)[-2] == "  moved most: no expert moved"


def test_one_domain_is_that_of_profiles_recorded_alone() -> None:
    one, two = profiles(2)
    data = compare_profiles([one, two], domain="prose")
    result = data.pairs[0].result
    for matrix, profile in ((result.reference, one), (result.other, two)):
        counts = profile.selection_counts[1].sum(axis=0)[0]
        np.testing.assert_allclose(matrix[0], counts / counts.sum())
    assert data.pairs[0].other.tokens == two.token_counts[1].sum()
    assert "domain prose" in data.subject


@pytest.mark.parametrize("measure", ["frequency", "probability", "weight"])
def test_each_domain_is_compared_with_the_rest(measure: Any) -> None:
    profile = merge([random_profile(seed, domains=(name,)) for seed, name in enumerate(WORDS)])
    data = compare_profiles([profile], ["whole"], by_domain=True, measure=measure)
    assert [pair.other.name for pair in data.pairs] == WORDS
    for at, pair in enumerate(data.pairs):
        others = merge([random_profile(seed, domains=(name,)) for seed, name in enumerate(WORDS) if seed != at])
        alone = random_profile(at, domains=(WORDS[at],))
        expected = compare_profiles([others, alone], measure=measure).pairs[0]
        for name in ("reference", "other", "difference", "correlation"):
            np.testing.assert_array_equal(getattr(pair.result, name), getattr(expected.result, name))
        np.testing.assert_array_equal(pair.result.ratio.jensen_shannon, expected.result.ratio.jensen_shannon)
        assert (pair.reference.tokens, pair.other.tokens) == (others.tokens, alone.tokens)
    assert len(findings(data)) == 5 + (measure != "frequency")


def test_the_noise_is_known_for_the_frequency_alone() -> None:
    data = compare_profiles(profiles(2), measure="weight")
    assert data.pairs[0].result.within_other is None
    assert any("not known for routing weight share" in remark for remark in data.remarks)
    assert "  noise: not known" in findings(data)
    assert len(distance_lines(data.pairs).data) == 2


def changed(profile: RoutingProfile, **changes: Any) -> RoutingProfile:
    return replace(profile, model=replace(profile.model, **changes))


def test_remarks_say_what_differs_and_may() -> None:
    one, two = profiles(2)
    assert compare_profiles([one, two]).remarks == ()

    def remark(other: RoutingProfile) -> str:
        return " / ".join(compare_profiles([one, other], ["a", "b"]).remarks)

    assert "different models: a is tiny, b is large; experts are matched by id" in remark(
        changed(two, id="large", fingerprint="other")
    )
    assert "their router weights are the same" in remark(changed(two, id="copy"))
    assert "a and b have different router weights" in remark(changed(two, fingerprint="other"))
    assert "score differently: softmax in a, sigmoid in b" in remark(changed(two, scoring="sigmoid"))
    tops = tuple(replace(layer, top_k=1) for layer in MODEL.layers)
    assert "top-k differs: 2 (layers 1, 3), 3 (layers 4) in a, 1 in b" in remark(
        replace(two, model=replace(MODEL, layers=tops))
    )
    assert "b holds an interrupted run" in remark(replace(two, runs=(replace(two.runs[0], complete=False),)))
    assert "ran the same prompts" in remark(replace(two, runs=(replace(two.runs[0], prompts_sha256="0"),)))
    lone = np.zeros_like(two.split_counts)
    lone[4] = two.split_counts.sum(axis=0)
    assert "b: all prompts lie in one split" in remark(replace(two, split_counts=lone))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (MODEL.layers[:2], "cannot compare a (3 layers × 6-8 experts) with b (2 layers × 6-8 experts): the numbers of"),
        ((LayerInfo(1, 8, 2), LayerInfo(2, 6, 2), LayerInfo(4, 8, 3)), "different indices in the model, first 3 and 2"),
        ((LayerInfo(1, 8, 2), LayerInfo(3, 8, 2), LayerInfo(4, 8, 3)), "layer 3 has 6 experts in one and 8 in the"),
    ],
)
def test_profiles_of_different_shape_are_refused(layers: tuple[LayerInfo, ...], message: str) -> None:
    model = ModelInfo("other", MODEL.architecture, "softmax", layers)
    with pytest.raises(ProfileError) as caught:
        compare_profiles([random_profile(0), random_profile(1, model=model)], ["a", "b"])
    assert message in str(caught.value)


def test_what_cannot_be_asked_for_is_refused() -> None:
    one, two = profiles(2)
    lone = random_profile(5, domains=("code",))
    bare = replace(two, probability_sums=None, probability_tokens=None)
    for arguments, options, message in (
        ([one], {}, "two profiles or more"),
        ([], {}, "two profiles or more"),
        ([one, two], {"by_domain": True}, "within one profile, got 2"),
        ([one], {"by_domain": True, "domain": "code"}, "cannot both"),
        ([lone], {"by_domain": True}, "one domain only"),
        ([one, two], {"names": ["a"]}, "1 names for 2 profiles"),
        ([one, two], {"names": ["a", "a"]}, "distinct"),
        ([one, two], {"names": ["a", " "]}, "not empty"),
        ([one, lone], {"domain": "prose"}, "profile 2: domain 'prose' is not in the profile; it has code"),
        ([one, bare], {"measure": "probability"}, "profile 2: measure 'probability' was not recorded"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_profiles(arguments, **options)  # type: ignore[arg-type]


def test_everything_is_written_under_its_documented_name(data: ComparisonData, tmp_path: Path) -> None:
    written = write_comparison(data, tmp_path / "new")
    assert {file.name for file in written} | {"plotly.min.js"} == {f.name for f in (tmp_path / "new").iterdir()}
    text = (tmp_path / "new" / "comparison_report.txt").read_text()
    assert max(map(len, text.splitlines())) <= WIDTH
    found = json.loads((tmp_path / "new" / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert found["metadata"]["names"] == ["base", "one", "two"]
    first, result = found["comparisons"][0], data.pairs[0].result
    np.testing.assert_array_equal(first["jensen_shannon_bits"]["between"], result.between.jensen_shannon)
    np.testing.assert_array_equal(first["total_variation"]["noise"], result.noise.total_variation)
    assert first["jensen_shannon_bits"]["ratio_of_means"] == pytest.approx(
        result.between.jensen_shannon.mean() / result.noise.jensen_shannon.mean()
    )
    assert result.within_other is not None
    within = result.within_other.distances.jensen_shannon.tolist()
    assert first["jensen_shannon_bits"]["within_other"] == within
    assert first["difference_matrix"][1][6:] == [None, None]
    assert first["experts_moved"][0]["layer"] == result.moved[0].layer
    assert first["other"] == {"name": "one", "model_id": "tiny", "num_tokens": 60, "runs": ["run-1"]}


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    data = compare_profiles(profiles(3), ["a", HOSTILE, HOSTILE * 9])
    for file in write_comparison(data, tmp_path):
        text = file.read_text()
        if file.suffix == ".html":
            assert "<script>alert" not in text
    assert max(map(len, comparison_text(data).splitlines())) <= WIDTH
    assert difference_heatmap(data.pairs).data[0].hovertemplate.count("%{x}") == 1
    lines = findings(compare_profiles(profiles(2), ["a", "b\x1b[31m\nc"]))
    assert all(line.isprintable() for line in lines)


def test_files_are_called_by_what_tells_them_apart() -> None:
    def names(*paths: str) -> list[str]:
        return distinct_names([Path(path) for path in paths], "profile.safetensors")

    assert names("/r/base/profile.safetensors", "/r/tuned.safetensors") == ["base", "tuned"]
    assert names("/x/run/profile.safetensors", "/y/run/profile.safetensors", "/z/profile.safetensors") == [
        "x/run",
        "y/run",
        "z",
    ]
    assert names("/r/a/profile.safetensors", "/r/b/../a/profile.safetensors") == ["a", "a (2)"]
    assert names("/profile.safetensors", "/q.safetensors") == ["profile", "q"]


def routed(popularity: np.ndarray, prompts: str, seed: int, draw: int, split_seed: int = 0) -> RoutingProfile:
    """A profile of selections drawn by popularity (L, E) in 16 equal splits."""
    rng = np.random.default_rng(draw)
    splits = rng.multinomial(4000, popularity, size=(16, len(popularity))).astype(np.int64)[:, None]
    base = random_profile(seed, domains=("all",))
    selections = np.stack([splits.sum(axis=0), np.zeros_like(splits[0])], axis=1)
    model = replace(MODEL, layers=tuple(LayerInfo(i, popularity.shape[1], 2) for i in range(len(popularity))))
    return replace(
        base,
        model=model,
        runs=(replace(base.runs[0], prompts_sha256=prompts, settings={"seed": split_seed}),),
        selection_counts=selections,
        split_counts=splits,
        weight_sums=selections / 2.0,
        token_counts=np.array([[32_000, 0]]),
        probability_sums=None,
        probability_tokens=None,
        coactivation=None,
    )


def planted() -> list[RoutingProfile]:
    """A base, another draw of it, and one whose layer 2 uses expert 5 more."""
    rng = np.random.default_rng(31)
    base = rng.dirichlet(np.full(12, 20.0), size=4)
    moved = base.copy()
    moved[2, 5] += 0.05
    moved /= moved.sum(axis=1, keepdims=True)
    return [routed(base, "a", 1, 1), routed(base, "b", 2, 2), routed(moved, "c", 3, 3)]


def test_what_changed_is_told_from_the_draw_of_prompts() -> None:
    data = compare_profiles(planted(), ["base", "again", "moved"])
    same, moved = data.pairs
    assert same.change is not None
    assert moved.change is not None
    assert not same.change.layers_changed.any()
    assert moved.change.layers_changed.tolist() == [False, False, True, False]
    assert moved.change.experts_changed[2, 5]
    lines = findings(data)
    assert "  beyond the draw of prompts: 0 of 4 layers and 0 of 48 experts (p ≤ 0.05 for all of them" in lines[3]
    changed = int(moved.change.experts_changed.sum())
    assert (
        f"1 of 4 layers and {changed} of 48 experts (p ≤ 0.05 for all of them together, tested over different"
        in (lines[9])
    )
    lines, bars = distance_lines(data.pairs).data, moved_bars(data.pairs).data
    assert lines[1].marker.symbol == ("circle-open", "circle-open", "circle", "circle-open")
    assert lines[1].customdata[2][5] == moved.change.layer_p_corrected[2]
    assert bars[1].y[0] == "layer 2, expert 5"
    assert bars[1].marker.opacity[0] == 1
    assert set(bars[0].marker.opacity) == {0.4}
    np.testing.assert_allclose(
        difference_heatmap(data.pairs).data[1].customdata[..., 2], moved.change.p_corrected, rtol=1e-6
    )
    tests = comparison_data(data)["comparisons"][1]["tests"]
    assert tests["layer_p_value_all_layers"] == moved.change.layer_p_corrected.tolist()
    assert (tests["num_layers_changed"], tests["num_experts_changed"], tests["same_prompts"]) == (1, changed, False)
    first = comparison_data(data)["comparisons"][1]["experts_moved"][0]
    assert first["p_value_all_experts"] == moved.change.p_corrected[2, 5]


@pytest.mark.parametrize(
    ("prompts", "seed", "complete", "paired"),
    [("a", 0, True, True), ("b", 0, True, False), ("a", 1, True, False), ("a", 0, False, False), ("", 0, True, False)],
)
def test_the_same_prompts_in_the_same_splits_are_tested_in_pairs(
    prompts: str, seed: int, complete: bool, paired: bool
) -> None:
    rng = np.random.default_rng(32)
    popularity = rng.dirichlet(np.full(12, 20.0), size=4)
    one = routed(popularity, prompts and "a", 1, 1)
    two = routed(popularity, prompts, 2, 2, split_seed=seed)
    two = replace(two, runs=(replace(two.runs[0], complete=complete),))
    data = compare_profiles([one, two])
    assert data.pairs[0].change is not None
    assert data.pairs[0].change.paired is paired
    assert any("the tests take this into account" in remark for remark in data.remarks) is paired
    assert any("ran the same prompts" in remark for remark in data.remarks) is (prompts == "a")


def test_more_than_two_are_held_against_each_other() -> None:
    data = compare_profiles(planted(), ["base", "again", "moved"])
    every = data.every
    np.testing.assert_array_equal(every.between.jensen_shannon[0, 2], data.pairs[1].result.between.jensen_shannon)
    within = data.pairs[0].result.within_other
    assert within is not None
    np.testing.assert_array_equal(every.within.total_variation[1], within.distances.total_variation)
    trace = distance_matrix(every, data.measure).data[0]
    assert trace.z[0][2] == pytest.approx(every.between.jensen_shannon[0, 2].mean())
    assert trace.z[1][1] == pytest.approx(within.distances.jensen_shannon.mean())
    assert list(trace.customdata[1][2]) == ["again", "moved"]
    near = every.between.jensen_shannon[0, 1].mean()
    (told,) = every_finding(every)
    assert told.startswith(f"of all 3, closest together: base and again ({near:.4f} bits); furthest apart: ")
    assert told in findings(data)
    found = comparison_data(data)["all_distances"]
    assert found["names"] == ["base", "again", "moved"]
    assert found["jensen_shannon_bits"]["by_layer"][2][1] == every.between.jensen_shannon[1, 2].tolist()
    assert every_finding(compare_profiles(planted()[:2]).every) == []
    assert "Each against each" in comparison_text(data)


def test_a_measure_without_splits_is_not_tested() -> None:
    data = compare_profiles(profiles(3), measure="weight")
    assert data.pairs[0].change is None
    assert comparison_data(data)["comparisons"][0]["tests"] is None
    assert comparison_data(data)["all_distances"]["total_variation"]["between_halves"] == [[None] * 3] * 3
    assert not any("beyond the draw" in line for line in findings(data))
    assert "p for all" not in distance_lines(data.pairs).data[0].hovertemplate
