"""One pass over the experts of a checkpoint: every byte read once, all layers side by side, memory bounded."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch
from torch import Tensor

from moescope.profiler.interrupts import interruptible
from moescope.profiler.weight_features import draw_probes
from moescope.profiler.weight_slabs import (
    PARTS,
    Block,
    Part,
    ReadAhead,
    Slab,
    WeightSource,
    part_forms,
    plan,
    weights_of,
)
from moescope.profiler.weight_sums import ChangeSums, Faults, FeatureSums, MatchSums, SameIndexSums, Sums, Task

#: Working memory of a pass, bytes; what is read of a block takes two fifths of it, twice.
MEMORY: Final = 1 << 30
#: Least time between two times that the sums are kept, seconds; and how much longer than keeping them takes.
KEEP_SECONDS: Final = 30.0
KEEP_RATIO: Final = 10.0
#: Threads that read for a GPU, which waits for one; on a CPU the cores are wanted for the arithmetic.
READERS: Final = 4


@dataclass(frozen=True, slots=True)
class PassSettings:
    """What a pass is to measure. Two passes of the same settings over the same files go through the same blocks.

    Attributes:
        deltas: Distances of layers at which experts are compared as they are.
        all_pairs: Compare them without their layer's mean in all pairs of layers, not just at `deltas`.
        pairs: Layers, by true index, whose experts are matched all against all; against another checkpoint, layers of
            this one and of that.
        sketch: Read a sample of the weights.
        memory: Working memory, bytes.
    """

    deltas: tuple[int, ...] = ()
    all_pairs: bool = True
    pairs: tuple[tuple[int, int], ...] = ()
    sketch: bool = False
    memory: int = MEMORY


@dataclass(frozen=True, slots=True)
class PassProgress:
    """How far a pass is.

    Attributes:
        bytes_read: Bytes read.
        bytes_total: Bytes to read.
        bytes_per_second: Speed since the start of this run.
        seconds_left: At that speed.
    """

    bytes_read: int
    bytes_total: int
    bytes_per_second: float
    seconds_left: float


class Keeper(Protocol):
    """Where the sums of an unfinished pass are kept."""

    def load(self, fingerprint: str) -> tuple[int, Mapping[str, Tensor]] | None:
        """Blocks that an interrupted pass had done, and its sums; None without any."""

    def keep(self, fingerprint: str, done: int, state: Mapping[str, Tensor]) -> None:
        """Keep the sums after `done` blocks."""


@dataclass(frozen=True, slots=True, eq=False)
class PassResult:
    """What a pass has summed, and how.

    Attributes:
        state: Sums by name, on the CPU; see `moescope.profiler.weight_sums`.
        coordinates: Weights read of each expert.
        bytes_read: Bytes read of the experts, of all checkpoints.
        engine: Device and threads, in words.
        seconds: What this run took.
    """

    state: dict[str, Tensor] = field(repr=False)
    coordinates: int
    bytes_read: int
    engine: str
    seconds: float


def run_pass(
    sources: Sequence[WeightSource],
    settings: PassSettings,
    *,
    device: str = "cpu",
    n_jobs: int | None = None,
    keeper: Keeper | None = None,
    on_progress: Callable[[PassProgress], None] | None = None,
) -> PassResult:
    """Sum over the experts of a checkpoint, layer against layer, or over those of two, expert against expert.

    Blocks of rows of all layers and experts are read one after another, the next while the present one is worked on;
    the work on a block is spread over threads.

    Args:
        sources: One checkpoint, or two of the same layers and shape.
        settings: What is measured.
        device: "cpu" or a CUDA device.
        n_jobs: Threads; all cores by default.
        keeper: Where unfinished sums are kept, and taken up from.
        on_progress: Called after each block.

    Returns:
        The sums.

    Raises:
        ModelError: A file cannot be read.
        KeyboardInterrupt: The pass was interrupted; what was done has been kept.
    """
    work = _Pass(sources, settings, torch.device(device), n_jobs or cores())
    return work.run(keeper, on_progress)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def match_sides(
    pairs: Sequence[tuple[int, int]], layers: Sequence[int], *, against: bool
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Layers that take part in matches, each once.

    Args:
        pairs: True indices of the layers to be matched.
        layers: True model indices.
        against: The second of a pair is a layer of the second checkpoint.

    Returns:
        Checkpoint and position of each layer that takes part; and, for each pair, where its two stand in that list.
    """
    ends = [((0, layers.index(first)), (int(against), layers.index(second))) for first, second in pairs]
    sides = sorted({side for pair in ends for side in pair})
    return sides, [(sides.index(first), sides.index(second)) for first, second in ends]


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Products in full float32, though the caller may have allowed TF32 or bfloat16 inside them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Pass:
    """A pass and its state; used once."""

    def __init__(
        self, sources: Sequence[WeightSource], settings: PassSettings, device: torch.device, n_jobs: int
    ) -> None:
        self._sources, self._settings, self._device = sources, settings, device
        self._n_jobs = n_jobs
        self._forms = [[form.to(device) for form in forms] for forms in part_forms(sources)]
        first = sources[0]
        depth, experts = len(first.layers), first.experts
        room = settings.memory * 2 // 5
        self._blocks = plan(self._forms, depth * experts, room, sketch=settings.sketch)
        sketched = self._coordinates() < sum(form.rows * form.columns for form in self._forms[0])
        if settings.sketch and not sketched:  # so small that a sample is all of it
            self._blocks = plan(self._forms, depth * experts, room)
        self._faults = Faults(len(sources), depth, experts, device)
        lanes, self._readers = (1, min(n_jobs, READERS)) if device.type == "cuda" else (n_jobs, 1)
        self._features: FeatureSums | None = None
        self._sums: list[Sums] = (
            [SameIndexSums(first.layers, experts, settings.deltas, settings.all_pairs, self._faults, lanes)]
            if len(sources) == 1
            else [ChangeSums(depth, experts, self._faults)]
        )
        if settings.pairs:
            sides, pairs = match_sides(settings.pairs, first.layers, against=len(sources) > 1)
            self._sums.append(MatchSums(sides, pairs, experts, device))
            if not sketched:  # rows that are sampled are of different neurons where neurons were permuted
                self._features = FeatureSums(sides, experts, first.width, draw_probes(first.hidden), device)
                self._sums.append(self._features)

    def run(self, keeper: Keeper | None, on_progress: Callable[[PassProgress], None] | None) -> PassResult:
        started = kept = time.monotonic()
        keeping = 0.0
        fingerprint = self._fingerprint()
        done = self._restore(keeper, fingerprint) if keeper is not None else 0
        sizes = [self._bytes(block) for block in self._blocks]
        before = read = sum(sizes[:done])
        with ExitStack() as stack:
            stack.enter_context(_whole_float32())
            interrupts = stack.enter_context(interruptible())
            pool = stack.enter_context(ThreadPoolExecutor(self._n_jobs, "pass", torch.set_num_threads, (1,)))
            try:
                for block, slabs in stack.enter_context(
                    ReadAhead(self._sources, self._forms, self._blocks[done:], self._device, self._readers)
                ):
                    with interrupts.held():
                        self._work(pool, block, slabs)
                        read += sizes[done]
                        done += 1
                    now = time.monotonic()
                    if on_progress is not None:
                        speed = (read - before) / max(now - started, 1e-9)
                        on_progress(PassProgress(read, sum(sizes), speed, (sum(sizes) - read) / speed))
                    if keeper is not None and now - kept > max(KEEP_SECONDS, KEEP_RATIO * keeping):
                        with interrupts.held():
                            keeper.keep(fingerprint, done, self._state())
                        kept = time.monotonic()
                        keeping = kept - now
            except KeyboardInterrupt:
                interrupts.hold()
                if keeper is not None and done:
                    keeper.keep(fingerprint, done, self._state())
                raise
        threads = "1 thread" if self._n_jobs == 1 else f"{self._n_jobs} threads"
        return PassResult(
            state={name: tensor.cpu() for name, tensor in self._state().items()},
            coordinates=self._coordinates(),
            bytes_read=sum(sizes),
            engine=f"cpu, {threads}" if self._device.type == "cpu" else str(self._device),
            seconds=time.monotonic() - started,
        )

    def _fingerprint(self) -> str:
        """What has to be the same for a pass to be continued."""
        files = [f"{source.model}\n{source.layers}\n{source.fingerprint()}" for source in self._sources]
        return "\n".join([str(self._settings), *files])

    def _coordinates(self) -> int:
        """Weights read of each expert."""
        return sum(weights_of(block, self._forms[0]) for block in self._blocks)

    def _bytes(self, block: Block) -> int:
        """Bytes of a block on disk, all checkpoints together."""
        share = weights_of(block, self._forms[0]) / sum(form.rows * form.columns for form in self._forms[0])
        return round(share * sum(source.bytes_total for source in self._sources))

    def _state(self) -> dict[str, Tensor]:
        state = self._faults.state()
        for sums in self._sums:
            state |= sums.state()
        return state

    def _restore(self, keeper: Keeper, fingerprint: str) -> int:
        """Take up what an interrupted pass had summed; blocks that are done."""
        found = keeper.load(fingerprint)
        if found is None:
            return 0
        done, state = found
        self._open(self._blocks[done - 1])
        for name, tensor in self._state().items():
            tensor.copy_(state[name])
        return done

    def _open(self, block: Block) -> None:
        if self._features is not None:
            self._features.open([form for form in self._forms[0] if form.part in block.parts])

    def _work(self, pool: ThreadPoolExecutor, block: Block, slabs: list[dict[Part, Slab]]) -> None:
        """Everything that is summed over a block."""
        self._open(block)
        if block.first:
            self._find_zero_experts(slabs)
        self._do(pool, (task for sums in self._sums for task in sums.tasks(slabs)))
        if self._device.type == "cuda":  # the reader may overwrite the slabs from here on
            torch.cuda.synchronize(self._device)

    def _do(self, pool: ThreadPoolExecutor, tasks: Iterable[Task]) -> None:
        if self._device.type == "cuda":
            for task in tasks:
                task()
            return
        for future in [pool.submit(task) for task in tasks]:
            future.result()

    def _find_zero_experts(self, slabs: list[dict[Part, Slab]]) -> None:
        """Experts that are zero in the whole of a part; those that begin with zeros are looked through to the end."""
        for row, (source, parts) in enumerate(zip(self._sources, slabs, strict=True)):
            for part, slab in parts.items():
                for layer, expert in slab.zeros():
                    rows = source.hidden if part == "down" else source.width
                    whole = source.rows(source.layers[layer], expert, part, 0, rows)
                    self._faults.zero[row, PARTS.index(part), layer, expert] = not whole.any()
