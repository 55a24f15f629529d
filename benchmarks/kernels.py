"""What counting takes beside its floor: one pass over the same memory that reads ids and weights and writes the ids.

The commit of a step is measured as the recorder calls it: on a GPU the Triton kernel, and on either device the torch
reference that it is held against. All of them must count what `numpy.bincount` counts before anything is timed. Times
are CPU time of one thread, or the GPU's own time by events; ratios are within a repetition.

    python -m benchmarks.kernels [--device cuda] [--quick] [--json FILE] [--repetitions N]
"""

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from moescope.benchmarks.rows import OtherLoad, Row, add_options, make_row, report, this_host
from moescope.profiler import choices
from moescope.profiler.staged import PHASES, cell_of
from moescope.profiler.tokens import SPLITS

#: Qwen3-30B-A3B's layers, and the domains of a prompt set.
LAYERS: Final = 48
EXPERTS: Final = 128
TOP_K: Final = 8
DOMAINS: Final = 12
#: Rows of a step: a small and a large decode batch, and a step of prompts.
ROWS: Final = {"cpu": (64, 2048), "cuda": (64, 256, 16_384)}
QUICK_ROWS: Final = {"cpu": (64,), "cuda": (64, 16_384)}
FLOOR: Final = "floor"
BARE: Final = "torch.bincount of the ids alone"
#: Cycles that a GPU sleeps, some 0.3 ms, so that what is timed waits on the device rather than for its launch.
_NAP: Final = 500_000


@dataclass(frozen=True, slots=True)
class Step:
    """What a forward staged, and the sums that it is counted into; see `moescope.profiler.choices.add_choices`."""

    ids: Tensor
    fresh: Tensor
    weights: Tensor
    cells: Tensor
    scales: Tensor
    counts: Tensor
    weight_sums: Tensor
    faults: Tensor
    pairs: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that the floor moves: ids and weights read, ids written."""
        return 2 * self.ids.nbytes + self.weights.nbytes

    def restore(self) -> None:
        """Stage the forward again, for counting poisons it."""
        self.ids.copy_(self.fresh)

    def clear(self) -> None:
        """Set all sums to zero."""
        for sums in (self.counts, self.weight_sums, self.faults, self.pairs):
            sums.zero_()


def draw_step(rows: int, device: str) -> Step:
    """A step routed at random: distinct experts, a few of them popular; every row counts, in some domain and split."""
    rng = np.random.default_rng(rows)
    scores = rng.gumbel(size=(LAYERS, rows, EXPERTS)).astype(np.float32) + rng.normal(size=(LAYERS, 1, EXPERTS))
    ids = torch.from_numpy(np.argpartition(-scores, TOP_K, axis=-1)[..., :TOP_K].astype(np.int32)).to(device)
    cells = [cell_of(row % DOMAINS, row % PHASES, row % SPLITS) for row in range(rows)]
    count = DOMAINS * PHASES
    return Step(
        ids=ids,
        fresh=ids.clone(),
        weights=torch.from_numpy(rng.random(ids.shape, dtype=np.float32)).to(device),
        cells=torch.tensor(cells, dtype=torch.int32, device=device),
        scales=torch.ones(LAYERS, device=device),
        counts=torch.zeros(count * SPLITS, LAYERS, EXPERTS, dtype=torch.int64, device=device),
        weight_sums=torch.zeros(count, LAYERS, EXPERTS, dtype=torch.int64, device=device),
        faults=torch.zeros(len(choices.FAULTS), LAYERS, dtype=torch.int64, device=device),
        pairs=torch.zeros(LAYERS, EXPERTS, EXPERTS, dtype=torch.int64, device=device),
    )


def floor(step: Step) -> None:
    """Read ids and weights and write the ids, once."""
    torch.add(step.ids, step.weights.view(torch.int32), out=step.ids)


def bare_count(step: Step) -> None:
    """Count the ids alone, by layer: no cells, no weights, no faults."""
    layers = torch.arange(LAYERS, device=step.ids.device)[:, None, None] * EXPERTS
    torch.bincount((step.ids + layers).view(-1), minlength=LAYERS * EXPERTS)


def by_torch(step: Step, *, pairs: bool) -> None:
    """Commit by the torch reference."""
    if pairs:
        choices.add_pairs(step.ids, step.cells, step.pairs)
    choices.add_choices(step.ids, step.weights, step.cells, step.scales, step.counts, step.weight_sums, step.faults)


def by_triton(step: Step, *, pairs: bool) -> None:
    """Commit by the Triton kernel."""
    from moescope.profiler import kernels

    kernels.add_choices(
        step.ids,
        step.weights,
        step.cells,
        step.scales,
        step.counts,
        step.weight_sums,
        step.faults,
        step.pairs if pairs else None,
    )


def providers(device: str) -> dict[str, Callable[[Step], None]]:
    """What is timed, by name."""
    named: dict[str, Callable[[Step], None]] = {FLOOR: floor, BARE: bare_count}
    if device == "cuda":
        named |= {"Triton": partial(by_triton, pairs=False), "Triton, pairs too": partial(by_triton, pairs=True)}
    return named | {"torch": partial(by_torch, pairs=False), "torch, pairs too": partial(by_torch, pairs=True)}


def check(step: Step, name: str, commit: Callable[[Step], None]) -> None:
    """Assert that a commit counts what `numpy.bincount` counts.

    Raises:
        AssertionError: It does not, or it reports a fault, or leaves something staged.
    """
    step.restore()
    step.clear()
    commit(step)
    chosen = step.fresh.cpu().numpy()
    expected = np.stack([np.bincount(layer.reshape(-1), minlength=EXPERTS) for layer in chosen])
    assert np.array_equal(step.counts.sum(0).cpu().numpy(), expected), f"{name} miscounts"
    assert not step.faults.any(), f"{name} reports faults"
    assert (step.ids == choices.POISON).all(), f"{name} leaves rows staged"
    if "pairs" in name:
        once = np.zeros((LAYERS, len(step.cells), EXPERTS), np.float32)
        np.put_along_axis(once, chosen.astype(np.int64), 1.0, axis=-1)
        assert np.array_equal(step.pairs.cpu().numpy(), once.transpose(0, 2, 1) @ once), f"{name} miscounts pairs"


def seconds_of(commit: Callable[[Step], None], step: Step) -> float:
    """Seconds of one commit: CPU time, or the GPU's own."""
    step.restore()
    if step.ids.device.type == "cpu":
        start = time.process_time_ns()
        commit(step)
        return (time.process_time_ns() - start) / 1e9
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_NAP)
    begin.record()
    commit(step)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(step: Step, timed: Mapping[str, Callable[[Step], None]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each provider, each once in a repetition, in random order."""
    taken: dict[str, list[float]] = {name: [] for name in timed}
    order = random.Random(0)
    for _ in range(repetitions):
        for name in order.sample(list(timed), len(timed)):
            taken[name].append(seconds_of(timed[name], step))
    return taken


def step_rows(rows: int, device: str, repetitions: int) -> list[Row]:
    """Rows of the table for a step of so many rows."""
    step = draw_step(rows, device)
    timed = providers(device)
    for name, commit in timed.items():
        if name not in (FLOOR, BARE):
            check(step, name, commit)
    measure(step, timed, 2)
    with OtherLoad() as load:
        taken = measure(step, timed, repetitions)
    host = this_host(device)
    case = f"commit of {rows:,} rows, {LAYERS} layers × {EXPERTS} experts, top-{TOP_K}, {step.nbytes / 1e6:.2g} MB"
    found: list[Row] = []
    for name, values in taken.items():
        found.append(make_row(case, name, "time", "µs", [1e6 * value for value in values], load.cores, host))
        if name != FLOOR:
            ratios = [value / base for value, base in zip(values, taken[FLOOR], strict=True)]
            found.append(make_row(case, name, "time of floor", "×", ratios, load.cores, host))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, repetitions=20)
    parser.add_argument("--device", default="cpu", choices=tuple(ROWS), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; try --device cpu")
    torch.set_num_threads(1)  # threads that wait for one another take CPU time of their own
    sizes = (QUICK_ROWS if options.quick else ROWS)[options.device]
    repetitions = min(options.repetitions, 3) if options.quick else options.repetitions
    report([row for rows in sizes for row in step_rows(rows, options.device, repetitions)], options.json)


if __name__ == "__main__":
    main()
