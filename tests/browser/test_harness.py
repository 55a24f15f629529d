"""The search for problems finds them: pages with a planted one, and pages that only look like it."""

from pathlib import Path
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import pytest
from browser import hostile_ran, open_page, problems, visible_text, wait_drawn

from moescope.viz.pages import write_figure

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

OVERLAPPING = '<p style="position:absolute;top:9px">under</p><h2 style="position:absolute;top:0">over the other</h2>'
HIDING = '<div style="overflow:hidden;width:60px;white-space:nowrap">a line that is too long</div>'
SCROLLING = '<div style="overflow:auto;width:60px;white-space:nowrap">a line that is too long</div>'
SHORTENED = '<div style="overflow:hidden;text-overflow:ellipsis;width:60px;white-space:nowrap">a line too long</div>'


def look(context: "BrowserContext", folder: Path, body: str, width: int = 600) -> tuple[list[str], list[str]]:
    """Problems and faults of a page with this body."""
    file = folder / "page.html"
    file.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:8px">{body}</body>', encoding="utf-8")
    opened = open_page(context, file, width)
    wait_drawn(opened.page)
    found = problems(opened.page)
    opened.page.close()
    return found, opened.faults


def look_at_figure(context: "BrowserContext", folder: Path, figure: go.Figure) -> list[str]:
    """Problems of a page with this figure, on which nothing else may go wrong."""
    write_figure(figure, folder / "figure.html", "Figure")
    opened = open_page(context, folder / "figure.html", 1280)
    assert wait_drawn(opened.page) == 1
    found = problems(opened.page)
    opened.page.close()
    assert opened.faults == []
    return found


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (OVERLAPPING, 'text "over the other" and the text "under" overlap by'),
        (HIDING, 'text "a line that is too long" is cut by what holds it'),
        ('<p style="position:relative;left:-30px">gone left</p>', '"gone left" is cut at the left edge of its window'),
        ('<p style="position:relative;top:-30px">gone up</p>', '"gone up" is cut at the top edge of its window'),
        (f"<p>{'w' * 200}</p>", "wider than its window"),
        (f"<p>{'w' * 200}</p>", "is cut at the right edge of its window"),
        ('<select style="width:70px"><option>a long choice of words</option></select>', "is cut by its select"),
        ('<button>one</button><button style="margin-left:-20px">two</button>', "overlap by"),
        ('<h1>Heading</h1><button style="position:fixed;left:20px;top:30px">Dark</button>', "overlap by"),
    ],
)
def test_a_planted_problem_is_found(context: "BrowserContext", tmp_path: Path, body: str, problem: str) -> None:
    found, faults = look(context, tmp_path, body)
    assert any(problem in sentence for sentence in found), found
    assert faults == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<script>console.error('broken')</script>", "console: broken"),
        ("<script>setTimeout(() => nowhere(), 0)</script>", "uncaught: nowhere is not defined"),
        ('<img src="http://192.0.2.1/a.png">', "request outside: http://192.0.2.1/a.png"),
        ("<script>fetch('https://example.org/').catch(() => 0)</script>", "request outside: https://example.org/"),
        ("<script>new WebSocket('wss://example.org/')</script>", "request outside: wss://example.org/"),
        ('<img src="missing.png">', "request failed: file:"),
        ("<script>alert('hello')</script>", "dialog: hello"),
    ],
)
def test_a_planted_fault_is_reported(context: "BrowserContext", tmp_path: Path, body: str, fault: str) -> None:
    _, faults = look(context, tmp_path, f"<p>text</p>{body}")
    assert any(sentence.startswith(fault) for sentence in faults), faults


@pytest.mark.parametrize(
    "body",
    [
        f"<h1>Heading</h1><p>{'words and <b>bold words</b> ' * 80}</p>",
        '<p style="line-height:1">one <b>two</b><br>three <i>four</i></p>' * 2,
        "<button>one</button> <button>two</button> <select><option>a choice of words</option></select>",
        SCROLLING,
        SHORTENED,
        f'<div style="visibility:hidden">{OVERLAPPING}</div>',
        f"<details><summary>more</summary>{HIDING}</details>",
        f"<table>{'<tr><td>cell</td><td>cell</td></tr>' * 20}</table>",
    ],
)
def test_a_sound_page_has_none(context: "BrowserContext", tmp_path: Path, body: str) -> None:
    assert look(context, tmp_path, body) == ([], [])


def test_problems_of_figures_are_found(context: "BrowserContext", tmp_path: Path) -> None:
    figure = go.Figure(go.Bar(x=["left", "right"], y=[1, 2]))
    figure.add_annotation(text="first note", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    figure.add_annotation(text="second note", x=0.51, y=0.5, xref="paper", yref="paper", showarrow=False)
    figure.add_annotation(text="far out", x=-0.2, y=0.2, xref="paper", yref="paper", showarrow=False)
    figure.update_layout(title_text="A title that does not fit, " * 9)
    found = look_at_figure(context, tmp_path, figure)
    for planted in (
        'The text "first note" and the text "second note" overlap by',
        'The text "far out" is cut at the left edge of its figure',
        "is cut at the right edge of its figure",
    ):
        assert any(planted in sentence for sentence in found), found
    assert len(found) == 3


def test_turned_labels_and_raised_numbers_are_no_problem(context: "BrowserContext", tmp_path: Path) -> None:
    figure = go.Figure(go.Scatter(x=[f"a label of some length {index}" for index in range(40)], y=[1.0, 1e9] * 20))
    figure.update_xaxes(tickangle=-45, automargin=True)
    figure.update_yaxes(type="log", exponentformat="power", title_text="x<sup>2</sup> y<sub>i</sub>")
    assert look_at_figure(context, tmp_path, figure) == []


def test_a_surface_is_drawn(context: "BrowserContext", tmp_path: Path) -> None:
    figure = go.Figure(go.Surface(z=[[0, 1, 2], [1, 2, 3], [2, 3, 5]]))
    assert look_at_figure(context, tmp_path, figure) == []


@pytest.mark.parametrize(
    "body",
    [
        '<div class="plotly-graph-div" style="height:100px"></div>',
        '<div class="js-plotly-plot" style="height:100px"><svg class="main-svg"></svg></div>',
    ],
)
def test_a_figure_that_is_never_drawn_is_waited_for_in_vain(
    context: "BrowserContext", tmp_path: Path, body: str
) -> None:
    from playwright.sync_api import TimeoutError

    (tmp_path / "page.html").write_text(f"<!doctype html>{body}", encoding="utf-8")
    opened = open_page(context, tmp_path / "page.html", 600)
    with pytest.raises(TimeoutError):
        wait_drawn(opened.page, timeout=0.5)
    opened.page.close()


def test_a_script_that_ran_is_noticed(context: "BrowserContext", tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>seen</p><p hidden>unseen</p><script>window.hostile = 1</script>")
    opened = open_page(context, tmp_path / "page.html", 600)
    assert hostile_ran(opened.page)
    assert visible_text(opened.page).split() == ["seen"]
    opened.page.close()
