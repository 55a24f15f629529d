"""The transformers engine against an independent count, for every supported family."""

import warnings
from typing import Any, Literal

import numpy as np
import pytest
import reference
import torch
from tiny_models import FAMILY_CONFIGS, VOCABULARY, tiny_model

from moescope.adapters.families import FAMILIES, REFUSED
from moescope.adapters.session import profile_prompts
from moescope.adapters.transformers import TransformersEngine
from moescope.adapters.transformers_hooks import bind
from moescope.profiler.engine import Generation
from moescope.profiler.errors import ModelError
from moescope.profiler.profile import RoutingProfile
from moescope.profiler.prompts import Prompt

LENGTHS = (3, 19, 1, 8, 11, 19, 6)
GENERATING = (
    "qwen3_moe",
    "deepseek_v3",
    "minimax_m2",
    "mixtral",
    "deepseek_v2",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "hunyuan_v1_moe",
    "olmoe",
    "qwen2_moe",
    "granitemoe",
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations while it builds models
        yield


def prompts_of(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(6, VOCABULARY, size=length).tolist() for length in lengths]


def run(
    model: Any,
    prompts: list[list[int]],
    *,
    max_tokens: int = 0,
    batch_size: int = 7,
    padding: Literal["left", "right"] = "right",
    **options: Any,
) -> RoutingProfile:
    engine = TransformersEngine(model, name="tiny", batch_size=batch_size, padding_side=padding, **options)
    items = [Prompt(token_ids=tuple(ids), domain="ab"[i % 2]) for i, ids in enumerate(prompts)]
    return profile_prompts(engine, items, Generation(max_tokens))


def expected(model: Any, prompts: list[list[int]], generated: list[list[int]]) -> reference.Count:
    binding = bind(model, "tiny")
    return reference.count(
        model,
        [(ids, new, i % 2) for i, (ids, new) in enumerate(zip(prompts, generated, strict=True))],
        domains=2,
        experts=max(binding.model.experts),
        scoring=binding.family.scoring,
        scale=binding.layers[0].scale,
    )


def assert_equal(profile: RoutingProfile, count: reference.Count) -> None:
    assert list(profile.model.layer_indices) == count.layers
    np.testing.assert_array_equal(profile.selection_counts, count.selection)
    np.testing.assert_array_equal(profile.token_counts, count.tokens)
    np.testing.assert_array_equal(profile.split_counts, count.splits)
    np.testing.assert_allclose(profile.weight_sums, count.weights, atol=1e-4)
    assert profile.probability_sums is not None
    np.testing.assert_allclose(profile.probability_sums, count.probabilities, atol=1e-4)
    np.testing.assert_array_equal(profile.probability_tokens, count.tokens)


def test_every_family_is_tested() -> None:
    assert set(FAMILY_CONFIGS) == set(FAMILIES)
    assert not set(FAMILIES) & set(REFUSED)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_prompts_in_one_padded_batch(family: str) -> None:
    model, prompts = tiny_model(family), prompts_of()
    count = expected(model, prompts, [[]] * len(prompts))
    assert len(np.unique(count.selection)) > 5  # a reference that saw nothing would be equal to a profile of nothing
    assert_equal(run(model, prompts), count)


@pytest.mark.versions
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "minimax_m2", "mixtral"])
@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_and_batches(family: str, batch_size: int, padding: Literal["left", "right"]) -> None:
    model, prompts = tiny_model(family, seed=3), prompts_of()
    profile = run(model, prompts, batch_size=batch_size, padding=padding)
    assert_equal(profile, expected(model, prompts, [[]] * len(prompts)))


@pytest.mark.versions
@pytest.mark.parametrize("family", GENERATING)
def test_generation_with_a_stop_token_in_the_middle(family: str) -> None:
    model, prompts = tiny_model(family, seed=1), prompts_of((3, 12, 7, 9))
    free = [reference.greedy(model, ids, 40) for ids in prompts]
    stop = free[1][11]
    model.generation_config.eos_token_id = stop
    generated = [new[: new.index(stop) + 1] if stop in new else new for new in free]
    lengths = [len(new) for new in generated]
    assert lengths[1] <= 12
    assert max(lengths) == 40
    count = expected(model, prompts, generated)
    for batch_size in (1, 4):
        profile = run(model, prompts, max_tokens=40, batch_size=batch_size)
        assert profile.token_counts[:, 1].sum() == sum(lengths) - len(lengths)
        assert_equal(profile, count)


def test_a_transformers_that_nobody_tested_is_remarked_upon_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from moescope.adapters.transformers import NEWEST_TESTED

    model, prompts = tiny_model("qwen3_moe"), prompts_of((4, 9))
    newest, beyond = f"5.{NEWEST_TESTED[1]}.9", f"5.{NEWEST_TESTED[1] + 1}.0.dev0"
    for version, remarks in ((newest, 0), (beyond, 1), ("6.0.0", 1), ("5.9.0", 0)):
        monkeypatch.setattr(transformers, "__version__", version)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            profile = run(model, prompts, max_tokens=2)
        told = [str(warning.message) for warning in caught if "newest that moescope was tested" in str(warning.message)]
        assert len(told) == remarks, version
        assert all(version in line and "\n" not in line for line in told)
        assert profile.tokens == 13 + 2


def test_one_generated_token_is_never_fed_back() -> None:
    model, prompts = tiny_model("qwen3_moe"), prompts_of((4, 9))
    profile = run(model, prompts, max_tokens=1)
    assert_equal(profile, expected(model, prompts, [reference.greedy(model, ids, 1) for ids in prompts]))
    assert profile.token_counts[:, 1].sum() == 0


def test_dense_layers_are_absent() -> None:
    assert run(tiny_model("qwen3_moe"), prompts_of()).model.layer_indices == (0, 2, 3)
    assert run(tiny_model("deepseek_v3"), prompts_of()).model.layer_indices == (1, 2, 3)


def test_coactivation_equals_a_count_of_pairs() -> None:
    model, prompts = tiny_model("deepseek_v3"), prompts_of()
    profile = run(model, prompts, coactivation=True)
    pairs = np.zeros_like(profile.coactivation)
    for ids in prompts:
        routing = reference.route(model, ids)
        for slot, layer in enumerate(sorted(routing.ids)):
            for chosen in routing.ids[layer]:
                for one in chosen:
                    for two in chosen:
                        pairs[slot, one, two] += 1
    np.testing.assert_array_equal(profile.coactivation, pairs)


def test_without_distributions() -> None:
    model, prompts = tiny_model("mixtral"), prompts_of()
    profile = run(model, prompts, probabilities=False)
    assert profile.probability_sums is None
    np.testing.assert_array_equal(profile.selection_counts, expected(model, prompts, [[]] * len(prompts)).selection)


def test_sampling_asks_for_plain_sampling_with_a_seed_of_its_own_for_each_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = tiny_model("qwen3_moe"), []
    original = model.generate

    def generate(**kwargs: Any) -> Any:
        config = kwargs["generation_config"]
        seen.append((torch.initial_seed(), config.do_sample, config.temperature, config.top_k, config.top_p))
        return original(**kwargs)

    monkeypatch.setattr(model, "generate", generate)
    engine = TransformersEngine(model, batch_size=2)
    items = [Prompt(token_ids=tuple(ids)) for ids in prompts_of((5, 9, 7))]
    profile_prompts(engine, items, Generation(3, temperature=1.5, seed=4))
    assert [row[1:] for row in seen] == [(True, 1.5, 0, 1.0)] * 2
    assert len({row[0] for row in seen}) == 2


def test_what_the_checkpoint_asks_of_generation_does_not_change_the_run() -> None:
    model, prompts = tiny_model("qwen3_moe"), prompts_of((4, 9))
    plain = run(model, prompts, max_tokens=8)
    config = model.generation_config
    config.num_beams, config.num_return_sequences, config.repetition_penalty = 2, 2, 5.0
    np.testing.assert_array_equal(run(model, prompts, max_tokens=8).selection_counts, plain.selection_counts)
    assert model.generation_config is config


@pytest.mark.versions
def test_a_cache_whose_first_layer_is_linear_attention() -> None:
    layers = ["linear_attention", "full_attention"] * 2
    model, prompts = tiny_model("minimax", layer_types=layers), prompts_of((7, 7))
    profile = run(model, prompts, max_tokens=6, batch_size=1)
    generated = [reference.greedy(model, ids, 6) for ids in prompts]
    assert profile.token_counts[:, 1].tolist() == [5, 5]
    assert_equal(profile, expected(model, prompts, generated))


def test_a_family_whose_checkpoint_chooses_the_scoring() -> None:
    model, prompts = tiny_model("cohere2_moe", expert_selection_fn="sigmoid"), prompts_of()
    profile = run(model, prompts)
    assert profile.model.scoring == "sigmoid"
    assert_equal(profile, expected(model, prompts, [[]] * len(prompts)))


@pytest.mark.parametrize(
    ("family", "changes", "groups"),
    [
        ("qwen3_moe", {}, 1),
        ("deepseek_v3", {}, 4),
        ("deepseek_v2", {}, 4),
        ("deepseek_v2", {"topk_method": "greedy"}, 1),
        ("axk2", {"n_group": None, "topk_group": None}, 1),
    ],
)
def test_router_groups_are_those_that_the_router_heeds(family: str, changes: dict[str, Any], groups: int) -> None:
    assert bind(tiny_model(family, **changes), "tiny").model.groups == groups


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    engine = TransformersEngine(tiny_model("mixtral"), batch_size=2)
    torch.manual_seed(5)
    items = [Prompt(token_ids=(7, 8, 9))]
    profile_prompts(engine, items, Generation(3, temperature=1.0, seed=2**60))
    assert torch.equal(torch.rand(1), expected_next)


def test_batches_are_longest_first_and_fit_the_token_budget() -> None:
    engine = TransformersEngine(tiny_model("qwen3_moe"), batch_size=3)
    lengths = np.array([5, 9, 1, 9, 2, 7, 3])
    assert engine.plan(lengths, Generation(0)) == [[1, 3, 5], [0, 6, 4], [2]]
    engine.batching = {"batch_size": 10, "batch_tokens": 30}
    assert engine.plan(lengths, Generation(0)) == [[1, 3, 5], [0, 6, 4, 2]]
    assert engine.plan(lengths, Generation(6)) == [[1, 3], [5, 0], [6, 4, 2]]
    engine.batching = {"batch_size": 10, "batch_tokens": 4}  # a prompt longer than the budget runs alone
    assert engine.plan(lengths, Generation(0)) == [[1], [3], [5], [0], [6], [4, 2]]


def test_a_model_in_training_mode_is_run_in_evaluation_and_given_back_as_it_was() -> None:
    model, prompts = tiny_model("mixtral", router_jitter_noise=0.5).train(), prompts_of()
    profile = run(model, prompts)
    assert model.training
    assert_equal(profile, expected(model.eval(), prompts, [[]] * len(prompts)))


def test_a_layer_without_router_or_with_two_expert_modules_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    model.model.layers[2].more = tiny_model("qwen3_moe").model.layers[2].mlp
    with pytest.raises(ModelError, match="layer 2 has two expert modules"):
        bind(model, "tiny")
    other = tiny_model("qwen3_moe")
    other.model.layers[2].mlp.chooser = other.model.layers[2].mlp.gate
    del other.model.layers[2].mlp.gate
    with pytest.raises(ModelError, match=r"no router was found beside model\.layers\.2\.mlp\.experts"):
        bind(other, "tiny")


def test_sampling_is_reproducible_and_seeded() -> None:
    model = tiny_model("qwen3_moe")
    engine = TransformersEngine(model, batch_size=4)

    def sample(seed: int) -> RoutingProfile:
        items = [Prompt(token_ids=tuple(ids)) for ids in prompts_of((5, 9, 7))]
        return profile_prompts(engine, items, Generation(20, temperature=1.5, seed=seed))

    one, again, other = sample(0), sample(0), sample(1)
    np.testing.assert_array_equal(one.selection_counts, again.selection_counts)
    assert not np.array_equal(one.selection_counts, other.selection_counts)


def test_bfloat16_counts_add_up() -> None:
    profile = run(tiny_model("deepseek_v3").to(torch.bfloat16), prompts_of(), max_tokens=10)
    assert profile.tokens > sum(LENGTHS)


def test_unknown_family_is_refused_by_name() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "jamba", vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, mamba_dt_rank=4, expert_layer_period=2,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"family 'jamba' cannot be recorded exactly: .*Supported: .*qwen3_moe"):
        bind(AutoModelForCausalLM.from_config(config), "tiny")


def test_unlisted_family_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmoe")
    monkeypatch.delitem(FAMILIES, "olmoe")
    with pytest.raises(ModelError, match=r"MoE family 'olmoe' is not known.*CONTRIBUTING"):
        bind(model, "tiny")


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_dense_model_is_refused(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    with pytest.raises(ModelError, match="has no MoE layers"):
        bind(AutoModelForCausalLM.from_config(config), "tiny")


def test_moe_config_with_dense_layers_only_is_refused() -> None:
    model = tiny_model("qwen3_moe", mlp_only_layers=[0, 1, 2, 3])
    with pytest.raises(ModelError, match="has no MoE layers"):
        bind(model, "tiny")


@pytest.mark.parametrize(
    ("family", "wrong"), [("qwen3_moe", "sigmoid"), ("minimax_m2", "softmax"), ("deepseek_v3", "scale")]
)
def test_a_family_that_scores_otherwise_than_the_table_says_is_refused(
    family: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    entry = FAMILIES[family]
    changed = replace(entry, scale=None) if wrong == "scale" else replace(entry, scoring=wrong)  # type: ignore[arg-type]
    monkeypatch.setitem(FAMILIES, family, changed)
    with pytest.raises(ModelError, match="in a way that moescope does not know"):
        run(tiny_model(family), prompts_of())
