"""How sure a finding is, in words, numbers and figures, over runs that were really drawn."""

import json
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from builders import ENGINE

from moescope.profiler.profile import LayerInfo, ModelInfo, RoutingProfile, RunInfo
from moescope.stats.periodicity import PeriodicPattern
from moescope.viz.analysis import analyze
from moescope.viz.certainty import distance_finding, period_finding, reliability_finding, standing
from moescope.viz.chance import corrected_heatmap, distance_against_chance, period_scan, reliability_by_layer
from moescope.viz.findings import caution, findings
from moescope.viz.periodicity import periodic_bars
from moescope.viz.report_data import ReportData
from moescope.viz.structured import analysis_data, analysis_summary
from moescope.viz.summary import summary_text

LAYERS, EXPERTS, TOP_K = 16, 32, 2


def drawn(popularity: np.ndarray, tokens: int, seed: int = 0, splits: int = 16) -> RoutingProfile:
    """A profile of selections drawn by popularity (L, E), the logarithm of a share, in equal splits."""
    rng = np.random.default_rng(seed)
    weights = np.exp(popularity)
    shares = weights / weights.sum(axis=1, keepdims=True)
    layers, experts = popularity.shape
    counts = np.zeros((16, 1, layers, experts), np.int64)
    counts[:splits, 0] = rng.multinomial(TOP_K * tokens // splits, shares, size=(splits, layers))
    selections = np.zeros((1, 2, layers, experts), np.int64)
    selections[:, 0] = counts.sum(axis=0)
    routed = np.array([[tokens // splits * splits, 0]])
    return RoutingProfile(
        model=ModelInfo("m", "M", "softmax", tuple(LayerInfo(i, experts, TOP_K) for i in range(layers)), "f"),
        domains=("all",),
        runs=(RunInfo("u", "2026-01-01", ENGINE, 1, 1, "00", {}),),
        created="2026-01-01",
        selection_counts=selections,
        weight_sums=selections / TOP_K,
        token_counts=routed,
        split_counts=counts,
        version="0",
    )


def periodic(period: int, share: float = 0.9) -> np.ndarray:
    rng = np.random.default_rng(5)
    base = rng.normal(size=(period, EXPERTS))[np.arange(LAYERS) % period]
    return np.sqrt(share) * base + np.sqrt(1 - share) * rng.normal(size=(LAYERS, EXPERTS))


def fading() -> np.ndarray:
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(LAYERS, EXPERTS))
    for layer in range(1, LAYERS):
        rows[layer] = 0.9 * rows[layer - 1] + np.sqrt(1 - 0.81) * rows[layer]
    return rows


@pytest.fixture(scope="module")
def repeating() -> ReportData:
    return analyze(drawn(periodic(4), 32_000), intervals=(1, 4, 8), permutations=400)


@pytest.fixture(scope="module")
def nothing() -> ReportData:
    return analyze(drawn(np.random.default_rng(7).normal(size=(LAYERS, EXPERTS)), 32_000), permutations=400)


def test_a_period_is_told_with_its_size_its_two_p_values_and_the_looks(repeating: ReportData) -> None:
    assert repeating.period is not None
    told = period_finding(repeating.period)
    assert told.startswith("Expert use repeats every 4 layers: over ")
    assert "95% interval +" in told
    assert "p = 0.0025 against alignment that only fades with distance, p = 0.0025 against experts in random" in told
    assert "each for the best of 7 periods looked at (2-8)" in told
    r = repeating.correlation.pairwise[np.arange(12), np.arange(4, 16)].mean()
    assert f"Mean r is {r:+.2f} at Δ = 4, " in told
    assert findings(repeating)[0] == told


def test_no_period_is_told_with_what_would_have_been_found(nothing: ReportData) -> None:
    assert nothing.period is not None
    told = period_finding(nothing.period)
    assert told.startswith("No period was found: 7 periods looked at (2-8); p = ")
    seen = nothing.period.smallest_detectable
    assert f"One whose layers correlate by {seen:.2f} more than" in told
    assert "weak" not in " ".join(findings(nothing))


def test_layers_that_are_merely_alike_nearby_have_no_period_but_beat_the_shuffle() -> None:
    report = analyze(drawn(fading(), 32_000), permutations=400)
    assert report.period is not None
    assert report.nulls is not None
    assert report.period.period is None
    assert report.nulls.free.p_family[0] < 0.01
    assert "Δ = 1 (mean r +0." in distance_finding(report.nulls)
    aligned = replace(report.period, unaligned=replace(report.period.unaligned, p_period=0.0025))
    aligned = replace(aligned, smooth=replace(aligned.smooth, p_period=0.4))
    assert "Expert use is aligned (p = 0.0025 against experts in random order), but no more so at a period" in (
        period_finding(aligned)
    )


def test_a_shallow_model_cannot_be_searched() -> None:
    report = analyze(drawn(periodic(4)[:3], 3_200), permutations=50)
    assert report.period is not None
    assert period_finding(report.period) == (
        "No period can be looked for: too few layers can be compared for one to come back."
    )
    assert isinstance(period_scan(report.period), go.Figure)
    assert not period_scan(report.period).data


def test_distances_are_told_with_interval_chance_and_p(repeating: ReportData, nothing: ReportData) -> None:
    assert repeating.nulls is not None
    assert nothing.nulls is not None
    told = distance_finding(repeating.nulls)
    null = repeating.nulls.free
    above = [delta for delta, p in zip(null.deltas, null.p_family, strict=True) if p <= 0.05]
    assert told.startswith(f"At {len(above)} of 15 distances layers correlate more than with experts in random order")
    assert {4, 8, 12} <= set(above)
    assert f"chance up to {null.threshold[3]:+.2f}; p = 0.0025)" in told
    told = distance_finding(nothing.nulls)
    assert told.startswith("At none of 15 distances do layers correlate more than with experts in random order")


def test_a_distance_that_one_expert_carries_is_doubted(repeating: ReportData) -> None:
    nulls = repeating.nulls
    assert nulls is not None
    doubted = replace(nulls, ranks=replace(nulls.ranks, p_family=np.full(15, 0.3)))
    assert "Ranks alone do not show it at Δ = " in distance_finding(doubted)
    assert "Ranks" not in distance_finding(nulls)


def test_reliability_says_whether_the_tokens_are_enough() -> None:
    long = analyze(drawn(periodic(4), 32_000), permutations=0).reliability
    short = analyze(drawn(periodic(4) / 4, 320), permutations=0).reliability
    assert long is not None
    assert short is not None
    assert f"correlate by {np.median(long.reliability):.2f} with these in the median layer" in reliability_finding(long)
    assert "That is enough: for 0.9 in half of the layers, about " in reliability_finding(long)
    assert "too little to conclude from a low correlation" in reliability_finding(short)
    assert "and there are 32,000." in reliability_finding(long)
    noise = analyze(drawn(np.zeros((LAYERS, EXPERTS)), 320), permutations=0)
    none = replace(noise.reliability, defined=np.zeros(LAYERS, bool))  # type: ignore[type-var]
    assert "320 tokens are too few: in no layer" in reliability_finding(none)  # type: ignore[arg-type]


def test_reliability_of_one_part_cannot_be_told() -> None:
    report = analyze(drawn(periodic(4), 3_200, splits=1), permutations=0)
    assert report.reliability is not None
    told = "the prompts fall into 1 part that can be held against each other, and three are needed"
    assert told in reliability_finding(report.reliability)
    assert told in caution(report)


def test_a_mean_is_not_called_weak_where_it_was_held_against_chance(repeating: ReportData) -> None:
    nulls = repeating.nulls
    assert nulls is not None
    low = PeriodicPattern(4, 0.1, 0.1, (0.1, 0.1), (0, 1), 2, "weak")
    assert standing(low, None) == "weak"
    assert standing(low, nulls) == "more than chance, p = 0.0025"
    assert standing(replace(low, strength="strong"), nulls) == "strong, more than chance, p = 0.0025"
    assert standing(replace(low, delta=1), nulls).startswith("no more than chance, p = ")
    assert standing(replace(low, delta=40, strength="not measurable"), nulls) == "not measurable"


def test_the_summary_and_the_structured_data_hold_the_same(repeating: ReportData) -> None:
    assert repeating.period is not None
    assert repeating.nulls is not None
    text = " ".join(summary_text(repeating).split())
    assert period_finding(repeating.period) in text
    assert max(map(len, summary_text(repeating).splitlines())) <= 100
    data, summary = analysis_data(repeating), analysis_summary(repeating)["key_findings"]
    assert summary["period"] == {key: data["period_finder"][key] for key in summary["period"]}
    assert summary["period"]["period"] == 4
    entry = data["correlation_null"]["distances"][3]
    assert (entry["delta"], entry["num_pairs"]) == (4, 12)
    assert entry["mean_correlation"] == repeating.nulls.free.mean[3]
    assert {found["delta"] for found in summary["distances_above_chance"]} >= {4, 8, 12}
    assert [
        entry["reliability"] for entry in data["reliability"]["layers"]
    ] == repeating.reliability.reliability.tolist()  # type: ignore[union-attr]
    json.dumps(data, allow_nan=False)


def test_without_permutations_nothing_is_held_against_chance() -> None:
    report = analyze(drawn(periodic(4), 3_200), permutations=0)
    assert report.nulls is report.period is None
    assert "It was not held against chance" in findings(report)[0]
    data = analysis_data(report)
    assert data["correlation_null"]["distances"] is data["period_finder"]["periods"] is None
    assert "permutations were 0" in data["period_finder"]["reason"]
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        analyze(drawn(periodic(4), 320), permutations=-1)


def test_full_marks_are_what_beats_chance(repeating: ReportData) -> None:
    nulls, period, reliability = repeating.nulls, repeating.period, repeating.reliability
    assert nulls is not None
    assert period is not None
    assert reliability is not None
    low, high, threshold, points = distance_against_chance(nulls).data
    assert points.x == nulls.free.deltas
    np.testing.assert_array_equal(points.y, nulls.free.mean)
    full = [symbol == "circle" for symbol in points.marker.symbol]
    np.testing.assert_array_equal(full, nulls.free.p_family <= 0.05)
    np.testing.assert_array_equal(full, points.y > threshold.y)
    assert (np.array(low.y) < np.array(high.y)).all()

    scan = period_scan(period).data
    assert len(scan) == 7
    full = [symbol == "circle" for symbol in scan[-1].marker.symbol]
    assert full[period.periods.index(4)]
    np.testing.assert_array_equal(full, (scan[-1].y > scan[2].y) & (scan[-1].y > scan[5].y))

    np.testing.assert_array_equal(reliability_by_layer(reliability).data[0].y, reliability.reliability)
    corrected = corrected_heatmap(reliability, 8).data[0]
    assert corrected.z[3][4] == np.float32(reliability.corrected[3, 8])
    assert reliability.corrected_at(4) == pytest.approx(reliability.corrected.diagonal(4).mean())


def test_periodic_bars_carry_the_band_of_chance(repeating: ReportData) -> None:
    nulls = repeating.nulls
    assert nulls is not None
    bars, band = periodic_bars(repeating.periodic, "", nulls).data
    assert len(band.x) == len(bars.x)
    place = [pattern.delta for pattern in repeating.periodic.patterns].index(4)
    at = nulls.free.deltas.index(4)
    assert band.base[place] == nulls.free.null_quantiles[0, at]
    assert band.base[place] + band.y[place] == pytest.approx(nulls.free.null_quantiles[2, at])
    assert not any("weak" in label for label in bars.x)
    assert len(periodic_bars(repeating.periodic).data) == 1


def test_what_busy_groups_explain_is_told_apart() -> None:
    rng = np.random.default_rng(8)
    busy = np.repeat(np.log([4.0, 1.0, 1.0, 0.3]), EXPERTS // 4)
    profile = drawn(busy + 0.3 * rng.normal(size=(LAYERS, EXPERTS)), 32_000)
    grouped = replace(profile, model=replace(profile.model, groups=4))
    plain, report = analyze(profile, permutations=200), analyze(grouped, permutations=200)
    assert plain.nulls is not None
    assert report.nulls is not None
    assert report.nulls.within_groups is not None
    told = distance_finding(report.nulls)
    assert told.startswith("At 15 of 15 distances layers correlate more than with experts in random order")
    assert (
        " Within the router's 4 groups of experts, whichever of them are busy, they do at no distance (p = 0." in told
    )
    assert "groups" not in distance_finding(plain.nulls)
    within = distance_against_chance(report.nulls).data
    assert [trace.name for trace in within if trace.name and "groups" in trace.name] == [
        "95% within router groups",
        "p = 0.05 within router groups",
    ]
    np.testing.assert_array_equal(within[-2].y, report.nulls.within_groups.threshold)
    assert len(distance_against_chance(plain.nulls).data) == len(within) - 3
    entry, bare = (analysis_data(one)["correlation_null"]["distances"][2] for one in (report, plain))
    assert entry["within_groups_p_value_all_looks"] == report.nulls.within_groups.p_family[2] > 0.05
    assert bare["within_groups_p_value_all_looks"] is None
    assert "experts         32, in 4 router groups" in summary_text(report)
