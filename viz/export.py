"""A profile in the formats that other tools read: structured data, tables, TensorBoard, load balancers, and more."""

import csv
import gc
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args
from uuid import uuid4

import numpy as np

from moescope.stats.activation import Measure
from moescope.stats.use import LEAST_TOKENS
from moescope.stats.weight_similarity import WeightSimilarity
from moescope.viz.analysis import analyze
from moescope.viz.errors import ExportError, require
from moescope.viz.events import SUFFIX, write_events
from moescope.viz.expert_load import eplb, sglang
from moescope.viz.parity import parity_data
from moescope.viz.report_data import ReportData
from moescope.viz.structured import SUFFIXES, StructuredFormat, analysis_data, encode
from moescope.viz.tables import NAMES, Table, calibration, metadata, pruning, tables

if TYPE_CHECKING:  # the hand-over type only; viz never reads files or runs models
    from moescope.profiler.profile import RoutingProfile
    from moescope.profiler.sidecars import RouterTables

ExportFormat = Literal[
    "json",
    "jsonl",
    "pickle",
    "csv",
    "xlsx",
    "parquet",
    "parity",
    "tensorboard",
    "eplb",
    "sglang",
    "pruning",
    "calibration",
]

#: Formats written as a folder, with the names in it that a later export may replace or remove.
FOLDERS: Final[dict[ExportFormat, Callable[[str], bool]]] = {
    "csv": lambda name: name in {f"{table}.csv" for table in NAMES},
    "parquet": lambda name: name in {f"{table}.parquet" for table in NAMES},
    "tensorboard": lambda name: name.startswith("events.out.tfevents.") and name.endswith(SUFFIX),
}

#: Formats that hold tables, p-values among them.
_TABLES: Final = ("csv", "xlsx", "parquet")
#: Formats that need no statistics of the whole profile.
_COUNTS_ALONE: Final = ("eplb", "sglang", "pruning", "calibration")

SHEET_ROWS: Final = 1_048_576
SHEET_TEXT: Final = 32_767
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n")
#: What XML 1.0 cannot hold.
_FORBIDDEN: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: the file or folder.
        left_out: name of each table that does not fit the format, and why.
    """

    path: Path
    left_out: tuple[tuple[str, str], ...] = ()


def export(
    profile: "RoutingProfile",
    path: Path | str,
    export_format: ExportFormat,
    *,
    force: bool = False,
    measure: Measure | None = None,
    intervals: Sequence[int] | None = None,
    delta_max: int = 30,
    permutations: int | None = None,
    routed_scaling_factor: float | None = None,
    routers: "RouterTables | None" = None,
    weights: WeightSimilarity | None = None,
    least_tokens: int | None = None,
) -> Exported:
    """Write a profile and its statistics in another format; the output appears whole or not at all.

    `json`, `jsonl`, `pickle` and `parity` are one file, `xlsx` a file with a sheet for each table; `csv` and
    `parquet` are a folder with a file for each table, `tensorboard` a folder with an event file. What load
    balancers, pruning and quantisation take is one file: `eplb` safetensors, `sglang` JSON, `pruning` and `calibration`
    csv; see `moescope.viz.expert_load` and `moescope.viz.tables`.

    Args:
        profile: A checked profile.
        path: The file or folder; folders above it are made.
        export_format: One of `ExportFormat`.
        force: Replace a file; replace, in a folder that is not empty, the files of an earlier export.
        measure: What correlation and periodic patterns rest on; None is the selection frequency.
        intervals: Distances Δ of the periodic patterns; None takes the defaults.
        delta_max: Largest Δ of the correlation matrix.
        permutations: See `analyze`; for the structured data and the tables alone.
        routed_scaling_factor: See `parity_data`; for that format alone.
        routers: Router weights that were compared, for the structured data; see `moescope.profiler.sidecars`.
        weights: What the experts' weights say, for the structured data.
        least_tokens: Tokens that an expert should see; for `calibration` alone; None is `LEAST_TOKENS`.

    Raises:
        ExportError: The output exists, an optional package is missing, the profile does not hold what is asked for,
            an option does not apply to the format, or the output cannot be written.
    """
    path = Path(path)
    if export_format not in get_args(ExportFormat):
        raise ExportError(f"unknown format {export_format!r}; there are {', '.join(get_args(ExportFormat))}")
    if routed_scaling_factor is not None and export_format != "parity":
        raise ExportError(f"--routed-scaling-factor belongs to --format parity, not to {export_format}")
    if measure is not None and export_format == "parity":
        raise ExportError("--measure does not apply to --format parity, whose measure is the earlier tool's")
    tested = export_format in SUFFIXES or export_format in _TABLES
    if permutations is not None and not tested:
        raise ExportError(f"--permutations belongs to structured data and tables, not to --format {export_format}")
    if measure is not None and export_format in _COUNTS_ALONE:
        raise ExportError(f"--measure does not apply to --format {export_format}, which rests on selection counts")
    if least_tokens is not None and export_format != "calibration":
        raise ExportError(f"--least-tokens belongs to --format calibration, not to {export_format}")
    if least_tokens is not None and least_tokens < 1:
        raise ExportError(f"--least-tokens must be 1 or more, not {least_tokens}")
    check_target(path, export_format, force=force)

    if export_format in _COUNTS_ALONE:
        with _whole(path) as temporary:
            match export_format:
                case "eplb":
                    temporary.write_bytes(eplb(profile))
                case "sglang":
                    temporary.write_bytes(sglang(profile))
                case "pruning":
                    _write_csv(pruning(profile), temporary)
                case "calibration":
                    _write_csv(calibration(profile, least_tokens or LEAST_TOKENS), temporary)
        return Exported(path)
    if export_format == "parity":
        data = parity_data(
            profile,
            intervals=intervals,
            delta_max=delta_max,
            routed_scaling_factor=routed_scaling_factor,
            routers=routers,
        )
        with _whole(path) as temporary:
            temporary.write_bytes(encode(data, "json"))
        return Exported(path)
    try:
        report = analyze(
            profile,
            measure=measure or "frequency",
            intervals=intervals,
            delta_max=delta_max,
            routers=routers,
            weights=weights,
            permutations=permutations if tested else 0,
        )
    except ValueError as error:
        raise ExportError(f"--measure {measure}: {error}") from error
    with _whole(path, FOLDERS.get(export_format)) as temporary:
        match export_format:
            case "csv":
                for table in tables(profile, report):
                    _write_csv(table, temporary / f"{table.name}.csv")
            case "parquet":
                for table in tables(profile, report):
                    _write_parquet(table, temporary / f"{table.name}.parquet")
            case "xlsx":
                return Exported(path, _write_workbook(tables(profile, report), report, temporary))
            case "tensorboard":
                write_events(report, temporary)
            case "json" | "jsonl" | "pickle":
                temporary.write_bytes(_structured(report, export_format))
    return Exported(path)


def check_target(path: Path, export_format: ExportFormat, *, force: bool = False) -> None:
    """Refuse an output that would overwrite something, before any work is done.

    Raises:
        ExportError: it exists and `force` is false, or it is a folder where a file is to be written, or the reverse.
    """
    folder = export_format in FOLDERS
    if folder and path.exists() and not path.is_dir():
        raise ExportError(f"{path} is a file; --format {export_format} writes a folder, choose another name")
    if not folder and path.exists() and not path.is_file():
        raise ExportError(f"{path} is not a file that can be replaced; choose another name")
    if force or not path.exists():
        return
    if folder and any(path.iterdir()):
        raise ExportError(f"{path} exists and is not empty; choose another folder, or --force to replace its tables")
    if not folder:
        raise ExportError(f"{path} exists; choose another name, or --force to overwrite")


def harmless(text: str) -> str:
    """Text that no spreadsheet takes for a formula: an apostrophe before what begins like one."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _structured(report: ReportData, export_format: StructuredFormat) -> bytes:
    return encode(analysis_data(report, export_format), export_format)


@contextmanager
def _whole(path: Path, replaceable: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place if the block succeeds and vanishes if it fails.

    Args:
        path: the file, or the folder if `replaceable` is given.
        replaceable: tells by name which files of a folder that exists belong to an earlier export; they are replaced
            or removed, all others stay.

    Raises:
        ExportError: it cannot be written.
    """
    beside = path.absolute()  # `.` has no name of its own
    temporary = beside.parent / f".{beside.name}.{uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if replaceable is None:
            yield temporary
            os.replace(temporary, path)
            return
        temporary.mkdir()
        yield temporary
        if not path.exists():
            os.replace(temporary, path)
            return
        written = [file.name for file in temporary.iterdir()]
        for name in written:
            os.replace(temporary / name, path / name)
        for file in path.iterdir():
            if replaceable(file.name) and file.name not in written:
                file.unlink()
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if replaceable is None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        else:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_csv(table: Table, path: Path) -> None:
    """A table as UTF-8 text with a heading; numbers in full precision, empty cells for what is not defined."""
    known: dict[str, str] = {}
    columns = []
    for column in table.columns:
        cells = column.cells()
        if column.kind in ("text", "any"):
            known |= {cell: harmless(cell) for cell in set(cells) if isinstance(cell, str)}
            cells = [known.get(cell, cell) for cell in cells]
        columns.append(cells)
    with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file)  # CRLF as RFC 4180 has it; with another ending a lone CR in a text goes unquoted
        writer.writerow([column.name for column in table.columns])
        writer.writerows(zip(*columns, strict=True))


def _write_parquet(table: Table, path: Path) -> None:
    """A table with typed columns, null for what is not defined, and descriptions in the fields' metadata."""
    arrow = require("pyarrow", "parquet", "parquet")
    parquet = require("pyarrow.parquet", "parquet", "parquet")
    types = {"integer": arrow.int64(), "number": arrow.float64(), "text": arrow.string(), "any": arrow.string()}
    arrays, fields = [], []
    for column in table.columns:
        kind = types[column.kind]
        if column.kind == "number":
            arrays.append(arrow.array(column.values, kind, mask=~np.isfinite(column.values)))
        elif column.kind == "any":
            arrays.append(arrow.array([str(value) for value in column.values], kind))
        else:
            arrays.append(arrow.array(column.values, kind))
        fields.append(arrow.field(column.name, kind, metadata={"description": column.description}))
    parquet.write_table(arrow.Table.from_arrays(arrays, schema=arrow.schema(fields)), path)


def _write_workbook(found: Sequence[Table], report: ReportData, path: Path) -> tuple[tuple[str, str], ...]:
    """The tables as sheets of one workbook; returns those that have more rows than a sheet and so are left out."""
    openpyxl = require("openpyxl", "xlsx", "excel")
    left_out = tuple(
        (table.name, f"{table.rows:,} rows and a heading do not fit into a sheet of {SHEET_ROWS:,}; use csv or parquet")
        for table in found
        if table.rows + 1 > SHEET_ROWS
    )
    names = {name for name, _ in left_out}
    book = openpyxl.Workbook(write_only=True)
    book.properties.creator = "moescope"
    try:
        for table in (metadata(report, left_out), *found[1:]):
            if table.name not in names:
                _append_sheet(book, table)
        book.save(path)
    except OSError as error:
        # half-open sheets would complain on standard error when they are collected later
        ignored, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            error.__traceback__ = None
            del book
            gc.collect()
        finally:
            sys.unraisablehook = ignored
        raise
    return left_out


def _append_sheet(book: Any, table: Table) -> None:
    """A sheet with a heading that stays in view; cells without a value are left out."""
    sheet = book.create_sheet(table.name)
    sheet.freeze_panes = "A2"
    sheet.append([column.name for column in table.columns])
    texts = any(column.kind in ("text", "any") for column in table.columns)
    cells = _sheet_cells(sheet) if texts else None
    for record in table.records():
        sheet.append(record if cells is None else [cells(cell) for cell in record])


def _sheet_cells(sheet: Any) -> Callable[[Any], Any]:
    """Cell values as the sheet takes them: text is cleaned, and never typed as a formula or an error code."""
    cell_type = require("openpyxl.cell", "xlsx", "excel").WriteOnlyCell
    known: dict[str, str] = {}

    def convert(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        text = known.get(value)
        if text is None:
            text = known[value] = sheet_text(value)
        if not text.startswith("#"):
            return text
        cell = cell_type(sheet, text)
        cell.data_type = "s"
        return cell

    return convert


def sheet_text(text: str) -> str:
    """Text as a sheet can hold it: harmless, no control characters, and where it is too long, cut and marked so."""
    text = harmless(_FORBIDDEN.sub("\ufffd", text))
    mark = " … [cut: longer than a cell]"
    return text if len(text) <= SHEET_TEXT else text[: SHEET_TEXT - len(mark)] + mark
