"""The whole report as one page: every figure draws, every control acts, in the light and in the dark."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import HOSTILE, Opened, hostile_ran, problems, resize, show_all, visible_text, wait_drawn
from builders import MODEL, random_profile

from moescope.profiler.profile import LayerInfo
from moescope.viz.analysis import analyze
from moescope.viz.report import write_report
from moescope.viz.report_data import ReportData

Show = Callable[[Path, int], Opened]
Maker = Callable[..., ReportData]

SHAPES: dict[str, dict[str, Any]] = {
    "domains": {"domains": ("code", "prose", "mathematics"), "sampled": True},
    "large": {
        "layers": tuple(range(3, 97)),
        "experts": (256,) * 94,
        "tokens": 60,
        "model_id": "organisation/" + "long-name-" * 11,
        "domains": tuple(f"domain {i}" for i in range(20)),
    },
    "one layer": {"layers": (4,)},
    "bare": {"probabilities": False, "weights": False, "experts": (16,) * 7 + (12,) * 7},
}


@pytest.fixture(scope="module")
def reports(make_report: Maker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ReportData, Path]]:
    folder = tmp_path_factory.mktemp("reports")
    made = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        report = make_report(**shape)
        page = next(file for file in write_report(report, folder) if file.name == "report.html")
        made[name] = (report, page.rename(folder / f"{number}.html"))
    report = analysed()
    page = next(file for file in write_report(report, folder) if file.name == "report.html")
    made["analysed"] = (report, page.rename(folder / "analysed.html"))
    return made


def analysed() -> ReportData:
    """A report with everything that a profile gives: nulls, within groups too, periods, reliability, use of experts."""
    layers = tuple(LayerInfo(index, 8, 2) for index in range(12))
    profile = random_profile(4, model=replace(MODEL, layers=layers, groups=2))
    return analyze(profile, permutations=50)


@pytest.fixture
def opened(reports: dict[str, tuple[ReportData, Path]], show: Show) -> Opened:
    """The page with domains, as it comes up."""
    opened = show(reports["domains"][1], 1280)
    show_all(opened.page)
    return opened


def shown_matrix(opened: Opened, figure: str) -> np.ndarray:
    """What a heatmap shows, as plotly.js holds it."""
    rows = opened.page.evaluate(
        f"Array.from(document.getElementById('{figure}')._fullData[0].z, row => Array.from(row))"
    )
    return np.array([[np.nan if cell is None else cell for cell in row] for row in rows], dtype=float)


@pytest.mark.parametrize("width", [1280, 1920])
@pytest.mark.parametrize("shape", [*SHAPES, "analysed"])
def test_every_figure_is_drawn_and_legible(
    reports: dict[str, tuple[ReportData, Path]], show: Show, shape: str, width: int
) -> None:
    opened = show(reports[shape][1], width)
    assert show_all(opened.page) == (17 if shape == "analysed" else 9)
    assert problems(opened.page) == []
    assert opened.faults == []


def test_the_page_says_what_was_run_and_what_stands_out(opened: Opened) -> None:
    text = " ".join(visible_text(opened.page).split())
    assert "Counts add up: in each of the 14 MoE layers 300 tokens × top-2 selections" in text
    assert "DemoForCausalLM, softmax router" in text
    assert "This is a short run: 300 tokens give 38 selections an expert on average." in text


def test_a_report_that_does_not_add_up_says_so_first(make_report: Maker, tmp_path: Path, show: Show) -> None:
    write_report(make_report(lost=1), tmp_path)
    opened = show(tmp_path / "report.html", 1280)
    assert "Counts do NOT add up in layers 0" in visible_text(opened.page)


def test_the_domain_changes_what_is_shown(opened: Opened, reports: dict[str, tuple[ReportData, Path]]) -> None:
    report = reports["domains"][0]
    for place, view in enumerate(sorted(report.domains, key=lambda view: view.name)):
        opened.page.select_option("#choose-domain", str(place))
        wait_drawn(opened.page)
        expected = view.activation.matrix
        np.testing.assert_allclose(shown_matrix(opened, "figure-activation"), expected, atol=expected.max() / 60000)
        correlation = shown_matrix(opened, "figure-correlation")
        np.testing.assert_allclose(correlation, view.correlation.matrix[:, : correlation.shape[1]], atol=1e-6)
        bars = opened.page.evaluate("Array.from(document.getElementById('figure-periods')._fullData[0].y)")
        np.testing.assert_allclose(bars, [pattern.mean for pattern in view.periodic.patterns], atol=1e-6)
        assert f"Domain: {view.name}" in visible_text(opened.page)
        assert problems(opened.page) == []
    opened.page.select_option("#choose-domain", "")
    wait_drawn(opened.page)
    np.testing.assert_allclose(
        shown_matrix(opened, "figure-activation"), report.activations[0].matrix, rtol=1e-6, equal_nan=True
    )
    assert opened.faults == []


def test_a_layer_is_chosen_and_sorted(opened: Opened, reports: dict[str, tuple[ReportData, Path]]) -> None:
    matrix = reports["domains"][0].activations[0].matrix
    bars = "(name => Array.from(document.getElementById('figure-layer')._fullData[0][name]))"
    opened.page.select_option("#choose-layer", "5")
    wait_drawn(opened.page)
    np.testing.assert_allclose(opened.page.evaluate(f"{bars}('y')"), matrix[5], rtol=1e-6)
    opened.page.select_option("#choose-order", "use")
    wait_drawn(opened.page)
    np.testing.assert_allclose(opened.page.evaluate(f"{bars}('y')"), np.sort(matrix[5])[::-1], rtol=1e-6)
    order = [int(expert) for expert in opened.page.evaluate(f"{bars}('x')")]
    np.testing.assert_array_equal(matrix[5][order], np.sort(matrix[5])[::-1])
    assert opened.faults == []


def test_the_dark_page_is_dark_and_stays_so(opened: Opened, reports: dict[str, tuple[ReportData, Path]]) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = opened.page.evaluate(background)
    opened.page.click("#theme")
    wait_drawn(opened.page)
    assert opened.page.evaluate(background) != light
    paper = "document.getElementById('figure-periods')._fullLayout.paper_bgcolor"
    opened.page.wait_for_function(f"{paper} === '#14171d'")
    scale = opened.page.evaluate("document.getElementById('figure-activation')._fullData[0].colorscale[0][1]")
    assert scale == "#19448e", "the documented gradient stays"
    assert problems(opened.page) == []
    opened.page.reload()
    assert opened.page.evaluate("document.documentElement.dataset.theme") == "dark"
    opened.page.click("#theme")
    assert opened.page.evaluate(background) == light
    assert opened.faults == []


def test_the_page_follows_the_window(opened: Opened) -> None:
    resize(opened.page, 1920)
    wait_drawn(opened.page)
    assert problems(opened.page) == []
    resize(opened.page, 1280)


def test_hostile_names_and_tokens_are_shown_and_do_nothing(make_report: Maker, tmp_path: Path, show: Show) -> None:
    texts = tuple(HOSTILE.values())
    report = make_report(model_id=HOSTILE["script"], domains=(HOSTILE["image"], HOSTILE["bidi"]), sampled=True)
    sample = replace(report.sample, texts=texts[:3])
    write_report(replace(report, sample=sample, remarks=texts), tmp_path)
    opened = show(tmp_path / "report.html", 1280)
    show_all(opened.page)
    opened.page.select_option("#choose-domain", "0")
    wait_drawn(opened.page)
    assert not hostile_ran(opened.page)
    assert problems(opened.page) == []
    assert opened.faults == []


def test_views_are_chosen_beside_the_figure(opened: Opened, reports: dict[str, tuple[ReportData, Path]]) -> None:
    shown = "document.getElementById('figure-activation')._fullData.map(trace => trace.visible)"
    assert opened.page.locator(".updatemenu-button").count() == 0
    opened.page.select_option("#choose-view-activation", "1")
    opened.page.wait_for_function(f"JSON.stringify({shown}) === '[false,true,false]'")
    opened.page.click("#theme")
    wait_drawn(opened.page)
    opened.page.wait_for_function(f"JSON.stringify({shown}) === '[false,true,false]'")
    opened.page.click("#theme")
    opened.page.select_option("#choose-domain", "1")
    assert opened.page.is_disabled("#choose-view-activation"), "a domain is shown in the report's measure"
    assert opened.faults == []


def test_a_comparison_is_one_page(tmp_path: Path, show: Show) -> None:
    from moescope.viz.comparison_data import compare_profiles
    from moescope.viz.comparison_report import write_comparison

    profiles = [random_profile(seed) for seed in (1, 2, 3)]
    write_comparison(compare_profiles(profiles, [HOSTILE["image"], "tuned", HOSTILE["long word"]]), tmp_path)
    for width in (1280, 1920):
        opened = show(tmp_path / "comparison.html", width)
        assert show_all(opened.page) == 4
        assert problems(opened.page) == []
        assert not hostile_ran(opened.page)
        assert opened.faults == []
