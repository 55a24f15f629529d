"""The statistics as TensorBoard events, written with tensorboard's own records; torch is not needed."""

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moescope.stats.activation import normalised_entropy
from moescope.viz.errors import require
from moescope.viz.report_data import ReportData
from moescope.viz.summary import summary_text

BINS: Final = 30
#: TensorBoard finds event files by `tfevents`; the ending marks those that an export may replace.
SUFFIX: Final = ".moescope"


def write_events(report: ReportData, folder: Path) -> Path:
    """Write one event file into a folder.

    Scalars by layer, the step being the true layer index: `load/max_over_mean`, `load/dead_experts` and
    `load/normalised_entropy`; the histogram `selection_frequency` of each layer over its experts;
    `correlation/mean_r`, the step being Δ in model layers; the summary as text. A value that is not defined is left
    out. The time of every event is that of the recording.

    Args:
        report: the results.
        folder: where to write; it must exist.

    Returns:
        The file.

    Raises:
        ExportError: tensorboard is not installed.
        OSError: the folder cannot be written.
    """
    records = require("tensorboard.summary.writer.record_writer", "tensorboard", "tensorboard")
    event = require("tensorboard.compat.proto.event_pb2", "tensorboard", "tensorboard").Event
    wall_time = _seconds(report.created)
    path = folder / f"events.out.tfevents.{int(wall_time):010}{SUFFIX}"
    with open(path, "wb") as file:
        writer = records.RecordWriter(file)
        writer.write(event(wall_time=wall_time, file_version="brain.Event:2").SerializeToString())
        for step, summary in _summaries(report):
            writer.write(event(wall_time=wall_time, step=step, summary=summary).SerializeToString())
    return path


def _summaries(report: ReportData) -> Iterator[tuple[int, Any]]:
    """Step and summary message of each event."""
    summary = require("tensorboard.compat.proto.summary_pb2", "tensorboard", "tensorboard")

    def scalar(tag: str, value: float) -> Any:
        return summary.Summary(value=[summary.Summary.Value(tag=tag, simple_value=value)])

    frequency = report.activation("frequency")
    entropy = dict(zip(report.layers, normalised_entropy(frequency), strict=True)) if frequency else {}
    for load in report.loads:
        values = {
            "load/max_over_mean": load.max_over_mean,
            "load/dead_experts": float(len(load.dead_experts)) if load.selections else float("nan"),
            "load/normalised_entropy": float(entropy.get(load.layer, np.nan)),
        }
        for tag, value in values.items():
            if np.isfinite(value):
                yield load.layer, scalar(tag, value)
    if frequency:
        for layer, row in zip(frequency.layers, frequency.matrix, strict=True):
            known = row[np.isfinite(row)]
            if known.size:
                histogram = summary.HistogramProto(**_histogram(known))
                value = summary.Summary.Value(tag="selection_frequency", histo=histogram)
                yield layer, summary.Summary(value=[value])
    for delta, column in zip(report.correlation.deltas, report.correlation.matrix.T, strict=True):
        measured = column[np.isfinite(column)]
        if measured.size:
            yield delta, scalar("correlation/mean_r", float(measured.mean()))
    yield 0, _text(summary, "summary", summary_text(report))


def _histogram(values: NDArray[np.float64]) -> dict[str, Any]:
    """Fields of a histogram message over (N,) finite values; equal values share one bucket."""
    low, high = float(values.min()), float(values.max())
    counts, limits = [float(values.size)], [high]
    if low < high:
        found, edges = np.histogram(values, bins=BINS)
        counts, limits = found.astype(np.float64).tolist(), edges[1:].tolist()
    return {
        "min": low,
        "max": high,
        "num": float(values.size),
        "sum": float(values.sum()),
        "sum_squares": float((values**2).sum()),
        "bucket_limit": limits,
        "bucket": counts,
    }


def _text(summary: Any, tag: str, text: str) -> Any:
    """A summary message of the text plug-in, indented so that its Markdown keeps the columns."""
    tensors = require("tensorboard.compat.proto.tensor_pb2", "tensorboard", "tensorboard")
    types = require("tensorboard.compat.proto.types_pb2", "tensorboard", "tensorboard")
    indented = "".join(f"    {line}\n" for line in text.splitlines())
    plugin = summary.SummaryMetadata.PluginData(plugin_name="text")
    tensor = tensors.TensorProto(dtype=types.DT_STRING, string_val=[indented.encode("utf-8", "replace")])
    value = summary.Summary.Value(tag=tag, metadata=summary.SummaryMetadata(plugin_data=plugin), tensor=tensor)
    return summary.Summary(value=[value])


def _seconds(created: str) -> float:
    """Seconds since 1970 of an ISO 8601 time; now if it is none."""
    try:
        return max(datetime.fromisoformat(created).timestamp(), 0.0)
    except ValueError:
        return time.time()
