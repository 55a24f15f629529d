"""Profiles made of random routing, consistent by construction."""

from dataclasses import replace
from typing import Any

import numpy as np

from moescope.profiler.profile import EngineInfo, LayerInfo, ModelInfo, RoutingProfile, RunInfo

ENGINE = EngineInfo("transformers", "5.19.0", "cpu", "float32", {"torch": "2.13"})
MODEL = ModelInfo(
    "tiny", "Qwen3MoeForCausalLM", "softmax", (LayerInfo(1, 8, 2), LayerInfo(3, 6, 2), LayerInfo(4, 8, 3)), "abc"
)


def random_profile(
    seed: int,
    domains: tuple[str, ...] = ("code", "prose"),
    model: ModelInfo = MODEL,
    uuid: str | None = None,
    **changes: Any,
) -> RoutingProfile:
    """Route random tokens by a loop and count them; every array is present."""
    rng = np.random.default_rng(seed)
    width, layers = max(model.experts), len(model.layers)
    counts = np.zeros((len(domains), 2, layers, width), np.int64)
    split_counts = np.zeros((16, len(domains), layers, width), np.int64)
    units = np.zeros_like(counts)
    probability = np.zeros_like(counts)
    pairs = np.zeros((layers, width, width), np.int64)
    tokens = np.zeros((len(domains), 2), np.int64)
    for _ in range(60):
        d, p, s = rng.integers(len(domains)), rng.integers(2), rng.integers(16)
        tokens[d, p] += 1
        for slot, layer in enumerate(model.layers):
            chosen = rng.permutation(layer.experts)[: layer.top_k]
            counts[d, p, slot, chosen] += 1
            split_counts[s, d, slot, chosen] += 1
            units[d, p, slot, chosen] += rng.integers(1, 1 << 24, size=layer.top_k)
            pairs[slot][np.ix_(chosen, chosen)] += 1
            whole = rng.multinomial(1 << 24, np.ones(layer.experts) / layer.experts)
            probability[d, p, slot, : layer.experts] += whole
    run = RunInfo(uuid or f"run-{seed}", f"2026-01-01T00:00:{seed:02}", ENGINE, 5, 5, "00", {"seed": seed})
    profile = RoutingProfile(
        model=model,
        domains=domains,
        runs=(run,),
        created=run.created,
        selection_counts=counts,
        weight_sums=units * 2.0**-24,
        token_counts=tokens,
        split_counts=split_counts,
        probability_sums=probability * 2.0**-24,
        probability_tokens=tokens.copy(),
        coactivation=pairs,
        version="0",
    )
    return replace(profile, **changes)
