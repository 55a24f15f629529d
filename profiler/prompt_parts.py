"""What every form of prompt set shares: its bounds, the names of its fields, and the words of its errors."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moescope.profiler.errors import PromptError

MAX_BYTES = 16 * 2**20
"""Longest line, CSV record, JSON item and text document, in bytes with the line ending; a table's row is held to it."""
TOO_LONG = f"longer than {MAX_BYTES // 2**20} MiB"

PROMPT_FIELDS = ("prompt", "messages", "prompt_token_ids")
"""Fields that hold a prompt; a record has one of them that is not null."""
OTHER_FIELDS = ("conversations", "text")
"""Fields that hold it where there is none of these, the first that is not null."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of a record's fields; None looks for the usual ones.

    Attributes:
        prompt: Field that holds the prompt.
        domain: Field that holds the domain.
        left_out: Told the place of each conversation that is left out because it asks nothing; None refuses these.
    """

    prompt: str | None = None
    domain: str | None = None
    left_out: Callable[[str], None] | None = None


def chosen_columns(columns: Sequence[str], fields: Fields, name: str) -> list[str]:
    """The columns of a table that records need.

    Raises:
        PromptError: One is missing, or there more than once.
    """
    usual = (*PROMPT_FIELDS, *OTHER_FIELDS)
    prompts = [fields.prompt] if fields.prompt is not None else [column for column in usual if column in columns]
    if not prompts:
        raise PromptError(
            f"{name} has no column {', '.join(map(repr, usual[:-1]))} or {usual[-1]!r} but {listed(columns)}; "
            "name the prompt's column with --prompt-field"
        )
    check_columns(columns, fields, name)
    chosen = dict.fromkeys([*prompts, fields.domain or "domain"])
    for column in chosen:
        if columns.count(column) > 1:
            raise PromptError(f"{name} has more than one column {column!r}; rename all but one")
    return [column for column in chosen if column in columns]


def check_columns(columns: Sequence[str], fields: Fields, name: str) -> None:
    """Raise PromptError where a column named by an option is missing."""
    for column, option in ((fields.prompt, "--prompt-field"), (fields.domain, "--domain-field")):
        if column is not None and column not in columns:
            raise PromptError(f"{name} has no column {column!r} but {listed(columns)}; name one with {option}")


def check_size(record: Mapping[str, Any], where: str) -> None:
    """Raise PromptError where a table's row would be too long as a line of JSON, even of the shortest."""
    size = 0
    pending: list[Any] = [record]
    while pending and size <= MAX_BYTES:
        item = pending.pop()
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, Mapping):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            size += 2 * len(item)  # a digit and a comma
            pending += [inner for inner in item if not isinstance(inner, int)]
    if size > MAX_BYTES:
        raise PromptError(f"{where} is {TOO_LONG}; split it into several prompts")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns an error of the operating system into one line."""
    try:
        yield
    except OSError as error:
        raise PromptError(f"{name} cannot be read: {error.strerror or error}") from error


def decoded(data: bytes, name: str, line: int = 1, before: int = 0) -> str:
    """Text of UTF-8 bytes, without the byte order mark of the first line.

    Args:
        data: The bytes.
        name: Of their source.
        line: The line they start in.
        before: Bytes of that line before them.
    """
    try:
        text = data.decode()
        wrong = data.find(b"\0")
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong >= 0:
        start = data.rfind(b"\n", 0, wrong)
        byte = wrong - start + (before if start < 0 else 0)
        line += data.count(b"\n", 0, wrong)
        what = f"0x{data[wrong]:02x}, which is not UTF-8" if data[wrong] else "NUL, which no text holds"
        raise PromptError(f"{name}, line {line}: byte {byte} is {what}; save it as UTF-8 text")
    return text.removeprefix("\ufeff") if (line, before) == (1, 0) else text


def decoded_parts(parts: Iterable[bytes], name: str) -> Iterator[str]:
    """Text of a stream of UTF-8 bytes, part by part; the parts may end anywhere."""
    rest, line, before = b"", 1, 0
    for part in parts:
        data = rest + part
        try:
            whole = codecs.utf_8_decode(data)[1]
        except UnicodeDecodeError:
            whole = len(data)  # refused next, by its place
        yield decoded(data[:whole], name, line, before)
        end = data.rfind(b"\n", 0, whole)
        before = before + whole if end < 0 else whole - end - 1
        line += data.count(b"\n", 0, whole)
        rest = data[whole:]
    if rest:
        decoded(rest, name, line, before)


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list() | tuple():
            return "a list" if value else "an empty list"
        case Mapping():
            return "an object"
    return type(value).__name__


def shown(name: str) -> str:
    """A file's or field's name on one line."""
    return name if name.isprintable() else ascii(name)


def listed(names: Iterable[object], most: int = 8) -> str:
    """Names in quotes, the first few."""
    words = [repr(str(name) if len(str(name)) <= 40 else str(name)[:39] + "…") for name in names]
    more = [f"{len(words) - most} more"] if len(words) > most else []
    return ", ".join(words[:most] + more) or "no field"
