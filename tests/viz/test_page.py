"""The report as one page: data packed and unpacked, text that tries to break out, nothing from elsewhere."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import HOSTILE

from moescope.viz import theme
from moescope.viz.page import PACKED_STEPS, packed
from moescope.viz.pages import LIBRARY
from moescope.viz.report import write_report
from moescope.viz.report_data import ReportData
from moescope.viz.report_page import MOST_DOMAINS

Maker = Callable[..., ReportData]
NAN = float("nan")


class Parsed(HTMLParser):
    """Tags, what they refer to, the text of each script, and all other text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.open = ""
        self.text = text
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open == "script":
            self.scripts[-1] += data
        elif self.open != "style":
            self.words.append(data)

    @property
    def data(self) -> Any:
        """The page's data, refusing what strict JSON has no word for."""
        return json.loads(self.scripts[0], parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def written(report: ReportData, folder: Path) -> Parsed:
    write_report(report, folder)
    return Parsed((folder / "report.html").read_text(encoding="utf-8"))


def unpacked(cells: dict[str, Any]) -> np.ndarray:
    """What report.js makes of a packed matrix."""
    assert cells["dtype"] == "u2"
    shape = tuple(map(int, cells["shape"].split(",")))
    steps = np.frombuffer(base64.b64decode(cells["bdata"]), "<u2").reshape(shape)
    return np.where(steps == cells["missing"], NAN, steps * cells["scale"])


@pytest.mark.parametrize(
    "matrix",
    [
        np.random.default_rng(0).dirichlet(np.full(64, 0.1), 30),
        np.array([[0.0, NAN, 0.5], [NAN, NAN, NAN], [1e-7, 0.3, 0.25]]),
        np.zeros((3, 4)),
        np.full((2, 2), NAN),
        np.array([[0.0, NAN]]),
        np.array([[3.5]]),
        np.array([[1e-30, 2e-30]]),
        np.zeros((0, 4)),
    ],
    ids=["drawn", "missing cells", "all zero", "all missing", "zero or missing", "one cell", "small", "no rows"],
)
def test_packing_loses_less_than_a_step(matrix: np.ndarray) -> None:
    cells = json.loads(json.dumps(packed(matrix), allow_nan=False))
    found = unpacked(cells)
    assert found.shape == matrix.shape
    np.testing.assert_array_equal(np.isnan(found), np.isnan(matrix))
    largest = np.nanmax(matrix, initial=0.0)
    step = largest / PACKED_STEPS
    assert np.nanmax(np.abs(found - matrix), initial=0.0) <= step * 0.5000001
    assert np.nanmax(found, initial=0.0) == pytest.approx(largest)
    np.testing.assert_array_equal(found[matrix == 0], 0)


def test_the_page_holds_what_was_measured(make_report: Maker, tmp_path: Path) -> None:
    report = make_report(domains=("code", "prose"), sampled=True, experts=(16,) * 7 + (12,) * 7)
    page = written(report, tmp_path)
    figures = {figure["id"]: figure for figure in page.data["figures"]}
    assert list(figures) == [
        f"figure-{name}"
        for name in ("activation", "layer", "load", "correlation", "periods", "pairs", "routers", "norms", "tokens")
    ]
    assert page.data["domains"] == ["code", "prose"]
    activation = figures["figure-activation"]
    for place, view in enumerate(report.domains):
        found = unpacked(activation["variants"][str(place)]["data"][0]["z"])
        np.testing.assert_allclose(found, view.activation.matrix, atol=np.nanmax(view.activation.matrix) / PACKED_STEPS)
    assert figures["figure-layer"]["of"] == "figure-activation"
    assert figures["figure-layer"]["experts"] == [16] * 7 + [12] * 7
    assert len(figures["figure-tokens"]["data"]) == 14
    assert figures["figure-load"]["data"][0]["x"] == [str(layer) for layer in range(14)]
    assert all("title" not in figure["layout"] or not figure["layout"]["title"] for figure in figures.values())
    ids = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert {f"#{name}" for name in ids} >= {link for link in links if str(link).startswith("#")}
    assert len(ids) == len(set(ids))
    options = [attributes["value"] for tag, attributes in page.tags if tag == "option"]
    assert options[:3] == ["", "0", "1"]


def test_pages_of_figures_by_themselves_are_there(make_report: Maker, tmp_path: Path) -> None:
    page = written(make_report(), tmp_path)
    alone = [str(attributes["href"]) for tag, attributes in page.tags if tag == "a" and attributes["href"][0] != "#"]
    assert len(alone) == 7
    assert all((tmp_path / name).is_file() for name in alone)


@pytest.mark.parametrize(
    "shape",
    [
        {"domains": ("a", "b"), "sampled": True},
        {"tokens": 0},
        {"layers": (5,), "weights": False},
        {"layers": (0, 1, 2), "experts": (16, 12, 12), "probabilities": False},
        {"lost": 1, "domains": tuple(f"d{i}" for i in range(20))},
    ],
    ids=["whole", "no tokens", "one layer", "uneven", "many domains"],
)
def test_data_is_strict_json_and_nothing_comes_from_elsewhere(
    shape: dict[str, Any], make_report: Maker, tmp_path: Path
) -> None:
    report = make_report(**shape)
    page = written(report, tmp_path)
    assert len(page.data["domains"]) == min(MOST_DOMAINS, len(report.domains))
    targets = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert LIBRARY in targets
    local = {file.name for file in tmp_path.iterdir()}
    assert all(target is not None and (target.startswith("#") or target in local) for target in targets)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for word in ("http://", "https://", "url(", "@import", "fetch(", "XMLHttpRequest", "WebSocket", 'src="//'):
        assert word not in text
    assert page.data["config"]["showSendToCloud"] is False


@pytest.mark.parametrize("shift", [0, 9])
def test_hostile_text_stays_text_everywhere(make_report: Maker, tmp_path: Path, shift: int) -> None:
    """Each text of the corpus once as domain, token, remark and finding's neighbour, and some as everything else."""
    texts = tuple(HOSTILE.values())
    texts = texts[shift:] + texts[:shift]
    made = make_report(layers=(0, 1, 2, 3), domains=("a",) * MOST_DOMAINS, sampled=True)
    plain = written(made, tmp_path)
    ids = np.arange(len(texts), dtype=np.int32)
    values = np.full((4, len(texts), 16), 1 / 16, np.float32)
    assert made.sample is not None
    report = replace(
        made,
        model_id=texts[0],
        architecture=texts[1],
        scoring=texts[2],
        engine=texts[3],
        created=texts[4],
        versions={"moescope": texts[5], texts[6]: texts[7]},
        remarks=texts,
        tokens_by_phase={texts[8]: 200, "decode": 100},
        tokens_by_domain=dict.fromkeys(texts, 5),
        domains=tuple(replace(made.domains[0], name=text) for text in texts),
        sample=replace(made.sample, token_ids=ids, texts=texts, probabilities=values),
    )
    page = written(report, tmp_path)
    raw = page.text
    assert raw.count("</script>") == 3
    assert all(character.isprintable() or character == "\n" for character in raw)
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert not [name for _, own in page.tags for name in own if name.startswith("on")]
    assert not [own for _, own in page.tags if str(own.get("href", "")).lower().startswith("javascript")]
    assert page.data["domains"] == sorted(texts[:MOST_DOMAINS]), "data are what they were"
    words = "".join(page.words)
    assert f"Expert routing of {theme.printable(texts[0])}" in words
    assert all(theme.printable(text) in words for text in texts)


def test_the_verdict_stands_on_top(make_report: Maker, tmp_path: Path) -> None:
    for lost, kind, words in (
        (0, "badge good", "Counts add up: in each of the 14 MoE layers 300 tokens × top-2"),
        (1, "badge bad", "Counts do NOT add up in layers 0: trust no number below."),
    ):
        page = written(make_report(lost=lost), tmp_path)
        assert kind in [attributes.get("class") for _, attributes in page.tags]
        assert words in "".join(page.words)


def test_without_a_sample_the_place_says_why(make_report: Maker, tmp_path: Path) -> None:
    page = written(make_report(), tmp_path)
    (figure,) = (figure for figure in page.data["figures"] if figure["id"] == "figure-tokens")
    assert figure["data"] == []
    assert "No tokens were kept beside this profile" in figure["layout"]["annotations"][0]["text"]
