"""A recording server: the real `vllm serve` on vLLM's CPU build, with real clients."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference

if "MOESCOPE_NO_SKIPS" not in os.environ:
    pytest.importorskip("vllm")

from vllm_models import save_checkpoint

import moescope
from benchmarks.server_soak import Soak
from benchmarks.server_soak import merge as merge_all
from benchmarks.serving import Server
from moescope.adapters.vllm_runs import load_runs
from moescope.profiler.errors import InvariantError, ProfileError
from moescope.profiler.profile import RoutingProfile

pytestmark = pytest.mark.filterwarnings("default")

DEMO = Path(moescope.__file__).parent / "profiler" / "demo" / "stacked"
ARGUMENTS = [
    "--dtype=float32", "--enforce-eager", "--max-model-len=512", "--gpu-memory-utilization=0.15", "--max-num-seqs=16",
]  # fmt: skip


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if result := condition():
                return result
        except (ProfileError, InvariantError, OSError):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)


def merge(folder: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moescope.cli", "merge", str(folder), "-o", str(output), "--force"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def add_plugin(folder: Path, code: str) -> Path:
    """A package that vLLM loads as a plug-in; a folder for PYTHONPATH."""
    about = folder / "vllm_fault-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-fault\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nfault = vllm_fault:register\n")
    (folder / "vllm_fault.py").write_text(textwrap.dedent(code))
    return folder


def test_a_server_counts_what_it_serves_whatever_its_clients_send(tmp_path: Path) -> None:
    from openai import OpenAI
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = tmp_path / "recorded"
    environment = {"MOESCOPE_DOMAINS": "5,code,poetry"}
    arguments = [*ARGUMENTS, "--no-enable-prefix-caching"]
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    requests: list[tuple[list[int], list[int], int]] = []
    domains = ["code", "default", "other", "poetry", "tenant"]
    rng = np.random.default_rng(2)

    def prompt() -> list[int]:
        return rng.integers(6, 4096, int(rng.integers(4, 60))).tolist()  # type: ignore[no-any-return]

    with Server(DEMO, tmp_path, record, arguments, environment) as server:
        server.wait_until_up()
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

        def ask(expected: str, tokens: int = 6, **extra: Any) -> None:
            ids = prompt()
            answer = client.completions.create(
                model="m", prompt=ids, max_tokens=tokens, temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": extra},
            )  # fmt: skip
            generated = answer.choices[0].model_extra["token_ids"]
            assert len(generated) == tokens
            requests.append((ids, generated, domains.index(expected)))

        for name in ("code", "poetry", "code"):
            ask(name, moescope_domain=name)
        ask("default")
        # keys of `moescope profile` say nothing here, and strangers cannot take the place of known domains
        for extra in ({"moescope_trace": "x"}, {"moescope_verify": 1}, {"moescope_split": 99}):
            for _ in range(3):
                ask("default", **extra)
        ask("tenant", moescope_domain="tenant")
        for name in ("second", "x" * 5000, "", "a\nb", 7, [1.5, 2], "other"):
            ask("other", moescope_domain=name)
        ask("poetry", moescope_domain="poetry")

        total = sum(len(p) + len(g) - 1 for p, g, _ in requests)
        wait_for(lambda: load_runs(record).tokens == total)  # the server has gone idle
        part = next(record.glob("part-*"))
        saved = part.stat().st_mtime_ns
        server.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: part.stat().st_mtime_ns > saved)

        # text and chat, streamed, as clients do; a client that hangs up; a stop string
        chat = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "def add(a, b):"}], max_tokens=9, temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": {"moescope_domain": "code"}},
        )  # fmt: skip
        ids = chat.model_extra["prompt_token_ids"]
        requests.append((ids, chat.choices[0].model_extra["token_ids"], domains.index("code")))

        opening = tokenizer("The file is")["input_ids"]
        free = reference.greedy(model, opening, 120)
        text = tokenizer.decode(free[20:60])
        word = max(text.split(), key=len)
        stopped = client.completions.create(
            model="m", prompt=opening, max_tokens=120, temperature=0, stop=[word],
            extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": {"moescope_domain": "tenant"}},
        )  # fmt: skip
        assert stopped.choices[0].finish_reason == "stop"
        answered = stopped.choices[0].model_extra["token_ids"]
        assert answered == free[: len(answered)]
        server.stop()
    result = merge(record, tmp_path / "profile.safetensors")
    assert result.returncode == 0, result.stderr
    profile = RoutingProfile.load(str(tmp_path / "profile.safetensors"))
    assert profile.domains == tuple(domains)
    # what the engine had routed before the front end found the stop string was routed, and counts
    decoded = int(profile.token_counts[domains.index("tenant"), 1]) - 5
    assert len(answered) - 1 <= decoded < 119
    requests.append((opening, free[: decoded + 1], domains.index("tenant")))
    expected = reference.count(model, requests, domains=5, experts=16, scoring="softmax", scale=1.0)
    np.testing.assert_array_equal(profile.token_counts, expected.tokens)
    np.testing.assert_array_equal(profile.selection_counts, expected.selection)
    np.testing.assert_array_equal(profile.split_counts, expected.splits)
    run = profile.runs[0]
    assert (run.engine.name, run.prompts, run.complete) == ("vllm", len(requests), True)
    assert run.settings["aborted_requests"] == 1
    assert [path.name for path in record.iterdir()] == [part.name]  # no error, no trigger is left


def test_a_fault_in_the_scheduler_ends_the_recording_and_not_the_server(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_checkpoint("qwen3_moe", model)
    record = tmp_path / "recorded"
    path = add_plugin(
        tmp_path / "plugin",
        """
        def register():
            from moescope.adapters.vllm_ledger import Ledger

            ended = Ledger.ended

            def failing(self, request, *, aborted):
                if request.num_tokens == 13:
                    raise LookupError("a request of thirteen tokens")
                return ended(self, request, aborted=aborted)

            Ledger.ended = failing
        """,
    )
    arguments = [*ARGUMENTS, "--max-model-len=256", "--skip-tokenizer-init"]
    with Server(model, tmp_path, record, arguments, path=[path]) as server:
        server.wait_until_up()
        before = [server.complete([7, 8, 9 + i], 4) for i in range(3)]
        assert len(server.complete([10] * 8, 5)["choices"][0]["token_ids"]) == 5  # the fault
        after = [server.complete([7, 8, 9 + i], 4) for i in range(3)]
        assert [one["choices"][0]["token_ids"] for one in after] == [one["choices"][0]["token_ids"] for one in before]
        wait_for(lambda: not load_runs(record).complete)
        assert server.stop() == 0
        assert "the recording ends: the scheduler's ledger failed: LookupError: a request of thirteen" in server.text()
    profile = load_runs(record)
    profile.check()
    assert 3 * 6 <= profile.tokens <= 3 * 6 + 12  # what was counted before stands, the rest is not there
    assert profile.runs[0].settings["ended"].startswith("the scheduler's ledger failed")


def test_a_server_whose_worker_does_not_record_does_not_start(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_checkpoint("qwen3_moe", model)
    path = add_plugin(
        tmp_path / "plugin",
        """
        def register():
            from moescope.adapters import vllm_plugin

            vllm_plugin._bind = lambda worker, settings: None  # as where the environment does not reach a worker
        """,
    )
    arguments = [*ARGUMENTS, "--max-model-len=256", "--skip-tokenizer-init"]
    with Server(model, tmp_path, tmp_path / "recorded", arguments, path=[path]) as server:
        with pytest.raises(RuntimeError, match="did not come up"):
            server.wait_until_up()
        assert "the plug-in did not bind in a worker of vLLM, so nothing would be recorded" in server.text()


def test_a_folder_that_cannot_be_written_is_said_before_the_server_is_up(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_checkpoint("qwen3_moe", model)
    (tmp_path / "file").touch()
    with Server(model, tmp_path, tmp_path / "file" / "recorded", [*ARGUMENTS, "--skip-tokenizer-init"]) as server:
        with pytest.raises(RuntimeError, match="did not come up"):
            server.wait_until_up()
        assert f"cannot record into {tmp_path / 'file' / 'recorded'}: Not a directory" in server.text()


def test_a_session_whose_input_streams_is_left_out_and_counted_as_such(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_checkpoint("qwen3_moe", model)
    record = tmp_path / "recorded"
    script = tmp_path / "session.py"
    script.write_text(
        textwrap.dedent(
            """
            import asyncio, json, sys
            from vllm import AsyncEngineArgs, SamplingParams
            from vllm.engine.protocol import StreamingInput
            from vllm.v1.engine.async_llm import AsyncLLM

            def sampling(tokens):
                return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)

            async def chunks():
                for ids in ([7, 8, 9, 10], [11, 12, 13], [14, 15]):
                    yield StreamingInput({"prompt_token_ids": ids}, sampling(4))

            async def session(engine):
                async for output in engine.generate(chunks(), sampling(4), "session"):
                    pass

            async def request(engine, number):
                ids = [20 + number] * (number + 3)
                async for output in engine.generate({"prompt_token_ids": ids}, sampling(6), f"r{number}"):
                    pass
                return len(ids) + len(output.outputs[0].token_ids) - 1

            async def main():
                engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**json.loads(sys.argv[1])))
                tokens = await asyncio.gather(session(engine), *(request(engine, i) for i in range(5)))
                await session(engine)
                tokens.append(await request(engine, 9))
                print("routed", sum(count or 0 for count in tokens))
                engine.shutdown()

            if __name__ == "__main__":
                asyncio.run(main())
            """
        )
    )
    engine = {
        "model": str(model), "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8,
        "gpu_memory_utilization": 0.15, "skip_tokenizer_init": True, "enable_prefix_caching": False,
    }  # fmt: skip
    environment = os.environ | {"MOESCOPE_RECORD": str(record), "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(engine)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tokens = next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("routed"))
    profile = load_runs(record)
    assert profile.complete
    assert profile.tokens == tokens == sum(i + 3 + 5 for i in (*range(5), 9))
    settings = profile.runs[0].settings
    assert (profile.runs[0].prompts, settings["left_out_requests"]) == (6, 2)
    # 9 tokens of input and 3 of each answer but the last, whose last token is never fed
    assert settings["left_out_tokens"] == 2 * (9 + 3 * 3)


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    """The short form of `benchmarks/server_soak.py`: a full disk, then SIGTERM and kills of servers on one folder."""
    model = tmp_path / "model"
    save_checkpoint("qwen3_moe", model)
    arguments = [*ARGUMENTS, "--max-model-len=256", "--skip-tokenizer-init"]
    rows = Soak(model, tmp_path, 0.7, 64, 128, arguments).run()
    assert [row for row in rows if not row.holds] == []
    assert [row.case for row in rows] == ["drained", "SIGTERM", "front end", "engine core", "worker 0"]
    assert merge_all(tmp_path) == sum(row.recorded for row in rows)
