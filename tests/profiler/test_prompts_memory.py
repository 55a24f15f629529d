"""Prompt sets made to fill memory: each form is read, or refused in one line, within a limit that the system holds."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_sets import refused

from moescope.profiler import prompt_parquet
from moescope.profiler.prompts import read_prompts

MB = 2**20
LONG = "longer than 16 MiB; split it into several prompts"
READ = """
import itertools, json, resource, sys
from moescope.profiler import prompt_parquet
from moescope.profiler.errors import PromptError
from moescope.profiler.prompts import read_prompts

source, memory, limit = json.loads(sys.argv[1])
prompt_parquet.MEMORY = memory or prompt_parquet.MEMORY
found = {"read": 0, "error": None}
try:
    for _ in read_prompts([source], limit=limit):
        found["read"] += 1
except PromptError as error:
    found["error"] = str(error)
found["children"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
with open("/proc/self/status") as file:  # the other figure begins with that of the process before
    found["self"] = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
print(json.dumps(found))
"""


def read(source: str, *, most: int | None = None, memory: int = 0, limit: int | None = None, **options: Any) -> Any:
    """What another process makes of a source: prompts, error, and its and its children's memory in MB.

    Args:
        source: The source.
        most: Bytes of addresses that the process, and each child, may have.
        memory: Bytes that decoding may take, instead of the usual.
        limit: Prompts to read.
        options: Of the process.
    """
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps([source, memory, limit])],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=None if most is None else lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
        **options,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Parquet


def value_of(size: int) -> pa.Array:
    """A column of one text."""
    buffers = [None, pa.py_buffer(np.array([0, size], np.int64)), pa.py_buffer(np.full(size, ord("a"), np.uint8))]
    return pa.Array.from_buffers(pa.large_string(), 1, buffers)


def repeated(text: str, rows: int) -> pa.Array:
    """A column whose rows all name one value of a dictionary."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([text]))


def one_list(items: pa.Array) -> pa.Array:
    """A column of one list."""
    return pa.ListArray.from_arrays(pa.array([0, len(items)], pa.int32()), items)


def table(path: Path, columns: dict[str, Any], **options: Any) -> str:
    fixed = {"compression": "zstd", "store_schema": False, "write_statistics": False}
    pq.write_table(pa.table(columns), path, **fixed, **options)
    return str(path)


def messages(rows: int, size: int) -> pa.Array:
    texts = [repeated("user", rows), repeated("a" * size, rows)]
    return one_list(pa.StructArray.from_arrays(texts, ["role", "content"]))


def test_a_value_of_one_gibibyte(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", {"prompt": value_of(2**30)}, use_dictionary=False)
    assert os.path.getsize(path) < 40_000
    found = read(path, most=4 << 30)
    assert found["error"] == (
        f"{path}, after row 0: reading on takes more than 2 GiB of memory; split or remove the longest prompts, or "
        "write the file with smaller pages"
    )
    assert found["self"] < 500
    assert found["children"] < 2300


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"prompt": lambda: value_of(300 * MB)}, {"use_dictionary": False}),
        ({"prompt": lambda: value_of(300 * MB)}, {}),
        ({"prompt": lambda: repeated("a" * (300 * MB), 50)}, {}),
        ({"prompt_token_ids": lambda: one_list(pa.array(np.zeros(60_000_000, np.int8)))}, {}),
        ({"messages": lambda: messages(5000, MB)}, {}),
    ],
    ids=["a page", "a page with a dictionary", "a dictionary", "a list of ids", "messages of a dictionary"],
)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_small_files_that_unfold(columns: dict[str, Any], options: Any, version: str, tmp_path: Path) -> None:
    made = {name: make() for name, make in columns.items()}
    path = table(tmp_path / "x.parquet", made, data_page_version=version, **options)
    del made
    assert os.path.getsize(path) < 50_000
    found = read(path, memory=400 * MB)
    assert found["read"] == 0
    assert "after row 0: reading on takes more than 0.391 GiB of memory" in found["error"]
    assert found["self"] < 500
    assert found["children"] < 700


def test_many_rows_that_name_one_long_value_are_read(tmp_path: Path) -> None:
    """1 GB of text from a file of some KB."""
    path = table(tmp_path / "x.parquet", {"prompt": repeated("a" * (4 * MB + 1), 250)})
    assert os.path.getsize(path) < 10_000
    found = read(path, memory=400 * MB)
    assert (found["read"], found["error"]) == (250, None)
    assert found["self"] < 500
    assert found["children"] < 600


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": ["a", "a" * (16 * MB + 1)]},
        {"prompt_token_ids": pa.ListArray.from_arrays([0, 1, 8 * MB + 2], pa.array(np.ones(8 * MB + 2, np.int8)))},
        {"messages": [[{"role": "user", "content": "x"}], [{"role": "user", "content": "a" * MB}] * 17]},
    ],
    ids=["text", "ids", "messages"],
)
def test_a_row_that_is_longer_than_a_line_may_be(columns: dict[str, Any], tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", columns)
    assert refused(path) == f"{path}, row 2 is {LONG}"


@pytest.mark.parametrize("shape", ["columns", "row groups"])
def test_many_columns_or_row_groups(shape: str, tmp_path: Path) -> None:
    if shape == "columns":
        path = table(tmp_path / "x.parquet", {**{f"c{i}": ["x"] for i in range(10_000)}, "prompt": ["a"]})
    else:
        path = table(tmp_path / "x.parquet", {"prompt": ["a"] * 10_000}, row_group_size=1)
    found = read(path, memory=300 * MB)
    assert (found["read"], found["error"]) == (1 if shape == "columns" else 10_000, None)
    assert found["children"] < 400


def test_a_process_that_is_ended_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "x.parquet", {"prompt": ["a"]})
    monkeypatch.setattr(prompt_parquet, "_DECODE", "import os; os.abort()")
    assert refused(path).startswith(f"{path}, after row 0: reading on takes more than 2 GiB of memory; ")


def test_no_process_is_left(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", {"prompt": ["a" * 1000] * 10_000})

    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    prompts = read_prompts([path])
    next(prompts)
    assert len(children() - before) == 1
    del prompts
    assert children() == before


# The other forms, fed without an end


@contextlib.contextmanager
def endless(path: Path, head: bytes, more: bytes) -> Iterator[str]:
    """A file that begins so, and then goes on for ever."""
    os.mkfifo(path)

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), open(path, "wb", buffering=0) as file:
            file.write(head)
            while True:
                file.write(more)

    thread = threading.Thread(target=feed)
    thread.start()
    yield str(path)
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("suffix", "head", "message"),
    [
        (".txt", b"", ": the text is longer than 16 MiB"),
        (".jsonl", b'{"prompt": "', ", line 1 is longer than 16 MiB"),
        (".json", b'[{"prompt": "', ", item 1 is longer than 16 MiB"),
        (".csv", b"prompt\n", ", line 2 is longer than 16 MiB"),
        (".csv", b"", ", line 1 is longer than 16 MiB"),
    ],
)
def test_a_value_without_an_end(suffix: str, head: bytes, message: str, tmp_path: Path) -> None:
    with endless(tmp_path / f"x{suffix}", head, b"a" * MB) as path:
        found = read(path, most=1 << 30)
    assert found["error"].startswith(path + message)
    assert found["self"] < 400


def test_a_quote_that_is_left_open(tmp_path: Path) -> None:
    with endless(tmp_path / "x.csv", b'prompt\n"', (b"a" * 99 + b"\n") * 10_000) as path:
        found = read(path, most=1 << 30)
    assert found["error"].startswith(f"{path}, line 2: the record is longer than 16 MiB; is a quote left open?")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("item", ["[],", "{},", "0,", '"",'])
def test_json_of_many_small_values(suffix: str, item: str, tmp_path: Path) -> None:
    """As long as a line may be: what it unfolds to is bounded, too."""
    text = f'{{"prompt": [{(item * (15 * MB // len(item)))[:-1]}]}}'
    (tmp_path / f"x{suffix}").write_text(f"[{text}]" if suffix == ".json" else text)
    found = read(str(tmp_path / f"x{suffix}"), most=3 << 30)
    assert (found["read"], bool(found["error"])) == ((1, False) if item == "0," else (0, True))
    assert found["self"] < 2000


def test_a_header_of_many_columns(tmp_path: Path) -> None:
    header = ",".join(f"{i:x}" for i in range(2_500_000))
    (tmp_path / "x.csv").write_text(f"{header}\n")
    found = read(str(tmp_path / "x.csv"), most=3 << 30)
    assert "has no column 'prompt' or 'text' but '0', '1', " in found["error"]
    assert found["self"] < 1500


# Datasets


def test_a_row_of_a_dataset_is_held_to_the_same_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    table(tmp_path / "data" / "x.parquet", {"prompt": ["a", "a" * (17 * MB)]})
    found = read(f"hf:{tmp_path / 'data'}")
    assert (found["read"], found["error"]) == (1, f"hf:{tmp_path / 'data'}, row 2 is {LONG}")
