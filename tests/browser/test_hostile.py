"""Text of others in the pages: shown, and nothing but shown."""

import html
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from browser import HOSTILE, Opened, hostile_ran, problems, show_all, visible_text, wait_drawn

from moescope.viz.activation import activation_heatmap
from moescope.viz.pages import write_figure
from moescope.viz.report import write_report
from moescope.viz.report_data import ReportData
from moescope.viz.theme import plain
from moescope.viz.wording import LONGEST_NAME, subject

Show = Callable[[Path, int], Opened]


def shown(text: str) -> str:
    """What stands in a figure for a text: spaces for what cannot be printed, runs of spaces as one."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all pages: the browser then reads plotly.js, which lies beside them, once."""
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_model_name_is_shown_and_does_nothing(
    make_report: Callable[..., ReportData], folder: Path, show: Show, name: str
) -> None:
    text = HOSTILE[name]
    report = make_report(model_id=text)
    write_figure(activation_heatmap(report.activations, subject(report)), folder / "figure.html", f"Figure · {text}")
    opened = show(folder / "figure.html", 1280)
    assert wait_drawn(opened.page) == 1
    assert not hostile_ran(opened.page)
    line = shown(text if len(text) <= LONGEST_NAME else f"…{text[1 - LONGEST_NAME :]}")
    assert f"{line} · 14 MoE layers" in " ".join(visible_text(opened.page).split())
    assert opened.page.title() == f"Figure · {shown(text)}"
    assert problems(opened.page) == []
    assert opened.faults == []


@pytest.mark.parametrize("name", ["image", "entities", "wide word"])
def test_a_long_subject_of_it_is_shortened_and_fits(
    make_report: Callable[..., ReportData], folder: Path, show: Show, name: str
) -> None:
    figure = activation_heatmap(make_report().activations, HOSTILE[name] * 20)
    write_figure(figure, folder / "figure.html", "Figure")
    opened = show(folder / "figure.html", 1280)
    wait_drawn(opened.page)
    assert problems(opened.page) == []
    assert not hostile_ran(opened.page)
    assert opened.faults == []


def test_every_page_of_a_report_holds_it(make_report: Callable[..., ReportData], folder: Path, show: Show) -> None:
    text = HOSTILE["image"] + HOSTILE["script"]
    written = write_report(replace(make_report(model_id=text, domain=text), remarks=(text,)), folder)
    line = f"…{text[1 - LONGEST_NAME :]}"
    assert html.unescape(plain(line)) == line
    for file in (file for file in written if file.suffix == ".html"):
        opened = show(file, 1280)
        if file.name == "report.html":
            assert show_all(opened.page) == 9
            assert shown(text) in " ".join(visible_text(opened.page).split())
        else:
            assert wait_drawn(opened.page) == 1
        assert not hostile_ran(opened.page)
        assert line in visible_text(opened.page)
        assert problems(opened.page) == []
        assert opened.faults == []
