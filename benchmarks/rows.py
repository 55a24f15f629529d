"""Rows of benchmarks: what was measured, its spread, where, and beside which load; as a table and as JSON."""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from scipy.stats import t as student

from moescope import __version__

#: CPU time of other processes, in cores, above which timings do not count as taken on a quiet machine.
QUIET: Final = 0.1


@dataclass(frozen=True, slots=True)
class Host:
    """Where and when rows were measured; generic, no names of machines.

    Attributes:
        device: Kind of processor and number of cores.
        threads: Threads of a CPU kernel.
        python: Version.
        torch: Version.
        transformers: Version.
        moescope: Version.
        date: Day, ISO 8601, UTC.
        vllm: Version, where it took part.
    """

    device: str
    threads: int
    python: str
    torch: str
    transformers: str
    moescope: str
    date: str
    vllm: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One measured quantity.

    Attributes:
        case: What was run.
        provider: What ran it: "off", or what was recorded.
        metric: What was measured.
        unit: Its unit.
        p20: 20th percentile over the repetitions; None, as all that follow, where there is nothing to measure.
        p50: Median.
        p80: 80th percentile.
        low: Least; None where it was not kept.
        high: Greatest; likewise.
        mean: Mean.
        bound: One-sided 95% upper bound of the mean (Student's t), or None for a single repetition.
        n: Repetitions.
        other_load: Cores that other processes kept busy meanwhile, mean.
        host: Where.
    """

    case: str
    provider: str
    metric: str
    unit: str
    p20: float | None
    p50: float | None
    p80: float | None
    low: float | None
    high: float | None
    mean: float | None
    bound: float | None
    n: int
    other_load: float
    host: Host


class OtherLoad:
    """CPU time that other processes take while a `with` block runs; `cores` is its mean in cores, afterwards."""

    def __init__(self) -> None:
        self.cores = 0.0

    def __enter__(self) -> Self:
        self._start = (_busy_seconds(), _own_seconds(), time.monotonic())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        busy, own, clock = self._start
        others = (_busy_seconds() - busy) - (_own_seconds() - own)
        self.cores = max(0.0, others / max(time.monotonic() - clock, 1e-9))


def _busy_seconds() -> float:
    """Seconds that all cores were not idle, since the start of the machine; stolen time counts as busy."""
    fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]]
    idle = fields[3] + fields[4]
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")  # guest time is part of user time already


def _own_seconds() -> float:
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system


def this_host(device: str = "cpu") -> Host:
    """The machine that this runs on; `device`: the kind of device that was measured, "cpu" or "cuda"."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    name = f"{len(os.sched_getaffinity(0))} cores of an {platform.machine()} server, {capability}"
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, {name}"
    return Host(
        device=name,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=importlib.metadata.version("transformers"),
        moescope=__version__,
        date=datetime.now(UTC).date().isoformat(),
    )


def make_row(
    case: str, provider: str, metric: str, unit: str, values: Sequence[float], other_load: float, host: Host
) -> Row:
    """Sum repetitions up.

    Args:
        case: What was run.
        provider: What ran it.
        metric: What was measured.
        unit: Its unit.
        values: One for each repetition.
        other_load: Cores that other processes kept busy meanwhile.
        host: Where.
    """
    data = np.asarray(values, dtype=np.float64)
    bound = None
    if len(data) > 1:
        bound = float(data.mean() + student.ppf(0.95, len(data) - 1) * data.std(ddof=1) / np.sqrt(len(data)))
    p20, p50, p80 = (float(value) for value in np.percentile(data, (20, 50, 80)))
    return Row(
        case=case,
        provider=provider,
        metric=metric,
        unit=unit,
        p20=p20,
        p50=p50,
        p80=p80,
        low=float(data.min()),
        high=float(data.max()),
        mean=float(data.mean()),
        bound=bound,
        n=len(data),
        other_load=other_load,
        host=host,
    )


def absent_row(case: str, provider: str, metric: str, why: str, host: Host) -> Row:
    """A row without numbers, which says in place of the unit why there are none."""
    return Row(case, provider, metric, why, None, None, None, None, None, None, None, 0, 0.0, host)


def describe(rows: Sequence[Row]) -> str:
    """One line on where `rows` were measured, and whether the machine was quiet."""
    host = rows[0].host
    load = max(row.other_load for row in rows)
    quiet = "on a quiet machine" if load <= QUIET else "BESIDE OTHER LOAD, timings are rough"
    vllm = next((f"vLLM {row.host.vllm}, " for row in rows if row.host.vllm), "")
    return (
        f"{host.device}; {host.threads} thread{'s' * (host.threads != 1)}; Python {host.python}, torch {host.torch}, "
        f"transformers {host.transformers}, {vllm}moescope {host.moescope}; {host.date}; "
        f"other processes took up to {load:.2f} cores: {quiet}"
    )


def markdown(rows: Sequence[Row], *, short: bool = False) -> str:
    """A Markdown table of `rows`; a short one leaves the least, the greatest and the bound out."""
    names = ["case", "provider", "metric", "unit", "p20", "p50", "p80", "min", "max", "bound", "n"]
    if short:
        names[7:10] = []
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * 4 + "---:|" * (len(names) - 4)]
    for row in rows:
        numbers = (row.p20, row.p50, row.p80, row.low, row.high, row.bound)[: 3 if short else None]
        shown = ["–" if number is None else _number(number) for number in numbers]
        cells = (row.case, row.provider, row.metric, row.unit, *shown, str(row.n))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Four decimals below 10, so that percents of a ratio can be read; fewer above."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def read_json(path: Path) -> list[Row]:
    """The rows that `write_json` wrote to `path`."""
    return [Row(**{**row, "host": Host(**row["host"])}) for row in json.loads(path.read_text(encoding="utf-8"))]


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write `rows` to `path` as one JSON list."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def report(rows: Sequence[Row], path: Path | None) -> None:
    """Print where `rows` were measured and their table; write them to `path`, if one is given."""
    print(f"\n{describe(rows)}\n\n{markdown(rows)}")
    if path is not None:
        write_json(rows, path)
        print(f"\nWrote {path}")


def add_options(parser: argparse.ArgumentParser, *, repetitions: int) -> None:
    """Add the options that every benchmark takes."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--repetitions", type=int, default=repetitions, metavar="N", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a rough look in less than 40 seconds")
