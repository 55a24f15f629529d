"""Other tools beside moescope, on the same model and tokens: first whether their numbers are right, then their speed.

The models are real ones in transformers: the embedded demo (Qwen3-MoE, trained) with its own prompts, and an OLMoE with
random weights. Every tool hooks the same forwards and gets the settings that suit it best. What it reports is held
against an independent count: the top-k of the router logits that the model itself returns.

    pip install --target DIR --no-deps plumb-moe==0.1.0 moewatch==0.1.0
    PYTHONPATH=DIR python -m benchmarks.peers [--quick] [--json FILE] [--repetitions N]

A tool that is not installed gets a row that says so. The tool that moescope descends from does not run in transformers
5; its algorithm is written here from its description, on routers that it would not find itself.
"""

import argparse
import importlib.metadata
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import moescope
from moescope.benchmarks.rows import OtherLoad, Row, absent_row, add_options, make_row, report, this_host
from moescope.profiler.demo import model_path, prompts_path
from moescope.stats.activation import mean_probability
from moescope.stats.correlation import layer_correlation

BATCH: Final = 8
#: Tokens of a prompt where all are equally long, so that tools which count padding meet none.
LENGTH: Final = 128
PROMPTS: Final = 32
QUICK_PROMPTS: Final = 16
#: Layers of the demo whose expert use is alike, at this distance.
PERIOD: Final = 4
OFF: Final = "off"

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Found:
    """What a tool reports.

    Attributes:
        counts: float64 (L, E), selections by expert; None where it does not count.
        use: float64 (L, E), what it would correlate: counts, or mean probabilities.
        kept: Bytes that it holds of the run.
        correlate: Its own layer correlation, float64 (L, L); None where it has none.
    """

    counts: NDArray[np.float64] | None
    use: NDArray[np.float64]
    kept: int
    correlate: Callable[[], NDArray[np.float64]] | None = None


Tool = Callable[[Any, Sequence[Batch]], Found | None]


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and tokens for it.

    Attributes:
        name: For the table.
        model: In transformers, float32.
        batches: What its forwards are given.
        timed: Measure speed, too.
        delta: Distance between layers whose mean r is shown; 0: none.
    """

    name: str
    model: Any
    batches: tuple[Batch, ...]
    timed: bool
    delta: int = 0

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(int(batch["attention_mask"].sum()) for batch in self.batches)


def forwards(model: Any, batches: Sequence[Batch]) -> None:
    """What every tool watches: the body of the model over all batches."""
    with torch.inference_mode():
        for batch in batches:
            model.model(**batch, use_cache=False)


def routers(model: Any) -> dict[str, nn.Module]:
    """The router of each layer by its name in the model's body, in model order."""
    return {name: module for name, module in model.model.named_modules() if name.endswith(".mlp.gate")}


def independent(case: Case) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Selections (L, E) and mean probabilities (L, E) by the logits that the model returns; padding left out."""
    k, layers = case.model.config.num_experts_per_tok, case.model.config.num_hidden_layers
    experts = case.model.config.num_experts
    counts, sums = np.zeros((layers, experts)), np.zeros((layers, experts))
    for batch in case.batches:
        with torch.inference_mode():
            output = case.model.model(**batch, use_cache=False, output_router_logits=True)
        real = batch["attention_mask"].reshape(-1).bool()
        for layer, logits in enumerate(output.router_logits):
            shares = logits.reshape(-1, experts)[real].float().softmax(dim=-1)
            counts[layer] += np.bincount(shares.topk(k).indices.reshape(-1).numpy(), minlength=experts)
            sums[layer] += shares.double().sum(dim=0).numpy()
    return counts, sums / case.tokens


def run_off(model: Any, batches: Sequence[Batch]) -> None:
    """Forwards alone."""
    forwards(model, batches)


def run_moescope(model: Any, batches: Sequence[Batch], *, probabilities: bool) -> Found:
    """`moescope.record` around the forwards, and a checked profile."""
    with moescope.record(model, probabilities=probabilities, name="peers") as recording:
        forwards(model, batches)
    profile = recording.profile
    info = profile.model
    counts = profile.selection_counts.sum(axis=(0, 1)).astype(np.float64)
    kept = sum(array.nbytes for array in profile.arrays().values())
    if profile.probability_sums is None:
        return Found(counts, counts, kept)
    activation = mean_probability(
        profile.probability_sums.sum(axis=(0, 1)), profile.tokens, info.top_k, info.experts, info.layer_indices
    )
    return Found(counts, activation.matrix, kept, lambda: layer_correlation(activation).pairwise)


def run_old_tool(model: Any, batches: Sequence[Batch]) -> Found:
    """The way of moe_expert_activation_analysis: keep each token's softmax, and average it for each pair of layers."""
    kept: dict[str, list[Tensor]] = {name: [] for name in routers(model)}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept[name].append(torch.softmax(output[0].float(), dim=-1).detach().cpu())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in routers(model).items()]
    try:
        forwards(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    tokens = [torch.cat(parts).numpy() for parts in kept.values()]
    use = np.stack([layer.mean(axis=0) for layer in tokens]).astype(np.float64)
    size = sum(part.nbytes for parts in kept.values() for part in parts)

    def correlate() -> NDArray[np.float64]:
        pairwise = np.eye(len(tokens))
        for i in range(len(tokens)):
            for j in range(i + 1, len(tokens)):
                pairwise[i, j] = pairwise[j, i] = np.corrcoef(tokens[i].mean(axis=0), tokens[j].mean(axis=0))[0, 1]
        return pairwise

    return Found(None, use, size, correlate)


def run_moewatch(model: Any, batches: Sequence[Batch]) -> Found:
    """`moewatch.audit` of every step, told the routers' names, with a window that holds all steps."""
    names = list(routers(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that every step costs time, and that so few say little
        import moewatch

        config = moewatch.WatchConfig(
            sample_every=1,
            window_steps=len(batches),
            ring_buffer_capacity=len(batches),
            router_modules=names,
            output=moewatch.OutputMode.SILENT,
        )
        audit = moewatch.audit(model.model, batches, steps=len(batches), config=config, verbose=False)
    stats = [audit.layer_stats(name) for name in names]
    counts = np.stack([layer.expert_counts.numpy() for layer in stats]).astype(np.float64)
    return Found(counts, counts, sum(part.nbytes for layer in stats for part in layer.raw_logits_window))


def run_plumb(model: Any, batches: Sequence[Batch]) -> Found:
    """plumb-moe's hooks, told the model's k, with a window that no expert fills; until its queue is empty."""
    from plumb.counter import ActivationCounter
    from plumb.hook import ProfilingHooks

    config = model.config
    counter = ActivationCounter(window_size=1 << 40)
    with ProfilingHooks(counter) as hooks:
        hooks.attach(model, top_k=config.num_experts_per_tok)
        forwards(model, batches)
    counts = np.zeros((config.num_hidden_layers, config.num_experts))
    for (layer, expert), count in counter.snapshot().items():
        counts[layer, expert] = count
    return Found(counts, counts, sum(sys.getsizeof(entries) for entries in counter._counts.values()))


#: Tools by the name in the table, and the distribution each comes from, with the package to import.
TOOLS: Final[dict[str, tuple[Tool, str | None]]] = {
    OFF: (run_off, None),
    "moescope, counts": (lambda model, batches: run_moescope(model, batches, probabilities=False), None),
    "moescope, distributions too": (lambda model, batches: run_moescope(model, batches, probabilities=True), None),
    "old tool's algorithm": (run_old_tool, None),
    "moewatch": (run_moewatch, "moewatch"),
    "plumb-moe": (run_plumb, "plumb-moe"),
}


def installed() -> tuple[dict[str, Tool], list[str]]:
    """Tools that can be run here, named with their versions, and the names of those that are not installed."""
    found: dict[str, Tool] = {}
    missing = []
    for name, (tool, distribution) in TOOLS.items():
        try:
            version = f" {importlib.metadata.version(distribution)}" if distribution else ""
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
        else:
            found[name + version] = tool
    return found, missing


def correlations(use: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation over experts of each pair of layers, float64 (L, L); NaN where a layer is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(use)


def check_rows(case: Case, tools: dict[str, Tool]) -> list[Row]:
    """Rows that say whether the tools' numbers are right."""
    host = this_host()
    expected, mean = independent(case)
    rows: list[Row] = []

    def add(provider: str, metric: str, unit: str, value: float) -> None:
        if np.isfinite(value):
            rows.append(make_row(case.name, provider, metric, unit, [value], 0.0, host))
        else:
            rows.append(absent_row(case.name, provider, metric, "not defined", host))

    def add_period(provider: str, r: NDArray[np.float64]) -> None:
        if case.delta:
            add(provider, f"mean r at Δ = {case.delta}", "r", float(np.diagonal(r, case.delta).mean()))

    above = np.triu_indices(len(expected), 1)
    add_period("independent count", correlations(expected))
    for provider, tool in tools.items():
        found = tool(case.model, case.batches)
        if found is None:
            continue
        if found.counts is not None:
            wrong = 100 * np.abs(found.counts - expected).sum() / expected.sum()
            add(provider, "selections counted", "% of those made", 100 * found.counts.sum() / expected.sum())
            add(provider, "selections too few or too many", "% of those made", wrong)
            if provider.startswith("moescope"):
                assert wrong == 0, f"{case.name}: {provider} miscounts"
        right = expected if found.counts is found.use else mean
        r = correlations(found.use)
        add(provider, "largest error of r of two layers", "r", float(np.abs(r - correlations(right))[above].max()))
        add_period(provider, r)
    return rows


def speed_rows(case: Case, tools: dict[str, Tool], repetitions: int) -> list[Row]:
    """Rows of CPU time, each tool once in a repetition, in random order, divided by the forwards alone."""
    taken: dict[str, list[float]] = {name: [] for name in tools}
    analysis: dict[str, list[float]] = {}
    kept: dict[str, int] = {}
    order = random.Random(0)
    with OtherLoad() as load:
        for _ in range(repetitions):
            for name in order.sample(list(tools), len(tools)):
                start = time.process_time()
                found = tools[name](case.model, case.batches)
                taken[name].append(time.process_time() - start)
                if found is None:
                    continue
                kept[name] = found.kept
                if found.correlate is not None:
                    start = time.process_time()
                    found.correlate()
                    analysis.setdefault(name, []).append(1e3 * (time.process_time() - start))
    host = this_host()
    rows = [make_row(case.name, OFF, "CPU time", "s", taken[OFF], load.cores, host)]
    for name, size in kept.items():
        ratios = [a / b for a, b in zip(taken[name], taken[OFF], strict=True)]
        rows.append(make_row(case.name, name, "CPU time", "× off", ratios, load.cores, host))
        rows.append(make_row(case.name, name, "kept of the run", "MB", [size / 1e6], load.cores, host))
    for name, milliseconds in analysis.items():
        rows.append(make_row(case.name, name, "layer correlation", "CPU ms", milliseconds, load.cores, host))
    return rows


def in_batches(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Batch, ...]:
    """Sequences of token ids, padded on the right to the longest of their batch."""
    batches = []
    for start in range(0, len(sequences), BATCH):
        part = [torch.tensor(sequence) for sequence in sequences[start : start + BATCH]]
        ids = nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(sequence) for sequence in part])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return tuple(batches)


def demo_cases(prompts: int) -> list[Case]:
    """The embedded demo: prompts cut to one length, and the same prompts as they are, which takes padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_path("stacked")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    lines = prompts_path().read_text(encoding="utf-8").splitlines()
    encoded = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    long = [ids for ids in encoded if len(ids) >= LENGTH]
    chosen = [long[place] for place in np.linspace(0, len(long) - 1, prompts).astype(int)]  # of all domains
    cut = in_batches([ids[:LENGTH] for ids in chosen], model.config.pad_token_id)
    whole = in_batches(chosen, model.config.pad_token_id)
    share = 1 - sum(map(len, chosen)) / sum(batch["input_ids"].numel() for batch in whole)
    return [
        Case(f"demo (Qwen3-MoE), {prompts} × {LENGTH} tokens", model, cut, timed=True, delta=PERIOD),
        Case(f"demo, the same prompts whole, {share:.0%} padding", model, whole, timed=False, delta=PERIOD),
    ]


def olmoe_case(prompts: int) -> Case:
    """An OLMoE with random weights and spread-out router scores, and random tokens."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=64,
        num_experts_per_tok=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = OlmoeForCausalLM(config).eval()
    for router in routers(model).values():
        nn.init.normal_(router.weight)
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (prompts, LENGTH)).tolist()
    return Case(f"OLMoE (12 × 64, top-8), {prompts} × {LENGTH} tokens", model, in_batches(ids, 0), timed=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, repetitions=10)
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    prompts, repetitions = (QUICK_PROMPTS, 1) if options.quick else (PROMPTS, options.repetitions)
    torch.set_num_threads(1)  # threads that wait for one another take CPU time of their own
    tools, missing = installed()
    rows: list[Row] = []
    for case in (*demo_cases(prompts), olmoe_case(prompts)):
        rows += check_rows(case, tools)  # also what the tools import on their first run
        if case.timed:
            rows += speed_rows(case, tools, repetitions)
    host = this_host()
    rows += [absent_row("–", name, "–", "not installed", host) for name in missing]
    report(rows, options.json)


if __name__ == "__main__":
    main()
