"""The embedded demo has a known answer: Δ = 4 and 8 in the stacked model, nothing in the control."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import moescope
from moescope.profiler.demo import model_path, prompts_path
from moescope.profiler.errors import ModelError
from moescope.profiler.profile import RoutingProfile
from moescope.profiler.prompts import read_prompts
from moescope.stats.activation import selection_frequency
from moescope.stats.nulls import layer_nulls
from moescope.stats.period_finder import find_period
from moescope.stats.reliability import layer_reliability


def mean_correlations(counts: np.ndarray) -> dict[int, float]:
    """Mean Pearson r by distance, by np.corrcoef alone."""
    r = np.corrcoef(counts.astype(np.float64))
    return {delta: float(np.mean(np.diagonal(r, delta))) for delta in range(1, len(r))}


@pytest.fixture(scope="module", params=["stacked", "control"])
def demo(request: pytest.FixtureRequest) -> tuple[str, RoutingProfile]:
    """Each model's name and its profile over the embedded prompts."""
    return request.param, moescope.profile(f"demo:{request.param}", read_prompts([str(prompts_path())]))


def test_the_known_answer_is_found(demo: tuple[str, RoutingProfile]) -> None:
    name, profile = demo
    assert profile.tokens == 63_292
    means = mean_correlations(profile.selection_counts.sum(axis=(0, 1)))
    report = moescope.analyze(profile)
    strengths = {pattern.delta: pattern.strength for pattern in report.periodic.patterns}
    assert {pattern.delta for pattern in report.periodic.patterns} == set(range(1, 12))
    for pattern in report.periodic.patterns:
        assert pattern.mean == pytest.approx(means[pattern.delta], abs=1e-9)
    if name == "stacked":
        assert {delta for delta, mean in means.items() if mean > 0.7} == {4, 8}
        assert max(mean for delta, mean in means.items() if delta not in (4, 8)) < 0
        assert {delta for delta, strength in strengths.items() if strength != "weak"} == {4, 8}
    else:
        assert max(means.values()) < 0.3
        assert set(strengths.values()) == {"weak"}


def test_the_known_answer_is_found_without_naming_it(demo: tuple[str, RoutingProfile]) -> None:
    name, profile = demo
    splits = profile.split_counts.sum(axis=1)
    layers = profile.model.layer_indices
    activation = selection_frequency(splits.sum(axis=0), (4,) * 12, profile.tokens, (16,) * 12, layers)
    found = find_period(activation, splits, seed=0)
    nulls = layer_nulls(activation, splits, permutations=2000, seed=0)
    reliability = layer_reliability(splits, (16,) * 12, layers, profile.tokens)
    assert not reliability.too_short
    assert reliability.defined.all()
    if name == "stacked":
        assert found.period == 4
        assert found.p < 0.01
        assert [harmonic.delta for harmonic in found.harmonics] == [4, 8]
        significant = [d for d, p in zip(nulls.free.deltas, nulls.free.p_family, strict=True) if p < 0.01]
        assert significant == [4, 8]
        lowest = nulls.intervals[0][[nulls.free.deltas.index(delta) for delta in (4, 8)]]
        assert (lowest > 0.7).all()
    else:
        assert found.period is None
        assert found.p > 0.05
        assert nulls.free.p_largest > 0.05


def test_the_prompt_set_is_what_the_card_says() -> None:
    lines = [json.loads(line) for line in prompts_path().read_text(encoding="utf-8").splitlines()]
    assert len(lines) >= 300
    domains = Counter(line["domain"] for line in lines)
    assert {"prose", "code", "mathematics", "dialogue", "structured-data"} < set(domains)
    assert len(domains) >= 9
    assert len({line["prompt"] for line in lines}) == len(lines)


def test_both_models_are_small() -> None:
    size = sum(file.stat().st_size for name in ("stacked", "control") for file in Path(model_path(name)).iterdir())
    assert size <= 24e6


def test_an_unknown_demo_model() -> None:
    with pytest.raises(ModelError, match=r"choose demo:stacked or demo:control"):
        moescope.profile("demo:other", ["hello"])
