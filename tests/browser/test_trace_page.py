"""The page of a trace's tokens: every figure draws, in the light and in the dark, with the text of others in it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from browser import HOSTILE, Opened, hostile_ran, problems, show_all, visible_text, wait_drawn
from traces import about, write_batches

from moescope.profiler.profile import LayerInfo
from moescope.profiler.trace import Trace
from moescope.profiler.trace_sums import sum_trace
from moescope.viz.trace_analysis import analyze_trace
from moescope.viz.trace_report import write_trace_analysis


def test_the_page_is_drawn_and_legible(tmp_path: Path, show: Callable[[Path, int], Opened]) -> None:
    layers = tuple(LayerInfo(index, 16, 2) for index in (0, 1, 2, 3, 7))
    write_batches(tmp_path / "t", about(layers, weights=True), [[0, 1], [2]], tokens=120)
    analysis = analyze_trace(sum_trace(Trace(tmp_path / "t")))
    texts = {int(token): HOSTILE["image"] for token in analysis.vocabulary.tokens[:20]}
    page, _ = write_trace_analysis(replace(analysis, model_id=HOSTILE["script"], texts=texts), tmp_path / "out")
    opened = show(page, 1280)
    assert show_all(opened.page) == 12
    assert problems(opened.page) == []
    assert not hostile_ran(opened.page)
    assert "A token keeps" in visible_text(opened.page)
    opened.page.click("#theme")
    wait_drawn(opened.page)
    assert problems(opened.page) == []
    opened.page.select_option("#choose-view-agreement", "2")
    shown = "document.getElementById('figure-agreement')._fullData.map(trace => trace.visible)"
    opened.page.wait_for_function(f"JSON.stringify({shown}) === '[false,false,true]'")
    assert opened.faults == []
