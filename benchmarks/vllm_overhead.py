"""What recording inside vLLM costs, on one GPU: paired on/off blocks in one engine, and whole processes in turn.

    python -m benchmarks.vllm_overhead paired --shape qwen3-30b-a3b     # on/off blocks, latency, profiler
    python -m benchmarks.vllm_overhead process --provider off           # one process: throughput and latency
    python -m benchmarks.vllm_overhead process --provider capture       # … with vLLM's own capture of routed experts
    python -m benchmarks.vllm_overhead process --provider moescope

Weights are random ("dummy"), shapes are real. A block is 256 prompts of 512 tokens, 128 generated for each. Before the
timing, `paired` asserts that every layer counted 256 · 639 · k choices. Rows are JSON lines; a table comes last.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

PROMPTS, LENGTH, NEW = 256, 512, 128
DOMAINS = 12


def _prompts(count: int, length: int, vocabulary: int, seed: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    return [{"prompt_token_ids": rng.integers(32, vocabulary, length).tolist()} for _ in range(count)]


def _params(new: int, count: int, tagged: bool, traced: bool) -> list[Any]:
    from vllm import SamplingParams

    from moescope.adapters.vllm_settings import DOMAIN_KEY, SPLIT_KEY, TRACE_KEY

    made = []
    for i in range(count):
        tags = {DOMAIN_KEY: i % DOMAINS, SPLIT_KEY: i % 16, **({TRACE_KEY: i} if traced else {})} if tagged else None
        made.append(SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, extra_args=tags))
    return made


class Load:
    """The three loads that are timed, on one engine."""

    def __init__(self, llm: Any, vocabulary: int, *, tagged: bool, length: int = LENGTH) -> None:
        self._llm = llm
        self._vocabulary = vocabulary
        self._tagged = tagged
        self.traced = False
        self._length = length
        self._seed = 0
        self._steps: list[float] = []
        step = llm.llm_engine.step

        def timed(*args: Any, **kwargs: Any) -> Any:
            outputs = step(*args, **kwargs)
            self._steps.append(time.perf_counter())
            return outputs

        llm.llm_engine.step = timed

    def throughput(self, prompts: int = PROMPTS) -> float:
        """Tokens a second, prompts and generated ones, of one block."""
        return self.block(prompts)[0]

    def block(self, prompts: int = PROMPTS) -> tuple[float, float]:
        """Tokens a second of one block, and the median milliseconds of its steps, which a hiccup of the host spares."""
        self._steps.clear()
        seconds = self._generate(prompts, self._length, NEW)
        return prompts * (self._length + NEW) / seconds, 1000 * float(np.median(np.diff(self._steps)))

    def latency(self, batch: int, new: int) -> tuple[float, float]:
        """Milliseconds between tokens of one long generation: mean, and median of the steps (what a hiccup spares)."""
        self._steps.clear()
        self._generate(batch, 32, new)
        between = np.diff(self._steps)[2:]
        return 1000 * float(between.mean()), 1000 * float(np.median(between))

    def _generate(self, count: int, length: int, new: int) -> float:
        self._seed += 1
        prompts = _prompts(count, length, self._vocabulary, self._seed)
        params = _params(new, count, self._tagged, self.traced)
        start = time.perf_counter()
        self._llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start


def _pairs(
    switch: Callable[[bool], None], measure: Callable[[], Any], pairs: int, seed: int, seconds: float = 1e9
) -> dict[str, Any]:
    """On/off blocks in random order, for so many pairs or seconds."""
    rng = np.random.default_rng(seed)
    on, off = [], []
    start = time.monotonic()
    for _ in range(pairs):
        if len(on) > 1 and time.monotonic() - start > seconds:
            break
        for state in rng.permutation([True, False]):
            switch(bool(state))
            (on if state else off).append(measure())
        print(json.dumps({"pair": len(on), "on": on[-1], "off": off[-1]}), flush=True)
    return {"on": np.array(on), "off": np.array(off)}


def _loss(pair: dict[str, Any], *, larger_is_better: bool) -> dict[str, float]:
    ratio = pair["off"] / pair["on"] - 1 if larger_is_better else pair["on"] / pair["off"] - 1
    spread = ratio.std(ddof=1) / np.sqrt(len(ratio))
    p20, p50, p80 = np.percentile(ratio, (20, 50, 80))
    bound = ratio.mean() + student.ppf(0.95, len(ratio) - 1) * spread
    rows = {"p20": p20, "p50": p50, "p80": p80, "mean": ratio.mean(), "bound95": bound}
    return {"pairs": len(ratio), **{name: round(100 * float(value), 3) for name, value in rows.items()}}


def _arguments(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "load_format": "dummy",
        "max_model_len": 2048,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "gpu_memory_utilization": 0.92,
        "disable_log_stats": True,
        **json.loads(options.engine_args),
    }


def _model(shape: str, options: argparse.Namespace) -> tuple[str, int]:
    from tests.gpu.shapes import REAL, write_config

    changes = json.loads(options.config)
    config = {**REAL[shape], **changes}
    return write_config(Path(tempfile.mkdtemp(prefix="shape-")), REAL[shape], **changes), config["vocab_size"]


def paired(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Exactness, then on/off blocks in one engine."""
    from moescope.adapters.vllm import VllmEngine
    from moescope.profiler.engine import Generation, Request

    model, vocabulary = _model(options.shape, options)
    engine = VllmEngine(
        model,
        probabilities=options.probabilities,
        coactivation=options.coactivation,
        ignore_eos=True,
        engine_args=_arguments(options.shape, options),
    )
    rows: list[dict[str, Any]] = []
    base = {"shape": options.shape, "recorded": _recorded(options), **_versions(engine.info.device)}

    def row(metric: str, **values: Any) -> None:
        rows.append({"metric": metric, **values, **base})
        print(json.dumps(rows[-1]), flush=True)

    try:
        row("reserved", MiB=round(engine.reserved / 2**20, 1), note=engine.note)
        requests = [
            Request(np.array(prompt["prompt_token_ids"], np.int32), i % 12, i % 16)
            for i, prompt in enumerate(_prompts(PROMPTS, LENGTH, vocabulary, 99))
        ]
        done = engine.run(requests, Generation(NEW), 0)
        counts = done.sums.parts[0].arrays()["selection_counts"].sum(axis=(0, 1, 3))
        k = engine.model.layers[0].top_k
        expected = PROMPTS * (LENGTH + NEW - 1) * k
        assert (counts == expected).all(), (counts, expected)
        row("invariant", layers=len(counts), choices_in_each=expected)
        load = Load(engine.llm, vocabulary, tagged=True)

        def switch(state: bool) -> None:
            engine._wait_until_settled()
            engine._call("reset")
            engine._call("switch", state)

        load.throughput()
        for batch, new in ((1, 448), (64, 96)):
            if not options.latency_pairs:
                break
            load.latency(batch, 16)
            pair = _pairs(switch, lambda b=batch, n=new: load.latency(b, n), options.latency_pairs, batch)  # type: ignore[misc]
            for column, kind in enumerate(("mean", "median")):
                chosen = {state: values[:, column] for state, values in pair.items()}
                row(
                    f"inter-token latency, batch {batch}, {kind}",
                    off_ms=round(float(np.median(chosen["off"])), 4),
                    loss_percent=_loss(chosen, larger_is_better=False),
                )
        for name, values in ({} if options.no_profiler else _profiled(engine, load, switch)).items():
            row(f"profiler, {name}", **values)
        pair = _pairs(switch, load.block, options.pairs, 5, options.seconds)
        speed, step = ({state: values[:, column] for state, values in pair.items()} for column in (0, 1))
        row(
            "throughput",
            off_tokens_s=round(float(np.median(speed["off"]))),
            loss_percent=_loss(speed, larger_is_better=True),
        )
        row(
            "step of these blocks, median",
            off_ms=round(float(np.median(step["off"])), 4),
            loss_percent=_loss(step, larger_is_better=False),
        )
        if options.trace_rounds:
            _traced_rounds(engine, load, switch, options.trace_rounds, row)
        if options.skewed_pairs:
            engine.llm.collective_rpc(_skew)
            load.throughput()
            pair = _pairs(switch, load.throughput, options.skewed_pairs, 6)
            switch(True)
            done = engine.run(requests, Generation(NEW), 1)
            counts = done.sums.parts[0].arrays()["selection_counts"].sum(axis=(0, 1))
            assert (counts.sum(axis=1) == expected).all()
            row(
                "throughput, skewed router",
                off_tokens_s=round(float(np.median(pair["off"]))),
                loss_percent=_loss(pair, larger_is_better=True),
                busiest_expert_share=round(float(counts.max() * k / counts[0].sum()), 3),
            )
    finally:
        engine.close()
    return rows


def _traced_rounds(
    engine: Any, load: Load, switch: Callable[[bool], None], rounds: int, row: Callable[..., None]
) -> None:
    """Blocks without recording, with a trace of the ids, and with one of ids and weights, in random order."""
    names = ("off", "ids", "ids and weights")
    rng = np.random.default_rng(8)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    behind, memory, sizes = [], dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    pids = [os.getpid(), *engine.llm.collective_rpc(_pid)]
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for place in rng.permutation(len(names)):
                name = names[place]
                with _tracing(
                    engine, load, switch, None if name == "off" else Path(folder, f"{turn}-{place}"), name
                ) as at:
                    with _Memory(pids) as peak:
                        found[name].append(load.block())
                    memory[name] = max(memory[name], peak.most)
                if at:
                    behind.append(at["behind_s"])
                    sizes[name] = at["bytes"]
            print(json.dumps({"round": turn, **{name: values[-1] for name, values in found.items()}}), flush=True)
        off = np.array(found["off"])
        for name in names[1:]:
            on = np.array(found[name])
            row(
                f"throughput, trace of {name}",
                off_tokens_s=round(float(np.median(off[:, 0]))),
                loss_percent=_loss({"on": on[:, 0], "off": off[:, 0]}, larger_is_better=True),
                step_loss_percent=_loss({"on": on[:, 1], "off": off[:, 1]}, larger_is_better=False),
                bytes_a_block=sizes[name],
                on_disk_after_s=round(max(behind), 3),
                host_memory_added_MB=round(memory[name] - memory["off"], 1),
            )
        for place, name in enumerate(names):
            target = None if name == "off" else Path(folder, f"sync-{place}")
            with _tracing(engine, load, switch, target, name):
                load._generate(PROMPTS, 64, 64)
                engine.llm.collective_rpc(_start_trace, args=(True,))
                load._generate(PROMPTS, 64, 64)
                kernels = engine.llm.collective_rpc(_stop_trace, args=(True,))[0]
            row(f"profiler, trace: {name}", **kernels)
        for name in names[1:]:  # an operation of torch that waits for the GPU inside the recorder fails the run
            engine.llm.collective_rpc(_refuse_synchronisation, args=(True,))
            with _tracing(engine, load, switch, Path(folder, f"refused-{name}"), name):
                load._generate(PROMPTS, 64, 64)
            engine.llm.collective_rpc(_refuse_synchronisation, args=(False,))
            row(f"no operation of torch waited, trace of {name}", blocks=1)


@contextlib.contextmanager
def _tracing(
    engine: Any, load: Load, switch: Callable[[bool], None], folder: Path | None, name: str
) -> Iterator[dict[str, Any]]:
    """Record what runs inside into a trace, or nothing; what is not exact in the end fails."""
    from moescope.profiler.trace_writer import TraceOptions, TraceWriter
    from tests.gpu.shapes import trace_about

    at: dict[str, Any] = {}
    switch(folder is not None)
    if folder is None:
        yield at
        return
    weights = name != "ids"
    about = trace_about(engine, DOMAINS, PROMPTS, weights=weights)
    with TraceWriter(about, TraceOptions(folder, weights=weights, force=True)) as writer:
        engine.trace(writer)
        load.traced = True
        try:
            engine._receiver.expect(range(DOMAINS))
            writer.admit(range(PROMPTS), [LENGTH + NEW - 1] * PROMPTS)
            yield at
            start = time.perf_counter()
            engine._wait_until_settled()
            sent = sum(engine._call("traced"))
            engine._receiver.wait_for(sent)
            counted = engine._collect("trace: ").tokens.sum()
            assert sent == counted, (sent, counted)
        finally:
            load.traced = False
            engine.trace(None)
        writer.commit(0)
        writer.finish()
        at["behind_s"] = time.perf_counter() - start
    at["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    for file in folder.iterdir():
        file.unlink()


class _Memory:
    """Most resident memory (MB, 10⁶ bytes) of some processes together while this runs."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = sorted(set(pids))
        self.most = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._end.wait(0.05):
            pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._pids]
            self.most = max(self.most, sum(pages) * page / 1e6)


def _pid(worker: Any) -> int:
    return os.getpid()


def _refuse_synchronisation(worker: Any, refuse: bool) -> None:
    """From now on, an operation of torch that waits for the GPU inside the recorder's hooks is an error."""
    import torch

    recorder = worker.moescope_recorder
    if not torch.cuda.is_available():
        return
    for name in ("_before", "_after"):
        if not refuse:
            vars(recorder).pop(name, None)
            continue
        method = getattr(recorder, name)

        def strict(output: Any, method: Callable[[Any], None] = method) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                method(output)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        setattr(recorder, name, strict)


def _recorded(options: argparse.Namespace) -> str:
    parts = ["counts", "weights", "phases", "domains", "splits"]
    if options.probabilities != "off":
        parts.append(f"distributions of {options.probabilities}")
    if options.coactivation:
        parts.append("co-activation")
    return ", ".join(parts)


def process(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One process: throughput and latency, without switching."""
    model, vocabulary = _model(options.shape, options)
    arguments = _arguments(options.shape, options)
    if options.provider == "moescope":
        from moescope.adapters.vllm import VllmEngine

        engine = VllmEngine(model, probabilities="off", ignore_eos=True, engine_args=arguments)
        llm = engine.llm
        engine._call("switch", True)
    else:
        from vllm import LLM

        llm = LLM(model=model, enable_return_routed_experts=options.provider == "capture", **arguments)
    load = Load(llm, vocabulary, tagged=options.provider == "moescope")
    load.throughput()
    load.latency(1, 16)
    throughput = [load.throughput() for _ in range(options.blocks)]
    latency = {batch: [load.latency(batch, new)[1] for _ in range(10)] for batch, new in ((1, 128), (64, 96))}
    kernels = None
    if options.provider != "capture":
        kernels = _trace(llm, lambda: load._generate(1, 32, 16))
    row = {
        "metric": "process",
        "provider": options.provider,
        "shape": options.shape,
        "tokens_s": [round(value) for value in throughput],
        "tokens_s_mean": round(float(np.mean(throughput))),
        "latency_ms": {
            f"batch {batch}": {
                "p50": round(float(np.median(values)), 4),
                "min": round(min(values), 4),
                "max": round(max(values), 4),
            }
            for batch, values in latency.items()
        },
        "kernels_of_16_steps": None if kernels is None else sum(count for count, _ in kernels.values()),
        **_versions(""),
    }
    print(json.dumps(row), flush=True)
    llm.llm_engine.engine_core.shutdown()
    return [row]


def _profiled(engine: Any, load: Load, switch: Callable[[bool], None]) -> dict[str, dict[str, Any]]:
    """GPU time and kernels of some steps, with recording and without; what is added is the difference."""
    found: dict[str, dict[str, Any]] = {}
    loads: dict[str, tuple[int, Callable[[], Any]]] = {
        "batch 1": (64, lambda: load._generate(1, 32, 64)),
        "batch 64": (64, lambda: load._generate(64, 32, 64)),
        "batch 256": (64, lambda: load._generate(256, 32, 64)),
        "prefill": (16, lambda: load._generate(PROMPTS, LENGTH, 1)),
    }
    for name, (_, run) in loads.items():
        states = {}
        for state in (False, True):
            switch(state)
            run()
            states[state] = _trace(engine.llm, run)
        commits = [values for kernel, values in states[True].items() if "_add_choices" in kernel]
        steps, busy = (commits[0][0], commits[0][1]) if commits else (0, 0.0)
        total = sum(time_us for _, time_us in states[False].values())
        found[name] = {
            "steps": steps,
            "step_us": round(total / max(steps, 1), 1),
            "commit_us": round(busy / max(steps, 1), 2),
            "added_percent": round(100 * busy / total, 3) if total else None,
            "kernels_off": sum(count for count, _ in states[False].values()),
            "kernels_on": sum(count for count, _ in states[True].values()),
        }
    return found


def _trace(llm: Any, run: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    llm.collective_rpc(_start_trace)
    run()
    return {name: (count, busy) for name, count, busy in llm.collective_rpc(_stop_trace)[0]}


def _start_trace(worker: Any, calls: bool = False) -> None:
    import torch

    if not torch.cuda.is_available():
        return
    torch.cuda.synchronize()
    kinds = torch.profiler.ProfilerActivity
    worker.moescope_trace = torch.profiler.profile(activities=[kinds.CUDA, *([kinds.CPU] if calls else [])])
    worker.moescope_trace.start()


def _stop_trace(worker: Any, calls: bool = False) -> Any:
    """GPU time by kernel; with `calls`: kernels, GPU time, and by thread the calls that wait for the GPU."""
    import torch

    if not torch.cuda.is_available():
        return {} if calls else []
    torch.cuda.synchronize()
    worker.moescope_trace.stop()
    events = worker.moescope_trace.key_averages()
    kernels = [(e.key, int(e.count), float(e.self_device_time_total)) for e in events if e.self_device_time_total > 0]
    if not calls:
        return kernels
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        worker.moescope_trace.export_chrome_trace(str(path))
        found = json.loads(path.read_text())["traceEvents"]
    waits: dict[str, int] = {}
    launches: dict[str, int] = {}
    for event in found:
        name = event.get("name", "")
        if event.get("cat") == "cuda_runtime" and "Synchronize" in name:
            key = f"{name}, thread {event['tid']}"
            waits[key] = waits.get(key, 0) + 1
        if name == "cudaGraphLaunch":
            launches[str(event["tid"])] = launches.get(str(event["tid"]), 0) + 1
    return {
        "kernels": sum(count for _, count, _ in kernels),
        "gpu_ms": round(sum(busy for _, _, busy in kernels) / 1000, 2),
        "graph_launches_by_thread": launches,
        "waits": waits,
        "transfers": {key: (count, round(busy)) for key, count, busy in kernels if "Memcpy" in key},
    }


def _skew(worker: Any) -> None:
    """Routers that know two sets of experts alone: every token takes one set or the other."""
    import torch

    for layer in worker.moescope_recorder._layers:
        weight = layer.gate if layer.gate is not None else None
        direction = torch.randn(weight.shape[1], device=weight.device, dtype=torch.float32)
        k = layer.info.top_k
        weight.zero_()
        ramp = torch.linspace(1.0, 1.1, k, device=weight.device)[:, None]
        weight[:k].copy_((ramp * direction).to(weight.dtype))
        weight[k : 2 * k].copy_((-ramp * direction).to(weight.dtype))


def _versions(device: str) -> dict[str, str]:
    import torch
    import vllm

    from moescope import __version__

    device = device or "one GPU"
    return {"device": device, "vllm": vllm.__version__, "torch": torch.__version__, "moescope": __version__}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["paired", "process"])
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--provider", default="moescope", choices=["off", "moescope", "capture"])
    parser.add_argument("--probabilities", default="off", choices=["off", "sample", "all"])
    parser.add_argument("--coactivation", action="store_true")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--latency-pairs", type=int, default=20)
    parser.add_argument("--skewed-pairs", type=int, default=5)
    parser.add_argument("--trace-rounds", type=int, default=0, help="blocks off, with a trace of ids, and with weights")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop the throughput pairs after so long")
    parser.add_argument("--no-profiler", action="store_true")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--config", default="{}", help="changes to the shape's config, JSON")
    parser.add_argument("--engine-args", default="{}", help="arguments of vllm.LLM, JSON")
    options = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # the profiler is started by a function sent over
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    rows = paired(options) if options.part == "paired" else process(options)
    print("\n".join(_line(row) for row in rows))
    sys.stdout.flush()


def _line(row: dict[str, Any]) -> str:
    left = {key: value for key, value in row.items() if key not in ("shape", "device", "vllm", "torch", "moescope")}
    return f"{row['shape']}: {left}"


if __name__ == "__main__":
    main()
