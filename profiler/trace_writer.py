"""Writing traces: rows wait in bounded memory while a thread puts them into shards on the disk."""

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from moescope.profiler.errors import OptionError, TraceError
from moescope.profiler.files import atomic_path
from moescope.profiler.trace import (
    ABOUT_NAME,
    INDEX_NAME,
    SHARD_NAME,
    Batch,
    Index,
    Shard,
    Trace,
    TraceAbout,
    TraceRows,
    index_line,
    read_about,
    read_index,
    shard_header,
)

#: A shard is finished when it has this size or this age, whichever comes first.
SHARD_BYTES: Final = 64 * 10**6
SHARD_SECONDS: Final = 5.0
#: Least memory: a few shards of a size that is worth a file.
LEAST_MEMORY: Final = 16 * 10**6

WhenSlow = Literal["wait", "sample"]


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What is traced, and where to.

    Attributes:
        folder: The trace.
        sample: Share of the requests to trace, whole ones, by a hash of the seed and the request's number.
        weights: Trace routing weights too (float16).
        limit: Most bytes of all shards, or None. A request is left out unless the longest it can get still fits.
        memory: Most bytes of host memory that the writer takes.
        when_slow: When the disk is too slow, "wait", or "sample": leave out whole requests, and count them.
        force: Replace the trace that lies in the folder.

    Raises:
        OptionError: A value that cannot be used.
    """

    folder: Path
    sample: float = 1.0
    weights: bool = False
    limit: int | None = None
    memory: int = 512 * 10**6
    when_slow: WhenSlow = "wait"
    force: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.sample <= 1:
            raise OptionError(f"--trace-sample must be a share above 0 and up to 1, not {self.sample}")
        if self.memory < LEAST_MEMORY:
            raise OptionError(f"--trace-memory must be at least {LEAST_MEMORY // 10**6}MB, not {self.memory} bytes")
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"--trace-limit must be a size, e.g. 10GB, not {self.limit}")
        if self.when_slow not in ("wait", "sample"):
            raise OptionError(f"--trace-when-slow must be wait or sample, not {self.when_slow!r}")


@dataclass(slots=True)
class _Piece:
    """Rows on their way, the end of a batch, or a wish to have all of it on disk."""

    rows: TraceRows | None = None
    ready: Callable[[], object] | None = None
    size: int = 0
    batch: Batch | None = None
    flush: bool = False


class TraceWriter:
    """Writes a trace. One thread feeds it: `admit` requests, `append` their rows, `commit` the batch, `finish`.

    Rows of many requests may come in one call; those of one request come in order. What `append` was given must not
    be changed afterwards. Where requests end at different times inside a batch, `release` tells of it.

    Args:
        about: What the trace is of; with `resume`, it must be what the folder says.
        options: Where to, and how much.
        seed: Of the sample.
        resume: Go on after so many finished batches of the trace in the folder, and drop what came after them.

    Raises:
        TraceError: The folder cannot be written, holds something else or a trace that must not be replaced, is in use
            by another run, or (with `resume`) does not reach that batch.
    """

    def __init__(self, about: TraceAbout, options: TraceOptions, *, seed: int = 0, resume: int | None = None) -> None:
        self.about = about
        self._options = options
        self._folder = options.folder
        self._key = seed.to_bytes(8, "little")
        row = about.row_bytes
        self._shard_rows = max(1, min(SHARD_BYTES, options.memory // 4) // row)
        self._head = len(shard_header(about, self._shard_rows))
        # beside the ring there is the shard that grows, and what the feeder is about to hand over
        self._room = options.memory - 2 * self._shard_rows * row
        self._lock: IO[bytes] | None = None
        self._index = self._open(resume)
        self._batch = self._index.last
        self._names = max((int(shard.name[6:-12]) for shard in self._index.shards), default=-1) + 1
        self._written = sum(shard.bytes for shard in self._index.shards)
        self._rows = self._index.rows  # handed over
        self._stored = self._rows  # in finished shards
        self._reserved: dict[int, int] = {}  # rows that admitted requests may still bring
        self._shard = TraceRows(
            **{name: np.empty((self._shard_rows, *shape), kind) for name, (kind, shape) in about.columns.items()}
        )
        self._filled = 0
        self._begun = 0.0  # when the growing shard got its first row
        self._ends: list[Batch] = []  # batches whose last rows are not in a finished shard yet
        self._queue: deque[_Piece] = deque()
        self._used = 0
        self._busy = False
        self._closing = False
        self._error: BaseException | None = None
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="moescope trace", daemon=True)
        self._thread.start()

    def summary(self) -> dict[str, int]:
        """How many requests of the run are in the trace, and how many were left out and why; see `Batch`."""
        return {name: getattr(self._batch, name) for name in ("requests", "traced", "sampled_out", "slow", "limited")}

    def admit(self, requests: Sequence[int], most: Sequence[int]) -> NDArray[np.bool_]:
        """Decide of requests that begin whether they are traced; their rows are whole in the trace or not there.

        Args:
            requests: (n,) their numbers, below 2**32.
            most: (n,) tokens that each can get at most.

        Returns:
            bool (n,), True for those whose rows are to be appended.

        Raises:
            TraceError: Writing failed.
        """
        self._raise()
        chosen = np.zeros(len(requests), np.bool_)
        counts = dict.fromkeys(("traced", "sampled_out", "slow", "limited"), 0)
        with self._condition:
            waiting = self._used
        for place, (request, rows) in enumerate(zip(requests, most, strict=True)):
            if self._hash(request) >= self._options.sample:
                why = "sampled_out"
            elif self._options.limit is not None and self._promised(rows) > self._options.limit:
                why = "limited"
            elif self._options.when_slow == "sample" and waiting > self._room // 2:
                why = "slow"
            else:
                why = "traced"
                waiting += rows * self.about.row_bytes
                chosen[place] = True
                self._reserved[request] = rows
            counts[why] += 1
        before = self._batch
        self._batch = replace(
            before,
            requests=before.requests + len(chosen),
            **{why: getattr(before, why) + count for why, count in counts.items()},
        )
        return chosen

    def append(self, rows: TraceRows, ready: Callable[[], object] | None = None) -> None:
        """Hand rows of admitted requests over; waits while memory is full.

        Args:
            rows: At least one token; arrays of the trace's types.
            ready: Called, in the writing thread, before the rows are read: waits until they have arrived.

        Raises:
            TraceError: Writing failed.
        """
        piece = _Piece(rows, ready, len(rows) * self.about.row_bytes)
        self._rows += len(rows)
        if self._options.limit is not None:
            numbers, counts = np.unique(rows.request, return_counts=True)
            for request, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                self._reserved[request] = max(self._reserved.get(request, 0) - count, 0)
        with self._condition:
            self._condition.wait_for(lambda: self._error or not self._used or self._used + piece.size <= self._room)
            self._raise()
            self._used += piece.size
            self._queue.append(piece)
            self._condition.notify_all()

    def release(self, requests: Sequence[int]) -> None:
        """These requests have come to their end, so others may take the room that was kept for them."""
        for request in requests:
            self._reserved.pop(request, None)

    def commit(self, batch: int) -> None:
        """All rows so far are those of whole batches that were held against their requests' own lengths.

        All requests that were admitted have come to their end.

        Raises:
            TraceError: Writing failed.
        """
        self._raise()
        self._reserved.clear()
        self._batch = replace(self._batch, batch=batch, rows=self._rows)
        with self._condition:
            self._queue.append(_Piece(batch=self._batch))
            self._condition.notify_all()

    def flush(self) -> None:
        """Wait until everything handed over is on disk.

        Raises:
            TraceError: Writing failed.
        """
        with self._condition:
            self._queue.append(_Piece(flush=True))
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._error or not (self._queue or self._busy))
        self._raise()

    def finish(self) -> None:
        """Put everything on disk and note that the run came to its end.

        Raises:
            TraceError: Writing failed.
        """
        self.flush()
        self._stop()
        self._guard(lambda: self._note(True))
        self._raise()

    def close(self) -> None:
        """Keep what was handed over; after `finish`, do nothing but let go of the folder.

        The trace then says that its run did not come to its end. One without any token is removed.
        """
        if self._lock is None:
            return
        if self._thread.is_alive():
            with contextlib.suppress(TraceError):
                self.flush()
            self._stop()
            if self._error is None:
                self._guard(lambda: self._note(False))
        empty = not self._stored and (self._error is not None or self._batch.batch < 0)
        self._lock.close()
        self._lock = None
        if empty:
            _remove(self._folder)
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hash(self, request: int) -> float:
        digest = hashlib.blake2b(self._key + request.to_bytes(8, "little"), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64

    def _promised(self, more: int) -> int:
        """Bytes of the shards if every admitted request, and `more` rows, get as long as they can."""
        waiting = self._rows - self._stored + sum(self._reserved.values()) + more
        heads = (waiting // self._shard_rows + 2) * self._head
        return self._written + heads + waiting * self.about.row_bytes

    # ------------------------------------------------------------------------------------------------- opening

    def _open(self, resume: int | None) -> Index:
        """Take the folder; what is kept of the trace in it."""
        folder = self._folder
        if folder.exists() and not folder.is_dir():
            raise TraceError(f"{folder} is a file; --trace needs a folder")
        try:
            if resume is None:
                self._claim_new(folder)
            else:
                _check_same(read_about(folder), self.about, folder)
            self._take_index()
            return Index() if resume is None else self._cut(resume)
        except BlockingIOError as error:
            self._release()
            raise TraceError(f"{folder} is in use by another run; choose another --trace") from error
        except OSError as error:
            self._release()
            raise TraceError(f"cannot write into {folder}: {error.strerror or error}") from error
        except BaseException:
            self._release()
            raise

    def _take_index(self) -> None:
        """Open the index, and lock it until close."""
        self._release()
        self._lock = open(self._folder / INDEX_NAME, "ab", buffering=0)  # noqa: SIM115 - held until close
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _claim_new(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        others = [entry.name for entry in folder.iterdir() if not _ours(entry.name)]
        if others:
            raise TraceError(f"{folder} holds other files, e.g. {others[0]}; choose another folder for --trace")
        if any(folder.iterdir()):
            if not self._options.force:
                raise TraceError(f"{folder} holds a trace; choose another folder for --trace, or --force to replace it")
            with open(folder / INDEX_NAME, "ab") as index:
                fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)
        with atomic_path(folder / ABOUT_NAME) as temporary:
            temporary.write_text(self.about.text(), encoding="utf-8")

    def _cut(self, batches: int) -> Index:
        """Drop what came after the first `batches` batches, so that they can be run again."""
        found = read_index(self._folder)
        last = next((b for b in found.batches if b.batch == batches - 1 and b.rows <= found.rows), None)
        if last is None and batches:
            raise TraceError(
                f"{self._folder} does not reach batch {batches - 1}, up to which the profile goes; "
                "--resume needs the trace of the interrupted run"
            )
        rows = 0 if last is None else last.rows
        kept: list[Shard] = []
        for shard in found.shards:
            room = rows - sum(other.rows for other in kept)
            if shard.rows <= room:
                kept.append(shard)
            elif room:
                name = _shard_name(max(int(other.name[6:-12]) for other in found.shards) + 1)
                kept.append(self._store(name, Trace(self._folder, unfinished=True).read_shard(shard, 0, room)))
        index = Index(tuple(kept), tuple(b for b in found.batches if b.batch < batches))
        with atomic_path(self._folder / INDEX_NAME) as temporary:
            entries: list[Shard | Batch] = [*index.shards, *index.batches]
            temporary.write_text("".join(map(index_line, entries)), encoding="utf-8")
        self._take_index()  # the file was replaced
        names = {shard.name for shard in kept}
        for entry in list(self._folder.glob("shard-*")):
            if entry.name not in names:
                entry.unlink()
        return index

    # ------------------------------------------------------------------------------------------------- the thread

    def _raise(self) -> None:
        if self._error is not None:
            raise TraceError(
                f"cannot write the trace {self._folder}: {getattr(self._error, 'strerror', None) or self._error}; "
                f"{self._stored:,} tokens are in finished shards, {self._rows - self._stored:,} are lost"
            ) from self._error

    def _stop(self) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._condition:
                age = self._begun + SHARD_SECONDS - time.monotonic() if self._filled else None
                self._condition.wait_for(lambda: self._queue or self._closing, age if age is None else max(age, 0))
                piece = self._queue.popleft() if self._queue else None
                self._busy = True
            if piece is None and self._closing:
                return
            self._guard(lambda piece=piece: self._handle(piece))  # type: ignore[misc]
            with self._condition:
                self._used -= piece.size if piece is not None else 0
                self._busy = False
                if self._error is not None:
                    self._queue.clear()
                    self._used = 0
                self._condition.notify_all()
            if self._error is not None:
                return

    def _guard(self, action: Callable[[], None]) -> None:
        """Run `action`; what goes wrong is told to the thread that feeds."""
        try:
            action()
        except Exception as error:  # whatever it is, the feeding thread must hear of it
            self._error = error

    def _handle(self, piece: _Piece | None) -> None:
        if piece is not None and piece.rows is not None:
            if piece.ready is not None:
                piece.ready()
            self._fill(piece.rows)
        if piece is not None and piece.batch is not None:
            self._ends.append(piece.batch)
        old = self._filled and time.monotonic() - self._begun >= SHARD_SECONDS
        if old or (piece is not None and piece.flush):
            self._finish_shard()
        self._note_batches()

    def _fill(self, rows: TraceRows) -> None:
        done = 0
        while done < len(rows):
            if not self._filled:
                self._begun = time.monotonic()
            count = min(len(rows) - done, self._shard_rows - self._filled)
            for field in fields(TraceRows):
                target = getattr(self._shard, field.name)
                if target is not None:
                    target[self._filled : self._filled + count] = getattr(rows, field.name)[done : done + count]
            self._filled += count
            done += count
            if self._filled == self._shard_rows:
                self._finish_shard()

    def _finish_shard(self) -> None:
        if not self._filled:
            return
        shard = self._store(_shard_name(self._names), self._shard.take(slice(0, self._filled)))
        self._line(index_line(shard))
        self._names += 1
        self._written += shard.bytes
        self._stored += shard.rows
        self._filled = 0

    def _store(self, name: str, rows: TraceRows) -> Shard:
        """Write rows as a shard, in one step, and make sure that the disk has it."""
        path = self._folder / name
        temporary = path.with_name(f"{name}.tmp")
        parts: list[Any] = [shard_header(self.about, len(rows))]
        parts += [getattr(rows, column).reshape(-1).view(np.uint8) for column in self.about.columns]
        checksum = size = 0
        try:
            with open(temporary, "wb", buffering=0) as file:
                for part in parts:
                    checksum = zlib.crc32(part, checksum)
                    size += len(part)
                    _write(file, part)
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _synchronise(self._folder)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        return Shard(name, len(rows), size, checksum, int(rows.request.min()), int(rows.request.max()))

    def _note_batches(self) -> None:
        done = [batch for batch in self._ends if batch.rows <= self._stored]
        if done:
            self._line("".join(map(index_line, done)))
            del self._ends[: len(done)]

    def _note(self, complete: bool) -> None:
        self._line(index_line(complete))

    def _line(self, text: str) -> None:
        """Append to the index, in one write."""
        if self._lock is not None:
            _write(self._lock, text.encode())
            os.fsync(self._lock.fileno())


def _write(file: IO[bytes], data: Any) -> None:
    """Write all of it; an unbuffered file may take it in parts."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _synchronise(folder: Path) -> None:
    """Make sure that the disk has the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shard_name(number: int) -> str:
    return f"shard-{number:06}.safetensors"


def _ours(name: str) -> bool:
    """Whether a file of this name belongs to a trace; some are left where a run was killed while it wrote them."""
    half = re.fullmatch(rf"\.({re.escape(ABOUT_NAME)}|{re.escape(INDEX_NAME)})\.[0-9]+\.tmp", name)
    whole = name in (ABOUT_NAME, INDEX_NAME) or SHARD_NAME.fullmatch(name.removesuffix(".tmp"))
    return bool(half or whole)


def _remove(folder: Path) -> None:
    for entry in list(folder.iterdir()):
        if _ours(entry.name):
            entry.unlink()


def _check_same(there: TraceAbout, here: TraceAbout, folder: Path) -> None:
    for what, before, now in (
        ("run", there.run.uuid, here.run.uuid),
        ("choice of --trace-weights", there.weights, here.weights),
        ("--trace-sample", there.sample, here.sample),
    ):
        if before != now:
            raise TraceError(f"{folder} is the trace of another {what} than this one; --resume goes on with its own")
