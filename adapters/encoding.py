"""Prompts to token ids, by a model's own tokenizer."""

from collections.abc import Sequence
from typing import Any

from moescope.profiler.errors import ModelError, PromptError
from moescope.profiler.prompts import Prompt


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], model: str) -> list[list[int]]:
    """Token ids of prompts given as text (with the tokenizer's special tokens) or as messages (chat template).

    Args:
        tokenizer: A transformers tokenizer, or None where the model has none.
        prompts: The prompts; those given as token ids get an empty list.
        model: Name of the model, for messages.

    Raises:
        ModelError: There is no tokenizer.
        PromptError: The chat template refuses a prompt's messages, or there is none.
    """
    if tokenizer is None:
        raise ModelError(f"{model} has no tokenizer; give prompts as prompt_token_ids")
    encoded: list[list[int]] = [[]] * len(prompts)
    texts = [i for i, prompt in enumerate(prompts) if prompt.text is not None]
    if texts:
        ids = tokenizer([prompts[i].text for i in texts], add_special_tokens=True, verbose=False)["input_ids"]
        for i, tokens in zip(texts, ids, strict=True):
            encoded[i] = list(tokens)
    for i, prompt in enumerate(prompts):
        if prompt.messages is not None:
            encoded[i] = _encode_messages(tokenizer, prompt, model)
    return encoded


def _encode_messages(tokenizer: Any, prompt: Prompt, model: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(f"{prompt.source}: {model} has no chat template; give `prompt` instead of `messages`")
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in prompt.messages or ()],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except Exception as error:  # templates raise what they like
        raise PromptError(f"{prompt.source}: the chat template refuses the messages: {first_line(error)}") from error
    return [int(token) for token in ids]


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Each token as text of its own; empty strings without a tokenizer."""
    if tokenizer is None:
        return [""] * len(token_ids)
    return [str(tokenizer.decode([int(token)])) for token in token_ids]


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
