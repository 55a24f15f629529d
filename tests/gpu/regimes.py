"""Exactness on a GPU: every regime of the engine, counts held against vLLM's own capture in the same run.

    python -m tests.gpu.regimes                  # all cases, several engines at a time on one GPU
    python -m tests.gpu.regimes qwen3 deepseek   # some
    python -m tests.gpu.regimes --parallel 2     # cases for two GPUs

Each case is a process of its own; a row says what was compared. The first row names the version of vLLM; a case that it
cannot run says so. Exit code 1 if a case fails.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moescope.adapters.vllm import vllm_version

PROMPTS, LONGEST, NEW = 96, 200, 48
DOMAINS = 3


def _case(shape: str, config: dict[str, Any] | None = None, /, **options: Any) -> dict[str, Any]:
    return {"shape": shape, "config": config or {}, **options}


#: Half of the experts of most layers replaced by constants, as a pruned checkpoint of vLLM 0.33 says it.
SUBSTITUTED: dict[str, Any] = {
    "approximate_experts": {str(layer): list(range(layer, 32, 2)) for layer in (0, 1, 3, 4)},
}
WRITER = {"worker_cls": "tests.helpers.overwriting.OverwritingWorker"}
#: In this process, so that the engine's own words are heard.
INTRUDER = {"MOESCOPE_TEST_WRITER": "method", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

#: name: shape, changes to the config, engine arguments, environment, options of the case.
CASES: dict[str, dict[str, Any]] = {
    "qwen3": _case("qwen3"),
    "qwen3-eager": _case("qwen3", args={"enforce_eager": True}),
    "qwen3-piecewise": _case("qwen3", args={"compilation_config": {"cudagraph_mode": "PIECEWISE"}}),
    "qwen3-full-off": _case("qwen3", args={"compilation_config": {"cudagraph_mode": "FULL"}}, probabilities="off"),
    "qwen3-full": _case("qwen3", args={"compilation_config": {"cudagraph_mode": "FULL"}}),
    "qwen3-sync": _case("qwen3", args={"async_scheduling": False}),
    "qwen3-chunked": _case("qwen3", args={"max_num_batched_tokens": 64, "max_num_seqs": 32}),
    "qwen3-preempt": _case("qwen3", args={"num_gpu_blocks_override": 60}),
    "qwen3-preempt-sync": _case("qwen3", args={"num_gpu_blocks_override": 60, "async_scheduling": False}),
    "qwen3-prefix": _case("qwen3", args={"enable_prefix_caching": True}, shared=True),
    "qwen3-prefix-preempt": _case(
        "qwen3", args={"enable_prefix_caching": True, "num_gpu_blocks_override": 60}, shared=True
    ),
    "qwen3-ngram": _case(
        "qwen3",
        args={
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 1,
            }
        },
        temperature=0.0,
    ),
    "qwen3-lora": _case("qwen3", args={"enable_lora": True, "max_lora_rank": 8}),
    "qwen3-sleep": _case("qwen3", args={"enable_sleep_mode": True}, sleep=True),
    # of its two model runners, a version of vLLM captures routing in one
    **{
        f"{shape}-{runner}{suffix}": _case(shape, runner=runner, **options)
        for runner in ("v1", "v2")
        for shape, suffix, options in (
            ("qwen3", "", {}),
            ("qwen3", "-preempt", {"args": {"num_gpu_blocks_override": 60}}),
            ("deepseek", "", {}),
        )
    },
    "qwen3-int4": _case("qwen3", {"quantization": "gptq"}, args={"moe_backend": "emulation"}),
    "qwen3-all": _case("qwen3", probabilities="all", coactivation=True),
    "qwen3-nan": _case("qwen3", nan=True, capture=False, probabilities="off"),
    "deepseek": _case("deepseek"),
    "deepseek-fp8": _case("deepseek", {"quantization": "fp8"}),
    "deepseek-all": _case("deepseek", probabilities="all", coactivation=True),
    "deepseek-mtp": _case(
        "deepseek",
        args={"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
        temperature=0.0,
    ),
    "deepseek-nan": _case("deepseek", nan=True, capture=False, probabilities="off"),
    "minimax": _case("minimax"),
    "minimax-fp8": _case("minimax", {"quantization": "fp8"}),
    "minimax-all": _case("minimax", probabilities="all", coactivation=True),
    "minimax-nan": _case("minimax", nan=True, capture=False, probabilities="off"),
    **{
        f"{shape}-{name}{suffix}": _case(shape, *config, args={"enforce_eager": bool(suffix), **args}, **options)
        for shape in ("qwen3", "minimax", "deepseek")
        for suffix in ("", "-eager")
        for name, config, args, options in (
            # vLLM's own experts that write to what the router returned
            ("substituted", (SUBSTITUTED,), {}, {"needs": "vllm.model_executor.layers.fused_moe.expert_substitution"}),
            # a class of experts that does, in every version
            ("overwritten", (), WRITER, {"env": {"MOESCOPE_TEST_WRITER": "experts"}}),
            # a write that nothing announces: the engine stops, or, where copies are staged, the record stands
            ("intruder", (), WRITER, {"env": INTRUDER, "stops": shape != "deepseek"}),
        )
    },
}
#: Cases for two GPUs.
PARALLEL: dict[str, dict[str, Any]] = {
    "qwen3-tp2": _case("qwen3", args={"tensor_parallel_size": 2}),
    "qwen3-ep2": _case("qwen3", args={"tensor_parallel_size": 2, "enable_expert_parallel": True}),
    "qwen3-eplb": _case(
        "qwen3",
        args={
            "tensor_parallel_size": 2,
            "enable_expert_parallel": True,
            "enable_eplb": True,
            "eplb_config": {"window_size": 20, "step_interval": 10, "num_redundant_experts": 4},
        },
    ),
    "qwen3-pp2": _case("qwen3", args={"pipeline_parallel_size": 2}, capture=False),
    "deepseek-tp2": _case("deepseek", args={"tensor_parallel_size": 2}),
    "deepseek-ep2": _case("deepseek", args={"tensor_parallel_size": 2, "enable_expert_parallel": True}),
    "deepseek-pp2": _case("deepseek", args={"pipeline_parallel_size": 2}, capture=False),
    "minimax-tp2": _case("minimax", args={"tensor_parallel_size": 2}),
    # two processes, the second with fewer requests: it runs dummy batches while the first goes on
    "qwen3-dp2": _case("qwen3", args={"enable_expert_parallel": True}, replicas=2),
    "deepseek-dp2": _case("deepseek", args={"enable_expert_parallel": True}, replicas=2, capture=False),
}


def run_case(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Run one case in this process; the row says what held."""
    from moescope.adapters.vllm import VllmEngine, captures_beside_cache
    from moescope.profiler.engine import Generation
    from moescope.profiler.errors import InvariantError, MoescopeError
    from tests.gpu.shapes import FP8, GPTQ, SMALL, write_config

    if "needs" in case and importlib.util.find_spec(case["needs"]) is None:
        return {"case": name, "ok": True, "not_run": f"vLLM {vllm_version()} has no {case['needs']}"}
    changes = dict(case["config"])
    quantization = changes.pop("quantization", None)
    if quantization:
        changes["quantization_config"] = {"fp8": FP8, "gptq": GPTQ}[quantization]
    folder = tempfile.mkdtemp(prefix="shape-")
    model = write_config(Path(folder), SMALL[case["shape"]], **changes)
    arguments = {
        "load_format": "dummy",
        "max_model_len": 512,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 64,
        # engines that share a GPU must not size their caches by what is free at the moment
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 2**28,
        **case.get("args", {}),
    }
    capturing = "v2" if captures_beside_cache() else "v1"
    capture = case.get("capture", True) and not case.get("stops") and case.get("runner", capturing) == capturing
    started = time.monotonic()

    def start() -> VllmEngine:
        return VllmEngine(
            model,
            probabilities=case.get("probabilities", "sample"),
            coactivation=case.get("coactivation", False),
            verify=0.25 if capture else 0.0,
            engine_args=arguments,
        )

    if case.get("stops"):
        return {"case": name} | _stopped(start, case, MoescopeError)
    engine = start()
    row: dict[str, Any] = {"case": name, "start_s": round(time.monotonic() - started, 1)}
    try:
        row |= _writers(engine, case)
        if case.get("nan"):
            return row | _with_nan(engine, InvariantError)
        requests = _requests(case)
        outputs: list[Any] = []
        generate = engine.llm.generate

        def keep(*args: Any, **kwargs: Any) -> Any:
            found = generate(*args, **kwargs)
            outputs.extend(found)
            return found

        engine.llm.generate = keep
        generation = Generation(NEW, case.get("temperature", 1.0), 7)
        for batch in range(2):
            if case.get("sleep") and batch:
                engine.llm.sleep(level=1)
                engine.llm.wake_up()
            outputs.clear()
            if batch and engine._writers == 1:  # the first batch is counted alone, the second traced as well
                row |= _trace(engine, requests, outputs, generation, batch, capture, Path(folder, "trace"))
                continue
            sums = engine.run(requests, generation, batch).sums.parts[0]
            row |= _compare(engine, requests, outputs, sums, capture, case)
        if engine.probabilities and engine._writers == 1 and not case.get("shared"):  # cached tokens are not routed
            row |= _distributions(engine, requests[1].token_ids)
        row["verified"] = engine.findings().get("verified", {}).get("token_layers", 0)
        row["skipped"] = engine.findings().get("skipped_by_prefix_cache", 0)
        row["routers"] = engine.info.options["routers"]
        row["async"] = engine.info.options["async_scheduling"]
        row["ok"] = True
    finally:
        _wait_for_replicas()
        engine.close()
    return row


def _stopped(start: Callable[[], Any], case: dict[str, Any], error: type[Exception]) -> dict[str, Any]:
    """An engine that writes to lent memory says so, when it starts or when it routes its first request."""
    from moescope.profiler.engine import Generation

    engine = None
    try:
        engine = start()
        engine.run(_requests(case), Generation(4, 1.0, 7), 0)
    except error as found:
        text = str(found)
        assert "vLLM wrote to what its router had returned" in text, text
        return {"ok": True, "said": text, "at": "start" if engine is None else "the first request"}
    finally:
        if engine is not None:
            engine.close()
    raise AssertionError("a write to what the router had returned went unnoticed")


def _writers(engine: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Layers whose experts write to what their router returned, and layers that get the staging buffers themselves."""
    writing, lent = engine.llm.collective_rpc(_count_writers)[0]
    if "approximate_experts" in case["config"] or "worker_cls" in case.get("args", {}):
        assert writing > 0, "nothing writes to what the routers return"
    return {"writing_layers": writing, "layers_that_only_read": lent}


def _count_writers(worker: Any) -> tuple[int, int]:
    from moescope.adapters.vllm_routing import _only_reads

    layers = [layer.runner for layer in worker.moescope_recorder._layers]
    substituted = sum(type(layer.routed_experts).__name__ == "SubstitutedRoutedExperts" for layer in layers)
    return substituted + getattr(worker, "overwriting", 0), sum(_only_reads(layer) for layer in layers)


def _wait_for_replicas() -> None:
    """A replica that ends early leaves the others waiting in a collective."""
    size = int(os.environ.get("VLLM_DP_SIZE", "1"))
    if size == 1:
        return
    flags = [Path(tempfile.gettempdir(), f"dp-{os.environ['VLLM_DP_MASTER_PORT']}-{rank}") for rank in range(size)]
    flags[int(os.environ["VLLM_DP_RANK"])].touch()
    deadline = time.monotonic() + 60
    while not all(flag.exists() for flag in flags) and time.monotonic() < deadline:
        time.sleep(0.1)


def _requests(case: dict[str, Any]) -> list[Any]:
    from moescope.profiler.engine import Request
    from moescope.profiler.tokens import split_of

    rank = int(os.environ.get("VLLM_DP_RANK", "0"))
    rng = np.random.default_rng(3 + rank)
    shared = rng.integers(16, 256, 96)
    requests = []
    for i in range(PROMPTS // (1 + 3 * rank)):
        ids = rng.integers(16, 256, int(rng.integers(1, LONGEST))).astype(np.int32)
        if case.get("shared") and i % 2:
            ids = np.concatenate([shared, ids]).astype(np.int32)
        requests.append(Request(ids, i % DOMAINS, split_of(ids, 0), i))
    return requests


def _trace(
    engine: Any, requests: list[Any], outputs: list[Any], generation: Any, batch: int, capture: bool, folder: Path
) -> dict[str, Any]:
    """A traced batch: every routed token once, in order, with the experts of vLLM's own capture; counts of the run."""
    from moescope.profiler.trace import Trace, TraceRows
    from moescope.profiler.trace_writer import TraceOptions, TraceWriter
    from tests.gpu.shapes import trace_about

    about = trace_about(engine, DOMAINS, len(requests), weights=True)
    with TraceWriter(about, TraceOptions(folder, weights=True)) as writer:
        engine.trace(writer)
        try:
            sums = engine.run(requests, generation, batch).sums.parts[0]
        finally:
            engine.trace(None)
        writer.commit(0)
        writer.finish()
    row = _compare(engine, requests, outputs, sums, capture, {})
    trace = Trace(folder)
    trace.verify()
    rows = TraceRows.concatenate(list(trace.rows()))
    compared = 0
    for request, output in zip(requests, outputs, strict=True):
        own = rows.take(rows.request == request.number)
        cached = output.num_cached_tokens or 0
        routed = request.token_ids.tolist() + list(output.outputs[0].token_ids[:-1])
        assert np.array_equal(own.position, np.arange(cached, len(routed))), "positions of a traced request"
        assert np.array_equal(own.token, routed[cached:]), "token ids of a traced request"
        assert np.array_equal(own.phase, own.position >= len(request.token_ids))
        assert (own.domain == request.domain).all()
        assert (own.split == request.split).all()
        if capture:
            theirs = np.asarray(output.outputs[0].routed_experts)[cached : len(routed)][:, engine.model.layer_indices]
            assert np.array_equal(np.sort(own.experts, -1), np.sort(theirs, -1)), "experts of a traced request"
            compared += own.experts.size
    arrays = sums.arrays()
    found = np.zeros_like(arrays["selection_counts"][:DOMAINS])
    weight = np.zeros(found.shape)
    for slot in range(found.shape[2]):
        at = rows.domain[:, None], rows.phase[:, None], slot, rows.experts[:, slot]
        np.add.at(found, at, 1)
        np.add.at(weight, at, rows.weights[:, slot].astype(np.float64))
    assert np.array_equal(found, arrays["selection_counts"][:DOMAINS]), "counts of a trace"
    assert np.allclose(weight, arrays["weight_sums"][:DOMAINS] / 2**24, rtol=2e-3, atol=1e-2), "weights of a trace"
    return row | {"traced": len(rows), "traced_choices_as_captured": compared}


def _distributions(engine: Any, token_ids: Any) -> dict[str, Any]:
    """The distributions of single tokens sum to 1; a softmax's largest are what its router chooses."""
    seen = engine.distributions(token_ids)
    assert seen is not None
    assert seen.shape[0] == len(engine.model.layers)
    assert np.allclose(seen.sum(axis=-1), 1, atol=1e-4), "distributions of single tokens"
    return {"distributions": seen.shape[1]}


def _compare(
    engine: Any, requests: list[Any], outputs: list[Any], sums: Any, capture: bool, case: dict[str, Any]
) -> dict[str, Any]:
    """Counts against vLLM's own capture, and what must hold without it."""
    arrays = sums.arrays()
    layers = engine.model.layers
    k, experts = layers[0].top_k, layers[0].experts
    tokens = sum(len(r.token_ids) - (o.num_cached_tokens or 0) for r, o in zip(requests, outputs, strict=True))
    tokens += sum(len(o.outputs[0].token_ids) - 1 for o in outputs)
    selection = arrays["selection_counts"][:DOMAINS]
    assert (selection.sum(axis=(0, 1, 3)) == k * tokens).all(), "k·T"
    lengths = sorted({len(o.outputs[0].token_ids) for o in outputs})
    row: dict[str, Any] = {"tokens": int(tokens), "lengths": f"{lengths[0]}-{lengths[-1]}"}
    # all three families renormalise, so a token's weights sum to 1 before the scaling factor
    weight = arrays["weight_sums"][:DOMAINS].sum(axis=(0, 1, 3)) / 2**24
    assert np.allclose(weight, tokens, rtol=1e-5), f"weights sum to {weight}, not {tokens}"
    if "probability_sums" in arrays:
        seen = int(arrays["probability_tokens"].sum())
        mass = arrays["probability_sums"].sum(axis=(0, 1, 3)) / 2**24
        assert np.allclose(mass, seen, rtol=1e-4), f"distributions sum to {mass}, not {seen}"
        row["sampled"] = seen
        if case.get("probabilities") == "all":
            assert seen == tokens
    if "coactivation" in arrays:
        diagonal = np.diagonal(arrays["coactivation"], axis1=1, axis2=2)
        assert np.array_equal(diagonal, selection.sum(axis=(0, 1)))
        assert (arrays["coactivation"].sum(axis=(1, 2)) == k * k * tokens).all()
    if capture:
        mine = np.zeros_like(selection)
        split = np.zeros((16, *selection.shape[:1], *selection.shape[2:]), np.int64)
        for request, output in zip(requests, outputs, strict=True):
            theirs = np.asarray(output.outputs[0].routed_experts)
            length, cached = len(request.token_ids), output.num_cached_tokens or 0
            routed = theirs[: length + len(output.outputs[0].token_ids) - 1]
            for slot, layer in enumerate(layers):
                for phase, part in enumerate((routed[cached:length, layer.index], routed[length:, layer.index])):
                    counts = np.bincount(part.reshape(-1).astype(np.int64), minlength=experts)
                    mine[request.domain, phase, slot] += counts
                    split[request.split, request.domain, slot] += counts
        different = int((mine != selection).sum())
        assert different == 0, f"{different} counts differ from vLLM's own capture"
        assert np.array_equal(split, arrays["split_counts"][:, :DOMAINS])
        row["captured"] = int(mine.sum())
    return row


def _with_nan(engine: Any, error: type[Exception]) -> dict[str, Any]:
    """A NaN in one layer's router is found, by the name of the layer."""
    from moescope.profiler.engine import Generation

    victim = engine.model.layers[1].index
    requests = _requests({})
    engine.run(requests, Generation(4, 1.0, 7), 0)
    engine.llm.collective_rpc(_poison, args=(victim,))
    try:
        engine.run(requests, Generation(4, 1.0, 7), 1)
    except error as found:
        text = str(found)
        assert f"layer {victim}" in text, text
        return {"ok": True, "said": text}
    raise AssertionError("NaN scores went unnoticed")


def _poison(worker: Any, victim: int) -> None:
    for name, module in worker.model_runner.get_model().named_modules():
        if name.endswith((f"layers.{victim}.mlp.gate", f"layers.{victim}.block_sparse_moe.gate")):
            module.weight.data.fill_(float("nan"))


def _start(name: str, limit: float) -> dict[str, Any]:
    case = (CASES | PARALLEL)[name]
    environment = os.environ | case.get("env", {})
    if "runner" in case:
        environment["VLLM_USE_V2_MODEL_RUNNER"] = str(int(case["runner"] == "v2"))
    environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    replicas = case.get("replicas", 1)
    if replicas == 1:
        return _run(name, environment, limit)
    port = _free_port()
    with concurrent.futures.ThreadPoolExecutor(replicas) as pool:
        rows = list(
            pool.map(
                lambda rank: _run(
                    name,
                    environment
                    | {
                        "VLLM_DP_RANK": str(rank),
                        "VLLM_DP_RANK_LOCAL": str(rank),
                        "VLLM_DP_SIZE": str(replicas),
                        "VLLM_DP_MASTER_IP": "127.0.0.1",
                        "VLLM_DP_MASTER_PORT": str(port),
                    },
                    limit,
                    f"-{rank}",
                ),
                range(replicas),
            )
        )
    return {"case": name, "ok": all(row.get("ok") for row in rows), "ranks": rows}


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _run(name: str, environment: dict[str, str], limit: float, suffix: str = "") -> dict[str, Any]:
    try:
        run = subprocess.run(
            [sys.executable, "-m", "tests.gpu.regimes", "--one", name],
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"case": name, "ok": False, "error": f"took longer than {limit:.0f} s"}
    rows = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode or not rows:
        tail = (run.stdout + run.stderr).strip().splitlines()[-60:]
        logs = environment.get("MOESCOPE_TEST_LOGS")
        if logs:
            Path(logs, f"{name}{suffix}.log").write_text(run.stdout[-20000:] + run.stderr[-30000:])
        errors = [line for line in tail if "Error" in line or "error" in line]
        return {"case": name, "ok": False, "error": (errors or tail or ["no output"])[-1][-300:]}
    return dict(json.loads(rows[-1]))


def main() -> None:
    """Run cases and print their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--one", action="store_true", help="run the one case here")
    parser.add_argument("--parallel", type=int, default=1, help="GPUs")
    parser.add_argument("--jobs", type=int, default=4, help="engines at a time")
    parser.add_argument("--also", nargs="*", default=[], help="further cases")
    parser.add_argument("--logs", help="folder for the output of cases that fail")
    parser.add_argument("--limit", type=float, default=280, help="seconds a case may take")
    options = parser.parse_args()
    if options.one:
        name = options.names[0]
        print(json.dumps(run_case(name, (CASES | PARALLEL)[name])), flush=True)
        return
    names = (options.names or list(PARALLEL if options.parallel > 1 else CASES)) + options.also
    if options.logs:
        os.environ["MOESCOPE_TEST_LOGS"] = options.logs
    start: Callable[[str], dict[str, Any]] = lambda name: _start(name, options.limit)  # noqa: E731
    print(json.dumps({"vllm": vllm_version(), "cases": len(names)}), flush=True)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        rows = []
        for row in pool.map(start, names):
            rows.append(row)
            print(json.dumps(row), flush=True)
    failed = [row["case"] for row in rows if not row.get("ok")]
    skipped = [row["case"] for row in rows if row.get("not_run")]
    print(
        f"{len(rows) - len(failed) - len(skipped)} of {len(rows)} cases hold; failed: {', '.join(failed) or 'none'}; "
        f"not run: {', '.join(skipped) or 'none'}"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
