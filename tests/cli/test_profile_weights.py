"""`profile --enable-expert-similarity`: what it adds, what stays when it cannot, and what `report` makes of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command import Cli
from safetensors.torch import load_file, save_file

from moescope.profiler import weight_pass, weight_slabs
from moescope.profiler.files import PARTIAL_WEIGHTS_NAME, PROFILE_NAME, WEIGHTS_NAME, load_profile
from moescope.profiler.profile import RoutingProfile
from moescope.profiler.weight_files import load_weights, load_weights_beside, save_weights
from moescope.viz.weights_report import EXPERT_PAGES

SECTION = "Expert similarity between layers"


def structured(folder: Path | str) -> dict[str, object]:
    found: dict[str, object] = json.loads(Path(folder, "analysis_data.json").read_bytes())["expert_similarity"]
    return found


@pytest.fixture(scope="module")
def weighed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over one prompt with the experts' weights."""
    import moescope.cli as command

    folder = tmp_path_factory.mktemp("weighed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["profile", "Once upon a time", "-m", str(checkpoint), "--max-tokens", "0", "-o", str(folder)]
        patch.setattr("sys.argv", ["moescope", *arguments, "--enable-expert-similarity", "--n-jobs", "1"])
        with pytest.raises(SystemExit) as caught:
            command.main()
    assert not caught.value.code
    return folder


def test_the_report_has_the_experts(weighed: Path, checkpoint: Path) -> None:
    profile, record = load_profile(weighed / PROFILE_NAME), load_weights(weighed / WEIGHTS_NAME)
    assert record.run.layers == profile.model.layer_indices
    assert record.run.model == profile.model.id == str(checkpoint)
    assert record.run.fingerprint == profile.model.fingerprint
    assert record.run.engine.startswith("cpu, 1 ")
    assert not (weighed / PARTIAL_WEIGHTS_NAME).exists()
    for name in EXPERT_PAGES:
        assert (weighed / name).stat().st_size > 0
    assert SECTION in (weighed / "report.html").read_text(encoding="utf-8")
    assert "Experts' weights" in (weighed / "summary_report.txt").read_text(encoding="utf-8")
    found = structured(weighed)
    assert found["num_experts"] == record.run.experts
    assert found["layer_indices"] == list(record.run.layers)


def test_report_and_export_show_them_again(cli: Cli, weighed: Path, tmp_path: Path) -> None:
    assert cli("report", weighed / PROFILE_NAME, "-o", "again").code == 0
    assert structured("again") == structured(weighed)
    assert SECTION in Path("again", "report.html").read_text(encoding="utf-8")
    done = cli("export", weighed / PROFILE_NAME, "--format", "json", "-o", "data.json")
    assert done.code == 0
    assert json.loads(Path("data.json").read_bytes())["expert_similarity"] == structured(weighed)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(weighed / PROFILE_NAME, alone)
    assert cli("report", alone / PROFILE_NAME, "-o", "again", "--force").code == 0
    assert structured("again")["reason"] == "the experts' weights were not read"
    assert not any(Path("again", name).exists() for name in EXPERT_PAGES), "an earlier report's"


def test_weights_are_reported_by_themselves(cli: Cli, weighed: Path) -> None:
    done = cli("report", weighed / WEIGHTS_NAME, "-o", "pages")
    assert done.code == 0
    assert SECTION in Path("pages", "weights.html").read_text(encoding="utf-8")
    assert not Path("pages", WEIGHTS_NAME).exists()
    both = cli("report", weighed / PROFILE_NAME, weighed / WEIGHTS_NAME, "-o", "both")
    assert both.code == 2
    assert "holds weights and no profile; report on it by itself" in both.error
    other = cli("export", weighed / WEIGHTS_NAME, "--format", "json", "-o", "data.json")
    assert "holds weights and no profile; `moescope report` and `moescope info` take it" in other.error
    told = cli("info", weighed / WEIGHTS_NAME)
    assert told.code == 0
    assert "MoE layers 3 (0, 2-3)" in told.out
    assert "all pairs compared, 3 matched" in told.out


def test_those_of_another_model_are_refused_and_forgotten(
    cli: Cli, weighed: Path, checkpoint: Path, tmp_path: Path
) -> None:
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(weighed, copy)
    shutil.copytree(checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert cli("weights", other, "-o", "w").code == 0
    shutil.copy(Path("w", WEIGHTS_NAME), copy)
    done = cli("report", copy / PROFILE_NAME, "-o", "again")
    assert done.code == 2
    assert f"{copy / WEIGHTS_NAME} belongs to another model than the profile" in done.error
    assert not Path("again").exists()
    assert cli("weights", "demo:stacked", "--sketch", "-o", "demo").code == 0
    shutil.copy(Path("demo", WEIGHTS_NAME), copy)
    assert "belongs to another model" in cli("report", copy / PROFILE_NAME, "-o", "again").error
    (copy / WEIGHTS_NAME).write_text("hello")
    assert "remove it, or record again" in cli("report", copy / PROFILE_NAME, "-o", "again").error
    assert cli("profile", "hello", "-m", other, "--max-tokens", 0, "-o", copy, "--force").code == 0
    assert not (copy / WEIGHTS_NAME).exists(), "of the run before"
    assert not any((copy / name).exists() for name in EXPERT_PAGES)


def test_a_change_beside_a_profile_is_no_part_of_its_report(weighed: Path, checkpoint: Path, cli: Cli) -> None:
    assert cli("weights", checkpoint, "--against", checkpoint, "-o", "change").code == 0
    assert load_weights_beside(Path("change"), load_profile(weighed / PROFILE_NAME).model) is None
    done = cli("report", Path("change") / WEIGHTS_NAME, "-o", "pages")
    assert "No expert has changed" in done.out
    assert f"against    {checkpoint}" in cli("info", Path("change") / WEIGHTS_NAME).out


def test_some_layers_alone_need_no_fingerprint(weighed: Path, checkpoint: Path, cli: Cli) -> None:
    assert cli("weights", checkpoint, "--layers", "2-3", "-o", "some").code == 0
    record = load_weights_beside(Path("some"), load_profile(weighed / PROFILE_NAME).model)
    assert record is not None
    assert record.run.layers == (2, 3)
    save_weights(record, Path("again.safetensors"))
    assert load_weights(Path("again.safetensors")).run == record.run


def test_an_interrupted_pass_leaves_profile_and_report(
    cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, calls = weight_pass._Pass._work, []

    def interrupted(*arguments: object) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        work(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(weight_slabs, "_PIECE", 1)
        patch.setattr(weight_pass._Pass, "_work", interrupted)
        arguments = ("-m", checkpoint, "--max-tokens", 0, "--enable-expert-similarity", "-o", "out")
        stopped = cli("profile", "hello", *arguments)
        assert stopped.code == 130
        assert load_profile("out/profile.safetensors").complete
        assert structured("out")["by_distance"] is None
        resume = ("weights", checkpoint, "--resume", "-o", "out")
        assert (
            f"moescope {' '.join(map(str, resume))}, then moescope report {Path('out') / PROFILE_NAME}" in stopped.err
        )
        patch.setattr(weight_pass._Pass, "_work", work)
        assert cli(*resume).code == 0
    assert cli("report", Path("out") / PROFILE_NAME, "--force", "-o", "out").code == 0
    assert structured("out")["num_experts"] == 8


def test_files_that_vanish_during_the_pass_are_an_error_after_the_report(
    cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vanishing"
    shutil.copytree(checkpoint, folder)
    run = RoutingProfile.check

    def gone(profile: RoutingProfile) -> None:
        run(profile)
        (folder / "model.safetensors").unlink(missing_ok=True)

    monkeypatch.setattr(RoutingProfile, "check", gone)
    done = cli("profile", "hello", "-m", folder, "--max-tokens", 0, "--enable-expert-similarity", "-o", "out")
    assert done.code == 2
    assert str(folder) in done.error
    assert load_profile("out/profile.safetensors").complete
    assert structured("out")["by_distance"] is None
    assert not Path("out", WEIGHTS_NAME).exists()


def test_a_checkpoint_that_cannot_be_read_does_not_stop_the_profile(
    cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(checkpoint, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    done = cli("profile", "hello", "-m", folder, "--max-tokens", 0, "--enable-expert-similarity", "-o", "out")
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if line.startswith("Going on without")]
    assert "has no weights in safetensors files" in line
    assert structured("out")["by_distance"] is None
    assert not Path("out", WEIGHTS_NAME).exists()


def test_jobs_are_for_the_pass_alone(cli: Cli, checkpoint: Path) -> None:
    done = cli("profile", "hello", "-m", checkpoint, "--n-jobs", 2, "-o", "out")
    assert done.code == 2
    assert "--n-jobs is for --enable-expert-similarity" in done.error
    assert not Path("out").exists()
