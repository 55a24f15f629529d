"""Prompt sets that other tools write: JSON lists and datasets of the hub, read as records.

Each record comes with its place, for error messages. None is held after it has been taken.
"""

import itertools
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, BinaryIO

from moescope.profiler.errors import PromptError
from moescope.profiler.prompt_parts import (
    MAX_BYTES,
    TOO_LONG,
    Fields,
    check_size,
    chosen_columns,
    decoded_parts,
    kind,
    listed,
)

Record = tuple[str, Mapping[str, Any]]
"""A record's place and its fields."""

HUB_PREFIX = "hf:"
_HUB_FORMS = "hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_JSON_BLANK = re.compile(r"[ \t\r\n]*")
_JSON_LIST = 'a .json file must be one list of objects such as [{"prompt": "…"}]'
_PART = 2**18  # bytes read at a time
_CUT = 16  # a token that the end of the text cuts is reported at most so many characters before it
_NO_ROWS = "holds no rows; it must hold one prompt in each row"
_BATCH_ROWS = 64


def imported(module: str, extra: str, name: str) -> Any:
    """A package that is not always there.

    Raises:
        PromptError: It cannot be imported; the message names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise PromptError(
            f"{name} needs the package {package!r}, which is not installed: pip install 'moescope[{extra}]'"
        ) from None


# JSON


class _JsonText:
    """JSON of a stream; the text from the last value on is held, and its place is known."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._parts = decoded_parts(iter(lambda: stream.read(_PART), b""), name)
        self._name = name
        self._text = ""
        self._at = 0
        self._line = 1  # where the text starts
        self._before = 0
        self._ended = False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not blank, empty at the end."""
        while True:
            match = _JSON_BLANK.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Past the character that `peek` returned."""
        self._at += 1

    def value(self, number: int) -> Any:
        """The next value, of the list's given item."""
        self.peek()
        where = f"{self._name}, item {number}"
        while True:
            value, cut = None, None
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                wrong = f"not JSON ({error.msg}); {_JSON_LIST}"
                if not error.msg.startswith("Unterminated string") and error.pos <= len(self._text) - _CUT:
                    raise self.error(wrong, error.pos) from None
                cut, end = error.pos - self._at, len(self._text)
            except RecursionError:
                raise PromptError(f"{where}: the JSON is nested too deeply") from None
            except ValueError as error:  # a number with thousands of digits
                raise PromptError(f"{where}: not usable as JSON ({str(error).partition(';')[0]})") from None
            if end - self._at > MAX_BYTES:
                raise PromptError(f"{where} is {TOO_LONG}; split it into several prompts")
            size = end - self._at
            if (cut is None and end < len(self._text)) or not self._more():  # at the text's end a number may go on
                if cut is not None:
                    raise self.error(wrong, self._at + cut)
                self._at += size
                return value

    def error(self, what: str, at: int | None = None) -> PromptError:
        """An error at a character of the text, by default the next."""
        at = self._at if at is None else at
        start = self._text.rfind("\n", 0, at)
        line = self._line + self._text.count("\n", 0, at)
        column = at - start + (self._before if start < 0 else 0)
        return PromptError(f"{self._name}, line {line}, column {column}: {what}")

    def _more(self) -> bool:
        """Reads on, at least as much as is held, so that a long value is decoded only a few times."""
        start = self._text.rfind("\n", 0, self._at)
        self._before = self._before + self._at if start < 0 else self._at - start - 1
        self._line += self._text.count("\n", 0, self._at)
        parts, size = [self._text[self._at :]], 0
        while not self._ended and size <= len(parts[0]):
            part = next(self._parts, None)
            self._ended = part is None
            parts.append(part or "")
            size += len(parts[-1])
        self._text, self._at = "".join(parts), 0
        return size > 0


def json_records(stream: BinaryIO, name: str) -> Iterator[Record]:
    """The objects of one JSON list, read item by item."""
    text = _JsonText(stream, name)
    first = text.peek()
    if not first:
        raise PromptError(f"{name} is empty; it must hold one list of JSON objects")
    if first == "{":
        raise PromptError(f"{name} holds an object, but {_JSON_LIST}; one object in each line is a .jsonl file")
    if first != "[":
        raise text.error(f"not a list, but {_JSON_LIST}")
    text.skip()
    if text.peek() == "]":
        raise PromptError(f"{name} holds an empty list; {_JSON_LIST}")
    number = 1
    while True:
        value = text.value(number)
        where = f"{name}, item {number}"
        if not isinstance(value, dict):
            raise PromptError(f"{where}: {kind(value)}, but {_JSON_LIST}")
        yield where, value
        match text.peek():
            case ",":
                text.skip()
                number += 1
            case "]":
                break
            case "":
                raise text.error(f"the file ends before its list does, after item {number}; is it cut short?")
            case _:
                raise text.error(f"a comma or the list's end must follow item {number}; {_JSON_LIST}")
    text.skip()
    if text.peek():
        raise text.error(f"the file goes on after the list's end; {_JSON_LIST}")


# Conversations of ShareGPT

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "observation": "tool",
}


class NoQuestion(PromptError):
    """A conversation has no turn of the user, so there is nothing to answer."""


def is_conversation(turns: Sequence[Any]) -> bool:
    """Whether a list holds turns of ShareGPT's form, rather than messages with a role."""
    return bool(turns) and isinstance(turns[0], Mapping) and "from" in turns[0] and "role" not in turns[0]


def conversation_messages(turns: Sequence[Any], where: str) -> tuple[dict[str, str], ...]:
    """The messages of a ShareGPT conversation that ask for an answer: all up to the last of the user or of a tool.

    The assistant's turns after it are the recorded answer, which the model is to give itself.

    Args:
        turns: Objects with `from` and `value`.
        where: Place of the conversation, for error messages.

    Raises:
        NoQuestion: No turn is the user's.
        PromptError: A turn cannot be used.
    """
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise PromptError(f"{where}: turn {number} must be an object with 'from' and 'value', not {kind(turn)}")
        speaker = turn.get("from")
        if not isinstance(speaker, str):
            raise PromptError(
                f"{where}: turn {number} needs a 'from' that is text, such as 'human', not {kind(speaker)}"
            )
        role = _ROLES.get(speaker.strip().lower().replace("-", "_"))
        if role is None:
            raise PromptError(
                f"{where}: turn {number} is from {listed([speaker])}, whose role is unknown; "
                f"known are {', '.join(_ROLES)}"
            )
        if not isinstance(turn.get("value"), str):
            raise PromptError(f"{where}: turn {number} needs a 'value' that is text, not {kind(turn.get('value'))}")
        messages.append({"role": role, "content": turn["value"]})
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise NoQuestion(f"{where}: the conversation has no turn of the user ('from': 'human'); remove it")
    while roles[-1] not in ("user", "tool"):
        roles.pop()
    return tuple(messages[: len(roles)])


def without_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of a table, without the nulls that fill up its objects' missing fields.

    All objects of a table's column have the same fields; chat templates ask which ones a message has.
    """

    def pruned(value: Any) -> Any:
        if isinstance(value, list):
            return [pruned(item) for item in value]
        if isinstance(value, dict):
            return {key: pruned(item) for key, item in value.items() if item is not None or key == "content"}
        return value

    return {key: pruned(value) for key, value in record.items()}


# Datasets


def hub_records(source: str, name: str, fields: Fields) -> Iterator[Record]:
    """The rows of a dataset, streamed. It is looked up when this is called, and no code of its own is run.

    Args:
        source: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`, where the name is that of a dataset on the hub or
            a folder of data files. Without a split it is `train`, or the only one.
        name: The source in error messages.
        fields: The fields that rows need.
    """
    parts = source.removeprefix(HUB_PREFIX).split(":")
    if len(parts) > 3 or not all(parts):
        raise PromptError(f"{name} must be {_HUB_FORMS}")
    path, config, split = parts[0], parts[1] if len(parts) == 3 else None, parts[-1] if len(parts) > 1 else None
    if os.path.isfile(path):
        raise PromptError(f"{name} names a file; leave {HUB_PREFIX} out, or name the folder it is in")
    if not os.path.isdir(path) and (not _HUB_NAME.fullmatch(path) or path.startswith(".")):
        raise PromptError(f"{name} names no folder that is there, and no dataset of the hub; it must be {_HUB_FORMS}")
    if os.path.isdir(path):
        _check_folder(path, name)
    with _quiet():
        library = imported("datasets", "datasets", name)
    with _quiet(library):
        if int(library.__version__.partition(".")[0]) < 4:
            raise PromptError(
                f"{name} needs datasets 4 or newer, which runs no code of a dataset: pip install 'moescope[datasets]'"
            )
        dataset = _opened(library, path, config, split, name)
        columns = dataset.column_names
        if columns is not None:
            dataset = dataset.select_columns(chosen_columns(columns, fields, name))
    return _hub_rows(library, dataset, name)


def _check_folder(path: str, name: str) -> None:
    """Raise PromptError where `datasets` would read a part of a folder and say nothing of the rest."""
    if os.path.isfile(os.path.join(path, "README.md")):  # may say which files belong to it
        return
    suffixes = {os.path.splitext(file)[1].lower() for _, _, files in os.walk(path) for file in files}
    found = sorted(suffixes & {".jsonl", ".csv", ".parquet"})
    if len(found) > 1:
        raise PromptError(f"{name} holds files of several forms ({', '.join(found)}); keep one, or name the files")


def _opened(library: Any, path: str, config: str | None, split: str | None, name: str) -> Any:
    """One split of a dataset, as a stream."""
    try:
        splits = library.load_dataset(path, config, streaming=True)
    except Exception as error:
        configs = _configs(library, path) if isinstance(error, ValueError) else []
        if configs and config not in configs and (config is not None or len(configs) > 1):
            raise PromptError(
                f"{name} names no configuration of the dataset; it has {listed(configs)}; "
                f"name one: {HUB_PREFIX}NAME:CONFIG:SPLIT"
            ) from error
        if isinstance(error, StopIteration):
            raise PromptError(f"{name} {_NO_ROWS}") from error
        advice = "check the files in it" if os.path.isdir(path) else "check the name and the network"
        raise PromptError(f"{name} cannot be opened: {reason(error)}; {advice}") from error
    if split is None:
        split = "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None
    if split not in splits:
        raise PromptError(
            f"{name} names no split of the dataset; it has {listed(splits)}; name one: "
            f"{HUB_PREFIX}NAME:SPLIT or {HUB_PREFIX}NAME:CONFIG:SPLIT"
        )
    return splits[split]


def _configs(library: Any, path: str) -> list[str]:
    try:
        return list(library.get_dataset_config_names(path))
    except Exception:  # what failed before is told instead
        return []


def _hub_rows(library: Any, dataset: Any, name: str) -> Iterator[Record]:
    rows = iter(dataset)
    number = 0
    failed: Exception | None = None
    block: list[Mapping[str, Any]] = []
    while number == 0 or len(block) == _BATCH_ROWS:
        block = []
        with _quiet(library):
            try:
                block.extend(itertools.islice(rows, _BATCH_ROWS))
            except Exception as error:
                failed = error
        for row in block:
            number += 1
            check_size(row, f"{name}, row {number}")
            yield f"{name}, row {number}", without_nulls(row)
        if failed is not None:
            place = f" after row {number}" if number else ""
            raise PromptError(f"{name} cannot be read{place}: {reason(failed)}; check its files") from failed
        if not number:
            raise PromptError(f"{name} {_NO_ROWS}")


@contextmanager
def _quiet(library: Any = None) -> Iterator[None]:
    """Without the progress bars, log lines and warnings of datasets: what fails is told in one line, by its error."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", "fsspec")]
    levels = [logger.level for logger in loggers]
    bars = library is not None and not library.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL + 1)
            if bars:
                library.disable_progress_bars()
            yield
        finally:
            if bars:
                library.enable_progress_bars()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def reason(error: BaseException) -> str:
    """First line of an error's text, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
