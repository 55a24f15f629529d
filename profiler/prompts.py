"""Prompt sets: text, files and standard input, read as a stream of checked prompts."""

import codecs
import csv
import io
import itertools
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from moescope.profiler.errors import OptionError, PromptError
from moescope.profiler.prompt_forms import (
    HUB_PREFIX,
    NoQuestion,
    Record,
    conversation_messages,
    hub_records,
    imported,
    is_conversation,
    json_records,
)
from moescope.profiler.prompt_parquet import parquet_records
from moescope.profiler.prompt_parts import (
    MAX_BYTES,
    OTHER_FIELDS,
    PROMPT_FIELDS,
    TOO_LONG,
    Fields,
    check_columns,
    decoded,
    kind,
    listed,
    reading,
    shown,
)

DEFAULT_DOMAIN = "default"
MAX_DOMAIN_CHARACTERS = 200
TOKEN_ID_END = 2**31

_TEXT_FIELDS = ("prompt", "text")
_BLANK = b" \t\r\n\v\f" + codecs.BOM_UTF8
_CONTROL = frozenset(("Cc", "Cs", "Zl", "Zp"))  # Unicode: controls, surrogates, line and paragraph separators


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request before tokenisation: exactly one of text, messages and token ids.

    A prompt that exists is valid: the constructor checks it and strips the domain's name.

    Attributes:
        text: The text to complete; more than white space.
        messages: A conversation for the model's chat template: objects with a `role` and `content`.
        token_ids: Token ids, each at least 0 and below 2**31.
        domain: The part of the set it belongs to; `"default"` where the set names none.
        source: Where it comes from, for error messages: `"file.jsonl, line 12"`.

    Raises:
        PromptError: Something in it cannot be used; the message starts with the source.
    """

    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    token_ids: tuple[int, ...] | None = None
    domain: str = DEFAULT_DOMAIN
    source: str = "prompt"

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.text, self.messages, self.token_ids)) != 1:
            raise PromptError(f"{self.source}: a prompt is exactly one of text, messages and token ids")
        object.__setattr__(self, "domain", _checked_domain(self.domain, self.source))
        if self.text is not None:
            _check_text(self.text, self.source)
            if not self.text.strip():
                raise PromptError(f"{self.source}: the prompt is empty; give it text or remove it")
        if self.messages is not None:
            object.__setattr__(self, "messages", tuple(self.messages))
            _check_messages(self.messages, self.source)
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", _checked_token_ids(self.token_ids, self.source))

    @property
    def size(self) -> int:
        """Characters of text, or four for each token id: what a batch of prompts is measured by."""
        if self.token_ids is not None:
            return 4 * len(self.token_ids)
        if self.text is not None:
            return len(self.text)
        return sum(map(len, _strings(self.messages)))


def read_prompts(
    sources: Sequence[str],
    *,
    prompt_field: str | None = None,
    domain_field: str | None = None,
    limit: int | None = None,
    stdin: BinaryIO | None = None,
    left_out: Callable[[str], None] | None = None,
) -> Iterator[Prompt]:
    """Prompts of text, files and standard input, in order.

    The sources are looked at when this is called, and read as the iterator is: no file or dataset is held in memory.

    Args:
        sources: Text; files that `READERS` knows by their suffix; `hf:NAME`, `hf:NAME:SPLIT` or
            `hf:NAME:CONFIG:SPLIT` for a dataset of the hub or of a folder; `-` for standard input, which is JSONL
            where its first line that is not blank starts with `{`, and one text document otherwise. A name that has
            such a suffix, or a path separator and no white space, must exist.
        prompt_field: Field or column that holds the prompt. Without it `prompt`, `messages` or `prompt_token_ids`, or
            else `conversations` or `text`. Turns of ShareGPT's form (`from`, `value`) become messages, all up to the
            last of the user or of a tool; the answers recorded after it are dropped.
        domain_field: Field that holds the domain. Without it `domain`, where there is one.
        limit: Stop after so many prompts.
        stdin: Read for `-`; the process's own by default. Need not be seekable.
        left_out: Told the place of each conversation of ShareGPT's form that has no turn of the user, which is left
            out. Without this, such a conversation is refused.

    Raises:
        PromptError: A source cannot be read or a prompt cannot be used.
        OptionError: The limit is below 1.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"--limit must be at least 1, not {limit}")
    if not sources:
        raise PromptError(f"no prompts: give text, files ({_known_suffixes()}), hf:NAME or - for standard input")
    if list(sources).count("-") > 1:
        raise PromptError("- (standard input) is given more than once; it can be read only once")
    fields = Fields(prompt_field, domain_field, left_out)
    streams = [_source_prompts(source, number, fields, stdin) for number, source in enumerate(sources, 1)]
    return itertools.islice(itertools.chain.from_iterable(streams), limit)


def as_prompts(items: Iterable[str | Mapping[str, Any] | Prompt]) -> Iterator[Prompt]:
    """Prompts from Python objects: text, mappings with the fields of a JSONL line, or prompts as they are.

    Text is always text, never a file's name. Token ids may be a numpy array.

    Raises:
        PromptError: An item cannot be used; it is named by its place, from 1.
    """
    if isinstance(items, str | bytes | Mapping | Prompt):
        raise PromptError(f"prompts must be a list of prompts, not one {type(items).__name__}; put it in a list")
    return (_as_prompt(item, f"prompt {number}") for number, item in enumerate(items, 1))


def _as_prompt(item: Any, where: str) -> Prompt:
    match item:
        case Prompt():
            return item
        case str():
            return Prompt(text=item, source=where)
        case Mapping():
            return _record_prompt(item, Fields(), where)
    raise PromptError(f"{where} must be text, a mapping or a Prompt, not {type(item).__name__}")


# Sources


def _source_prompts(source: str, number: int, fields: Fields, stdin: BinaryIO | None) -> Iterator[Prompt]:
    if source == "-":
        return _stdin_prompts(stdin or sys.stdin.buffer, fields)
    if source.startswith(HUB_PREFIX) and not source[len(HUB_PREFIX) :][:1].isspace():
        return _records_prompts(hub_records(source, shown(source), fields), fields)
    suffix = os.path.splitext(source)[1].lower()
    if not _names_file(source, suffix):
        return iter([Prompt(text=source, source=f"prompt argument {number}")])
    if os.path.isdir(source):
        raise PromptError(f"{shown(source)} is a directory; name a file in it ({_known_suffixes()})")
    if suffix not in READERS:
        found = f"an unknown suffix {suffix}" if suffix else "no suffix"
        raise PromptError(f"{shown(source)} has {found}; prompt files are {_known_suffixes()}")
    if suffix == ".parquet":
        imported("pyarrow", "parquet", shown(source))  # said before a model is loaded
    return _file_prompts(source, READERS[suffix], fields)


def _names_file(source: str, suffix: str) -> bool:
    """Whether a source is a file, or a mistyped name of one, rather than text."""
    single_line = len(source.splitlines()) == 1
    one_word = len(source.split()) == 1
    looks_like_path = (single_line and suffix in READERS) or (one_word and not set(source).isdisjoint("/" + os.sep))
    try:
        os.stat(source)
    except PermissionError:
        return looks_like_path  # opening it says what is wrong
    except (OSError, ValueError):
        if looks_like_path:
            raise PromptError(f"No such file: {shown(source)}") from None
        return False
    return True


def _file_prompts(path: str, reader: "Reader", fields: Fields) -> Iterator[Prompt]:
    with reading(shown(path)), open(path, "rb") as stream:
        yield from reader(stream, shown(path), fields)


def _stdin_prompts(stream: BinaryIO, fields: Fields) -> Iterator[Prompt]:
    name = "standard input"
    head, line = bytearray(), b""
    with reading(name):
        while not line.strip(_BLANK) and len(head) <= MAX_BYTES:
            line = stream.readline(MAX_BYTES + 1)  # whole, or too long for either reader
            if not line:
                break
            head += line
        if line.lstrip(_BLANK).startswith(b"{"):
            yield from _jsonl_prompts(stream, name, fields, bytes(head))
        else:
            yield from _text_prompts(stream, name, fields, bytes(head))


# Readers: an open file, its name and the fields to prompts. A new format is one more function and one entry in READERS.


def _text_prompts(stream: BinaryIO, name: str, fields: Fields, head: bytes = b"") -> Iterator[Prompt]:
    """The one document; a final line ending is the file's, not the document's."""
    document = bytearray(head)
    while len(document) <= MAX_BYTES and (chunk := stream.read(MAX_BYTES + 1 - len(document))):
        document += chunk
    if len(document) > MAX_BYTES:
        raise PromptError(f"{name}: the text is {TOO_LONG}; split it, or make it a .jsonl file with many prompts")
    text = decoded(bytes(document), name)
    if not text.strip():
        raise PromptError(f"{name} is empty; it must hold text")
    yield Prompt(text=text.removesuffix("\n").removesuffix("\r"), source=name)


def _jsonl_prompts(stream: BinaryIO, name: str, fields: Fields, head: bytes = b"") -> Iterator[Prompt]:
    return _records_prompts(_jsonl_records(stream, name, head), fields)


def _jsonl_records(stream: BinaryIO, name: str, head: bytes) -> Iterator[Record]:
    empty = True
    for number, line in _lines(stream, name, head):
        if not line.strip():
            continue
        empty = False
        where = f"{name}, line {number}"
        record = _parsed(line, where)
        if not isinstance(record, dict):
            raise PromptError(f'{where}: {kind(record)}, but a line must be a JSON object such as {{"prompt": "…"}}')
        yield where, record
    if empty:
        raise PromptError(f"{name} is empty; it must hold one JSON object in each line")


def _csv_prompts(stream: BinaryIO, name: str, fields: Fields) -> Iterator[Prompt]:
    rows = _csv_rows(stream, name)
    _, header = next(rows, (0, None))
    if header is None:
        raise PromptError(f"{name} is empty; it must hold a header row and one prompt in each row")
    header = [column.strip() for column in header]
    prompt_field = fields.prompt or next((field for field in _TEXT_FIELDS if field in header), None)
    if prompt_field is None:
        raise PromptError(
            f"{name} has no column 'prompt' or 'text' but {listed(header)}; "
            "it needs a header row, separated by commas, or --prompt-field with one of these columns"
        )
    check_columns(header, Fields(prompt_field, fields.domain), name)
    for column in (prompt_field, fields.domain or "domain"):
        if header.count(column) > 1:
            raise PromptError(f"{name} has more than one column {column!r}; rename all but one")
    empty = True
    for number, row in rows:
        empty = False
        if len(row) != len(header):
            raise PromptError(
                f"{name}, line {number}: {len(row)} fields where the header has {len(header)}; "
                "put fields that hold commas or line breaks in double quotes"
            )
        record = dict(zip(header, row, strict=True))
        yield _record_prompt(record, Fields(prompt_field, fields.domain), f"{name}, line {number}")
    if empty:
        raise PromptError(f"{name} holds a header row but no prompts; it must hold one prompt in each row")


def _json_prompts(stream: BinaryIO, name: str, fields: Fields) -> Iterator[Prompt]:
    return _records_prompts(json_records(stream, name), fields)


def _parquet_prompts(stream: BinaryIO, name: str, fields: Fields) -> Iterator[Prompt]:
    return _records_prompts(parquet_records(stream, name, fields), fields)


Reader = Callable[[BinaryIO, str, Fields], Iterator[Prompt]]
READERS: dict[str, Reader] = {
    ".txt": _text_prompts,
    ".jsonl": _jsonl_prompts,
    ".json": _json_prompts,
    ".csv": _csv_prompts,
    ".parquet": _parquet_prompts,
}
"""Readers by the suffix of the files they read, in lower case."""


def _lines(stream: BinaryIO, name: str, head: bytes = b"") -> Iterator[tuple[int, str]]:
    """Numbered lines with their endings; `head` is what has been read already, in whole lines."""
    rest = iter(lambda: stream.readline(MAX_BYTES + 1), b"")
    for number, line in enumerate(itertools.chain(io.BytesIO(head), rest), 1):
        if len(line) > MAX_BYTES:
            raise PromptError(f"{name}, line {number} is {TOO_LONG}; split it into several prompts")
        yield number, decoded(line, name, number)


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        # The column is that of the line, whatever line breaks the decoder sees in it.
        raise PromptError(
            f"{where}, column {error.pos + 1}: not JSON ({error.msg}); each line must be one JSON object"
        ) from None
    except RecursionError:
        raise PromptError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:  # a number with thousands of digits
        raise PromptError(f"{where}: not usable as JSON ({str(error).partition(';')[0]})") from None


class _RecordLines:
    """Lines for `csv.reader`, with the current record's first line and a bound on its length."""

    def __init__(self, lines: Iterator[tuple[int, str]], name: str) -> None:
        self._lines = lines
        self._name = name
        self._number = 0
        self._size = 0
        self.start = 1

    def begin(self) -> None:
        self.start = self._number + 1
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._number, line = next(self._lines)
        self._size += len(line)
        if self._size > MAX_BYTES:
            raise PromptError(f"{self._name}, line {self.start}: the record is {TOO_LONG}; is a quote left open?")
        return line


def _csv_rows(stream: BinaryIO, name: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the line it starts at."""
    # The module has one limit for all readers, 128 Ki characters by default; records are bounded above.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_BYTES))
    lines = _RecordLines(_lines(stream, name), name)
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error).partition(" - ")[0]
            raise PromptError(
                f"{name}, line {lines.start}: not CSV ({reason}); "
                "fields are separated by commas, and quotes inside a quoted field are doubled"
            ) from None
        if row:
            yield lines.start, row


# Records


def _records_prompts(records: Iterator[Record], fields: Fields) -> Iterator[Prompt]:
    for where, record in records:
        try:
            prompt = _record_prompt(record, fields, where)
        except NoQuestion:
            if fields.left_out is None:
                raise
            fields.left_out(where)
        else:
            yield prompt


def _record_prompt(record: Mapping[str, Any], fields: Fields, where: str) -> Prompt:
    """A prompt from a record's fields. The field says what it holds, or else its value's shape does."""
    field = _prompt_field(record, fields, where)
    domain = _record_domain(record, fields, where)
    value = record[field]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    is_list = isinstance(value, list | tuple)
    if is_list and (is_conversation(value) or (field == "conversations" and not value)):
        return Prompt(messages=conversation_messages(value, where), domain=domain, source=where)
    if field in ("messages", "conversations"):
        if not is_list:
            raise PromptError(f"{where}: {field!r} must be a list of messages, not {kind(value)}")
        return Prompt(messages=tuple(value), domain=domain, source=where)
    if field == "prompt_token_ids":
        if not is_list:
            raise PromptError(f"{where}: {field!r} must be a list of token ids, not {kind(value)}")
        return Prompt(token_ids=tuple(value), domain=domain, source=where)
    if isinstance(value, str):
        return Prompt(text=value, domain=domain, source=where)
    if is_list and value and isinstance(value[0], Mapping):
        return Prompt(messages=tuple(value), domain=domain, source=where)
    if is_list and value and isinstance(value[0], int | np.integer):
        return Prompt(token_ids=tuple(value), domain=domain, source=where)
    what = "a list of something else" if is_list and value else kind(value)
    raise PromptError(f"{where}: {field!r} must be text, a list of messages or a list of token ids, not {what}")


def _prompt_field(record: Mapping[str, Any], fields: Fields, where: str) -> str:
    """The field that holds the prompt; null counts as absent."""
    if fields.prompt is not None:
        if record.get(fields.prompt) is None:
            state = "is null" if fields.prompt in record else "is missing"
            raise PromptError(
                f"{where}: the prompt's field {fields.prompt!r} {state}; there is {listed(record)}; "
                "name one with --prompt-field"
            )
        return fields.prompt
    found = [field for field in PROMPT_FIELDS if record.get(field) is not None]
    if len(found) > 1:
        raise PromptError(f"{where}: more than one prompt ({listed(found)}); keep one or name it with --prompt-field")
    if found:
        return found[0]
    for field in OTHER_FIELDS:
        if record.get(field) is not None:
            return field
    raise PromptError(
        f"{where}: no 'prompt', 'messages' or 'prompt_token_ids' but {listed(record)}; "
        "name the prompt's field with --prompt-field"
    )


def _record_domain(record: Mapping[str, Any], fields: Fields, where: str) -> str:
    field = fields.domain or "domain"
    if fields.domain is not None and field not in record:
        raise PromptError(
            f"{where}: the domain's field {field!r} is missing; there is {listed(record)}; name one with --domain-field"
        )
    value = record.get(field)
    if value is None:
        return DEFAULT_DOMAIN
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(value)  # class labels
    if not isinstance(value, str):
        raise PromptError(f"{where}: the domain {field!r} must be text, not {kind(value)}")
    return value


# Checks


def _checked_domain(domain: str, where: str) -> str:
    domain = domain.strip()
    if not domain:
        raise PromptError(f"{where}: the domain's name is empty; name it or leave the field out")
    if len(domain) > MAX_DOMAIN_CHARACTERS:
        raise PromptError(
            f"{where}: the domain's name has {len(domain):,} characters, at most {MAX_DOMAIN_CHARACTERS} are allowed; "
            "is --domain-field right?"
        )
    wrong = next((character for character in domain if unicodedata.category(character) in _CONTROL), None)
    if wrong is not None:
        raise PromptError(f"{where}: the domain's name holds the control character {wrong!a}; remove it")
    return domain


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: character {error.start + 1} of the text is {text[error.start]!a}, half of a surrogate pair; "
            "text must be valid Unicode"
        ) from None
    if "\0" in text:
        raise PromptError(f"{where}: character {text.index(chr(0)) + 1} of the text is NUL; remove it")


def _check_messages(messages: Sequence[Any], where: str) -> None:
    if not messages:
        raise PromptError(f"{where}: the list of messages is empty; it needs at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise PromptError(
                f"{where}: message {number} must be an object with 'role' and 'content', not {kind(message)}"
            )
        if not isinstance(message.get("role"), str) or not message["role"].strip():
            raise PromptError(f"{where}: message {number} needs a 'role' that is text, such as 'user'")
        content = message.get("content")
        parts = isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content)
        silent = content is None and message.get("tool_calls")
        if not (isinstance(content, str) or parts or silent):
            raise PromptError(
                f"{where}: message {number} needs a 'content' that is text or a list of parts, not {kind(content)}"
            )
    for text in _strings(messages):
        _check_text(text, where)


def _checked_token_ids(token_ids: Sequence[Any], where: str) -> tuple[int, ...]:
    if not token_ids:
        raise PromptError(f"{where}: the list of token ids is empty; it needs at least one token id")
    for number, token_id in enumerate(token_ids, 1):
        whole = isinstance(token_id, int | np.integer) and not isinstance(token_id, bool)
        if not whole or not 0 <= token_id < TOKEN_ID_END:
            given = f"{token_id}" if whole and abs(token_id) < 2**63 else kind(token_id)
            raise PromptError(
                f"{where}: token id {number} of {len(token_ids)} is {given}; "
                f"token ids are whole numbers from 0 to {TOKEN_ID_END - 1}"
            )
    return tuple(map(int, token_ids))


def _strings(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings, keys included."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item


def _known_suffixes() -> str:
    *most, last = READERS
    return f"{', '.join(most)} or {last}"
