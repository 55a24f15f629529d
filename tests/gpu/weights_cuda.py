"""The pass over weights on a GPU: the same as on a CPU and as plain float64, and how fast beside mere reading.

    python -m tests.gpu.weights_cuda [--layers 48]

Small checkpoints of several layouts, with experts that are zero or not finite, are summed on both devices and every sum
is compared. Then one in the shape of Qwen3-30B-A3B is timed, its files in memory: *reading* is what as many threads
take to read the same bytes into memory of their own, and the share is that time over the pass's. Exit code 1 if a sum
differs by more than 1e-5 of the largest of its kind.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from moescope.adapters.checkpoints import open_checkpoint
from moescope.adapters.weight_reader import WeightReader
from moescope.profiler.weight_pass import READERS, PassResult, PassSettings, run_pass
from moescope.profiler.weight_slabs import PARTS

Layout = Literal["bf16", "fp8", "transposed"]

LARGEST_DIFFERENCE: Final = 1e-5
REPETITIONS: Final = 3
BLOCK: Final = 128
#: Read at a time by a thread of plain reading: more than caches hold, as the pass's own memory is.
PIECE: Final = 1 << 27
CASES: Final = {
    "all pairs, matched": PassSettings(deltas=(1, 12), pairs=((0, 1), (1, 4))),
    "all pairs": PassSettings(deltas=(1, 12)),
    "one distance": PassSettings(deltas=(2,), all_pairs=False),
}


def save_checkpoint(
    folder: Path, layout: Layout, layers: int, experts: int, hidden: int, width: int, *, faults: bool = False
) -> Path:
    """Random experts, one shard a layer; with `faults`, some of layer 1 are zero, NaN or infinite."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_vl_moe_text" if layout == "transposed" else "qwen3_moe",
        "num_hidden_layers": layers,
        "num_experts": experts,
        "hidden_size": hidden,
        "moe_intermediate_size": width,
    }
    if layout == "fp8":
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp."
        shared = torch.randn(1, hidden, generator=generator)
        parts = {
            "gate": torch.randn(experts, width, hidden, generator=generator) + shared,
            "up": torch.randn(experts, width, hidden, generator=generator),
            "down": torch.randn(experts, hidden, width, generator=generator) + shared.T,
        }
        if faults and layer == 1:
            parts["gate"][1] = 0.0
            parts["up"][2, 3, 5] = torch.nan
            parts["down"][3, 4, 6] = torch.nan if layout == "fp8" else torch.inf  # its largest code is no infinity
        tensors = {f"{prefix}gate.weight": torch.randn(experts, hidden, generator=generator).bfloat16()}
        if layout == "transposed":
            both = torch.cat([parts["gate"], parts["up"]], dim=1)
            tensors[f"{prefix}experts.gate_up_proj"] = both.mT.bfloat16().contiguous()
            tensors[f"{prefix}experts.down_proj"] = parts["down"].mT.bfloat16().contiguous()
        else:
            tensors |= _per_expert(prefix, parts, fp8=layout == "fp8", generator=generator)
        save_file(tensors, folder / f"model-{layer:05}.safetensors")
    return folder


def _per_expert(prefix: str, parts: dict[str, Tensor], *, fp8: bool, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = {}
    for part, experts in parts.items():
        for expert, weights in enumerate(experts):
            name = f"{prefix}experts.{expert}.{part}_proj.weight"
            tensors[name] = weights.to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
            if fp8:
                shape = [-(-size // BLOCK) for size in weights.shape]
                tensors[f"{name}_scale_inv"] = 0.5 + torch.rand(shape, generator=generator)
    return tensors


def run(folders: Iterable[Path], settings: PassSettings, device: str) -> PassResult:
    """One pass over a checkpoint, or two."""
    with ExitStack() as stack:
        readers = [stack.enter_context(WeightReader(open_checkpoint(folder))) for folder in folders]
        return run_pass(readers, settings, device=device)


def plain_reading(folder: Path) -> float:
    """Seconds that as many threads as the pass has take to read all bytes and do nothing with them."""
    pieces = [
        (file, start) for file in sorted(folder.glob("*.safetensors")) for start in range(0, file.stat().st_size, PIECE)
    ]
    buffers = [memoryview(bytearray(PIECE)) for _ in range(READERS)]

    def read(lane: int) -> None:
        for file, start in pieces[lane::READERS]:
            with file.open("rb", buffering=0) as stream:
                stream.seek(start)
                done = 0
                while done < PIECE and (got := stream.readinto(buffers[lane][done:])):
                    done += got

    with ThreadPoolExecutor(READERS) as pool:
        started = time.perf_counter()
        list(pool.map(read, range(READERS)))
        return time.perf_counter() - started


def difference(first: PassResult, second: PassResult) -> float:
    """Greatest difference of two passes' sums, in units of the largest of each; infinite if they differ in faults.

    Products of different layers' experts are measured by the squares of their lengths, as in a cosine. What an expert
    that is not finite adds to sums and means before it is found depends on how blocks are cut, so such experts, and for
    centred sums and means their layers, are left out.
    """
    assert first.state.keys() == second.state.keys()
    faulty = first.state["non_finite"][0].mT  # (3, E, L)
    worst = 0.0
    for name, tensor in first.state.items():
        own, other = tensor.double(), second.state[name].double()
        kept = own.isfinite()
        if not torch.equal(kept, other.isfinite()):
            return float("inf")
        if name in ("raw", "centred", "means"):
            sound = ~(faulty if name == "raw" else faulty.any(1, keepdim=name == "centred"))
            kept &= sound[..., :, None] & sound[..., None, :]
        if name in ("raw", "centred", "means", "within"):  # the same below the diagonal, where it may be left out
            kept = kept.triu()
        measure = (first.state["within"] if name == "between" else tensor).double()
        if kept.any() and (scale := float(measure[measure.isfinite()].abs().max())):
            worst = max(worst, float((own - other)[kept].abs().max()) / scale)
    return worst


def difference_from_float64(folder: Path, result: PassResult, device: str) -> float:
    """Greatest difference of the cosines at the same index, as they are and centred, from those of float64."""
    worst = 0.0
    with WeightReader(open_checkpoint(folder)) as source:
        for place, part in enumerate(PARTS):
            rows = source.hidden if part == "down" else source.width
            weights = torch.stack(
                [
                    torch.stack(
                        [source.rows(layer, expert, part, 0, rows).flatten().to(device) for layer in source.layers]
                    )
                    for expert in range(source.experts)
                ]
            )
            mean = weights.double().mean(0)
            for expert, own in enumerate(weights):
                for name, table in (("raw", own.double()), ("centred", own.double() - mean)):
                    exact = _cosine((table @ table.T).cpu())
                    sums = result.state[name][place, expert].triu()
                    measured = sums != 0  # raw ones of some distances alone
                    worst = max(worst, float((exact - _cosine(sums))[measured].abs().max()))
    return worst


def _cosine(gram: Tensor) -> Tensor:
    length = gram.diagonal().sqrt()
    return gram / (length[:, None] * length[None, :])


def check_small(root: Path) -> bool:
    """Every sum on both devices: layouts, faults, samples, and one checkpoint against another."""
    shape = (6, 16, 300, 130)
    layouts: tuple[Layout, ...] = ("bf16", "fp8", "transposed")
    folders = {layout: save_checkpoint(root / layout, layout, *shape, faults=True) for layout in layouts}
    sound = save_checkpoint(root / "sound", "bf16", *shape)
    passes: dict[str, tuple[list[Path], PassSettings]] = {}
    for layout, folder in folders.items():
        passes |= {f"{layout}, {case}": ([folder], settings) for case, settings in CASES.items()}
        passes[f"{layout}, small blocks"] = ([folder], PassSettings(pairs=((0, 1),), memory=1 << 21))
        passes[f"{layout} against bf16"] = ([folder, sound], PassSettings(pairs=((0, 0), (1, 1))))
    passes["bf16, sketch"] = ([sound], PassSettings(pairs=((0, 1),), sketch=True))
    held = True
    for name, (paths, settings) in passes.items():
        found = difference(run(paths, settings, "cpu"), run(paths, settings, "cuda"))
        held &= found <= LARGEST_DIFFERENCE
        print(f"{name:<32} difference from the CPU {found:.1e}", flush=True)
    return held


def time_large(root: Path, layers: int) -> bool:
    """Speed of each case beside reading; and its sums beside the CPU's and float64."""
    held = True
    for layout in ("bf16", "fp8"):
        folder = save_checkpoint(root / f"large-{layout}", layout, layers, 8, 2048, 768)
        for case, settings in CASES.items():
            cpu = run([folder], settings, "cpu")
            reading, seconds = [], []
            for _ in range(REPETITIONS):
                reading.append(plain_reading(folder))
                cuda = run([folder], settings, "cuda")
                seconds.append(cuda.seconds)
            found = difference(cpu, cuda)
            exact = difference_from_float64(folder, cuda, "cuda") if case == "all pairs" else 0.0
            held &= max(found, exact) <= LARGEST_DIFFERENCE
            size = cuda.bytes_read / 1e9
            print(
                f"{layout:<5} {case:<19} {size:5.2f} GB  reading {size / min(reading):6.2f} GB/s"
                f"  cuda {size / min(seconds):6.2f} GB/s ({min(reading) / min(seconds):.0%} of reading;"
                f" first {size / seconds[0]:.2f})  cpu {size / cpu.seconds:6.2f} GB/s"
                f"  difference {found:.1e}" + (f", from float64 {exact:.1e}" if exact else ""),
                flush=True,
            )
        shutil.rmtree(folder)
    return held


def main() -> int:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48, help="of the large checkpoint; 48 are 3.6 GB")
    layers = parser.parse_args().layers
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    root = Path(tempfile.mkdtemp())
    try:
        small = check_small(root)
        return int(not (time_large(root, layers) and small))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
