"""Tokens as text that can be shown one by one."""

from collections.abc import Sequence
from typing import Any, Final

REPLACEMENT: Final = "\ufffd"
LONGEST_CHARACTER: Final = 4
"""Tokens that may be needed for one character: it has at most four bytes."""


def text_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token of a sequence adds.

    A token is decoded behind the one before it, because some tokenizers drop a space that stands first; one that ends
    within a character adds nothing, and the one that completes the character has all of it. (The way in which servers
    stream text, e.g. text-generation-inference.)

    Args:
        tokenizer: Anything with `decode(list of ids) -> str`.
        ids: (T,) token ids.

    Returns:
        (T,) texts; bytes that make no character are U+FFFD.
    """
    pieces = [""] * len(ids)
    context = done = 0
    for place in range(len(ids)):
        before = tokenizer.decode(list(ids[context:done])) if done else ""
        after = tokenizer.decode(list(ids[context : place + 1]))
        last = place + 1 == len(ids) or place + 1 - done == LONGEST_CHARACTER
        if last or (len(after) > len(before) and not after.endswith(REPLACEMENT)):
            pieces[place] = after[len(before) :]
            context, done = done, place + 1
    return pieces


def visible(text: str) -> str:
    """Text in which everything can be seen and nothing steers.

    A line break is marked and kept, other control characters are their pictures, marks of direction and whatever else
    cannot be printed their code points.
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "⏎\n"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    return character if character.isprintable() else f"⟨U+{code:04X}⟩"
