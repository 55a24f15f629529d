"""Prompt sets of JSON lists, and ShareGPT's conversations in every form."""

import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from prompt_sets import refused, write

from moescope.profiler.errors import PromptError
from moescope.profiler.prompt_forms import json_records
from moescope.profiler.prompt_parts import decoded_parts
from moescope.profiler.prompts import MAX_BYTES, Prompt, as_prompts, read_prompts

LIST = 'a .json file must be one list of objects such as [{"prompt": "…"}]'
USER = {"from": "human", "value": "Hi"}
ANSWER = {"from": "gpt", "value": "Hello"}


def as_file(path: Path, items: Any, **options: Any) -> str:
    return write(path, json.dumps(items, **options))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("part", [1, 7, 2**20])
def test_a_list_of_records(part: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescope.profiler.prompt_forms._PART", part)
    messages = [{"role": "user", "content": 'brackets ]}, and "quotes" \\'}]
    items = [
        {"prompt": "é\u2028 😀", "domain": "a", "score": 1234567890, "more": [[], {}, None, True, -1.5e3]},
        {"messages": messages, "prompt": None},
        {"prompt_token_ids": [1, 22, 333]},
        {"text": "t", "domain": 3},
    ]
    path = as_file(tmp_path / "x.JSON", items, indent=indent, ensure_ascii=False)
    assert list(read_prompts([path])) == [
        Prompt(text="é\u2028 😀", domain="a", source=f"{path}, item 1"),
        Prompt(messages=tuple(messages), source=f"{path}, item 2"),
        Prompt(token_ids=(1, 22, 333), source=f"{path}, item 3"),
        Prompt(text="t", domain="3", source=f"{path}, item 4"),
    ]


def test_named_fields(tmp_path: Path) -> None:
    path = as_file(tmp_path / "x.json", [{"instruction": "a", "prompt": "x", "topic": "s"}])
    prompts = read_prompts([path], prompt_field="instruction", domain_field="topic")
    assert [(p.text, p.domain) for p in prompts] == [("a", "s")]
    assert refused(path, prompt_field="question").startswith(f"{path}, item 1: the prompt's field 'question' is missin")


def test_only_what_is_asked_for_is_parsed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", '[{"prompt": "a"}, {"prompt": "b"}, nonsense')
    assert [p.text for p in read_prompts([path], limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", f" holds an empty list; {LIST}"),
        ('{"prompt": "a"}', f" holds an object, but {LIST}; one object in each line is a .jsonl file"),
        ('{"prompt": "a"}\n{"prompt": "b"}', f" holds an object, but {LIST}; one object in each line is a .jsonl file"),
        ('\n "a"', f", line 2, column 2: not a list, but {LIST}"),
        ("null", f", line 1, column 1: not a list, but {LIST}"),
        ("{'a'}", f" holds an object, but {LIST}"),
        ('["a"]', f", item 1: text, but {LIST}"),
        ('[{"prompt": "a"}, 3]', f", item 2: a number, but {LIST}"),
        ("[NaN]", f", item 1: a number, but {LIST}"),
        ("[null]", f", item 1: null, but {LIST}"),
        ("[[[]]]", f", item 1: a list, but {LIST}"),
        ('[{"prompt": "a"},\n]', f", line 2, column 1: not JSON (Expecting value); {LIST}"),
        ("[", f", line 1, column 2: not JSON (Expecting value); {LIST}"),
        ('[\n  {"prompt": "a"},\n  {"prompt": "b', ", line 3, column 14: not JSON (Unterminated string start"),
        ('[{"prompt": "a"}, {"prompt": tru', f", line 1, column 30: not JSON (Expecting value); {LIST}"),
        ('[{"prompt": "a"}', ", line 1, column 17: the file ends before its list does, after item 1; is it cut short?"),
        ('[{"prompt": "a"},\n', f", line 2, column 1: not JSON (Expecting value); {LIST}"),
        ('[{"prompt": "a"}\n {"prompt": "b"}]', ", line 2, column 2: a comma or the list's end must follow item 1; "),
        ('[{"prompt": "a"}]\n]', f", line 2, column 1: the file goes on after the list's end; {LIST}"),
        ('[{"prompt": "a"}][{"prompt": "a"}]', ", line 1, column 18: the file goes on after the list's end; "),
        (
            "[{'prompt': 'a'}]" + " " * 40,
            ", line 1, column 3: not JSON (Expecting property name enclosed in double quo",
        ),
        ('[{"prompt": "a\tb"}]', ", line 1, column 15: not JSON (Invalid control character at); "),
        ("[" * 200_000, ", item 1: the JSON is nested too deeply"),
        ('[{"a": ' + "1" * 5000 + "}]", ", item 1: not usable as JSON (Exceeds the limit (4300 digits)"),
        ('[{"prompt": ""}]', ", item 1: the prompt is empty; give it text or remove it"),
        (
            '[{"prompt": NaN}]',
            ", item 1: 'prompt' must be text, a list of messages or a list of token ids, not a number",
        ),
        ('[{"prompt": null, "text": null}]', ", item 1: no 'prompt', 'messages' or 'prompt_token_ids' but 'prompt', "),
        (
            '[{"prompt": [null]}]',
            ", item 1: 'prompt' must be text, a list of messages or a list of token ids, not a li",
        ),
        ('[{"messages": [null]}]', ", item 1: message 1 must be an object with 'role' and 'content', not null"),
        ('[{"prompt": "a", "domain": NaN}]', ", item 1: the domain 'domain' must be text, not a number"),
    ],
)
@pytest.mark.parametrize("part", [3, 2**20])
def test_malformed(part: int, content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescope.profiler.prompt_forms._PART", part)
    path = write(tmp_path / "x.json", content)
    assert refused(path).startswith(path + message)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b'[{"prompt": "caf\xe9"}]', "line 1: byte 17 is 0xe9, which is not UTF-8"),
        (b'[\n{"prompt": "\xc3\xa9\xe9"}]', "line 2: byte 15 is 0xe9, which is not UTF-8"),
        (b'[{"prompt": "a"}]\n\xf0\x9f', "line 2: byte 1 is 0xf0, which is not UTF-8"),
        ('[{"prompt": "a"}]'.encode("utf-16"), "line 1: byte 1 is 0xff, which is not UTF-8"),
        ('[{"prompt": "a"}]'.encode("utf-16-be"), "line 1: byte 1 is NUL, which no text holds"),
        (b'[{"prompt": "\xc3\xa9\0"}]', "line 1: byte 16 is NUL, which no text holds"),
    ],
)
@pytest.mark.parametrize("part", [1, 2, 5, 2**20])
def test_not_utf8(part: int, content: bytes, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescope.profiler.prompt_forms._PART", part)
    path = write(tmp_path / "x.json", content)
    assert refused(path) == f"{path}, {place}; save it as UTF-8 text"


@pytest.mark.parametrize("part", [1, 2, 3, 4, 100])
def test_text_in_parts(part: int) -> None:
    text = "\ufeffa\né😀\n\ufeff\u2028z"
    stream = io.BytesIO(text.encode())
    assert "".join(decoded_parts(iter(lambda: stream.read(part), b""), "x")) == text[1:]


@pytest.mark.parametrize("over", [0, 1])
def test_longest_item(over: int, tmp_path: Path) -> None:
    item = {"prompt": "x" * (MAX_BYTES - 14 + over)}
    path = as_file(tmp_path / "x.json", [{"prompt": "a"}, item])
    if over:
        assert refused(path) == f"{path}, item 2 is longer than 16 MiB; split it into several prompts"
    else:
        assert [len(p.text or "") for p in read_prompts([path])] == [1, MAX_BYTES - 14]


@pytest.mark.parametrize(("head", "rest"), [(b'[{"prompt": "', b"x"), (b'[{"a": [', b"1, ")])
def test_an_item_without_end_is_read_no_further_than_its_bound(head: bytes, rest: bytes) -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size: int = -1) -> bytes:
            data = rest * (size // len(rest)) if self.taken else head
            self.taken += len(data)
            assert self.taken < 3 * MAX_BYTES
            return data

    with pytest.raises(PromptError, match=r"^x, item 1 is longer than 16 MiB; split it into several prompts$"):
        next(json_records(Endless(), "x"))


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    item = json.dumps({"prompt": "word " * 30})
    path = write(tmp_path / "x.json", "[" + ",\n".join([item] * 100_000) + "]")
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_prompts([path]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 100_000
    assert peak < 2 * 2**20 < os.path.getsize(path) / 7


# ShareGPT


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": value} for speaker, value in pairs]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (turns(("human", "a")), "user:a"),
        (turns(("human", "a"), ("gpt", "b")), "user:a"),
        (turns(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"), ("gpt", "e")), "user:a assistant:b user:c"),
        (turns(("system", "s"), ("User", "a"), ("chatgpt", "b")), "system:s user:a"),
        (turns(("gpt", "a"), ("human", "b")), "assistant:a user:b"),
        (turns(("human", "a"), ("bot", "b"), ("function-response", "c"), ("gpt", "d")), "user:a assistant:b tool:c"),
        (turns(("human", "a"), ("assistant", "b"), ("system", "c")), "user:a"),
    ],
)
def test_sharegpt(given: list[dict[str, str]], expected: str, tmp_path: Path) -> None:
    record = {"id": "x_0", "conversations": given, "domain": "d"}
    lines = write(tmp_path / "x.jsonl", json.dumps(record))
    path = as_file(tmp_path / "x.json", [record])
    for prompts in (read_prompts([path]), read_prompts([lines]), as_prompts([record])):
        (prompt,) = prompts
        assert prompt.domain == "d"
        assert " ".join(f"{m['role']}:{m['content']}" for m in prompt.messages or ()) == expected


def test_conversations_stand_back(tmp_path: Path) -> None:
    """Other fields say better what the prompt is, and an option says best."""
    messages = [{"role": "user", "content": "m"}, {"role": "assistant", "content": "kept"}]
    path = as_file(
        tmp_path / "x.json",
        [
            {"prompt": "p", "conversations": [USER]},
            {"text": "t", "conversations": [USER]},
            {"conversations": messages},
            {"messages": [USER, ANSWER]},
        ],
    )
    user = ({"role": "user", "content": "Hi"},)
    assert [p.text or p.messages for p in read_prompts([path])] == ["p", user, tuple(messages), user]
    named = as_file(tmp_path / "y.json", [{"dialogue": [USER, ANSWER], "prompt": "p"}])
    assert [p.messages for p in read_prompts([named], prompt_field="dialogue")] == [user]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Hi", "'conversations' must be a list of messages, not text"),
        (USER, "'conversations' must be a list of messages, not an object"),
        (["Hi"], "message 1 must be an object with 'role' and 'content', not text"),
        ([USER, "Hi"], "turn 2 must be an object with 'from' and 'value', not text"),
        ([USER, None], "turn 2 must be an object with 'from' and 'value', not null"),
        ([USER, {"value": "a"}], "turn 2 needs a 'from' that is text, such as 'human', not null"),
        ([USER, {"from": 3, "value": "a"}], "turn 2 needs a 'from' that is text, such as 'human', not a number"),
        ([USER, {"from": "dog", "value": "a"}], "turn 2 is from 'dog', whose role is unknown; known are human, user, "),
        ([USER, {"from": "gpt"}], "turn 2 needs a 'value' that is text, not null"),
        ([{"from": "human", "value": ["a"]}], "turn 1 needs a 'value' that is text, not a list"),
        ([{"from": "human", "value": "a\0"}], "character 2 of the text is NUL; remove it"),
        ([ANSWER], "the conversation has no turn of the user ('from': 'human'); remove it"),
        ([], "the conversation has no turn of the user ('from': 'human'); remove it"),
    ],
)
def test_wrong_conversations(given: Any, message: str, tmp_path: Path) -> None:
    path = as_file(tmp_path / "x.json", [{"prompt": "fine"}, {"conversations": given}])
    assert refused(path).startswith(f"{path}, item 2: {message}")


def test_conversations_that_ask_nothing_are_left_out_by_one_who_is_told(tmp_path: Path) -> None:
    records = [{"conversations": given} for given in ([], [USER], [ANSWER])]
    path = as_file(tmp_path / "x.json", records)
    lines = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, records)))
    places: list[str] = []
    assert len(list(read_prompts([path, lines], left_out=places.append))) == 2
    assert places == [f"{path}, item 1", f"{path}, item 3", f"{lines}, line 1", f"{lines}, line 3"]
    assert refused(as_file(tmp_path / "y.json", [{"messages": []}]), left_out=places.append).endswith(
        "item 1: the list of messages is empty; it needs at least one message"
    )
