"""One reading of a trace: the sums that all statistics of its tokens rest on, in bounded memory."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moescope.profiler.errors import OptionError, TraceError
from moescope.profiler.ranges import Ranges
from moescope.profiler.tokens import SPLITS
from moescope.profiler.trace import Trace, TraceAbout, TraceRows

Integers = NDArray[np.int64]

#: Shares of the tokens after which the profile so far is looked at.
STEPS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
#: Tokens back at which a token is compared with an earlier one of its request. All up to HELD, so that what lasts
#: that long can be told; then twice as far each time.
LAGS: Final = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
HELD: Final = 8
#: Tokens that are compared at all lags, and with a random one of their request; all are at lag 1.
ANCHORS: Final = 100_000
#: Windows of the longest request, and the fewest tokens of one.
WINDOWS: Final = 48
LEAST_WINDOW: Final = 32

#: Rows counted at a time: of one layer, they fit into a core's cache.
_BLOCK: Final = 1 << 14
#: Anchors compared at a time: of all layers, they do.
_COMPARED: Final = 512
#: Rows that are kept of requests that go on in the next shard, all together.
_MOST_HISTORY: Final = 1 << 16
#: Rows turned from tokens first to layers first at a time.
_TURNED: Final = 256


@dataclass(frozen=True, slots=True, eq=False)
class TraceSums:
    """Sums over T tokens of R requests of a trace; L layers, E experts of the widest, K the largest k.

    Attributes:
        about: What the trace is of.
        requests: Requests that were read, R.
        chosen: Whether these are some of the trace's requests, asked for by number.
        step_tokens: int64 (C,), tokens of the requests of each step: requests in order of their numbers, each whole in
            the first step at whose end its last token is counted; see `STEPS`.
        step_requests: int64 (C,), their requests.
        position_starts: int64 (B,), first position of each bucket of positions: 0, 1, 2, 4, 8 and so on.
        cell_tokens: int64 (C, B), tokens by step and bucket.
        counts: int64 (C, B, L, E), selections by step and bucket.
        frequent: int64 (V,), the most frequent token ids, most frequent first.
        occurrences: int64 (V,), how often each occurs.
        vocabulary: int64 (V, L, E), selections of their tokens.
        split_pairs: int64 (S,), tokens whose predecessor in the same request was traced, by split of the request.
        split_kept: int64 (S, L), experts that such a token shares with its predecessor, over all pairs.
        top_kept: int64 (L,), pairs with the same expert of the largest weight; None without weights.
        top_counts: int64 (L, E), times an expert had the largest weight of a token; None without weights.
        anchors: Tokens that were compared at all lags; all, or a random sample.
        lag_pairs: int64 (G,), anchors with a token so far back in hand; see `LAGS`.
        lag_kept: int64 (G, L), experts shared with it.
        held_windows: int64 (M,), anchors with the m - 1 tokens before them in hand, for m = 1 to `HELD`.
        held: int64 (M, L), experts that an anchor and all those m - 1 tokens have.
        split_random_pairs: int64 (S,), anchors with a predecessor, each compared with another token of its request, so
            that each request has the weight that it has among pairs.
        split_random_kept: int64 (S, L), experts shared with a random other token of the request, drawn from those of
            the same shard.
        longest: Number of the longest request.
        window: Tokens of one of its windows.
        window_tokens: int64 (W,), tokens of each; the last may have fewer.
        windows: int64 (W, L, E), their selections.
        sample: unsigned (N, L, K), expert ids of tokens spread evenly over the trace, one drawn from each of N
            stretches of equal length; all tokens where there are no more.
        sample_split: uint8 (N,), split of the request of each.
        seconds: How long the reading took.
    """

    about: TraceAbout
    requests: int
    chosen: bool
    step_tokens: Integers
    step_requests: Integers
    position_starts: Integers
    cell_tokens: Integers
    counts: Integers
    frequent: Integers
    occurrences: Integers
    vocabulary: Integers
    split_pairs: Integers
    split_kept: Integers
    top_kept: Integers | None
    top_counts: Integers | None
    anchors: int
    lag_pairs: Integers
    lag_kept: Integers
    held_windows: Integers
    held: Integers
    split_random_pairs: Integers
    split_random_kept: Integers
    longest: int
    window: int
    window_tokens: Integers
    windows: Integers
    sample: NDArray[np.unsignedinteger[Any]]
    sample_split: NDArray[np.uint8]
    seconds: float

    @property
    def lags(self) -> tuple[int, ...]:
        """(G,) tokens back; the sum of the nearest is exact for all tokens in `kept`."""
        return LAGS

    @property
    def pairs(self) -> int:
        """Tokens whose predecessor in the same request was traced."""
        return int(self.split_pairs.sum())

    @property
    def kept(self) -> Integers:
        """int64 (L,), experts that they share with it, over all."""
        total: Integers = self.split_kept.sum(axis=0)
        return total

    @property
    def tokens(self) -> int:
        """Tokens that were read, T."""
        return int(self.cell_tokens.sum())


def sum_trace(
    trace: Trace,
    *,
    requests: Iterable[int | range] | None = None,
    vocabulary: int = 256,
    pair_tokens: int = 50_000,
    n_jobs: int = 1,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> TraceSums:
    """Read a trace once and keep the sums; its small columns (12 bytes a token) are read once before.

    Memory: a shard (64 MB as traces are written), `pair_tokens` · L · K ids, and, for each thread, tables of
    (V + some hundreds) · L · E counts; with V = 256, 48 layers of 128 experts and top-8 some 150 MB for one thread, and
    40 MB for each more. Besides, some 40 bytes for each request and 16 for each different token id.

    Args:
        trace: The trace.
        requests: Numbers of requests, and ranges of them; those that are in the trace are read. By default all.
        vocabulary: Most frequent token ids whose experts are counted, V.
        pair_tokens: Tokens kept for what pairs of layers have in common, N.
        n_jobs: Threads that count.
        seed: Of the tokens that are drawn.
        on_progress: Called after each shard with the tokens read and those of the trace.

    Raises:
        OptionError: None of the requests is in the trace, or a number that cannot be.
        TraceError: The trace is damaged, or holds no tokens.
    """
    if min(vocabulary, pair_tokens, n_jobs) < 1:
        raise OptionError("vocabulary, pair tokens and threads must be at least 1")
    return _Reading(trace, requests, vocabulary, pair_tokens, n_jobs, seed).run(on_progress)


class _Tally:
    """How often each value occurs, without knowing the values beforehand.

    What is added waits until it is as much as is there already, so that many small parts do not sort all values anew.
    """

    def __init__(self) -> None:
        self.values: Integers = np.empty(0, np.int64)
        self.counts: Integers = np.empty(0, np.int64)
        self._waiting: list[tuple[Integers, Integers]] = []
        self._waits = 0

    def add(self, values: NDArray[Any]) -> None:
        found, counts = np.unique(values, return_counts=True)
        self._waiting.append((found.astype(np.int64), counts))
        self._waits += len(found)
        if self._waits > len(self.values):
            self.settle()

    def settle(self) -> None:
        """Count what waits, before the result is looked at."""
        parts = [(self.values, self.counts), *self._waiting]
        self.values, place = np.unique(np.concatenate([values for values, _ in parts]), return_inverse=True)
        self.counts = np.zeros(len(self.values), np.int64)
        np.add.at(self.counts, place, np.concatenate([counts for _, counts in parts]))
        self._waiting, self._waits = [], 0


@dataclass(slots=True, eq=False)
class _History:
    """The last rows of requests that go on: those of one in order."""

    request: NDArray[np.uint32]
    position: NDArray[np.uint32]
    experts: NDArray[np.unsignedinteger[Any]]
    top: NDArray[np.unsignedinteger[Any]] | None

    def __len__(self) -> int:
        return len(self.request)


@dataclass(slots=True, eq=False)
class _Counts:
    """What one thread has counted; the fields are those of `TraceSums`."""

    counts: Integers
    cell_tokens: Integers
    vocabulary: Integers
    pairs: Integers
    kept: Integers
    top_kept: Integers
    top_counts: Integers
    lag_pairs: Integers
    lag_kept: Integers
    held_windows: Integers
    held: Integers
    random_pairs: Integers
    random_kept: Integers
    anchors: Integers
    window_tokens: Integers
    windows: Integers

    def add(self, other: "_Counts") -> None:
        for field in fields(self):
            getattr(self, field.name)[...] += getattr(other, field.name)


@dataclass(slots=True, eq=False)
class _Sorted:
    """Rows in hand, request by request: those kept from before, then the shard's.

    `order` gives the place of each row among both; the other arrays are in that order.
    """

    rows: TraceRows
    top: NDArray[np.unsignedinteger[Any]] | None
    history: _History
    order: NDArray[np.intp]
    new: NDArray[np.bool_]
    request: NDArray[np.uint32]
    position: Integers
    begin: NDArray[np.intp]  # where the row's request begins
    end: NDArray[np.intp]
    ordinal: Integers  # how many new rows of the longest request come before

    def experts(self, places: NDArray[np.intp]) -> NDArray[np.unsignedinteger[Any]]:
        """(n, L, K) ids at places of the order."""
        return self._gather(places, self.history.experts, self.rows.experts)

    def splits(self, places: NDArray[np.intp]) -> NDArray[np.uint8]:
        """(n,) splits at places of new rows."""
        return self.rows.split[self.order[places] - len(self.history)]

    def tops(self, places: NDArray[np.intp]) -> NDArray[np.unsignedinteger[Any]]:
        """(n, L) ids of largest weight at places of the order."""
        assert self.top is not None
        assert self.history.top is not None
        return self._gather(places, self.history.top, self.top)

    def _gather(self, places: NDArray[np.intp], before: NDArray[Any], now: NDArray[Any]) -> NDArray[Any]:
        index = self.order[places] - len(self.history)
        old = index < 0
        if not old.any():
            return now.take(index, axis=0)
        found = now.take(np.maximum(index, 0), axis=0)
        found[old] = before[index[old] + len(self.history)]
        return found


class _Reading:
    def __init__(
        self,
        trace: Trace,
        requests: Iterable[int | range] | None,
        vocabulary: int,
        pair_tokens: int,
        n_jobs: int,
        seed: int,
    ) -> None:
        self.trace = trace
        self.n_jobs = n_jobs
        self.layers = trace.about.model.layers
        self.width = max(layer.experts for layer in self.layers)
        self.most = max(layer.top_k for layer in self.layers)
        #: (L, K) which places hold an expert: a layer may choose fewer than others
        self.chosen = np.arange(self.most) < np.array([layer.top_k for layer in self.layers])[:, None]
        self.all_chosen = bool(self.chosen.all())
        self.wanted = None if requests is None else Ranges.of(requests)
        self.rng = np.random.default_rng(seed)
        self._scan(vocabulary)
        edges = np.linspace(0, self.tokens, min(pair_tokens, self.tokens) + 1).astype(np.int64)
        self.drawn = edges[:-1] + (self.rng.random(len(edges) - 1) * np.diff(edges)).astype(np.int64)
        self.anchor_share = min(1.0, ANCHORS / self.tokens)
        self.lock = threading.Lock()

    def _scan(self, vocabulary: int) -> None:
        """Read the small columns: which requests there are, how long, which tokens are frequent.

        Shards verify when they are read whole; all that are looked into here are.
        """
        owners, ids, last, left = _Tally(), _Tally(), 0, self.trace.tokens
        for shard in self.trace.index.shards:
            rows, left = min(shard.rows, left), left - min(shard.rows, left)
            if not rows or not self._has(shard.first_request, shard.last_request):
                continue
            request, position, token = (
                self.trace.column(shard, name, check=False)[:rows] for name in ("request", "position", "token")
            )
            if self.wanted is not None:
                inside = self.wanted.hold(request)
                request, position, token = request[inside], position[inside], token[inside]
            owners.add(request)
            ids.add(token)
            last = max(last, int(position.max(initial=0)))
        owners.settle()
        ids.settle()
        self.numbers, self.lengths = owners.values, owners.counts
        if self.wanted is not None and self.trace.tokens and not len(self.numbers):
            for _ in self._rows():  # a shard that is damaged may hide them, and says so
                pass
            raise OptionError(f"none of the requests asked for is in the trace {self.trace.folder}")
        if not len(self.numbers):
            raise TraceError(f"{self.trace.folder} holds no tokens of a finished batch")
        self.tokens = int(self.lengths.sum())
        common = np.argsort(-ids.counts, kind="stable")[:vocabulary]
        self.frequent, self.occurrences = ids.values[common], ids.counts[common]
        self.by_id = np.argsort(self.frequent)
        ends = np.cumsum(self.lengths)
        self.step = np.searchsorted(np.ceil(np.array(STEPS) * self.tokens), ends)
        self.left = self.lengths.copy()
        self.buckets = int(last).bit_length() + 1
        self.longest = int(np.argmax(self.lengths))
        length = int(self.lengths[self.longest])
        self.window = max(LEAST_WINDOW, -(-length // WINDOWS))
        self.window_count = -(-length // self.window)

    def _has(self, first: int, last: int) -> bool:
        """Whether a shard of these requests may hold any that is wanted."""
        return self.wanted is None or self.wanted.meet(first, last)

    def run(self, on_progress: Callable[[int, int], None] | None) -> TraceSums:
        start = time.monotonic()
        depth, steps = len(self.layers), len(STEPS)
        whole = self._zeros()
        sample = np.empty((len(self.drawn), depth, self.most), self.trace.about.columns["experts"][0])
        sample_split = np.empty(len(self.drawn), np.uint8)
        history = self._none()
        done = longest = 0
        spare = [whole]  # tables that no thread uses
        with ThreadPoolExecutor(self.n_jobs) as pool:
            for rows in self._rows():
                first, last = np.searchsorted(self.drawn, (done, done + len(rows)))
                sample[first:last] = rows.experts[self.drawn[first:last] - done]
                sample_split[first:last] = rows.split[self.drawn[first:last] - done]
                in_hand = self._sorted(rows, history, longest)
                anchors = self.rng.random(len(in_hand.order)) < self.anchor_share
                others = self.rng.random(len(in_hand.order))
                starts = range(0, len(in_hand.order), _BLOCK)
                list(pool.map(lambda at: self._counted(in_hand, at, anchors, others, spare), starts))  # noqa: B023
                longest += int((rows.request == self.numbers[self.longest]).sum())
                history = self._next(in_hand)
                done += len(rows)
                if on_progress is not None:
                    on_progress(done, self.tokens)
        for other in spare:
            if other is not whole:
                whole.add(other)
        weighted = self.trace.about.weights
        return TraceSums(
            about=self.trace.about,
            requests=len(self.numbers),
            chosen=self.wanted is not None,
            step_tokens=np.bincount(self.step, weights=self.lengths, minlength=steps).astype(np.int64),
            step_requests=np.bincount(self.step, minlength=steps),
            position_starts=np.concatenate([[0], 1 << np.arange(self.buckets - 1)]).astype(np.int64),
            cell_tokens=whole.cell_tokens.reshape(steps, self.buckets),
            counts=whole.counts.reshape(steps, self.buckets, depth, self.width),
            frequent=self.frequent,
            occurrences=self.occurrences,
            vocabulary=whole.vocabulary,
            split_pairs=whole.pairs,
            split_kept=whole.kept,
            top_kept=whole.top_kept if weighted else None,
            top_counts=whole.top_counts if weighted else None,
            anchors=int(whole.anchors[0]),
            lag_pairs=whole.lag_pairs,
            lag_kept=whole.lag_kept,
            held_windows=whole.held_windows,
            held=whole.held,
            split_random_pairs=whole.random_pairs,
            split_random_kept=whole.random_kept,
            longest=int(self.numbers[self.longest]),
            window=self.window,
            window_tokens=whole.window_tokens,
            windows=whole.windows,
            sample=sample,
            sample_split=sample_split,
            seconds=time.monotonic() - start,
        )

    def _zeros(self) -> _Counts:
        depth, width = len(self.layers), self.width
        shapes = {
            "counts": (len(STEPS) * self.buckets, depth, width),
            "cell_tokens": (len(STEPS) * self.buckets,),
            "vocabulary": (len(self.frequent), depth, width),
            "pairs": (SPLITS,),
            "kept": (SPLITS, depth),
            "top_kept": (depth,),
            "top_counts": (depth, width),
            "lag_pairs": (len(LAGS),),
            "lag_kept": (len(LAGS), depth),
            "held_windows": (HELD,),
            "held": (HELD, depth),
            "random_pairs": (SPLITS,),
            "random_kept": (SPLITS, depth),
            "anchors": (1,),
            "window_tokens": (self.window_count,),
            "windows": (self.window_count, depth, width),
        }
        return _Counts(**{name: np.zeros(shape, np.int64) for name, shape in shapes.items()})

    def _rows(self) -> Iterator[TraceRows]:
        """Rows of the wanted requests, shard by shard, all in the same memory."""
        left = self.trace.tokens
        buffer = np.empty(max(shard.bytes for shard in self.trace.index.shards), np.uint8)
        for shard in self.trace.index.shards:
            count, left = min(shard.rows, left), left - min(shard.rows, left)
            if count and self._has(shard.first_request, shard.last_request):
                rows = self.trace.read_shard(shard, 0, count, into=buffer)
                yield rows if self.wanted is None else rows.take(self.wanted.hold(rows.request))

    def _none(self) -> _History:
        kinds = self.trace.about.columns
        depth = len(self.layers)
        return _History(
            np.empty(0, np.uint32),
            np.empty(0, np.uint32),
            np.empty((0, depth, self.most), kinds["experts"][0]),
            np.empty((0, depth), kinds["experts"][0]) if self.trace.about.weights else None,
        )

    def _sorted(self, rows: TraceRows, history: _History, longest: int) -> _Sorted:
        request = np.concatenate([history.request, rows.request])
        order = np.argsort(request, kind="stable")
        new = order >= len(history)
        request = request[order]
        starts = np.flatnonzero(np.concatenate([[True], request[1:] != request[:-1]]))
        lengths = np.diff(np.append(starts, len(order)))
        here = new & (request == self.numbers[self.longest])
        return _Sorted(
            rows=rows,
            top=_tops(rows),
            history=history,
            order=order,
            new=new,
            request=request,
            position=np.concatenate([history.position, rows.position])[order].astype(np.int64),
            begin=np.repeat(starts, lengths),
            end=np.repeat(starts + lengths, lengths),
            ordinal=np.where(here, longest + np.cumsum(here) - 1, -1),
        )

    def _next(self, in_hand: _Sorted) -> _History:
        """The last rows of the requests that go on."""
        owners, counts = np.unique(in_hand.rows.request, return_counts=True)
        self.left[np.searchsorted(self.numbers, owners)] -= counts
        goes_on = self.left[np.searchsorted(self.numbers, in_hand.request)] > 0
        place = np.arange(len(in_hand.order))
        open_requests = int(np.count_nonzero(goes_on & (place == in_hand.begin)))
        keep = max(1, min(LAGS[-1], _MOST_HISTORY // max(open_requests, 1)))
        places = np.flatnonzero(goes_on & (place >= in_hand.end - keep))
        return _History(
            in_hand.request[places],
            in_hand.position[places].astype(np.uint32),
            in_hand.experts(places),
            None if in_hand.top is None else in_hand.tops(places),
        )

    def _counted(
        self,
        in_hand: _Sorted,
        start: int,
        anchors: NDArray[np.bool_],
        others: NDArray[np.float64],
        spare: list[_Counts],
    ) -> None:
        """Count a block, in tables that no other thread has."""
        with self.lock:
            sums = spare.pop() if spare else None
        sums = sums or self._zeros()
        self._block(sums, in_hand, start, anchors, others)
        with self.lock:
            spare.append(sums)

    def _block(
        self,
        sums: _Counts,
        in_hand: _Sorted,
        start: int,
        anchors: NDArray[np.bool_],
        others: NDArray[np.float64],
    ) -> None:
        stop = min(start + _BLOCK, len(in_hand.order))
        places = np.arange(start, stop)
        new = np.flatnonzero(in_hand.new[start:stop])
        before = max(start - 1, 0)
        ids = _layers_first(in_hand.experts(np.arange(before, stop)))  # (L, K, rows), one row before the block's
        own = ids[:, :, start - before :]
        self._check(own, in_hand.splits(places[new]))
        valid = new[_back(in_hand, places[new], 1)]
        split = in_hand.splits(places[valid])
        sums.pairs += np.bincount(split, minlength=SPLITS)

        group, token, window = self._groups(in_hand, places[new])
        used, group = np.unique(group, return_inverse=True)
        sums.cell_tokens[used] += np.bincount(group, minlength=len(used))
        frequent, ordinary = np.flatnonzero(token >= 0), len(new) == stop - start
        inside = np.flatnonzero(window >= 0)
        sums.window_tokens += np.bincount(window[inside], minlength=self.window_count)
        follows = np.zeros(stop - before, np.bool_)
        follows[valid + start - before] = True
        for slot, layer in enumerate(self.layers):
            chosen = own[slot, : layer.top_k]
            fresh = chosen if ordinary else chosen[:, new]
            sums.counts[used, slot] += _table(group, fresh, len(used), self.width)
            if len(frequent):
                sums.vocabulary[:, slot] += _table(token[frequent], fresh[:, frequent], len(self.frequent), self.width)
            if len(inside):
                sums.windows[:, slot] += _table(window[inside], fresh[:, inside], self.window_count, self.width)
            shared = _kept(ids[slot, : layer.top_k])[follows[1:]]
            sums.kept[:, slot] += np.bincount(split, weights=shared, minlength=SPLITS).astype(np.int64)
        if in_hand.top is not None:
            self._tops(sums, in_hand, places[new], places[valid])
        anchored = places[new][anchors[start:stop][new]]
        for first in range(0, len(anchored), _COMPARED):
            self._anchored(sums, in_hand, anchored[first : first + _COMPARED], others)

    def _check(self, own: NDArray[np.unsignedinteger[Any]], splits: NDArray[np.uint8]) -> None:
        if splits.max(initial=0) >= SPLITS:
            raise TraceError(f"{self.trace.folder} is damaged: a split is out of range")
        for slot, layer in enumerate(self.layers):
            if own[slot, : layer.top_k].max(initial=0) >= layer.experts:
                raise TraceError(
                    f"{self.trace.folder}: layer {layer.index}: an expert id is at or beyond E = {layer.experts}"
                )

    def _groups(
        self, in_hand: _Sorted, places: NDArray[np.intp]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], Integers]:
        """Step and bucket, place among the frequent tokens (or -1), and window (or -1) of new rows."""
        position = in_hand.position[places]
        bucket = np.frexp(position.astype(np.float64))[1]  # 0 of 0, 1 of 1, 2 of 2 and 3, 3 of 4 to 7
        step = self.step[np.searchsorted(self.numbers, in_hand.request[places])]
        ids = in_hand.rows.token[in_hand.order[places] - len(in_hand.history)]
        ascending = self.frequent[self.by_id]
        found = np.minimum(np.searchsorted(ascending, ids), len(ascending) - 1)
        token = np.where(ascending[found] == ids, self.by_id[found], -1)
        ordinal = in_hand.ordinal[places]
        return step * self.buckets + bucket, token, np.where(ordinal >= 0, ordinal // self.window, -1)

    def _tops(self, sums: _Counts, in_hand: _Sorted, new: NDArray[np.intp], valid: NDArray[np.intp]) -> None:
        """Experts of the largest weight: how often each, and how often that of the token before."""
        for slot, column in enumerate(in_hand.tops(new).T):
            sums.top_counts[slot] += np.bincount(column, minlength=self.width)
        sums.top_kept += (in_hand.tops(valid) == in_hand.tops(valid - 1)).sum(axis=0)

    def _anchored(
        self, sums: _Counts, in_hand: _Sorted, anchors: NDArray[np.intp], others: NDArray[np.float64]
    ) -> None:
        """Compare anchors with tokens before them, and with a random one of their request."""
        sums.anchors += len(anchors)
        own = _layers_first(in_hand.experts(anchors))
        held = np.broadcast_to(self.chosen[:, :, None], own.shape).copy()
        reaches = np.ones(len(anchors), np.bool_)
        self._hold(sums, 0, held, reaches)
        for number, lag in enumerate(LAGS):
            there = _back(in_hand, anchors, lag)
            same = self._shared(own, in_hand, anchors - lag, there)
            sums.lag_pairs[number] += np.count_nonzero(there)
            sums.lag_kept[number] += same.sum(axis=(1, 2))
            if lag == 1:
                followed = there
            if lag < HELD:
                reaches &= there
                held &= same
                self._hold(sums, lag, held, reaches)
        anchors, own = anchors[followed], own[:, :, followed]
        begin = in_hand.begin[anchors]
        other = begin + (others[anchors] * (in_hand.end[anchors] - begin - 1)).astype(np.intp)
        other += other >= anchors  # any but itself
        split = in_hand.splits(anchors)
        sums.random_pairs += np.bincount(split, minlength=SPLITS)
        np.add.at(sums.random_kept, split, self._shared(own, in_hand, other, followed[followed]).sum(axis=1).T)

    def _hold(self, sums: _Counts, lag: int, held: NDArray[np.bool_], reaches: NDArray[np.bool_]) -> None:
        sums.held_windows[lag] += np.count_nonzero(reaches)
        sums.held[lag] += (held & reaches).sum(axis=(1, 2))

    def _shared(
        self,
        own: NDArray[np.unsignedinteger[Any]],
        in_hand: _Sorted,
        others: NDArray[np.intp],
        there: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """(L, K, n) whether each expert of a token is one of the other's too, where there is another."""
        theirs = _layers_first(in_hand.experts(np.where(there, others, 0)))
        same, equal = np.zeros(own.shape, np.bool_), np.empty(own.shape, np.bool_)
        for choice in range(self.most):
            np.equal(own, theirs[:, choice, None], out=equal)
            if not self.all_chosen:
                equal &= self.chosen[:, choice, None, None]
            same |= equal
        same &= self.chosen[:, :, None] & there
        return same


def _layers_first(ids: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.unsignedinteger[Any]]:
    """(n, L, K) as (L, K, n), turned in pieces that fit into the cache."""
    found = np.empty((*ids.shape[1:], len(ids)), ids.dtype)
    for start in range(0, len(ids), _TURNED):
        found[:, :, start : start + _TURNED] = ids[start : start + _TURNED].transpose(1, 2, 0)
    return found


def _kept(ids: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.int32]:
    """(n - 1,) how many experts (k, n) of the row before each row has."""
    kept = np.zeros(ids.shape[1] - 1, np.int32)
    for choice in ids:
        same = np.zeros(len(kept), np.bool_)
        for other in ids:
            same |= choice[1:] == other[:-1]
        kept += same
    return kept


def _back(in_hand: _Sorted, places: NDArray[np.intp], lag: int) -> NDArray[np.bool_]:
    """Whether the row `lag` before is the token so far back in the same request."""
    before = places - lag
    there = before >= in_hand.begin[places]
    there[there] = in_hand.position[places[there]] - in_hand.position[before[there]] == lag
    return there


def _table(
    group: NDArray[np.intp], ids: NDArray[np.unsignedinteger[Any]], groups: int, width: int
) -> NDArray[np.int64]:
    """(groups, width) how often each id (k, n) occurs in each group (n,)."""
    bins = (group * width).astype(np.int32) + ids
    return np.bincount(bins.reshape(-1), minlength=groups * width).reshape(groups, width)


def _tops(rows: TraceRows) -> NDArray[np.unsignedinteger[Any]] | None:
    """(n, L) the expert of the largest weight; None without weights."""
    if rows.weights is None:
        return None
    # bits of floats that are not negative are in the order of the floats, the others are below as signed integers, and
    # integers are compared faster
    largest = rows.weights.view(np.int16).argmax(axis=2)
    return np.take_along_axis(rows.experts, largest[:, :, None], axis=2)[:, :, 0]
