"""`moescope cache`, and a profile that goes through a cache: the same routing under the model's own name."""

import os
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Cli
from disks import full_disk
from fp8 import Fp8Checkpoint, fp8_checkpoint

from moescope.adapters import model_cache
from moescope.profiler.files import load_profile
from moescope.profiler.profile import RoutingProfile

VOCABULARY = 258


@pytest.fixture(params=["deepseek_v3", "minimax_m2"])
def fp8(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> Fp8Checkpoint:
    """FP8 with blocks that do not divide its matrices, and with a tokenizer."""
    made = fp8_checkpoint(request.param, tmp_path / "models" / "tiny", vocab_size=VOCABULARY, eos_token_id=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint / name, made.folder / name)
    return made


def profiled(cli: Cli, model: Path, out: str, *options: object) -> tuple[RoutingProfile, str]:
    done = cli("profile", "Once upon a time", "to be", "-m", model, "--max-tokens", 4, "-o", out, *options)
    assert done.code == 0, done.err
    return load_profile(f"{out}/profile.safetensors"), done.out + done.err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_profile_through_the_cache_is_that_of_weights_dequantised_by_numpy(
    dtype: str, cli: Cli, fp8: Fp8Checkpoint, tmp_path: Path
) -> None:
    plain = fp8.plain(tmp_path / "plain", getattr(torch, dtype))
    expected, _ = profiled(cli, plain, "expected", "--dtype", dtype)
    options = ("--dtype", dtype, "--cache-dir", "caches")
    found, told = profiled(cli, fp8.folder, "found", *options, "--dump-cache")
    (cache,) = Path("caches").iterdir()
    assert f"Wrote {cache}" in told
    assert cache.name.endswith(dtype)
    np.testing.assert_array_equal(found.selection_counts, expected.selection_counts)
    np.testing.assert_array_equal(found.weight_sums, expected.weight_sums)
    assert found.model.id == str(fp8.folder)
    assert found.model.fingerprint == expected.model.fingerprint
    again, told = profiled(cli, fp8.folder, "again", *options)
    assert f"Loading {fp8.folder} from its cache {cache}" in told
    assert "Wrote caches" not in told
    np.testing.assert_array_equal(again.weight_sums, expected.weight_sums)


def test_cache_then_profile(cli: Cli, fp8: Fp8Checkpoint) -> None:
    done = cli("cache", fp8.folder, "--cache-dir", "caches", "--dtype", "float32")
    assert done.code == 0, done.err
    (cache,) = Path("caches").iterdir()
    assert done.out.splitlines()[-1] == f"Wrote {cache}"
    done = cli("cache", fp8.folder, "--cache-dir", "caches", "--dtype", "float32")
    assert done.out == f"{cache} is there and complete; --force converts it again\n"
    assert cli("cache", fp8.folder, "--cache_dir", "caches", "--dtype", "float32", "--force").out == f"Wrote {cache}\n"
    _, told = profiled(cli, fp8.folder, "out", "--cache-dir", "caches")  # any type of cache serves --dtype auto
    assert f"from its cache {cache}" in told


def test_dump_only_stops_after_the_cache(cli: Cli, fp8: Fp8Checkpoint, tmp_path: Path) -> None:
    done = cli("profile", "--model_path", fp8.folder, "--cache_dir", "caches", "--dump_cache", "--dump_only")
    assert done.code == 0, done.err
    (cache,) = Path("caches").iterdir()
    assert done.out == f"Wrote {cache}\n"
    assert cache.name.endswith("bfloat16")
    assert {file.name for file in tmp_path.iterdir()} == {"models", "caches"}


def test_ctrl_c_keeps_what_is_finished(cli: Cli, fp8: Fp8Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    write = model_cache._write

    def interrupted(path: Path, pieces: Iterable[bytes | memoryview]) -> object:
        if path.name == "model-00002-of-00003.safetensors":
            os.kill(os.getpid(), signal.SIGINT)
        return write(path, pieces)

    monkeypatch.setattr(model_cache, "_write", interrupted)
    done = cli("cache", fp8.folder, "--cache-dir", "caches")
    assert done.code == 130
    assert done.err.splitlines()[-1] == "Interrupted. Finished files are kept; the same command goes on with them."
    (cache,) = Path("caches").iterdir()
    assert {file.name for file in cache.iterdir()} == {"model-00001-of-00003.safetensors", model_cache.MANIFEST_NAME}
    monkeypatch.setattr(model_cache, "_write", write)
    first = (cache / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    assert cli("cache", fp8.folder, "--cache-dir", "caches").out == f"Wrote {cache}\n"
    assert (cache / "model-00001-of-00003.safetensors").stat().st_mtime_ns == first


def test_a_full_disk(cli: Cli, fp8: Fp8Checkpoint) -> None:
    with full_disk(2000):
        done = cli("cache", fp8.folder, "--cache-dir", "caches")
    assert done.code == 2
    assert "cannot write caches/" in done.error
    assert done.error.endswith("; finished files are kept, and the same command goes on with them")
    assert not list(Path("caches").rglob("*.tmp"))
    assert cli("cache", fp8.folder, "--cache-dir", "caches").code == 0


def test_without_a_cache_the_original_is_loaded(cli: Cli, checkpoint: Path, fp8: Fp8Checkpoint) -> None:
    for option in ((), ("--dump-cache",)):
        _, told = profiled(cli, checkpoint, f"out{len(option)}", "--cache-dir", "caches", *option)
        said = f"Nothing to convert: {checkpoint} is not FP8; it can be profiled as it is" if option else "No cache of"
        assert said in told
    assert cli("cache", checkpoint, "--cache-dir", "caches").out.startswith("Nothing to convert: ")
    done = cli("profile", "a", "--max-tokens", 0, "--limit", 1, "--cache-dir", "caches", "-o", "demo")
    assert done.code == 0, done.err
    assert "Nothing to convert: demo:stacked is not FP8." in done.err
    assert not Path("caches").exists()
    done = cli("profile", "a", "-m", fp8.folder, "--cache-dir", "caches", "-o", "none")
    assert f"No cache of {fp8.folder} in caches" in done.err
    assert done.code == 2  # transformers asks for accelerate
    assert done.error.endswith("; `moescope cache` converts FP8 checkpoints for the CPU")


def test_what_is_wrong_is_one_line(cli: Cli, fp8: Fp8Checkpoint) -> None:
    def error(*arguments: object) -> str:
        done = cli(*arguments)
        assert done.code == 2
        return done.error

    tiny = ("-m", fp8.folder)
    assert "--dump-cache needs --cache-dir" in error("profile", "a", *tiny, "--dump-cache")
    assert "--dump-only needs --cache-dir" in error("profile", "a", *tiny, "--dump-only")
    assert "--dump-only needs --model" in error("profile", "a", "--dump-only", "--cache-dir", "caches")
    cuda = error("profile", "a", *tiny, "--cache-dir", "caches", "--device", "cuda", "--engine", "transformers")
    assert cuda.endswith("--cache-dir is for transformers on a CPU; leave it out, or give --device cpu")
    vllm = error("profile", "a", *tiny, "--cache-dir", "caches", "--engine", "vllm")
    assert "--cache-dir is for transformers on a CPU, and vllm runs FP8 checkpoints as they are" in vllm
    assert "No such folder: ./absent" in error("cache", "./absent", "--cache-dir", "caches")
    assert "is neither a folder nor in the local hub cache" in error("cache", "nobody/nothing", "--cache-dir", "caches")
    shard = fp8.folder / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "cut short or damaged" in error("cache", fp8.folder, "--cache-dir", "caches")
    assert not Path("caches").exists()
