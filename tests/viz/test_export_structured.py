"""The structured data against the published schema, and each documented number against plain numpy."""

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonschema
import numpy as np
import pytest
from builders import MODEL, random_profile
from weight_results import weight_similarity

from moescope.profiler.profile import LayerInfo, RoutingProfile
from moescope.viz.analysis import analyze
from moescope.viz.report import write_report
from moescope.viz.structured import SUFFIXES, StructuredFormat, analysis_data, analysis_summary, encode, schema

UNIFORM = replace(MODEL, layers=tuple(LayerInfo(index, 8, 2) for index in (1, 2, 4, 5)))
CASES = ("normal", "no probabilities", "no router weights", "different experts", "one layer", "no tokens")


def case(name: str) -> tuple[RoutingProfile, list[np.ndarray] | None]:
    """A profile and router weights."""
    model = {"different experts": MODEL, "one layer": replace(MODEL, layers=MODEL.layers[:1])}.get(name, UNIFORM)
    changes = {"probability_sums": None, "probability_tokens": None} if name == "no probabilities" else {}
    profile = random_profile(11, model=model, **changes)
    if name == "no tokens":
        profile = replace(profile, **{key: np.zeros_like(array) for key, array in profile.arrays().items()})
    rng = np.random.default_rng(4)
    weights = [rng.normal(size=(width, 5)) for width in model.experts]
    return profile, None if name == "no router weights" else weights


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson by its definition; NaN where it has none."""
    if len(a) != len(b) or len(a) == 0 or not np.isfinite([*a, *b]).all() or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    x, y = a - a.mean(), b - b.mean()
    return float((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))


def close(found: Any, expected: Any) -> None:
    """Within 1e-6, null and NaN being the same."""
    np.testing.assert_allclose(
        np.array(found, dtype=np.float64), np.array(expected, dtype=np.float64), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("measure", ["frequency", "weight"])
def test_real_outputs_fit_the_schema(name: str, measure: Any) -> None:
    profile, weights = case(name)
    report = analyze(
        profile,
        measure=measure,
        delta_max=3,
        router_weights=weights,
        weights=weight_similarity() if name == "normal" else None,
    )
    for title, data in (("analysis_data", analysis_data(report)), ("analysis_summary", analysis_summary(report))):
        published = schema(title)  # type: ignore[arg-type]
        jsonschema.Draft202012Validator.check_schema(published)
        jsonschema.Draft202012Validator(published).validate(json.loads(encode(data, "json")))


def paths(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to every dict in a tree, lists excepted."""
    if isinstance(node, dict):
        yield path
        for key, value in node.items():
            yield from paths(value, (*path, key))


def test_the_schema_is_strict() -> None:
    profile, weights = case("normal")
    validator = jsonschema.Draft202012Validator(schema("analysis_data"))
    data = analysis_data(analyze(profile, router_weights=weights))
    free = {"num_experts_per_layer", "top_k_per_layer", "versions", "tokens_by_phase", "tokens_by_domain"}
    free |= {"per_layer_stats", "periodic_patterns"}
    for path in paths(data):
        copy = json.loads(json.dumps(data))
        node = copy
        for key in path:
            node = node[key]
        if path and path[-1] in free:
            node["x"] = "not a number" if path[-1] != "versions" else 1
        else:
            node["x"] = 1
        assert not validator.is_valid(copy), path
        for key in list(node):
            if path and path[-1] in free:
                continue
            lacking = json.loads(json.dumps(data))
            inner = lacking
            for step in path:
                inner = inner[step]
            inner.pop(key, None)
            assert key == "x" or not validator.is_valid(lacking), (*path, key)


def test_every_key_of_the_schema_is_described() -> None:
    def check(node: Any, where: str) -> None:
        if isinstance(node, dict):
            for name, value in node.get("properties", {}).items():
                told = "$ref" in value or "description" in value or value == {"type": "null"} or "oneOf" in value
                assert told or value["type"] == "object", f"{where}.{name}"
            if node.get("type") == "object":
                assert "additionalProperties" in node, where
            for name, value in node.items():
                check(value, f"{where}.{name}")
        elif isinstance(node, list):
            for value in node:
                check(value, where)

    check(schema("analysis_data"), "analysis_data")
    check(schema("analysis_summary"), "analysis_summary")
    check(schema("weights"), "weights")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("measure", ["frequency", "weight", "probability"])
def test_every_documented_number(name: str, measure: Any) -> None:
    profile, weights = case(name)
    if measure == "probability" and profile.probability_sums is None:
        with pytest.raises(ValueError, match="was not recorded"):
            analyze(profile, measure=measure)
        return
    report = analyze(profile, measure=measure, intervals=(1, 2, 3), delta_max=4, router_weights=weights)
    data = json.loads(encode(analysis_data(report), "json"))
    summary = json.loads(encode(analysis_summary(report), "json"))

    layers = [layer.index for layer in profile.model.layers]
    widths = [layer.experts for layer in profile.model.layers]
    tops = [layer.top_k for layer in profile.model.layers]
    depth, tokens = len(layers), int(profile.token_counts.sum())
    counts = profile.selection_counts.sum(axis=(0, 1))
    weight = profile.weight_sums.sum(axis=(0, 1))
    beyond = np.arange(max(widths))[None, :] >= np.array(widths)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        matrices = {
            "frequency": counts / (np.array(tops)[:, None] * float(tokens)),
            "weight": weight / weight.sum(axis=1, keepdims=True),
        }
        if profile.probability_sums is not None and profile.probability_tokens is not None:
            matrices["probability"] = profile.probability_sums.sum(axis=(0, 1)) / float(
                profile.probability_tokens.sum()
            )
    for matrix in matrices.values():
        matrix[beyond] = np.nan

    info = data["metadata"]["model_info"]
    assert info == summary["model"]
    assert info["num_moe_layers"] == summary["key_findings"]["num_moe_layers"] == depth
    assert info["layer_indices"] == layers
    assert info["num_experts_per_layer"] == {str(i): width for i, width in zip(layers, widths, strict=True)}
    assert info["top_k_per_layer"] == {str(i): k for i, k in zip(layers, tops, strict=True)}
    assert info["total_tokens_analyzed"] == tokens
    assert list(data["metadata"]["tokens_by_phase"].values()) == profile.token_counts.sum(axis=0).tolist()
    assert list(data["metadata"]["tokens_by_domain"].values()) == profile.token_counts.sum(axis=1).tolist()

    for key, kind in (
        ("expert_activation", "probability"),
        ("selection_frequency", "frequency"),
        ("weight_share", "weight"),
    ):
        assert data[key]["layer_indices"] == layers
        if kind in matrices:
            close(data[key]["matrix"], matrices[kind])
            expected = profile.probability_tokens.sum() if kind == "probability" else tokens  # type: ignore[union-attr]
            assert data[key]["num_tokens"] == expected
        else:
            assert data[key]["matrix"] is None
    for slot, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        stats = data["expert_activation"]["per_layer_stats"][str(layer)]
        assert (stats["num_tokens"], stats["num_experts"], stats["var_activation"]) == (tokens, width, None)
        if "probability" in matrices:
            close(stats["avg_activation"], matrices["probability"][slot, :width])
        own = counts[slot, :width]
        load = data["selection_frequency"]["per_layer_stats"][str(layer)]
        assert (load["num_tokens"], load["num_experts"], load["selections"]) == (tokens, width, own.sum())
        assert load["dead_experts"] == (np.flatnonzero(own == 0).tolist() if tokens else [])
        close(load["max_over_mean"], own.max() / own.mean() if tokens else np.nan)

    found = data["layer_correlation"]
    basis = matrices[measure]

    def r(one: int, other: int) -> float:
        if one not in layers or other not in layers:
            return float("nan")
        i, j = layers.index(one), layers.index(other)
        return pearson(basis[i, : widths[i]], basis[j, : widths[j]])

    assert (found["deltas"], found["layer_indices"], found["measure"]) == ([1, 2, 3, 4], layers, measure)
    close(found["correlation_matrix"], [[r(layer, layer + delta) for delta in (1, 2, 3, 4)] for layer in layers])
    pairs = {(i, j) for i in layers for j in layers if 1 <= j - i <= 4}
    assert {(pair["layer_i"], pair["layer_j"]) for pair in found["layer_pairs"]} == pairs
    for pair in found["layer_pairs"]:
        assert pair["delta"] == pair["layer_j"] - pair["layer_i"]
        close(pair["correlation"], r(pair["layer_i"], pair["layer_j"]))

    for delta in (1, 2, 3):
        rs = [value for layer in layers if np.isfinite(value := r(layer, layer + delta))]
        mean = sum(rs) / len(rs) if rs else float("nan")
        spread = (sum((value - mean) ** 2 for value in rs) / len(rs)) ** 0.5 if rs else float("nan")
        word = "strong" if mean > 0.7 else "moderate" if mean > 0.4 else "weak" if rs else "not measurable"
        pattern = data["periodic_patterns"][str(delta)]
        close(pattern["all_correlations"], rs)
        brief = summary["key_findings"]["periodic_patterns"][str(delta)]
        for one in (pattern, brief):
            close([one["mean_correlation"], one["std_correlation"]], [mean, spread])
            assert (one["num_pairs"], one["strength"]) == (len(rs), word)

    findings = summary["key_findings"]
    assert findings["invariant_holds"] is data["metadata"]["invariant_holds"] is True
    assert findings["dead_experts"] == (int(((counts == 0) & ~beyond).sum()) if tokens else 0)
    worst = (
        max(row[:width].max() / row[:width].mean() for row, width in zip(counts, widths, strict=True))
        if tokens
        else None
    )
    close(findings["load_max_over_mean"], worst)

    routers = data["router_similarity"]
    if weights is None:
        assert routers["cosine_similarity_matrix"] is None
        return

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        if a.shape != b.shape:
            return float("nan")
        return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))

    close(routers["cosine_similarity_matrix"], [[cosine(a, b) for b in weights] for a in weights])
    position = {layer: slot for slot, layer in enumerate(layers)}
    norms, rows = np.full((depth, 30), np.nan), np.full((depth, 30), np.nan)
    for layer in layers:
        for delta in range(1, 5):
            if layer + delta in position:
                a, b = weights[position[layer]], weights[position[layer + delta]]
                norms[position[layer], delta - 1] = pearson(np.sqrt((a**2).sum(axis=1)), np.sqrt((b**2).sum(axis=1)))
                if a.shape == b.shape:
                    rows[position[layer], delta - 1] = np.mean([cosine(x, y) for x, y in zip(a, b, strict=True)])
    assert (routers["deltas"], routers["router_layers"]) == ([1, 2, 3, 4], layers)
    close(routers["column_norm_correlation"], norms[:, :4])
    close(routers["row_cosine"], rows[:, :4])


@pytest.mark.parametrize("structured_format", get_args(StructuredFormat))
def test_a_report_in_each_structured_format(structured_format: StructuredFormat, tmp_path: Path) -> None:
    report = analyze(random_profile(3))
    written = write_report(report, tmp_path, structured_format=structured_format)
    name = f"analysis_data{SUFFIXES[structured_format]}"
    assert [path.name for path in written[-2:]] == [name, "analysis_summary.json"]
    assert [file.name for file in tmp_path.glob("analysis_data*")] == [name]
    content = (tmp_path / name).read_bytes()
    expected = analysis_data(report, structured_format)
    if structured_format == "pickle":
        assert pickle.loads(content) == expected
    else:
        lines = [json.loads(line) for line in content.decode().splitlines()]
        assert {key: value for line in lines for key, value in line.items()} == expected
    assert json.loads((tmp_path / "analysis_summary.json").read_text()) == analysis_summary(report)


def test_bare_nan_is_refused() -> None:
    for structured_format in ("json", "jsonl"):
        with pytest.raises(ValueError, match="not JSON compliant"):
            encode({"a": float("nan")}, structured_format)  # type: ignore[arg-type]


def test_correlation_that_was_left_out_says_so() -> None:
    data = analysis_data(analyze(random_profile(3), correlate=False))
    jsonschema.Draft202012Validator(schema("analysis_data")).validate(data)
    found = data["layer_correlation"]
    assert found["reason"] == "correlation and periodic patterns were left out"
    assert {pair["correlation"] for pair in found["layer_pairs"]} == {None}
    assert data["periodic_patterns"] == {}
