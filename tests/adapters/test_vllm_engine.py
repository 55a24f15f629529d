"""Recording inside a real vLLM engine on the CPU: counts equal to transformers' for the same token ids, everywhere."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if "MOESCOPE_NO_SKIPS" not in os.environ:
    pytest.importorskip("vllm")

import reference
from vllm_engine import Kept, recording

import moescope
from moescope.adapters.vllm_settings import DOMAIN_KEY, SPLIT_KEY
from moescope.profiler.engine import Generation, Request
from moescope.profiler.errors import InvariantError, OptionError, TraceError
from moescope.profiler.trace_writer import TraceWriter

pytestmark = pytest.mark.filterwarnings("default")

GREEDY = Generation(12)
#: Drafts from the prompt itself; with random tokens most are rejected.
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    with recording("qwen3_moe", tmp_path_factory.mktemp("qwen")) as kept:
        yield kept


def test_chunked_prefill_and_waiting_requests(qwen: Kept) -> None:
    """24 requests, 8 at a time, prompts of up to 150 tokens in chunks of 64, decode beside prefill."""
    requests = qwen.requests(24, seed=1)
    done = qwen.engine.run(requests, GREEDY, 0)
    qwen.assert_equal(requests, done.sums.parts[0])
    assert len({len(output.outputs[0].token_ids) for output in qwen.outputs}) > 1, "some must meet the stop token"
    assert sum(done.tokens) == done.sums.parts[0].tokens.sum()


def test_sampling_and_a_second_batch(qwen: Kept) -> None:
    requests = qwen.requests(17, seed=2)
    for batch in (0, 1):
        done = qwen.engine.run(requests, Generation(9, temperature=1.0, seed=3), batch)
        qwen.assert_equal(requests, done.sums.parts[0])


def test_prompts_alone(qwen: Kept) -> None:
    requests = qwen.requests(9, seed=4)
    done = qwen.engine.run(requests, Generation(0), 0)
    qwen.assert_equal(requests, done.sums.parts[0])
    assert done.sums.parts[0].tokens[:, 1].sum() == 0


def test_more_domains_than_the_device_counts(qwen: Kept) -> None:
    requests = qwen.requests(40, seed=5, longest=20, domains=20)
    arrays: dict[str, Any] = {}
    done = qwen.engine.run(requests, Generation(0), 0)
    assert len(done.sums.parts) == 2
    layers, experts = len(qwen.engine.model.layers), qwen.engine.model.experts[0]
    for name, shape in {
        "selection_counts": (20, 2, layers, experts),
        "weight_sums": (20, 2, layers, experts),
        "probability_sums": (20, 2, layers, experts),
        "split_counts": (16, 20, layers, experts),
        "token_counts": (20, 2),
        "probability_tokens": (20, 2),
        "coactivation": (layers, experts, experts),
    }.items():
        arrays[name] = np.zeros(shape, np.int64)
    done.sums.add_to(arrays, done.tokens)
    for domain in range(20):
        expected = sum(len(request.token_ids) for request in requests if request.domain == domain)
        assert arrays["token_counts"][domain].sum() == expected
        assert (arrays["selection_counts"][domain].sum(axis=(0, 2)) == 4 * expected).all()
        assert (arrays["split_counts"][:, domain].sum(axis=(0, 2)) == 4 * expected).all()


def test_several_samples_of_one_prompt(qwen: Kept) -> None:
    """N = 3: every sample routes its own tokens; without a prefix cache the engine routes the prompt for each."""
    from vllm import SamplingParams

    qwen.engine._call("reset")
    params = SamplingParams(
        n=3, temperature=1.0, seed=5, max_tokens=7, detokenize=False, extra_args={DOMAIN_KEY: 1, SPLIT_KEY: 2}
    )
    outputs = qwen.engine.llm.generate([{"prompt_token_ids": [9, 8, 7, 6]}], [params], use_tqdm=False)
    qwen.engine._wait_until_settled()
    tokens = qwen.engine._collect("").tokens
    assert tokens[1, 0, 2] == 3 * 4
    assert tokens[1, 1, 2] == sum(len(sample.token_ids) - 1 for sample in outputs[0].outputs)
    assert tokens.sum() == tokens[1, :, 2].sum()


def test_aborted_requests_count_what_was_routed(qwen: Kept) -> None:
    from vllm import SamplingParams

    engine = qwen.engine.llm.llm_engine
    qwen.engine._call("reset")
    params = SamplingParams(max_tokens=100, ignore_eos=True, detokenize=False, temperature=0.0)
    names = [
        engine.add_request(str(i), {"prompt_token_ids": list(range(10, 20 + i))}, params.clone()) for i in range(4)
    ]
    for _ in range(6):
        engine.step()
    engine.abort_request([str(names[1] or "1"), str(names[2] or "2")], internal=names[1] is not None)
    while engine.has_unfinished_requests():
        engine.step()
    qwen.engine._wait_until_settled()
    tokens = qwen.engine._collect("").tokens
    assert tokens[0, 0, 0] == 10 + 11 + 12 + 13
    assert 2 * 99 < tokens[0, 1, 0] < 2 * 99 + 2 * 30


def test_recording_can_be_switched(qwen: Kept) -> None:
    requests = qwen.requests(6, seed=7)
    qwen.engine._call("reset")
    qwen.engine._call("switch", False)
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": request.token_ids.tolist()} for request in requests]
    qwen.engine.llm.generate(prompts, SamplingParams(max_tokens=3, detokenize=False), use_tqdm=False)
    qwen.engine._wait_until_settled()
    assert qwen.engine._collect("").tokens.sum() == 0
    done = qwen.engine.run(requests, GREEDY, 0)  # switches on again
    qwen.assert_equal(requests, done.sums.parts[0])


def test_a_second_recording_engine_is_refused(qwen: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    from moescope.adapters.vllm_settings import VARIABLE

    monkeypatch.setenv(VARIABLE, "{}")
    with pytest.raises(OptionError, match="another recording engine"):
        moescope.profile("demo:stacked", ["a"], engine="vllm")


def test_router_weights_and_identity(qwen: Kept) -> None:
    from moescope.adapters.transformers import TransformersEngine

    other = TransformersEngine(qwen.model)
    assert qwen.engine.model.layers == other.model.layers
    assert qwen.engine.model.fingerprint == other.model.fingerprint
    assert qwen.engine.model.architecture == other.model.architecture
    assert qwen.engine.model.scoring == other.model.scoring
    assert qwen.engine.model.groups == other.model.groups == 1


def test_distributions_are_those_of_transformers_and_are_not_counted(qwen: Kept) -> None:
    """A prompt that comes in three chunks, one token, and what was counted before and is counted after."""
    requests = qwen.requests(12, seed=21)
    before = qwen.engine.run(requests, GREEDY, 0).sums.parts[0]
    rng = np.random.default_rng(22)
    for length in (150, 64, 50, 1):
        assert qwen.assert_distributions_equal(rng.integers(6, 128, length).astype(np.int32), length) == length
    assert qwen.engine._collect("").tokens.sum() == 0
    done = qwen.engine.run(requests, GREEDY, 0)
    qwen.assert_equal(requests, done.sums.parts[0])
    for name, array in before.arrays().items():
        other = done.sums.parts[0].arrays()[name]
        exact = name not in ("weight_sums", "probability_sums")  # these round by what shares a batch
        np.testing.assert_allclose(other, array, rtol=0, atol=0 if exact else 2**24 * 1e-3)


def test_what_was_counted_outlives_a_look_at_tokens(qwen: Kept) -> None:
    from vllm import SamplingParams

    qwen.engine._call("reset")
    qwen.engine._call("switch", True)
    params = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False, extra_args={DOMAIN_KEY: 1, SPLIT_KEY: 2})
    qwen.engine.llm.generate([{"prompt_token_ids": [9, 8, 7, 6, 7]}], [params], use_tqdm=False)
    qwen.engine._wait_until_settled()
    qwen.assert_distributions_equal(np.arange(10, 60, dtype=np.int32), 50)
    tokens = qwen.engine._collect("").tokens
    assert (tokens[1, 0, 2], tokens[1, 1, 2], tokens.sum()) == (5, 3, 8)


def test_a_small_buffer_gives_the_tokens_from_the_first_on(qwen: Kept) -> None:
    """As where a sample of the rows is recorded: of a prompt in chunks the buffer holds the first rows of each."""
    ids = np.random.default_rng(23).integers(6, 128, 150).astype(np.int32)
    qwen.engine.llm.collective_rpc(_resize, args=(17,))
    try:
        assert qwen.assert_distributions_equal(ids) == 17
        assert qwen.assert_distributions_equal(ids[:10]) == 10
    finally:
        qwen.engine.llm.collective_rpc(_resize, args=(None,))
    assert qwen.assert_distributions_equal(ids) == 150
    requests = qwen.requests(6, seed=24)
    qwen.assert_equal(requests, qwen.engine.run(requests, GREEDY, 0).sums.parts[0])


def _resize(worker: Any, rows: int | None) -> None:
    recorder = worker.moescope_recorder.recorder
    size = recorder.capacity if rows is None else rows
    recorder.sample = recorder.sample.new_full((size,), -1)
    recorder.distributions = recorder.distributions.new_zeros((len(recorder.layers), size, recorder.experts))


def test_no_distributions_where_none_are_recorded(qwen: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen.engine, "probabilities", False)
    qwen.outputs = []
    assert qwen.engine.distributions(np.arange(10, 20, dtype=np.int32)) is None
    assert qwen.outputs == [], "nothing is run"


def test_a_share_of_the_requests_is_traced_whole(qwen: Kept, tmp_path: Path) -> None:
    requests = qwen.requests(40, seed=21, longest=40)
    trace = qwen.run_traced(requests, GREEDY, tmp_path / "trace", sample=0.4, weights=False)
    found = set(np.concatenate([rows.request for rows in trace.rows()]).tolist())
    assert 5 < len(found) < 30
    assert trace.index.last.traced == len(found)
    lengths = [
        len(request.token_ids) + len(output.outputs[0].token_ids) - 1
        for request, output in zip(requests, qwen.outputs, strict=True)
    ]
    assert trace.tokens == sum(lengths[number] for number in found)


def test_a_trace_that_cannot_be_written_fails_the_run(qwen: Kept, tmp_path: Path) -> None:
    requests = qwen.requests(6, seed=22, longest=40)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TraceWriter, "_store", full)
        with pytest.raises(TraceError, match="No space left on device"):
            qwen.run_traced(requests, GREEDY, tmp_path / "trace")
    qwen.run_traced(requests, GREEDY, tmp_path / "again")


def test_staging_buffers_are_lent_to_code_that_was_read(qwen: Kept) -> None:
    found = qwen.engine.llm.collective_rpc(_reads_alone)
    assert found == [[True, True, True]]


def _reads_alone(worker: Any) -> list[bool]:
    from moescope.adapters.vllm_routing import _only_reads

    return [_only_reads(layer.runner) for layer in worker.moescope_recorder._layers]


@pytest.mark.parametrize(("experts", "held", "plain"), [(32, 17, False), (32, 36, False), (30, 32, True), (4, 8, True)])
def test_groups_are_told_by_the_experts_of_the_model(experts: int, held: int, plain: bool) -> None:
    """A layer holds fewer experts where some are substituted, and more where some are redundant."""
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

    from moescope.adapters.vllm_routing import _falls_back

    router = GroupedTopKRouter(top_k=2, global_num_experts=held, num_expert_group=4, topk_group=2, eplb_state=None)
    assert _falls_back(router, experts) is plain


def test_a_write_to_lent_memory_is_seen() -> None:
    import torch

    from moescope.adapters.vllm_routing import _Lent

    buffers = torch.zeros((2, 8, 4)), torch.zeros((2, 8, 4), dtype=torch.int32)
    writes: list[Callable[[Any, Any], Any]] = [
        lambda weights, ids: ids.copy_(ids + 1),
        lambda weights, ids: weights.masked_fill_(ids > 3, 0.0),
        lambda weights, ids: ids.view(-1)[3:].fill_(1),
        lambda weights, ids: ids.__setitem__(0, 5),
        lambda weights, ids: torch.mul(weights, 2, out=weights),
    ]
    with torch.inference_mode():
        for write in writes:
            lent = _Lent("layer 3")
            lent.check()
            given = [buffer[1, :5].data for buffer in buffers]
            given[1].fill_(7)  # what routes writes before it returns
            lent.lend(*given)
            for buffer in buffers:  # the recorder's own
                buffer.fill_(1)
            lent.check()
            write(*given)
            with pytest.raises(RuntimeError, match="layer 3 cannot be recorded: vLLM wrote to"):
                lent.check()


def test_a_layer_that_stages_nothing_is_found(qwen: Kept) -> None:
    """Last in this file: the engine is not whole afterwards."""
    requests = qwen.requests(5, seed=8)
    qwen.engine.llm.collective_rpc(_unbind, args=(1,))
    victim = qwen.engine.model.layers[1].index
    with pytest.raises(InvariantError, match=f"layer {victim}"):
        qwen.engine.run(requests, GREEDY, 0)


def _unbind(worker: Any, slot: int) -> None:
    router = worker.moescope_recorder._layers[slot].router
    del router.__dict__["_compute_routing"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {}),
        ("qwen3_moe", {"enforce_eager": False}),
        ("deepseek_v3", {"enforce_eager": False}),
        ("qwen3_moe", {"speculative_config": DRAFTS}),
        ("qwen3_moe", {"tensor_parallel_size": 2}),
        ("qwen3_moe", {"num_gpu_blocks_override": 12, "block_size": 32, "enable_prefix_caching": True}),
    ],
    ids=[
        "deepseek", "qwen compiled", "deepseek compiled", "drafts", "tensor parallel", "preemption and prefix cache"
    ],
)  # fmt: skip
def test_counts_equal_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "tensor_parallel_size" in changes:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2 and "MOESCOPE_NO_SKIPS" not in os.environ:
            pytest.skip("one core is not enough for two workers")
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    with recording(family, tmp_path, engine_args=changes) as kept:
        assert kept.engine.model.groups == (4 if family == "deepseek_v3" else 1)
        cached = bool(changes.get("enable_prefix_caching"))
        requests = kept.requests(24, seed=11, longest=100)
        if cached:  # half of the prompts begin alike
            shared = requests[0].token_ids[:1].repeat(40)
            requests = [
                Request(np.concatenate([shared, request.token_ids[:40]]) if i % 2 else request.token_ids[:80],
                        request.domain, request.split)
                for i, request in enumerate(requests)
            ]  # fmt: skip
        done = kept.engine.run(requests, GREEDY, 0)
        sums = done.sums.parts[0]
        if not cached:
            kept.assert_equal(requests, sums)
            ids = np.random.default_rng(12).integers(6, 128, 100).astype(np.int32)
            assert kept.assert_distributions_equal(ids, 100) == 100
            trace = kept.run_traced(requests, GREEDY, tmp_path / "trace")
            assert trace.tokens == sums.tokens.sum()
            done = kept.engine.run(requests, GREEDY, 1)
            kept.assert_equal(requests, done.sums.parts[0])
            return
        skipped = sum(output.num_cached_tokens or 0 for output in kept.outputs)
        assert skipped > 0
        assert kept.engine.findings()["skipped_by_prefix_cache"] == skipped
        lengths = sum(len(request.token_ids) for request in requests) - skipped
        lengths += sum(len(output.outputs[0].token_ids) - 1 for output in kept.outputs)
        assert sums.tokens.sum() == lengths
        assert kept.run_traced(requests, GREEDY, tmp_path / "trace").tokens > 0
        ids = np.random.default_rng(12).integers(6, 128, 100).astype(np.int32)
        assert kept.assert_distributions_equal(ids) == 100
        assert kept.engine.distributions(ids) is None, "its first tokens come from the cache and are not routed"


@pytest.mark.parametrize(("family", "eager"), [("qwen3_moe", False), ("deepseek_v3", True)])
def test_what_was_staged_outlives_writes_to_what_the_router_returned(
    tmp_path: Path, family: str, eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts that overwrite ids and weights: the record holds what they were given, not what they made of it."""
    import overwriting

    monkeypatch.setenv(overwriting.VARIABLE, "experts")
    changes = {
        "worker_cls": "overwriting.OverwritingWorker",
        "enforce_eager": eager,
        "async_scheduling": False,  # every row that is routed counts
    }
    with recording(family, tmp_path, engine_args=changes) as kept:
        layers = kept.engine.model.layer_indices
        assert kept.engine.llm.collective_rpc(_reads_alone) == [[False] * len(layers)]
        assert kept.engine.llm.collective_rpc(overwriting.overwriting) == [len(layers)]
        kept.engine.llm.collective_rpc(overwriting.given)  # those of the warm-up
        done = kept.engine.run(kept.requests(16, seed=31, longest=100), GREEDY, 0)
        (given,) = kept.engine.llm.collective_rpc(overwriting.given)
        arrays = {name: array.sum(axis=(0, 1)) for name, array in done.sums.parts[0].arrays().items()}
        counts, weights = np.array([given[layer] for layer in layers]).transpose(1, 0, 2)
        np.testing.assert_array_equal(arrays["selection_counts"], counts)
        np.testing.assert_allclose(arrays["weight_sums"] / 2**24, weights, atol=1e-3)
        assert (counts != np.roll(counts, 1, axis=1)).any(), "what the experts made of it is the same"


def test_verify_says_in_one_line_what_it_needs(tmp_path: Path) -> None:
    """On a CPU vLLM cannot capture: model runner V2, which the capture needs, does not run there."""
    with (
        pytest.raises(OptionError, match=r"^--verify: .*Model Runner V2.*leave out --verify$") as found,
        recording("qwen3_moe", tmp_path, verify=0.5),
    ):
        pass
    assert "\n" not in str(found.value)
    with (
        pytest.raises(OptionError, match="leave out enable_prefix_caching"),
        recording("qwen3_moe", tmp_path, verify=0.5, engine_args={"enable_prefix_caching": False}),
    ):
        pass


def test_a_prefix_cache_that_is_on_for_the_capture_alone_is_not_read(tmp_path: Path) -> None:
    """Prompts that begin alike, or are the same, are routed whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moescope.adapters.vllm._capture_arguments", lambda _given: {"enable_prefix_caching": True})
        with recording("qwen3_moe", tmp_path, verify=1e-9, engine_args={"block_size": 32}) as kept:
            ids = np.random.default_rng(41).integers(6, 128, 100).astype(np.int32)
            requests = [Request(ids, i % 3, reference.split(ids.tolist())) for i in range(6)]
            for batch in range(2):
                done = kept.engine.run(requests, GREEDY, batch)
                kept.assert_equal(requests, done.sums.parts[0])
            assert kept.assert_distributions_equal(ids, 100) == 100
            assert kept.engine.info.options["prefix_caching"] is True
            assert kept.engine.findings()["skipped_by_prefix_cache"] == 0
