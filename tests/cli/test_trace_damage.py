"""One byte of a shard that is not what was written, and every way to read a trace."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Cli
from traces import about, write_batches

from moescope.profiler.errors import TraceError
from moescope.profiler.profile import RoutingProfile
from moescope.profiler.trace import Trace, shard_header
from moescope.profiler.trace_writer import TraceOptions, TraceWriter
from moescope.viz.trace_view import view_trace

ABOUT = about(weights=True)
TOKENS = 6
BATCHES = [[4, 0, 7], [1, 2]]
SHARD = "shard-000000.safetensors"
"""Five requests, of which 2 is in the second batch."""


def regions() -> Iterator[tuple[str, int]]:
    """A byte of the header and one of each tensor: that of the last row."""
    rows = TOKENS * sum(map(len, BATCHES))
    place = len(shard_header(ABOUT, rows))
    yield "header", place // 2
    for name, (dtype, shape) in ABOUT.columns.items():
        size = dtype.itemsize
        for length in shape:
            size *= length
        place += rows * size
        yield name, place - 1


@pytest.fixture(params=list(regions()), ids=lambda region: region[0])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A trace with one bit of a region turned over."""
    write_batches(tmp_path / "t", ABOUT, BATCHES, tokens=TOKENS)
    file = tmp_path / "t" / SHARD
    data = bytearray(file.read_bytes())
    data[request.param[1]] ^= 1
    file.write_bytes(data)
    return tmp_path / "t"


@pytest.mark.parametrize(
    "command",
    [
        ["head", "t", "-n", "1"],
        ["head", "t", "--request", "4", "-n", "1"],
        ["verify", "t"],
        ["export", "t", "--format", "csv", "-o", "out"],
        ["export", "t", "--format", "parquet", "-o", "out"],
        ["view", "t", "-o", "out"],
        ["view", "t", "--request", "4", "--tokens", "1", "-o", "out"],
        ["analyze", "t", "-o", "out"],
        ["analyze", "t", "--requests", "0", "-o", "out"],
        ["analyze", "t", "--requests", "3", "-o", "out"],
    ],
    ids=" ".join,
)
def test_every_command_says_so(cli: Cli, damaged: Path, command: list[str]) -> None:
    done = cli("trace", *command)
    assert done.code == 2
    assert f"t/{SHARD} is " in done.error
    assert "Wrote" not in done.out
    assert not Path("out").exists()


def test_so_does_python(damaged: Path) -> None:
    for read in (
        RoutingProfile.from_trace,
        view_trace,
        lambda folder: view_trace(folder, [4], tokens=1),
        lambda folder: Trace(folder).requests([0]),
        lambda folder: next(Trace(folder).rows(0, 1)),
        lambda folder: Trace(folder).column(Trace(folder).index.shards[0], "phase"),
    ):
        with pytest.raises(TraceError, match=SHARD):
            read(damaged)


def test_a_shard_that_is_cut_to_go_on_is_not_written_anew(damaged: Path) -> None:
    before = (damaged / SHARD).read_bytes()
    with pytest.raises(TraceError, match=SHARD):
        TraceWriter(ABOUT, TraceOptions(damaged, weights=True), resume=1)
    assert (damaged / SHARD).read_bytes() == before
