"""Caches of FP8 checkpoints: every weight against numpy, the same bytes after a kill, every fault in one line."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disks import full_disk
from fp8 import Fp8Checkpoint, e4m3, fp8_checkpoint, quantise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from moescope.adapters import model_cache
from moescope.adapters.model_cache import CACHE_DTYPES, MANIFEST_NAME, build_cache, find_cache
from moescope.profiler.errors import ModelError, MoescopeError, OptionError, OutputError
from moescope.profiler.files import LOCK_NAME, OutputFolder

FAMILIES = ("deepseek_v3", "minimax_m2")


@pytest.fixture(scope="session", params=FAMILIES)
def fp8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fp8Checkpoint:
    return fp8_checkpoint(request.param, tmp_path_factory.mktemp("fp8") / f"tiny-{request.param}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One of its own, to be spoilt."""
    return fp8_checkpoint("minimax_m2", tmp_path / "tiny").folder


def built(model: Any, cache_dir: Path, dtype: str = "bfloat16", **options: Any) -> Path:
    path = build_cache(model, cache_dir, dtype, **options)
    assert path is not None
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def refused(pattern: str, *arguments: Any, kind: type[MoescopeError] = ModelError, **options: Any) -> None:
    with pytest.raises(kind, match=pattern) as caught:
        build_cache(*arguments, **options)
    assert "\n" not in str(caught.value)


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1 << 22, 100])  # 100: several pieces for most tensors, with blocks cut in two
def test_float32_is_what_numpy_makes_of_codes_and_scales(
    piece: int, fp8: Fp8Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "_PIECE", piece)
    found = tensors(built(fp8.folder, tmp_path, "float32"))
    assert found.keys() == fp8.values.keys()
    for name, expected in fp8.values.items():
        assert found[name].dtype == torch.float32
        np.testing.assert_array_equal(found[name].numpy(), expected.numpy(), err_msg=name)


def test_bfloat16_is_that_rounded_and_the_rest_as_stored(fp8: Fp8Checkpoint, tmp_path: Path) -> None:
    found = tensors(built(fp8.folder, tmp_path))
    assert found.keys() == fp8.values.keys()
    for name, expected in fp8.values.items():
        bits = expected.numpy().view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)  # to even
        wide = "e_score_correction_bias" in name
        assert found[name].dtype == (torch.float32 if wide else torch.bfloat16), name
        np.testing.assert_array_equal(found[name].float().numpy(), expected.numpy() if wide else rounded, err_msg=name)
    assert any("e_score_correction_bias" in name for name in found)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_transformers_loads_it_with_every_weight(dtype: str, fp8: Fp8Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = built(fp8.folder, tmp_path / "caches", dtype)
    plain = fp8.plain(tmp_path / "plain", getattr(torch, dtype))
    loaded, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == getattr(torch, dtype)
    expected = AutoModelForCausalLM.from_pretrained(plain).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_the_files_are_those_of_the_format(fp8: Fp8Checkpoint, tmp_path: Path) -> None:
    folder = built(fp8.folder, tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            assert reader.metadata() == {"format": "pt"}
            held |= dict.fromkeys(reader.keys(), file.name)
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in tensors(folder).values())
    config, before = (json.loads((place / "config.json").read_text()) for place in (folder, fp8.folder))
    assert config == {name: value for name, value in before.items() if name != "quantization_config"} | {
        "dtype": "bfloat16"
    }
    generation = "generation_config.json"
    assert (folder / generation).read_bytes() == (fp8.folder / generation).read_bytes()
    assert {file.name for file in folder.iterdir()} == {
        "config.json", generation, MANIFEST_NAME, "model.safetensors.index.json", *held.values()
    }  # fmt: skip


def test_scales_of_every_form_and_fused_experts(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 1,
        "num_experts": 3,
        "hidden_size": 10,
        "moe_intermediate_size": 6,
        "torch_dtype": "float16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]},
    }
    stored: dict[str, torch.Tensor] = {"model.layers.0.mlp.gate.weight": torch.randn(3, 10, generator=generator).half()}
    expected = {"model.layers.0.mlp.gate.weight": stored["model.layers.0.mlp.gate.weight"].float().numpy()}

    def add(name: str, shape: tuple[int, int], block: tuple[int, int], ending: str, form: tuple[int, ...]) -> None:
        codes, scales, exact = quantise(torch.randn(shape, generator=generator), block)
        stored.update({name: codes, name + ending: scales.reshape(form).bfloat16()})
        spread = np.repeat(np.repeat(scales.bfloat16().float().numpy(), block[0], 0), block[1], 1)
        expected[name] = (e4m3(codes.view(torch.uint8).numpy()) * spread[: shape[0], : shape[1]]).astype(np.float32)
        assert np.abs(expected[name] - exact).max() < 0.01 * np.abs(exact).max()

    add("model.layers.0.self_attn.q_proj.weight", (7, 10), (100, 100), "_scale", ())
    add("model.layers.0.self_attn.k_proj.weight", (7, 10), (1, 100), "_scale", (7, 1))
    add("model.layers.0.self_attn.v_proj.weight", (7, 10), (4, 4), "_scale_inv", (2, 3))
    stored["model.layers.0.self_attn.v_proj.input_scale"] = torch.ones(1)
    for name, shape in (("gate_up_proj", (12, 10)), ("down_proj", (10, 6))):
        done = [quantise(torch.randn(shape, generator=generator), (4, 4)) for _ in range(3)]
        name = f"model.layers.0.mlp.experts.{name}"
        stored |= {name: torch.stack([d[0] for d in done]), f"{name}_scale_inv": torch.stack([d[1] for d in done])}
        expected[name] = np.stack([d[2] for d in done]).astype(np.float32)
    stored["steps"] = torch.tensor(7)
    source = tmp_path / "odd name!"
    source.mkdir()
    save_file(stored, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    folder = built(source, tmp_path, "float32")
    assert folder.name.startswith("odd--name-")
    found = load_file(folder / "model.safetensors")
    assert found.pop("steps") == torch.tensor(7)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), values, err_msg=name)
    assert not (folder / "model.safetensors.index.json").exists()
    written = json.loads((folder / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == ("float32", "float32")


def test_progress_comes_to_its_end(fp8: Fp8Checkpoint, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    folder = built(fp8.folder, tmp_path, on_progress=lambda done, total: told.append((done, total)))
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert told == sorted(told)


# --- what is found ---------------------------------------------------------------------------------------------------


def test_a_cache_is_found_by_what_the_checkpoint_holds(model: Path, tmp_path: Path) -> None:
    caches = tmp_path / "caches"
    assert find_cache(model, caches) is None
    folder = built(model, caches)
    stamp = (folder / MANIFEST_NAME).stat().st_mtime_ns
    assert folder.parent == caches
    assert find_cache(model, caches) == find_cache(str(model), caches) == folder
    assert find_cache(model, caches, "float32") is None
    assert built(model, caches) == folder
    assert (folder / MANIFEST_NAME).stat().st_mtime_ns == stamp
    same = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(model, same)
    assert find_cache(same, caches) == folder  # other times, another place
    shard = sorted(same.glob("*.safetensors"))[0]
    with open(shard, "rb+") as stream:  # tuned on: the same names, shapes and sizes
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    assert find_cache(same, caches) is None
    assert built(same, caches) != folder
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    assert find_cache(model, caches) is None


def test_nothing_to_convert(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").bfloat16().save_pretrained(tmp_path / "plain")
    assert build_cache(tmp_path / "plain", tmp_path / "caches") is None
    assert find_cache(tmp_path / "plain", tmp_path / "caches") is None
    assert not (tmp_path / "caches").exists()


# --- what was interrupted --------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from moescope.adapters.model_cache import build_cache
kill = lambda done, total: done > total / 2 and os.kill(os.getpid(), signal.SIGKILL)
build_cache(sys.argv[1], sys.argv[2], on_progress=kill)
"""


def test_killed_and_resumed_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    whole = built(model, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(model), str(tmp_path / "killed")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (half,) = (tmp_path / "killed").iterdir()
    finished = {file.name: file.stat().st_mtime_ns for file in half.glob("model*.safetensors")}
    assert 0 < len(finished) < len(list(whole.glob("*.safetensors")))
    assert list(half.glob(".*.tmp"))
    assert not (half / "config.json").exists()
    assert find_cache(model, tmp_path / "killed") is None
    told: list[int] = []
    assert built(model, tmp_path / "killed", on_progress=lambda done, total: told.append(done)) == half
    assert told[0] == sum((half / name).stat().st_size for name in finished)
    assert {name: (half / name).stat().st_mtime_ns for name in finished} == finished
    assert contents(half) == contents(whole)


def test_what_is_damaged_is_converted_again(model: Path, tmp_path: Path) -> None:
    folder = built(model, tmp_path / "caches")
    whole = contents(folder)
    first, second, _ = sorted(folder.glob("*.safetensors"))
    os.truncate(first, first.stat().st_size - 1)
    assert find_cache(model, tmp_path / "caches") is None
    data = bytearray(second.read_bytes())
    data[-1] ^= 1  # of the same size: seen only where files are checked before a conversion goes on
    second.write_bytes(data)
    assert built(model, tmp_path / "caches") == folder
    assert contents(folder) == whole
    (folder / MANIFEST_NAME).write_text("{")
    assert find_cache(model, tmp_path / "caches") is None
    assert built(model, tmp_path / "caches") == folder
    assert contents(folder) == whole


def test_force_converts_again(model: Path, tmp_path: Path) -> None:
    folder = built(model, tmp_path / "caches")
    whole = contents(folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(bytes(shard.stat().st_size))
    assert built(model, tmp_path / "caches") == folder  # sizes fit
    assert contents(folder) != whole
    assert built(model, tmp_path / "caches", force=True) == folder
    assert contents(folder) == whole


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_what_is_finished_is_kept(stop: BaseException, model: Path, tmp_path: Path) -> None:
    def halfway(done: int, total: int) -> None:
        if done > total / 2:
            raise stop

    full = r"cannot write .*model-00002.*: No space left on device; finished files are kept, and the same command goes"
    with pytest.raises((KeyboardInterrupt, OutputError), match=full if isinstance(stop, OSError) else None):
        build_cache(model, tmp_path / "caches", on_progress=halfway)
    (folder,) = (tmp_path / "caches").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["model-00001-of-00003.safetensors", MANIFEST_NAME]
    assert find_cache(model, tmp_path / "caches") is None
    assert contents(built(model, tmp_path / "caches")) == contents(built(model, tmp_path / "whole"))


# --- faults ----------------------------------------------------------------------------------------------------------


def test_room_is_asked_for_to_the_byte(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built(model, tmp_path / "whole")
    needed = sum(len(data) for name, data in contents(folder).items() if name != MANIFEST_NAME)

    def room(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(needed, 0, free))  # type: ignore[attr-defined]

    room(needed - 1)
    text = r"needs \d+\.\d KB, but its disk has \d+\.\d KB free; choose another --cache-dir or make room"
    refused(text, model, tmp_path / "caches", kind=OutputError)
    assert not (tmp_path / "caches").exists()
    room(needed)
    built(model, tmp_path / "caches")


def test_a_write_that_fails(model: Path, tmp_path: Path) -> None:
    with full_disk(10_000):
        refused("cannot write .*model-00001.*: File too large; finished", model, tmp_path / "caches", kind=OutputError)
    built(model, tmp_path / "caches")


def test_folders_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused("cannot write into .*: Not a directory", model, tmp_path / "file", kind=OutputError)
    refused("cannot write into /proc/caches/", model, "/proc/caches", kind=OutputError)


def test_something_else_in_the_way(model: Path, tmp_path: Path) -> None:
    folder = built(model, tmp_path / "caches")
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.txt").write_text("all of it")
    text = r"holds something else than a cache; move it away or choose another --cache-dir"
    for force in (False, True):
        refused(text, model, tmp_path / "caches", kind=OutputError, force=force)
    assert contents(folder) == {"thesis.txt": b"all of it"}
    shutil.rmtree(folder)
    folder.write_text("")
    refused("is a file; --cache-dir needs a folder", model, tmp_path / "caches", kind=OutputError)


def test_two_at_once(model: Path, tmp_path: Path) -> None:
    folder = built(model, tmp_path / "caches")
    shutil.rmtree(folder)
    text = "is in use by another run; choose another --cache-dir"
    with OutputFolder(folder):
        assert (folder / LOCK_NAME).exists()
        refused(text, model, tmp_path / "caches", kind=OutputError)
    built(model, tmp_path / "caches")


def resaved(folder: Path, change: Any) -> None:
    """Rewrite the checkpoint as one file, with `change` done to its tensors."""
    held = tensors(folder)
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    change(held)
    save_file(held, folder / "model.safetensors")


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda held: held.pop(f"{EXPERT}_scale_inv"), "w1.weight is FP8 and lacks its scale"),
        (lambda held: held.pop(f"{QUERY}_scale_inv"), "q_proj.weight is FP8 and lacks its scale"),
        (lambda held: held.update({f"{QUERY}_scale": torch.ones(1)}), "q_proj.weight is FP8 and has two scales"),
        (lambda held: held.update({f"{QUERY}_scale_inv": torch.ones(3, 3)}), r"of shape \[3, 3\] is no scale of shape"),
        (lambda held: held.update({QUERY: held[QUERY].float()}), "q_proj.weight is F32, but has a scale"),
        (lambda held: held.update({QUERY: held[QUERY].to(torch.float8_e5m2)}), "is F8_E5M2, but has a scale"),
        (
            lambda held: held.update({"a.weight": torch.zeros(2, 2).to(torch.float8_e5m2)}),
            "a.weight is stored as F8_E5M2, which this reader does not convert",
        ),
        (
            lambda held: held.update({"a.weight": held[QUERY][0].clone(), "a.weight_scale": torch.ones(1)}),
            r"a.weight is FP8 of shape \[64\], which this reader does not scale",
        ),
        (lambda held: held.update({"a.qweight": torch.zeros(2, dtype=torch.int32)}), "a.qweight is packed"),
        (
            lambda held: held.update({EXPERT.replace("weight", "qweight"): torch.zeros(2, dtype=torch.int32)}),
            "the experts are packed .* does not unpack",
        ),
    ],
)
def test_checkpoints_that_cannot_be_converted(change: Any, pattern: str, model: Path, tmp_path: Path) -> None:
    resaved(model, change)
    refused(pattern, model, tmp_path / "caches")
    assert not (tmp_path / "caches").exists()


def test_source_files_that_are_damaged(model: Path, tmp_path: Path) -> None:
    shard = model / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    os.truncate(shard, len(data) - 1)
    refused(r"model-00002.*cut short or damaged", model, tmp_path / "caches")
    shard.unlink()
    refused(r"model-00002.*no such file", model, tmp_path / "caches")
    assert not (tmp_path / "caches").exists()
    shard.write_bytes(data)

    def shorten(done: int, total: int) -> None:
        os.truncate(shard, 20_000)

    refused("model-00002.*ends early: the file became shorter", model, tmp_path / "caches", on_progress=shorten)
    (folder,) = (tmp_path / "caches").iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["model-00001-of-00003.safetensors", MANIFEST_NAME]


def test_models_and_types_that_are_none(model: Path, tmp_path: Path) -> None:
    refused("^No such folder: ", tmp_path / "absent", tmp_path)
    refused("nobody/nothing is neither a folder nor in the local hub cache", "nobody/nothing", tmp_path)
    refused(
        "'float16' is no type of a cache; choose one of bfloat16, float32", model, tmp_path, "float16", kind=OptionError
    )
