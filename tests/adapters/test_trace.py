"""Traces through transformers: each counted token once, with the ids of an independent forward, and going on."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from tiny_models import VOCABULARY, tiny_model

import moescope
from moescope.adapters.transformers import TransformersEngine
from moescope.profiler import run as run_module
from moescope.profiler import trace_writer
from moescope.profiler.errors import InvariantError, ProfileError, TraceError
from moescope.profiler.files import PARTIAL_NAME, OutputFolder, load_profile
from moescope.profiler.profile import RoutingProfile
from moescope.profiler.run import Interrupted, Progress
from moescope.profiler.trace import Trace, TraceRows

PROMPTS = [
    {
        "prompt_token_ids": np.random.default_rng(i).integers(6, VOCABULARY, size=3 + i % 9).tolist(),
        "domain": "ab"[i % 2],
    }
    for i in range(23)
]
COUNTS = ("selection_counts", "token_counts", "split_counts")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "CHUNK", 10)
    monkeypatch.setattr(run_module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(trace_writer, "SHARD_BYTES", 1500)


def profile(model: Any, folder: Path, **options: Any) -> RoutingProfile:
    chosen = {name: options.pop(name) for name in ("sample", "weights", "limit") if name in options}
    options = {"batch_size": 4, "max_tokens": 4, "trace": moescope.TraceOptions(folder, **chosen), **options}
    return moescope.profile(model, PROMPTS, engine="transformers", **options)


def assert_same_counts(one: RoutingProfile, two: RoutingProfile) -> None:
    assert (one.model, one.domains) == (two.model, two.domains)
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def by_request(trace: Trace) -> TraceRows:
    whole = TraceRows.concatenate(list(trace.rows()))
    return whole.take(np.lexsort((whole.position, whole.request)))


def assert_same_trace(one: Path, two: Path) -> None:
    left, right = by_request(Trace(one)), by_request(Trace(two))
    for name in TraceRows.__slots__:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    assert not Trace(one).verify().damaged


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "minimax_m2"])
@pytest.mark.parametrize("max_tokens", [0, 4])
def test_each_token_is_there_once_with_the_ids_of_an_independent_forward(
    tmp_path: Path, family: str, max_tokens: int
) -> None:
    model = tiny_model(family)
    profile(model, tmp_path / "t", max_tokens=max_tokens, weights=True)
    trace = Trace(tmp_path / "t")
    assert not trace.verify().damaged
    seen = 0
    scales = [layer.scale for layer in TransformersEngine(model).binding.layers]
    for number, prompt in enumerate(PROMPTS):
        ids = prompt["prompt_token_ids"]
        rows = trace.requests([number])
        generated = rows.token[len(ids) :].tolist()
        assert rows.token[: len(ids)].tolist() == ids
        assert len(generated) <= max(max_tokens - 1, 0)
        assert generated == reference.greedy(model, ids, max_tokens)[: len(generated)]
        np.testing.assert_array_equal(rows.position, np.arange(len(rows)))
        np.testing.assert_array_equal(rows.phase, np.arange(len(rows)) >= len(ids))
        assert set(rows.domain.tolist()) == {number % 2}
        assert set(rows.split.tolist()) == {reference.split(ids)}
        routing = reference.route(model, rows.token.tolist())
        assert rows.weights is not None
        for slot, layer in enumerate(sorted(routing.ids)):
            np.testing.assert_array_equal(
                np.sort(rows.experts[:, slot].astype(np.int64), axis=1), np.sort(routing.ids[layer], axis=1)
            )
            applied = np.sort(routing.weights[layer] / scales[slot], axis=1)
            np.testing.assert_allclose(np.sort(rows.weights[:, slot], axis=1), applied, rtol=2e-3, atol=1e-5)
        seen += len(rows)
    assert seen == trace.tokens


def test_what_is_summed_is_that_of_an_independent_forward(model: Any, tmp_path: Path) -> None:
    profile(model, tmp_path / "t")
    trace = Trace(tmp_path / "t")
    sums = moescope.sum_trace(trace)
    counts, kept = np.zeros(sums.counts.shape[2:], int), np.zeros(len(sums.kept), int)
    for number in range(len(PROMPTS)):
        routing = reference.route(model, trace.requests([number]).token.tolist())
        for slot, layer in enumerate(sorted(routing.ids)):
            sets = [set(ids.tolist()) for ids in routing.ids[layer]]
            for one, before in zip(sets[1:], sets, strict=False):
                kept[slot] += len(one & before)
            for expert in routing.ids[layer].ravel():
                counts[slot, expert] += 1
    np.testing.assert_array_equal(sums.kept, kept)
    np.testing.assert_array_equal(sums.counts.sum(axis=(0, 1)), counts)
    analysis = moescope.analyze_trace(sums)
    np.testing.assert_allclose(analysis.repetition.kept, kept / (sums.pairs * np.array(analysis.top_k)))


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_a_profile_of_the_trace_is_that_of_the_run(model: Any, tmp_path: Path, max_tokens: int) -> None:
    whole = profile(model, tmp_path / "t", max_tokens=max_tokens, weights=True)
    counted = RoutingProfile.from_trace(str(tmp_path / "t"))
    assert_same_counts(counted, whole)
    np.testing.assert_allclose(counted.weight_sums, whole.weight_sums, rtol=2**-11)
    assert counted.complete
    assert counted.runs[0].prompts == whole.runs[0].prompts == 23
    assert whole.runs[0].settings["trace"] == {
        "sample": 1.0,
        "weights": True,
        "requests": 23,
        "traced": 23,
        "sampled_out": 0,
        "slow": 0,
        "limited": 0,
    }
    without = moescope.profile(model, PROMPTS, batch_size=4, max_tokens=max_tokens)
    assert_same_counts(without, whole)


def test_a_sample_is_part_of_the_whole(model: Any, tmp_path: Path) -> None:
    run = profile(model, tmp_path / "whole")
    sampled = profile(model, tmp_path / "part", sample=0.4)
    assert_same_counts(run, sampled)  # what is traced does not change what is counted
    part, whole = by_request(Trace(tmp_path / "part")), by_request(Trace(tmp_path / "whole"))
    numbers = np.unique(part.request)
    assert 0 < len(numbers) < 23
    expected = whole.take(np.isin(whole.request, numbers))
    for name in TraceRows.__slots__:
        np.testing.assert_array_equal(getattr(part, name), getattr(expected, name))
    assert sampled.runs[0].settings["trace"]["traced"] == len(numbers)
    counted = Trace(tmp_path / "part").profile()
    assert counted.runs[0].prompts == len(numbers)
    assert not counted.complete


def test_layers_of_other_sizes(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.model.layers[2].mlp = (
        tiny_model("qwen3_moe", seed=1, num_experts=6, num_experts_per_tok=2).model.layers[2].mlp
    )
    whole = profile(model, tmp_path / "t", weights=True)
    assert whole.model.top_k == (3, 2, 3)
    assert_same_counts(RoutingProfile.from_trace(str(tmp_path / "t")), whole)
    (first, *_) = Trace(tmp_path / "t").rows()
    assert first.weights is not None
    assert not first.experts[:, 1, 2].any()
    assert not first.weights[:, 1, 2].any()


# ------------------------------------------------------------------------------------------------------------ going on


class Stop:
    """Presses Ctrl-C after so many batches, by a real signal."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, progress: Progress) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_run_goes_on_to_the_same_trace(model: Any, tmp_path: Path, after: int) -> None:
    run = profile(model, tmp_path / "whole", weights=True)
    folder, trace = tmp_path / "out", tmp_path / "out" / "trace"
    with pytest.raises(Interrupted) as caught:
        profile(model, trace, weights=True, output_dir=folder, on_progress=Stop(after))
    assert Trace(trace).index.complete is False
    assert_same_counts(Trace(trace).profile(), caught.value.profile)
    resumed = profile(model, trace, weights=True, output_dir=folder, resume=True)
    assert_same_counts(resumed, run)
    assert_same_counts(Trace(trace).profile(), run)
    assert_same_trace(trace, tmp_path / "whole")
    assert Trace(trace).about.run.uuid == resumed.runs[0].uuid


def test_a_batch_that_was_interrupted_is_traced_once(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile(model, tmp_path / "whole")
    calls = 0
    original = model.model.layers[2].forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[2], "forward", forward)
        with pytest.raises(Interrupted):
            profile(model, tmp_path / "out" / "trace", output_dir=tmp_path / "out")
    trace = Trace(tmp_path / "out" / "trace")
    assert trace.unfinished  # two of the four forwards of the third batch
    assert not trace.verify().damaged
    assert trace.profile().tokens == load_profile(tmp_path / "out" / PARTIAL_NAME).tokens
    profile(model, tmp_path / "out" / "trace", output_dir=tmp_path / "out", resume=True)
    assert_same_trace(tmp_path / "out" / "trace", tmp_path / "whole")


def test_a_killed_run_goes_on_to_the_same_trace(model: Any, tmp_path: Path) -> None:
    whole = profile(model, tmp_path / "whole")
    code = f"""
        import os, signal, sys
        sys.path[:0] = [{str(Path(__file__).parents[1] / "helpers")!r}, {str(Path(__file__).parent)!r}]
        from pathlib import Path
        import test_trace
        from moescope.profiler import run, trace_writer
        run.CHUNK, run.SAVE_EVERY, trace_writer.SHARD_BYTES = 10, 1e9, 1500
        left = 5
        def progress(state):
            global left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        test_trace.profile(
            test_trace.tiny_model("qwen3_moe"), Path({str(tmp_path / "out" / "trace")!r}),
            output_dir={str(tmp_path / "out")!r}, on_progress=progress,
        )
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "out" / "trace"
    kept = load_profile(tmp_path / "out" / PARTIAL_NAME)
    assert kept.runs[0].batches == 1
    trace = Trace(folder)
    assert trace.index.complete is None
    assert not trace.verify().damaged
    assert len(trace) >= kept.tokens  # the trace never lags behind what is resumed
    resumed = profile(model, folder, output_dir=tmp_path / "out", resume=True)
    assert_same_counts(resumed, whole)
    assert_same_trace(folder, tmp_path / "whole")


def test_a_run_is_resumed_with_its_trace_alone(model: Any, tmp_path: Path) -> None:
    folder, trace = tmp_path / "out", tmp_path / "out" / "trace"
    with pytest.raises(Interrupted):
        profile(model, trace, output_dir=folder, on_progress=Stop(2))
    with pytest.raises(ProfileError, match=r"trace was .* in the interrupted run and is None now"):
        profile(model, trace, output_dir=folder, resume=True, trace=None)
    with pytest.raises(ProfileError, match=r"'sample': 0\.5"):
        profile(model, trace, output_dir=folder, resume=True, sample=0.5)
    with pytest.raises(TraceError, match="No such folder"):
        profile(model, tmp_path / "other", output_dir=folder, resume=True)
    assert Trace(trace).index.last.batch == 1


# ----------------------------------------------------------------------------------------------------- what goes wrong


def test_a_trace_that_cannot_be_written_stops_the_run_where_it_can_go_on(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = profile(model, tmp_path / "whole")
    folder, trace = tmp_path / "out", tmp_path / "out" / "trace"
    save = OutputFolder.save_partial

    def fill(self: OutputFolder, kept: RoutingProfile) -> None:
        save(self, kept)
        if kept.runs[0].batches == 3:  # a folder in the way of the next shard, as good as a full disk
            last = Trace(trace, unfinished=True).index.shards[-1].name
            (trace / f"shard-{int(last[6:12]) + 1:06}.safetensors").mkdir()

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "save_partial", fill)
        with pytest.raises(TraceError, match=r"cannot write the trace .*tokens are in finished shards, .* are lost"):
            profile(model, trace, output_dir=folder)
    assert load_profile(folder / PARTIAL_NAME).runs[0].batches == 3
    assert_same_counts(Trace(trace).profile(), load_profile(folder / PARTIAL_NAME))
    next(entry for entry in trace.iterdir() if entry.is_dir()).rmdir()
    assert_same_counts(profile(model, trace, output_dir=folder, resume=True), whole)
    assert_same_trace(trace, tmp_path / "whole")


def test_a_run_that_does_not_add_up_leaves_its_batch_out_of_the_trace(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = TransformersEngine.run

    def run(self: TransformersEngine, requests: Any, generation: Any, batch: int) -> Any:
        done = drain(self, requests, generation, batch)
        if batch == 2:
            raise InvariantError("batch 2: made to fail")
        return done

    monkeypatch.setattr(TransformersEngine, "run", run)
    with pytest.raises(InvariantError, match="batch 2"):
        profile(model, tmp_path / "t")
    trace = Trace(tmp_path / "t")
    assert trace.index.last.batch == 1
    assert trace.unfinished > 0
    assert trace.index.complete is False
    assert trace.profile().runs[0].prompts == 8
