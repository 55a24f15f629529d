"""Compiled models are refused in one line, however and whenever they were compiled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

import moescope
from moescope.profiler.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[6, 7, 8, 9]])


@pytest.fixture
def model() -> Any:
    torch.compiler.reset()
    with torch.no_grad():
        yield tiny_model("qwen3_moe", num_hidden_layers=1)


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="eager", **options)


def with_compiled_forward(model: Any) -> Any:
    model.forward = compiled(model.forward)
    return model


def compiled_layer(model: Any) -> Any:
    model.model.layers[0].compile(backend="eager")
    return model


#: What a user may call in the block instead of the model.
CALLS: dict[str, Callable[[Any], Any]] = {
    "model": compiled,
    "full graph": lambda model: compiled(model, fullgraph=True),
    "body": lambda model: compiled(model.model),
    "forward": with_compiled_forward,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_model_that_is_called_in_the_block(model: Any, call: str, warm: bool) -> None:
    """One that ran before has its graphs, which look at no hooks: it would count nothing, and say nothing."""
    called = None
    if warm:
        called = CALLS[call](model)
        called(input_ids=IDS)
    recording = moescope.record(model)

    def block() -> None:  # a full graph's refusal gets its one line at the end of the block
        with recording:
            model.model(input_ids=IDS)
            (CALLS[call](model) if called is None else called)(input_ids=IDS)

    with pytest.raises(ModelError, match="a compiled model cannot be recorded") as caught:
        block()
    assert "\n" not in str(caught.value)
    assert recording.profile.token_counts.tolist() == [[4, 0]]
    assert "forward" not in vars(model.model)


@pytest.mark.parametrize("make", [compiled, compiled_layer, lambda model: model.compile(backend="eager") or model])
def test_a_model_that_was_compiled_before(model: Any, make: Callable[[Any], Any]) -> None:
    made = make(model)
    with pytest.raises(ModelError, match="a compiled model cannot be recorded"):
        moescope.record(made)


@pytest.mark.versions
def test_a_layer_that_is_compiled_in_the_block(model: Any) -> None:
    with moescope.record(model):
        compiled_layer(model)
        with pytest.raises(ModelError, match="a compiled model cannot be recorded"):
            model(input_ids=IDS)


@pytest.mark.versions
def test_generate_that_compiles_by_itself(model: Any) -> None:
    from transformers import CompileConfig

    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # as on a GPU
    call = {"max_new_tokens": 4, "cache_implementation": "static", "compile_config": config, "pad_token_id": 0}
    with moescope.record(model) as recording:
        with pytest.raises(ModelError, match="pass it disable_compile=True"):
            model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **call)
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), disable_compile=True, **call)
    assert recording.profile.token_counts.tolist() == [[4, 3]]


def test_what_is_compiled_beside_the_routing_does_no_harm(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.compile(backend="eager")
    with moescope.record(model) as recording:
        model(input_ids=IDS)
    assert recording.profile.token_counts.tolist() == [[4, 0]]
