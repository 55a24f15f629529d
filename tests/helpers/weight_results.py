"""Results of a pass over weights, made from weights whose history is known by the statistics themselves."""

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import numpy as np
from weight_sums import grams, same_index, within

from moescope.stats.expert_grams import within_cosine
from moescope.stats.expert_matching import LayerPair, Verdict, match_experts, verdict
from moescope.stats.expert_similarity import PARTS, Part, UnusableExpert
from moescope.stats.similarity import router_similarity
from moescope.stats.weight_similarity import WeightChange, WeightCoverage, WeightSimilarity

Origin = Literal["stacked", "experts permuted", "unrelated"]
Layer = dict[Part, np.ndarray]

PERIOD = 3
"""Layers of a stacked model that share an origin lie this far apart."""
DRAWS, ALPHA = 99, 0.01
VERSIONS = {"moescope": "0.1.0", "numpy": "2.0"}


def draw_layer(rng: np.random.Generator, experts: int, size: int) -> Layer:
    """Random experts, (E, size) each part."""
    return {part: rng.normal(size=(experts, size)).astype(np.float32) for part in PARTS}


def mixed(one: Layer, other: Layer, weight: float) -> Layer:
    """Weights whose cosine with `one` is about `weight`."""
    rest = float(np.sqrt(1 - weight**2))
    return {part: (weight * one[part] + rest * other[part]).astype(np.float32) for part in PARTS}


def draw_model(origin: Origin, depth: int, experts: int, size: int, seed: int = 0, shared: float = 0.0) -> list[Layer]:
    """Layers of a model; `shared` is what all experts of all layers have in common."""
    rng = np.random.default_rng(seed)
    first = [draw_layer(rng, experts, size) for _ in range(min(depth, PERIOD))]
    mean = draw_layer(rng, 1, size)
    layers = []
    for row in range(depth):
        own = draw_layer(rng, experts, size)
        layer = own if origin == "unrelated" else mixed(first[row % PERIOD], own, 0.9)
        order = rng.permutation(experts) if origin == "experts permuted" else np.arange(experts)
        layers.append({part: layer[part][order] + np.float32(shared) * mean[part] for part in PARTS})
    return layers


def matched(
    pairs: Sequence[tuple[int, int, Layer, Layer]], draws: int = DRAWS, alpha: float = ALPHA
) -> tuple[tuple[LayerPair, ...], Verdict | None]:
    """Match layers, named by their indices, and say what that comes to."""
    matches = tuple(
        LayerPair(first, second, weights=match_experts(grams(one, other), draws, seed=(first, second)))
        for first, second, one, other in pairs
    )
    return matches, verdict(matches, alpha) if matches else None


def weight_similarity(
    origin: Origin = "stacked",
    layers: Sequence[int] = tuple(range(1, 8)),
    experts: int = 8,
    size: int = 40,
    *,
    deltas: Sequence[int] = (1, 3),
    match: bool = True,
    pairs: Sequence[tuple[int, int]] | None = None,
    shared: float = 0.0,
    zero: tuple[int, int] | None = None,
    model_id: str = "demo/model",
    coverage: WeightCoverage | None = None,
    draws: int = DRAWS,
    alpha: float = ALPHA,
) -> WeightSimilarity:
    """A model's result; `pairs` are the places of the layers to match, `zero` the place and expert without weights."""
    model = draw_model(origin, len(layers), experts, size, shared=shared)
    if zero is not None:
        for part in PARTS:
            model[zero[0]][part][zero[1]] = 0.0
    chosen = combinations(range(len(layers)), 2) if pairs is None else pairs
    matches, found = matched(
        [(layers[i], layers[j], model[i], model[j]) for i, j in chosen] if match else [], draws, alpha
    )
    rng = np.random.default_rng(1)
    return WeightSimilarity(
        model_id=model_id,
        architecture="DemoForCausalLM",
        layers=tuple(layers),
        experts=experts,
        hidden=size,
        width=1,
        dtypes=("bfloat16",),
        deltas=tuple(deltas),
        routers=router_similarity([rng.normal(size=(experts, 8)) for _ in layers], layers),
        same_index=same_index(model, layers),
        within=np.array([within_cosine(within(layer)) for layer in model]),
        matches=matches,
        verdict=found,
        coverage=coverage or WeightCoverage(3 * size, 3 * size, 6_000_000_000, 6_000_000_000),
        engine="cpu, 2 threads",
        seconds=75.2,
        versions=VERSIONS,
        created="2026-01-02T03:04:05+00:00",
    )


def weight_change(
    layers: Sequence[int] = tuple(range(1, 6)),
    experts: int = 8,
    size: int = 40,
    *,
    strength: float = 0.1,
    match: bool = True,
    zero: tuple[int, int] | None = None,
    model_id: str = "demo/tuned",
    against_id: str = "demo/base",
) -> WeightChange:
    """A model after a step of random size `strength` on each weight, held against what it was."""
    rng = np.random.default_rng(5)
    base = draw_model("unrelated", len(layers), experts, size, seed=2)
    if zero is not None:
        for part in PARTS:
            base[zero[0]][part][zero[1]] = 0.0
    tuned = [
        {part: (before + strength * rng.normal(size=before.shape)).astype(np.float32) for part, before in layer.items()}
        for layer in base
    ]
    one, two = (np.stack([[layer[part] for layer in model] for part in PARTS]) for model in (tuned, base))
    routers = rng.normal(size=(2, len(layers), experts, 8))
    routers[0] = routers[1] + strength * routers[0]
    whole = [np.concatenate(list(model), axis=-1) for model in (one, two)]
    matches, found = matched([(i, i, a, b) for i, a, b in zip(layers, tuned, base, strict=True)] if match else [])
    return WeightChange(
        model_id=model_id,
        against_id=against_id,
        architecture="DemoForCausalLM",
        layers=tuple(layers),
        experts=experts,
        cosine=cosine(*whole),
        part_cosine=cosine(one, two),
        relative_change=relative(*whole),
        part_relative_change=relative(one, two),
        router_cosine=cosine(*routers),
        router_relative_change=relative(*routers),
        unusable=() if zero is None else (UnusableExpert(layers[zero[0]], zero[1], "zero"),),
        matches=matches,
        verdict=found,
        coverage=WeightCoverage(3 * size, 3 * size, 12_000_000_000, 12_000_000_000),
        engine="cpu, 2 threads",
        seconds=31.0,
        versions=VERSIONS,
        created="2026-01-02T03:04:05+00:00",
    )


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Along the last axis; NaN where one is zero."""
    length = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    found: np.ndarray = np.where(length > 0, (one * other).sum(axis=-1) / np.where(length > 0, length, 1), np.nan)
    return found


def relative(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """‖a − b‖ / ‖b‖ along the last axis; NaN where b is zero."""
    length = np.linalg.norm(other, axis=-1)
    apart = np.linalg.norm(one - other, axis=-1)
    found: np.ndarray = np.where(length > 0, apart / np.where(length > 0, length, 1), np.nan)
    return found
