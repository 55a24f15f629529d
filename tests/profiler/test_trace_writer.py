"""Writing traces: what is kept, what is left out, bounded memory, crashes, full disks, and going on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disks import full_disk
from traces import about, assert_rows_equal, batch_rows, random_rows, write_batches

from moescope.profiler import trace_writer
from moescope.profiler.errors import OptionError, TraceError
from moescope.profiler.profile import LayerInfo
from moescope.profiler.trace import ABOUT_NAME, INDEX_NAME, Batch, Trace, TraceRows, Verification
from moescope.profiler.trace_writer import LEAST_MEMORY, TraceOptions, TraceWriter

BATCHES = [[4, 0, 7], [1, 2], [9, 3, 5, 6], [8]]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_writer, "SHARD_BYTES", 7 * about().row_bytes)


def everything(folder: Path, **options: Any) -> TraceRows:
    return TraceRows.concatenate(list(Trace(folder, **options).rows()))


# ---------------------------------------------------------------------------------------------------- what is in it


def test_a_batch_counts_when_it_is_committed(tmp_path: Path) -> None:
    of, folder = about(), tmp_path / "t"
    with TraceWriter(of, TraceOptions(folder)) as writer:
        writer.admit([0, 1], [6, 6])
        done = batch_rows(of, [0, 1], 6)
        for rows in done:
            writer.append(rows)
        writer.commit(0)
        writer.admit([2], [6])
        late = random_rows(of, [2, 2], [0, 1])
        writer.append(late)
        writer.flush()
        assert Trace(folder).index.complete is None  # still going on
    trace = Trace(folder)
    assert (trace.tokens, trace.unfinished, trace.index.complete) == (12, 2, False)
    assert_rows_equal(everything(folder), TraceRows.concatenate(done))
    assert_rows_equal(everything(folder, unfinished=True), TraceRows.concatenate([*done, late]))
    assert len(trace.requests([2])) == 0
    assert trace.verify() == Verification((), 0, 14, 2, ())
    profile = trace.profile()
    assert (profile.tokens, profile.complete, profile.runs[0].prompts, profile.runs[0].batches) == (12, False, 2, 1)


def test_shards_are_finished_by_size(tmp_path: Path, small_shards: None) -> None:
    write_batches(tmp_path / "t", about(), BATCHES)
    shards = Trace(tmp_path / "t").index.shards
    assert [shard.rows for shard in shards] == [7] * 8 + [4]
    assert all(os.path.getsize(tmp_path / "t" / shard.name) == shard.bytes for shard in shards)
    assert sorted(os.listdir(tmp_path / "t")) == sorted([ABOUT_NAME, INDEX_NAME, *(shard.name for shard in shards)])


def test_shards_are_finished_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_writer, "SHARD_SECONDS", 0.1)
    of = about()
    with TraceWriter(of, TraceOptions(tmp_path / "t")) as writer:
        writer.admit([0], [3])
        writer.append(random_rows(of, [0], [0]))
        writer.commit(0)
        deadline = time.monotonic() + 30
        while not Trace(tmp_path / "t").tokens:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        writer.finish()


def test_a_sample_takes_whole_requests_and_says_which_share(tmp_path: Path) -> None:
    of = about(sample=0.3)
    chosen = []
    with TraceWriter(of, TraceOptions(tmp_path / "t", sample=0.3), seed=5) as writer:
        for batch in range(20):
            requests = list(range(100 * batch, 100 * batch + 100))
            admitted = np.array(requests)[writer.admit(requests, [1] * 100)].tolist()
            chosen += admitted
            writer.append(random_rows(of, admitted, [0] * len(admitted)))
            writer.commit(batch)
        assert writer.summary() == {
            "requests": 2000,
            "traced": len(chosen),
            "sampled_out": 2000 - len(chosen),
            "slow": 0,
            "limited": 0,
        }
        writer.finish()
    assert 500 < len(chosen) < 700  # 4.9 standard deviations
    trace = Trace(tmp_path / "t")
    assert trace.index.last == Batch(19, len(chosen), 2000, len(chosen), 2000 - len(chosen))
    assert not trace.profile().complete
    assert trace.profile().runs[0].settings["from_trace"] == {"requests": 2000, "traced": len(chosen)}
    again = TraceWriter(about(sample=0.3), TraceOptions(tmp_path / "u", sample=0.3), seed=5)
    other = TraceWriter(about(sample=0.3), TraceOptions(tmp_path / "v", sample=0.3), seed=6)
    with again, other:
        everyone = list(range(2000))
        assert np.flatnonzero(again.admit(everyone, [1] * 2000)).tolist() == chosen
        assert np.flatnonzero(other.admit(everyone, [1] * 2000)).tolist() != chosen


def test_a_limit_leaves_whole_requests_out(tmp_path: Path, small_shards: None) -> None:
    of = about()
    limit = 60 * of.row_bytes + 11 * 700  # room for some 60 tokens and the headers of their shards
    with TraceWriter(of, TraceOptions(tmp_path / "t", limit=limit)) as writer:
        traced = []
        for number in range(30):
            if writer.admit([number], [6])[0]:
                traced.append(number)
                for rows in batch_rows(of, [number], 4):  # shorter than it could have been: the rest is free again
                    writer.append(rows)
            writer.commit(number)
        assert writer.summary()["limited"] == 30 - len(traced)
        writer.finish()
    assert 5 < len(traced) < 30
    files = sum(file.stat().st_size for file in (tmp_path / "t").glob("shard-*"))
    assert files <= limit
    np.testing.assert_array_equal(np.unique(everything(tmp_path / "t").request), traced)
    assert not Trace(tmp_path / "t").verify().damaged


def test_room_that_is_kept_for_a_request_is_given_back(tmp_path: Path) -> None:
    of = about()
    limit = 1000 * of.row_bytes + 3000  # and headers
    with TraceWriter(of, TraceOptions(tmp_path / "t", limit=limit)) as writer:
        assert writer.admit([0, 1], [600, 600]).tolist() == [True, False]
        writer.append(random_rows(of, [0] * 200, list(range(200))))
        assert writer.admit([2, 3], [300, 300]).tolist() == [True, False]  # 200 of the 600 came, 400 may come
        writer.release([0])
        assert writer.admit([4, 5], [300, 600]).tolist() == [True, False]
        writer.commit(0)
        assert writer.admit([6], [600]).tolist() == [True]


# ------------------------------------------------------------------------------------------------- a disk that is slow


class Slow:
    """A stand-in for rows that are not there yet: holds the writing thread up until told otherwise."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def __call__(self) -> None:
        assert self.gate.wait(30)


WIDE = about(tuple(LayerInfo(i, 256, 8) for i in range(48)))


def wide_rows(requests: list[int], count: int) -> TraceRows:
    """Rows of about a megabyte for 2,600 tokens; each request goes on from place 0."""
    rows = random_rows(WIDE, [requests[0]], [0])
    whole = rows.take(np.zeros(count * len(requests), np.int64))
    owner = np.repeat(np.array(requests, np.uint32), count)
    place = np.tile(np.arange(count, dtype=np.uint32), len(requests))
    return TraceRows(**{n: getattr(whole, n) for n in TraceRows.__slots__} | {"request": owner, "position": place})


def test_waiting_rows_fill_no_more_than_the_memory_given(tmp_path: Path) -> None:
    slow, sent = Slow(), 0
    with TraceWriter(WIDE, TraceOptions(tmp_path / "t", memory=LEAST_MEMORY)) as writer:
        writer.admit([0], [10**6])
        piece = wide_rows([0], 2600)

        def feed() -> None:
            nonlocal sent
            for _ in range(20):
                writer.append(piece, slow)
                sent += 1

        thread = threading.Thread(target=feed)
        thread.start()
        time.sleep(0.5)
        assert 4 <= sent <= LEAST_MEMORY // 10**6
        held = sent
        time.sleep(0.2)
        assert sent == held
        slow.gate.set()
        thread.join(30)
        assert sent == 20
        writer.commit(0)
        writer.finish()
    assert Trace(tmp_path / "t").tokens == 20 * 2600


def test_a_slow_disk_leaves_whole_requests_out_where_asked(tmp_path: Path) -> None:
    slow = Slow()
    with TraceWriter(WIDE, TraceOptions(tmp_path / "t", memory=LEAST_MEMORY, when_slow="sample")) as writer:
        assert writer.admit([0, 1], [2600, 2600]).all()
        for request in (0, 1):
            writer.append(wide_rows([request], 2600), slow)
        assert writer.admit(list(range(2, 12)), [2600] * 10).tolist() == [True] * 2 + [False] * 8
        for request in (2, 3):
            writer.append(wide_rows([request], 2600), slow)
        assert writer.summary() == {"requests": 12, "traced": 4, "sampled_out": 0, "slow": 8, "limited": 0}
        slow.gate.set()
        writer.commit(0)
        writer.flush()
        assert writer.admit([12], [2600]).all()
        writer.append(wide_rows([12], 2600))
        writer.commit(1)
        writer.finish()
    trace = Trace(tmp_path / "t")
    assert np.unique(everything(tmp_path / "t").request).tolist() == [0, 1, 2, 3, 12]
    assert (trace.index.last.slow, trace.index.last.traced, trace.index.last.requests) == (8, 5, 13)
    assert not trace.verify().damaged


def test_what_goes_wrong_while_writing_is_told(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("the device is gone")

    of = about()
    with TraceWriter(of, TraceOptions(tmp_path / "t")) as writer:
        writer.admit([0], [6])
        writer.append(random_rows(of, [0], [0]), fail)
        for action in (writer.flush, writer.finish, lambda: writer.commit(0), lambda: writer.admit([1], [1])):
            with pytest.raises(TraceError, match="the device is gone; 0 tokens are in finished shards, 1 are lost"):
                action()
    assert not (tmp_path / "t").exists()


# ----------------------------------------------------------------------------------------------- crashes and full disks


KILLED = """
import os, signal, sys, time
sys.path.insert(0, {helpers!r})
from pathlib import Path
from traces import about, batch_rows
from moescope.profiler import trace_writer
from moescope.profiler.trace_writer import TraceOptions, TraceWriter
trace_writer.SHARD_BYTES = 7 * about().row_bytes
of = about()
writer = TraceWriter(of, TraceOptions(Path({folder!r})))
for number, requests in enumerate({batches!r}):
    writer.admit(requests, [6] * len(requests))
    for step, rows in enumerate(batch_rows(of, requests, 6, seed=100 * number)):
        if number == 2 and step == 2:
            while writer._stored < 42:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        writer.append(rows)
    writer.commit(number)
"""


def test_a_killed_run_loses_the_last_shard_alone(tmp_path: Path, small_shards: None) -> None:
    whole = TraceRows.concatenate(write_batches(tmp_path / "whole", about(), BATCHES))
    folder = tmp_path / "killed"
    code = KILLED.format(helpers=str(Path(__file__).parents[1] / "helpers"), folder=str(folder), batches=BATCHES)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    trace = Trace(folder)
    assert trace.index.complete is None
    assert trace.tokens == 30  # two batches of 3 and 2 requests
    assert trace.unfinished == 42 - 30  # 46 tokens had been handed over
    (folder / "shard-000006.safetensors.tmp").write_bytes(b"half")
    assert trace.verify() == Verification((), 0, 42, 12, ("shard-000006.safetensors.tmp",))
    assert_rows_equal(everything(folder, unfinished=True), whole.take(slice(0, 42)))
    write_batches(folder, about(), BATCHES[2:], first=2, resume=2)
    assert_rows_equal(everything(folder), whole)
    assert Trace(folder).verify() == Verification((), 0, 60, 0, ())


def write(writer: TraceWriter, rows: TraceRows) -> None:
    writer.append(rows)
    writer.flush()


def test_a_full_disk_keeps_what_was_finished_and_says_what_is_lost(tmp_path: Path, small_shards: None) -> None:
    of, folder = about(), tmp_path / "t"
    steps = [batch_rows(of, requests, 6, seed=i) for i, requests in enumerate(BATCHES)]
    with TraceWriter(of, TraceOptions(folder)) as writer:
        for number in (0, 1):
            writer.admit(BATCHES[number], [6] * len(BATCHES[number]))
            for rows in steps[number]:
                writer.append(rows)
            writer.commit(number)
        writer.flush()
        with (
            full_disk(600),
            pytest.raises(TraceError, match="30 tokens are in finished shards, 9 are lost") as caught,
        ):
            write(writer, steps[2][0].take(slice(0, 9)))
        assert "File too large" in str(caught.value)
        with pytest.raises(TraceError, match="cannot write the trace"):
            writer.append(steps[2][1])
    assert Trace(folder).index.complete is None
    assert Trace(folder).verify() == Verification((), 0, 30, 0, ())
    assert_rows_equal(everything(folder), TraceRows.concatenate([*steps[0], *steps[1]]))


# ------------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("finished", [True, False])
def test_a_resumed_trace_is_that_of_a_whole_run(
    tmp_path: Path, small_shards: None, batches: int, finished: bool
) -> None:
    whole = TraceRows.concatenate(write_batches(tmp_path / "whole", about(), BATCHES))
    folder = tmp_path / "t"
    write_batches(folder, about(), BATCHES[: None if finished else 3])
    if batches == 4 and not finished:
        with pytest.raises(TraceError, match="does not reach batch 3"):
            write_batches(folder, about(), [], resume=4)
        return
    write_batches(folder, about(), BATCHES[batches:], first=batches, resume=batches)
    assert_rows_equal(everything(folder), whole)
    trace = Trace(folder)
    assert (trace.index.last.traced, trace.index.last.requests, trace.index.complete) == (10, 10, True)
    assert trace.verify() == Verification((), 0, 60, 0, ())
    assert [batch.batch for batch in trace.index.batches] == [0, 1, 2, 3]


def test_only_its_own_trace_is_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    write_batches(folder, about(), BATCHES)
    for other, message in (
        (about(uuid="other"), "trace of another run"),
        (about(weights=True), "another choice of --trace-weights"),
        (about(sample=0.5), "another --trace-sample"),
    ):
        with pytest.raises(TraceError, match=message):
            write_batches(folder, other, [], resume=1)
    with pytest.raises(TraceError, match="No such folder"):
        write_batches(tmp_path / "none", about(), [], resume=1)
    assert Trace(folder).verify().rows == 60


def test_a_folder_is_not_overwritten_by_chance(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    write_batches(folder, about(), BATCHES)
    with pytest.raises(TraceError, match="holds a trace; choose another folder for --trace, or --force"):
        write_batches(folder, about(), BATCHES)
    write_batches(folder, about(uuid="new"), BATCHES[:1], force=True)
    assert Trace(folder).about.run.uuid == "new"
    assert len(Trace(folder)) == 18
    (folder / f".{INDEX_NAME}.123.tmp").write_text("")  # of a run that was killed
    write_batches(folder, about(uuid="newer"), BATCHES[:1], force=True)
    assert len(list(folder.iterdir())) == 3
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(TraceError, match=r"holds other files, e\.g\. mine\.txt"):
        write_batches(folder, about(), BATCHES, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="is a file; --trace needs a folder"):
        write_batches(tmp_path / "file", about(), BATCHES)
    with pytest.raises(TraceError, match="cannot write"):
        write_batches(Path("/proc/none"), about(), BATCHES)


@pytest.mark.parametrize("options", [{"force": True}, {"resume": 0}])
def test_two_runs_cannot_share_a_trace(tmp_path: Path, options: dict[str, Any]) -> None:
    with (
        TraceWriter(about(), TraceOptions(tmp_path / "t")),
        pytest.raises(TraceError, match="in use by another run"),
    ):
        write_batches(tmp_path / "t", about(), BATCHES, **options)


def test_a_trace_without_tokens_of_a_run_that_stopped_is_removed(tmp_path: Path) -> None:
    with TraceWriter(about(), TraceOptions(tmp_path / "t")):
        pass
    assert not (tmp_path / "t").exists()
    with TraceWriter(about(), TraceOptions(tmp_path / "t")) as writer:
        writer.commit(0)
        writer.finish()  # a sample may be empty
    with pytest.raises(TraceError, match="holds no tokens"):
        Trace(tmp_path / "t").profile()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": 0.0}, "--trace-sample must be a share above 0"),
        ({"sample": 1.1}, "--trace-sample"),
        ({"sample": float("nan")}, "--trace-sample"),
        ({"memory": LEAST_MEMORY - 1}, "--trace-memory must be at least 16MB"),
        ({"limit": 0}, "--trace-limit"),
        ({"when_slow": "cry"}, "--trace-when-slow must be wait or sample"),
    ],
)
def test_absurd_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TraceOptions(tmp_path / "t", **options)
