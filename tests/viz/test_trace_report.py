"""What is said and written of a trace's tokens: findings, figures, page, structured data; from real traces."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import about, random_rows

from moescope.profiler.profile import LayerInfo
from moescope.profiler.trace import Trace, TraceRows
from moescope.profiler.trace_sums import sum_trace
from moescope.profiler.trace_writer import TraceOptions, TraceWriter
from moescope.stats.pairwise import finite_mean
from moescope.viz.trace_analysis import TraceAnalysis, analyze_trace
from moescope.viz.trace_findings import trace_findings, trace_notes
from moescope.viz.trace_report import trace_data, trace_figures, write_trace_analysis

HOSTILE = "<b>&amp; %{x} </b></script><script>alert(1)</script>"
LAYERS = tuple(LayerInfo(index, 8, 2) for index in (0, 1, 2, 5))

Edit = Callable[[TraceRows, np.random.Generator], None]


def traced(
    folder: Path,
    layers: tuple[LayerInfo, ...] = LAYERS,
    *,
    lengths: tuple[int, ...] = (400, 300, 500),
    weights: bool = False,
    edit: Edit | None = None,
    **options: Any,
) -> TraceAnalysis:
    """A trace of requests one after the other, routed at random, then edited; and what is made of it."""
    of = about(layers, weights=weights)
    owners = [number for number, length in enumerate(lengths) for _ in range(length)]
    rows = random_rows(of, owners, [place for length in lengths for place in range(length)])
    rows.token[:] = np.random.default_rng(1).integers(0, 20, len(rows))
    if edit is not None:
        edit(rows, np.random.default_rng(2))
    with TraceWriter(of, TraceOptions(folder, weights=weights)) as writer:
        writer.admit(range(len(lengths)), lengths)
        writer.append(rows)
        writer.commit(0)
        writer.finish()
    return analyze_trace(sum_trace(Trace(folder), **options))


def planted(rows: TraceRows, rng: np.random.Generator) -> None:
    """Layer 0 sticks, layer 1 follows the id, layer 5 is layer 0 under other names; the last 100 tokens differ."""
    for t in range(1, len(rows)):
        if rng.random() < 0.7 and rows.request[t] == rows.request[t - 1]:
            rows.experts[t, 0] = rows.experts[t - 1, 0]
    rows.experts[:, 1] = np.stack([rng.permutation(8)[:2] for _ in range(20)])[rows.token]
    rows.experts[:, 3] = rng.permutation(8)[rows.experts[:, 0]]
    rows.experts[-100:, 2] = [6, 7]


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> TraceAnalysis:
    return traced(tmp_path_factory.mktemp("random") / "t", weights=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> TraceAnalysis:
    return traced(tmp_path_factory.mktemp("planted") / "t", edit=planted)


def test_random_routing_is_at_chance_everywhere(random: TraceAnalysis) -> None:
    repeated = random.repetition
    for share in (repeated.kept, repeated.within, repeated.at_lag[3]):
        np.testing.assert_allclose(share, repeated.chance, atol=0.03)
    np.testing.assert_allclose(repeated.run, repeated.run_chance, rtol=0.03)
    assert repeated.top_kept is not None
    assert repeated.top_chance is not None
    np.testing.assert_allclose(repeated.top_kept, repeated.top_chance, atol=0.03)
    assert np.nanmax(np.abs(random.agreement.explained)) < 0.01
    assert np.nanmax(np.abs(random.vocabulary.decided)) < 0.02
    for groups in (random.position, random.time):
        ratio = finite_mean(groups.from_rest, 1)[3:] / finite_mean(groups.rest_floor, 1)[3:]
        assert ratio.max() < 2.5
    text = " ".join(trace_findings(random))
    for words in (
        "No layer tells more of another than chance may",
        "No expert has token ids of its own beyond chance. No id has experts of its own.",
        "The first token of a request is routed",
        "chance: no more than so few tokens bring.",
        "no more than chance may, at any distance",
    ):
        assert words in text
    assert "no more than the order of tokens brings" in trace_findings(random)[-1]
    assert repeated.order_interval[0] < 0 < repeated.order_interval[1]
    assert repeated.request_interval[0] < 0 < repeated.request_interval[1]


def test_what_was_planted_is_found(found: TraceAnalysis) -> None:
    repeated, explained = found.repetition, found.agreement.explained
    assert abs(repeated.kept[0] - 0.78) < 0.03
    assert np.abs(repeated.kept - repeated.within)[1:3].max() < 0.1
    np.testing.assert_allclose([explained[0, 3], explained[3, 0]], 1)
    assert np.nanmax(explained[1:3]) < 0.1
    assert found.vocabulary.decided[1] > 0.99
    assert found.vocabulary.decided[[0, 2, 3]].max() < 0.1
    assert {one.layer for one in found.vocabulary.specific[:8]} == {1}
    late = found.time.from_before[:, 2] - found.time.before_floor[:, 2]
    assert set(np.argsort(-np.nan_to_num(late))[:2].tolist()) == {12, 13}  # the change is half way in the first of them


def test_findings_have_their_numbers_with_chance_beside_them(found: TraceAnalysis) -> None:
    text = " ".join(trace_findings(found))
    repeated, vocabulary = found.repetition, found.vocabulary
    for words in (
        f"A token keeps {repeated.kept.mean():.1%} of the experts of the token before it, mean of 4 layers "
        f"(95% interval "
        f"{repeated.kept_interval[0]:.1%} to {repeated.kept_interval[1]:.1%}), from",
        f"to {repeated.kept.max():.1%} in layer 0; by chance, any two tokens of the trace share "
        f"{repeated.chance.mean():.1%}, two of one request {repeated.within.mean():.1%}.",
        f"An expert stays for {repeated.run.mean():.2f} tokens, by chance {repeated.run_chance.mean():.2f}",
        "Most is told by layer",
        "100.0%. Token by token",
        f"The token id decides {vocabulary.decided.mean():.1%} of which experts are chosen",
        "over the 20 most frequent ids, 100.0% of the tokens",
        f"expert {vocabulary.specific[0].expert} of layer 1",
        "In the longest request (2; 500 tokens), windows of 32 tokens",
    ):
        assert words in text
    assert [note[:35] for note in trace_notes(found)] == ["These are the tokens of 3 requests."]
    assert trace_notes(replace(found, requests=30)) == []


def test_order_that_avoids_repeating_is_not_called_no_order(tmp_path: Path) -> None:
    def alternating(rows: TraceRows, rng: np.random.Generator) -> None:
        rows.experts[:] = (rows.position[:, None, None] % 4) * 2 + np.arange(2, dtype=np.uint32)

    text = " ".join(trace_findings(traced(tmp_path / "t", lengths=(200,) * 4, edit=alternating)))
    assert "A token keeps 0.0%" in text
    assert "leaves no trace" not in text
    assert re.search(r"-2[45]\.\d points .* from standing next to each other", text)


def test_what_few_requests_cannot_say_is_said(tmp_path: Path) -> None:
    text = " ".join(trace_findings(traced(tmp_path / "t", lengths=(300, 200))))
    assert "From so few requests, how sure this is cannot be said" in text
    assert "leaves no trace" not in text


def test_one_position_stands_and_several_stand(tmp_path: Path) -> None:
    def moved(first: int, last: int) -> str:
        def edit(rows: TraceRows, _: np.random.Generator) -> None:
            rows.experts[(rows.position >= first) & (rows.position <= last)] = [6, 7]

        return " ".join(trace_findings(traced(tmp_path / f"{first}", lengths=(8,) * 60, edit=edit)))

    assert "After the first token, position 1 stands furthest from others" in moved(1, 1)
    assert "After the first token, positions 2-3 stand furthest from others" in moved(2, 3)


def test_what_rests_on_a_part_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescope.profiler.trace_sums.ANCHORS", 100)
    analysis = traced(tmp_path / "t", pair_tokens=120, requests=[0, 1])
    few, chosen, pairs, anchors = trace_notes(analysis)
    assert "2 requests" in few
    assert "Requests were chosen by number" in chosen
    assert "120 tokens spread evenly over the trace (17.1%)" in pairs
    assert f"{analysis.anchors:,} tokens drawn at random" in anchors


def test_figures_show_the_results(found: TraceAnalysis) -> None:
    figures = trace_figures(found)
    repeated = found.repetition
    names = [trace.name for trace in figures["repetition"].data]
    assert names == ["the token before", "a random token of the request", "any token of the trace (chance)"]
    np.testing.assert_array_equal(figures["repetition"].data[0].y, repeated.kept)
    np.testing.assert_array_equal(figures["repetition"].data[2].y, repeated.chance)
    np.testing.assert_allclose(figures["lags"].data[0].y, repeated.at_lag.mean(axis=1))
    np.testing.assert_allclose(figures["held"].data[1].y, repeated.held_chance.mean(axis=1))
    np.testing.assert_allclose(figures["agreement"].data[0].z, found.agreement.explained, rtol=1e-6)
    same = figures["agreement"].data[2]
    np.testing.assert_allclose(same.z + same.customdata, found.agreement.overlap, rtol=1e-5)
    assert list(figures["agreement-distance"].data[0].x) == [1, 2, 3, 4, 5]
    assert figures["agreement-distance"].data[0].y[4] == finite_mean(found.agreement.explained[[0], 3], 0)
    np.testing.assert_array_equal(figures["vocabulary"].data[0].y, found.vocabulary.decided)
    assert figures["vocabulary-tokens"].data[0].z.max() > 1
    assert list(figures["settling"].data[0].x)[-1] == "1,200"
    assert figures["settling"].data[0].y[-1] == 0
    position = figures["position"].data[0]
    assert list(position.x)[:4] == ["0", "1", "2-3", "4-7"]
    assert position.x[-1] == "256+"
    beyond = np.maximum(found.position.from_rest - found.position.rest_floor, 0)
    np.testing.assert_allclose(position.z, beyond.T, rtol=1e-6)
    np.testing.assert_allclose(figures["time-lines"].data[0].y, found.time.from_rest.mean(axis=1))
    assert figures["time"].layout.updatemenus[0].buttons[2].label == "Evenness"


@pytest.mark.parametrize(
    ("layers", "lengths"),
    [
        (LAYERS, (1,)),
        ((LayerInfo(3, 4, 1),), (30, 1)),
        ((LayerInfo(0, 2, 2), LayerInfo(1, 2, 1)), (5, 5)),
        ((LayerInfo(0, 1, 1), LayerInfo(1, 8, 3)), (40,)),
        (LAYERS, (1, 1, 1)),
    ],
)
def test_little_is_no_error(tmp_path: Path, layers: tuple[LayerInfo, ...], lengths: tuple[int, ...]) -> None:
    analysis = traced(tmp_path / "t", layers, lengths=lengths, weights=True)
    page, data = write_trace_analysis(analysis, tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert "NaN" not in json.dumps(json.loads(data.read_text(encoding="utf-8"), parse_constant=pytest.fail))
    assert trace_findings(analysis)
    for sentence in trace_findings(analysis):
        assert "nan" not in sentence.split()
    if max(lengths) == 1:
        assert "No token has its predecessor" in text


def test_the_data_are_those_of_the_results(found: TraceAnalysis, tmp_path: Path) -> None:
    page, file = write_trace_analysis(replace(found, texts={int(found.vocabulary.tokens[0]): "\n"}), tmp_path)
    assert (page.name, file.name) == ("trace.html", "trace.json")
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["metadata"]["layer_indices"] == [0, 1, 2, 5]
    assert data["metadata"]["findings"] == trace_findings(found)
    np.testing.assert_allclose(data["repetition"]["share_kept"], found.repetition.kept)
    assert data["repetition"]["top_expert_share_kept"] is None
    assert data["layer_agreement"]["variance_explained"][0][0] is None
    np.testing.assert_allclose(data["layer_agreement"]["variance_explained"][0][1], found.agreement.explained[0, 1])
    assert data["vocabulary"]["texts"][:2] == ["\n", None]
    np.testing.assert_array_equal(data["vocabulary"]["specificity"], found.vocabulary.specificity)
    assert data["settling"]["tokens"][-1] == 1200
    assert data["position"]["starts"] == found.position.starts.tolist()
    assert data["time_series"]["request"] == 2
    assert write_trace_analysis(found, tmp_path, structured=False) == [page]
    assert not file.exists()


def test_every_key_is_described(found: TraceAnalysis) -> None:
    text = (Path(__file__).parents[2] / "docs" / "structured-data.md").read_text(encoding="utf-8")
    described = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text[text.index("## trace") :]))))

    def keys(tree: Any) -> set[str]:
        if isinstance(tree, dict):
            return set(tree).union(*map(keys, tree.values()))
        return set().union(*map(keys, tree)) if isinstance(tree, list) else set()

    assert keys(trace_data(found)) - described - {"metadata"} == set()


def test_a_trace_is_not_written_over(found: TraceAnalysis, tmp_path: Path) -> None:
    traced(tmp_path / "t", lengths=(5,))
    with pytest.raises(ValueError, match="holds a trace"):
        write_trace_analysis(found, tmp_path / "t")
    assert len(Trace(tmp_path / "t")) == 5


def test_names_and_texts_of_others_stay_text(found: TraceAnalysis, tmp_path: Path) -> None:
    texts = {int(token): HOSTILE for token in found.vocabulary.tokens}
    page, _ = write_trace_analysis(replace(found, model_id=HOSTILE, texts=texts), tmp_path)
    assert "<script>alert" not in page.read_text(encoding="utf-8")
    assert trace_data(replace(found, model_id=HOSTILE))["metadata"]["model_id"] == HOSTILE
