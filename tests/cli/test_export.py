"""`moescope export`, and `--output-format` of `report` and `profile`."""

import csv
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from builders import random_profile
from command import Cli

from moescope.profiler.files import save_profile
from moescope.profiler.profile import merge
from moescope.viz.analysis import analyze
from moescope.viz.structured import analysis_data

FOLDERS = ("csv", "parquet", "tensorboard")
FORMATS = ("json", "jsonl", "pickle", "xlsx", "parity", "pruning", "calibration", *FOLDERS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_profile(random_profile(1), tmp_path / "one.safetensors")
    save_profile(random_profile(2), tmp_path / "two.safetensors")
    return tmp_path


@pytest.mark.parametrize("export_format", FORMATS)
def test_every_format(cli: Cli, saved: Path, export_format: str) -> None:
    name = "out.xlsx" if export_format == "xlsx" else "out"
    arguments = ("export", "one.safetensors", "--format", export_format, "-o", f"new/{name}")
    done = cli(*arguments)
    assert (done.code, done.out) == (0, f"Wrote new/{name}\n"), done.err
    assert (saved / "new" / name).is_dir() == (export_format in FOLDERS)
    again = cli(*arguments)
    assert again.code == 2
    assert f"{name} exists" in again.error
    assert "--force" in again.error
    assert cli(*arguments, "--force").code == 0
    assert [file.name for file in (saved / "new").iterdir()] == [name]


def test_profiles_add_up(cli: Cli, saved: Path) -> None:
    done = cli("export", "one.safetensors", "two.safetensors", "--format", "csv", "--output", "tables")
    assert done.code == 0, done.err
    both = merge([random_profile(1), random_profile(2)])
    with open("tables/experts.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["selections"]) for row in rows) == both.selection_counts.sum()


def test_measure_intervals_and_distance_act(cli: Cli, saved: Path) -> None:
    shared = ("export", "one.safetensors", "--format", "json", "-o", "a.json")
    assert cli(*shared, "--measure", "weight", "--periodic-intervals", "3", "--delta-max", 2).code == 0
    data = json.loads(Path("a.json").read_text(encoding="utf-8"))
    assert data["metadata"]["measure"] == "weight"
    assert list(data["periodic_patterns"]) == ["3"]
    assert data["layer_correlation"]["deltas"] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--format", "xml", "-o", "a"],
            "'json', 'jsonl', 'pickle', 'csv', 'xlsx', 'parquet', 'parity', 'tensorboard', "
            "'eplb', 'sglang', 'pruning', 'calibration'",
        ),
        (["-o", "a"], "--format"),
        (["--format", "xlsx", "-o", "a"], "write -o a.xlsx"),
        (["--format", "json"], "--output"),
        (["--format", "json", "-o", "one.safetensors"], "one.safetensors exists; choose another name, or --force"),
        (["--format", "csv", "-o", "one.safetensors"], "one.safetensors is a file"),
        (["--format", "json", "-o", "."], "is not a file that can be replaced"),
        (["--format", "json", "-o", "one.safetensors/a"], "cannot write one.safetensors/a: "),
        (["--format", "json", "-o", "a", "--routed-scaling-factor", "2"], "belongs to --format parity"),
        (["--format", "parity", "-o", "a", "--measure", "weight"], "--measure does not apply"),
        (["--format", "sglang", "-o", "a"], "write -o a.json"),
        (["--format", "sglang", "-o", "a.json"], "layers of one number of experts"),
        (["--format", "json", "-o", "a", "--least-tokens", "9"], "belongs to --format calibration"),
        (["--format", "json", "-o", "a", "--periodic-intervals", "0"], "--periodic-intervals"),
        (["--format", "json", "-o", "a", "two.safetensors", "two.safetensors"], "counted only once"),
        (["--format", "json", "-o", "a", "none.safetensors"], "No such file: none.safetensors"),
    ],
)
def test_bad_options_are_one_line(cli: Cli, saved: Path, arguments: list[str], message: str) -> None:
    done = cli("export", "one.safetensors", *arguments)
    assert done.code == 2
    assert message in done.error
    assert {file.name for file in saved.iterdir()} == {"one.safetensors", "two.safetensors"}


def test_what_was_not_recorded(cli: Cli, saved: Path) -> None:
    save_profile(random_profile(1, probability_sums=None, probability_tokens=None), saved / "bare.safetensors")
    shared = ("export", "bare.safetensors", "-o", "a", "--format")
    assert "--probabilities all" in cli(*shared, "parity").error
    assert "--measure probability" in cli(*shared, "json", "--measure", "probability").error


def test_a_missing_package(cli: Cli, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "openpyxl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    done = cli("export", "one.safetensors", "--format", "xlsx", "-o", "a.xlsx")
    assert done.code == 2
    assert done.error == "moescope: --format xlsx needs openpyxl: pip install 'moescope[excel]'"


def test_a_table_left_out_is_said(cli: Cli, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moescope.viz.export

    monkeypatch.setattr(moescope.viz.export, "SHEET_ROWS", 80)
    done = cli("export", "one.safetensors", "--format", "xlsx", "-o", "a.xlsx")
    assert done.code == 0
    assert done.out.startswith("left out experts_by_domain: 88 rows and a heading do not fit into a sheet of 80")


def test_structured_formats_of_a_report(cli: Cli, saved: Path) -> None:
    for export_format, name in (("json", "json"), ("jsonl", "jsonl"), ("pickle", "pkl")):
        done = cli("report", "one.safetensors", "-o", export_format, "--output-format", export_format)
        assert done.code == 0, done.err
        found = {file.name for file in (saved / export_format).glob("analysis_*")}
        assert found == {f"analysis_data.{name}", "analysis_summary.json"}
    expected = analysis_data(analyze(random_profile(1)), "pickle")
    found = pickle.loads((saved / "pickle" / "analysis_data.pkl").read_bytes())
    assert found["selection_frequency"] == expected["selection_frequency"]
    assert cli("report", "one.safetensors", "-o", "none", "--disable-structured-output").code == 0
    assert not list((saved / "none").glob("analysis_*"))
    assert "'json', 'jsonl', 'pickle'" in cli("report", "one.safetensors", "--output-format", "csv", "-o", "x").error


def test_structured_format_of_a_run(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    done = cli("profile", "hi", "-m", checkpoint, "--max-tokens", 0, "-o", "out", "--output-format", "jsonl")
    assert done.code == 0, done.err
    assert {file.name for file in (tmp_path / "out").glob("analysis_*")} == {
        "analysis_data.jsonl",
        "analysis_summary.json",
    }


@pytest.mark.parametrize("export_format", FORMATS)
def test_a_full_disk_is_one_line(saved: Path, export_format: str) -> None:
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.argv = ["moescope", "export", "one.safetensors", "--format", {export_format!r}, "-o", "out.xlsx"]
from moescope.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=saved, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("moescope: cannot write out.xlsx: ")
    assert {file.name for file in saved.iterdir()} == {"one.safetensors", "two.safetensors"}


def test_into_the_working_folder(cli: Cli, saved: Path) -> None:
    assert "exists and is not empty" in cli("export", "one.safetensors", "--format", "csv", "-o", ".").error
    assert cli("export", "one.safetensors", "--format", "csv", "-o", ".", "--force").code == 0
    assert {"one.safetensors", "two.safetensors", "experts.csv"} <= {file.name for file in saved.iterdir()}


@pytest.mark.parametrize("command", ["profile", "report", "merge", "export", "info"])
def test_help_keeps_the_lines_of_the_examples(cli: Cli, command: str) -> None:
    lines = cli(command, "--help").out.splitlines()
    assert any(line.startswith(f"    moescope {command} ") for line in lines)
    assert not any("\\b" in line for line in lines)
