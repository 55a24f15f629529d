"""The pass over weights on a GPU: the same as on the CPU, and how fast beside plain reading.

python -m tests.gpu.weights_cuda [--layers 48]
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from moescope.adapters.checkpoints import open_checkpoint
from moescope.adapters.weight_reader import WeightReader
from moescope.profiler.weight_pass import PassResult, PassSettings, run_pass


def save_checkpoint(folder: Path, layers: int, experts: int, hidden: int, width: int, *, fp8: bool) -> None:
    """Random experts in the shape of Qwen3-MoE, one shard a layer."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "num_experts": experts,
        "hidden_size": hidden,
        "moe_intermediate_size": width,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp."
        tensors = {f"{prefix}gate.weight": torch.randn(experts, hidden).bfloat16()}
        for expert in range(experts):
            for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
                weights = f"{prefix}experts.{expert}.{name}_proj.weight"
                tensors[weights] = torch.randn(shape).to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
                if fp8:
                    tensors[f"{weights}_scale_inv"] = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128))
        save_file(tensors, folder / f"model-{layer:05}.safetensors")


def run(folder: Path, settings: PassSettings, device: str) -> PassResult:
    """One pass; its files are read before, so that both devices find them in memory."""
    with WeightReader(open_checkpoint(folder)) as source:
        return run_pass([source], settings, device=device)


def reading(folder: Path) -> float:
    """Seconds to read all bytes of a checkpoint and do nothing with them."""
    start = time.perf_counter()
    buffer = bytearray(1 << 24)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def difference(first: PassResult, second: PassResult) -> float:
    """Greatest difference of two passes' sums, in units of the largest of each."""
    worst = 0.0
    for name, tensor in first.state.items():
        other = second.state[name]
        scale = max(float(tensor.abs().max()), 1e-30) if tensor.dtype != torch.bool else 1.0
        worst = max(worst, float((tensor.double() - other.double()).abs().max()) / scale)
    return worst


def main() -> None:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48, help="of the large checkpoint; 48 are 3.6 GB")
    layers = parser.parse_args().layers
    root = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        for name, shape, fp8 in (
            ("small", (6, 16, 300, 130), False),
            ("small fp8", (6, 16, 300, 130), True),
            ("large", (layers, 8, 2048, 768), False),
            ("large fp8", (layers, 8, 2048, 768), True),
        ):
            folder = root / name.replace(" ", "-")
            save_checkpoint(folder, *shape, fp8=fp8)
            for case, settings in (
                ("all pairs, matched", PassSettings(pairs=((0, 1), (1, 4)))),
                ("all pairs", PassSettings()),
                ("one distance", PassSettings(deltas=(2,))),
            ):
                plain = min(reading(folder) for _ in range(2))
                cpu, cuda = (
                    run(folder, settings, "cpu"),
                    min((run(folder, settings, "cuda") for _ in range(2)), key=lambda result: result.seconds),
                )
                found = difference(cpu, cuda)
                assert found < 1e-5, f"{name}, {case}: {found}"
                size = cuda.bytes_read / 1e9
                print(
                    f"{name:<10} {case:<19} {size:6.2f} GB  reading {size / plain:6.2f} GB/s  "
                    f"cuda {size / cuda.seconds:6.2f} GB/s  cpu {size / cpu.seconds:6.2f} GB/s  difference {found:.1e}"
                )
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
