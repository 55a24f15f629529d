"""Ctrl-C that never falls between two sums."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interruptible() -> Iterator["Interrupts"]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt, except inside `held` blocks, which they wait for.

    Outside the main thread signals cannot be handled; there the handlers stay as they are.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.signal(number, interrupts.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupts:
    """State of the signal handler that `interruptible` installs."""

    def __init__(self) -> None:
        self._held = False
        self._pending = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._held:
            self._pending = True
        else:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """From here on signals wait for good: what is left to do is short and must be done."""
        self._held = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A block that finishes first; a signal that came meanwhile is raised at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt
