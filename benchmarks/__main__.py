"""The suite: every benchmark in a process of its own, each with a time limit, and one short table of what they found.

python -m benchmarks                     # on the CPU, under five minutes on two idle cores
python -m benchmarks gpu                 # on one GPU that holds Qwen3-30B-A3B in bf16, with vLLM
python -m benchmarks --only kernels,peers --quick --json rows.json
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from moescope.benchmarks.rows import Host, OtherLoad, Row, describe, make_row, markdown, read_json, write_json

ROOT: Final = Path(__file__).parents[1]
PARTS: Final = ("cpu", "gpu")
#: Exit codes; `argparse` gives 2 for a wrong command line.
DONE, FAILED = 0, 1


@dataclass(frozen=True, slots=True)
class Case:
    """A benchmark of the suite.

    Attributes:
        part: "cpu" or "gpu".
        name: As the command line takes it.
        question: What it answers.
        script: Module to run.
        arguments: Its arguments, separated by spaces.
        quick: Its arguments for a rough look.
        seconds: How long it may take.
        shown: Metrics that the suite's table shows; empty: all.
        gives: How it gives its rows: in the "file" that its `--json` names, as "lines" of JSON that it prints, or none,
            and what it prints is "text" for people.
    """

    part: str
    name: str
    question: str
    script: str
    arguments: str
    quick: str
    seconds: int
    shown: tuple[str, ...] = ()
    gives: Literal["file", "lines", "text"] = "file"


def _served(provider: str, question: str) -> Case:
    """One provider of vLLM's throughput in a process of its own."""
    process = f"process --provider {provider} --blocks"
    return Case(
        "gpu",
        f"vllm-{provider}",
        question,
        "benchmarks.vllm_overhead",
        f"{process} 3",
        f"{process} 1",
        600,
        gives="lines",
    )


CASES: Final = (
    Case(
        "cpu",
        "recording",
        "What do counts, pairs, distributions and a trace add to a forward?",
        "benchmarks.recording_cost",
        "--quick",
        "--quick --repetitions 1",
        600,
        ("CPU time", "CPU in recorder"),
    ),
    Case(
        "cpu",
        "memory",
        "Does memory grow with the length of a run?",
        "benchmarks.memory",
        "--quick",
        "--quick --long 20000",
        600,
        ("peak",),
    ),
    Case(
        "cpu",
        "kernels",
        "How far is counting from merely passing over the same memory?",
        "benchmarks.kernels",
        "--repetitions 10",
        "--quick",
        600,
        ("time of floor",),
    ),
    Case(
        "cpu",
        "traces",
        "How fast are traces written and read beside the plain files, and what do they add to a run?",
        "benchmarks.traces",
        "--quick",
        "--quick --repetitions 1",
        600,
        (
            "bytes a token",
            "memory above that before",
            "written and synchronised, wall time",
            "read, materialised, checksums on, CPU time",
            "the same bytes and checksum alone, CPU time",
            "counted to a profile, CPU time",
            "CPU time inside tracing",
        ),
    ),
    Case(
        "cpu",
        "analysis",
        "What do statistics and the report take beside reading the profile?",
        "benchmarks.analysis",
        "--repetitions 3",
        "--quick",
        600,
    ),
    Case(
        "cpu",
        "weights",
        "What does a pass over weights cost beside merely reading them?",
        "benchmarks.weights",
        "--quick",
        "--quick",
        600,
        ("ratio", "peak memory"),
    ),
    Case(
        "cpu",
        "peers",
        "What do other tools count on the same model and tokens, and how fast?",
        "benchmarks.peers",
        "--repetitions 3",
        "--quick",
        600,
        ("selections too few or too many", "mean r at Δ = 4", "CPU time", "kept of the run", "layer correlation", "–"),
    ),
    Case(
        "gpu",
        "vllm",
        "What does recording cost in paired blocks of one engine?",
        "benchmarks.vllm_overhead",
        "paired --pairs 6 --latency-pairs 6 --trace-rounds 6 --skewed-pairs 0",
        "paired --pairs 2 --latency-pairs 2 --trace-rounds 2 --skewed-pairs 0 --no-profiler",
        1800,
        gives="lines",
    ),
    _served("off", "How fast is vLLM without recording?"),
    _served("moescope", "How fast is it with counts, in a process of its own?"),
    _served("capture", "How fast is it with its own capture of routed experts?"),
    Case(
        "gpu",
        "kernels-gpu",
        "How far is the commit's kernel from merely passing over the same memory?",
        "benchmarks.kernels",
        "--device cuda --repetitions 50",
        "--device cuda --quick",
        180,
    ),
    Case(
        "gpu",
        "weights-gpu",
        "Does the pass over weights give the same on the GPU, and how fast is it beside reading?",
        "tests.gpu.weights_cuda",
        "",
        "--layers 12",
        900,
        gives="text",
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case.

    Attributes:
        rows: What it measured.
        remarks: What it says beneath its own table: goals, mostly.
        failure: Why it has no rows, or what it left unfinished; empty if all went well.
    """

    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()
    failure: str = ""


def run_case(case: Case, quick: bool) -> Outcome:
    """Run a case in a process of its own; whatever happens in there, this returns."""
    with tempfile.TemporaryDirectory(prefix="moescope-benchmark-") as name, OtherLoad() as load:
        rows_file = Path(name) / "rows.json"
        command = [sys.executable, "-m", case.script, *(case.quick if quick else case.arguments).split()]
        if case.gives == "file":
            command += ["--json", str(rows_file)]
        # threads that spin while they wait slow each other down; what a killed process leaves goes with the folder
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"TMPDIR": name}
        with open(Path(name) / "output", "w+", encoding="utf-8", errors="replace") as output:
            code = _run(command, output.fileno(), case.seconds, environment)
            output.seek(0)
            lines = output.read().splitlines()
        found = read_json(rows_file) if rows_file.exists() else []
    if case.gives == "lines":
        found = list(printed_rows(lines, load.cores))
    failure = ""
    if code is None:
        failure = f"stopped after {case.seconds} s"
    elif code not in ((0, 1) if found else (0,)) or not (found or case.gives == "text"):
        # 1 with rows: a goal was missed, as its remarks say
        failure = f"exit code {code}: {next((line for line in reversed(lines) if line.strip()), 'no output')[:300]}"
    return Outcome(tuple(found), tuple(lines if case.gives == "text" else _remarks(lines)), failure)


def _run(command: Sequence[str], output: int, seconds: int, environment: dict[str, str]) -> int | None:
    """Exit code of a command, or None where it had to be stopped, with all processes that it started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _remarks(lines: Sequence[str]) -> Iterator[str]:
    """Lines beneath the last table of a script's output."""
    tables = [place for place, line in enumerate(lines) if line.startswith("|")]
    for line in lines[tables[-1] + 1 :] if tables else ():
        if line.strip() and not line.startswith("Wrote"):
            yield line


def printed_rows(lines: Sequence[str], other_load: float) -> Iterator[Row]:
    """Rows among the lines that `vllm_overhead` prints: speeds, and losses in percent."""
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if not isinstance(found, dict) or "metric" not in found:
            continue
        host = _printed_host(found)
        if "tokens_s" in found:
            provider = "moescope: counts" if found["provider"] == "moescope" else found["provider"]
            yield make_row(found["shape"], provider, "throughput", "tokens/s", found["tokens_s"], other_load, host)
        for key, what in (("loss_percent", ""), ("step_loss_percent", ", median of the steps")):
            if key not in found:
                continue
            loss = found[key]
            yield Row(
                case=found["shape"],
                provider=found["recorded"],
                metric=f"{found['metric']}{what}, loss",
                unit="%",
                p20=loss["p20"],
                p50=loss["p50"],
                p80=loss["p80"],
                low=None,
                high=None,
                mean=loss["mean"],
                bound=loss["bound95"],
                n=loss["pairs"],
                other_load=other_load,
                host=host,
            )


def _printed_host(found: dict[str, Any]) -> Host:
    """Where a printed row was measured; this process must not open the GPU to find out more."""
    from importlib.metadata import version

    return Host(
        device=found["device"],
        threads=len(os.sched_getaffinity(0)),
        python=sys.version.split()[0],
        torch=found["torch"],
        transformers=version("transformers"),
        moescope=found["moescope"],
        date=datetime.now(UTC).date().isoformat(),
        vllm=found["vllm"],
    )


def chosen_cases(part: str, only: str | None, parser: argparse.ArgumentParser) -> list[Case]:
    """The cases that the command line names; a wrong name ends the program."""
    if only is None:
        return [case for case in CASES if case.part == part]
    names = [name.strip() for name in only.split(",")]
    known = {case.name: case for case in CASES}
    for name in names:
        if name not in known:
            parser.error(f"--only: no case {name!r}; choose from {', '.join(known)}")
    return [known[name] for name in names]


def gpu_is_there() -> bool:
    """Whether torch finds a GPU: vLLM's CPU build would take tens of gigabytes of memory instead."""
    import torch

    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; 0 if every case ran to its end."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", default="cpu", choices=PARTS, help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="say which cases there are, and run none")
    parser.add_argument("--only", metavar="NAMES", help="run these cases, separated by commas, of either part")
    parser.add_argument("--quick", action="store_true", help="a rough look at each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there, also those not shown")
    options = parser.parse_args(arguments)
    cases = chosen_cases(options.part, options.only, parser)
    if options.list:
        for case in CASES:
            print(f"{case.part}  {case.name:<14} {case.question}")
        return DONE
    if any(case.part == "gpu" for case in cases) and not gpu_is_there():
        parser.error("torch finds no GPU here, which the GPU part needs; run the CPU part: python -m benchmarks")
    rows: list[Row] = []
    shown: list[Row] = []
    remarks: list[str] = []
    failures: list[str] = []
    for case in cases:
        print(f"{case.name}: {case.question}", file=sys.stderr, flush=True)
        start = time.monotonic()
        outcome = run_case(case, options.quick)
        print(f"  {outcome.failure or 'done'}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        named = [replace(row, case=f"{case.name}: {row.case}") for row in outcome.rows]
        rows += named
        shown += [row for row in named if not case.shown or row.metric in case.shown]
        remarks += [f"{case.name}: {remark}" for remark in outcome.remarks]
        failures += [f"{case.name} FAILED: {outcome.failure}"] * bool(outcome.failure)
    if shown:
        print(f"{describe(rows)}\n\n{markdown(shown, short=True)}\n")
    for line in (*remarks, *failures):
        print(line)
    if options.json is not None:
        write_json(rows, options.json)
        print(f"Wrote {options.json}")
    return FAILED if failures else DONE


if __name__ == "__main__":
    raise SystemExit(main())
