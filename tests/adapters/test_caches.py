"""Where a forward's tokens stand: caches of every kind, however they are handed over, against an independent count."""

import inspect
from typing import Any

import numpy as np
import pytest
import reference
import torch
from tiny_models import PAD, VOCABULARY, cache_name, tiny_model

import moescope
from moescope.adapters.transformers_forward import cached_columns, find_cache, named_arguments
from moescope.adapters.transformers_hooks import bind
from moescope.profiler.errors import ModelError
from moescope.profiler.profile import RoutingProfile

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.versions]

#: Of every kind of cache layer: full, sliding and linear attention, convolutions, latents, an indexer's keys.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 4},
    "minimax_m2": {},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "lfm2_moe": {},
    "qwen3_next": {},
}


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3_moe", seed=2)


def padded(*lengths: int) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Prompts, and their ids and mask (B, S), padded on the left."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(6, VOCABULARY, size=n).tolist() for n in lengths]
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    return prompts, ids, mask


def decode(
    model: Any, lengths: tuple[int, ...], steps: int, *, cache: Any = None, unnamed: bool = False, columns: int = 0
) -> RoutingProfile:
    """Record a prompt and greedy steps as a user's own loop runs them, and hold it against the reference.

    Args:
        model: The model.
        lengths: Tokens of each prompt; a mask is passed where they differ.
        steps: Tokens that are fed after the prompt.
        cache: What the first forward is given.
        unnamed: Hand everything over by position.
        columns: Of the masks, filled up with ones; 0 for as many as there are tokens.
    """
    name = cache_name(model)
    prompts, step, mask = padded(*lengths)
    fed = []
    with moescope.record(model) as recording, torch.no_grad():
        for left in range(steps, -1, -1):
            given = {"input_ids": step, "attention_mask": None, "position_ids": None, name: cache}
            if columns or len(set(lengths)) > 1:
                more = torch.ones(len(mask), max(0, columns - mask.shape[1]), dtype=mask.dtype)
                given["attention_mask"] = torch.cat([mask, more], dim=1)
                given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
            output = model(*given.values(), use_cache=True) if unnamed else model(**given, use_cache=True)
            cache = output[name]
            step = output.logits[:, -1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(step)], dim=1)
            if left:
                fed.append(step)
    new = torch.cat(fed, dim=1).tolist()
    assert new == [reference.greedy(model, prompt, steps) for prompt in prompts]
    assert_counts(recording.profile, model, prompts, new)
    return recording.profile


def assert_counts(profile: RoutingProfile, model: Any, prompts: list[list[int]], fed: list[list[int]]) -> None:
    binding = bind(model, "tiny")
    count = reference.count(
        model,
        [(prompt, [*new, -1], 0) for prompt, new in zip(prompts, fed, strict=True)],  # the last one is not fed
        domains=1,
        experts=max(binding.model.experts),
        scoring=binding.family.scoring,
        scale=binding.layers[0].scale,
    )
    np.testing.assert_array_equal(profile.selection_counts, count.selection)
    np.testing.assert_array_equal(profile.token_counts, count.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_loop_counts_prompt_and_steps_apart(family: str) -> None:
    model = tiny_model(family, seed=2, **FAMILIES[family])
    assert decode(model, (5,), 2).token_counts.tolist() == [[5, 2]]
    assert decode(model, (3, 5), 1).token_counts.tolist() == [[8, 2]]
    assert decode(model, (5,), 6).token_counts.tolist() == [[5, 6]]


@pytest.mark.parametrize("unnamed", [False, True])
@pytest.mark.parametrize("kind", ["bare", "dynamic", "static"])
def test_a_cache_counts_whatever_its_kind_and_its_place(model: Any, kind: str, unnamed: bool) -> None:
    from transformers import DynamicCache, StaticCache

    made: Any = {
        "bare": DynamicCache,
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=20),
    }[kind]
    assert decode(model, (5,), 2, cache=made(), unnamed=unnamed).token_counts.tolist() == [[5, 2]]
    assert decode(model, (3, 5), 1, cache=made(), unnamed=unnamed).token_counts.tolist() == [[8, 2]]


def test_a_mask_may_span_the_whole_buffer_of_a_static_cache(model: Any) -> None:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=20)
    assert decode(model, (3, 5), 1, cache=cache, columns=20).token_counts.tolist() == [[8, 2]]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_generate_with_a_static_cache(family: str) -> None:
    model = tiny_model(family, seed=2, **FAMILIES[family])
    model.generation_config.eos_token_id = None
    prompts, ids, mask = padded(3, 9)
    with moescope.record(model) as recording:
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, cache_implementation="static", pad_token_id=PAD
        )
    assert recording.profile.token_counts.tolist() == [[12, 10]]
    assert_counts(recording.profile, model, prompts, [row[:-1] for row in output[:, 9:].tolist()])


def with_code_of_its_own(model: Any) -> Any:
    """The model with a body that keeps tuples of keys and values, under a name of its own, as remote code may."""
    from transformers import DynamicCache

    class Body(type(model.model)):  # type: ignore[misc]
        def forward(self, input_ids: Any, attention_mask: Any = None, history: Any = None, **options: Any) -> Any:
            cache = DynamicCache(config=self.config)
            for layer, (keys, values) in enumerate(history or ()):
                cache.update(keys, values, layer)
            hidden = super().forward(input_ids, attention_mask, None, cache, use_cache=True, **options)[0]
            return hidden, tuple((layer.keys, layer.values) for layer in cache.layers)

    model.model.__class__ = Body
    return model


def test_keys_and_values_in_tuples_under_an_unknown_name() -> None:
    model, plain = with_code_of_its_own(tiny_model("qwen3_moe", seed=2)), tiny_model("qwen3_moe", seed=2)
    prompts, ids, _ = padded(5, 5)
    tokens = [[7, 8], [9, 10]]
    with moescope.record(model) as recording, torch.no_grad():
        history: Any = None
        for step in (ids, torch.tensor(tokens)[:, :1], torch.tensor(tokens)[:, 1:]):
            history = model.model(step, history=history)[1]
    assert recording.profile.token_counts.tolist() == [[10, 4]]
    assert recording.profile.runs[0].prompts == 2  # a row that goes on keeps its split
    assert_counts(recording.profile, plain, prompts, tokens)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params", "memory"])
def test_a_cache_under_a_name_that_the_model_does_not_take_is_refused(model: Any, name: str) -> None:
    """Transformers swallows unknown names; the model then starts at position 0, and nothing else would tell."""
    takes = {cache_name(model), "past_key_values"}  # the old name is still taken
    with moescope.record(model) as recording, torch.no_grad():
        kept = model(input_ids=torch.tensor([[6, 7, 8]]), use_cache=True)[cache_name(model)]
        if name in takes:
            model(input_ids=torch.tensor([[9]]), **{name: kept})
        else:
            with pytest.raises(ModelError, match="brought 1 columns to a cache of 3, which then held 1, not 4"):
                model(input_ids=torch.tensor([[9]]), **{name: kept})
    assert recording.profile.token_counts.tolist() == [[3, int(name in takes)]]


@pytest.mark.parametrize("width", [1, 5, 7])
def test_a_mask_that_disagrees_with_the_cache_is_refused(model: Any, width: int) -> None:
    name, (_, ids, mask) = cache_name(model), padded(3, 5)
    with moescope.record(model) as recording, torch.no_grad():
        kept = model(input_ids=ids, attention_mask=mask, use_cache=True)[name]
        ones = torch.ones(2, width, dtype=torch.int64)
        with pytest.raises(ModelError, match=f"has {width} columns, but the cache holds 5 and the forward brings 1"):
            model(input_ids=ids[:, :1], attention_mask=ones, **{name: kept})
        with pytest.raises(ModelError, match="has 6 columns, but the cache holds 0 and the forward brings 1"):
            model(input_ids=ids[:, :1], attention_mask=torch.ones(2, 6, dtype=torch.int64))
        model(input_ids=ids[:, :1], attention_mask=torch.ones(2, 6, dtype=torch.int64), **{name: kept})
    assert recording.profile.token_counts.tolist() == [[8, 2]]


def test_a_cache_that_grows_by_something_else_is_refused(model: Any) -> None:
    from transformers import DynamicCache

    class Forgetful(DynamicCache):
        def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            whole = super().update(keys, values, layer_idx, *args, **kwargs)
            self.layers[layer_idx].crop(-1)
            return whole

    with moescope.record(model) as recording, torch.no_grad():
        with pytest.raises(ModelError, match="brought 3 columns to a cache of 0, which then held 2, not 3"):
            model(input_ids=torch.tensor([[6, 7, 8]]), **{cache_name(model): Forgetful()})
        with pytest.raises(ModelError, match="nothing was recorded"):
            _ = recording.profile


def test_a_cache_that_cannot_be_read_is_refused(model: Any) -> None:
    from transformers import DynamicCache

    class States:
        """A cache that knows no columns, as those of recurrent models and of continuous batching."""

        def update_state(self, state: Any) -> None:
            raise AssertionError("the forward must not come so far")

    name = cache_name(model)
    with moescope.record(model) as recording, torch.no_grad():
        kept = model(input_ids=torch.tensor([[6, 7, 8]]), use_cache=True)[name]
        with pytest.raises(ModelError, match="cache of type States does not tell how many columns it holds"):
            model(input_ids=torch.tensor([[9]]), **{name: States()})
        with pytest.raises(ModelError, match="has 2 caches"):
            model(input_ids=torch.tensor([[9]]), memory=DynamicCache(), **{name: kept})
        kept.layers[1].crop(-1)
        with pytest.raises(ModelError, match=r"layers of a cache hold different numbers of columns: \[2, 3\]"):
            model(input_ids=torch.tensor([[9]]), **{name: kept})
    assert recording.profile.token_counts.tolist() == [[3, 0]]


def test_what_is_a_cache_and_what_is_not() -> None:
    from transformers import DynamicCache, EncoderDecoderCache

    keys = torch.zeros(2, 4, 7, 16)
    legacy = ((keys, keys), [keys, keys, keys])
    assert find_cache([None, True, "x", keys, {"update": 1}, (keys, keys), [], legacy, legacy]) is legacy
    assert cached_columns(legacy) == 7
    with pytest.raises(ModelError, match=r"different numbers of columns: \[6, 7\]"):
        cached_columns(((keys, keys), (keys[:, :, 1:], keys)))
    own, other = DynamicCache(), DynamicCache()
    both = EncoderDecoderCache(own, other)
    own.update(keys, keys, 0)
    assert find_cache([both]) is both
    assert cached_columns(both) == 7


def test_arguments_are_named_whatever_the_catch_all_is_called() -> None:
    def forward(input_ids: Any, mask: Any = None, **rest: Any) -> None: ...

    given = named_arguments(inspect.signature(forward), (1,), {"cache": 2, "rest": 3})
    assert given == {"input_ids": 1, "cache": 2, "rest": 3}
