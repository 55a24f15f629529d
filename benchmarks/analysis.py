"""What the statistics and the report take beside reading the profile, for a large model.

A profile of random routing with some popular experts is written and read back, analysed, held against chance and
reported. CPU time of one thread; ratios are to reading the same file in the same repetition, from the system's memory.

    python -m benchmarks.analysis [--shape 48x128] [--quick] [--json FILE] [--repetitions N]
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command line has it: many small products, no threads

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from moescope.benchmarks.rows import OtherLoad, Row, add_options, make_row, report, this_host
from moescope.profiler.profile import EngineInfo, LayerInfo, ModelInfo, RoutingProfile, RunInfo
from moescope.profiler.tokens import SPLITS
from moescope.stats.nulls import PERMUTATIONS, layer_nulls
from moescope.stats.period_finder import find_period
from moescope.viz.analysis import activations, analyze
from moescope.viz.report import write_report

DOMAINS: Final = 12
TOP_K: Final = 8
#: Tokens that are routed in each domain, phase and split, and how often each of them counts.
ROUTED, TIMES = 4, 1000
READING: Final = "reading the profile"


def draw_profile(layers: int, experts: int) -> RoutingProfile:
    """A profile of random routing: experts of unequal popularity, pairs of experts and distributions recorded."""
    rng = np.random.default_rng(0)
    shape = (SPLITS, DOMAINS, 2)
    counts = np.zeros((*shape, layers, experts), np.int64)
    pairs = np.zeros((layers, experts, experts), np.int64)
    tokens = int(np.prod(shape)) * ROUTED
    for layer in range(layers):
        scores = rng.gumbel(size=(tokens, experts)) + rng.normal(0, 0.7, experts)
        once = np.zeros((tokens, experts), np.float32)
        np.put_along_axis(once, np.argpartition(-scores, TOP_K, axis=1)[:, :TOP_K], 1.0, axis=1)
        counts[..., layer, :] = once.reshape(*shape, ROUTED, experts).sum(axis=3)
        pairs[layer] = once.T @ once
    counts *= TIMES
    selections = counts.sum(axis=0)
    token_counts = np.full(shape[1:], SPLITS * ROUTED * TIMES, np.int64)
    run = RunInfo(
        uuid="benchmark",
        created="2026-01-01T00:00:00+00:00",
        engine=EngineInfo("transformers", "0", "cpu", "float32"),
        prompts=1000,
        prompts_total=1000,
        prompts_sha256="00",
        settings={"seed": 0},
    )
    infos = tuple(LayerInfo(index, experts, TOP_K) for index in range(layers))
    return RoutingProfile(
        model=ModelInfo("random", "Random", "softmax", infos),
        domains=tuple(f"domain {i:02}" for i in range(DOMAINS)),
        runs=(run,),
        created=run.created,
        version="0",
        selection_counts=selections,
        weight_sums=selections / TOP_K,
        token_counts=token_counts,
        split_counts=counts.sum(axis=2),
        probability_sums=selections / TOP_K,
        probability_tokens=token_counts,
        coactivation=pairs * TIMES,
    )


def shape_rows(layers: int, experts: int, repetitions: int, permutations: int) -> list[Row]:
    """Rows of the table for a model of so many layers and experts."""
    with tempfile.TemporaryDirectory() as name:
        file, folder = Path(name) / "profile.safetensors", Path(name) / "report"
        draw_profile(layers, experts).save(str(file))
        profile = RoutingProfile.load(str(file))
        data = analyze(profile)
        activation, splits = activations(profile)["frequency"], profile.split_counts.sum(axis=1)
        work: dict[str, Callable[[], object]] = {
            READING: lambda: RoutingProfile.load(str(file)),
            "analyze, without chance": lambda: analyze(profile, permutations=0),
            "analyze, as a report does": lambda: analyze(profile),
            f"layer correlation, {permutations:,} permutations": lambda: layer_nulls(
                activation, splits, permutations=permutations
            ),
            f"period, {permutations:,} simulations": lambda: find_period(activation, splits, permutations),
            "writing the report": lambda: write_report(data, folder),
        }
        write_report(data, folder)  # imports, and files that later ones replace
        taken: dict[str, list[float]] = {name: [] for name in work}
        with OtherLoad() as load:
            for _ in range(repetitions):
                for provider, run in work.items():
                    start = time.process_time()
                    run()
                    taken[provider].append(time.process_time() - start)
        size = file.stat().st_size / 1e6
        written = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    host = this_host()
    case = f"{layers} layers × {experts} experts, {DOMAINS} domains, {size:.0f} MB"
    rows: list[Row] = []
    for provider, values in taken.items():
        rows.append(make_row(case, provider, "CPU time", "s", values, load.cores, host))
    ratios = [a / b for a, b in zip(taken["analyze, without chance"], taken[READING], strict=True)]
    rows.append(make_row(case, "analyze, without chance", "time of reading", "×", ratios, load.cores, host))
    rows.append(make_row(case, "writing the report", "size", "MB", [written], load.cores, host))
    return rows


def shape(text: str) -> tuple[int, int]:
    """Layers and experts of, say, `48x128`."""
    layers, _, experts = text.partition("x")
    return int(layers), int(experts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, repetitions=5)
    parser.add_argument("--shape", type=shape, default=(48, 128), metavar="LxE", help="default: 48x128")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    repetitions, permutations = (1, PERMUTATIONS // 10) if options.quick else (options.repetitions, PERMUTATIONS)
    report(shape_rows(*options.shape, repetitions, permutations), options.json)


if __name__ == "__main__":
    main()
