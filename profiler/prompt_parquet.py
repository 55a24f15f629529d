"""Prompt sets of Parquet files, decoded by a process of its own whose memory is limited.

Small files unfold to any size, in many ways: a page that compresses well, a value of the dictionary that many items
name, a list of equal ids. What a file says of its sizes need not be true. So another process decodes it, Linux holds
that process to its limit, and rows come back that are no longer than a line of JSON may be.
"""

import contextlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, Final

from moescope.profiler.errors import PromptError
from moescope.profiler.prompt_forms import Record, imported, reason, without_nulls
from moescope.profiler.prompt_parts import Fields, check_size, chosen_columns

#: Bytes that decoding may take beside Python and its libraries: pages of 1,024 long documents fit.
MEMORY: Final = 2 << 30
_BATCH_ROWS: Final = 16
_PART: Final = 2**18  # bytes read at a time
_DECODE: Final = f"from {__name__} import decode; decode()"


def parquet_records(stream: BinaryIO, name: str, fields: Fields) -> Iterator[Record]:
    """The rows of a Parquet file, with the columns that prompts need.

    Args:
        stream: An open file of the system.
        name: The file in error messages.
        fields: The fields that rows need.

    Raises:
        PromptError: It is no Parquet file, damaged, lacks a column, or takes more memory than `MEMORY`.
    """
    magic = stream.read(4)
    if not magic:
        raise PromptError(f"{name} is empty; it must hold a Parquet table")
    if magic != b"PAR1":
        raise PromptError(f"{name} is not a Parquet file; save it as Parquet, or name it by the form it has")
    question = json.dumps([name, fields.prompt, fields.domain, MEMORY])
    environment = {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # others set aside more than they use,
        "MALLOC_MMAP_THRESHOLD_": str(1 << 22),  # and long texts would leave holes
    }
    read = 0
    with subprocess.Popen(
        [sys.executable, "-P", "-c", _DECODE, question],
        stdin=stream,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    ) as child:
        assert child.stdout is not None
        try:
            while (answer := pickle.load(child.stdout)) is not None:
                if isinstance(answer, str):
                    raise PromptError(answer)
                read += 1
                yield answer
        except (EOFError, pickle.UnpicklingError) as error:  # it was ended in the middle of its work
            raise PromptError(_too_large(name, read, MEMORY)) from error
        finally:
            child.kill()


def decode() -> None:
    """What the other process does: write each row to standard output, and None or an error's text at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    name, prompt, domain, memory = json.loads(sys.argv[1])
    with os.fdopen(os.dup(1), "wb") as answers, open(0, "rb") as stream, contextlib.suppress(BrokenPipeError):
        os.dup2(2, 1)  # what a library prints is no answer
        answer = partial(pickle.dump, file=answers)
        read = 0
        try:
            for record in _rows_of(stream, name, Fields(prompt, domain), memory):
                answer(record)
                read += 1
            answer(None)
        except PromptError as error:
            answer(str(error))
        except MemoryError:
            answer(_too_large(name, read, memory))


def _too_large(name: str, read: int, memory: int) -> str:
    return (
        f"{name}, after row {read}: reading on takes more than {memory / 2**30:.3g} GiB of memory; split or remove the "
        "longest prompts, or write the file with smaller pages"
    )


def _rows_of(stream: BinaryIO, name: str, fields: Fields, memory: int) -> Iterator[Record]:
    arrow = imported("pyarrow", "parquet", name)
    parquet = imported("pyarrow.parquet", "parquet", name)
    _limit(memory)
    try:
        # Read a column in pieces, not the whole of a row group.
        file = parquet.ParquetFile(stream, buffer_size=_PART, pre_buffer=False)
        columns = chosen_columns(file.schema_arrow.names, fields, name)
        if not file.metadata.num_rows:
            raise PromptError(f"{name} holds columns but no rows; it must hold one prompt in each row")
        number = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
            for row in _rows(batch, name, number):
                number += 1
                where = f"{name}, row {number}"
                check_size(row, where)
                yield where, without_nulls(row)
    except MemoryError:
        raise
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{name} is damaged or cut short: {reason(error)}; write it again") from error


def _limit(memory: int) -> None:
    """Let this process take so much more memory than it has; only Linux says what it has."""
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        wanted = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + memory
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (wanted if most < 0 else min(wanted, most), most))


def _rows(batch: Any, name: str, before: int) -> Iterator[dict[str, Any]]:
    """A batch's rows as Python objects, one at a time; `before` is how many rows precede it."""
    for index in range(batch.num_rows):
        try:
            yield from batch.slice(index, 1).to_pylist()
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date that Python has not
            where = f"{name}, row {before + index + 1}"
            raise PromptError(f"{where}: a value cannot be used: {reason(error)}; mend or remove it") from error
