"""What a save costs the steps of a server: how long steps take near one, against the same steps without.

    python -m benchmarks.saves --seconds 120 --every 5       # one GPU that holds Qwen3-30B-A3B in bf16

The engine records as a server does (MOESCOPE_RECORD), in this process, so that each of its steps can be timed. Windows
with saves and windows without alternate. Of each window of half a second the longest step and the median are taken;
a row compares windows that a save fell into with those of the same batch in which none was made.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_WINDOW = 0.5


def _decode(llm: Any, batch: int, vocabulary: int, seconds: float, seed: int) -> list[tuple[float, float]]:
    """Steps of a batch that decodes: when each began, and how long it took."""
    from vllm import SamplingParams

    rng = np.random.default_rng(seed)
    params = SamplingParams(temperature=0.0, max_tokens=30_000, ignore_eos=True, detokenize=False)
    names = [f"{seed}-{i}" for i in range(batch)]
    for i, name in enumerate(names):
        prompt = {"prompt_token_ids": rng.integers(32, vocabulary, 32).tolist()}
        tagged = params.clone()
        tagged.extra_args = {"moescope_domain": f"d{i % 12}"}
        llm.llm_engine.add_request(name, prompt, tagged)
    steps = []
    begin = time.perf_counter()
    while time.perf_counter() < begin + seconds:
        started = time.perf_counter()
        llm.llm_engine.step()
        steps.append((started, time.perf_counter() - started))
    llm.llm_engine.abort_request(names)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return steps[20:]


def _windows(
    steps: Sequence[tuple[float, float]], saves: Sequence[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """Longest step above the median, ms, of each window with and of each without a save."""
    starts, took = np.array(steps).T
    typical = float(np.median(took))
    with_save, without = [], []
    for begin in np.arange(starts[0], starts[-1] - _WINDOW, _WINDOW):
        inside = (starts + took >= begin) & (starts < begin + _WINDOW)
        if inside.any():
            longest = (float(took[inside].max()) - typical) * 1e3
            saved = any(first < begin + _WINDOW and last >= begin for first, last in saves)
            (with_save if saved else without).append(longest)
    return with_save, without


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows, one a batch size."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    folder = Path(tempfile.mkdtemp(prefix="saves-"))
    os.environ["MOESCOPE_RECORD"] = str(folder / "recorded")
    import torch
    import vllm
    from vllm import LLM

    from moescope.adapters import vllm_ledger, vllm_worker
    from tests.gpu.shapes import REAL, SMALL, write_config

    saves: list[tuple[float, float]] = []
    clocks: list[Any] = []
    write, clock = vllm_worker.WorkerRecorder._write, vllm_ledger.SaveClock.__init__
    take = vllm_worker.WorkerRecorder._take
    taken = [0.0]

    def timed_take(self: Any) -> None:
        taken[0] = time.perf_counter()
        take(self)

    def timed_write(self: Any) -> int:
        result = write(self)
        saves.append((taken[0], time.perf_counter()))
        return result

    def kept(self: Any, *arguments: Any, **more: Any) -> None:
        clock(self, *arguments, **more)
        clocks.append(self)

    vllm_worker.WorkerRecorder._take = timed_take  # type: ignore[method-assign]
    vllm_worker.WorkerRecorder._write = timed_write  # type: ignore[method-assign]
    vllm_ledger.SaveClock.__init__ = kept  # type: ignore[method-assign]
    shape = (SMALL | REAL)[options.shape]
    llm = LLM(
        model=write_config(folder / "model", shape),
        load_format="dummy",
        trust_remote_code=False,
        skip_tokenizer_init=True,
        max_model_len=min(32768, shape.get("max_position_embeddings", 4096)),
        max_num_seqs=64,
        compilation_config={"cudagraph_capture_sizes": [1, 64]},
        **({"gpu_memory_utilization": options.memory} if options.memory else {}),
    )
    rows = []
    try:
        for batch in options.batches:
            _decode(llm, batch, shape.get("vocab_size", 256), 3.0, 0)
            steps, without = [], []
            saves.clear()
            for block in range(options.blocks):
                clocks[-1]._every = options.every if block % 2 else float("inf")
                steps += _decode(llm, batch, shape.get("vocab_size", 256), options.seconds / options.blocks, block)
                time.sleep(1.5)  # the idle engine saves, outside of what is timed
            with_save, without = _windows(steps, saves)
            rows.append(
                {
                    "batch": batch,
                    "median step ms": round(float(np.median([took for _, took in steps])) * 1e3, 3),
                    "saves": len(saves),
                    "save ms": round(float(np.median([last - first for first, last in saves])) * 1e3, 1),
                    "bytes": sum(path.stat().st_size for path in (folder / "recorded").glob("part-*")),
                    **{
                        f"{name} {what}": round(float(np.quantile(values, q)), 3)
                        for name, values in (("with", with_save), ("without", without))
                        for what, q in (("p50", 0.5), ("p90", 0.9), ("max", 1.0))
                    },
                    "windows": [len(with_save), len(without)],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__, "shape": options.shape}))
    finally:
        llm.llm_engine.engine_core.shutdown()
    return rows


def main() -> None:
    """Measure and print rows; each is the longest step above the median, in ms, over windows of half a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two saves")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--memory", type=float, help="gpu_memory_utilization")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
