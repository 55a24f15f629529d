"""`moescope profile --trace` and `moescope trace`."""

import csv
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from command import Cli
from pyarrow import parquet
from traces import about, write_batches

from moescope.profiler.files import load_profile
from moescope.profiler.profile import RoutingProfile
from moescope.profiler.trace import INDEX_NAME, Trace, TraceRows

BATCHES = [[4, 0, 7], [1, 2], [9, 3, 5, 6], [8]]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    write_batches(tmp_path / "t", about(weights=True), BATCHES)
    return tmp_path / "t"


def test_profile_traces(cli: Cli, checkpoint: Path) -> None:
    shared = ("profile", "one", "two three", "-m", checkpoint, "--max-tokens", 4, "--disable-structured-output")
    done = cli(*shared, "-o", "out", "--trace", "auto", "--trace-weights", "--trace-limit", "1 GB")
    assert done.code == 0, done.err
    assert "Wrote the trace out/trace: 2 of 2 requests (100.0%)\n" in done.out
    whole = load_profile("out/profile.safetensors")
    counted = RoutingProfile.from_trace("out/trace")
    np.testing.assert_array_equal(counted.selection_counts, whole.selection_counts)
    assert "weights" in Trace("out/trace").about.columns
    again = cli(*shared, "-o", "other", "--trace", "out/trace")
    assert again.code == 2
    assert "out/trace holds a trace; choose another folder for --trace, or --force" in again.error
    assert not Path("other").exists()
    assert '<a href="trace_view.html">' in Path("out/report.html").read_text(encoding="utf-8")
    assert '"number":1,' in Path("out/trace_view.html").read_text(encoding="utf-8")
    assert cli(*shared, "-o", "other", "--trace", "out/trace", "--force", "--trace-limit", "1KB").code == 0
    assert not Path("other/trace_view.html").exists(), "the trace is empty"
    assert "trace_view.html" not in Path("other/report.html").read_text(encoding="utf-8")
    assert Trace("out/trace").index.last.limited == 2
    done = cli(*shared, "-o", "third", "--trace", "third/t", "--trace-sample", 0.000001)
    assert "Wrote the trace third/t: 0 of 2 requests (0.0%), 2 left out by the sample" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace-limit", "10 apples"], "--trace-limit '10 apples' must be a size, e.g. 512MB or 10GB"),
        (["--trace-memory", "0"], "--trace-memory '0' must be a size"),
        (["--trace-memory", "1MB"], "--trace-memory must be at least 16MB"),
        (["--trace-sample", "0"], "--trace-sample must be a share above 0"),
        (["--trace-sample", "2"], "--trace-sample"),
        (["--trace-when-slow", "cry"], "'wait', 'sample'"),
    ],
)
def test_absurd_options_are_refused(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli("profile", "one", "-o", "out", "--trace", "auto", *arguments)
    assert done.code == 2
    assert message in done.error
    assert not Path("out").exists()


def test_options_without_a_trace_are_refused(cli: Cli) -> None:
    done = cli("profile", "one", "-o", "out", "--trace-weights")
    assert done.code == 2
    assert "--trace-weights needs --trace, the folder to write to" in done.error


def test_info(cli: Cli, trace: Path) -> None:
    done = cli("trace", "info", "t")
    assert done.code == 0, done.err
    rows = dict(line.split(maxsplit=1) for line in done.out.splitlines() if not line.startswith("MoE"))
    assert rows["tokens"] == "60"
    assert rows["requests"] == "10 of 10 requests (100.0%)"
    assert rows["run"].endswith("; complete")
    assert rows["domains"] == "2 (code, prose)"
    assert "weights" in rows["holds"]
    lines = (trace / INDEX_NAME).read_text().splitlines(keepends=True)
    (trace / INDEX_NAME).write_text("".join(lines[:-2]))  # cut off before the last batch was finished
    out = cli("trace", "info", "t").out
    assert "54; 6 more of a batch that was not finished" in out
    assert "9 of 9 requests" in out
    assert "cut off, or still going on" in out


def test_head(cli: Cli, trace: Path) -> None:
    done = cli("trace", "head", "t", "-n", 3)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 4
    (rows,) = Trace(trace).rows()
    ids = "  ".join(
        f"{layer.index}: {' '.join(map(str, rows.experts[2, slot, : layer.top_k]))}"
        for slot, layer in enumerate(about().model.layers)
    )
    assert done.out.splitlines()[3].split(maxsplit=5) == ["4", "2", str(rows.token[2]), "prefill", "code", ids]
    done = cli("trace", "head", "t", "--request", 8, "--layer", 3)
    assert [line.split()[:2] for line in done.out.splitlines()[1:]] == [["8", str(i)] for i in range(6)]
    assert "3: " in done.out
    assert "4: " not in done.out
    assert "the MoE layers are 1, 3, 4" in cli("trace", "head", "t", "--layer", 2).error
    assert "t holds no request 77; its requests lie in 0 to 9" in cli("trace", "head", "t", "--request", 77).error


def test_verify(cli: Cli, trace: Path) -> None:
    done = cli("trace", "verify", "t")
    assert (done.code, done.out) == (0, "Verified 60 tokens in 1 shard\n")
    (trace / "shard-000001.safetensors.tmp").write_text("")
    assert "shard-000001.safetensors.tmp is not in the index" in cli("trace", "verify", "t").out
    data = bytearray((trace / "shard-000000.safetensors").read_bytes())
    data[-1] ^= 1
    (trace / "shard-000000.safetensors").write_bytes(data)
    done = cli("trace", "verify", "t")
    assert done.code == 2
    assert (
        "shard-000000.safetensors is damaged: its checksum is not that of the index; damaged: 1 of 1 shard; "
        in done.error
    )
    assert "60 tokens lost, 0 verified" in done.error


def test_export_to_csv(cli: Cli, trace: Path) -> None:
    done = cli("trace", "export", "t", "--format", "csv", "-o", "new/a.csv")
    assert (done.code, done.out) == (0, "Wrote new/a.csv: 60 tokens\n"), done.err
    (rows,) = Trace(trace).rows()
    assert rows.weights is not None
    with open("new/a.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 60
    for i, row in enumerate(table):
        assert [int(row[name]) for name in ("request", "position", "token", "split")] == [
            rows.request[i],
            rows.position[i],
            rows.token[i],
            rows.split[i],
        ]
        assert row["domain"] == ("code", "prose")[rows.domain[i]]
        assert row["phase"] == ("prefill", "decode")[rows.phase[i]]
        for slot, layer in enumerate(about().model.layers):
            for j in range(layer.top_k):
                assert int(row[f"layer_{layer.index}_{j}"]) == rows.experts[i, slot, j]
                assert float(row[f"weight_{layer.index}_{j}"]) == rows.weights[i, slot, j]
    assert len(table[0]) == 6 + 2 * 6
    again = cli("trace", "export", "t", "--format", "csv", "-o", "new/a.csv")
    assert "new/a.csv exists; choose another name, or --force" in again.error
    assert cli("trace", "export", "t", "--format", "csv", "-o", "new/a.csv", "--force").code == 0


def test_export_to_parquet(cli: Cli, trace: Path) -> None:
    done = cli("trace", "export", "t", "--format", "parquet", "-o", "a.parquet")
    assert (done.code, done.out) == (0, "Wrote a.parquet: 60 tokens\n"), done.err
    table = parquet.read_table("a.parquet").to_pydict()
    rows = TraceRows.concatenate(list(Trace(trace).rows()))
    assert rows.weights is not None
    for name in ("request", "position", "token", "split"):
        assert table[name] == getattr(rows, name).tolist()
    assert table["domain"] == [("code", "prose")[i] for i in rows.domain]
    assert table["phase"] == [("prefill", "decode")[i] for i in rows.phase]
    for slot, layer in enumerate(about().model.layers):
        assert table[f"layer_{layer.index}"] == rows.experts[:, slot, : layer.top_k].tolist()
        assert table[f"weights_{layer.index}"] == rows.weights[:, slot, : layer.top_k].tolist()


def test_text_that_looks_like_a_formula_is_harmless_in_csv(cli: Cli, trace: Path) -> None:
    file = trace / "trace.json"
    file.write_text(file.read_text().replace('"code"', '"=1+1"'))
    data = (trace / "shard-000000.safetensors").read_bytes().replace(rb"\"code\"", rb"\"=1+1\"")
    (trace / "shard-000000.safetensors").write_bytes(data)
    index = (trace / INDEX_NAME).read_text().splitlines()
    shard = json.loads(index[0])
    shard["shard"]["crc32"] = zlib.crc32(data)
    (trace / INDEX_NAME).write_text("\n".join([json.dumps(shard), *index[1:]]) + "\n")
    assert cli("trace", "export", "t", "--format", "csv", "-o", "a.csv").code == 0
    assert ",'=1+1," in Path("a.csv").read_text(encoding="utf-8")


def test_view_of_a_traced_model(cli: Cli, checkpoint: Path) -> None:
    shared = ("profile", "a <b>é", "-m", checkpoint, "--max-tokens", 4, "--disable-structured-output")
    done = cli(*shared, "-o", "out", "--trace", "auto", "--no-token-sample")
    assert done.code == 0, done.err
    assert not Path("out/trace_view.html").exists(), "text is not to be kept"
    done = cli("trace", "view", "out/trace")
    file = Path("out/trace_view.html").absolute()
    assert (done.code, done.out) == (0, f"Wrote {file}: 10 tokens of 1 request\n"), done.err
    assert json.loads(re.search(r'"texts":(\[.*?\])', file.read_text(encoding="utf-8"))[1])[:7] == [*"a <b>", "", "é"]
    again = cli("trace", "view", "out/trace")
    assert f"{file} exists; choose another name, or --force" in again.error
    assert cli("trace", "view", "out/trace", "--force", "--tokenizer", checkpoint).code == 0


def test_view_without_a_tokenizer_shows_ids(cli: Cli, trace: Path) -> None:
    done = cli("trace", "view", "t", "--request", 3, "--request", 7, "-o", "new/a.html")
    assert (done.code, done.out) == (0, "Wrote new/a.html: 12 tokens of 2 requests\n"), done.err
    assert "Tokens are shown by their ids: tiny is neither a folder nor in the local hub cache" in done.err
    page = Path("new/a.html").read_text(encoding="utf-8")
    refused = cli("trace", "view", "t", "-o", "t/trace.json/a.html")
    assert (refused.code, refused.error) == (2, "moescope: cannot write t/trace.json/a.html: File exists")
    assert '"texts":null' in page
    assert "Tokens are shown by their ids: tiny is neither a folder" in page


def test_analyze(cli: Cli, trace: Path) -> None:
    done = cli("trace", "analyze", "t", "-o", "new/a")
    assert done.code == 0, done.err
    assert "60 tokens of 10 requests, 3 MoE layers\nA token keeps " in done.out
    assert done.out.endswith("Wrote new/a/trace.html and new/a/trace.json\n")
    data = json.loads(Path("new/a/trace.json").read_text(encoding="utf-8"))
    assert data["metadata"]["tokens"] == 60
    again = cli("trace", "analyze", "t", "-o", "new/a")
    assert again.code == 2
    assert "new/a exists and is not empty" in again.error
    done = cli("trace", "analyze", "t", "-o", "new/a", "--force", "--requests", "3-5,8", "--disable-structured-output")
    assert "24 tokens of 4 requests" in done.out
    assert "Requests were chosen by number" in done.out
    assert "Not in the trace" not in done.out
    assert not Path("new/a/trace.json").exists()
    done = cli("trace", "analyze", "t", "-o", "new/a", "--force", "--requests", "3,70-72")
    assert "6 tokens of 1 request, 3 MoE layers\nNot in the trace: 3 of the 4 requests asked for\n" in done.out
    done = cli("trace", "analyze", "t", "-o", "new/a", "--force", "--requests", "0-5,3-4294967295,100000")
    assert done.code == 0, done.err
    assert "60 tokens of 10 requests" in done.out
    assert "Not in the trace: 4,294,967,286 of the 4,294,967,296 requests asked for\n" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--request", "77"], "t holds no request 77; its requests lie in 0 to 9"),
        (["--tokenizer", "nothing/there"], "--tokenizer nothing/there has no tokenizer that can be read"),
        (["--tokens", "0"], "--tokens"),
        (["--request", "3", "--request", "4", "--tokens", "6"], "--tokens 6 is used up before request 4"),
        (["-o", "t"], "t exists; choose another name, or --force"),
    ],
)
def test_a_view_that_cannot_be(cli: Cli, trace: Path, arguments: list[str], message: str) -> None:
    done = cli("trace", "view", "t", *arguments)
    assert done.code == 2
    assert message in done.error
    assert not Path("t_view.html").exists()


def test_a_tokenizer_of_another_vocabulary(cli: Cli, trace: Path, checkpoint: Path) -> None:
    done = cli("trace", "view", "t", "--tokenizer", checkpoint)
    assert done.code == 2
    highest = max(int(rows.token.max()) for rows in Trace(trace).rows())
    assert f"--tokenizer {checkpoint} has token ids 0 to 257, and the trace has {highest}; it takes" in done.error
    file = trace / "trace.json"
    file.write_text(file.read_text().replace('"tiny"', json.dumps(str(checkpoint))))
    done = cli("trace", "view", "t")
    assert done.code == 0
    assert f"Tokens are shown by their ids: {checkpoint} has token ids 0 to 257, and" in done.err


def test_an_empty_trace_has_no_view(cli: Cli, trace: Path) -> None:
    (trace / INDEX_NAME).write_text("")
    done = cli("trace", "view", "t")
    assert done.code == 2
    assert "t holds no tokens of a finished batch" in done.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "t"], "--output-dir t is the trace itself; choose another folder"),
        (["-o", "out", "--requests", "77"], "none of the requests asked for is in the trace t"),
        (["-o", "out", "--requests", "100000"], "none of the requests asked for is in the trace t"),
        (
            ["-o", "out", "--requests", "4294967296"],
            "--requests: 4294967296 is too large; requests are whole numbers from 0 to 4,294,967,295",
        ),
        (["-o", "out", "--requests", "0-" + "9" * 5000], "--requests: 99999999999999999999 is too large; requests are"),
        (["-o", "out", "--requests", "3-x"], "--requests '3-x' must be requests and ranges of them, e.g. 3-10,20"),
        (["-o", "out", "--tokenizer", "none/such"], "--tokenizer none/such has no tokenizer that can be read"),
        (["-o", "out", "--vocabulary", "0"], "--vocabulary"),
        (["-o", "out", "--pair-tokens", "0"], "--pair-tokens"),
    ],
)
def test_what_cannot_be_analysed_is_one_line(cli: Cli, trace: Path, arguments: list[str], message: str) -> None:
    done = cli("trace", "analyze", "t", *arguments)
    assert done.code == 2
    assert message in done.error
    assert not Path("out").exists()
    assert Trace(trace).tokens == 60


def test_tokens_have_the_text_of_the_model_that_was_traced(cli: Cli) -> None:
    shared = ("--max-tokens", 2, "--disable-structured-output", "--no-analyze-weights", "--no-analyze-correlation")
    assert cli("profile", "one two three", "-m", "demo:stacked", "-o", "out", "--trace", "auto", *shared).code == 0
    done = cli("trace", "analyze", "out/trace", "-o", "a")
    assert done.code == 0, done.err
    texts = json.loads(Path("a/trace.json").read_text(encoding="utf-8"))["vocabulary"]["texts"]
    assert "one" in "".join(texts)


@pytest.mark.parametrize("command", ["info", "head", "verify", "export", "view", "analyze"])
def test_bad_input_is_one_line(cli: Cli, tmp_path: Path, command: str) -> None:
    more = {"export": ["--format", "csv", "-o", "a.csv"], "analyze": ["-o", "out"]}.get(command, [])
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "No such folder: none"), ("empty", "holds no trace.json, so it is not a trace")):
        done = cli("trace", command, name, *more)
        assert done.code == 2
        assert message in done.error
    assert not Path("a.csv").exists()


def test_help_and_a_missing_command(cli: Cli) -> None:
    done = cli("trace", "--help")
    assert done.code == 0
    assert all(name in done.out for name in ("info", "head", "verify", "export", "view", "analyze"))
    assert "Missing command" in cli("trace").error
    assert "\b" not in cli("trace", "info", "--help").out
