"""Traces of random routing, and their tokens kept aside."""

from pathlib import Path
from typing import Any

import numpy as np

from moescope.profiler.profile import EngineInfo, LayerInfo, ModelInfo, RunInfo
from moescope.profiler.trace import TraceAbout, TraceRows
from moescope.profiler.trace_writer import TraceOptions, TraceWriter

LAYERS = (LayerInfo(1, 8, 2), LayerInfo(3, 6, 3), LayerInfo(4, 8, 1))


def about(
    layers: tuple[LayerInfo, ...] = LAYERS, *, weights: bool = False, sample: float = 1.0, uuid: str = "run"
) -> TraceAbout:
    engine = EngineInfo("transformers", "5.19.0", "cpu", "float32", {"torch": "2.13"})
    run = RunInfo(uuid, "2026-01-01T00:00:00", engine, 0, 9, "00", {"seed": 0}, complete=False)
    model = ModelInfo("tiny", "Qwen3MoeForCausalLM", "softmax", layers, "abc")
    return TraceAbout(model, ("code", "prose"), run, "0", weights, sample)


def random_rows(of: TraceAbout, owners: list[int], places: list[int], seed: int = 0) -> TraceRows:
    """Rows of these requests at these positions, routed at random; the first three tokens of each are its prompt."""
    rng = np.random.default_rng(seed)
    count, layers = len(owners), of.model.layers
    kinds = {name: kind for name, (kind, _) in of.columns.items()}
    experts = np.zeros((count, len(layers), max(of.model.top_k)), kinds["experts"])
    weights = np.zeros(experts.shape, np.float16)
    for slot, layer in enumerate(layers):
        for row in range(count):
            experts[row, slot, : layer.top_k] = rng.permutation(layer.experts)[: layer.top_k]
        weights[:, slot, : layer.top_k] = rng.random((count, layer.top_k))
    request, position = np.array(owners, np.uint32), np.array(places, np.uint32)
    return TraceRows(
        request=request,
        position=position,
        token=rng.integers(0, 1000, count).astype(np.int32),
        domain=(request % 2).astype(np.uint8),
        phase=(position > 2).astype(np.uint8),
        split=(request % 16).astype(np.uint8),
        experts=experts,
        weights=weights if of.weights else None,
    )


def batch_rows(of: TraceAbout, requests: list[int], tokens: int, seed: int = 0) -> list[TraceRows]:
    """Rows of a batch, a step each: the prompts at once, request by request, then one token of each at a time."""
    prompts = [(request, place) for request in requests for place in range(3)]
    steps = [prompts, *([(request, place) for request in requests] for place in range(3, tokens))]
    return [random_rows(of, *map(list, zip(*step, strict=True)), seed=seed + i) for i, step in enumerate(steps)]


def write_batches(
    folder: Path, of: TraceAbout, batches: list[list[int]], *, tokens: int = 6, first: int = 0, **options: Any
) -> list[TraceRows]:
    """Write a whole trace; what was given to the writer, batch by batch."""
    resume = options.pop("resume", None)
    given = []
    with TraceWriter(
        of, TraceOptions(folder, weights=of.weights, sample=of.sample, **options), resume=resume
    ) as writer:
        for number, requests in enumerate(batches, first):
            writer.admit(requests, [tokens] * len(requests))
            steps = batch_rows(of, requests, tokens, seed=100 * number)
            for rows in steps:
                writer.append(rows)
            writer.commit(number)
            given.append(TraceRows.concatenate(steps))
        writer.finish()
    return given


def assert_rows_equal(one: TraceRows, two: TraceRows) -> None:
    for name in TraceRows.__slots__:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
