"""A recording server: started by an environment variable, domains by request, saves on a signal and at its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference

if "MOESCOPE_NO_SKIPS" not in os.environ:
    pytest.importorskip("vllm")

from vllm_models import save_checkpoint

import moescope
from moescope.profiler.files import load_profile

pytestmark = pytest.mark.filterwarnings("default")


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    model: Any
    name: str

    def complete(self, prompt: list[int], tokens: int, domain: str | None) -> list[int]:
        """Tokens that the server generates."""
        body: dict[str, Any] = {
            "model": self.name,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if domain is not None:
            body["vllm_xargs"] = {"moescope_domain": domain}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return list(json.load(answer)["choices"][0]["token_ids"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    model = save_checkpoint("qwen3_moe", folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MOESCOPE_RECORD": str(folder / "recorded"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    arguments = ["--model", str(folder / "model"), "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "256", "--gpu-memory-utilization", "0.15", "--max-num-seqs", "8"]
    arguments += ["--skip-tokenizer-init", "--no-enable-prefix-caching"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 180
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                except (urllib.error.URLError, ConnectionError, TimeoutError):
                    assert process.poll() is None, (folder / "log").read_text()[-3000:]
                    assert time.monotonic() < deadline, "the server did not come up"
                    time.sleep(0.5)
            yield Server(process, port, folder / "recorded", model, str(folder / "model"))
        finally:
            process.kill()
            process.wait()


def _await(path: Path, changed_after: float = 0.0) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() or path.stat().st_mtime <= changed_after:
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.1)


def test_a_server_records_from_start_to_stop(server: Server) -> None:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(6, 128, int(rng.integers(4, 60))).tolist() for _ in range(6)]
    names = ["code", "poetry", None, "code", "poetry", "code"]
    requests = []
    domains = ["code", "default", "poetry"]
    for prompt, name in zip(prompts, names, strict=True):
        generated = server.complete(prompt, 6, name)
        assert len(generated) == 6
        requests.append((prompt, generated, domains.index(name or "default")))
    path = server.folder / "profile.safetensors"
    assert not path.exists()
    server.process.send_signal(signal.SIGUSR1)
    _await(path)
    saved = path.stat().st_mtime
    first = load_profile(path)
    assert first.tokens > 0

    late = server.complete(prompts[0], 3, "code")
    requests.append((prompts[0], late, 0))
    _await(path, saved)  # the server has gone idle
    saved = path.stat().st_mtime
    last = server.complete(prompts[1], 3, "poetry")
    requests.append((prompts[1], last, 2))
    _await(path, saved)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    profile = moescope.RoutingProfile.load(path)
    expected = reference.count(server.model, requests, domains=3, experts=16, scoring="softmax", scale=1.0)
    assert profile.domains == tuple(domains)
    np.testing.assert_array_equal(profile.selection_counts, expected.selection)
    np.testing.assert_array_equal(profile.split_counts, expected.splits)
    np.testing.assert_array_equal(profile.token_counts, expected.tokens)
    assert profile.runs[0].engine.name == "vllm"
    assert profile.runs[0].prompts == 8
    assert not list(server.folder.glob("error-*"))
