"""The sentences of a report against numbers worked out by hand."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moescope.stats.activation import LayerLoad
from moescope.stats.correlation import LayerCorrelation
from moescope.stats.similarity import similarity_at_distances
from moescope.viz.findings import findings
from moescope.viz.report_data import ReportData

Maker = Callable[..., ReportData]
NAN = float("nan")


def correlation(*columns: list[float]) -> LayerCorrelation:
    """Of four layers, by distance from 1 up."""
    matrix = np.array(columns, dtype=float).T
    return LayerCorrelation("frequency", matrix, np.full((4, 4), NAN), tuple(range(1, len(columns) + 1)), (0, 1, 2, 3))


def load(layer: int, selections: int, busiest: int, dead: tuple[int, ...] = (), experts: int = 8) -> LayerLoad:
    return LayerLoad(layer, experts, 2, selections // 2, selections, busiest, dead)


@pytest.fixture
def report(make_report: Maker) -> ReportData:
    """1,000 tokens in four layers without routers; each test plants the rest."""
    loads = tuple(load(layer, 2000, 300 + 100 * layer) for layer in range(4))
    made = make_report(layers=(0, 1, 2, 3), tokens=30, weights=False)
    planted = correlation([0.1, 0.2, 0.0, NAN], [0.8, 0.9, NAN, NAN], [0.3, NAN, NAN, NAN])
    return replace(made, loads=loads, tokens_by_phase={"prefill": 900, "decode": 100}, correlation=planted)


def test_a_period(report: ReportData) -> None:
    assert findings(report)[0] == (
        "Expert use of layers is strongly correlated at Δ = 2 (+0.85 over 2 pairs); at every other distance the "
        "mean is +0.10 or lower. It was not held against chance, which was left out."
    )


def test_a_moderate_period_and_no_other_distance(report: ReportData) -> None:
    planted = correlation([0.5, 0.5, 0.5, NAN], [0.75, 0.25, NAN, NAN])
    sentence = findings(replace(report, correlation=planted))[0]
    assert sentence.startswith(
        "Expert use of layers is moderately correlated at Δ = 1 (+0.50 over 3 pairs), Δ = 2 (+0.50 over 2 pairs). "
    )


def test_many_periods_are_counted_not_listed(report: ReportData) -> None:
    columns = [[0.5 + delta / 20] * 2 + [NAN] * 2 for delta in range(7)]
    sentence = findings(replace(report, correlation=correlation(*columns, [-0.5, -0.25, NAN, NAN])))[0]
    assert (
        "strongly correlated at Δ = 7 (+0.80 over 2 pairs), Δ = 6 (+0.75 over 2 pairs), Δ = 5 (+0.70 over 2 pairs), "
        "Δ = 4 (+0.65 over 2 pairs) and 3 more; at every other distance the mean is -0.38 or lower."
    ) in sentence


def test_no_period(report: ReportData) -> None:
    planted = correlation([0.4, -0.1, 0.0, NAN], [0.3, 0.1, NAN, NAN], [0.9, NAN, NAN, NAN])
    assert findings(replace(report, correlation=planted))[0] == (
        "No layer distance stands out in selection frequency: the highest mean correlation is +0.20 at Δ = 2 "
        "(2 pairs of layers)."
    )


def test_one_pair_is_no_period(report: ReportData) -> None:
    planted = correlation([0.9, NAN, NAN, NAN], [NAN, 0.9, NAN, NAN])
    assert findings(replace(report, correlation=planted))[0] == (
        "No distance is spanned by two comparable pairs of layers: periods cannot be measured."
    )


def test_the_measure_is_named(report: ReportData) -> None:
    planted = replace(correlation([0.1, 0.1, NAN, NAN]), kind="weight")
    assert "stands out in routing weight share" in findings(replace(report, correlation=planted))[0]


def test_load(report: ReportData) -> None:
    """Busiest over mean is 1.2, 1.6, 2.0 and 2.4 of a mean of 250."""
    assert findings(report)[2] == (
        "Every expert was chosen at least once. The busiest expert of a layer carries 1.80 times the mean load in the "
        "median layer, and 2.40 times in layer 3."
    )


def test_dead_experts(report: ReportData) -> None:
    loads = (load(4, 2000, 500, (1, 7)), load(9, 2000, 250, (0,), experts=16))
    assert findings(replace(report, loads=loads))[2] == (
        "3 of 24 experts were never chosen. The busiest expert of a layer carries 2.00 times the mean load in the "
        "median layer, and 2.00 times in layer 4."
    )


def test_the_amount(report: ReportData) -> None:
    assert findings(report)[1:2] == ["1,000 tokens give 250 selections an expert on average."]
    few = tuple(load(layer, 2000, 300, experts=32 if layer == 2 else 8) for layer in range(4))
    assert findings(replace(report, loads=few))[1:2] == [
        "This is a short run: 1,000 tokens give 62 selections an expert on average. Below 100 the noise of counting "
        "hides real correlations; profile more prompts before you conclude anything."
    ]
    edge = tuple(load(layer, 800, 300) for layer in range(4))
    assert "short run" not in findings(replace(report, loads=edge))[1]


def test_zero_tokens(report: ReportData, make_report: Maker) -> None:
    nothing = ["No tokens were routed: there is nothing to find."]
    assert findings(replace(report, tokens_by_phase={"prefill": 0, "decode": 0})) == nothing
    assert findings(make_report(tokens=0)) == nothing


def test_routers(report: ReportData) -> None:
    """Row cosines by distance: 0.1 (three pairs), 0.75 (two), 0.9 (one: not enough)."""
    rows = np.eye(4)
    for (i, j), value in {
        (0, 1): 0.0, (1, 2): 0.1, (2, 3): 0.2, (0, 2): 0.7, (1, 3): 0.8, (0, 3): 0.9
    }.items():  # fmt: skip
        rows[i, j] = rows[j, i] = value
    similarity = similarity_at_distances(np.eye(4), np.ones((4, 8)), rows, (0, 1, 2, 3), (8,) * 4)
    assert findings(replace(report, router_similarity=similarity))[3] == (
        "Router rows of the same expert are most alike at Δ = 2: mean cosine +0.750, against +0.425 at the median "
        "distance."
    )
    apart = similarity_at_distances(np.eye(4), np.ones((4, 8)), np.full((4, 4), NAN), (0, 1, 2, 3), (8,) * 4)
    assert len(findings(replace(report, router_similarity=apart))) == 3


def test_a_planted_period_is_found_in_drawn_counts(make_report: Maker) -> None:
    """Layers 3 apart share their experts; nothing else does."""
    from moescope.stats.activation import selection_frequency
    from moescope.stats.correlation import layer_correlation

    rng = np.random.default_rng(2)
    shapes = rng.dirichlet(np.full(32, 0.3), 3)
    counts = np.stack([rng.multinomial(20_000, shapes[layer % 3]) for layer in range(12)])
    layers = tuple(range(12))
    frequency = selection_frequency(counts, (2,) * 12, 10_000, (32,) * 12, layers)
    made = make_report(layers=layers, experts=(32,) * 12)
    sentence = findings(replace(made, correlation=layer_correlation(frequency)))[0]
    assert sentence.startswith("Expert use of layers is strongly correlated at Δ = ")
    assert all(f"Δ = {delta} (+" in sentence for delta in (3, 6, 9))
