"""What analysing a trace costs: tokens a second and memory, beside counting the same trace to a profile and reading it.

The trace has the shape of Qwen3-30B-A3B's (48 layers, 128 experts, top-8): batches of 256 requests, whose prompts lie
request by request and whose generated tokens alternate, with token ids as frequent as words are, and experts that
depend on the id. CPU time, since other processes take wall time; one thread.

    python -m benchmarks.trace_analysis [--quick] [--json FILE] [--repetitions N] [--tokens T]
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from moescope.benchmarks.memory import Sampler, anonymous_memory
from moescope.benchmarks.rows import OtherLoad, add_options, make_row, report, this_host
from moescope.benchmarks.traces import LAYERS, about, cpu_seconds, read
from moescope.profiler.tokens import SPLITS
from moescope.profiler.trace import Trace, TraceRows
from moescope.profiler.trace_sums import sum_trace
from moescope.profiler.trace_writer import TraceOptions, TraceWriter
from moescope.viz.trace_analysis import analyze_trace

TOKENS: Final = 1_000_000
QUICK_TOKENS: Final = 200_000
REQUESTS: Final = 256
LENGTH: Final = 640
VOCABULARY: Final = 50_000
SETS: Final = 4096
STEP: Final = 16_384


def write(folder: Path, tokens: int) -> None:
    """Write a trace of at least `tokens` tokens, in whole batches."""
    rng = np.random.default_rng(0)
    sets = np.argsort(rng.random((SETS, len(LAYERS), 128), np.float32), axis=2)[:, :, :8].astype(np.uint8)
    frequency = np.arange(1, VOCABULARY + 1) ** -1.05
    frequency /= frequency.sum()
    half = LENGTH // 2
    positions = np.concatenate([np.tile(np.arange(half), REQUESTS), np.repeat(np.arange(half, LENGTH), REQUESTS)])
    with TraceWriter(about(weights=False), TraceOptions(folder)) as writer:
        for batch in range(-(-tokens // len(positions))):
            numbers = np.arange(REQUESTS) + batch * REQUESTS
            owners = np.concatenate([np.repeat(numbers, half), np.tile(numbers, LENGTH - half)])
            writer.admit(numbers.tolist(), [LENGTH] * REQUESTS)
            for start in range(0, len(owners), STEP):
                own = owners[start : start + STEP]
                place = positions[start : start + STEP]
                ids = rng.choice(VOCABULARY, len(own), p=frequency)
                none = np.zeros(len(own), np.uint8)
                split = (own % SPLITS).astype(np.uint8)
                writer.append(
                    TraceRows(
                        request=own.astype(np.uint32),
                        position=place.astype(np.uint32),
                        token=ids.astype(np.int32),
                        domain=none,
                        phase=(place >= half).astype(np.uint8),
                        split=split,
                        experts=sets[(7 * ids + 512 * rng.integers(0, 8, len(own))) % SETS],
                    )
                )
            writer.commit(batch)
        writer.finish()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, repetitions=3)
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="T", help="tokens of the trace; %(default)s")
    options = parser.parse_args(arguments)
    repetitions, tokens = (1, QUICK_TOKENS) if options.quick else (options.repetitions, options.tokens)
    host = this_host()
    speeds: dict[str, list[float]] = {}
    comparing: list[float] = []
    peaks: list[float] = []
    with tempfile.TemporaryDirectory() as name, OtherLoad() as load:
        write(Path(name) / "t", tokens)
        trace = Trace(Path(name) / "t")
        works: dict[str, Callable[[], object]] = {
            "read, checksums on": lambda: read(trace),
            "counted to a profile": trace.profile,
            "summed for the analyses": lambda: sum_trace(trace),
        }
        for _ in range(repetitions):
            for provider, work in works.items():
                before = anonymous_memory()
                with Sampler() as sampler:
                    speeds.setdefault(provider, []).append(trace.tokens / cpu_seconds(work))
            peaks.append(sampler.peak - before)
            sums = sum_trace(trace)
            comparing.append(cpu_seconds(lambda: analyze_trace(sums)))  # noqa: B023
    case = f"{trace.tokens:,} tokens, 48 layers × 128 experts, top-8"
    rows = [
        make_row(case, provider, "speed, CPU time", "tokens/s", found, load.cores, host)
        for provider, found in speeds.items()
    ]
    rows.append(make_row(case, "summed for the analyses", "memory above that before", "MB", peaks, load.cores, host))
    rows.append(make_row(case, "statistics from the sums", "CPU time", "s", comparing, load.cores, host))
    report(rows, options.json)


if __name__ == "__main__":
    main()
