"""Bind to the routers inside a vLLM worker: what each layer chose goes to the recorder's staging buffers.

Where vLLM's own top-k kernel takes its output tensors from the caller, it is given the staging buffers, so that nothing
is added to the engine's graphs; elsewhere two small copies are. Routers are known by their class; one that is not known
is refused.

vLLM then holds the staging buffers as its own, so nothing of it may write to them. Code of vLLM that was read does not;
where other code gets them, such as substituted experts, which turn the router's ids into rows in place, copies are
staged. PyTorch counts the writes to a tensor, so one that comes all the same stops the engine, at no cost in graphs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from moescope.profiler.errors import ModelError
from moescope.profiler.profile import LayerInfo, Scoring
from moescope.profiler.staged import StagedRecorder, stage_distributions

#: Router classes that can be recorded exactly.
ROUTERS: Final = ("FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter", "CPURouter")
#: Why other routers cannot.
_REFUSED: Final = {
    "RoutingSimulatorRouter": "the routing is simulated: unset VLLM_MOE_ROUTING_SIMULATION_STRATEGY",
    "ZeroExpertRouter": "its zero experts are chosen but do nothing",
    "CustomRoutingRouter": "the model brings a routing function of its own",
    "AiterSharedRoutedFusedMoERouter": "shared experts are fused into its top-k",
}

Routing = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class BoundLayer:
    """One MoE layer of a worker's model.

    Attributes:
        info: Index, experts, k.
        runner: vLLM's MoE runner.
        router: Its router.
        gate: Router weight (E, H), or None where it was not found.
        scoring: Scoring function.
        scale: Factor that the router's weights carry.
        groups: Groups of experts that the router first chooses among; 1 for none.
    """

    info: LayerInfo
    runner: Any
    router: Any
    gate: Tensor | None
    scoring: Scoring
    scale: float
    groups: int


def find_layers(model: Any) -> list[BoundLayer]:
    """The MoE layers of a model that a worker has loaded, in model order.

    Raises:
        ModelError: There are none, or one of them routes in a way that cannot be recorded exactly.
    """
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    modules = dict(model.named_modules())
    layers = [
        _bound(module, modules.get(f"{name.rpartition('.')[0]}.gate"))
        for name, module in modules.items()
        if isinstance(module, MoERunner)
    ]
    layers.sort(key=lambda layer: layer.info.index)
    if len({layer.info.index for layer in layers}) != len(layers):
        raise ModelError("two MoE layers have the same index; this model cannot be recorded")
    return layers


def _bound(runner: Any, gate: Any) -> BoundLayer:
    router = runner.router
    kind = type(router).__name__
    where = f"layer {runner.layer_id}"
    if runner.is_monolithic:
        raise ModelError(
            f"{where} routes inside a fused kernel ({type(runner.routed_experts.quant_method).__name__}), where it "
            "cannot be recorded; choose a modular backend with the engine argument moe_backend=triton (cutlass, marlin)"
        )
    if kind in _REFUSED:
        raise ModelError(f"{where}: {kind} cannot be recorded: {_REFUSED[kind]}")
    if kind not in ROUTERS:
        raise ModelError(f"{where}: the router {kind} is unknown; moescope records {', '.join(ROUTERS)}")
    if getattr(router, "custom_routing_function", None) is not None:
        raise ModelError(f"{where}: {kind} cannot be recorded: {_REFUSED['CustomRoutingRouter']}")
    if getattr(router, "_hash_indices_table", None) is not None:
        raise ModelError(f"{where}: {kind} cannot be recorded: it routes by a hash of the token id")
    if getattr(router, "num_fused_shared_experts", 0):
        raise ModelError(f"{where}: {kind} cannot be recorded: shared experts are fused into its top-k")
    config = runner.moe_config
    experts, k = int(config.num_logical_experts), int(config.experts_per_token)
    plain = _falls_back(router, experts)
    scoring: Any = "softmax" if plain else router.scoring_func
    if scoring not in ("softmax", "sigmoid"):
        raise ModelError(f"{where}: the scoring function {scoring!r} is unknown; moescope records softmax and sigmoid")
    if experts < 1 or not 1 <= k <= experts:
        raise ModelError(f"{where}: {experts} experts, of which {k} are chosen, cannot be right")
    gate = gate if gate is not None else getattr(runner, "gate", None)
    weight = None if gate is None else _router_weight(gate, experts, int(config.hidden_dim))
    if weight is not None and not torch.isfinite(weight).all():
        raise ModelError(f"{where}: the router weight holds NaN or infinite values")
    info = LayerInfo(int(runner.layer_id), experts, k)
    return BoundLayer(info, runner, router, weight, scoring, _scale(router, plain), _groups(router, plain))


def _router_weight(gate: Any, experts: int, hidden: int) -> Tensor | None:
    """Router weight (E, H), or None if it cannot be had."""
    weight = getattr(gate, "weight", None)
    if isinstance(weight, Tensor) and weight.shape == (experts, hidden):
        return weight.detach()
    if getattr(gate, "bias", None) is not None:
        return None
    dtype = getattr(gate, "params_dtype", None) or torch.get_default_dtype()
    with torch.inference_mode():  # a packed weight still multiplies: what it makes of the unit vectors is the weight
        rows = gate(torch.eye(hidden, dtype=dtype))
    rows = rows[0] if isinstance(rows, tuple) else rows
    return rows.T.contiguous() if rows.shape == (hidden, experts) else None


def _scale(router: Any, plain: bool) -> float:
    """Factor that the weights from `_compute_routing` carry."""
    scale = float(getattr(router, "routed_scaling_factor", 1.0) or 1.0)
    grouped = getattr(router, "use_grouped_topk", None)
    if grouped is False:  # CPURouter multiplies in its grouped branch alone
        return 1.0
    return 1.0 if plain else scale


def _groups(router: Any, plain: bool) -> int:
    """Groups of experts that a router first chooses among."""
    if getattr(router, "use_grouped_topk", True) is False or plain:
        return 1
    return int(getattr(router, "num_expert_group", None) or 1)


def _falls_back(router: Any, experts: int) -> bool:
    """Whether a grouped router whose groups do not divide its experts uses vLLM's plain softmax top-k, unscaled."""
    if type(router).__name__ != "GroupedTopKRouter" or router.e_score_correction_bias is not None:
        return False
    groups = router.num_expert_group  # held against the logits, one for each of the model's experts
    return bool(experts <= groups or experts % groups)


def stage(recorder: StagedRecorder, slot: int, layer: BoundLayer, data_parallel: int) -> None:
    """Replace a router's `_compute_routing` by one that also leaves its choices in the staging buffers."""
    router = layer.router
    original: Routing = router._compute_routing
    into = _direct(router) if recorder.device.type == "cuda" and _only_reads(layer.runner) else None
    lent = _Lent(f"layer {layer.info.index}")
    sampled = recorder.sample is not None

    if recorder.device.type != "cuda":
        _define_operators()

    def on_cpu(
        hidden_states: Tensor, router_logits: Tensor, indices_type: Any, *, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        weights, ids = original(hidden_states, router_logits, indices_type, input_ids=input_ids)
        # operators rather than calls: the engine traces this function, and operators stay in what it compiles
        torch.ops.moescope.stage(ids, weights, recorder.ids, recorder.weights, slot)
        if sampled:
            torch.ops.moescope.stage_distributions(
                router_logits, recorder.sample, recorder.distributions, slot, layer.scoring == "sigmoid"
            )
        return weights, ids

    def on_gpu(
        hidden_states: Tensor, router_logits: Tensor, indices_type: Any, *, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows = len(router_logits)
        start, stop = _own_rows(rows) if data_parallel > 1 else (0, rows)
        if stop - start > recorder.capacity:  # nothing is staged, which the commit finds
            return original(hidden_states, router_logits, indices_type, input_ids=input_ids)
        if into is not None and start == 0 and stop == rows and indices_type in (None, torch.int32):
            lent.check()
            weights, ids = into(router_logits, *(view.data for view in recorder.views(slot, rows)))
            lent.lend(weights, ids)
        else:
            weights, ids = original(hidden_states, router_logits, indices_type, input_ids=input_ids)
            ids_out, weights_out = recorder.views(slot, stop - start)
            ids_out.copy_(ids[start:stop])
            weights_out.copy_(weights[start:stop])
        recorder.stage_distributions(slot, router_logits[start:stop])
        return weights, ids

    router._compute_routing = on_gpu if recorder.device.type == "cuda" else on_cpu


class _Lent:
    """The staging views that vLLM holds as a router's outputs, and whether it wrote to them.

    Each view comes with a count of writes of its own (`Tensor.data`), so PyTorch's writes are seen when the layer next
    routes: in time, as an engine's first forward is a profiling run, never counted and before any graph is captured.
    What compiled kernels write is not seen.

    Args:
        where: The layer, for the message.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._versions: list[tuple[Tensor, int]] = []

    def lend(self, *tensors: Tensor) -> None:
        """The router returns these."""
        self._versions = [(tensor, tensor._version) for tensor in tensors]

    def check(self) -> None:
        """Nobody has written to what was lent last.

        Raises:
            RuntimeError: Somebody has; what was staged is not what the router chose.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(
                f"moescope: {self._where} cannot be recorded: vLLM wrote to what its router had returned"
            )


def _only_reads(runner: Any) -> bool:
    """Whether a router's outputs go to code of vLLM that was read and does not write to them, and to no other."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    taken = (
        (runner._forward_impl, MoERunner._forward_impl),
        (runner._apply_quant_method, MoERunner._apply_quant_method),
        (runner.routed_experts.forward_modular, RoutedExperts.forward_modular),
    )
    return all(getattr(method, "__func__", None) is known for method, known in taken)


def _own_rows(rows: int) -> tuple[int, int]:
    """Of the rows that a layer routes under data parallelism, those of this rank: all, or a span of all ranks' rows."""
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    metadata = context.dp_metadata
    if metadata is None:
        return 0, rows
    counts = metadata.num_tokens_across_dp_cpu
    from vllm.distributed.parallel_state import get_dp_group

    rank = get_dp_group().rank_in_group
    own, total = int(counts[rank]), int(counts.sum())
    if rows == own:
        return 0, rows
    if rows == total:
        start = int(counts[:rank].sum())
        return start, start + own
    raise RuntimeError(f"moescope: a layer routed {rows} rows, but this rank has {own} and all ranks have {total}")


def _direct(router: Any) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """The call of vLLM's own top-k kernel that writes into given tensors, or None where there is none."""
    from vllm._aiter_ops import rocm_aiter_ops
    from vllm.model_executor.layers.fused_moe.router import fused_topk_bias_router, fused_topk_router

    if rocm_aiter_ops.is_fused_moe_enabled():
        return None
    kind = type(router).__name__
    kernel: Callable[..., Any]
    if kind == "FusedTopKRouter":
        plain = {"softmax": "vllm_topk_softmax", "sigmoid": "vllm_topk_sigmoid"}
        kernel = getattr(fused_topk_router, plain[router.scoring_func])

        def choose(logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            kernel(weights, ids, torch.empty_like(ids), logits, router.renormalize)
            return weights, ids

        return choose
    if kind == "FusedTopKBiasRouter" and router.scoring_func == "sigmoid":
        kernel = fused_topk_bias_router.vllm_topk_sigmoid
        scale = router.routed_scaling_factor

        def choose_biased(logits: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            bias = router.e_score_correction_bias
            bias = None if bias is None else bias.data
            kernel(weights, ids, torch.empty_like(ids), logits, router.renormalize, bias, scale)
            return weights, ids

        return choose_biased
    return None


def _define_operators() -> None:
    if hasattr(torch.ops.moescope, "stage"):
        return

    @torch.library.custom_op("moescope::stage", mutates_args=("all_ids", "all_weights"))
    def stage_choices(ids: Tensor, weights: Tensor, all_ids: Tensor, all_weights: Tensor, slot: int) -> None:
        rows = min(len(ids), all_ids.shape[1])
        all_ids[slot, :rows].copy_(ids[:rows])
        all_weights[slot, :rows].copy_(weights[:rows])

    @torch.library.custom_op("moescope::stage_distributions", mutates_args=("all_distributions",))
    def stage_probabilities(
        logits: Tensor, sample: Tensor, all_distributions: Tensor, slot: int, sigmoid: bool
    ) -> None:
        stage_distributions(logits, sample, all_distributions[slot], sigmoid)
