"""How long the statistics of a large profile take, and how large its report is."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plotly.offline import get_plotlyjs
from weight_results import weight_similarity

from moescope.profiler.profile import EngineInfo, LayerInfo, ModelInfo, RoutingProfile, RunInfo
from moescope.profiler.sidecars import TokenSample, choose_layers
from moescope.viz.analysis import affordable_permutations, analyze
from moescope.viz.report import write_report
from moescope.viz.weights_report import write_weights

TOKENS = 4096


def large_profile(layers: int, experts: int, domains: int, top_k: int = 8) -> RoutingProfile:
    """Every token of a domain chooses at random; only sums are kept."""
    rng = np.random.default_rng(0)
    model = ModelInfo("large", "M", "softmax", tuple(LayerInfo(i, experts, top_k) for i in range(layers)), "f")
    selection = np.zeros((domains, 2, layers, experts), np.int64)
    for domain in range(domains):
        for layer in range(layers):
            chosen = rng.random((64, experts)).argpartition(top_k, axis=1)[:, :top_k]
            selection[domain, 0, layer] = np.bincount(chosen.ravel(), minlength=experts) * (TOKENS // 64)
    tokens = np.zeros((domains, 2), np.int64)
    tokens[:, 0] = TOKENS
    splits = np.zeros((16, domains, layers, experts), np.int64)
    splits[3] = selection.sum(axis=1)
    run = RunInfo("u", "2026-01-01", EngineInfo("e", "1", "cpu", "float32"), 1, 1, "00", {})
    weights = selection / top_k
    return RoutingProfile(
        model=model,
        domains=tuple(f"domain {i:02}" for i in range(domains)),
        runs=(run,),
        created="2026-01-01",
        selection_counts=selection,
        weight_sums=weights,
        token_counts=tokens,
        split_counts=splits,
        probability_sums=weights.copy(),
        probability_tokens=tokens.copy(),
        version="0",
    )


def test_statistics_of_94_layers_of_128_experts_take_half_a_second_without_their_nulls() -> None:
    profile = large_profile(94, 128, 1)
    profile.check()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        analyze(profile, permutations=0)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(("layers", "experts", "expected"), [(12, 16, 10_000), (94, 128, 1768), (300, 512, 1_000)])
def test_permutations_are_as_many_as_a_model_of_that_size_affords(layers: int, experts: int, expected: int) -> None:
    assert affordable_permutations(layers, experts) == expected


def test_a_small_report_takes_five_seconds(tmp_path: Path) -> None:
    profile = large_profile(12, 16, 12, top_k=4)
    start = time.perf_counter()
    report = analyze(profile)
    write_report(report, tmp_path)
    assert time.perf_counter() - start < 5
    assert report.nulls is not None
    assert report.period is not None
    assert report.nulls.free.permutations == report.period.smooth.simulations == 10_000


def test_a_report_of_94_layers_of_256_experts_is_under_12_mb(tmp_path: Path) -> None:
    profile = large_profile(94, 256, 20)
    rng = np.random.default_rng(1)
    shown = tuple(choose_layers(94))
    values = rng.dirichlet(np.full(256, 0.1), size=(len(shown), 50)).astype(np.float32)
    sample = TokenSample(shown, (256,) * len(shown), np.arange(50, dtype=np.int32), ("token",) * 50, values, "f")
    routers = [rng.normal(size=(256, 32)).astype(np.float32) for _ in range(94)]
    report = analyze(profile, router_weights=routers, sample=sample, permutations=20)
    assert len(report.domains) == 20
    write_report(report, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 12_000_000
    assert (tmp_path / "report.html").stat().st_size < 4_000_000


@pytest.mark.parametrize(("layers", "experts"), [(94, 128), (58, 256)])
def test_the_page_of_weights_of_a_large_model_is_under_12_mb_with_its_library(
    layers: int, experts: int, tmp_path: Path
) -> None:
    result = weight_similarity(
        "unrelated", range(layers), experts, 2, deltas=(12, 24, 36), pairs=[(0, 12)], draws=9, alpha=0.1
    )
    assert result.verdict is not None
    many = replace(
        result, matches=result.matches * 40, verdict=replace(result.verdict, pairs=result.verdict.pairs * 40)
    )
    sizes = {file.name: file.stat().st_size for file in write_weights(many, tmp_path)}
    assert sizes.pop("weights.html") + len(get_plotlyjs()) < 9_000_000
    assert max(sizes.values()) < 6_000_000
