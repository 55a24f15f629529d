"""`moescope profile` and its companions: what they write, and what they say when something is wrong."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Cli

from moescope.profiler.files import PARTIAL_NAME, PROFILE_NAME, load_profile

ROOT = Path(__file__).parents[2]
DOCUMENTED = {
    "analysis_data.json",
    "analysis_summary.json",
    "expert_activation_3d.html",
    "expert_activation_heatmap.html",
    "layer_correlation_matrix.html",
    "periodic_pattern_analysis.html",
    "periodic_pattern_analysis_detailed.html",
    "report.html",
    "router_norm_correlation.html",
    "router_similarity_matrix.html",
    "summary_report.txt",
}
BESIDE = {PROFILE_NAME, "plotly.min.js", "router_similarity.safetensors", "token_sample.safetensors"}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "Once upon a time", "domain": "prose"},
        {"messages": [{"role": "user", "content": "Hello?"}], "domain": "dialogue"},
        {"prompt_token_ids": [5, 6, 7], "domain": "code"},
        {"prompt": "def f(x): return x", "domain": "code"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def test_profile_writes_the_documented_files(cli: Cli, checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    done = cli("profile", prompts, "--model", checkpoint, "--max-tokens", 5, "--output-dir", "out")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"Wrote {Path('out') / PROFILE_NAME} and the report beside it"
    assert {file.name for file in (tmp_path / "out").iterdir()} == DOCUMENTED | BESIDE
    profile = load_profile("out/profile.safetensors")
    assert profile.domains == ("code", "dialogue", "prose")
    assert profile.token_counts[:, 0].tolist() == [
        3 + len("def f(x): return x"),
        len("user: Hello?\n"),
        len("Once upon a time"),
    ]
    assert profile.token_counts[:, 1].sum() == 4 * (5 - 1)
    data = json.loads(Path("out/analysis_data.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert data["metadata"]["model_info"]["layer_indices"] == [0, 2, 3]
    assert data["metadata"]["model_info"]["total_tokens_analyzed"] == profile.tokens
    counts = profile.selection_counts.sum(axis=(0, 1))
    np.testing.assert_allclose(data["selection_frequency"]["matrix"], counts / (3 * profile.tokens))
    assert profile.probability_sums is not None
    np.testing.assert_allclose(
        data["expert_activation"]["matrix"], profile.probability_sums.sum(axis=(0, 1)) / profile.tokens
    )


def test_router_similarity_is_that_of_the_files(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    assert cli("profile", "hello", "-m", checkpoint, "--max-tokens", 0, "-o", "out").code == 0
    tensors = load_file(checkpoint / "model.safetensors")
    rows = [tensors[f"model.layers.{i}.mlp.gate.weight"].astype(np.float64).ravel() for i in (0, 2, 3)]
    cosine = [[float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in rows] for a in rows]
    data = json.loads((tmp_path / "out" / "analysis_data.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose(data["router_similarity"]["cosine_similarity_matrix"], cosine, atol=1e-6)


def test_python_cli_py_works_too_and_defaults_to_a_new_folder(checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "profile", "hello", "--model", str(checkpoint), "--max-tokens", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("moescope_20")
    assert (folder / PROFILE_NAME).exists()


def test_standard_input_text_files_and_csv(
    cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a document\nof two lines", encoding="utf-8")
    (tmp_path / "b.csv").write_text('question,subject\n"two\nlines",maths\nplain,art\n', encoding="utf-8")

    class Stdin:
        buffer = io.BytesIO(b'{"prompt": "from stdin"}\n')

    monkeypatch.setattr(sys, "stdin", Stdin())
    assert cli("profile", "-", "a.txt", "-m", checkpoint, "--max-tokens", 0, "-o", "one").code == 0
    assert load_profile("one/profile.safetensors").tokens == len("from stdin") + len("a document\nof two lines")
    arguments = ["b.csv", "--prompt-field", "question", "--domain-field", "subject", "--limit", 2]
    assert cli("profile", *arguments, "-m", checkpoint, "--max-tokens", 0, "-o", "two").code == 0
    assert load_profile("two/profile.safetensors").domains == ("art", "maths")


def test_conversations_and_parquet(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ask, answer = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
    records = [{"conversations": turns} for turns in ([answer], [ask, answer], [])]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    pq.write_table(pa.table({"prompt": ["abc"]}), tmp_path / "b.parquet")
    done = cli("profile", "a.json", "b.parquet", "-m", checkpoint, "--max-tokens", 0, "-o", "out")
    assert done.code == 0
    assert "Left out 2 conversations without a turn of the user (first: a.json, item 1)." in done.err
    assert load_profile("out/profile.safetensors").tokens == len("user: Hi\n") + len("abc")
    summary = Path("out/summary_report.txt").read_text(encoding="utf-8")
    assert "conversations left out because they have no turn of the user: 2" in summary


def test_too_long_prompts_are_counted_and_truncated_only_if_told_to(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "x" * n}) for n in (10, 150, 200)), encoding="utf-8"
    )
    arguments = ["profile", "p.jsonl", "-m", checkpoint, "--max-tokens", 0, "-o", "out"]
    done = cli(*arguments)
    assert done.code == 2
    assert "2 of 3 prompts are longer than --max-prompt-tokens 128" in done.error
    assert "200 tokens, p.jsonl, line 3" in done.error
    assert not (tmp_path / "out").exists()
    assert cli(*arguments, "--truncate", "--max-prompt-tokens", 50).code == 0
    assert load_profile("out/profile.safetensors").tokens == 10 + 50 + 50


def test_measures_and_intervals_act(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    shared = ["profile", "hello there", "-m", checkpoint, "--max-tokens", 0]
    assert cli(*shared, "-o", "f", "--periodic-intervals", "2,3", "--delta-max", 2).code == 0
    data = json.loads(Path("f/analysis_data.json").read_text(encoding="utf-8"))
    assert list(data["periodic_patterns"]) == ["2", "3"]
    assert data["layer_correlation"]["deltas"] == [1, 2]
    assert cli("report", "f/profile.safetensors", "--measure", "probability", "-o", "p").code == 0
    other = json.loads(Path("p/analysis_data.json").read_text(encoding="utf-8"))
    assert data["layer_correlation"]["measure"] == "frequency"
    assert other["layer_correlation"]["measure"] == "probability"
    matrix = np.array(other["expert_activation"]["matrix"])
    assert other["layer_correlation"]["correlation_matrix"][1][0] == pytest.approx(
        np.corrcoef(matrix[1], matrix[2])[0, 1]
    )
    assert cli(*shared, "-o", "n", "--disable-structured-output", "--probabilities", "off", "--coactivation").code == 0
    assert not Path("n/analysis_data.json").exists()
    assert load_profile("n/profile.safetensors").probability_sums is None
    assert load_profile("n/profile.safetensors").coactivation is not None
    failed = cli("report", "n/profile.safetensors", "--measure", "probability", "-o", "q")
    assert failed.code == 2
    assert "was not recorded" in failed.error
    assert not Path("q").exists()


def test_merge_info_and_report(cli: Cli, checkpoint: Path) -> None:
    for name in ("a", "b"):
        assert cli("profile", f"prompt {name}", "-m", checkpoint, "--max-tokens", 0, "-o", name).code == 0
    files = ["a/profile.safetensors", "b/profile.safetensors"]
    assert cli("merge", *files, "-o", "ab.safetensors").code == 0
    assert load_profile("ab.safetensors").tokens == 16
    shown = cli("info", "ab.safetensors").out
    assert "16 (prefill 16, decode 0)" in shown
    assert "2, 2 prompts" in shown
    assert cli("report", *files, "-o", "r").code == 0
    assert "16" in Path("r/summary_report.txt").read_text(encoding="utf-8")
    assert "ab.safetensors exists" in cli("merge", *files, "-o", "ab.safetensors").error
    assert "is in more than one of the profiles" in cli("merge", *files, files[0], "-o", "c.safetensors").error
    assert not Path("c.safetensors").exists()
    assert cli("merge", *files, "-o", "ab.safetensors", "--force").code == 0


def test_profiles_of_different_models_do_not_merge(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    from tiny_models import tiny_model

    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    tiny_model("qwen3_moe", seed=5, vocab_size=258, max_position_embeddings=128).save_pretrained(other)
    for name, model in (("a", checkpoint), ("b", other)):
        assert cli("profile", "hello", "-m", model, "--max-tokens", 0, "-o", name).code == 0
    error = cli("merge", "a/profile.safetensors", "b/profile.safetensors", "-o", "c.safetensors").error
    assert "profiles of different models cannot be merged" in error
    assert "router weights differ" in error


def test_ctrl_c_keeps_what_was_counted_and_resume_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"{i} " + "x" * 90}) for i in range(600)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "moescope.cli",
        "profile",
        "p.jsonl",
        "--model",
        str(checkpoint),
        "--max-tokens",
        "8",
    ]
    command += ["--batch-size", "4", "--output-dir", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:  # the engine is up when it has said what it runs
            if "MoE layers" in line:
                break
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / PARTIAL_NAME).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130, rest
    assert "Interrupted after" in rest
    assert "--resume" in rest
    kept = load_profile(tmp_path / "out" / PARTIAL_NAME)
    assert 0 < kept.runs[0].prompts < 600
    done = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = load_profile(tmp_path / "out" / PROFILE_NAME)
    assert whole.runs[0].prompts == 600
    assert whole.token_counts[0, 0] == sum(len(json.loads(line)["prompt"]) for line in lines)
    assert whole.runs[0].uuid == kept.runs[0].uuid
    assert not (tmp_path / "out" / PARTIAL_NAME).exists()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "missing.jsonl", "No such file: missing.jsonl"),
        (b"", "empty.txt", "empty.txt is empty"),
        (b"", "empty.jsonl", "empty.jsonl is empty"),
        (b"", "empty.csv", "empty.csv is empty"),
        (b"\xff\xfe\x00", "latin.txt", "latin.txt, line 1: byte 1 "),
        (b'{"prompt": "a"}\n{"prompt": \n', "bad.jsonl", "bad.jsonl, line 2"),
        (b'{"text_": "a", "kind": 1}\n', "field.jsonl", "'text_', 'kind'"),
        (b"a,b\n1,2\n", "field.csv", "'a', 'b'"),
        (b'{"prompt": ""}\n', "blank.jsonl", "blank.jsonl, line 1: the prompt is empty"),
        (b"%PDF", "paper.pdf", ".jsonl"),
        (b'{"prompt_token_ids": [1, 99999]}', "ids.jsonl", "ids.jsonl, line 1"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "tool.jsonl", "chat template refuses"),
    ],
)
def test_bad_prompt_files(
    cli: Cli, checkpoint: Path, tmp_path: Path, content: bytes | None, name: str, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = cli("profile", name, "-m", checkpoint, "--max-tokens", 0, "-o", "out")
    assert done.code == 2
    assert message in done.error
    assert not (tmp_path / "out").exists()


def test_a_wrong_prompt_field_lists_the_fields(cli: Cli, checkpoint: Path, prompts: Path) -> None:
    done = cli("profile", prompts, "--prompt-field", "question", "-m", checkpoint, "--max-tokens", 0, "-o", "out")
    assert done.code == 2
    assert "'question'" in done.error
    assert "'prompt'" in done.error


def test_a_line_of_ten_gigabytes(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    with open(tmp_path / "huge.jsonl", "wb") as file:
        file.write(b'{"prompt": "')
        file.truncate(10 * 2**30)
    done = cli("profile", "huge.jsonl", "-m", checkpoint, "-o", "out")
    assert done.code == 2
    assert "huge.jsonl, line 1 is longer than 16 MiB" in done.error


def test_too_many_domains_are_refused_by_name(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "a", "user": f"u{i}"}) for i in range(70)), encoding="utf-8"
    )
    done = cli("profile", "p.jsonl", "--domain-field", "user", "-m", checkpoint, "-o", "out")
    assert done.code == 2
    assert "--domain-field" in done.error
    assert "70" in done.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "sglang"], "'--engine'"),
        (["--engine", "transformers", "--verify", "0.5"], "--engine transformers does not take verify"),
        (["--engine-arg", "eager"], "--engine-arg 'eager': write name=value"),
        (["--truncate", "--skip-long", "--max-prompt-tokens", "4"], "--truncate and --skip-long exclude one another"),
        (["--dtype", "int3"], "'--dtype'"),
        (["--measure", "vibes"], "'--measure'"),
        (["--device", "toaster"], "--device 'toaster' is unknown"),
        (["--device", "cuda:7"], "CUDA devices here"),
        (["--max-tokens", "-1"], "'--max-tokens'"),
        (["--max-tokens", "1e9"], "'--max-tokens'"),
        (["--max-tokens", "5000000"], "leaves no room for a prompt in the model's context of 128"),
        (["--max-prompt-tokens", "200"], "exceed the model's context of 128"),
        (["--max-prompt-tokens", "0"], "'--max-prompt-tokens'"),
        (["--batch-size", "0"], "--batch-size '0' must be auto or"),
        (["--batch-size", "many"], "--batch-size 'many' must be auto or"),
        (["--limit", "0"], "'--limit'"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "-2"], "'--temperature'"),
        (["--seed", "-1"], "'--seed'"),
        (["--delta-max", "0"], "'--delta-max'"),
        (["--periodic-intervals", "12;24"], "--periodic-intervals '12;24' must be"),
        (["--periodic-intervals", "0"], "--periodic-intervals '0' must be"),
        (["--measure", "probability", "--probabilities", "off"], "--probabilities off leaves out"),
        (["--resume"], "--resume needs --output-dir"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_options(cli: Cli, checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    extra = [] if "--resume" in arguments else ["-o", "out"]
    done = cli("profile", "hello", "-m", checkpoint, *extra, *arguments)
    assert done.code == 2
    assert message in done.error
    assert list(tmp_path.iterdir()) == []


def test_bad_models(cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moescope.adapters.families import FAMILIES

    monkeypatch.delitem(FAMILIES, "olmoe")
    empty, no_weights, broken, dense = (tmp_path / name for name in ("empty", "no_weights", "broken", "dense"))
    empty.mkdir()
    for folder in (no_weights, broken, dense):
        shutil.copytree(checkpoint, folder)
    (no_weights / "model.safetensors").unlink()
    (broken / "model.safetensors").write_bytes(b"not weights")
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    for model_type, message in (
        ("qwen3", "(qwen3) has no MoE layers"),
        ("jamba", "family 'jamba' cannot be recorded exactly"),
        ("olmoe", "MoE family 'olmoe' is not known"),
        ("nonsense", "cannot read the config"),
    ):
        (dense / "config.json").write_text(
            json.dumps({**config, "model_type": model_type, "architectures": None, "num_local_experts": 8}),
            encoding="utf-8",
        )
        if model_type == "qwen3":
            (dense / "config.json").write_text(
                json.dumps({k: v for k, v in config.items() if "expert" not in k} | {"model_type": "qwen3"}),
                encoding="utf-8",
            )
        done = cli("profile", "hello", "-m", dense, "-o", "out")
        assert done.code == 2
        assert message in done.error
    for model, message in (
        (tmp_path / "nowhere", "No such folder"),
        (empty, "has no config.json"),
        (no_weights, "no weights"),
        (broken, f"cannot load {broken}"),
        (checkpoint / "config.json", "is a file; --model needs the folder"),
        ("no-such-org/no-such-model", "no-such-org/no-such-model"),
    ):
        done = cli("profile", "hello", "-m", model, "-o", "out")
        assert done.code == 2
        assert message in done.error
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_refused_not_made_up(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, tmp_path / "holes")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.2.mlp.gate.weight"]
    save_file(tensors, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    done = cli("profile", "hello", "-m", "holes", "--max-tokens", 0, "-o", "out")
    assert done.code == 2
    assert "1 weights are missing, e.g. model.layers.2.mlp.gate.weight" in done.error
    assert not (tmp_path / "out").exists()


def test_names_that_no_file_can_have(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    name = "a" * 300
    assert "--model is empty" in cli("profile", "hello", "-m", "").error
    assert "File name too long" in cli("profile", "hello", "-m", checkpoint, "-o", f"new/deeper/{name}").error
    for arguments in (["info", name], ["report", name, "-o", "r"], ["merge", name, "-o", "m"]):
        assert cli(*arguments).code == 2
    assert "not a file that can be replaced" in cli("merge", name, "-o", ".", "--force").error
    assert list(tmp_path.iterdir()) == []


def test_bad_output_folders(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "full exists and is not empty" in cli("profile", "hello", "-m", checkpoint, "-o", "full").error
    assert os.listdir(tmp_path / "full") == ["mine.txt"]
    assert cli("profile", "hello", "-m", checkpoint, "--max-tokens", 0, "-o", "full", "--force").code == 0
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert (
        "is a file; --output-dir needs a folder" in cli("profile", "a", "-m", checkpoint, "-o", "full/mine.txt").error
    )
    assert "cannot write into /proc/moescope" in cli("profile", "a", "-m", checkpoint, "-o", "/proc/moescope").error
    assert "No such folder: gone" in cli("profile", "a", "-m", checkpoint, "-o", "gone", "--resume").error


def test_a_full_disk(checkpoint: Path, tmp_path: Path) -> None:
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.argv = ["moescope", "profile", "hello", "-m", {str(checkpoint)!r}, "--max-tokens", "0", "-o", "out"]
from moescope.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("moescope: cannot write out/profile.partial.safetensors: ")
    assert not (tmp_path / "out").exists()


def test_bad_profiles(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    assert cli("profile", "hello", "-m", checkpoint, "--max-tokens", 0, "-o", "a").code == 0
    good = (tmp_path / "a" / PROFILE_NAME).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(good[:-5])
    (tmp_path / "text.safetensors").write_text("hello")
    damaged = bytearray(good)
    damaged[-8] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    for name, message in (
        ("none.safetensors", "No such file: none.safetensors"),
        ("cut.safetensors", "cut.safetensors is not a safetensors file, or is cut short"),
        ("text.safetensors", "text.safetensors is not a safetensors file"),
        ("damaged.safetensors", "damaged.safetensors: "),
        ("a", "a is a folder; name the file, e.g. a/profile.safetensors"),
    ):
        for command in (["info"], ["report", "-o", "r"], ["merge", "-o", "m.safetensors"]):
            done = cli(command[0], name, *command[1:])
            assert done.code == 2
            assert message in done.error
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "m.safetensors").exists()


def test_debug_shows_the_traceback(cli: Cli, checkpoint: Path) -> None:
    from moescope.profiler.errors import PromptError

    with pytest.raises(PromptError):
        cli("profile", "missing.jsonl", "-m", checkpoint, "--debug")


def test_help_and_version(cli: Cli) -> None:
    assert "Examples:" in cli("profile", "--help").out
    assert cli("--version").out.startswith("moescope 0.")
    none = cli()
    assert none.code == 2
    assert "profile" in none.out
