"""A look at one prompt's tokens: the routers' own distributions, counting nothing, and what a run keeps of it."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from tiny_models import VOCABULARY, tiny_model

import moescope
from moescope.adapters.session import profile_prompts
from moescope.adapters.transformers import TransformersEngine
from moescope.profiler.engine import Generation, Request
from moescope.profiler.errors import EngineError
from moescope.profiler.files import PROFILE_NAME, OutputFolder, load_profile
from moescope.profiler.prompts import Prompt
from moescope.profiler.run import Interrupted, Progress
from moescope.profiler.sidecars import ROUTERS_NAME, SAMPLE_NAME, choose_layers, load_sample

FAMILIES = ("qwen3_moe", "deepseek_v3", "minimax_m2")


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations while it builds models
        yield


def ids_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(6, VOCABULARY, length).astype(np.int32)


def expected(model: Any, ids: np.ndarray, scoring: str) -> list[np.ndarray]:
    """Distributions (T, E) of each layer from an independent forward."""
    logits = reference.route(model, ids.tolist()).logits
    return [reference.distribution(logits[layer], scoring) for layer in sorted(logits)]


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def mixed_model() -> Any:
    """A Qwen3-MoE whose layer 2 has 6 experts, the others 8."""
    model = tiny_model("qwen3_moe")
    model.model.layers[2].mlp = tiny_model("qwen3_moe", seed=1, num_experts=6).model.layers[2].mlp
    return model


# ------------------------------------------------------------------------------------------------------ distributions


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 50])
def test_distributions_equal_an_independent_forward(family: str, length: int) -> None:
    model, ids = tiny_model(family), ids_of(length)
    engine = TransformersEngine(model)
    assert engine.model.scoring == ("softmax" if family == "qwen3_moe" else "sigmoid")
    found = engine.distributions(ids)
    layers = expected(model, ids, engine.model.scoring)
    assert found is not None
    assert found.dtype == np.float32
    assert found.shape == (len(layers), length, layers[0].shape[1])
    np.testing.assert_allclose(found, layers, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)


def test_distributions_equal_the_models_own_router_logits() -> None:
    model, ids = tiny_model("qwen3_moe"), ids_of(31)
    with torch.no_grad():
        out = model(torch.from_numpy(ids.astype(np.int64))[None], output_router_logits=True, use_cache=False)
    logits = [layer for layer in out.router_logits if layer is not None]
    found = TransformersEngine(model).distributions(ids)
    np.testing.assert_allclose(found, np.stack([layer.double().softmax(-1) for layer in logits]), rtol=0, atol=1e-6)


def test_layers_with_fewer_experts_are_padded_with_zeros() -> None:
    model, ids = mixed_model(), ids_of(20)
    engine = TransformersEngine(model)
    assert engine.model.experts == (8, 6, 8)
    found = engine.distributions(ids)
    assert found is not None
    assert (found[1, :, 6:] == 0).all()
    for slot, values in enumerate(expected(model, ids, "softmax")):
        np.testing.assert_allclose(found[slot, :, : values.shape[1]], values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_look_counts_nothing_and_leaves_no_hook(family: str) -> None:
    model = tiny_model(family)
    engine = TransformersEngine(model, coactivation=True)
    before = hooks(model)
    requests = [Request(ids_of(n, seed=n), n % 2, n) for n in (4, 9, 15)]

    def totals() -> dict[str, np.ndarray]:
        layers, experts = len(engine.model.layers), max(engine.model.experts)
        arrays = {
            "selection_counts": np.zeros((2, 2, layers, experts), np.int64),
            "split_counts": np.zeros((16, 2, layers, experts), np.int64),
            "weight_sums": np.zeros((2, 2, layers, experts), np.int64),
            "token_counts": np.zeros((2, 2), np.int64),
            "probability_sums": np.zeros((2, 2, layers, experts), np.int64),
            "probability_tokens": np.zeros((2, 2), np.int64),
            "coactivation": np.zeros((layers, experts, experts), np.int64),
        }
        done = engine.run(requests, Generation(5), 0)
        done.sums.add_to(arrays, done.tokens)
        return arrays

    first = totals()
    assert engine.distributions(ids_of(50)) is not None
    assert hooks(model) == before
    second = totals()
    assert hooks(model) == before
    assert second["selection_counts"].any()
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array)


def test_a_forward_that_fails_leaves_no_hook_and_the_model_as_it_was() -> None:
    model = tiny_model("qwen3_moe").train()
    engine = TransformersEngine(model)
    before = hooks(model)
    with pytest.raises(IndexError):
        engine.distributions(np.array([VOCABULARY + 5], np.int32))
    assert hooks(model) == before
    assert all(module.training for module in model.modules())


def test_a_model_in_training_is_looked_at_in_evaluation_and_given_back() -> None:
    model, ids = tiny_model("mixtral", router_jitter_noise=0.5).train(), ids_of(12)
    model.model.layers[1].eval()
    training = [module.training for module in model.modules()]
    found = TransformersEngine(model).distributions(ids)
    assert [module.training for module in model.modules()] == training
    np.testing.assert_allclose(found, expected(model.eval(), ids, "softmax"), rtol=0, atol=1e-6)


def test_no_distributions_where_none_are_recorded() -> None:
    model = tiny_model("qwen3_moe")
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert TransformersEngine(model, probabilities=False).distributions(ids_of(5)) is None
    assert calls == []


def test_tokens_without_a_tokenizer_have_no_text() -> None:
    assert TransformersEngine(tiny_model("qwen3_moe")).texts(ids_of(3)) == ["", "", ""]


# --------------------------------------------------------------------------------------------------------- what is kept


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen3_moe")


def keep(model: Any, folder: Path, lengths: tuple[int, ...], **options: Any) -> Any:
    prompts = [{"prompt_token_ids": ids_of(n, seed=i).tolist()} for i, n in enumerate(lengths)]
    return moescope.profile(model, prompts, engine="transformers", output_dir=folder, **options)


@pytest.mark.parametrize(
    ("lengths", "chosen"),
    [
        ((3, 50, 80), 1),
        ((49, 12, 51, 50), 2),
        ((9, 49, 30, 49), 1),
        ((1,), 0),
        ((120, 50), 0),
    ],
)
def test_the_first_prompt_that_is_long_enough_or_the_longest(
    model: Any, tmp_path: Path, lengths: tuple[int, ...], chosen: int
) -> None:
    done = keep(model, tmp_path / "out", lengths)
    sample = load_sample(tmp_path / "out", done.model)
    assert sample is not None
    ids = ids_of(lengths[chosen], seed=chosen)
    np.testing.assert_array_equal(sample.token_ids, ids[:50])
    assert sample.texts == ("",) * min(50, len(ids))
    assert (sample.layers, sample.experts, sample.fingerprint) == ((0, 2, 3), (8, 8, 8), done.model.fingerprint)
    np.testing.assert_allclose(sample.probabilities, expected(model, ids[:50], "softmax"), rtol=0, atol=1e-6)
    assert done.tokens == sum(lengths), "a look is not counted"


def test_a_run_that_samples_is_equal_to_one_that_does_not(model: Any, tmp_path: Path) -> None:
    one = keep(model, tmp_path / "a", (60, 7), max_tokens=4)
    two = keep(model, tmp_path / "b", (60, 7), max_tokens=4, token_sample=False)
    assert (tmp_path / "a" / SAMPLE_NAME).is_file()
    assert {file.name for file in (tmp_path / "b").iterdir()} == {PROFILE_NAME}
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, two.arrays()[name])
        np.testing.assert_array_equal(array, load_profile(tmp_path / "a" / PROFILE_NAME).arrays()[name])


def test_without_a_folder_or_distributions_nothing_is_kept(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = TransformersEngine(model)
    monkeypatch.setattr(engine, "distributions", pytest.fail)
    profile_prompts(engine, [Prompt(token_ids=(7, 8, 9))], Generation(0))
    assert list(tmp_path.iterdir()) == []
    keep(model, tmp_path / "off", (60,), probabilities=False)
    assert {file.name for file in (tmp_path / "off").iterdir()} == {PROFILE_NAME}


@pytest.mark.parametrize("options", [{"probabilities": False}, {"token_sample": False}])
def test_what_an_earlier_run_kept_does_not_stay_beside_a_later_profile(
    model: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    keep(model, tmp_path / "out", (60,))
    (tmp_path / "out" / ROUTERS_NAME).write_text("of the earlier run")
    keep(tiny_model("qwen3_moe", seed=9), tmp_path / "out", (60,), force=True, **options)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {PROFILE_NAME}


def test_an_engine_that_fails_at_last_loses_no_profile(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise EngineError("gone")

    engine = TransformersEngine(model)
    monkeypatch.setattr(engine, "distributions", fail)
    with OutputFolder(tmp_path / "out") as folder:
        done = profile_prompts(engine, [Prompt(token_ids=(7, 8, 9))], Generation(0), folder=folder)
    assert done.tokens == 3
    assert {file.name for file in (tmp_path / "out").iterdir()} == {PROFILE_NAME}


def test_ten_layers_of_a_deep_model(tmp_path: Path) -> None:
    deep = tiny_model("qwen3_moe", num_hidden_layers=24, mlp_only_layers=[0])
    done = keep(deep, tmp_path / "out", (52,))
    sample = load_sample(tmp_path / "out", done.model)
    assert sample is not None
    assert len(sample.layers) == 10
    assert (sample.layers[0], sample.layers[-1]) == (1, 23)
    slots = choose_layers(23)
    every = expected(deep, ids_of(52)[:50], "softmax")
    np.testing.assert_allclose(sample.probabilities, [every[slot] for slot in slots], rtol=0, atol=1e-6)


def test_of_layers_with_fewer_experts_the_width_is_kept(tmp_path: Path) -> None:
    done = keep(mixed_model(), tmp_path / "out", (5,))
    sample = load_sample(tmp_path / "out", done.model)
    assert sample is not None
    assert sample.experts == (8, 6, 8)
    assert (sample.probabilities[1, :, 6:] == 0).all()
    np.testing.assert_allclose(sample.probabilities.sum(axis=-1), 1, atol=1e-6)


def test_a_resumed_run_keeps_the_same_sample(model: Any, tmp_path: Path) -> None:
    keep(model, tmp_path / "whole", (3, 70, 55, 8), batch_size=1)
    with pytest.raises(Interrupted):
        keep(model, tmp_path / "parts", (3, 70, 55, 8), batch_size=1, on_progress=_stop)
    assert not (tmp_path / "parts" / SAMPLE_NAME).exists()
    keep(model, tmp_path / "parts", (3, 70, 55, 8), batch_size=1, resume=True)
    whole, parts = ((tmp_path / name / SAMPLE_NAME).read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def _stop(progress: Progress) -> None:
    if progress.prompts >= 2:
        raise KeyboardInterrupt
