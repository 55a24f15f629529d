"""What is taken out of a trace to be looked at."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from traces import LAYERS, about, assert_rows_equal, random_rows, write_batches

from moescope.profiler import trace as trace_module
from moescope.profiler import trace_excerpt
from moescope.profiler.errors import OptionError, TraceError
from moescope.profiler.trace import INDEX_NAME, Trace, TraceRows
from moescope.profiler.trace_excerpt import excerpt
from moescope.profiler.trace_writer import TraceOptions, TraceWriter

BATCHES = [[4, 0, 7], [1, 2], [9, 3, 5, 6], [8]]
"""Ten requests of six tokens."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TraceRows]:
    folder = tmp_path_factory.mktemp("traces") / "t"
    return folder, TraceRows.concatenate(write_batches(folder, about(weights=True), BATCHES))


def test_whole_requests_with_which_the_trace_begins(written: tuple[Path, TraceRows]) -> None:
    folder, given = written
    found = excerpt(Trace(folder), None, 20)
    assert found.requests == (0, 4, 7), "a fourth would not fit"
    assert (found.starts, found.lengths, found.held) == ((0, 6, 12), (6, 6, 6), 60)
    expected = TraceRows.concatenate([given.take(given.request == number) for number in found.requests])
    assert_rows_equal(found.rows, expected)
    assert found.rows.position.tolist() == [*range(6)] * 3


def test_a_first_request_that_is_longer_is_cut(written: tuple[Path, TraceRows]) -> None:
    found = excerpt(Trace(written[0]), None, 4)
    assert (found.requests, found.lengths, len(found.rows)) == ((4,), (6,), 4)
    assert found.rows.position.tolist() == [0, 1, 2, 3]


def test_requests_by_their_numbers(written: tuple[Path, TraceRows]) -> None:
    found = excerpt(Trace(written[0]), [8, 2, 8], 10)
    assert (found.requests, found.starts, found.lengths) == ((2, 8), (0, 4), (6, 6))
    assert found.rows.position.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    with pytest.raises(OptionError, match="--tokens 6 is used up before request 2"):
        excerpt(Trace(written[0]), [8, 2], 6)


def test_what_the_trace_uses(written: tuple[Path, TraceRows], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, given = written
    found = excerpt(Trace(folder), [3], 100)
    np.testing.assert_array_equal(found.counts, Trace(folder).profile().selection_counts.sum(axis=(0, 1)))
    assert found.counted == 60
    monkeypatch.setattr(trace_excerpt, "_COUNTED", 8)
    monkeypatch.setattr(trace_excerpt, "_PIECES", 4)
    found = excerpt(Trace(folder), [3], 100)
    rows = np.concatenate([np.arange(start, start + 2) for start in (0, 19, 38, 58)])
    assert found.counted == 8
    for slot, layer in enumerate(LAYERS):
        ids = given.experts[rows, slot, : layer.top_k].reshape(-1)
        np.testing.assert_array_equal(found.counts[slot], np.bincount(ids, minlength=8))


def test_what_cannot_be_taken(written: tuple[Path, TraceRows], tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="holds no request 10; its requests lie in 0 to 9"):
        excerpt(Trace(written[0]), [10], 100)
    with pytest.raises(OptionError, match="--tokens must be at least 1"):
        excerpt(Trace(written[0]), None, 0)
    write_batches(tmp_path / "t", about(), [[0]])
    (tmp_path / "t" / INDEX_NAME).write_text("")
    with pytest.raises(TraceError, match="holds no tokens of a finished batch"):
        excerpt(Trace(tmp_path / "t"), None, 100)


def test_ids_out_of_range_are_damage(tmp_path: Path) -> None:
    of = about()
    rows = random_rows(of, [0, 0], [0, 1])
    rows.experts[1, 0, 0] = 99
    with TraceWriter(of, TraceOptions(tmp_path / "t")) as writer:
        writer.admit([0], [2])
        writer.append(rows)
        writer.commit(0)
        writer.finish()
    with pytest.raises(TraceError, match="is damaged: an expert id, domain or phase is out of range"):
        excerpt(Trace(tmp_path / "t"), None, 100)


def test_a_shard_is_read_whole_once(written: tuple[Path, TraceRows], monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is looked into: what a checksum was taken of is not taken again, unless the file changes."""
    folder, _ = written
    taken: list[int] = []
    crc32 = zlib.crc32
    monkeypatch.setattr(trace_module.zlib, "crc32", lambda data: taken.append(len(data)) or crc32(data))
    trace = Trace(folder)
    for _ in range(3):
        excerpt(trace, None, 20)
        trace.request(4)
        list(trace.rows())
    assert taken == [shard.bytes for shard in trace.index.shards]
    shard = folder / trace.index.shards[0].name
    data = shard.read_bytes()
    try:
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(TraceError, match="checksum"):
            trace.request(4)
    finally:
        shard.write_bytes(data)
