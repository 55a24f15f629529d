"""A profile's report: every figure, the summary and the structured data, under their documented names."""

from dataclasses import replace
from pathlib import Path

from moescope.viz.activation import activation_heatmap
from moescope.viz.correlation import correlation_heatmap
from moescope.viz.page import write_page
from moescope.viz.pages import write_bytes, write_figures, write_text
from moescope.viz.periodicity import periodic_bars, periodic_boxes
from moescope.viz.report_data import ReportData
from moescope.viz.report_page import report_page
from moescope.viz.similarity import router_cosine_heatmap, router_norm_heatmap
from moescope.viz.structured import SUFFIXES, StructuredFormat, analysis_data, analysis_summary, encode
from moescope.viz.summary import summary_text
from moescope.viz.surface import activation_surface
from moescope.viz.weights_report import EXPERT_PAGES, expert_figures
from moescope.viz.wording import subject

PAGE_NAME = "report.html"
TRACE_VIEW_NAME = "trace_view.html"
"""A token view that lies beside the report is linked from it."""
CORRELATION_PAGES = (
    "layer_correlation_matrix.html",
    "periodic_pattern_analysis.html",
    "periodic_pattern_analysis_detailed.html",
)
STRUCTURED_NAMES = (*(f"analysis_data{suffix}" for suffix in SUFFIXES.values()), "analysis_summary.json")


def write_report(
    report: ReportData, folder: Path | str, *, structured: bool = True, structured_format: StructuredFormat = "json"
) -> list[Path]:
    """Write the report into a folder, replacing files of an earlier one; each file appears whole or not at all.

    Args:
        report: the results.
        folder: where to write; made if it does not exist.
        structured: whether to write `analysis_data` and `analysis_summary.json` too.
        structured_format: format of `analysis_data`, and so its ending: `.json`, `.jsonl` or `.pkl`.

    Returns:
        The files written, but for `plotly.min.js`, which lies beside them.

    Raises:
        OSError: if the folder cannot be made or written to.
    """
    folder = Path(folder)
    about = subject(report)
    figures = {
        "expert_activation_heatmap.html": activation_heatmap(report.activations, about),
        "layer_correlation_matrix.html": correlation_heatmap(report.correlation, about),
        "periodic_pattern_analysis.html": periodic_bars(report.periodic, about, report.nulls),
        "periodic_pattern_analysis_detailed.html": periodic_boxes(report.periodic, about, report.nulls),
        "router_similarity_matrix.html": router_cosine_heatmap(report.router_similarity, about),
        "router_norm_correlation.html": router_norm_heatmap(report.router_similarity, about),
        "expert_activation_3d.html": activation_surface(report.sample, about),
    }
    if not report.correlated:
        figures = {name: figure for name, figure in figures.items() if name not in CORRELATION_PAGES}
    if report.weights is not None:
        figures |= expert_figures(report.weights)
    texts = {"summary_report.txt": summary_text(report)}
    data = {}
    if structured:
        content = encode(analysis_data(report, structured_format), structured_format)
        data[f"analysis_data{SUFFIXES[structured_format]}"] = content
        data["analysis_summary.json"] = encode(analysis_summary(report), "json", indent=2)

    folder.mkdir(parents=True, exist_ok=True)
    write_figures(figures, folder, report.model_id)
    views = [(TRACE_VIEW_NAME, "Tokens of the trace")] if (folder / TRACE_VIEW_NAME).is_file() else []
    write_page(replace(report_page(report, figures), links=views), folder / PAGE_NAME)
    for name, text in texts.items():
        write_text(folder / name, text)
    for name, content in data.items():
        write_bytes(folder / name, content)
    written = [PAGE_NAME, *figures, *texts, *data]
    for name in {*CORRELATION_PAGES, *EXPERT_PAGES, *STRUCTURED_NAMES}.difference(written):
        (folder / name).unlink(missing_ok=True)  # an earlier report's, which this one leaves out
    return [folder / name for name in written]
