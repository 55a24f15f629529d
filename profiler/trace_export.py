"""Traces as tables that other tools read: one row a token, in Parquet or CSV."""

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np

from moescope.profiler.errors import OptionError, OutputError, TraceError
from moescope.profiler.files import atomic_path
from moescope.profiler.profile import PHASES
from moescope.profiler.trace import Trace, TraceRows

TraceFormat = Literal["parquet", "csv"]

#: Rows that are turned into a table at a time.
_ROWS: Final = 1 << 14
_FORMULA: Final = re.compile(r"[\s]*[=+\-@]")


def export_trace(trace: Trace, path: Path, export_format: TraceFormat, *, force: bool = False) -> int:
    """Write a trace as one file; it appears whole or not at all.

    Columns are `request`, `position`, `token`, `domain` and `phase` (as text) and `split`; then, in Parquet,
    `layer_I` for the layer of index I (a list of k expert ids) and, if recorded, `weights_I` (k float32); in CSV,
    `layer_I_J` and `weight_I_J` for the J-th of them.

    Args:
        trace: The trace.
        path: The file.
        export_format: "parquet" or "csv".
        force: Replace a file.

    Returns:
        Rows written.

    Raises:
        OutputError: The file exists or cannot be written.
        OptionError: An unknown format, or Parquet without pyarrow.
        TraceError: The trace is damaged.
    """
    if export_format not in get_args(TraceFormat):
        raise OptionError(
            f"unknown format {export_format!r}; a trace is exported to {' or '.join(get_args(TraceFormat))}"
        )
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a file that can be replaced; choose another name")
    if path.exists() and not force:
        raise OutputError(f"{path} exists; choose another name, or --force to overwrite")
    open_table = _parquet if export_format == "parquet" else _csv
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    rows = 0
    with atomic_path(path) as temporary, open_table(trace, temporary) as write:
        for part in trace.rows(reuse=True):
            for start in range(0, len(part), _ROWS):
                few = part.take(slice(start, start + _ROWS))
                try:
                    write(few)
                except IndexError as error:
                    raise TraceError(f"{trace.folder}: a phase or domain is out of range") from error
                rows += len(few)
    return rows


@contextmanager
def _csv(trace: Trace, path: Path) -> Iterator[Any]:
    about = trace.about
    names = ["request", "position", "token", "domain", "phase", "split"]
    for name in ("layer", "weight") if about.weights else ("layer",):
        names += [f"{name}_{layer.index}_{j}" for layer in about.model.layers for j in range(layer.top_k)]
    # a spreadsheet takes text that begins like a formula for one
    domains = [f"'{name}" if _FORMULA.match(name) else name for name in about.domains]
    used = (np.arange(max(about.model.top_k)) < np.array(about.model.top_k)[:, None]).reshape(-1)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)

        def write(rows: TraceRows) -> None:
            columns: list[list[Any]] = [array.tolist() for array in (rows.request, rows.position, rows.token)]
            columns += [[domains[i] for i in rows.domain], [PHASES[i] for i in rows.phase], rows.split.tolist()]
            parts = [rows.experts] if rows.weights is None else [rows.experts, rows.weights]
            for part in parts:
                columns += part.reshape(len(rows), -1)[:, used].T.tolist()
            writer.writerows(zip(*columns, strict=True))

        yield write


@contextmanager
def _parquet(trace: Trace, path: Path) -> Iterator[Any]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise OptionError("--format parquet needs the package 'pyarrow': pip install 'moescope[parquet]'") from error
    about = trace.about
    ids = arrow.from_numpy_dtype(about.columns["experts"][0])
    text = arrow.dictionary(arrow.int8(), arrow.string())
    types: list[tuple[str, Any]] = [("request", arrow.uint32()), ("position", arrow.uint32()), ("token", arrow.int32())]
    types += [("domain", text), ("phase", text), ("split", arrow.uint8())]
    layers = list(enumerate(about.model.layers))
    types += [(f"layer_{layer.index}", arrow.list_(ids, layer.top_k)) for _, layer in layers]
    if about.weights:
        types += [(f"weights_{layer.index}", arrow.list_(arrow.float32(), layer.top_k)) for _, layer in layers]
    schema = arrow.schema(types)
    domains, phases = arrow.array(about.domains, arrow.string()), arrow.array(PHASES, arrow.string())
    with parquet.ParquetWriter(path, schema) as writer:

        def lists(values: Any, k: int) -> Any:
            return arrow.FixedSizeListArray.from_arrays(arrow.array(np.ascontiguousarray(values).reshape(-1)), k)

        def write(rows: TraceRows) -> None:
            if rows.domain.max() >= len(domains) or rows.phase.max() >= len(phases):
                raise IndexError
            columns = [arrow.array(array) for array in (rows.request, rows.position, rows.token)]
            columns += [
                arrow.DictionaryArray.from_arrays(arrow.array(place.astype(np.int8)), names)
                for place, names in ((rows.domain, domains), (rows.phase, phases))
            ]
            columns.append(arrow.array(rows.split))
            columns += [lists(rows.experts[:, slot, : layer.top_k], layer.top_k) for slot, layer in layers]
            if rows.weights is not None:
                weights = rows.weights.astype(np.float32)
                columns += [lists(weights[:, slot, : layer.top_k], layer.top_k) for slot, layer in layers]
            writer.write_batch(arrow.RecordBatch.from_arrays(columns, schema=schema))

        yield write
