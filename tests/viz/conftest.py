"""A report made from routings that were really drawn, so that counts, probabilities and weights belong together."""

from collections.abc import Callable

import numpy as np
import pytest

from moescope.profiler.sidecars import TokenSample
from moescope.stats.activation import layer_loads, mean_probability, selection_frequency, weight_share
from moescope.stats.correlation import layer_correlation
from moescope.stats.periodicity import default_intervals, periodic_patterns
from moescope.stats.similarity import router_similarity
from moescope.viz.report_data import DomainView, ReportData

ReportMaker = Callable[..., ReportData]


def build_report(
    layers: tuple[int, ...] = tuple(range(14)),
    experts: tuple[int, ...] | None = None,
    tokens: int = 300,
    model_id: str = "demo/model",
    domain: str = "code",
    probabilities: bool = True,
    weights: bool = True,
    lost: int = 0,
    delta_max: int = 30,
    domains: tuple[str, ...] = (),
    sampled: bool = False,
) -> ReportData:
    """A report over drawn routings; `lost` selections go missing in the first layer."""
    rng = np.random.default_rng(7)
    depth = len(layers)
    experts = experts or (16,) * depth
    top_k = (2,) * depth
    counts = np.zeros((depth, max(experts, default=0)), dtype=np.int64)
    sums = np.zeros(counts.shape)
    for row, width in enumerate(experts):
        router = rng.dirichlet(np.full(width, 0.5))
        sums[row, :width] = router * tokens
        for _ in range(tokens):
            counts[row, rng.choice(width - 1, size=2, replace=False)] += 1
    shape = (top_k, tokens, experts, layers)
    frequency = selection_frequency(counts, *shape)
    weight = weight_share(counts * 0.5, tokens, top_k, experts, layers)
    probability = mean_probability(sums, tokens, top_k, experts, layers)
    if lost:
        counts[0, 0] -= lost
    correlation = layer_correlation(frequency, delta_max)
    views = []
    for name in domains:
        own = np.zeros_like(counts)
        for row, width in enumerate(experts):
            own[row, :width] = rng.multinomial(tokens * 2, rng.dirichlet(np.full(width, 0.5)))
        activation = selection_frequency(own, *shape)
        apart = layer_correlation(activation, delta_max)
        views.append(DomainView(name, tokens, activation, apart, periodic_patterns(apart, default_intervals(layers))))
    return ReportData(
        model_id=model_id,
        architecture="DemoForCausalLM",
        scoring="softmax",
        engine="transformers, cpu, float32",
        versions={"moescope": "0.1.0"},
        created="2026-01-02T03:04:05Z",
        prompts=12,
        tokens_by_phase={"prefill": tokens - tokens // 3, "decode": tokens // 3},
        tokens_by_domain={domain: tokens},
        activations=(frequency, probability, weight) if probabilities else (frequency, weight),
        correlation=correlation,
        periodic=periodic_patterns(correlation, default_intervals(layers)),
        router_similarity=router_similarity([rng.normal(size=(e, 8)) for e in experts], layers) if weights else None,
        loads=layer_loads(counts, *shape),
        domains=tuple(views),
        sample=build_sample(layers, experts) if sampled else None,
    )


def build_sample(
    layers: tuple[int, ...], experts: tuple[int, ...], texts: tuple[str, ...] = ("a", " b", "c")
) -> TokenSample:
    """Distributions of a few tokens, drawn."""
    rng = np.random.default_rng(9)
    values = np.zeros((len(layers), len(texts), max(experts)), np.float32)
    for row, width in enumerate(experts):
        values[row, :, :width] = rng.dirichlet(np.full(width, 0.2), size=len(texts))
    return TokenSample(layers, experts, np.arange(len(texts), dtype=np.int32), texts, values)


@pytest.fixture
def make_report() -> ReportMaker:
    return build_report
