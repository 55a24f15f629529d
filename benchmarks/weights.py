"""What a pass over weights costs beside merely reading them, and beside the way that loads everything.

A checkpoint of random experts in the shape of Qwen3-30B-A3B is written to a temporary folder; its files are read once
before, so that no case waits for a disk. Every case runs once in each repetition, in random order, and the figures are
ratios within a repetition. Memory is anonymous (RssAnon), of a process of its own.

    python -m benchmarks.weights [--quick] [--json FILE] [--repetitions N] [--folder DIR]
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from moescope.adapters.checkpoints import open_checkpoint
from moescope.adapters.weight_reader import WeightReader
from moescope.benchmarks.memory import Sampler
from moescope.benchmarks.rows import OtherLoad, Row, add_options, make_row, report, this_host
from moescope.profiler.weight_pass import PassResult, PassSettings, run_pass
from moescope.profiler.weight_slabs import PARTS
from moescope.profiler.weight_sums import mirrored

EXPERTS: Final = 8
HIDDEN: Final = 2048
WIDTH: Final = 768
BLOCK: Final = 128
LAYERS: Final = 48
QUICK_LAYERS: Final = 12
DELTA: Final = 6
#: What is shown by itself of a model of this depth, where all pairs are compared.
SHOWN: Final = (1, 12, 24, 36)
#: What each ratio may be at most: seconds of the pass over seconds of what it is held against.
GOALS: Final = {
    "one distance / read and upcast": 2.0,
    "all pairs / read, upcast and GEMM": 1.3,
    "one distance / all experts loaded first": 1 / 5,
    "all pairs, FP8 / read, torch's conversion and GEMM": 1.5,
}
MEMORY_GOAL: Final = 1500.0


def save_checkpoint(folder: Path, layers: int, *, fp8: bool) -> None:
    """Random experts, one shard a layer."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "num_experts": EXPERTS,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": WIDTH,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp."
        tensors = {f"{prefix}gate.weight": torch.randn(EXPERTS, HIDDEN, generator=generator).bfloat16()}
        for expert in range(EXPERTS):
            for part in PARTS:
                shape = (HIDDEN, WIDTH) if part == "down" else (WIDTH, HIDDEN)
                name = f"{prefix}experts.{expert}.{part}_proj.weight"
                drawn = torch.randn(shape, generator=generator)
                tensors[name] = drawn.to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
                if fp8:
                    tensors[f"{name}_scale_inv"] = torch.ones(shape[0] // BLOCK, shape[1] // BLOCK)
        save_file(tensors, folder / f"model-{layer:05}.safetensors")


def read_and_upcast(folder: Path, *, fp8: bool, gemm: bool) -> None:
    """Each expert of all layers, read into memory that is used again, to float32 by torch; then one product (L, L)."""
    size = HIDDEN * WIDTH
    with WeightReader(open_checkpoint(folder)) as source:
        depth = len(source.layers)
        stored = torch.empty(depth, len(PARTS) * size, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
        weights = torch.empty(stored.shape)
        view, bytes_of = stored.view(torch.uint8).numpy().data.cast("B"), size * stored.itemsize
        for expert in range(EXPERTS):
            position = 0
            for layer in source.layers:
                for part in PARTS:
                    rows = HIDDEN if part == "down" else WIDTH
                    source.read_into(layer, expert, part, 0, rows, view[position : position + bytes_of])
                    position += bytes_of
            weights.copy_(stored)
            if fp8:
                _scale(source, expert, weights)
            if gemm:
                torch.mm(weights, weights.T)


def _scale(source: WeightReader, expert: int, weights: Tensor) -> None:
    for row, layer in enumerate(source.layers):
        for piece, part in zip(weights[row].chunk(len(PARTS)), PARTS, strict=True):
            scale = source.scale(layer, expert, part)
            assert scale is not None
            high, wide = scale.values.shape
            piece.view(high, BLOCK, wide, BLOCK).mul_(scale.values[:, None, :, None])


def load_all(folder: Path) -> np.ndarray:
    """All experts as float32 arrays first, then one pair of layers after another: (L - Δ, E) cosines."""
    opened = open_checkpoint(folder)
    layers = [layer.index for layer in opened.layers]
    loaded = {}
    for layer in layers:
        for expert in range(EXPERTS):
            whole = opened.expert(layer, expert).float32()
            loaded[layer, expert] = tuple(part.numpy() for part in (whole.gate, whole.up, whole.down))
    found = []
    for layer in layers[:-DELTA]:
        row = []
        for expert in range(EXPERTS):
            first, second = (
                np.concatenate([part.flatten() for part in loaded[index, expert]]) for index in (layer, layer + DELTA)
            )
            row.append(float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second))))
        found.append(row)
    return np.array(found)


def sums(folder: Path, settings: PassSettings) -> PassResult:
    """The pass that is measured."""
    with WeightReader(open_checkpoint(folder)) as source:
        return run_pass([source], settings)


def one_distance(folder: Path) -> np.ndarray:
    """(L - Δ, E) cosines by the pass."""
    gram = mirrored(sums(folder, PassSettings(deltas=(DELTA,), all_pairs=False)).state["raw"].sum(0)).numpy()
    square = np.einsum("ell->el", gram)
    at = np.arange(gram.shape[1] - DELTA)
    return (gram[:, at, at + DELTA] / np.sqrt(square[:, at] * square[:, at + DELTA])).T


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_memory(folder: Path) -> float:
    """Peak anonymous memory of a pass in a process of its own, MB."""
    command = [sys.executable, "-m", "moescope.benchmarks.weights", "--peak", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(folder: Path, layers: int, repetitions: int) -> list[Row]:
    """All ratios, and memory at two sizes."""
    double, plain, fp8 = folder / "double", folder / "bf16", folder / "fp8"
    save_checkpoint(double, 2 * layers, fp8=False)
    peaks = {2 * layers: peak_memory(double)}
    shutil.rmtree(double)  # it would take the page cache from the others
    save_checkpoint(plain, layers, fp8=False)
    peaks[layers] = peak_memory(plain)
    save_checkpoint(fp8, layers, fp8=True)
    np.testing.assert_allclose(one_distance(plain), load_all(plain), atol=1e-5)
    cases: dict[str, Callable[[], object]] = {
        "read and upcast": lambda: read_and_upcast(plain, fp8=False, gemm=False),
        "read, upcast and GEMM": lambda: read_and_upcast(plain, fp8=False, gemm=True),
        "all experts loaded first": lambda: load_all(plain),
        "read, torch's conversion and GEMM": lambda: read_and_upcast(fp8, fp8=True, gemm=True),
        "one distance": lambda: sums(plain, PassSettings(deltas=(DELTA,), all_pairs=False)),
        "all pairs": lambda: sums(plain, PassSettings(deltas=SHOWN)),
        "all pairs, FP8": lambda: sums(fp8, PassSettings(deltas=SHOWN)),
    }
    for run in cases.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in cases}
    order = random.Random(0)
    with OtherLoad() as load:
        for _ in range(repetitions):
            for name in order.sample(list(cases), len(cases)):
                taken[name].append(seconds(cases[name]))
    host = this_host()
    rows = [make_row(f"{layers} layers", name, "time", "s", found, load.cores, host) for name, found in taken.items()]
    for ratio in GOALS:
        name, _, base = ratio.partition(" / ")
        found = [a / b for a, b in zip(taken[name], taken[base], strict=True)]
        rows.append(make_row(f"{layers} layers", ratio, "ratio", "×", found, load.cores, host))
    for depth, peak in sorted(peaks.items()):
        rows.append(make_row(f"{depth} layers", "all pairs and matches", "peak memory", "MB", [peak], load.cores, host))
    return rows


def judge(rows: Sequence[Row]) -> int:
    """Print which goals were missed; 1 if any was."""
    missed = [row for row in rows if row.provider in GOALS and row.p50 > GOALS[row.provider]]
    missed += [row for row in rows if row.metric == "peak memory" and row.p50 > MEMORY_GOAL]
    for row in missed:
        goal = GOALS.get(row.provider, MEMORY_GOAL)
        print(f"MISSED: {row.case}, {row.provider}: {row.p50:.3g} {row.unit}, goal at most {goal:.3g}")
    return int(bool(missed))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, repetitions=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written, for a while")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        with Sampler() as sampler:
            sums(options.peak, PassSettings(deltas=SHOWN, pairs=((0, 1),)))
        print(sampler.peak)
        return 0
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        layers, repetitions = (QUICK_LAYERS, 2) if options.quick else (LAYERS, options.repetitions)
        rows = measure(Path(folder), layers, repetitions)
    report(rows, options.json)
    return judge(rows)


if __name__ == "__main__":
    raise SystemExit(main())
