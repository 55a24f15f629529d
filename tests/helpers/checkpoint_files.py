"""Checkpoints as files, in every layout, and what they stand for in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fp8 import quantise
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

Reference = dict[int, tuple[NDArray[np.float64], list[tuple[NDArray[np.float64], ...]]]]

QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 3,
    "hidden_size": 10,
    "moe_intermediate_size": 6,
}
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A checkpoint with an index if there is more than one shard; tensors go to the shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards + 1:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in sorted(set(where.values())):
        save_file({name: tensors[name] for name in tensors if where[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def per_expert(
    config: dict[str, Any],
    root: str = "mlp.",
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
    layers: tuple[int, ...] = (0, 1),
    block: tuple[int, int] | None = None,
    scale: str = "weight_scale_inv",
) -> tuple[dict[str, Tensor], Reference]:
    """Tensors under the hub's names, and what they stand for."""
    generator = torch.Generator().manual_seed(7)
    experts = config.get("num_experts", config.get("n_routed_experts", config.get("num_local_experts")))
    hidden, width = config["hidden_size"], config.get("moe_intermediate_size", config.get("intermediate_size"))
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": torch.zeros(2, 2)}
    reference: Reference = {}
    for layer in range(config["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(hidden)
    for layer in layers:
        prefix = f"model.layers.{layer}.{root}"
        router = torch.randn(experts, hidden, generator=generator).bfloat16()
        tensors[f"{prefix}gate.weight"] = router
        all_parts = []
        for expert in range(experts):
            parts = []
            for name, shape in zip(names, ((width, hidden), (width, hidden), (hidden, width)), strict=True):
                weights = torch.randn(shape, generator=generator)
                if block is None:
                    stored = weights.bfloat16()
                    parts.append(stored.double().numpy())
                else:
                    stored, scales, values = quantise(weights, block)
                    parts.append(values)
                    tensors[f"{prefix}experts.{expert}.{name}.{scale}"] = scales
                tensors[f"{prefix}experts.{expert}.{name}.weight"] = stored
            all_parts.append(tuple(parts))
        reference[layer] = (router.double().numpy(), all_parts)
    return tensors, reference


def fuse(
    reference: Reference, prefix: str, transposed: bool, router: str = "mlp.gate.weight", root: str = "mlp.experts."
) -> dict[str, Tensor]:
    """The fused tensors of a reference, gate rows before up rows."""
    tensors: dict[str, Tensor] = {}
    for layer, (gate, experts) in reference.items():
        both = np.stack([np.concatenate(parts[:2]) for parts in experts])
        down = np.stack([parts[2] for parts in experts])
        if transposed:
            both, down = both.swapaxes(1, 2), down.swapaxes(1, 2)
        for name, values in ((router, gate), (f"{root}gate_up_proj", both), (f"{root}down_proj", down)):
            tensors[f"{prefix}layers.{layer}.{name}"] = torch.from_numpy(values.copy()).bfloat16()
    return tensors


def modules_reference(model: nn.Module, transposed: bool = False, interleaved: bool = False) -> tuple[Reference, Any]:
    """By layer, the router (E, H) and each expert's gate, up and down, from the module's own parameters."""
    found: Reference = {}
    biases = {}
    for path, module in model.named_modules():
        if not path.endswith(".experts") or not hasattr(module, "gate_up_proj"):
            continue
        both, downs = (module.get_parameter(n).detach().double().numpy() for n in ("gate_up_proj", "down_proj"))
        if transposed:
            both, downs = both.swapaxes(1, 2), downs.swapaxes(1, 2)
        half = both.shape[1] // 2
        gates, ups = (both[:, 0::2], both[:, 1::2]) if interleaved else (both[:, :half], both[:, half:])
        parent = model.get_submodule(path.rpartition(".")[0])
        shape = (both.shape[0], both.shape[2])
        routers = [
            p for n, p in parent.named_parameters() if p.shape == shape and "shared" not in n and "experts." not in n
        ]
        assert len(routers) == 1
        index = int(path.split("layers.")[1].split(".")[0])
        found[index] = (routers[0].detach().double().numpy(), list(zip(gates, ups, downs, strict=True)))
        tensors = [*parent.named_parameters(), *parent.named_buffers()]
        bias = [t for n, t in tensors if "bias" in n and t.numel() == both.shape[0] and "proj" not in n]
        assert len(bias) < 2
        biases[index] = bias[0].detach().flatten().double().numpy() if bias else None
    return found, biases
