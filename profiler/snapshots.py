"""Read what a recorder has counted while its engine runs on.

A snapshot is enqueued between two commits: a copy on the device, on the engine's own stream, and from there a copy to
pinned memory on a stream of its own, ended by an event. Only the reader waits for that event; the engine never does.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.profiler.staged import PHASES, StagedRecorder, StagedSums
from moescope.profiler.tokens import SPLITS

#: Buffers whose first axis goes over cells, and over domains and phases; the rest is copied whole.
_BY_CELL: Final = {"counts": PHASES * SPLITS, "weights": PHASES, "distributions": PHASES}


class Snapshots:
    """The sums of a recorder as they were between two of its commits, one snapshot at a time.

    Args:
        recorder: The recorder; its sums are held twice more, on its device and on the host.
    """

    def __init__(self, recorder: StagedRecorder) -> None:
        self._recorder = recorder
        self._on_gpu = recorder.device.type == "cuda"
        self._source = recorder.buffers()
        self._host = {
            name: torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=self._on_gpu)
            for name, buffer in self._source.items()
        }
        self._between: dict[str, Tensor] = {}
        if self._on_gpu:
            self._between = {name: torch.empty_like(buffer) for name, buffer in self._source.items()}
            self._stream = torch.cuda.Stream(recorder.device)  # type: ignore[no-untyped-call]
            self._taken = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._lengths: tuple[NDArray[np.int64], NDArray[np.int64]] = recorder.lengths()
        self._domains = 0
        self._about: Any = None
        self._free = threading.Semaphore()
        self._waiting = threading.Event()

    @property
    def nbytes(self) -> int:
        """Bytes that it holds on the recorder's device."""
        return sum(buffer.nbytes for buffer in self._between.values())

    @property
    def waiting(self) -> bool:
        """Whether a snapshot was taken that nobody has read."""
        return self._waiting.is_set()

    def take(self, domains: int, about: Any = None) -> bool:
        """Enqueue a copy of the sums; waits for nothing.

        To be called where nothing is being committed: by the thread that commits, or under a lock that it takes too.

        Args:
            domains: How many of the first domains are in use.
            about: What belongs to the same moment; handed to the reader.

        Returns:
            False if the last snapshot has not been read yet: then nothing was done.
        """
        if not self._free.acquire(blocking=False):
            return False
        try:
            self._domains, self._about = domains, about
            self._lengths = self._recorder.lengths()
            if self._on_gpu:
                self._enqueue()
            else:
                for name, buffer in self._source.items():
                    self._part(name, self._host).copy_(self._part(name, {name: buffer}))
        except BaseException:
            self._free.release()
            raise
        self._waiting.set()
        return True

    def _enqueue(self) -> None:
        engine = self._recorder.stream
        assert engine is not None
        with torch.inference_mode(), torch.cuda.stream(engine):
            for name in self._source:
                self._part(name, self._between).copy_(self._part(name, self._source), non_blocking=True)
            self._taken.record(engine)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._stream.wait_event(self._taken)
            for name in self._source:
                self._part(name, self._host).copy_(self._part(name, self._between), non_blocking=True)
            self._arrived.record(self._stream)

    def _part(self, name: str, buffers: dict[str, Tensor]) -> Tensor:
        """The rows of the domains in use."""
        rows = _BY_CELL.get(name)
        return buffers[name] if rows is None else buffers[name][: self._domains * rows]

    @contextmanager
    def read(self) -> Iterator[tuple[StagedSums, Any]]:
        """The snapshot that is waiting, and what `take` was told about it; arrays hold until the end of the block.

        Raises:
            InvariantError: It does not add up.
            RuntimeError: None is waiting.
        """
        if not self._waiting.is_set():
            raise RuntimeError("no snapshot was taken")
        try:
            if self._on_gpu:
                self._arrived.synchronize()
            arrays = {name: buffer.numpy() for name, buffer in self._host.items()}
            yield self._recorder.sums_of(arrays, self._lengths, self._domains), self._about
        finally:
            self._waiting.clear()
            self._free.release()
