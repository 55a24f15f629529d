"""A vLLM worker whose experts write to what the routers returned, as substituted experts do; for `worker_cls`.

The environment's `MOESCOPE_TEST_WRITER` names who writes: "experts", a class of its own in the place of vLLM's, or
"method", the quantisation method below vLLM's class, where nothing tells it from one that only reads.
"""

import os
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.platforms import current_platform

#: Who writes.
VARIABLE = "MOESCOPE_TEST_WRITER"
CPU = current_platform.is_cpu()

if CPU:
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


@torch.library.custom_op("overwriting::keep", mutates_args=("sums",))
def _keep(weights: Tensor, ids: Tensor, sums: Tensor) -> None:
    rows = ids.flatten().long()
    sums[0].index_add_(0, rows, torch.ones(len(rows), dtype=sums.dtype))
    sums[1].index_add_(0, rows, weights.flatten().to(sums.dtype))


class OverwritingWorker(Worker):  # type: ignore[misc, valid-type]
    """Its experts count what they are given, then overwrite it.

    Attributes:
        given: By layer index, float64 (2, E): how often each expert was given, and the sum of its weights; on a CPU.
        overwriting: Layers that write.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, and let its experts write before anybody else sees them."""
        self.given: dict[int, Tensor] = {}
        self.overwriting = 0
        load = self.model_runner.load_model

        def load_and_replace(*inner: Any, **options: Any) -> None:
            load(*inner, **options)
            for runner in self.model_runner.get_model().modules():
                if isinstance(runner, MoERunner):
                    self._replace(runner)

        self.model_runner.load_model = load_and_replace
        super().load_model(*args, **kwargs)

    def _replace(self, runner: Any) -> None:
        experts = int(runner.moe_config.num_logical_experts)
        sums = self.given[runner.layer_id] = torch.zeros((2, experts), dtype=torch.float64)
        self.overwriting += 1

        def overwrite(weights: Tensor, ids: Tensor) -> None:
            if CPU:
                torch.ops.overwriting.keep(weights, ids, sums)
            ids.copy_((ids + 1) % experts)
            weights.masked_fill_(ids % 2 == 0, 0.0)

        if os.environ[VARIABLE] == "experts":
            _write_in_class(runner.routed_experts, overwrite)
        else:
            _write_in_method(runner.routed_experts.quant_method, overwrite)


def _write_in_class(experts: Any, overwrite: Any) -> None:
    kind = type(experts)

    class OverwritingExperts(kind):  # type: ignore[misc, valid-type]
        def forward_modular(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            overwrite(topk_weights, topk_ids)
            return super().forward_modular(x, topk_weights, topk_ids, *args, **kwargs)

    experts.__class__ = OverwritingExperts


def _write_in_method(method: Any, overwrite: Any) -> None:
    apply = method.apply

    def overwriting_apply(*args: Any, topk_weights: Tensor, topk_ids: Tensor, **kwargs: Any) -> Any:
        overwrite(topk_weights, topk_ids)
        return apply(*args, topk_weights=topk_weights, topk_ids=topk_ids, **kwargs)

    method.apply = overwriting_apply


def given(worker: Any) -> dict[int, list[list[float]]]:
    """What the experts of each layer were given since the last call, for `collective_rpc`."""
    found = {layer: sums.tolist() for layer, sums in worker.given.items()}
    for sums in worker.given.values():
        sums.zero_()
    return found


def overwriting(worker: Any) -> int:
    """Layers that write, for `collective_rpc`."""
    return int(worker.overwriting)
