"""Code that comes with a checkpoint does not run, whatever the answer on standard input."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from command import Cli
from tiny_models import tiny_model
from traces import about, write_batches

from moescope.profiler.trace import ABOUT_NAME

ROOT = Path(__file__).parents[2]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the code of the checkpoint would leave behind."""
    return tmp_path / "it ran"


@pytest.fixture
def hostile(tmp_path: Path, marker: Path, checkpoint: Path) -> Path:
    """A checkpoint that loads without code, but for its tokenizer, which brings its own.

    Its family has no tokenizer of transformers' own, which would be taken without asking.
    """
    folder = tmp_path / "hostile"
    shutil.copytree(checkpoint, folder)
    tiny_model("dots1", vocab_size=258, eos_token_id=1, max_position_embeddings=128).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    code = f"""
        from pathlib import Path
        from transformers import PreTrainedTokenizerFast
        Path({str(marker)!r}).touch()

        class Hostile(PreTrainedTokenizerFast):
            pass
    """
    (folder / "hostile.py").write_text("\n".join(line[8:] for line in code.splitlines()), encoding="utf-8")
    return folder


def write_trace(folder: Path, model: str) -> None:
    """A trace of 12 tokens, said to be of a model; some of their ids are beyond the tokenizer of the checkpoint."""
    write_batches(folder, about(), [[0, 1]])
    file = folder / ABOUT_NAME
    file.write_text(file.read_text(encoding="utf-8").replace('"tiny"', json.dumps(model)), encoding="utf-8")


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command line, with yes as the answer to whatever it asks."""
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        cwd=cwd,
        input="y\n" * 20,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_MODULES_CACHE": str(cwd / "modules")} | environment,
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["trace", "view", "t", "-o", "v.html"], 0),
        (["trace", "analyze", "t", "-o", "a"], 0),
        (["trace", "view", "t", "-o", "v.html", "--tokenizer", "hostile"], 2),
        (["trace", "analyze", "t", "-o", "a", "--tokenizer", "hostile"], 2),
        (["profile", "ids.jsonl", "-m", "hostile", "--max-tokens", "0", "-o", "out", "--trace", "auto"], 0),
        (["profile", "x", "-m", "hostile", "--max-tokens", "0", "-o", "out", "--trace", "auto"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_code_of_a_checkpoint_runs(
    hostile: Path, marker: Path, tmp_path: Path, command: list[str], code: int
) -> None:
    write_trace(tmp_path / "t", str(hostile))
    (tmp_path / "ids.jsonl").write_text('{"prompt_token_ids": [3, 4, 5]}')
    done = run(*command, cwd=tmp_path)
    assert not marker.exists()
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    if code:
        assert [line for line in done.stderr.splitlines() if line.startswith("moescope: ")] == [
            done.stderr.splitlines()[-1]
        ]


def test_a_model_with_code_of_its_own_is_refused(hostile: Path, marker: Path, tmp_path: Path) -> None:
    config = json.loads((hostile / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "hostile", "auto_map": {"AutoConfig": "hostile.Hostile"}}
    (hostile / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = run("profile", "x", "-m", "hostile", "-o", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert not marker.exists()
    assert done.stderr.splitlines()[-1].startswith("moescope: cannot read the config of hostile: ")


def test_code_runs_where_the_user_names_it_and_says_so(hostile: Path, marker: Path, tmp_path: Path) -> None:
    """The positive control: the code would run, and is heard of."""
    done = run(
        *("profile", "x", "-m", "hostile", "--max-tokens", "0", "-o", "out", "--trace", "auto", "--trust-remote-code"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert marker.exists()
    assert '"texts":["x"]' in (tmp_path / "out" / "trace_view.html").read_text(encoding="utf-8").replace(" ", "")
    marker.unlink()
    named = ("--tokenizer", "hostile", "--trust-remote-code")
    done = run("trace", "view", "out/trace", "-o", "v.html", *named, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert marker.exists()


def test_trust_is_for_a_tokenizer_that_is_named(cli: Cli, tmp_path: Path) -> None:
    write_trace(tmp_path / "t", "tiny")
    for command in (["view", "t"], ["analyze", "t", "-o", "a"]):
        done = cli("trace", *command, "--trust-remote-code")
        assert done.code == 2
        assert "--trust-remote-code needs --tokenizer: no code runs that a trace names" in done.error


@pytest.fixture
def foreign(tmp_path: Path, checkpoint: Path) -> Path:
    """A folder of another user."""
    if os.geteuid():
        return Path("/usr/lib")
    folder = tmp_path / "foreign"
    shutil.copytree(checkpoint, folder)
    os.chown(folder, 65534, 65534)
    return folder


def test_the_folder_of_another_user_is_read_only_if_it_is_named(
    cli: Cli, foreign: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link"
    link.symlink_to(foreign)
    for number, model in enumerate((foreign, link)):
        write_trace(tmp_path / f"t{number}", str(model))
        done = cli("trace", "view", f"t{number}")
        assert done.code == 0, done.err
        assert f"Tokens are shown by their ids: {model} is a folder of another user, which must be named" in done.err
    write_trace(tmp_path / "own", str(checkpoint))
    assert "another user" not in cli("trace", "view", "own").err
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "another user" in cli("trace", "view", "own", "--force").err
    assert "has token ids 0 to 257" in cli("trace", "view", "own", "--force", "--tokenizer", checkpoint).error


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A server in place of the hub that has nothing, and what was asked of it."""
    asked: list[str] = []

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Nothing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_hub_is_not_asked_for_what_a_trace_names(
    hub: tuple[str, list[str]], checkpoint: Path, tmp_path: Path
) -> None:
    """A model of the local cache gives its text; another one stays away until the user names it."""
    address, asked = hub
    cache = tmp_path / "home" / "hub" / "models--org--known"
    shutil.copytree(checkpoint, cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    for name in ("known", "other"):
        write_trace(tmp_path / name, f"org/{name}")
    done = run("trace", "view", "known", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "org/known has token ids 0 to 257" in done.stderr, "it was read"
    done = run("trace", "view", "other", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "org/other is neither a folder nor in the local hub cache" in done.stderr
    assert asked == []
    done = run("trace", "view", "other", "--force", "--tokenizer", "org/other", cwd=tmp_path, **environment)
    assert done.returncode == 2
    assert any("org/other" in path for path in asked), "the server would have heard"
