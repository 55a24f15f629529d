"""Snapshots of a recorder that counts on: each is what was counted up to one of its steps, never something between."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from moescope.profiler.errors import InvariantError
from moescope.profiler.profile import LayerInfo
from moescope.profiler.snapshots import Snapshots
from moescope.profiler.staged import StagedRecorder, StagedSums, cell_of

EXPERTS, K, LAYERS, ROWS = 32, 4, 12, 64


def make_recorder(**options: object) -> StagedRecorder:
    layers = [LayerInfo(index, EXPERTS, K) for index in range(LAYERS)]
    shape = {"scoring": "softmax", "scales": [1.0] * LAYERS, "capacity": ROWS, "domains": 4}
    return StagedRecorder(layers, **(shape | options))  # type: ignore[arg-type]


class Engine:
    """Counts steps in a thread of its own, whose rows are a function of their number."""

    def __init__(self, recorder: StagedRecorder, snapshots: Snapshots, every: int) -> None:
        self.recorder, self.snapshots, self.every = recorder, snapshots, every
        self.lock = threading.Lock()
        self.steps = 0
        self.stop = threading.Event()
        rng = np.random.default_rng(5)
        chosen = np.argsort(rng.random((7, LAYERS, ROWS, EXPERTS)), axis=-1)[..., :K].astype(np.int32)
        self.ids = torch.from_numpy(chosen)
        self.cells = np.array([cell_of(row % 3, row % 2, row % 16) for row in range(ROWS)], np.int32)
        self.tokens = np.bincount(self.cells, minlength=4 * 32)
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.stop.is_set():
            with self.lock:
                self.step()
                if self.steps % self.every == 0:
                    self.snapshots.take(3, self.steps)
            time.sleep(0.0002)  # between two steps an engine leaves the lock to others

    def step(self) -> None:
        self.recorder.ids.copy_(self.ids[self.steps % 7])
        self.recorder.weights.fill_(1 / K)
        self.recorder.commit(self.recorder.upload(self.cells), self.tokens)
        self.steps += 1

    def expected(self, steps: int) -> np.ndarray:
        """Cells (3 · 32, L, E) after so many steps."""
        out = np.zeros((4 * 32, LAYERS, EXPERTS), np.int64)
        for kind in range(7):
            times = len(range(kind, steps, 7))
            for slot in range(LAYERS):
                np.add.at(out, (self.cells[:, None], slot, self.ids[kind, slot].numpy()), times)
        return out[: 3 * 32]


@pytest.fixture
def engine() -> Iterator[Engine]:
    recorder = make_recorder(share=0.0, coactivation=True)
    made = Engine(recorder, Snapshots(recorder), every=3)
    yield made
    made.stop.set()
    made.thread.join()


def assert_is_after(engine: Engine, sums: StagedSums, steps: int) -> None:
    np.testing.assert_array_equal(sums.cells.reshape(3 * 32, LAYERS, EXPERTS), engine.expected(steps))
    np.testing.assert_array_equal(sums.tokens.reshape(-1), engine.tokens[: 3 * 32] * steps)
    assert sums.cells.sum() == LAYERS * K * sums.tokens.sum() == LAYERS * K * ROWS * steps
    assert sums.coactivation is not None
    np.testing.assert_array_equal(np.diagonal(sums.coactivation, axis1=1, axis2=2), sums.cells.sum(axis=(0, 1, 2)))


def test_every_snapshot_is_what_was_counted_up_to_a_step(engine: Engine) -> None:
    engine.thread.start()
    seen = []
    deadline = time.monotonic() + 60
    while len(seen) < 40:
        assert time.monotonic() < deadline
        if len(seen) % 10 == 9:  # as the saver does where the scheduler asks for nothing
            with engine.lock:
                engine.snapshots.take(3, engine.steps)
        if engine.snapshots.waiting:
            with engine.snapshots.read() as (sums, steps):
                time.sleep(0.001)  # the engine counts on while it is read
                assert_is_after(engine, sums, steps)
            seen.append(steps)
        else:
            time.sleep(0.001)  # a loop that spins keeps the interpreter's lock from the engine
    assert len(set(seen)) > 30
    assert not engine.snapshots.waiting or engine.snapshots.take(3) is False


def test_reading_the_sums_themselves_meanwhile_is_torn(engine: Engine) -> None:
    """The control: without a snapshot, a count is seen that belongs to no step."""
    engine.thread.start()
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline, "not one of the reads was torn"
        try:
            engine.recorder.peek()
        except InvariantError:
            break


def test_a_snapshot_is_read_once_and_holds_only_the_domains_in_use() -> None:
    recorder = make_recorder(share=1.0)
    snapshots = Snapshots(recorder)
    with pytest.raises(RuntimeError, match="no snapshot"), snapshots.read():
        pass
    assert snapshots.take(2, "first")
    assert not snapshots.take(2, "second")
    with snapshots.read() as (sums, about):
        assert about == "first"
        assert sums.cells.shape == (2, 2, 16, LAYERS, EXPERTS)
        assert sums.probability is not None
        assert sums.probability.shape == (2, 2, LAYERS, EXPERTS)
        assert not snapshots.take(2, "while it is read")
    assert snapshots.take(4)


def test_a_snapshot_that_does_not_add_up_is_refused_and_given_back() -> None:
    recorder = make_recorder()
    snapshots = Snapshots(recorder)
    recorder._counts[0, 0, 0] = 1
    snapshots.take(1)
    with pytest.raises(InvariantError, match="layer 0"), snapshots.read():
        pass
    assert snapshots.take(1)
