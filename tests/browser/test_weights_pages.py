"""The pages of weights: every figure draws, names its axes, and switches its views, in the light and in the dark."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import HOSTILE, Opened, hostile_ran, problems, resize, show_all, visible_text, wait_drawn
from weight_results import weight_change, weight_similarity

from moescope.stats.weight_similarity import WeightChange, WeightSimilarity
from moescope.viz.report import write_report
from moescope.viz.report_data import ReportData
from moescope.viz.weights_report import write_weights

Show = Callable[[Path, int], Opened]
Written = dict[str, dict[str, Path]]

LONG = "organisation/" + "long-name-" * 11
FIGURES = {"weights": 8, "change": 3}
VISIBLE = "document.querySelector('.js-plotly-plot')._fullData.map(trace => trace.visible)"
TITLES = """
figure => [figure._fullLayout.xaxis, figure._fullLayout.yaxis].map(axis => axis.title.text)
"""


def results() -> dict[str, WeightSimilarity | WeightChange]:
    large: dict[str, Any] = {"layers": range(94), "experts": 128, "size": 4, "deltas": (12, 24, 36), "model_id": LONG}
    return {
        "weights": weight_similarity(zero=(1, 2), shared=1.0),
        "permuted": weight_similarity("experts permuted", experts=64, pairs=[(0, 3), (0, 1)], draws=9, alpha=0.1),
        "bare": weight_similarity("unrelated", layers=(4,), match=False),
        "large": weight_similarity(**large, pairs=[(0, 12)], draws=9, alpha=0.1),
        "change": weight_change(zero=(0, 1)),
        "hostile": weight_similarity(model_id=HOSTILE["script"] + HOSTILE["image"]),
        "hostile change": weight_change(model_id=HOSTILE["image"], against_id=HOSTILE["template"]),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The pages of each result, all in one folder: the browser then reads plotly.js, which lies beside them, once."""
    folder = tmp_path_factory.mktemp("weights")
    pages = {}
    for number, (name, result) in enumerate(results().items()):
        files = [file for file in write_weights(result, folder) if file.suffix == ".html"]
        pages[name] = {file.stem: file.rename(folder / f"{number}-{file.name}") for file in files}
    return pages


@pytest.mark.parametrize("width", [1280, 1920])
@pytest.mark.parametrize("name", ["weights", "permuted", "bare", "large", "change", "hostile", "hostile change"])
def test_every_figure_of_the_page_is_drawn_and_legible(written: Written, show: Show, name: str, width: int) -> None:
    opened = show(written[name]["weights"], width)
    assert show_all(opened.page) == FIGURES["change" if "change" in name else "weights"]
    assert problems(opened.page) == []
    assert not hostile_ran(opened.page)
    opened.page.click("#theme")
    wait_drawn(opened.page)
    assert problems(opened.page) == []
    opened.page.click("#theme")
    for titles in opened.page.locator(".js-plotly-plot").evaluate_all(f"figures => figures.map({TITLES})"):
        assert all(titles)
    assert opened.faults == []


@pytest.mark.parametrize("name", ["weights", "large", "change", "bare", "hostile"])
def test_every_figure_by_itself_is_legible_and_each_view_is_shown(written: Written, show: Show, name: str) -> None:
    for stem, page in written[name].items():
        if stem == "weights":
            continue
        opened = show(page, 1280)
        assert wait_drawn(opened.page) == 1
        assert problems(opened.page) == [], stem
        assert all(opened.page.locator(".js-plotly-plot").evaluate(TITLES)), stem
        closed = opened.page.locator(".updatemenu-header")
        views = opened.page.evaluate(
            "(document.querySelector('.js-plotly-plot').layout.updatemenus || [{}])[0].buttons"
        )
        for index in range(len(views or [])) if name == "weights" else ():
            if closed.count():
                closed.click()
            opened.page.locator(".updatemenu-button, .updatemenu-dropdown-button").nth(index).click()
            wait_drawn(opened.page)
            assert opened.page.evaluate(VISIBLE) == views[index]["args"][0]["visible"], stem
            assert problems(opened.page) == [], stem
        resize(opened.page, 1920)
        wait_drawn(opened.page)
        assert problems(opened.page) == [], stem
        assert opened.faults == []


def test_the_page_says_what_was_found_and_views_are_chosen_beside_the_figure(written: Written, show: Show) -> None:
    opened = show(written["weights"]["weights"], 1280)
    show_all(opened.page)
    text = " ".join(visible_text(opened.page).split())
    assert "Same index: in 5 of 21 matched pairs of layers experts keep their index" in text
    assert "Left out, as they have no cosine: layer 2 expert 2 (zero)." in text
    shown = "document.getElementById('figure-expert-layers')._fullData.map(trace => trace.visible)"
    opened.page.select_option("#choose-view-expert-layers", "1")
    opened.page.wait_for_function(f"JSON.stringify({shown}) === '[false,true,false,false,false]'")
    assert opened.faults == []


def test_the_mouse_brings_the_cosine_of_two_experts_and_not_the_circle(written: Written, show: Show) -> None:
    opened = show(written["weights"]["expert_match_matrix"], 1280)
    wait_drawn(opened.page)
    area = opened.page.locator(".nsewdrag").first.bounding_box()
    x, y = (area[start] + area[length] / 16 for start, length in (("x", "width"), ("y", "height")))
    opened.page.mouse.move(x - 3, y)
    opened.page.mouse.move(x, y)
    label = opened.page.locator(".hoverlayer .hovertext")
    label.first.wait_for(timeout=5000)
    assert "experts 0 and 0" in label.first.text_content()
    assert "centred cosine 0." in label.first.text_content()
    opened.page.mouse.move(0, 0)


def test_a_report_holds_the_sections_of_weights(
    make_report: Callable[..., ReportData], tmp_path: Path, show: Show
) -> None:
    report = replace(make_report(sampled=True), weights=weight_similarity())
    write_report(report, tmp_path)
    opened = show(tmp_path / "report.html", 1280)
    assert show_all(opened.page) == 9 + 6
    assert problems(opened.page) == []
    assert "Layers repeat: 5 of 21 matched pairs" in visible_text(opened.page)
    assert opened.faults == []
