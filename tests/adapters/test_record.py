"""`moescope.record`: the user's own forwards and generate calls."""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from tiny_models import PAD, VOCABULARY, cache_name, tiny_model

import moescope
from moescope.profiler.errors import ModelError
from moescope.profiler.profile import RoutingProfile

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.versions]


@pytest.fixture
def model() -> Any:
    made = tiny_model("qwen3_moe", seed=2)
    made.generation_config.eos_token_id = None
    return made


def batch(*lengths: int) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(6, VOCABULARY, size=n).tolist() for n in lengths]
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return prompts, ids, mask


def assert_counts(profile: RoutingProfile, model: Any, prompts: list[list[int]], generated: list[list[int]]) -> None:
    count = reference.count(
        model,
        [(p, g, 0) for p, g in zip(prompts, generated, strict=True)],
        domains=1,
        experts=8,
        scoring="softmax",
        scale=1.0,
    )
    np.testing.assert_array_equal(profile.selection_counts, count.selection)
    np.testing.assert_array_equal(profile.token_counts, count.tokens)


def test_generate_with_padding_and_a_stop_token(model: Any) -> None:
    prompts, ids, mask = batch(4, 9, 6)
    free = [reference.greedy(model, prompt, 20) for prompt in prompts]
    stop = free[0][7]
    generated = [new[: new.index(stop) + 1] if stop in new else new for new in free]
    with moescope.record(model, domain="mine") as recording:
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=20, eos_token_id=stop, pad_token_id=PAD
        )
    assert output.shape == (3, 9 + max(map(len, generated)))
    assert recording.profile.domains == ("mine",)
    assert_counts(recording.profile, model, prompts, generated)
    assert not model._forward_hooks
    assert not {"generate", "_get_stopping_criteria", "_moescope_recording"} & set(vars(model))
    for index, prompt in enumerate(prompts):
        tokens = len(prompt) + len(generated[index]) - 1
        assert recording.profile.split_counts[reference.split(prompt)].sum() >= 3 * 3 * tokens


def test_custom_stopping_criteria_end_rows_where_they_say(model: Any) -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class RowZeroAfterFive(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            done = torch.zeros(len(input_ids), dtype=torch.bool)
            done[0] = input_ids.shape[1] >= 9 + 5
            return done

    prompts, ids, mask = batch(4, 9)
    free = [reference.greedy(model, prompt, 12) for prompt in prompts]
    with moescope.record(model) as recording:
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=12, eos_token_id=VOCABULARY - 1, pad_token_id=PAD,
            stopping_criteria=StoppingCriteriaList([RowZeroAfterFive()]),
        )  # fmt: skip
    assert VOCABULARY - 1 not in free[0] + free[1]
    assert_counts(recording.profile, model, prompts, [free[0][:5], free[1]])


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 4}, {}])
def test_recomputed_and_chunked_columns_count_once(model: Any, options: dict[str, Any]) -> None:
    prompts, ids, mask = batch(9, 9)
    free = [reference.greedy(model, prompt, 8) for prompt in prompts]
    with moescope.record(model) as recording:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, pad_token_id=PAD, **options)
    assert_counts(recording.profile, model, prompts, free)


def test_several_samples_of_a_prompt_count_as_the_engine_routes_them(model: Any) -> None:
    prompts, ids, mask = batch(4, 9)
    with moescope.record(model) as recording:
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=True,
            num_return_sequences=3,
            pad_token_id=PAD,
        )
    new = output[:, 9:].tolist()
    assert_counts(recording.profile, model, [p for p in prompts for _ in range(3)], new)


def test_plain_forwards_and_a_decode_loop_of_ones_own(model: Any) -> None:
    prompts, ids, mask = batch(4, 9)
    with moescope.record(model) as recording, torch.no_grad():
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        output = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True)
        tokens = []
        for _ in range(5):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token)
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            position = position[:, -1:] + 1
            kept = {cache_name(model): output[cache_name(model)]}
            output = model(input_ids=token, attention_mask=mask, position_ids=position, **kept)
    new = torch.cat(tokens, dim=1).tolist()
    assert new == [reference.greedy(model, prompt, 5) for prompt in prompts]
    # here the last token was fed too
    assert_counts(recording.profile, model, prompts, [[*row, -1] for row in new])
    assert recording.profile.runs[0].prompts == 2


def test_a_conversation_that_goes_on_with_its_cache(model: Any) -> None:
    from transformers import DynamicCache

    _, ids, mask = batch(7)
    cache = DynamicCache(config=model.config)
    with moescope.record(model) as recording:
        kept = {cache_name(model): cache}
        first = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, pad_token_id=PAD, **kept)
        more = torch.cat([first, torch.tensor([[11, 12, 13]])], dim=1)
        second = model.generate(
            input_ids=more,
            attention_mask=torch.ones_like(more),
            max_new_tokens=4,
            pad_token_id=PAD,
            **kept,
        )
    profile = recording.profile
    # 7 prompt and 3 fed tokens; then the 4th and three new ones, and 3 fed tokens: each position once
    assert profile.token_counts.tolist() == [[7 + 4, 3 + 3]]
    whole = second[0].tolist()
    count = reference.count(model, [(whole, [], 0)], domains=1, experts=8, scoring="softmax", scale=1.0)
    last = reference.route(model, whole)
    for slot, layer in enumerate(sorted(last.ids)):
        final = np.bincount(last.ids[layer][-1], minlength=8)
        np.testing.assert_array_equal(
            profile.selection_counts.sum(axis=(0, 1))[slot], count.selection[0].sum(axis=0)[slot] - final
        )


def test_several_calls_add_up_and_a_failing_call_counts_nothing(model: Any) -> None:
    prompts, ids, mask = batch(4, 9)
    with moescope.record(model) as recording, torch.no_grad():
        model(input_ids=ids[:1], attention_mask=mask[:1])
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 3), 10_000))
        model(input_ids=ids[1:], attention_mask=mask[1:])
    assert_counts(recording.profile, model, prompts, [[], []])
    assert recording.profile.runs[0].prompts == 2


def test_prompts_of_a_failing_call_do_not_count_with_the_next_step(model: Any) -> None:
    _, ids, _ = batch(9)
    with moescope.record(model) as recording, torch.no_grad():
        kept = {cache_name(model): model(input_ids=ids, use_cache=True)[cache_name(model)]}
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 3), 10_000))
        model(input_ids=torch.tensor([[11]]), **kept)
    assert recording.profile.runs[0].prompts == 1
    assert recording.profile.token_counts.tolist() == [[9, 1]]


def test_what_cannot_be_counted_is_refused(model: Any) -> None:
    _, ids, mask = batch(4, 9)
    with moescope.record(model) as recording:
        with pytest.raises(ModelError, match="beam search"):
            model.generate(input_ids=ids, attention_mask=mask, num_beams=2, max_new_tokens=3)
        with pytest.raises(ModelError, match="no attention_mask tells what"):
            model.generate(input_ids=ids, max_new_tokens=3, pad_token_id=PAD)
        with pytest.raises(ModelError, match="input_ids"):
            model.generate(inputs_embeds=torch.zeros(1, 3, 64), max_new_tokens=3)
        with pytest.raises(ModelError, match="inputs_embeds name no tokens"):
            model(inputs_embeds=torch.zeros(1, 3, 64))
        with pytest.raises(ModelError, match="nothing was recorded"):
            _ = recording.profile
        with pytest.raises(ModelError, match="being recorded already"), moescope.record(model):
            pass
    with pytest.raises(ModelError, match="nothing was recorded"):
        _ = recording.profile


def test_a_training_step_inside_the_block_keeps_no_graph(model: Any) -> None:
    _, ids, mask = batch(4, 9)
    with moescope.record(model) as recording:
        for _ in range(2):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            loss.backward()
    assert recording.profile.tokens == 2 * 13
    assert not recording._recorder._weights.requires_grad


def test_recording_in_and_out_of_inference_mode(model: Any) -> None:
    _, ids, mask = batch(4, 9)
    with moescope.record(model) as recording:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=mask)
        model(input_ids=ids, attention_mask=mask)
    assert recording.profile.tokens == 2 * 13


def test_the_seed_changes_the_splits(model: Any) -> None:
    _, ids, mask = batch(4, 9, 7, 8)
    splits = []
    for seed in (0, 1):
        with moescope.record(model, seed=seed) as recording, torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
        splits.append(recording.profile.split_counts)
    assert not np.array_equal(*splits)
    with moescope.record(model) as other, torch.no_grad():
        model(input_ids=ids[:2], attention_mask=mask[:2])
    assert other.profile.runs[0].prompts_sha256 != recording.profile.runs[0].prompts_sha256


def test_padding_is_never_counted_however_it_is_told(model: Any) -> None:
    from transformers import GenerationConfig

    prompts, ids, mask = batch(4, 9)
    model.generation_config.pad_token_id = PAD
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with moescope.record(model) as recording, torch.no_grad():
        with pytest.raises(ModelError, match="no attention_mask tells what"):
            model.generate(ids, GenerationConfig(max_new_tokens=3))  # transformers takes the padding token of the model
        with pytest.raises(ModelError, match="no attention_mask tells what"):
            model(input_ids=ids)
        with pytest.raises(ModelError, match=r"attention_mask as \(B, S\)"):
            model(input_ids=ids, attention_mask=mask[:, None, None, :].bool().expand(2, 1, 9, 9))
        model.model(ids, mask, position)
    assert_counts(recording.profile, model, prompts, [[], []])


def test_two_conversations_at_once_keep_their_splits(model: Any) -> None:
    prompts, ids, _ = batch(9, 9)
    with moescope.record(model) as recording, torch.no_grad():
        outputs = [model(input_ids=ids[i : i + 1], use_cache=True) for i in (0, 1)]
        for i in (0, 1):
            model(input_ids=torch.tensor([[11]]), **{cache_name(model): outputs[i][cache_name(model)]})
    splits = [reference.split(prompt) for prompt in prompts]
    assert splits[0] != splits[1]
    for split in splits:
        assert recording.profile.split_counts[split].sum() == 3 * 3 * 10
    assert recording.profile.token_counts.tolist() == [[18, 2]]


def test_what_throws_tokens_away_is_refused_wherever_it_is_set(model: Any) -> None:
    from transformers import GenerationConfig

    _, ids, mask = batch(4, 9)
    with moescope.record(model):
        with pytest.raises(ModelError, match="leave out num_beams"):
            model.generate(ids, GenerationConfig(num_beams=3), attention_mask=mask)
        with pytest.raises(ModelError, match="leave out assistant_early_exit"):
            model.generate(ids, attention_mask=mask, assistant_early_exit=2)
        model.generation_config.prompt_lookup_num_tokens = 3
        with pytest.raises(ModelError, match="leave out prompt_lookup_num_tokens"):
            model.generate(ids, attention_mask=mask)


def test_what_the_user_had_put_on_the_model_comes_back(model: Any) -> None:
    calls = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return type(model).generate(model, *args, **kwargs)

    model.generate = own
    _, ids, mask = batch(4, 9)
    with moescope.record(model) as recording:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, pad_token_id=PAD)
    assert model.generate is own
    assert len(calls) == 1
    assert recording.profile.tokens == 13 + 2


def test_the_model_computes_the_same_with_and_without_recording(model: Any) -> None:
    _, ids, mask = batch(4, 9)
    plain = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, pad_token_id=PAD)
    with moescope.record(model):
        recorded = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, pad_token_id=PAD)
    assert torch.equal(plain, recorded)
