"""Which rows count, against a simulated scheduler: asynchronous steps, preemption, drafts, aborts, in random order.

vLLM's CPU build does not schedule asynchronously, so this simulation drives the same ledger, worker and recorder
through what its GPU build does. What a row routed is a function of its request and position; the expected counts come
from the requests' final lengths alone. The GPU regimes in tests/gpu do the same with the real engine.
"""

import threading
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace as Space
from typing import Any

import numpy as np
import pytest
import torch

from moescope.adapters.vllm_ledger import Ledger
from moescope.adapters.vllm_parts import REMARKS
from moescope.adapters.vllm_settings import DOMAIN_KEY, SPLIT_KEY, TRACE_KEY, Settings
from moescope.adapters.vllm_worker import WorkerRecorder, _Table
from moescope.profiler.profile import LayerInfo
from moescope.profiler.staged import StagedRecorder

EXPERTS, K, LAYERS = 8, 2, 3


def _chosen(name: str, position: int) -> np.ndarray:
    """(L, K) ids that a token of a request is sent to."""
    rng = np.random.default_rng([int(name), position])
    return np.stack([rng.permutation(EXPERTS)[:K] for _ in range(LAYERS)])


@dataclass
class _Request:
    request_id: str
    prompt: int
    wanted: int
    num_tokens: int = 0
    num_computed_tokens: int = 0
    placeholders: int = 0
    in_flight: int = 0
    target: int = 0
    seen: bool = False
    resumed: bool = False
    ended: bool = False
    resumable: bool = False
    reached: int = 0
    uncounted: set[int] = field(default_factory=set)


class _Simulation:
    def __init__(self, seed: int, *, depth: int, drafts: int, as_new: bool, gpu_rows: int = 40) -> None:
        self.rng = np.random.default_rng(seed)
        self.depth, self.drafts, self.as_new = depth, drafts, as_new
        self.ledger = Ledger()
        self.worker = _worker(gpu_rows)
        self.rows = gpu_rows
        self.expected = np.zeros((2, 2, 16, LAYERS, EXPERTS), np.int64)
        self.active: dict[str, _Request] = {}
        self.waiting: list[_Request] = []
        for number in range(12):
            prompt, wanted = int(self.rng.integers(1, 25)), int(self.rng.integers(1, 12))
            request = _Request(str(number), prompt, wanted, num_tokens=prompt, target=prompt)
            self.waiting.append(request)
        self.flying: deque[tuple[Any, list[tuple[_Request, int]]]] = deque()
        self.places = self.rng.permutation(12).tolist()

    def run(self) -> None:
        for _ in range(2000):
            self._maybe_disturb()
            while len(self.flying) < self.depth and self._plan():
                pass
            if not self.flying and not self.active and not self.waiting:
                break
            if self.flying:
                self._take_in()
        else:
            pytest.fail("the simulation does not end")
        self._plan(empty=True)  # the engine's last step, which brings the news of the last requests
        assert self.worker.unsettled() == 0
        assert self.worker._error is None

    def _maybe_disturb(self) -> None:
        running = [request for request in self.active.values() if not request.in_flight]
        if running and self.rng.random() < 0.08:
            request = running[int(self.rng.integers(len(running)))]
            self.ledger.preempting(request)
            request.reached = max(request.reached, min(request.num_computed_tokens, request.num_tokens))
            request.num_computed_tokens = request.placeholders = 0
            if self.rng.random() < 0.3:  # another request left more of it in the prefix cache than it had reached
                cached = int(self.rng.integers(0, request.num_tokens))
                request.num_computed_tokens = cached
                request.uncounted |= set(range(request.reached, cached))
                request.reached = max(request.reached, cached)
            request.resumed = True
            del self.active[request.request_id]
            self.waiting.insert(0, request)
        if self.active and self.rng.random() < 0.03:
            self._end(self.active[next(iter(self.active))], aborted=True)

    def _plan(self, *, empty: bool = False) -> bool:
        room = self.rows - 4
        new, resumed, known, scheduled, drafted = [], set(), [], {}, {}
        work = []
        for request in list(self.active.values()) + ([] if empty else list(self.waiting)):
            if request.request_id not in self.active and len(self.active) >= 4:
                continue
            start = request.num_computed_tokens
            left = request.num_tokens + request.placeholders - start
            count = min(left, room, int(self.rng.integers(1, 16)))
            if count < 1 or empty:
                continue
            target = request.prompt + request.wanted
            if start >= request.prompt and start + 1 >= target + 1:
                continue  # the scheduler knows the longest output
            samples = start + count >= request.num_tokens + request.placeholders
            extra = 0
            if samples and self.drafts and start >= request.prompt:
                extra = min(self.drafts, room - count, target - start - count)
                drafted |= {request.request_id: [0] * extra} if extra > 0 else {}
                extra = max(extra, 0)
            if request.request_id not in self.active:
                self.waiting.remove(request)
                self.active[request.request_id] = request
                if not request.seen or self.as_new:
                    new.append(request)
                else:
                    resumed.add(request.request_id)
                    known.append(request)
            else:
                known.append(request)
            request.seen = True
            work.append((request, start, count + extra, samples))
            scheduled[request.request_id] = count + extra
            room -= count + extra
        if not work and not empty:
            return False
        output = Space(
            scheduled_new_reqs=[self._data(request) for request in new],
            scheduled_cached_reqs=Space(
                req_ids=[request.request_id for request in known],
                num_computed_tokens=[request.num_computed_tokens for request in known],
                resumed_req_ids=resumed,
            ),
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            scheduled_spec_decode_tokens=drafted,
        )
        self.ledger.scheduled(output, self.active)
        self._execute(output, work)
        flying = []
        for request, start, count, samples in work:
            request.num_computed_tokens = start + count
            request.in_flight += samples
            request.placeholders += samples and self.depth > 1
            flying.append((request, count if samples else 0))
        self.flying.append((output, flying))
        return True

    @staticmethod
    def _data(request: _Request) -> Any:
        number = int(request.request_id)
        return Space(
            req_id=request.request_id,
            prompt_token_ids=list(range(request.prompt)),
            prompt_embeds=None,
            num_computed_tokens=request.num_computed_tokens,
            sampling_params=Space(
                extra_args={DOMAIN_KEY: number % 2, SPLIT_KEY: number % 16}
                | ({TRACE_KEY: number} if number % 3 else {})  # two requests in three
            ),
        )

    def _execute(self, output: Any, work: list[Any]) -> None:
        """A forward: the engine puts its rows in an order of its own, which it keeps for a while."""
        if self.rng.random() < 0.2:
            self.places = self.rng.permutation(12).tolist()
        order = sorted(work, key=lambda item: self.places[int(item[0].request_id)])
        tokens = [_token(request.request_id, start + i) for request, start, count, _ in order for i in range(count)]
        self.worker._runner = Space(
            input_batch=Space(req_ids=[request.request_id for request, *_ in order]),
            input_ids=Space(gpu=torch.tensor(tokens + [-7] * 3, dtype=torch.int32)),
        )
        self.worker.before(output)
        recorder = self.worker.recorder
        row = 0
        for request, start, count, _ in order:
            for position in range(start, start + count):
                recorder.ids[:, row] = torch.from_numpy(_chosen(request.request_id, position)).int()
                recorder.weights[:, row] = 1 / K
                row += 1
        padded = min(row + 3, self.rows)
        recorder.ids[:, row:padded] = 0
        self.worker.after(output)

    def _take_in(self) -> None:
        output, flying = self.flying.popleft()
        for request, count in flying:
            if not count:
                continue
            request.in_flight -= 1
            if request.ended:
                continue
            request.placeholders = max(0, request.placeholders - 1)
            drafts = len(output.scheduled_spec_decode_tokens.get(request.request_id, ()))
            accepted = int(self.rng.integers(0, drafts + 1)) if drafts else 0
            request.num_computed_tokens -= drafts - accepted
            last = request.prompt + request.wanted
            for _ in range(accepted + 1):
                request.num_tokens += 1
                if request.num_tokens == last or self.rng.random() < 0.05:  # a stop token
                    self._end(request, aborted=False)
                    break
        self.ledger.taken_in(output)

    def _end(self, request: _Request, *, aborted: bool) -> None:
        request.ended = True
        self.ledger.ended(request, aborted=aborted)
        del self.active[request.request_id]
        if aborted:
            last = max(request.reached, min(request.num_computed_tokens, request.num_tokens))
        else:
            last = request.num_tokens - 1
        number = int(request.request_id)
        for position in set() if request.resumable else set(range(last)) - request.uncounted:
            phase = int(position >= request.prompt)
            for layer, ids in enumerate(_chosen(request.request_id, position)):
                self.expected[number % 2, phase, number % 16, layer, ids] += 1


class _Sender:
    """Keeps what is sent: experts and token by request and position."""

    weights = True

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], tuple[list[list[int]], int, int]] = {}

    def send(self, requests: Any, positions: Any, cells: Any, tokens: Any, ids: Any, weights: Any) -> None:
        assert (weights == 1 / K).all()
        for row, (request, position) in enumerate(zip(requests.tolist(), positions.tolist(), strict=True)):
            assert (request, position) not in self.rows
            self.rows[request, position] = (ids[:, row].tolist(), int(tokens[row]), int(cells[row]))


def _token(request_id: str, position: int) -> int:
    return 100 * int(request_id) + position


def _worker(rows: int) -> WorkerRecorder:
    worker = object.__new__(WorkerRecorder)  # its constructor wants a real engine
    layers = [LayerInfo(index, EXPERTS, K) for index in range(LAYERS)]
    worker.settings = Settings("", domains=2)
    worker.recorder = StagedRecorder(
        layers, scoring="softmax", scales=[1.0] * LAYERS, capacity=rows, domains=2, share=1.0
    )
    worker._table = _Table()
    worker._steps, worker._closing = deque(), []
    worker._order, worker._order_slots = [], np.zeros(0, np.int64)
    worker._placed, worker._upcoming = None, np.zeros(0, np.int64)
    worker._steady = None
    worker._armed = worker._on = True
    worker._shown, worker._trace = None, None
    worker._error, worker._verified = None, {}
    worker._requests = worker._counted = 0
    worker._remarks = dict.fromkeys(REMARKS, 0)
    worker._snapshots, worker._believed = None, True
    worker._lock = threading.Lock()
    return worker


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("depth", "drafts", "as_new"),
    [(1, 0, False), (2, 0, False), (2, 0, True), (3, 0, True), (1, 3, False), (1, 3, True)],
    ids=["sync", "async", "async V2", "async pipeline V2", "drafts", "drafts V2"],
)
def test_every_routed_token_counts_once(seed: int, depth: int, drafts: int, as_new: bool) -> None:
    simulation = _Simulation(seed, depth=depth, drafts=drafts, as_new=as_new)
    simulation.run()
    sums = simulation.worker.recorder.drain()
    np.testing.assert_array_equal(sums.cells, simulation.expected)
    assert simulation.worker._requests == 12
    assert not simulation.worker._table.slot_of


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("depth", "drafts", "as_new"), [(1, 0, False), (2, 0, True), (1, 3, False)])
def test_every_row_of_a_traced_request_is_sent_once(seed: int, depth: int, drafts: int, as_new: bool) -> None:
    simulation = _Simulation(seed, depth=depth, drafts=drafts, as_new=as_new)
    sender = _Sender()
    simulation.worker._trace = sender  # type: ignore[assignment]
    simulation.run()
    counted = simulation.worker.recorder.drain()  # type: ignore[union-attr]
    np.testing.assert_array_equal(counted.cells, simulation.expected)
    traced = np.zeros_like(simulation.expected)
    for (number, position), (ids, token, cell) in sender.rows.items():
        assert number % 3
        assert token == _token(str(number), position)
        assert ids == _chosen(str(number), position).tolist()
        for layer, chosen in enumerate(ids):
            traced[cell // 32, cell // 16 % 2, cell % 16, layer, chosen] += 1
    of_traced = np.array([number % 3 > 0 for number in range(12)])
    for number in range(12):  # twelve requests have twelve splits: each has cells of its own
        part = np.s_[number % 2, :, number]
        expected = simulation.expected[part] if of_traced[number] else 0
        np.testing.assert_array_equal(traced[part], expected)


def test_steps_of_a_steady_batch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    steady = WorkerRecorder._next_of_steady

    def noted(worker: WorkerRecorder, output: Any) -> Any:
        found.append(steady(worker, output))
        return found[-1]

    monkeypatch.setattr(WorkerRecorder, "_next_of_steady", noted)
    for seed in range(4):
        _Simulation(seed, depth=1, drafts=0, as_new=False).run()
    assert 5 < sum(step is not None for step in found) < len(found)


def test_a_wrong_length_is_found() -> None:
    simulation = _Simulation(0, depth=2, drafts=0, as_new=False)
    ended = simulation.ledger.ended

    def one_more(request: Any, *, aborted: bool) -> None:
        ended(request, aborted=aborted)
        if request.request_id == "3":
            simulation.ledger._finished["3"] += 1

    simulation.ledger.ended = one_more  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        simulation.run()
    assert "request 3" in (simulation.worker._error or "")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("depth", "as_new"), [(1, False), (2, False), (2, True)])
def test_requests_with_streaming_input_are_left_out(seed: int, depth: int, as_new: bool) -> None:
    simulation = _Simulation(seed, depth=depth, drafts=0, as_new=as_new)
    for request in simulation.waiting[::5]:
        request.resumable = True
    left_out = len(simulation.waiting[::5])
    simulation.run()
    np.testing.assert_array_equal(simulation.worker.recorder.drain().cells, simulation.expected)
    assert simulation.worker._remarks["left_out_requests"] == left_out == 12 - simulation.worker._requests
    assert simulation.worker._remarks["left_out_tokens"] > 0


def test_steps_that_the_scheduler_forgets_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    from moescope.adapters import vllm_worker

    monkeypatch.setattr(vllm_worker, "_MOST_OPEN", 5)
    simulation = _Simulation(0, depth=2, drafts=0, as_new=False)
    simulation.ledger.taken_in = lambda output: None  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        simulation.run()
    assert "has not said for 6 steps" in (simulation.worker._error or "")
    assert simulation.worker.unsettled() == 0
    simulation.worker.recorder.peek()  # type: ignore[union-attr] # what was counted adds up


def test_what_was_counted_before_a_fault_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = _Simulation(3, depth=2, drafts=0, as_new=False)
    learn, steps = simulation.worker._learn, []

    def failing(output: Any) -> None:
        steps.append(output)
        if len(steps) == 12:
            raise MemoryError("no room")
        learn(output)

    monkeypatch.setattr(simulation.worker, "_learn", failing)
    with pytest.raises(AssertionError):
        simulation.run()
    assert simulation.worker._error == "the recorder failed: MemoryError: no room"
    assert simulation.worker._believed
    sums = simulation.worker.recorder.peek()  # type: ignore[union-attr]
    assert 0 < sums.tokens.sum() < simulation.expected.sum() / LAYERS / K
    assert (sums.cells <= simulation.expected).all()


def test_the_first_rows_rather_than_a_sample() -> None:
    """As many as the buffer holds; the next draw is a sample again."""
    layers = [LayerInfo(0, 4, 2)]
    shape: dict[str, Any] = {"scoring": "softmax", "scales": [1.0], "capacity": 256, "domains": 1}
    recorder = StagedRecorder(layers, **shape, share=1 / 64, seed=1)
    assert recorder.sample is not None
    room = len(recorder.sample)
    for rows in (1, 5, room, room + 1, 256):
        chosen = recorder.choose_first(rows)
        assert chosen.tolist() == list(range(min(rows, room)))
        assert recorder.sample.tolist() == chosen.tolist() + [-1] * (room - len(chosen))
    logits = torch.randn(5, 4)
    recorder.choose_first(5)
    recorder.stage_distributions(0, logits)
    assert recorder.distributions is not None
    torch.testing.assert_close(recorder.distributions[0, :5], logits.softmax(-1))
    drawn = recorder.choose_sample(256)
    assert recorder.sample[: len(drawn)].tolist() == drawn.tolist() != list(range(len(drawn)))
    assert recorder.peek().tokens.sum() == 0
    off = StagedRecorder(layers, **shape)
    assert off.choose_first(7).tolist() == []
