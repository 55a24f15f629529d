"""What a scheduler knows of each request's length, sent to the workers with every step.

Workers learn too late which rows were worth counting: with asynchronous scheduling a step is planned before the token
that it feeds is known. So they wait with each step until this ledger says how far its requests got.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

#: Attribute of a `SchedulerOutput` that carries the note; a plain dataclass, so pickling takes it along.
NOTE: Final = "moescope_note"
#: Seconds between two saves of a server under traffic: what came before is on the disk 5 s later.
SAVE_EVERY: Final = 4.0


@dataclass(frozen=True, slots=True)
class Note:
    """What the scheduler tells the workers with one step.

    Attributes:
        step: Number of this step, from 0.
        settled: All steps up to this number have had their outputs taken in; -1 if none.
        limits: For some requests, the position from which rows of earlier steps do not count: rejected drafts, the row
            after the last token, tokens that a preemption threw away.
        finished: For each request that ended, how many of its tokens were routed, from its lengths alone.
        aborted: Requests among them that did not end by themselves: a client hung up, or its stop string was found.
        left_out: New requests that are not counted: their prompts grow while they run (streaming input).
        save: Every worker is to take a snapshot before this step, so that all of them take the same.
        failed: Why nothing is counted from now on, or None.
    """

    step: int
    settled: int
    limits: dict[str, int] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    save: bool = False
    failed: str | None = None


class SaveClock:
    """Says with which steps a server saves: every few seconds, and when a file is touched.

    Args:
        trigger: The file.
        every: Seconds between two saves.
    """

    def __init__(self, trigger: Path, every: float = SAVE_EVERY) -> None:
        self._trigger = trigger
        self._every = every
        self._touched = touched(trigger)
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether to save with this step."""
        now, seen = time.monotonic(), touched(self._trigger)
        if seen == self._touched and now - self._last < self._every:
            return False
        self._touched, self._last = seen, now
        return True


def touched(path: Path) -> int:
    """When a file was touched last, ns; 0 if it is not there."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


@dataclass(slots=True)
class _Entry:
    skipped: int
    reached: int = 0


class Ledger:
    """Follows one scheduler; its methods are called around the scheduler's own.

    Args:
        clock: Says when a server saves; None: nothing is saved meanwhile.
    """

    def __init__(self, clock: SaveClock | None = None) -> None:
        self.failed: str | None = None
        self._clock = clock
        self._step = 0
        self._taken_in: set[int] = set()
        self._settled = -1
        self._limits: dict[str, int] = {}
        self._finished: dict[str, int] = {}
        self._aborted: list[str] = []
        self._entries: dict[str, _Entry] = {}
        self._drafted: set[str] = set()

    def scheduled(self, output: Any, requests: dict[str, Any]) -> None:
        """A step was planned: attach the note to it."""
        left_out = set()
        for new in output.scheduled_new_reqs:
            if getattr(requests.get(new.req_id), "resumable", False):
                left_out.add(new.req_id)
            if new.req_id in self._entries:  # model runner V2: a preempted request comes back as a new one
                self._resumed(new.req_id, new.num_computed_tokens)
            else:
                self._entries[new.req_id] = _Entry(skipped=new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        if cached.resumed_req_ids:
            for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
                if request_id in cached.resumed_req_ids and request_id in self._entries:
                    self._resumed(request_id, computed)
        for request_id in self._drafted:
            if request_id in requests:
                # the newest token has not been fed; what was fed from its place on are rejected drafts
                self._limits.setdefault(request_id, requests[request_id].num_tokens - 1)
        self._drafted = set(output.scheduled_spec_decode_tokens)
        save = self._clock is not None and self._clock.due()
        note = Note(self._step, self._settled, self._limits, self._finished, self._aborted, left_out, save)
        setattr(output, NOTE, note)
        self._limits, self._finished, self._aborted = {}, {}, []
        self._step += 1

    def guarded(self, method: Callable[..., None], *arguments: Any) -> None:
        """Keep a fault of the ledger away from the scheduler, which goes on; what comes after it is not counted."""
        if self.failed is None:
            try:
                method(*arguments)
            except Exception as error:  # whatever it is, the engine must not die of it
                self.failed = f"the scheduler's ledger failed: {type(error).__name__}: {error}"
                self._entries.clear()

    def _resumed(self, request_id: str, computed: int) -> None:
        entry = self._entries[request_id]
        # past what it had reached, another request left its tokens in the prefix cache
        entry.skipped += max(0, computed - entry.reached)

    def taken_in(self, output: Any) -> None:
        """The outputs of a step were taken in."""
        self._taken_in.add(getattr(output, NOTE).step)
        while self._settled + 1 in self._taken_in:
            self._settled += 1
            self._taken_in.discard(self._settled)

    def preempting(self, request: Any) -> None:
        """A request is about to lose its cache; what it has computed will be computed again."""
        entry = self._entries.get(request.request_id)
        if entry is not None:
            entry.reached = max(entry.reached, min(request.num_computed_tokens, request.num_tokens))
            self._limits[request.request_id] = entry.reached

    def ended(self, request: Any, *, aborted: bool) -> None:
        """A request ended by itself or was aborted."""
        entry = self._entries.pop(request.request_id, None)
        if entry is None:  # never scheduled: nothing was routed
            return
        if aborted:
            self._aborted.append(request.request_id)
            # what is in flight past the last known token is not known to be worth counting
            end = max(entry.reached, min(request.num_computed_tokens, request.num_tokens))
        else:
            end = request.num_tokens - 1  # the last token is never fed
        self._limits[request.request_id] = end
        self._finished[request.request_id] = end - entry.skipped


def follow(scheduler: type, clock: Callable[[], SaveClock | None] = lambda: None) -> None:
    """Wrap a scheduler class so that each instance keeps a ledger and its steps carry notes.

    Args:
        scheduler: vLLM's class.
        clock: Makes the clock of a ledger.
    """
    plan, take_in = scheduler.schedule, scheduler.update_from_output  # type: ignore[attr-defined]
    free, preempt = scheduler._free_request, scheduler._preempt_request  # type: ignore[attr-defined]

    def ledger(self: Any) -> Ledger:
        kept: Ledger | None = getattr(self, "_moescope_ledger", None)
        if kept is None:
            kept = self._moescope_ledger = Ledger(clock())
        return kept

    @functools.wraps(plan)
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plan(self, *args, **kwargs)
        own = ledger(self)
        own.guarded(own.scheduled, output, self.requests)
        if own.failed is not None:
            setattr(output, NOTE, Note(-1, -1, failed=own.failed))
        return output

    @functools.wraps(take_in)
    def update_from_output(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = take_in(self, scheduler_output, *args, **kwargs)
        own = ledger(self)
        if hasattr(scheduler_output, NOTE):
            own.guarded(own.taken_in, scheduler_output)
        return result

    @functools.wraps(free)
    def free_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        own = ledger(self)
        own.guarded(lambda: own.ended(request, aborted=request.status.name in ("FINISHED_ABORTED", "FINISHED_ERROR")))
        return free(self, request, *args, **kwargs)

    @functools.wraps(preempt)
    def preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        own = ledger(self)
        own.guarded(own.preempting, request)
        return preempt(self, request, *args, **kwargs)

    scheduler.schedule = schedule  # type: ignore[attr-defined]
    scheduler.update_from_output = update_from_output  # type: ignore[attr-defined]
    scheduler._free_request = free_request  # type: ignore[attr-defined]
    scheduler._preempt_request = preempt_request  # type: ignore[attr-defined]
