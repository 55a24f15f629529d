"""Some requests of a trace, small enough to look at token by token, and what the whole trace uses beside them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moescope.profiler.errors import OptionError, TraceError
from moescope.profiler.profile import PHASES, ModelInfo
from moescope.profiler.trace import Trace, TraceAbout, TraceRows

#: Tokens whose experts are counted to know what a trace uses, and pieces of a larger one that they come from.
_COUNTED: Final = 1 << 18
_PIECES: Final = 64


@dataclass(frozen=True, slots=True, eq=False)
class TraceExcerpt:
    """T tokens of R requests of a trace.

    Attributes:
        about: What the trace is of.
        requests: (R,) numbers of the requests, ascending.
        starts: (R,) first row of each in `rows`.
        lengths: (R,) tokens of each in the trace; the last of a request may be left out.
        rows: The T tokens, request by request, each in order.
        counts: int64 (L, E), selections of each expert among `counted` tokens.
        counted: Tokens behind `counts`: all of the trace, or evenly spaced pieces of a large one.
        held: Tokens of the trace.
    """

    about: TraceAbout
    requests: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    rows: TraceRows
    counts: NDArray[np.int64]
    counted: int
    held: int


def excerpt(trace: Trace, requests: Sequence[int] | None, tokens: int) -> TraceExcerpt:
    """Take requests out of a trace, at most so many tokens.

    Each shard that is looked into verifies first; the rows in question are all that is kept.

    Args:
        trace: The trace.
        requests: Numbers of requests; the last that fits in part is cut. Without them, those with which the trace
            begins: whole ones as they fit, the first one cut if it alone is longer.
        tokens: Tokens to take at most.

    Raises:
        OptionError: `tokens` is below 1, or leaves nothing for a request that was asked for.
        TraceError: The trace holds no tokens, or not that request, or is damaged.
    """
    if tokens < 1:
        raise OptionError(f"--tokens must be at least 1, not {tokens}")
    if not trace.tokens:
        raise TraceError(f"{trace.folder} holds no tokens of a finished batch")
    found = _chosen(trace, requests, tokens) if requests else _first(trace, tokens)
    found.sort(key=lambda item: int(item[0].request[0]))
    parts = [rows for rows, _ in found]
    rows = TraceRows.concatenate(parts)
    _check(rows, trace.about, trace)
    counts, counted = _use(trace)
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return TraceExcerpt(
        about=trace.about,
        requests=tuple(int(part.request[0]) for part in parts),
        starts=(0, *ends[:-1]),
        lengths=tuple(length for _, length in found),
        rows=rows,
        counts=counts,
        counted=counted,
        held=trace.tokens,
    )


def _chosen(trace: Trace, requests: Sequence[int], tokens: int) -> list[tuple[TraceRows, int]]:
    """Rows of these requests, and how many each has in the trace."""
    found = []
    left = tokens
    for number in dict.fromkeys(requests):
        if not left:
            raise OptionError(f"--tokens {tokens} is used up before request {number}; raise it, or ask for fewer")
        rows = trace.request(number)
        found.append((rows.take(slice(left)), len(rows)))
        left -= len(found[-1][0])
    return found


def _first(trace: Trace, tokens: int) -> list[tuple[TraceRows, int]]:
    """The same of whole requests with which the trace begins; the first is cut if need be."""
    found: list[tuple[TraceRows, int]] = []
    left = tokens
    for number in _begun(trace.rows(0, tokens)):
        rows = trace.requests([number])
        if found and len(rows) > left:
            break
        found.append((rows.take(slice(left)), len(rows)))
        left -= len(found[-1][0])
    return found


def _begun(parts: Iterable[TraceRows]) -> list[int]:
    """Requests in the order of their first token."""
    return list(dict.fromkeys(number for rows in parts for number in rows.request.tolist()))


def _use(trace: Trace) -> tuple[NDArray[np.int64], int]:
    """Selections int64 (L, E), and of how many tokens."""
    model = trace.about.model
    counts = np.zeros((len(model.layers), max(model.experts)), np.int64)
    counted = 0
    for start, stop in _pieces(trace.tokens):
        for rows in trace.rows(start, stop):
            _check(rows, trace.about, trace)
            counted += len(rows)
            for slot, layer in enumerate(model.layers):
                ids = rows.experts[:, slot, : layer.top_k].reshape(-1)
                counts[slot] += np.bincount(ids, minlength=counts.shape[1])
    return counts, counted


def _pieces(tokens: int) -> list[tuple[int, int]]:
    """What to count of so many tokens: all, or evenly spaced pieces."""
    if tokens <= _COUNTED:
        return [(0, tokens)]
    size = _COUNTED // _PIECES
    return [(start, start + size) for start in np.linspace(0, tokens - size, _PIECES).astype(int).tolist()]


def _check(rows: TraceRows, about: TraceAbout, trace: Trace) -> None:
    model: ModelInfo = about.model
    wide = any((rows.experts[:, slot, : layer.top_k] >= layer.experts).any() for slot, layer in enumerate(model.layers))
    if wide or rows.domain.max() >= len(about.domains) or rows.phase.max() >= len(PHASES):
        raise TraceError(f"{trace.folder} is damaged: an expert id, domain or phase is out of range")
