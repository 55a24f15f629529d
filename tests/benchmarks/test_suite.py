"""The suite of benchmarks: its smallest case runs, a wrong name is said, and no case can end or hold up the others."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import CASES, FAILED, Case, main, printed_rows, run_case
from benchmarks.rows import read_json

ROOT = Path(__file__).parents[2]


def case(script: str, arguments: str = "", seconds: int = 60, gives: str = "file") -> Case:
    return Case("cpu", "one", "?", script, arguments, arguments, seconds, gives=gives)  # type: ignore[arg-type]


def test_the_smallest_case_runs(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks", "--only", "kernels", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    rows = read_json(file)
    assert {row.provider for row in rows} > {"floor", "torch", "torch, pairs too"}
    assert {(row.metric, row.n) for row in rows} == {("time", 3), ("time of floor", 3)}
    assert all(row.p50 is not None and row.p50 > 0 for row in rows)
    table = [line for line in done.stdout.splitlines() if line.startswith("| kernels: commit of 64 rows")]
    assert len(table) == sum(row.metric == "time of floor" for row in rows) == 3
    assert rows[0].host.torch in done.stdout
    assert f"Wrote {file}" in done.stdout


def test_a_wrong_name_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--only", "kernels,coffee"])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--only: no case 'coffee'; choose from recording, memory, kernels" in error


def test_the_gpu_part_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as ended:
        main(["gpu"])
    assert ended.value.code == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_the_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in listed] == [[one.part, one.name] for one in CASES]
    assert len({one.name for one in CASES}) == len(CASES)
    for one in CASES:
        assert (ROOT / (one.script.replace(".", "/") + ".py")).exists()


def test_a_case_that_fails_says_why() -> None:
    outcome = run_case(case("benchmarks.kernels", "--device abacus"), quick=False)
    assert not outcome.rows
    assert outcome.failure.startswith("exit code 2: ")
    assert "invalid choice: 'abacus'" in outcome.failure


def test_a_case_that_takes_too_long_is_stopped() -> None:
    outcome = run_case(case("benchmarks.kernels", "--repetitions 100000000", seconds=1), quick=False)
    assert outcome.failure == "stopped after 1 s"


def test_others_go_on_when_one_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cases = (case("benchmarks.none"), case("benchmarks.kernels", "--help", gives="text"))
    monkeypatch.setattr("benchmarks.__main__.CASES", cases)
    assert main([]) == FAILED
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("one: usage: ")
    assert out[-1].startswith("one FAILED: exit code 1: ")
    assert "No module named benchmarks.none" in out[-1]


def test_rows_that_the_benchmark_of_vllm_prints_are_read() -> None:
    about = {"shape": "s", "device": "one GPU", "vllm": "0.26.0", "torch": "2.11.0", "moescope": "0.1.0"}
    loss = {"pairs": 8, "p20": -0.5, "p50": 0.1, "p80": 0.7, "mean": 0.2, "bound95": 0.4}
    lines = [
        "INFO starting",
        json.dumps({"pair": 1, "on": 2.0, "off": 2.0}),
        json.dumps({"metric": "throughput", "recorded": "counts", "loss_percent": loss, **about}),
        json.dumps({"metric": "process", "provider": "capture", "tokens_s": [10, 30], **about}),
        "s: {'metric': 'process'}",
    ]
    first, second = printed_rows(lines, 0.5)
    assert (first.metric, first.provider, first.p50, first.bound, first.n) == (
        "throughput, loss",
        "counts",
        0.1,
        0.4,
        8,
    )
    assert (second.metric, second.provider, second.p50, second.n) == ("throughput", "capture", 20, 2)
    assert first.host.vllm == second.host.vllm == "0.26.0"
    assert first.other_load == 0.5


def test_tools_are_held_against_an_independent_count() -> None:
    from benchmarks.peers import check_rows, correlations, demo_cases, independent, run_moescope, run_old_tool

    even, padded = demo_cases(8)
    tools = {
        "moescope": lambda model, batches: run_moescope(model, batches, probabilities=True),
        "old": run_old_tool,
    }
    errors = {}
    for one in (even, padded):
        for row in check_rows(one, tools):
            errors[one.name, row.provider, row.metric] = row.p50
    wrong, error = "selections too few or too many", "largest error of r of two layers"
    assert errors[even.name, "moescope", wrong] == errors[padded.name, "moescope", wrong] == 0
    assert errors[even.name, "moescope", error] < 1e-3
    assert errors[padded.name, "moescope", error] < 1e-3
    assert errors[even.name, "old", error] < 1e-3  # without padding its averages are right
    assert errors[padded.name, "old", error] > 0.05
    counts, mean = independent(padded)
    assert (counts.sum(axis=1) == 4 * padded.tokens).all()
    np.testing.assert_allclose(mean.sum(axis=1), 1.0, rtol=1e-5)
    found = run_old_tool(even.model, even.batches)
    assert found.correlate is not None
    np.testing.assert_allclose(found.correlate(), correlations(found.use), atol=1e-6)
