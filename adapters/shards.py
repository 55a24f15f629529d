"""Safetensors files as untrusted data: headers checked in full, tensors read piece by piece into memory of their own.

Nothing is mapped and no file stays open: a piece is read when it is asked for, and belongs to whoever asked.
"""

import json
import math
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor

from moescope.profiler.errors import ModelError

#: Element types that can be read, by their name in the files.
DTYPES: Final = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_MAX_HEADER: Final = 100_000_000  # the limit of the format
_MAX_JSON: Final = 256 << 20
_MAX_SHOWN: Final = 200
#: Bits of an element, for every element type whose tensors can be told apart in a file.
BITS: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


def shown(name: str) -> str:
    """A name out of a file, fit for one line of a terminal."""
    name = name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}…"
    return name if name.isprintable() else ascii(name)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: Its name.
        label: Its file, as errors name it.
        file: Its file.
        dtype: Element type as the file names it.
        shape: Its shape.
        offset: Byte of the file at which it begins.
    """

    name: str
    label: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def refuse(self, what: str) -> ModelError:
        """The error that names this tensor and its file."""
        return ModelError(f"{self.label}: tensor {shown(self.name)} {what}")

    def read(self, first: int, count: int, pieces: int = 1, pitch: int = 0) -> Tensor:
        """Read `pieces` runs of `count` elements that begin `pitch` elements apart; only these bytes are read.

        Args:
            first: Element at which the first run begins, counted over the flattened tensor.
            count: Elements of a run.
            pieces: Number of runs.
            pitch: Elements from the start of one run to the next.

        Returns:
            (pieces, count) in the stored dtype, in memory of its own.

        Raises:
            ModelError: The file cannot be read, or became shorter since it was opened.
        """
        shape = (pieces, count)
        if pitch == count:
            count, pieces = count * pieces, 1
        return self._runs(first, count, pieces, pitch).view(DTYPES[self.dtype]).reshape(shape)

    def raw(self, first: int, count: int) -> Tensor:
        """Read `count` elements from `first` on, of whatever dtype, as bytes.

        Returns:
            (bytes,) uint8, in memory of its own.

        Raises:
            ModelError: As `read`.
        """
        return self._runs(first, count, 1, 0)

    def _runs(self, first: int, count: int, pieces: int, pitch: int) -> Tensor:
        width = BITS[self.dtype] // 8
        buffer = torch.empty(pieces * count * width, dtype=torch.uint8)
        view = buffer.numpy().data
        try:
            with self.file.open("rb", buffering=0) as stream:
                for piece in range(pieces):
                    stream.seek(self.offset + (first + piece * pitch) * width)
                    left = view[piece * count * width : (piece + 1) * count * width]
                    while left:
                        done = stream.readinto(left)
                        if not done:
                            raise self.refuse("ends early: the file became shorter while it was read")
                        left = left[done:]
        except OSError as error:
            raise self.refuse(f"cannot be read: {error.strerror}") from error
        return buffer


class OpenFiles:
    """Files that stay open for many small reads, by any thread, until the `with` block ends."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all of them."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read_into(self, tensor: StoredTensor, first: int, out: memoryview) -> None:
        """Fill `out` with a tensor's bytes from element `first` on; only these bytes are read.

        Args:
            tensor: Where to read.
            first: Element to begin with, counted over the flattened tensor.
            out: Bytes to fill.

        Raises:
            ModelError: The file cannot be read, or became shorter since it was opened.
        """
        position = tensor.offset + first * (BITS[tensor.dtype] // 8)
        try:
            with self._opening:
                descriptor = self._descriptors.get(tensor.file)
                if descriptor is None:
                    descriptor = self._descriptors[tensor.file] = os.open(tensor.file, os.O_RDONLY | os.O_CLOEXEC)
            while out:
                done = os.preadv(descriptor, [out], position)
                if not done:
                    raise tensor.refuse("ends early: the file became shorter while it was read")
                out = out[done:]
                position += done
        except OSError as error:
            raise tensor.refuse(f"cannot be read: {error.strerror}") from error


class Shards:
    """The safetensors files of a folder: `model.safetensors`, else those of the index, else all there are.

    Args:
        folder: The checkpoint.
        model: Its name in errors.

    Raises:
        ModelError: There are no safetensors files, the index names files outside the folder, or a file that has to be
            read for its names is damaged.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self._folder = folder.resolve()
        self._model = model
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self._named: dict[str, set[str]] = {}  # shard -> names the index puts there
        self._where: dict[str, str] = {}
        if (folder / _SINGLE).exists():
            self._take([_SINGLE])
        elif (folder / _INDEX).exists():
            self._where = self._read_index()
            for name, shard in self._where.items():
                self._named.setdefault(shard, set()).add(name)
        else:
            self._take(sorted(file.name for file in folder.glob("*.safetensors")))
        if not self._where:
            raise ModelError(f"{model} has no weights in safetensors files")

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors, as the index or, without one, the files give them."""
        return self._where.keys()

    @property
    def files(self) -> list[str]:
        """Names of the files that hold these tensors, in order."""
        return sorted(set(self._where.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def find(self, name: str) -> StoredTensor:
        """Where a tensor lies; the header of its file is checked the first time one of its tensors is asked for.

        Raises:
            ModelError: The file is missing, damaged, or lacks the tensor.
        """
        return self._header(self._where[name])[name]

    def held(self, shard: str) -> list[StoredTensor]:
        """The tensors of one of `files`, in the order in which they lie there.

        Raises:
            ModelError: The file is missing or damaged.
        """
        found = (tensor for name, tensor in self._header(shard).items() if name in self._where)
        return sorted(found, key=lambda tensor: tensor.offset)

    def samples(self, shard: str, size: int) -> tuple[int, tuple[bytes, ...]]:
        """What tells one of `files` from another: its bytes in all, its header, and `size` bytes at three places.

        Raises:
            ModelError: The file is missing, damaged or cannot be read.
        """
        tensors = self._header(shard).values()
        start = min((tensor.offset for tensor in tensors), default=0)
        file, label = self._inside(shard), f"{self._model}/{shard}"
        whole = _size(file, label)
        try:
            with file.open("rb") as stream:
                parts = [stream.read(start)]
                for place in (start, start + (whole - start) // 2, max(start, whole - size)):
                    stream.seek(place)
                    parts.append(stream.read(size))
        except OSError as error:
            raise ModelError(f"{label}: {error.strerror}") from error
        return whole, tuple(parts)

    def read_bytes(self, name: str, limit: int = _MAX_JSON) -> bytes:
        """Read a small file of the checkpoint.

        Raises:
            ModelError: It is missing, leaves the folder, or has more bytes than `limit`.
        """
        return _read_bytes(self._inside(name), f"{self._model}/{name}", limit)

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a small JSON file of the checkpoint.

        Raises:
            ModelError: It is missing, leaves the folder, is too large, or holds no JSON object.
        """
        return _parse(self.read_bytes(name), f"{self._model}/{name}")

    def _read_index(self) -> dict[str, str]:
        label = f"{self._model}/{_INDEX}"
        where = self.read_json(_INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
            raise ModelError(f"{label}: weight_map does not give one file name for each tensor")
        for shard in set(where.values()):
            if (
                shard != PurePosixPath(shard).as_posix()
                or PurePosixPath(shard).is_absolute()
                or ".." in PurePosixPath(shard).parts
                or not shard.isprintable()
                or "\\" in shard
                or not shard.endswith(".safetensors")
            ):
                raise ModelError(f"{label}: {shown(shard)} is not the name of a safetensors file inside the folder")
        return where

    def _take(self, files: list[str]) -> None:
        for file in files:
            for name in self._header(file):
                if name in self._where:
                    raise ModelError(
                        f"{self._model}/{file}: tensor {shown(name)} is in {self._where[name]} as well"
                        f" and there is no {_INDEX} to say which holds"
                    )
                self._where[name] = file

    def _inside(self, name: str) -> Path:
        """The real file behind a name; a hub cache's snapshot links to blobs beside it, all else must stay inside."""
        try:
            file = (self._folder / name).resolve()
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{self._model}/{name}: a symbolic link that leads nowhere") from error
        roots = [self._folder]
        repository = self._folder.parent.parent
        if self._folder.parent.name == "snapshots" and repository.name.startswith("models--"):
            roots += [repository / "blobs", repository.parent / "blobs"]
        if not any(file.is_relative_to(root) for root in roots):
            raise ModelError(f"{self._model}/{name}: a symbolic link that leaves the folder")
        return file

    def _header(self, shard: str) -> dict[str, StoredTensor]:
        if shard not in self._headers:
            label = f"{self._model}/{shard}"
            header = _read_header(self._inside(shard), label)
            for name in header:
                if self._named and self._where.get(name, shard) != shard:
                    raise ModelError(
                        f"{label}: tensor {shown(name)} is here, but {_INDEX} puts it in {self._where[name]}"
                    )
            for name in sorted(self._named.get(shard, set()) - header.keys())[:1]:
                raise ModelError(f"{label}: tensor {shown(name)} is not here, although {_INDEX} says so")
            self._headers[shard] = header
        return self._headers[shard]


def _size(file: Path, label: str) -> int:
    try:
        status = file.stat()
    except OSError as error:
        raise ModelError(
            f"{label}: {'no such file' if isinstance(error, FileNotFoundError) else error.strerror}"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{label}: not a regular file")
    return status.st_size


def _read_bytes(file: Path, label: str, limit: int) -> bytes:
    size = _size(file, label)
    if size > limit:
        raise ModelError(f"{label}: {size} bytes are too many for such a file")
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelError(f"{label}: {error.strerror}") from error


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(twice)} stands there twice")
    return found


def _parse(data: bytes, label: str) -> dict[str, Any]:
    try:
        found = json.loads(data.decode(), object_pairs_hook=_pairs)
    except RecursionError as error:
        raise ModelError(f"{label}: nested too deeply") from error
    except ValueError as error:
        raise ModelError(f"{label}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{label}: holds no JSON object")
    return found


def _read_header(file: Path, label: str) -> dict[str, StoredTensor]:
    """Parse a header and check that its tensors tile the rest of the file without gap or overlap."""
    size = _size(file, label)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise ModelError(
                    f"{label}: its header claims {length} bytes of a file of {size}:"
                    f" cut short, damaged or no safetensors file"
                )
            data = stream.read(length)
    except OSError as error:
        raise ModelError(f"{label}: {error.strerror}") from error
    entries = _parse(data, label)
    entries.pop("__metadata__", None)
    start = 8 + length
    found = {name: _read_entry(name, entry, label, file, start) for name, entry in entries.items()}
    expected = start
    for tensor, end in sorted(found.values(), key=lambda pair: (pair[0].offset, pair[1])):
        if tensor.offset != expected:
            raise tensor.refuse("does not begin where the one before it ends")
        if end > size:
            raise tensor.refuse(f"ends at byte {end}, but the file has {size}: cut short or damaged")
        expected = end
    if expected != size:
        raise ModelError(f"{label}: {size - expected} bytes after the last tensor")
    return {name: tensor for name, (tensor, _) in found.items()}


def _read_entry(name: str, entry: Any, label: str, file: Path, start: int) -> tuple[StoredTensor, int]:
    """A tensor and the byte of the file at which it ends."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ModelError(f"{label}: tensor {shown(name)} has no usable dtype, shape and data_offsets")
    tensor = StoredTensor(name, label, file, dtype, tuple(shape), start + offsets[0])
    size = offsets[1] - offsets[0]
    if size < 0 or (dtype in BITS and size != tensor.size):
        raise tensor.refuse(f"has {size} bytes, which is not {shown(dtype)} of shape {shape}")
    return tensor, start + offsets[1]


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
