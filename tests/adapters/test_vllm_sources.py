"""What the adapter rests on in vLLM is there in every supported version, by their sources; none is installed.

The tables below are what `moescope.adapters.vllm*` take from vLLM, file by file. Names that the adapter asks for with a
default are among them where losing one would silently lift a refusal.
"""

import ast
import os
import textwrap
from typing import Any, NoReturn

import pytest
from vllm_sources import Sources, UnreachableError, parameters, positional
from vllm_writes import Write, find_writes

from moescope.adapters import vllm
from moescope.adapters.vllm_plugin import PATCHED, supported
from moescope.adapters.vllm_routing import _REFUSED, ROUTERS

VERSIONS = ("0.26.0", "0.27.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")

_SCHEDULER = "vllm/v1/core/sched/scheduler.py"
_ASYNC_SCHEDULER = "vllm/v1/core/sched/async_scheduler.py"
_STEP = "vllm/v1/core/sched/output.py"
_REQUEST = "vllm/v1/request.py"
_WORKER = "vllm/v1/worker/gpu_worker.py"
_CPU_WORKER = "vllm/v1/worker/cpu_worker.py"
_WORKER_BASE = "vllm/v1/worker/worker_base.py"
_RUNNER_V1 = "vllm/v1/worker/gpu_model_runner.py"
_BATCH_V1 = "vllm/v1/worker/gpu_input_batch.py"
_RUNNER_V2 = "vllm/v1/worker/gpu/model_runner.py"
_BATCH_V2 = "vllm/v1/worker/gpu/input_batch.py"
_MOE = "vllm/model_executor/layers/fused_moe"
_MOE_RUNNER = f"{_MOE}/runner/moe_runner.py"
_BASE_ROUTER = f"{_MOE}/router/base_router.py"
_TOPK = f"{_MOE}/router/fused_topk_router.py"
_TOPK_BIAS = f"{_MOE}/router/fused_topk_bias_router.py"
_GROUPED = f"{_MOE}/router/grouped_topk_router.py"
_CPU_ROUTER = f"{_MOE}/router/cpu_router.py"
_PARALLEL = "vllm/distributed/parallel_state.py"
_LLM = "vllm/entrypoints/llm.py"
_CORE = "vllm/v1/engine/core.py"
_CLIENT = "vllm/v1/engine/core_client.py"
_ARGUMENTS = "vllm/engine/arg_utils.py"
_MANAGERS = "vllm/v1/engine/utils.py"
_CONFIG = "vllm/config/vllm.py"
_CACHE_MANAGER = "vllm/v1/core/kv_cache_manager.py"
_ROUTED = f"{_MOE}/routed_experts.py"
#: Whose presence tells the adapter that vLLM's own capture needs the prefix cache.
_CAPTURE_BESIDE_CACHE = f"{vllm._CAPTURE_BESIDE_CACHE.replace('.', '/')}.py"
_CAPTURE = "vllm/distributed/aux_output_connector/connector.py"
_SUBSTITUTION = f"{_MOE}/expert_substitution.py"

#: Files that came later: the first version that has them.
SINCE = {_CPU_ROUTER: "0.30.0", _CAPTURE_BESIDE_CACHE: "0.31.0", _CAPTURE: "0.31.0", _SUBSTITUTION: "0.33.0"}

#: Where each router class is that the adapter knows by name.
ROUTER_FILES = {
    "FusedTopKRouter": _TOPK,
    "FusedTopKBiasRouter": _TOPK_BIAS,
    "GroupedTopKRouter": _GROUPED,
    "CPURouter": _CPU_ROUTER,
    "RoutingSimulatorRouter": f"{_MOE}/router/routing_simulator_router.py",
    "ZeroExpertRouter": f"{_MOE}/router/zero_expert_router.py",
    "CustomRoutingRouter": f"{_MOE}/router/custom_routing_router.py",
    "AiterSharedRoutedFusedMoERouter": f"{_MOE}/router/aiter_shared_routed_fused_moe_router.py",
}

#: File, class or None, and names that it has: fields, methods, properties, or what its methods set on `self`.
MEMBERS: tuple[tuple[str, str | None, str], ...] = (
    # the scheduler's ledger
    (_SCHEDULER, "Scheduler", "requests finished_req_ids has_finished_requests finish_requests"),
    (
        _STEP,
        "SchedulerOutput",
        "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens total_num_scheduled_tokens "
        "scheduled_spec_decode_tokens",
    ),
    (_STEP, "NewRequestData", "req_id prompt_token_ids prompt_embeds sampling_params num_computed_tokens"),
    (_STEP, "CachedRequestData", "req_ids resumed_req_ids num_computed_tokens"),
    (_REQUEST, "Request", "request_id num_tokens num_computed_tokens status resumable"),
    (_REQUEST, "RequestStatus", "FINISHED_ABORTED FINISHED_ERROR"),
    # the worker and its model runners
    (_WORKER, "Worker", "model_runner"),
    (_WORKER_BASE, "WorkerBase", "vllm_config"),
    (_RUNNER_V1, "GPUModelRunner", "get_model device input_batch"),
    (_BATCH_V1, "InputBatch", "req_ids"),
    (_RUNNER_V2, "GPUModelRunner", "get_model device execute_model_state"),
    (_RUNNER_V2, "ExecuteModelState", "input_batch"),
    (_BATCH_V2, "InputBatch", "req_ids"),
    # the MoE layers
    (
        _MOE_RUNNER,
        "MoERunner",
        "router gate moe_config routed_experts layer_id is_monolithic _forward_impl _apply_quant_method",
    ),
    (_ROUTED, "RoutedExperts", "quant_method forward_modular"),
    (_SUBSTITUTION, "SubstitutedRoutedExperts", "forward_modular"),
    (f"{_MOE}/config.py", "FusedMoEConfig", "num_logical_experts experts_per_token hidden_dim"),
    (_TOPK, "FusedTopKRouter", "scoring_func renormalize"),
    (
        _TOPK_BIAS,
        "FusedTopKBiasRouter",
        "scoring_func renormalize routed_scaling_factor e_score_correction_bias _hash_indices_table "
        "num_fused_shared_experts",
    ),
    (
        _GROUPED,
        "GroupedTopKRouter",
        "scoring_func routed_scaling_factor e_score_correction_bias num_expert_group num_fused_shared_experts",
    ),
    (
        _CPU_ROUTER,
        "CPURouter",
        "scoring_func routed_scaling_factor use_grouped_topk num_expert_group custom_routing_function "
        "_hash_indices_table",
    ),
    ("vllm/_aiter_ops.py", "rocm_aiter_ops", "is_fused_moe_enabled"),
    # ranks
    ("vllm/forward_context.py", None, "get_forward_context"),
    ("vllm/forward_context.py", "ForwardContext", "dp_metadata"),
    ("vllm/forward_context.py", "DPMetadata", "num_tokens_across_dp_cpu"),
    (_PARALLEL, None, "get_dp_group get_tp_group get_pp_group"),
    (_PARALLEL, "GroupCoordinator", "rank_in_group"),
    # configs
    (
        "vllm/config/vllm.py",
        "VllmConfig",
        "model_config cache_config parallel_config scheduler_config compilation_config speculative_config "
        "additional_config",
    ),
    (
        "vllm/config/parallel.py",
        "ParallelConfig",
        "use_sequence_parallel_moe use_ubatching enable_dbo prefill_context_parallel_size data_parallel_rank "
        "data_parallel_size pipeline_parallel_size",
    ),
    ("vllm/config/scheduler.py", "SchedulerConfig", "async_scheduling max_num_batched_tokens max_num_seqs"),
    ("vllm/config/compilation.py", "CompilationConfig", "cudagraph_capture_sizes"),
    ("vllm/config/cache.py", "CacheConfig", "enable_prefix_caching"),
    (
        "vllm/config/model.py",
        "ModelConfig",
        "model hf_config dtype enforce_eager max_model_len quantization get_vocab_size",
    ),
    # the front end
    ("vllm/__init__.py", None, "__version__"),
    ("vllm/logger.py", None, "init_logger"),
    (_LLM, "LLM", "generate collective_rpc llm_engine"),
    ("vllm/v1/engine/llm_engine.py", "LLMEngine", "engine_core"),
    (_CLIENT, "InprocClient", "engine_core shutdown"),
    (_CLIENT, "EngineCoreClient", "shutdown"),
    (_MANAGERS, "CoreEngineProcManager", "processes"),
    (_CORE, "EngineCore", "step_fn"),
    (
        _ARGUMENTS,
        "EngineArgs",
        "dtype trust_remote_code enable_prefix_caching skip_tokenizer_init disable_log_stats seed tokenizer "
        "enable_return_routed_experts speculative_config async_scheduling data_parallel_size",
    ),
    (
        "vllm/sampling_params.py",
        "SamplingParams",
        "max_tokens temperature seed stop_token_ids ignore_eos detokenize extra_args skip_reading_prefix_cache",
    ),
    ("vllm/outputs.py", "RequestOutput", "request_id outputs num_cached_tokens"),
    ("vllm/outputs.py", "CompletionOutput", "token_ids routed_experts"),
)

#: File, class, function, its parameters in order, and how many of them the adapter gives by position; -1: no others.
SIGNATURES: tuple[tuple[str, str | None, str, str, int], ...] = (
    (_SCHEDULER, "Scheduler", "_free_request", "request", 1),
    (_SCHEDULER, "Scheduler", "_preempt_request", "request", 1),
    (_SCHEDULER, "Scheduler", "update_from_output", "scheduler_output", 1),
    (_WORKER, "Worker", "execute_model", "scheduler_output", 1),
    (_WORKER, "Worker", "compile_or_warm_up_model", "", -1),
    (_CPU_WORKER, "CPUWorker", "compile_or_warm_up_model", "", -1),
    (_WORKER, "Worker", "execute_dummy_batch", "", -1),
    (_WORKER, "Worker", "shutdown", "", -1),
    *(
        (path, owner, "_compute_routing", "hidden_states router_logits indices_type input_ids", -1)
        for path, owner in [(_BASE_ROUTER, "BaseRouter"), *((ROUTER_FILES[name], name) for name in ROUTERS)]
    ),
    (_TOPK, None, "vllm_topk_softmax", "topk_weights topk_indices token_expert_indices gating_output renormalize", 5),
    (_TOPK, None, "vllm_topk_sigmoid", "topk_weights topk_indices token_expert_indices gating_output renormalize", 5),
    (
        _TOPK_BIAS,
        None,
        "vllm_topk_sigmoid",
        "topk_weights topk_indices token_expert_indices gating_output renormalize e_score_correction_bias "
        "routed_scaling_factor",
        7,
    ),
    (_LLM, "LLM", "collective_rpc", "method timeout args", 1),
    (_LLM, "LLM", "generate", "prompts sampling_params use_tqdm", 2),
)

#: Parameters of `_compute_routing` that come by position.
ROUTING_BY_POSITION = ["hidden_states", "router_logits", "indices_type"]

#: File, class, function, an expression in it ("(": a call), and how often it is there; None: at least once.
FACTS: tuple[tuple[str, str | None, str | None, str, int | None], ...] = (
    # an engine whose requests have all ended still steps once more, so that their ends reach the workers
    (_SCHEDULER, "Scheduler", "has_requests", "self.has_finished_requests(", 1),
    (_SCHEDULER, "Scheduler", "has_finished_requests", "self.finished_req_ids", None),
    (_SCHEDULER, "Scheduler", "_free_request", "self.finished_req_ids.add(", 1),
    # every request ends in `_free_request`, and every preemption goes through `_preempt_request`
    (_SCHEDULER, "Scheduler", "finish_requests", "self._free_request(", 1),
    (_SCHEDULER, "Scheduler", "update_from_output", "self._free_request(", 1),
    (_SCHEDULER, "Scheduler", "schedule", "self._preempt_request(", 1),
    # preempted requests come back as cached ones in model runner V1, as new ones in V2
    (_SCHEDULER, "Scheduler", "schedule", "scheduled_new_reqs.extend(scheduled_resumed_reqs)", 1),
    (_SCHEDULER, "Scheduler", "schedule", "self.use_v2_model_runner", None),
    # one step of the worker is one forward; the wrapper calls the instance's method
    (_WORKER, "Worker", "execute_model", "self.model_runner.execute_model(", 1),
    (_WORKER, "Worker", "load_model", "self.model_runner.load_model(", 1),
    (_WORKER_BASE, "WorkerWrapperBase", "execute_model", "self.worker.execute_model(", 1),
    (_WORKER_BASE, "WorkerWrapperBase", "__getattr__", "getattr(self.worker, attr)", 1),
    (_RUNNER_V2, "GPUModelRunner", "execute_model", "ExecuteModelState(", 1),
    # a salt is part of the hash of a request's first block, and so of all of them
    ("vllm/v1/core/kv_cache_utils.py", None, "generate_block_hash_extra_keys", "request.cache_salt", None),
    # a front end that shuts down stops its engines here, whichever way it was started
    (_CLIENT, "MPClient", "shutdown", "self.resources.engine_manager.shutdown(", 1),
    ("vllm/entrypoints/cli/serve.py", None, "run_multi_api_server", "local_engine_manager.shutdown(", 1),
    ("vllm/entrypoints/cli/serve.py", None, "run_headless", "engine_manager.shutdown(", 1),
    # an engine core loads plug-ins before its workers' models, and sets their caches up after
    (_CORE, "EngineCore", "__init__", "self._initialize_kv_caches(", 1),
    # which environment variables the workers of a Ray cluster get
    ("vllm/ray/ray_env.py", None, None, "envs.VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", None),
    # what a router chose
    (_BASE_ROUTER, "BaseRouter", "_select_experts", "self._compute_routing(", 1),
    (_BASE_ROUTER, "BaseRouter", None, "self._compute_routing(", 1),
    (_MOE_RUNNER, "MoERunner", None, "self.router.select_experts(", 1),
    (_MOE_RUNNER, "MoERunner", "layer_id", "extract_layer_index(self.layer_name)", 1),
    (_MOE_RUNNER, "MoERunner", "is_monolithic", "self.routed_experts.quant_method.is_monolithic", 1),
    # what it chose goes to the experts alone, and from their own class to the quantisation method alone
    (_MOE_RUNNER, "MoERunner", None, "self._apply_quant_method(", 1),
    (_MOE_RUNNER, "MoERunner", "_forward_impl", "self._apply_quant_method(", 1),
    (_MOE_RUNNER, "MoERunner", "_apply_quant_method", "self.router.select_experts(", 1),
    (_MOE_RUNNER, "MoERunner", "_apply_quant_method", "topk_ids", 1),
    (_MOE_RUNNER, "MoERunner", "_apply_quant_method", "self.routed_experts.forward_modular(", 1),
    (_ROUTED, "RoutedExperts", "forward_modular", "topk_ids", 1),
    (_ROUTED, "RoutedExperts", "forward_modular", "self.quant_method.apply(", 1),
    # whether groups are used is told by the logits, not by how many experts the layer holds
    (_GROUPED, "GroupedTopKRouter", "_compute_routing", "router_logits.shape[-1]", None),
    # substituted experts are a class of their own, whose `forward_modular` is the first to see what was chosen; the
    # router's ids are those of the model, as vLLM's own capture gets them
    (_SUBSTITUTION, "SubstitutedRoutedExperts", "forward_modular", "self.expert_substitution.transform_routes(", 1),
    (_BASE_ROUTER, "BaseRouter", "_select_experts", "self.capture_fn(", 1),
    # a request that is told not to read from the prefix cache finds nothing in it, when it starts and when it resumes
    (_REQUEST, "Request", "get_skip_reading_prefix_cache", "self.sampling_params.skip_reading_prefix_cache", None),
    (_CACHE_MANAGER, "KVCacheManager", None, "request.skip_reading_prefix_cache", None),
    # the plug-in is loaded in every process, and compiled graphs with it are told from those without
    ("vllm/plugins/__init__.py", None, None, "'vllm.general_plugins'", 1),
    (_WORKER_BASE, "WorkerWrapperBase", None, "load_general_plugins(", 1),
    (_CORE, "EngineCore", "__init__", "load_general_plugins(", 1),
    (_ARGUMENTS, "EngineArgs", None, "load_general_plugins(", None),
    ("vllm/config/vllm.py", "VllmConfig", "compute_hash", "self.additional_config", None),
    ("vllm/envs.py", None, None, "'VLLM_MOE_ROUTING_SIMULATION_STRATEGY'", None),
    ("vllm/__init__.py", None, None, "'.entrypoints.llm:LLM'", 1),
    ("vllm/__init__.py", None, None, "'.sampling_params:SamplingParams'", 1),
)

#: Facts of the version given and later ones: vLLM's own capture needs the prefix cache and model runner V2.
LATER_FACTS: tuple[tuple[str, tuple[str, str | None, str | None, str, int | None]], ...] = tuple(
    ("0.31.0", (_CONFIG, "VllmConfig", "_verify_aux_output_compatibility", expression, 1))
    for expression in ("not self.cache_config.enable_prefix_caching", "not self.use_v2_model_runner")
)

#: File, class, and how it is decorated: a step takes attributes that it was not made with, and pickling keeps them.
DECORATED = ((_STEP, "SchedulerOutput", ["dataclass"]),)

#: File, class, and the base that it inherits what is patched from.
BASES = (
    (_CPU_WORKER, "CPUWorker", "Worker"),
    (_ASYNC_SCHEDULER, "AsyncScheduler", "Scheduler"),
    (_WORKER, "Worker", "WorkerBase"),
    *((path, name, "BaseRouter") for name, path in ROUTER_FILES.items()),
)

#: File, class, and methods that it must not replace, as their base's are patched.
INHERITED = (
    (_ASYNC_SCHEDULER, "AsyncScheduler", "schedule update_from_output _free_request _preempt_request has_requests"),
    (_CPU_WORKER, "CPUWorker", "load_model"),
)

#: Where what a router returns goes to: the layers, the quantisation methods and what they call. Models have code of
#: their own for it too, which overrides a method of the runner or of the experts and so gets copies, or calls a router
#: that is refused; that was seen by reading every file of 0.26.0 and 0.33.0 that names `topk_ids` or `topk_weights`.
RECEIVERS = (
    f"{_MOE}/",
    "vllm/model_executor/layers/quantization/",
    "vllm/distributed/device_communicators/",
    "vllm/lora/",
    "vllm/_custom_ops.py",
    "vllm/_aiter_ops.py",
)

_BEFORE = "a router writes to its own tensors before it returns them"
_OTHER = "not what a router returned: another tensor, which takes the same way by name"
_REFUSED_HERE = "the adapter refuses this router"
_ROCM = "shared experts fused into the top-k (ROCm), which the adapter refuses"
_COPIED = "a class of its own: copies are staged"

#: Writes that were read and are harmless: file, function, the operation, and why.
HARMLESS: tuple[tuple[str, str, str, str], ...] = (
    (_SUBSTITUTION, "ConstantExpertSubstitution.transform_routes",
     "topk_ids.copy_(routes.clamp_min(0).to(topk_ids.dtype))", _COPIED),
    (_SUBSTITUTION, "ConstantExpertSubstitution.transform_routes",
     "topk_weights.masked_fill_(~valid | substituted, 0.0)", _COPIED),
    (f"{_MOE}/b12x.py", "B12xExperts.warmup_launches",
     "topk_ids.remainder_(int(prepared.num_experts))", "ids of its own, for a warm-up"),
    (f"{_MOE}/experts/rocm_aiter_moe.py", "inject_shared_expert_weights",
     "topk_weights[:, topk:topk + num_fused_shared_experts] = shared_expert_weights[:token]", _ROCM),
    (f"{_MOE}/moe_permute_unpermute.py", "MoEPermuteScratch.prepare_topk_ids",
     "topk_ids_int32.copy_(topk_ids)", "a copy into its scratch memory"),
    (f"{_MOE}/moe_permute_unpermute.py", "moe_prepare_scatter",
     "scratch.expert_first_token_offset.zero_()", _OTHER),
    (f"{_MOE}/prepare_megamoe.py", "_store_topk",
     "tl.store(topk_weights_out + token_id[:, None] * topk_weights_out_stride_m + topk_offsets[None, :] * "
     "topk_weights_out_stride_k, weights, mask=topk_mask)", _OTHER),
    (f"{_MOE}/router/dsv4_topk.py", "_dsv4_topk_kernel",
     "tl.store(topk_ids_ptr + output_offsets, selected_ids, mask=output_mask)", _BEFORE),
    (f"{_MOE}/router/dsv4_topk.py", "_dsv4_topk_kernel",
     "tl.store(topk_weights_ptr + output_offsets, selected_weights, mask=output_mask)", _BEFORE),
    (_TOPK_BIAS, "_topk_softplus_sqrt_torch", "topk_indices.copy_(expert_ids)", _BEFORE),
    (_TOPK_BIAS, "_topk_softplus_sqrt_torch", "topk_indices.copy_(indices)", _BEFORE),
    (_TOPK_BIAS, "_topk_softplus_sqrt_torch", "topk_weights.copy_(weights * routed_scaling_factor)", _BEFORE),
    (_TOPK_BIAS, "fused_topk_bias", "topk_weights *= routed_scaling_factor", _BEFORE),
    (_GROUPED, "GroupedTopKRouter._compute_routing", "topk_weights *= self.routed_scaling_factor", _BEFORE),
    *(
        (ROUTER_FILES["ZeroExpertRouter"], "ZeroExpertRouter._compute_routing", text, _REFUSED_HERE)
        for text in (
            "topk_ids[zero_mask] = 0",
            "topk_weights *= self.routed_scaling_factor",
            "topk_weights[zero_mask] = 0.0",
        )
    ),
    (f"{_MOE}/topk_weight_and_reduce.py", "TopKWeightAndReduceContiguous.apply",
     "fused_expert_output.mul_(topk_weights.view(m, -1, 1))", _OTHER),
    (f"{_MOE}/topk_weight_and_reduce.py", "TopKWeightAndReduceNaiveBatched.apply",
     "rhs.mul_(topk_weights[matching_tokens].view(rhs.size(0), 1))", _OTHER),
    *(
        (f"vllm/distributed/device_communicators/{name}.py", f"{owner}.all_gather", "dim += input_.dim()", "a number")
        for name, owner in (
            ("base_device_communicator", "DeviceCommunicatorBase"),
            ("cpu_communicator", "CpuCommunicator"),
            ("cuda_communicator", "CudaCommunicator"),
        )
    ),
)  # fmt: skip

FILES = sorted(
    {row[0] for table in (PATCHED, MEMBERS, SIGNATURES, FACTS, DECORATED, BASES, INHERITED) for row in table}
    | set(ROUTER_FILES.values())
    | set(RECEIVERS)
)


def _skip(reason: str) -> NoReturn:
    """Skip, or fail where no test may be skipped."""
    if "MOESCOPE_NO_SKIPS" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module", params=VERSIONS)
def sources(request: pytest.FixtureRequest) -> Sources:
    """The files of one version; one version at a time is held."""
    cache = request.config.cache
    assert cache is not None
    try:
        found = Sources(request.param, FILES, cache.mkdir("vllm-sources"))
    except UnreachableError as error:
        _skip(f"the sources of vLLM cannot be had: {error}")
    return found


def _rows(sources: Sources, table: tuple[tuple[Any, ...], ...]) -> list[tuple[Any, ...]]:
    """Rows of a table whose files this version is meant to have."""
    return [row for row in table if _number(sources.version) >= _number(SINCE.get(row[0], "0"))]


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _where(path: str, *names: str | None) -> str:
    return f"{path}: {'.'.join(name for name in names if name) or 'the file'}"


def test_versions_are_the_supported_ones() -> None:
    assert all(supported(version) for version in VERSIONS)
    assert not supported("0.25.0")
    assert not supported("0.34.0")
    assert set(ROUTER_FILES) == {*ROUTERS, *_REFUSED}


def test_files_are_there(sources: Sources) -> None:
    expected = [path for (path,) in _rows(sources, tuple((path,) for path in FILES))]
    assert [path for path in expected if not sources.has(path)] == []
    early = [path for path in FILES if path not in expected and sources.has(path)]
    assert early == [], "these came earlier than SINCE says"


def test_patched_functions_are_there(sources: Sources) -> None:
    wrong = []
    for path, owner, name, wanted in _rows(sources, PATCHED):
        function = sources.function(path, owner, name)
        if function is None:
            wrong.append(f"{_where(path, owner, name)} is missing")
        elif lost := set(wanted) - set(parameters(function)):
            wrong.append(f"{_where(path, owner, name)} lacks {sorted(lost)}")
    assert not wrong, "\n".join(wrong)


def test_members_are_there(sources: Sources) -> None:
    wrong = []
    for path, owner, names in _rows(sources, MEMBERS):
        there = sources.members(path, owner)
        wrong += [_where(path, owner, name) for name in names.split() if name not in there]
    assert not wrong, "\n".join(wrong)


def test_signatures_fit(sources: Sources) -> None:
    wrong = []
    for path, owner, name, wanted, count in _rows(sources, SIGNATURES):
        function = sources.function(path, owner, name)
        if function is None:
            wrong.append(f"{_where(path, owner, name)} is missing")
            continue
        found = parameters(function)
        if count < 0:
            fits = found == wanted.split()
            if name == "_compute_routing":
                fits = fits and positional(function) == ROUTING_BY_POSITION
        else:
            fits = positional(function)[:count] == wanted.split()[:count] and set(wanted.split()) <= set(found)
        if not fits:
            wrong.append(f"{_where(path, owner, name)} takes {found}, not {wanted.split()}")
    assert not wrong, "\n".join(wrong)


def test_facts_hold(sources: Sources) -> None:
    wrong = []
    later = [fact for version, fact in LATER_FACTS if _number(sources.version) >= _number(version)]
    for path, owner, name, expression, times in _rows(sources, (*FACTS, *later)):
        count = sources.occurrences(path, owner, name, expression)
        if count != times if times is not None else not count:
            wrong.append(f"{_where(path, owner, name)} has {expression!r} {count} times")
    assert not wrong, "\n".join(wrong)


def test_a_step_can_carry_a_note(sources: Sources) -> None:
    for path, owner, decorators in DECORATED:
        assert sources.decorators(path, owner) == decorators


def test_classes_inherit_what_is_patched(sources: Sources) -> None:
    wrong = [
        f"{_where(path, owner)} is not a {base}"
        for path, owner, base in _rows(sources, BASES)
        if base not in sources.bases(path, owner)
    ]
    for path, owner, names in _rows(sources, INHERITED):
        own = sources.members(path, owner)
        wrong += [f"{_where(path, owner, name)} replaces what is patched" for name in names.split() if name in own]
    assert not wrong, "\n".join(wrong)


def _found(sources: Sources) -> list[Write]:
    """Writes to what routers return, in the files that get it."""
    files = [path for folder in RECEIVERS for path in sources.files(folder)]
    return find_writes({path: sources.tree(path) for path in files if sources.mentions(path, ("topk_",))})


def test_nothing_writes_to_what_routers_return(sources: Sources) -> None:
    """On a GPU these are the recorder's own staging buffers."""
    allowed = {Write(*row[:3]) for row in HARMLESS}
    found = _found(sources)
    wrong = [f"{_where(write.path, write.function)}: {write.text}" for write in found if write not in allowed]
    assert not wrong, "written to after routing; stage copies there, or say in HARMLESS why not:\n" + "\n".join(wrong)
    # the search finds what there is: this one is in every version, and substituted experts write from 0.33 on
    assert Write(_GROUPED, "GroupedTopKRouter._compute_routing", "topk_weights *= self.routed_scaling_factor") in found
    expected = {Write(*row[:3]) for row in HARMLESS if row[3] == _COPIED} if sources.has(_SUBSTITUTION) else set()
    assert {write for write in found if write.path == _SUBSTITUTION} == expected


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("topk_ids[0] = 1", "topk_ids[0] = 1"),
        ("topk_weights *= 2", "topk_weights *= 2"),
        ("ids = topk_ids.view(-1)\n    ids[mask] -= 1", "ids[mask] -= 1"),
        ("a, b = x, topk_weights\n    b.data.mul_(2)", "b.data.mul_(2)"),
        ("torch.add(x, 1, out=topk_ids)", "torch.add(x, 1, out=topk_ids)"),
        ("torch.clamp_(topk_ids, 0)", "torch.clamp_(topk_ids, 0)"),
        ("dist.all_reduce(topk_weights)", "dist.all_reduce(topk_weights)"),
        ("torch.flatten(topk_ids).fill_(0)", "torch.flatten(topk_ids).fill_(0)"),
        ("self.other(x, topk_ids)", "chosen.zero_()"),
        ("kernel[(1,)](topk_ids, x)", "tl.store(p + 1, x)"),
        ("ids = topk_ids.clone()\n    ids.add_(1)", None),
        ("x.copy_(topk_ids)", None),
        ("x = torch.empty_like(topk_ids)\n    x[0] = topk_ids[0]", None),
    ],
)
def test_writes_are_found(body: str, text: str | None) -> None:
    source = f"""
class Experts:
    def apply(self, x, topk_weights, topk_ids, mask):
{textwrap.indent(body.replace(chr(10) + "    ", chr(10)), "        ")}

    def other(self, y, chosen):
        chosen.zero_()

def kernel(p, x):
    tl.store(p + 1, x)
"""
    assert [write.text for write in find_writes({"a.py": ast.parse(source)})] == ([] if text is None else [text])
