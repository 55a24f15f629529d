"""What a pass over weights has found: the page, every figure, the structured data, under their documented names."""

from pathlib import Path

import plotly.graph_objects as go

from moescope.stats.weight_similarity import WeightChange, WeightSimilarity
from moescope.viz.page import Page, write_page
from moescope.viz.pages import write_bytes, write_figures
from moescope.viz.similarity import router_cosine_heatmap, router_norm_heatmap
from moescope.viz.structured import encode
from moescope.viz.weight_change import change_heatmap, change_lines
from moescope.viz.weights import (
    expert_histogram,
    expert_layer_heatmap,
    expert_scatter,
    match_heatmap,
)
from moescope.viz.weights_data import weights_data
from moescope.viz.weights_page import change_page, similarity_page, weights_subject

PAGE_NAME = "weights.html"
DATA_NAME = "weights.json"
EXPERT_PAGES = (
    "expert_weight_similarity.html",
    "expert_weight_similarity_scatter.html",
    "expert_layer_similarity.html",
    "expert_match_matrix.html",
)
CHANGE_PAGES = ("expert_weight_change.html", "expert_weight_change_by_layer.html", "expert_match_matrix.html")


def write_weights(result: WeightSimilarity | WeightChange, folder: Path | str, structured: bool = True) -> list[Path]:
    """Write the results into a folder, replacing files of an earlier pass; each file appears whole or not at all.

    Args:
        result: the results: layers of one checkpoint against each other, or a checkpoint against another.
        folder: where to write; made if it does not exist.
        structured: whether to write `weights.json` too.

    Returns:
        The files written, but for `plotly.min.js`, which lies beside them.

    Raises:
        OSError: if the folder cannot be made or written to.
    """
    folder = Path(folder)
    figures, page, about = _change(result) if isinstance(result, WeightChange) else _similarity(result)
    data = {DATA_NAME: encode(weights_data(result), "json")} if structured else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_figures(figures, folder, about)
    write_page(page, folder / PAGE_NAME)
    for name, content in data.items():
        write_bytes(folder / name, content)
    written = [PAGE_NAME, *figures, *data]
    for name in {*EXPERT_PAGES, *CHANGE_PAGES, DATA_NAME}.difference(written):
        (folder / name).unlink(missing_ok=True)  # an earlier pass's, which this one leaves out
    return [folder / name for name in written]


def expert_figures(result: WeightSimilarity) -> dict[str, go.Figure]:
    """The figures of experts by the names of their files, as a report of a profile has them, too."""
    subject = weights_subject(result)
    figures = (
        expert_histogram(result, subject),
        expert_scatter(result, subject),
        expert_layer_heatmap(result, subject),
        match_heatmap(result.matches, result.verdict, subject),
    )
    return dict(zip(EXPERT_PAGES, figures, strict=True))


def _similarity(result: WeightSimilarity) -> tuple[dict[str, go.Figure], Page, str]:
    """Figures by file, the page, and what both are about."""
    subject = weights_subject(result)
    figures = expert_figures(result) | {
        "router_similarity_matrix.html": router_cosine_heatmap(result.routers, subject),
        "router_norm_correlation.html": router_norm_heatmap(result.routers, subject),
    }
    return figures, similarity_page(result, figures), result.model_id


def _change(change: WeightChange) -> tuple[dict[str, go.Figure], Page, str]:
    """Figures by file, the page, and what both are about."""
    subject = weights_subject(change)
    figures = (
        change_heatmap(change, subject),
        change_lines(change, subject),
        match_heatmap(
            change.matches, change.verdict, subject, "Expert of the checkpoint held against", "Expert of the model"
        ),
    )
    named = dict(zip(CHANGE_PAGES, figures, strict=True))
    return named, change_page(change, named), f"{change.model_id} against {change.against_id}"
