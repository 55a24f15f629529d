"""What recording costs on a CPU: the same forwards with and without it, in pairs, in one process.

A random-weight Qwen3-MoE with the layers of Qwen3-30B-A3B, but few of them. In each repetition every provider runs
once, in random order, on the same batch; the figure is the ratio of its CPU time (all threads) to that of the same
forward without recording.

    python -m benchmarks.recording_cost [--quick] [--json FILE] [--repetitions N]
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.adapters.transformers import TransformersEngine
from moescope.adapters.transformers_hooks import DECODE, Rows, Watch
from moescope.adapters.transformers_trace import BatchTrace
from moescope.benchmarks.rows import Host, OtherLoad, Row, add_options, make_row, report, this_host
from moescope.benchmarks.traces import InTracing
from moescope.profiler.engine import Generation, Request
from moescope.profiler.profile import SPLITS, RunInfo
from moescope.profiler.recorder import GroupSums, Recorder
from moescope.profiler.run import timestamp
from moescope.profiler.trace import Trace, TraceAbout
from moescope.profiler.trace_writer import TraceOptions, TraceWriter

OFF: Final = "off"
#: What is recorded by each provider: full distributions, pairs of experts, a trace of every token.
PROVIDERS: Final[Mapping[str, tuple[bool, bool, bool]]] = {
    "counts": (False, False, False),
    "counts+coactivation": (False, True, False),
    "counts+trace": (False, False, True),
    "counts+probabilities": (True, False, False),
    "counts+probabilities+coactivation": (True, True, False),
}
#: The provider that the goal is set for, and how much CPU time it may add.
GOAL_PROVIDER: Final = "counts+probabilities"
GOAL: Final = 1.03

EXPERTS: Final = 128
TOP_K: Final = 8
VOCABULARY: Final = 1024
PROMPT_TOKENS: Final = 512
DECODE_BATCH: Final = 16
DECODE_STEPS: Final = 8
_DEVIATION: Final = 0.02


@dataclass(frozen=True, slots=True)
class Case:
    """Something to run with and without recording.

    Attributes:
        name: For the table.
        tokens: Tokens that count.
        plain: Runs it without recording; told whether to return the router logits of each forward, (T, E) by layer.
        record: Runs it with recording, and with tracing if there is a writer.
    """

    name: str
    tokens: int
    plain: Callable[[bool], list[Sequence[Tensor]]]
    record: Callable[[TransformersEngine, TraceWriter | None], GroupSums]


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one provider, seconds.

    Attributes:
        cpu: CPU time of the process, all threads.
        wall: Time that passed.
        inside: CPU time inside the recorder's own methods and, with a trace, those of tracing; 0 without recording.
    """

    cpu: float
    wall: float
    inside: float


class Stopwatch:
    """Adds up the CPU time inside a recorder's methods; what remains of the cost is in the hooks around them."""

    METHODS: Final = ("start", "begin", "stage", "commit", "drain")

    def __init__(self, recorder: Recorder) -> None:
        self.seconds = 0.0
        self._depth = 0
        for name in self.METHODS:
            setattr(recorder, name, self._timed(getattr(recorder, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:  # `drain` calls `start`
                    self.seconds += time.process_time() - start

        return timed


@dataclass(frozen=True, slots=True)
class Provider:
    """What records.

    Attributes:
        engine: The engine.
        stopwatch: The clock in its recorder.
        writer: What it writes a trace with; None: it writes none.
        folder: Where to.
        batches: Numbers of the batches to come.
    """

    engine: TransformersEngine
    stopwatch: Stopwatch
    writer: TraceWriter | None
    folder: Path
    batches: Iterator[int] = field(default_factory=itertools.count)

    def record(self, case: Case) -> GroupSums:
        """Run a case; what is traced is handed over, and its writing goes on meanwhile, as in a run."""
        sums = case.record(self.engine, self.writer)
        if self.writer is not None:
            self.writer.commit(next(self.batches))
        return sums

    def timed(self, case: Case) -> float:
        """Run a case; CPU seconds inside recorder and tracing."""
        self.stopwatch.seconds = 0.0
        with InTracing() if self.writer is not None else contextlib.nullcontext() as tracing:
            self.record(case)
        return self.stopwatch.seconds + (0.0 if tracing is None else tracing.seconds)

    def traced_counts(self, tokens: int) -> NDArray[np.int64]:
        """int64 (L, E), the experts of the last so many tokens of the trace."""
        assert self.writer is not None
        self.writer.flush()
        trace = Trace(self.folder)
        experts = np.concatenate([rows.experts for rows in trace.rows(trace.tokens - tokens)])
        return np.stack([np.bincount(layer.reshape(-1), minlength=EXPERTS) for layer in experts.swapaxes(0, 1)])


def make_provider(model: Any, name: str, folder: Path, stack: contextlib.ExitStack) -> Provider:
    """One of `PROVIDERS`; a trace is written into `folder` until `stack` is left."""
    probabilities, coactivation, traces = PROVIDERS[name]
    engine = TransformersEngine(model, name="random", probabilities=probabilities, coactivation=coactivation)
    writer = None
    if traces:
        run = RunInfo("benchmark", timestamp(), engine.info, 0, 0, "", {"seed": 0})
        writer = stack.enter_context(TraceWriter(TraceAbout(engine.model, ("all",), run, "0"), TraceOptions(folder)))
    return Provider(engine, Stopwatch(engine.recorder), writer, folder)


def build_model(layers: int) -> Any:
    """A Qwen3-MoE with the layers of Qwen3-30B-A3B, float32, random weights, `layers` of them."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(0.0, _DEVIATION)
            else:  # of the same deviation, and made six times as fast
                parameter.uniform_(-(3**0.5) * _DEVIATION, 3**0.5 * _DEVIATION)
    return model


def _requests(count: int, seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, VOCABULARY, (count, PROMPT_TOKENS), dtype=np.int32)
    return [Request(ids, domain=0, split=i % SPLITS, number=i) for i, ids in enumerate(prompts)]


def prefill_case(model: Any, prompts: int) -> Case:
    """Prompts through the body in one batch, as `TransformersEngine.run` does it."""
    requests = _requests(prompts, seed=prompts)
    ids = torch.from_numpy(np.stack([request.token_ids for request in requests]).astype(np.int64))

    def plain(logits: bool) -> list[Sequence[Tensor]]:
        extra = {"output_router_logits": True} if logits else {}
        with torch.inference_mode():
            output = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **extra)
        return [output.router_logits] if logits else []

    def record(engine: TransformersEngine, writer: TraceWriter | None) -> GroupSums:
        engine.trace(writer)
        return engine.run(requests, Generation(), 0).sums

    return Case(f"prefill {prompts} × {PROMPT_TOKENS}", ids.numel(), plain, record)


def decode_case(model: Any, steps: int) -> Case:
    """Steps of a batch after a filled cache, as `generate` drives the body; the cache holds random keys and values."""
    from transformers import DynamicCache

    config = model.config
    cache = DynamicCache(config=config)
    generator = torch.Generator().manual_seed(1)
    shape = (DECODE_BATCH, config.num_key_value_heads, PROMPT_TOKENS, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), layer)
    ids = torch.randint(VOCABULARY, (steps, DECODE_BATCH, 1), generator=generator)
    requests = _requests(DECODE_BATCH, seed=DECODE_BATCH)
    owners = tuple((request.domain, request.split) for request in requests)
    prompt = torch.ones(DECODE_BATCH, PROMPT_TOKENS, dtype=torch.bool)
    going_on = torch.zeros(DECODE_BATCH, dtype=torch.bool)

    def forwards(logits: bool = False, after: Callable[[], None] | None = None) -> list[Sequence[Tensor]]:
        extra = {"output_router_logits": True} if logits else {}
        seen = []
        if (grown := cache.get_seq_length() - PROMPT_TOKENS) > 0:
            cache.crop(-grown)
        with torch.inference_mode():
            for step in range(steps):
                mask = torch.ones(DECODE_BATCH, PROMPT_TOKENS + step + 1, dtype=torch.int64)
                output = model.model(ids[step], mask, None, cache, use_cache=True, **extra)
                if logits:
                    seen.append(output.router_logits)
                if after is not None:
                    after()
        return seen

    def record(engine: TransformersEngine, writer: TraceWriter | None) -> GroupSums:
        rows = Rows(owners, PROMPT_TOKENS, prompt)
        hooks: dict[str, Any] = {}
        if writer is not None:
            traced = BatchTrace(writer, engine.recorder, requests, prompt, steps + 1)
            hooks = {"selected": traced.select, "after": traced.append}
        with torch.inference_mode(), Watch(model, engine.binding, engine.recorder, **hooks) as watch:
            watch.expect(rows)
            forwards(after=lambda: rows.finish_tokens(going_on))
        groups = rows.groups()
        rows_of = {split: sum(owner[1] == split for owner in owners) for split in range(SPLITS)}
        return engine.recorder.drain([rows_of[g.split] * steps * (g.phase == DECODE) for g in groups])

    return Case(f"decode {DECODE_BATCH}, cache {PROMPT_TOKENS}", DECODE_BATCH * steps, forwards, record)


def check_case(case: Case, providers: Mapping[str, Provider]) -> None:
    """Assert, before anything is timed, that every provider counts what the router's logits say.

    Raises:
        AssertionError: Counts differ between providers or from a top-k of the logits, or do not sum to k·T.
    """
    expected = _reference_counts(case)
    assert (expected.sum(axis=1) == TOP_K * case.tokens).all()
    weights: list[NDArray[np.int64]] = []
    for name, provider in providers.items():
        sums = provider.record(case)
        phases = {g.phase for g, counts in zip(sums.groups, sums.selection, strict=True) if counts.any()}
        assert len(phases) == 1, f"{case.name}: {name} counts in phases {phases}"
        assert np.array_equal(sums.selection.sum(axis=0), expected), f"{case.name}: {name} miscounts"
        weights.append(sums.weight)
        assert np.array_equal(weights[0], sums.weight), f"{case.name}: {name} sums other weights"
        if sums.probability is not None and sums.probability_tokens is not None:
            assert int(sums.probability_tokens.sum()) == case.tokens
            shares = sums.probability.sum(axis=(0, 2)) / case.tokens / 2**24  # by layer
            assert np.allclose(shares, 1.0, atol=1e-5), f"{case.name}: distributions sum to {shares}"
        if sums.coactivation is not None:
            assert np.array_equal(np.diagonal(sums.coactivation, axis1=1, axis2=2), expected)
        if provider.writer is not None:
            assert np.array_equal(provider.traced_counts(case.tokens), expected), f"{case.name}: {name} traces others"


def _reference_counts(case: Case) -> NDArray[np.int64]:
    """int64 (L, E), chosen experts from the logits that the model itself returns."""
    layers: list[NDArray[np.int64]] = []
    for forward in case.plain(True):
        chosen = [logits.float().softmax(dim=-1).topk(TOP_K, dim=-1).indices.reshape(-1) for logits in forward]
        layers.append(np.stack([np.bincount(ids.numpy(), minlength=EXPERTS) for ids in chosen]))
    return np.sum(layers, axis=0)


def measure(
    case: Case, providers: Mapping[str, Provider], repetitions: int, rng: np.random.Generator
) -> dict[str, list[Sample]]:
    """Run every provider once in each repetition, in random order."""
    samples: dict[str, list[Sample]] = {name: [] for name in (OFF, *providers)}
    for repetition in range(repetitions):
        for name in rng.permutation(list(samples)):
            wall, cpu = time.perf_counter(), time.process_time()
            inside = 0.0
            if name == OFF:
                case.plain(False)
            else:
                inside = providers[name].timed(case)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            samples[name].append(Sample(cpu, wall, inside))
        print(f"\r{case.name}: {repetition + 1} of {repetitions}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return samples


def case_rows(
    case: Case, samples: Mapping[str, Sequence[Sample]], layers: int, other_load: float, host: Host
) -> list[Row]:
    """Rows of one case: the time without recording, and for each provider its ratios to that, pair by pair."""

    def add(provider: str, metric: str, unit: str, values: Sequence[float]) -> None:
        rows.append(make_row(case.name, provider, metric, unit, values, other_load, host))

    rows: list[Row] = []
    off = samples[OFF]
    add(OFF, "CPU time", "s", [sample.cpu for sample in off])
    add(OFF, "wall time", "s", [sample.wall for sample in off])
    for provider, on in samples.items():
        if provider == OFF:
            continue
        pairs = list(zip(on, off, strict=True))
        add(provider, "CPU time", "× off", [a.cpu / b.cpu for a, b in pairs])
        add(provider, "wall time", "× off", [a.wall / b.wall for a, b in pairs])
        add(provider, "CPU in recorder", "of off", [a.inside / b.cpu for a, b in pairs])
        add(provider, "CPU in recorder, a token and layer", "µs", [a.inside / case.tokens / layers * 1e6 for a in on])
    return rows


def chosen_cases(model: Any, providers: Mapping[str, Provider], options: argparse.Namespace) -> Iterator[Case]:
    """The cases that the command line asks for, one made after the other."""
    if options.quick:
        yield prefill_case(model, 1)
        yield decode_case(model, 4)
        return
    # as many prompts as the engine itself puts into a batch
    lengths = np.full(1024, PROMPT_TOKENS, dtype=np.int64)
    batch = providers[GOAL_PROVIDER].engine.plan(lengths, Generation())[0]
    makers: dict[str, Callable[[], Case]] = {
        "batch": lambda: prefill_case(model, len(batch)),
        "one": lambda: prefill_case(model, 1),
        "decode": lambda: decode_case(model, DECODE_STEPS),
    }
    for name in options.cases.split(","):
        yield makers[name]()


def measured(case: Case, providers: Mapping[str, Provider], layers: int, repetitions: int) -> list[Row]:
    """Check a case, time it, and sum it up."""
    check_case(case, providers)
    with OtherLoad() as load:
        samples = measure(case, providers, repetitions, np.random.default_rng(0))
    return case_rows(case, samples, layers, load.cores, this_host())


def print_goal(rows: Sequence[Row]) -> None:
    """Say for each case whether full distributions stay within the goal."""
    print(f"\nGoal: {GOAL_PROVIDER} takes at most {GOAL - 1:.0%} more CPU time than {OFF}.")
    for row in rows:
        if (row.provider, row.metric, row.unit) != (GOAL_PROVIDER, "CPU time", "× off"):
            continue
        if row.bound is None:
            print(f"- {row.case}: {row.p50 - 1:+.2%} once: open; repeat more often")
            continue
        lower = 2 * row.mean - row.bound
        verdict = "met" if row.bound <= GOAL else "missed" if lower > GOAL else "open; repeat more often"
        print(f"- {row.case}: median {row.p50 - 1:+.2%}, mean below {row.bound - 1:+.2%} (95%): {verdict}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, repetitions=20)
    parser.add_argument("--layers", type=int, default=2, metavar="L", help="2.5 GB each; default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a kernel; default: torch's own choice")
    parser.add_argument("--cases", default="batch,one,decode", metavar="LIST", help="some of %(default)s")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    layers, repetitions = options.layers, options.repetitions
    if options.quick:
        layers, repetitions = 1, min(repetitions, 3)
    model = build_model(layers)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        providers = {name: make_provider(model, name, Path(folder), stack) for name in PROVIDERS}
        cases = chosen_cases(model, providers, options)
        rows = [row for case in cases for row in measured(case, providers, layers, repetitions)]
    report(rows, options.json)
    print_goal(rows)


if __name__ == "__main__":
    main()
