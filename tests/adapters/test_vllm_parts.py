"""What needs no engine: the scheduler's ledger, parts of ranks, settings, and refusals before an engine starts."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Space
from typing import Any

import numpy as np
import pytest
from vllm_ranks import make_part

from moescope.adapters import vllm_plugin
from moescope.adapters.session import choose_engine, open_engine, parse_engine_args
from moescope.adapters.vllm_ledger import NOTE, Ledger, SaveClock
from moescope.adapters.vllm_parts import join, load_part, save_part
from moescope.adapters.vllm_plugin import supported
from moescope.adapters.vllm_runs import to_profile
from moescope.adapters.vllm_settings import (
    DOMAINS_VARIABLE,
    PROBABILITIES_VARIABLE,
    RAY_VARIABLE,
    RUN_VARIABLE,
    SERVER_VARIABLE,
    VARIABLE,
    Settings,
    name_run,
    share_with_ray,
)
from moescope.profiler.errors import InvariantError, ModelError, OptionError, ProfileError


def _output(new: dict[str, int] | None = None, cached: dict[str, int] | None = None, **fields: Any) -> Any:
    cached = cached or {}
    return Space(
        scheduled_new_reqs=[Space(req_id=name, num_computed_tokens=start) for name, start in (new or {}).items()],
        scheduled_cached_reqs=Space(
            req_ids=list(cached),
            num_computed_tokens=list(cached.values()),
            resumed_req_ids=fields.pop("resumed", set()),
        ),
        scheduled_spec_decode_tokens=fields.pop("drafts", {}),
    )


def _request(name: str, tokens: int, computed: int) -> Any:
    return Space(request_id=name, num_tokens=tokens, num_computed_tokens=computed)


def test_the_ledger_says_how_far_a_finished_request_got() -> None:
    ledger = Ledger()
    first = _output({"a": 0})
    ledger.scheduled(first, {})
    assert (getattr(first, NOTE).step, getattr(first, NOTE).settled) == (0, -1)
    ledger.ended(_request("a", tokens=14, computed=14), aborted=False)
    ledger.taken_in(first)
    last = _output()
    ledger.scheduled(last, {})
    note = getattr(last, NOTE)
    assert (note.step, note.settled) == (1, 0)
    assert note.limits == {"a": 13}
    assert note.finished == {"a": 13}
    ledger.scheduled(after := _output(), {})
    assert getattr(after, NOTE).limits == {}


def test_outputs_settle_in_order() -> None:
    ledger = Ledger()
    steps = [_output() for _ in range(3)]
    for step in steps:
        ledger.scheduled(step, {})
    ledger.taken_in(steps[1])
    ledger.scheduled(now := _output(), {})
    assert getattr(now, NOTE).settled == -1
    ledger.taken_in(steps[0])
    ledger.scheduled(now := _output(), {})
    assert getattr(now, NOTE).settled == 1


@pytest.mark.parametrize(
    ("cached", "tokens", "computed", "aborted", "routed"),
    [
        (0, 30, 31, True, 30),  # one row ahead of the last known token was in flight: not counted
        (8, 30, 20, True, 12),  # aborted while its prompt was still coming; 8 came from the prefix cache
        (8, 30, 30, False, 21),
    ],
)
def test_aborted_and_cached_requests(cached: int, tokens: int, computed: int, aborted: bool, routed: int) -> None:
    ledger = Ledger()
    ledger.scheduled(_output({"a": cached}), {})
    ledger.ended(_request("a", tokens, computed), aborted=aborted)
    ledger.scheduled(out := _output(), {})
    assert getattr(out, NOTE).finished == {"a": routed}


def test_preemption_does_not_lose_what_was_routed() -> None:
    ledger = Ledger()
    ledger.scheduled(_output({"a": 0}), {})
    ledger.preempting(_request("a", tokens=20, computed=21))
    ledger.scheduled(out := _output(), {})
    assert getattr(out, NOTE).limits == {"a": 20}
    # it comes back with 24 tokens from another request's cache: 4 of them it never routed itself
    ledger.scheduled(_output(cached={"a": 24}, resumed={"a"}), {})
    ledger.ended(_request("a", tokens=41, computed=41), aborted=False)
    ledger.scheduled(out := _output(), {})
    assert getattr(out, NOTE).finished == {"a": 36}


def test_rejected_drafts_are_limited() -> None:
    ledger = Ledger()
    ledger.scheduled(_output({"a": 0}, drafts={"a": [1, 2]}), {})
    ledger.scheduled(out := _output(), {"a": _request("a", tokens=9, computed=8)})
    assert getattr(out, NOTE).limits == {"a": 8}


def test_a_fault_of_the_ledger_stays_in_the_ledger() -> None:
    ledger = Ledger()
    ledger.guarded(ledger.scheduled, _output({"a": 0}), {})
    assert ledger.failed is None
    ledger.guarded(ledger.scheduled, _output(cached={"a": 4}, resumed=None), {})
    ledger.guarded(ledger.scheduled, object(), {})
    assert ledger.failed is not None
    assert ledger.failed.startswith("the scheduler's ledger failed: AttributeError")
    ledger.guarded(ledger.ended, object())  # nothing is done any more


def test_a_server_saves_with_a_step_every_few_seconds_and_when_asked(tmp_path: Path) -> None:
    clock = SaveClock(tmp_path / "save", every=0.2)
    ledger = Ledger(clock)
    saves = []
    for _ in range(3):
        ledger.scheduled(out := _output(), {})
        saves.append(getattr(out, NOTE).save)
    time.sleep(0.25)
    for touch in (False, False, True, False):
        if touch:
            (tmp_path / "save").touch()
        ledger.scheduled(out := _output(), {})
        saves.append(getattr(out, NOTE).save)
    assert saves == [False, False, False, True, False, True, False]


def test_a_request_that_was_never_scheduled() -> None:
    ledger = Ledger()
    ledger.ended(_request("a", 5, 0), aborted=True)
    ledger.scheduled(out := _output(), {})
    assert getattr(out, NOTE).finished == {}


def test_a_part_survives_its_file(tmp_path: Path) -> None:
    part = make_part((1, 2))
    save_part(part, tmp_path / "part-x.safetensors")
    loaded = load_part(tmp_path / "part-x.safetensors")
    assert loaded.layers == part.layers
    assert loaded.rank == part.rank
    assert loaded.groups == part.groups == 2
    assert to_profile([loaded]).model.groups == 2
    np.testing.assert_array_equal(loaded.sums.cells, part.sums.cells)
    with pytest.raises(ProfileError, match="not what a recording vLLM worker writes"):
        load_part(tmp_path / "nothing")


def test_pipeline_ranks_lie_side_by_side() -> None:
    one = make_part((0, 1), rank={"pp": 0, "pp_size": 2})
    two = make_part((2,), seed=1, rank={"pp": 1, "pp_size": 2})
    layers, sums = join([two, one])
    assert [layer.index for layer in layers] == [0, 1, 2]
    np.testing.assert_array_equal(sums.cells[:, :, :, 2], two.sums.cells[:, :, :, 0])
    np.testing.assert_array_equal(sums.tokens, one.sums.tokens)
    with pytest.raises(InvariantError, match="same MoE layer"):
        join([one, replace(one, rank=two.rank)])
    wrong = replace(two, sums=replace(two.sums, tokens=two.sums.tokens + 1))
    with pytest.raises(InvariantError, match="disagree"):
        join([one, wrong])


def test_replicas_add_up_and_are_never_added_twice() -> None:
    one, two = make_part((0, 1)), make_part((0, 1), seed=1, rank={"dp": 1})
    layers, sums = join([one, two])
    assert len(layers) == 2
    np.testing.assert_array_equal(sums.cells, one.sums.cells + two.sums.cells)
    with pytest.raises(InvariantError, match="wrote twice"):
        join([one, one])
    with pytest.raises(InvariantError, match="no worker"):
        join([])


def test_settings_travel_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VARIABLE, SERVER_VARIABLE, PROBABILITIES_VARIABLE, DOMAINS_VARIABLE, RUN_VARIABLE, RAY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    assert Settings.from_environment() is None
    asked = Settings("/f", "all", coactivation=True, domains=3, seed=5)
    monkeypatch.setenv(VARIABLE, asked.to_json())
    assert Settings.from_environment() == asked
    monkeypatch.setenv(VARIABLE, json.dumps(json.loads(asked.to_json()) | {"version": "9.9"}))
    with pytest.raises(OptionError, match=r"the command that asks is 9\.9"):
        Settings.from_environment()
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv(SERVER_VARIABLE, "/rec")
    monkeypatch.setenv(RUN_VARIABLE, "")
    name_run()
    served = Settings.from_environment()
    assert served is not None
    assert (served.serving, served.probabilities, served.domains) == (True, "off", 16)
    assert served.run == os.environ[RUN_VARIABLE] != ""
    name_run()  # as the processes that the front end starts do
    assert Settings.from_environment() == served
    for name, value in (
        (PROBABILITIES_VARIABLE, "some"),
        (DOMAINS_VARIABLE, "0"),
        (DOMAINS_VARIABLE, "65"),
        (DOMAINS_VARIABLE, "3,a,b"),
        (DOMAINS_VARIABLE, "a,\n"),
        (DOMAINS_VARIABLE, "a" * 65),
        (RUN_VARIABLE, "../x"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(OptionError, match=name):
                Settings.from_environment()


@pytest.mark.parametrize(
    ("given", "count", "reserved"),
    [
        ("1", 1, ()),
        ("64", 64, ()),
        ("code, chat", 16, ("code", "chat")),
        ("4,code,chat", 4, ("code", "chat")),
        ("default,code,code,other", 16, ("code",)),
        (",".join(f"n{i}" for i in range(20)), 22, tuple(f"n{i}" for i in range(20))),
    ],
)
def test_a_server_keeps_room_for_domains(
    monkeypatch: pytest.MonkeyPatch, given: str, count: int, reserved: tuple[str, ...]
) -> None:
    for name, value in ((SERVER_VARIABLE, "/rec"), (RUN_VARIABLE, "r"), (DOMAINS_VARIABLE, given)):
        monkeypatch.setenv(name, value)
    served = Settings.from_environment()
    assert served is not None
    assert (served.domains, served.reserved) == (count, reserved)


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "MOESCOPE_"), ("ABC_,DE_", "ABC_,DE_,MOESCOPE_"), ("MOESCOPE_", "MOESCOPE_")],
)
def test_workers_of_a_ray_cluster_get_the_settings(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.setenv(RAY_VARIABLE, before or "")
    share_with_ray()
    assert os.environ[RAY_VARIABLE] == after


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.25.1", False), ("0.26.0", True), ("0.33.2", True), ("0.33.0+cpu", True), ("0.34.0", False), ("1.0", False)],
)
def test_supported_versions(version: str, expected: bool) -> None:
    assert supported(version) is expected


def test_a_server_does_not_start_inside_a_version_that_nobody_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_VARIABLE, "/rec")
    monkeypatch.setattr(vllm_plugin, "vllm_version", lambda: "0.34.0")
    with pytest.raises(
        OptionError, match=r"vLLM 0\.34\.0 is not supported; moescope records inside vLLM 0\.26 to 0\.33"
    ):
        vllm_plugin.register()


def test_calls_from_outside_reach_a_few_methods_alone() -> None:
    class Worker:
        def load_model(self) -> None:
            """Nothing."""

    vllm_plugin._wrap_worker(Worker)
    worker: Any = Worker()
    assert worker.moescope("bound") is None  # no recorder
    calls: list[str] = []
    methods = {name: lambda name=name: calls.append(name) for name in ("bound", "dump", "reset", "switch", "_write")}
    for serving in (True, False):
        worker.moescope_recorder = Space(settings=Settings("", serving=serving), **methods)
        worker.moescope("bound")
        for name in ("dump", "reset", "switch"):
            if serving:
                with pytest.raises(ValueError, match="cannot be called"):
                    worker.moescope(name)
            else:
                worker.moescope(name)
        for name in ("_write", "__class__", "settings", "recorder"):
            with pytest.raises(ValueError, match="cannot be called"):
                worker.moescope(name)
    assert calls == ["bound", "bound", "dump", "reset", "switch"]


def test_engine_arguments() -> None:
    parsed = parse_engine_args(
        ["max-model-len=8192", "enforce_eager=true", "load_format=dummy", 'hf_overrides={"a": 1}']
    )
    assert parsed == {"max_model_len": 8192, "enforce_eager": True, "load_format": "dummy", "hf_overrides": {"a": 1}}
    assert parse_engine_args(["--dtype=float32", "seed=None", "x=a=b"]) == {
        "dtype": "float32",
        "seed": None,
        "x": "a=b",
    }
    for wrong in ("x", "=3", "a b=1"):
        with pytest.raises(OptionError, match="write name=value"):
            parse_engine_args([wrong])


@pytest.fixture
def vllm_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a supported vLLM and the plug-in were installed, whatever is."""
    from moescope.adapters import vllm

    monkeypatch.setattr(vllm, "vllm_version", lambda: "0.33.0")
    monkeypatch.setattr(vllm, "loads_plugin", lambda: True)
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.usefixtures("vllm_there")
class TestRefusals:
    """Each before anything is loaded."""

    def test_unsupported_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moescope.adapters import vllm

        monkeypatch.setattr(vllm, "vllm_version", lambda: "0.25.1")
        with pytest.raises(OptionError, match=r"vLLM 0\.25\.1 is not supported"):
            vllm.VllmEngine("demo")

    def test_no_vllm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moescope.adapters import vllm

        monkeypatch.setattr(vllm, "vllm_version", lambda: None)
        with pytest.raises(OptionError, match=r"moescope\[vllm\]"):
            vllm.VllmEngine("demo")

    def test_plugin_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moescope.adapters import vllm

        monkeypatch.setattr(vllm, "loads_plugin", lambda: False)
        with pytest.raises(OptionError, match="install moescope as a package"):
            vllm.VllmEngine("demo")
        monkeypatch.setenv("VLLM_PLUGINS", "other")
        with pytest.raises(OptionError, match="VLLM_PLUGINS leaves"):
            vllm.VllmEngine("demo")

    def test_simulated_routing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moescope.adapters import vllm

        monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random")
        with pytest.raises(OptionError, match="simulated"):
            vllm.VllmEngine("demo")

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"model_type": "llama"}, "dense model"),
            ({"model_type": "qwen3_moe", "num_experts": 8, "zero_expert_num": 2}, "zero experts"),
        ],
    )
    def test_models(self, tmp_path: Path, fields: dict[str, Any], match: str) -> None:
        from moescope.adapters import vllm

        (tmp_path / "model.safetensors").touch()
        (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 4, **fields}))
        with pytest.raises(ModelError, match=match):
            vllm.VllmEngine(str(tmp_path))

    def test_no_such_model(self) -> None:
        from moescope.adapters import vllm

        with pytest.raises(ModelError, match="No such folder"):
            vllm.VllmEngine("/no/such/model")

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"engine_args": {"data_parallel_size": 2}}, "data_parallel_size"),
            ({"probabilities": "some"}, "--probabilities"),
            ({"verify": 2.0}, "--verify"),
            ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
            ({"attention": "sdpa"}, "--attention"),
        ],
    )
    def test_options(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(OptionError, match=match):
            open_engine("demo:stacked", engine="vllm", **options)

    def test_a_loaded_model(self) -> None:
        with pytest.raises(OptionError, match="not a loaded one"):
            open_engine(object(), engine="vllm")


def test_options_of_the_other_engine() -> None:
    with pytest.raises(OptionError, match="engine_args"):
        open_engine("demo:stacked", engine="transformers", engine_args={"a": 1})
    with pytest.raises(OptionError, match="sample is for vLLM"):
        open_engine("demo:stacked", engine="transformers", probabilities="sample")


def test_auto_takes_transformers_without_a_gpu() -> None:
    import torch

    expected = "vllm" if torch.cuda.is_available() else "transformers"
    assert choose_engine("Qwen/Qwen3-30B-A3B", {}) == expected
    assert choose_engine("demo:stacked", {}) == "transformers"
    assert choose_engine("x", {"verify": 0.1}) == "vllm"
