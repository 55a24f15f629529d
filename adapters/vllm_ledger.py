"""What a scheduler knows of each request's length, sent to the workers with every step.

Workers learn too late which rows were worth counting: with asynchronous scheduling a step is planned before the token
that it feeds is known. So they wait with each step until this ledger says how far its requests got.
"""

from dataclasses import dataclass, field
from typing import Any, Final

#: Attribute of a `SchedulerOutput` that carries the note; a plain dataclass, so pickling takes it along.
NOTE: Final = "moescope_note"


@dataclass(frozen=True, slots=True)
class Note:
    """What the scheduler tells the workers with one step.

    Attributes:
        step: Number of this step, from 0.
        settled: All steps up to this number have had their outputs taken in; -1 if none.
        limits: For some requests, the position from which rows of earlier steps do not count: rejected drafts, the row
            after the last token, tokens that a preemption threw away.
        finished: For each request that ended, how many of its tokens were routed, from its lengths alone.
    """

    step: int
    settled: int
    limits: dict[str, int] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Entry:
    skipped: int
    reached: int = 0


class Ledger:
    """Follows one scheduler; its methods are called around the scheduler's own."""

    def __init__(self) -> None:
        self._step = 0
        self._taken_in: set[int] = set()
        self._settled = -1
        self._limits: dict[str, int] = {}
        self._finished: dict[str, int] = {}
        self._entries: dict[str, _Entry] = {}
        self._drafted: set[str] = set()

    def scheduled(self, output: Any, requests: dict[str, Any]) -> None:
        """A step was planned: attach the note to it."""
        for new in output.scheduled_new_reqs:
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
        setattr(output, NOTE, Note(self._step, self._settled, self._limits, self._finished))
        self._limits, self._finished = {}, {}
        self._step += 1

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
        if aborted:  # what is in flight past the last known token is not known to be worth counting
            end = max(entry.reached, min(request.num_computed_tokens, request.num_tokens))
        else:
            end = request.num_tokens - 1  # the last token is never fed
        self._limits[request.request_id] = end
        self._finished[request.request_id] = end - entry.skipped


def follow(scheduler: type) -> None:
    """Wrap a scheduler class so that each instance keeps a ledger and its steps carry notes."""
    plan, take_in = scheduler.schedule, scheduler.update_from_output  # type: ignore[attr-defined]
    free, preempt = scheduler._free_request, scheduler._preempt_request  # type: ignore[attr-defined]

    def ledger(self: Any) -> Ledger:
        kept: Ledger | None = getattr(self, "_moescope_ledger", None)
        if kept is None:
            kept = self._moescope_ledger = Ledger()
        return kept

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plan(self, *args, **kwargs)
        ledger(self).scheduled(output, self.requests)
        return output

    def update_from_output(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = take_in(self, scheduler_output, *args, **kwargs)
        if hasattr(scheduler_output, NOTE):
            ledger(self).taken_in(scheduler_output)
        return result

    def free_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        aborted = request.status.name in ("FINISHED_ABORTED", "FINISHED_ERROR")
        ledger(self).ended(request, aborted=aborted)
        return free(self, request, *args, **kwargs)

    def preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        ledger(self).preempting(request)
        return preempt(self, request, *args, **kwargs)

    scheduler.schedule = schedule  # type: ignore[attr-defined]
    scheduler.update_from_output = update_from_output  # type: ignore[attr-defined]
    scheduler._free_request = free_request  # type: ignore[attr-defined]
    scheduler._preempt_request = preempt_request  # type: ignore[attr-defined]
