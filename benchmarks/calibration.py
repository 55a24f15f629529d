"""Do the statistics keep what they promise? False alarms over kinds of nothing, and power over planted periods.

python -m benchmarks.calibration nothing --seed 1 --layers 48 --experts 64    # about 6 minutes
python -m benchmarks.calibration power --seed 1                               # about 6 minutes
python -m benchmarks.calibration speed
"""

import os

# Small products: more threads wait for each other longer than they compute.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kstest

from moescope.stats.activation import Activation, selection_frequency
from moescope.stats.correlation import layer_correlation
from moescope.stats.nulls import layer_nulls
from moescope.stats.period_finder import find_period
from moescope.stats.periodicity import MODERATE, STRONG, periodic_patterns
from moescope.stats.reliability import layer_reliability

Array = NDArray[np.float64]
SPREAD = 0.5
"""Standard deviation of the logarithm of an expert's popularity."""

SELECTIONS = 200
"""Selections an expert has on average."""

SPLITS = 16


def smooth(rng: np.random.Generator, layers: int, experts: int, decay: float) -> Array:
    """Popularity (L, E) of which the correlation between layers is decay^Δ."""
    drawn = rng.normal(size=(layers, experts))
    for layer in range(1, layers):
        drawn[layer] = decay * drawn[layer - 1] + np.sqrt(1 - decay**2) * drawn[layer]
    return drawn


def blocks(rng: np.random.Generator, layers: int, experts: int, size: int, within: float, between: float) -> Array:
    """Popularity in blocks of layers: correlation `within` a block, times between^n for blocks n apart."""
    base = smooth(rng, -(-layers // size), experts, between)[np.arange(layers) // size]
    return np.sqrt(within) * base + np.sqrt(1 - within) * rng.normal(size=(layers, experts))


def drift(rng: np.random.Generator, layers: int, experts: int) -> Array:
    """Popularity that moves in a straight line from that of the first layer to that of the last."""
    depth = np.linspace(0, 1, layers)[:, None]
    first, last = rng.normal(size=(2, 1, experts))
    return (1 - depth) * first + depth * last + 0.5 * rng.normal(size=(layers, experts))


def turning(rng: np.random.Generator, layers: int, experts: int) -> Array:
    """Popularity that turns from one to another in the middle of the depth, with little noise of a layer's own."""
    turned = 1 / (1 + np.exp(-12 * (np.linspace(0, 1, layers)[:, None] - 0.5)))
    first, last = rng.normal(size=(2, 1, experts))
    return (1 - turned) * first + turned * last + 0.2 * rng.normal(size=(layers, experts))


def deepening(rng: np.random.Generator, layers: int, experts: int) -> Array:
    """One popularity for all layers, the stronger the deeper they lie."""
    return np.linspace(0, 1, layers)[:, None] * rng.normal(size=experts) + 0.5 * rng.normal(size=(layers, experts))


def periodic(rng: np.random.Generator, layers: int, experts: int, period: int, share: float) -> Array:
    """Popularity of which layers at a multiple of the period correlate with `share`, others not at all."""
    base = rng.normal(size=(period, experts))[np.arange(layers) % period]
    return np.sqrt(share) * base + np.sqrt(1 - share) * rng.normal(size=(layers, experts))


def drawn_run(popularity: Array, rng: np.random.Generator, selections: float = SELECTIONS) -> NDArray[np.int64]:
    """Selections (16, L, E) of a run: popularity is the logarithm of a share, `selections` the mean of an expert."""
    weights = np.exp(popularity)
    size = max(1, round(selections * popularity.shape[1] / SPLITS))
    return rng.multinomial(size, weights / weights.sum(axis=1, keepdims=True), size=(SPLITS, len(popularity)))


def _plain(make: Callable[..., Array], scale: float = SPREAD, selections: float = SELECTIONS) -> Callable[..., Array]:
    """A kind that is drawn from a popularity alone."""

    def kind(rng: np.random.Generator, layers: int, experts: int) -> NDArray[np.int64]:
        return drawn_run(scale * make(rng, layers, experts), rng, selections)

    return kind


def _independent(rng: np.random.Generator, layers: int, experts: int) -> Array:
    return rng.normal(size=(layers, experts))


def _dead_layer(rng: np.random.Generator, layers: int, experts: int) -> NDArray[np.int64]:
    run = drawn_run(SPREAD * rng.normal(size=(layers, experts)), rng)
    run[:, rng.integers(layers)] = 0
    return run


UNALIGNED: dict[str, Callable[[np.random.Generator, int, int], NDArray[np.int64]]] = {
    "independent": _plain(_independent),
    "skewed popularity": _plain(_independent, scale=2),
    "few tokens": _plain(_independent, selections=0.5),
    "a dead layer": _dead_layer,
}
"""Kinds of nothing without any alignment between layers."""

NOTHING = UNALIGNED | {
    "decay 0.5^Δ": _plain(partial(smooth, decay=0.5)),
    "decay 0.9^Δ": _plain(partial(smooth, decay=0.9)),
    "decay 0.97^Δ": _plain(partial(smooth, decay=0.97)),
    "blocks of 8, decaying": _plain(partial(blocks, size=8, within=0.8, between=0.5)),
    "blocks of 6, unlike": _plain(partial(blocks, size=6, within=0.9, between=0.0)),
    "drift with depth": _plain(drift),
    "stronger with depth": _plain(deepening),
    "blocks of 12, near copies": _plain(partial(blocks, size=12, within=0.98, between=0.0)),
    "a turn in the middle": _plain(turning),
}
"""Kinds of nothing without a period."""


def activation_of(run: NDArray[np.int64]) -> Activation:
    """The selection frequency of a run."""
    counts = run.sum(axis=0)
    layers, experts = counts.shape
    return selection_frequency(counts, (1,) * layers, int(counts.sum(axis=1).max()), (experts,) * layers, range(layers))


@dataclass(frozen=True, slots=True)
class Looks:
    """p-values of many runs of one kind of nothing.

    Attributes:
        kind: of `NOTHING`.
        test: what was looked for.
        p: p-value of each run.
        found: share of the runs in which a period was reported: both nulls rejected; None for other tests.
    """

    kind: str
    test: str
    p: list[float]
    found: float | None


def alarm(kind: str, layers: int, experts: int, simulations: int, seed: int, number: int) -> tuple[float, ...]:
    """Of one run: p of a period, whether one is reported; of unaligned layers p of the largest Δ and of Δ = 1."""
    rng = np.random.default_rng([seed, list(NOTHING).index(kind), number])
    activation = activation_of(NOTHING[kind](rng, layers, experts))
    finding = find_period(activation, simulations=simulations, seed=number)
    period = (finding.p, float(finding.period is not None))
    if kind not in UNALIGNED:
        return (*period, float("nan"), float("nan"))
    null = layer_nulls(activation, permutations=simulations, seed=number).free
    return (*period, null.p_largest, float(null.p[0]))


def holm(p: Iterable[float]) -> list[float]:
    """p-values corrected for their number (S. Holm, Scand. J. Stat. 6, 1979)."""
    values = np.array(list(p))
    order = np.argsort(values)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values)))), 1)
    return corrected.tolist()


def alarms(
    layers: int,
    experts: int,
    profiles: int,
    simulations: int,
    seed: int,
    processes: int,
    kinds: Iterable[str] = tuple(NOTHING),
) -> Iterator[Looks]:
    """Every test on many runs of every kind that it should stay silent on."""
    with ProcessPoolExecutor(processes) as pool:
        for kind in kinds:
            one = partial(alarm, kind, layers, experts, simulations, seed)
            period, found, largest, first = np.array(list(pool.map(one, range(profiles), chunksize=10))).T.tolist()
            yield Looks(kind, "a period", period, sum(found) / profiles)
            if kind in UNALIGNED:
                yield Looks(kind, "the largest Δ", largest, None)
                yield Looks(kind, "Δ = 1", first, None)


def nothing(options: argparse.Namespace) -> None:
    """Share of false alarms, and how uniform p-values are, over all kinds of nothing."""
    kinds = options.kinds.split("; ") if options.kinds else NOTHING
    size = (options.layers, options.experts, options.profiles, options.simulations)
    rows = list(alarms(*size, options.seed, options.processes, kinds))
    uniform = holm(kstest(row.p, "uniform").pvalue for row in rows)
    print(f"{options.profiles} runs a kind, {options.layers} layers, {options.experts} experts, seed {options.seed}\n")
    print("| kind | test | p ≤ 0.05 | p ≤ 0.01 | reported | mean p | uniform, corrected |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row, corrected in zip(rows, uniform, strict=True):
        five, one = (np.mean(np.array(row.p) <= level) for level in (0.05, 0.01))
        found = "" if row.found is None else f"{row.found:.1%}"
        print(
            f"| {row.kind} | {row.test} | {five:.1%} | {one:.1%} | {found} | {np.mean(row.p):.2f} | {corrected:.3f} |"
        )


def search(
    layers: int, experts: int, period: int, share: float, selections: float, simulations: int, seed: int, number: int
) -> tuple[float, float, float, float, float]:
    """One planted run: found, found right, called strong at the period, mean r at 12, called moderate at 12."""
    rng = np.random.default_rng([seed, layers, experts, period, round(1000 * share), round(selections), number])
    popularity = SPREAD * periodic(rng, layers, experts, period, share)
    activation = activation_of(drawn_run(popularity, rng, selections))
    found = find_period(activation, simulations=simulations, seed=number)
    own, twelve = periodic_patterns(layer_correlation(activation), (period, 12, 1)).patterns[:2]
    twelve = own if period == 12 else twelve
    return (
        found.period is not None,
        found.period == period,
        own.mean > STRONG,
        twelve.mean,
        twelve.mean > MODERATE,
    )


def power(options: argparse.Namespace) -> None:
    """How often a planted period is found, beside what fixed rules would have said."""
    print(f"{options.profiles} runs a row, seed {options.seed}; share of runs\n")
    print(
        "| layers | experts | period | true r | selections an expert | found | right | "
        "mean r > 0.7 at the period | mean r at Δ = 12 | > 0.4 at Δ = 12 |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    cases = product(((24, 4), (24, 12), (48, 5), (62, 8), (94, 12)), (16, 128, 256), (0.1, 0.3, 0.6), (5, 200))
    with ProcessPoolExecutor(options.processes) as pool:
        for (layers, period), experts, share, selections in cases:
            one = partial(search, layers, experts, period, share, selections, options.simulations, options.seed)
            mean = np.array(list(pool.map(one, range(options.profiles), chunksize=5)), dtype=float).mean(axis=0)
            print(
                f"| {layers} | {experts} | {period} | {share} | {selections} | {mean[0]:.0%} | {mean[1]:.0%} | "
                f"{mean[2]:.0%} | {mean[3]:+.2f} | {mean[4]:.0%} |",
                flush=True,
            )


def speed(options: argparse.Namespace) -> None:
    """Seconds that the statistics of the largest models take, and how long the processor worked on them."""
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| layers × experts | part | seconds | CPU seconds |\n|---|---|---:|---:|")
    for layers, experts in ((94, 128), (62, 256)):
        rng = np.random.default_rng(options.seed)
        run = drawn_run(SPREAD * rng.normal(size=(layers, experts)), rng)
        activation = activation_of(run)
        parts: dict[str, Callable[[], object]] = {
            "layer correlation, 10,000 permutations, with groups": partial(layer_nulls, activation, run, 8),
            "the same without permutations": partial(layer_nulls, activation, run, 8, 1),
            "period, 2,000 simulations of each null": partial(find_period, activation, run),
            "period, 10,000 simulations of each null": partial(find_period, activation, run, 10_000),
            "the same without simulations": partial(find_period, activation, run, 1),
            "reliability": partial(layer_reliability, run, (experts,) * layers, range(layers), activation.tokens),
        }
        for name, part in parts.items():
            start, worked = time.perf_counter(), time.process_time()
            part()
            took, worked = time.perf_counter() - start, time.process_time() - worked
            print(f"| {layers} × {experts} | {name} | {took:.2f} | {worked:.2f} |", flush=True)
    print(f"\nmost memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def main() -> None:
    """Measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("nothing", "power", "speed"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--kinds", help=f"some kinds of nothing, with '; ' between them: {'; '.join(NOTHING)}")
    parser.add_argument("--profiles", type=int, help="runs of a kind or row: 500 of nothing, 40 of a period")
    parser.add_argument("--simulations", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.profiles is None:
        options.profiles = 40 if options.what == "power" else 500
    {"nothing": nothing, "power": power, "speed": speed}[options.what](options)


if __name__ == "__main__":
    main()
