"""What traces cost: bytes a token, writing and reading speed, and what tracing adds to a run through transformers.

Writing is held against plain sequential writing of as many bytes to the same disk, both synchronised. Reading is
materialised, checksums on, from files that the system holds in memory, on one core, beside the ceiling: reading the
same bytes into the same memory and the same checksum, without a trace. Speeds are of CPU time where they say so, since
other processes take wall time. Tracing is compared with the same run without it, in turns.

    python -m benchmarks.traces [--quick] [--json FILE] [--repetitions N]
"""

import argparse
import contextlib
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from moescope.adapters.transformers_hooks import overridden
from moescope.adapters.transformers_trace import BatchTrace
from moescope.benchmarks.memory import Sampler, anonymous_memory, prompts, save_model
from moescope.benchmarks.rows import OtherLoad, Row, add_options, make_row, report, this_host
from moescope.profiler.profile import EngineInfo, LayerInfo, ModelInfo, RunInfo
from moescope.profiler.trace import Trace, TraceAbout, TraceRows
from moescope.profiler.trace_writer import SHARD_BYTES, TraceOptions, TraceWriter

#: Qwen3-30B-A3B's layers.
LAYERS: Final = tuple(LayerInfo(i, 128, 8) for i in range(48))
TOKENS: Final = 1_000_000
QUICK_TOKENS: Final = 250_000
STEP: Final = 16_384
#: Prompt tokens and tokens to generate of the runs through transformers.
RUNS: Final = ((20_000, 0), (2_000, 16))
QUICK_RUNS: Final = ((10_000, 0), (1_000, 16))
#: Least reading speed, GB/s, or half the ceiling; most bytes of a token beside its ids.
GOAL_SPEED: Final = 1.0
GOAL_BYTES: Final = 16


def about(weights: bool) -> TraceAbout:
    """A trace of a model as large as Qwen3-30B-A3B."""
    engine = EngineInfo("transformers", "0", "cpu", "bfloat16")
    run = RunInfo("benchmark", "2026-01-01T00:00:00", engine, 0, 1, "00", {"seed": 0})
    return TraceAbout(ModelInfo("random", "Random", "softmax", LAYERS), ("all",), run, "0", weights)


def step(of: TraceAbout) -> TraceRows:
    """Rows of one step, routed at random."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 128, (STEP, len(LAYERS), 1))
    experts = ((first + 16 * np.arange(8)) % 128).astype(np.uint8)
    byte = np.zeros(STEP, np.uint8)
    return TraceRows(
        request=np.repeat(np.arange(STEP // 64, dtype=np.uint32), 64),
        position=np.tile(np.arange(64, dtype=np.uint32), STEP // 64),
        token=rng.integers(0, 150_000, STEP).astype(np.int32),
        domain=byte,
        phase=byte,
        split=byte,
        experts=experts,
        weights=rng.random(experts.shape).astype(np.float16) if of.weights else None,
    )


def write(folder: Path, of: TraceAbout, rows: TraceRows, tokens: int) -> tuple[float, float]:
    """Write a trace of `tokens` tokens; wall and CPU seconds until all of it is on disk."""
    wall, cpu = time.monotonic(), time.process_time()
    with TraceWriter(of, TraceOptions(folder, weights=of.weights)) as writer:
        writer.admit([0], [tokens])
        for done in range(0, tokens, STEP):
            writer.append(rows.take(slice(0, min(STEP, tokens - done))))
        writer.commit(0)
        writer.finish()
    return time.monotonic() - wall, time.process_time() - cpu


def write_plainly(file: Path, size: int) -> tuple[float, float]:
    """Write so many bytes to a file, one after the other; wall and CPU seconds until all is on disk."""
    memory = np.random.default_rng(0).integers(0, 128, min(size, SHARD_BYTES), dtype=np.uint8)
    wall, cpu = time.monotonic(), time.process_time()
    with open(file, "wb", buffering=0) as target:
        for done in range(0, size, len(memory)):
            target.write(memory[: size - done].data)
        os.fsync(target.fileno())
    taken = time.monotonic() - wall, time.process_time() - cpu
    file.unlink()
    return taken


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def read(trace: Trace, *, reuse: bool = True) -> None:
    """Read all of a trace, into the same memory or into memory of its own."""
    tokens = sum(len(rows) for rows in trace.rows(reuse=reuse))
    if tokens != trace.tokens:
        raise RuntimeError(f"{tokens} of {trace.tokens} tokens were read")


def read_into(path: Path, memory: NDArray[np.uint8]) -> None:
    """Fill memory from the start of a file."""
    with open(path, "rb", buffering=0) as file:
        done = 0
        while done < len(memory):
            done += file.readinto(memory[done:].data)


def ceiling(trace: Trace) -> None:
    """Read the same files into the same memory and take the same checksum."""
    memory = np.empty(max(shard.bytes for shard in trace.index.shards), np.uint8)
    for shard in trace.index.shards:
        part = memory[: shard.bytes]
        read_into(trace.folder / shard.name, part)
        if zlib.crc32(part.data) != shard.crc32:
            raise RuntimeError(f"{shard.name} is damaged")


def file_rows(tokens: int, repetitions: int) -> tuple[list[Row], list[str]]:
    """Bytes a token, writing and reading; and what of the goals was met."""
    host = this_host()
    rows: list[Row] = []
    goals: list[str] = []
    for weights in (False, True):
        of = about(weights)
        given = step(of)
        case = f"{tokens:,} tokens, 48 layers × 128 experts, top-8, ids{' and weights' * weights}"
        speeds, own, ceilings, peaks, counting = [], [], [], [], []
        written: dict[str, list[tuple[float, float]]] = {"trace": [], "plain sequential file": []}
        with OtherLoad() as load:
            for _ in range(repetitions):
                with tempfile.TemporaryDirectory() as name:
                    for _ in range(2):  # once more than is counted: memory of the system that was never used is slow
                        plain = write_plainly(Path(name) / "plain", tokens * of.row_bytes)
                    written["plain sequential file"].append(plain)
                    before = anonymous_memory()
                    with Sampler() as sampler:
                        written["trace"].append(write(Path(name) / "t", of, given, tokens))
                    trace = Trace(Path(name) / "t")
                    size = sum(shard.bytes for shard in trace.index.shards)
                    peaks.append(sampler.peak - before)
                    read(trace)  # warm
                    for work, found in (
                        (partial(ceiling, trace), ceilings),
                        (partial(read, trace), speeds),
                        (partial(read, trace, reuse=False), own),
                    ):
                        found.append(size / cpu_seconds(work) / 1e9)
                    counting.append(trace.tokens / cpu_seconds(trace.profile))
        each = size / trace.tokens
        values: Sequence[tuple[str, str, list[float]]] = (
            ("bytes a token", "bytes", [each]),
            ("memory above that before", "MB", peaks),
            ("read, materialised, checksums on, CPU time", "GB/s", speeds),
            ("read into new memory, checksums on, CPU time", "GB/s", own),
            ("the same bytes and checksum alone, CPU time", "GB/s", ceilings),
            ("counted to a profile, CPU time", "tokens/s", counting),
        )
        rows += [make_row(case, "trace", metric, unit, data, load.cores, host) for metric, unit, data in values]
        for place, clock in enumerate(("wall time", "CPU time")):
            metric = f"written and synchronised, {clock}"
            taken = {provider: [pair[place] for pair in pairs] for provider, pairs in written.items()}
            for provider, seconds in taken.items():
                speed = [size / 1e9 / each for each in seconds]
                rows.append(make_row(case, provider, metric, "GB/s", speed, load.cores, host))
            ratio = [a / b for a, b in zip(taken["trace"], taken["plain sequential file"], strict=True)]
            rows.append(make_row(case, "trace", metric, "× plain", ratio, load.cores, host))
        median, most = float(np.median(speeds)), float(np.median(ceilings))
        met = median >= GOAL_SPEED or median >= most / 2
        goals.append(
            f"reading{' with weights' * weights}: {median:.2f} GB/s of {most:.2f}: {'met' if met else 'missed'}"
        )
        if not weights:
            beside = each - len(LAYERS) * 8
            goals.append(f"bytes beside the ids: {beside:.2f}: {'met' if beside <= GOAL_BYTES else 'missed'}")
    return rows, goals


class InTracing:
    """CPU seconds that pass inside tracing, in all threads, while a `with` block runs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for owner, name in (
            (BatchTrace, "__init__"),
            (BatchTrace, "select"),
            (BatchTrace, "append"),
            (TraceWriter, "_handle"),  # of the writing thread
        ):
            self._stack.enter_context(overridden(owner, name, self._timed(getattr(owner, name))))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start

        return timed


def run_rows(runs: Sequence[tuple[int, int]], repetitions: int) -> list[Row]:
    """CPU time of runs through transformers with and without a trace, in turns, and the part that tracing takes."""
    import torch

    import moescope

    host = this_host()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        save_model(model)
        torch.set_num_threads(1)  # threads that wait for one another take CPU time of their own
        moescope.profile(model, prompts(1000))  # imports, and memory that later runs find warm
        for tokens, new in runs:
            seconds: dict[str, list[float]] = {"off": [], "trace": [], "trace, weights": []}
            shares: dict[str, list[float]] = {"trace": [], "trace, weights": []}
            with OtherLoad() as load:
                for repetition in range(repetitions):
                    for provider, found in sorted(seconds.items(), reverse=bool(repetition % 2)):
                        folder = Path(name) / f"{provider} {tokens} {repetition}"
                        options = None if provider == "off" else TraceOptions(folder, weights="weights" in provider)
                        work = partial(moescope.profile, model, prompts(tokens), max_tokens=new, trace=options)
                        with InTracing() as inside:
                            found.append(cpu_seconds(work))
                        if options is not None:
                            shares[provider].append(100 * inside.seconds / found[-1])
            case = (
                f"{tokens:,} prompt tokens, {new} generated a prompt at most, 12 layers × 64 experts, top-8, one thread"
            )
            for provider, found in seconds.items():
                rows.append(make_row(case, provider, "run", "CPU s", found, load.cores, host))
            for provider, found in shares.items():
                rows.append(make_row(case, provider, "CPU time inside tracing", "%", found, load.cores, host))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, repetitions=5)
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    repetitions = min(options.repetitions, 2) if options.quick else options.repetitions
    rows, goals = file_rows(QUICK_TOKENS if options.quick else TOKENS, repetitions)
    rows += run_rows(QUICK_RUNS if options.quick else RUNS, repetitions)
    report(rows, options.json)
    print("\n" + "\n".join(goals))


if __name__ == "__main__":
    main()
