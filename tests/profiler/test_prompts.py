"""Prompt sets: every reader, every refusal, and how much of a source is read."""

import io
import json
import os
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prompt_sets import refused, write

from moescope.profiler.errors import OptionError, PromptError
from moescope.profiler.prompts import MAX_BYTES, READERS, Prompt, as_prompts, read_prompts

MIB = 2**20
TEXT_FORMS = sorted(set(READERS) - {".parquet"})
KNOWN = ".txt, .jsonl, .json, .csv or .parquet"


class Endless(io.RawIOBase):
    """A pipe: a head, then one byte for ever; counts what is read and cannot seek."""

    def __init__(self, head: bytes = b"", rest: bytes = b"x") -> None:
        self.head = io.BytesIO(head)
        self.rest = rest
        self.taken = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        assert size >= 0, "an unbounded read"
        data = self.head.read(size) or self.rest * size
        self.taken += len(data)
        return data

    def readline(self, size: int | None = -1) -> bytes:
        assert size is not None and size >= 0, "an unbounded readline"  # noqa: PT018
        data = self.head.readline(size)
        if not data.endswith(b"\n"):
            data += (self.rest * (size - len(data))) if self.rest != b"\n" else b"\n"
        self.taken += len(data)
        return data

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation("seek")


class Pipe(io.RawIOBase):
    """Standard input that cannot seek and hands out a few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.data.readinto(memoryview(buffer)[:7])


def pipe(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(Pipe(data))


# Sources


@pytest.mark.parametrize(
    "text",
    [
        "Why is the sky blue?",
        "either / or",
        "what is http://example.org like",
        "ends with a dot.",
        "two lines,\nthe second a name.txt",
        "version 2.5",
        "word",
        "é" * 5000,
    ],
)
def test_text_is_text(text: str) -> None:
    assert list(read_prompts([text])) == [Prompt(text=text, source="prompt argument 1")]


@pytest.mark.parametrize(
    "name", ["none.jsonl", "none.TXT", "none with spaces.csv", "and/or", "/no/where", "./x", "a.txt/b", "dir/x.unknown"]
)
def test_a_name_of_no_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "x")
    with pytest.raises(PromptError) as caught:
        read_prompts(["text", name])  # before anything is read
    assert str(caught.value) == f"No such file: {name}"


def test_a_name_on_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "two\nlines.jsonl", '{"prompt": 3}')
    assert refused(path).startswith(f"{path!a}, line 1: 'prompt' must be text")


def test_sources_in_order_and_without_reading_ahead(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": 3}')
    second = write(tmp_path / "b.TXT", "four")
    third = write(tmp_path / "c.csv", "prompt,domain\nfive,x\n")
    assert [p.text for p in read_prompts([second, "text", third, first], limit=5)] == [
        "four", "text", "five", "one", "two"
    ]  # fmt: skip
    assert [p.text for p in read_prompts([second], limit=7)] == ["four"]
    assert "line 3" in refused(first, limit=3)


def test_limit_stops_reading() -> None:
    stream = Endless(b'{"prompt": "a"}\n' * 3)
    assert len(list(read_prompts(["-"], limit=3, stdin=stream))) == 3
    assert stream.taken == 48


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_is_positive(limit: int) -> None:
    with pytest.raises(OptionError, match=f"^--limit must be at least 1, not {limit}$"):
        read_prompts(["x"], limit=limit)


def test_no_sources() -> None:
    assert refused() == f"no prompts: give text, files ({KNOWN}), hf:NAME or - for standard input"


def test_standard_input_only_once() -> None:
    assert refused("-", "x", "-", stdin=pipe(b"x")).startswith("- (standard input) is given more than once")


def test_directory(tmp_path: Path) -> None:
    folder = tmp_path / "set.jsonl"
    folder.mkdir()
    assert refused(str(folder)) == f"{folder} is a directory; name a file in it ({KNOWN})"


@pytest.mark.parametrize(("name", "found"), [("x.xml", "an unknown suffix .xml"), ("x", "no suffix")])
def test_unknown_suffix(name: str, found: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, "[]")
    assert refused(path) == f"{path} has {found}; prompt files are {KNOWN}"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file of Linux that opens but cannot be read")
@pytest.mark.parametrize("suffix", READERS)
def test_file_that_cannot_be_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"memory{suffix}"
    path.symlink_to("/proc/self/mem")
    assert refused(str(path)) == f"{path} cannot be read: Input/output error"


@pytest.mark.parametrize("suffix", READERS)
def test_file_that_goes_away(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"gone{suffix}", "x")
    prompts = read_prompts([path])
    os.remove(path)
    with pytest.raises(PromptError, match=r"gone.* cannot be read: No such file or directory$"):
        next(prompts)


@pytest.mark.parametrize("suffix", TEXT_FORMS)
@pytest.mark.parametrize("content", [b"", b"\n\r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_empty_file(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / f"x{suffix}", content)
    assert refused(path).startswith(f"{path} is empty; it must hold ")


@pytest.mark.parametrize("suffix", TEXT_FORMS)
@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b'prompt\n{"prompt": "caf\xe9"}\n', "line 2: byte 16 is 0xe9, which is not UTF-8; save it as UTF-8 text"),
        (b"\xff\xfea\0b\0", "line 1: byte 1 is 0xff, which is not UTF-8; save it as UTF-8 text"),
        (b"prompt\n\nab\0\n", "line 3: byte 3 is NUL, which no text holds; save it as UTF-8 text"),
        (b"\xef\xbb\xbf\0", "line 1: byte 4 is NUL, which no text holds; save it as UTF-8 text"),
    ],
)
def test_not_utf8(suffix: str, content: bytes, place: str, tmp_path: Path) -> None:
    content = content.replace(b"prompt\n", b"\n") if suffix == ".jsonl" else content
    path = write(tmp_path / f"x{suffix}", content)
    assert refused(path) == f"{path}, {place}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", "é"),
        ("x.jsonl", '{"prompt": "é"}'),
        ("x.csv", "prompt\né"),
        ("y.csv", '"prompt"\né'),
        ("x.json", '[{"prompt": "é"}]'),
    ],
)
def test_byte_order_mark(name: str, content: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
    assert [p.text for p in read_prompts([path])] == ["é"]


# Bounded reading


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_ten_gigabytes_without_a_line_ending(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"huge{suffix}"
    with open(path, "wb") as file:
        file.truncate(10 * 2**30)
    tracemalloc.start()
    try:
        message = refused(str(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "longer than 16 MiB; " in message
    assert message.startswith(f"{path}: the text is" if suffix == ".txt" else f"{path}, line 1 is")
    assert peak < 4 * MAX_BYTES


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "standard input: the text is longer than 16 MiB"),
        (b"\n\n\n", "standard input: the text is longer than 16 MiB"),
        (b"one\ntwo\n", "standard input: the text is longer than 16 MiB"),
        (b'{"prompt": "', "standard input, line 1 is longer than 16 MiB"),
        (b'{"prompt": "a"}\n{"prompt": "', "standard input, line 2 is longer than 16 MiB"),
        (b'\n\n\n{"prompt": "', "standard input, line 4 is longer than 16 MiB"),
    ],
)
def test_endless_line(head: bytes, message: str) -> None:
    stream = Endless(head)
    assert refused("-", stdin=stream).startswith(message)
    assert stream.taken <= MAX_BYTES + 1 + len(head)


def test_endless_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescope.profiler.prompts.MAX_BYTES", 1000)
    stream = Endless(rest=b"\n")
    assert refused("-", stdin=stream).startswith("standard input: the text is longer than")
    assert stream.taken == 1001


@pytest.mark.parametrize("blank", [0, 10])
@pytest.mark.parametrize("over", [0, 1])
def test_longest_line(blank: int, over: int) -> None:
    line = json.dumps({"prompt": "x" * (MAX_BYTES - 14 + over)}).encode()
    assert len(line) == MAX_BYTES + over
    stdin = io.BytesIO(b"\n" * blank + line)
    if over:
        assert refused("-", stdin=stdin).startswith(f"standard input, line {blank + 1} is longer than 16 MiB")
    else:
        assert [len(p.text or "") for p in read_prompts(["-"], stdin=stdin)] == [MAX_BYTES - 14]


@pytest.mark.parametrize("over", [0, 1])
def test_longest_document(over: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", b"ab\n" * (MAX_BYTES // 3) + b"c" * (MAX_BYTES % 3 + over))
    if over:
        assert refused(path).startswith(f"{path}: the text is longer than 16 MiB; split it")
    else:
        assert [p.size for p in read_prompts([path])] == [MAX_BYTES]


def test_csv_quote_left_open(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", b'prompt\nfine\n"open\n' + b"line\n" * (4 * MIB))
    assert refused(path) == f"{path}, line 3: the record is longer than 16 MiB; is a quote left open?"


def test_csv_field_of_many_characters(tmp_path: Path) -> None:
    text = "line\n" * 100_000
    path = write(tmp_path / "x.csv", f'prompt\n"{text}"\n"{text}"\n')
    assert [p.text for p in read_prompts([path])] == [text, text]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_memory_does_not_grow_with_the_set(suffix: str, tmp_path: Path) -> None:
    text = "word " * 30
    line = json.dumps({"prompt": text}) if suffix == ".jsonl" else text
    path = write(tmp_path / f"x{suffix}", ("prompt\n" if suffix == ".csv" else "") + f"{line}\n" * 100_000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_prompts([path]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 100_000
    assert peak < MIB < os.path.getsize(path) / 10


# Text documents and standard input


@pytest.mark.parametrize(
    ("content", "text"),
    [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("\n a\r\nb ", "\n a\r\nb "), ("{}", "{}")],
)
def test_text_document(content: str, text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", content)
    assert list(read_prompts([path])) == [Prompt(text=text, source=path)]


@pytest.mark.parametrize("text", ["one document\nof two lines", "\n\n  leading", '"quoted"', "[1]", "x\n{}", "\ufeffx"])
def test_text_from_standard_input(text: str) -> None:
    prompts = list(read_prompts(["-"], stdin=pipe(text.encode() + b"\n")))
    assert prompts == [Prompt(text=text.removeprefix("\ufeff"), source="standard input")]


@pytest.mark.parametrize("before", ["", "\n", " \r\n\n", "\ufeff", "\ufeff\n"])
def test_jsonl_from_standard_input(before: str) -> None:
    lines = before + '  {"prompt": "a", "domain": "d"}\n\n{"prompt": 3}'
    prompts = read_prompts(["-"], stdin=pipe(lines.encode()))
    number = before.count("\n") + 1
    assert next(prompts) == Prompt(text="a", domain="d", source=f"standard input, line {number}")
    with pytest.raises(PromptError, match=f"^standard input, line {number + 2}: "):
        next(prompts)


def test_standard_input_is_streamed() -> None:
    stream = Endless(b'{"prompt": "a"}\n' * 2)
    prompts = read_prompts(["-"], stdin=stream)
    assert stream.taken == 0
    assert next(prompts).text == "a"
    assert stream.taken == 16


@pytest.mark.parametrize("data", [b"", b"\n\n \n"])
def test_empty_standard_input(data: bytes) -> None:
    assert refused("-", stdin=pipe(data)) == "standard input is empty; it must hold text"


def test_the_process_own_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe(b"hello")))
    assert [p.text for p in read_prompts(["-"])] == ["hello"]


def test_standard_input_that_cannot_be_read() -> None:
    class Broken(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    assert refused("-", stdin=Broken()) == "standard input cannot be read: Input/output error"


# JSONL


def jsonl(tmp_path: Path, *lines: Any) -> str:
    return write(tmp_path / "x.jsonl", "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_jsonl_prompts(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        {"prompt": "a\u2028b", "domain": " law "},
        "",
        {"messages": MESSAGES, "prompt": None, "domain": None},
        {"prompt_token_ids": [0, 5, 2**31 - 1], "domain": 7},
        {"text": "t", "messages": None},
        {"prompt": "p", "text": "ignored"},
        {"prompt": [1, 2]},
        {"prompt": MESSAGES},
    )
    prompts = list(read_prompts([path]))
    assert [(p.text, p.messages, p.token_ids, p.domain) for p in prompts] == [
        ("a\u2028b", None, None, "law"),
        (None, tuple(MESSAGES), None, "default"),
        (None, None, (0, 5, 2**31 - 1), "7"),
        ("t", None, None, "default"),
        ("p", None, None, "default"),
        (None, None, (1, 2), "default"),
        (None, tuple(MESSAGES), None, "default"),
    ]
    assert [p.source for p in prompts] == [f"{path}, line {number}" for number in (1, 3, 4, 5, 6, 7, 8)]
    assert [p.size for p in prompts[:3]] == [3, len("rolesystemcontentBe brief.roleusercontentHi"), 12]


def test_jsonl_line_endings(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", b'{"prompt": "a"}\r\n{"prompt": "b"}')
    assert [p.text for p in read_prompts([path])] == ["a", "b"]


def test_named_fields(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"q": "a", "prompt": "x", "subject": "s", "domain": "d"}, {"q": MESSAGES, "subject": None})
    prompts = list(read_prompts([path], prompt_field="q", domain_field="subject"))
    assert [(p.text, p.messages, p.domain) for p in prompts] == [
        ("a", None, "s"),
        (None, tuple(MESSAGES), "default"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", ", column 2: not JSON (Expecting property name enclosed in double quotes); each line must"),
        ('{"prompt": "a"', ", column 15: not JSON (Expecting ',' delimiter); each line must be one JSON object"),
        ('{"prompt": "a"} {}', ", column 17: not JSON (Extra data)"),
        ('{"prompt": "a\tb"}', ", column 14: not JSON (Invalid control character at)"),
        ("{", ", column 2: not JSON (Expecting property name"),
        ('["a"]', ': a list, but a line must be a JSON object such as {"prompt": "…"}'),
        ('"a"', ": text, but a line must be a JSON object"),
        ("3", ": a number, but a line must be a JSON object"),
        ("null", ": null, but a line must be a JSON object"),
        ("[" * 200_000, ": the JSON is nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", ": not usable as JSON (Exceeds the limit (4300 digits)"),
    ],
)
def test_malformed_lines(line: str, message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "fine"}, line)
    assert refused(path).startswith(f"{path}, line 2{message}")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "n": 1}, "no 'prompt', 'messages' or 'prompt_token_ids' but 'question', 'n'; "
         "name the prompt's field with --prompt-field"),
        ({}, "no 'prompt', 'messages' or 'prompt_token_ids' but no field; "),
        ({str(i): 0 for i in range(11)}, "no 'prompt', 'messages' or 'prompt_token_ids' but "
         "'0', '1', '2', '3', '4', '5', '6', '7', 3 more; "),
        ({"x" * 41: 0}, f"no 'prompt', 'messages' or 'prompt_token_ids' but '{'x' * 39}…'; "),
        ({"prompt": "a", "messages": MESSAGES}, "more than one prompt ('prompt', 'messages'); keep one or name it"),
        ({"prompt": ""}, "the prompt is empty; give it text or remove it"),
        ({"prompt": " \n"}, "the prompt is empty; "),
        ({"prompt": 3}, "'prompt' must be text, a list of messages or a list of token ids, not a number"),
        ({"prompt": True}, "'prompt' must be text, a list of messages or a list of token ids, not true"),
        ({"prompt": {}}, "'prompt' must be text, a list of messages or a list of token ids, not an object"),
        ({"prompt": []}, "'prompt' must be text, a list of messages or a list of token ids, not an empty list"),
        ({"prompt": ["a"]}, "'prompt' must be text, a list of messages or a list of token ids, not a list of some"),
        ({"prompt": "a\0"}, "character 2 of the text is NUL; remove it"),
        ('{"prompt": "a\\ud800"}', "character 2 of the text is '\\ud800', half of a surrogate pair; text must be"),
        ({"messages": "Hi"}, "'messages' must be a list of messages, not text"),
        ({"messages": MESSAGES[0]}, "'messages' must be a list of messages, not an object"),
        ({"messages": []}, "the list of messages is empty; it needs at least one message"),
        ({"messages": ["Hi"]}, "message 1 must be an object with 'role' and 'content', not text"),
        ({"messages": [*MESSAGES, {"content": "a"}]}, "message 3 needs a 'role' that is text, such as 'user'"),
        ({"messages": [{"role": 1, "content": "a"}]}, "message 1 needs a 'role' that is text, such as 'user'"),
        ({"messages": [{"role": " ", "content": "a"}]}, "message 1 needs a 'role' that is text, such as 'user'"),
        ({"messages": [{"role": "user"}]}, "message 1 needs a 'content' that is text or a list of parts, not null"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 needs a 'content' that is text or a list of par"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "message 1 needs a 'content' that is text or a list of"),
        ({"messages": [{"role": "user", "content": "a\0"}]}, "character 2 of the text is NUL; remove it"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\0"}]}]}, "character 1 of the text is"),
        ({"prompt_token_ids": "1 2"}, "'prompt_token_ids' must be a list of token ids, not text"),
        ({"prompt_token_ids": []}, "the list of token ids is empty; it needs at least one token id"),
        ({"prompt_token_ids": [1, -1]}, "token id 2 of 2 is -1; token ids are whole numbers from 0 to 2147483647"),
        ({"prompt_token_ids": [2**31]}, "token id 1 of 1 is 2147483648; token ids are"),
        ({"prompt_token_ids": [10**100]}, "token id 1 of 1 is a number; token ids are"),
        ({"prompt_token_ids": [1, True]}, "token id 2 of 2 is true; token ids are"),
        ({"prompt_token_ids": [False]}, "token id 1 of 1 is false; token ids are"),
        ({"prompt_token_ids": [1.0]}, "token id 1 of 1 is a number; token ids are"),
        ({"prompt_token_ids": ["1"]}, "token id 1 of 1 is text; token ids are"),
        ({"prompt_token_ids": [None]}, "token id 1 of 1 is null; token ids are"),
        ({"prompt": "a", "domain": ""}, "the domain's name is empty; name it or leave the field out"),
        ({"prompt": "a", "domain": " \t"}, "the domain's name is empty; name it or leave the field out"),
        ({"prompt": "a", "domain": "d" * 201}, "the domain's name has 201 characters, at most 200 are allowed; "),
        ({"prompt": "a", "domain": "a\tb"}, "the domain's name holds the control character '\\t'; remove it"),
        ({"prompt": "a", "domain": "a\x1b[1m"}, "the domain's name holds the control character '\\x1b'; remove it"),
        ({"prompt": "a", "domain": "a\u2028b"}, "the domain's name holds the control character '\\u2028'; "),
        ({"prompt": "a", "domain": "\ud800"}, "the domain's name holds the control character '\\ud800'; "),
        ({"prompt": "a", "domain": True}, "the domain 'domain' must be text, not true"),
        ({"prompt": "a", "domain": ["x"]}, "the domain 'domain' must be text, not a list"),
    ],
)  # fmt: skip
def test_wrong_records(record: Any, message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "fine"}, record)
    assert refused(path).startswith(f"{path}, line 2: {message}")


def test_longest_domain(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "a", "domain": " " + "é" * 200})
    assert [p.domain for p in read_prompts([path])] == ["é" * 200]


def test_messages_without_content_that_call_tools(tmp_path: Path) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    path = jsonl(tmp_path, {"messages": messages}, {"messages": parts})
    assert [p.messages for p in read_prompts([path])] == [tuple(messages), tuple(parts)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_field": "q"}, "the prompt's field 'q' is missing; there is 'prompt', 'n'; name one with --prompt-f"),
        ({"prompt_field": "n"}, "the prompt's field 'n' is null; there is 'prompt', 'n'; name one with --prompt-f"),
        ({"domain_field": "s"}, "the domain's field 's' is missing; there is 'prompt', 'n'; name one with --domain-f"),
    ],
)
def test_wrong_field_names(options: dict[str, str], message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"prompt": "a", "n": None})
    assert refused(path, **options).startswith(f"{path}, line 1: {message}")


# CSV


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_csv(ending: str, tmp_path: Path) -> None:
    text = f'domain, prompt ,n{ending}law,"a, ""b""",1{ending}{ending} x ,"c\nd",2{ending}x,é,3'
    path = write(tmp_path / "x.csv", text)
    assert list(read_prompts([path])) == [
        Prompt(text='a, "b"', domain="law", source=f"{path}, line 2"),
        Prompt(text="c\nd", domain="x", source=f"{path}, line 4"),
        Prompt(text="é", domain="x", source=f"{path}, line 6"),
    ]


def test_csv_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,subject,prompt\na,s,b\n")
    assert [(p.text, p.domain) for p in read_prompts([path])] == [("b", "default")]
    prompts = read_prompts([path], prompt_field="text", domain_field="subject")
    assert [(p.text, p.domain) for p in prompts] == [("a", "s")]
    assert [p.text for p in read_prompts([write(tmp_path / "y.csv", "text\na\n")])] == ["a"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("Why?,law\nHow?,law\n", {}, " has no column 'prompt' or 'text' but 'Why?', 'law'; it needs a header row"),
        ("prompt;domain\na;b\n", {}, " has no column 'prompt' or 'text' but 'prompt;domain'; it needs a header row"),
        ("prompt\na\n", {"prompt_field": "q"}, " has no column 'q' but 'prompt'; name one with --prompt-field"),
        ("prompt\na\n", {"domain_field": "q"}, " has no column 'q' but 'prompt'; name one with --domain-field"),
        ("prompt,prompt\na,b\n", {}, " has more than one column 'prompt'; rename all but one"),
        ("prompt,domain,domain\na,b,c\n", {}, " has more than one column 'domain'; rename all but one"),
        ("prompt,domain\n", {}, " holds a header row but no prompts; it must hold one prompt in each row"),
        ("prompt,domain\na,b\n\nc, d, e\n", {}, ", line 4: 3 fields where the header has 2; put fields that hold co"),
        ("prompt,domain\na\n", {}, ", line 2: 1 fields where the header has 2; put fields that hold commas or line"),
        ("prompt,domain\n,b\n", {}, ", line 2: the prompt is empty; "),
        ("prompt,domain\na,\n", {}, ", line 2: the domain's name is empty; "),
        ('prompt\na\n"open\nb\n', {}, ", line 3: not CSV (unexpected end of data); fields are separated by commas"),
        ('prompt\n"a"b\n', {}, ", line 2: not CSV (',' expected after '\"'); fields are separated by commas"),
        ("prompt\ra\rb", {}, ", line 1: not CSV (new-line character seen in unquoted field); fields are"),
    ],
)
def test_wrong_csv(content: str, options: dict[str, str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", content)
    assert refused(path, **options).startswith(path + message)


# Python objects


def test_as_prompts() -> None:
    given = Prompt(token_ids=(1,), domain="d", source="mine")
    prompts = list(
        as_prompts(
            [
                "none.jsonl",
                {"prompt": "b", "domain": "x"},
                given,
                {"prompt_token_ids": np.array([3, 4])},
                {"prompt_token_ids": (np.int32(5), 6)},
                {"messages": tuple(MESSAGES)},
            ]
        )
    )
    assert prompts == [
        Prompt(text="none.jsonl", source="prompt 1"),
        Prompt(text="b", domain="x", source="prompt 2"),
        given,
        Prompt(token_ids=(3, 4), source="prompt 4"),
        Prompt(token_ids=(5, 6), source="prompt 5"),
        Prompt(messages=tuple(MESSAGES), source="prompt 6"),
    ]
    assert {type(token_id) for p in prompts for token_id in p.token_ids or ()} == {int}


def test_as_prompts_streams() -> None:
    def texts() -> Iterator[str]:
        yield "a"
        raise AssertionError("read ahead")

    assert next(as_prompts(texts())).text == "a"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("text", "prompts must be a list of prompts, not one str; put it in a list"),
        ({"prompt": "a"}, "prompts must be a list of prompts, not one dict; put it in a list"),
        (["a", 3], "prompt 2 must be text, a mapping or a Prompt, not int"),
        (["a", None], "prompt 2 must be text, a mapping or a Prompt, not NoneType"),
        (["a", ""], "prompt 2: the prompt is empty; give it text or remove it"),
        ([{"prompt_token_ids": np.array([True])}], "prompt 1: token id 1 of 1 is true; token ids are"),
        ([{"prompt_token_ids": {1}}], "prompt 1: 'prompt_token_ids' must be a list of token ids, not set"),
    ],
)
def test_wrong_objects(items: Any, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        list(as_prompts(items))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("parts", [{}, {"text": "a", "token_ids": (1,)}])
def test_a_prompt_is_one_thing(parts: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=r"^here: a prompt is exactly one of text, messages and token ids$"):
        Prompt(**parts, source="here")
