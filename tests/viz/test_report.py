"""The written report: files, structured data, summary, and text that tries to break out."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from weight_results import weight_similarity

from moescope.stats.correlation import layer_correlation
from moescope.stats.periodicity import periodic_patterns
from moescope.viz.pages import LIBRARY, write_figure, write_text
from moescope.viz.report import write_report
from moescope.viz.report_data import ReportData
from moescope.viz.structured import analysis_data, analysis_summary, to_strict_json
from moescope.viz.summary import summary_text
from moescope.viz.weights_data import weights_data
from moescope.viz.weights_report import EXPERT_PAGES
from moescope.viz.wording import by_layer, in_bytes, index_ranges, minute, subject

Maker = Callable[..., ReportData]

FIGURES = [
    "expert_activation_heatmap.html",
    "layer_correlation_matrix.html",
    "periodic_pattern_analysis.html",
    "periodic_pattern_analysis_detailed.html",
    "router_similarity_matrix.html",
    "router_norm_correlation.html",
    "expert_activation_3d.html",
]
PAGES = ["report.html", *FIGURES]
TEXTS = ["summary_report.txt", "analysis_data.json", "analysis_summary.json"]
HOSTILE = '</script><script>alert(1)</script><b>&amp; "quoted" $title ${title}'


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=refuse)


class Tags(HTMLParser):
    """Counts tags and collects script sources and the title."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.sources: list[str] = []
        self.title = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)
        self.sources += [value for name, value in attrs if name in {"src", "href"} and value]

    def handle_data(self, data: str) -> None:
        if self.opened and self.opened[-1] == "title" and not self.title:
            self.title = data


def parse(page: Path) -> Tags:
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    return tags


def test_the_documented_files_and_nothing_else(make_report: Maker, tmp_path: Path) -> None:
    written = write_report(make_report(), tmp_path / "new" / "folder")
    assert written == [tmp_path / "new" / "folder" / name for name in PAGES + TEXTS]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted([*PAGES, *TEXTS, LIBRARY])


def test_plotly_lies_once_beside_small_pages_and_nothing_comes_from_elsewhere(
    make_report: Maker, tmp_path: Path
) -> None:
    write_report(make_report(), tmp_path)
    assert (tmp_path / LIBRARY).stat().st_size > 1_000_000
    for name in FIGURES:
        page = tmp_path / name
        assert page.stat().st_size < 100_000
        assert parse(page).sources == ["plotly.min.js"]
        assert "http://" not in page.read_text()
        assert "https://" not in page.read_text()


def test_pages_do_not_offer_to_upload(make_report: Maker, tmp_path: Path) -> None:
    write_report(make_report(), tmp_path)
    for name in FIGURES:
        (config,) = re.findall(r'\{"responsive"[^{}]*\}', (tmp_path / name).read_text())
        assert strict(config) == {"responsive": True, "displaylogo": False, "showSendToCloud": False}


def test_structured_data_can_be_left_out(make_report: Maker, tmp_path: Path) -> None:
    assert [path.name for path in write_report(make_report(), tmp_path, structured=False)] == [*PAGES, TEXTS[0]]
    assert not list(tmp_path.glob("*.json"))


def test_a_second_report_replaces_the_first(make_report: Maker, tmp_path: Path) -> None:
    write_report(make_report(model_id="first"), tmp_path)
    (tmp_path / LIBRARY).write_text("an older version")
    write_report(make_report(model_id="second"), tmp_path)
    assert "second" in (tmp_path / "summary_report.txt").read_text()
    assert "first" not in (tmp_path / "expert_activation_heatmap.html").read_text()
    assert (tmp_path / LIBRARY).stat().st_size > 1_000_000


def test_what_a_second_report_leaves_out_does_not_stay(make_report: Maker, tmp_path: Path) -> None:
    write_report(make_report(), tmp_path, structured_format="jsonl")
    (tmp_path / "notes.html").write_text("the user's own")
    second = write_report(replace(make_report(), correlated=False), tmp_path, structured=False)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in second} | {LIBRARY, "notes.html"}
    assert not {"layer_correlation_matrix.html", "periodic_pattern_analysis.html"} & {path.name for path in second}
    assert "Layer correlation" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "left out" in (tmp_path / "summary_report.txt").read_text(encoding="utf-8")


def test_what_experts_weights_say_is_part_of_the_report(make_report: Maker, tmp_path: Path) -> None:
    weights = weight_similarity()
    plain = write_report(make_report(), tmp_path)
    assert not {file.name for file in plain} & set(EXPERT_PAGES)
    written = write_report(replace(make_report(), weights=weights), tmp_path)
    assert [file.name for file in written] == [*PAGES, *EXPERT_PAGES, *TEXTS]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in EXPERT_PAGES:
        assert f'href="{name}"' in page
    assert "Layers repeat: 5 of 21 matched pairs of layers are related" in page
    data = strict((tmp_path / "analysis_data.json").read_text())
    assert data["expert_similarity"] == weights_data(weights)["expert_similarity"]
    assert write_report(make_report(), tmp_path) == plain
    assert not {path.name for path in tmp_path.iterdir()} & set(EXPERT_PAGES), "they would be of another report"
    assert "Layers repeat" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    bare = strict((tmp_path / "analysis_data.json").read_text())["expert_similarity"]
    assert bare == {"by_distance": None, "reason": "the experts' weights were not read"}


def test_the_same_report_gives_the_same_bytes(make_report: Maker, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_report(make_report(), tmp_path / folder)
    for name in PAGES + TEXTS:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.txt"
    write_text(page, "old")

    def fail(source: Path, target: Path) -> None:
        assert source.parent == tmp_path
        assert source.read_text() == "new"
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(page, "new")
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_hostile_text_stays_text(make_report: Maker, tmp_path: Path) -> None:
    write_report(make_report(model_id=HOSTILE, domain=HOSTILE), tmp_path)
    for name in FIGURES:
        text = (tmp_path / name).read_text()
        assert "<script>alert" not in text
        assert text.count("</script>") == 3
        tags = parse(tmp_path / name)
        assert "b" not in tags.opened
        assert tags.title.endswith(HOSTILE)
        assert "&lt;b&gt;&amp;amp;" in text
    data = strict((tmp_path / "analysis_data.json").read_text())
    assert data["metadata"]["model_info"]["model_id"] == HOSTILE
    assert list(data["metadata"]["tokens_by_domain"]) == [HOSTILE]
    assert HOSTILE in (tmp_path / "summary_report.txt").read_text()


def test_page_title_is_escaped(tmp_path: Path) -> None:
    write_figure(go.Figure(), tmp_path / "page.html", "a </title><i>& b")
    assert "i" not in parse(tmp_path / "page.html").opened
    assert parse(tmp_path / "page.html").title == "a </title><i>& b"


def test_documented_keys(make_report: Maker) -> None:
    report = make_report(layers=(1, 3, 5, 9, 10, 11))
    data = analysis_data(report)
    assert {"metadata", "expert_activation", "layer_correlation", "periodic_patterns", "router_similarity"} <= set(data)
    model = data["metadata"]["model_info"]
    assert model["num_moe_layers"] == 6
    assert model["layer_indices"] == [1, 3, 5, 9, 10, 11]
    assert model["num_experts_per_layer"] == dict.fromkeys(["1", "3", "5", "9", "10", "11"], 16)
    assert model["top_k_per_layer"]["11"] == 2
    assert model["total_tokens_analyzed"] == 300
    assert (data["metadata"]["export_format"], data["metadata"]["include_raw_data"]) == ("json", False)
    assert analysis_data(report, "jsonl")["metadata"]["export_format"] == "jsonl"

    probability = report.activation("probability")
    assert probability is not None
    assert data["expert_activation"]["matrix"] == probability.matrix.tolist()
    stats = data["expert_activation"]["per_layer_stats"]["9"]
    assert set(stats) == {"avg_activation", "var_activation", "num_tokens", "num_experts"}
    assert stats["avg_activation"] == probability.matrix[3].tolist()
    assert (stats["num_tokens"], stats["num_experts"]) == (300, 16)
    assert "reason" not in data["expert_activation"]

    correlation = data["layer_correlation"]
    assert correlation["deltas"] == list(range(1, 31))
    assert correlation["layer_indices"] == [1, 3, 5, 9, 10, 11]
    assert len(correlation["layer_pairs"]) == 15
    pair = next(p for p in correlation["layer_pairs"] if (p["layer_i"], p["layer_j"]) == (3, 10))
    assert pair["delta"] == 7
    assert pair["correlation"] == correlation["correlation_matrix"][1][6] == report.correlation.matrix[1, 6]
    assert correlation["correlation_matrix"][0][0] is None

    pattern = data["periodic_patterns"]["2"]
    assert pattern["num_pairs"] == len(pattern["all_correlations"]) == 3
    assert pattern["mean_correlation"] == pytest.approx(np.mean(pattern["all_correlations"]))
    assert pattern["std_correlation"] == pytest.approx(np.std(pattern["all_correlations"]))
    assert all(pattern["measure"] == "frequency" for pattern in data["periodic_patterns"].values())
    assert correlation["measure"] == data["metadata"]["measure"] == "frequency"

    routers = data["router_similarity"]
    assert routers["router_layers"] == [1, 3, 5, 9, 10, 11]
    assert np.array(routers["cosine_similarity_matrix"]).shape == (6, 6)
    assert len(routers["column_norm_correlation"]) == 6


def test_selection_frequency_has_keys_of_its_own(make_report: Maker) -> None:
    report = make_report()
    data = analysis_data(report)["selection_frequency"]
    assert data["matrix"] == report.activations[0].matrix.tolist()
    assert data["measure"] == "frequency"
    assert data["per_layer_stats"]["0"]["dead_experts"] == [15]
    assert data["per_layer_stats"]["0"]["selections"] == 600


def test_what_was_not_recorded_is_null_with_a_reason(make_report: Maker) -> None:
    data = strict(json.dumps(analysis_data(make_report(probabilities=False, weights=False)), allow_nan=False))
    assert data["expert_activation"]["matrix"] is None
    assert "not recorded" in data["expert_activation"]["reason"]
    assert data["expert_activation"]["per_layer_stats"]["0"]["avg_activation"] is None
    assert data["selection_frequency"]["matrix"] is not None
    assert data["router_similarity"]["cosine_similarity_matrix"] is None
    assert data["router_similarity"]["column_norm_correlation"] is None
    assert data["router_similarity"]["router_layers"] is None
    assert "not read" in data["router_similarity"]["reason"]


def test_padding_and_unmeasured_intervals_are_null(make_report: Maker) -> None:
    report = make_report(layers=(0, 1, 2), experts=(16, 12, 12))
    data = strict(json.dumps(analysis_data(report), allow_nan=False))
    assert data["expert_activation"]["matrix"][1][12:] == [None] * 4
    assert len(data["expert_activation"]["per_layer_stats"]["1"]["avg_activation"]) == 12
    assert data["periodic_patterns"]["2"] == {
        "mean_correlation": None,
        "std_correlation": None,
        "num_pairs": 0,
        "all_correlations": [],
        "strength": "not measurable",
        "measure": "frequency",
    }
    findings = analysis_summary(report)["key_findings"]["periodic_patterns"]
    assert findings["2"]["strength"] == "not measurable"
    assert findings["2"]["mean_correlation"] is None


def test_summary_data(make_report: Maker) -> None:
    report = make_report()
    summary = analysis_summary(report)
    assert summary["model"]["num_moe_layers"] == summary["key_findings"]["num_moe_layers"] == 14
    found = summary["key_findings"]["periodic_patterns"]["12"]
    (pattern,) = report.periodic.patterns
    assert (found["mean_correlation"], found["strength"]) == (pattern.mean, pattern.strength)
    assert summary["key_findings"]["invariant_holds"] is True
    assert summary["key_findings"]["dead_experts"] == 14
    assert analysis_summary(make_report(lost=1))["key_findings"]["invariant_holds"] is False


def test_strict_json() -> None:
    value = {1: np.array([[1.0, np.nan], [np.inf, -0.5]]), "n": np.int64(3), "b": np.bool_(True), "t": (None, "x", 1)}
    assert to_strict_json(value) == {"1": [[1.0, None], [None, -0.5]], "n": 3, "b": True, "t": [None, "x", 1]}
    assert to_strict_json(True) is True
    with pytest.raises(TypeError, match="a set has no JSON form"):
        to_strict_json({1})


def test_summary_says_what_was_measured(make_report: Maker) -> None:
    report = make_report(layers=(3, 4, 5, 7), tokens=1500)
    lines = summary_text(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert "MoE layers      4 (model layers 3-5, 7)" in lines
    assert "experts         16" in lines
    assert "top-k           2" in lines
    assert "engine          transformers, cpu, float32" in lines
    assert "versions        moescope 0.1.0" in lines
    assert any(line.split() == ["decode", "500", "33.3%"] for line in lines)
    assert any(line.split() == ["domain", "code", "1,500", "100.0%"] for line in lines)
    assert "selection counts sum to k·T in every layer: yes" in lines
    for pattern in report.periodic.patterns:
        expected = [str(pattern.delta), f"{pattern.mean:.4f}", f"{pattern.std:.4f}", str(pattern.num_pairs)]
        assert [*expected, pattern.strength] in [line.split() for line in lines]
    assert "dead experts    4 of 64 were never selected" in lines
    highest = max(report.loads, key=lambda load: load.max_over_mean)
    assert any(f"highest {highest.max_over_mean:.2f} in layer {highest.layer}" in line for line in lines)
    assert ["7", "16", f"{report.loads[3].max_over_mean:.2f}", "1", "15"] in [line.split() for line in lines]


def test_summary_of_counts_that_do_not_add_up(make_report: Maker) -> None:
    text = summary_text(make_report(layers=(3, 4), lost=1))
    assert "in every layer: NO" in text
    assert "in every layer: yes" not in text
    assert "layers at fault 3\n" in text


def test_summary_and_report_of_almost_nothing(make_report: Maker, tmp_path: Path) -> None:
    report = make_report(layers=(5,), tokens=0)
    text = summary_text(report)
    assert "no expert was selected: not measurable" in text
    assert "no two MoE layers: not measurable" in text
    write_report(report, tmp_path)
    strict((tmp_path / "analysis_data.json").read_text())
    strict((tmp_path / "analysis_summary.json").read_text())


def test_summary_calls_an_unmeasured_interval_so(make_report: Maker) -> None:
    report = make_report(layers=(0, 1, 2), experts=(16, 12, 12))
    assert ["2", "-", "-", "0", "not", "measurable"] in [line.split() for line in summary_text(report).splitlines()]


def test_summary_keeps_its_width_and_lines_with_any_text(make_report: Maker) -> None:
    lines = summary_text(make_report(model_id="/long" * 80, domain="evil\nlayer 99 " * 20)).splitlines()
    assert max(map(len, lines)) <= 100
    assert not any(line.startswith("layer 99") for line in lines)


def test_everything_names_the_measure_the_correlations_rest_on(make_report: Maker, tmp_path: Path) -> None:
    report = make_report()
    probability = report.activation("probability")
    assert probability is not None
    correlation = layer_correlation(probability)
    report = replace(report, correlation=correlation, periodic=periodic_patterns(correlation, (12,)))
    data = analysis_data(report)
    assert data["metadata"]["measure"] == data["layer_correlation"]["measure"] == "probability"
    assert data["periodic_patterns"]["12"]["measure"] == "probability"
    assert data["layer_correlation"]["correlation_matrix"][0][11] == correlation.matrix[0, 11]
    assert analysis_summary(report)["key_findings"]["measure"] == "probability"
    assert "Periodic patterns in mean router probability" in summary_text(report)
    write_report(report, tmp_path)
    for name in FIGURES[1:4]:
        assert "mean router probability" in (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ((), ""),
        ((4,), "4"),
        ((0, 1, 2, 5), "0-2, 5"),
        (range(3, 61), "3-60"),
        (range(1, 24, 2), "1-23 in steps of 2"),
        ((1, 9), "1, 9"),
    ],
)
def test_index_ranges(indices: tuple[int, ...], text: str) -> None:
    assert index_ranges(indices) == text


def test_numbers_by_layer() -> None:
    assert by_layer((8, 8), (3, 4)) == "8"
    assert by_layer((64, 64, 32), (3, 4, 9)) == "64 (layers 3-4), 32 (layers 9)"
    assert by_layer((), ()) == "-"


def test_subject_keeps_the_end_of_a_long_path(make_report: Maker) -> None:
    line = subject(make_report(model_id="/data" * 40 + "/final-model"))
    assert line.startswith("…")
    assert "/final-model · 14 MoE layers · 16 experts, top-2 · 300 tokens" in line


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_999, "1000.0 kB"),
        (61_064_245_248, "61.1 GB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert in_bytes(count) == words


def test_a_time_to_the_minute_or_as_it_is() -> None:
    assert minute("2026-01-02T03:04:05+01:00") == "2026-01-02 02:04 UTC"
    assert minute("yesterday") == "yesterday"
