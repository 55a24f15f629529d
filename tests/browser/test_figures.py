"""Every figure of a report, as its reader sees it: drawn, whole, legible, and without a request."""

from collections.abc import Callable
from pathlib import Path

import pytest
from browser import Opened, problems, resize, visible_text, wait_drawn

from moescope.viz.report import write_report
from moescope.viz.report_data import ReportData

Show = Callable[[Path, int], Opened]

SHAPES = {
    "small": {},
    "large, late first layer, long name": {
        "layers": tuple(range(3, 97)),
        "experts": (256,) * 94,
        "tokens": 60,
        "model_id": "organisation/" + "long-name-" * 11,
    },
    "one layer": {"layers": (4,)},
    "mixed experts": {"layers": (1, 3, 5, 9, 10, 11), "experts": (16, 16, 16, 12, 12, 12)},
    "bare": {"probabilities": False, "weights": False},
}
PAGES = (
    "expert_activation_3d",
    "expert_activation_heatmap",
    "layer_correlation_matrix",
    "periodic_pattern_analysis",
    "periodic_pattern_analysis_detailed",
    "router_norm_correlation",
    "router_similarity_matrix",
)
SWITCHED = {"expert_activation_heatmap": 3, "router_norm_correlation": 2}
"""Pages with view buttons, and how many."""

VISIBLE = "document.querySelector('.js-plotly-plot')._fullData.map(trace => trace.visible)"


@pytest.fixture(scope="module")
def reports(
    make_report: Callable[..., ReportData], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Path]]:
    """The pages of each shape, all in one folder: the browser then reads plotly.js, which lies beside them, once."""
    folder = tmp_path_factory.mktemp("reports")
    pages = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        written = [file for file in write_report(make_report(**shape), folder) if file.suffix == ".html"]
        written = [file for file in written if file.name != "report.html"]
        pages[name] = {file.stem: file.rename(folder / f"{number}-{file.name}") for file in written}
    return pages


def test_the_pages_are_those_that_are_written(reports: dict[str, dict[str, Path]]) -> None:
    for pages in reports.values():
        assert sorted(pages) == list(PAGES)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_figure_is_legible_in_a_window_and_in_the_widened_window(
    reports: dict[str, dict[str, Path]], show: Show, shape: str, name: str
) -> None:
    opened = show(reports[shape][name], 1280)
    assert wait_drawn(opened.page) == 1
    assert problems(opened.page) == []
    resize(opened.page, 1920)
    wait_drawn(opened.page)
    assert opened.page.evaluate("document.querySelector('.main-svg').getBoundingClientRect().width") == 1920
    assert problems(opened.page) == []
    assert opened.faults == []


@pytest.mark.parametrize("name", PAGES)
def test_a_figure_is_legible_in_a_wide_window(reports: dict[str, dict[str, Path]], show: Show, name: str) -> None:
    opened = show(reports["small"][name], 1920)
    assert wait_drawn(opened.page) == 1
    assert problems(opened.page) == []
    assert opened.faults == []


@pytest.mark.parametrize("name", SWITCHED)
def test_each_button_shows_its_view(reports: dict[str, dict[str, Path]], show: Show, name: str) -> None:
    opened = show(reports["small"][name], 1280)
    wait_drawn(opened.page)
    buttons = opened.page.locator(".updatemenu-button")
    assert buttons.count() == SWITCHED[name]
    for index in (*range(1, SWITCHED[name]), 0):
        buttons.nth(index).click()
        wait_drawn(opened.page)
        assert opened.page.evaluate(VISIBLE) == [other == index for other in range(SWITCHED[name])]
        assert opened.page.locator(".heatmaplayer image").count() == 1
        bar = " ".join(opened.page.locator(".colorbar .cbtitle tspan").all_text_contents()).split()
        assert " ".join(bar) == buttons.nth(index).text_content().lower()
        assert problems(opened.page) == []
    assert opened.faults == []


def test_a_page_without_a_choice_has_no_buttons(reports: dict[str, dict[str, Path]], show: Show) -> None:
    for name in sorted(set(PAGES) - set(SWITCHED)):
        opened = show(reports["small"][name], 1280)
        wait_drawn(opened.page)
        assert opened.page.locator(".updatemenu-button").count() == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("expert_activation_heatmap", "uniform use 6.250%"),
        ("layer_correlation_matrix", "Pearson r"),
        ("periodic_pattern_analysis", "pairs measurable"),
        ("router_similarity_matrix", "cosine"),
    ],
)
def test_the_mouse_brings_the_values(reports: dict[str, dict[str, Path]], show: Show, name: str, words: str) -> None:
    opened = show(reports["small"][name], 1280)
    wait_drawn(opened.page)
    area = opened.page.locator(".nsewdrag").first.bounding_box()
    x, y = area["x"] + area["width"] / 2, area["y"] + area["height"] * 0.45
    opened.page.mouse.move(x - 3, y)
    opened.page.mouse.move(x, y)
    label = opened.page.locator(".hoverlayer .hovertext")
    label.first.wait_for(timeout=5000)
    assert words in label.first.text_content()
    assert opened.faults == []
    opened.page.mouse.move(0, 0)


@pytest.mark.parametrize("name", ["router_norm_correlation", "router_similarity_matrix"])
def test_a_figure_without_data_says_so(reports: dict[str, dict[str, Path]], show: Show, name: str) -> None:
    opened = show(reports["bare"][name], 1280)
    wait_drawn(opened.page)
    assert "Router weights were not read for this profile." in visible_text(opened.page)
