"""The token view, as its reader uses it: every control acts, tokens of others are only shown, and it stays quick."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import HOSTILE, Opened, hostile_ran, problems, visible_text, wait_drawn
from traces import LAYERS, about, write_batches

from moescope.profiler.profile import LayerInfo
from moescope.profiler.trace import TraceRows
from moescope.profiler.trace_writer import TraceOptions, TraceWriter
from moescope.viz.token_text import visible
from moescope.viz.trace_view import TraceView, view_trace
from moescope.viz.trace_view_page import write_trace_view

Show = Callable[[Path, int], Opened]
TEXTS = (*HOSTILE.values(), "<script>", "</script>", "&", "\n", " the", "")
MOVE = """layer => {
  const slider = document.getElementById('layer');
  slider.value = layer;
  slider.dispatchEvent(new Event('input'));
  return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
}"""


class Texts:
    """A tokenizer that gives each id one of a few texts."""

    def decode(self, ids: list[int]) -> str:
        return "".join(TEXTS[i % len(TEXTS)] for i in ids)


def write_view(folder: Path, *, weights: bool, tokenizer: Any = None) -> tuple[TraceView, Path]:
    write_batches(folder / "t", about(weights=weights), [[2, 0], [5]], tokens=40)
    view = view_trace(folder / "t", tokenizer=tokenizer)
    return view, write_trace_view(view, folder / "view.html")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[TraceView, Path]:
    """Of a model, domains and remarks that are as hostile as the tokens."""
    view, file = write_view(tmp_path_factory.mktemp("view"), weights=True, tokenizer=Texts())
    requests = tuple(replace(one, domain=HOSTILE["image"]) for one in view.requests[2:])
    remarks = tuple(HOSTILE.values())
    view = replace(view, model_id=HOSTILE["title end"], requests=(*view.requests[:2], *requests), remarks=remarks)
    return view, write_trace_view(view, file)


@pytest.fixture
def opened(made: tuple[TraceView, Path], show: Show) -> Iterator[Opened]:
    opened = show(made[1], 1280)
    yield opened
    assert opened.faults == []


def settle(opened: Opened) -> None:
    opened.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def classes(opened: Opened) -> list[set[str]]:
    """Classes of each token that is shown."""
    return [set(found.split()) for found in opened.page.evaluate("[...text.children].map(node => node.className)")]


def test_tokens_are_shown_and_do_nothing(made: tuple[TraceView, Path], opened: Opened) -> None:
    shown = opened.page.evaluate("[...text.children].map(node => node.textContent)")
    assert shown == [visible(TEXTS[token % len(TEXTS)]) or "·" for token in made[0].token[:40].tolist()]
    assert not hostile_ran(opened.page)
    generated = ["generated" in found for found in classes(opened)]
    assert generated == [False] * 3 + [True] * 37


@pytest.mark.parametrize("width", [700, 1280, 1920])
def test_the_page_is_legible(made: tuple[TraceView, Path], show: Show, width: int) -> None:
    opened = show(made[1], width)
    for colour in ("0", "1"):
        opened.page.select_option("#colour", colour)
        opened.page.click("#numbers")
        opened.page.click("#theme")
        wait_drawn(opened.page)
        opened.page.evaluate("window.scrollTo(0, 0)")  # else text lies under the bar on top
        assert problems(opened.page) == []
    assert not hostile_ran(opened.page)
    assert opened.faults == []


def test_the_slider_chooses_the_layer(made: tuple[TraceView, Path], opened: Opened) -> None:
    view = made[0]
    for slot, layer in enumerate(LAYERS):
        opened.page.evaluate(MOVE, slot)
        assert opened.page.inner_text("#layer-name") == f"Layer {layer.index}, {slot + 1} of 3"
        firsts = view.ids[slot, :, 0]
        order = sorted(range(8), key=lambda expert: (-np.count_nonzero(firsts == expert), expert))
        for place, found in enumerate(classes(opened)):
            assert f"c{order.index(firsts[place])}" in found
        rows = opened.page.locator("#token-experts tr:visible")
        assert rows.count() == layer.top_k
        assert view.shares is not None
        for j in range(layer.top_k):
            text = rows.nth(j).inner_text().split()
            assert int(text[0]) == view.ids[slot, 0, j]
            assert float(text[1].rstrip("%")) == pytest.approx(100 * view.shares[slot, 0, j], abs=0.8)


def test_entropy_and_surprisal_are_steps_of_colour(made: tuple[TraceView, Path], opened: Opened) -> None:
    view = made[0]
    assert view.entropy is not None
    opened.page.select_option("#colour", "1")
    settle(opened)
    expected = np.clip(view.entropy[0, :40] / np.log2(3) * 12, 0, 11).astype(int)
    assert [f"s{step}" in found for step, found in zip(expected, classes(opened), strict=True)].count(False) <= 1
    assert opened.page.locator("#legend button:visible").count() == 0
    opened.page.select_option("#colour", "2")
    settle(opened)
    steps = [next(int(name[1:]) for name in found if name[0] == "s") for found in classes(opened)]
    assert np.corrcoef(steps, view.surprisal[0, :40])[0, 1] > 0.95


def test_an_expert_is_highlighted_everywhere(made: tuple[TraceView, Path], opened: Opened) -> None:
    view = made[0]

    def hits(slot: int, expert: int) -> list[bool]:
        return (view.ids[slot, :40, : LAYERS[slot].top_k] == expert).any(axis=1).tolist()

    opened.page.fill("#expert", "4")
    settle(opened)
    assert ["hit" in found for found in classes(opened)] == hits(0, 4)
    assert ["away" in found for found in classes(opened)] == [not hit for hit in hits(0, 4)]
    backgrounds = opened.page.evaluate("[...text.children].map(node => getComputedStyle(node).backgroundColor)")
    assert [colour != "rgba(0, 0, 0, 0)" for colour in backgrounds] == hits(0, 4), "what is not meant loses its colour"
    assert f"Expert 4 of layer 1: {sum(hits(0, 4))} of the request's 40 tokens" in visible_text(opened.page)
    opened.page.evaluate(MOVE, 1)
    assert ["hit" in found for found in classes(opened)] == hits(1, 4)
    opened.page.fill("#expert", "7")
    settle(opened)
    assert opened.page.inner_text("#chosen") == "Layer 3 has experts 0 to 5."
    opened.page.fill("#expert", "")
    opened.page.locator("#legend button").first.click()
    settle(opened)
    assert opened.page.get_attribute("#legend button >> nth=0", "aria-pressed") == "true"
    assert opened.page.evaluate("document.activeElement.parentElement.id") == "legend", "the button keeps the focus"


def test_keys_do_everything(made: tuple[TraceView, Path], opened: Opened) -> None:
    view, page = made[0], opened.page

    def at() -> int:
        settle(opened)
        active = page.get_attribute("#text", "aria-activedescendant")
        assert page.locator("[aria-selected=true]").get_attribute("id") == active
        return int(active.removeprefix("token-"))

    page.focus("#text")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert at() == 3
    assert f"Token id {view.token[3]} · position 3 · generated · layer 1" in page.inner_text("#token")
    page.keyboard.press("ArrowLeft")
    assert at() == 2
    page.keyboard.press("End")
    assert at() == 39
    page.keyboard.press("ArrowUp")
    above = at()
    top = "document.getElementById('token-{}').offsetTop".format
    assert page.evaluate(top(above)) < page.evaluate(top(39))
    page.keyboard.press("Home")
    assert at() == 0
    page.keyboard.press("ArrowDown")
    assert page.evaluate(top(at())) > page.evaluate(top(0))
    page.keyboard.press(".")
    settle(opened)
    assert page.inner_text("#layer-name") == "Layer 3, 2 of 3"
    page.keyboard.press("e")
    settle(opened)
    assert page.input_value("#expert") == str(view.ids[1, at(), 0])
    page.keyboard.press("Escape")
    settle(opened)
    assert page.input_value("#expert") == ""
    page.keyboard.press("c")
    page.keyboard.press("Home")
    settle(opened)
    assert page.input_value("#compare") == "other"
    assert "share" in page.inner_text("#path-says")


def test_the_mouse_shows_and_chooses_a_token(made: tuple[TraceView, Path], opened: Opened) -> None:
    view, page = made[0], opened.page
    page.hover("#token-1")
    assert f"Token id {view.token[1]} · position 1" in page.inner_text("#token-facts")
    page.mouse.move(0, 0)
    assert f"Token id {view.token[0]} · position 0" in page.inner_text("#token-facts")
    page.click("#token-1")
    settle(opened)
    page.mouse.move(0, 0)
    assert f"Token id {view.token[1]} · position 1" in page.inner_text("#token-facts")


def test_two_tokens_share_experts(made: tuple[TraceView, Path], opened: Opened) -> None:
    view, page = made[0], opened.page
    page.click("#mark")
    settle(opened)
    assert "This is the token that was kept" in page.inner_text("#path-says")
    page.focus("#text")
    page.keyboard.press("ArrowRight")
    settle(opened)
    shared = [
        len(set(view.ids[slot, 0, : layer.top_k].tolist()) & set(view.ids[slot, 1, : layer.top_k].tolist()))
        for slot, layer in enumerate(LAYERS)
    ]
    says = page.inner_text("#path-says")
    assert f"share {sum(shared) / 3:.2f} of 2 experts" in says
    assert f"most in layer {LAYERS[int(np.argmax(shared))].index}: {max(shared)}." in says
    assert says in page.get_attribute("#strip", "aria-label")
    page.select_option("#compare", "mean")
    settle(opened)
    taken = [
        np.isin(view.ids[slot, :40, : layer.top_k], view.ids[slot, 1, : layer.top_k]).mean()
        for slot, layer in enumerate(LAYERS)
    ]
    assert f"get {round(100 * np.mean(taken))}% of the request's selections" in page.inner_text("#path-says")
    painted = page.evaluate(
        "strip.getContext('2d').getImageData(0, 0, strip.width, strip.height).data.some(value => value > 0)"
    )
    assert painted


def test_a_request_is_chosen(made: tuple[TraceView, Path], opened: Opened) -> None:
    page = opened.page
    assert page.locator("#request option").all_inner_texts() == [
        "0 · code · 40 tokens",
        "2 · code · 40 tokens",
        '5 · <img src=x onerror="win… · 40 tokens',
    ]
    page.select_option("#request", "2")
    settle(opened)
    assert page.locator("#text > span").first.get_attribute("id") == "token-80"
    assert f"Token id {made[0].token[80]} · position 0" in page.inner_text("#token-facts")


def test_surfaces_hold_the_shares(made: tuple[TraceView, Path], show: Show) -> None:
    view, page = made[0], show(made[1], 700).page  # software draws a small window sooner
    assert view.shares is not None
    page.locator("#surface").scroll_into_view_if_needed()
    page.wait_for_function("document.getElementById('surface').dataset.drawn === '1'")
    grids = page.evaluate("surface.data.map(trace => trace.customdata.map(line => Array.from(line)))")
    assert len(grids) == 3
    for slot, layer in enumerate(LAYERS):
        expected = np.zeros((40, 8))
        np.put_along_axis(
            expected, view.ids[slot, :40, : layer.top_k].astype(int), view.shares[slot, :40, : layer.top_k], axis=1
        )
        np.testing.assert_allclose(grids[slot], expected, atol=0.002)
    assert "Tokens 0 to 39 of request 0 (all); all 3 layers" in page.inner_text("#space-says")
    assert page.inner_text("#space-says") in page.get_attribute("#surface", "aria-label")
    page.select_option("#height", "0")
    page.wait_for_function("surface.data.length === 1")
    np.testing.assert_array_equal(page.evaluate("surface.data[0].z"), view.ids[:, :40, 0])
    assert not hostile_ran(page)


def test_without_weights_and_tokenizer(tmp_path: Path, show: Show) -> None:
    view, file = write_view(tmp_path, weights=False)
    opened = show(file, 1280)
    assert opened.page.inner_text("#token-1") == f"#{view.token[1]}"
    assert opened.page.locator("#colour option").all_inner_texts() == ["expert", "surprisal of experts"]
    assert "the router named first (no weights traced)" in visible_text(opened.page)
    assert problems(opened.page) == []
    assert opened.faults == []


def test_five_thousand_tokens_of_48_layers_stay_quick(tmp_path: Path, show: Show) -> None:
    tokens, depth, k = 5_000, 48, 8
    of = about(tuple(LayerInfo(layer, 128, k) for layer in range(depth)), weights=True)
    rng = np.random.default_rng(1)
    steps = rng.integers(1, 15, (tokens, depth, k))  # at most 126 on: no expert twice
    rows = TraceRows(
        request=np.zeros(tokens, np.uint32),
        position=np.arange(tokens, dtype=np.uint32),
        token=rng.integers(0, 1000, tokens).astype(np.int32),
        domain=np.zeros(tokens, np.uint8),
        phase=(np.arange(tokens) > 4000).astype(np.uint8),
        split=np.zeros(tokens, np.uint8),
        experts=(steps.cumsum(axis=2) % 128).astype(np.uint8),
        weights=rng.random((tokens, depth, k)).astype(np.float16),
    )
    with TraceWriter(of, TraceOptions(tmp_path / "t", weights=True)) as writer:
        writer.admit([0], [tokens])
        writer.append(rows)
        writer.commit(0)
        writer.finish()
    file = write_trace_view(view_trace(tmp_path / "t", tokenizer=Texts()), tmp_path / "view.html")
    assert file.stat().st_size < 10_000_000
    opened = show(file, 1280)
    assert opened.page.locator("#text > span").count() == tokens
    meter = opened.page.context.new_cdp_session(opened.page)
    meter.send("Performance.enable")

    def scripting() -> float:
        metrics = meter.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "ScriptDuration")

    before = scripting()
    for layer in range(1, 21):
        opened.page.evaluate(MOVE, layer)
    assert (scripting() - before) / 20 < 0.1, "seconds of scripting for each step of the slider"
    assert opened.page.inner_text("#layer-name") == "Layer 20, 21 of 48"
    assert opened.faults == []
