"""The recorder inside one vLLM worker: which rows of each step count, and where their counts go.

A step is held back until the scheduler has said how far its requests got (see `moescope.adapters.vllm_ledger`); then
its rows are counted once, by position, so that recomputed tokens, rejected drafts, and rows past a request's last token
do not count.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.adapters.vllm_ledger import NOTE, Note
from moescope.adapters.vllm_parts import REMARKS, Part, save_part
from moescope.adapters.vllm_routing import find_layers, stage
from moescope.adapters.vllm_runs import claim, error_path, rank_name
from moescope.adapters.vllm_saver import Savable, Saver
from moescope.adapters.vllm_settings import (
    DEFAULT_DOMAIN,
    DOMAIN_KEY,
    OTHER_DOMAIN,
    SPLIT_KEY,
    TRACE_KEY,
    VERIFY_KEY,
    Settings,
    is_domain_name,
    log,
    trigger_path,
)
from moescope.adapters.vllm_trace import TraceSender
from moescope.profiler.errors import InvariantError, ModelError
from moescope.profiler.fingerprint import router_fingerprint
from moescope.profiler.run import timestamp
from moescope.profiler.snapshots import Snapshots
from moescope.profiler.staged import PREFILL, SAMPLE_SHARE, Copied, Placed, StagedRecorder, StagedSums, cell_of
from moescope.profiler.tokens import SPLITS, split_of

_SHARES: Final = {"off": 0.0, "sample": SAMPLE_SHARE, "all": 1.0}
#: Steps, at most, that wait for the scheduler's word; no engine runs as far ahead.
_MOST_OPEN: Final = 256
#: Cell of the rows of a request that is left out: neither phase of it counts.
_LEFT_OUT: Final = -2 * SPLITS


@dataclass(slots=True)
class _Step:
    """A forward whose rows have not been counted yet."""

    number: int
    slots: NDArray[np.int64]  # (T,) whose row it is
    positions: NDArray[np.int64]  # (T,)
    cells: NDArray[np.int32]  # (T,) negative: does not count
    drafts: bool
    sampled: NDArray[np.int64]  # rows
    tokens: NDArray[np.int64] | None = None  # (C,) rows of each cell, where all rows count
    token_ids: Tensor | None = None  # (T,) on the device, of a step with rows that are traced
    copied: Copied | None = None


@dataclass(slots=True)
class _Steady:
    """A batch in which every request decodes one token a step: while nobody comes or goes, only positions move.

    The table of requests is brought up to date when the batch ends.
    """

    order: list[str]  # of the rows
    scheduled: list[str]  # the same requests as the scheduler lists them
    computed: list[int]  # of these, the positions fed next
    slots: NDArray[np.int64]  # (T,) of the rows
    positions: NDArray[np.int64]  # (T,) fed next
    cells: NDArray[np.int32]  # (T,)
    tokens: NDArray[np.int64] | None
    counted: int = 0  # steps


@dataclass(frozen=True, slots=True)
class _Taken:
    """What belongs to a snapshot."""

    counted: int
    domains: tuple[str, ...]
    requests: int
    remarks: dict[str, int]
    ended: str | None
    time_ns: int


@dataclass(slots=True)
class _Table:
    """What is known of the requests in flight, by slot."""

    slot_of: dict[str, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    prompt: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    base: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # cell of its prefill
    start: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # next position to be fed
    done: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # positions below were counted
    floor: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # …and these are certain
    counted: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    whole: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))  # recorded from its first token
    outside: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))  # left out
    trace: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # its number; negative: not traced

    def add(self, request_id: str) -> int:
        if not self.free:
            size = len(self.prompt)
            grown = max(64, size)
            for name in ("prompt", "base", "start", "done", "floor", "counted", "whole", "outside", "trace"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros(grown, column.dtype)]))
            self.free = list(range(size + grown - 1, size - 1, -1))
        slot = self.free.pop()
        self.slot_of[request_id] = slot
        return slot


class WorkerRecorder:
    """Records one worker's model; made when the model has been loaded, armed when the engine has warmed up.

    Args:
        worker: vLLM's worker.
        settings: What to record.

    Raises:
        ModelError: This model or engine cannot be recorded exactly; the message says what would help.
    """

    def __init__(self, worker: Any, settings: Settings) -> None:
        self.settings = settings
        config = worker.vllm_config
        parallel = config.parallel_config
        _refuse(config)
        self._runner = worker.model_runner
        self.rank = _rank(parallel)
        self._layers = find_layers(self._runner.get_model())
        self._table = _Table()
        self._steps: deque[_Step] = deque()
        self._closing: list[tuple[int, str, int, int]] = []
        self._order: list[str] = []
        self._order_slots = np.zeros(0, np.int64)
        self._steady: _Steady | None = None
        self._placed: tuple[NDArray[np.int32], Tensor | Placed] | None = None
        self._upcoming: NDArray[np.int64] = np.zeros(0, np.int64)
        self._armed = False
        self._on = settings.serving
        self._shown: list[tuple[NDArray[np.int64], Tensor]] | None = None
        self._trace: TraceSender | None = None
        self._error: str | None = None
        self._requests = 0
        self._remarks = dict.fromkeys(REMARKS, 0)
        self._counted = 0  # steps
        self._verified: dict[str, list[tuple[NDArray[np.int64], Tensor]]] = {}
        # a server keeps room for names that it knows before a client brings others
        self._domains = [DEFAULT_DOMAIN, *settings.reserved][: settings.domains]
        self._description = _describe(config)
        self._created = timestamp()
        self._fingerprint: str | None = None
        self._lock = threading.Lock()
        self._saver: Saver | None = None
        self._snapshots: Snapshots | None = None
        self._path = Path()
        self._believed = True
        self.recorder: StagedRecorder | None = None
        if self._layers:
            self.recorder = self._bind(config)
        if settings.serving and self.recorder is not None and self.rank["writes"]:
            self._snapshots = Snapshots(self.recorder)
            self._path = claim(Path(settings.folder), settings.run, self.rank)
            self._take()
            self._write()  # that this rank is there, and that the folder can be written

    def _bind(self, config: Any) -> StagedRecorder:
        scheduler = config.scheduler_config
        scorings = {layer.scoring for layer in self._layers}
        if len(scorings) != 1 or len({layer.info.top_k for layer in self._layers}) != 1:
            raise ModelError("MoE layers differ in their scoring function or their top-k; this cannot be recorded yet")
        sizes = [scheduler.max_num_batched_tokens, scheduler.max_num_seqs]
        sizes += config.compilation_config.cudagraph_capture_sizes or []
        try:
            recorder = StagedRecorder(
                [layer.info for layer in self._layers],
                scoring=self._layers[0].scoring,
                scales=[layer.scale for layer in self._layers],
                capacity=max(sizes),
                domains=self.settings.domains,
                share=_SHARES[self.settings.probabilities],
                coactivation=self.settings.coactivation,
                seed=self.settings.seed,
                device=self._runner.device,
            )
            recorder.warm_up()
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"no room on {self._runner.device} for the recorder; lower max_num_batched_tokens, or leave out "
                "--probabilities all and --coactivation"
            ) from error
        for slot, layer in enumerate(self._layers):
            stage(recorder, slot, layer, config.parallel_config.data_parallel_size)
        gates = [layer.gate for layer in self._layers]
        if config.parallel_config.pipeline_parallel_size == 1 and all(gate is not None for gate in gates):
            self._fingerprint = router_fingerprint(gate for gate in gates if gate is not None)
        return recorder

    @property
    def depth(self) -> int:
        """MoE layers of this worker."""
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes that are reserved on the device."""
        snapshots = 0 if self._snapshots is None else self._snapshots.nbytes
        return snapshots + (0 if self.recorder is None else self.recorder.nbytes)

    def arm(self) -> None:
        """The engine has warmed up and captured its graphs: from now on, forwards are real."""
        self._armed = True
        snapshots = self._snapshots
        if snapshots is not None:
            source = Savable(
                lambda: self._counted, lambda: snapshots.waiting, self._take_if_idle, self._write, self._end
            )
            self._saver = Saver(source, trigger_path(self.settings), error_path(self._path), log())

    def close(self) -> None:
        """The worker shuts down; a server saves once more."""
        if self._saver is not None:
            self._saver.close()
            self._saver = None

    # around every step of the worker

    def before(self, output: Any) -> None:
        """A step is about to run: settle what earlier steps left open. Never raises: a fault fails the next dump."""
        self._guarded(self._before, output)

    def after(self, output: Any) -> None:
        """A step has been launched: note whose rows it has. Never raises."""
        self._guarded(self._after, output)

    def before_dummy(self) -> None:
        """A forward that no request asked for is about to run."""
        self._guarded(self._make_room)

    def _guarded(self, method: Callable[..., None], *arguments: Any) -> None:
        """Keep a fault of the recorder away from the engine, which goes on; what was counted is not believed."""
        with self._lock:
            try:
                method(*arguments)
            except Exception as error:  # whatever it is, the engine must not die of it
                self._fail(f"the recorder failed: {type(error).__name__}: {error}")

    def _fail(self, reason: str, *, believed: bool = True) -> None:
        """Nothing is counted from here on; a command refuses what was counted.

        Args:
            reason: Why.
            believed: Whether a server may keep what was counted before; else it keeps what it has saved.
        """
        if self._error is not None:
            return
        self._error, self._believed = reason, believed
        self._steps.clear()
        self._closing.clear()
        self._steady = None
        self._counted += 1  # news for the saver
        if self.settings.serving:
            log().error("moescope: the recording ends: %s", reason)

    def _end(self, reason: str) -> None:
        """The saver found that what was counted does not add up."""
        with self._lock:
            self._fail(reason, believed=False)

    def _before(self, output: Any) -> None:
        recorder = self.recorder
        if recorder is None or not self._armed or self._error is not None:
            return
        note: Note | None = getattr(output, NOTE, None)
        if note is None:
            self._fail("the scheduler sends no notes: the moescope plug-in did not load in the engine")
            return
        if note.failed is not None:
            self._fail(note.failed)
            return
        self._limit(note)
        self._settle(note.settled)
        if note.save:
            self._take()
        if len(self._steps) > _MOST_OPEN:
            self._fail(f"the scheduler has not said for {len(self._steps)} steps how far their requests got")
            return
        total = output.total_num_scheduled_tokens
        if total:
            self._make_room()
            if self._shown is not None:
                self._upcoming = recorder.choose_first(total)
            else:
                self._upcoming = recorder.choose_sample(total) if self._on else self._upcoming[:0]

    def _after(self, output: Any) -> None:
        if self.recorder is None or not self._armed or self._error is not None or not hasattr(output, NOTE):
            return
        if not output.total_num_scheduled_tokens:
            self._end_steady()
            self._learn(output)
            return
        step = self._next_of_steady(output) or self._step(output)
        if step is None:
            return
        if self._shown is not None and self.recorder.distributions is not None:
            seen = self.recorder.distributions[:, : len(self._upcoming)].to("cpu", copy=True)
            self._shown.append((step.positions[self._upcoming], seen))
        if self._trace is not None and bool((self._table.trace[step.slots] >= 0).any()):
            step.token_ids = _token_ids(self._runner, len(step.slots)).clone()
        self._steps.append(step)

    def _next_of_steady(self, output: Any) -> _Step | None:
        """The step of a batch that goes on as it was, found with a few operations; None: it does not."""
        steady = self._steady
        if steady is None:
            return None
        cached = output.scheduled_cached_reqs
        if (
            output.total_num_scheduled_tokens != len(steady.slots)
            or output.scheduled_new_reqs
            or cached.resumed_req_ids
            or output.scheduled_spec_decode_tokens
            or cached.req_ids != steady.scheduled
            or _batch_order(self._runner) != steady.order
        ):
            return None
        if cached.num_computed_tokens != steady.computed:
            return None
        positions = steady.positions
        steady.positions = positions + 1
        steady.computed = [position + 1 for position in steady.computed]
        note = getattr(output, NOTE)
        return _Step(note.step, steady.slots, positions, steady.cells, False, self._upcoming, steady.tokens)

    def _end_steady(self) -> None:
        """The batch changes: bring the table up to date."""
        if self._steady is not None:
            table, slots = self._table, self._steady.slots
            table.start[slots] = table.done[slots] = self._steady.positions
            table.counted[slots] += self._steady.counted
            self._steady = None

    def _step(self, output: Any) -> _Step | None:
        """A step of any kind; None: its rows are not those that were scheduled."""
        self._end_steady()
        self._learn(output)
        order = _batch_order(self._runner)
        scheduled = output.num_scheduled_tokens
        if order != self._order:
            self._order = order
            self._order_slots = np.array([self._table.slot_of[name] for name in order], np.int64)
        slots = self._order_slots
        table = self._table
        total = output.total_num_scheduled_tokens
        if total == len(order):
            lengths = np.ones(total, np.int64)
        else:
            lengths = np.array([scheduled[name] for name in order], np.int64)
        if int(lengths.sum()) != total:
            self._fail(f"a step of {total} tokens has {int(lengths.sum())} rows")
            return None
        starts = table.start[slots]
        ends = np.cumsum(lengths)
        rows = np.repeat(slots, lengths)
        positions = np.arange(total) - np.repeat(ends - lengths - starts, lengths)
        decoding = positions >= table.prompt[rows]
        fresh = positions >= table.done[rows]
        if self._on:
            cells = np.where(fresh, table.base[rows] + np.where(decoding, SPLITS, 0), -1).astype(np.int32)
        else:
            cells = np.full(total, -1, np.int32)
            table.whole[slots] = False
        table.done[slots] = np.maximum(table.done[slots], starts + lengths)
        table.start[slots] = starts + lengths
        drafts = bool(output.scheduled_spec_decode_tokens)
        cached = output.scheduled_cached_reqs
        if total == len(order) == len(cached.req_ids) and not drafts and bool((decoding & fresh).all()):
            tokens = self._tokens_of(cells) if self._on else None
            computed = [position + 1 for position in cached.num_computed_tokens]
            self._steady = _Steady(order, list(cached.req_ids), computed, slots, positions + 1, cells, tokens)
        return _Step(getattr(output, NOTE).step, rows, positions, cells, drafts, self._upcoming)

    def _tokens_of(self, cells: NDArray[np.int32]) -> NDArray[np.int64]:
        """(C,) rows of each cell."""
        return np.bincount(cells[cells >= 0], minlength=self.settings.domains * 2 * SPLITS)

    def _make_room(self) -> None:
        """The staging buffers are about to be written: keep a copy of what is still open."""
        if self.recorder is not None:
            for step in self._steps:
                if step.copied is None:
                    step.copied = self.recorder.copy(len(step.cells), len(step.sampled))

    def _learn(self, output: Any) -> None:
        """Take in the requests and positions of a step."""
        table = self._table
        for new in output.scheduled_new_reqs:
            if new.req_id in table.slot_of:  # model runner V2: a preempted request comes back as a new one
                self._place([new.req_id], [new.num_computed_tokens], {new.req_id})
                continue
            slot = table.add(new.req_id)
            ids = new.prompt_token_ids
            outside = new.req_id in getattr(output, NOTE).left_out
            domain, split = self._tags(new)
            table.prompt[slot] = len(ids) if ids is not None else len(new.prompt_embeds)
            table.base[slot] = _LEFT_OUT if outside else cell_of(domain, PREFILL, split)
            table.start[slot] = table.done[slot] = new.num_computed_tokens
            table.floor[slot] = table.counted[slot] = 0
            table.outside[slot] = outside
            table.whole[slot] = not outside
            table.trace[slot] = -1 if self.settings.serving else self._extra(new).get(TRACE_KEY, -1)
            if outside:
                self._remarks["left_out_requests"] += 1
            else:
                self._requests += 1
                self._remarks["skipped_by_prefix_cache"] += new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        if cached.req_ids:
            self._place(cached.req_ids, cached.num_computed_tokens, cached.resumed_req_ids)

    def _place(self, names: Sequence[str], computed: Sequence[int], resumed: Set[str]) -> None:
        """Take in where known requests go on."""
        table = self._table
        slots = np.array([table.slot_of[name] for name in names], np.int64)
        starts = np.array(computed, np.int64)
        if resumed:
            for name, slot in zip(names, slots, strict=True):
                if name in resumed:
                    table.floor[slot] = table.done[slot]  # what is fed again below here was counted
        # rejected drafts: their places are fed anew
        table.done[slots] = np.maximum(np.minimum(table.done[slots], starts), table.floor[slots])
        # what another request left in the prefix cache is not routed
        skipped = np.maximum(starts - table.done[slots], 0)[~table.outside[slots]]
        self._remarks["skipped_by_prefix_cache"] += int(skipped.sum())
        table.done[slots] = np.maximum(table.done[slots], starts)
        table.start[slots] = starts

    @staticmethod
    def _extra(new: Any) -> dict[str, Any]:
        """What came with a request beside its sampling."""
        return getattr(new.sampling_params, "extra_args", None) or {}

    def _tags(self, new: Any) -> tuple[int, int]:
        """Domain and split of a request; of what a client of a server sends, only the name of a domain is read."""
        given = self._extra(new)
        if self.settings.serving:
            ids = np.asarray(new.prompt_token_ids or [], np.int32)
            return self._domain_named(given.get(DOMAIN_KEY, DEFAULT_DOMAIN)), split_of(ids, self.settings.seed)
        if VERIFY_KEY in given:
            self._verified[new.req_id] = []
        domain, split = int(given.get(DOMAIN_KEY, 0)), int(given.get(SPLIT_KEY, 0))
        if not (0 <= domain < self.settings.domains and 0 <= split < SPLITS):
            raise ValueError(f"request {new.req_id} has domain {domain} and split {split}")
        return domain, split

    def _domain_named(self, name: Any) -> int:
        """Index of a domain; a new name is taken as long as there is room, and what does not fit is `other`."""
        room = self.settings.domains - 1 - len(self._domains)
        if not is_domain_name(name) or (name not in self._domains and name != OTHER_DOMAIN and room < 1):
            name = OTHER_DOMAIN
        if name not in self._domains:
            if len(self._domains) == self.settings.domains:  # there is room for one domain alone
                return 0
            self._domains.append(name)
        return self._domains.index(name)

    def _limit(self, note: Note) -> None:
        """Drop the rows of open steps that a request did not get to keep."""
        table = self._table
        if note.limits or note.finished:
            self._end_steady()
        for name, limit in note.limits.items():
            slot = table.slot_of.get(name)
            if slot is None:
                continue
            for step in self._steps:
                dropped = (step.slots == slot) & (step.positions >= limit)
                if dropped.any():  # cells may be shared with other steps of a steady batch
                    step.cells, step.tokens = np.where(dropped, np.int32(-1), step.cells), None
            table.done[slot] = min(table.done[slot], limit)
        for name in note.aborted:
            slot = table.slot_of.get(name)
            self._remarks["aborted_requests"] += slot is not None and not table.outside[slot]
        for name, routed in note.finished.items():
            slot = table.slot_of.pop(name, None)
            if slot is not None:
                self._closing.append((note.step, name, slot, routed))

    def _settle(self, settled: int) -> None:
        """Count the steps whose rows are certain, and hold ended requests against the scheduler's lengths."""
        while self._steps and self._steps[0].number - (0 if self._steps[0].drafts else 1) <= settled:
            self._count(self._steps.popleft())
        oldest = self._steps[0].number if self._steps else None
        table = self._table
        while self._closing and (oldest is None or self._closing[0][0] <= oldest):
            _, name, slot, routed = self._closing.pop(0)
            if table.whole[slot] and table.counted[slot] != routed:
                counted = int(table.counted[slot])
                self._fail(
                    f"request {name}: {counted:,} tokens were counted, but its lengths say {routed:,}", believed=False
                )
                return
            if table.outside[slot]:
                self._remarks["left_out_tokens"] += int(table.done[slot])
            table.free.append(slot)
            self._order = []  # the slot may come back under another name

    def _count(self, step: _Step) -> None:
        recorder = self.recorder
        if recorder is None:
            return
        cells, tokens = step.cells, step.tokens
        if tokens is None:
            counted = cells >= 0
            if not counted.any():
                if step.copied is None:
                    recorder.poison(len(cells))
                return
            tokens = self._tokens_of(cells)
            self._table.counted += np.bincount(step.slots[counted], minlength=len(self._table.counted))
        elif self._steady is not None and cells is self._steady.cells:
            self._steady.counted += 1
        else:
            self._table.counted[step.slots] += 1
        if self._placed is None or (self._placed[0] is not cells and not np.array_equal(self._placed[0], cells)):
            self._placed = (cells, recorder.place(cells))
        for name in self._verified:
            self._keep(name, step, recorder)
        if step.token_ids is not None:
            self._send(step, recorder)
        self._counted += 1
        sampled = cells[step.sampled] if len(step.sampled) else None
        recorder.commit(self._placed[1], tokens, sampled=sampled, source=step.copied)

    def _keep(self, name: str, step: _Step, recorder: StagedRecorder) -> None:
        """Keep the ids of a request whose routing is to be verified, token by token."""
        slot = self._table.slot_of.get(name)
        if slot is None:
            slot = next((closing[2] for closing in self._closing if closing[1] == name), None)
        rows = np.flatnonzero((step.slots == slot) & (step.cells >= 0))
        if len(rows):
            ids = recorder.ids if step.copied is None else step.copied.ids
            chosen = ids[:, torch.from_numpy(rows).to(ids.device)].cpu()
            self._verified[name].append((step.positions[rows], chosen))

    def _send(self, step: _Step, recorder: StagedRecorder) -> None:
        """Hand the rows of traced requests over."""
        numbers = self._table.trace[step.slots]
        kept = (step.cells >= 0) & (numbers >= 0)
        if self._trace is None or step.token_ids is None or not kept.any():
            return
        ids, staged = recorder.staged(len(step.cells), step.copied)
        weights = staged if self._trace.weights else None
        tokens = step.token_ids
        if not kept.all():
            rows = recorder.upload(np.flatnonzero(kept).astype(np.int32))
            ids, tokens = ids.index_select(1, rows), tokens[rows]
            weights = None if weights is None else weights.index_select(1, rows)
        if weights is not None:
            weights = recorder.unscaled(weights)
        self._trace.send(numbers[kept], step.positions[kept], step.cells[kept], tokens, ids, weights)

    # called through RPC

    def trace_to(self, path: str | None, weights: bool = False) -> None:
        """Send the rows of traced requests to a socket from now on, or no longer."""
        if self._trace is not None:
            self._trace.close()
            self._trace = None
        if path is not None and self.rank["writes"] and self.recorder is not None:
            self._trace = TraceSender(path, self.recorder.experts, weights=weights)

    def traced(self) -> int:
        """Rows sent since `trace_to`; waits until they are."""
        return 0 if self._trace is None else self._trace.flush()

    def describe(self, folder: str) -> dict[str, Any]:
        """What was bound; router weights go to a file in `folder`."""
        from safetensors.torch import save_file

        if self._layers and self.rank["writes"]:
            gates = {str(layer.info.index): layer.gate for layer in self._layers if layer.gate is not None}
            kept = {name: gate.detach().to(torch.bfloat16).cpu().contiguous() for name, gate in gates.items()}
            save_file(kept, os.path.join(folder, f"routers-{rank_name(self.rank)}.safetensors"))
        return {
            "rank": self.rank,
            "layers": [(layer.info.index, layer.info.experts, layer.info.top_k) for layer in self._layers],
            "scoring": self._layers[0].scoring if self._layers else None,
            "groups": self._layers[0].groups if self._layers else None,
            "routers": sorted({type(layer.router).__name__ for layer in self._layers}),
            "bytes": self.recorder.nbytes if self.recorder is not None else 0,
            "capacity": self.recorder.capacity if self.recorder is not None else 0,
            "kernels": self.recorder is not None and self.recorder._kernels is not None,
            **self._description,
        }

    def switch(self, on: bool) -> None:
        """Start or stop recording; graphs stay as they are."""
        self._on = on
        self._end_steady()

    def reset(self) -> None:
        """Drop what was counted."""
        self._error = None
        self._requests = 0
        self._remarks = dict.fromkeys(REMARKS, 0)
        self._verified.clear()
        if self.recorder is not None:
            self.recorder.reset()

    def unsettled(self) -> int:
        """Steps and ended requests that wait for the scheduler."""
        return len(self._steps) + len(self._closing)

    def dump(self, folder: str) -> dict[str, str]:
        """Write what was counted to this rank's file in `folder` and start empty.

        Returns:
            "path" of the file; "error" if it does not add up; neither where another rank writes.
        """
        if self.recorder is None or not self.rank["writes"]:
            self.reset()
            return {}
        try:
            if self._error:
                raise InvariantError(self._error)
            part = self._part(self.recorder.peek(), self._now())
        except InvariantError as error:
            return {"error": str(error)}
        finally:
            self.reset()
        path = os.path.join(folder, f"part-{rank_name(self.rank)}.safetensors")
        save_part(replace(part, domains=()), Path(path))
        return {"path": path}

    def bound(self) -> bool:
        """That this worker has a recorder."""
        return True

    def verified(self, folder: str) -> dict[str, Any] | None:
        """Write the positions (T,) and ids (T, L, K) that were counted of each request that is to be verified."""
        from safetensors.numpy import save_file

        if not self.rank["writes"] or not self._layers:
            return None
        arrays: dict[str, NDArray[Any]] = {}
        for name, pieces in self._verified.items():
            if pieces:
                arrays[f"{name}:positions"] = np.concatenate([positions for positions, _ in pieces])
                ids = torch.cat([ids for _, ids in pieces], dim=1).permute(1, 0, 2)
                arrays[f"{name}:ids"] = np.ascontiguousarray(ids.numpy())
        path = os.path.join(folder, f"verified-{rank_name(self.rank)}.safetensors")
        save_file(arrays, path)
        return {"path": path, "layers": [layer.info.index for layer in self._layers]}

    def show(self) -> None:
        """Until `shown`, keep the distributions of the rows that are routed, one by one; they are not counted."""
        self.switch(False)
        self._shown = []

    def shown(self, folder: str) -> dict[str, Any] | None:
        """Write the positions (T,) and distributions (L, T, E) kept since `show`, and keep no more."""
        from safetensors.torch import save_file

        kept, self._shown = self._shown, None
        if not kept or not self.rank["writes"] or not self._layers:
            return None
        path = os.path.join(folder, f"shown-{rank_name(self.rank)}.safetensors")
        positions = torch.from_numpy(np.concatenate([positions for positions, _ in kept]))
        save_file({"positions": positions, "distributions": torch.cat([seen for _, seen in kept], dim=1)}, path)
        return {"path": path, "layers": [layer.info.index for layer in self._layers]}

    # what a server saves

    def _now(self) -> _Taken:
        return _Taken(
            self._counted, tuple(self._domains), self._requests, dict(self._remarks), self._error, time.time_ns()
        )

    def _part(self, sums: StagedSums, taken: _Taken) -> Part:
        return Part(
            layers=tuple(layer.info for layer in self._layers),
            scoring=self._layers[0].scoring,
            groups=self._layers[0].groups,
            domains=taken.domains,
            rank=self.rank,
            requests=taken.requests,
            sums=sums,
            description=self._description,
            run=self.settings.run,
            created=self._created,
            settings={
                "seed": self.settings.seed,
                "probabilities": self.settings.probabilities,
                "coactivation": self.settings.coactivation,
            },
            remarks=taken.remarks,
            ended=taken.ended,
            fingerprint=self._fingerprint,
        )

    def _take(self) -> None:
        """Take a snapshot; under the step's lock, or in the thread of the steps."""
        if self._snapshots is not None and self._believed:
            self._snapshots.take(len(self._domains), self._now())

    def _take_if_idle(self) -> None:
        """Take a snapshot unless a step is being prepared; those that the scheduler asks for come with a step."""
        if not self._believed:
            raise InvariantError(self._error or "what was counted is not believed")
        if self._lock.acquire(blocking=False):
            try:
                self._take()
            finally:
                self._lock.release()

    def _write(self) -> int:
        """Write the snapshot that waits in one go; its file's time is that of the snapshot."""
        assert self._snapshots is not None
        with self._snapshots.read() as (sums, taken):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_part(self._part(sums, taken), self._path)
            os.utime(self._path, ns=(taken.time_ns, taken.time_ns))
        return int(taken.counted)


def _batch_order(runner: Any) -> list[str]:
    """Request ids of the step that was just launched, in the order of their rows; model runners V2 and V1."""
    batch = _launched(runner)
    return list((runner.input_batch if batch is None else batch).req_ids)


def _launched(runner: Any) -> Any:
    """The batch of the step that was just launched, where the runner keeps one a step; else None."""
    return getattr(getattr(runner, "execute_model_state", None), "input_batch", None)


def _token_ids(runner: Any, rows: int) -> Tensor:
    """(T,) token ids of the step that was just launched, on the device; model runners V2 and V1."""
    batch = _launched(runner)
    ids: Tensor = runner.input_ids.gpu if batch is None else batch.input_ids
    return ids[:rows]


def _rank(parallel: Any) -> dict[str, Any]:
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    tp = get_tp_group().rank_in_group
    return {
        "dp": int(parallel.data_parallel_rank),
        "pp": int(get_pp_group().rank_in_group),
        "tp": int(tp),
        "pp_size": int(parallel.pipeline_parallel_size),
        "dp_size": int(parallel.data_parallel_size),
        "writes": tp == 0,  # without sequence parallelism every rank of a group routes the same rows
    }


def _refuse(config: Any) -> None:
    """Refuse engines whose rows could be miscounted."""
    import vllm.envs as envs

    parallel = config.parallel_config
    if envs.VLLM_MOE_ROUTING_SIMULATION_STRATEGY:
        raise ModelError("the routing is simulated: unset VLLM_MOE_ROUTING_SIMULATION_STRATEGY")
    if config.model_config.runner_type == "pooling":
        raise ModelError("pooling models are not recorded: they generate nothing; use the transformers engine")
    if getattr(parallel, "use_sequence_parallel_moe", False):
        raise ModelError(
            "MoE layers run sequence-parallel, which is not recorded; choose another all2all_backend, such as "
            "allgather_reducescatter, or leave out enable_expert_parallel"
        )
    if getattr(parallel, "use_ubatching", False) or getattr(parallel, "enable_dbo", False):
        raise ModelError("micro-batch overlap is not recorded: leave out enable_dbo")
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise ModelError("context parallelism is not recorded: leave out prefill_context_parallel_size")
    if config.speculative_config is not None and config.scheduler_config.async_scheduling:
        raise ModelError(
            "speculative decoding with asynchronous scheduling does not say in time which drafts were kept; set "
            "async_scheduling=False (on a server: --no-async-scheduling)"
        )


def _describe(config: Any) -> dict[str, Any]:
    import vllm

    model = config.model_config
    return {
        "vllm": vllm.__version__,
        "model": model.model,
        "architecture": (model.hf_config.architectures or [type(model.hf_config).__name__])[0],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": _device_name(),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "enforce_eager": bool(model.enforce_eager),
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "max_model_len": int(model.max_model_len),
        "vocabulary": int(model.get_vocab_size()),
        "quantization": model.quantization,
    }


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
