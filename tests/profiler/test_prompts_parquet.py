"""Prompt sets of Parquet files."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_sets import refused, write

from moescope.profiler import prompt_parquet
from moescope.profiler.errors import PromptError
from moescope.profiler.prompts import Prompt, read_prompts

MESSAGE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def table(path: Path, columns: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def strings(*values: bytes) -> pa.Array:
    """A column of text that nobody has checked."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def test_every_kind_of_prompt(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}]
    path = table(
        tmp_path / "x.Parquet",
        {
            "prompt": ["é", None, None, None, None],
            "messages": pa.array([None, messages, None, None, None], MESSAGE),
            "prompt_token_ids": pa.array([None, None, [1, 2**31 - 1], None, None], pa.list_(pa.uint32())),
            "conversations": [None, None, None, [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], None],
            "text": pa.array([None, None, None, None, "t"], pa.large_string()),
            "domain": pa.array(["a", "b", None, "a", "a"]).dictionary_encode(),
            "image": pa.array([b"\xff"] * 5),
        },
    )
    assert list(read_prompts([path])) == [
        Prompt(text="é", domain="a", source=f"{path}, row 1"),
        Prompt(messages=tuple(messages), domain="b", source=f"{path}, row 2"),
        Prompt(token_ids=(1, 2**31 - 1), source=f"{path}, row 3"),
        Prompt(messages=({"role": "user", "content": "q"},), domain="a", source=f"{path}, row 4"),
        Prompt(text="t", domain="a", source=f"{path}, row 5"),
    ]


def test_named_columns(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", {"a.b": ["q"], "a": [{"b": "no"}], "label": [3], "prompt": ["x"]})
    prompts = read_prompts([path], prompt_field="a.b", domain_field="label")
    assert [(p.text, p.domain) for p in prompts] == [("q", "3")]


def test_nulls_that_fill_up_messages_are_dropped(tmp_path: Path) -> None:
    """All messages of a column have the same fields; a template would see a call of a tool in each."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    answer = {"role": "tool", "content": "2", "name": "f"}
    other = {"role": "assistant", "content": None, "tool_calls": [{"name": "g", "arguments": {"y": 1}}]}
    question = {"role": "user", "content": "Hi"}
    path = table(tmp_path / "x.parquet", {"messages": [[question, call, answer, other]]})
    assert [p.messages for p in read_prompts([path])] == [(question, call, answer, other)]


def test_batches_and_row_groups(tmp_path: Path) -> None:
    texts = [f"prompt {i}" for i in range(1000)]
    path = table(tmp_path / "x.parquet", {"prompt": texts}, row_group_size=300)
    prompts = list(read_prompts([path]))
    assert [p.text for p in prompts] == texts
    assert prompts[-1].source == f"{path}, row 1000"
    assert [p.text for p in read_prompts([path], limit=3)] == texts[:3]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_memory_does_not_grow_with_the_set(compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row group of 160 MB, and a column of as much that is not asked for, within 64 MB."""
    seed = np.random.default_rng(0)
    texts = [seed.bytes(4000).hex() for _ in range(10_000)]
    columns = {"prompt": texts * 2, "other": texts * 2}
    path = table(tmp_path / "x.parquet", columns, compression=compression, use_dictionary=False)
    del texts, columns
    monkeypatch.setattr(prompt_parquet, "MEMORY", 64 << 20)
    assert sum(1 for _ in read_prompts([path])) == 20_000


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"question": ["a"], "n": [1]}, {}, " has no column 'prompt', 'messages', 'prompt_token_ids', 'conversations' "
         "or 'text' but 'question', 'n'; name the prompt's column with --prompt-field"),
        ({}, {}, " has no column 'prompt', 'messages', 'prompt_token_ids', 'conversations' or 'text' but no field; "),
        ({"prompt": ["a"]}, {"prompt_field": "q"}, " has no column 'q' but 'prompt'; name one with --prompt-field"),
        ({"prompt": ["a"]}, {"domain_field": "q"}, " has no column 'q' but 'prompt'; name one with --domain-field"),
        ({"prompt": pa.array([], pa.string())}, {}, " holds columns but no rows; it must hold one prompt in each row"),
        ({"prompt": ["a", ""]}, {}, ", row 2: the prompt is empty; "),
        ({"prompt": ["a", None]}, {}, ", row 2: no 'prompt', 'messages' or 'prompt_token_ids' but 'prompt'; "),
        ({"prompt": ["a", None]}, {"prompt_field": "prompt"}, ", row 2: the prompt's field 'prompt' is null; "),
        ({"prompt": [1]}, {}, ", row 1: 'prompt' must be text, a list of messages or a list of token ids, not a num"),
        ({"prompt": [float("nan")]}, {}, ", row 1: 'prompt' must be text, a list of messages or a list of token ids, "),
        ({"prompt": [b"a"]}, {}, ", row 1: 'prompt' must be text, a list of messages or a list of token ids, not byt"),
        ({"prompt": [True]}, {}, ", row 1: 'prompt' must be text, a list of messages or a list of token ids, not tru"),
        ({"prompt": [[None, "a"]]}, {}, ", row 1: 'prompt' must be text, a list of messages or a list of token ids, n"),
        ({"prompt": pa.array([None], pa.null())}, {}, ", row 1: no 'prompt', 'messages' or 'prompt_token_ids' but "),
        ({"prompt": strings(b"ok", b"\xff")}, {}, ", row 2: a value cannot be used: 'utf-8' codec can't decode byte "
         "0xff in position 0: invalid start byte; mend or remove it"),
        ({"prompt": ["a"], "messages": [[{"role": "user", "content": "x"}]]}, {}, ", row 1: more than one prompt "),
        ({"messages": pa.array([[]], MESSAGE)}, {}, ", row 1: the list of messages is empty; "),
        ({"messages": pa.array([[None]], MESSAGE)}, {}, ", row 1: message 1 must be an object with 'role' a"),
        ({"messages": pa.array([[{"role": None}]], MESSAGE)}, {}, ", row 1: message 1 needs a 'role' that is text"),
        ({"messages": pa.array([[{"role": "user"}]], MESSAGE)}, {}, ", row 1: message 1 needs a 'content' that is tex"),
        ({"messages": ["a"]}, {}, ", row 1: 'messages' must be a list of messages, not text"),
        ({"conversations": [[{"from": "gpt", "value": "a"}]]}, {}, ", row 1: the conversation has no turn of the user"),
        ({"conversations": [[{"from": "human", "value": None}]]}, {}, ", row 1: turn 1 needs a 'value' that is text, "),
        ({"prompt_token_ids": [[1, None]]}, {}, ", row 1: token id 2 of 2 is null; token ids are"),
        ({"prompt_token_ids": [[1.0]]}, {}, ", row 1: token id 1 of 1 is a number; token ids are"),
        ({"prompt_token_ids": [[-1]]}, {}, ", row 1: token id 1 of 1 is -1; token ids are"),
        ({"prompt": ["a"], "domain": [float("nan")]}, {}, ", row 1: the domain 'domain' must be text, not a number"),
        ({"prompt": ["a"], "domain": [[None]]}, {}, ", row 1: the domain 'domain' must be text, not a list"),
    ],
)  # fmt: skip
def test_wrong_tables(columns: dict[str, Any], options: dict[str, str], message: str, tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", columns)
    assert refused(path, **options).startswith(path + message)


def test_a_column_there_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"]), path)
    assert refused(path) == f"{path} has more than one column 'prompt'; rename all but one"


@pytest.mark.parametrize("content", [b"", b'{"prompt": "a"}', b"\n", b"PAR"])
def test_not_parquet(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", content)
    what = "is not a Parquet file; save it as Parquet, or name it by the form it has"
    assert refused(path) == f"{path} {what if content else 'is empty; it must hold a Parquet table'}"


def test_damaged_files(tmp_path: Path) -> None:
    whole = Path(table(tmp_path / "whole.parquet", {"prompt": [f"prompt {i}" for i in range(5000)]})).read_bytes()
    path = tmp_path / "x.parquet"
    for end in (4, 5, 9, 1000, len(whole) // 2, len(whole) - 20, len(whole) - 1):
        write(path, whole[:end])
        assert refused(str(path)).startswith(f"{path} is damaged or cut short: ")
    for start in range(4, 2000, 200):
        write(path, whole[:start] + b"\xff" * 200 + whole[start + 200 :])
        assert refused(str(path)).startswith(f"{path} is damaged or cut short: ")


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "x.parquet", {"prompt": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PromptError) as caught:
        read_prompts([path])  # before anything is read
    assert str(caught.value) == (
        f"{path} needs the package 'pyarrow', which is not installed: pip install 'moescope[parquet]'"
    )
