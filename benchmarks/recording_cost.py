"""What recording costs on a CPU: the same forwards with and without it, in pairs, in one process.

A random-weight Qwen3-MoE with the layers of Qwen3-30B-A3B, but few of them. In each repetition every provider runs
once, in random order, on the same batch; the figure is the ratio of its CPU time (all threads) to that of the same
forward without recording.

    python -m benchmarks.recording_cost [--quick] [--json FILE] [--repetitions N]
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.adapters.transformers import TransformersEngine
from moescope.adapters.transformers_hooks import DECODE, Rows, Watch
from moescope.benchmarks.rows import Host, OtherLoad, Row, add_options, make_row, report, this_host
from moescope.profiler.engine import Generation, Request
from moescope.profiler.profile import SPLITS
from moescope.profiler.recorder import GroupSums, Recorder

OFF: Final = "off"
#: What is recorded by each provider: full distributions, pairs of experts.
PROVIDERS: Final[Mapping[str, tuple[bool, bool]]] = {
    "counts": (False, False),
    "counts+probabilities": (True, False),
    "counts+probabilities+coactivation": (True, True),
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
        record: Runs it with recording.
    """

    name: str
    tokens: int
    plain: Callable[[bool], list[Sequence[Tensor]]]
    record: Callable[[TransformersEngine], GroupSums]


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one provider, seconds.

    Attributes:
        cpu: CPU time of the process, all threads.
        wall: Time that passed.
        inside: CPU time inside the recorder's own methods, 0 without recording.
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
    return [Request(ids, domain=0, split=i % SPLITS) for i, ids in enumerate(prompts)]


def prefill_case(model: Any, prompts: int) -> Case:
    """Prompts through the body in one batch, as `TransformersEngine.run` does it."""
    requests = _requests(prompts, seed=prompts)
    ids = torch.from_numpy(np.stack([request.token_ids for request in requests]).astype(np.int64))

    def plain(logits: bool) -> list[Sequence[Tensor]]:
        extra = {"output_router_logits": True} if logits else {}
        with torch.inference_mode():
            output = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **extra)
        return [output.router_logits] if logits else []

    def record(engine: TransformersEngine) -> GroupSums:
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
    owners = tuple((0, row % SPLITS) for row in range(DECODE_BATCH))
    going_on = torch.zeros(DECODE_BATCH, dtype=torch.bool)

    def forwards(logits: bool = False, after: Callable[[], None] | None = None) -> list[Sequence[Tensor]]:
        extra = {"output_router_logits": True} if logits else {}
        seen = []
        if (grown := cache.get_seq_length() - PROMPT_TOKENS) > 0:
            cache.crop(-grown)
        with torch.inference_mode():
            for step in range(steps):
                mask = torch.ones(DECODE_BATCH, PROMPT_TOKENS + step + 1, dtype=torch.int64)
                output = model.model(
                    input_ids=ids[step], attention_mask=mask, past_key_values=cache, use_cache=True, **extra
                )
                if logits:
                    seen.append(output.router_logits)
                if after is not None:
                    after()
        return seen

    def record(engine: TransformersEngine) -> GroupSums:
        rows = Rows(owners, PROMPT_TOKENS, torch.ones(DECODE_BATCH, PROMPT_TOKENS, dtype=torch.bool))
        with torch.inference_mode(), Watch(model, engine.binding, engine.recorder) as watch:
            watch.expect(rows)
            forwards(after=lambda: rows.finish_tokens(going_on))
        groups = rows.groups()
        rows_of = {split: sum(owner[1] == split for owner in owners) for split in range(SPLITS)}
        return engine.recorder.drain([rows_of[g.split] * steps * (g.phase == DECODE) for g in groups])

    return Case(f"decode {DECODE_BATCH}, cache {PROMPT_TOKENS}", DECODE_BATCH * steps, forwards, record)


def check_case(case: Case, engines: Mapping[str, TransformersEngine]) -> None:
    """Assert, before anything is timed, that every provider counts what the router's logits say.

    Raises:
        AssertionError: Counts differ between providers or from a top-k of the logits, or do not sum to k·T.
    """
    expected = _reference_counts(case)
    assert (expected.sum(axis=1) == TOP_K * case.tokens).all()
    weights: list[NDArray[np.int64]] = []
    for name, engine in engines.items():
        sums = case.record(engine)
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


def _reference_counts(case: Case) -> NDArray[np.int64]:
    """int64 (L, E), chosen experts from the logits that the model itself returns."""
    layers: list[NDArray[np.int64]] = []
    for forward in case.plain(True):
        chosen = [logits.float().softmax(dim=-1).topk(TOP_K, dim=-1).indices.reshape(-1) for logits in forward]
        layers.append(np.stack([np.bincount(ids.numpy(), minlength=EXPERTS) for ids in chosen]))
    return np.sum(layers, axis=0)


def measure(
    case: Case,
    engines: Mapping[str, TransformersEngine],
    stopwatches: Mapping[str, Stopwatch],
    repetitions: int,
    rng: np.random.Generator,
) -> dict[str, list[Sample]]:
    """Run every provider once in each repetition, in random order."""
    samples: dict[str, list[Sample]] = {name: [] for name in (OFF, *engines)}
    for repetition in range(repetitions):
        for name in rng.permutation(list(samples)):
            wall, cpu = time.perf_counter(), time.process_time()
            if name == OFF:
                case.plain(False)
            else:
                stopwatches[name].seconds = 0.0
                case.record(engines[name])
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            samples[name].append(Sample(cpu, wall, stopwatches[name].seconds if name != OFF else 0.0))
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
        add(provider, "CPU in recorder", "µs a token and layer", [a.inside / case.tokens / layers * 1e6 for a in on])
    return rows


def print_goal(rows: Sequence[Row]) -> None:
    """Say for each case whether full distributions stay within the goal."""
    print(f"\nGoal: {GOAL_PROVIDER} takes at most {GOAL - 1:.0%} more CPU time than {OFF}.")
    for row in rows:
        if (row.provider, row.metric, row.unit) == (GOAL_PROVIDER, "CPU time", "× off"):
            upper = row.mean if row.bound is None else row.bound
            lower = 2 * row.mean - upper
            verdict = "met" if upper <= GOAL else "missed" if lower > GOAL else "open; repeat more often"
            print(f"- {row.case}: median {row.p50 - 1:+.2%}, mean below {upper - 1:+.2%} (95%): {verdict}")


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
    rng = np.random.default_rng(0)
    layers = 1 if options.quick else options.layers
    model = build_model(layers)
    engines = {
        name: TransformersEngine(model, probabilities=probabilities, coactivation=coactivation)
        for name, (probabilities, coactivation) in PROVIDERS.items()
    }
    stopwatches = {name: Stopwatch(engine.recorder) for name, engine in engines.items()}
    # as many prompts as the engine itself puts into a batch
    batch = engines[GOAL_PROVIDER].plan(np.full(1024, PROMPT_TOKENS, dtype=np.int64), Generation())[0]
    if options.quick:
        cases, repetitions = [prefill_case(model, 1), decode_case(model, 4)], min(options.repetitions, 3)
    else:
        makers: dict[str, Callable[[], Case]] = {
            "batch": lambda: prefill_case(model, len(batch)),
            "one": lambda: prefill_case(model, 1),
            "decode": lambda: decode_case(model, DECODE_STEPS),
        }
        cases = [makers[name]() for name in options.cases.split(",")]
        repetitions = options.repetitions
    host = this_host()
    rows: list[Row] = []
    for case in cases:
        check_case(case, engines)
        with OtherLoad() as load:
            samples = measure(case, engines, stopwatches, repetitions, rng)
        rows += case_rows(case, samples, layers, load.cores, host)
    report(rows, options.json)
    print_goal(rows)


if __name__ == "__main__":
    main()
