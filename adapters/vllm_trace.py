"""Traces from vLLM: a worker sends the rows of traced requests to the process that writes them, which may be another.

Both ends talk through a socket of the file system. A message is the number of its rows, then the columns of a trace
one after another. What waits in the worker is bounded: where the writer is slower, the engine waits.
"""

import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.adapters.trace_rows import arrival, on_host
from moescope.profiler.errors import EngineError
from moescope.profiler.staged import PHASES
from moescope.profiler.tokens import SPLITS
from moescope.profiler.trace import TraceRows
from moescope.profiler.trace_writer import TraceWriter

#: Bytes that wait in a worker at most.
WAITING: Final = 64 << 20
_COUNT: Final = struct.Struct("<I")
_PATIENCE: Final = 60.0


class TraceSender:
    """The worker's end.

    Args:
        path: The socket.
        experts: E, routed experts of a layer.
        weights: Whether routing weights are traced.

    Attributes:
        weights: Whether routing weights are traced.

    Raises:
        OSError: There is no such socket.
    """

    def __init__(self, path: str, experts: int, *, weights: bool) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._kind = getattr(torch, np.min_scalar_type(experts - 1).name)
        self.weights = weights
        self._queue: deque[tuple[Sequence[NDArray[Any]], Callable[[], object] | None, int]] = deque()
        self._waiting = 0
        self._rows = 0
        self._closing = False
        self._error: Exception | None = None
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="moescope trace", daemon=True)
        self._thread.start()

    def send(
        self,
        requests: NDArray[np.int64],
        positions: NDArray[np.int64],
        cells: NDArray[np.int32],
        token_ids: Tensor,
        ids: Tensor,
        weights: Tensor | None,
    ) -> None:
        """Send some rows of a step; nothing is waited for but room.

        Args:
            requests: (n,) their requests' numbers.
            positions: (n,) places in their requests.
            cells: (n,) where they are counted; see `moescope.profiler.staged.cell_of`.
            token_ids: (n,) on the device.
            ids: (L, n, K) experts on the device.
            weights: (L, n, K) float32 routing weights on the device, the model's scaling divided out; None where they
                are not traced.

        Raises:
            EngineError: The other end is gone.
        """
        tensors = [token_ids.to(torch.int32)]
        if weights is not None:
            tensors.append(weights.transpose(0, 1).to(torch.float16, memory_format=torch.contiguous_format))
        tensors.append(ids.transpose(0, 1).to(self._kind, memory_format=torch.contiguous_format))
        of_cell = cells // (PHASES * SPLITS), cells // SPLITS % PHASES, cells % SPLITS
        columns = [
            requests.astype(np.uint32),
            positions.astype(np.uint32),
            *(on_host(tensor) for tensor in tensors),
            *(column.astype(np.uint8) for column in of_cell),
        ]
        size = sum(column.nbytes for column in columns)
        ready = arrival(ids.device)
        with self._condition:
            self._condition.wait_for(lambda: self._error or not self._waiting or self._waiting + size <= WAITING)
            if self._error is not None:
                raise EngineError(f"the trace cannot be handed over: {self._error}")
            self._waiting += size
            self._rows += len(cells)
            self._queue.append((columns, ready, size))
            self._condition.notify_all()

    def flush(self) -> int:
        """Wait until all rows are sent.

        Returns:
            How many they were.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._error or not self._waiting)
            return self._rows

    def close(self) -> None:
        """Send what waits, and hang up."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join(_PATIENCE)
        self._socket.close()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                columns, ready, size = self._queue.popleft()
            try:
                if ready is not None:
                    ready()
                self._socket.sendall(_COUNT.pack(len(columns[0])))
                for column in columns:
                    self._socket.sendall(column.reshape(-1).view(np.uint8).data)
            except Exception as error:  # whatever it is, the recorder must hear of it
                self._error = error
            with self._condition:
                self._waiting -= size
                if self._error is not None:
                    self._queue.clear()
                    self._waiting = 0
                self._condition.notify_all()
            if self._error is not None:
                return


class TraceReceiver:
    """The writer's end.

    Args:
        writer: Where rows go.
        path: The socket to listen at.
    """

    def __init__(self, writer: TraceWriter, path: Path) -> None:
        self.writer = writer
        self.path = path
        self._places = np.zeros(0, np.uint8)
        self._rows = 0
        self._error: Exception | None = None
        self._condition = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._work, name="moescope trace receiver", daemon=True)
        self._thread.start()

    def expect(self, places: Sequence[int]) -> None:
        """The rows to come name the run's domains by their place here."""
        self._places = np.array(places, np.uint8)

    def wait_for(self, rows: int) -> None:
        """Wait until so many rows have come since the start.

        Raises:
            EngineError: They do not come.
            TraceError: Writing failed.
        """
        with self._condition:
            came = self._condition.wait_for(lambda: self._error or self._rows >= rows, _PATIENCE)
        if self._error is not None:
            raise self._error
        if not came or self._rows != rows:
            raise EngineError(f"{self._rows:,} rows of the trace came from vLLM instead of {rows:,}")

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(_PATIENCE)
        self.path.unlink(missing_ok=True)

    def _work(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._socket.accept()
            with connection:
                self._receive(connection)

    def _receive(self, connection: socket.socket) -> None:
        columns = self.writer.about.columns
        while (head := _read(connection, _COUNT.size)) is not None:
            (count,) = _COUNT.unpack(head)
            found: dict[str, NDArray[Any]] = {}
            for name, (kind, shape) in columns.items():
                content = _read(connection, count * kind.itemsize * int(np.prod(shape, dtype=np.int64)))
                if content is None:
                    return
                found[name] = np.frombuffer(content, kind).reshape(count, *shape)
            try:
                if (
                    self._error is None
                ):  # after one, go on reading: the engine must not wait for a room that never comes
                    self._append(found)
            except Exception as error:  # whatever it is, the run must hear of it
                self._error = error
            with self._condition:
                self._rows += count
                self._condition.notify_all()

    def _append(self, columns: Mapping[str, NDArray[Any]]) -> None:
        self.writer.append(TraceRows(**{**columns, "domain": self._places[columns["domain"]]}))


def _read(connection: socket.socket, size: int) -> bytearray | None:
    """So many bytes; None at the end."""
    content = bytearray(size)
    rest = memoryview(content)
    while rest:
        done = connection.recv_into(rest)
        if not done:
            return None
        rest = rest[done:]
    return content
