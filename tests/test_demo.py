"""The embedded demo has a known answer: Δ = 4 and 8 in the stacked model, nothing in the control."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import moescope
from moescope.profiler.demo import model_path, prompts_path
from moescope.profiler.errors import ModelError
from moescope.profiler.prompts import read_prompts


def mean_correlations(counts: np.ndarray) -> dict[int, float]:
    """Mean Pearson r by distance, by np.corrcoef alone."""
    r = np.corrcoef(counts.astype(np.float64))
    return {delta: float(np.mean(np.diagonal(r, delta))) for delta in range(1, len(r))}


@pytest.mark.parametrize("name", ["stacked", "control"])
def test_the_known_answer_is_found(name: str) -> None:
    profile = moescope.profile(f"demo:{name}", read_prompts([str(prompts_path())]))
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
