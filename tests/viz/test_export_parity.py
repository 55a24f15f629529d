"""The earlier tool's numbers, recomputed here by its definitions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import random_profile

from moescope.profiler.profile import LayerInfo, ModelInfo
from moescope.profiler.sidecars import RouterTables
from moescope.viz.errors import ExportError
from moescope.viz.export import export
from moescope.viz.parity import parity_data

LAYERS = (0, 1, 3, 4, 7)  # dense layers lie between
SOFTMAX = ModelInfo("q", "Qwen3MoeForCausalLM", "softmax", tuple(LayerInfo(i, 8, 2) for i in LAYERS), "a")
SIGMOID = replace(SOFTMAX, architecture="DeepseekV3ForCausalLM", scoring="sigmoid")


def test_softmax_models(tmp_path: Path) -> None:
    profile = random_profile(9, model=SOFTMAX)
    assert profile.probability_sums is not None
    export(profile, tmp_path / "analysis_data.json", "parity", intervals=(1, 3, 9), delta_max=4)
    data = json.loads((tmp_path / "analysis_data.json").read_text(), parse_constant=pytest.fail)
    matrix = profile.probability_sums.sum(axis=(0, 1)) / profile.tokens
    np.testing.assert_allclose(data["expert_activation"]["matrix"], matrix)
    stats = data["expert_activation"]["per_layer_stats"]["3"]
    np.testing.assert_allclose(stats["avg_activation"], matrix[2])
    assert (stats["var_activation"], stats["num_tokens"], stats["num_experts"]) == (None, profile.tokens, 8)
    assert "not kept" in data["expert_activation"]["var_activation_reason"]

    r = np.corrcoef(matrix)
    found = data["layer_correlation"]
    for slot in range(5):
        for delta in range(1, 5):
            cell = found["correlation_matrix"][slot][delta - 1]
            assert cell == (pytest.approx(r[slot, slot + delta]) if slot + delta < 5 else None)
    assert [(p["layer_i"], p["layer_j"]) for p in found["layer_pairs"] if p["delta"] == 3] == [(0, 4), (1, 7)]
    assert len(found["layer_pairs"]) == 10
    pattern = data["periodic_patterns"]["3"]
    assert pattern["all_correlations"] == pytest.approx([r[0, 3], r[1, 4]])
    assert pattern["mean_correlation"] == pytest.approx(np.mean([r[0, 3], r[1, 4]]))
    assert pattern["std_correlation"] == pytest.approx(np.std([r[0, 3], r[1, 4]]))
    assert pattern["num_pairs"] == 2
    assert set(data["periodic_patterns"]) == {"1", "3"}, "an interval that no pair spans was left out"
    assert {"expert_activation", "delta", "std_correlation", "strength"} <= set(data["definitions"])
    assert set(data) == {
        "metadata",
        "definitions",
        "expert_activation",
        "layer_correlation",
        "periodic_patterns",
        "router_similarity",
    }
    assert data["router_similarity"]["router_layers"] is None


@pytest.mark.parametrize("factor", [None, 2.5])
def test_sigmoid_models(factor: float | None) -> None:
    profile = random_profile(9, model=SIGMOID)
    counts = profile.selection_counts
    profile = replace(profile, weight_sums=counts / 2)  # two experts a token, weights that sum to 1
    data = parity_data(profile, routed_scaling_factor=factor)
    scale = factor or 1.0
    np.testing.assert_allclose(
        data["expert_activation"]["matrix"], scale * counts.sum(axis=(0, 1)) / 2 / profile.tokens
    )
    np.testing.assert_allclose(np.sum(data["expert_activation"]["matrix"], axis=1), scale)
    said = data["definitions"]["routed_scaling_factor"]
    assert said == ("given as 2.5" if factor else "not held by the profile and not given: taken as 1.0")
    assert data["periodic_patterns"] == {}


def test_routers_that_were_compared_are_in_it_by_distance_in_moe_layers() -> None:
    rng = np.random.default_rng(4)
    weights = rng.normal(size=(5, 8, 12))
    norms = np.linalg.norm(weights, axis=2)
    flat = weights.reshape(5, -1)
    cosine = flat @ flat.T / np.outer(np.linalg.norm(flat, axis=1), np.linalg.norm(flat, axis=1))
    tables = RouterTables(LAYERS, (8,) * 5, cosine, norms, np.zeros((5, 5)))
    found = parity_data(random_profile(9, model=SIGMOID), routers=tables, delta_max=3)["router_similarity"]
    np.testing.assert_allclose(found["cosine_similarity_matrix"], cosine)
    assert found["column_norm_correlation"][0][1] == pytest.approx(np.corrcoef(norms)[0, 2])
    assert found["router_layers"] == list(LAYERS)


def test_a_constant_layer_spoils_its_interval_as_it_used_to() -> None:
    profile = random_profile(9, model=SOFTMAX)
    assert profile.probability_sums is not None
    sums = profile.probability_sums.copy()
    sums[:, :, 2] = sums[:, :, 2].sum(axis=-1, keepdims=True) / 8
    pattern = parity_data(replace(profile, probability_sums=sums), intervals=(2, 3))["periodic_patterns"]
    assert (pattern["2"]["mean_correlation"], pattern["2"]["std_correlation"]) == (None, None)
    assert (pattern["2"]["num_pairs"], pattern["2"]["strength"]) == (3, "weak")
    assert [r is None for r in pattern["2"]["all_correlations"]] == [True, False, True]
    assert pattern["3"]["mean_correlation"] is not None


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"probability_sums": None, "probability_tokens": None}, {}, "--probabilities all"),
        ({}, {"routed_scaling_factor": 2.5}, "applies to sigmoid routers"),
        ({"model": SIGMOID}, {"routed_scaling_factor": 0.0}, "must be a number above 0"),
        ({"model": SIGMOID}, {"routed_scaling_factor": float("inf")}, "must be a number above 0"),
        (
            {"model": replace(SIGMOID, architecture="MiniMaxM2ForCausalLM")},
            {},
            "not possible for MiniMaxM2ForCausalLM",
        ),
        ({}, {"measure": "weight"}, "--measure does not apply to --format parity"),
    ],
)
def test_what_parity_cannot_do_is_said(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    profile = replace(random_profile(9, model=SOFTMAX), **changes)
    with pytest.raises(ExportError, match=message):
        export(profile, tmp_path / "a.json", "parity", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_factor_is_for_parity_alone(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--routed-scaling-factor belongs to --format parity, not to csv"):
        export(random_profile(9), tmp_path / "a", "csv", routed_scaling_factor=2.5)
