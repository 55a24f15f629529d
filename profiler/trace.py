"""Traces: which experts each token of each request was sent to; the format, and reading it back.

A trace is a folder. `trace.json` says what was run; shards hold the tokens; `index.jsonl` gets a line when a shard is
finished and when a batch is held against its requests' own lengths, so that after a crash all but the last shard is
there. A shard is a safetensors file (a header of JSON, then plain arrays: any tool reads it, and a row's bytes can be
found without reading the others), complete in itself:

| tensor | dtype, shape | |
|---|---|---|
| `request` | uint32 [T] | number of the request; rows of several may alternate, those of one are in order |
| `position` | uint32 [T] | place of the token in its request |
| `token` | int32 [T] | token id |
| `weights` | float16 [T,L,K] | routing weights, before `routed_scaling_factor`; if recorded |
| `experts` | uint8, uint16 or uint32 [T,L,K] | expert ids: the narrowest type that holds them |
| `domain`, `phase`, `split` | uint8 [T] | place in `domains`; 0 prefill, 1 decode; split of the request |

K is the largest k of all layers; a layer with a smaller one has zeros past its own.
"""

import contextlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from moescope.profiler.errors import MoescopeError, TraceError
from moescope.profiler.profile import (
    FIXED_POINT_BITS,
    PHASES,
    ModelInfo,
    RoutingProfile,
    RunInfo,
    axis_sizes,
    header,
    parse_header,
)
from moescope.profiler.tokens import MAX_DOMAINS, SPLITS

FORMAT_VERSION: Final = 1
ABOUT_NAME: Final = "trace.json"
INDEX_NAME: Final = "index.jsonl"
SHARD_NAME: Final = re.compile(r"shard-[0-9]{6,12}\.safetensors")

_LARGEST_TEXT: Final = 1 << 28
_LARGEST_SHARD: Final = 1 << 32
#: Rows of other requests that are read rather than skipped, because each read costs too.
_SKIPPED_ROWS: Final = 1 << 10
#: Rows counted at a time: bounds temporary memory to some tens of MB.
_COUNTED_ROWS: Final = 1 << 16
_SAFETENSORS_NAMES: Final = {"uint8": "U8", "uint16": "U16", "uint32": "U32", "int32": "I32", "float16": "F16"}


@dataclass(frozen=True, slots=True, eq=False)
class TraceRows:
    """T tokens of a trace.

    Attributes:
        request: uint32 (T,), number of the request.
        position: uint32 (T,), place of the token in its request.
        token: int32 (T,), token id.
        domain: uint8 (T,), place in the trace's domains.
        phase: uint8 (T,), 0 prefill, 1 decode.
        split: uint8 (T,), split of the request.
        experts: unsigned (T, L, K), expert ids; zero past a layer's own k.
        weights: float16 (T, L, K), routing weights, or None where they were not recorded.
    """

    request: NDArray[np.uint32]
    position: NDArray[np.uint32]
    token: NDArray[np.int32]
    domain: NDArray[np.uint8]
    phase: NDArray[np.uint8]
    split: NDArray[np.uint8]
    experts: NDArray[np.unsignedinteger[Any]]
    weights: NDArray[np.float16] | None = None

    def __len__(self) -> int:
        return len(self.request)

    def take(self, where: Any) -> "TraceRows":
        """The rows that a numpy index of one axis names."""
        taken: dict[str, Any] = {}
        for field in fields(self):
            array = getattr(self, field.name)
            taken[field.name] = None if array is None else array[where]
        return TraceRows(**taken)

    @classmethod
    def concatenate(cls, parts: Sequence["TraceRows"]) -> Self:
        """The rows of `parts`, at least one, one after the other."""
        whole: dict[str, Any] = {}
        for field in fields(cls):
            arrays = [getattr(part, field.name) for part in parts]
            whole[field.name] = None if arrays[0] is None else np.concatenate(arrays)
        return cls(**whole)


@dataclass(frozen=True, slots=True)
class TraceAbout:
    """What a trace is of: `trace.json`.

    Attributes:
        model: The model, with its layers.
        domains: Names of the domains, sorted.
        run: The run that was traced, as it began.
        version: Version of moescope that wrote it.
        weights: Whether routing weights are in it.
        sample: Share of the requests that were to be traced.
    """

    model: ModelInfo
    domains: tuple[str, ...]
    run: RunInfo
    version: str
    weights: bool = False
    sample: float = 1.0

    @property
    def columns(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and row shape of each tensor of a shard, in the order of the file: wide types first, so all align."""
        routed = (len(self.model.layers), max(self.model.top_k))
        byte = np.dtype(np.uint8)
        found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "request": (np.dtype(np.uint32), ()),
            "position": (np.dtype(np.uint32), ()),
            "token": (np.dtype(np.int32), ()),
            "weights": (np.dtype(np.float16), routed),
            "experts": (np.min_scalar_type(max(self.model.experts) - 1), routed),
            "domain": (byte, ()),
            "phase": (byte, ()),
            "split": (byte, ()),
        }
        if not self.weights:
            del found["weights"]
        return dict(sorted(found.items(), key=lambda item: -item[1][0].itemsize))

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in a shard."""
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.columns.values())

    def text(self) -> str:
        """JSON text of `trace.json`."""
        sizes = axis_sizes(self.model, self.domains)
        counts = np.zeros((sizes["D"], sizes["P"]), np.int64)
        empty = _profile(self, (self.run,), counts, np.zeros((1, *(sizes[a] for a in "DPLE")), np.int64), None)
        about = {
            "format_version": FORMAT_VERSION,
            "kind": "moescope trace",
            "weights": self.weights,
            "sample": self.sample,
            "profile": json.loads(header(empty)),
        }
        return json.dumps(about, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `text`.

        Raises:
            TraceError: Not a trace, of a newer format, or damaged.
        """
        try:
            about = json.loads(text)
            if about["kind"] != "moescope trace":
                raise KeyError("kind")
            version = about["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TraceError("it is not the header of a moescope trace") from error
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise TraceError(
                f"it was written in trace format {version!r}; this moescope reads up to {FORMAT_VERSION}: "
                "upgrade moescope"
            )
        try:
            found = parse_header(json.dumps(about["profile"]))
            trace = cls(
                model=found["model"],
                domains=found["domains"],
                run=found["runs"][0],
                version=found["version"],
                weights=bool(about["weights"]),
                sample=float(about["sample"]),
            )
            layers = trace.model.layers
            if not 1 <= len(trace.domains) <= MAX_DOMAINS:
                raise ValueError(f"{len(trace.domains)} domains")
            if not layers or any(not 1 <= i.top_k <= i.experts <= 2**32 for i in layers) or trace.row_bytes > 1 << 30:
                raise ValueError("its layers cannot be")
            return trace
        except (KeyError, IndexError, TypeError, ValueError, MoescopeError) as error:
            raise TraceError(f"its header is damaged ({error})") from error


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished shard: a line of the index.

    Attributes:
        name: File in the folder.
        rows: Tokens in it.
        bytes: Size of the file.
        crc32: zlib.crc32 of the file.
        first_request: Smallest request number in it.
        last_request: Largest.
    """

    name: str
    rows: int
    bytes: int
    crc32: int
    first_request: int
    last_request: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that was held against its requests' own lengths: a line of the index.

    Attributes:
        batch: Its number, from 0.
        rows: Tokens of the trace up to its end.
        requests: Requests of the run so far.
        traced: Those that are in the trace.
        sampled_out: Those that the sample left out.
        slow: Those left out because the disk was too slow.
        limited: Those left out because the trace had reached its limit.
    """

    batch: int = -1
    rows: int = 0
    requests: int = 0
    traced: int = 0
    sampled_out: int = 0
    slow: int = 0
    limited: int = 0


@dataclass(frozen=True, slots=True)
class Index:
    """`index.jsonl`: what was finished, in order.

    Attributes:
        shards: Shards.
        batches: Batches; their rows may lie in shards that a crash lost.
        complete: Whether the run came to its end; None if it was cut off before it could say.
    """

    shards: tuple[Shard, ...] = ()
    batches: tuple[Batch, ...] = ()
    complete: bool | None = None

    @property
    def rows(self) -> int:
        """Tokens in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def last(self) -> Batch:
        """The last batch whose tokens are all there."""
        return next((batch for batch in reversed(self.batches) if batch.rows <= self.rows), Batch())


@dataclass(frozen=True, slots=True)
class Verification:
    """What `Trace.verify` found.

    Attributes:
        damaged: Name and fault of each shard that does not verify.
        rows_lost: Tokens in those.
        rows: Tokens that verify, those of an unfinished batch included.
        unfinished: Tokens of a batch that did not come to its end.
        unlisted: Shard files that are not in the index: a crash came before they were finished.
    """

    damaged: tuple[tuple[str, str], ...]
    rows_lost: int
    rows: int
    unfinished: int
    unlisted: tuple[str, ...]


def index_line(entry: Shard | Batch | bool) -> str:
    """The line of the index for a shard, a batch, or the end (whether the run is complete)."""
    if isinstance(entry, bool):
        return json.dumps({"end": entry}) + "\n"
    return json.dumps({type(entry).__name__.lower(): {f.name: getattr(entry, f.name) for f in fields(entry)}}) + "\n"


def read_about(folder: Path) -> TraceAbout:
    """Read `trace.json`.

    Raises:
        TraceError: No such folder, not a trace, of a newer format, or damaged.
    """
    if not folder.is_dir():
        raise TraceError(
            f"{folder} is a file; name the folder of a trace" if folder.exists() else f"No such folder: {folder}"
        )
    file = folder / ABOUT_NAME
    if not file.is_file():
        raise TraceError(f"{folder} holds no {ABOUT_NAME}, so it is not a trace; name the folder given to --trace")
    try:
        return TraceAbout.parse(_text(file))
    except TraceError as error:
        raise TraceError(f"{file}: {error}") from error


def read_index(folder: Path) -> Index:
    """Read `index.jsonl`; a last line that a crash cut short does not count.

    Raises:
        TraceError: It is missing or damaged, or names something that is not a shard of this folder.
    """
    file = folder / INDEX_NAME
    if not file.is_file():
        raise TraceError(f"{folder} holds no {INDEX_NAME}; the trace is damaged")
    shards: list[Shard] = []
    batches: list[Batch] = []
    complete: bool | None = None
    lines = _text(file).split("\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut short, or is empty
        try:
            ((kind, value),) = json.loads(line).items()
            complete = None
            if kind == "shard":
                shards.append(_entry(Shard, value))
            elif kind == "batch":
                batches.append(_entry(Batch, value))
            elif kind == "end" and isinstance(value, bool):
                complete = value
            else:
                raise ValueError(f"{kind!r}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TraceError(f"{file}: line {number} is damaged ({error})") from error
    for shard in shards:
        if not SHARD_NAME.fullmatch(shard.name):
            raise TraceError(f"{file} names {shard.name!r}, which is not a shard of this folder")
        if not 1 <= shard.rows <= shard.bytes <= _LARGEST_SHARD:
            raise TraceError(f"{file}: {shard.name} cannot have {shard.rows} tokens in {shard.bytes} bytes")
    if len({shard.name for shard in shards}) < len(shards):
        raise TraceError(f"{file} names a shard twice")
    if any(a.batch >= b.batch or a.rows > b.rows for a, b in itertools.pairwise(batches)):
        raise TraceError(f"{file}: its batches are not in order")
    return Index(tuple(shards), tuple(batches), complete)


def _entry(kind: Any, value: Mapping[str, Any]) -> Any:
    entry = kind(**value)
    for field in fields(kind):
        if type(getattr(entry, field.name)) is not (str if field.name == "name" else int):
            raise TypeError(f"{field.name} is {getattr(entry, field.name)!r}")
    return entry


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST_TEXT:
            raise TraceError(f"{file} is too large to be that of a trace")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise TraceError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{file} is damaged: it is not text") from error


def shard_header(about: TraceAbout, rows: int) -> bytes:
    """The head of a shard as safetensors writes it: 8 bytes of length, and JSON padded to a multiple of 8."""
    layers = about.model.layers
    meaning = {
        "run": about.run.uuid,
        "domains": about.domains,
        "layers": [layer.index for layer in layers],
        "experts": [layer.experts for layer in layers],
        "top_k": [layer.top_k for layer in layers],
    }
    found: dict[str, Any] = {"__metadata__": {"moescope_trace": json.dumps(meaning)}}
    start = 0
    for name, (dtype, shape) in about.columns.items():
        end = start + rows * dtype.itemsize * int(np.prod(shape))
        found[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype.name],
            "shape": [rows, *shape],
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Trace:
    """A trace folder, opened for reading.

    Rows are those of batches that were held against their requests' own lengths; what an interrupted run left of its
    last batch is not among them, unless asked for. The first reading of a shard, of whichever part, holds all of it
    against its checksum.

    Args:
        folder: The folder.
        unfinished: Take the tokens of a batch that did not come to its end too; its requests may be cut short.

    Raises:
        TraceError: Not a trace, damaged, or of a newer format.
    """

    def __init__(self, folder: str | os.PathLike[str], *, unfinished: bool = False) -> None:
        self.folder = Path(folder)
        self.about = read_about(self.folder)
        self.index = read_index(self.folder)
        #: Tokens that reading gives.
        self.tokens = self.index.rows if unfinished else self.index.last.rows
        #: Tokens in shards of a batch that did not come to its end.
        self.unfinished = self.index.rows - self.index.last.rows
        self._sound: set[tuple[str, int, int]] = set()  # shards that verified, as they were then

    def __len__(self) -> int:
        return self.tokens

    def read_shard(
        self, shard: Shard, start: int = 0, stop: int | None = None, *, into: NDArray[np.uint8] | None = None
    ) -> TraceRows:
        """Rows `start` to `stop` of one shard; only those are read once the shard has verified.

        Args:
            shard: One of the index.
            start: First row.
            stop: Row after the last; by default all.
            into: uint8, memory that is large enough for a whole shard; the arrays lie in it until it is used again.

        Raises:
            TraceError: The shard is missing, damaged, or not what the index says.
        """
        return TraceRows(**self._arrays(shard, start, stop, tuple(self.about.columns), into=into))

    def column(self, shard: Shard, name: str, *, check: bool = True) -> NDArray[Any]:
        """One column of a shard, for all its rows; only that is read once the shard has verified.

        Args:
            shard: One of the index.
            name: A tensor of the format, e.g. "token".
            check: Verify the shard; without it, nothing may be concluded before the same shard was read by another way.

        Raises:
            TraceError: The shard is missing, damaged, or not what the index says.
        """
        return self._arrays(shard, 0, None, (name,), check=check)[name]

    def _arrays(
        self,
        shard: Shard,
        start: int,
        stop: int | None,
        names: Sequence[str],
        *,
        into: NDArray[np.uint8] | None = None,
        check: bool = True,
    ) -> dict[str, NDArray[Any]]:
        """Rows `start` to `stop` of some columns, out of the bytes that the checksum was taken of."""
        stop = shard.rows if stop is None else min(stop, shard.rows)
        arrays: dict[str, NDArray[Any]] = {}
        with self._opened(shard) as (file, offset):
            status = os.fstat(file)
            state = (shard.name, status.st_ino, status.st_mtime_ns)
            check = check and state not in self._sound
            whole = None
            if check or into is not None:
                whole = _pread(file, np.empty(shard.bytes, np.uint8) if into is None else into[: shard.bytes], 0)
            if check and whole is not None:
                if zlib.crc32(whole.data) != shard.crc32:
                    raise TraceError(f"{self.folder / shard.name} is damaged: its checksum is not that of the index")
                self._sound.add(state)
            for name, (dtype, shape) in self.about.columns.items():
                row = dtype.itemsize * int(np.prod(shape))
                if name in names:
                    first, last = offset + start * row, offset + stop * row
                    read = _pread(file, np.empty(last - first, np.uint8), first) if whole is None else whole[first:last]
                    arrays[name] = read.view(dtype.newbyteorder("<")).reshape(stop - start, *shape)
                offset += shard.rows * row
        return arrays

    @contextlib.contextmanager
    def _opened(self, shard: Shard) -> Iterator[tuple[int, int]]:
        """Descriptor of a shard that is what the index and the trace say, and where its arrays begin."""
        path = self.folder / shard.name
        head = shard_header(self.about, shard.rows)
        size = len(head) + shard.rows * self.about.row_bytes
        if shard.bytes != size:
            raise TraceError(f"{path}: the index says {shard.bytes} bytes, but {shard.rows} tokens take {size}")
        if path.is_symlink() or not path.is_file():
            raise TraceError(f"{path} is not a file of its own" if os.path.lexists(path) else f"{path} is missing")
        try:
            with open(path, "rb", buffering=0) as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    raise TraceError(f"{path} has {found} bytes; the index says {size}")
                if _pread(file.fileno(), np.empty(len(head), np.uint8), 0).tobytes() != head:
                    raise TraceError(f"{path} is not a shard of this trace: its header is another's")
                yield file.fileno(), len(head)
        except OSError as error:
            raise TraceError(f"cannot read {path}: {error.strerror or error}") from error

    def rows(self, start: int = 0, stop: int | None = None, *, reuse: bool = False) -> Iterator[TraceRows]:
        """Tokens `start` to `stop` in the order of the trace, at most a shard at a time; other shards are not read.

        Args:
            start: First token.
            stop: Token after the last; by default all.
            reuse: Read every shard into the same memory: rows are valid until the next ones are asked for.

        Raises:
            TraceError: A shard is missing or damaged.
        """
        start, stop, _ = slice(start, stop).indices(self.tokens)
        buffer = self._memory() if reuse else None
        first = 0
        for shard in self.index.shards:
            begin, end = max(start - first, 0), min(stop - first, shard.rows)
            if begin < end:
                yield self.read_shard(shard, begin, end, into=buffer)
            first += shard.rows

    def requests(self, numbers: Sequence[int]) -> TraceRows:
        """All tokens of some requests, in the order of the trace; shards without them are not read.

        Args:
            numbers: Numbers of requests.

        Raises:
            TraceError: A shard is missing or damaged.
        """
        wanted = np.unique(np.asarray(numbers, dtype=np.int64))
        found, first = [self._none()], 0
        for shard in self.index.shards:
            inside = wanted[(wanted >= shard.first_request) & (wanted <= shard.last_request)]
            stop = min(shard.rows, self.tokens - first)
            first += shard.rows
            if not len(inside) or stop <= 0:
                continue
            where = np.flatnonzero(np.isin(self.column(shard, "request")[:stop], inside))
            breaks = np.flatnonzero(np.diff(where) > _SKIPPED_ROWS) + 1
            for run in np.split(where, breaks) if len(where) else ():
                first_row = int(run[0])
                found.append(self.read_shard(shard, first_row, int(run[-1]) + 1).take(run - first_row))
        return TraceRows.concatenate(found)

    def request(self, number: int) -> TraceRows:
        """All tokens of one request; see `requests`.

        Args:
            number: Its number.

        Raises:
            TraceError: The trace does not hold it, or a shard is missing or damaged.
        """
        rows = self.requests([number])
        if not self.tokens:
            raise TraceError(f"{self.folder} holds no tokens of a finished batch")
        if not len(rows):
            shards = self.index.shards
            span = f"{min(s.first_request for s in shards)} to {max(s.last_request for s in shards)}"
            raise TraceError(f"{self.folder} holds no request {number}; its requests lie in {span}")
        return rows

    def _memory(self) -> NDArray[np.uint8]:
        return np.empty(max((shard.bytes for shard in self.index.shards), default=0), np.uint8)

    def _none(self) -> TraceRows:
        return TraceRows(**{name: np.empty((0, *shape), dtype) for name, (dtype, shape) in self.about.columns.items()})

    def verify(self) -> Verification:
        """Read everything and check it: checksums, ranges, and that each token of a request is there once, in order.

        Returns:
            What is damaged, and what is left.

        Raises:
            TraceError: The index itself is damaged.
        """
        self._sound.clear()
        damaged: list[tuple[str, str]] = []
        lost = 0
        buffer = self._memory()
        positions: dict[int, int] = {}
        for shard in self.index.shards:
            try:
                rows = self.read_shard(shard, into=buffer)
            except TraceError as error:
                damaged.append((shard.name, str(error)))
                lost += shard.rows
                positions.clear()  # the requests that it held go on after a gap
                continue
            fault = self._fault(shard, rows, positions, gaps=bool(damaged))
            if fault:
                damaged.append((shard.name, f"{self.folder / shard.name}: {fault}"))
                lost += shard.rows
        listed = {shard.name for shard in self.index.shards}
        others = sorted(entry.name for entry in self.folder.glob("shard-*") if entry.name not in listed)
        return Verification(tuple(damaged), lost, self.index.rows - lost, self.unfinished, tuple(others))

    def _fault(self, shard: Shard, rows: TraceRows, positions: dict[int, int], *, gaps: bool) -> str:
        """What is wrong with the content of a shard, or ""; `positions`: last place seen of each request."""
        for slot, layer in enumerate(self.about.model.layers):
            ids = np.sort(rows.experts[:, slot, : layer.top_k], axis=1)
            if (ids[:, -1] >= layer.experts).any():
                return f"layer {layer.index}: an expert id is at or beyond E = {layer.experts}"
            if (ids[:, 1:] == ids[:, :-1]).any():
                return f"layer {layer.index}: a token has the same expert twice"
        if (
            rows.phase.max() >= len(PHASES)
            or rows.domain.max() >= len(self.about.domains)
            or rows.split.max() >= SPLITS
        ):
            return "a phase, domain or split is out of range"
        if rows.weights is not None and not np.isfinite(rows.weights).all():
            return "a weight is not finite"
        if (rows.request.min(), rows.request.max()) != (shard.first_request, shard.last_request):
            return "its requests are not those of the index"
        order = np.argsort(rows.request, kind="stable")
        owner, place = rows.request[order], rows.position[order].astype(np.int64)
        same = owner[1:] == owner[:-1]
        first = np.flatnonzero(np.concatenate(([True], ~same)))
        last = np.append(first[1:], len(owner)) - 1
        step = place[1:][same] - place[:-1][same]
        before = [positions.get(request, -1) for request in owner[first].tolist()]
        positions.update(zip(owner[last].tolist(), place[last].tolist(), strict=True))
        if (step < 1).any() or (place[first] <= before).any():
            return "tokens of a request are there twice or out of order"
        if not gaps and ((step > 1).any() or (place[first] != np.array(before) + 1).any()):
            return "tokens of a request are missing"
        return ""

    def profile(self) -> RoutingProfile:
        """The profile that the traced tokens make: counts exactly those of the run if every request was traced.

        `weight_sums` are sums of what the trace holds, float16 (each weight within 2**-11 of itself), and zero where it
        holds no weights; what else a profile may hold is absent.

        Raises:
            TraceError: The trace is damaged, or holds no tokens.
            InvariantError: Counts do not add up.
        """
        about, last = self.about, self.index.last
        sizes = axis_sizes(about.model, about.domains)
        depth, width, domains = sizes["L"], sizes["E"], sizes["D"]
        tokens = np.zeros((domains, len(PHASES)), np.int64)
        counts = np.zeros((SPLITS, domains, len(PHASES), depth, width), np.int64)
        units = np.zeros((domains, len(PHASES), depth, width), np.int64) if about.weights else None
        if not self.tokens:
            raise TraceError(f"{self.folder} holds no tokens of a finished batch")
        for shard_rows in self.rows(reuse=True):
            for start in range(0, len(shard_rows), _COUNTED_ROWS):
                part = shard_rows.take(slice(start, start + _COUNTED_ROWS))
                try:
                    _count(part, about.model, tokens, counts, units)
                except ValueError as error:
                    raise TraceError(f"{self.folder}: {error}") from error
        settings = {**about.run.settings, "from_trace": {"requests": last.requests, "traced": last.traced}}
        run = replace(
            about.run,
            prompts=last.traced,
            batches=last.batch + 1,
            settings=settings,
            complete=bool(self.index.complete) and last.traced == last.requests,
        )
        profile = _profile(about, (run,), tokens, counts, units)
        profile.check()
        return profile


def _pread(descriptor: int, target: NDArray[np.uint8], offset: int) -> NDArray[np.uint8]:
    done = 0
    while done < len(target):
        got = os.preadv(descriptor, [target[done:].data], offset + done)
        if not got:
            raise OSError("the file ends early")
        done += got
    return target


def _count(
    rows: TraceRows,
    model: ModelInfo,
    tokens: NDArray[np.int64],
    counts: NDArray[np.int64],
    units: NDArray[np.int64] | None,
) -> None:
    """Add rows to tokens [D,P], counts [S,D,P,L,E] and, if there are weights, units [D,P,L,E] of 2**-24."""
    cells = counts.shape[:3]
    width = counts.shape[-1]
    if any(
        column.max(initial=0) >= size for column, size in zip((rows.split, rows.domain, rows.phase), cells, strict=True)
    ):
        raise ValueError("a phase, domain or split is out of range")
    if rows.weights is not None and not np.isfinite(rows.weights).all():
        raise ValueError("a weight is not finite")
    group = np.ravel_multi_index((rows.split, rows.domain, rows.phase), cells)
    used, group = np.unique(group, return_inverse=True)
    split, domain, phase = np.unravel_index(used, cells)
    np.add.at(tokens, (domain, phase), np.bincount(group, minlength=len(used)))
    for slot, layer in enumerate(model.layers):
        ids = rows.experts[:, slot, : layer.top_k]
        if ids.max(initial=0) >= layer.experts:
            raise ValueError(f"layer {layer.index}: an expert id is out of range")
        bins = (group[:, None] * width + ids).reshape(-1)
        found = np.bincount(bins, minlength=len(used) * width).reshape(len(used), width)
        counts[split, domain, phase, slot] += found
        if units is not None and rows.weights is not None:
            scaled = np.rint(rows.weights[:, slot, : layer.top_k].astype(np.float64) * 2.0**FIXED_POINT_BITS)
            sums = np.bincount(bins, weights=scaled.reshape(-1), minlength=len(used) * width)
            np.add.at(units[:, :, slot], (domain, phase), sums.reshape(len(used), width).astype(np.int64))


def _profile(
    about: TraceAbout,
    runs: tuple[RunInfo, ...],
    tokens: NDArray[np.int64],
    counts: NDArray[np.int64],
    units: NDArray[np.int64] | None,
) -> RoutingProfile:
    """A profile of tokens [D,P], counts [S,D,P,L,E] and weights [D,P,L,E] in units of 2**-24."""
    selection = counts.sum(axis=0)
    return RoutingProfile(
        model=about.model,
        domains=about.domains,
        runs=runs,
        created=about.run.created,
        selection_counts=selection,
        weight_sums=np.ldexp(np.zeros_like(selection) if units is None else units, -FIXED_POINT_BITS),
        token_counts=tokens,
        split_counts=counts.sum(axis=2),
        version=about.version,
    )
