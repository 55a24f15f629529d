"""The one place that writes: text and figure pages, whole or not at all."""

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from uuid import uuid4

import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from moescope.viz.theme import printable

LIBRARY = "plotly.min.js"

CONFIG = {"responsive": True, "displaylogo": False, "showSendToCloud": False}
"""plotly.js offers to upload the chart by default; what was measured on someone's prompts stays with them."""

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>html, body { height: 100%; margin: 0; background: white; }</style>
</head>
<body>
$figure
</body>
</html>
""")


def write_figure(figure: go.Figure, path: Path, title: str) -> None:
    """Write a figure as a page that needs no network; `plotly.min.js` lies once beside all pages of a folder.

    Args:
        figure: what to show.
        path: the HTML file; its folder must exist.
        title: title of the page, any text.

    Raises:
        OSError: if the folder cannot be written to.
    """
    provide_library(path.parent)
    write_text(path, _figure_page(figure, title))


def write_figures(figures: Mapping[str, go.Figure], folder: Path, about: str) -> None:
    """Write figures under their names, each a page as `write_figure` makes it.

    Args:
        figures: by the names of their files.
        folder: where to write; it must exist.
        about: what they were measured on, for the titles of the pages.

    Raises:
        OSError: if the folder cannot be written to.
    """
    provide_library(folder)
    for name, figure in figures.items():
        heading = name.removesuffix(".html").replace("_", " ").capitalize()
        write_text(folder / name, _figure_page(figure, f"{heading} · {about}"))


def _figure_page(figure: go.Figure, title: str) -> str:
    div = pio.to_html(
        figure,
        full_html=False,
        include_plotlyjs="directory",
        config=CONFIG,
        div_id="figure",
    )
    return PAGE.substitute(title=escape(printable(title)), figure=div)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename: readers see all of it or nothing.

    Raises:
        OSError: if the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def provide_library(folder: Path) -> None:
    """Put plotly.js into the folder unless this very version is there."""
    library = folder / LIBRARY
    source = get_plotlyjs()
    if not library.is_file() or library.read_bytes() != source.encode():
        write_text(library, source)
