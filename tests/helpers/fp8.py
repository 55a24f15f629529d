"""FP8 checkpoints made and undone by numpy alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import Tensor

#: Parts of names whose tensors stay as they are: what published FP8 checkpoints leave alone.
UNTOUCHED = ("embed_tokens", "lm_head", ".gate.weight", "norm")


def e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Values of FP8 codes: 1 sign bit, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    exponent = (codes >> 3 & 15).astype(np.float64)
    mantissa = (codes & 7) / 8
    size = np.where(exponent == 0, 2.0**-6 * mantissa, 2.0 ** (exponent - 7) * (1 + mantissa))
    return np.where(codes >> 7, -size, size)


def quantise(weights: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """FP8 codes, one scale per block, and what they stand for."""
    rows, columns = weights.shape
    values = weights.double().numpy()
    scales = np.empty((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    spread = np.empty_like(values)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = np.abs(values[where]).max() / 448
            spread[where] = scales[i, j]
    codes = torch.from_numpy((values / spread).astype(np.float32)).to(torch.float8_e4m3fn)
    return codes, torch.from_numpy(scales), e4m3(codes.view(torch.uint8).numpy()) * spread


@dataclass(frozen=True)
class Fp8Checkpoint:
    """A checkpoint in FP8, and what it stands for.

    Attributes:
        folder: The checkpoint.
        values: What each tensor stands for, float32; scales are absent.
        weights: Names of those that are FP8.
    """

    folder: Path
    values: dict[str, Tensor]
    weights: set[str]

    def plain(self, folder: Path, dtype: torch.dtype) -> Path:
        """The same model as a checkpoint without FP8, its weights dequantised by numpy and rounded to `dtype`."""
        folder.mkdir()
        tensors = {name: value.to(dtype) if name in self.weights else value for name, value in self.values.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for file in self.folder.iterdir():
            if file.suffix == ".json" and not file.name.endswith(".index.json"):
                (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((self.folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
        return folder


def fp8_checkpoint(
    family: str, folder: Path, *, shards: int = 3, block: tuple[int, int] = (16, 16), **changes: Any
) -> Fp8Checkpoint:
    """A tiny model in FP8, under the names of the hub; weights lie in other files than their scales.

    Norms and routers are bfloat16 and correction biases float32, as published ones are.
    """
    model = tiny_model(family, **changes)
    model.save_pretrained(folder, save_original_format=True)
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors, values, weights = {}, {}, set()
    for name, tensor in stored.items():
        if tensor.ndim == 2 and not any(part in name for part in UNTOUCHED):
            codes, scales, exact = quantise(tensor, block)
            tensors |= {name: codes, f"{name}_scale_inv": scales}
            values[name] = torch.from_numpy(exact.astype(np.float32))
            weights.add(name)
        else:
            tensors[name] = tensor if "bias" in name else tensor.bfloat16()
            values[name] = tensors[name].float()
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in sorted(set(where.values())):
        held = {name: tensor for name, tensor in tensors.items() if where[name] == shard}
        save_file(held, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))
    return Fp8Checkpoint(folder, values, weights)
