"""A thread of a server's worker that writes what was counted, and goes on when the disk fails it."""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Final

from moescope.adapters.vllm_ledger import touched
from moescope.profiler.errors import InvariantError

#: Seconds between two looks at whether there is something to save, and after which an engine is idle.
_LOOK: Final = 0.1
_IDLE: Final = 0.5
#: Seconds until a save that failed is tried again: the first time, and at most.
_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 30.0
#: Seconds that `close` waits for the last save.
PATIENCE: Final = 10.0


@dataclass(frozen=True, slots=True)
class Savable:
    """What a saver saves.

    Attributes:
        progress: A number that grows with what was counted.
        waiting: Whether a snapshot waits to be written.
        take: Takes a snapshot if no step is running.
        write: Writes the snapshot that waits, and returns the progress that it was taken at.
        ended: Told why nothing more is counted, if what was counted does not add up.
    """

    progress: Callable[[], int]
    waiting: Callable[[], bool]
    take: Callable[[], object]
    write: Callable[[], int]
    ended: Callable[[str], None]


class Saver:
    """Writes the snapshots that the scheduler asked for; takes its own when the engine is idle, and at the end.

    Args:
        source: What it saves.
        trigger: A file; when it is touched, an idle engine saves, too.
        error_path: File that says why the last save failed; removed by one that succeeds.
        log: vLLM's logger.
    """

    def __init__(self, source: Savable, trigger: Path, error_path: Path, log: Logger) -> None:
        self._source = source
        self._trigger = trigger
        self._error_path = error_path
        self._log = log
        self._touched = touched(trigger)
        self._kept = self._seen = source.progress()
        self._active = time.monotonic()
        self._failures = 0
        self._retry_at = 0.0
        self._over = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moescope saver", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        closing = False
        while not closing and not self._over:
            closing = self._closed.wait(_LOOK)
            try:
                self._look(closing)
            except Exception as error:  # a thread that dies would lose all that is still to come
                self._failed(error)

    def _look(self, closing: bool) -> None:
        now, progress, trigger = time.monotonic(), self._source.progress(), touched(self._trigger)
        if progress != self._seen:
            self._seen, self._active = progress, now
        if now < self._retry_at and not closing:
            return
        if self._source.waiting():  # the scheduler asked for it
            self._save()
        new = progress != self._kept
        idle = now - self._active >= _IDLE
        if (closing and new) or (idle and (new or trigger != self._touched)):
            self._source.take()
            if self._source.waiting():
                self._save()
                self._touched = trigger

    def _save(self) -> None:
        self._kept = self._source.write()
        if self._failures:
            self._log.info("moescope: saved again after %d failures", self._failures)
        self._failures = 0
        with contextlib.suppress(OSError):
            self._error_path.unlink(missing_ok=True)

    def _failed(self, error: Exception) -> None:
        pause = min(_PAUSE * 2**self._failures, _LONGEST_PAUSE)
        self._failures += 1
        self._retry_at = time.monotonic() + pause
        with contextlib.suppress(OSError):
            self._error_path.write_text(f"{error}\n", encoding="utf-8")
        if isinstance(error, InvariantError):
            self._over = True
            self._log.error("moescope: the recording ends, what was counted does not add up: %s", error)
            self._source.ended(str(error))
        else:
            self._log.warning("moescope: not saved (%s: %s); next try in %.0f s", type(error).__name__, error, pause)

    def close(self) -> None:
        """Save once more and stop; returns after a while even if the disk hangs."""
        self._closed.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._log.error("moescope: the last save did not end within %.0f s", PATIENCE)
