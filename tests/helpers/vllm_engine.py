"""A recording vLLM engine on the CPU, whose outputs are kept for the independent count."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import reference
from vllm_models import COMMON_ARGS, ENGINE_ARGS, save_checkpoint

from moescope.adapters.vllm import VllmEngine
from moescope.profiler.engine import Generation, Request
from moescope.profiler.profile import RunInfo
from moescope.profiler.trace import Trace, TraceAbout, TraceRows
from moescope.profiler.trace_writer import TraceOptions, TraceWriter

SCALES = {"qwen3_moe": 1.0, "deepseek_v3": 2.5}


class Kept:
    """An engine, the model it runs as transformers has it, and what came out of its last call."""

    def __init__(self, family: str, folder: Path, model: Any, **options: Any) -> None:
        self.family = family
        self.model = model
        self.outputs: list[Any] = []
        arguments = {**COMMON_ARGS, **ENGINE_ARGS[family], **options.pop("engine_args", {})}
        options = {"dtype": "float32", "probabilities": "all", "coactivation": True, **options}
        self.engine = VllmEngine(str(folder), engine_args=arguments, **options)
        generate = self.engine.llm.generate

        def keep(*args: Any, **kwargs: Any) -> Any:
            self.outputs = generate(*args, **kwargs)
            return self.outputs

        self.engine.llm.generate = keep

    def requests(self, count: int, seed: int, longest: int = 150, domains: int = 3) -> list[Request]:
        """Random prompts of 1 to `longest` tokens."""
        rng = np.random.default_rng(seed)
        made = []
        for i in range(count):
            ids = rng.integers(6, 128, int(rng.integers(1, longest))).astype(np.int32)
            made.append(Request(ids, i % domains, reference.split(ids.tolist())))
        return made

    def reference(self, requests: list[Request], domains: int = 3) -> reference.Count:
        """The count of the same token ids in transformers, prompt by prompt."""
        return reference.count(
            self.model,
            [
                (request.token_ids.tolist(), list(output.outputs[0].token_ids), request.domain)
                for request, output in zip(requests, self.outputs, strict=True)
            ],
            domains=domains,
            experts=self.engine.model.experts[0],
            scoring=self.engine.model.scoring,
            scale=SCALES[self.family],
        )

    def assert_distributions_equal(self, token_ids: np.ndarray, least: int = 1) -> int:
        """The engine's distributions of a prompt are transformers' for the same ids; returns how many tokens it saw."""
        seen = self.engine.distributions(token_ids)
        assert seen is not None
        routing = reference.route(self.model, token_ids.tolist())
        assert list(self.engine.model.layer_indices) == sorted(routing.logits)
        assert seen.dtype == np.float32
        assert least <= seen.shape[1] <= len(token_ids)
        for slot, layer in enumerate(sorted(routing.logits)):
            expected = reference.distribution(routing.logits[layer], self.engine.model.scoring)
            np.testing.assert_allclose(seen[slot], expected[: seen.shape[1]], rtol=1e-4, atol=1e-5)
        return seen.shape[1]

    def run_traced(self, requests: list[Request], generation: Generation, folder: Path, **options: Any) -> Trace:
        """Run one batch into a trace, which must hold each token's experts as transformers chooses them."""
        requests = [replace(request, number=i) for i, request in enumerate(requests)]
        run = RunInfo(
            "run", "2026-01-01T00:00:00", self.engine.info, 0, len(requests), "00", {"seed": 0}, complete=False
        )
        domains = tuple(f"{i:02}" for i in range(1 + max(request.domain for request in requests)))
        options = {"weights": True, **options}
        about = TraceAbout(self.engine.model, domains, run, "0", options["weights"], options.get("sample", 1.0))
        with TraceWriter(about, TraceOptions(folder, **options)) as writer:
            self.engine.trace(writer)
            try:
                self.engine.run(requests, generation, 0)
            finally:
                self.engine.trace(None)
            writer.commit(0)
            writer.finish()
        trace = Trace(folder)
        trace.verify()
        self.assert_rows(trace, requests)
        return trace

    def assert_rows(self, trace: Trace, requests: list[Request]) -> None:
        """Every traced request is there with each routed token once, in order, and nothing else is."""
        layers = self.engine.model.layer_indices
        rows = TraceRows.concatenate(list(trace.rows()))
        for request, output in zip(requests, self.outputs, strict=True):
            own = rows.take(rows.request == request.number)
            if not len(own):
                continue
            prompt, cached = request.token_ids.tolist(), int(output.num_cached_tokens or 0)
            routed = prompt + list(output.outputs[0].token_ids[:-1])
            np.testing.assert_array_equal(own.position, np.arange(cached, len(routed)))
            np.testing.assert_array_equal(own.token, routed[cached:])
            np.testing.assert_array_equal(own.phase, own.position >= len(prompt))
            assert (own.domain == request.domain).all()
            assert (own.split == request.split).all()
            routing = reference.route(self.model, routed)
            for slot, layer in enumerate(layers):
                order = np.argsort(own.experts[:, slot], axis=1)
                expected = np.argsort(routing.ids[layer][cached:], axis=1)
                np.testing.assert_array_equal(
                    np.take_along_axis(own.experts[:, slot], order, 1),
                    np.take_along_axis(routing.ids[layer][cached:], expected, 1),
                )
                if own.weights is not None:
                    np.testing.assert_allclose(
                        np.take_along_axis(own.weights[:, slot], order, 1).astype(np.float64),
                        np.take_along_axis(routing.weights[layer][cached:], expected, 1) / SCALES[self.family],
                        atol=1e-3,
                    )

    def assert_equal(self, requests: list[Request], sums: Any, domains: int = 3) -> None:
        """Counts equal, weights and distributions close to the independent count."""
        expected = self.reference(requests, domains)
        arrays = sums.arrays()
        np.testing.assert_array_equal(arrays["selection_counts"][:domains], expected.selection)
        np.testing.assert_array_equal(arrays["split_counts"][:, :domains], expected.splits)
        np.testing.assert_array_equal(arrays["token_counts"][:domains], expected.tokens)
        np.testing.assert_allclose(arrays["weight_sums"][:domains] / 2**24, expected.weights, atol=2e-3)
        if "probability_sums" in arrays:
            np.testing.assert_array_equal(arrays["probability_tokens"][:domains], expected.tokens)
            found = arrays["probability_sums"][:domains] / 2**24
            np.testing.assert_allclose(found, expected.probabilities, atol=2e-3)
        if "coactivation" in arrays:
            diagonal = np.diagonal(arrays["coactivation"], axis1=1, axis2=2)
            np.testing.assert_array_equal(diagonal, expected.selection.sum(axis=(0, 1)))
            k, tokens = self.engine.model.layers[0].top_k, int(expected.tokens.sum())
            assert (arrays["coactivation"].sum(axis=(1, 2)) == k * k * tokens).all()


@contextmanager
def recording(family: str, folder: Path, **options: Any) -> Iterator[Kept]:
    """An engine for a `with` block."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    model = save_checkpoint(family, folder)
    kept = Kept(family, folder, model, **options)
    try:
        yield kept
    finally:
        kept.engine.close()
