"""The run loop with a real engine: chunks, saves, Ctrl-C, resume, and runs that must keep nothing."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

import moescope
from moescope.adapters.transformers import TransformersEngine
from moescope.adapters.transformers_hooks import Rows
from moescope.profiler import run as run_module
from moescope.profiler.engine import Completed, Generation, Request
from moescope.profiler.errors import EngineError, InvariantError, OptionError, OutputError, ProfileError
from moescope.profiler.files import PARTIAL_NAME, PROFILE_NAME, OutputFolder, load_profile
from moescope.profiler.profile import RoutingProfile
from moescope.profiler.run import Interrupted, Progress
from moescope.profiler.sidecars import SAMPLE_NAME

PROMPTS = [
    {
        "prompt_token_ids": np.random.default_rng(i).integers(6, VOCABULARY, size=3 + i % 9).tolist(),
        "domain": "ab"[i % 2],
    }
    for i in range(23)
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "CHUNK", 10)
    monkeypatch.setattr(run_module, "SAVE_EVERY", 0.0)


def profile(model: Any, **options: Any) -> RoutingProfile:
    return moescope.profile(
        model, PROMPTS, engine="transformers", **{"batch_size": 4, "max_tokens": 3, "coactivation": True, **options}
    )


def assert_equal(one: RoutingProfile, two: RoutingProfile) -> None:
    assert list(one.arrays()) == list(two.arrays())
    for name, array in one.arrays().items():
        if name == "probability_sums" or name == "weight_sums":  # softmax rounds its last bit by the shape of the batch
            np.testing.assert_allclose(array, two.arrays()[name], atol=1e-5)
        else:
            np.testing.assert_array_equal(array, two.arrays()[name])


def test_chunks_and_batches_do_not_change_the_counts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = profile(model)
    monkeypatch.setattr(run_module, "CHUNK", 1000)
    assert_equal(one, profile(model, batch_size=23))
    assert_equal(one, profile(model, batch_size=1))
    assert one.domains == ("a", "b")
    assert one.runs[0].prompts == 23
    assert one.runs[0].batches == 7  # 10 + 10 + 3 prompts in batches of at most 4
    assert one.complete


def test_runs_over_parts_merge_into_the_whole(model: Any) -> None:
    whole = profile(model)
    parts = [
        moescope.profile(model, part, batch_size=4, max_tokens=3, coactivation=True)
        for part in (PROMPTS[:9], PROMPTS[9:])
    ]
    assert_equal(moescope.merge(parts), whole)
    assert len(moescope.merge(parts).runs) == 2


class Stop:
    """Presses Ctrl-C after so many batches, by a real signal."""

    def __init__(self, after: int, number: int = signal.SIGINT) -> None:
        self.left = after
        self.number = number

    def __call__(self, progress: Progress) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("after", [1, 3, 6])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_resumes_to_the_same_profile(model: Any, tmp_path: Path, after: int, number: int) -> None:
    whole, folder = profile(model), tmp_path / "out"
    with pytest.raises(Interrupted) as caught:
        profile(model, output_dir=folder, on_progress=Stop(after, number))
    kept = load_profile(folder / PARTIAL_NAME)
    assert kept.tokens == caught.value.profile.tokens
    assert not kept.complete
    assert kept.runs[0].batches == after
    assert not (folder / PROFILE_NAME).exists()
    resumed = profile(model, output_dir=folder, resume=True)
    assert_equal(resumed, whole)
    assert resumed.runs[0].uuid == kept.runs[0].uuid
    assert sorted(os.listdir(folder)) == [PROFILE_NAME, SAMPLE_NAME]
    with pytest.raises(ProfileError, match="more than one"):
        moescope.merge([kept, resumed])


def test_a_run_interrupted_twice_resumes_to_the_same_profile(model: Any, tmp_path: Path) -> None:
    for after in (2, 2):
        with pytest.raises(Interrupted):
            profile(model, output_dir=tmp_path / "out", resume=(tmp_path / "out").exists(), on_progress=Stop(after))
    assert load_profile(tmp_path / "out" / PARTIAL_NAME).runs[0].batches == 4
    assert_equal(profile(model, output_dir=tmp_path / "out", resume=True), profile(model))


def test_ctrl_c_in_the_middle_of_a_batch_counts_none_of_it(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = model.model.layers[2].forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(model.model.layers[2], "forward", forward)
    with pytest.raises(Interrupted) as caught:
        profile(model, output_dir=tmp_path / "out")
    assert caught.value.profile.runs[0].batches == 2  # three forwards a batch of one prompt and three tokens
    caught.value.profile.check()
    assert_equal(profile(model, output_dir=tmp_path / "out", resume=True), profile(model))


def test_ctrl_c_before_the_first_batch_keeps_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: TransformersEngine, requests: Sequence[Request], generation: Generation, batch: int) -> Completed:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(TransformersEngine, "run", run)
    with pytest.raises(Interrupted):
        profile(model, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 4}, "max_tokens was 3 in the interrupted run and is 4 now"),
        ({"seed": 1}, "seed was 0"),
        ({"coactivation": False}, "coactivation was True"),
    ],
)
def test_resume_with_other_settings_is_refused(
    model: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(Interrupted):
        profile(model, output_dir=tmp_path / "out", on_progress=Stop(2))
    before = (tmp_path / "out" / PARTIAL_NAME).read_bytes()
    with pytest.raises(ProfileError, match=message):
        profile(model, output_dir=tmp_path / "out", resume=True, **change)
    assert (tmp_path / "out" / PARTIAL_NAME).read_bytes() == before


def test_resume_with_other_prompts_or_another_model_is_refused(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(Interrupted):
        profile(model, output_dir=folder, on_progress=Stop(2))
    with pytest.raises(ProfileError, match="the prompts are not those"):
        moescope.profile(
            model, PROMPTS[1:], batch_size=4, max_tokens=3, coactivation=True, output_dir=folder, resume=True
        )
    moved = [{**prompt, "domain": "a" if i < 2 else prompt["domain"]} for i, prompt in enumerate(PROMPTS)]
    with pytest.raises(ProfileError, match="domains_sha256 was"):
        moescope.profile(model, moved, batch_size=4, max_tokens=3, coactivation=True, output_dir=folder, resume=True)
    with pytest.raises(ProfileError, match="the interrupted run profiled"):
        profile(tiny_model("qwen3_moe", seed=9), output_dir=folder, resume=True)


def test_resume_takes_the_batches_of_the_interrupted_run(model: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        profile(model, output_dir=tmp_path / "out", on_progress=Stop(2))
    assert_equal(profile(model, output_dir=tmp_path / "out", resume=True, batch_size=2), profile(model))


def test_resume_in_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        profile(tiny_model("qwen3_moe").to(torch.bfloat16), output_dir=tmp_path / "out", on_progress=Stop(2))
    other = tiny_model("qwen3_moe").to(torch.bfloat16).to(torch.float32)  # the same router weights in bfloat16
    with pytest.raises(ProfileError, match="dtype was bfloat16 in the interrupted run and is float32 now"):
        profile(other, output_dir=tmp_path / "out", resume=True)


def test_what_is_drained_is_saved_at_once_and_then_now_and_then(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = []
    original = OutputFolder.save_partial

    def save(self: OutputFolder, kept: RoutingProfile) -> None:
        saves.append(kept.runs[0].batches)
        original(self, kept)

    monkeypatch.setattr(OutputFolder, "save_partial", save)
    profile(model, output_dir=tmp_path / "a")
    assert saves == [1, 2, 3, 4, 5, 6, 7]
    saves.clear()
    monkeypatch.setattr(run_module, "SAVE_EVERY", 3600.0)
    profile(model, output_dir=tmp_path / "b")
    assert saves == [1]


@pytest.mark.parametrize("where", ["save_partial", "save_final"])
def test_ctrl_c_while_it_saves_loses_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    original = getattr(OutputFolder, where)

    def save(self: OutputFolder, kept: RoutingProfile) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, kept)

    monkeypatch.setattr(OutputFolder, where, save)
    monkeypatch.setattr(run_module, "SAVE_EVERY", 3600.0)
    if where == "save_final":
        assert_equal(profile(model, output_dir=tmp_path / "out"), load_profile(tmp_path / "out" / PROFILE_NAME))
    else:  # at the first save, and again at the one that answers it
        with pytest.raises(Interrupted):
            profile(model, output_dir=tmp_path / "out")
        assert load_profile(tmp_path / "out" / PARTIAL_NAME).runs[0].batches == 1


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_absurd_temperatures_are_refused_before_the_run(model: Any, temperature: float) -> None:
    with pytest.raises(OptionError, match="temperature must be a number from 0 up"):
        profile(model, temperature=temperature)


def test_nothing_to_resume(model: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such folder"):
        profile(model, output_dir=tmp_path / "none", resume=True)
    profile(model, output_dir=tmp_path / "out")
    with pytest.raises(OutputError, match=r"nothing to resume; profile\.safetensors there is complete"):
        profile(model, output_dir=tmp_path / "out", resume=True)


def test_a_run_that_counts_padding_saves_nothing_under_the_final_name(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Rows.select
    calls = 0

    def select(self: Rows, batch: int, past: int, width: int, mask: Any) -> Any:
        nonlocal calls
        calls += 1
        counted, group = original(self, batch, past, width, mask)
        return (torch.ones_like(counted) if calls == 4 else counted), group

    monkeypatch.setattr(Rows, "select", select)
    with pytest.raises(InvariantError, match=r"batch 1: layer 0: selections sum to"):
        profile(model, output_dir=tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [PARTIAL_NAME]
    assert load_profile(tmp_path / "out" / PARTIAL_NAME).runs[0].batches == 1


def test_a_layer_that_stops_routing_fails_the_run(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = model.model.layers[3].mlp
    monkeypatch.setattr(block, "forward", lambda hidden: hidden)
    with pytest.raises(InvariantError, match=r"layers \[3\] routed nothing"):
        profile(model, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_nan_in_the_router_fails_the_run_by_name_of_the_layer(model: Any) -> None:
    broken = tiny_model("qwen3_moe")
    with torch.no_grad():
        broken.model.layers[2].mlp.gate.weight[0, 0] = float("nan")
    with pytest.raises(InvariantError, match=r"batch 0: layer 2: .*NaN"):
        profile(broken, max_tokens=0)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out"), pytest.raises(OutputError, match="in use by another run"):
        OutputFolder(tmp_path / "out", force=True)
    with OutputFolder(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_needs_force(model: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(OutputError, match="exists and is not empty; choose another folder, or --force"):
        profile(model, output_dir=tmp_path)
    profile(model, output_dir=tmp_path, force=True)
    assert sorted(os.listdir(tmp_path)) == ["mine.txt", PROFILE_NAME, SAMPLE_NAME]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; --output-dir needs a folder"):
        profile(model, output_dir=tmp_path / "file")


def test_what_was_drained_survives_an_engine_that_dies(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = profile(model, output_dir=tmp_path / "whole")
    run = TransformersEngine.run

    def dies(self: TransformersEngine, requests: Sequence[Request], generation: Generation, batch: int) -> Completed:
        if batch == 3:
            raise EngineError("batch 3: the engine failed")
        return run(self, requests, generation, batch)

    monkeypatch.setattr(run_module, "SAVE_EVERY", 1e9)  # only the first batch is saved by itself
    monkeypatch.setattr(TransformersEngine, "run", dies)
    with pytest.raises(
        EngineError, match=r"batch 3: the engine failed\. Kept what 10 of 23 prompts gave in .*--resume"
    ):
        profile(model, output_dir=tmp_path / "died")
    assert load_profile(tmp_path / "died" / PARTIAL_NAME).runs[0].batches == 3
    monkeypatch.setattr(TransformersEngine, "run", run)
    assert_equal(profile(model, output_dir=tmp_path / "died", resume=True), whole)
