"""Every export format, read back by its own library and compared with the arrays of the profile."""

import csv
import io
import json
import os
import pickle
import pickletools
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import MODEL, random_profile

import moescope.viz.export
from moescope.profiler.profile import LayerInfo, ModelInfo, RoutingProfile
from moescope.stats.activation import normalised_entropy, selection_frequency
from moescope.viz.analysis import analyze
from moescope.viz.errors import ExportError
from moescope.viz.export import FOLDERS, Exported, export, harmless, sheet_text
from moescope.viz.structured import analysis_data
from moescope.viz.tables import NAMES, tables

HOSTILE = ("+1+1", "-2", "=cmd|' /C calc'!A0", "@SUM(A1)", "\tx", "\rx", "plain")
FORMATS = ("json", "jsonl", "pickle", "csv", "xlsx", "parquet", "parity", "tensorboard", "pruning", "calibration")


def read_csv(file: Path) -> dict[str, list[str]]:
    with open(file, encoding="utf-8", newline="") as text:
        heading, *rows = csv.reader(text)
    return {name: [row[column] for row in rows] for column, name in enumerate(heading)}


def load_book(file: Path) -> Any:
    import openpyxl

    return openpyxl.load_workbook(io.BytesIO(file.read_bytes()))  # whatever its name


def read_sheet(file: Path, name: str) -> dict[str, list[Any]]:
    book = load_book(file)
    heading, *rows = book[name].iter_rows(values_only=True)
    book.close()
    return {str(title): [row[column] for row in rows] for column, title in enumerate(heading)}


def read_parquet(file: Path) -> dict[str, list[Any]]:
    import pyarrow.parquet

    found: dict[str, list[Any]] = pyarrow.parquet.read_table(file).to_pydict()
    return found


def read_table(path: Path, export_format: str, name: str) -> dict[str, list[Any]]:
    """Cells as int, float, str and None whatever the format."""
    if export_format == "xlsx":
        return read_sheet(path, name)
    if export_format == "parquet":
        return read_parquet(path / f"{name}.parquet")

    def typed(cell: str) -> Any:
        for kind in (int, float):
            try:
                return kind(cell)
            except ValueError:
                continue
        return cell or None

    return {title: [typed(cell) for cell in cells] for title, cells in read_csv(path / f"{name}.csv").items()}


def numbers(cells: list[Any]) -> np.ndarray:
    return np.array([np.nan if cell is None else cell for cell in cells], dtype=np.float64)


def wide_profile(domains: int, layers: int = 94, experts: int = 128, k: int = 8) -> RoutingProfile:
    """A profile of the size of a large model: every token chooses k neighbouring experts."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, 5000, size=(domains, 2))
    first = rng.multinomial(np.broadcast_to(tokens[..., None], (domains, 2, layers)), np.full(experts, 1 / experts))
    counts = sum(np.roll(first, shift, axis=-1) for shift in range(k))
    split = np.zeros((16, domains, layers, experts), np.int64)
    split[0] = counts.sum(axis=1)
    model = ModelInfo(
        "wide", "Qwen3MoeForCausalLM", "softmax", tuple(LayerInfo(i, experts, k) for i in range(layers)), "w"
    )
    return replace(
        random_profile(1),
        model=model,
        domains=tuple(f"domain{number:02}" for number in range(domains)),
        selection_counts=counts,
        weight_sums=counts * 2.0**-3,
        token_counts=tokens,
        split_counts=split,
        probability_sums=None,
        probability_tokens=None,
        coactivation=None,
    )


@pytest.mark.parametrize("export_format", ["csv", "xlsx", "parquet"])
def test_tables_hold_the_arrays(export_format: Any, tmp_path: Path) -> None:
    profile = random_profile(5)
    assert profile.probability_sums is not None
    assert profile.probability_tokens is not None
    assert profile.coactivation is not None
    path = tmp_path / "tables"
    assert export(profile, path, export_format) == Exported(path)

    layers, widths, tops = [1, 3, 4], [8, 6, 8], [2, 2, 3]
    counts = profile.selection_counts.sum(axis=(0, 1))
    where = [(slot, expert) for slot in range(3) for expert in range(widths[slot])]
    experts = read_table(path, export_format, "experts")
    assert list(zip(experts["layer"], experts["expert"], strict=True)) == [(layers[s], e) for s, e in where]
    assert experts["selections"] == [counts[cell] for cell in where]
    frequency = np.array([counts[s, e] / tops[s] / profile.tokens for s, e in where])
    np.testing.assert_allclose(numbers(experts["selection_frequency"]), frequency, rtol=1e-12)
    np.testing.assert_allclose(
        numbers(experts["ratio_to_uniform"]), [frequency[row] * widths[s] for row, (s, _) in enumerate(where)]
    )
    probability = profile.probability_sums.sum(axis=(0, 1)) / profile.probability_tokens.sum()
    np.testing.assert_allclose(numbers(experts["mean_probability"]), [probability[cell] for cell in where])
    weight = profile.weight_sums.sum(axis=(0, 1))
    np.testing.assert_allclose(
        numbers(experts["weight_share"]), [weight[cell] / weight[cell[0]].sum() for cell in where]
    )

    parts = read_table(path, export_format, "experts_by_domain")
    rebuilt = np.zeros_like(profile.selection_counts)
    for domain, phase, layer, expert, count in zip(*parts.values(), strict=True):
        cell = (profile.domains.index(domain), ("prefill", "decode").index(phase), layers.index(layer), expert)
        rebuilt[cell] += count
    assert list(parts) == ["domain", "phase", "layer", "expert", "selections"]
    assert len(parts["layer"]) == 2 * 2 * len(where)
    np.testing.assert_array_equal(rebuilt, profile.selection_counts)

    found = read_table(path, export_format, "layers")
    assert (found["layer"], found["experts"], found["top_k"]) == (layers, widths, tops)
    assert found["tokens"] == [profile.tokens] * 3
    assert found["selections"] == counts.sum(axis=1).tolist()
    assert found["busiest"] == counts.max(axis=1).tolist()
    np.testing.assert_allclose(numbers(found["max_over_mean"]), counts.max(axis=1) * widths / counts.sum(axis=1))
    assert found["dead"] == [int((counts[s, : widths[s]] == 0).sum()) for s in range(3)]

    pairs = read_table(path, export_format, "correlation")
    assert list(zip(pairs["layer_i"], pairs["layer_j"], pairs["delta"], strict=True)) == [
        (1, 3, 2),
        (1, 4, 3),
        (3, 4, 1),
    ]
    r = float(np.corrcoef(counts[0], counts[2])[0, 1])
    assert [pairs["r"][0], pairs["r"][2]] == [None, None]
    assert pairs["r"][1] == pytest.approx(r, abs=1e-12)
    nulls = analyze(profile).nulls
    assert nulls is not None
    np.testing.assert_allclose(numbers(pairs["p_value"]), [np.nan, nulls.free.cell_p[0, 2], np.nan])
    assert pairs["within_groups_p_value"] == [None] * 3

    patterns = read_table(path, export_format, "periodic_patterns")
    assert patterns["delta"] == [1, 2, 3]
    assert patterns["mean_correlation"] == [None, None, pytest.approx(r)]
    assert patterns["num_pairs"] == [0, 0, 1]
    assert patterns["p_value_all_looks"] == [None, None, pytest.approx(nulls.free.p_family[0])]
    assert patterns["interval_high"][2] == pytest.approx(nulls.intervals[1, 0])

    tokens = read_table(path, export_format, "tokens")
    assert tokens["domain"] == ["code", "code", "prose", "prose"]
    assert tokens["phase"] == ["prefill", "decode"] * 2
    assert tokens["tokens"] == profile.token_counts.ravel().tolist()

    together = read_table(path, export_format, "coactivation")
    rebuilt = np.zeros_like(profile.coactivation)
    for layer, one, other, count in zip(*together.values(), strict=True):
        assert one < other
        assert count > 0
        rebuilt[layers.index(layer), one, other] = count
    np.testing.assert_array_equal(rebuilt, np.triu(profile.coactivation, 1))

    known = read_table(path, export_format, "metadata")
    meta = dict(zip(known["key"], known["value"], strict=True))
    assert (meta["model_id"], meta["invariant_holds"]) == ("tiny", "yes")
    assert int(meta["tokens"]) == profile.tokens
    described = read_table(path, export_format, "columns")
    assert set(described["table"]) == set(NAMES) - {"metadata", "columns"}
    assert all(described["description"])


def test_types_in_a_sheet_and_in_parquet(tmp_path: Path) -> None:
    import pyarrow.parquet

    export(random_profile(5), tmp_path / "a.xlsx", "xlsx")
    book = load_book(tmp_path / "a.xlsx")
    assert book.sheetnames == list(NAMES)
    assert all(sheet.freeze_panes == "A2" for sheet in book)
    assert [cell.data_type for cell in book["experts"][2]] == ["n"] * 7
    assert [cell.data_type for cell in book["experts_by_domain"][2]] == ["s", "s", "n", "n", "n"]
    book.close()
    export(random_profile(5), tmp_path / "p", "parquet")
    schema = pyarrow.parquet.read_schema(tmp_path / "p" / "experts.parquet")
    assert list(map(str, schema.types)) == ["int64"] * 3 + ["double"] * 4
    assert schema.field("selections").metadata[b"description"] == b"times the expert was among a token's top-k"


def test_what_was_not_recorded_is_empty_or_absent(tmp_path: Path) -> None:
    profile = random_profile(5, probability_sums=None, probability_tokens=None, coactivation=None)
    for export_format in ("csv", "xlsx", "parquet"):
        path = tmp_path / export_format
        export(profile, path, export_format)
        assert set(read_table(path, export_format, "experts")["mean_probability"]) == {None}
        assert "coactivation" not in read_table(path, export_format, "columns")["table"]
    assert not (tmp_path / "csv" / "coactivation.csv").exists()
    text = (tmp_path / "csv" / "experts.csv").read_text()
    assert "nan" not in text.lower()


@pytest.mark.parametrize("export_format", ["csv", "xlsx"])
def test_text_that_begins_like_a_formula_is_neutralised(export_format: Any, tmp_path: Path) -> None:
    model = replace(MODEL, id="=HYPERLINK(1)")
    profile = random_profile(2, domains=tuple(sorted(HOSTILE)), model=model)
    path = tmp_path / "out"
    export(profile, path, export_format)
    read = read_csv(path / "tokens.csv") if export_format == "csv" else read_sheet(path, "tokens")
    shown = {domain.replace("\r", "\n") for domain in read["domain"]}  # XML knows no CR
    assert shown == {("" if name == "plain" else "'") + name.replace("\r", "\n") for name in HOSTILE}
    meta = read_csv(path / "metadata.csv") if export_format == "csv" else read_sheet(path, "metadata")
    assert meta["value"][0] == "'=HYPERLINK(1)"
    if export_format == "xlsx":
        book = load_book(path)
        kinds = {cell.data_type for sheet in book for row in sheet.iter_rows() for cell in row}
        book.close()
        assert kinds <= {"s", "n"}


def test_error_codes_and_control_characters_are_text_in_a_sheet(tmp_path: Path) -> None:
    profile = random_profile(2, domains=("#N/A", "a\x00b\x0b\x1f", "c\ufffe"))
    export(profile, tmp_path / "a.xlsx", "xlsx")
    book = load_book(tmp_path / "a.xlsx")
    cells = [row[0] for row in book["tokens"].iter_rows(min_row=2)]
    book.close()
    assert [cell.value for cell in cells[::2]] == ["#N/A", "a\ufffdb\ufffd\ufffd", "c\ufffd"]
    assert {cell.data_type for cell in cells} == {"s"}


def test_text_for_cells() -> None:
    assert [harmless(text) for text in ("=1", "a=1", "", "-", "'=1")] == ["'=1", "a=1", "", "'-", "'=1"]
    long = sheet_text("x" * 40_000)
    assert len(long) == 32_767
    assert long.endswith("… [cut: longer than a cell]")


def test_a_table_that_does_not_fit_a_sheet_is_left_out_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = random_profile(5)
    rows = {table.name: table.rows for table in tables(profile, analyze(profile))}
    monkeypatch.setattr(moescope.viz.export, "SHEET_ROWS", rows["coactivation"] + 1)
    done = export(profile, tmp_path / "a.xlsx", "xlsx")
    assert [name for name, _ in done.left_out] == ["experts_by_domain"]
    book = load_book(tmp_path / "a.xlsx")
    assert set(book.sheetnames) == set(NAMES) - {"experts_by_domain"}
    assert book["coactivation"].max_row == rows["coactivation"] + 1
    book.close()
    meta = read_sheet(tmp_path / "a.xlsx", "metadata")
    reason = dict(zip(meta["key"], meta["value"], strict=True))["left_out.experts_by_domain"]
    assert reason.startswith("88 rows and a heading do not fit into a sheet of ")


def test_structured_formats_hold_the_same(tmp_path: Path) -> None:
    profile = random_profile(5)
    for export_format in ("json", "jsonl", "pickle"):
        export(profile, tmp_path / export_format, export_format, delta_max=4, intervals=(1, 3))
    report = analyze(profile, delta_max=4, intervals=(1, 3))

    def strict(text: str) -> Any:
        return json.loads(text, parse_constant=pytest.fail)

    assert strict((tmp_path / "json").read_text()) == analysis_data(report)
    lines = [strict(line) for line in (tmp_path / "jsonl").read_text().splitlines()]
    assert all(len(line) == 1 for line in lines)
    assert {key: value for line in lines for key, value in line.items()} == analysis_data(report, "jsonl")

    content = (tmp_path / "pickle").read_bytes()
    opcodes = {code.name for code, _, _ in pickletools.genops(content)}
    assert not opcodes & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "EXT1", "PERSID"}
    assert content[:2] == b"\x80\x04"
    assert pickle.loads(content) == analysis_data(report, "pickle")


def test_tensorboard_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = replace(MODEL, layers=tuple(LayerInfo(index, 8, 2) for index in (1, 3, 4)))
    profile = random_profile(5, model=model)
    export(profile, tmp_path / "events", "tensorboard", delta_max=3)
    (file,) = (tmp_path / "events").iterdir()
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"histograms": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    counts = profile.selection_counts.sum(axis=(0, 1))
    frequency = counts / counts.sum(axis=1, keepdims=True)

    def scalars(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(tag)}

    assert scalars("load/max_over_mean") == pytest.approx(
        dict(zip((1, 3, 4), (counts.max(axis=1) * 8 / counts.sum(axis=1)).tolist(), strict=True))
    )
    entropy = [-sum(p * np.log(p) for p in row if p > 0) / np.log(8) for row in frequency]
    assert scalars("load/normalised_entropy") == pytest.approx(dict(zip((1, 3, 4), entropy, strict=True)))
    assert scalars("load/dead_experts") == dict(zip((1, 3, 4), (counts == 0).sum(axis=1).tolist(), strict=True))
    r = np.corrcoef(frequency)
    assert scalars("correlation/mean_r") == pytest.approx({1: r[1, 2], 2: r[0, 1], 3: r[0, 2]}, abs=1e-6)
    histograms = events.Histograms("selection_frequency")
    assert [event.step for event in histograms] == [1, 3, 4]
    for event, row in zip(histograms, frequency, strict=True):
        value = event.histogram_value
        assert (value.num, value.min, value.max) == (8, row.min(), row.max())
        assert value.sum_squares == pytest.approx((row**2).sum())
        assert sum(value.bucket) == 8
    (text,) = events.Tensors("summary")
    assert b"moescope summary" in text.tensor_proto.string_val[0]
    assert events.SummaryMetadata("summary").plugin_data.plugin_name == "text"
    assert os.uname().nodename not in file.name


def test_entropy() -> None:
    counts = np.array([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0], [16, 0, 0, 0]])
    view = selection_frequency(counts, (1,) * 4, 16, (4, 4, 2, 1), (0, 1, 2, 3))
    np.testing.assert_allclose(normalised_entropy(view), [1, 0, 1, np.nan])
    empty = selection_frequency(counts * 0, (1,) * 4, 0, (4, 4, 2, 1), (0, 1, 2, 3))
    assert np.isnan(normalised_entropy(empty)).all()


@pytest.mark.parametrize("export_format", FORMATS)
def test_parts_without_tokens_and_nothing_at_all(export_format: Any, tmp_path: Path) -> None:
    profile = random_profile(5)
    zeros = {name: np.zeros_like(array) for name, array in profile.arrays().items()}
    nothing = replace(profile, **zeros)
    nothing.check()
    path = tmp_path / "nothing"
    assert export(nothing, path, export_format).path == path
    if export_format in ("csv", "xlsx", "parquet"):
        experts = read_table(path, export_format, "experts")
        assert set(experts["selection_frequency"]) == {None}
        assert set(experts["selections"]) == {0}
        assert read_table(path, export_format, "experts_by_domain")["layer"] == []
        assert read_table(path, export_format, "tokens")["tokens"] == [0] * 4
        assert read_table(path, export_format, "layers")["max_over_mean"] == [None] * 3

    counts, tokens = profile.selection_counts.copy(), profile.token_counts.copy()
    counts[1, 1], tokens[1, 1] = 0, 0
    part = replace(profile, selection_counts=counts, token_counts=tokens)
    if export_format in ("csv", "xlsx", "parquet"):
        export(part, tmp_path / "part", export_format)
        found = read_table(tmp_path / "part", export_format, "experts_by_domain")
        assert ("prose", "decode") not in set(zip(found["domain"], found["phase"], strict=True))
        assert len(set(zip(found["domain"], found["phase"], strict=True))) == 3


@pytest.mark.parametrize(
    ("export_format", "package", "extra"),
    [("xlsx", "openpyxl", "excel"), ("parquet", "pyarrow", "parquet"), ("tensorboard", "tensorboard", "tensorboard")],
)
def test_a_missing_package_names_its_extra_and_leaves_nothing(
    export_format: Any, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError) as caught:
        export(random_profile(1), tmp_path / "out", export_format)
    assert str(caught.value) == f"--format {export_format} needs {package}: pip install 'moescope[{extra}]'"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("export_format", FORMATS)
def test_what_exists_is_kept_without_force(export_format: Any, tmp_path: Path) -> None:
    profile, path = random_profile(1), tmp_path / "out"
    if export_format in FOLDERS:
        path.mkdir()
        export(profile, path, export_format)
    else:
        path.write_text("mine")
    before = {file.name: file.read_bytes() for file in (path.iterdir() if path.is_dir() else [path])}
    with pytest.raises(ExportError, match="exists"):
        export(profile, path, export_format)
    assert {file.name: file.read_bytes() for file in (path.iterdir() if path.is_dir() else [path])} == before
    export(profile, path, export_format, force=True)

    other = tmp_path / "other"
    if export_format in FOLDERS:
        other.write_text("mine")
    else:
        other.mkdir()
    with pytest.raises(ExportError, match=r"is a file|is not a file"):
        export(profile, other, export_format, force=True)
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".tmp")]


def test_force_replaces_an_earlier_export_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "tables"
    export(random_profile(1), path, "csv")
    (path / "notes.txt").write_text("mine")
    (path / "mine.csv").write_text("mine")
    profile = random_profile(2, coactivation=None)
    export(profile, path, "csv", force=True)
    assert not (path / "coactivation.csv").exists()
    assert {file.name for file in path.iterdir()} == {f"{name}.csv" for name in NAMES if name != "coactivation"} | {
        "notes.txt",
        "mine.csv",
    }
    assert read_csv(path / "tokens.csv")["tokens"] == [str(count) for count in profile.token_counts.ravel()]


@pytest.mark.parametrize("export_format", ["json", "csv"])
def test_an_interrupted_export_leaves_the_old_one(
    export_format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "out"
    export(random_profile(1), path, export_format)
    before = sorted(tmp_path.rglob("*"))

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(moescope.viz.export, "_structured", fail)
    monkeypatch.setattr(moescope.viz.export, "_write_csv", fail)
    with pytest.raises(ExportError, match=r"cannot write .*out: No space left on device"):
        export(random_profile(2), path, export_format, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_format_lists_them(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="unknown format 'xml'; there are json, jsonl, pickle, csv"):
        export(random_profile(1), tmp_path / "a", "xml")  # type: ignore[arg-type]


@pytest.mark.parametrize("export_format", ["csv", "parquet"])
def test_a_large_profile_takes_seconds(export_format: Any, tmp_path: Path) -> None:
    profile = wide_profile(domains=64)
    start = time.monotonic()
    export(profile, tmp_path / "out", export_format, permutations=0)
    assert time.monotonic() - start < 20  # two or three on an idle machine
    if export_format == "parquet":
        found = read_parquet(tmp_path / "out" / "experts_by_domain.parquet")
        counts = np.array(found["selections"]).reshape(profile.selection_counts.shape)
        np.testing.assert_array_equal(counts, profile.selection_counts)
    else:
        with open(tmp_path / "out" / "experts_by_domain.csv", encoding="utf-8") as file:
            assert sum(1 for _ in file) == 1 + profile.selection_counts.size
