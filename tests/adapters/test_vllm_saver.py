"""The thread that saves: a disk that fails, hangs and comes back, and counts that do not add up."""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moescope.adapters import vllm_saver
from moescope.adapters.vllm_saver import Savable, Saver
from moescope.profiler.errors import InvariantError, OutputError

LOG = logging.getLogger("vllm.moescope.test")


class Source:
    """Counts by hand; a snapshot is the number counted, and writing it puts it into a file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "recorded" / "part"
        self.counted = 0
        self.snapshot: int | None = None
        self.refused = ""
        self.writes = 0
        self.hangs = threading.Event()

    def take(self) -> None:
        self.snapshot = self.counted

    def write(self) -> int:
        snapshot, self.snapshot = self.snapshot, None
        assert snapshot is not None
        self.writes += 1
        if self.hangs.is_set():
            time.sleep(60)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name("draft")
        draft.write_text(str(snapshot))
        draft.replace(self.path)
        return snapshot

    def saver(self, folder: Path) -> Saver:
        source = Savable(
            lambda: self.counted,
            lambda: self.snapshot is not None,
            self.take,
            lambda: self.write(),
            lambda reason: setattr(self, "refused", reason),
        )
        return Saver(source, folder / "save", folder / "error.txt", LOG)

    @property
    def saved(self) -> int:
        return int(self.path.read_text()) if self.path.exists() else -1


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_LOOK", 0.01), ("_IDLE", 0.1), ("_PAUSE", 0.05), ("PATIENCE", 0.5)):
        monkeypatch.setattr(vllm_saver, name, value)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_saves_when_the_engine_is_idle_when_asked_and_at_the_end(tmp_path: Path) -> None:
    source = Source(tmp_path)
    saver = source.saver(tmp_path)
    source.counted = 3
    wait_for(lambda: source.saved == 3)
    time.sleep(0.3)
    assert source.writes == 1  # nothing new, nothing written
    (tmp_path / "save").touch()
    wait_for(lambda: source.writes == 2)
    source.counted = 4
    saver.close()
    assert source.saved == 4


def test_it_writes_what_the_scheduler_asked_for_while_the_engine_is_busy(tmp_path: Path) -> None:
    source = Source(tmp_path)
    saver = source.saver(tmp_path)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        source.counted += 1
        time.sleep(0.001)
        if source.counted == 50:
            source.take()
    assert source.saved == 50
    saver.close()
    assert source.saved == source.counted


def test_a_disk_that_fails_is_tried_again_and_nothing_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Source(tmp_path)
    folder = source.path.parent
    folder.touch()  # a folder that cannot be made
    with caplog.at_level(logging.INFO, LOG.name):
        saver = source.saver(tmp_path)
        source.counted = 7
        wait_for(lambda: source.writes >= 4)
        assert "File exists" in (tmp_path / "error.txt").read_text()
        folder.unlink()
        wait_for(lambda: source.saved == 7)
        wait_for(lambda: not (tmp_path / "error.txt").exists())
        saver.close()
    pauses = [record.args[2] for record in caplog.records if "not saved" in record.message and record.args]
    assert pauses == sorted(pauses)
    assert pauses[-1] >= 4 * pauses[0]
    assert "saved again" in caplog.text


def test_an_error_file_that_cannot_be_written_does_not_stop_it(tmp_path: Path) -> None:
    source = Source(tmp_path)
    source.path.parent.touch()
    (tmp_path / "error.txt").mkdir()
    saver = source.saver(tmp_path)
    source.counted = 7
    wait_for(lambda: source.writes >= 3)
    os.unlink(source.path.parent)
    wait_for(lambda: source.saved == 7)
    saver.close()


@pytest.mark.parametrize("error", [OSError("?"), OutputError("cannot write"), RuntimeError("CUDA"), MemoryError()])
def test_any_error_is_survived(tmp_path: Path, error: Exception) -> None:
    source = Source(tmp_path)
    write, errors = source.write, [error, error]

    def failing() -> int:
        if errors:
            source.snapshot = None
            raise errors.pop()
        return write()

    source.write = failing  # type: ignore[method-assign]
    saver = source.saver(tmp_path)
    source.counted = 2
    wait_for(lambda: source.saved == 2)
    saver.close()


def test_counts_that_do_not_add_up_end_it(tmp_path: Path) -> None:
    source = Source(tmp_path)

    def wrong() -> int:
        source.writes += 1
        source.snapshot = None
        raise InvariantError("layer 3: selections sum to 1")

    source.write = wrong  # type: ignore[method-assign]
    saver = source.saver(tmp_path)
    source.counted = 2
    wait_for(lambda: bool(source.refused))
    assert source.refused == "layer 3: selections sum to 1"
    assert (tmp_path / "error.txt").read_text() == "layer 3: selections sum to 1\n"
    source.counted = 3
    time.sleep(0.3)
    assert source.writes == 1
    saver.close()


def test_a_disk_that_hangs_does_not_hold_up_the_shutdown(tmp_path: Path) -> None:
    source = Source(tmp_path)
    source.hangs.set()
    saver = source.saver(tmp_path)
    source.counted = 1
    wait_for(lambda: source.writes == 1)
    began = time.monotonic()
    saver.close()
    assert time.monotonic() - began < 5
