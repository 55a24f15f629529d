"""A recording server under load that is killed, restarted, and whose disk fills: what is left must be what was routed.

    python -m benchmarks.server_soak --model DIR --minutes 20     # a checkpoint without a tokenizer will do

One folder takes the runs of all servers, some of them at the same time. For each run, with
T = Σ (prompt − cached + completion − 1) over requests:
T of requests that had ended 5 s before a kill ≤ T recorded ≤ T of all that were started; after SIGTERM, all that had
ended; and where the load was drained, equality. The disk of the first run is full for a while in the middle.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.serving import Load, Server
from moescope.adapters.vllm_parts import load_part
from moescope.adapters.vllm_runs import part_paths

#: Seconds before a kill from which on nothing is promised.
MARGIN = 5.0
#: Seconds between two samples of memory and throughput.
_SAMPLE = 1.0


@dataclass(frozen=True)
class Row:
    """One run of a server."""

    case: str
    seconds: float
    requests: int
    ended: int
    recorded: int
    started: int
    holds: bool
    mb_a_minute: float | None = None
    last_third: float | None = None
    cost_growth: float | None = None


def recorded(folder: Path, run: str) -> int:
    """Tokens in the parts of a run."""
    parts = [path for path in part_paths(folder, run) if path.stat().st_size]
    return sum(int(load_part(path).sums.tokens.sum()) for path in parts)


def limit_files(pids: Sequence[int], size: int) -> None:
    """Let no file of these processes grow beyond `size` bytes, as on a disk that is full."""
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]))


def steady(server: Server, load: Load, seconds: float) -> dict[str, float]:
    """Load with a full disk in the middle.

    Returns:
        Growth of resident memory; throughput of the last third over that of the first; and, free of how fast the
        machine happens to be, the engine's CPU time over the front end's, last third over first.
    """
    workers = [pid for name, pid in server.processes().items() if name != "front end"]
    begin = time.monotonic()
    samples, full, free = [], False, False
    while (now := time.monotonic() - begin) < seconds:
        front, engine = server.cpu_seconds()
        samples.append((now, server.resident() / 1e6, load.tokens(), front, engine))
        if not full and now > seconds / 3:
            limit_files(workers, 1024)
            full = True
        if full and not free and now > seconds / 3 + min(20.0, seconds / 4):
            limit_files(workers, resource.RLIM_INFINITY)
            free = True
        time.sleep(_SAMPLE)
    limit_files(workers, resource.RLIM_INFINITY)
    if "not saved" not in server.text():
        raise AssertionError("the disk was full, and nobody noticed")
    for error in load.errors[:3]:
        print(f"not answered: {error}", flush=True)
    times, memory, tokens, front, engine = np.array(samples).T
    warm = times > seconds / 2  # vLLM's own buffers and cache are touched for the first time before
    columns = {"tokens": tokens, "front": front, "engine": engine}
    ends = [seconds / 12, seconds / 3, seconds * 2 / 3, seconds]
    spans = {name: np.diff(np.interp(ends, times, values))[[0, 2]] for name, values in columns.items()}
    first, last = spans["tokens"] / np.diff(ends)[[0, 2]]
    cost = spans["engine"] / spans["front"]
    return {
        "mb_a_minute": round(float(np.polyfit(times[warm], memory[warm], 1)[0]) * 60, 2),
        "last_third": round(float(last / first), 3),
        "cost_growth": round(float(cost[1] / cost[0]), 3),
    }


@dataclass(frozen=True)
class Soak:
    """What all runs have in common.

    Attributes:
        model: Folder of a checkpoint.
        folder: Where logs go; the servers record into `recorded` in it.
        minutes: How long, without the servers' starts.
        clients: Clients at a time.
        vocabulary: Token ids are below this.
        arguments: Of `vllm serve`.
    """

    model: Path
    folder: Path
    minutes: float
    clients: int
    vocabulary: int
    arguments: Sequence[str]

    def run(self) -> list[Row]:
        """Load that is drained, then SIGTERM and kills under load, two servers at a time on the one folder."""
        with ThreadPoolExecutor(2) as pool:
            victims = ["SIGTERM", "front end", "engine core", "worker 0"]
            return [self.drained(), *pool.map(self.ended, victims)]

    def server(self, run: str) -> Server:
        """A server whose run has this name."""
        arguments = ["--enable-prompt-tokens-details", *self.arguments]
        return Server(self.model, self.folder, self.folder / "recorded", arguments, {"MOESCOPE_RUN": run})

    def drained(self) -> Row:
        """A full disk in the middle, load that comes to its end, SIGTERM: what is recorded is what was served."""
        seconds = self.minutes * 60 * 0.6
        with self.server("drained") as server:
            server.wait_until_up()
            with Load(server.url, self.clients, self.vocabulary) as load:
                figures = steady(server, load, seconds)
            code = server.stop()
        served, tokens = load.tokens(), recorded(self.folder / "recorded", "drained")
        holds = code == 0 and not load.errors and served == tokens
        return _told(Row("drained", seconds, len(load.ended), served, tokens, load.started, holds, **figures))

    def ended(self, how: str) -> Row:
        """SIGTERM, or kill -9 of one process, under load."""
        seconds = max(self.minutes * 60 * 0.1, 2 * MARGIN)
        run = how.replace(" ", "-")
        with self.server(run) as server:
            server.wait_until_up()
            with Load(server.url, self.clients, self.vocabulary, seed=len(how)) as load:
                time.sleep(seconds)
                processes, now = server.processes(), time.monotonic()
                if how == "SIGTERM":
                    least = load.tokens(now)
                    server.terminate()
                else:
                    least = load.tokens(now - MARGIN)
                    os.kill(processes.get(how, processes["engine core"]), signal.SIGKILL)
                    deadline = time.monotonic() + 20
                    while server.process.poll() is None and time.monotonic() < deadline:
                        time.sleep(0.2)
                    server.kill_all()
        tokens = recorded(self.folder / "recorded", run)
        holds = 0 < least <= tokens <= load.started
        return _told(Row(how, seconds, len(load.ended), least, tokens, load.started, holds))


def _told(row: Row) -> Row:
    print(json.dumps(asdict(row)), flush=True)
    return row


def merge(folder: Path) -> int:
    """Tokens of `moescope merge` of all runs."""
    target = folder / "merged.safetensors"
    command = [sys.executable, "-m", "moescope.cli", "merge", str(folder / "recorded"), "-o", str(target), "--force"]
    subprocess.run(command, check=True)
    from moescope.profiler.files import load_profile

    return load_profile(target).tokens


def main() -> None:
    """Run the soak and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=128)
    parser.add_argument("arguments", nargs="*", help="of vllm serve, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        rows = Soak(
            options.model, folder, options.minutes, options.clients, options.vocabulary, options.arguments
        ).run()
        total = merge(folder)
    print("| run | requests | ended before | recorded | started |  |")
    print("|---|---:|---:|---:|---:|---|")
    for row in rows:
        print(
            f"| {row.case} | {row.requests:,} | {row.ended:,} | {row.recorded:,} | {row.started:,} | "
            f"{'holds' if row.holds else 'FAILS'} |"
        )
    first = rows[0]
    print(f"merged: {total:,}; memory {first.mb_a_minute} MB a minute; last third {first.last_third} of the first")
    print(f"the engine's CPU time over the front end's {first.cost_growth} of the first third's")
    sys.exit(not all(row.holds for row in rows) or total != sum(row.recorded for row in rows))


if __name__ == "__main__":
    main()
