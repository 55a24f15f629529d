"""What is said and written of weights: findings, pages, files, structured data."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import plotly.graph_objects as go
import pytest
from weight_results import Origin, weight_change, weight_similarity

from moescope.stats.weight_similarity import WeightChange, WeightCoverage, WeightSimilarity
from moescope.viz.page import page_text
from moescope.viz.structured import encode, schema
from moescope.viz.weight_findings import verdict_in_words, weight_findings
from moescope.viz.weights_data import weights_data
from moescope.viz.weights_page import MOST_ROWS, change_page, similarity_page
from moescope.viz.weights_report import EXPERT_PAGES, expert_figures, write_weights

HOSTILE = "<b>&amp; %{x} </b></script><script>alert(1)</script>"
SKETCH = WeightCoverage(30, 120, 1_500_000_000, 6_000_000_000)
ROUTER_PAGES = ["router_similarity_matrix.html", "router_norm_correlation.html"]
NO_ROUTERS = {name: go.Figure() for name in ROUTER_PAGES}
CHANGE_PAGES = ["expert_weight_change.html", "expert_weight_change_by_layer.html", "expert_match_matrix.html"]


def found(result: WeightSimilarity | WeightChange) -> str:
    return " ".join(weight_findings(result))


def test_the_verdict_has_its_number_and_its_null_level() -> None:
    for origin, words in (
        ("stacked", "Same index: in 5 of 21 matched pairs of layers experts keep their index and neurons their order"),
        ("experts permuted", "Experts permuted: in 5 of 21 matched pairs of layers experts are the same in another"),
    ):
        result = weight_similarity(origin)  # type: ignore[arg-type]
        assert result.verdict is not None
        related = [pair for pair in result.verdict.pairs if pair.kind != "none"]
        cosine, level = (np.mean([getattr(pair, name) for pair in related]) for name in ("cosine", "level"))
        text = verdict_in_words(result)
        assert text.startswith(words)
        assert text.endswith(f"mean cosine {cosine:.3f}, null level {level:.3f}.")


def test_no_relation_is_said_with_the_pair_that_came_closest() -> None:
    result = weight_similarity("unrelated")
    assert result.verdict is not None
    best = max(result.verdict.pairs, key=lambda pair: pair.cosine - pair.level)
    text = verdict_in_words(result)
    assert text.startswith(f"None: no relation in 21 matched pairs of layers. The closest, layers {best.first} and")
    assert f"has mean cosine {best.cosine:.3f}; the null level is {best.level:.3f}" in text
    assert "Nothing says that this model is stacked" in found(result)


def test_a_sketch_never_says_yes() -> None:
    related = weight_similarity(coverage=SKETCH)
    assert "This is a sketch: it says where to look; the pass over all weights decides." in verdict_in_words(related)
    assert "Layers seem to repeat" in found(related)
    assert "30 of the 120 weights of each expert (25%): a sketch" in found(related)
    assert "does not rule a relation out" in verdict_in_words(weight_similarity("unrelated", coverage=SKETCH))
    for whole in (weight_similarity(), weight_similarity("unrelated")):
        assert "sketch" not in verdict_in_words(whole) + found(whole)


def test_what_was_not_tested_is_not_claimed() -> None:
    result = weight_similarity(match=False)
    assert "no relation was tested" in verdict_in_words(result)
    assert "was not tested: no pairs of layers were matched" in found(result)
    few = weight_similarity(experts=2)
    assert verdict_in_words(few).startswith("Not measurable")
    assert "cannot be told" in found(few)
    some = weight_similarity(pairs=[(0, 3), (1, 4)])
    assert "2 of 21 pairs of layers were matched" in found(some)
    assert "of 21 pairs of layers were matched" not in found(weight_similarity())


def test_a_period_is_named_only_where_other_distances_were_tested() -> None:
    assert "Δ = 6 (1 of 1 tested), all multiples of 3, as in a model stacked from 3 layers." in found(
        weight_similarity()
    )
    chosen = weight_similarity(pairs=[(0, 3), (1, 4), (0, 6)])
    assert "at Δ = 3 (2 of 2 tested), Δ = 6 (1 of 1 tested)." in found(chosen)
    wide = weight_similarity(layers=range(1, 14), pairs=[(0, 6), (0, 12), (1, 7), (0, 2), (0, 1)])
    assert "Δ = 12 (1 of 1 tested), all multiples of 6 (Δ = 3 not tested)." in found(wide)


def test_a_shared_mean_is_not_taken_for_a_relation() -> None:
    result = weight_similarity("unrelated", shared=1.0)
    raw = result.by_distance[0]
    text = found(result)
    assert raw.mean > 0.3
    assert f"Δ = 1: {raw.mean:+.3f} raw, " in text
    assert "The raw cosine may come from a mean that all experts share; the centred one is what counts." in text
    assert "The raw cosine may come" not in found(weight_similarity("unrelated"))
    nulls = [p.weights.same_index for p in result.matches if p.weights is not None and p.second - p.first == 1]
    spread = np.mean([null.std for null in nulls if null is not None])
    assert f"by chance +0.000 ± {spread:.3f} for one pair (6 pairs of layers)" in text


def test_experts_of_one_layer_that_are_alike_are_named_so() -> None:
    for shared, words in (
        (0.0, "no sign is left"),
        (0.8, "share a part"),
        (3.0, "copied from one dense layer (upcycled)"),
    ):
        result = weight_similarity("unrelated", shared=shared)
        text = next(line for line in weight_findings(result) if line.startswith("Two different experts"))
        assert words in text
        assert f"{np.median(result.within):+.3f} in the median layer" in text
    assert "Two different" not in found(weight_similarity(experts=1))


def test_unusable_experts_are_named() -> None:
    assert "Left out, as they have no cosine: layer 2 expert 5 (zero)." in found(weight_similarity(zero=(1, 5)))
    assert "layer 2 expert 5 (zero)" in found(weight_change(zero=(1, 5)))
    assert "Left out" not in found(weight_similarity())


def test_change_in_words() -> None:
    change = weight_change()
    text = found(change)
    assert "40 of 40 experts have the expert of their own index as partner, in 5 of 5 layers" in text
    row, expert = np.unravel_index(change.relative_change.argmax(), change.relative_change.shape)
    assert f"expert {expert} of layer {change.layers[row]} ({change.relative_change.max() * 100:.3g}%)" in text
    assert f"layer {change.layers[change.relative_change.mean(axis=1).argmax()]} (mean" in text
    gate = np.median(change.part_relative_change[0])
    assert f"gate {gate * 100:.3g}%" in text
    still = weight_change(strength=0.0, match=False)
    assert "No expert has changed: the weights are the same. The routers have not changed." in found(still)
    assert "no layers were matched" in found(still)


@pytest.mark.parametrize("match", [True, False])
def test_a_similarity_is_written_under_its_documented_names(match: bool, tmp_path: Path) -> None:
    written = write_weights(weight_similarity(match=match), tmp_path / "new")
    assert [file.name for file in written] == ["weights.html", *EXPERT_PAGES, *ROUTER_PAGES, "weights.json"]
    assert {file.name for file in written} | {"plotly.min.js"} == {f.name for f in (tmp_path / "new").iterdir()}
    page = (tmp_path / "new" / "weights.html").read_text(encoding="utf-8")
    for name in (*EXPERT_PAGES, *ROUTER_PAGES):
        assert f'href="{name}"' in page


def test_a_later_pass_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    write_weights(weight_similarity(), tmp_path)
    written = write_weights(weight_change(), tmp_path, structured=False)
    assert [file.name for file in written] == ["weights.html", *CHANGE_PAGES]
    left = {file.name for file in tmp_path.iterdir()} - {"plotly.min.js", *ROUTER_PAGES}
    assert left == {file.name for file in written}, "routers may be of a report in the same folder"


def test_the_page_has_the_facts() -> None:
    result = weight_similarity(coverage=SKETCH)
    text = page_text(similarity_page(result, expert_figures(result) | NO_ROUTERS))
    for words in (
        "demo/model (DemoForCausalLM)",
        "7 (model layers 1-7)",
        "gate, up and down of 40 × 1, stored as bfloat16",
        "1.5 GB of 6.0 GB: a sketch, 30 of 120 weights of each expert",
        "cpu, 2 threads",
        "75 s",
        "2026-01-02 03:04 UTC",
        "moescope 0.1.0, numpy 2.0",
        "21 of 21 pairs of layers were matched",
        "Pairs of layers matched: 21 (1% chance of any false alarm over 42 tests)",
    ):
        assert words in text


def test_the_table_has_every_pair_and_no_more_than_fit() -> None:
    result = weight_similarity()
    page = similarity_page(result, expert_figures(result) | NO_ROUTERS)
    ((_, _, rows),) = page.tables
    assert result.verdict is not None
    by_layers = {f"{pair.first} and {pair.second}": pair for pair in result.verdict.pairs}
    assert {row[0] for row in rows} == set(by_layers)
    for row in rows:
        pair = by_layers[str(row[0])]
        assert row[1:4] == (pair.second - pair.first, pair.kind, f"{pair.cosine:.3f}")
        assert row[4:] == (f"{pair.level:.3f}", f"{pair.p_value:.2g}", f"{pair.identity:.0%}")
    many = replace(result.verdict, pairs=result.verdict.pairs * 20)
    page = similarity_page(replace(result, verdict=many), expert_figures(result) | NO_ROUTERS)
    ((title, _, rows),) = page.tables
    assert len(rows) == MOST_ROWS
    assert title.startswith("Pairs of layers matched: the clearest 200 of 420")
    bare = weight_similarity(match=False)
    assert not similarity_page(bare, expert_figures(bare) | NO_ROUTERS).tables


def test_a_change_has_no_distance_in_its_table() -> None:
    change = weight_change()
    figures = dict.fromkeys(CHANGE_PAGES, go.Figure())
    page = change_page(change, figures)
    ((_, columns, rows),) = page.tables
    assert columns == ("layer", "relation", "mean cosine", "null level", "p, corrected", "own index")
    assert sorted(row[0] for row in rows) == list(change.layers)
    assert page.verdict == (True, verdict_in_words(change))
    assert change_page(weight_change(match=False), figures).verdict is None
    unmeasured = change_page(weight_change(experts=2), figures).verdict
    assert unmeasured is not None
    assert unmeasured[0] is None


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    for result in (weight_similarity(model_id=HOSTILE), weight_change(model_id=HOSTILE, against_id=HOSTILE)):
        for file in write_weights(result, tmp_path):
            if file.suffix == ".html":
                assert "<script>alert" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "result",
    [
        weight_similarity(zero=(1, 2)),
        weight_similarity(match=False, coverage=SKETCH),
        weight_similarity(layers=(4,)),
        weight_similarity(experts=2),
        weight_change(zero=(0, 1)),
        weight_change(match=False),
    ],
)
def test_structured_data_fit_the_schema(result: WeightSimilarity | WeightChange) -> None:
    published = schema("weights")
    jsonschema.Draft202012Validator.check_schema(published)
    data = json.loads(encode(weights_data(result), "json"), parse_constant=pytest.fail)
    jsonschema.Draft202012Validator(published).validate(data)


def test_the_schema_is_strict() -> None:
    validator = jsonschema.Draft202012Validator(schema("weights"))
    for result in (weight_similarity(), weight_change()):
        for path in (("metadata",), (), *((part,) for part in weights_data(result))):
            for change in ("add", "drop"):
                data = weights_data(result)
                node = data
                for key in path:
                    node = node[key]
                if change == "add":
                    node["x"] = 1
                else:
                    node.popitem()
                assert not validator.is_valid(data), (path, change)


def test_reports_and_weights_share_their_definitions() -> None:
    one, two = schema("analysis_data")["$defs"], schema("weights")["$defs"]
    shared = set(one) & set(two)
    assert {"expert_similarity", "match", "weight_verdict"} <= shared
    for name in shared:
        assert one[name] == two[name], name


def test_structured_numbers_are_those_of_the_result() -> None:
    result = weight_similarity(zero=(1, 2), shared=1.0)
    data = weights_data(result)["expert_similarity"]
    assert data["layer_indices"] == list(result.layers)
    assert set(data["by_distance"]) == {"1", "3"}
    raw = result.by_distance[1]
    entry = data["by_distance"]["3"]
    assert (entry["mean_cosine"], entry["median_cosine"], entry["num_pairs"]) == (raw.mean, raw.median, raw.num_pairs)
    np.testing.assert_array_equal(np.array(entry["cosine"], dtype=float), raw.cosine)
    np.testing.assert_allclose(
        np.array(data["layer_similarity"]["part_centred_cosine"]["up"], dtype=float),
        np.nanmean(result.same_index.part_centred[1], axis=0),
    )
    np.testing.assert_array_equal(data["within_layer_cosine"], result.within)
    np.testing.assert_array_equal(np.array(data["norms"], dtype=float), result.same_index.norms.T)
    assert data["unusable_experts"] == [{"layer": 2, "expert": 2, "fault": "zero"}]
    assert result.verdict is not None
    assert data["verdict"]["num_related"] == result.verdict.related
    for found_pair, judged, pair in zip(data["matches"], result.verdict.pairs, result.matches, strict=True):
        assert (found_pair["layer_i"], found_pair["layer_j"]) == (pair.first, pair.second)
        assert (found_pair["kind"], found_pair["null_level"]) == (judged.kind, judged.level)
        assert pair.weights is not None
        partners = [None if expert < 0 else expert for expert in pair.weights.partner]
        assert found_pair["weights"]["partner"] == partners
        assert found_pair["neuron_order_free_features"] is None
    change = weight_change()
    tree = weights_data(change)["expert_change"]
    np.testing.assert_array_equal(tree["part_relative_change"]["down"], change.part_relative_change[2])
    np.testing.assert_array_equal(tree["router_cosine"], change.router_cosine)


def test_of_many_distances_the_highest_are_named() -> None:
    result = weight_similarity(deltas=range(1, 7), match=False)
    (sentence,) = [found for found in weight_findings(result) if found.startswith("Same expert")]
    named = [int(part.split(":")[0]) for part in sentence.split("Δ = ")[1:]]
    assert len(named) == 4
    assert named == sorted(named)
    assert {3, 6} <= set(named)
    assert sentence.endswith("; lower at the other 2 distances.")
    assert sentence not in weight_findings(result, by_distance=False)


@pytest.mark.parametrize(("origin", "expected"), [("stacked", [3, 6]), ("unrelated", [None])])
def test_distances_no_higher_than_chance_are_not_named(origin: Origin, expected: list[int | None]) -> None:
    result = weight_similarity(origin, deltas=range(1, 7), size=4000)
    (sentence,) = [found for found in weight_findings(result) if found.startswith("Same expert")]
    named = [int(part.split(":")[0]) for part in sentence.split("Δ = ")[1:]]
    assert len(named) == len(expected)
    assert named == expected or expected == [None]
    assert sentence.endswith(f"; lower at the other {6 - len(named)} distances.")
