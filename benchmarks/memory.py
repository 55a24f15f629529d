"""What a run's length does to its memory: private memory of a short run against that of a long one.

Each run is a process of its own that calls `moescope.profile` on a checkpoint of a small Qwen3-MoE, full distributions
on. Its anonymous memory (RssAnon; mapped files do not count) is sampled every 20 ms; the figure is the peak of the long
run less that of the short one.

    python -m benchmarks.memory [--quick] [--json FILE] [--repetitions N]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from moescope.benchmarks.rows import OtherLoad, Row, add_options, make_row, report, this_host

SHORT: Final = 10_000
LONG: Final = 100_000
QUICK_LONG: Final = 50_000
#: How far the long run's peak may be above the short one's, MB.
GOAL: Final = 50.0
SAMPLE_SECONDS: Final = 0.02

LAYERS: Final = 12
EXPERTS: Final = 64
TOP_K: Final = 8
VOCABULARY: Final = 1024
SHORTEST_PROMPT: Final = 16
LONGEST_PROMPT: Final = 512


@dataclass(frozen=True, slots=True)
class Usage:
    """Anonymous memory of one run, MB, and what it counted.

    Attributes:
        tokens: Tokens that the profile holds.
        loaded: Memory before the run, all modules imported.
        first: Memory after the first batch.
        last: Memory after the last batch.
        after: Memory after the run.
        peak: Most that was sampled.
        samples: Samples taken.
        seconds: Wall time of the run.
    """

    tokens: int
    loaded: float
    first: float
    last: float
    after: float
    peak: float
    samples: int
    seconds: float


def anonymous_memory() -> float:
    """RssAnon of this process, MB (10**6 bytes)."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("this kernel does not tell RssAnon in /proc/self/status")


class Sampler:
    """Samples anonymous memory in a thread of its own while a `with` block runs."""

    def __init__(self) -> None:
        self.peak = 0.0
        self.samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_memory())
            self.samples += 1
            if self._stop.wait(SAMPLE_SECONDS):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def save_model(folder: Path) -> None:
    """Write a checkpoint of a small Qwen3-MoE with random weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def prompts(tokens: int) -> Iterator[Mapping[str, Any]]:
    """Prompts of 16 to 512 random tokens, log-uniform, `tokens` in all; made one at a time, so none is held."""
    rng = np.random.default_rng(0)
    while tokens:
        length = int(np.exp(rng.uniform(np.log(SHORTEST_PROMPT), np.log(LONGEST_PROMPT))))
        length = min(tokens, length)
        ids = rng.integers(3, VOCABULARY, length).tolist()
        yield {"prompt_token_ids": ids, "domain": f"domain {rng.integers(4)}"}
        tokens -= length


def measure_here(model: Path, tokens: int, folder: Path, max_tokens: int) -> Usage:
    """Profile in this process, which should be a fresh one, and watch its memory."""
    import torch  # noqa: F401 - imported now, so that `loaded` holds it
    import transformers  # noqa: F401

    import moescope

    batches: list[float] = []
    loaded = anonymous_memory()
    start = time.monotonic()
    with Sampler() as sampler:
        profile = moescope.profile(
            model,
            prompts(tokens),
            max_tokens=max_tokens,
            probabilities=True,
            output_dir=folder,
            on_progress=lambda progress: batches.append(anonymous_memory()),
        )
    return Usage(
        tokens=int(profile.token_counts.sum()),
        loaded=loaded,
        first=batches[0],
        last=batches[-1],
        after=anonymous_memory(),
        peak=sampler.peak,
        samples=sampler.samples,
        seconds=time.monotonic() - start,
    )


def measure(model: Path, tokens: int, max_tokens: int) -> Usage:
    """Profile in a fresh process and return what its memory did.

    Raises:
        RuntimeError: The process failed, or counted another number of prompt tokens.
    """
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, "--child", str(model), str(tokens), name + "/out"]
        command += ["--max-tokens", str(max_tokens)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"the run of {tokens} tokens failed with exit code {done.returncode}")
    usage = Usage(**json.loads(done.stdout.splitlines()[-1]))
    if usage.tokens < tokens or (not max_tokens and usage.tokens != tokens):
        raise RuntimeError(f"the run of {tokens} tokens counted {usage.tokens}")
    return usage


def usage_rows(short: Sequence[Usage], long: Sequence[Usage], sizes: tuple[int, int], load: float) -> list[Row]:
    """Rows of all repetitions: peaks, the growth from the first to the last batch, and the difference of the peaks."""
    host = this_host()
    rows: list[Row] = []
    for size, runs in zip(sizes, (short, long), strict=True):
        case = f"{size:,} tokens"
        for metric, values in (
            ("imports alone", [run.loaded for run in runs]),
            ("peak", [run.peak for run in runs]),
            ("last batch − first batch", [run.last - run.first for run in runs]),
            ("after the run", [run.after for run in runs]),
        ):
            rows.append(make_row(case, "moescope.profile", metric, "MB", values, load, host))
    differences = [b.peak - a.peak for a, b in zip(short, long, strict=True)]
    rows.append(
        make_row(f"{sizes[1]:,} − {sizes[0]:,} tokens", "moescope.profile", "peak", "MB", differences, load, host)
    )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, repetitions=5)
    parser.add_argument("--long", type=int, metavar="T", help=f"tokens of the long run; {LONG}, quick: {QUICK_LONG}")
    parser.add_argument("--max-tokens", type=int, default=0, metavar="N", help="tokens to generate; %(default)s")
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "TOKENS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        model, tokens, folder = options.child
        print(json.dumps(asdict(measure_here(Path(model), int(tokens), Path(folder), options.max_tokens))))
        return
    repetitions, long_tokens = (1, QUICK_LONG) if options.quick else (options.repetitions, LONG)
    long_tokens = options.long or long_tokens
    short: list[Usage] = []
    long: list[Usage] = []
    with tempfile.TemporaryDirectory() as name, OtherLoad() as load:
        model = Path(name)
        save_model(model)
        for repetition in range(repetitions):
            runs = [(SHORT, short), (long_tokens, long)]
            for tokens, usages in runs if repetition % 2 == 0 else reversed(runs):
                usages.append(measure(model, tokens, options.max_tokens))
                print(f"{tokens:>9,} tokens: {usages[-1]}", file=sys.stderr)
    rows = usage_rows(short, long, (SHORT, long_tokens), load.cores)
    report(rows, options.json)
    worst = rows[-1].high
    print(f"\nGoal: at most {GOAL:.0f} MB more. Most seen: {worst:+.1f} MB: {'met' if worst <= GOAL else 'missed'}")


if __name__ == "__main__":
    main()
