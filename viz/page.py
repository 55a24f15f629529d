"""One page of several figures that needs no network: sections, a domain selector, a light and a dark look."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from numpy.typing import NDArray

from moescope.viz import theme
from moescope.viz.pages import CONFIG, LIBRARY, provide_library, write_text

LONGEST_OPTION, LONGEST_VIEW = 24, 48
"""Characters of a domain in the bar on top, and of a view beside its figure."""
PACKED_STEPS = 65534
"""Steps of a packed matrix; 65535 stands for a missing cell."""


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """One figure of a page with the sentence that says how to read it.

    Attributes:
        id: name of the section within the page, also its anchor.
        title: heading.
        how: how to read the figure, one or two sentences.
        figure: what to show; its own title is left out.
        height: pixels.
        variants: by domain, patches of the figure's traces and layout; see `packed`.
        of: id of a heatmap section of which this one shows a single layer, or None.
        experts: with `of`: routed experts of each layer.
        layers: with `of`: names of the layers to choose from.
        page: file of the figure by itself, or None.
    """

    id: str
    title: str
    how: str
    figure: go.Figure
    height: int = 480
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    of: str | None = None
    experts: Sequence[int] = ()
    layers: Sequence[str] = ()
    page: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """A whole page; every text may be any text.

    Attributes:
        title: heading, and what the browser's tab shows.
        subject: one line on what was measured.
        verdict: the check that stands on top: whether it is good, or None where that is not the question, and its
            sentence; or None.
        facts: label and value, in order.
        notes: remarks below the facts.
        findings: sentences on what stands out.
        sections: figures in order.
        domains: domains to choose from; empty shows no selector.
        tables: heading, column names and rows of each table at the end; numbers are set right.
        footer: last line.
        links: name and title of pages that lie beside this one.
    """

    title: str
    subject: str
    verdict: tuple[bool | None, str] | None
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    findings: Sequence[str]
    sections: Sequence[Section]
    domains: Sequence[str] = ()
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str | int]]]] = ()
    footer: str = ""
    links: Sequence[tuple[str, str]] = ()


def packed(matrix: NDArray[np.float64]) -> dict[str, Any]:
    """A matrix (rows, columns) in 16 bits a cell: 65,534 steps up to its largest value; NaN is missing.

    Values must not be negative. What is lost is less than a thousandth of a percent of the largest value.
    """
    largest = float(np.nanmax(matrix, initial=0.0))
    scale = largest / PACKED_STEPS if largest > 0 else 1.0
    steps = np.where(np.isfinite(matrix), np.round(np.nan_to_num(matrix) / scale), PACKED_STEPS + 1).astype("<u2")
    return {
        "dtype": "u2",
        "bdata": base64.b64encode(steps.tobytes()).decode("ascii"),
        "shape": f"{matrix.shape[0]}, {matrix.shape[1]}",
        "scale": scale,
        "missing": PACKED_STEPS + 1,
    }


def write_page(page: Page, path: Path) -> None:
    """Write a page; `plotly.min.js` lies once beside all pages of a folder.

    Raises:
        OSError: if the folder cannot be written to.
    """
    provide_library(path.parent)
    write_text(path, page_text(page))


def page_text(page: Page) -> str:
    """The page as HTML."""
    figures = [_spec(section) for section in page.sections]
    data = {
        "figures": figures,
        "domains": list(page.domains),
        "config": CONFIG,
        "dark": theme.DARK_COLOURS,
        "diverging": [colour for _, colour in theme.DIVERGING],
        "dark_diverging": theme.DARK_DIVERGING,
    }
    body = [_head(page), *(_section(section, bool(page.domains)) for section in page.sections)]
    body += [_table(f"table-{place}", *table) for place, table in enumerate(page.tables)]
    return whole_page(
        page.title,
        page.subject,
        controls=_domain_select(page.domains),
        css=asset("report.css"),
        body="\n".join(body),
        footer=page.footer,
        scripts=_SCRIPTS.substitute(data=script_json(data), library=LIBRARY, script=page_script("report.js")),
    )


def whole_page(title: str, subject: str, *, css: str, body: str, footer: str, scripts: str, controls: str = "") -> str:
    """A page in the common frame: a bar with the subject and the button for light and dark, the body, a footer.

    Args:
        title: its title, any text.
        subject: what it is about, any text.
        css: its styles.
        body: HTML between bar and footer.
        footer: any text.
        scripts: HTML of its script elements; one holds `page_script`.
        controls: HTML in the bar, before the button.
    """
    return Template(asset("page.html")).substitute(
        title=escaped(title),
        subject=escaped(subject),
        css=css,
        controls=controls,
        body=body,
        footer=escaped(footer),
        scripts=scripts,
    )


def page_script(name: str) -> str:
    """Text of a page's script, with what all pages share before it."""
    return f"{asset('theme.js')}\n{asset(name)}"


def sentences(texts: Sequence[str]) -> str:
    """A list of sentences, any text, as HTML; nothing without any."""
    items = "\n".join(_ITEM.substitute(text=escaped(text)) for text in texts)
    return _SENTENCES.substitute(items=items) if items else ""


def asset(name: str) -> str:
    """Text of a file that pages are made of."""
    return files("moescope.viz").joinpath("assets", name).read_text(encoding="utf-8")


def escaped(text: str) -> str:
    """Any text for HTML, in element or attribute: markup escaped, what cannot be printed or turns the line, a space."""
    return escape(theme.printable(text))


def script_json(data: Any) -> str:
    """Strict JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _spec(section: Section) -> dict[str, Any]:
    """A section's figure as plotly.js takes it, without its title."""
    figure = go.Figure(section.figure)
    figure.update_layout(title=None, height=section.height, margin_t=24, autosize=True)
    figure.layout.updatemenus = ()
    plain = json.loads(pio.to_json(figure, validate=False))
    spec: dict[str, Any] = {"id": f"figure-{section.id}", "data": plain["data"], "layout": plain["layout"]}
    views = _views(section)
    if views:
        spec["views"] = [{"args": list(button.args)} for button in views]
    if section.variants:
        spec["variants"] = section.variants
    if section.of is not None:
        spec |= {"of": f"figure-{section.of}", "experts": list(section.experts)}
    return spec


def _views(section: Section) -> Sequence[Any]:
    """The buttons of a figure that has several views: on a page they are a selector of its own."""
    return [button for menu in section.figure.layout.updatemenus for button in menu.buttons]


_HEAD = Template("""\
<section id="about">
<h1><bdi>$title</bdi></h1>
$verdict
<dl class="facts">
$facts
</dl>
$notes
</section>
<section id="findings">
<h2>Key findings$scope</h2>
<ul class="findings">
$findings
</ul>
<ul class="contents">
$contents
</ul>
</section>""")
_VERDICT = Template('<p class="badge $kind">$text</p>')
_FACT = Template("<div><dt>$label</dt><dd><bdi>$value</bdi></dd></div>")
_ITEM = Template("<li><bdi>$text</bdi></li>")
_SENTENCES = Template('<ul class="findings">$items</ul>')
_SCRIPTS = Template("""\
<script type="application/json" id="report-data">$data</script>
<script src="$library"></script>
<script>
$script
</script>""")
_LINK = Template('<li><a href="$place">$title</a></li>')
_SECTION = Template("""\
<section id="$id">
<h2>$title</h2>
<p class="how">$how</p>
<div class="section-controls">$controls<span class="shown" data-varies="$varies"></span></div>
<div class="figure" id="figure-$id" style="height:${height}px"></div>
$alone
</section>""")
_ALONE = Template('<p class="alone"><a href="$page">This figure by itself</a></p>')
_SELECT = Template('<label>$label <select id="choose-$id">$options</select></label>')
_OPTION = Template('<option value="$value">$text</option>')
_TABLE = Template("""\
<section id="$id">
<h2>$title</h2>
<table>
<thead><tr>$columns</tr></thead>
<tbody>
$rows
</tbody>
</table>
</section>""")
_ROW = Template("<tr>$cells</tr>")
_CELL = Template("<td$kind><bdi>$text</bdi></td>")


def _head(page: Page) -> str:
    places = [*((f"#{section.id}", section.title) for section in page.sections), *page.links]
    verdict = ""
    if page.verdict is not None:
        good, text = page.verdict
        verdict = _VERDICT.substitute(kind={True: "good", False: "bad", None: "plain"}[good], text=escaped(text))
    return _HEAD.substitute(
        title=escaped(page.title),
        verdict=verdict,
        facts="\n".join(_FACT.substitute(label=escaped(label), value=escaped(value)) for label, value in page.facts),
        notes=sentences(page.notes),
        scope=" (all domains together)" if page.domains else "",
        findings="\n".join(_ITEM.substitute(text=escaped(finding)) for finding in page.findings),
        contents="\n".join(_LINK.substitute(place=escaped(place), title=escaped(title)) for place, title in places),
    )


def _section(section: Section, with_domains: bool) -> str:
    views = [(str(place), button.label) for place, button in enumerate(_views(section))]
    controls = _select(f"view-{section.id}", "View", views) if views else ""
    if section.of is not None:
        layers = [(str(place), name) for place, name in enumerate(section.layers)]
        controls = _select("layer", "Layer", layers) + _select(
            "order", "Order", [("id", "by index"), ("use", "by use")]
        )
    varies = bool(section.variants) or section.of is not None
    return _SECTION.substitute(
        id=section.id,
        title=escaped(section.title),
        how=escaped(section.how),
        controls=controls,
        varies="1" if varies and with_domains else "0",
        height=section.height,
        alone=_ALONE.substitute(page=escaped(section.page)) if section.page else "",
    )


def _domain_select(domains: Sequence[str]) -> str:
    if not domains:
        return ""
    return _select("domain", "Domain", [("", "all"), *((str(place), name) for place, name in enumerate(domains))])


def _select(name: str, label: str, options: Sequence[tuple[str, str]]) -> str:
    most = LONGEST_OPTION if name == "domain" else LONGEST_VIEW
    made = "".join(_OPTION.substitute(value=value, text=escaped(theme.clip(text, most))) for value, text in options)
    return _SELECT.substitute(id=name, label=label, options=made)


def _table(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | int]]) -> str:
    return _TABLE.substitute(
        id=name,
        title=escaped(title),
        columns="".join(Template("<th>$text</th>").substitute(text=escaped(column)) for column in columns),
        rows="\n".join(_ROW.substitute(cells="".join(_cell(value) for value in row)) for row in rows),
    )


def _cell(value: str | int) -> str:
    if isinstance(value, int):
        return _CELL.substitute(kind=' class="number"', text=f"{value:,}")
    return _CELL.substitute(kind="", text=escaped(value))
