"""`moescope weights`: what it prints and writes, and every fault in one line."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import QWEN, per_expert, write
from command import Cli
from disks import full_disk
from safetensors.torch import save_file

from moescope.adapters import weighing
from moescope.profiler import weight_pass, weight_slabs
from moescope.profiler.files import PARTIAL_WEIGHTS_NAME, WEIGHTS_NAME
from moescope.profiler.weight_files import load_weights
from moescope.viz import weight_analysis, weights_report
from moescope.viz.pages import LIBRARY
from moescope.viz.weight_analysis import weight_similarity
from moescope.viz.weight_findings import verdict_in_words
from moescope.viz.weights_report import DATA_NAME, EXPERT_PAGES, PAGE_NAME

CONFIG = {**QWEN, "num_hidden_layers": 3}
ROUTER_PAGES = ("router_similarity_matrix.html", "router_norm_correlation.html")
WRITTEN = {WEIGHTS_NAME, PAGE_NAME, DATA_NAME, LIBRARY, *EXPERT_PAGES, *ROUTER_PAGES}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    tensors, _ = per_expert(CONFIG, layers=(0, 1, 2))
    return write(tmp_path / "tiny", CONFIG, tensors, shards=2)


def test_the_demo_is_told_from_its_control(cli: Cli) -> None:
    done = cli("weights", "demo:stacked", "-o", "stacked", "--delta", "4", "--n-jobs", 1)
    assert done.code == 0
    assert "Δ = 4   cosine of the same expert +0.955, +0.955 centred, over 8 pairs of layers" in done.out
    assert "Same index: in 8 of 8 matched pairs of layers" in done.out
    assert done.out.splitlines()[-1] == f"Wrote {Path('stacked') / WEIGHTS_NAME} and weights.html beside it"
    assert set(os.listdir("stacked")) == WRITTEN
    page = Path("stacked", "weights.html").read_text(encoding="utf-8")
    assert "<title>Weight similarity in demo:stacked</title>" in page
    found = weight_similarity(load_weights(Path("stacked") / WEIGHTS_NAME))
    assert found.verdict is not None
    assert found.verdict.kind == "same index"
    assert verdict_in_words(found) in done.out
    assert verdict_in_words(found) in page
    control = cli("weights", "demo:control", "--sketch", "--delta", "4,8", "--match-pairs", 4)
    assert control.code == 0
    assert "None: no relation in 4 matched pairs of layers" in control.out
    assert "This is a sketch" in control.out


def test_two_checkpoints(cli: Cli, tiny: Path) -> None:
    done = cli("weights", tiny, "--against", tiny, "--layers", "0-1", "--match-pairs", 0, "-o", "out")
    assert done.code == 0
    assert "2 MoE layers, 3 experts" in done.out
    assert "No expert has changed: the weights are the same." in done.out
    assert "No layers were matched, so no relation was tested." in done.out
    data = json.loads(Path("out", "weights.json").read_bytes())
    assert data["metadata"]["model_id"] == data["metadata"]["against_id"] == str(tiny)
    assert np.all(np.array(data["expert_change"]["relative_change"]) == 0)


def test_an_interrupted_pass_is_resumed(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cli("weights", tiny, "-o", "whole")
    assert whole.code == 0
    monkeypatch.setattr(weight_slabs, "_PIECE", 1)
    work, calls = weight_pass._Pass._work, []

    def interrupted(*arguments: object) -> None:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        work(*arguments)

    monkeypatch.setattr(weight_pass._Pass, "_work", interrupted)
    stopped = cli("weights", tiny, "-o", "out")
    assert stopped.code == 130
    assert f"kept in {Path('out') / PARTIAL_WEIGHTS_NAME}" in stopped.err
    assert os.listdir("out") == [PARTIAL_WEIGHTS_NAME]
    monkeypatch.setattr(weight_pass._Pass, "_work", work)
    assert "or --resume to go on" in cli("weights", tiny, "-o", "out").error
    assert "other settings than these" in cli("weights", tiny, "-o", "out", "--resume", "--delta", "1").error
    resumed = cli("weights", tiny, "-o", "out", "--resume")
    assert resumed.code == 0
    assert set(os.listdir("out")) == WRITTEN
    one, other = (load_weights(Path(folder) / WEIGHTS_NAME) for folder in ("whole", "out"))
    assert one.raw is not None
    assert other.raw is not None
    np.testing.assert_allclose(one.raw, other.raw, rtol=1e-5, atol=1e-5)
    assert "nothing to resume" in cli("weights", tiny, "-o", "out", "--resume").error


def test_ctrl_c_while_pages_are_written(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(weights_report, "write_weights", interrupted)
    stopped = cli("weights", tiny, "-o", "out")
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1].startswith("Interrupted. weights.safetensors is complete")
    assert os.listdir("out") == [WEIGHTS_NAME]


def test_ctrl_c_before_anything_was_read(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(weighing, "open_checkpoint", interrupted)
    stopped = cli("weights", tiny, "-o", "out")
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    assert not Path("out").exists()


def test_a_full_disk(cli: Cli, tiny: Path) -> None:
    with full_disk(2000):
        done = cli("weights", tiny, "-o", "out")
    assert done.code == 2
    assert f"cannot write {Path('out') / WEIGHTS_NAME}: " in done.error
    assert not Path("out").exists()
    assert cli("weights", tiny, "-o", "out").code == 0


def test_one_of_a_kind_is_counted_so(cli: Cli, tmp_path: Path) -> None:
    config = {**CONFIG, "num_experts": 1}
    folder = write(tmp_path / "one", config, per_expert(config, layers=(0, 1, 2))[0])
    done = cli("weights", folder, "-o", "out")
    assert done.code == 0
    assert "3 MoE layers, 1 expert, " in done.out
    assert "1 experts" not in done.out + Path("out", PAGE_NAME).read_text(encoding="utf-8")


def test_an_interruption_after_the_pass_loses_no_sums(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(work: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weight_analysis, "_match", interrupted)
        stopped = cli("weights", tiny, "-o", "out")
    assert stopped.code == 130
    assert "`moescope report` goes on from it" in stopped.err
    assert os.listdir("out") == [WEIGHTS_NAME]
    assert cli("report", Path("out") / WEIGHTS_NAME, "--force", "-o", "out").code == 0
    assert set(os.listdir("out")) == WRITTEN


def test_a_router_that_is_not_finite_is_named_with_its_checkpoint(cli: Cli, tmp_path: Path) -> None:
    tensors, _ = per_expert(CONFIG, layers=(0, 1, 2))
    clean = write(tmp_path / "clean", CONFIG, tensors)
    tensors["model.layers.2.mlp.gate.weight"][1, 0] = torch.inf
    folder = write(tmp_path / "spoilt", CONFIG, tensors)
    for arguments in ((folder,), (clean, "--against", folder), (folder, "--against", clean)):
        done = cli("weights", *arguments, "-o", "out", "--force")
        assert done.code == 2
        assert done.error.endswith(f"left out of the results: layer 2 router row 1 of {folder}")
        assert "The routers have not changed" not in done.out


def test_a_sketch_of_a_small_model_is_all_of_it(cli: Cli, tmp_path: Path) -> None:
    tensors, _ = per_expert(CONFIG, layers=(0, 1, 2))
    folder = write(tmp_path / "small", CONFIG, tensors)
    for arguments in ((), ("--against", folder), ("--layers", "0-1")):
        done = cli("weights", folder, "--sketch", "-o", "out", "--force", *arguments)
        assert done.code == 0, done.error
        assert "a sample" not in done.out


@pytest.mark.parametrize("arguments", [("",), ("demo:stacked", "--against", "")])
def test_an_empty_name_is_said_to_be_empty(cli: Cli, arguments: tuple[str, ...]) -> None:
    done = cli("weights", *arguments, "-o", "out")
    assert done.code == 2
    assert "is empty; name the folder of a checkpoint" in done.error


def test_weights_that_are_not_finite_are_named(cli: Cli, tmp_path: Path) -> None:
    tensors, _ = per_expert(CONFIG, layers=(0, 1, 2))
    for expert in (0, 2):
        tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"][3, 3] = torch.nan
    folder = write(tmp_path / "spoilt", CONFIG, tensors)
    done = cli("weights", folder, "-o", "out")
    assert done.code == 2
    assert done.error.endswith(
        f"weights that are not finite were left out of the results: layer 1 expert 0 of {folder}, "
        f"layer 1 expert 2 of {folder}"
    )
    assert f"Wrote {Path('out') / WEIGHTS_NAME} and weights.html beside it" in done.out
    found = weight_similarity(load_weights(Path("out") / WEIGHTS_NAME))
    assert [(expert.layer, expert.expert) for expert in found.unusable] == [(1, 0), (1, 2)]


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--delta", "3"), "--delta 3: no two of the layers of "),
        (("--delta", "0"), "--delta '0' must be layer distances"),
        (("--layers", "1"), "layer 1 is the only one that routes, or was chosen"),
        (("--layers", "1,7"), "layer 7 of "),
        (("--layers", "3-1"), "--layers '3-1' must be layers and ranges of them"),
        (
            ("--layers", "0-99999999999"),
            "--layers: 99999999999 is too large; layers are whole numbers from 0 to ",
        ),
        (("-o", ""), "--output-dir is empty; name a folder, or leave the option out"),
        (("--layers", "a"), "--layers 'a' must be layers"),
        (("--device", "tpu"), "--device 'tpu' must be auto, cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), "--device cuda:99: there is no such GPU here"),
        (("--resume",), "--resume needs --output-dir"),
        (("--against", "demo:stacked"), "cannot be held against"),
        (("--against", "demo:stacked", "--delta", "1"), "leave --delta out"),
        (("--against", "nowhere/at/all"), "No such folder: nowhere/at/all"),
    ],
)
def test_options_that_do_not_fit(options: tuple[str, ...], pattern: str, cli: Cli, tiny: Path) -> None:
    done = cli("weights", tiny, *options)
    assert done.code == 2
    assert pattern in done.error
    assert sorted(os.listdir()) == ["tiny"]


def test_one_layer_and_layers_of_different_widths(cli: Cli, tmp_path: Path) -> None:
    single = {**QWEN, "num_hidden_layers": 1}
    folder = write(tmp_path / "single", single, per_expert(single, layers=(0,))[0])
    assert "layer 0 is the only one that routes" in cli("weights", folder).error
    assert cli("weights", folder, "--against", folder, "-o", "out").code == 0
    tensors, _ = per_expert(CONFIG, layers=(0, 1, 2))
    for part in ("gate", "up", "down"):
        name = f"model.layers.2.mlp.experts.1.{part}_proj.weight"
        tensors[name] = torch.zeros(10, 7) if part == "down" else torch.zeros(7, 10)
    done = cli("weights", write(tmp_path / "wider", CONFIG, tensors))
    assert done.code == 2
    assert (
        "model.layers.2.mlp.experts.1.gate_proj.weight has shape [7, 10], but the config asks for [6, 10]" in done.error
    )


def test_damaged_files(cli: Cli, tiny: Path) -> None:
    def error() -> str:
        done = cli("weights", tiny)
        assert done.code == 2
        assert not list(Path().glob("moescope_weights*"))
        return done.error

    shard, index = tiny / "model-00001.safetensors", tiny / "model.safetensors.index.json"
    kept, listed = shard.read_bytes(), index.read_text()
    shard.write_bytes(kept[:-10])
    assert "cut short or damaged" in error()
    shard.write_bytes((1 << 40).to_bytes(8, "little") + kept[8:])
    assert "its header claims 1099511627776 bytes" in error()
    shard.unlink()
    assert "model-00001.safetensors: no such file" in error()
    shard.write_bytes(kept)
    where = json.loads(listed)
    name = next(iter(where["weight_map"]))
    index.write_text(json.dumps({"weight_map": where["weight_map"] | {name: "../outside.safetensors"}}))
    assert "is not the name of a safetensors file inside the folder" in error()
    for file in tiny.glob("*.safetensors*"):
        file.unlink()
    assert "has no weights in safetensors files" in error()


def test_a_dense_model_is_named_as_one(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    done = cli("weights", folder)
    assert done.code == 2
    assert done.error.endswith("none is of a router or of experts, as in a dense model")
