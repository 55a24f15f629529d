"""Checkpoints on disk: every layout against plain references, every fault named in one line."""

import gc
import io
import itertools
import json
import os
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import BLOCKS, QWEN, Reference, fuse, modules_reference, per_expert, write
from fp8 import e4m3, quantise
from safetensors.torch import save_file
from tiny_models import FAMILY_CONFIGS, tiny_model
from torch import Tensor
from transformers import AutoConfig, Llama4ForCausalLM, Qwen3VLMoeTextModel

from moescope.adapters.checkpoints import Checkpoint, ExpertWeights, open_checkpoint, router_weights
from moescope.adapters.layouts import CHECKPOINT_FAMILIES
from moescope.profiler.errors import ModelError

PARTS = ("gate", "up", "down")


def check(checkpoint: Checkpoint, reference: Reference) -> None:
    """Everything the checkpoint gives, whole and by rows, against the reference; bit for bit."""
    assert [layer.index for layer in checkpoint.layers] == sorted(reference)
    for layer, router in zip(checkpoint.layers, router_weights(checkpoint), strict=True):
        expected_router, experts = reference[layer.index]
        assert router.dtype == np.float32
        np.testing.assert_array_equal(router, expected_router.astype(np.float32))
        assert (layer.experts, layer.width, layer.hidden) == (len(experts), *experts[0][0].shape)
        for expert, parts in enumerate(experts):
            weights = checkpoint.expert(layer.index, expert).float32()
            for part, expected in zip(PARTS, parts, strict=True):
                whole = getattr(weights, part)
                assert whole.dtype == torch.float32
                assert whole.is_contiguous()
                np.testing.assert_array_equal(whole.numpy(), expected.astype(np.float32))
        last = len(experts) - 1
        for part, expected in zip(PARTS, experts[last], strict=True):
            count = len(expected)
            for start, stop in ((0, count), (0, 0), (count, count), (1, 4), (count - 3, count), (2, 3)):
                rows = checkpoint.rows(layer.index, last, part, start, stop)
                assert rows.dtype == torch.float32
                np.testing.assert_array_equal(rows.numpy(), expected[start:stop].astype(np.float32))


# --- what transformers saves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(CHECKPOINT_FAMILIES.keys() & FAMILY_CONFIGS.keys()))
def test_what_transformers_saves_is_read_back(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    odd = family == "gpt_oss"
    reference, biases = modules_reference(model, transposed=odd, interleaved=odd)
    assert reference
    for original in (True, False):
        folder = tmp_path / str(original)
        model.save_pretrained(folder, save_original_format=original)
        checkpoint = open_checkpoint(folder)
        check(checkpoint, reference)
        assert checkpoint.architecture == model.config.architectures[0]
        assert checkpoint.expert_dtypes == checkpoint.router_dtypes == ("F32",)
        for index, expected in biases.items():
            bias = checkpoint.router_bias(index)
            assert (bias is None) == (expected is None)
            if bias is not None:
                np.testing.assert_array_equal(bias.numpy(), expected)


def test_biases_of_experts_are_read(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj_bias.normal_()
        experts.down_proj_bias.normal_()
    model.save_pretrained(tmp_path)
    biases = open_checkpoint(tmp_path).expert(1, 3).biases
    assert biases is not None
    torch.testing.assert_close(biases[0], experts.gate_up_proj_bias[3, 0::2].detach(), rtol=0, atol=0)
    torch.testing.assert_close(biases[1], experts.gate_up_proj_bias[3, 1::2].detach(), rtol=0, atol=0)
    torch.testing.assert_close(biases[2], experts.down_proj_bias[3].detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama4_text", "qwen3_vl_moe_text"])
def test_text_models_of_larger_models(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = AutoConfig.for_model(kind, **sizes, **heads, **experts, num_local_experts=8)
    model = (Llama4ForCausalLM if kind == "llama4_text" else Qwen3VLMoeTextModel)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    reference, _ = modules_reference(model, transposed=kind == "llama4_text")
    model.save_pretrained(tmp_path)
    check(open_checkpoint(tmp_path), reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe").to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    checkpoint = open_checkpoint(str(tmp_path))
    check(checkpoint, modules_reference(model)[0])
    assert checkpoint.expert(0, 0).gate.dtype == dtype
    assert checkpoint.expert_bytes == 3 * 8 * 3 * 24 * 64 * 2
    assert checkpoint.router_bytes == 3 * 8 * 64 * 2
    (tmp_path / "model.safetensors.index.json").unlink()
    assert open_checkpoint(str(tmp_path)) == checkpoint


# --- what the hub holds ----------------------------------------------------------------------------------------------


def test_deepseek_fp8_blocks_dense_and_mtp_layers(tmp_path: Path) -> None:
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 4,
        "n_routed_experts": 3,
        "hidden_size": 300,
        "moe_intermediate_size": 130,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    tensors, reference = per_expert(config, layers=(1, 2, 3, 4), block=(128, 128))
    bias = torch.randn(3)
    tensors["model.layers.2.mlp.gate.e_score_correction_bias"] = bias
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(3, 300)
    tensors["model.layers.4.eh_proj.weight"] = torch.zeros(3, 3)
    del reference[4]
    checkpoint = open_checkpoint(write(tmp_path, config, tensors, shards=5))
    check(checkpoint, reference)
    assert torch.equal(checkpoint.router_bias(2), bias)  # type: ignore[arg-type]
    assert checkpoint.router_bias(1) is None
    assert checkpoint.expert_dtypes == ("F8_E4M3",)
    assert checkpoint.router_dtypes == ("BF16",)
    assert checkpoint.expert_bytes == 3 * 3 * 3 * (300 * 130 + 4 * 6)
    stored = checkpoint.expert(1, 0)
    assert stored.gate.dtype == torch.float8_e4m3fn
    assert stored.scales[0] is not None
    assert stored.scales[0].values.shape == (2, 3)


def test_minimax_m2_fp8(tmp_path: Path) -> None:
    config = {
        "model_type": "minimax_m2",
        "num_hidden_layers": 2,
        "num_local_experts": 3,
        "hidden_size": 10,
        "intermediate_size": 6,
        **BLOCKS,
    }
    tensors, reference = per_expert(config, "block_sparse_moe.", ("w1", "w3", "w2"), block=(4, 4))
    bias = torch.randn(3)
    tensors["model.layers.0.block_sparse_moe.e_score_correction_bias"] = bias
    checkpoint = open_checkpoint(write(tmp_path, config, tensors))
    check(checkpoint, reference)
    assert torch.equal(checkpoint.router_bias(0), bias)  # type: ignore[arg-type]
    assert checkpoint.architecture == "minimax_m2"


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("ending", ["weight_scale", "weight_scale_inv"])
def test_one_scale_per_tensor(ending: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors, reference = per_expert(QWEN, block=(100, 100), scale=ending)
    tensors = {name: t.reshape(shape) if name.endswith(ending) else t for name, t in tensors.items()}
    check(open_checkpoint(write(tmp_path, QWEN, tensors)), reference)


@pytest.mark.parametrize("flat", [True, False])
def test_one_scale_per_row(flat: bool, tmp_path: Path) -> None:
    tensors, reference = per_expert(QWEN, block=(1, 100), scale="weight_scale")
    tensors = {name: t.flatten() if flat and name.endswith("_scale") else t for name, t in tensors.items()}
    check(open_checkpoint(write(tmp_path, QWEN, tensors)), reference)


@pytest.mark.parametrize("width", [6, 5, 10])  # 5: 2F = H; 10: F = H
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model.", "language_model.", ""])
def test_fused_experts_lie_either_way(prefix: str, transposed: bool, width: int, tmp_path: Path) -> None:
    text = {**QWEN, "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": width}
    outer = {"model_type": "qwen3_vl_moe", "architectures": ["Outer"], "text_config": text, "hidden_size": 77}
    _, reference = per_expert(text)
    tensors = fuse(reference, prefix, transposed)
    tensors["model.visual.layers.0.mlp.weight"] = torch.zeros(2)
    checkpoint = open_checkpoint(write(tmp_path, outer, tensors, shards=2))
    check(checkpoint, reference)
    assert checkpoint.architecture == "Outer"


def test_llama4_with_dense_layers_between(tmp_path: Path) -> None:
    text = {**QWEN, "model_type": "llama4_text", "intermediate_size": 6, "num_hidden_layers": 4}
    _, reference = per_expert(text, layers=(1, 3))
    tensors = fuse(reference, "language_model.model.", True, "feed_forward.router.weight", "feed_forward.experts.")
    for layer in (0, 2):
        tensors[f"language_model.model.layers.{layer}.feed_forward.gate_proj.weight"] = torch.zeros(2, 2)
    check(open_checkpoint(write(tmp_path, {"model_type": "llama4", "text_config": text}, tensors)), reference)


@pytest.mark.parametrize("kind", ["blocks", "expert", "expert3", "rows", "one"])
@pytest.mark.parametrize("width", [6, 8])  # 6: a block of scales holds gate and up rows
def test_fused_fp8(kind: str, width: int, tmp_path: Path) -> None:
    config = {**QWEN, "moe_intermediate_size": width, **BLOCKS}
    _, reference = per_expert(config, layers=(0, 1))
    tensors: dict[str, Tensor] = {}
    expected: Reference = {}
    for layer, (router, experts) in reference.items():
        block = {"blocks": (4, 4), "rows": (1, 100)}.get(kind, (100, 100))
        prefix = f"model.layers.{layer}.mlp."
        tensors[f"{prefix}gate.weight"] = torch.from_numpy(router.copy()).bfloat16()
        values = []
        for name, parts in (("gate_up_proj", slice(0, 2)), ("down_proj", slice(2, 3))):
            done = [quantise(torch.from_numpy(np.concatenate(weights[parts])), block) for weights in experts]
            codes, scales = torch.stack([one[0] for one in done]), torch.stack([one[1] for one in done])
            result = np.stack([one[2] for one in done])
            if kind == "one":
                scales = scales[:1].reshape(1)
                result = e4m3(codes.view(torch.uint8).numpy()) * scales.double().numpy()
            if kind == "expert":
                scales = scales.flatten()
            tensors[f"{prefix}experts.{name}"] = codes
            tensors[f"{prefix}experts.{name}_scale_inv"] = scales
            values.append(result)
        both, down = values
        expected[layer] = (router, [(b[:width], b[width:], d) for b, d in zip(both, down, strict=True)])
    check(open_checkpoint(write(tmp_path, config, tensors)), expected)


def test_a_hub_id_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    tensors, reference = per_expert(QWEN)
    write(repository / "blobs", QWEN, tensors)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    checkpoint = open_checkpoint("someone/tiny")
    check(checkpoint, reference)
    assert checkpoint.model == "someone/tiny"
    with pytest.raises(ModelError, match=r"^someone/other is neither a folder nor in the local hub cache; download it"):
        open_checkpoint("someone/other")
    with pytest.raises(ModelError, match="neither a folder nor a valid hub id"):
        open_checkpoint("someone/a..b")
    (snapshot / "model.safetensors").unlink()
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (repository / "blobs" / "model.safetensors").rename(outside / "model.safetensors")
    (snapshot / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(ModelError, match="symbolic link that leaves the folder"):
        open_checkpoint("someone/tiny")


# --- what is read, and who owns it -----------------------------------------------------------------------------------


class Reads:
    """Counts what is read from files that are opened while it is in place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spans: list[tuple[str, int, int]] = []
        self.streams: list[io.FileIO] = []
        spans = self.spans

        class Counted(io.FileIO):
            def readinto(self, buffer: Any, /) -> int:
                begin = self.tell()
                count = super().readinto(buffer) or 0
                spans.append((str(self.name), begin, begin + count))
                return count

        def opened(path: Path, mode: str = "r", buffering: int = -1) -> io.FileIO:
            assert (mode, buffering) == ("rb", 0)
            self.streams.append(Counted(path, "rb"))
            return self.streams[-1]

        monkeypatch.setattr(Path, "open", opened)

    @property
    def bytes(self) -> int:
        """Bytes read so far, after a check that no byte was read twice and no file stays open."""
        assert all(stream.closed for stream in self.streams)
        ordered = sorted(self.spans)
        for (file, _, end), (other, begin, _) in itertools.pairwise(ordered):
            assert file != other or end <= begin
        return sum(end - begin for _, begin, end in ordered)


def sparse(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[str, list[int]]]) -> Path:
    """A checkpoint whose data is one hole."""
    sizes = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + sizes[dtype] * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    data = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(len(data).to_bytes(8, "little") + data)
        stream.truncate(8 + len(data) + end)
    return folder


def test_rows_read_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    width, hidden = 1 << 22, 1024
    config = {**QWEN, "num_hidden_layers": 1, "num_experts": 1, "hidden_size": hidden, "moe_intermediate_size": width}
    config |= {"quantization_config": {"weight_block_size": [128, 128]}}
    root = "model.layers.0.mlp"
    fp8 = {
        f"{root}.experts.0.up_proj.weight": ("F8_E4M3", [width, hidden]),
        f"{root}.experts.0.up_proj.weight_scale_inv": ("F32", [width // 128, hidden // 128]),
    }
    shapes = {
        f"{root}.gate.weight": ("BF16", [1, hidden]),
        f"{root}.experts.0.gate_proj.weight": ("BF16", [width, hidden]),
        f"{root}.experts.0.down_proj.weight": ("BF16", [hidden, width]),
        **fp8,
    }
    checkpoint = open_checkpoint(sparse(tmp_path, config, shapes))
    assert checkpoint.expert_bytes > 20 << 30
    reads = Reads(monkeypatch)
    assert checkpoint.rows(0, 0, "gate", 1000, 1003).shape == (3, hidden)
    assert reads.bytes == 3 * hidden * 2
    checkpoint.rows(0, 0, "up", 200, 300)  # in two rows of blocks
    assert reads.bytes == 3 * hidden * 2 + 100 * hidden + 2 * 8 * 4
    checkpoint.rows(0, 0, "down", 7, 7)
    assert reads.bytes == 3 * hidden * 2 + 100 * hidden + 2 * 8 * 4


def test_rows_of_transposed_experts_read_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    width, hidden = 1 << 22, 256
    config = {**QWEN, "model_type": "llama4_text", "num_hidden_layers": 1, "num_experts": 2, "hidden_size": hidden}
    config["intermediate_size"] = width
    root = "model.layers.0.feed_forward"
    shapes = {
        f"{root}.router.weight": ("BF16", [2, hidden]),
        f"{root}.experts.gate_up_proj": ("BF16", [2, hidden, 2 * width]),
        f"{root}.experts.down_proj": ("BF16", [2, width, hidden]),
    }
    checkpoint = open_checkpoint(sparse(tmp_path, config, shapes))
    reads = Reads(monkeypatch)
    checkpoint.rows(0, 1, "up", 5, 8)
    assert reads.bytes == 3 * hidden * 2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_each_byte_is_read_once(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    reads = Reads(monkeypatch)
    for layer in checkpoint.layers:
        checkpoint.router(layer.index)
        checkpoint.router_bias(layer.index)
    assert reads.bytes == checkpoint.router_bytes
    for layer in checkpoint.layers:
        for expert in range(layer.experts):
            checkpoint.expert(layer.index, expert)
    assert reads.bytes == checkpoint.router_bytes + checkpoint.expert_bytes


def test_what_is_handed_out_belongs_to_the_caller(tmp_path: Path) -> None:
    tensors, reference = per_expert(QWEN, block=(100, 100))
    before = write(tmp_path, QWEN, tensors).joinpath("model.safetensors").read_bytes()
    checkpoint = pickle.loads(pickle.dumps(open_checkpoint(tmp_path)))
    weights = checkpoint.expert(0, 1)
    weights.float32().gate.zero_()
    assert weights.gate.float().any()
    weights.gate.view(torch.uint8).zero_()
    checkpoint.router(0).zero_()
    checkpoint.rows(0, 1, "down", 0, 3).zero_()
    alive = weakref.ref(weights.gate)
    del weights
    gc.collect()
    assert alive() is None
    check(checkpoint, reference)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    tensors, _ = per_expert(QWEN)
    checkpoint = open_checkpoint(write(tmp_path, QWEN, tensors))
    os.truncate(tmp_path / "model.safetensors", 3000)  # in the header
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor {SHOWN_GATE} ends early"):
        checkpoint.expert(1, 2)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor .*gate\.weight cannot be read: No such file"):
        checkpoint.router(0)


def test_requests_out_of_range(tmp_path: Path) -> None:
    tensors, _ = per_expert({**QWEN, "num_hidden_layers": 5}, layers=(1, 2, 4))
    checkpoint = open_checkpoint(write(tmp_path, {**QWEN, "num_hidden_layers": 5}, tensors))
    with pytest.raises(ModelError, match=r"layer 0 of .* does not route; those that do: 1-2, 4"):
        checkpoint.router(0)
    with pytest.raises(ModelError, match=r"layer 1 of .* has experts 0 to 2, not 3"):
        checkpoint.expert(1, 3)
    with pytest.raises(ModelError, match="not -1"):
        checkpoint.expert(1, -1)
    with pytest.raises(ModelError, match="side is no part of an expert; the parts are: gate, up, down"):
        checkpoint.rows(1, 0, "side", 0, 1)  # type: ignore[arg-type]
    for start, stop in ((0, 7), (-1, 2), (3, 2)):
        with pytest.raises(ModelError, match=f"has rows 0 to 6, not {start} to {stop}"):
            checkpoint.rows(1, 0, "gate", start, stop)


# --- faults ----------------------------------------------------------------------------------------------------------


def refused(folder: Path | str, pattern: str) -> None:
    with pytest.raises(ModelError, match=pattern) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1500


GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
SHOWN_GATE = GATE.replace(".", r"\.")


def raw(folder: Path, header: bytes, data: bytes = b"", claimed: int | None = None) -> Path:
    """A checkpoint with these bytes as its one file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN))
    length = len(header) if claimed is None else claimed
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
    return folder


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    ("header", "data", "claimed", "pattern"),
    [
        (b"{}", b"", 1 << 62, r"model\.safetensors: its header claims 4611686018427387904 bytes of a file of 10"),
        (b"{}", b"", 3, "header claims 3 bytes of a file of 10"),
        (b"{}" + b" " * 100, b"", 100_000_001, "header claims 100000001 bytes"),
        (b"[]", b"", None, r"model\.safetensors: holds no JSON object"),
        (b"{", b"", None, "not readable as JSON"),
        (b"\xff\xfe{}", b"", None, "not readable as JSON"),
        (b"[" * 200_000, b"", None, "nested too deeply"),
        (b'{"a": {}, "a": {}}', b"", None, "a stands there twice"),
        (b'{"a": 3}', b"", None, "tensor a has no usable dtype, shape and data_offsets"),
        (entry(shape=[-2]), bytes(8), None, "tensor a has no usable"),
        (entry(shape=[2.0]), bytes(8), None, "tensor a has no usable"),
        (entry(shape=[True, 2]), bytes(8), None, "tensor a has no usable"),
        (entry(shape="xx"), bytes(8), None, "tensor a has no usable"),
        (entry(dtype=None), bytes(8), None, "tensor a has no usable"),
        (entry(offsets=[0]), bytes(8), None, "tensor a has no usable"),
        (entry(offsets=[8, 0]), bytes(8), None, "tensor a has -8 bytes"),
        (entry(offsets=[0, 12]), bytes(12), None, r"tensor a has 12 bytes, which is not F32 of shape \[2\]"),
        (entry(dtype="F64"), bytes(8), None, "tensor a has 8 bytes, which is not F64"),
        (entry(shape=[1 << 40, 1 << 40]), bytes(8), None, "tensor a has 8 bytes"),
        (entry(offsets=[4, 12]), bytes(12), None, "tensor a does not begin where the one before it ends"),
        (entry(offsets=[1 << 70, (1 << 70) + 8]), bytes(8), None, "tensor a does not begin"),
        (entry(), bytes(7), None, "tensor a ends at byte .* but the file has .* cut short"),
        (entry(), bytes(9), None, "1 bytes after the last tensor"),
        (entry(dtype="NEW\nTYPE", shape=[2]), bytes(8), None, "has no router"),
        (b'{"__metadata__": {}}', b"", None, "no weights in safetensors files"),
    ],
)
def test_headers_that_lie(header: bytes, data: bytes, claimed: int | None, pattern: str, tmp_path: Path) -> None:
    refused(raw(tmp_path, header, data, claimed), pattern)


def test_overlapping_tensors_and_odd_names(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": one, "b\n\x1b[31m": {**one, "data_offsets": [4, 12]}}).encode()
    refused(raw(tmp_path, header, bytes(12)), r"tensor 'b\\n\\x1b\[31m' does not begin where the one before it ends")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    refused(tmp_path, "of a file of 3: cut short")


def change_index(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/../b.safetensors", "x.bin", "a\\b.safetensors", "", "."]
)
def test_an_index_that_leaves_the_folder(name: str, tmp_path: Path) -> None:
    write(tmp_path, QWEN, per_expert(QWEN)[0], shards=2)
    change_index(tmp_path, lambda where: where.update({GATE: name}))
    refused(tmp_path, r"index\.json: .* is not the name of a safetensors file inside the folder")


def test_an_index_that_does_not_fit_the_files(tmp_path: Path) -> None:
    tensors, reference = per_expert(QWEN)
    first, second = "model-00001.safetensors", "model-00002.safetensors"
    folders = [write(tmp_path / str(i), QWEN, tensors, shards=2) for i in range(7)]
    where = json.loads((folders[0] / "model.safetensors.index.json").read_text())["weight_map"]
    other = {first: second, second: first}[where[GATE]]
    change_index(folders[0], lambda where: where.update({GATE: other}))
    refused(folders[0], rf"tensor {SHOWN_GATE} is (not )?here,")
    change_index(folders[1], lambda where: where.update({GATE.replace("2", "7"): second}))
    refused(folders[1], rf"{second}: tensor .*7\.gate_proj\.weight is not here, although .*index\.json says so")
    (folders[2] / first).unlink()
    refused(folders[2], rf"{first}: no such file")
    save_file({**{n: t for n, t in tensors.items() if where[n] == other}, GATE: tensors[GATE]}, folders[3] / other)
    refused(folders[3], rf"{other}: tensor {SHOWN_GATE} is here, but .* puts it in {where[GATE]}")
    (folders[3] / "model.safetensors.index.json").unlink()
    refused(folders[3], rf"tensor {SHOWN_GATE} is in {first} as well and there is no")
    os.truncate(folders[4] / first, os.path.getsize(folders[4] / first) - 1)
    refused(folders[4], f"{first}: tensor .* cut short")
    change_index(folders[5], lambda where: where.update({"lm_head.weight": "model-00003.safetensors"}))
    check(open_checkpoint(folders[5]), reference)  # a shard without routers and experts is not needed
    (folders[6] / first).unlink()
    os.mkfifo(folders[6] / first)
    refused(folders[6], f"{first}: not a regular file")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("{}", "weight_map does not give one file name"),
        ('{"weight_map": {"a": 3}}', "weight_map does not give one file name"),
        ('{"weight_map": {}}', "no weights in safetensors files"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "a stands there twice"),
        ("[]", "holds no JSON object"),
        ("", "not readable as JSON"),
    ],
)
def test_an_index_that_is_none(text: str, pattern: str, tmp_path: Path) -> None:
    write(tmp_path, QWEN, per_expert(QWEN)[0], shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, pattern)


def test_links_that_leave_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", QWEN, per_expert(QWEN)[0])
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    refused(folder, r"model\.safetensors: a symbolic link that leaves the folder")
    (tmp_path / "blob").rename(folder / "inner")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "inner")
    open_checkpoint(folder)
    (tmp_path / "link").symlink_to(folder)
    open_checkpoint(tmp_path / "link")
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    refused(folder, r"config\.json: a symbolic link that leaves the folder")


def test_folders_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "^No such folder: ")
    refused("a" * 5000, "cannot be opened: File name too long")
    refused("./absent", r"^No such folder: \./absent")
    refused(tmp_path, "has no config.json")
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    refused(tmp_path, "has no weights in safetensors files")
    refused(tmp_path / "config.json", "is a file; the folder of a checkpoint")


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"num_experts": 4}, r"tensor .*mlp\.gate\.weight has shape \[3, 10\], but the config asks for \[4, 10\]"),
        ({"hidden_size": 11}, r"has shape \[3, 10\], but the config asks for \[3, 11\]"),
        ({"moe_intermediate_size": 7}, r"gate_proj\.weight has shape \[6, 10\], but the config asks for \[7, 10\]"),
        ({"num_hidden_layers": 3}, "no tensors of layer 2, but its config says 3 layers"),
        ({"num_hidden_layers": 10**12}, "no tensors of layer 2"),
        ({"num_hidden_layers": None}, r"config\.json: num_hidden_layers is missing"),
        ({"num_experts": "3"}, r"config\.json: num_experts is not a positive whole number"),
        ({"num_experts": True}, "num_experts is not a positive whole number"),
        ({"num_experts": None}, "num_experts or num_local_experts or n_routed_experts is missing"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is not a positive"),
        ({"model_type": "novel_moe"}, r"\(novel_moe\) is of a family .* tensors like .*experts\.0\.down_proj\.weight"),
        ({"model_type": None}, r"\(without model_type\) is of a family"),
        (
            {"model_type": "mixtral"},
            r"layer 0 routes, but .* like .*experts\.0\.up_proj\.weight, model\.layers\.0\.mlp\.gate",
        ),
        ({"model_type": "gpt_oss"}, r"has no router under .* tensors like model\.layers\.0\.mlp\.experts"),
        ({"quantization_config": {"weight_block_size": [128]}}, "weight_block_size is not two positive"),
        ({"quantization_config": {"weight_block_size": [128, 0]}}, "weight_block_size is not two positive"),
    ],
)
def test_configs_that_do_not_fit(changes: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    refused(write(tmp_path, {**QWEN, **changes}, per_expert(QWEN)[0]), pattern)


def test_a_config_that_is_none(tmp_path: Path) -> None:
    write(tmp_path, QWEN, per_expert(QWEN)[0])
    (tmp_path / "config.json").write_text('{"model_type": "a", "model_type": "b"}')
    refused(tmp_path, r"config\.json: not readable as JSON: model_type stands there twice")
    (tmp_path / "config.json").write_text("NaN")
    refused(tmp_path, "config.json: holds no JSON object")


def planted(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fault among the tensors of layer 1."""
    layer = "model.layers.1.mlp."
    if kind == "lacks":
        del tensors[GATE]
    elif kind == "extra":
        tensors[GATE.replace("experts.2", "experts.3")] = tensors[GATE].clone()
    elif kind == "router":
        del tensors[f"{layer}gate.weight"]
    elif kind == "renamed":
        for name in [name for name in tensors if name.startswith(f"{layer}experts.")]:
            tensors[name.replace("_proj", "_matrix")] = tensors.pop(name)
    elif kind == "two layouts":
        tensors[f"{layer}experts.gate_up_proj"] = torch.zeros(3, 12, 10)
    elif kind == "two models":
        tensors["language_model.layers.0.mlp.gate.weight"] = torch.zeros(3, 10)
    elif kind == "two biases":
        for name in ("gate.e_score_correction_bias", "e_score_correction_bias"):
            tensors[layer + name] = torch.zeros(3)
    elif kind == "bias":
        tensors[f"{layer}gate.e_score_correction_bias"] = torch.zeros(4)
    elif kind == "transposed":
        tensors[GATE] = tensors[GATE].t().contiguous()
    elif kind == "integers":
        tensors[GATE] = torch.zeros(6, 10, dtype=torch.int8)
    elif kind == "e5m2":
        tensors[GATE] = torch.zeros(6, 10).to(torch.float8_e5m2)
    elif kind == "no scale":
        tensors[GATE] = tensors[GATE].to(torch.float8_e4m3fn)
    elif kind == "scale of bf16":
        tensors[f"{GATE}_scale_inv"] = torch.ones(2, 3)
    elif kind.startswith("scale"):
        tensors[GATE] = tensors[GATE].to(torch.float8_e4m3fn)
        scale = torch.ones(3, 2) if kind == "scale shape" else torch.ones(2, 3)
        tensors[f"{GATE}_scale_inv"] = scale.to(torch.float8_e8m0fnu) if kind == "scale dtype" else scale
        if kind == "scales":
            tensors[f"{GATE}_scale"] = scale.clone()
    else:
        del tensors[GATE]
        tensors[GATE.removesuffix(".weight") + kind] = torch.zeros(2, 2, dtype=torch.int32)
    return tensors


PACKED = "the experts are packed .*which this reader does not unpack"


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("lacks", r"lacks tensor layers\.1\.mlp\.experts\.2\.gate_proj\.weight"),
        ("extra", r"layer 1 has tensors of expert 3 \(.*experts\.3.*\), but the config says 3 experts"),
        ("router", r"lacks tensor layers\.1\.mlp\.gate\.weight"),
        ("renamed", r"layer 1 routes, but its experts have names .* tensors like .*experts\.0\.down_matrix"),
        ("two layouts", "layer 1 has experts in two layouts: per expert and fused"),
        ("two models", r"routers of more than one model: under language_model\., model\."),
        ("two biases", "layer 1 has two router biases"),
        ("bias", r"e_score_correction_bias has shape \[4\], but the config asks for \[3\]"),
        ("transposed", rf"tensor {SHOWN_GATE} has shape \[10, 6\], but the config asks for \[6, 10\]"),
        ("integers", rf"tensor {SHOWN_GATE} is stored as I8"),
        ("e5m2", rf"tensor {SHOWN_GATE} is stored as F8_E5M2"),
        ("no scale", rf"tensor {SHOWN_GATE} is FP8 and lacks its scale"),
        ("scales", rf"tensor {SHOWN_GATE} is FP8 and has two scales"),
        ("scale shape", rf"tensor {SHOWN_GATE}_scale_inv of shape \[3, 2\] is no scale of shape \[6, 10\]"),
        ("scale dtype", rf"tensor {SHOWN_GATE}_scale_inv is a scale stored as F8_E8M0"),
        ("scale of bf16", rf"tensor {SHOWN_GATE} is BF16, but has a scale"),
        (".qweight", PACKED),
        (".weight_packed", PACKED),
    ],
)
def test_tensors_that_do_not_fit(kind: str, pattern: str, tmp_path: Path) -> None:
    refused(write(tmp_path, {**QWEN, **BLOCKS}, planted(kind, per_expert(QWEN)[0])), pattern)


def test_mxfp4_is_refused(tmp_path: Path) -> None:
    config = {**QWEN, "model_type": "gpt_oss", "intermediate_size": 6, "num_hidden_layers": 1}
    config["quantization_config"] = {"quant_method": "mxfp4"}
    root = "model.layers.0.mlp"
    tensors = {f"{root}.router.weight": torch.zeros(3, 10)}
    for name in ("gate_up_proj", "down_proj"):
        tensors[f"{root}.experts.{name}_blocks"] = torch.zeros(3, 12, 1, 16, dtype=torch.uint8)
        tensors[f"{root}.experts.{name}_scales"] = torch.zeros(3, 12, 1, dtype=torch.uint8)
    refused(
        write(tmp_path, config, tensors), rf"packed \(mxfp4\), which .*{root}\.experts\.\w+_blocks; use a checkpoint"
    )


def test_fused_faults(tmp_path: Path) -> None:
    text = {**QWEN, "model_type": "qwen3_vl_moe_text"}
    reference = per_expert(text)[1]
    straight, across = fuse(reference, "model.", False), fuse(reference, "model.", True)
    down = "model.layers.1.mlp.experts.down_proj"
    refused(
        write(tmp_path / "a", text, {**straight, down: across[down]}),
        r"experts\.down_proj of shape .* does not go with",
    )
    refused(write(tmp_path / "b", {**text, "model_type": "qwen3_moe"}, across), r"gate_up_proj has shape \[3, 10, 12\]")
    scales = {f"{name}_scale_inv": torch.ones(3) for name in across if "proj" in name}
    codes = {name: t.to(torch.float8_e4m3fn) if "proj" in name else t for name, t in across.items()}
    refused(write(tmp_path / "c", text, {**codes, **scales}), "is FP8 in a transposed layout")


def test_nan_is_left_to_the_caller(tmp_path: Path) -> None:
    tensors, _ = per_expert(QWEN)
    tensors[GATE][0, 0] = torch.nan
    assert open_checkpoint(write(tmp_path, QWEN, tensors)).rows(1, 2, "gate", 0, 1)[0, 0].isnan()


def test_every_fp8_code_has_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    stored = codes.view(torch.float8_e4m3fn)
    decoded = ExpertWeights(stored, stored.t(), stored[:, 3:]).float32()
    expected = e4m3(codes.numpy())
    expected.reshape(-1)[[127, 255]] = np.nan
    for weights, values in zip(
        (decoded.gate, decoded.up, decoded.down), (expected, expected.T, expected[:, 3:]), strict=True
    ):
        np.testing.assert_array_equal(weights.numpy(), values)
